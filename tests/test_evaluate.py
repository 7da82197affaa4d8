"""Selection against the reference, AP against pycocotools on files, and labels that score 1."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data import COCO_NAMES, COCO_SIGMAS, PAD_MODES, CocoPose, collate, flatten, read_skeleton
from evaluate import (detect, evaluate, keypoint_ap, load_model, look, open_split, people_in,
                      quiet_coco, select, to_coco, val_batches)
from model import Decoded, YoloNasPose
from people import draw_dataset

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("case", ["val", "coco_eval", "predict", "few", "none"])
def test_selection_is_the_references(case):
    dump = np.load(FOLDER / "postproc.npz")
    conf, iou, pre, post = dump[f"{case}/config"]
    kept = select(torch.tensor(dump["boxes"]), torch.tensor(dump["scores"]),
                  float(np.float32(conf)), float(iou), int(pre), int(post))
    assert kept.tolist() == dump[f"{case}/anchors"].tolist()


def coco_file(gt: np.ndarray) -> dict:
    """Rows image, x, y, w, h, area, crowd, 17 x (x, y, v) as a json."""
    annotations = [{"id": i + 1, "image_id": int(row[0]), "category_id": 1,
                    "bbox": row[1:5].tolist(), "area": float(row[5]), "iscrowd": int(row[6]),
                    "keypoints": row[7:].tolist(), "num_keypoints": int((row[9::3] > 0).sum())}
                   for i, row in enumerate(gt)]
    return {"images": [{"id": i, "width": 640, "height": 640, "file_name": f"{i}"}
                       for i in range(int(gt[:, 0].max()) + 1)],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "person", "keypoints": COCO_NAMES, "skeleton": []}]}


def detections(dt: np.ndarray, images: list) -> dict:
    """Rows image, score, 17 x (x, y, v) through to_coco."""
    shift = [0.5, 0.5, 0]
    return {i: to_coco(i, 1, dt[dt[:, 0] == i, 1], dt[dt[:, 0] == i, 2:].reshape(-1, 17, 3) + shift)
            for i in images}


def test_ap_is_that_of_pycocotools_on_the_same_files(tmp_path):
    """Also equal to the numbers that the reference kept for these detections."""
    dump = np.load(FOLDER / "metric.npz")
    labels = coco_file(dump["gt"])
    by_image = detections(dump["dt"], [image["id"] for image in labels["images"]])
    ours = keypoint_ap(quiet_coco(labels), by_image, COCO_SIGMAS)

    (tmp_path / "gt.json").write_text(json.dumps(labels))
    (tmp_path / "dt.json").write_text(json.dumps([r for rows in by_image.values() for r in rows]))
    truth = COCO(str(tmp_path / "gt.json"))
    scorer = COCOeval(truth, truth.loadRes(str(tmp_path / "dt.json")), "keypoints")
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    mean_oks = ours.pop("OKS")
    np.testing.assert_allclose(list(ours.values()), scorer.stats, atol=1e-12)
    np.testing.assert_allclose(list(ours.values()), dump["pycocotools_stats"], atol=1e-6)
    assert mean_oks == pytest.approx(slow_mean_oks(labels, by_image), abs=1e-12)


def slow_mean_oks(labels: dict, by_image: dict) -> float:
    """For each labeled person the largest OKS of the image's 20 best detections; their mean."""
    values = []
    for person in labels["annotations"]:
        x, y, v = np.reshape(person["keypoints"], (17, 3)).T
        if person["iscrowd"] or not v.any():
            continue
        best = 0.0
        for found in sorted(by_image[person["image_id"]], key=lambda r: -r["score"])[:20]:
            fx, fy, _ = np.reshape(found["keypoints"], (17, 3)).T
            e = ((fx - x) ** 2 + (fy - y) ** 2) / (8 * np.square(COCO_SIGMAS) * person["area"])
            best = max(best, np.exp(-e)[v > 0].mean())
        values.append(best)
    return float(np.mean(values))


