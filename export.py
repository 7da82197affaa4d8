"""A checkpoint as one file for other programs, decoding included: ONNX, or PyTorch's pt2.

    python export.py --weights runs/train/best.pt --format onnx --data DIR [--int8]

In      images (B, 3, H, W) uint8, RGB; any B, H and W multiples of 32, at least 64
Out     boxes (B, A, 4) x1, y1, x2, y2 and keypoints (B, A, K, 2) x, y in px of the input, pixel i
        covering [i, i + 1) (for COCO results, subtract 0.5 after mapping keypoints back to the
        file); scores (B, A) and keypoint_scores (B, A, K) in [0, 1]. A anchors, mostly background
Inside  json, in ONNX as metadata, in pt2 as the extra file nanopose.json: the keypoints' names,
        flip, edges, sigmas; image_size and pad: scale an image by image_size / its longer side,
        pad with 127 (bottom_right, or center: all around). fit_image in data.py does exactly this:
        it reduces by 2, 4, ... (the mean of as many pixels), then resamples bilinearly, by just
        that factor, like Pillow's transform, to a gray level; its resize moves keypoints by 1 px;
        conf, iou, pre, post of evaluate.py's select (these are for AP: predict.py takes conf 0.3,
        pre 2000, post 300)

Run     onnxruntime.InferenceSession(FILE).run(None, {"images": images}), whose
        get_modelmeta().custom_metadata_map holds one json text for each name; or
        extra = {"nanopose.json": ""}; program = torch.export.load(FILE, extra_files=extra);
        program.module()(torch.from_numpy(images)), with json.loads(extra["nanopose.json"])

NMS is not in the file; for boxes (A, 4) and scores (A,) of one image, in numpy (kept: best first):

    left, kept = np.argsort(-scores)[:pre], []
    left = left[scores[left] >= conf]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    while len(left) and len(kept) < post:
        i, left = left[0], left[1:]
        kept.append(i)
        low = np.maximum(boxes[i, :2], boxes[left, :2])
        high = np.minimum(boxes[i, 2:], boxes[left, 2:])
        shared = (high - low).clip(0).prod(1)
        left = left[shared <= iou * (area[i] + area[left] - shared)]
"""
import argparse
import ast
import importlib.util
import io
import json
import logging
import os
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import BODY_SHARE_OF_BOX, CocoPose, DataError, collate, find_split
from evaluate import (check_places, detect, keypoint_ap, load_model, open_split, parse, quiet_coco,
                      seconds, select, val_batches)
from model import Decoded, decode

LARGEST = 0.05, 1e-4      # allowed difference from PyTorch's network: px, scores
TOLERANCE = 0.004, 0.01   # allowed cost of a part in int8: 1 - OKS, change of person score
# CPUs lack an int8 ConvTranspose. Ops between convolutions, in float, would convert to and fro.
INT8_OPS = ["Conv", "Relu", "MaxPool", "Concat", "Add", "Mul"]


class Exported(nn.Module):
    """Images (B, 3, H, W) uint8 to Decoded's fields, as the plain tuple torch.export.save needs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(decode(self.model(images.float() / 255)))


def write(model: nn.Module, path: str, meta: dict) -> None:
    """Write the fused network, without mask branch, for CPUs; path ends with .onnx or .pt2."""
    model.mask = None
    shapes = {"images": {0: torch.export.Dim("batch"), 2: 32 * torch.export.Dim("rows"),
                         3: 32 * torch.export.Dim("columns")}}
    example = torch.zeros(2, 3, 96, 128, dtype=torch.uint8)
    program = torch.export.export(Exported(model), (example,), dynamic_shapes=shapes)
    if path.endswith(".pt2"):
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # names folders of this computer
        whole = io.BytesIO()  # torch's own writer has no OSError for a full disk
        torch.export.save(program, whole, extra_files={"nanopose.json": json.dumps(meta)})
        with open(path, "wb") as f:
            f.write(whole.getbuffer())
        return
    import onnx
    made = torch.onnx.export(
        program, dynamo=True, dynamic_shapes=shapes, verbose=False, input_names=["images"],
        output_names=["boxes", "scores", "keypoints", "keypoint_scores"]).model_proto
    for node in made.graph.node:  # named after their module, for parts_of
        scopes = [p.value for p in node.metadata_props if p.key.endswith("name_scopes")]
        node.name = f"{ast.literal_eval(scopes[0])[-2] if scopes else ''}/{node.name}"
        del node.metadata_props[:]
    onnx.helper.set_model_props(made, {key: json.dumps(value) for key, value in meta.items()})
    onnx.save(made, path)


def open_file(path: str, threads: int = 0):
    """A function from images (B, 3, H, W) uint8 to Decoded that runs a written file on the CPU."""
    if path.endswith(".pt2"):
        module = torch.export.load(path).module()
        return lambda images: Decoded(*module(images))
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads  # 0: all
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: Decoded(*map(torch.from_numpy, session.run(
        None, {"images": np.ascontiguousarray(images.numpy())})))


def largest_difference(a, b, batches: list[Tensor]) -> tuple[float, float]:
    """Largest difference of two functions of images: boxes and keypoints, px; scores. Or NaN."""
    pairs = [[(x - y).abs().max() for x, y in zip(a(images), b(images))] for images in batches]
    boxes, scores, keypoints, kpt_scores = torch.tensor(pairs).T                  # (batches,) each
    px, score = torch.cat([boxes, keypoints]).max(), torch.cat([scores, kpt_scores]).max()
    return px.item(), score.item()


def average_precision(run, dataset: CocoPose, labels: dict, args: argparse.Namespace) -> float:
    """AP of a function of images on a data set, with evaluate.py's protocol and flags."""
    by_image = {}
    for keys in val_batches(len(dataset), args.batch_size):
        images, targets = collate([dataset[key] for key in keys])
        by_image |= detect(run(images), targets, labels["categories"][0]["id"], args.conf, args.iou)
    return keypoint_ap(quiet_coco(labels), by_image, dataset.skeleton.sigmas)["AP"]


