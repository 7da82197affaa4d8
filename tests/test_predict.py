"""predict.py: which files are meant, orientation, pictures, COCO results."""
import argparse
import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from data import COCO_EDGES, COCO_NAMES, CocoPose, collate, flatten, read_skeleton
from draw import LEFT, MIDDLE, RIGHT, draw_people
from evaluate import check_places, load_model, look, people_in, quiet_coco
from model import Decoded, YoloNasPose
from predict import find_images, main, out_names, predict


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A checkpoint that sees people in noise: a new network whose scores start near 0.5."""
    torch.manual_seed(0)
    model = YoloNasPose("n")
    for head in model.heads.values():
        torch.nn.init.constant_(head.cls_pred.bias, 0.0)
        torch.nn.init.normal_(head.cls_pred.weight, std=2.0)
    path = tmp_path_factory.mktemp("weights") / "x.pt"
    skeleton = read_skeleton({"categories": [{"keypoints": COCO_NAMES, "skeleton": COCO_EDGES}]})
    torch.save({"format": "nanopose", "args": {"model": "n", "image_size": 96, "val_pad": "center"},
                "skeleton": skeleton._asdict(), "model": model.state_dict()}, path)
    return str(path)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(256, size=(6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def call(monkeypatch, capsys, *flags) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of main."""
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, flags)])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        sys.stderr.write("" if isinstance(end.code, int) else str(end.code))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_batch_is_its_images_one_by_one(weights):
    model, file = load_model(weights)
    images = [photo(120, 80), photo(50, 200, 1), photo(96, 96, 2)]
    together = predict(model, file, images, conf=0.1)
    for image, found in zip(images, together):
        alone = predict(model, file, [image], conf=0.1)[0]
        assert len(found[1]) > 0
        for a, b in zip(found, alone):
            np.testing.assert_allclose(a, b, atol=1e-3)
        assert (found[0] >= 0).all() and (found[0].reshape(-1, 2) <= image.size).all()
    assert predict(model, file, []) == []


@pytest.mark.parametrize("pad", ["center", "bottom_right"])
@pytest.mark.parametrize("size", [(500, 290), (90, 410), (60, 40)])
def test_a_photo_of_any_size_is_seen_as_evaluation_sees_it(weights, tmp_path, size, pad):
    """The loader's pixels are proven in test_data.py; reduced by powers of two where it can."""
    photo(*size).save(tmp_path / "a.png")
    coco = {"images": [{"id": 1, "file_name": "a.png", "width": size[0], "height": size[1]}],
            "annotations": [], "categories": [{"keypoints": COCO_NAMES}]}
    model, file = load_model(weights, pad=pad)
    dataset = CocoPose(flatten(coco), str(tmp_path), read_skeleton(coco), 96, pad)
    images, targets = collate([dataset[0, 0]])
    out, _ = look(model, images)
    want = people_in(out, 0, targets["matrix"][0].numpy(), 0.1, 0.7, 2000, 300)
    found, = predict(model, file, [Image.open(tmp_path / "a.png")], conf=0.1)
    assert len(found[1]) > 0
    for a, b in zip(found, (want[0].clip(0, size * 2), *want[1:])):
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_a_crowd_is_not_cut_to_the_20_that_coco_scores(weights, monkeypatch):
    """150 people side by side, each seen by ten anchors."""
    corner = torch.cartesian_prod(torch.arange(15) * 6.0, torch.arange(10) * 9.0)   # (150, 2)
    boxes = torch.cat([corner, corner + 5], 1).repeat(10, 1)[None]                  # (1, A, 4)
    scores = 0.9 - torch.arange(1500) / 1e4
    out = Decoded(boxes, scores[None], torch.zeros(1, 1500, 17, 2), torch.zeros(1, 1500, 17))
    monkeypatch.setattr("predict.look", lambda *given: (out, None))
    (found, _, _), = predict(*load_model(weights), [photo(96, 96)])
    np.testing.assert_array_equal(found, boxes[0, :150])


