"""Find people in images: pictures with their skeletons, and COCO results.

    python predict.py --weights runs/train/best.pt photo.jpg "holiday/*.jpg" frames/
    python predict.py --weights yolo_nas_pose_n.pth --model n photo.jpg --json found.json

Owns which files are meant, and that photos stand upright (EXIF), which COCO's json ignores.
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

from data import (COCO_EDGES, COCO_NAMES, PAD_MODES, UNREADABLE, Skeleton, fit_image,
                  read_skeleton, to_rgb, undo)
from draw import contact_sheet, draw_people, write_text
from evaluate import input_of, load_model, select, to_coco, to_input
from model import decode


@torch.no_grad()
def predict(model: nn.Module, file: dict, images: list[Image.Image], conf: float = 0.3,
            iou: float = 0.7) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """People in each image, best first: boxes (D, 4) px, scores (D,), keypoints (D, K, 3).

    model and file are load_model's. Keypoints are x, y, px, and a score; px of the image,
    continuous: pixel i covers [i, i + 1). iou is the largest overlap of two people.
    """
    fitted = [fit_image(to_rgb(image), *input_of(file)) for image in images]
    x = torch.stack([torch.from_numpy(pixels).permute(2, 0, 1) for pixels, _ in fitted])
    out, found = decode(model(to_input(x, model))), []                       # x (B, 3, S, S) uint8
    for i, (image, (_, matrix)) in enumerate(zip(images, fitted)):
        kept = select(out.boxes[i], out.scores[i], conf, iou)                             # (D,)
        boxes, scores, xy, kpt_scores = (t[i, kept].double().cpu().numpy() for t in out)
        boxes = undo(boxes.reshape(-1, 2, 2), matrix).clip(0, image.size).reshape(-1, 4)
        keypoints = np.concatenate([undo(xy, matrix), kpt_scores[..., None]], -1)      # (D, K, 3)
        found.append((boxes, scores, keypoints))
    return found


def find_images(sources: list[str]) -> list[str]:
    """The files of images, folders (not of folders in them) and patterns; frame 2 before frame 10.

    Raises ValueError for a source without any.
    """
    suffixes = tuple(s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN)
    files = []
    for source in sources:
        if os.path.isdir(source):
            inside = [os.path.join(source, name) for name in os.listdir(source)]
            found = [path for path in inside if path.lower().endswith(suffixes)]
        else:
            found = [source] if os.path.isfile(source) else glob.glob(source)
        if not found:
            raise ValueError(f"{source}: no image; expected a file, a folder or a pattern of them")
        files += sorted(found, key=lambda path: [int(part) if part.isdigit() else part
                                                 for part in re.split(r"(\d+)", path)])
    return list(dict.fromkeys(files))


def out_names(files: list[str]) -> dict[str, str]:
    """{file: name of its picture}: a.jpg, and where another is called so a_2.jpg, a_3.jpg, ..."""
    names = {"": "sheet.jpg"}
    for path in files:
        stem, n = os.path.splitext(os.path.basename(path))[0], 1
        while (name := f"{stem}_{n}.jpg" if n > 1 else f"{stem}.jpg") in names.values():
            n += 1
        names[path] = name
    del names[""]
    return names


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; exit with code 2 and one line of advice if a value cannot work."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("source", nargs="+", metavar="SOURCE", help="images, folders, quoted patterns")
    p.add_argument("--weights", required=True, metavar="FILE",
                   help="checkpoint of train.py, or an official one")
    p.add_argument("--model", choices=["n", "s", "m", "l"], help="for an official checkpoint")
    p.add_argument("--out", default="runs/predict", metavar="DIR", help="default: runs/predict")
    p.add_argument("--json", metavar="FILE", help="write COCO results, one a person; image_id is "
                   "the file's name if all are numbers, else its place, counted from 0")
    p.add_argument("--sheet", action="store_true", help="also the first 16 pictures on a sheet.jpg")
    p.add_argument("--conf", type=float, default=0.3, help="smallest person score; default: 0.3")
    p.add_argument("--iou", type=float, default=0.7, help="largest overlap of two; default: 0.7")
    p.add_argument("--batch-size", type=int, default=8, help="images at a time; default: 8")
    p.add_argument("--image-size", type=int, help="px; default: the checkpoint's, else 640")
    p.add_argument("--pad", choices=PAD_MODES, help="default: the checkpoint's, else bottom_right")
    args = p.parse_args(argv)
    if args.image_size is not None and (args.image_size % 32 or args.image_size < 32):
        p.error(f"--image-size {args.image_size} must be a multiple of 32, the largest stride")
    if args.batch_size < 1 or not (0 <= args.conf <= 1 and 0 <= args.iou <= 1):
        p.error("--batch-size must be positive, --conf and --iou in 0 to 1")
    if args.json and not os.path.isdir(os.path.dirname(args.json) or "."):
        p.error(f"--json {args.json}: there is no folder {os.path.dirname(args.json)}")
    return args


def draw_all(found: dict[str, tuple], images: dict[str, Image.Image], skeleton: Skeleton,
             paths: dict[str, str]) -> list[Image.Image]:
    """Write each image with its people to paths; small ones enlarged, or nothing could be seen."""
    pictures = []
    for file, (boxes, scores, keypoints) in found.items():
        image = images[file]
        zoom = max(1, 480 / max(image.size))
        if zoom > 1:
            image = image.resize([max(round(zoom * side), 1) for side in image.size])
        pictures.append(draw_people(image, zoom * boxes, keypoints * (zoom, zoom, 1),
                                    skeleton.names, skeleton.edges, scores))
        pictures[-1].save(paths[file], quality=92)
    return pictures


def main() -> None:
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        files = find_images(args.source)
        paths = {f: os.path.join(args.out, name) for f, name in out_names(files).items()}
        clash = {*map(os.path.realpath, files)} & {*map(os.path.realpath, paths.values())}
        if clash:
            raise ValueError(f"the picture would replace {min(clash)}; give another --out")
        model, file = load_model(args.weights, args.model)
        os.makedirs(args.out, exist_ok=True)
    except (ValueError, OSError) as error:
        sys.exit(f"predict.py: {str(error).splitlines()[-1]}")
    model = model.fuse().to(device, memory_format=torch.channels_last)
    size, pad = input_of(file)
    file["args"] |= {"image_size": args.image_size or size, "val_pad": args.pad or pad}
    skeleton = Skeleton(**file["skeleton"]) if "skeleton" in file else read_skeleton(
        {"categories": [{"keypoints": COCO_NAMES, "skeleton": COCO_EDGES}]})
    stems = [os.path.splitext(os.path.basename(f))[0] for f in files]
    numbered = all(s.isdecimal() for s in stems) and len(set(map(int, stems))) == len(files)
    ids = {f: int(s) if numbered else i for i, (f, s) in enumerate(zip(files, stems))}
    results, sheet, bad, people, start = [], [], 0, 0, time.monotonic()
    for first in range(0, len(files), args.batch_size):
        images = {}
        for path in files[first:first + args.batch_size]:
            try:
                with Image.open(path) as image:
                    images[path] = to_rgb(ImageOps.exif_transpose(image))
            except UNREADABLE as error:
                bad += 1
                print(f"\r{path} cannot be read, skipped: {error}", file=sys.stderr, flush=True)
        if not images:
            continue
        found = dict(zip(images, predict(model, file, list(images.values()), args.conf, args.iou)))
        sheet += draw_all(found, images, skeleton, paths)[:16 - len(sheet)]
        for path, (_, scores, keypoints) in found.items():
            people += len(scores)
            results += [{**result, "file_name": path} for result in to_coco(
                ids[path], 1, scores, keypoints[..., :2], keypoints[..., 2])]
        done = min(first + args.batch_size, len(files))
        seconds = time.monotonic() - start
        print(f"\r{done}/{len(files)} images  {done / seconds:.1f} img/s", end="", flush=True)
    if args.sheet and sheet:
        contact_sheet([ImageOps.pad(picture, (480, 480)) for picture in sheet], 4).save(
            os.path.join(args.out, "sheet.jpg"), quality=88)
    if args.json:
        write_text(args.json, json.dumps(results))
    hint = "" if people else f" (none above --conf {args.conf}: try a lower one)"
    print(f"\n{people} people in {len(files) - bad} images{hint}; pictures in {args.out}")
    if bad:
        sys.exit(f"predict.py: {bad} of {len(files)} files cannot be read; they are named above")


if __name__ == "__main__":
    main()
