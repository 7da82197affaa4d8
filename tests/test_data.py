"""Pixels and points move together, a sample depends on its key alone, bad files are refused."""
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask

import data
from data import (MOSAIC, MOSAIC_HEAVY, PAD_GRAY, PAD_MODES, PLAIN, Augment, CocoPose, collage,
                  collate, flatten, letterbox, make_loader, move, read_json, read_skeleton, stream,
                  undo)

NAMES = ["left_dot", "right_dot", "blue"]
NO_COLOR = {"contrast": 0.0, "hsv": 0.0, "bgr": 0.0}


def labels(images: list, annotations: list, names: list = NAMES) -> dict:
    return {"images": images, "annotations": annotations,
            "categories": [{"id": 1, "name": "person", "keypoints": names,
                            "skeleton": [[1, 2], [2, 3]]}]}


def dot_images(folder, suffix: str, count: int = 6) -> dict:
    """Dark images, each with one red, one green and one blue disc: the keypoints of a person."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(count):
        width, height = (int(v) for v in rng.integers(300, 700, 2))
        centers = rng.uniform(0.25, 0.75, (3, 2)) * (width, height)                    # (3, 2) px
        y, x = np.mgrid[:height, :width] + 0.5
        distance = np.hypot(x[..., None] - centers[:, 0], y[..., None] - centers[:, 1])
        dark = 10 * (i % 6)  # so that a tile's edge can be told
        pixels = (dark + (255 - dark) * (12.5 - distance).clip(0, 1)).astype(np.uint8)   # (H, W, 3)
        Image.fromarray(pixels).save(folder / f"{i}{suffix}", quality=100, subsampling=0)
        images.append({"id": i, "file_name": f"{i}{suffix}", "width": width, "height": height})
        points = np.column_stack([centers - 0.5, [2, 2, 1]])  # COCO counts pixel indices
        annotations.append({"id": i + 1, "image_id": i, "category_id": 1, "iscrowd": 0,
                            "bbox": [0, 0, width, height], "keypoints": points.ravel().tolist(),
                            "num_keypoints": 3, "area": 1.0})
    return labels(images, annotations)


def dataset(coco: dict, folder, size: int = 256, pad: str = "center", augment=PLAIN,
            **more) -> CocoPose:
    return CocoPose(flatten(coco), str(folder), read_skeleton(coco, ""), size, pad, augment, **more)


def centroid_errors(sample: dict, zoom: float) -> list:
    """Light of a keypoint's color near it, less the keypoint: (n, 2) px of the output.

    Keypoints so near an edge that it may cut their dot are left out.
    """
    pixels = sample["image"].astype(float)
    radius, errors = 14 * zoom + 2, []
    for person in sample["keypoints"]:
        for channel, (px, py, v) in enumerate(person):
            if v == 0 or min(px, py) < radius or max(px, py) > len(pixels) - radius:
                continue
            left, top = int(px - radius), int(py - radius)
            window = pixels[top:int(py + radius) + 2, left:int(px + radius) + 2]
            y, x = np.mgrid[:window.shape[0], :window.shape[1]] + 0.5
            x, y = x + left, y + top
            near = np.hypot(x - px, y - py) < radius
            others = np.delete(window, channel, axis=2).max(2)
            if np.ptp(others[near]) > 6:
                continue
            light = (window[..., channel] - others).clip(0) * near
            errors.append([(light * x).sum() / light.sum() - px,
                           (light * y).sum() / light.sum() - py])
    return errors


@pytest.mark.parametrize("suffix, cached", [(".png", False), (".jpg", False), (".jpg", True)])
def test_colored_dots_stay_under_their_keypoints_through_everything_random(tmp_path, suffix,
                                                                           cached):
    """No reference needed: the image itself says where a point went. Mosaic tiles included."""
    coco = dot_images(tmp_path, suffix)
    errors = []
    for augment, pad in ((MOSAIC, "center"), (MOSAIC_HEAVY, "bottom_right")):
        augment = augment._replace(**NO_COLOR, flip=0.5)
        for size in (128, 320):
            ds = dataset(coco, tmp_path, size, pad, augment, seed=1)
            ds.cache = data.Cache(ds.annotations, ds.folder, size, "ram") if cached else None
            ds.skeleton = ds.skeleton._replace(flip=[0, 1, 2])  # colors do not trade places
            for epoch in range(6):
                for i in range(len(ds)):
                    errors += centroid_errors(ds[epoch, i], zoom=size / 500)
    errors = np.array(errors)
    assert len(errors) > 200
    assert np.abs(errors.mean(0)).max() <= 0.05
    assert np.abs(errors).max() <= 0.3


def test_a_mirror_exchanges_left_and_right():
    coco = labels([{"id": 1, "file_name": "a.png", "width": 100, "height": 50}],
                  [{"id": 1, "image_id": 1, "bbox": [10, 10, 30, 30],
                    "keypoints": [19.5, 19.5, 2, 29.5, 19.5, 1, 0, 0, 0]}])
    for ann in coco["annotations"]:
        ann |= {"iscrowd": 0, "num_keypoints": 2}
    ds = CocoPose(flatten(coco), "", read_skeleton(coco), 100, "bottom_right")
    mirror = data.matrix3(-1, 0, 100, 0, 1, 0)
    boxes, keypoints, _ = ds.people(0, mirror, np.array([0, 0, 100, 50.0]))
    assert boxes.tolist() == [[60, 10, 90, 40]]
    assert keypoints.tolist() == [[[70, 20, 1], [80, 20, 2], [0, 0, 0]]]


@pytest.mark.parametrize("pad", PAD_MODES)
@pytest.mark.parametrize("size", [(640, 427), (31, 500), (333, 333)])
def test_padding_can_be_undone(pad, size):
    matrix = letterbox(*size, 256, pad)
    points = np.random.default_rng(0).uniform(0, 1, (20, 2)) * size
    np.testing.assert_allclose(undo(move(points, matrix), matrix), points, atol=1e-9)


def test_padding_is_where_the_reference_puts_it():
    """160 x 120 px scaled to 96 is 96 x 72: centered it starts at row 12, else at row 0."""
    assert letterbox(160, 120, 96, "center")[:2].tolist() == [[0.6, 0, 0], [0, 0.6, 12]]
    assert letterbox(160, 120, 96, "bottom_right")[:2].tolist() == [[0.6, 0, 0], [0, 0.6, 0]]
    for width, height in ((333, 500), (500, 331), (101, 77)):  # whole pixels
        assert not (letterbox(width, height, 96, "center")[:2, 2] % 1).any()


def test_what_is_random_happens_as_often_and_goes_as_far_as_it_says():
    """The matrix taken apart: mirror, quarter turns, rotation, zoom, shift of the middle."""
    augment = Augment(flip=0.3, rotate90=0.4, affine=0.7, degrees=6.0, scale=(0.5, 2.0),
                      translate=0.2)
    rng, n, found = np.random.default_rng(0), 4000, []
    for _ in range(n):
        matrix, width, height = data.random_geometry(300, 200, rng, augment)
        flip = np.linalg.det(matrix[:2, :2]) < 0
        x, y = matrix[:2, 0] * (-1 if flip else 1)  # where the image's right goes
        angle = math.degrees(math.atan2(y, x))
        turns = round(angle / 90) % 4
        shift = (move(np.array([150, 100]), matrix) - (width / 2, height / 2)) / (width, height)
        found.append([flip, turns, (angle + 45) % 90 - 45, math.hypot(x, y), *shift])
        assert (width, height) == ((200, 300) if turns % 2 else (300, 200))
    flips, turns, angles, zooms, dx, dy = np.array(found).T
    assert flips.mean() == pytest.approx(0.3, abs=0.03)
    assert [(turns == t).mean() for t in range(4)] == pytest.approx([0.7, 0.1, 0.1, 0.1], abs=0.03)
    moved = np.abs(zooms - 1) > 1e-9
    assert moved.mean() == pytest.approx(0.7, abs=0.03) and not angles[~moved].round(9).any()
    for values, low, high in ((angles, -6, 6), (zooms, 0.5, 2.0), (dx, -0.2, 0.2), (dy, -0.2, 0.2)):
        share = (values[moved] - low) / (high - low)  # evenly from end to end
        assert np.quantile(share, [0, 0.25, 0.5, 0.75, 1]) == pytest.approx(
            [0, 0.25, 0.5, 0.75, 1], abs=0.03)
        assert share.min() >= -1e-9 and share.max() <= 1 + 1e-9


def test_colors_change_as_often_and_as_far_as_they_say():
    """By what each change leaves alone: contrast the mean's hue, hue and saturation gray."""
    off, n = Augment(contrast=0, hsv=0, bgr=0), 2000
    mean, gray, red = np.array([90.0, 120, 60]), np.array([50.0, 50, 50]), np.array([200.0, 0, 0])
    image = np.tile(mean[:, None, None], (1, 20, 20))

    def matrices(**changes):
        rng = np.random.default_rng(0)
        return np.array([data.random_color(image, rng, off._replace(**changes)) for _ in range(n)])

    def spread(values, low, high):
        assert np.quantile(values, [0, 0.5, 1]) == pytest.approx(
            [low, (low + high) / 2, high], abs=0.03 * (high - low))
    assert (matrices() == np.eye(3, 4)).all()
    swapped = matrices(bgr=0.3)[:, 0, 0] == 0
    assert swapped.mean() == pytest.approx(0.3, abs=0.04)
    assert (matrices(bgr=1)[0] @ [*red, 1] == red[::-1]).all()
    one, both = (matrices(bgr=p, contrast=1)[0] @ [*red, 1] for p in (0, 1))
    assert (both == one[::-1]).all()  # it comes last
    changed = matrices(contrast=0.6, contrast_range=0.2)
    assert (changed != np.eye(3, 4)).any((1, 2)).mean() == pytest.approx(0.6, abs=0.04)
    changed = matrices(contrast=1, contrast_range=0.2)
    at_mean = changed @ [*mean, 1] / mean                                          # (n, 3)
    np.testing.assert_allclose(at_mean, at_mean[:, :1].repeat(3, 1), rtol=1e-9)
    spread(at_mean[:, 0], 0.8, 1.2)  # brightness
    spread(changed[:, 0, 0], 0.8, 1.2)  # contrast
    changed = matrices(hsv=1, hsv_gain=20)
    at_gray = changed @ [*gray, 1] / 50
    np.testing.assert_allclose(at_gray, at_gray[:, :1].repeat(3, 1), rtol=1e-9)
    value = at_gray[:, 0]
    assert (np.abs(value - 1) > 1e-9).mean() == pytest.approx(0.5, abs=0.04)
    spread(value[np.abs(value - 1) > 1e-9], 0.8, 1.2)
    r, g, b = (changed @ [*red, 1]).T / value[:, None].T
    hue = np.degrees(np.arctan2(math.sqrt(3) * (g - b), 2 * r - g - b))
    some = np.abs(hue) > 1e-6
    assert some.mean() == pytest.approx(0.5, abs=0.04)
    spread(hue[some], -40, 40)
    saturation = (r - g)[~some] / 200  # of an unturned red: its distance from gray
    spread(saturation[np.abs(saturation - 1) > 1e-9], 0.8, 1.2)


