"""COCO keypoints from disk to padded batches.

Owns the file format, the skeleton, every augmentation, the padding and its inverse, and the order
in which images are seen; knows nothing about the network. Read in this order: Annotations,
Augment, random_geometry, CocoPose, stream, make_loader.

Axes    B images   S side of the padded input   M people in one image   K keypoints
        N images of the set   T people of the set

A sample is a dict; this list is the only definition of its keys:
    image      (S, S, 3) uint8, RGB
    boxes      (M, 4)    float32, x1, y1, x2, y2, px of the padded input
    keypoints  (M, K, 3) float32, x px, y px, v: 0 not labeled, 1 hidden, 2 visible
    crowd      (M,)      bool, the box holds a crowd
    image_id   int, the json's id
    matrix     (2, 3)    float64, px of the file (of a mosaic: its last) to px of the padded input
    bad        list of str, error messages of the unreadable images that this one replaces
    mask       (S/2, S/2) uint8, only if asked for: 0 nobody's pixel, 1 somebody's, 2 unknown

Pixels: coordinates are continuous. Pixel i covers [i, i + 1) and its center is i + 0.5, as in
Pillow's resampling and in COCO's boxes. COCO's keypoints are pixel *indices*: reading adds 0.5,
writing results subtracts it, and everything in between is continuous.

Geometry: all that happens to an image (mirror, rotation, zoom, mosaic, padding) is one 3 x 3
matrix, so its pixels are resampled only once, and its points go through the same matrix.
"""
import atexit
import ctypes
import functools
import hashlib
import itertools
import json
import math
import mmap
import multiprocessing
import os
import signal
import struct
import sys
from collections.abc import Iterable, Iterator
from numbers import Number
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

COCO_NAMES = ["nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder",
              "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist",
              "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle"]
COCO_SIGMAS = [.026, .025, .025, .035, .035, .079, .079, .072, .072, .062, .062, .107, .107, .087,
               .087, .089, .089]
COCO_EDGES = [[16, 14], [14, 12], [17, 15], [15, 13], [12, 13], [6, 12], [7, 13], [6, 7], [6, 8],
              [7, 9], [8, 10], [9, 11], [2, 3], [1, 2], [1, 3], [2, 4], [3, 5], [4, 6], [5, 7]]
DEFAULT_SIGMA = 0.05  # for keypoints without published sigmas; COCO's are 0.025 to 0.107
BODY_SHARE_OF_BOX = 0.53  # area of a person whose annotation lacks it, as a share of the box
PAD_GRAY = 127
PAD_MODES = ("center", "bottom_right")
# What Pillow raises for files that are damaged, or suspiciously large.
UNREADABLE = (OSError, ValueError, SyntaxError, TypeError, RuntimeError, struct.error,
              Image.DecompressionBombError)
# What each record of a json must have.
RECORDS = {"categories": {"id": int, "name": str},
           "images": {"id": int, "file_name": str, "width": Number, "height": Number},
           "annotations": {"id": int, "image_id": int, "bbox": list}}


class DataError(ValueError):
    """An image file cannot be used; the message says which and why."""

    def __str__(self) -> str:
        """One line: from a loader process, the traceback there comes before it."""
        return super().__str__().strip().splitlines()[-1].removeprefix("data.DataError: ")


class Skeleton(NamedTuple):
    """What describes a keypoint set, as plain lists, so that it fits into a checkpoint."""

    names: list[str]        # K
    flip: list[int]         # K: row k of a mirrored person is row flip[k] of the original
    edges: list[list[int]]  # pairs of keypoints that a line joins, counted from 0
    sigmas: list[float]     # K: spread of each keypoint as a share of sqrt(area)


class Annotations(NamedTuple):
    """A json as flat arrays: lists of dicts would be copied page by page into every worker."""

    files: np.ndarray      # (N,) file names
    ids: np.ndarray        # (N,) int64
    sizes: np.ndarray      # (N, 2) int64, width, height, px
    offsets: np.ndarray    # (N + 1,) int64, the people of image i are rows offsets[i:i + 2]
    boxes: np.ndarray      # (T, 4) float32, x1, y1, x2, y2, px
    keypoints: np.ndarray  # (T, K, 3) float32, x px, y px, v; continuous coordinates
    crowd: np.ndarray      # (T,) bool
    masked: np.ndarray     # (T,) bool, the annotation has a segmentation
    masks: bytes           # COCO's run lengths of people's pixels, image by image, if asked for
    mask_offsets: np.ndarray   # (N + 1,) int64, where in masks each image begins; (1,) without


def find_split(root: str, split: str) -> tuple[str, str]:
    """The paths of a split's json and image folder. Raises FileNotFoundError."""
    for folder in (os.path.join(root, split), os.path.join(root, "images", split)):
        if os.path.isdir(folder):
            return os.path.join(root, "annotations", f"person_keypoints_{split}.json"), folder
    raise FileNotFoundError(f"no folder {os.path.abspath(root)}/{split} or images/{split} there; "
                            f"expected the split's images; other layouts: name json and images by "
                            f"flags of their own")


