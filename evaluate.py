"""From raw outputs to COCO keypoint AP.

    python evaluate.py --data DIR --weights runs/train/best.pt
    python evaluate.py --data DIR --weights runs/train/best.pt --card card.html    # why is AP so?

Owns thresholds, NMS, COCO result dicts, scoring and the diagnosis of errors. Knows nothing about
training, and nothing about how a page looks.

Read in this order: select, to_coco, score, evaluate; for the card diagnose, put_right, make_card.

Axes    B images   A anchors   K keypoints
        D detections kept in one image   M labeled people of one image   P pairs of the two
Protocol: all images of the split count, with and without people; one scale, no mirroring unless
asked for; the score of a result is the person score alone; pycocotools does the scoring, at most
20 an image.
"""
import argparse
import contextlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.ops import nms

from data import (PAD_MODES, CocoPose, Skeleton, check_files, collate, find_split, flatten,
                  make_loader, read_json, read_skeleton, undo)
from draw import card_page, contact_sheet, draw_people, write_text
from loss import oks
from model import STRIDES, Decoded, YoloNasPose, decode, read_weights

METRICS = ("AP", "AP50", "AP75", "AP_medium", "AP_large",
           "AR", "AR50", "AR75", "AR_medium", "AR_large", "OKS")
KEYPOINT_NUMBERS = ("OKS", "PCK", "good", "jitter", "inversion", "swap", "miss")
KINDS = ("best", "score", "duplicate", "background")  # of detections
FOUND = 0.1      # OKS from which somebody counts as found
PCK_SHARE = 0.1  # of the longer side of the box: https://doi.org/10.1109/TPAMI.2012.261
GROUPS = {"people in the image": (("1", 0, 1), ("2", 1, 2), ("3 to 5", 2, 5),
                                  ("6 or more", 5, math.inf)),
          "crowding": (("easy", -1, 0.1), ("medium", 0.1, 0.8), ("hard", 0.8, 1))}


def select(boxes: Tensor, scores: Tensor, conf: float = 0.01, iou: float = 0.7,
           pre: int = 300, post: int = 20) -> Tensor:
    """Which anchors of one image are detections, best first: indices (D,), D <= post.

    boxes (A, 4) px, scores (A,). Keeps scores of at least conf, of those the best `pre`, and drops
    what overlaps a better one by more than iou.
    """
    kept = (scores >= conf).nonzero()[:, 0]                                       # (D,)
    if len(kept) > pre:
        kept = kept[scores[kept].topk(pre).indices]                               # (pre,)
    return kept[nms(boxes[kept].float(), scores[kept].float(), iou)[:post]]


def to_coco(image_id: int, category_id: int, scores: np.ndarray, keypoints: np.ndarray,
            kpt_scores: np.ndarray) -> list[dict]:
    """Detections of one image as COCO results; keypoints (D, K, 2) in px of the file.

    scores (D,), kpt_scores (D, K). COCO counts pixel indices, hence the 0.5. There is no "bbox" in
    a result: with one, pycocotools would take its area instead of the pose's.
    """
    rows = np.concatenate([keypoints - 0.5, kpt_scores[..., None]], axis=-1)      # (D, K, 3)
    return [{"image_id": image_id, "category_id": category_id, "score": float(score),
             "keypoints": row.ravel().tolist()} for score, row in zip(scores, rows)]


def quiet_coco(labels: dict) -> COCO:
    """pycocotools' index of a json that is already read, without its prints."""
    coco = COCO()
    coco.dataset = labels
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def from_rank_0(value):
    """What process 0 gave to this call, on every process."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def gather(value) -> list:
    """What each process gave to this call, on every process."""
    found = [value]
    if dist.is_initialized():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, value)
    return found


def merge_ranks(by_image: dict[int, list[dict]]) -> dict[int, list[dict]]:
    """Join every process's {image_id: results}; keyed by image, so that a repeat counts once."""
    if not dist.is_initialized():
        return by_image
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, by_image)
    return {image_id: found for share in shares for image_id, found in share.items()}