def cost(run, wanted: list[Decoded], images: list[Tensor], sigmas: list[float]) -> Tensor:
    """int8's cost, (2,): 1 - OKS and score change, score-weighted means over float's detections."""
    rows = []
    for image, was in zip(images, wanted):
        now, kept = run(image), select(was.boxes[0], was.scores[0], 0)            # (D,)
        area = (was.boxes[0, kept, 2:] - was.boxes[0, kept, :2]).prod(1) * BODY_SHARE_OF_BOX
        square = (was.keypoints - now.keypoints)[0, kept].square().sum(-1)        # (D, K)
        oks = (-square / (8 * area[:, None] * torch.tensor(sigmas) ** 2 + 1e-9)).exp().mean(1)
        scores = was.scores[0, kept]
        moved = (scores - now.scores[0, kept]).abs()
        rows.append(torch.stack([scores * (1 - oks), scores * moved, scores], 1))         # (D, 3)
    total = torch.cat(rows).sum(0)
    return total[:2] / total[2]


def parts_of(path: str) -> dict[str, list[str]]:
    """{part of the network: its nodes that int8 can run}. Decoding is in none of them."""
    import onnx
    parts = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        scope = node.name.split("/")[0].split(".")  # like model.heads.head1.cls_pred
        if node.op_type in INT8_OPS and len(scope) > 2:
            name = ".".join(scope[1:4 if scope[-1].endswith("_pred") else 3])
            parts.setdefault(name, []).append(node.name)
    return parts


