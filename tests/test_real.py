"""On real photos, where COCO_ROOT names a folder in COCO's layout; a stranger needs none of it."""
import os

import pytest
import torch

from data import MOSAIC, PLAIN, CocoPose, collate, find_split, flatten, read_json, read_skeleton
from evaluate import to_input
from loss import PoseLoss, assign
from model import YoloNasPose, decode

pytestmark = pytest.mark.skipif("COCO_ROOT" not in os.environ, reason="COCO_ROOT is not set")


def open_split(split: str, size: int, augment=PLAIN) -> CocoPose:
    path, folder = find_split(os.environ["COCO_ROOT"], split)
    labels = read_json(path)
    return CocoPose(flatten(labels), folder, read_skeleton(labels), size, "center", augment)


def test_a_fresh_network_teaches_every_labeled_person_in_view():
    """The reference's rule, oks_floor 0 beside an absolute epsilon, leaves some with nothing."""
    dataset = open_split("train2017", 448)
    images, targets = collate([dataset[0, i] for i in range(12)])
    torch.manual_seed(0)
    with torch.no_grad():
        model = YoloNasPose("n").train()
        raw = model(to_input(images, model))
    out, sigmas = decode(raw), torch.tensor(dataset.skeleton.sigmas)
    people = (targets["keypoints"][..., 2] > 0).any(-1) & ~targets["crowd"]            # (B, M)
    best = {}
    for floor in (0.1, 0.0):
        person, weight = assign(out.scores, out.boxes, out.keypoints, targets["boxes"],
                                targets["keypoints"], people, raw.centers, sigmas,
                                oks_floor=floor)
        best[floor] = torch.stack([(weight * (person == m)).amax(1)
                                   for m in range(people.shape[1])], 1)[people]        # (people,)
    assert len(best[0.1]) > 12 and best[0.1].min() > 1e-3
    assert (best[0.0] < 1e-3).float().mean() > 0.1


def test_crowds_and_unlabeled_people_give_no_class_gradient():
    dataset = open_split("val2017", 256)
    keys = [(0, i) for i in range(len(dataset)) if dataset.annotations.crowd[
        dataset.annotations.offsets[i]:dataset.annotations.offsets[i + 1]].any()][:4]
    images, targets = collate([dataset[key] for key in keys])
    torch.manual_seed(0)
    model = YoloNasPose("n").eval()
    raw = model(to_input(images, model))
    raw = raw._replace(cls_logits=raw.cls_logits.detach().requires_grad_())
    terms, _ = PoseLoss(torch.tensor(dataset.skeleton.sigmas))(raw, decode(raw), targets)
    gradient, = torch.autograd.grad(terms["cls"], raw.cls_logits)
    c, checked = raw.centers, 0
    for b in range(len(keys)):
        people = (targets["keypoints"][b, :, :, 2] > 0).any(-1) & ~targets["crowd"][b]
        x1, y1, x2, y2 = targets["boxes"][b].T[..., None]
        inside = (c[:, 0] > x1) & (c[:, 1] > y1) & (c[:, 0] < x2) & (c[:, 1] < y2)     # (M, A)
        only_ignored = inside[~people].any(0) & ~inside[people].any(0)
        checked += int(only_ignored.sum())
        assert (gradient[b, only_ignored] == 0).all()
        assert (gradient[b, ~inside.any(0)] != 0).all()
    assert checked > 100


def test_the_whole_set_loads_with_every_augmentation():
    dataset = open_split("train2017", 128, MOSAIC._replace(bgr=0.5, rotate90=0.5))
    for index in range(0, len(dataset), 10):
        sample = dataset[1, index]
        assert (sample["boxes"][:, 2:] > sample["boxes"][:, :2]).all()
        assert sample["boxes"].min(initial=0) >= 0 and sample["boxes"].max(initial=0) <= 128
        xy = sample["keypoints"][sample["keypoints"][..., 2] > 0][:, :2]
        assert ((xy >= 0) & (xy < 128)).all()
