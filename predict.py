"""Find people in images: pictures with their skeletons, and COCO results.

    python predict.py --weights runs/train/best.pt photo.jpg "holiday/*.jpg" frames/
    python predict.py --weights yolo_nas_pose_n.pth --model n a.jpg --results found.json

Owns the search for files, and turning photos upright by EXIF, which COCO's json ignores.
In Python: predict(*load_model("best.pt"), [Image.open("photo.jpg")]).
"""
import argparse
import glob
import json
import os
import re
import sys
import time

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from data import UNREADABLE, fit_image, to_rgb
from draw import contact_sheet, draw_people, save_picture, write_file
from evaluate import check_places, load_model, look, parse, people_in, to_coco


def predict(model: nn.Module, file: dict, images: list[Image.Image], conf: float = 0.3,
            iou: float = 0.7) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """People in each image, the best 300: boxes (D, 4) px, scores (D,), keypoints (D, K, 3).

    model and file are load_model's. Keypoints are x px, y px and a score. px are of the image and
    continuous: pixel i covers [i, i + 1). The EXIF tag turns photos upright first. iou is the
    largest NMS overlap of two people.
    """
    if not images:
        return []
    images = [ImageOps.exif_transpose(image) for image in images]
    fitted = [fit_image(to_rgb(image), file["image_size"], file["pad"]) for image in images]
    out, _ = look(model, torch.stack([torch.from_numpy(x).permute(2, 0, 1) for x, _ in fitted]))
    found = []
    for b, (image, (_, matrix)) in enumerate(zip(images, fitted)):
        boxes, scores, keypoints = people_in(out, b, matrix, conf, iou, 2000, 300)
        found.append((boxes.clip(0, image.size * 2), scores, keypoints))  # width, height, twice
    return found


def find_images(sources: list[str]) -> list[str]:
    """The files that sources (files, folders without subfolders, patterns) name; frame 2 before 10.

    Raises ValueError for a source without any.
    """
    suffixes = tuple(s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN)
    files = []
    for source in sources:
        inside = os.path.join(glob.escape(source), "*") if os.path.isdir(source) else source
        found = [source] if os.path.isfile(source) else [
            path for path in glob.glob(inside) if path.lower().endswith(suffixes)]
        if not found:
            raise ValueError(f"{source}: no image there; expected a file, a folder with images in "
                             f"it (of folders in it give a quoted pattern, DIR/*/*), or a pattern")
        files += sorted(found, key=lambda path: [int(part) if part.isdecimal() else part
                                                 for part in re.split(r"(\d+)", path)])
    return list(dict.fromkeys(files))


def out_names(files: list[str]) -> dict[str, str]:
    """{file: name of its picture}: a.jpg, or a_2.jpg, ... if another one is a.jpg (or A.jpg)."""
    names, taken = {}, {"sheet.jpg"}
    for path in files:
        stem, n = os.path.splitext(os.path.basename(path))[0], 1
        while (name := f"{stem}_{n}.jpg" if n > 1 else f"{stem}.jpg").lower() in taken:
            n += 1
        names[path] = name
        taken.add(name.lower())
    return names


def parse_args() -> argparse.Namespace:
    """Read this script's flags, as evaluate.parse does."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                usage="%(prog)s --weights FILE SOURCE ... [flags]")
    p.add_argument("source", nargs="+", metavar="SOURCE", help="images, folders, quoted patterns")
    p.add_argument("--out", default="runs/predict", metavar="DIR", help="folder of the pictures; "
                   "two files called a become a.jpg and a_2.jpg; default: %(default)s")
    p.add_argument("--results", metavar="FILE", help="write COCO results, one per person; image_id "
                   "is the file's name if all are numbers, else its place, from 0; file_name is "
                   "the path as given, category_id 1; keypoints are pixel indices as in COCO, 0.5 "
                   "less than those of predict(); box is not shifted")
    p.add_argument("--sheet", action="store_true", help="put the first 16 pictures on sheet.jpg")
    args = parse(p, None, 0.3, 8)
    check_places(p, [args.results], [args.weights], new=args.out)
    return args


def main() -> None:
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        files = find_images(args.source)
        paths = {f: os.path.join(args.out, name) for f, name in out_names(files).items()}
        written = [*paths.values(), os.path.join(args.out, "sheet.jpg"), args.results or args.out]
        written = {os.path.realpath(path).lower() for path in written}  # a.jpg may be A.JPG
        clash = [f for f in files if os.path.realpath(f).lower() in written]
        if clash:
            raise ValueError(f"a picture or json could replace {clash[0]} (where a is A); give "
                             f"another --out or --results")
        model, file = load_model(args.weights, args.model, args.image_size, args.pad)
        skeleton = file["skeleton"]
        os.makedirs(args.out, exist_ok=True)
        if not os.access(args.out, os.W_OK):
            raise ValueError(f"{args.out} is read-only; give another --out")
    except (ValueError, OSError) as error:
        sys.exit(f"predict.py: {str(error).splitlines()[-1]}")
    model = model.fuse().to(device, memory_format=torch.channels_last)
    stems = [os.path.splitext(os.path.basename(f))[0] for f in files]
    numbered = all(s.isdecimal() for s in stems) and len(set(map(int, stems))) == len(files)
    ids = {f: int(s) if numbered else i for i, (f, s) in enumerate(zip(files, stems))}
    results, sheet, best, bad, start = [], [], 0.0, 0, time.monotonic()
    for first in range(0, len(files), args.batch_size):
        images = {}
        for path in files[first:first + args.batch_size]:
            try:
                with Image.open(path) as image:
                    images[path] = to_rgb(ImageOps.exif_transpose(image))
            except UNREADABLE as error:
                bad += 1
                print(f"{path} cannot be read, skipped: {error}", file=sys.stderr, flush=True)
        found = predict(model, file, list(images.values()), 0.0, args.iou)
        for path, (boxes, scores, keypoints) in zip(images, found):
            best, n = max([best, *scores[:1]]), (scores >= args.conf).sum()
            picture = draw_people(images[path], boxes[:n], keypoints[:n], skeleton["names"],
                                  skeleton["edges"], skeleton["flip"], scores[:n])
            picture.thumbnail((65_500, 65_500))  # no JPEG is larger
            save_picture(paths[path], picture, quality=92)
            sheet += [picture] if len(sheet) < 16 else []
            results += [{**result, "box": box, "file_name": path} for box, result in zip(
                boxes.tolist(), to_coco(ids[path], 1, scores[:n], keypoints[:n]))]
        done = min(first + args.batch_size, len(files))
        if done == len(files) or sys.stdout.isatty():
            print(f"{done}/{len(files)} images  {done / (time.monotonic() - start):.1f} img/s",
                  end="\n" if done == len(files) else "\r", flush=True)
    if args.results:
        write_file(args.results, json.dumps(results))
    if args.sheet and sheet:
        save_picture(os.path.join(args.out, "sheet.jpg"), contact_sheet(
            [ImageOps.pad(picture, (480, 480)) for picture in sheet], 4), quality=88)
    hint = f"--conf {args.conf}" + f", the best score {best:.3f}" * (best > 0 and not results)
    print(f"{len(results)} people in {len(files) - bad} images ({hint}); pictures in {args.out}")
    if bad:
        sys.exit(f"predict.py: {bad} of {len(files)} files cannot be read; they are named above")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a full disk
        sys.exit(f"predict.py: {error}")
