"""What the drawn data set promises about its pictures and its labels."""
import contextlib
import functools
import io
import json
import os

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import people

SIDE, VAL = 192, 200


@functools.cache
def scenes(split: int, count: int) -> list[tuple]:
    """(image, annotations, layers) of the first pictures of a split, 0 train or 1 val."""
    return [people.draw_image(np.random.default_rng((0, split, i)), SIDE) for i in range(count)]


def repaint(layers: list[tuple]) -> np.ndarray:
    """Who is on top, (side, side) canvas pixels, from one separate stencil per layer."""
    top = np.zeros([SIDE * people.OVERSAMPLE] * 2, int)
    for value, polygons in layers:
        stencil = Image.new("L", top.shape)
        people.paint(stencil, polygons, 1)
        top = np.where(np.asarray(stencil) == 1, value, top)
    return top


def on_top(top: np.ndarray, ann: dict) -> tuple[np.ndarray, np.ndarray]:
    """v (17,) and what `top` shows at each keypoint, (17,), -1 where the keypoint is outside."""
    x, y, v = np.array(ann["keypoints"]).reshape(17, 3).T
    column, row = (((c + 0.5) * people.OVERSAMPLE + 1e-6).astype(int) for c in (x, y))
    return v, np.where(v > 0, top[row, column], -1)


def test_a_picture_depends_on_seed_split_and_index_alone(tmp_path):
    people.draw_dataset(str(tmp_path / "a"), train=3, val=2, side=96)
    people.draw_dataset(str(tmp_path / "b"), train=2, val=1, side=96)
    people.draw_dataset(str(tmp_path / "c"), train=2, val=1, side=96, seed=1)
    read = {name: (tmp_path / name).read_bytes() for name in (
        "a/train2017/000001.jpg", "b/train2017/000001.jpg", "c/train2017/000001.jpg",
        "a/val2017/000001.jpg")}
    assert read["a/train2017/000001.jpg"] == read["b/train2017/000001.jpg"]
    assert len(set(read.values())) == 3


def test_visible_keypoints_lie_on_their_person_and_absent_ones_are_zero():
    for _, anns, layers in scenes(1, VAL)[:50]:
        top = repaint(layers)
        for value, ann in enumerate(anns, 1):
            v, shown = on_top(top, ann)
            assert (shown[v == 2] == value).all()
            assert (np.array(ann["keypoints"]).reshape(17, 3)[v == 0] == 0).all()
            assert ann["num_keypoints"] == (v > 0).sum() and (v == 2).sum() >= 5


def test_area_and_box_are_those_of_the_pixels_in_sight():
    for _, anns, layers in scenes(1, VAL)[:50]:
        top = repaint(layers)
        for value, ann in enumerate(anns, 1):
            rows, columns = np.nonzero(top == value)
            box = np.array([columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1])
            np.testing.assert_allclose(ann["area"], len(rows) / people.OVERSAMPLE ** 2)
            np.testing.assert_allclose(ann["bbox"], box / people.OVERSAMPLE)


def test_a_keypoint_is_a_pixels_index_and_visible_if_it_faces_us():
    """By hand, 4 x 4 px: the person fills the middle 2 x 2, from canvas pixel 3 to 9."""
    mask = Image.new("L", [4 * people.OVERSAMPLE] * 2)
    mask.paste(1, (3, 3, 9, 9))
    joints = np.array([4.5 + 7.5j, 4.5 + 7.5j, 1.5 + 4.5j, -1 + 4j] + 13 * [20 + 20j])
    ann = people.annotate(mask, 1, joints, np.array([True, False] + 15 * [True]))
    assert ann["keypoints"] == [1, 2, 2, 1, 2, 1, 0, 1, 1, 0, 0, 0] + 39 * [0]
    assert (ann["bbox"], ann["area"], ann["num_keypoints"]) == ([1, 1, 2, 2], 4, 3)


def test_the_image_shows_the_face_where_the_keypoints_are():
    """Pupils are nearly black and noses are not, so labels that left the picture fail."""
    contrast = []
    for image, anns, _ in scenes(1, VAL):
        gray = np.asarray(image.convert("L"), float)
        for ann in anns:
            nose, left, right = np.array(ann["keypoints"]).reshape(17, 3)[:3]
            if ann["bbox"][3] > 0.4 * SIDE and nose[2] == left[2] == right[2] == 2:
                for x, y, _ in (left, right):
                    x, y = round(x), round(y)
                    contrast.append(gray[round(nose[1]), round(nose[0])] - gray[y, x])
    assert len(contrast) > 50 and np.mean(np.array(contrast) > 0) > 0.95