def faults(coco: dict) -> Iterator[str]:
    """Yield what is wrong with a json's content. Read only the first: it may cause the others."""
    if not isinstance(coco, dict) or not all(isinstance(coco.get(what), list) for what in RECORDS):
        yield ("expected the lists images, annotations and categories of COCO's format; export "
               "your labels as COCO keypoints")
    if not coco["images"]:
        yield "its list of images is empty; was another subset exported?"
    for what, kinds in RECORDS.items():
        seen = set()
        for record in coco[what]:
            if not isinstance(record, dict):
                yield f"{what}: found {str(record)[:60]}, expected a record {{...}}"
            for key, kind in kinds.items():
                value = record.get(key)
                if (not isinstance(value, kind) or kind is int and abs(value) >= 2**53
                        or kind is Number and not 1 <= value <= 100_000):
                    where = str(record)[:80] if key == "id" else f"id {record['id']}"
                    yield (f"{what}: {key} {str(record.get(key, 'is missing'))[:40]} in {where}, "
                           f"expected {'1 to 100000 px' if kind is Number else key} of type "
                           f"{kind.__name__.lower()}; fix or remove the record")
            if record["id"] in seen:
                yield f"{what}: id {record['id']} is there twice; remove the copy, or renumber it"
            seen.add(record["id"])
    named = [category for category in coco["categories"] if category.get("keypoints")]
    if len(named) > 1:
        same = all(category["keypoints"] == named[0]["keypoints"] for category in named)
        yield (f"{len(named)} categories with keypoints, {str([c['name'] for c in named])[:60]}, "
               f"expected one; " + ("they name the same: keep one and give all annotations its id "
                                    "as category_id" if same else
                                    "they name different ones: keep one and its annotations"))
    names = named[0]["keypoints"] if named else None
    if not (isinstance(names, list) and all(isinstance(n, str) for n in names)
            and len(names) == len(set(names))):
        yield (f"categories {[c['name'] for c in coco['categories']]}, expected exactly one with "
               f"keypoint names, different texts (found {str(names)[:60]}); add them as its "
               f"\"keypoints\", or use person_keypoints_*.json, not COCO's instances_*.json")
    images = {image["id"] for image in coco["images"]}
    for ann in coco["annotations"]:
        if wrong := wrong_with(ann, images, named[0]):
            yield f"annotation {ann['id']} has {wrong}; fix or remove it"
    points = (v for ann in coco["annotations"] for i, v in enumerate(ann.get("keypoints") or [])
              if i % 3 < 2)
    if (max((max(ann["bbox"]) for ann in coco["annotations"]), default=2) <= 1
            or 0 < max(points, default=0) < 1
            or 0 < max((ann.get("area") or 0 for ann in coco["annotations"]), default=0) <= 1):
        yield ("all boxes, keypoints or areas lie within 1 px, expected px, not shares of the "
               "image, and boxes around the people; export again (an area may be left out)")


def wrong_with(ann: dict, images: set[int], category: dict) -> str:
    """What is wrong with an annotation of a file with these image ids and this category, or ""."""
    numbers = 3 * len(category["keypoints"])
    bbox, area, keypoints = ann["bbox"], ann.get("area") or 0, ann.get("keypoints") or [0] * numbers
    try:
        if ann["image_id"] not in images:
            return f"image {ann['image_id']}, which is not in the file"
        if ann.get("category_id", category["id"]) != category["id"]:
            return (f"category_id {str(ann['category_id'])[:40]}, expected {category['id']}, the "
                    f"category with keypoint names")
        if len(keypoints) != numbers:
            return f"{len(keypoints)} keypoint numbers, expected {numbers} (x, y, v for each name)"
        if not (math.isfinite(sum(bbox) + sum(keypoints) + area) and area <= 1e10
                and max(map(abs, [*bbox, *keypoints])) < 1e9
                and len(bbox) == 4 and min(bbox[2:]) >= 0):
            return (f"bbox {bbox}, area {ann.get('area')}, and keypoints; expected finite numbers "
                    f"everywhere (0, 0, 0 for a missing keypoint), in bbox 4: x, y, and a size "
                    f"that is not negative")
        if not {0, 1, 2}.issuperset(keypoints[2::3]):
            return f"visibility {min({*keypoints[2::3]} - {0, 1, 2})}, expected 0, 1 or 2"
        if any(keypoints[2::3]) and not bbox[2] * bbox[3]:
            return f"labeled keypoints, but bbox {bbox}, expected one around the body"
        if ann.get("iscrowd") not in (None, 0, 1):
            return f"iscrowd {str(ann['iscrowd'])[:40]}, expected 0 or 1"
    except (TypeError, OverflowError):
        return (f"bbox {str(bbox)[:60]}, area {str(ann.get('area'))[:20]} or keypoints with "
                f"something that is not a number")
    return ""


def read_json(path: str) -> dict:
    """Load a COCO keypoint file. Fill in what pycocotools needs and some tools omit: area (also if
    not positive), iscrowd, category_id, and keypoints (all 0) of a person who has none. Count
    num_keypoints again; drop categories without keypoint names, which some tools add.
    Raises FileNotFoundError, or ValueError that names the faulty record and what to do."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} not found; expected a COCO keypoint json (COCO's are in "
                                f"annotations_trainval2017.zip)")
    with open(path, encoding="utf-8-sig") as f:
        try:
            coco = json.load(f)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}; was the download or export cut off?") from None
    for fault in faults(coco):
        raise ValueError(f"{path}: {fault}")
    category, = coco["categories"] = [c for c in coco["categories"] if c.get("keypoints")]
    for ann in coco["annotations"]:
        keypoints = ann.get("keypoints") or 3 * len(category["keypoints"]) * [0]
        area, box_area = ann.get("area") or 0, ann["bbox"][2] * ann["bbox"][3]
        ann |= {"category_id": category["id"], "iscrowd": int(ann.get("iscrowd") or 0),
                "area": area if area > 0 else BODY_SHARE_OF_BOX * box_area,
                "keypoints": keypoints, "num_keypoints": sum(v > 0 for v in keypoints[2::3])}
    return coco


def runs_of(text: str) -> list[int]:
    """Decode COCO's compressed run lengths: 5 bits a letter; from the fourth on, differences."""
    counts, value, shift = [], 0, 0
    for letter in text.encode():
        letter -= 48
        value, shift = value | (letter & 31) << shift, shift + 5
        if not letter & 32:  # a number's last letter, whose highest bit is the sign
            value -= (letter >> 4 & 1) << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def pixels_of(people: list[dict], image: dict) -> bytes:
    """COCO's compressed run lengths of all people of an image that have a segmentation (polygons,
    or either kind of RLE), as one mask. Raises ValueError for other segmentations."""
    parts, size = [], [image["height"], image["width"]]
    for ann in people:
        shape = ann.get("segmentation")
        if ann["iscrowd"] or not shape:
            continue
        runs = isinstance(shape, dict) and shape.get("size") == size and shape.get("counts")
        runs = runs_of(runs) if isinstance(runs, str) else runs
        polygons = isinstance(shape, list) and all(
            isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and all(
                isinstance(v, (int, float)) and abs(v) < 1e6 for v in p) for p in shape)
        fits = isinstance(runs, list) and size[0] * size[1] == sum(  # pycocotools trusts it
            v if isinstance(v, int) and v >= 0 else math.inf for v in runs)
        if not fits and not polygons:
            raise ValueError(f"annotation {ann['id']}: segmentation {str(shape)[:60]}, expected "
                             f"polygons or run lengths of {size[0]} x {size[1]} px; fix it")
        if fits:  # by numpy: runs of 0 would make pycocotools' merge endless
            pixels = np.repeat((np.arange(len(runs)) % 2).astype(np.uint8), runs)
            parts.append(coco_mask.encode(pixels.reshape(size, order="F")))
        else:
            parts += coco_mask.frPyObjects(shape, *size)
    return coco_mask.merge(parts)["counts"] if parts else b""


