"""The network against the reference's numbers, hand computations and invariances."""
import copy
import hashlib
import os

import numpy as np
import pytest
import torch
from torch import nn

from data import COCO_NAMES
from model import (BINS, KEYPOINT_ROWS, SIZES, Bottleneck, CSPLayer, QARepVGG, RawOutput,
                   YoloNasPose, decode, load_weights, make_anchors, read_weights)
from reference import INPUTS, committed, full, image, official_shapes, official_state

STEM = "backbone.stem.conv"
BOX_BIAS = "heads.head1.reg_pred.bias"


def write(tmp_path, content) -> str:
    torch.save(content, tmp_path / "w.pth")
    return str(tmp_path / "w.pth")


@torch.no_grad()
def outputs(model: nn.Module, images: torch.Tensor) -> dict[str, np.ndarray]:
    """What decode says of the images, under the reference's names and in its units."""
    out = decode(model(images.to(next(model.parameters()).dtype)))
    return {"boxes": out.boxes.numpy(), "scores": out.scores[..., None].numpy(),
            "poses": out.keypoints.numpy() - 0.5, "pose_scores": out.kpt_scores.numpy()}


def assert_reference(model: nn.Module, dump: dict, rows: slice = slice(None)) -> None:
    """The outputs for both inputs, and the running statistics after one forward in training."""
    for which, args in INPUTS.items():
        for name, got in outputs(model.double().eval(), image(*args)).items():
            np.testing.assert_allclose(got[:, rows], dump[f"eval64_{which}/{name}"], 1e-6, 1e-6)
    model.train()(image(*INPUTS["a"]))
    trained = {name: want for name, want in dump.items() if name.endswith(("_mean", "_var"))}
    assert len(trained) == 10
    for name, want in trained.items():
        got = model.state_dict()[name.removeprefix("train_a_bn/")]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * abs(want).max(), err_msg=name)


@pytest.mark.parametrize("mask", [False, True])
def test_every_layer_that_depends_on_the_keypoints_is_in_the_table(mask):
    """Fine-tuning on other keypoints keeps the shared rows of these alone."""
    with torch.device("meta"):
        few, more = (YoloNasPose("n", k, mask=mask).state_dict() for k in (5, 7))
    layers = {name.split(".")[-2] for name in few if few[name].shape != more[name].shape}
    assert layers == set(KEYPOINT_ROWS)


def test_n_is_the_reference(model_n):
    assert_reference(copy.deepcopy(model_n), committed("reference_n.npz"), slice(None, None, 37))


def test_s_is_the_reference(tmp_path):
    path = write(tmp_path, {"net": official_state("s", full("bnstats_s.npz"))})
    model = YoloNasPose("s")
    load_weights(model, path)
    assert_reference(model, full("model_s.npz"))


@pytest.mark.parametrize("size, entries, digest, live, fused, momentum", [
    ("n", 956, "9a9265e20339a638", 7_165_323, 6_843_635, 0.03),
    ("s", 987, "da277f5e22611049", 16_050_444, 15_337_756, 0.1),
    ("m", 1031, "3ef192739b2a7844", 40_886_734, 38_916_414, 0.1),
    ("l", 1163, "172a4b293768658a", 56_919_508, 54_371_076, 0.03)])
def test_every_size_has_the_references_tensors(size, entries, digest, live, fused, momentum):
    """digest: start of the sha256 of its sorted lines "name shape". fused: every norm folded."""
    shapes = official_shapes(size)
    lines = "\n".join(sorted(f"{name} {shape}" for name, shape in shapes.items()))
    assert len(shapes) == entries
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == digest
    with torch.device("meta"):
        model = YoloNasPose(size)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.momentum, m.eps) for m in norms} == {(momentum, 1e-6)}
    assert sum(p.numel() for p in model.parameters()) == live
    assert sum(p.numel() for p in model.fuse().parameters()) == fused
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_every_score_of_a_new_network_is_near_0_01():
    for head in YoloNasPose("n").heads.values():
        torch.testing.assert_close(head.cls_pred.bias.sigmoid(), torch.full((18,), 0.01))


