"""What the flip test averages, and that evaluate.py looks as its flags say."""
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from data import COCO_NAMES, CocoPose, collate, flatten, read_skeleton
from evaluate import look, mirror
from model import STRIDES, Decoded, RawOutput, decode, make_anchors
from people import draw_dataset

SKELETON = read_skeleton({"categories": [{"keypoints": COCO_NAMES}]})


def random_outputs(height: int, width: int) -> Decoded:
    rng = torch.Generator().manual_seed(0)
    a = sum(height // s * (width // s) for s in STRIDES)
    return Decoded(*(torch.rand(2, a, *shape, generator=rng, dtype=torch.float64) * width
                     for shape in ((4,), (), (17, 2), (17,))))


def test_a_mirrored_output_is_where_its_twin_is():
    out = random_outputs(64, 96)
    twin = mirror(out, 64, 96, SKELETON.flip)
    centers, strides = make_anchors(64, 96, torch.device("cpu"))
    for a, (center, stride) in enumerate(zip(centers, strides)):
        b, = ((centers == torch.stack([96 - center[0], center[1]])).all(1)
              & (strides[:, 0] == stride)).nonzero()[:, 0].tolist()
        assert (twin.scores[:, a] == out.scores[:, b]).all()
        x1, y1, x2, y2 = out.boxes[:, b].T
        assert torch.equal(twin.boxes[:, a], torch.stack([96 - x2, y1, 96 - x1, y2], 1))
        for k, other in enumerate(SKELETON.flip):
            assert (twin.keypoints[:, a, k, 0] == 96 - out.keypoints[:, b, other, 0]).all()
            assert (twin.keypoints[:, a, k, 1] == out.keypoints[:, b, other, 1]).all()
            assert (twin.kpt_scores[:, a, k] == out.kpt_scores[:, b, other]).all()


def test_the_flip_test_of_mirrored_images_is_its_mirror_image(model_n):
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    plain, _ = look(model_n, images)
    once, _ = look(model_n, images, SKELETON.flip)
    other = mirror(look(model_n, images.flip(3), SKELETON.flip)[0], 64, 96, SKELETON.flip)
    for field, a, b, c in zip(Decoded._fields, once, other, plain):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-10, msg=field)
        assert (a - c).abs().max() > 1e-3, field
    twin = mirror(look(model_n, images.flip(3))[0], 64, 96, SKELETON.flip)
    s, t = plain.scores, twin.scores
    assert torch.equal(once.scores, torch.maximum(s, t))
    for k in range(17):
        for a, b, c in zip(*(out.keypoints[:, :, k].unbind(-1) for out in (once, plain, twin))):
            torch.testing.assert_close(a, (s * b + t * c) / (s + t), rtol=0, atol=1e-9)


class Even(torch.nn.Module):
    """A network that sees a mirrored image exactly mirrored: all it says are means of cells."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, images):
        centers, strides = make_anchors(*images.shape[2:], images.device)
        light = torch.cat([torch.nn.functional.avg_pool2d(images.mean(1), s).flatten(1)
                           for s in STRIDES], 1)                                   # (B, A)
        box = torch.zeros(*light.shape, 4, 17)
        box[..., 3] = 5 * light[..., None]
        mask = images.mean(1)[:, ::2, ::2] + images.mean(1)[:, ::2, 1::2]          # (B, H/2, W/2)
        return RawOutput(light, box, torch.full((*light.shape, 17, 2), 0.5),
                         light[..., None].expand(*light.shape, 17), centers, strides, mask)


def test_a_network_that_is_even_itself_gains_nothing_from_the_flip_test():
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    (plain, mask), (flipped, flipped_mask) = (look(Even(), images, flip)
                                              for flip in (None, SKELETON.flip))
    for a, b in zip((*plain, mask), (*flipped, flipped_mask)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Eight drawn images of 64 px."""
    root = tmp_path_factory.mktemp("card")
    draw_dataset(str(root / "set"), train=1, val=8, side=64)
    return root


@pytest.fixture
def run(small, official_n, monkeypatch, capsys):
    def run(*flags: str) -> None:
        monkeypatch.setattr(sys, "argv", [
            "evaluate.py", "--data", str(small / "set"), "--weights", official_n, "--model", "n",
            "--image-size", "64", "--workers", "0", "--batch-size", "8", "--conf", "0", *flags])
        evaluate.main()
    return run


def test_each_way_of_looking_is_the_one_asked_for(small, official_n, run):
    """The best score of each image, against the network called by hand; no two ways are equal."""
    labels = json.loads((small / "set/annotations/person_keypoints_val2017.json").read_text())
    dataset = CocoPose(flatten(labels), str(small / "set/val2017"), SKELETON, 64, "bottom_right")
    images = collate([dataset[0, i] for i in range(8)])[0] / 255
    with torch.no_grad():
        model = evaluate.load_model(official_n, "n")[0]
        plain, other = (decode(model(x)) for x in (images, images.flip(3)))
        with torch.autocast("cpu", torch.bfloat16):
            coarse = model(images)
        by_hand = {(): plain.scores, ("--amp", "bf16"): decode(coarse).scores,
                   ("--flip-test",): torch.maximum(
                       plain.scores, mirror(other, 64, 64, SKELETON.flip).scores),
                   ("--fuse",): decode(model.fuse()(images)).scores}
    best = {}
    for flags, scores in by_hand.items():
        run("--results", str(small / "r.json"), *flags)
        results = json.loads((small / "r.json").read_text())
        best[flags] = np.array([max(r["score"] for r in results if r["image_id"] == i)
                                for i in dataset.annotations.ids])
        np.testing.assert_allclose(best[flags], scores.amax(1), rtol=0, atol=1e-7)
    for a, b in itertools.combinations(best.values(), 2):
        assert (a != b).any()