def score(truth: COCO, by_image: dict[int, list[dict]], sigmas: Sequence[float]) -> COCOeval:
    """pycocotools' judgement of the images in by_image, quietly: stats, ious, _gts and more.

    by_image    image_id -> results of to_coco. An image without detections must be there with an
                empty list: left out, it would not be scored, and AP would look better than it is.
    """
    results = [dict(r) for found in by_image.values() for r in found]  # loadRes adds keys to them
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        if results:
            found = truth.loadRes(results)
        else:  # loadRes fails on an empty list, which is normal in a first epoch
            found = quiet_coco({**truth.dataset, "annotations": []})
        scorer = COCOeval(truth, found, "keypoints")
        scorer.params.imgIds = sorted(by_image)
        scorer.params.kpt_oks_sigmas = np.asarray(sigmas)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer


def keypoint_ap(truth: COCO, by_image: dict[int, list[dict]],
                sigmas: Sequence[float]) -> dict[str, float]:
    """The ten COCO keypoint numbers of score; and OKS, the mean over labeled people of their best
    detection's, which tells more than AP where that is still near 0.

    -1 means that no labeled person is in that class of sizes.
    """
    scorer, best = score(truth, by_image, sigmas), []
    for key, people in scorer._gts.items():
        values = scorer.ious.get(key, [])  # (D, people), or [] if either is 0
        best += [max(values[:, i]) if len(values) else 0.0
                 for i, person in enumerate(people) if not person["ignore"]]
    return dict(zip(METRICS, [*map(float, scorer.stats), float(np.mean(best or [-1]))]))


def detect(decoded: Decoded, targets: dict[str, Tensor], category_id: int, conf: float,
           iou: float) -> dict[int, list[dict]]:
    """A batch's detections {image_id: results}, in px of the files."""
    by_image = {}
    for b, image_id in enumerate(targets["image_id"].tolist()):
        kept = select(decoded.boxes[b], decoded.scores[b], conf, iou)
        keypoints = undo(decoded.keypoints[b, kept].double().cpu().numpy(),
                         targets["matrix"][b].numpy())
        by_image[image_id] = to_coco(image_id, category_id, decoded.scores[b, kept].cpu().numpy(),
                                     keypoints, decoded.kpt_scores[b, kept].cpu().numpy())
    return by_image


def to_input(images: Tensor, model: nn.Module) -> Tensor:
    """Images (B, 3, S, S) uint8 of a loader to the model's input in [0, 1], channels_last."""
    weight = next(model.parameters())
    return images.to(weight.device, non_blocking=True).to(weight.dtype).div_(255)