def test_a_model_in_training_mode_is_refused():
    """Its norms would take in the images."""
    with pytest.raises(ValueError, match="call its eval"):
        look(YoloNasPose("n"), torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_the_callers_images_stay_as_they_are():
    """Also floats, which need no copy to become the model's type."""
    images = torch.full((1, 3, 64, 64), 200.0)
    look(YoloNasPose("n").eval(), images, flip=list(range(17)))
    assert (images == 200).all()


def test_mask_iou_counts_pixels_of_all_images_and_leaves_out_the_unknown():
    """A network that says 3 of 4 true pixels and 1 false one: 3 / 5. What is unknown is neither."""
    truth = torch.zeros(1, 4, 4, dtype=torch.uint8)
    truth[0, 0], truth[0, 3] = 1, 2
    said = torch.full((1, 4, 4), -1.0)
    said[0, 0, :3] = said[0, 1, 0] = said[0, 3, 0] = 1
    model = YoloNasPose("n").eval()
    real = model.forward
    model.forward = lambda images: real(images)._replace(mask_logits=said)
    batch = torch.zeros(1, 3, 64, 64, dtype=torch.uint8), {
        "image_id": torch.tensor([0]), "matrix": torch.eye(3)[None, :2].double(), "mask": truth}
    person = {"id": 1, "image_id": 0, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 9,
              "iscrowd": 0, "num_keypoints": 17, "keypoints": [5, 5, 2] * 17}
    labels = {"images": [{"id": 0}], "annotations": [person],
              "categories": [{"id": 1, "keypoints": COCO_NAMES}]}
    assert evaluate(model, [batch], quiet_coco(labels), COCO_SIGMAS)[0]["mask_IoU"] == 0.6


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> str:
    root = str(tmp_path_factory.mktemp("people") / "set")
    draw_dataset(root, train=1, val=12, side=96)
    return root


@pytest.mark.parametrize("size", [64, 256, 416])
@pytest.mark.parametrize("pad", PAD_MODES)
def test_labels_that_enter_after_nms_score_one(drawn, pad, size):
    """Through padding, un-padding and half pixels. Real photos too, where COCO_ROOT names them."""
    sets = [(f"{drawn}/annotations/person_keypoints_val2017.json", f"{drawn}/val2017")]
    if root := os.environ.get("COCO_ROOT"):
        sets.append((f"{root}/annotations/person_keypoints_val2017.json", f"{root}/val2017"))
    for path, folder in sets:
        labels = json.loads(Path(path).read_text())
        dataset = CocoPose(flatten(labels), folder, read_skeleton(labels), size, pad)
        by_image = {}
        for key in ((0, i) for i in range(min(len(dataset), 60))):
            _, targets = collate([dataset[key]])
            boxes, people = targets["boxes"], targets["keypoints"]
            labeled = (people[..., 2] > 0).any(-1) & ~targets["crowd"]                # (1, M)
            told = Decoded(boxes, labeled.float(), people[..., :2], people[..., 2])
            by_image |= detect(told, targets, 1, 0.5, 1.0)
            found, scores, _ = people_in(told, 0, targets["matrix"][0].numpy(), 0.5, 1.0)
            width, height = dataset.annotations.sizes[key[1]]
            assert len(scores) == labeled.sum() and (found > -0.01).all()
            assert (found < np.array([width, height, width, height]) + 0.01).all()
        assert keypoint_ap(quiet_coco(labels), by_image, COCO_SIGMAS)["AP"] >= 1 - 1e-9


def test_images_without_people_or_detections_count(drawn):
    """A false person in an empty image costs, a missed person costs, and nothing at all is 0."""
    labels = json.loads(Path(f"{drawn}/annotations/person_keypoints_val2017.json").read_text())
    labels["images"].append({"id": 999, "file_name": "none", "width": 96, "height": 96})
    truth = quiet_coco(labels)
    perfect = {image["id"]: [] for image in labels["images"]}
    for ann in labels["annotations"]:
        perfect[ann["image_id"]].append({"image_id": ann["image_id"], "category_id": 1,
                                         "score": 0.5, "keypoints": ann["keypoints"]})
    assert keypoint_ap(truth, perfect, COCO_SIGMAS)["AP"] == pytest.approx(1)
    false = {**perfect, 999: [{**perfect[0][0], "image_id": 999, "score": 0.9}]}
    assert keypoint_ap(truth, false, COCO_SIGMAS)["AP"] < 0.99
    assert keypoint_ap(truth, {**perfect, 0: []}, COCO_SIGMAS)["AP"] < 0.99
    assert keypoint_ap(truth, {i: [] for i in perfect}, COCO_SIGMAS)["AP"] == 0


def test_a_split_is_opened_as_the_checkpoint_wants_it(drawn, official_n, tmp_path):
    """Official files know COCO's keypoints, 640 px and the corner; flags come before them. Crowds
    alone are no masks, and keypoints other than ours are refused."""
    model, file = load_model(official_n, "n")
    assert (file["skeleton"]["names"], file["image_size"], file["pad"]) == (
        COCO_NAMES, 640, "bottom_right")
    args = {"model": "n", "image_size": 64, "train_pad": "bottom_right", "val_pad": "center"}
    torch.save({"format": "nanopose", "args": args, "skeleton": file["skeleton"],
                "model": model.state_dict()}, tmp_path / "own.pt")
    _, file = load_model(str(tmp_path / "own.pt"))
    assert (file["image_size"], file["pad"]) == (64, "center")
    _, file = load_model(official_n, "n", 96, "center")
    labels = json.loads(Path(f"{drawn}/annotations/person_keypoints_val2017.json").read_text())
    for ann in labels["annotations"]:
        ann.pop("segmentation", None)
    labels["annotations"][0] |= {"iscrowd": 1, "segmentation": [[1, 1, 9, 1, 9, 9]]}
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(labels))
    dataset, _ = open_split(str(path), f"{drawn}/val2017", file, masks=True)
    assert (dataset.size, dataset.pad) == (96, "center") and "mask" not in dataset[0, 0]
    labels["categories"][0]["keypoints"] = COCO_NAMES[::-1]
    file["unnamed"] = False  # an official file leaves names to the labels
    path.write_text(json.dumps(labels))
    with pytest.raises(ValueError, match="must be the same"):
        open_split(str(path), f"{drawn}/val2017", file)