def test_one_to_five_people_of_all_sizes():
    counts = [len(anns) for _, anns, _ in scenes(1, VAL)]
    assert set(counts) == {1, 2, 3, 4, 5}
    heights = [ann["bbox"][3] / SIDE for _, anns, _ in scenes(1, VAL) for ann in anns]
    assert 0.15 <= min(heights) < 0.25 and 0.8 < max(heights) <= 0.91


def test_three_in_ten_people_are_partly_hidden_by_something_else():
    hidden = []
    for _, anns, layers in scenes(1, VAL):
        top = repaint(layers)
        for value, ann in enumerate(anns, 1):
            hidden.append(bool(set(on_top(top, ann)[1].tolist()) - {-1, 0, value}))
    assert np.mean(hidden) >= 0.3


def test_the_median_pose_in_the_true_box_scores_next_to_nothing():
    places = []  # of each train keypoint in its box, 0 to 1, nan outside the image
    for _, anns, _ in scenes(0, 300):
        for ann in anns:
            points = np.array(ann["keypoints"]).reshape(17, 3)
            place = (points[:, :2] + 0.5 - ann["bbox"][:2]) / ann["bbox"][2:]             # (17, 2)
            places.append(np.where(points[:, 2:] > 0, place, np.nan))
    median = np.nanmedian(places, 0)                                                      # (17, 2)

    truth, guesses = [], []
    for i, (_, anns, _) in enumerate(scenes(1, VAL)):
        for ann in anns:
            truth.append({"id": len(truth) + 1, "image_id": i, **ann})
            points = median * ann["bbox"][2:] + ann["bbox"][:2] - 0.5                     # (17, 2)
            guesses.append({"image_id": i, "category_id": 1, "score": 1.0,
                            "keypoints": np.c_[points, np.ones(17)].ravel().tolist()})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"images": [{"id": i} for i in range(VAL)], "annotations": truth,
                        "categories": [people.CATEGORY]}
        coco.createIndex()
        scorer = COCOeval(coco, coco.loadRes(guesses), "keypoints")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    assert 0 <= scorer.stats[0] <= 0.05


def test_the_files_are_complete_and_a_second_call_leaves_them_alone(tmp_path):
    root = tmp_path / "new" / "drawn"
    people.draw_dataset(str(root), train=3, val=2, side=96)
    for name, count in (("train2017", 3), ("val2017", 2)):
        coco = json.loads((root / f"annotations/person_keypoints_{name}.json").read_text())
        assert [i["file_name"] for i in coco["images"]] == sorted(os.listdir(root / name))
        assert len(coco["images"]) == count and len(coco["categories"][0]["keypoints"]) == 17
        assert len({a["id"] for a in coco["annotations"]} - {0}) == len(coco["annotations"])
        assert {a["image_id"] for a in coco["annotations"]} == {i["id"] for i in coco["images"]}
        assert Image.open(root / name / coco["images"][0]["file_name"]).size == (96, 96)
    before = [p.stat().st_mtime_ns for p in sorted(root.rglob("*"))]
    people.draw_dataset(str(root), train=4, val=3, side=96)
    assert [p.stat().st_mtime_ns for p in sorted(root.rglob("*"))] == before


def test_of_two_processes_that_draw_at_once_both_go_on(tmp_path, monkeypatch):
    root, real = tmp_path / "set", json.dump

    def other_is_faster(*given):
        real(*given)
        monkeypatch.setattr(json, "dump", real)
        people.draw_dataset(str(root), 2, 1, 32)
    monkeypatch.setattr(json, "dump", other_is_faster)
    people.draw_dataset(str(root), 2, 1, 32)
    assert os.listdir(tmp_path) == ["set"] and len(list(root.rglob("*.jpg"))) == 3
    monkeypatch.setattr(os, "rename", lambda *_: os.stat(tmp_path / "not here"))
    with pytest.raises(FileNotFoundError):
        people.draw_dataset(str(tmp_path / "other"), 2, 1, 32)


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    pictures = iter([people.draw_image(np.random.default_rng(0), 96)])
    monkeypatch.setattr(people, "draw_image", lambda rng, side: next(pictures))
    with pytest.raises(StopIteration):
        people.draw_dataset(str(tmp_path / "drawn"), train=3, val=2, side=96)
    assert os.listdir(tmp_path) == []
