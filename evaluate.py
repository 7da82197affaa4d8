"""From raw outputs to COCO keypoint AP.

    python evaluate.py --data DIR --weights runs/train/best.pt
    python evaluate.py --data DIR --weights runs/train/best.pt --card card.html    # explains the AP

Owns thresholds, NMS, COCO result dicts, scoring and the diagnosis of errors. Knows nothing about
training, and nothing about how a page looks.

Read in this order: select, to_coco, score, evaluate; for the card diagnose, put_right, make_card.

Axes    B images   A anchors   K keypoints
        D detections kept in one image   M labeled people of one image   P pairs of the two
Protocol: all images of the split count, with and without people; one scale, no mirroring unless
asked for; a detection's score is the person score alone; pycocotools scores at most 20 detections
an image.
"""
import argparse
import contextlib
import json
import math
import os
import sys
import time
import timeit
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data import (COCO_EDGES, COCO_NAMES, PAD_MODES, CocoPose, Skeleton, check_files, collate,
                  find_split, flatten, make_loader, read_json, read_skeleton, undo)
from draw import card_page, contact_sheet, draw_people, save_picture, write_file
from model import SIZES, Decoded, YoloNasPose, decode, make_anchors, read_weights

METRICS = ("AP", "AP50", "AP75", "AP_medium", "AP_large",
           "AR", "AR50", "AR75", "AR_medium", "AR_large", "OKS")
KEYPOINT_NUMBERS = ("OKS", "PCK", "good", "jitter", "inversion", "swap", "miss")
KINDS = ("best", "score", "duplicate", "background")  # of detections
FOUND = 0.1      # OKS from which a person counts as found
PCK_SHARE = 0.1  # of the longer side of the box: https://doi.org/10.1109/TPAMI.2012.261
# The first two rows are read by place, below and in card_page of draw.py.
GROUPS = {"images": (("all", -1, math.inf), ("with labeled people", 0, math.inf)),
          "people in the image": (("1", 0, 1), ("2", 1, 2), ("3 to 5", 2, 5),
                                  ("6 or more", 5, math.inf)),  # low < n <= high
          "crowding": (("easy", -1, 0.1), ("medium", 0.1, 0.8), ("hard", 0.8, 1))}


def select(boxes: Tensor, scores: Tensor, conf: float = 0.01, iou: float = 0.7,
           pre: int = 300, post: int = 20) -> Tensor:
    """Which anchors of one image are detections, best first: indices (D,), D <= post.

    boxes (A, 4) px, scores (A,). Keeps scores of at least conf, of these the best `pre`, drops
    boxes whose IoU with a better one is above iou, and returns the best `post`.
    """
    from torchvision.ops import nms  # takes 2 s, for which a misspelt flag would wait
    kept = (scores >= conf).nonzero()[:, 0]                                       # (D,)
    if len(kept) > pre:
        kept = kept[scores[kept].topk(pre).indices]                               # (pre,)
    return kept[nms(boxes[kept].float(), scores[kept].float(), iou)[:post]]


def to_coco(image_id: int, category_id: int, scores: np.ndarray,
            keypoints: np.ndarray) -> list[dict]:
    """Detections of one image as COCO results; scores (D,), keypoints (D, K, 3): x px, y px, score.

    COCO's keypoints are pixel indices, hence the 0.5. A result has no "bbox": with one, pycocotools
    would take its area instead of the pose's.
    """
    return [{"image_id": image_id, "category_id": category_id, "score": float(score),
             "keypoints": (pose - [0.5, 0.5, 0]).ravel().tolist()}
            for score, pose in zip(scores, keypoints)]


def quiet_coco(labels: dict) -> COCO:
    """The COCO object of loaded labels, without pycocotools' prints. Annotation ids are renumbered
    from 1: pycocotools would take a match with id 0 for no match."""
    coco = COCO()
    coco.dataset = labels | {"annotations": [
        {**ann, "id": n} for n, ann in enumerate(labels["annotations"], 1)]}
    with contextlib.redirect_stdout(None):
        coco.createIndex()
    return coco


def gather(value) -> list:
    """The values of all processes, in a list, on every process."""
    found = [value]
    if dist.is_initialized():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, value)
    return found