@pytest.mark.parametrize("tag", [3, 6, 8])
def test_a_turned_photo_shows_the_same_people(weights, tmp_path, monkeypatch, capsys, tag):
    """The file holds the pixels turned by 180, 270 or 90 degrees, and the tag that says so."""
    upright, turn = photo(120, 80), {3: 180, 6: 90, 8: 270}[tag]
    upright.save(tmp_path / "0.png")
    exif = Image.Exif()
    exif[0x0112] = tag
    upright.rotate(turn, expand=True).save(tmp_path / "1.png", exif=exif)
    found = tmp_path / "found.json"
    code, _, _ = call(monkeypatch, capsys, "--weights", weights, tmp_path, "--out", tmp_path / "o",
                      "--results", found, "--conf", "0.1")
    assert code == 0
    people = json.loads(found.read_text())
    first, second = ([p["keypoints"] for p in people if p["image_id"] == i] for i in (0, 1))
    assert first and first == second
    turned = predict(*load_model(weights), [Image.open(tmp_path / "1.png")], conf=0.1)[0]
    np.testing.assert_array_equal(turned[2].shape, np.reshape(first, (-1, 17, 3)).shape)
    np.testing.assert_allclose(turned[0], [p["box"] for p in people if p["image_id"]], atol=1e-2)
    assert Image.open(tmp_path / "o" / "1.jpg").size == Image.open(tmp_path / "o" / "0.jpg").size


def test_results_are_cocos(weights, tmp_path, monkeypatch, capsys):
    for i, name in enumerate(("000000000007.png", "000000000003.png")):
        photo(120, 80, i).save(tmp_path / name)
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr("predict.draw_people", lambda *a: drawn.append(a) or draw_people(*a))
        call(monkeypatch, capsys, "--weights", weights, tmp_path, "--out", tmp_path / "o",
             "--results", tmp_path / "found.json", "--conf", "0.1", "--sheet")
    results = json.loads((tmp_path / "found.json").read_text())
    shown = [person for _, boxes, keypoints, _, _, _, scores in drawn
             for person in zip(boxes.tolist(), scores.tolist(), keypoints - [0.5, 0.5, 0])]
    assert len(drawn) == 2 and len(shown) == len(results) > 2
    for (box, score, keypoints), r in zip(shown, results):  # each picture has its file's people
        assert (box, score, 1) == (r["box"], r["score"], r["category_id"])
        np.testing.assert_allclose(np.reshape(r["keypoints"], (-1, 3)), keypoints)
    assert {r["image_id"] for r in results} == {3, 7}
    truth = quiet_coco({"images": [{"id": 3}, {"id": 7}], "annotations": [], "categories": [
        {"id": 1, "name": "person", "keypoints": COCO_NAMES}]})
    assert len(truth.loadRes(results).anns) == len(results)
    for r in results:
        assert r["file_name"] == str(tmp_path / f"{r['image_id']:012}.png")
    model, file = load_model(weights)
    (_, scores, keypoints), = predict(model, file, [photo(120, 80, 1)], conf=0.1)  # image 3
    assert len(scores) == sum(r["image_id"] == 3 for r in results)
    first = max((r for r in results if r["image_id"] == 3), key=lambda r: r["score"])
    want = keypoints[0] - [0.5, 0.5, 0]
    np.testing.assert_allclose(np.reshape(first["keypoints"], (17, 3)), want, atol=1e-2)
    assert Image.open(tmp_path / "o" / "sheet.jpg").size == (1920, 480)
    call(monkeypatch, capsys, "--weights", weights, tmp_path, "--out", tmp_path / "o", "--results",
         tmp_path / "fewer.json", "--conf", "0.1", "--iou", "0.1")
    assert len(json.loads((tmp_path / "fewer.json").read_text())) < len(results)
    scores = sorted(r["score"] for r in results)
    for conf, said in (
            (scores[5], f"{len(scores) - 5} people in 2 images (--conf {scores[5]});"),
            (1, f"0 people in 2 images (--conf 1.0, the best score {scores[-1]:.3f})")):
        _, out, _ = call(monkeypatch, capsys, "--weights", weights, tmp_path, "--out",
                         tmp_path / "o", "--conf", conf)
        assert said in out