def test_a_collage_meets_in_the_middle_row():
    """The reference's mosaic of 160x120, 90x100 over 130x70, 60x110 px is 250 x 230 px."""
    corners, width, height = collage([(160, 120), (90, 100), (130, 70), (60, 110)])
    assert (width, height) == (250, 230)
    assert corners == [(0, 0), (160, 20), (30, 120), (160, 120)]


def test_padding_keeps_its_gray_whatever_the_colors_do(tmp_path):
    coco = dot_images(tmp_path, ".png", count=1)
    ds = dataset(coco, tmp_path, 128, "bottom_right",
                 Augment(mosaic=0, affine=0, flip=0, contrast=1, hsv=1))
    image = ds[0, 0]["image"]
    width, height = np.ceil(np.array(flatten(coco).sizes[0]) * 128 / flatten(coco).sizes[0].max())
    assert (image[int(height):] == PAD_GRAY).all() and (image[:, int(width):] == PAD_GRAY).all()


def test_a_sample_depends_on_seed_epoch_and_index_alone(tmp_path):
    coco = dot_images(tmp_path, ".png")
    ds = dataset(coco, tmp_path, 96, augment=MOSAIC, seed=3)
    keys = [[(0, 1), (0, 2)], [(1, 0), (0, 1)], [(2, 5), (1, 0)]]
    alone = [collate([ds[key] for key in batch]) for batch in keys]
    for workers in (0, 2):
        for (images, targets), (want, wanted) in zip(
                make_loader(ds, keys, workers, torch.device("cpu")), alone):
            assert torch.equal(images, want)
            assert targets.pop("bad") == wanted.get("bad") == []
            assert all(torch.equal(targets[name], wanted[name]) for name in targets)
    other = dataset(coco, tmp_path, 96, augment=MOSAIC, seed=4)
    assert not np.array_equal(ds[0, 1]["image"], other[0, 1]["image"])
    assert not np.array_equal(ds[0, 1]["image"], ds[1, 1]["image"])


def test_mosaic_closes_with_its_last_epoch(tmp_path):
    coco = dot_images(tmp_path, ".png", count=4)
    always = PLAIN._replace(mosaic=1.0, last_mosaic=2)
    plain, closing = (dataset(coco, tmp_path, 96, augment=a) for a in (PLAIN, always))
    for epoch in range(4):
        same = np.array_equal(plain[epoch, 0]["image"], closing[epoch, 0]["image"])
        assert same == (epoch >= 2)