def flatten(coco: dict, only_people: bool = False, masks: bool = False) -> Annotations:
    """The images of a json, in order of id, and their people, in continuous coordinates.
    only_people leaves out images without a labeled person; masks keeps people's pixels.
    Raises ValueError if nothing is left, or masks are asked for and nobody has a segmentation."""
    people = {image["id"]: [] for image in coco["images"]}
    for ann in coco["annotations"]:
        people[ann["image_id"]].append(ann)
    images = [image for image in sorted(coco["images"], key=lambda image: image["id"])
              if not only_people or any(a["num_keypoints"] and not a["iscrowd"]
                                        for a in people[image["id"]])]
    if not images:
        raise ValueError("no image is left" + only_people * ": nobody is labeled in any of them")
    counts = [len(people[image["id"]]) for image in images]
    rows = [ann for image in images for ann in people[image["id"]]]
    masked = [bool(ann.get("segmentation") and not ann["iscrowd"]) for ann in rows]
    if masks and not any(masked):
        raise ValueError("no annotation has a segmentation, which --mask trains with; leave it out")
    runs = [pixels_of(people[image["id"]], image) for image in images] if masks else []
    boxes = np.array([ann["bbox"] for ann in rows], np.float32).reshape(-1, 4)         # (T, 4)
    boxes[:, 2:] += boxes[:, :2]
    k = len(coco["categories"][0]["keypoints"])
    keypoints = np.array([ann["keypoints"] for ann in rows], np.float32).reshape(-1, k, 3)
    keypoints[..., :2] += 0.5  # from pixel index to the middle of the pixel
    return Annotations(
        files=np.array([image["file_name"] for image in images]),
        ids=np.array([image["id"] for image in images], np.int64),
        sizes=np.array([[image["width"], image["height"]] for image in images], np.int64),
        offsets=np.cumsum([0, *counts]), boxes=boxes, keypoints=keypoints,
        crowd=np.array([ann["iscrowd"] for ann in rows], bool), masked=np.array(masked, bool),
        masks=b"".join(runs), mask_offsets=np.cumsum([0, *map(len, runs)]))


def fingerprint(arrays: Iterable) -> str:
    """A hash of the arrays' content. For Annotations it does not depend on where the files lie."""
    return hashlib.sha256(b"".join(
        a if isinstance(a, bytes) else a.tobytes() for a in arrays)).hexdigest()[:12]


