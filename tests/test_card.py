"""Errors planted into perfect detections are found, in their class alone; the flip test mirrors."""
import itertools
import json
import math
import resource
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import evaluate
from data import COCO_NAMES, COCO_SIGMAS, CocoPose, collate, flatten, read_skeleton
from evaluate import (KEYPOINT_NUMBERS, crowd_index, diagnose, look, make_card, mirror, quiet_coco)
from model import STRIDES, Decoded, RawOutput, decode, make_anchors
from people import draw_dataset
from test_evaluate import coco_file, detections

FOLDER = Path(__file__).parent
CATEGORY = {"id": 1, "name": "person", "keypoints": COCO_NAMES, "skeleton": []}
SKELETON = read_skeleton({"categories": [CATEGORY]})
NOSE, L_EYE, L_WRIST, R_WRIST, L_ANKLE = (COCO_NAMES.index(n) for n in (
    "nose", "left_eye", "left_wrist", "right_wrist", "left_ankle"))
AREA, WIDTH, HEIGHT = 10_000.0, 120.0, 300.0


def person(number: int, image_id: int, x: float, y: float) -> dict:
    """Keypoints 40 px apart: left ones in one column, right ones in the other, all labeled."""
    rows = np.array([(x + 40 * name.startswith("right"), y + 35 * (i + 1) // 2, 2)
                     for i, name in enumerate(COCO_NAMES)], float)
    return {"id": number, "image_id": image_id, "category_id": 1, "area": AREA, "iscrowd": 0,
            "bbox": [x - 40, y, WIDTH, HEIGHT], "num_keypoints": 17,
            "keypoints": rows.ravel().tolist()}


def scene() -> tuple[dict, dict]:
    """Six images, two people in each of them far from each other, and perfect detections."""
    people = [person(2 * i + j + 1, i, 100 + 900 * j, 50) for i in range(6) for j in range(2)]
    labels = {"images": [{"id": i, "file_name": f"{i}.jpg", "width": 1500, "height": 500}
                         for i in range(6)],
              "annotations": people, "categories": [CATEGORY]}
    by_image = {i: [{"image_id": i, "category_id": 1, "score": 0.5 + 0.01 * p["id"],
                     "keypoints": list(p["keypoints"])} for p in people if p["image_id"] == i]
                for i in range(6)}
    return labels, by_image


def rows(result: dict) -> np.ndarray:
    return np.reshape(result["keypoints"], (17, 3))


def put(result: dict, changes: dict) -> dict:
    """The result with keypoints {k: (x, y)} elsewhere."""
    pose = rows(result).copy()
    for k, xy in changes.items():
        pose[k, :2] = xy
    return result | {"keypoints": pose.ravel().tolist()}


def off(result: dict, k: int, close: float) -> tuple:
    """Where keypoint k has this similarity to its label."""
    reach = math.sqrt(-math.log(close) * 8 * COCO_SIGMAS[k] ** 2 * AREA)
    return rows(result)[k, 0] - 0.6 * reach, rows(result)[k, 1] - 0.8 * reach


def plant_inversion(found: list) -> dict:
    """A wrist, and somebody the other way round: all but the nose."""
    found[0] = put(found[0], {L_WRIST: rows(found[0])[R_WRIST, :2]})
    found[1] = put(found[1], dict(enumerate(rows(found[1])[SKELETON.flip, :2])))
    return {"inversion": 1 + 16}


def plant_jitter(found: list) -> dict:
    found[0] = put(found[0], {k: off(found[0], k, 0.84) for k in (NOSE, L_EYE)}
                   | {L_ANKLE: off(found[0], L_ANKLE, 0.51), L_WRIST: off(found[0], L_WRIST, 0.86)})
    return {"jitter": 3}


def plant_miss(found: list) -> dict:
    found[0] = put(found[0], {L_WRIST: off(found[0], L_WRIST, 0.49), NOSE: (-700, 400)})
    return {"miss": 2}


def plant_swap(found: list) -> dict:
    """A wrist on the other's, and an ankle on the other's other one."""
    found[0] = put(found[0], {L_WRIST: rows(found[1])[L_WRIST, :2],
                              L_ANKLE: rows(found[1])[SKELETON.flip[L_ANKLE], :2]})
    return {"swap": 2}


def plant_duplicate(found: list) -> dict:
    found[1]["score"] = 0.97
    found.append(found[1] | {"score": 0.96})
    return {"duplicate": 1}


def plant_score(found: list) -> dict:
    """The exact pose has a low score beside a rough one with a high score."""
    rough = put(found[0], {k: off(found[0], k, 0.8) for k in range(17)})
    found[0]["score"], rough["score"] = 0.1, 0.99
    found.append(rough)
    return {"score": 1}


def plant_background(found: list) -> dict:
    found.append(put(found[0], {k: (500 + k, 480) for k in range(17)}) | {"score": 0.95})
    return {"background": 1}


def plant_missed(found: list) -> dict:
    del found[1]
    return {"missed": 1}


PLANTS = [plant_inversion, plant_jitter, plant_miss, plant_swap, plant_duplicate, plant_score,
          plant_background, plant_missed]


def count(card: dict) -> dict:
    return {row["kind"]: row["count"] for row in card["errors"] if "gain" in row and row["count"]}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_error_is_found_in_its_class_alone_and_gives_the_lost_ap_back(plant):
    labels, by_image = scene()
    truth = quiet_coco(labels)
    assert count(make_card(truth, by_image, SKELETON)) == {}
    planted = plant(by_image[2])
    card = make_card(truth, by_image, SKELETON)
    assert count(card) == planted
    by_error = {row["kind"]: row for row in card["errors"]}
    ap, (name,) = card["scores"][0]["AP"], planted
    assert ap < 1 - 1e-3
    assert by_error[name]["AP"] == pytest.approx(1, abs=1e-12)
    assert by_error[name]["gain"] == pytest.approx(1 - ap, abs=1e-12)
    for other in set(by_error) - {"good", "best", "found", "score"} - planted.keys():
        assert by_error[other]["gain"] == 0  # the best order of scores may hide other errors
    sums_to_one(card)


def sums_to_one(card: dict) -> None:
    for of in {row["of"] for row in card["errors"]}:
        shares = [row["share"] for row in card["errors"] if row["of"] == of]
        assert sum(shares) == pytest.approx(1, abs=1e-12)
    for row in card["keypoints"]:
        assert sum(row[e] for e in KEYPOINT_NUMBERS[2:]) == pytest.approx(1, abs=1e-12)


def test_all_errors_at_once_are_counted_side_by_side():
    labels, by_image = scene()
    for i, plant in enumerate(PLANTS[:6]):
        plant(by_image[i])
    plant_background(by_image[0])
    card = make_card(quiet_coco(labels), by_image, SKELETON)
    assert count(card) == {"jitter": 3, "inversion": 17, "swap": 2, "miss": 2, "score": 1,
                           "duplicate": 1, "background": 1}
    sums_to_one(card)
    assert {r["kind"]: r["count"] for r in card["errors"]}["good"] == 12 * 17 - 3 - 17 - 2 - 2
    table = {row["keypoint"]: row for row in card["keypoints"]}
    assert table["left_wrist"]["inversion"] == 2 / 12 and table["left_wrist"]["swap"] == 1 / 12
    assert table["nose"]["miss"] == table["nose"]["jitter"] == 1 / 12


def test_what_coco_does_not_score_is_no_error():
    """A crowd and somebody without keypoints take detections in; no label, no error."""
    labels, by_image = scene()
    labels["annotations"] += [
        person(90, 3, 500, 50) | {"iscrowd": 1},
        person(91, 4, 500, 50) | {"num_keypoints": 0, "keypoints": 51 * [0]}]
    for i in (3, 4):
        by_image[i].append(put(by_image[i][0], dict(enumerate(
            rows(person(0, i, 500, 50))[:, :2]))) | {"score": 0.9})
    first = labels["annotations"][0]
    first["keypoints"] = put(first, {})["keypoints"]
    first["keypoints"][3 * NOSE:3 * NOSE + 3] = 0, 0, 0
    first["num_keypoints"] = 16
    card = make_card(quiet_coco(labels), by_image, SKELETON)
    assert count(card) == {} and card["scores"][0]["AP"] == pytest.approx(1)
    assert [row["labeled"] for row in card["keypoints"]] == [12 * 17 - 1, 11] + 16 * [12]


def test_scores_put_right_leave_duplicates_none():
    labels, by_image = scene()
    people = [a for a in labels["annotations"] if a["image_id"] == 0]
    results = sorted(by_image[0], key=lambda r: -r["score"])
    far = results[0] | {"score": 0.4, "keypoints": (rows(results[0]) + [3, 0, 0]).ravel().tolist()}
    case = diagnose([*results, far], people, np.zeros(3), SKELETON)
    assert case.kinds == ["best", "best", "duplicate"]
    assert [r["score"] for r in evaluate.put_right(case, "score")] == [1.0, 1.0, 0.0]


def test_a_pose_belongs_rather_to_an_upright_person_than_to_a_mirrored_one():
    labels, by_image = scene()
    pose = rows(by_image[0][0])
    person = labels["annotations"][0]
    mirrored, near = ({**person, "keypoints": p.ravel().tolist()} for p in (
        pose[SKELETON.flip], pose + [0.5, 0, 0]))
    case = diagnose(by_image[0][:1], [mirrored, near], np.zeros(1), SKELETON)
    assert case.pairs.tolist() == [[0, 1]]


def test_somebody_without_keypoints_takes_in_one_detection_as_pycocotools_has_it():
    labels, by_image = scene()
    labels["annotations"].append(
        person(91, 4, 500, 50) | {"num_keypoints": 0, "keypoints": 51 * [0]})
    shown = put(by_image[4][0], dict(enumerate(rows(person(0, 4, 500, 50))[:, :2])))
    by_image[4] += [shown | {"score": 0.9}, shown | {"score": 0.8}]
    card = make_card(quiet_coco(labels), by_image, SKELETON)
    assert count(card) == {"background": 1} and card["scores"][0]["AP"] < 1 - 1e-3
    assert [row["AP"] for row in card["errors"] if row["kind"] == "background"] == [
        pytest.approx(1)]


def test_keypoint_oks_and_pck_by_hand():
    """A tenth of a box of 120 x 300 px is 30 px, half a pixel either way decides; unfound people
    are left out."""
    labels, by_image = scene()
    x, y = rows(by_image[0][0])[L_ANKLE, :2]
    by_image[0][0] = put(by_image[0][0], {L_ANKLE: (x, y + 29.5), NOSE: (
        rows(by_image[0][0])[NOSE, 0] - 30.5, rows(by_image[0][0])[NOSE, 1])})
    del by_image[5][0]
    card = make_card(quiet_coco(labels), by_image, SKELETON)
    table = {row["keypoint"]: row for row in card["keypoints"]}
    ankle = math.exp(-29.5 ** 2 / (2 * 10_000 * (2 * 0.089) ** 2))
    nose = math.exp(-30.5 ** 2 / (2 * 10_000 * (2 * 0.026) ** 2))
    assert table["left_ankle"]["OKS"] == pytest.approx((10 + ankle) / 11, abs=1e-12)
    assert table["nose"]["OKS"] == pytest.approx((10 + nose) / 11, abs=1e-12)
    worst = card["worst images"]
    assert [row["file"] for row in worst] == ["5.jpg", "0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert [row["OKS"] for row in worst[:3]] == pytest.approx(
        [1 / 2, (1 + (15 + ankle + nose) / 17) / 2, 1], abs=1e-6) and worst[0]["people"] == 2
    assert table["left_ankle"]["PCK"] == 1 and table["nose"]["PCK"] == 10 / 11
    assert table["all"]["PCK"] == (11 * 17 - 1) / (11 * 17) and table["all"]["labeled"] == 11 * 17


def pycocotools_stats(labels: dict, results: list, ids: list, folder: Path) -> np.ndarray:
    (folder / "gt.json").write_text(json.dumps(labels))
    (folder / "dt.json").write_text(json.dumps(results))
    truth = COCO(str(folder / "gt.json"))
    scorer = COCOeval(truth, truth.loadRes(str(folder / "dt.json")), "keypoints")
    scorer.params.imgIds = ids
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    return scorer.stats


def slow_crowd_index(people: list) -> float:
    ratios = []
    for a in people:
        x, y, w, h = a["bbox"]
        own = foreign = 0
        for b in people:
            for px, py, v in np.reshape(b["keypoints"], (-1, 3)).tolist():
                own += b is a and v > 0
                foreign += b is not a and v > 0 and x <= px <= x + w and y <= py <= y + h
        ratios.append(min(foreign / own, 1))
    return sum(ratios) / len(ratios)


def test_every_ap_is_that_of_pycocotools_on_files(tmp_path):
    """All images, those with people, by number of people, by crowding; sizes; images without."""
    dump = np.load(FOLDER / "metric.npz")
    labels = coco_file(dump["gt"])
    labels["images"].append({"id": 999, "width": 640, "height": 640, "file_name": "none"})
    ids = [image["id"] for image in labels["images"]]
    by_image = detections(dump["dt"], ids)
    by_image[999] = [next(filter(None, by_image.values()))[0] | {"image_id": 999, "score": 0.99}]
    people = {i: [a for a in labels["annotations"] if a["image_id"] == i and a["num_keypoints"]
                  and not a["iscrowd"]] for i in ids}
    crowding = {i: slow_crowd_index(p) for i, p in people.items() if p}
    number, crowd = "people in the image", "crowding"
    groups = {("images", "all"): ids, ("images", "with labeled people"): list(crowding),
              (number, "1"): [i for i in ids if len(people[i]) == 1],
              (number, "2"): [i for i in ids if len(people[i]) == 2],
              (number, "3 to 5"): [i for i in ids if 3 <= len(people[i]) <= 5],
              (number, "6 or more"): [i for i in ids if len(people[i]) >= 6],
              (crowd, "easy"): [i for i, c in crowding.items() if c <= 0.1],
              (crowd, "medium"): [i for i, c in crowding.items() if 0.1 < c <= 0.8],
              (crowd, "hard"): [i for i, c in crowding.items() if c > 0.8]}
    scores = {(row["group"], row["which"]): row for row in
              make_card(quiet_coco(labels), by_image, SKELETON)["scores"]}
    results = [r for found in by_image.values() for r in found]
    for name, chosen in groups.items():
        row = scores.pop(name)
        assert row["images"] == len(chosen) and row["people"] == sum(len(people[i]) for i in chosen)
        stats = pycocotools_stats(labels, results, chosen, tmp_path) if chosen else 10 * [-1]
        np.testing.assert_allclose([row[m] for m in ("AP", "AP50", "AP75", "AR")],
                                   [stats[i] for i in (0, 1, 2, 5)], atol=1e-12)
    assert sum(map(bool, groups.values())) >= 6
    stats = pycocotools_stats(labels, results, ids, tmp_path)
    for i, name, low, high in ((3, "medium", 1024, 9216), (4, "large", 9216, 1e10)):
        row = scores.pop(("size", name))
        areas = [a["area"] for p in people.values() for a in p]
        assert row["people"] == sum(low <= area <= high for area in areas) > 0
        np.testing.assert_allclose([row["AP"], row["AR"]], [stats[i], stats[i + 5]], atol=1e-12)
    assert not scores


def test_crowd_index_by_hand():
    """Somebody with all of another's 17 keypoints in the box, who has none of the first's."""
    one, two = person(1, 0, 100, 50), person(2, 0, 400, 50)
    assert crowd_index([one, two]) == 0 and crowd_index([one]) == 0
    assert crowd_index([one | {"bbox": [0, 0, 1000, 1000]}, two]) == 0.5
    two["keypoints"][2::3] = [2] * 5 + [0] * 12
    assert crowd_index([one | {"bbox": [0, 0, 1000, 1000]}, two]) == pytest.approx(5 / 17 / 2)
    assert crowd_index([one, two | {"bbox": [0, 0, 1000, 1000]}]) == 0.5  # 17 / 5 counts as 1


def slow_error(pose: np.ndarray, whose: int, k: int, people: list) -> str:
    """The class of one keypoint by the words of diagnose."""
    def close(m: int, j: int) -> float:
        x, y, v = people[m]["keypoints"][3 * j:3 * j + 3]
        e = ((pose[k] - (x, y)) ** 2).sum() / (8 * COCO_SIGMAS[k] ** 2 * people[m]["area"])
        return math.exp(-e) if v else 0.0
    own, side = close(whose, k), close(whose, SKELETON.flip[k])
    others = [close(m, j) for m in range(len(people)) if m != whose for j in (k, SKELETON.flip[k])]
    if own >= 0.85:
        return "good"
    if max([own, side, *others]) < 0.5:
        return "miss"
    if own >= max([side, *others]):
        return "jitter"
    return "inversion" if side >= max(others, default=0) else "swap"


def test_classes_of_many_keypoints_are_those_of_a_slow_version():
    rng, seen = np.random.default_rng(0), set()
    for _ in range(30):
        people = [person(i + 1, 0, *rng.uniform(50, 200, 2)) | {"area": rng.uniform(4e3, 4e4)}
                  for i in range(4)]
        for p in people:
            p["keypoints"][2::3] = rng.integers(0, 3, 17).tolist()
        results = [{"score": 1 - i / 9, "keypoints": (np.array(p["keypoints"])
                    + rng.normal(size=51) * 12).tolist()} for i, p in enumerate(people)]
        case = diagnose(results, people, np.zeros(4), SKELETON)
        for (d, m), told in zip(case.pairs, case.told.transpose(1, 2, 0)):
            pose, labels = rows(results[d])[:, :2], rows(people[m])
            for k in range(17):
                if labels[k, 2] == 0:
                    assert not told[k].any()
                    continue
                expected = slow_error(pose, m, k, people)
                assert [n for n, v in zip(KEYPOINT_NUMBERS[2:], told[k, 2:]) if v] == [expected]
                seen.add(expected)
    assert seen == set(KEYPOINT_NUMBERS[2:])


def test_nothing_found_and_nobody_there():
    labels, by_image = scene()
    card = make_card(quiet_coco(labels), {i: [] for i in by_image}, SKELETON)
    assert count(card) == {"missed": 12} and card["keypoints"][0] == {
        "keypoint": "all", "labeled": 0} | dict.fromkeys(KEYPOINT_NUMBERS, -1)
    card = make_card(quiet_coco(labels | {"annotations": []}), by_image, SKELETON)
    assert count(card) == {"background": 12} and card["scores"][0]["AP"] == -1
    json.dumps(card)
    page = evaluate.card_page(card | {"metrics": {"AP": -1.0}, "protocol": {"weights": "w.pt"},
                                      "speed": {"latency_ms": 1.0, "batch": 8, "img_s": 1.0,
                                                "evaluation_s": 1.0}})
    assert "<title>nobody labeled: w.pt</title>" in page


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
    (plain, mask), (flipped, flipped_mask) = (look(Even().eval(), images, flip)
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


def test_the_command_writes_a_page_and_its_numbers(small, run):
    run("--metrics", str(small / "m.json"), "--results", str(small / "r.json"),
        "--card", str(small / "card.html"), "--flip-test", "--fuse")
    card = json.loads((small / "card.json").read_text())
    metrics = json.loads((small / "m.json").read_text())
    assert card["metrics"] == metrics and card["scores"][0]["AP"] == metrics["AP"]
    assert card["protocol"]["flip test"] and card["protocol"]["fused"]
    assert card["speed"]["batch"] == 8 and card["speed"]["latency_ms"] > 0
    assert not list(small.glob("*.tmp"))
    page = (small / "card.html").read_text()
    for text in (*COCO_NAMES, *card["protocol"], "jitter", "background", "missed", "6 or more"):
        assert text in page
    assert "8 images, 0 of them without labeled people" in page
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing from elsewhere


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


def test_sigmas_are_the_rulers_of_ap_and_are_said(small, official_n, run):
    """Given by hand, as a benchmark names them; the same numbers as from a json that holds them."""
    wide = [3 * sigma for sigma in COCO_SIGMAS]
    for flags in ([], ["--sigmas", ",".join(map(str, wide))]):
        run("--results", str(small / "r.json"), "--card", str(small / "c.html"), *flags)
        card = json.loads((small / "c.json").read_text())
        assert card["protocol"]["sigmas"] == (wide if flags else COCO_SIGMAS)
        by_image = {i: [] for i in range(8)}
        for result in json.loads((small / "r.json").read_text()):
            by_image[result["image_id"]].append(result)
        labels = json.loads((small / "set/annotations/person_keypoints_val2017.json").read_text())
        want = evaluate.keypoint_ap(quiet_coco(labels), by_image, wide if flags else COCO_SIGMAS)
        assert card["metrics"] == pytest.approx(want, abs=1e-12)
        worst = card["worst images"]  # all eight
        assert len(worst) == 8
        assert sum(row["OKS"] * row["people"] for row in worst) / sum(
            row["people"] for row in worst) == pytest.approx(card["metrics"]["OKS"], rel=1e-6)


def test_the_protocol_and_the_speed_are_those_of_the_run(small, run, monkeypatch):
    """A second an image, by a clock that says how many images a pass has."""
    passes, look = [], evaluate.look
    monkeypatch.setattr(evaluate, "look", lambda model, images, *how: passes.append(
        len(images)) or look(model, images, *how))
    monkeypatch.setattr(evaluate, "seconds", lambda call: call() and float(passes[-1]))
    for pad in "center", "bottom_right":
        run("--card", str(small / "c.html"), "--conf", "0.02", "--iou", "0.5", "--pad", pad)
        card = json.loads((small / "c.json").read_text())
        assert (card["speed"]["latency_ms"], card["speed"]["img_s"]) == (1000, 1)
        assert [card["protocol"][name] for name in ("smallest score", "NMS overlap", "padding",
                                                    "image size")] == [0.02, 0.5, pad, "64 px"]


def test_thresholds_reach_the_results(small, run):
    """--iou leaves fewer, --conf exactly the better ones."""
    def scores(*flags: str) -> list[float]:
        run("--results", str(small / "r.json"), *flags)
        return sorted(r["score"] for r in json.loads((small / "r.json").read_text()))
    every = scores()
    assert len(scores("--iou", "0.1")) < len(every)
    assert scores("--conf", repr(every[9])) == every[9:]


def test_predictions_from_0_3_on_are_drawn_and_always_the_best(monkeypatch):
    limits = []
    monkeypatch.setattr(evaluate, "people_in", lambda out, b, m, conf: limits.append(conf) or (
        np.zeros((0, 4)), [], np.zeros((0, 17, 3))))
    monkeypatch.setattr(evaluate, "look", lambda *_: (Decoded(
        None, torch.tensor([[0.1, 0.9], [0.1, 0.2]]), None, None), None))
    sample = {"image": np.zeros((64, 64, 3), np.uint8), "boxes": np.zeros((0, 4)), "keypoints":
              np.zeros((0, 17, 3)), "crowd": np.zeros(0, bool), "image_id": 1, "bad": [],
              "matrix": np.eye(2, 3)}

    class Samples(list):
        skeleton = SKELETON
    evaluate.draw_samples(Samples([sample, sample]), [0, 1], torch.nn.Identity())
    assert limits == pytest.approx([0.3, 0.2])


def test_a_flip_test_without_pairs_is_refused(small, official_n, tmp_path, monkeypatch):
    """It would average left with right."""
    model, file = evaluate.load_model(official_n, "n")
    file["skeleton"]["flip"] = list(range(17))
    torch.save(file | {"format": "nanopose", "model": model.state_dict()}, tmp_path / "w.pt")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--data", str(small / "set"), "--weights",
                                      str(tmp_path / "w.pt"), "--workers", "0", "--flip-test"])
    with pytest.raises(SystemExit, match="--flip-test needs pairs of left and right"):
        evaluate.main()