def test_a_mosaic_draws_each_of_its_images(tmp_path):
    ds, seen = dataset(dot_images(tmp_path, ".png", count=4), tmp_path, 96,
                       augment=PLAIN._replace(mosaic=1.0)), []
    ds.paint = lambda canvas, index, *_: seen.append(index)
    for epoch in range(20):
        ds[epoch, 0]
    others = np.reshape(seen, (20, 4))[:, 1:].T.tolist()
    assert len({tuple(places) for places in others}) == 3


def test_mixup_is_a_blend_and_keeps_the_people_of_both(tmp_path):
    coco = dot_images(tmp_path, ".png", count=4)
    one = dataset(coco, tmp_path, 96)
    mixed = dataset(coco, tmp_path, 96, augment=PLAIN._replace(mixup=1.0))
    images = [one[0, i]["image"].astype(float) for i in range(4)]
    people = [one[0, i]["keypoints"] for i in range(4)]
    sample = mixed[0, 0]
    assert np.array_equal(sample["keypoints"][:1], people[0])
    other = next(i for i in range(4) if np.array_equal(sample["keypoints"][1:], people[i]))
    way = images[other] - images[0]
    share = ((sample["image"] - images[0]) * way).sum() / (way * way).sum()
    assert len(sample["boxes"]) == len(sample["crowd"]) == 2 and 0.2 < share < 0.8
    assert np.abs(sample["image"] - images[0] - share * way).max() <= 2