def from_rank_0(value):
    """Process 0's value, on every process."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def score(truth: COCO, by_image: dict[int, list[dict]], sigmas: Sequence[float]) -> COCOeval:
    """Score the images in by_image with pycocotools, quietly: stats, ious, _gts and more.

    by_image    image_id -> results of to_coco. An image without detections must be there with an
                empty list: left out, it would not be scored, and AP would look better than it is.
    """
    results = [dict(r) for found in by_image.values() for r in found]  # loadRes adds keys to them
    with contextlib.redirect_stdout(None):  # pycocotools prints as it goes
        # loadRes fails on an empty list, which is normal in a first epoch
        found = truth.loadRes(results) if results else COCO()
        scorer = COCOeval(truth, found, "keypoints")
        scorer.params.imgIds = sorted(by_image)
        scorer.params.kpt_oks_sigmas = np.asarray(sigmas)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer


def best_oks(scorer: COCOeval) -> dict[int, list[float]]:
    """{image_id: OKS of each labeled person's best detection}, of what score returns."""
    best = {}
    for key, people in scorer._gts.items():
        values = scorer.ious.get(key, [])  # (D, people), or [] if either is 0
        best[key[0]] = [float(max(values[:, i])) if len(values) else 0.0
                        for i, person in enumerate(people) if not person["ignore"]]
    return best


def keypoint_ap(truth: COCO, by_image: dict[int, list[dict]],
                sigmas: Sequence[float]) -> dict[str, float]:
    """COCO's ten keypoint metrics, -1 if nobody of that size is labeled; and OKS, the mean of
    best_oks, which says more than AP while AP is near 0."""
    scorer = score(truth, by_image, sigmas)
    best = [oks for values in best_oks(scorer).values() for oks in values] or [-1]
    return dict(zip(METRICS, [*scorer.stats.tolist(), float(np.mean(best))]))


def people_in(out: Decoded, b: int, matrix: np.ndarray, conf: float, iou: float = 0.7,
              pre: int = 300, post: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """People detected in image b, best first: boxes (D, 4), scores (D,), keypoints (D, K, 3).

    Keypoints are x, y and a score. matrix (2, 3) is that of the image's sample; boxes and keypoints
    are in px of the file, continuous. For the other parameters see select.
    """
    kept = select(out.boxes[b], out.scores[b], conf, iou, pre, post)              # (D,)
    boxes, scores, xy, kpt_scores = (t[b, kept].double().cpu().numpy() for t in out)
    boxes = undo(boxes.reshape(-1, 2, 2), matrix).reshape(-1, 4)
    return boxes, scores, np.concatenate([undo(xy, matrix), kpt_scores[..., None]], -1)


def detect(out: Decoded, targets: dict[str, Tensor], category_id: int, conf: float,
           iou: float) -> dict[int, list[dict]]:
    """A batch's detections {image_id: results}, in px of the files."""
    ids, matrices = targets["image_id"].tolist(), targets["matrix"].numpy()
    return {i: to_coco(i, category_id, *people_in(out, b, matrix, conf, iou)[1:])
            for b, (i, matrix) in enumerate(zip(ids, matrices))}


def to_input(images: Tensor, model: nn.Module) -> Tensor:
    """A loader's images (B, 3, S, S) uint8 as the model's input: floats in [0, 1]."""
    weight = next(model.parameters())
    return images.to(weight.device, non_blocking=True).to(weight.dtype) / 255


def mirror(out: Decoded, height: int, width: int, flip: list[int]) -> Decoded:
    """Map the outputs for mirrored images (height, width px) back to the unmirrored images.

    Sides are multiples of 32 px, so every cell has a mirror twin: anchors change places with their
    twins, and keypoints with those of the other side (Skeleton.flip).
    """
    centers, strides = make_anchors(height, width, out.scores.device)             # (A, 2), (A, 1)
    cells = (width - 2 * centers[:, 0]) / strides[:, 0]  # from each to its twin, in its row
    twin = torch.arange(len(cells), device=cells.device) + cells.long()           # (A,)
    boxes, scores, keypoints, kpt_scores = (t[:, twin] for t in out)
    x1, y1, x2, y2 = boxes.unbind(-1)
    x, y = keypoints[:, :, flip].unbind(-1)
    return Decoded(torch.stack([width - x2, y1, width - x1, y2], -1), scores,
                   torch.stack([width - x, y], -1), kpt_scores[:, :, flip])


@torch.no_grad()
def look(model: nn.Module, images: Tensor, flip: list[int] | None = None,
         bf16: bool = False) -> tuple[Decoded, Tensor | None]:
    """Decoded outputs for images (B, 3, S, S) uint8, before any threshold; and mask logits or None.

    flip is Skeleton.flip for the flip test: boxes and keypoints are the means of image and mirror
    image, weighted by their scores; the score is the larger one, as a person is often detected by
    an anchor in one and by its neighbor in the other. bf16: autocast of the network; decoding is in
    float32. Raises ValueError for a model in training mode, whose norms would update statistics.
    """
    if model.training:
        raise ValueError("the model is in training mode; call its eval() first")
    x = to_input(images, model)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        raw = model(x)
    out, mask = decode(raw), raw.mask_logits
    if flip:
        twin, twin_mask = look(model, images.flip(3), bf16=bf16)
        twin = mirror(twin, *images.shape[2:], flip)
        share = out.scores / (out.scores + twin.scores).clamp(min=1e-30)          # (B, A)
        mean = (b + (a - b) * share.view(*share.shape, *[1] * (a.ndim - 2))
                for a, b in zip(out, twin))
        out = Decoded(*mean)._replace(scores=torch.maximum(out.scores, twin.scores))
        mask = None if mask is None else (mask + twin_mask.flip(2)) / 2
    return out, mask


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, truth: COCO, sigmas: Sequence[float],
             conf: float = 0.01, iou: float = 0.7, progress: bool = False,
             flip: list[int] | None = None,
             bf16: bool = False) -> tuple[dict[str, float], dict[int, list[dict]]]:
    """Metrics of the model (in eval mode) on the loader's images, and its results by image.

    Each process evaluates its share of the images; process 0 scores all and sends the metrics to
    the others, so that all decide alike. If network and loader have masks, mask_IoU, of people's
    pixels in all images, is added. flip and bf16 are those of look.
    """
    category_id = truth.dataset["categories"][0]["id"]
    by_image, start, pixels = {}, time.monotonic(), torch.zeros(2, dtype=torch.float64)
    for images, targets in loader:
        decoded, mask = look(model, images, flip, bf16)
        by_image |= detect(decoded, targets, category_id, conf, iou)
        if mask is not None and "mask" in targets:
            found, true = mask.cpu() > 0, targets["mask"] == 1                    # (B, S/2, S/2)
            found &= targets["mask"] != 2
            pixels += torch.stack([(found & true).sum(), (found | true).sum()])
        if progress and (sys.stdout.isatty() or len(by_image) == len(loader.dataset)):
            rate = len(by_image) / (time.monotonic() - start)
            print(f"{len(by_image)}/{len(loader.dataset)} images  {rate:.1f} img/s",
                  end="\n" if len(by_image) == len(loader.dataset) else "\r", flush=True)
    shares, metrics = gather((by_image, pixels)), None
    by_image = {i: results for part, _ in shares for i, results in part.items()}  # no image twice
    both, either = sum(counts for _, counts in shares).tolist()
    if not dist.is_initialized() or dist.get_rank() == 0:
        metrics = keypoint_ap(truth, by_image, sigmas)
        if either > 0:
            metrics["mask_IoU"] = both / either
    return from_rank_0(metrics), by_image


def draw_samples(dataset: CocoPose, keys: list[tuple[int, int]],
                 model: nn.Module | None = None) -> list[Image.Image]:
    """Draw inputs with labels, or with a model's predictions (in eval mode). keys: (epoch, index).

    Predictions with a score of 0.3 or more are drawn, and always the best one.
    """
    samples, skeleton = [dataset[key] for key in keys], dataset.skeleton
    people = [(sample["boxes"], None, sample["keypoints"]) for sample in samples]
    if model is not None and samples:
        out, _ = look(model, collate(samples)[0])
        people = [people_in(out, b, np.eye(2, 3), min(0.3, out.scores[b].max().item()))
                  for b in range(len(samples))]
    return [draw_people(Image.fromarray(sample["image"]), boxes, keypoints, skeleton.names,
                        skeleton.edges, skeleton.flip, scores)
            for sample, (boxes, scores, keypoints) in zip(samples, people)]


def save_people(path: str, dataset: CocoPose, keys: list[tuple[int, int]],
                model: nn.Module | None = None) -> None:
    """Save a sheet of up to 16 of draw_samples' pictures."""
    save_picture(path, contact_sheet(draw_samples(dataset, keys[:16], model)))


def extremes(model: nn.Module, dataset: CocoPose, truth: COCO, by_image: dict[int, list[dict]],
             most: int = 500) -> list[tuple[str, Image.Image]]:
    """Captions and pictures of the model's worst, median and best images, up to three of each.

    A picture has labels on the left and predictions on the right. Images with a labeled person, at
    most `most`, evenly spread, are ranked by the mean of best_oks. by_image is evaluate's.
    """
    index = {n: i for i, n in enumerate(dataset.annotations.ids.tolist()) if any(
        p["num_keypoints"] and not p["iscrowd"] for p in truth.imgToAnns[n])}
    part = {n: by_image[n] for n in list(index)[::math.ceil(len(index) / most) or 1]}
    oks = best_oks(score(truth, part, dataset.skeleton.sigmas)) if part else {}
    ranked = sorted((float(np.mean(values)), index[n]) for n, values in oks.items())
    each = min(3, math.ceil(len(ranked) / 3))
    middle = (len(ranked) - each) // 2
    names = (dict.fromkeys(ranked[middle:middle + each], "median")
             | dict.fromkeys(ranked[-each:], "best") | dict.fromkeys(ranked[:each], "worst"))
    chosen, pictures = sorted(names), []
    keys = [(0, i) for _, i in chosen]
    for (value, i), *pair in zip(chosen, draw_samples(dataset, keys),
                                 draw_samples(dataset, keys, model)):
        picture, side = contact_sheet(pair, 2), pair[0].width
        picture.paste("white", (side - 1, 0, side + 1, side))  # between the two
        caption = f"{names[value, i]}: OKS {value:.2f}, {dataset.annotations.files[i]}"
        pictures.append((caption, picture))
    return pictures


def val_batches(images: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list:
    """This process's share of a split, each image once: lists of (epoch, index), epoch 0."""
    mine = [(0, i) for i in range(rank, images, world_size)]
    return [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]


class Case(NamedTuple):
    """One image under diagnosis: D detections, M labeled people, P pairs of the two."""

    results: list[dict]   # (D,) of to_coco, best score first
    people: list[dict]    # (M,) annotations
    kinds: list[str]      # (D,) one of KINDS, or ignored
    pairs: np.ndarray     # (P, 2) index of a person's best detection, and of that person
    oks: np.ndarray       # (P,)
    told: np.ndarray      # (7, P, K) KEYPOINT_NUMBERS of each keypoint; 0 where it is not labeled


def similarity(poses: np.ndarray, labels: np.ndarray, area: np.ndarray,
               sigmas: np.ndarray) -> np.ndarray:
    """(D, M, K): exp(-distance^2 / (8 sigma^2 area)), whose mean over labeled keypoints is OKS.

    poses (D, K, 2), labels (M, K, 3) px, area (M,) px^2. 0 where a keypoint is not labeled.
    """
    distance2 = np.square(poses[:, None] - labels[..., :2]).sum(-1)               # (D, M, K) px^2
    spread = 8 * np.square(sigmas) * (area[:, None] + np.spacing(1))              # (M, K) px^2
    return np.exp(-distance2 / spread) * (labels[..., 2] > 0)


def diagnose(results: list[dict], people: list[dict], passed: np.ndarray,
             skeleton: Skeleton) -> Case:
    """Classify each detection of an image, and the keypoint errors of each person's best detection.

    results: best score first. passed (D,): pycocotools ignores this detection at an OKS of 0.5, as
    it shows a crowd, or is the first to show a person without keypoints.
    Errors are those of Ronchi & Perona, https://arxiv.org/abs/1707.05388, by these rules:
    * Detections and people are paired by OKS, largest first, down to FOUND; a pose with left and
      right swapped as a whole is paired, too. The best detection counts, whatever its score.
    * A keypoint with a similarity of at least 0.85 to its label is good. Else the most similar
      label decides: its own (jitter), that of the other side (inversion), or either of these of
      another person (swap). If none reaches 0.5, it is a miss.
    * Another detection of a paired person is a score error if its score is higher, else a
      duplicate.
    """
    flip, sigmas = skeleton.flip, np.asarray(skeleton.sigmas)
    poses = np.reshape([r["keypoints"] for r in results], (-1, len(flip), 3))[..., :2]
    labels = np.reshape([p["keypoints"] for p in people], (-1, len(flip), 3))     # (M, K, 3)
    area, side = np.reshape([(p["area"], max(p["bbox"][2:])) for p in people], (-1, 2)).T
    labeled = labels[..., 2] > 0                                                  # (M, K)
    own = similarity(poses, labels, area, sigmas)                                 # (D, M, K)
    mirrored = similarity(poses, labels[:, flip], area, sigmas)                   # (D, M, K)
    upright, exchanged = (s.sum(-1) / labeled.sum(-1).clip(1) for s in (own, mirrored))
    fit = np.maximum(upright, 0.9 * exchanged)                                    # (D, M)
    person, free = np.full(len(results), -1), fit.copy()
    while free.max(initial=0) >= FOUND:
        i, j = np.unravel_index(free.argmax(), free.shape)
        person[i], free[i], free[:, j] = j, 0, 0
    kinds = np.where(person >= 0, "best", "background").tolist()
    for d in np.flatnonzero(person < 0):
        if passed[d]:
            kinds[d] = "ignored"
        elif fit[d].max(initial=0) >= FOUND:
            better = results[person.tolist().index(fit[d].argmax())]
            kinds[d] = "score" if results[d]["score"] > better["score"] else "duplicate"
    d = np.flatnonzero(person >= 0)                                               # (P,)
    m = person[d]
    anybody = np.maximum(own, mirrored)[d].max(1, initial=0)                      # (P, K)
    three = np.stack([own[d, m], mirrored[d, m], anybody])                        # (3, P, K)
    error = np.where(three.max(0) < 0.5, 4, 1 + three.argmax(0))  # (P, K), see KEYPOINT_NUMBERS[2:]
    error[three[0] >= 0.85] = 0
    far = np.linalg.norm(poses[d] - labels[m, :, :2], axis=-1)                    # (P, K) px
    told = [three[0], far <= PCK_SHARE * side[m, None], *(error == i for i in range(5))]
    return Case(results, people, kinds, np.stack([d, m], 1), upright[d, m], told * labeled[m])


def put_right(case: Case, error: str) -> list[dict]:
    """The image's results as they would be without this one kind of error.

    A wrong keypoint moves onto its label; scores become the OKS of each person's best detection and
    0 for the others; duplicates and background are removed; missed people are added, with score 1.
    """
    if error == "missed":
        return case.results + [
            {name: p[name] for name in ("image_id", "category_id", "keypoints")} | {"score": 1.0}
            for m, p in enumerate(case.people) if m not in case.pairs[:, 1]]
    if error == "score":
        best = dict(zip(case.pairs[:, 0].tolist(), case.oks.tolist()))
        return [r | {"score": best.get(d, 0.0)} for d, r in enumerate(case.results)]
    if error in KINDS:
        return [r for r, kind in zip(case.results, case.kinds) if kind != error]
    results, wrong = list(case.results), case.told[KEYPOINT_NUMBERS.index(error)] > 0   # (P, K)
    for (d, m), rows in zip(case.pairs, wrong):
        pose, label = (np.reshape(x["keypoints"], (-1, 3)) for x in (results[d], case.people[m]))
        pose = np.where(rows[:, None], label, pose)                               # (K, 3)
        results[d] = results[d] | {"keypoints": pose.ravel().tolist()}
    return results


def crowd_index(people: list[dict]) -> float:
    """How crowded an image's labeled people are: 0 if nobody is in another's box, at most 1.

    The mean over people of min(labeled keypoints of others in the box / own ones, 1): CrowdPose,
    https://arxiv.org/abs/1812.00324.
    """
    labels = np.reshape([p["keypoints"] for p in people], (len(people), -1, 3))   # (M, K, 3)
    boxes = np.array([p["bbox"] for p in people])[:, None, None]                  # (M, 1, 1, 4)
    offset = labels[..., :2] - boxes[..., :2]                                     # (M, M, K, 2) px
    inside = ((offset >= 0) & (offset <= boxes[..., 2:])).all(-1) & (labels[..., 2] > 0)
    count, own = inside.sum(-1), (labels[..., 2] > 0).sum(-1).clip(1)             # (M, M), (M,)
    return float(np.minimum((count.sum(1) - count.diagonal()) / own, 1).mean())


def make_card(truth: COCO, by_image: dict[int, list[dict]], skeleton: Skeleton) -> dict:
    """All that labels reveal about results, as plain numbers; -1 where nothing is labeled.

    scores     AP and AR of all images, and of groups of images or people
    keypoints  KEYPOINT_NUMBERS of people who were found, each the mean over labeled keypoints
    errors     how many of each kind, and the AP of results without them
    worst images    the 20 of the least OKS, the mean of best_oks
    """
    scorer, cases = score(truth, by_image, skeleton.sigmas), {}
    category_id = truth.dataset["categories"][0]["id"]
    passed = {e["image_id"]: e["dtIgnore"][0] for e in scorer.evalImgs[:len(by_image)] if e}
    for i, found in by_image.items():  # evalImgs begins with all sizes, dtIgnore with OKS 0.5
        results = sorted(found, key=lambda r: -r["score"])[:20]
        labeled = [a for a in scorer._gts[i, category_id] if not a["ignore"]]
        cases[i] = diagnose(results, labeled, passed.get(i, []), skeleton)
    people = {i: len(case.people) for i, case in cases.items()}
    values = {"images": people, "people in the image": people,
              "crowding": {i: crowd_index(c.people) for i, c in cases.items() if c.people}}
    groups = [(group, name, [i for i, value in values[group].items() if low < value <= high])
              for group, classes in GROUPS.items() for name, low, high in classes]
    stats = [keypoint_ap(truth, {i: by_image[i] for i in ids}, skeleton.sigmas) if ids else
             dict.fromkeys(METRICS, -1.0) for *_, ids in groups]
    scores = [{"group": group, "which": name, "images": len(ids),
               "people": sum(people[i] for i in ids)}
              | {metric: part[metric] for metric in ("AP", "AP50", "AP75", "AR")}
              for (group, name, ids), part in zip(groups, stats)]
    areas = np.array([p["area"] for case in cases.values() for p in case.people])
    for name, low, high in (("medium", 32, 96), ("large", 96, 1e5)):
        inside = (areas >= low ** 2) & (areas <= high ** 2)
        scores.append({"group": "size", "which": name, "people": int(inside.sum())}
                      | {metric: stats[0][f"{metric}_{name}"] for metric in ("AP", "AR")})
    oks = {i: float(np.mean(best)) for i, best in best_oks(scorer).items() if best}
    worst = [{"file": truth.imgs[i]["file_name"], "people": people[i], "OKS": oks[i]}
             for i in sorted(oks, key=oks.get)[:20]]
    return {"scores": scores, "worst images": worst} | count_errors(
        truth, cases, stats[0]["AP"], skeleton)


def count_errors(truth: COCO, cases: dict[int, Case], ap: float, skeleton: Skeleton) -> dict:
    """The keypoints and errors of make_card; ap is the AP of the unchanged results."""
    told = np.concatenate([case.told for case in cases.values()], 1).sum(1)       # (7, K)
    told = np.column_stack([told.sum(1), told])                                   # (7, 1 + K)
    labeled = told[2:].sum(0).astype(int).tolist()
    keypoints = [{"keypoint": name, "labeled": n}
                 | dict(zip(KEYPOINT_NUMBERS, (column / n).tolist() if n else 7 * [-1.0]))
                 for name, n, column in zip(["all", *skeleton.names], labeled, told.T)]
    kinds = [kind for case in cases.values() for kind in case.kinds]
    missed = sum(len(case.people) - len(case.pairs) for case in cases.values())
    errors = []
    for of, tally in (
            ("keypoints of found people", dict(zip(KEYPOINT_NUMBERS[2:], told[2:, 0].astype(int)))),
            ("detections", {kind: kinds.count(kind) for kind in KINDS}),
            ("people", {"found": kinds.count("best"), "missed": missed})):
        for name, n in tally.items():
            row = {"of": of, "kind": name, "count": int(n),
                   "share": float(n / max(sum(tally.values()), 1))}
            if name not in ("good", "best", "found"):
                fixed = {i: put_right(case, name) for i, case in cases.items()}
                row["AP"] = keypoint_ap(truth, fixed, skeleton.sigmas)["AP"]
                row["gain"] = row["AP"] - ap
            errors.append(row)
    return {"keypoints": keypoints, "errors": errors}


def seconds(call: Callable) -> float:
    """How long a call takes: the median of ten, after three to warm up."""
    return float(np.median(timeit.repeat(call, number=1, repeat=13)[3:]))


def load_model(path: str, size: str | None = None, image_size: int | None = None,
               pad: str | None = None) -> tuple[YoloNasPose, dict]:
    """The network of a checkpoint with its weights, in eval mode, and a dict of the file's other
    parts: always skeleton (a Skeleton's fields), image_size (px) and pad, as given here or saved.

    size is needed for official files, which name neither it nor keypoints (unless a skeleton was
    added to the file); 17 are taken for COCO's.
    Raises OSError and ValueError.
    """
    state, file = read_weights(path)
    if file.get("format") != "nanopose":
        if size is None:
            raise ValueError(f"{path} does not say which size it is; add --model "
                             f"{', '.join(SIZES)} (of a teacher: --teacher-model)")
        file = {name: file[name] for name in ("skeleton",) if name in file}
        file |= {"args": {"model": size}, "unnamed": not file}
    try:
        args, k = file["args"], len(state["heads.head1.pose_pred.bias"]) // 2
        if size not in (None, args["model"]):
            raise ValueError(f"{path} is of size {args['model']}, not {size}; leave the size out")
        model = YoloNasPose(args["model"], k, mask="mask.1.bias" in state)
        model.load_state_dict(state)
    except (LookupError, RuntimeError) as error:
        raise ValueError(f"{path} holds another network, or another size of it (--model): "
                         f"{str(error).splitlines()[-1].strip()}") from None
    if "skeleton" not in file:
        category = ({"keypoints": COCO_NAMES, "skeleton": COCO_EDGES} if k == len(COCO_NAMES) else
                    {"keypoints": [f"keypoint_{i + 1}" for i in range(k)]})
        file["skeleton"] = read_skeleton({"categories": [category]})._asdict()
    file["image_size"] = image_size or args.get("image_size", 640)
    file["pad"] = pad or args.get("val_pad", "bottom_right")
    return model.eval(), file


def check_names(whose: str, names: list[str], expected: list[str]) -> None:
    """Raise ValueError if these keypoints are not the ones expected, in that order."""
    if names != expected:
        new, absent = (", ".join(n for n in a if n not in b) for a, b in
                       ((names, expected), (expected, names)))
        raise ValueError(f"{whose} has other keypoints than expected here: "
                         + (f"new {new or 'none'}, lacking {absent or 'none'}" if new or absent else
                            f"the same in another order, {', '.join(names)}")
                         + "; they must be the same, in the same order")


def open_split(path: str, folder: str, file: dict, masks: bool = False) -> tuple[CocoPose, dict]:
    """The images of a json, prepared for the network of load_model's file, and the labels.

    masks: read people's pixels, if there are any. Raises OSError and ValueError.
    """
    labels, skeleton = read_json(path), Skeleton(**file["skeleton"])
    names = labels["categories"][0]["keypoints"]
    if "format" not in file and file["unnamed"] and len(names) == len(skeleton.names):
        skeleton = read_skeleton(labels)  # an official file does not say it
    check_names(path, names, skeleton.names)
    masks &= any(a.get("segmentation") and not a["iscrowd"] for a in labels["annotations"])
    annotations = flatten(labels, masks=masks)
    check_files(annotations, folder, headers=True)
    return CocoPose(annotations, folder, skeleton, file["image_size"], file["pad"]), labels


def check_places(p: argparse.ArgumentParser, written: list, read: list, new: str = "") -> None:
    """Exit with code 2 and one line if one of `written` cannot become a file, or is written twice,
    or is one of `read`, or if `new` cannot become a folder. None stands for no path."""
    if any(map(os.path.isfile, (new, *Path(new).parents))):
        p.error(f"--out {new} is a file, or in one; expected the name of a folder")
    taken = {os.path.realpath(path) for path in read if path}
    for path in filter(None, written):
        folder = os.path.dirname(path) or "."
        made = new and os.path.realpath(folder) == os.path.realpath(new)
        if os.path.exists(path) and not os.path.isfile(path) or not (
                made or os.access(folder, os.W_OK)):
            p.error(f"{path} is a folder or device, or in a folder that is missing or read-only; "
                    f"expected the name of a file")
        if os.path.realpath(path) in taken:
            p.error(f"{path} is read, or written twice; choose another name to write to")
        taken.add(os.path.realpath(path))


def numbers(text: str) -> list[float]:
    """Parse a flag value like 90,120."""
    return [float(value) for value in text.split(",")]


def parse(p: argparse.ArgumentParser, argv: list[str] | None, conf: float,
          batch_size: int) -> argparse.Namespace:
    """Read p's flags, and those that evaluate, predict and export share; conf and batch_size are
    defaults. Exits with code 2 and one line of advice if a value cannot work."""
    add, p.usage = p.add_argument, p.usage or "%(prog)s [flags]"
    add("--weights", required=True, metavar="FILE", help="checkpoint of train.py, or official")
    add("--model", choices=[*SIZES], help="size, for an official checkpoint")
    add("--image-size", type=int, help="in px; default: the checkpoint's, else 640")
    add("--pad", choices=PAD_MODES, help="default: checkpoint's, else bottom_right")
    add("--batch-size", type=int, default=batch_size, help="images per pass; default: %(default)s")
    add("--conf", type=float, default=conf, help="smallest person score; default: %(default)s")
    add("--iou", type=float, default=0.7, help="largest NMS overlap; default: %(default)s")
    args = p.parse_args(argv)
    if args.image_size is not None and (args.image_size % 32 or args.image_size < 32):
        p.error(f"--image-size {args.image_size} must be a multiple of 32, the largest stride")
    if args.batch_size < 1:
        p.error(f"--batch-size {args.batch_size} must be positive")
    for name in ("conf", "iou"):
        if not 0 <= getattr(args, name) <= 1:
            p.error(f"--{name} {getattr(args, name)} must lie in 0 to 1")
    return args


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read this script's flags, as parse does."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = p.add_argument
    add("--data", metavar="DIR", help="COCO root, as in train.py")
    add("--split", default="val2017", help="default: %(default)s")
    add("--json", metavar="FILE", help="labels; with --images, replaces --data")
    add("--images", metavar="DIR", help="folder of the images that --json names")
    add("--sigmas", type=numbers, metavar="X,X,...", help="for AP; default: checkpoint's")
    add("--workers", type=int, default=2, help="loader processes; default: %(default)s")
    add("--flip-test", action="store_true", help="combine with mirror images; twice as slow")
    add("--amp", choices=["no", "bf16"], default="no", help="autocast type; default: %(default)s")
    add("--fuse", action="store_true", help="fold branches and norms: same AP, faster")
    add("--metrics", metavar="FILE", help="write the metrics as json")
    add("--results", metavar="FILE", help="write the detections as COCO results")
    add("--card", metavar="FILE.html", help="write a page that explains AP: which detections "
        "are right and wrong, and why, and lists the worst images; its numbers go to FILE.json")
    args = parse(p, argv, 0.01, 16)
    if args.workers < 0:
        p.error(f"--workers {args.workers} must be 0 or more")
    if bool(args.json) != bool(args.images) or bool(args.data) == bool(args.json):
        p.error("give --data DIR, or --json FILE and --images DIR")
    if args.card and not args.card.endswith(".html"):
        p.error(f"--card {args.card} must end in .html; its numbers go to the same name in .json")
    labels = args.json or f"{args.data}/annotations/person_keypoints_{args.split}.json"
    twin = args.card and args.card[:-4] + "json"
    check_places(p, [args.metrics, args.results, args.card, twin], [args.weights, labels])
    return args


def main() -> None:
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model, file = load_model(args.weights, args.model, args.image_size, args.pad)
        path, folder = (args.json, args.images) if args.json else find_split(args.data, args.split)
        dataset, labels = open_split(path, folder, file, masks=model.mask is not None)
        loader = make_loader(dataset, val_batches(len(dataset), args.batch_size), args.workers,
                             device)
        print(f"{len(dataset)} images, {dataset.size} px, {dataset.pad}, conf {args.conf}, NMS "
              f"{args.iou}, at most 20 detections an image")
        model, truth = (model.fuse() if args.fuse else model).to(device), quiet_coco(labels)
        skeleton, start = dataset.skeleton, time.monotonic()
        if args.sigmas:
            skeleton = skeleton._replace(sigmas=read_skeleton(labels, "", args.sigmas).sigmas)
        if args.flip_test and skeleton.flip == list(range(len(skeleton.flip))) != [0]:
            raise ValueError("--flip-test needs pairs of left and right, but the checkpoint was "
                             "trained without any; see train.py's --flip-pairs")
        how = (skeleton.flip if args.flip_test else None), args.amp == "bf16"
        metrics, by_image = evaluate(model, loader, truth, skeleton.sigmas, args.conf, args.iou,
                                     True, *how)
        took = time.monotonic() - start
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
    for name, value in metrics.items():
        print(f"{name:10} " + (f"{value:.4f}" if value != -1 else "nobody labeled"))
    if args.metrics:
        write_file(args.metrics, json.dumps(metrics, indent=1))
    if args.results:
        write_file(args.results, json.dumps([r for found in by_image.values() for r in found]))
    if args.card:
        print(f"diagnosing for {args.card}: about a dozen times the scoring", flush=True)
        many = min(args.batch_size, len(dataset))
        batches = [collate([dataset[0, i] for i in range(n)]) for n in (1, many)]
        latency, of_many = (seconds(lambda: detect(look(model, images, *how)[0], targets, 1,
                                                   args.conf, args.iou))
                            for images, targets in batches)
        card = {"protocol": {
            "weights": args.weights, "labels": path, "image size": f"{dataset.size} px",
            "padding": dataset.pad, "smallest score": args.conf, "NMS overlap": args.iou,
            "most detections an image": 20, "flip test": args.flip_test, "autocast": args.amp,
            "fused": args.fuse, "sigmas": skeleton.sigmas,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else
            f"CPU, {torch.get_num_threads()} threads", "torch": torch.__version__},
            "metrics": metrics, **make_card(truth, by_image, skeleton),
            "speed": {"latency_ms": 1000 * latency, "batch": many, "img_s": many / of_many,
                      "evaluation_s": took}}
        write_file(args.card[:-4] + "json", json.dumps(card, indent=1))
        write_file(args.card, card_page(card))
        print(f"wrote {args.card}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a full disk
        sys.exit(f"evaluate.py: {error}")