def test_frames_come_in_order_and_names_do_not_collide(tmp_path, monkeypatch):
    for name in ("a/frame10.png", "a/frame2.png", "a/notes.txt", "b/frame2.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    files = find_images([str(tmp_path / "a"), str(tmp_path / "b" / "*.jpg"), str(tmp_path / "a")])
    assert [f[len(str(tmp_path)) + 1:] for f in files] == ["a/frame2.png", "a/frame10.png",
                                                          "b/frame2.jpg"]
    (tmp_path / "a" / "._frame2.png").write_bytes(b"")  # what macOS puts beside a file
    assert find_images([str(tmp_path / "*" / "*")]) == files == find_images(
        [str(tmp_path / "a") + os.sep, str(tmp_path / "b")])
    monkeypatch.chdir(tmp_path / "b")
    (tmp_path / "b" / "\u00b27.jpg").write_bytes(b"")  # a digit that is no number
    assert find_images(["\u00b27.jpg"]) == ["\u00b27.jpg"]
    assert list(out_names(files).values()) == ["frame2.jpg", "frame10.jpg", "frame2_2.jpg"]
    assert list(out_names(["x_2.png", "x.png", "y/x.png"]).values()) == ["x_2.jpg", "x.jpg",
                                                                        "x_3.jpg"]
    assert list(out_names(["sheet.png"]).values()) == ["sheet_2.jpg"]
    assert list(out_names(["a/X.JPG", "b/x.jpg"]).values()) == ["X.jpg", "x_2.jpg"]  # one on a Mac


def test_nothing_replaces_what_is_read(weights, tmp_path, monkeypatch, capsys):
    tmp_path = tmp_path / "Photos"
    tmp_path.mkdir()
    photo(90, 60).save(tmp_path / "a.JPG")
    before = (tmp_path / "a.JPG").read_bytes()
    code, _, err = call(monkeypatch, capsys, "--weights", weights, tmp_path, "--out", tmp_path)
    assert code == 1 and "a.JPG" in err and (tmp_path / "a.JPG").read_bytes() == before
    (tmp_path / "a.JPG").rename(tmp_path / "sheet.jpg")
    for flags in (["--out", tmp_path],
                  ["--results", tmp_path / "sheet.jpg", "--out", tmp_path / "o"]):
        code, _, err = call(monkeypatch, capsys, "--weights", weights, tmp_path, *flags)
        assert code == 1 and "could replace" in err
    code, _, err = call(monkeypatch, capsys, "--weights", weights, tmp_path, "--results", weights)
    assert code == 2 and "is read, or written twice" in err
    code, _, err = call(monkeypatch, capsys, "--weights", weights, tmp_path, "--out", weights)
    assert code == 2 and "is a file, or in one" in err
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    p = argparse.ArgumentParser()
    with pytest.raises(SystemExit, match="2"):
        check_places(p, ["found.json"], [])
    check_places(p, ["new/found.json"], [], new="new")


def test_what_cannot_be_read_is_named_and_the_rest_done(weights, tmp_path, monkeypatch, capsys):
    photo(120, 80).save(tmp_path / "good.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:900])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    code, out, err = call(monkeypatch, capsys, "--weights", weights, tmp_path, "--out",
                          tmp_path / "o")
    assert code == 1 and "3 of 4 files cannot be read" in err and "in 1 images" in out
    for name in ("cut.jpg", "empty.png", "text.png"):
        assert f"{tmp_path / name} cannot be read" in err
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["good.jpg"]


@pytest.mark.parametrize("mode, size", [("L", (90, 60)), ("CMYK", (90, 60)), ("P", (90, 60)),
                                        ("RGBA", (90, 60)), ("I;16", (90, 60)), ("RGB", (1, 1)),
                                        ("RGB", (4000, 6)), ("RGB", (70_000, 2))])
def test_any_mode_and_shape_is_drawn(weights, tmp_path, monkeypatch, capsys, mode, size):
    image = photo(*size)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    code, out, _ = call(monkeypatch, capsys, "--weights", weights, path, "--out", tmp_path / "o")
    assert code == 0
    drawn = np.asarray(Image.open(tmp_path / "o" / "x.jpg").convert("L"), float)
    if mode in ("L", "I;16"):  # as bright as the file: 16 bits are scaled, not cut off
        assert abs(drawn.mean() - np.asarray(photo(*size).convert("L"), float).mean()) < 40


@pytest.mark.parametrize("flags, code, message", [
    (["nowhere.jpg"], 1, "nowhere.jpg: no image"),
    ([".", "--weights", "nowhere.pt"], 1, "nowhere.pt"),
    ([".", "--image-size", "100"], 2, "must be a multiple of 32"),
    ([".", "--conf", "2"], 2, "--conf 2.0 must lie in 0 to 1"),
    ([".", "--batch-size", "0"], 2, "--batch-size 0 must be positive"),
    ([".", "--model", "s"], 1, "is of size n, not s"),
    ([".", "--results", "."], 2, ". is a folder or device, or in a folder that is missing or re"),
    ([".", "--results", "/dev/null"], 2, "/dev/null is a folder or device"),
])
def test_bad_input_gets_one_line(weights, tmp_path, monkeypatch, capsys, flags, code, message):
    photo(9, 9).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    found, out, err = call(monkeypatch, capsys, "--weights", weights, "--out", tmp_path / "o",
                           *flags)
    assert found == code and message in err.splitlines()[-1] and not out
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("names, flip, colors", [
    (["nose", "left_a", "right_a"], [0, 2, 1], [MIDDLE, LEFT, RIGHT]),
    (["nose", "right_a", "left_a"], [0, 2, 1], [MIDDLE, RIGHT, LEFT]),
    (["snout", "finL", "finR"], [0, 2, 1], [MIDDLE, LEFT, RIGHT]),
    (["snout", "finL", "finR"], [0, 1, 2], [MIDDLE, MIDDLE, MIDDLE])])
def test_left_is_orange_and_right_blue_also_of_pairs_that_only_flags_name(names, flip, colors):
    keypoints = np.array([[[30, 20, 2], [60, 50, 2], [90, 80, 2]]])
    drawn = draw_people(Image.new("RGB", (120, 120)), np.array([[1, 1, 119, 119]]), keypoints,
                        names, [], flip)
    assert drawn.size == (480, 480)  # enlarged, and so are the places
    assert [drawn.getpixel((4 * x, 4 * y)) for x, y, _ in keypoints[0].tolist()] == colors


@pytest.mark.parametrize("ground", ["black", "white"])
@pytest.mark.parametrize("side", [200, 3840])
def test_skeletons_are_seen_on_any_ground_at_any_size(ground, side):
    """A line's pixels differ from the ground, boxes too, and a score at the corner is whole."""
    image = Image.new("RGB", (side, side), ground)
    keypoints = np.array([[[0.2, 0.5, 1], [0.8, 0.5, 1]]]) * [side, side, 1]
    boxes = np.array([[-0.1, -0.1, 1.1, 0.9]]) * side
    drawn = np.asarray(draw_people(image, boxes, keypoints, ["left_a", "right_a"], [[0, 1]],
                                   [1, 0], [0.5], least=side))
    changed = np.abs(drawn.astype(int) - np.asarray(image)).sum(-1) > 100
    column = changed[int(0.45 * side):int(0.55 * side), side // 2]
    assert 0.004 * side <= column.sum() <= 0.03 * side
    assert changed[int(0.9 * side) - side // 100:int(0.9 * side) + side // 100 + 2, side // 2].any()
    text = changed[:side // 12, :side // 6]  # the score starts inside, though the box does not
    assert text.any() and not text[0].all()