def check_files(annotations: Annotations, folder: str, headers: bool = False) -> None:
    """Raise FileNotFoundError, with advice, for the first of the images that is not in folder.
    headers: also raise DataError for the first that is no image, or not of the json's size."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder; expected the images that the json "
                                f"names; if it has moved, give its new path")
    listed = set(os.listdir(folder))
    for name, size in zip(annotations.files.tolist(), annotations.sizes.tolist()):
        path = os.path.join(folder, name)
        if name not in listed and not os.path.isfile(path):
            raise FileNotFoundError(f"{path} not found, but the json names {name}; get it, fix or "
                                    f"remove its record, or give the folder from which names count")
        if headers:
            try:
                open_header(path, *size).close()
            except UNREADABLE as error:
                raise DataError(f"{path}: {error}; fix or remove the file or its record") from None


def swapped(xy: np.ndarray, labeled: np.ndarray, widths: np.ndarray, flip: list) -> np.ndarray:
    """People (T,) bool whose left and right may be swapped: two left-right pairs disagree on which
    way they face, but agree in nearly all of the set (as shoulders and hips do; not wrists).
    xy (T, K, 2), labeled (T, K), widths (T,) of the boxes, flip (K)."""
    left, right = np.array([(i, j) for i, j in enumerate(flip) if i < j], int).reshape(-1, 2).T
    apart = (xy[:, left, 0] - xy[:, right, 0]) / np.maximum(widths, 1)[:, None]   # (T, pairs)
    side = np.sign(apart) * (np.abs(apart) > 0.1) * labeled[:, left] * labeled[:, right]
    found = np.zeros(len(xy), bool)
    for a, b in itertools.combinations(side.T, 2):
        agree = a * b * np.sign(a @ b)  # -1 if one pair is named right to left
        if (agree > 0).sum() >= 0.97 * np.count_nonzero(agree):
            found |= agree < 0
    return found


def describe(dataset: "CocoPose", use: str) -> list[str]:
    """Lines that describe a data set, its use and flaws. Opens 1,000 to 2,000 images, or all
    of a smaller set."""
    a, size, names = dataset.annotations, dataset.size, dataset.skeleton.names
    labeled, xy = a.keypoints[..., 2] > 0, a.keypoints[..., :2]                   # (T, K, ...)
    people, unlabeled = labeled.any(1) & ~a.crowd, ~labeled.any(1) & ~a.crowd    # (T,), (T,)
    image = np.repeat(np.arange(len(a.ids)), np.diff(a.offsets))                  # (T,)
    wide_high = a.boxes[:, 2:] - a.boxes[:, :2]                                   # (T, 2) px
    side = np.sqrt(wide_high.prod(1)) * size / a.sizes[image].max(1)              # (T,) px
    _, first = np.unique(np.column_stack([image, a.boxes]), axis=0, return_index=True)
    outside = labeled & ((xy < 0) | (xy > a.sizes[image][:, None])).any(-1)       # (T, K)
    beside = labeled & ((xy < a.boxes[:, None, :2]) | (xy > a.boxes[:, None, 2:])).any(-1)  # (T, K)
    over = ((a.boxes < -1) | (a.boxes > 1 + np.tile(a.sizes[image], 2))).any(1)   # (T,)
    broken, turned = [], []
    for i in range(0, len(a.ids), max(len(a.ids) // 1000, 1)):
        path = os.path.join(dataset.folder, str(a.files[i]))
        try:
            open_image(path, *a.sizes[i].tolist(), 1 / 8)
            with Image.open(path) as file:
                turned += [i] * (file.getexif().get(ExifTags.Base.Orientation) in range(2, 9))
        except UNREADABLE:
            broken.append(i)
    checks = {f"people smaller than 8 px at {size} px": image[people & (side < 8)],
              "boxes that their image has twice": np.delete(image, first),
              "boxes beyond their image, cut there (bbox is x, y, width, height)": image[over],
              "people with most keypoints outside their box (bbox is x, y, width, height)": image[
                  people & (beside.sum(1) > labeled.sum(1) / 2)],
              "people without keypoints and box, taken for background": image[
                  unlabeled & (side == 0)],
              "people with a keypoint outside the image, taken for not labeled": image[
                  outside.any(1)],
              "people with a labeled keypoint at 0, 0: is it missing, with v 0?": image[
                  (labeled & (xy == 0.5).all(-1)).any(1)],
              "images turned by their EXIF tag, which training ignores, as COCO does: labels must "
              "fit the file as stored": turned,
              "people whose left and right may be swapped": image[
                  people & swapped(xy, labeled, wide_high[:, 0], dataset.skeleton.flip)],
              "broken images": broken}
    shares = labeled[people].sum(0) / max(people.sum(), 1)                        # (K,)
    few, middle, many = np.quantile(side[people] if people.any() else [0], [0.05, 0.5, 0.95])
    empty = np.setdiff1d(np.arange(len(a.ids)), image[people])
    like = "".join(f", like {a.files[i]}" for i in empty[:1])
    return [f"{use:14}{people.sum()} people labeled, {unlabeled.sum()} without keypoints, "
            f"{a.crowd.sum()} crowds; {len(empty)} images show nobody labeled{like}",
            "labeled       " + ", ".join(f"{n} {s:.0%}" for n, s in zip(names, shares)),
            f"box sides     {few:.0f}, {middle:.0f}, {many:.0f} px at {size} px (5, 50, 95 % of "
            f"the people; the root of the area)",
            *(f"check         {len(images)} {what}, like {a.files[images[0]]}"
              for what, images in checks.items() if len(images))]


def read_skeleton(coco: dict, flip_pairs: str = None, sigmas: list[float] = None) -> Skeleton:
    """Names, mirror order, edges and sigmas of a json's category.
    flip_pairs  "a:b,c:d"; otherwise names that differ in left and right, or Left and Right
    sigmas      K numbers; otherwise the category's, COCO's for COCO's names, or DEFAULT_SIGMA
    Raises ValueError for names that are unknown or in two pairs, and for wrong sigmas or edges."""
    category = coco["categories"][0]
    names = category["keypoints"]
    if flip_pairs is None:
        twins = [n.replace("left", "right").replace("Left", "Right") for n in names]
        pairs = [[n, twin] for n, twin in zip(names, twins) if n != twin and twin in names]
    else:
        pairs = [pair.split(":") for pair in flip_pairs.split(",") if pair]
    flip = list(range(len(names)))
    free = set(names)
    for pair in pairs:
        if len(pair) != 2 or pair[0] == pair[1] or not free.issuperset(pair):
            raise ValueError(f"flip pair {':'.join(pair)}, expected LEFT:RIGHT,LEFT:RIGHT, each "
                             f"once, of the keypoints {', '.join(names)}")
        free -= set(pair)
        a, b = map(names.index, pair)
        flip[a], flip[b] = b, a
    default = COCO_SIGMAS if names == COCO_NAMES else [DEFAULT_SIGMA] * len(names)
    sigmas = sigmas or category.get("sigmas") or default
    if (not isinstance(sigmas, list) or len(sigmas) != len(names) or not all(
            isinstance(s, (int, float)) and 0 < s <= 1 for s in sigmas)):
        raise ValueError(f"sigmas {str(sigmas)[:60]} for {len(names)} keypoints; expected one, "
                         f"above 0 and at most 1, for each of {', '.join(names)}")
    edges = category.get("skeleton") or []
    if not isinstance(edges, list) or not all(isinstance(edge, list) and len(edge) == 2 and all(
            isinstance(end, int) and 1 <= end <= len(names) for end in edge) for edge in edges):
        raise ValueError(f"skeleton {str(edges)[:60]} of the json's category, expected pairs of "
                         f"keypoints, counted from 1 to {len(names)}; fix it, or set it to []")
    return Skeleton(names, flip, [[a - 1, b - 1] for a, b in edges], [float(s) for s in sigmas])


class Augment(NamedTuple):
    """How strongly training images are augmented; the defaults are for sizes n and s. A field that
    you add should be off by default, as all strengths start from these defaults."""

    mosaic: float = 0.5      # probability of a 2 x 2 collage with three other images
    flip: float = 0.5        # probability of a mirror image
    contrast: float = 0.5    # probability of another brightness and contrast
    contrast_range: float = 0.2    # factors lie in 1 - this ... 1 + this
    bgr: float = 0.0         # probability that red and blue are swapped
    hsv: float = 0.5         # probability that hue, saturation, value change, each of them at 0.5
    hsv_gain: float = 20.0   # largest change: hue in steps of 2 degrees, the others in percent
    rotate90: float = 0.0    # probability of a turn by 0, 90, 180 or 270 degrees
    affine: float = 0.75     # probability of rotation, zoom and shift
    degrees: float = 5.0     # largest rotation
    scale: tuple = (0.75, 1.5)     # smallest and largest zoom
    translate: float = 0.1   # largest shift, as a share of width and height
    mixup: float = 0.0       # probability of a blend with another sample and its people
    occlude: float = 0.0     # probability, for each person, of being partly covered
    last_mosaic: float = math.inf  # epochs from here on (the first is 0) have no mosaic


MOSAIC = Augment()
PLAIN = Augment(mosaic=0.0, flip=0.0, contrast=0.0, hsv=0.0, affine=0.0)
FLIP = PLAIN._replace(flip=0.5)
MOSAIC_HEAVY = Augment(contrast=0.75, contrast_range=0.3, bgr=0.5, hsv=0.75, hsv_gain=25.0,
                       rotate90=0.5, degrees=7.0, scale=(0.6, 1.75))


def matrix3(a: float, b: float, c: float, d: float, e: float, f: float) -> np.ndarray:
    """The map x' = a x + b y + c, y' = d x + e y + f as a (3, 3) matrix."""
    return np.array([[a, b, c], [d, e, f], [0.0, 0.0, 1.0]])


def move(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Map points (..., 2) px by a (2 or 3, 3) matrix, in float64."""
    return points @ matrix[:2, :2].T + matrix[:2, 2]