def test_unknown_size_is_refused():
    with pytest.raises(ValueError, match="'x' unknown; choose one of n, s, m, l"):
        YoloNasPose("x")


def test_kept_outputs_are_merged_from_first_to_last():
    layer, x = CSPLayer(8, 8, 4, 2, keep_all=True).eval(), torch.rand(1, 8, 6, 6)
    first = layer.bottlenecks[0](layer.conv1(x))
    kept = [layer.conv1(x), first, layer.bottlenecks[1](first), layer.conv2(x)]
    assert torch.equal(layer(x), layer.conv3(torch.cat(kept, dim=1)))


def test_fusing_changes_nothing(model_n):
    """float32 rounds: this net of random weights makes 0.05 px of it, with and without fusing."""
    want = outputs(model_n, image(*INPUTS["b"]))
    for dtype, rtol, px, score in ((torch.float64, 1e-9, 1e-9, 1e-9),
                                   (torch.float32, 0, 0.1, 1e-3)):
        fused = copy.deepcopy(model_n).to(dtype).fuse()
        assert not fused.training and not any(p.requires_grad for p in fused.parameters())
        got = outputs(fused, image(*INPUTS["b"]))
        for name, atol in zip(got, (px, score, px, score)):
            np.testing.assert_allclose(got[name], want[name], rtol=rtol, atol=atol, err_msg=name)


def test_an_image_is_alone_in_its_batch(model_n):
    images = image(5, 3, 64, 96)
    together = outputs(model_n, images)
    for i in range(3):
        for name, values in outputs(model_n, images[i:i + 1]).items():
            np.testing.assert_allclose(values[0], together[name][i], rtol=1e-9, atol=1e-9)


def test_parameters_before_a_norm_are_frozen_and_no_others(model_n):
    """A norm subtracts its mean, so a bias before it has no gradient and no effect in training."""
    model = copy.deepcopy(model_n).train()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    model.requires_grad_(True)
    images = image(6, 2, 96, 64)
    before = model(images)
    torch.manual_seed(0)
    loss = sum((torch.randn_like(t) * t).sum() for t in before[:4])
    got = torch.autograd.grad(loss, list(model.parameters()))
    cancelled = {name for (name, _), g in zip(model.named_parameters(), got) if g.norm() < 1e-8}
    assert len(frozen) == 72 and frozen == cancelled and frozen <= set(model.state_dict())
    with torch.no_grad():
        for name in frozen:
            model.get_parameter(name).add_(torch.randn(()))
        for old, new in zip(before, model(images)):
            torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-9)


def test_channels_last_gives_the_same_gradients(model_n):
    """The stem also in float32 and at 224 px, where a strided 1x1 convolution breaks the heap."""
    torch.manual_seed(0)
    net, stem = copy.deepcopy(model_n).train(), QARepVGG(3, 32, stride=2)
    for run, parameters, images, tol in (
            (lambda x: torch.cat([t.flatten() for t in net(x)[:4]]), net.parameters(),
             image(7, 2, 96, 64), 1e-8),
            (stem, stem.parameters(), image(8, 4, 224, 224).float(), 1e-4)):
        trained = [p for p in parameters if p.requires_grad]
        want, got = run(images), run(images.contiguous(memory_format=torch.channels_last))
        slope = torch.randn_like(want)
        for a, b in zip(torch.autograd.grad(got, trained, slope),
                        torch.autograd.grad(want, trained, slope)):
            assert (a - b).norm() <= tol * b.norm()


