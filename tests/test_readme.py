"""The Python of the README does what it says: its blocks run here as they are printed."""
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import flatten, read_json, read_skeleton
from evaluate import load_model
from model import YoloNasPose
from people import CATEGORY, draw_dataset

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
LABELS = "drawn_people/annotations/person_keypoints_{}2017.json"


def block(line: str) -> str:
    """The block that has this line's beginning in it."""
    found, = (text for text in BLOCKS if re.search("^ *" + re.escape(line), text, re.M))
    return found


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A folder with drawn people."""
    folder = tmp_path_factory.mktemp("readme")
    draw_dataset(str(folder / "drawn_people"), train=24, val=6, side=64)
    return folder


@pytest.fixture
def here(people, monkeypatch):
    monkeypatch.chdir(people)
    return people


def people_of(path: str) -> np.ndarray:
    """Boxes and keypoints of a json's people, in order, (T, 4 + 3K)."""
    labels = flatten(read_json(path))
    return np.concatenate([labels.boxes, labels.keypoints.reshape(len(labels.boxes), -1)], 1)


def test_an_export_is_split_by_its_images(here):
    Path("export.json").write_text(Path(LABELS.format("train")).read_text())
    exec(block('coco = json.load(open("export.json"))'), {})
    train, val, all_of_them = (read_json(f"{name}.json") for name in ("train", "val", "export"))
    assert (len(train["images"]), len(val["images"])) == (19, 5)
    for part in (train, val):
        ids = {image["id"] for image in part["images"]}
        assert {a["image_id"] for a in part["annotations"]} <= ids
    for what in ("images", "annotations"):
        assert (sorted(x["id"] for x in train[what] + val[what])
                == sorted(x["id"] for x in all_of_them[what]))


def test_what_tools_leave_out_is_filled_in_by_lines_after_the_second(here):
    """Several categories, no boxes, a skeleton for other points: refused as it is, then read."""
    coco = json.loads(Path(LABELS.format("train")).read_text())
    boxes = [a.pop("bbox") for a in coco["annotations"]]
    coco["categories"] = [{"id": 7, "name": "thing"}, {**CATEGORY, "skeleton": [[0, 99]]},
                          {**CATEGORY, "id": 3}]
    ball = {"id": 9999, "image_id": coco["images"][0]["id"], "category_id": 7, "bbox": [1, 1, 9, 9]}
    coco["annotations"].append(ball)
    Path("export.json").write_text(json.dumps(coco))
    with pytest.raises(ValueError, match="bbox is missing in id"):
        read_json("export.json")
    first, second, *rest = block('coco = json.load(open("export.json"))').splitlines()
    exec("\n".join([first, second, block("named = ["), *rest]), {})
    labels = read_json("train.json")
    assert read_skeleton(labels).names == CATEGORY["keypoints"]
    ids = [a["id"] for a in coco["annotations"]]
    assert len(labels["annotations"]) + len(read_json("val.json")["annotations"]) == len(ids) - 1
    for a in labels["annotations"]:
        x, y, w, h = a["bbox"]
        points = [p for p in zip(*[iter(a["keypoints"])] * 3) if p[2]]
        assert all(x <= px <= x + w and y <= py <= y + h for px, py, _ in points)
        assert w < 2 * boxes[ids.index(a["id"])][2] + 2


@pytest.mark.parametrize("visibility", [True, False])
def test_text_labels_become_a_json(here, visibility):
    """What is written as shares of the image comes back; without v, 0, 0 is nothing."""
    for part in ("train", "val"):
        coco = read_json(LABELS.format(part))
        for a in coco["annotations"]:
            a["keypoints"][:3] = 0, 0, 0
        Path(f"{part}_labels.json").write_text(json.dumps(coco))
        images, labels = (here / kind / part / "session" for kind in ("images", "labels"))
        for folder in (images, labels):
            folder.mkdir(parents=True, exist_ok=True)
        for image in coco["images"]:
            w, h, name = image["width"], image["height"], image["file_name"]
            Image.open(f"drawn_people/{part}2017/{name}").save(images / name)
            rows = []
            for a in (a for a in coco["annotations"] if a["image_id"] == image["id"]):
                x, y, bw, bh = a["bbox"]
                row = [0, (x + bw / 2) / w, (y + bh / 2) / h, bw / w, bh / h]
                for px, py, v in zip(*[iter(a["keypoints"])] * 3):
                    row += [px / w, py / h, v][:2 + visibility]
                rows.append(" ".join(map(str, row)))
            if rows:  # an image without people has no file
                (labels / f"{Path(name).stem}.txt").write_text("\n".join(rows))
    text = re.sub(r"^names = \[.*?\]", f"names = {CATEGORY['keypoints']}",
                  block('names = ["nose"'), flags=re.M)
    exec(text, {})
    for part in ("train", "val"):
        got, want = people_of(f"{part}.json"), people_of(f"{part}_labels.json")
        for image in read_json(f"{part}.json")["images"]:
            assert (here / "images" / part / image["file_name"]).is_file()
        if not visibility:
            want[:, 6::3] = 2.0 * (want[:, 6::3] > 0)
        np.testing.assert_allclose(got, want, atol=1e-4)
    for count in 3, 9, 18:  # names that do not fit were spread over the numbers
        wrong = text.replace(f"names = {CATEGORY['keypoints']}",
                             f"names = {CATEGORY['keypoints'][:count] + ['x'] * (count - 17)}")
        with pytest.raises(AssertionError, match=f" numbers for {count} names"):
            exec(wrong, {})


def test_sizes_and_operations_are_the_tables(capsys):
    exec(block("for size in SIZES:"), {})
    for line in capsys.readouterr().out.splitlines():
        size, parameters, fused, flops = line.split()
        if size not in "nsml":  # one of your own
            continue
        row, = re.findall(rf"^\| {size.upper()} \| ([\d.]+) M, ([\d.]+) M \| ([\d.]+) ", README,
                          re.M)
        assert row == (f"{int(parameters) / 1e6:.2f}", f"{int(fused) / 1e6:.2f}",
                       f"{int(flops) / 1e9:.1f}")


def test_names_put_into_an_official_file_are_its_names(here):
    """The same again, in another order than the json's, would be refused."""
    labels = read_json("drawn_people/annotations/person_keypoints_val2017.json")
    names = labels["categories"][0]["keypoints"] = [f"part {i}" for i in range(17)]
    with open("train.json", "w") as f:
        json.dump(labels, f)
    torch.save({"ema_net": YoloNasPose("n").state_dict(), "optimizer": print}, "ckpt_best.pth")
    exec(block('torch.save({"ema_net"'), {})
    assert load_model("named.pth", "n")[1]["skeleton"]["names"] == names


def test_a_loop_of_ones_own_writes_what_predict_reads(here, capsys):
    exec(block("optimizer.step()"), {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 10 and np.isfinite(losses).all()
    os.makedirs("runs/train", exist_ok=True)
    os.replace("own.pt", "runs/train/best.pt")
    Image.open("drawn_people/val2017/000001.jpg").save("photo.jpg")
    exec(block('model, file = load_model("runs/train/best.pt")'), {})
    boxes, scores, keypoints = re.findall(r"\([\d, ]+\)", capsys.readouterr().out)
    assert boxes.endswith(", 4)") and keypoints.endswith(", 17, 3)")