def test_official_weights_tuned_to_other_keypoints_take_names_from_the_labels(drawn, tmp_path):
    torch.save({"net": YoloNasPose("n", 2).state_dict()}, tmp_path / "tuned.pth")
    _, file = load_model(str(tmp_path / "tuned.pth"), "n", 96)
    assert file["skeleton"]["names"] == ["keypoint_1", "keypoint_2"]
    labels = json.loads(Path(f"{drawn}/annotations/person_keypoints_val2017.json").read_text())
    labels["categories"] = [{"id": 1, "name": "fish", "keypoints": ["left_fin", "right_fin"]}]
    for ann in labels["annotations"]:
        ann["keypoints"] = ann["keypoints"][:6]
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    dataset, _ = open_split(str(tmp_path / "labels.json"), f"{drawn}/val2017", file)
    assert dataset.skeleton.names == ["left_fin", "right_fin"] and dataset.skeleton.flip == [1, 0]
    other = read_skeleton({"categories": [{"keypoints": ["right_fin", "left_fin"]}]})  # put into it
    torch.save({"net": YoloNasPose("n", 2).state_dict(), "skeleton": other._asdict()},
               tmp_path / "named.pth")
    _, file = load_model(str(tmp_path / "named.pth"), "n", 96)
    with pytest.raises(ValueError, match="the same in another order"):
        open_split(str(tmp_path / "labels.json"), f"{drawn}/val2017", file)


def test_somebody_of_id_0_counts():
    """pycocotools writes down whom a detection met as an id, and reads 0 as nobody."""
    labels = coco_file(np.load(FOLDER / "metric.npz")["gt"])
    by_image = {image["id"]: [] for image in labels["images"]}
    for ann in labels["annotations"]:
        ann["id"] -= 1
        by_image[ann["image_id"]] += to_coco(ann["image_id"], 1, np.ones(1), np.reshape(
            ann["keypoints"], (1, 17, 3)) + [0.5, 0.5, 0])
    assert {ann["id"] for ann in labels["annotations"]} >= {0, 1}
    assert keypoint_ap(quiet_coco(labels), by_image, COCO_SIGMAS)["AR"] == 1


def test_every_image_is_evaluated_by_exactly_one_process():
    for world_size in (1, 2, 3):
        shares = [val_batches(10, 4, rank, world_size) for rank in range(world_size)]
        keys = sorted(key for share in shares for batch in share for key in batch)
        assert keys == [(0, i) for i in range(10)]