def undo(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The inverse of move: px of the padded input (..., 2) back to px of the file."""
    return (points - matrix[:2, 2]) @ np.linalg.inv(matrix[:2, :2]).T


def random_geometry(width: int, height: int, rng: np.random.Generator,
                    augment: Augment) -> tuple[np.ndarray, int, int]:
    """Random mirror, quarter turns, rotation, zoom and shift as a (3, 3) matrix; and width and
    height, px, of the frame: that of the image after quarter turns. What leaves it is cut off."""
    matrix = np.eye(3)
    if rng.random() < augment.flip:
        matrix = matrix3(-1, 0, width, 0, 1, 0)
    if rng.random() < augment.rotate90:
        for _ in range(rng.integers(4)):
            matrix = matrix3(0, 1, 0, -1, 0, width) @ matrix
            width, height = height, width
    if rng.random() < augment.affine:
        angle = math.radians(rng.uniform(-augment.degrees, augment.degrees))
        zoom = rng.uniform(*augment.scale)
        dx, dy = rng.uniform(-augment.translate, augment.translate, 2) * (width, height)
        cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
        from_middle = matrix3(1, 0, -width / 2, 0, 1, -height / 2)
        to_middle = matrix3(1, 0, width / 2 + dx, 0, 1, height / 2 + dy)
        matrix = to_middle @ matrix3(cos, sin, 0, -sin, cos, 0) @ from_middle @ matrix
    return matrix, width, height


def random_color(image: np.ndarray, rng: np.random.Generator, augment: Augment) -> np.ndarray:
    """Random brightness, contrast, red-blue swap, hue, saturation and value as one (3, 4) matrix
    (all are linear, or nearly so) for the image (3, H, W), whose mean is the pivot of contrast."""
    color = np.eye(3, 4)
    if rng.random() < augment.contrast:
        contrast, brightness = 1 + rng.uniform(-1, 1, 2) * augment.contrast_range
        mean = image[:, ::16, ::16].mean((1, 2))
        color = np.column_stack([contrast * np.eye(3), mean * (brightness - contrast)])
    if rng.random() < augment.bgr:
        color = color[::-1]
    if rng.random() < augment.hsv:
        change = rng.uniform(-1, 1, 3) * augment.hsv_gain * (rng.random(3) < 0.5)
        hue, (saturation, value) = math.radians(2 * change[0]), 1 + change[1:] / 100
        about_gray = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
        turn = math.cos(hue) * np.eye(3) + (1 - math.cos(hue)) / 3 + math.sin(hue) * about_gray
        gray = np.tile([0.299, 0.587, 0.114], (3, 1))
        color = value * (saturation * np.eye(3) + (1 - saturation) * gray) @ turn @ color
    return color


def letterbox(width: int, height: int, size: int, pad: str) -> np.ndarray:
    """The (3, 3) matrix that scales the longer side to `size` px and pads; pad: see PAD_MODES."""
    zoom = size / max(width, height)
    if pad == "bottom_right":
        return matrix3(zoom, 0, 0, 0, zoom, 0)
    left, top = ((size - max(round(side * zoom), 1)) // 2 for side in (width, height))
    return matrix3(zoom, 0, left, 0, zoom, top)


def collage(frames: list[tuple[int, int]]) -> tuple[list[tuple[float, float]], int, int]:
    """Where four frames (width, height) go in a 2 x 2 mosaic: top left corners x, y, and its
    width, height. All touch the line between the rows, which are centered. A single one stays."""
    if len(frames) == 1:
        return [(0, 0)], *frames[0]
    (w0, h0), (w1, h1), (w2, h2), (w3, h3) = frames
    top, width = max(h0, h1), max(w0 + w1, w2 + w3)
    upper, lower = (width - w0 - w1) // 2, (width - w2 - w3) // 2  # where the rows begin
    corners = [(upper, top - h0), (upper + w0, top - h1), (lower, top), (lower + w2, top)]
    return corners, width, top + max(h2, h3)


def shrink_for(zoom: float) -> int:
    """The largest power of two by which an image may be reduced first if `zoom` is the total."""
    return 2 ** max(math.floor(-math.log2(zoom)), 0)


def warp(canvas: Tensor, image: np.ndarray, matrix: np.ndarray, region: np.ndarray,
         color: np.ndarray | None = None, fill: int = PAD_GRAY, mode: str = "bilinear") -> None:
    """Draw image (C, H, W) uint8 through the (3, 3) matrix into region x1, y1, x2, y2 px of canvas
    (C, S, S) uint8, which shows `fill` where the image ends. color, a (3, 4) matrix, changes the
    image, not the fill. Only pixels that will be visible are computed."""
    height, width = image.shape[1:]
    frame = move(np.array([[0, 0], [width, 0], [0, height], [width, height]]), matrix)   # (4, 2)
    left, top = np.floor(np.maximum(region[:2], frame.min(0)) + 0.5).astype(int)
    right, bottom = np.floor(np.minimum(region[2:], frame.max(0)) + 0.5).astype(int)
    if right <= left or bottom <= top:
        return
    h, w, zoom = bottom - top, right - left, matrix[0, 0]
    scaled = zoom > 0 and np.array_equal(matrix, matrix3(zoom, 0, left, 0, zoom, top))
    resizes = mode == "bilinear" and h != height and 1 < w != width
    if scaled and color is None and (zoom == 1 or resizes):
        # 2.4 times as fast as below, rounded twice. F.interpolate would not take a size and a zoom;
        # this leaves an axis alone whose length stays, whatever the zoom, and fails at 1 x 1 px.
        canvas.numpy()[:, top:bottom, left:right] = (
            image[:, :h, :w] if zoom == 1 else torch.ops.aten.upsample_bilinear2d(
                torch.from_numpy(image)[None], (h, w), False, zoom, zoom)[0])
        return
    inverse = np.linalg.inv(matrix)  # where each pixel of the canvas comes from
    seen = move(np.array([[left, top], [right, top], [left, bottom], [right, bottom]]), inverse)
    x0, y0 = np.floor(seen.min(0)).astype(int).clip(1) - 1  # with the neighbors that bilinear needs
    x1, y1 = np.minimum(np.ceil(seen.max(0)).astype(int) + 1, (width, height))
    outside = np.full((len(image), 1), fill)                                      # (C, 1)
    if color is not None:  # applied after sampling; outside lies the color it maps to `fill`
        outside = np.linalg.solve(color[:, :3], fill - color[:, 3:])              # (3, 1)
        linear = torch.from_numpy(color[:, :3].astype(np.float32))
    # Outside is 0 from here on, as grid_sample pads with zeros. As color maps outside to fill,
    # linear @ (pixel - outside) is color(pixel) - fill; at the end `fill` is added back.
    patch = np.subtract(image[:, y0:y1, x0:x1], outside[..., None], dtype=np.float32)
    patch = torch.from_numpy(patch)[None]                                         # (1, C, h, w)
    # grid_sample's coordinates go from -1 to 1, from edge to edge.
    scale, back = 2 / np.array([x1 - x0, y1 - y0]), inverse[:2] - [[0, 0, x0], [0, 0, y0]]
    (a, b, c), (d, e, f) = (back * scale[:, None] - [[0, 0, 1], [0, 0, 1]]).tolist()
    upright = b == d == 0  # no turn: the outside does not show, and edges are not blended
    x, y = torch.arange(left, right) + 0.5, torch.arange(top, bottom)[:, None] + 0.5
    # As complex numbers, x + iy: one sum for both, which is faster than one for each.
    x, y = torch.complex(a * x + c, d * x + f), torch.complex(b * y, e * y)       # (w,), (h, 1)
    for i in range(0, bottom - top, 128):  # 128 rows at a time fit a core's cache
        grid = torch.view_as_real(x + y[i:i + 128])[None]                         # (1, h, w, 2)
        pixels = F.grid_sample(patch, grid, mode, "border" if upright else "zeros",
                               align_corners=False)[0]                            # (C, h, w)
        if color is not None:
            pixels = (linear @ pixels.view(3, -1)).view(pixels.shape).clamp_(-fill, 255 - fill)
        # NumPy truncates to uint8 six times as fast as torch does.
        shown = pixels.add_(fill + 0.5).numpy()
        canvas.numpy()[:, top + i:top + i + len(grid[0]), left:right] = shown


def blank(size: int) -> Tensor:
    """An empty input (3, S, S) uint8, all padding."""
    return torch.full((3, size, size), PAD_GRAY, dtype=torch.uint8)


def fit_image(image: Image.Image, size: int, pad: str) -> tuple[np.ndarray, np.ndarray]:
    """An RGB image as network input (S, S, 3) uint8, and the (3, 3) matrix that took it there."""
    matrix, canvas = letterbox(*image.size, size, pad), blank(size)
    shrink = shrink_for(matrix[0, 0])
    region = move(np.array([[0, 0], image.size]), matrix).reshape(4)
    warp(canvas, planes(image.reduce(shrink)), matrix @ np.diag([shrink, shrink, 1]), region)
    return canvas.numpy().transpose(1, 2, 0), matrix


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB; of an animated one the first frame."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def planes(image: Image.Image) -> np.ndarray:
    """An RGB image as (3, H, W) uint8. Pillow takes the channels apart faster than NumPy does."""
    channels = bytearray().join(image.tobytes("raw", channel) for channel in "RGB")
    return np.frombuffer(channels, np.uint8).reshape(3, image.height, image.width)


def open_header(path: str, width: int, height: int) -> Image.Image:
    """Open an image without decoding it. Raises ValueError if it is not of the json's width and
    height, px, or one of UNREADABLE."""
    image = Image.open(path)
    if image.size != (width, height):
        turned = ", turned by its EXIF tag?" * (image.size == (height, width))
        raise ValueError(f"is {image.width}x{image.height} px, its json says {width}x{height}"
                         f"{turned}")
    return image


def open_image(path: str, width: int, height: int, zoom: float) -> tuple[np.ndarray, int]:
    """Open an image as (3, h, w) uint8, RGB, already reduced by shrink_for(zoom), and return that
    power of two, too. The rest of the zoom then reduces by less than 2, which does not alias. JPEG
    files are decoded reduced. EXIF rotation tags are ignored, as COCO's json ignores them.
    Raises what open_header raises."""
    image, shrink = open_header(path, width, height), shrink_for(zoom)
    if image.format == "JPEG":
        image.draft(image.mode, (max(width // shrink, 1), max(height // shrink, 1)))
    more = shrink // 2 ** round(math.log2(max(width, height) / max(image.size)))
    image.load()
    image = to_rgb(image)
    return planes(image.reduce(more) if more > 1 else image), shrink


class Cache:
    """Decoded images of a set, in one array that all loader processes fill and share.

    Each is reduced by the largest power of two that leaves its longer side at least `size` px. kind
    "ram" is one array for each training process; "disk" is a file beside the images for all of them
    and for later runs, named after images and size: remove it when you change open_image.
    Raises ValueError or OSError if there is too little room.
    """

    def __init__(self, annotations: Annotations, folder: str, size: int, kind: str):
        self.shrinks = [shrink_for(size / max(side)) for side in annotations.sizes.tolist()]
        self.sides = -(-annotations.sizes // np.array(self.shrinks)[:, None])     # (N, 2) px
        self.offsets = np.cumsum([0, *3 * self.sides.prod(1)])                    # (N + 1,)
        total = int(self.offsets[-1]) + len(self.sides)  # the last N say which images are there
        takes = f"--cache {kind} takes {total / 1e9:.1f} GB"
        if kind == "ram":
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            if total * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > memory:
                raise ValueError(f"{takes} a process; this machine has {memory / 1e9:.0f} GB; use "
                                 f"--cache disk or none")
            self.map = mmap.mmap(-1, total)
        else:
            files = annotations.files.tolist()
            times = [os.stat(os.path.join(folder, file)).st_mtime_ns for file in files]
            name = hashlib.sha256(repr(("CHW", size, files, times, self.sides.tolist())).encode())
            path = f"{os.path.normpath(folder)}.{name.hexdigest()[:12]}.cache"
            try:
                with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as f:
                    have = os.fstat(f.fileno()).st_size
                    if sys.platform == "linux" and have < total:  # else SIGBUS kills on a full disk
                        os.posix_fallocate(f.fileno(), 0, total)
                    f.truncate(total)
                    self.map = mmap.mmap(f.fileno(), total)
            except OSError as error:
                if os.access(path, os.W_OK):  # another process may have removed it
                    os.remove(path)
                raise OSError(f"{takes}, {path}: {error.strerror}; use ram or none") from None
        self.pixels, self.there = np.split(np.frombuffer(self.map, np.uint8), self.offsets[-1:])

    def read(self, index: int, path: str, width: int, height: int,
             zoom: float) -> tuple[np.ndarray, int]:
        """Like open_image, for image `index` of the set."""
        (w, h), shrink = self.sides[index].tolist(), self.shrinks[index]
        begin, end = self.offsets[index:index + 2].tolist()
        image = self.pixels[begin:end].reshape(3, h, w)
        if not self.there[index]:
            image[:] = open_image(path, width, height, 1 / shrink)[0]
            page = begin - begin % mmap.PAGESIZE
            self.map.flush(page, end - page)  # a crash of the machine may lose what is not on disk
            self.there[index] = 1  # last; two processes at once write the same pixels
        more = shrink_for(zoom * shrink)
        if more > 1:
            image = np.stack([Image.fromarray(channel).reduce(more) for channel in image])
        return image, shrink * more


def occlude(image: Tensor, mask: Tensor | None, boxes: np.ndarray, keypoints: np.ndarray,
            rng: np.random.Generator, p: float) -> None:
    """Cover a part of each person of boxes (M, 4) with probability p, by a plain rectangle around
    a labeled keypoint. image (3, S, S), mask (1, S/2, S/2) and keypoints (M, K, 3) are changed in
    place: any person's visible keypoints (2) under the rectangle become hidden (1)."""
    for box, person in zip(boxes, keypoints):
        labeled = person[person[:, 2] > 0, :2]
        if rng.random() < p and len(labeled):
            reach = rng.uniform(0.05, 0.2, 2) * (box[2:] - box[:2])
            middle = labeled[rng.integers(len(labeled))]
            low, high = (np.floor((middle + side * reach) / 2).astype(int) for side in (-1, 1))
            (x1, y1), (x2, y2) = low.clip(0), high.clip(0)
            image[:, 2 * y1:2 * y2, 2 * x1:2 * x2] = torch.from_numpy(
                rng.integers(256, size=3))[:, None, None]
            if mask is not None:
                mask[:, y1:y2, x1:x2] = 0
            under = ((keypoints[..., :2] >= 2 * low) & (keypoints[..., :2] < 2 * high)).all(-1)
            keypoints[under & (keypoints[..., 2] == 2), 2] = 1


class CocoPose(Dataset):
    """Item (epoch, i) is the sample dict (see the top) of image i, augmented for that epoch.

    keep_ignored keeps crowds and people without a labeled keypoint in view; else they are dropped,
    and crowds that have keypoints count as people, as in the original recipe. An image that cannot
    be read is replaced by the next one, up to `spare` times in a row; then DataError is raised.
    """

    def __init__(self, annotations: Annotations, folder: str, skeleton: Skeleton, size: int,
                 pad: str, augment: Augment = PLAIN, seed: int = 0, keep_ignored: bool = True,
                 cache: Cache | None = None, spare: int = 0):
        self.annotations, self.folder, self.skeleton = annotations, folder, skeleton
        self.size, self.pad, self.augment, self.seed = size, pad, augment, seed
        self.keep_ignored, self.cache, self.spare = keep_ignored, cache, spare

    def __len__(self) -> int:
        return len(self.annotations.ids)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        bad = []
        while True:
            try:
                return {**self.sample(epoch, (index + len(bad)) % len(self)), "bad": bad}
            except DataError as error:
                if len(bad) == self.spare:
                    raise
                bad.append(str(error))

    def sample(self, epoch: int, index: int) -> dict:
        """Image `index` augmented for that epoch, with a random generator of its own."""
        rng = np.random.default_rng((self.seed, epoch, index))
        image, mask, people, matrix = self.compose(index, epoch, rng)
        if rng.random() < self.augment.mixup:
            more, more_mask, others, _ = self.compose(int(rng.integers(len(self))), epoch, rng)
            image = torch.lerp(image.float(), more.float(), rng.beta(32, 32)).add_(0.5).byte()
            mask = None if mask is None else torch.maximum(mask, more_mask)
            people = tuple(np.concatenate(pair) for pair in zip(people, others))
        boxes, keypoints, crowd = people
        if self.augment.occlude:
            occlude(image, mask, boxes, keypoints, rng, self.augment.occlude)
        sample = {"image": image.numpy().transpose(1, 2, 0), "boxes": boxes,
                  "keypoints": keypoints, "crowd": crowd, "matrix": matrix[:2],
                  "image_id": int(self.annotations.ids[index])}
        return sample if mask is None else {**sample, "mask": mask[0].numpy()}

    def compose(self, index: int, epoch: int, rng: np.random.Generator) -> tuple:
        """Image `index`, or a mosaic with three others: canvas, mask or None, people, matrix."""
        indices = [index]
        if rng.random() < self.augment.mosaic and epoch < self.augment.last_mosaic:
            indices += rng.integers(len(self), size=3).tolist()
        frames = [random_geometry(*self.annotations.sizes[i].tolist(), rng, self.augment)
                  for i in indices]
        corners, width, height = collage([(w, h) for _, w, h in frames])
        fit = letterbox(width, height, self.size, self.pad)
        canvas, mask, people = blank(self.size), None, []
        if self.annotations.masks:
            mask = torch.zeros(1, self.size // 2, self.size // 2, dtype=torch.uint8)
        for i, (matrix, w, h), (x, y) in zip(indices, frames, corners):
            region = move(np.array([[x, y], [x + w, y + h]]), fit).reshape(4)  # x1, y1, x2, y2
            matrix = fit @ matrix3(1, 0, x, 0, 1, y) @ matrix
            self.paint(canvas, i, matrix, region, rng)
            if mask is not None:
                self.paint_mask(mask, i, np.diag([0.5, 0.5, 1]) @ matrix, region / 2)
            people.append(self.people(i, matrix, region))
        return canvas, mask, tuple(np.concatenate(part) for part in zip(*people)), matrix

    def paint(self, canvas: Tensor, index: int, matrix: np.ndarray, region: np.ndarray,
              rng: np.random.Generator) -> None:
        """Resample image `index` through the (3, 3) matrix into region (4,) px of the canvas."""
        path = os.path.join(self.folder, str(self.annotations.files[index]))
        width, height = self.annotations.sizes[index].tolist()
        zoom = math.sqrt(abs(np.linalg.det(matrix[:2, :2])))
        try:
            image, shrink = (self.cache.read(index, path, width, height, zoom) if self.cache else
                             open_image(path, width, height, zoom))
        except UNREADABLE as error:
            raise DataError(f"{path}: {error}; fix or remove the file or its record") from None
        color = random_color(image, rng, self.augment)
        warp(canvas, image, matrix @ np.diag([shrink, shrink, 1]), region,
             None if np.array_equal(color, np.eye(3, 4)) else color)

    def paint_mask(self, canvas: Tensor, index: int, matrix: np.ndarray,
                   region: np.ndarray) -> None:
        """Resample the mask of people in the same way. Boxes of crowds and of people without a
        segmentation are unknown (2), except where a segmented person is."""
        a, rows = self.annotations, slice(*self.annotations.offsets[index:index + 2])
        width, height = a.sizes[index].tolist()
        pixels = np.zeros((height, width), np.uint8)
        for x1, y1, x2, y2 in a.boxes[rows][~a.masked[rows]].round().astype(int).clip(0):
            pixels[y1:y2, x1:x2] = 2
        runs = a.masks[slice(*a.mask_offsets[index:index + 2])]
        if runs:
            pixels[coco_mask.decode({"size": [height, width], "counts": runs}) > 0] = 1
        warp(canvas, pixels[None], matrix, region, fill=0, mode="nearest")

    def people(self, index: int, matrix: np.ndarray, region: np.ndarray) -> tuple:
        """Boxes (M, 4), keypoints (M, K, 3) and crowd (M,) of image `index`, mapped by the matrix
        and cut to region (4,) px: keypoints outside, or in a box under 1 px^2, become unlabeled. A
        person with none left keeps a box, which counts neither as person nor as background. Who is
        out of view is dropped."""
        a, rows = self.annotations, slice(*self.annotations.offsets[index:index + 2])
        low, high, crowd = region[:2], region[2:], a.crowd[rows]
        corners = a.boxes[rows][:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
        corners = move(corners, matrix).clip(low, high)                               # (M, 4, 2)
        boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1)              # (M, 4)
        width, height = (boxes[:, 2:] - boxes[:, :2]).T
        xy, v = move(a.keypoints[rows, :, :2], matrix), a.keypoints[rows, :, 2]  # (M, K, 2), (M, K)
        labeled = (v > 0) & ((xy >= low) & (xy < high)).all(-1) & (width * height >= 1)[:, None]
        keypoints = np.where(labeled[..., None], np.concatenate([xy, v[..., None]], -1), 0)
        if np.linalg.det(matrix[:2, :2]) < 0:
            keypoints = keypoints[:, self.skeleton.flip]
        keep = (width > 0) & (height > 0)
        if not self.keep_ignored:
            keep, crowd = keep & keypoints[..., 2].any(1), np.zeros_like(crowd)
        return boxes[keep].astype(np.float32), keypoints[keep].astype(np.float32), crowd[keep]


def collate(samples: list[dict]) -> tuple[Tensor, dict[str, Tensor]]:
    """Images (B, 3, S, S) uint8 and targets: boxes (B, M, 4), keypoints (B, M, K, 3), crowd (B, M),
    image_id (B,), matrix (B, 2, 3), mask (B, S/2, S/2) if there is one, and the list `bad`.
    M is the batch's largest number of people, at least 1; rows without a person are 0."""
    targets = {"bad": [error for s in samples for error in s["bad"]]}
    for name in ("boxes", "keypoints", "crowd"):
        rows = [torch.from_numpy(s[name]) for s in samples]
        rows.append(rows[0].new_zeros(1, *rows[0].shape[1:]))  # makes M at least 1
        targets[name] = nn.utils.rnn.pad_sequence(rows, batch_first=True)[:-1]        # (B, M, ...)
    for name in ("image_id", "matrix", "mask"):
        if name in samples[0]:
            targets[name] = torch.from_numpy(np.stack([s[name] for s in samples]))
    images = torch.stack([torch.from_numpy(s["image"]).permute(2, 0, 1) for s in samples])
    return images, targets                                                            # (B, 3, S, S)


def random_size(size: int, gain: float, seed: int, step: int) -> int:
    """A step's image size, the same on all processes: a multiple of 32 in size * (1 -+ gain)."""
    low, high = math.ceil(size * (1 - gain) / 32), math.floor(size * (1 + gain) / 32)
    if gain and low == high:
        raise ValueError(f"--multi-scale {gain} of {size} px reaches no other multiple of 32 px; "
                         f"choose a larger one")
    return 32 * int(np.random.default_rng((seed, step, size)).integers(max(low, 1), high + 1))


def resize(images: Tensor, targets: dict[str, Tensor], size: int) -> tuple[Tensor, dict]:
    """Resize images (B, 3, S, S) and their targets to `size` px, on their device."""
    zoom = size / images.shape[-1]
    if zoom == 1:
        return images, targets
    images = F.interpolate(images, (size, size), mode="bilinear", antialias=zoom < 1)
    points = targets["keypoints"]
    targets = {**targets, "boxes": targets["boxes"] * zoom,
               "keypoints": torch.cat([points[..., :2] * zoom, points[..., 2:]], -1)}
    if "mask" in targets:
        targets["mask"] = F.interpolate(targets["mask"][:, None], (size // 2, size // 2),
                                        mode="nearest-exact")[:, 0]
    return images.contiguous(memory_format=torch.channels_last), targets


def stream(images: int, seed: int, batch_size: int, start: int = 0, rank: int = 0,
           world_size: int = 1, accumulate: int = 1) -> Iterator[list[tuple[int, int]]]:
    """Batches of (epoch, index), from step `start` on, of an endless stream of shuffled epochs.

    Step k takes positions k G to (k + 1) G - 1 of it, G = batch_size * world_size * accumulate, so
    the order depends on the seed and G alone. A step is `accumulate` batches for each process. It
    is a generator: a second loop over it goes on where the first one stopped."""
    @functools.lru_cache(1)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(images)

    for micro in itertools.count(start * accumulate):
        first = (micro * world_size + rank) * batch_size
        places = [divmod(first + i, images) for i in range(batch_size)]
        yield [(epoch, int(order(epoch)[i])) for epoch, i in places]


def ignore_signals(worker: int) -> None:
    """Let a loader process end with the training process, not by Ctrl-C or schedulers' signals."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # PR_SET_PDEATHSIG: workers would keep a killed parent's GPU memory
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def stop_workers() -> None:
    """Kill all loader processes: they ignore signals, so the interpreter would wait for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report them as crashed
    for process in multiprocessing.active_children():
        if process.daemon:  # others would be a program's own, which waits for them
            process.kill()


def make_loader(dataset: CocoPose, batches, workers: int, device: torch.device) -> DataLoader:
    """A DataLoader of collated batches; `batches` is an iterable of lists of (epoch, index)."""
    atexit.register(stop_workers)  # not on import: a program's other daemons would be killed, too
    # Fork is tested; spawned workers would import torch again each time, and copy the cache.
    fork = "fork" if workers and (dataset.cache or sys.platform == "linux") else None
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate,
                      pin_memory=device.type == "cuda", worker_init_fn=ignore_signals,
                      multiprocessing_context=fork)