@pytest.mark.parametrize("flags,complaint", [
    (["--card", "card.htm"], "--card card.htm must end in .html"),
    (["--card", "nowhere/card.html"], "nowhere/card.html is a folder or device, or in a folder th"),
    (["--metrics", "/dev/null"], "/dev/null is a folder or device"),
    (["--card", "a.html", "--metrics", "./a.json"], "a.json is read, or written twice"),
    (["--metrics", "./w"], "./w is read, or written twice"),
    (["--metrics", "a", "--results", "./a"], "./a is read, or written twice"),
    (["--amp", "fp16"], "choose from")])
def test_bad_flags_are_refused(flags, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.parse_args(["--data", "d", "--weights", "w", *flags])
    assert stop.value.code == 2 and complaint in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--json", "x/l.json", "--images", "x"], ["--data", "x"]])
def test_labels_that_are_read_are_not_written_over(flags, tmp_path, monkeypatch, capsys):
    (tmp_path / "x" / "annotations").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    labels = "x/l" if "--json" in flags else "x/annotations/person_keypoints_val2017"
    for written in (["--metrics", f"./{labels}.json"], ["--card", f"{labels}.html"]):
        with pytest.raises(SystemExit, match="2"):
            evaluate.parse_args([*flags, "--weights", "w", *written])
        assert f"{labels}.json is read" in capsys.readouterr().err


def test_a_full_disk_is_said_in_one_line_and_a_link_stays_one(run, small, official_n, tmp_path,
                                                              monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "far.json")
    run("--metrics", str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink() and json.loads((tmp_path / "far.json").read_text())
    monkeypatch.chdir(tmp_path)
    room = resource.getrlimit(resource.RLIMIT_FSIZE)
    for script, flags in (
            ("evaluate.py", ["--data", small / "set", "--workers", "0", "--conf", "0", "--results",
                             "r.json"]),
            ("predict.py", [small / "set" / "val2017", "--out", "pictures"])):
        monkeypatch.setattr(sys, "argv", [script, "--weights", official_n, "--model", "n",
                                          "--image-size", "64", *map(str, flags)])
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, room[1]))
        try:
            with pytest.raises(SystemExit, match=rf"^{script}: \[Errno 27\]"):
                runpy.run_path(str(FOLDER.parent / script), run_name="__main__")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, room)
    assert {path.name for path in tmp_path.iterdir()} == {"link", "far.json", "pictures"}
    assert not list((tmp_path / "pictures").iterdir())
