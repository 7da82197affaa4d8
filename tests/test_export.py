"""export.py: files that say what the network says, and what is inside them."""
import json
import os
import sys
import textwrap

import numpy as np
import pytest
import torch

import export
from data import COCO_EDGES, COCO_NAMES, COCO_SIGMAS, DataError, read_skeleton
from evaluate import load_model, look, select
from model import YoloNasPose
from people import draw_dataset


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A checkpoint of a new network with a mask branch; its norms have seen two batches."""
    torch.manual_seed(0)
    model = YoloNasPose("n", mask=True).train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.rand(4, 3, 96, 96))
    path = tmp_path_factory.mktemp("weights") / "x.pt"
    skeleton = read_skeleton({"categories": [{"keypoints": COCO_NAMES, "skeleton": COCO_EDGES}]})
    torch.save({"format": "nanopose", "args": {"model": "n", "image_size": 96, "val_pad": "center"},
                "skeleton": skeleton._asdict(), "model": model.state_dict()}, path)
    return str(path)


def call(monkeypatch, *flags) -> str | int | None:
    """What main says as it exits."""
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, flags)])
    try:
        export.main()
    except SystemExit as end:
        return end.code


def onnx_packages() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="pip install onnx onnxscript onnxruntime")


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_a_file_says_what_the_network_says_at_any_size_and_batch(weights, tmp_path, monkeypatch,
                                                                 kind):
    if kind == "onnx":
        onnx_packages()
    path = str(tmp_path / f"x.{kind}")
    compared, programs = [], []
    real, trace = export.largest_difference, torch.export.export
    monkeypatch.setattr(export, "largest_difference", lambda a, b, images: (
        compared.extend(tuple(x.shape) for x in images) or real(a, b, images)))
    monkeypatch.setattr(torch.export, "export", lambda *given, **named: (
        programs.append(trace(*given, **named)) or programs[-1]))
    assert call(monkeypatch, "--weights", weights, "--format", kind, "--out", path, "--conf",
                "0.02", "--iou", "0.6") is None
    assert {(1, 3, 96, 96), (3, 3, 96, 96), (1, 3, 160, 128), (3, 3, 160, 128)} == set(compared)
    assert os.listdir(tmp_path) == [f"x.{kind}"]
    model, _ = load_model(weights)
    assert model.mask
    eager, run = export.Exported(model), export.open_file(path)
    for b, height, width in ((1, 96, 96), (3, 64, 160), (2, 192, 128)):
        images = torch.randint(256, (b, 3, height, width), dtype=torch.uint8)
        with torch.no_grad():
            same = zip(look(model, images)[0], eager(images), run(images))
        for want, traced, found in same:
            assert want.shape == found.shape and torch.equal(want, traced)  # in [0, 1], too
            np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-3)
    if kind == "pt2":
        extra = {"nanopose.json": ""}
        program = torch.export.load(path, extra_files=extra)
        inside, names = json.loads(extra["nanopose.json"]), list(program.state_dict)
        monkeypatch.setattr(torch.export, "export", lambda *given, **named: programs[-1])
        os.symlink("/dev/full", tmp_path / "full.pt2")  # a device without room
        with pytest.raises(OSError, match="No space left"):
            export.write(model.fuse(), str(tmp_path / "full.pt2"), {})
    else:
        import onnx
        made = onnx.load(path)
        inside = {p.key: json.loads(p.value) for p in made.metadata_props}
        names = [tensor.name for tensor in made.graph.initializer]
    assert names and not [name for name in names if "mask" in name]
    assert inside == {
        "names": COCO_NAMES, "sigmas": COCO_SIGMAS,
        "edges": [[a - 1, b - 1] for a, b in COCO_EDGES],
        "flip": [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15], "image_size": 96,
        "pad": "center", "conf": 0.02, "iou": 0.6, "pre": 300, "post": 20}


def test_the_nms_of_the_docstring_is_evaluates():
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 60, (400, 2))
    boxes = np.concatenate([low, low + rng.uniform(5, 40, (400, 2))], 1)
    scores, settings = rng.uniform(0, 1, 400), {"conf": 0.2, "iou": 0.6, "pre": 200, "post": 20}
    text = export.__doc__.split("kept: best first):")[1]
    names = {"np": np, "boxes": boxes, "scores": scores, **settings}
    exec(textwrap.dedent(text), names)
    want = select(torch.tensor(boxes), torch.tensor(scores), **settings)
    assert names["kept"] == want.tolist() and len(want) == 20


def test_a_file_that_differs_is_not_written(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "write", lambda model, path, meta: open(path, "w").close())
    monkeypatch.setattr(export, "open_file", lambda path: None)
    monkeypatch.setattr(export, "largest_difference", lambda a, b, images: (float("nan"), 0.0))
    said = call(monkeypatch, "--weights", weights, "--format", "pt2", "--out", tmp_path / "x.pt2")
    assert "nothing is written" in said and not os.listdir(tmp_path)


@pytest.mark.parametrize("flags, message", [
    (["--format", "pt2", "--int8"], 2), (["--format", "onnx", "--int8"], 2),
    (["--format", "onnx", "--json", "a.json"], 2),
    (["--format", "onnx", "--int8", "--json", "a.json", "--images", "a"], 2),
    (["--format", "pt2", "--out", "."], 2),
    (["--format", "pt2", "--out", "x.onnx"], 2),
    (["--format", "pt2", "--data", "nowhere"], "/nowhere/val2017 or images/val2017 there"),
    (["--format", "pt2", "--weights", "nowhere.pt"], "nowhere.pt"),
    (["--format", "pt2", "--out", "nowhere/x.pt2"], 2),
    (["--format", "pt2", "--weights", "32 px"], "needs at least 64"),
])
def test_bad_input_gets_one_line(weights, tmp_path, monkeypatch, flags, message):
    if "32 px" in flags:
        file = torch.load(weights, weights_only=True)
        file["args"]["image_size"] = 32
        torch.save(file, tmp_path / "32 px")
        monkeypatch.chdir(tmp_path)
    said = call(monkeypatch, "--weights", weights, *flags)
    assert said == message or message in said and "\n" not in said


def test_a_missing_package_is_named_with_its_command(weights, monkeypatch):
    real = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec",
                        lambda name: None if name.startswith("onnx") else real(name))
    assert call(monkeypatch, "--weights", weights, "--format", "onnx") == (
        "export.py: --format onnx needs onnx, onnxscript, onnxruntime; "
        "pip install onnx onnxscript onnxruntime")


def test_a_broken_image_to_score_is_one_line(weights, tmp_path, monkeypatch):
    """Also beyond the first 20, which are compared before anything is quantized."""
    draw_dataset(str(tmp_path / "people"), train=1, val=21, side=64)
    broken = sorted((tmp_path / "people" / "val2017").iterdir())[-1]
    broken.write_bytes(broken.read_bytes()[:900])  # its header is whole
    monkeypatch.setattr(export, "write", lambda model, path, meta: None)
    model, _ = load_model(weights)
    monkeypatch.setattr(export, "open_file", lambda path: lambda images: look(model, images)[0])
    monkeypatch.setattr(export, "to_int8", lambda *a: None)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(DataError, match=f"^{broken}: .*record$"):  # below, main ends with it
        call(monkeypatch, "--weights", weights, "--format", "onnx", "--int8", "--data",
             tmp_path / "people", "--out", tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


def test_int8_is_small_and_spares_decoding_and_what_is_sensitive(weights, tmp_path, monkeypatch):
    onnx_packages()
    import onnx
    draw_dataset(str(tmp_path / "people"), train=4, val=4, side=96)
    path, parts = tmp_path / "x.onnx", None
    labels = tmp_path / "people" / "annotations" / "person_keypoints_"
    flags = ["--weights", weights, "--format", "onnx", "--int8", "--json", f"{labels}val2017.json",
             "--images", tmp_path / "people" / "val2017", "--train-json", f"{labels}train2017.json",
             "--train-images", tmp_path / "people" / "train2017", "--out", path]
    real = export.parts_of

    def few(path):  # two parts are enough to see the rule at work
        nonlocal parts
        parts = real(path)
        return {name: parts[name] for name in ("backbone.stage4", "heads.head1")}
    monkeypatch.setattr(export, "parts_of", few)
    monkeypatch.setattr(export, "cost", lambda *a: costs.pop(0))
    costs = [torch.tensor(row) for row in ([0.0, 0.0], [1.0, 0.0])]
    seen, to_int8 = [], export.to_int8
    monkeypatch.setattr(export, "to_int8", lambda *a: seen.extend(a[2]) or to_int8(*a))
    assert call(monkeypatch, *flags) is None
    train_set, _ = export.open_split(f"{labels}train2017.json", str(tmp_path / "people/train2017"),
                                     load_model(weights)[1])
    assert len(seen) == 4 and all(map(torch.equal, seen, export.pixels(train_set, 4)))
    assert len(parts) == 22 and not any("decode" in name or name == "" for name in parts)
    made = onnx.load(str(path))
    graph, inside = made.graph, {p.key: json.loads(p.value) for p in made.metadata_props}
    assert inside["names"] == COCO_NAMES and inside["post"] == 20
    weights_int8 = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.INT8}
    for part, int8 in (("backbone.stage4.", True), ("heads.head1.", False)):
        names = [n for n in weights_int8 if f"model.{part}" in n]
        assert bool(names) == int8, part
    assert os.path.getsize(path) < 28e6 * 0.8  # stage4 has 30 % of the weights
    assert {p.key for p in onnx.load(str(path)).metadata_props} >= {"names", "sigmas", "image_size"}


def test_in_int8_a_part_may_move_neither_keypoints_nor_scores(monkeypatch):
    onnx_packages()
    costs = [torch.tensor(row) for row in ([1.0, 0.0], [0.0, 1.0])]
    monkeypatch.setattr(export, "open_file", lambda path: None)
    monkeypatch.setattr(export, "parts_of", lambda path: {"a": ["a"], "b": ["b"]})
    monkeypatch.setattr(export, "quantize", lambda *a: None)
    monkeypatch.setattr(export, "cost", lambda *a: costs.pop(0))
    with pytest.raises(SystemExit, match="every part would cost too much"):
        export.to_int8("x", "y", [], [])


def test_what_int8_costs_by_hand():
    """Two people of scores 0.9 and 0.3; the first's only keypoint moves so that its OKS is 1/e."""
    box, area = [0.0, 0.0, 10.0, 20.0], 0.53 * 200
    was = export.Decoded(torch.tensor([[box, [50.0, 50, 60, 70]]]), torch.tensor([[0.9, 0.3]]),
                         torch.zeros(1, 2, 1, 2), torch.ones(1, 2, 1))
    moved = was.keypoints.clone()
    moved[0, 0, 0, 0] = (8 * area * 0.1 ** 2) ** 0.5
    now = was._replace(keypoints=moved, scores=torch.tensor([[0.8, 0.3]]))
    found = export.cost(lambda image: now, [was], [None], [0.1])
    want = 0.9 * (1 - np.exp(-1)) / 1.2, 0.9 * 0.1 / 1.2
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_a_nan_anywhere_is_a_difference():
    zero = export.Decoded(*(torch.zeros(1, 3) for _ in range(4)))
    for i, place in ((0, 0), (1, 1), (2, 0), (3, 1)):
        bad = export.Decoded(*(torch.full((1, 3), float("nan")) if j == i else t
                               for j, t in enumerate(zero)))
        apart = export.largest_difference(lambda x: zero, lambda x: bad, [None, None])
        assert np.isnan(apart[place])