def test_mixup_rounds_to_the_nearest(tmp_path):
    """Cut, images would darken by half a gray level."""
    coco, rng = dot_images(tmp_path, ".png", count=2), np.random.default_rng(0)
    for image in coco["images"]:
        noise = rng.integers(256, size=(image["height"], image["width"], 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / image["file_name"])
    first, second = (dataset(coco, tmp_path, 96)[0, i]["image"].astype(float) for i in (0, 1))
    mixed = dataset(coco, tmp_path, 96, augment=PLAIN._replace(mixup=1.0))
    for epoch in range(9):
        change = mixed[epoch, 0]["image"] - first
        if change.any():  # else it was mixed with itself
            share, offset = np.polyfit((second - first).ravel(), change.ravel(), 1)
            assert 0.2 < share < 0.8 and abs(offset) < 0.1
    assert change.any()


def test_an_occluder_covers_the_mask_too():
    image = torch.full((3, 64, 64), PAD_GRAY, dtype=torch.uint8)
    mask = torch.ones(1, 32, 32, dtype=torch.uint8)
    data.occlude(image, mask, np.array([[0.0, 0, 60, 60]]), np.array([[[30.0, 30, 2]]]),
                 np.random.default_rng(0), 1.0)
    covered = (image != PAD_GRAY).any(0)[::2, ::2]
    assert covered.any() and torch.equal(mask[0] == 0, covered)


def test_an_occluder_has_its_persons_shape():
    """It reaches 5 to 20 % of the box's width and height on each side of a keypoint."""
    sizes = []
    for seed in range(50):
        image = torch.full((3, 512, 512), PAD_GRAY, dtype=torch.uint8)
        data.occlude(image, None, np.array([[0.0, 0, 500, 100]]), np.array([[[250.0, 250, 2]]]),
                     np.random.default_rng(seed), 1.0)
        rows, columns = np.nonzero((image != PAD_GRAY).any(0).numpy())
        sizes.append((int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1))
    (narrow, low), (wide, high) = np.min(sizes, 0), np.max(sizes, 0)
    assert 46 <= narrow < 80 and 180 < wide <= 204 and 6 <= low < 18 and 34 < high <= 44


def test_an_occluder_hides_what_it_covers_and_nothing_else(tmp_path):
    coco = dot_images(tmp_path, ".png", count=4)
    covering = PLAIN._replace(occlude=1.0)
    plain, covered = (dataset(coco, tmp_path, 256, augment=a) for a in (PLAIN, covering))
    hidden = 0
    for epoch in range(8):
        for i in range(4):
            before, after = plain[epoch, i], covered[epoch, i]
            changed = (before["image"] != after["image"]).any(-1)                     # (S, S)
            assert np.array_equal(before["keypoints"][..., :2], after["keypoints"][..., :2])
            for (x, y, v), (_, _, now) in zip(before["keypoints"][0], after["keypoints"][0]):
                under = changed[int(y), int(x)]
                assert now == (1 if under else v), (v, now)
                hidden += under and v == 2
            rows, columns = np.nonzero(changed)
            box = changed[rows.min():rows.max() + 1, columns.min():columns.max() + 1]
            assert box.mean() > 0.95  # one rectangle
    assert hidden > 10


SQUARE = [[20, 10, 60, 10, 60, 40, 20, 40]]


@pytest.mark.parametrize("shape", [
    SQUARE, {"size": [50, 100], "counts": [0] + [1010] + [30, 20] * 40 + [3970 - 50 * 39 - 20 * 1]},
    [[20, 10, 40, 10, 40, 40, 20, 40], [40, 10, 60, 10, 60, 40, 40, 40]]],
    ids=["polygon", "runs", "two"])
def test_masks_follow_their_people(shape):
    """A rectangle from 20, 10 to 60, 40 px of a 100 x 50 px image, as polygons or as run lengths,
    zoomed by 2, mirrored; the mask has half the pixels. A person without a shape is unknown, and
    so is a crowd."""
    if isinstance(shape, dict):  # column by column: 20 columns of nothing, then 10 off, 30 on, ...
        shape["counts"] = [20 * 50 + 10] + [30, 20] * 39 + [30, 10 + 40 * 50]
    person = {"bbox": [20, 10, 40, 30], "keypoints": [30, 20, 2] * 3, "num_keypoints": 3,
              "iscrowd": 0, "image_id": 1}
    coco = labels([{"id": 1, "file_name": "a.png", "width": 100, "height": 50}],
                  [{**person, "id": 1, "segmentation": shape},
                   {**person, "id": 2, "bbox": [80, 0, 10, 10]},
                   {**person, "id": 3, "bbox": [0, 0, 10, 10], "iscrowd": 1,
                    "segmentation": {"size": [50, 100], "counts": [5000]}}])
    ds = CocoPose(flatten(coco, masks=True), "", read_skeleton(coco), 200, "bottom_right")
    mask, half = torch.zeros(1, 100, 100, dtype=torch.uint8), np.diag([0.5, 0.5, 1])
    matrix = data.matrix3(-2, 0, 200, 0, 2, 0)
    ds.paint_mask(mask, 0, half @ matrix, np.array([0, 0, 100, 50]))
    want = np.zeros((100, 100), int)
    want[10:40, 40:80], want[0:10, 10:20], want[0:10, 90:100] = 1, 2, 2
    assert (mask[0].numpy() != want).sum() <= 80  # polygons are drawn up to a pixel off
    sizes = [(mask == v).sum().item() for v in (1, 2)]
    assert sizes == pytest.approx([1200, 200], rel=0.06)


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_cache_is_shared_and_changes_no_sample_that_it_need_not_shrink(kind, tmp_path,
                                                                         monkeypatch):
    """The same from files, while it fills, and from it; two processes fill one array."""
    (tmp_path / "images").mkdir()
    coco = dot_images(tmp_path / "images", ".jpg", count=4)
    annotations, folder = flatten(coco), str(tmp_path / "images")
    side = int(annotations.sizes.max())
    plain = CocoPose(annotations, folder, read_skeleton(coco, ""), side, "center",
                     MOSAIC_HEAVY._replace(mosaic=0.0))
    cache = data.Cache(annotations, folder, side, kind)
    cached = CocoPose(annotations, folder, read_skeleton(coco, ""), side, "center", plain.augment,
                      cache=cache)
    loader = data.make_loader(cached, [[(0, 0), (0, 1)], [(0, 2), (0, 3)]], 2, torch.device("cpu"))
    assert not cache.there.any()
    filling = torch.cat([images for images, _ in loader])
    assert cache.there.all()
    read = torch.cat([images for images, _ in loader])
    direct = torch.stack([torch.tensor(plain[0, i]["image"]).permute(2, 0, 1) for i in range(4)])
    assert (filling == read).all() and (filling == direct).all()

    again = data.Cache(annotations, folder, side, kind)
    assert again.there.all() == (kind == "disk")
    half = data.Cache(annotations, folder, side // 2, kind)
    assert max(half.shrinks) == 2 and not half.there.any()
    with monkeypatch.context() as mac:
        mac.setattr(sys, "platform", "darwin")
        mac.delattr(os, "posix_fallocate")
        assert len(data.Cache(annotations, folder, side // 4, kind).there) == 4
    os.utime(tmp_path / "images" / str(annotations.files[0]), (1, 1))  # edited
    assert not data.Cache(annotations, folder, side, kind).there.any()
    mended = annotations._replace(sizes=annotations.sizes - [[3, 0]])  # the json's, not the files'
    assert not data.Cache(mended, folder, side, kind).there.any()
    files = sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError), match=f"--cache {kind}.* GB.* none"):
        data.Cache(annotations._replace(sizes=annotations.sizes * 100_000), folder, 10 ** 8, kind)
    assert sorted(tmp_path.iterdir()) == files
    if kind == "disk":
        monkeypatch.setattr(os, "open", lambda *given: os.stat(tmp_path / "not here"))
        with pytest.raises(OSError, match="--cache disk .*No such file or dir.*use ram or none"):
            data.Cache(annotations, folder, side * 2, kind)


def test_a_cached_images_pixels_are_on_disk_before_it_counts_as_there(tmp_path):
    """Else a crash of the machine could leave an image that is there, and black, for later runs."""
    coco = dot_images(tmp_path, ".jpg", count=4)
    annotations = flatten(coco)
    cache = data.Cache(annotations, str(tmp_path), 32, "disk")
    real, written = cache.map, []

    class Disk:
        def flush(self, offset, size):
            index = len(written)
            begin, end = cache.offsets[index:index + 2]
            assert not cache.there[index] and cache.pixels[begin:end].any()
            assert offset <= begin and end <= offset + size
            written.append(real.flush(offset, size))  # raises for an offset within a page

    cache.map = Disk()
    for index in [0, 1, 2, 3, 2]:
        cache.read(index, str(tmp_path / str(annotations.files[index])),
                   *annotations.sizes[index].tolist(), 1.0)
    assert len(written) == 4 and cache.there.all()


def slow_warp(image, matrix, region, size, color):
    """warp pixel by pixel: a mean of the four nearest centers, gray beyond the edge."""
    canvas, inverse = np.full((size, size, 3), 127.0), np.linalg.inv(matrix)
    height, width = image.shape[:2]
    frame = np.array([matrix @ (x, y, 1) for x in (0, width) for y in (0, height)])[:, :2]
    low, high = np.maximum(region[:2], frame.min(0)), np.minimum(region[2:], frame.max(0))
    for i, j in np.ndindex(size, size):
        x, y, _ = inverse @ (j + 0.5, i + 0.5, 1)
        if not (low[0] <= j + 0.5 < high[0] and low[1] <= i + 0.5 < high[1]):
            continue
        total = 0
        for u in (math.floor(x - 0.5), math.floor(x + 0.5)):
            for v in (math.floor(y - 0.5), math.floor(y + 0.5)):
                if matrix[0, 1] == 0:  # upright: the edge's own pixel goes on
                    u_in, v_in, there = min(max(u, 0), width - 1), min(max(v, 0), height - 1), True
                else:
                    u_in, v_in, there = u, v, 0 <= u < width and 0 <= v < height
                pixel = color[:, :3] @ image[v_in, u_in] + color[:, 3] if there else 127
                total = total + (1 - abs(x - u - 0.5)) * (1 - abs(y - v - 0.5)) * pixel
        canvas[i, j] = np.clip(total, 0, 255)
    return canvas


@pytest.mark.parametrize("color", [
    None, np.array([[0.9, 0.1, 0, 5], [0, 1.2, 0, -20], [0.1, 0, 1, 0]])])
@pytest.mark.parametrize("matrix", [
    data.matrix3(1.3, 0.2, -9, -0.1, 0.9, 12), data.matrix3(0.7, 0, 5.3, 0, 0.7, 2),
    data.matrix3(1, 0, 7, 0, 1, 3), data.matrix3(-1, 0, 40, 0, 1, -2),
    data.matrix3(1.6, 0, -8.36, 0, 1.6, -7.16),
    data.matrix3(1.3, 0, 3, 0, 1.3, 1), data.matrix3(0.7, 0, 4, 0, 0.7, 2)])
def test_pixels_are_those_of_the_slow_version(matrix, color):
    image = np.random.default_rng(0).integers(256, size=(33, 38, 3), dtype=np.uint8)
    region, canvas = np.array([3.2, 1.0, 41.0, 33.6]), data.blank(48)
    data.warp(canvas, image.transpose(2, 0, 1), matrix, region, color)
    want = slow_warp(image, matrix, region, 48, np.eye(3, 4) if color is None else color)
    twice = color is None and not (matrix % 1)[:, 2].any()  # rounded, after x and after y
    assert np.abs(canvas.permute(1, 2, 0).numpy() - want).max() <= (1.01 if twice else 0.51)


@pytest.mark.parametrize("size, zoom", [((8, 40), 0.97), ((40, 8), 0.97), ((3, 3), 0.4),
                                        ((8, 40), 1.03), ((3, 40), 0.4), ((1, 1), 40.0)])
def test_images_are_resized_well_if_a_side_stays_or_is_1_px(size, zoom):
    image = np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8)
    matrix, canvas = data.matrix3(zoom, 0, 0, 0, zoom, 0), data.blank(48)
    region = zoom * np.array([0, 0, *size[::-1]])
    data.warp(canvas, image.transpose(2, 0, 1).copy(), matrix, region)
    want = slow_warp(image, matrix, region, 48, np.eye(3, 4))
    assert np.abs(canvas.permute(1, 2, 0).numpy() - want).max() <= 1.01


@pytest.mark.parametrize("pad", PAD_MODES)
def test_masks_lie_on_their_people_through_everything_random(tmp_path, pad):
    """People are red: the image says where the mask must be, mosaic tiles and mixup included."""
    images, people, rng = [], [], np.random.default_rng(0)
    for i in range(5):
        width, height = (200, 140) if i % 2 else (120, 180)
        x1, y1 = (rng.uniform(0.1, 0.4, 2) * (width, height)).round().tolist()
        x2, y2 = (rng.uniform(0.6, 0.9, 2) * (width, height)).round().tolist()
        pixels = np.full((height, width, 3), 127, np.uint8)
        pixels[int(y1):int(y2), int(x1):int(x2)] = 255, 0, 0
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        people.append({"id": i + 1, "image_id": i, "category_id": 1, "iscrowd": 0, "area": 1.0,
                       "bbox": [x1, y1, x2 - x1, y2 - y1], "num_keypoints": 0, "keypoints": 9 * [0],
                       "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]]})
    coco, agree = labels(images, people), 0
    ds = CocoPose(flatten(coco, masks=True), str(tmp_path), read_skeleton(coco, ""), 128, pad,
                  MOSAIC_HEAVY._replace(**NO_COLOR, mixup=0.5))
    for sample in (ds[epoch, i] for epoch in range(10) for i in range(5)):
        red = (sample["image"][..., 0].astype(int) - sample["image"][..., 1] > 40).reshape(
            64, 2, 64, 2).mean((1, 3))                                            # (64, 64)
        around = np.lib.stride_tricks.sliding_window_view(red, (5, 5))            # off any edge
        for value in 0, 1:
            inside = (around == value).all((2, 3))
            wrong = (sample["mask"][2:-2, 2:-2][inside] != value).sum()
            assert wrong <= 0.01 * inside.sum()  # where tiles meet in the middle of a mask's pixel
            agree += inside.sum() * value
    assert agree > 50 * 64 * 64 * 0.1


def mask_of(pixels: np.ndarray) -> dict:
    """COCO's compressed run lengths of pixels (H, W)."""
    found = coco_mask.encode(np.asfortranarray(pixels))
    return {"size": found["size"], "counts": found["counts"].decode()}


def test_masks_reach_the_batch_and_odd_shapes_are_refused(tmp_path):
    coco = dot_images(tmp_path, ".png", count=2)
    for ann in coco["annotations"]:
        x, y, w, h = ann["bbox"]
        ann["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    images = flatten(coco, masks=True)
    ds = CocoPose(images, str(tmp_path), read_skeleton(coco, ""), 64, "bottom_right", MOSAIC)
    _, targets = collate([ds[0, 0], ds[0, 1]])
    assert targets["mask"].shape == (2, 32, 32) and targets["mask"].float().mean() > 0.3
    assert "mask" not in collate([dataset(coco, tmp_path)[0, 0]])[1]
    size = [coco["images"][0]["height"], coco["images"][0]["width"]]
    for bad in ("x", [[1, 2]], {"size": [3, 3], "counts": [9]}, {"counts": [9]},
                [[1, 2, 3, "4", 5, 6]], [[1, 2, 3, 4, 5, float("nan")]], [[0, 0, 1e30, 0, 5, 5]],
                {"size": size, "counts": [2**70]}, {"size": size, "counts": "abc"},
                {"size": size, "counts": mask_of(np.ones((3, 3), np.uint8))["counts"]},
                {"size": size, "counts": [5, -5, size[0] * size[1]]}):
        coco["annotations"][0]["segmentation"] = bad
        with pytest.raises(ValueError, match="annotation 1: segmentation"):
            flatten(coco, masks=True)
    for pixels in np.random.default_rng(0).random((9, *size)) < [[[.5]], [[.9]], [[.001]]] * 3:
        text = mask_of(pixels.astype(np.uint8))  # the run lengths of a text, by numpy
        changes = np.flatnonzero(np.diff([0, *pixels.ravel("F").astype(int)]))
        assert data.runs_of(text["counts"]) == np.diff([0, *changes, pixels.size]).tolist()
        coco["annotations"][0]["segmentation"] = text
        flatten(coco, masks=True)
    for counts, same in (([3, 0, 7], [10]), ([0, 4, 0, 0, 0, 6], [0, 10])):  # runs of nothing
        long, short = ([{"id": 1, "iscrowd": 0, "segmentation": {"size": [5, 2], "counts": c}}]
                       for c in (counts, same))
        image = {"height": 5, "width": 2}
        other = [{**short[0], "segmentation": {"size": [5, 2], "counts": [2, 5, 3]}}]
        assert data.pixels_of(2 * long + other, image) == data.pixels_of(short + other, image)
    for ann in coco["annotations"]:
        del ann["segmentation"]
    with pytest.raises(ValueError, match="no annotation has a segmentation"):
        flatten(coco, masks=True)


def test_another_size_moves_points_with_pixels_and_is_drawn_by_step_alone(tmp_path):
    coco = dot_images(tmp_path, ".png", count=3)
    images, targets = collate([dataset(coco, tmp_path, 256)[0, i] for i in range(3)])
    for size in (160, 352):
        moved, points = data.resize(images.float(), targets, size)
        assert moved.shape == (3, 3, size, size)
        sample = [{"image": m.permute(1, 2, 0).numpy(), "keypoints": k.numpy()}
                  for m, k in zip(moved, points["keypoints"])]
        errors = np.array(sum((centroid_errors(s, size / 500) for s in sample), []))
        assert len(errors) > 4 and np.abs(errors).max() < 0.3
        assert torch.allclose(points["boxes"], targets["boxes"] * size / 256)
    sizes = [data.random_size(320, 0.5, 3, step) for step in range(200)]
    assert set(sizes) == set(range(160, 481, 32))
    assert sizes == [data.random_size(320, 0.5, 3, step) for step in range(200)]
    assert sizes != [data.random_size(320, 0.5, 4, step) for step in range(200)]
    assert data.random_size(320, 0.0, 3, 7) == 320


def test_a_smaller_size_averages_pixels():
    """Instead of taking some of them: stripes become gray."""
    stripes = torch.zeros(1, 3, 320, 320)
    stripes[..., ::2] = 1
    small, _ = data.resize(stripes, {"boxes": torch.zeros(1, 1, 4),
                                     "keypoints": torch.zeros(1, 1, 3, 3)}, 128)
    assert (small[..., 5:-5] - 0.5).abs().max() < 0.1


def test_masks_of_another_size_lie_where_they_lay():
    """A disc's middle stays in the middle of its pixels, whatever the ratio."""
    y, x = np.mgrid[:160, :160] + 0.5
    mask = torch.from_numpy((np.hypot(x - 90, y - 60) < 30).astype(np.uint8))[None]
    targets = {"mask": mask, "boxes": torch.zeros(1, 1, 4), "crowd": torch.zeros(1, 1, dtype=bool),
               "keypoints": torch.zeros(1, 1, 3, 3)}
    for size in (224, 288, 352, 480):
        moved = data.resize(torch.zeros(1, 3, 320, 320), targets, size)[1]["mask"][0]
        y, x = np.nonzero(moved.numpy())
        middle = (np.array([x.mean(), y.mean()]) + 0.5) * 320 / size
        assert np.abs(middle - [90, 60]).max() < 0.15


def test_a_set_is_described_and_each_fault_found(tmp_path):
    names = ["nose", *(f"{side}_{part}" for part in ("shoulder", "hip", "wrist")
                       for side in ("left", "right"))]
    annotations = []
    for i in range(60):  # facing us: left is at the image's right; wrists are crossed at random
        x = np.array([50, 70, 30, 65, 35, *np.random.default_rng(i).permutation([80, 20])])
        points = np.column_stack([x, [10, 30, 30, 60, 60, 50, 50], np.full(7, 2)])
        annotations.append({"id": i, "image_id": i, "bbox": [10, 10, 80, 80], "iscrowd": 0,
                            "keypoints": points.ravel().tolist(), "num_keypoints": 7})
        Image.new("RGB", (100, 100)).save(tmp_path / f"{i}.png")
    images = [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in range(60)]
    coco = labels(images, annotations, names)

    def said():
        ds = CocoPose(flatten(coco), str(tmp_path), read_skeleton(coco), 200, "center")
        return "\n".join(data.describe(ds, "to train on"))
    for line in ("60 people labeled, 0 without", "nose 100%"):
        assert "check" not in said() and line in said()
    p = annotations[3]["keypoints"]
    p[3:6], p[6:9] = p[6:9], p[3:6]
    annotations[4]["keypoints"][0] = 150
    annotations[5]["bbox"] = [10, 10, 3, 3]
    annotations.append({**annotations[6], "id": 99})
    annotations[7]["keypoints"][2::3] = [0] * 7
    annotations[8]["iscrowd"] = 1
    (tmp_path / "9.png").write_bytes(b"no image")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 0  # unknown, so not turned
    Image.new("RGB", (100, 100)).save(tmp_path / "2.png", exif=exif)
    exif[ExifTags.Base.Orientation] = 3  # upside down, which its size cannot tell
    Image.new("RGB", (100, 100)).save(tmp_path / "10.png", exif=exif)
    annotations[11]["bbox"] = [10, 10, 92, 80]
    annotations[12] |= {"bbox": [0, 0, 0, 0], "keypoints": 21 * [0]}
    text = said()
    for line in ("58 people labeled, 2 without keypoints, 1 crowds",
                 "3 images show nobody labeled, like 7.png",
                 "1 people without keypoints and box, taken for background, like 12.png",
                 "1 people smaller than 8 px at 200 px, like 5.png",
                 "1 people with most keypoints outside their box (bbox is x, y, width, height), "
                 "like 5.png",
                 "1 boxes that their image has twice, like 6.png",
                 "1 people with a keypoint outside the image, taken for not labeled, like 4.png",
                 "1 boxes beyond their image, cut there (bbox is x, y, width, height), like 11.png",
                 "labels must fit the file as stored, like 10.png",
                 "1 people whose left and right may be swapped, like 3.png",
                 "1 broken images, like 9.png"):
        assert line in text, text


def test_a_sets_numbers_are_of_its_people_and_of_the_padded_input(tmp_path):
    """400 x 100 px become 200 x 50: a box of 80 x 20 px has sides of 20. One of three people lacks
    b; a crowd and somebody without keypoints do not count."""
    Image.new("RGB", (400, 100)).save(tmp_path / "a.png")
    seen = [[9, 9, 2, 20, 20, 2], [9, 9, 2, 0, 0, 0], [9, 9, 2, 20, 20, 2], [0] * 6, [9, 9, 2] * 2]
    coco = labels([{"id": 1, "file_name": "a.png", "width": 400, "height": 100}], [
        {"id": i, "image_id": 1, "bbox": [i, 5, 80, 20] if i < 3 else [i, 0, 350, 90],
         "keypoints": k, "num_keypoints": sum(v > 0 for v in k[2::3]), "iscrowd": int(i == 4)}
        for i, k in enumerate(seen)], ["a", "b"])
    coco["categories"][0]["skeleton"] = []
    ds = dataset(coco, tmp_path, 200)
    assert data.describe(ds, "to train on")[1:3] == [
        "labeled       a 100%, b 67%", "box sides     20, 20, 20 px at 200 px "
        "(5, 50, 95 % of the people; the root of the area)"]


def test_every_split_of_the_stream_sees_the_same_images_in_the_same_steps():
    def steps(batch, world, accumulate, start=0):
        ranks = [list(itertools.islice(stream(10, 5, batch, start, rank, world, accumulate),
                                       (8 - start) * accumulate)) for rank in range(world)]
        return [sorted(key for rank in ranks for micro in rank[s * accumulate:(s + 1) * accumulate]
                       for key in micro) for s in range(8 - start)]
    one = steps(8, 1, 1)
    assert one == steps(4, 2, 1) == steps(2, 2, 2) == steps(1, 4, 2)
    assert one[3:] == steps(4, 2, 1, start=3)
    seen = [key for step in one for key in step]
    for epoch in range(6):
        assert sorted(i for e, i in seen if e == epoch) == list(range(10))
    assert len({tuple(i for e, i in seen[10 * k:10 * k + 10]) for k in range(6)}) == 6


def ignored(keypoints: list, bbox: list, keep: bool = True, **more) -> tuple:
    ann = {"id": 1, "image_id": 1, "bbox": bbox, "keypoints": keypoints, "num_keypoints": 1,
           "iscrowd": 0, **more}
    coco = labels([{"id": 1, "file_name": "a", "width": 100, "height": 100}], [ann])
    ds = CocoPose(flatten(coco), "", read_skeleton(coco, ""), 100, "center", keep_ignored=keep)
    return ds.people(0, np.eye(3), np.array([0, 0, 50, 100.0]))  # the right half is cut off


def test_people_whose_keypoints_left_the_picture_are_ignored_not_background():
    boxes, keypoints, crowd = ignored([60, 50, 2, 70, 50, 2, 0, 0, 0], [40, 40, 40, 20])
    assert boxes.tolist() == [[40, 40, 50, 60]] and (keypoints[..., 2] == 0).all()
    boxes, keypoints, crowd = ignored([45, 50, 2, 70, 50, 2, 0, 0, 0], [40, 40, 40, 20])
    assert keypoints[0, :, 2].tolist() == [2, 0, 0]
    boxes, keypoints, crowd = ignored([45, 50, 2, 0, 0, 0, 0, 0, 0], [45, 50, 0.9, 0.9])
    assert len(boxes) == 1 and (keypoints[..., 2] == 0).all()  # too small to learn from
    assert len(ignored([60, 50, 2, 70, 50, 2, 0, 0, 0], [60, 40, 40, 20])[0]) == 0  # out of view


def test_the_reference_drops_them_and_takes_a_crowd_for_a_person():
    assert len(ignored([60, 50, 2, 70, 50, 2, 0, 0, 0], [40, 40, 40, 20], keep=False)[0]) == 0
    row = [45, 50, 2, 0, 0, 0, 0, 0, 0], [40, 40, 40, 20]
    assert ignored(*row, iscrowd=1)[2].tolist() == [True]
    assert ignored(*row, keep=False, iscrowd=1)[2].tolist() == [False]


def test_only_people_leaves_out_images_without_labeled_ones():
    anns = [{"id": i, "image_id": i, "bbox": [0, 0, 9, 9], "keypoints": [1, 1, v] * 3,
             "num_keypoints": 3 * (v > 0), "iscrowd": crowd}
            for i, (v, crowd) in enumerate([(2, 0), (0, 0), (2, 1)])]
    images = [{"id": i, "file_name": str(i), "width": 9, "height": 9} for i in range(4)]
    assert flatten(labels(images, anns), only_people=True).ids.tolist() == [0]
    assert flatten(labels(images, anns)).ids.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="nobody is labeled"):
        flatten(labels(images[1:], anns[1:]), only_people=True)


def test_flip_pairs_and_sigmas_come_from_names_the_json_or_flags():
    coco = labels([], [], ["nose", "left_eye", "right_eye", "left_hand"])
    assert read_skeleton(coco).flip == [0, 2, 1, 3]
    assert read_skeleton(coco, "nose:left_hand").flip == [3, 1, 2, 0]
    for left, right in ("left a", "right a"), ("mouth_left", "mouth_right"), ("ALeft", "ARight"):
        assert read_skeleton(labels([], [], ["nose", right, left])).flip == [0, 2, 1]
    assert read_skeleton(coco).sigmas == [0.05] * 4
    assert read_skeleton(labels([], [], data.COCO_NAMES)).sigmas == data.COCO_SIGMAS
    coco["categories"][0]["sigmas"] = [0.1, 0.2, 0.3, 0.4]
    assert read_skeleton(coco).sigmas == [0.1, 0.2, 0.3, 0.4]
    assert read_skeleton(coco, sigmas=[1, 1, 1, 1]).sigmas == [1, 1, 1, 1]
    for bad in ("nose:elbow", "nose", "nose:nose", "nose:left_eye,nose:right_eye"):
        with pytest.raises(ValueError, match="flip pair"):
            read_skeleton(coco, bad)
    with pytest.raises(ValueError, match=r"sigmas \[1, 1\] for 4 keypoints"):
        read_skeleton(coco, sigmas=[1, 1])
    for key, bad, message in (("sigmas", 5, "sigmas 5"), ("sigmas", ["x"] * 4, "sigmas .'x'"),
                              ("sigmas", [math.nan] * 4, "sigmas .nan"),
                              ("sigmas", [25] * 4, "at most 1"),
                              ("skeleton", 5, "skeleton 5"), ("skeleton", [[0, 1]], "skeleton")):
        with pytest.raises(ValueError, match=message):
            read_skeleton({"categories": [{**coco["categories"][0], key: bad}]})
    assert read_skeleton({"categories": [{**coco["categories"][0], "skeleton": None}]}).edges == []


IMAGE = {"id": 1, "file_name": "a.png", "width": 9, "height": 9}
PERSON = {"id": 7, "image_id": 1, "bbox": [0, 0, 5, 5], "keypoints": [1, 1, 2] * 3}


def with_category(**changes) -> dict:
    coco = labels([IMAGE], [PERSON])
    return {**coco, "categories": [{**coco["categories"][0], **changes}]}


@pytest.mark.parametrize("content, message", [
    ([], "expected the lists images, annotations and categories"),
    ({"images": []}, "expected the lists images, annotations and categories"),
    (labels([], []), "its list of images is empty"),
    ({**labels([IMAGE], []), "annotations": {}}, "expected the lists images, annotations and cat"),
    ({**labels([IMAGE], []), "categories": [{"id": 1, "name": "cat"}]}, "instances_"),
    ({**labels([IMAGE], []), "categories": 2 * with_category()["categories"]},
     "id 1 is there twice"),
    ({**labels([IMAGE], []), "categories": with_category()["categories"] + [
        {"id": 2, "name": "b", "keypoints": ["x"]}]},
     r"2 categories with keypoints, \['person', 'b'\], expected one; they name different ones"),
    ({**labels([IMAGE], []), "categories": [{**with_category()["categories"][0], "id": i}
                                            for i in (1, 2)]}, "they name the same: keep one"),
    (with_category(keypoints=[]), "expected exactly one with keypoint names"),
    (labels([IMAGE], [{**PERSON, "category_id": 2}]), "annotation 7 has category_id 2, expected 1"),
    (labels([IMAGE], [{**PERSON, "iscrowd": "0"}]), "annotation 7 has iscrowd 0, expected 0 or 1"),
    (labels([IMAGE], [{**PERSON, "area": "12"}]), "area 12 or keypoints with something"),
    (labels([IMAGE], [{**PERSON, "bbox": [0, 0, 1e39, 5]}]), "expected finite numbers"),
    (labels([IMAGE], [{**PERSON, "bbox": [0, 0, 0, 0]}]), "expected one around the body"),
    (labels([IMAGE], [{**PERSON, "keypoints": [0.1, 0.9, 2] * 3}]), "not shares of the image"),
    (labels([IMAGE], [{**PERSON, "bbox": [0.1, 0.2, 0.5, 1]}]), "not shares of the image"),
    (labels([IMAGE], [{**PERSON, "area": 0.4}]), "not shares of the image"),
    (labels([IMAGE], [{**PERSON, "area": 1e11}]), "expected finite numbers everywhere"),
    (with_category(keypoints=["a", "a", "b"]), "different texts"),
    (with_category(keypoints=[1, 2, 3]), "different texts"),
    (labels([7], []), "images: found 7, expected a record"),
    (labels([{"id": 1, "file_name": "a.png", "width": 9}], []), "height is missing"),
    (labels([{**IMAGE, "id": "1"}], []), "id 1 in .* of type int"),
    (labels([{**IMAGE, "id": 2 ** 60}], []), "of type int"),
    (labels([{**IMAGE, "width": "9"}], []), "width 9 in .* of type number"),
    (labels([{**IMAGE, "width": 2**70}], []), "expected 1 to 100000"),
    (labels([{**IMAGE, "height": float("inf")}], []), "expected 1 to 100000"),
    (labels([{**IMAGE, "file_name": None}], []), "file_name None in .* of type str"),
    (labels([IMAGE, IMAGE], []), "images: id 1 is there twice"),
    (labels([IMAGE], [PERSON, PERSON]), "annotations: id 7 is there twice"),
    (labels([IMAGE], [{**PERSON, "keypoints": [1, 1, 2]}]), "annotation 7 has 3 keypoint numbers"),
    (labels([IMAGE], [{**PERSON, "keypoints": [1, 1, 3] * 3}]), "visibility 3, expected 0, 1 or"),
    (labels([IMAGE], [PERSON, {**PERSON, "id": 8, "bbox": [3, 3, 0, 9]}]),
     "annotation 8 has labeled keypoints, but bbox .*, expected one around the body"),
    (labels([IMAGE], [{**PERSON, "keypoints": ["1", 1, 2] * 3}]), "not a number"),
    (labels([IMAGE], [{**PERSON, "keypoints": [None, 1, 2] * 3}]), "not a number"),
    (labels([IMAGE], [{**PERSON, "keypoints": [float("inf"), 1, 2] * 3}]), "expected finite numb"),
    (labels([IMAGE], [{**PERSON, "image_id": 5}]), "annotation 7 has image 5, which is not in"),
    (labels([IMAGE], [{**PERSON, "bbox": [0, 0, -5, 5]}]), "a size that is not negative"),
    (labels([IMAGE], [{**PERSON, "bbox": [0, 0, 5]}]), "in bbox 4"),
    (labels([IMAGE], [{**PERSON, "bbox": [0, 0, float("nan"), 5]}]), "expected finite numbers"),
    (labels([IMAGE], [{**PERSON, "bbox": [0, 0, 10 ** 400, 5]}]), "not a number"),
    (labels([IMAGE], [{**PERSON, "area": float("nan")}]), "expected finite numbers"),
])
def test_a_json_that_cannot_train_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        read_json(str(path))
    assert str(path) in str(error.value)


def test_missing_numbers_that_scoring_needs_are_filled_in(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(labels([IMAGE], [PERSON])))
    ann = read_json(str(path))["annotations"][0]
    assert (ann["iscrowd"], ann["num_keypoints"], ann["area"]) == (0, 3, pytest.approx(0.53 * 25))
    coco = labels([IMAGE], [{**PERSON, "iscrowd": None, "num_keypoints": 0, "area": -25}])
    coco["categories"].insert(0, {"id": 0, "name": "fish-project", "supercategory": "none"})
    path.write_text(json.dumps(coco), encoding="utf-8-sig")  # as Windows' tools write
    coco = read_json(str(path))
    assert [category["id"] for category in coco["categories"]] == [1]
    ann = coco["annotations"][0]
    assert (ann["iscrowd"], ann["num_keypoints"], ann["category_id"]) == (0, 3, 1)
    assert ann["area"] == pytest.approx(0.53 * 25)
    path.write_text(json.dumps(labels([IMAGE], [
        {"id": 7, "image_id": 1, "bbox": [0, 0, 5, 5], "area": None, "keypoints": []}])))
    ann = read_json(str(path))["annotations"][0]
    assert ann["keypoints"] == [0] * 9 and ann["area"] == pytest.approx(0.53 * 25)


def test_an_image_of_another_size_than_the_json_says_is_refused(tmp_path):
    coco = dot_images(tmp_path, ".png", count=1)
    record = coco["images"][0]
    record["width"], record["height"] = record["height"], record["width"]
    with pytest.raises(ValueError, match="its json says .*, turned by its EXIF tag?"):
        dataset(coco, tmp_path)[0, 0]
    record["width"] += 1
    with pytest.raises(ValueError, match="its json says [0-9x]*;"):
        dataset(coco, tmp_path)[0, 0]


def test_sixteen_bits_become_eight(tmp_path):
    Image.fromarray(np.full((200, 300), 200 * 256 + 7, np.uint16)).save(tmp_path / "a.png")
    coco = labels([{"id": 1, "file_name": "a.png", "width": 300, "height": 200}], [])
    assert (dataset(coco, tmp_path, 64, "bottom_right")[0, 0]["image"][10, 10] == 200).all()


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "1"])
def test_any_color_mode_becomes_rgb(tmp_path, mode):
    suffix = "jpg" if mode in ("L", "CMYK") else "png"
    Image.new("RGB", (300, 200), (200, 200, 200)).convert(mode).save(tmp_path / f"a.{suffix}")
    coco = labels([{"id": 1, "file_name": f"a.{suffix}", "width": 300, "height": 200}], [])
    image = dataset(coco, tmp_path, 64, "bottom_right")[0, 0]["image"]
    assert image.shape == (64, 64, 3) and abs(float(image[10, 10, 0]) - 200) < 60


def test_arrays_that_differ_have_other_fingerprints():
    """A number alone, as norms count their batches, is no length: 1e18 zeros would not fit."""
    one, two = np.array(10**18), np.array(10**18 + 1)
    prints = {data.fingerprint(arrays) for arrays in ([one, two], [two, one], [one, one], [b"a"])}
    assert len(prints) == 4
    assert data.fingerprint([np.arange(6)[::2]]) == data.fingerprint([np.array([0, 2, 4])])


OWN_CHILD = """
import data, multiprocessing, sys, time
own = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0.5,))
own.start()
data.stop_workers()
own.join()
sys.exit(own.exitcode)
"""


SLOW_LOADER = """
import data, os, time, torch
class Slow(list):
    cache = None
    def __getitem__(self, key):
        print(os.getpid(), flush=True)
        time.sleep(60)
next(iter(data.make_loader(Slow([0]), [[0]], 1, torch.device("cpu"))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux'")
def test_a_killed_run_leaves_no_loader_process():
    """It would keep the GPU memory of the killed one from the run that goes on."""
    with subprocess.Popen([sys.executable, "-c", SLOW_LOADER], cwd=os.path.dirname(data.__file__),
                          stdout=subprocess.PIPE, text=True) as run:
        worker = Path("/proc", run.stdout.readline().strip(), "stat")
        assert worker.exists()
        run.kill()
        run.wait()
    for _ in range(20):  # it is gone, or waits as a zombie for its new parent
        if not worker.exists() or worker.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the loader process lives on")


def test_a_programs_own_processes_live_on():
    assert subprocess.run([sys.executable, "-c", OWN_CHILD], cwd=os.path.dirname(data.__file__)
                          ).returncode == 0