def mirror(out: Decoded, height: int, width: int, flip: list[int]) -> Decoded:
    """What the network says of mirrored images (height, width px), as if of the images themselves.

    Sides are multiples of 32 px, so every cell has a twin: anchors change places with theirs, and
    keypoints with those of the other side (Skeleton.flip).
    """
    sides = [(height // s, width // s) for s in STRIDES]
    levels = torch.arange(out.scores.shape[1]).split([h * w for h, w in sides])
    twin = torch.cat([level.view(side).flip(1).flatten()
                      for level, side in zip(levels, sides)])                     # (A,)
    boxes, scores, keypoints, kpt_scores = (t[:, twin] for t in out)
    x1, y1, x2, y2 = boxes.unbind(-1)
    x, y = keypoints[:, :, flip].unbind(-1)
    return Decoded(torch.stack([width - x2, y1, width - x1, y2], -1), scores,
                   torch.stack([width - x, y], -1), kpt_scores[:, :, flip])


@torch.no_grad()
def look(model: nn.Module, images: Tensor, flip: list[int] | None = None,
         bf16: bool = False) -> tuple[Decoded, Tensor | None]:
    """Images (B, 3, S, S) uint8 decoded, before any threshold; and logits of people's pixels.

    flip is Skeleton.flip for the flip test: an anchor's box and keypoints are the mean of what the
    network says of the image and of its mirror image, each weighed by its score; its score is the
    larger, as a person is often seen by one anchor here and by its neighbor there. bf16 runs the
    network under autocast; decoding is float32.
    """
    images = to_input(images, model)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        raws = [model(images)] + ([model(images.flip(3))] if flip else [])
    out, mask = decode(raws[0]), raws[0].mask_logits
    if flip:
        twin = mirror(decode(raws[1]), *images.shape[2:], flip)
        share = out.scores / (out.scores + twin.scores).clamp(min=1e-30)          # (B, A)
        mean = (b + (a - b) * share.view(*share.shape, *[1] * (a.ndim - 2))
                for a, b in zip(out, twin))
        out = Decoded(*mean)._replace(scores=torch.maximum(out.scores, twin.scores))
        mask = None if mask is None else (mask + raws[1].mask_logits.flip(2)) / 2
    return out, mask


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, truth: COCO, sigmas: Sequence[float],
             conf: float = 0.01, iou: float = 0.7, progress: bool = False,
             flip: list[int] | None = None,
             bf16: bool = False) -> tuple[dict[str, float], dict[int, list[dict]]]:
    """Metrics of the model (in eval mode) on the loader's images, and its results by image.

    With several processes each brings its share of the images; process 0 scores all of them and
    tells the others, so that every process takes the same decisions. A network with a mask branch
    also gets mask_IoU, of all pixels that show somebody, where the loader has masks. flip and bf16
    are those of look.
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
        if progress:
            rate = len(by_image) / (time.monotonic() - start)
            print(f"\r{len(by_image)}/{len(loader.dataset)} images  {rate:.1f} img/s", end="",
                  flush=True)
    if progress:
        print()
    by_image, metrics = merge_ranks(by_image), [None]
    if dist.is_initialized():
        dist.all_reduce(pixels)
    if not dist.is_initialized() or dist.get_rank() == 0:
        metrics = [keypoint_ap(truth, by_image, sigmas)]
        if pixels[1] > 0:
            metrics[0]["mask_IoU"] = float(pixels[0] / pixels[1])
    if dist.is_initialized():
        dist.broadcast_object_list(metrics, src=0)
    return metrics[0], by_image


@torch.no_grad()
def draw_samples(dataset: CocoPose, keys: list[tuple[int, int]],
                 model: nn.Module | None = None) -> list[Image.Image]:
    """Inputs with their labels, or with what a model (in eval mode) sees. keys: (epoch, index).

    Of predictions those of score 0.3 or more are drawn.
    """
    names, edges = dataset.skeleton.names, dataset.skeleton.edges
    samples = [dataset[key] for key in keys]
    sheet = [Image.fromarray(sample["image"]) for sample in samples]
    if model is None:
        return [draw_people(image, sample["boxes"], sample["keypoints"], names, edges)
                for image, sample in zip(sheet, samples)]
    out = decode(model(to_input(collate(samples)[0], model)))
    pose = torch.cat([out.keypoints, out.kpt_scores[..., None]], -1)                # (B, A, K, 3)
    for i, image in enumerate(sheet):
        kept = select(out.boxes[i], out.scores[i], conf=0.3)                        # (D,)
        boxes, poses, scores = (t[i, kept].cpu().numpy() for t in (out.boxes, pose, out.scores))
        sheet[i] = draw_people(image, boxes, poses, names, edges, scores)
    return sheet


def save_people(path: str, dataset: CocoPose, keys: list[tuple[int, int]],
                model: nn.Module | None = None) -> None:
    """A sheet of up to 16 of draw_samples' pictures."""
    contact_sheet(draw_samples(dataset, keys[:16], model)).save(path, quality=90)


def best_oks(people: list[dict], found: list[dict], sigmas: Sequence[float]) -> list[float]:
    """For each labeled person of an image the OKS of its best detection.

    people are annotations of a json, found results of to_coco.
    """
    people = [p for p in people if p["num_keypoints"] and not p["iscrowd"]]
    if not people or not found:
        return [0.0] * len(people)
    true, pred = (torch.tensor([r["keypoints"] for r in rows], dtype=torch.float64).reshape(
        len(rows), -1, 3) for rows in (people, found))                            # (., K, 3)
    area = torch.tensor([p["area"] for p in people], dtype=torch.float64)         # (M,)
    pairs = oks(pred[:, None, :, :2], true[..., :2], true[..., 2] > 0, area,
                torch.tensor(sigmas, dtype=torch.float64))                        # (D, M)
    return pairs.amax(0).tolist()


def extremes(model: nn.Module, dataset: CocoPose, truth: COCO, by_image: dict[int, list[dict]],
             most: int = 500) -> list[tuple[str, Image.Image]]:
    """Three images each where the model is worst, best and between: captions and pictures.

    A picture has labels on the left and predictions on the right. by_image is evaluate's. What
    ranks an image is the mean of best_oks. At most `most` are ranked, evenly spread over those
    with a labeled person, so that the cost does not grow with the set.
    """
    ranked = []
    ids = [(i, n) for i, n in enumerate(dataset.annotations.ids.tolist()) if any(
        p["num_keypoints"] and not p["iscrowd"] for p in truth.imgToAnns[n])]
    for i, image_id in ids[::math.ceil(len(ids) / most) or 1]:
        values = best_oks(truth.imgToAnns[image_id], by_image[image_id], dataset.skeleton.sigmas)
        ranked.append((sum(values) / len(values), i))
    ranked.sort()
    each = min(3, math.ceil(len(ranked) / 3))
    middle, names = (len(ranked) - each) // 2, {}
    for name, part in (("worst", ranked[:each]), ("best", ranked[-each:]),
                       ("median", ranked[middle:middle + each])):
        for _, i in part:
            names.setdefault(i, name)
    chosen = [(i, value) for value, i in ranked if i in names]
    keys = [(0, i) for i, _ in chosen]
    pairs = zip(draw_samples(dataset, keys), draw_samples(dataset, keys, model)) if keys else ()
    pictures, s = [contact_sheet(list(pair), 2) for pair in pairs], dataset.size
    for picture in pictures:
        picture.paste("white", (s - 1, 0, s + 1, s))  # between the two
    return [(f"{names[i]}: OKS {value:.2f}, {dataset.annotations.files[i]}", picture)
            for (i, value), picture in zip(chosen, pictures)]


def val_batches(images: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list:
    """This process's share of a split, each image once: lists of (epoch, index), epoch 0."""
    mine = [(0, i) for i in range(rank, images, world_size)]
    return [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]


class Case(NamedTuple):
    """One image under diagnosis: D detections, M labeled people, P pairs of the two."""

    results: list[dict]   # (D,) of to_coco, best score first
    people: list[dict]    # (M,) annotations
    kinds: list[str]      # (D,) one of KINDS, or ignored
    pairs: np.ndarray     # (P, 2) a detection, and the person whose best one it is
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


def diagnose(results: list[dict], people: list[dict], ignored: np.ndarray,
             skeleton: Skeleton) -> Case:
    """What each detection of an image is, and what is wrong with the keypoints of people's best.

    results by score; ignored (D,) is their largest OKS with crowds and people without keypoints.
    Errors are those of Ronchi & Perona, https://arxiv.org/abs/1707.05388, by these rules:
    * Pairs are made by OKS, the largest first, down to FOUND; somebody whose left and right are
      exchanged as a whole counts too. The best detection counts, whatever its score.
    * A keypoint with a similarity of 0.85 to its label is good. Else the most similar decides: its
      own label (jitter), that of the other side (inversion), or one of these two of another person
      (swap). Below 0.5 it is a miss.
    * A detection of somebody who has a better one is a score error if its score is higher, else
      a duplicate.
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
        d, m = np.unravel_index(free.argmax(), free.shape)
        person[d], free[d], free[:, m] = m, 0, 0
    kinds = np.where(person >= 0, "best", "background").tolist()
    for d in np.flatnonzero(person < 0):
        if ignored[d] >= 0.5:
            kinds[d] = "ignored"
        elif fit[d].max(initial=0) >= FOUND:
            better = results[person.tolist().index(fit[d].argmax())]
            kinds[d] = "score" if results[d]["score"] > better["score"] else "duplicate"
    d = np.flatnonzero(person >= 0)                                               # (P,)
    m = person[d]
    anybody = np.maximum(own, mirrored)[d].max(1, initial=0)                      # (P, K)
    three = np.stack([own[d, m], mirrored[d, m], anybody])                        # (3, P, K)
    error = np.where(three.max(0) < 0.5, 4, 1 + three.argmax(0))  # (P, K); the first of equals
    error[three[0] >= 0.85] = 0
    far = np.linalg.norm(poses[d] - labels[m, :, :2], axis=-1)                    # (P, K) px
    told = [three[0], far <= PCK_SHARE * side[m, None], *(error == i for i in range(5))]
    return Case(results, people, kinds, np.stack([d, m], 1), upright[d, m], told * labeled[m])


def put_right(case: Case, error: str) -> list[dict]:
    """The image's results, had the network not made this one kind of error.

    A keypoint moves onto its label; the score becomes the OKS of people's best and 0 for the rest;
    duplicates and inventions go; missed people are there, with score 1.
    """
    results = [dict(r) for r in case.results]
    if error == "missed":
        return results + [{name: p[name] for name in ("image_id", "category_id", "keypoints")}
                          | {"score": 1.0} for m, p in enumerate(case.people)
                          if m not in case.pairs[:, 1]]
    if error == "score":
        best = dict(zip(case.pairs[:, 0].tolist(), case.oks.tolist()))
        return [r | {"score": best.get(d, 0.0)} for d, r in enumerate(results)]
    if error in KINDS:
        return [r for r, kind in zip(results, case.kinds) if kind != error]
    wrong = case.told[KEYPOINT_NUMBERS.index(error)] > 0                          # (P, K)
    for (d, m), rows in zip(case.pairs, wrong):
        pose, label = (np.reshape(x["keypoints"], (-1, 3)) for x in (results[d], case.people[m]))
        results[d]["keypoints"] = np.where(rows[:, None], label, pose).ravel().tolist()
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
    """Everything that labels tell about results, as plain numbers; -1 where nothing is labeled.

    scores     AP and AR of all images, and by what is in them
    keypoints  KEYPOINT_NUMBERS of people who were found, each the mean over labeled keypoints
    errors     how many of each kind, and the AP of results without them
    """
    scorer, cases = score(truth, by_image, skeleton.sigmas), {}
    for i, found in by_image.items():
        key = i, truth.dataset["categories"][0]["id"]
        results, anns = sorted(found, key=lambda r: -r["score"])[:20], scorer._gts[key]
        ignored = np.array([bool(a["ignore"]) for a in anns], bool)
        pairs = np.reshape(scorer.ious[key], (len(results), len(anns)))           # OKS
        cases[i] = diagnose(results, [a for a in anns if not a["ignore"]],
                            pairs[:, ignored].max(1, initial=0), skeleton)
    number = {i: len(case.people) for i, case in cases.items()}
    crowding = {i: crowd_index(case.people) for i, case in cases.items() if case.people}
    groups = [("images", "all", list(cases)), ("images", "with labeled people", list(crowding))]
    for group, values in (("people in the image", number), ("crowding", crowding)):
        groups += [(group, name, [i for i, value in values.items() if low < value <= high])
                   for name, low, high in GROUPS[group]]
    scores = []
    for group, name, ids in groups:
        part = {i: by_image[i] for i in ids}
        stats = (scorer.stats if len(part) == len(cases) else
                 score(truth, part, skeleton.sigmas).stats if part else len(METRICS) * [-1])
        scores.append({"group": group, "which": name, "images": len(ids),
                       "people": sum(number[i] for i in ids)} | {
            metric: float(stats[METRICS.index(metric)]) for metric in ("AP", "AP50", "AP75", "AR")})
    areas = np.array([p["area"] for case in cases.values() for p in case.people])
    for name, low, high in (("medium", 32, 96), ("large", 96, 1e5)):
        inside = (areas >= low ** 2) & (areas <= high ** 2)
        scores.append({"group": "size", "which": name, "people": int(inside.sum())} | {
            metric: float(scorer.stats[METRICS.index(f"{metric}_{name}")])
            for metric in ("AP", "AR")})
    return {"scores": scores} | count_errors(truth, cases, float(scorer.stats[0]), skeleton)


def count_errors(truth: COCO, cases: dict[int, Case], ap: float, skeleton: Skeleton) -> dict:
    """The keypoints and errors of make_card; ap is that of the results as they are."""
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
                row["AP"] = float(score(truth, fixed, skeleton.sigmas).stats[0])
                row["gain"] = row["AP"] - ap
            errors.append(row)
    return {"keypoints": keypoints, "errors": errors}


@torch.no_grad()
def speed(model: nn.Module, images: Tensor, conf: float, iou: float, flip: list[int] | None,
          bf16: bool) -> float:
    """Seconds from images (B, 3, S, S) uint8 in memory to detections: the median of ten calls."""
    seconds = []
    for _ in range(13):  # three to warm up
        start = time.perf_counter()
        out, _ = look(model, images, flip, bf16)
        for boxes, scores in zip(out.boxes, out.scores):
            select(boxes, scores, conf, iou).cpu()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[3:]))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; exit with code 2 and one line of advice if a value cannot work."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", metavar="DIR",
                   help="COCO root: annotations/person_keypoints_SPLIT.json and SPLIT/")
    p.add_argument("--json", metavar="FILE", help="labels, with --images instead of --data")
    p.add_argument("--images", metavar="DIR")
    p.add_argument("--weights", required=True, metavar="FILE",
                   help="checkpoint of train.py, or an official one")
    p.add_argument("--split", default="val2017", help="default: val2017")
    p.add_argument("--model", choices=["n", "s", "m", "l"], help="for an official checkpoint")
    p.add_argument("--image-size", type=int, help="px; default: the checkpoint's, else 640")
    p.add_argument("--pad", choices=PAD_MODES, help="default: the checkpoint's, else bottom_right")
    p.add_argument("--batch-size", type=int, default=16, help="images at a time; default: 16")
    p.add_argument("--workers", type=int, default=2, help="loader processes; default: 2")
    p.add_argument("--conf", type=float, default=0.01, help="smallest person score; default: 0.01")
    p.add_argument("--iou", type=float, default=0.7,
                   help="NMS: largest overlap of two people; default: 0.7")
    p.add_argument("--flip-test", action="store_true",
                   help="join what is seen in each image and its mirror image; twice as slow")
    p.add_argument("--amp", choices=["no", "bf16"], default="no", help="autocast; default: no")
    p.add_argument("--fuse", action="store_true", help="fold branches and norms: same AP, faster")
    p.add_argument("--metrics", metavar="FILE", help="write the ten numbers as json")
    p.add_argument("--results", metavar="FILE", help="write the detections as COCO results")
    p.add_argument("--card", metavar="FILE.html", help="write what is right and wrong with the "
                   "detections, and why AP is what it is, as a page; its numbers as FILE.json")
    args = p.parse_args(argv)
    if not args.data and not (args.json and args.images):
        p.error("give --data DIR, or --json FILE and --images DIR")
    if args.image_size is not None and (args.image_size % 32 or args.image_size < 32):
        p.error(f"--image-size {args.image_size} must be a multiple of 32, the largest stride")
    if args.batch_size < 1 or args.workers < 0:
        p.error("--batch-size must be positive, --workers 0 or more")
    if args.card and not args.card.endswith(".html"):
        p.error(f"--card {args.card} must end in .html; its numbers go to the same name in .json")
    if args.card and args.card[:-4] + "json" in (args.metrics, args.results):
        p.error(f"--card writes its numbers to {args.card[:-4]}json; choose another name")
    for path in filter(None, (args.metrics, args.results, args.card)):
        if not os.path.isdir(os.path.dirname(path) or "."):
            p.error(f"{path}: there is no folder {os.path.dirname(path)}")
    return args


def load_model(path: str, size: str | None = None) -> tuple[YoloNasPose, dict]:
    """The network of a checkpoint with its weights in eval mode, and the checkpoint's other parts.

    size is needed for official files, which do not name theirs. Raises ValueError.
    """
    state, file = read_weights(path)
    if file.get("format") != "nanopose":
        if size is None:
            raise ValueError(f"{path} does not say which size it is; add --model n, s, m or l")
        file = {"args": {"model": size}}
    try:
        k = state["heads.head1.pose_pred.bias"].shape[0] // 2
        model = YoloNasPose(file["args"]["model"], k, mask="mask.1.bias" in state)
        model.load_state_dict(state)
    except (LookupError, RuntimeError) as error:
        raise ValueError(f"{path} holds another network, or another size of it: "
                         f"{str(error).splitlines()[0]}") from None
    return model.eval(), file


def input_of(file: dict) -> tuple[int, str]:
    """Image size in px and padding that a checkpoint was trained for; official: 640, corner."""
    return file["args"].get("image_size", 640), file["args"].get("val_pad", "bottom_right")


def main() -> None:
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model, file = load_model(args.weights, args.model)
        path, folder = (args.json, args.images) if args.json else find_split(args.data, args.split)
        labels = read_json(path)
        skeleton = Skeleton(**file["skeleton"]) if "skeleton" in file else read_skeleton(labels)
        names = labels["categories"][0]["keypoints"]
        if names != skeleton.names or len(names) != model.num_keypoints:
            raise ValueError(f"{args.weights} predicts {model.num_keypoints} keypoints "
                             f"{skeleton.names}, the data has {names}; they must be the same")
        size, pad = input_of(file)
        size, pad = args.image_size or size, args.pad or pad
        masks = model.mask is not None and any(a.get("segmentation") for a in labels["annotations"])
        annotations = flatten(labels, masks=masks)
        check_files(annotations.files, folder)
        dataset = CocoPose(annotations, folder, skeleton, size, pad)
        loader = make_loader(dataset, val_batches(len(dataset), args.batch_size), args.workers,
                             device)
        print(f"{len(dataset)} images, {size} px, {pad}, conf {args.conf}, NMS {args.iou}, at most "
              f"20 detections an image")
        model, truth = (model.fuse() if args.fuse else model).to(device), quiet_coco(labels)
        how = skeleton.flip if args.flip_test else None, args.amp == "bf16"
        start = time.monotonic()
        metrics, by_image = evaluate(model, loader, truth, skeleton.sigmas, args.conf, args.iou,
                                     True, *how)
        seconds = time.monotonic() - start
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {str(error).strip().splitlines()[-1]}")
    for name, value in metrics.items():
        print(f"{name:10} {value:.4f}")
    if args.metrics:
        write_text(args.metrics, json.dumps(metrics, indent=1))
    if args.results:
        write_text(args.results, json.dumps([r for found in by_image.values() for r in found]))
    if args.card:
        print(f"diagnosing for {args.card}: about a dozen times the scoring", flush=True)
        batch = collate([dataset[0, i] for i in range(min(args.batch_size, len(dataset)))])[0]
        one, many = (speed(model, images, args.conf, args.iou, *how)
                     for images in (batch[:1], batch))
        card = {"protocol": {
            "weights": args.weights, "labels": path, "image size": f"{size} px", "padding": pad,
            "smallest score": args.conf, "NMS overlap": args.iou, "most detections an image": 20,
            "flip test": args.flip_test, "autocast": args.amp, "fused": args.fuse,
            "device": torch.cuda.get_device_name() if device.type == "cuda"
            else f"CPU, {torch.get_num_threads()} threads", "torch": torch.__version__},
            "metrics": metrics, **make_card(truth, by_image, skeleton),
            "speed": {"latency_ms": 1000 * one, "batch": len(batch), "img_s": len(batch) / many,
                      "evaluation_s": seconds}}
        write_text(args.card[:-4] + "json", json.dumps(card, indent=1))
        write_text(args.card, card_page(card))


if __name__ == "__main__":
    main()