def hand_made(dtype: torch.dtype = torch.float32) -> RawOutput:
    """Zeros for 32 x 64 px; only anchor 33, of stride 16, row 0, column 1, says something."""
    centers, strides = make_anchors(32, 64, torch.device("cpu"))
    shapes = (1, 42), (1, 42, 4, BINS), (1, 42, 17, 2), (1, 42, 17)
    cls, box, offsets, kpt = (torch.zeros(shape) for shape in shapes)
    for side, bins in enumerate(([1], [2], [3], [4, 5])):   # left, top, right, bottom; the last 4.5
        box[0, 33, side, bins] = 200.0
    offsets[0, 33, 2] = torch.tensor([0.5, -0.25])
    cls[0, 33] = -torch.tensor(3.0).log()
    return RawOutput(*(t.to(dtype) for t in (cls, box, offsets, kpt)), centers, strides)


def test_anchors_go_level_by_level_and_row_by_row():
    centers, strides = make_anchors(32, 64, torch.device("cpu"))
    assert strides[:, 0].tolist() == [8] * 32 + [16] * 8 + [32] * 2
    assert centers[[0, 1, 8, 32, 36, 40, 41]].tolist() == [
        [4, 4], [12, 4], [4, 12], [8, 8], [8, 24], [16, 16], [48, 16]]


def test_box_and_point_by_hand():
    """Distances start at the cell's center, (24, 8), keypoints at its corner, (16, 0)."""
    out = decode(hand_made())
    assert out.boxes[0, 33].tolist() == pytest.approx([24 - 16, 8 - 32, 24 + 48, 8 + 72])
    assert out.keypoints[0, 33, 2].tolist() == [16 + 8, 0 - 4]
    assert out.scores[0, 33].item() == pytest.approx(1 / 4)
    assert out.kpt_scores[0, 33, 0] == 0.5


@pytest.mark.parametrize("given", [torch.bfloat16, torch.half, torch.float64])
def test_decode_works_in_float32_at_least(given):
    raw = hand_made(given)
    for got, want in zip(decode(raw), decode(RawOutput(*(t.double() for t in raw[:6])))):
        assert got.dtype == torch.promote_types(given, torch.float32)
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wrap", [
    lambda good, bad: {"net": bad, "ema_net": good},
    lambda good, bad: {"net": good, "epoch": 1},
    lambda good, bad: good,
    lambda good, bad: {"net": {f"module.{name}": t for name, t in good.items()}},
    lambda good, bad: {"format": "nanopose", "model": bad, "ema": good},
    lambda good, bad: {"format": "nanopose", "model": good},
], ids=["ema_net", "net", "bare", "module", "our ema", "our model"])
def test_the_best_weights_of_a_file_are_loaded(tmp_path, wrap):
    model, good, bad = YoloNasPose("n"), torch.rand(68), torch.zeros(68)
    report = load_weights(model, write(tmp_path, wrap({BOX_BIAS: good}, {BOX_BIAS: bad})))
    assert torch.equal(model.state_dict()[BOX_BIAS], good)
    assert report["loaded"] == [BOX_BIAS] and len(report["missing"]) == 885


@pytest.mark.parametrize("kind", ["official", "ours", "state_dict"])
def test_only_official_weights_are_converted(tmp_path, kind):
    """BGR becomes RGB in the stem; half a pixel is 0.5 / stride in the pose biases."""
    given = {f"{STEM}.branch_3x3.conv.weight": torch.rand(32, 3, 3, 3),
             f"{STEM}.branch_1x1.weight": torch.rand(32, 3, 1, 1)}
    given |= {f"heads.head{i}.pose_pred.bias": torch.rand(34) for i in (1, 2, 3)}
    want, file = given, {"format": "nanopose", "model": given} if kind == "ours" else given
    if kind == "official":
        file = {"net": given | {f"{STEM}.rbr_reparam.bias": torch.rand(32)}}
        want = {name: t[:, [2, 1, 0]] for name, t in given.items() if t.ndim == 4}
        for i, stride in ((1, 8), (2, 16), (3, 32)):
            name = f"heads.head{i}.pose_pred.bias"
            want[name] = given[name] + 0.5 / stride
    torch.testing.assert_close(read_weights(write(tmp_path, file))[0], want, rtol=0, atol=0)