def quantize(path: str, out: str, images: list[Tensor], nodes: list[str]) -> None:
    """Write `out`: path with these nodes in int8, with ranges measured on images (1, 3, S, S).

    Activations are unsigned; weights are signed, with a scale per channel, and of 7 bits, because
    x86 processors without VNNI add two products in 16 bits.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    logging.disable(logging.WARNING)  # for each part it would advise what fuse() has done
    batches = iter({"images": np.ascontiguousarray(image.numpy())} for image in images)
    quantize_static(path, out, SimpleNamespace(get_next=lambda: next(batches, None)),
                    quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8, per_channel=True, reduce_range=True,
                    op_types_to_quantize=INT8_OPS, nodes_to_quantize=nodes)
    logging.disable(logging.NOTSET)


def to_int8(path: str, out: str, images: list[Tensor], sigmas: list[float]) -> None:
    """Write `out`: path in int8, except for parts that each cost more than TOLERANCE alone."""
    import onnx
    wanted, kept, floats = list(map(open_file(path), images)), [], []
    for part, nodes in parts_of(path).items():
        quantize(path, out, images, nodes)
        miss, shift = cost(open_file(out), wanted, images, sigmas).tolist()
        if cheap := miss <= TOLERANCE[0] and shift <= TOLERANCE[1]:
            kept += nodes
        else:
            floats.append(part)
        print(f"{part:24} alone in int8: 1 - OKS {miss:.4f}, scores {shift:.4f}"
              f"{'' if cheap else ', stays in float'}", flush=True)
    if not kept:  # quantize would take [] for all nodes
        sys.exit("export.py: every part would cost too much in int8; nothing is written")
    quantize(path, out, images, kept)
    print(f"in float: {', '.join(floats) or 'no part'}")
    made = onnx.load(out)
    for mark in [p for p in made.metadata_props if p.key == "onnx.infer"]:
        made.metadata_props.remove(mark)  # not json, unlike the others
    onnx.save(made, out)


def pixels(dataset: CocoPose, count: int) -> list[Tensor]:
    """The first images of a set, (1, 3, S, S) uint8 each."""
    return [collate([dataset[0, i]])[0] for i in range(min(count, len(dataset)))]


def parse_args() -> argparse.Namespace:
    """Read the command line; exit with one line of advice if a value cannot work."""
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="--conf and --iou are written into the file, "
        "for whoever runs it; --batch-size is for the AP that --int8 prints.")
    add = p.add_argument
    add("--format", required=True, choices=["onnx", "pt2"], help="pt2 is PyTorch's own format")
    add("--out", metavar="FILE", help="default: next to --weights, like best.onnx")
    add("--int8", action="store_true", help="quantize ONNX to 8 bits, with ranges from --data")
    add("--data", metavar="DIR", help="COCO root; compare on its images (default: noise)")
    add("--split", default="val2017", help="to compare and score on; default: %(default)s")
    add("--train-split", default="train2017", help="for the int8 ranges; default: %(default)s")
    for name in ("json", "images", "train-json", "train-images"):
        add(f"--{name}", metavar="DIR" if "images" in name else "FILE",
            help="instead of --data" + "; for int8 ranges" * name.startswith("train"))
    args = parse(p, None, 0.01, 16)
    given = [bool(x) for x in (args.json, args.images, args.train_json, args.train_images)]
    if any(given) and (args.data or not all(given[:4 if args.int8 else 2])):
        p.error("give --data, or --json and --images, with --int8 --train-json and --train-images")
    if args.int8 and (args.format != "onnx" or not args.data and not args.json):
        p.error("--int8 needs --format onnx, and images to find the ranges of numbers: --data DIR")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime")
               if args.format == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"export.py: --format onnx needs {', '.join(missing)}; "
                 f"pip install {' '.join(missing)}")
    stem = os.path.splitext(args.weights)[0] + "_int8" * args.int8
    args.out = args.out or f"{stem}.{args.format}"
    if not args.out.endswith("." + args.format):
        p.error(f"--out {args.out} must end with .{args.format}")
    check_places(p, [args.out], [args.weights, args.json, args.train_json])
    return args


def main() -> None:
    args = parse_args()
    try:
        model, file = load_model(args.weights, args.model, args.image_size, args.pad)
        size = file["image_size"]
        if size < 64:
            raise ValueError(f"{args.weights} is for images of {size} px, an exported file needs "
                             f"at least 64; train with a larger --image-size")
        some = list(torch.randint(256, (20, 1, 3, size, size), dtype=torch.uint8))
        if args.data or args.json:
            path = (args.json, args.images) if args.json else find_split(args.data, args.split)
            val_set, labels = open_split(*path, file)
            file["skeleton"], some = val_set.skeleton._asdict(), pixels(val_set, 20)
        if args.int8:
            path = ((args.train_json, args.train_images) if args.json else
                    find_split(args.data, args.train_split))
            train_set, _ = open_split(*path, file)
            train_set.spare = 10  # broken images are replaced, as in training
            ranges = pixels(train_set, 32)
    except (ValueError, OSError) as error:
        sys.exit(f"export.py: {error}")
    images = some[:2] + [torch.cat(some[i:i + 3]) for i in range(2, len(some), 3)]
    images += [F.pad(image, (0, 32, 0, 64)) for image in images]  # another size, and not square
    meta = {**file["skeleton"], "image_size": size, "pad": file["pad"], "conf": args.conf,
            "iou": args.iou, "pre": 300, "post": 20}
    with tempfile.TemporaryDirectory(dir=os.path.dirname(args.out) or ".") as folder:
        written = os.path.join(folder, f"float.{args.format}")
        write(model.fuse(), written, meta)
        px, score = largest_difference(Exported(model), open_file(written), images)
        print(f"largest difference from PyTorch: {px:.1e} px, {score:.1e} in scores; "
              f"{'images' if args.data or args.json else 'noise'} of {size} x {size} and "
              f"{size + 64} x {size + 32} px, batches of 1 and 3")
        if not (px <= LARGEST[0] and score <= LARGEST[1]):
            sys.exit(f"export.py: more than {LARGEST[0]} px or {LARGEST[1]}, so nothing is written")
        if args.int8:
            files = [written, os.path.join(folder, "int8.onnx")]
            to_int8(*files, ranges, file["skeleton"]["sigmas"])
            for written in files:
                ap = average_precision(open_file(written), val_set, labels, args)
                run = open_file(written, threads=1)
                print(f"{os.path.basename(written):12} AP {ap:.4f}  "
                      f"{os.path.getsize(written) / 1e6:.2f} MB  "
                      f"{1 / seconds(lambda: run(some[0])):.1f} img/s on one thread")
        os.replace(written, args.out)
    print(f"{args.out}  {os.path.getsize(args.out) / 1e6:.1f} MB")


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError) as error:  # a broken image to score on, a full disk
        sys.exit(f"export.py: {error}")
