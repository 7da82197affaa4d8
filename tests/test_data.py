"""Pixels and points move together, a sample depends on its key alone, bad files are refused."""
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (MOSAIC, MOSAIC_HEAVY, PAD_COLOR, PAD_MODES, PLAIN, Augment, CocoPose, Stream,
                  collage, collate, flatten, letterbox, make_loader, move, read_json, read_skeleton, undo)

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


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_colored_dots_stay_under_their_keypoints_through_everything_random(tmp_path, suffix):
    """No reference needed: the image itself says where a point went. Mosaic tiles included."""
    coco = dot_images(tmp_path, suffix)
    errors = []
    for augment, pad in ((MOSAIC, "center"), (MOSAIC_HEAVY, "bottom_right")):
        augment = augment._replace(**NO_COLOR, flip=0.5)
        for size in (128, 320):
            ds = dataset(coco, tmp_path, size, pad, augment, seed=1)
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
    assert (image[int(height):] == PAD_COLOR).all() and (image[:, int(width):] == PAD_COLOR).all()


def test_a_sample_depends_on_seed_epoch_and_index_alone(tmp_path):
    coco = dot_images(tmp_path, ".png")
    ds = dataset(coco, tmp_path, 96, augment=MOSAIC, seed=3)
    keys = [[(0, 1), (0, 2)], [(1, 0), (0, 1)], [(2, 5), (1, 0)]]
    alone = [collate([ds[key] for key in batch]) for batch in keys]
    for workers in (0, 2):
        for (images, targets), (want, wanted) in zip(
                make_loader(ds, keys, workers, torch.device("cpu")), alone):
            assert torch.equal(images, want)
            assert all(torch.equal(targets[name], wanted[name]) for name in wanted)
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


def test_every_split_of_the_stream_sees_the_same_images_in_the_same_steps():
    def steps(batch, world, accumulate, start=0):
        ranks = [list(itertools.islice(Stream(10, 5, batch, start, rank, world, accumulate),
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
    assert read_skeleton(coco).sigmas == [0.05] * 4
    assert read_skeleton(labels([], [], data.COCO_NAMES)).sigmas == data.COCO_SIGMAS
    coco["categories"][0]["sigmas"] = [0.1, 0.2, 0.3, 0.4]
    assert read_skeleton(coco).sigmas == [0.1, 0.2, 0.3, 0.4]
    assert read_skeleton(coco, sigmas=[1, 1, 1, 1]).sigmas == [1, 1, 1, 1]
    for bad in ("nose:elbow", "nose", "nose:nose", "nose:left_eye,nose:right_eye"):
        with pytest.raises(ValueError, match="flip pair"):
            read_skeleton(coco, bad)
    with pytest.raises(ValueError, match="2 sigmas for 4 keypoints"):
        read_skeleton(coco, sigmas=[1, 1])


IMAGE = {"id": 1, "file_name": "a.png", "width": 9, "height": 9}
PERSON = {"id": 7, "image_id": 1, "bbox": [0, 0, 5, 5], "keypoints": [1, 1, 2] * 3}


@pytest.mark.parametrize("content, message", [
    ({"images": []}, "expected the keys images, annotations and categories"),
    ({**labels([IMAGE], []), "categories": [{"id": 1, "name": "cat"}]}, "instances_"),
    (labels([IMAGE], [{**PERSON, "keypoints": [1, 1, 2]}]), "annotation 7 has 3 keypoint numbers"),
    (labels([IMAGE], [{**PERSON, "image_id": 5}]), "annotation 7 belongs to image 5"),
    (labels([IMAGE], [{**PERSON, "bbox": [0, 0, -5, 5]}]), "negative box size"),
    (labels([IMAGE], [{**PERSON, "bbox": [0, 0, float("nan"), 5]}]), "not a finite number"),
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


def test_an_image_of_another_size_than_the_json_says_is_refused(tmp_path):
    coco = dot_images(tmp_path, ".png", count=1)
    coco["images"][0]["width"] += 1
    with pytest.raises(ValueError, match="its json says"):
        dataset(coco, tmp_path)[0, 0]


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "1"])
def test_any_color_mode_becomes_rgb(tmp_path, mode):
    suffix = "jpg" if mode in ("L", "CMYK") else "png"
    Image.new("RGB", (300, 200), (200, 200, 200)).convert(mode).save(tmp_path / f"a.{suffix}")
    coco = labels([{"id": 1, "file_name": f"a.{suffix}", "width": 300, "height": 200}], [])
    image = dataset(coco, tmp_path, 64, "bottom_right")[0, 0]["image"]
    assert image.shape == (64, 64, 3) and abs(float(image[10, 10, 0]) - 200) < 60