def test_another_number_of_keypoints_skips_what_depends_on_it(official_n):
    model = YoloNasPose("n", 14)
    report = load_weights(model, official_n)
    state, _ = read_weights(official_n)
    assert set(report["skipped"]) == {f"heads.head{i}.{kind}_pred.{part}" for i in (1, 2, 3)
                                      for kind in ("cls", "pose") for part in ("weight", "bias")}
    assert set(report["skipped"]) | set(report["loaded"]) == set(model.state_dict())
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in report["loaded"])


@pytest.mark.parametrize("names", [COCO_NAMES[::-1], ["tail", *COCO_NAMES[5:9], "nose"], ["nose"]])
def test_keypoints_of_the_same_name_are_kept_and_speak_as_before(official_n, names):
    """In any order: their outputs are the bits of the network that the file holds."""
    old, new = YoloNasPose("n").eval(), YoloNasPose("n", len(names)).eval()
    load_weights(old, official_n)
    report = load_weights(new, official_n, names, COCO_NAMES)
    assert len(report["in part"]) == 12 and not report["skipped"]
    assert report["new keypoints"] == [name for name in names if name == "tail"]
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        was, now = old(x), new(x)
    torch.testing.assert_close(now.cls_logits, was.cls_logits, rtol=0, atol=1e-5)
    for i, name in enumerate(names):
        if name != "tail":
            for kind in ("kpt_offsets", "kpt_logits"):
                torch.testing.assert_close(getattr(now, kind)[:, :, i],
                                           getattr(was, kind)[:, :, COCO_NAMES.index(name)],
                                           rtol=0, atol=1e-4)


def test_rows_of_a_file_that_names_no_keypoints(tmp_path, official_n):
    """17 are COCO's; another number stays where it is; names can be put into the file."""
    animal = ["nose", "tail", *COCO_NAMES[2:]]
    report = load_weights(YoloNasPose("n"), official_n, animal, COCO_NAMES)
    assert report["names no keypoints, taken for"] == COCO_NAMES
    assert report["new keypoints"] == ["tail"]
    for k, kind in ((17, "named"), (20, "unnamed")):
        names = [*animal, "a", "b", "c"][:k]
        file = {"net": YoloNasPose("n", k).state_dict()}
        path = write(tmp_path, file | ({"skeleton": {"names": names}} if kind == "named" else {}))
        model = YoloNasPose("n", k)
        report = load_weights(model, path, names, COCO_NAMES)
        assert report["names no keypoints, taken for"] == report["new keypoints"] == []
        assert report["keypoints by place"] == (names if kind == "unnamed" else [])
        assert len(report["loaded"]) == len(model.state_dict())
        assert all(torch.equal(t, file["net"][name]) for name, t in model.state_dict().items())


def test_averaged_files_count_batches_in_floats(tmp_path):
    name, model = f"{STEM}.post_bn.num_batches_tracked", YoloNasPose("n")
    load_weights(model, write(tmp_path, {"net": {name: torch.tensor(7.0)}}))
    assert torch.equal(model.state_dict()[name], torch.tensor(7))


class Call:
    def __reduce__(self):  # makes a folder when it is unpickled
        return os.mkdir, ("trap",)


@pytest.mark.parametrize("code", [Call(), os.getcwd, Call], ids=["call", "function", "class"])
def test_code_in_a_file_is_refused_and_never_run(tmp_path, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, {"net": {BOX_BIAS: torch.zeros(68)}, "extra": code})
    with pytest.raises(ValueError, match="no checkpoint of plain tensors"):
        load_weights(YoloNasPose("n"), path)
    assert os.listdir() == ["w.pth"]


@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_no_checkpoint_is_refused(tmp_path, zipped):
    """Cut short by a full disk or a lost connection, in both formats of torch, or just a text."""
    path = tmp_path / "w.pth"
    torch.save({"net": {BOX_BIAS: torch.zeros(68)}}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    cuts = [whole[:int(share * len(whole))] for share in np.linspace(0, 0.99, 40)]
    for content in (*cuts, b"hello world", b"a,b\n1,2\n", b"<html>404</html>"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no checkpoint"):
            read_weights(str(path))


@pytest.mark.parametrize("content, message", [
    ([1], "holds <class 'list'>"), ({"epoch": 3}, "holds .'epoch'"), ({"net": {}}, "holds .'net'"),
    ({"net": [torch.zeros(2)]}, "holds"), ({"net": torch.zeros(2)}, "holds"),
    ({"fc.weight": torch.zeros(3), BOX_BIAS: torch.zeros(3)}, "none of its 2 tensors fits")])
def test_a_file_without_weights_for_us_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_weights(YoloNasPose("n"), write(tmp_path, content))


def test_another_keypoint_set_rebuilds_the_last_layers_alone(official_n):
    """17 to 14 keypoints: of an official file only the tensors that have K in their shape."""
    model = YoloNasPose("n", 14)
    report = load_weights(model, official_n)
    assert report["skipped"] == [f"heads.head{i}.{layer}.{part}" for i in (1, 2, 3)
                                 for layer in ("cls_pred", "pose_pred")
                                 for part in ("weight", "bias")]
    assert not report["missing"] and not report["unused"]
    assert len(report["loaded"]) == len(model.state_dict()) - 12


def test_a_mask_branch_changes_nothing_else_and_teaches_the_neck():
    torch.manual_seed(0)
    plain = YoloNasPose("n")
    torch.manual_seed(0)
    masked = YoloNasPose("n", mask=True)
    one, two = plain.state_dict(), masked.state_dict()
    assert list(one) == [name for name in two if not name.startswith("mask.")]
    assert all(torch.equal(one[name], two[name]) for name in one)
    images = torch.rand(2, 3, 64, 96)
    raw, more = plain(images), masked(images)
    assert raw.mask_logits is None and more.mask_logits.shape == (2, 32, 48)
    assert all(torch.equal(a, b) for a, b in zip(raw[:6], more[:6]))
    more.mask_logits.sum().backward()
    assert masked.neck.neck2.conv.conv.weight.grad.abs().sum() > 0
    assert masked.heads.head1.cls_pred.weight.grad is None


def test_a_cell_tells_four_by_four_pixels():
    """Channel 4 i + j of a cell is its pixel in row i, column j."""
    model = YoloNasPose("n", mask=True).eval()
    with torch.no_grad():
        model.mask[1].weight.zero_()
        model.mask[1].bias.copy_(torch.arange(16.0))
        mask = model(torch.rand(1, 3, 64, 64)).mask_logits
    assert torch.equal(mask[0, 4:8, 8:12], torch.arange(16.0).reshape(4, 4))


def test_half_precision_is_not_widened_on_its_way():
    """One float32 factor would make all sums and norms after it float32, in memory and time."""
    model, widths = YoloNasPose("m"), []
    for module in model.modules():
        if isinstance(module, (Bottleneck, QARepVGG, torch.nn.BatchNorm2d)):
            module.register_forward_hook(lambda module, inputs, out: widths.append(out.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(torch.rand(1, 3, 64, 64))
    assert len(widths) > 200 and set(widths) == {torch.bfloat16}


def test_torch_compile_traces_the_network_as_a_whole(monkeypatch):
    """fullgraph fails at a graph break; the tracer alone, as code generation takes minutes. Size m
    has every kind of layer; here it has one of each."""
    row = SIZES["m"]
    monkeypatch.setitem(SIZES, "m", row._replace(
        stages=tuple((c, hidden, 1, keep) for c, hidden, _, keep in row.stages),
        neck=tuple((c, hidden, 1) for c, hidden, _ in row.neck)))
    torch.manual_seed(0)
    model = YoloNasPose("m", mask=True).train()
    images = torch.rand(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    want = copy.deepcopy(model)(images)
    model.compile(fullgraph=True, backend="eager")
    for a, b in zip(model(images), want):
        assert a is b is None or torch.equal(a, b)
