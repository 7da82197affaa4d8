"""train.py and evaluate.py as a user runs them, on a small drawn set; some in this process, which
spares them the start of another."""
import copy
import json
import math
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bench
import evaluate
import export
import predict
import train
from data import (COCO_NAMES, FLIP, MOSAIC_HEAVY, CocoPose, DataError, Skeleton, collate, flatten,
                  random_size, read_json, read_skeleton)
from evaluate import load_model
from loss import TERMS, LossWeights, PoseLoss
from model import YoloNasPose, decode
from people import draw_dataset
from schedule import EMA, WarmupEnd, make_optimizer, param_groups
from test_distributed import run_here
from train import (DEMO, RECIPES, cut_batch, epochs_of, fill_recipe, flat_gradients, freeze, main,
                   make_model, mean_of, note_bad, open_data, out_of_memory, parse_args, train_step)

ROOT = Path(__file__).parents[1]
SMALL = ["--image-size", "64", "--batch-size", "4", "--epochs", "3", "--eval-every", "1",
         "--warmup", "2", "--workers", "1", "--log-every", "1"]


def start(*flags) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, flags)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def end(run: subprocess.Popen) -> str:
    """Wait for it, and return what it printed."""
    out, err = run.communicate(timeout=250)
    assert run.returncode == 0, err
    return out


def here(monkeypatch, capsys, script, *flags) -> tuple[str, str]:
    """Call the script's main in this process; return what it printed, out and err."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, flags)])
    capsys.readouterr()
    script.main()
    return capsys.readouterr()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A folder with a set of 10 + 6 images, a finished run of 3 epochs in 8 steps, and one that
    stopped in the middle of an epoch."""
    folder = tmp_path_factory.mktemp("small")
    draw_dataset(str(folder / "people"), train=10, val=6, side=64)
    flags = ["--data", folder / "people", *SMALL]
    whole = start(*flags, "--out", folder / "run")
    run_here(*flags, "--out", folder / "resumed", "--max-steps", 4)
    (folder / "stdout").write_text(end(whole))
    return folder


def log_lines(run_folder: Path, timing: bool = True) -> list[dict]:
    """The log, with or without what the clock and the machine decide."""
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    clock = () if timing else ("img_s", "data_wait", "memory_gb")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def test_a_run_says_its_plan_and_leaves_what_it_promised(small):
    said = (small / "stdout").read_text()
    for part in ("10 to train on, 6 to evaluate", "4 images x 1 processes x 1 micro-batches = 4",
                 "steps         8 for 3 epochs", "peak lr", "warmup", "recipe n", "ETA", "img/s"):
        assert part in said
    lines = log_lines(small / "run")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    peak = 2e-3 * 4 / 480  # which a step was made with, not the next one's
    rates = [line["lr"] for line in lines if "loss" in line]
    assert rates[:3] == pytest.approx([0, peak / 2, peak]) and rates[7] == pytest.approx(peak / 20)
    assert [(line["step"], line["epoch"]) for line in lines if "AP" in line] == [(3, 1), (5, 2),
                                                                               (8, 3)]
    scores = {line["step"]: line["AP"] if line["AP"] > 0.001 else line["OKS"] - 1
              for line in lines if "AP" in line}  # while AP is 0, OKS says which is best
    best = torch.load(small / "run" / "best.pt", weights_only=True)["step"]
    assert scores[best] >= max(scores.values()) - 1e-4 and max(scores.values()) < 0
    assert [line["step"] for line in lines if "best" in line][-1] == best  # the report goes by it
    for name in ("first_batch.jpg", "predictions.jpg", "best.pt", "last.pt"):
        assert (small / "run" / name).stat().st_size > 1000
    last = torch.load(small / "run" / "last.pt", weights_only=True)
    assert last["format"] == "nanopose" and last["step"] == 8
    assert {"model", "ema", "optimizer", "scaler", "stopper", "log", "warmup", "bad"} <= last.keys()
    assert last["args"]["train_pad"] == "center" and last["args"]["val_pad"] == "bottom_right"
    assert last["skeleton"]["names"][5] == "left_shoulder"
    assert not list((small / "run").glob("*.tmp"))


def test_a_stopped_and_resumed_run_is_the_unbroken_one_bit_by_bit(small):
    run_here("--out", small / "resumed", "--resume")
    one, two = (torch.load(small / name / "last.pt", weights_only=True)
                for name in ("run", "resumed"))
    for part in ("model", "ema"):
        assert one[part].keys() == two[part].keys()
        assert all(torch.equal(one[part][k], two[part][k]) for k in one[part])
    for p in one["optimizer"]["state"]:
        for name, tensor in one["optimizer"]["state"][p].items():
            assert torch.equal(tensor, two["optimizer"]["state"][p][name])
    assert one["stopper"] == two["stopper"]
    assert log_lines(small / "run", timing=False) == log_lines(small / "resumed", timing=False)


def test_a_run_goes_on_with_its_data_in_another_place(small, tmp_path, monkeypatch, capsys):
    """As in the next session of a notebook: the labels must be the same, paths need not."""
    flags = ("--train-json", "{}/annotations/person_keypoints_train2017.json", "--train-images",
             "{}/train2017", "--val-json", "{}/annotations/person_keypoints_val2017.json",
             "--val-images", "{}/val2017")
    at = tmp_path / "then"
    at.symlink_to(small / "people")
    here(monkeypatch, capsys, train, *(flag.format(at) for flag in flags), *SMALL, "--out",
         tmp_path / "run", "--max-steps", 1)
    at.unlink()
    with pytest.raises(SystemExit, match="then/annotations/person_keypoints_train2017.json not"):
        here(monkeypatch, capsys, train, "--out", tmp_path / "run", "--resume")
    said, _ = here(monkeypatch, capsys, train, "--out", tmp_path / "run", "--resume", "--data",
                   small / "people", "--max-steps", 2)
    assert "1 done, 1 now" in said
    file = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert file["args"]["train_json"] is None and file["args"]["data"] == str(small / "people")


def test_a_gpu_that_only_emulates_bf16_is_told_to_take_fp16(monkeypatch):
    args = parse_args(["--amp", "bf16"])
    fill_recipe(args)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: emulated)
    with pytest.raises(ValueError, match="older than Ampere, only emulates it; use fp16"):
        make_model(args, Skeleton(["a"], [0], [], [0.05]), torch.device("cuda"), {})


def plain_loop(people: Path, kind: str, teacher) -> tuple[dict, dict]:
    """Weights and average after three steps of the run below, each rule written out. All steps
    are clipped, so what they are divided by does not matter here."""
    labels = read_json(f"{people}/annotations/person_keypoints_train2017.json")
    data = CocoPose(flatten(labels), f"{people}/train2017", read_skeleton(labels), 64, "center")
    criterion = PoseLoss(torch.tensor(data.skeleton.sigmas), LossWeights(dfl=0.3, pose_reg=20.0),
                         label_smoothing=0.2)
    torch.manual_seed(3)
    model = YoloNasPose("n").double()
    norms = [name for name, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    average = {name: t.clone() for name, t in model.state_dict().items()}
    first, second = ({name: torch.zeros_like(p) for name, p in trained.items()} for _ in "mv")
    order = np.concatenate([np.random.default_rng((3, epoch)).permutation(10) for epoch in (0, 1)])
    for step, (share, wide, beta, decay) in enumerate((
            (0.5, 4.0, 0.8, 2 / 11), (0.75, 2.0, 0.85, 0.25), (1.0, 1.0, 0.9, 0.25))):
        model.zero_grad()
        for place in (4 * step, 4 * step + 2):
            images, targets = collate([data[0, i] for i in order[place:place + 2]])
            x = images.double() / 255
            raw = model(x).promote()
            terms, _ = criterion(raw, decode(raw), targets, wide)
            loss = sum(terms.values())
            if teacher:
                with torch.no_grad():
                    told = teacher(x).promote()
                loss = loss + 0.5 * sum(criterion.distill(raw, decode(raw), told, decode(told),
                                                          wide).values())
            loss.backward()
        norm = torch.cat([p.grad.flatten() for p in trained.values()]).norm()
        for name, p in trained.items():
            g, m, v = p.grad * 2 / norm, first[name], second[name]
            rate = 0.01 * 4 / 8 * (0.1 if name.startswith("backbone") else 1)
            plain = name.endswith("bias") or name.rpartition(".")[0] in norms
            shrink = 0 if plain else 0.05
            if kind == "adamw":
                m += (1 - beta) * (g - m)
                v += 0.001 * (g * g - v)
                p.data *= 1 - rate * share * shrink
                p.data -= rate * share * m / (1 - beta ** (step + 1)) / (
                    (v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            else:
                biases = 20 - 19 * step / 2 if name.endswith("bias") and step < 2 else share
                g = g + shrink * p.data
                m.copy_(beta * m + g if step else g)
                p.data -= rate * biases * (g + beta * m)
        for name, t in model.state_dict().items():
            average[name] = t.clone() if "num" in name else decay * average[name] + (1 - decay) * t
    return model.state_dict(), average


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_run_is_a_plain_loop(small, tmp_path, monkeypatch, capsys, kind):
    """Order, tolerance, weights of terms, clipping, rates, decay, momentum, average. Adam divides
    small gradients by themselves, and their rounding with them."""
    rounding = {"adamw": 1e-5, "sgd": 1e-9}[kind]
    distill = ["--teacher", small / "run/best.pt", "--distill-weight", 0.5]
    sgd = ["--optimizer", "sgd", "--warmup-bias-lr", 0.1]
    here(monkeypatch, capsys, train, "--data", small / "people", "--out", tmp_path, "--double",
         "--image-size", 64, "--batch-size", 2, "--accumulate", 2, "--epochs", 4, "--max-steps", 3,
         "--eval-every", 9, "--workers", 0, "--augment", "none", "--lr", 0.01, "--lr-batch", 8,
         "--warmup", 2, "--warmup-start", 0.5, "--warmup-momentum", 0.8, "--momentum", 0.9,
         "--lr-mult", "backbone=0.1", "--weight-decay", 0.05, "--clip-norm", 2, "--ema-decay", 0.25,
         "--sigma-start", 4, "--sigma-epochs", 0.8, "--label-smoothing", 0.2, "--dfl-weight", 0.3,
         "--pose-weight", 20, "--seed", 3, *(distill if kind == "adamw" else sgd))
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    model = load_model(str(small / "run/best.pt"))[0]
    teacher = model.fuse().double() if kind == "adamw" else None
    by_hand = plain_loop(small / "people", kind, teacher)
    for want, found in zip(by_hand, (last["model"], last["ema"])):
        for name, t in want.items():
            if t.is_floating_point():
                assert (found[name] - t).norm() <= rounding * t.norm() + 1e-12, name
            else:
                assert found[name] == t, name


def test_a_steps_gradient_is_divided_once_by_its_scores_then_clipped(small):
    args = parse_args(["--data", str(small / "people"), "--image-size", "64", "--accumulate", "2",
                       "--batch-size", "2", "--augment", "none"])
    fill_recipe(args)
    data = open_data(args, 0)[0]
    batches = [collate([data[0, i] for i in half]) for half in ((0, 1), (2, 3))]
    criterion = PoseLoss(torch.tensor(data.skeleton.sigmas))
    torch.manual_seed(0)
    model, total = YoloNasPose("n").double(), 0.0
    for images, targets in batches:
        raw = model(images.double() / 255).promote()
        terms, scores = criterion(raw, decode(raw), targets, 8.0)
        sum(terms.values()).backward()
        total += scores.item()
    parameters = [p for p in model.parameters() if p.requires_grad]
    want = torch.cat([p.grad.flatten() for p in parameters]) / total
    flat = flat_gradients(parameters, len(TERMS) + 3)
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    assert total > 1.1
    for share, scaled in ((3, False), (1 / 3, False), (1 / 3, True)):
        args.clip_norm = share * want.norm().item()
        done = train_step(model, None, criterion, iter(batches), optimizer,
                          torch.amp.GradScaler("cpu", enabled=scaled), flat, args, 64, 8.0, False)
        found = torch.cat([p.grad.flatten() for p in parameters])
        assert (found - min(share, 1) * want).norm() <= 1e-9 * want.norm()
        assert (done.norm, done.sums[0]) == pytest.approx((want.norm().item(), total), rel=1e-9)


@pytest.mark.parametrize("unsynced", [True, False])
def test_a_step_averages_the_statistics_of_unsynced_norms_alone(small, monkeypatch, unsynced):
    args = parse_args(["--data", str(small / "people"), "--image-size", "64", "--batch-size", "2",
                       "--augment", "none", *["--no-sync-bn"] * unsynced])
    fill_recipe(args)
    data, model, averaged = open_data(args, 0)[0], YoloNasPose("n"), []
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train.dist, "all_reduce", lambda flat: None)
    monkeypatch.setattr(train, "average_statistics", averaged.append)
    flat = flat_gradients([p for p in model.parameters() if p.requires_grad], len(TERMS) + 3)
    train_step(model, None, PoseLoss(torch.tensor(data.skeleton.sigmas)),
               iter([collate([data[0, 0], data[0, 1]])]), torch.optim.SGD(model.parameters(), 0.0),
               torch.amp.GradScaler("cpu", enabled=False), flat, args, 64, 8.0, False)
    assert averaged == [model] * unsynced


def test_a_step_that_is_not_finite_leaves_the_model_as_it_was(small):
    args = parse_args(["--data", str(small / "people"), "--image-size", "64", "--batch-size", "2",
                       "--augment", "none"])
    fill_recipe(args)
    data = open_data(args, 0)[0]
    images, targets = collate([data[0, i] for i in (0, 1)])
    targets["keypoints"][0, 0, 0, 0] = math.inf
    torch.manual_seed(0)
    model = YoloNasPose("n")
    model.register_buffer("yours", torch.tensor([[True, False], [False, True], [True, True]]))
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    seen = []
    norm = model.backbone.stem.conv.post_bn
    norm.register_forward_hook(lambda *_: seen.append(norm.num_batches_tracked.item()))
    flat = flat_gradients([p for p in parameters if p.requires_grad], len(TERMS) + 3)
    done = train_step(model, None, PoseLoss(torch.tensor(data.skeleton.sigmas)),
                      iter([(images, targets)]), torch.optim.SGD(parameters, lr=1.0),
                      torch.amp.GradScaler("cpu", enabled=False), flat, args, 64, 8.0, False)
    assert not done.finite and seen == [1]
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name


def test_a_step_starts_few_operators():
    """A GPU's CPU starts them one by one, at small images the longest part of a step."""
    parts = bench.step_parts(Namespace(model="n", amp="no", compile=False, batch_size=1,
                                       image_size=64, people=3), torch.device("cpu"))
    parts["step"]()
    with bench.Operators() as operators:
        parts["step"]()
    assert operators.count <= 2300  # 146 convolutions and 135 norms, forward and backward: 1,400


def test_flags_of_rate_average_and_size_reach_their_parts(small, tmp_path, monkeypatch, capsys):
    """Two cycles of 4 steps; the first's warmup of 2 steps is made 4 long: the rates follow."""
    ends, averages, sizes, resize = [], [], [], train.resize
    monkeypatch.setattr(train, "WarmupEnd", lambda *a: ends.append(WarmupEnd(*a)) or ends[-1])
    monkeypatch.setattr(train, "EMA", lambda *a: averages.append(EMA(*a)) or averages[-1])
    monkeypatch.setattr(train, "resize", lambda *a: sizes.append(a[2]) or resize(*a))
    monkeypatch.setattr(WarmupEnd, "update", lambda self, *_: setattr(self, "end", 4))
    here(monkeypatch, capsys, train, "--data", small / "people", *SMALL, "--out", tmp_path,
         "--workers", 0, "--max-steps", 2, "--restarts", 1, "--dynamic-warmup", "--ema", "exp",
         "--lr", 0.01, "--lr-batch", 16, "--lr-scale", "sqrt", "--max-lr", 0.004, "--warmup-mult",
         "neck=0.5", "--multi-scale", 0.5, "--seed", 9)
    assert ends[0].dynamic and ends[0].most == 2 and averages[0].kind == "exp"
    assert sizes == [random_size(64, 0.5, 9, step) for step in (0, 1)] == [96, 32]
    assert [line["lr"] for line in log_lines(tmp_path)] == pytest.approx([0, 0.001])
    for group in torch.load(tmp_path / "last.pt", weights_only=True)["optimizer"]["param_groups"]:
        assert group["lr"] == pytest.approx(0.002 * (0.75 if group["part"] == "neck" else 1))


def test_memory_is_said_in_gb(monkeypatch):
    usage = Namespace(ru_maxrss=3 * (2**30 if sys.platform == "darwin" else 2**20))
    monkeypatch.setattr(train.resource, "getrusage", lambda who: usage)
    assert train.largest_memory(torch.device("cpu")) == 3


def test_the_reference_recipe_reaches_loss_labels_and_tolerance(small):
    for recipe, exact in (("reference", True), ("nanopose", False)):
        args = parse_args(["--data", str(small / "people"), "--recipe", recipe, "--max-bad", "3"])
        fill_recipe(args)
        train_set, val_set, *_ = open_data(args, 0)
        criterion = make_model(args, train_set.skeleton, torch.device("cpu"), {})[2]
        assert (criterion.reference, criterion.oks_floor) == (exact, 0.0 if exact else 0.1)
        assert train_set.keep_ignored != exact and (args.sigma_epochs == 0) == exact
        assert (train_set.pad, val_set.pad, train_set.spare) == ("center", "bottom_right", 3)


def test_only_people_leaves_the_images_to_evaluate_alone(small, tmp_path):
    """Images that show nobody count in AP; they are left out of training only."""
    shutil.copytree(small / "people", tmp_path / "people")
    for path in (tmp_path / "people" / "annotations").iterdir():
        labels = json.loads(path.read_text())
        labels["annotations"] = [a for a in labels["annotations"] if a["image_id"] != 1]
        path.write_text(json.dumps(labels))
    args = parse_args(["--data", str(tmp_path / "people"), "--only-people"])
    fill_recipe(args)
    train_set, val_set, truth, _ = open_data(args, 0)
    assert (len(train_set), len(val_set), len(truth.imgs)) == (9, 6, 6)


def test_where_nothing_says_so_a_run_goes_to_runs_train(small, tmp_path, monkeypatch, capsys):
    """And without --data it takes, or draws, people beside it."""
    (tmp_path / "drawn_people").symlink_to(small / "people")
    monkeypatch.chdir(tmp_path)
    said, _ = here(monkeypatch, capsys, train, "--max-steps", 1, "--image-size", 64, "--batch-size",
                   2, "--warmup", 2)
    assert "default       " in said and (tmp_path / "runs" / "train" / "last.pt").exists()
    said, _ = here(monkeypatch, capsys, train, "--resume", "--max-steps", 2)
    assert "1 done, 1 now" in said


def test_evaluate_repeats_the_numbers_of_the_run_and_predict_its_people(small, monkeypatch, capsys):
    numbers = small / "numbers.json"
    here(monkeypatch, capsys, evaluate, "--data", small / "people", "--weights",
         small / "run" / "last.pt", "--workers", 1, "--batch-size", 4, "--metrics", numbers,
         "--results", small / "results.json")
    logged = [line for line in log_lines(small / "run") if "AP" in line][-1]
    for name, value in json.loads(numbers.read_text()).items():
        assert value == pytest.approx(logged[name], abs=1e-6)
    found = json.loads((small / "results.json").read_text())
    assert all(set(r) == {"image_id", "category_id", "score", "keypoints"} for r in found)

    model, file = load_model(str(small / "run" / "last.pt"))  # from Python, as the README says
    image = Image.open(small / "people" / "val2017" / "000003.jpg")
    (boxes, scores, keypoints), = predict.predict(model, file, [image], conf=0.01)
    written = [r for r in found if r["image_id"] == 3]
    assert len(scores) == len(written) == len(boxes) > 0
    for row, score, result in zip(keypoints, scores, written):
        assert score == pytest.approx(result["score"], abs=1e-5)
        want = np.reshape(result["keypoints"], (17, 3)) + [0.5, 0.5, 0]
        np.testing.assert_allclose(row, want, atol=1e-2)


def test_start_weights_are_loaded_and_listed(small, monkeypatch, capsys):
    said, _ = here(monkeypatch, capsys, train, "--data", small / "people", "--out", small / "tuned",
                   *SMALL, "--max-steps", 1, "--weights", small / "run" / "best.pt")
    assert "weights loaded 886" in " ".join(said.split())


def test_compiling_synced_norms_is_refused(monkeypatch):
    args = parse_args(["--compile"])
    fill_recipe(args)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="add --no-sync-bn"):
        make_model(args, Skeleton(["a"], [0], [], [0.05]), torch.device("cpu"), {})


def test_images_in_both_sets_are_counted(small, capsys):
    """COCO's folders share no file; the same folder under another name does."""
    (small / "again").symlink_to(small / "people" / "val2017")
    labels = str(small / "people" / "annotations" / "person_keypoints_{}2017.json")
    for name, folder, shared in (("train", "people/train2017", False), ("val", "again", True)):
        args = parse_args(["--train-json", labels.format(name), "--train-images",
                           str(small / folder), "--val-json", labels.format("val"),
                           "--val-images", str(small / "people" / "val2017")])
        fill_recipe(args)
        _, val_set, *_ = open_data(args, 0)
        n, out = len(val_set), capsys.readouterr().out
        assert (f"{n} of {n} images to evaluate are also trained on" in out) == shared


def test_each_set_has_its_own_cache_and_the_augmentation_the_seed(small):
    args = parse_args(["--data", str(small / "people"), "--cache", "ram", "--seed", "7"])
    fill_recipe(args)
    sets = open_data(args, 0)[:2]
    assert sets[0].seed == 7 and [len(s.cache.sides) for s in sets] == [len(s) for s in sets]


def test_weights_of_other_keypoints_are_taken_by_name(small):
    args = parse_args(["--data", str(small / "people"), "--weights", str(small / "run/best.pt")])
    fill_recipe(args)
    skeleton = Skeleton(["tail", "left_eye"], [0, 1], [], [0.05, 0.05])
    model, _, _, report = make_model(args, skeleton, torch.device("cpu"), {})
    assert report["new keypoints"] == ["tail"] and report["kept keypoints"] == ["left_eye"]
    assert not report["skipped"] and not report["keypoints by place"]
    other = Skeleton([f"part {i}" for i in range(17)], list(range(17)), [], 17 * [0.05])
    _, _, _, same = make_model(args, other._replace(names=COCO_NAMES), torch.device("cpu"), {})
    assert not same["keypoints by place"]
    _, _, _, by_place = make_model(args, other, torch.device("cpu"), {})
    assert by_place["keypoints by place"] == other.names and not by_place["new keypoints"]
    spaced = Skeleton(["left eye", "tail"], [0, 1], [], [0.05, 0.05])
    apart, _, _, none = make_model(args, spaced, torch.device("cpu"), {})
    assert none["new keypoints"] == spaced.names and len(none["skipped"]) == 6  # pose_pred's
    file = torch.load(small / "run" / "best.pt", weights_only=True)
    for name in none["in part"]:  # cls_pred's, whose first row is the person's
        assert torch.equal(apart.state_dict()[name][0], file["model"][name][0])
    assert len(none["in part"]) == 6
    for name in report["in part"]:
        assert torch.equal(model.state_dict()[name][-1], file["model"][name][
            2 if "cls" in name else 3])  # the second keypoint of COCO: after the person, and its y


def refusal(monkeypatch, capsys, flags: list, code: int) -> str:
    """The last line of a run that ends before it trains, without the cost of another process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        main()
    if code == 2:
        assert end.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]
    message = str(end.value)  # of sys.exit(message), which means code 1
    assert "\n" not in message
    return message


@pytest.mark.parametrize("script", [train, evaluate, predict, export], ids=lambda s: s.__name__)
def test_help_is_printed(script, monkeypatch, capsys):
    """argparse formats the help texts only here: a bare % would be a traceback."""
    with pytest.raises(SystemExit, match="^0$"):
        here(monkeypatch, capsys, script, "--help")
    assert "--weights" in capsys.readouterr().out


@pytest.mark.parametrize("flags, code, message", [
    (["--image-size", "100"], 2, "--image-size 100 must be a multiple of 32"),
    (["--batch-size", "0"], 2, "--batch-size 0 must be positive"),
    (["--out", ""], 2, "--out  must name a folder"),
    (["--model", "x"], 2, "invalid choice"),
    (["--train-json", "a.json"], 2, "--train-images is missing"),
    (["--data", "/nowhere"], 1, "no folder /nowhere/train2017"),
    (["--resume", "--out", "/nowhere"], 1, "no intact last.pt or previous.pt in /nowhere"),
    (["--weights", "/nowhere/w.pt", "--data", "PEOPLE"], 1, "no such file; expected a checkpoint"),
    (["--weights", "RUN", "--data", "PEOPLE"], 1, "run: a folder; expected a checkpoint, as best"),
    (["--weights", __file__, "--data", "PEOPLE"], 1, "no checkpoint of plain tensors"),
    (["--sigmas", "a,b"], 2, "invalid numbers value: 'a,b'"),
    (["--lr-mult", "tail=2"], 2, "tail=2, expected each once: backbone, neck, heads, mask"),
    (["--occlude", "2"], 2, "--occlude 2.0 must lie in 0 to 1"),
    (["--freeze", "bn:1,bn:-1"], 2, "bn:1,bn:-1, expected each once: backbone, neck, bn"),
    (["--freeze", "bn:0"], 2, "bn:0, expected each once: backbone, neck, bn"),
    (["--freeze", "bn:1:2"], 2, "invalid epochs_of value: 'bn:1:2'"),
    (["--schedule", "step", "--lr-steps=3,-1"], 2, "--lr-steps [3.0, -1.0] must be 0 or more"),
    (["--seed", "9" * 20], 2, "is too large"),
    (["--resume", "--dry-run"], 2, "--resume goes on with a run"),
    (["--distill-weight", "2"], 2, "has no effect without --teacher"),
    (["--ema-decay", "1"], 2, "--ema-decay 1.0 must be less than 1"),
    (["--schedule", "flat", "--final-ratio", "0.5"], 2, "no effect without --schedule cosine"),
    (["--lr-scale", "none", "--lr-batch", "64"], 2, "no effect without --lr-scale linear or sqrt"),
    (["--lr-steps", "2"], 2, "--lr-steps [2.0] has no effect without --schedule step"),
    (["--data", "PEOPLE", "--image-size", "96", "--multi-scale", "0.2"], 1, "reaches no other"),
    (["--data", "PEOPLE", "--batch-size", "1", "--image-size", "64", "--multi-scale", "0.5"], 1,
     "--batch-size 1 at 32 px leaves norms one value"),
    (["--data", "PEOPLE", "--schedule", "step"], 1, "--lr-steps []: expected epochs below"),
    (["--data", "PEOPLE", "--val-images", "/nowhere"], 1, "/nowhere: no such folder; expected the"),
    (["--data", "PEOPLE", "--save-epochs", "0"], 1, "some of these do not end with"),
    (["--data", "PEOPLE", "--teacher", "/nowhere/t.pt"], 1, "no such file; expected a checkpoint"),
    (["--mosaic", "2"], 2, "--mosaic 2.0 must lie in 0 to 1"),
    (["--workers", "-1"], 2, "--workers -1 must be 0 or more"),
    (["--data", "PEOPLE", "--sigmas", "0.1,0.2"], 1, "sigmas [0.1, 0.2] for 17 keypoints"),
    (["--data", "PEOPLE", "--epochs", "2", "--warmup", "2"], 1, "--warmup 2 is 2 of "),
    (["--data", "PEOPLE", "--out", "RUN"], 1, "already holds a run"),
    (["--data", "PEOPLE", "--out", __file__ + "/run"], 2, "is a file, or in one; expected the"),
    (["--epoch", "2", "--lr-shape", "x"], 2, "unrecognized arguments: --lr-shape x"),
])
def test_a_wrong_flag_gets_one_line_of_advice(small, tmp_path, monkeypatch, capsys, flags, code,
                                              message):
    names = {"PEOPLE": str(small / "people"), "RUN": str(small / "run")}
    flags = [names.get(flag, flag) for flag in flags]
    if "--out" not in flags:
        flags += ["--out", str(tmp_path / "out")]
    assert message in refusal(monkeypatch, capsys, flags, code)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("harm, message", [
    ("missing", "000001.jpg not found, but the json names 000001.jpg; get it"),
    ("broken", "was the download or export cut off?"),
    ("no bbox", "annotations: bbox is missing in"),
    ("no json", "person_keypoints_train2017.json not found; expected a COCO keypoint json"),
    ("nobody", "nobody in it has a labeled keypoint; check the export"),
    ("wide val", "000000.jpg: is 64x64 px, its json says 65x64; fix or remove the file or its"),
    ("no val image", "000001.jpg: cannot identify image file"),
])
def test_broken_data_gets_one_line_that_names_the_file(small, tmp_path, monkeypatch, capsys, harm,
                                                       message):
    root = tmp_path / "people"
    shutil.copytree(small / "people", root)
    image = root / "train2017" / "000001.jpg"
    path = root / "annotations" / "person_keypoints_train2017.json"
    labels = json.loads(path.read_text())
    if harm == "missing":
        image.unlink()
    elif harm == "no bbox":
        del labels["annotations"][0]["bbox"]
    elif "val" in harm:
        path = root / "annotations" / "person_keypoints_val2017.json"
        labels = json.loads(path.read_text())
        labels["images"][0]["width"] += harm == "wide val"
        if harm == "no val image":
            (root / "val2017" / "000001.jpg").write_text("error 404")
    elif harm == "nobody":
        labels["annotations"] = [{**ann, "iscrowd": 1} for ann in labels["annotations"]]
    path.write_text(json.dumps(labels)[:None if harm != "broken" else 300])
    if harm == "no json":
        path.unlink()
    flags = ["--data", root, "--out", tmp_path / "out", *SMALL]
    assert message in refusal(monkeypatch, capsys, flags, 1)
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_in_its_first_step_leaves_its_folder_to_the_next(small, tmp_path,
                                                                          monkeypatch, capsys):
    flags = ["--data", small / "people", *SMALL, "--out", tmp_path / "run", "--max-steps", 1]
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            here(patch, capsys, train, *flags)
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 0
    here(monkeypatch, capsys, train, *flags, "--seed", 7)
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert (last["step"], last["args"]["seed"]) == (1, 7)
    assert "already holds a run" in refusal(monkeypatch, capsys, flags, 1)


def test_an_image_that_cannot_be_read_is_named_and_replaced_by_the_next(small, tmp_path,
                                                                        monkeypatch, capsys):
    shutil.copytree(small / "people", tmp_path / "people")
    image = tmp_path / "people" / "train2017" / "000001.jpg"
    image.write_bytes(image.read_bytes()[:900])
    _, err = here(monkeypatch, capsys, train, "--data", tmp_path / "people", *SMALL, "--out",
                  tmp_path / "run", "--max-steps", 3, "--workers", 2)
    assert [line.split(" (")[0] for line in err.splitlines()] == [
        f"bad image: {image}: image file is truncated"]
    assert len(torch.load(tmp_path / "run" / "last.pt", weights_only=True)["bad"]) == 1

    flags = parse_args(["--data", str(tmp_path / "people"), "--image-size", "64"])
    fill_recipe(flags)
    train_set, val_set, *_ = open_data(flags, 0)
    train_set.augment = MOSAIC_HEAVY._replace(mosaic=0.0)
    broken, following = train_set[2, 1], train_set[2, 2]
    assert len(broken["bad"]) == 1 and not following["bad"]
    assert broken["image_id"] == following["image_id"]
    assert np.array_equal(broken["image"], following["image"])
    shutil.copy(image, tmp_path / "people" / "val2017" / "000001.jpg")  # none may stand in there
    with pytest.raises(DataError, match="val2017/000001.jpg: image file is truncated"):
        val_set[0, 1]
    shutil.rmtree(tmp_path / "people" / "train2017")
    with pytest.raises(DataError, match="No such file"):
        train_set[0, 0]


def test_too_many_bad_images_end_the_run(capsys):
    known = ["a.jpg: cut"]
    note_bad(known, 2, ["b.jpg: cut", "a.jpg: cut", "b.jpg: cut"], 0)
    assert known == ["a.jpg: cut", "b.jpg: cut"] and capsys.readouterr().err.count("bad image") == 1
    with pytest.raises(SystemExit, match="3 images cannot be read, more than --max-bad 2"):
        note_bad(known, 2, ["c.jpg: cut"], 0)


def test_every_recipe_value_says_where_it_came_from():
    args = parse_args(["--data", "x", "--model", "m", "--epochs", "300"])
    source = fill_recipe(args)
    assert (args.epochs, source["epochs"]) == (300, "flag")
    assert (args.lr, args.lr_batch, source["lr"]) == (2e-3, 384, "from scratch, untested")
    assert (args.augment, args.pose_weight, args.dfl_weight) == ("heavy", 10, 0.5)
    tuned = parse_args(["--data", "x", "--model", "m", "--weights", "w"])
    assert fill_recipe(tuned)["lr"] == "recipe m" and (tuned.lr, tuned.lr_batch) == (1e-4, 256)
    demo = parse_args([])
    assert fill_recipe(demo)["lr"] == "demo" and demo.image_size == DEMO["image_size"]
    assert {size: (row["lr"], row["lr_batch"], row["batch_size"]) for size, row in RECIPES.items()
            if size in "nsml"} == {"n": (2e-3, 480, 60), "s": (2e-3, 384, 48), "m": (1e-4, 256, 32),
                  "l": (8e-5, 192, 24)}


@pytest.mark.parametrize("size", "nsml")
def test_recipes_are_the_originals(size):
    row, large = RECIPES[size], size in "ml"
    want = {"dfl_weight": 0.5, "pose_weight": 10, "ema": "exp", "augment": "heavy"} if large else {
        "dfl_weight": 0.01, "pose_weight": 34, "ema": "threshold", "augment": "mosaic"}
    want |= {"ema_decay": 0.997, "weight_decay": 1e-6, "momentum": 0.9, "image_size": 640,
             "epochs": 1000, "patience": 100, "final_ratio": 0.05, "eval_every": 1}
    assert {name: row[name] for name in want} == want


def test_a_part_thaws_after_its_epochs_in_a_run(small, tmp_path, monkeypatch, capsys):
    """10 images in steps of 2: epoch 0 is steps 0 to 4."""
    flags = ["--data", small / "people", "--image-size", 64, "--batch-size", 2, "--epochs", 2,
             "--warmup", 0, "--workers", 0, "--freeze", "backbone:1", "--eval-every", 9]
    torch.manual_seed(0)
    first = YoloNasPose("n").state_dict()
    for steps, learns in ((5, False), (6, True)):
        here(monkeypatch, capsys, train, *(flags if steps == 5 else ["--resume"]), "--out",
             tmp_path / "run", "--max-steps", steps)
        now = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
        moved = {name.split(".")[0] for name in first if not torch.equal(first[name], now[name])}
        assert ("backbone" in moved) == learns and {"neck", "heads"} <= moved


@pytest.mark.parametrize("strength, base", [("heavy", MOSAIC_HEAVY), ("flip", FLIP)])
def test_augmentation_flags_change_one_number_of_the_strength(small, strength, base):
    """Where there was no zoom, turn or shift, there is a zoom and nothing else."""
    flags = ["--data", str(small / "people"), "--augment", strength, "--epochs", "20"]
    args = parse_args(flags)
    fill_recipe(args)
    assert open_data(args, 0)[0].augment == base
    args = parse_args([*flags, "--scale", "0.9", "--mosaic", "0.1", "--close-mosaic", "5"])
    fill_recipe(args)
    augment = open_data(args, 0)[0].augment
    assert augment == base._replace(mosaic=0.1, scale=(1 - 0.9, 1 + 0.9), last_mosaic=15,
                                    affine=augment.affine, degrees=augment.degrees,
                                    translate=augment.translate)
    args = parse_args([*flags, "--mosaic", "0", "--close-mosaic", "5"])
    fill_recipe(args)
    with pytest.raises(ValueError, match="--close-mosaic 5: no epoch of 20 has a mosaic"):
        open_data(args, 0)
    args.mosaic, args.close_mosaic = 0.1, 20
    with pytest.raises(ValueError, match="--close-mosaic 20: no epoch of 20 has a mosaic"):
        open_data(args, 0)
    args.resume = True  # with fewer epochs than before
    assert open_data(args, 0)[0].augment.last_mosaic == 0
    moves = augment.affine, augment.degrees, augment.translate
    assert moves == ((0.75, 7.0, 0.1) if strength == "heavy" else (1.0, 0.0, 0.0))


def test_a_frozen_part_keeps_every_bit_and_thaws():
    torch.manual_seed(0)
    model = YoloNasPose("n")
    flat, _ = flat_gradients([p for p in model.parameters() if p.requires_grad], extra=7)
    optimizer = make_optimizer("sgd", param_groups(model, 0.1, 0.1), 0.9)  # fused: whole groups
    ranges, moved = epochs_of("backbone:-1,bn:2"), []
    for epoch in range(4):  # of 4: norms are frozen in 0 and 1, the backbone in 3
        freeze(model, ranges, epoch, 4)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        flat.zero_()
        decode(model(torch.rand(2, 3, 64, 64))).keypoints.square().mean().backward()
        optimizer.step()
        moved.append({n for n, t in model.state_dict().items() if not torch.equal(t, before[n])})
        norms = {m.training for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}
        assert norms == ({False} if epoch < 2 else {True} if epoch == 2 else {True, False})
    stem = "backbone.stem.conv."
    assert stem + "branch_3x3.conv.weight" in moved[0] and stem + "post_bn.weight" not in moved[1]
    assert {stem + "post_bn.weight", stem + "post_bn.running_mean"} <= moved[2]
    assert moved[3] and not any(name.startswith("backbone") for name in moved[3])


@pytest.mark.parametrize("given, note, accumulate, batch", [
    ([], 2, 2, (2, 4)), (["batch_size"], 2, 2, (2, 4)), (["accumulate"], 2, 4, (2, 4)),
    (["batch_size", "accumulate"], 2, 2, (2, 4)), (["batch_size"], 8, 2, (4, 2)),
    (["batch_size"], None, 2, (4, 2))])
def test_after_short_memory_the_images_a_step_stay(tmp_path, given, note, accumulate, batch):
    """The note of a run whose memory 4 were too many for counts, also against flags, which a job's
    script repeats; not against fewer images than it allows."""
    if note:
        (tmp_path / "out_of_memory").write_text(str(note))
    args = Namespace(out=str(tmp_path), batch_size=4, accumulate=accumulate, auto_batch=False,
                     given=given, no_sync_bn=False, image_size=64, multi_scale=0, freeze={})
    assert cut_batch(args, {"global_batch": 8, "world_size": 1}, 1) == 8
    assert (args.batch_size, args.accumulate) == batch


def test_on_fewer_processes_a_given_micro_batch_is_the_limit_with_auto_batch_too(tmp_path):
    for given, batch in ((["batch_size"], (4, 8)), ([], (32, 1))):
        args = Namespace(out=str(tmp_path), batch_size=4, accumulate=1, auto_batch=True,
                         given=given, no_sync_bn=False, image_size=64, multi_scale=0,
                         freeze={})
        assert cut_batch(args, {"global_batch": 32, "world_size": 8}, 1) == 32
        assert (args.batch_size, args.accumulate) == batch


@pytest.mark.parametrize("before, after, synced, alone", [
    ((8, 60, 1), 1, (480, 1), (60, 8)), ((4, 60, 2), 2, (120, 2), (60, 4)),
    ((1, 60, 8), 8, (6, 10), (60, 1))])
def test_norms_see_as_many_images_on_other_numbers_of_processes(tmp_path, before, after, synced,
                                                                alone):
    """Of all processes, or, with --no-sync-bn, of each: (batch size, micro-batches)."""
    for no_sync_bn, batch in ((False, synced), (True, alone)):
        args = Namespace(out=str(tmp_path), batch_size=before[1], accumulate=before[2], given=[],
                         auto_batch=False, no_sync_bn=no_sync_bn, image_size=64, multi_scale=0,
                         freeze={})
        assert cut_batch(args, {"global_batch": 480, "world_size": before[0]}, after) == 480
        assert (args.batch_size, args.accumulate) == batch


@pytest.mark.parametrize("batch, processes, unsynced, size, gain, freeze, fine", [
    (1, 1, None, 32, 0, {}, False), (1, 2, None, 32, 0, {}, True), (1, 2, True, 32, 0, {}, False),
    (2, 1, None, 32, 0, {}, True), (1, 1, None, 64, 0.5, {}, False), (1, 1, None, 64, 0, {}, True),
    (1, 1, None, 32, 0, {"bn": 0}, True), (1, 1, None, 32, 0, {"bn": 2}, False)])
def test_a_norm_with_one_value_is_refused(batch, processes, unsynced, size, gain, freeze, fine):
    args = Namespace(batch_size=batch, accumulate=1, no_sync_bn=unsynced, image_size=size,
                     multi_scale=gain, freeze=freeze)
    if fine:
        assert cut_batch(args, None, processes) == batch * processes
    else:
        with pytest.raises(ValueError, match="leaves norms one value"):
            cut_batch(args, None, processes)


UNEVALUATED = {"best": [], "stopper": {"best_epoch": 0}}  # of a checkpoint


def test_a_run_whose_best_snapshots_are_gone_averages_those_there(tmp_path, capsys):
    torch.save({"format": "nanopose", "launch": "", "args": {}, "best": [[0.5, 2], [0.4, 1]],
                "stopper": {"best_epoch": 2}}, tmp_path / "last.pt")
    (tmp_path / "best_1.pt").touch()
    args = parse_args(["--out", str(tmp_path), "--resume"])
    assert train.read_run(args, 0, "")["best"] == [[0.4, 1]]
    said = capsys.readouterr().out
    assert "--average-best has 1 so far" in said and "best.pt is not in" in said
    (tmp_path / "best.pt").touch()
    (tmp_path / "best_2.pt").touch()
    assert len(train.read_run(args, 0, "")["best"]) == 2 and capsys.readouterr().out == ""


def test_a_restarted_node_has_the_flags_of_the_run_and_its_own_paths(tmp_path):
    """Its disk may differ from the disk of process 0, which wrote the checkpoint."""
    torch.save({"format": "nanopose", "launch": "a", **UNEVALUATED, "args": {
        "data": "/disk0/coco", "teacher": "/disk0/m.pt", "lr": 1.0}}, tmp_path / "last.pt")
    args = parse_args(["--out", str(tmp_path), "--data", "/disk1/coco", "--teacher", "/disk1/m.pt",
                       "--lr", "2"])  # a rate that a resumed run could not have
    train.read_run(args, 0, "a")
    assert (args.data, args.teacher, args.lr) == ("/disk1/coco", "/disk1/m.pt", 1)


@pytest.mark.parametrize("given, paths", [
    (["--train-images", "b/"], ["a.json", "b/", "v.json", "v/"]),
    (["--data", "coco"], [None, None, None, None])])
def test_a_resumed_run_keeps_the_paths_that_have_not_moved(tmp_path, given, paths):
    names = ("train_json", "train_images", "val_json", "val_images")
    torch.save({"format": "nanopose", "launch": "", **UNEVALUATED, "args": {
        "data": None, **dict(zip(names, ("a.json", "a/", "v.json", "v/")))}}, tmp_path / "last.pt")
    args = parse_args(["--out", str(tmp_path), "--resume", *given])
    train.read_run(args, 0, "")
    assert [getattr(args, name) for name in names] == paths
    assert args.data == dict(zip(*[iter(given)] * 2)).get("--data")


def test_a_resumed_run_has_the_loader_processes_asked_for_or_this_machine_s(tmp_path):
    for given, flags, workers in (([], [], None), (["workers"], [], 3),
                                  (["workers"], ["--workers", "1"], 1)):
        torch.save({"format": "nanopose", "launch": "", **UNEVALUATED, "args": {
            "workers": 3, "given": given}}, tmp_path / "last.pt")
        args = parse_args(["--out", str(tmp_path), "--resume", *flags])
        train.read_run(args, 0, "")
        assert args.workers == workers and ("workers" in args.given) == bool(given)


@pytest.mark.parametrize("flags, message", [
    (["--teacher", "t.pt"], "--teacher t.pt differs from the None of the run"),
    (["--distill-weight", "2"], "--distill-weight 2.0 differs from the 1.0 of the run"),
    (["--lr-mult", "mask=2"], "--lr-mult {'mask': 2.0} differs from the None of the run")])
def test_a_resumed_run_does_not_change_its_terms(tmp_path, flags, message):
    torch.save({"format": "nanopose", "launch": "", **UNEVALUATED, "args": {
        "teacher": None, "distill_weight": 1.0}}, tmp_path / "last.pt")
    args = parse_args(["--out", str(tmp_path), "--resume", *flags])
    with pytest.raises(ValueError, match=message):
        train.read_run(args, 0, "")


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("cuDNN: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: out of memory"), RuntimeError("Cuda failure 2 'out of memory'"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    RuntimeError("GET was unable to find an engine to execute this computation")])
def test_want_of_memory_is_known_whoever_says_so(error, tmp_path, monkeypatch, capsys):
    """By its note, its advice and the error's own words; others go on as they are."""
    args = parse_args(["--batch-size", "9", "--out", str(tmp_path)])
    fill_recipe(args)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="1"):
        out_of_memory(args, error)
    said = capsys.readouterr().err
    assert "go on with 4" in said and str(error) in said
    assert (tmp_path / "out_of_memory").read_text() == "4"
    with pytest.raises(RuntimeError, match="shape"):
        out_of_memory(args, RuntimeError("shape '[2]' is invalid"))


def test_every_flag_has_a_default_and_is_of_its_kind():
    """The printed plan says the source of every value; a flag that is not given is its default."""
    args = parse_args(["--data", "x", "--freeze", "bn", "--lr-mult", "backbone=0.1,neck=0.5"])
    assert args.given == ["data", "freeze", "lr_mult"]
    source = fill_recipe(args)
    assert (args.freeze, args.lr_mult) == ({"bn": 0}, {"backbone": 0.1, "neck": 0.5})
    assert source["freeze"] == "flag" and source["clip_norm"] == "default"
    assert source["lr"] == "recipe n" and source["workers"] == "machine"
    assert source.keys() | {"given"} == vars(args).keys()


def test_a_dry_run_draws_and_trains_twenty_steps_and_leaves_no_run(small, monkeypatch, capsys):
    said, _ = here(monkeypatch, capsys, train, "--data", small / "people", "--out", small / "dry",
                   "--dry-run", "--image-size", "64", "--batch-size", "4", "--epochs", "30",
                   "--warmup", "3e", "--cache", "disk")
    for part in ("labeled       nose 100%", "box sides", "step 20/75", "img/s", "ETA"):
        assert part in said
    for use, set_ in ("to train on", "train"), ("to evaluate", "val"):
        labels = read_json(small / "people" / "annotations" / f"person_keypoints_{set_}2017.json")
        people = sum(ann["num_keypoints"] > 0 for ann in labels["annotations"])
        assert f"{use:14}{people} people labeled, 0 without" in said
    assert "  AP " not in said  # 20 steps complete 8 epochs
    assert sorted(p.name for p in (small / "dry").rglob("*")) == [
        "dry_run", "first_batch.jpg", "lock", "lr.svg", "momentum.svg"]
    assert not list((small / "people").glob("*.cache"))


def test_the_best_averages_are_averaged_and_asked_for_epochs_kept(small, tmp_path, monkeypatch,
                                                                  capsys):
    here(monkeypatch, capsys, train, "--data", small / "people", "--out", tmp_path, *SMALL,
         "--average-best", 2, "--save-epochs", "2,3", "--multi-scale", "0.5", "--patience", "9",
         "--max-steps", 7)
    said, _ = here(monkeypatch, capsys, train, "--out", tmp_path, "--resume", "--max-steps", 8)
    assert "average of 2  AP" in said
    lines = [line for line in log_lines(tmp_path) if "AP" in line]
    assert [line.get("epoch") for line in lines] == [1, 2, 3, None]
    ranked = sorted(((line["AP"] if line["AP"] > 0.001 else line["OKS"] - 1, line["epoch"])
                     for line in lines[:3]), reverse=True)
    kept = sorted(f"best_{epoch}.pt" for _, epoch in ranked[:2])
    assert {p.name for p in tmp_path.glob("best_*.pt")} >= set(kept)
    states = [torch.load(tmp_path / name, weights_only=True)["model"] for name in kept]
    average = torch.load(tmp_path / "average.pt", weights_only=True)
    for name, mean in average["model"].items():
        want = (states[0][name] + states[1][name]) / 2 if mean.is_floating_point() else mean
        assert torch.allclose(mean, want), name
    assert average["AP"] == lines[3]["AP"]
    assert torch.load(tmp_path / "epoch_2.pt", weights_only=True)["step"] == 5
    kept, last = (torch.load(tmp_path / name, weights_only=True) for name in ("epoch_3.pt",
                                                                              "last.pt"))
    assert all(torch.equal(t, last["ema"][name]) for name, t in kept["model"].items())
    model, _ = load_model(str(tmp_path / "average.pt"))
    assert not model.training


def test_a_run_in_a_used_folder_begins_its_own_log_and_keeps_to_its_images(small, tmp_path,
                                                                            monkeypatch, capsys):
    """Steps of 20 of 10 images complete epochs 2, 4, 6: evaluations are due at 3, and at 6."""
    shutil.copytree(small / "people", tmp_path / "people")
    (tmp_path / "run").mkdir()
    for name in ("log.jsonl", "out_of_memory"):
        (tmp_path / "run" / name).write_text("1")
    flags = ("--out", tmp_path / "run", "--batch-size", 20, "--epochs", 6, "--warmup", 1,
             "--image-size", 64, "--workers", 0, "--eval-every", 3, "--log-every", 1)
    here(monkeypatch, capsys, train, "--data", tmp_path / "people", *flags, "--max-steps", 2)
    assert [line.get("epoch") for line in log_lines(tmp_path / "run") if "AP" in line] == [4]
    assert not (tmp_path / "run" / "out_of_memory").exists()
    for split, use in ("train", "train on"), ("val", "evaluate"):
        path = tmp_path / f"people/annotations/person_keypoints_{split}2017.json"
        text = path.read_text()
        labels = json.loads(text)
        first = labels["images"].pop()["id"]
        labels["annotations"] = [a for a in labels["annotations"] if a["image_id"] != first]
        path.write_text(json.dumps(labels))
        with pytest.raises(SystemExit, match=f"not the labels to {use} of the run"):
            here(monkeypatch, capsys, train, "--out", tmp_path / "run", "--resume")
        path.write_text(text)
    said, _ = here(monkeypatch, capsys, train, "--out", tmp_path / "run", "--resume")
    assert "done at step 3 of 3" in said
    assert [line.get("epoch") for line in log_lines(tmp_path / "run") if "AP" in line] == [4, 6]
    stopper = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["stopper"]
    assert stopper["best_epoch"] in (4, 6)


def test_a_mean_of_files_by_hand(tmp_path):
    for i, values in enumerate(([1.0, 2.0], [3.0, 6.0])):
        torch.save({"model": {"w": torch.tensor(values), "n": torch.tensor(5 + i)}},
                   tmp_path / f"{i}.pt")
    mean = mean_of([str(tmp_path / "0.pt"), str(tmp_path / "1.pt")])
    assert mean["w"].tolist() == [2.0, 4.0] and mean["n"] == 6


def test_a_teacher_and_a_mask_branch_train_and_stay_out_of_the_way(small, tmp_path, monkeypatch,
                                                                   capsys):
    """Five more terms in the log; the checkpoint holds a mask branch and no teacher, which may lie
    elsewhere later, but not be another one."""
    again = "--out", tmp_path / "run", "--resume", "--teacher"
    here(monkeypatch, capsys, train, "--data", small / "people", "--out", tmp_path / "run", *SMALL,
         "--mask", "--teacher", small / "run" / "best.pt", "--max-steps", 2)
    with pytest.raises(SystemExit, match="not the teacher of the run"):
        here(monkeypatch, capsys, train, *again, tmp_path / "run" / "last.pt", "--max-steps", 3)
    shutil.copy(small / "run" / "best.pt", tmp_path / "copy.pt")
    here(monkeypatch, capsys, train, *again, tmp_path / "copy.pt", "--max-steps", 3)
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert not any("teacher" in name for name in last["model"])
    lines = log_lines(tmp_path / "run")
    assert {"mask", "kd_cls", "kd_box", "kd_pose"} < lines[0].keys() and "mask_IoU" in lines[-1]
    said, _ = here(monkeypatch, capsys, evaluate, "--data", small / "people", "--weights",
                   tmp_path / "run/last.pt", "--workers", 0)
    assert f"mask_IoU   {lines[-1]['mask_IoU']:.4f}" in said


def test_micro_batches_of_unequal_size_are_one_batch(small):
    """Three images and one against four, norms frozen, which would see other images."""
    flags = parse_args(["--data", str(small / "people"), "--image-size", "64"])
    fill_recipe(flags)
    data, gradients = open_data(flags, 0)[0], []
    for cut in ([range(4)], [range(3), range(3, 4)]):
        torch.manual_seed(0)
        model = YoloNasPose("n").double().eval()
        flat = flat_gradients([p for p in model.parameters() if p.requires_grad], len(TERMS) + 3)
        optimizer = make_optimizer("adamw", param_groups(model, 1e-3, 0.0), 0.9)
        flags.accumulate = len(cut)
        train_step(model, None, PoseLoss(torch.tensor(data.skeleton.sigmas)),
                   iter([collate([data[0, i] for i in part]) for part in cut]), optimizer,
                   torch.amp.GradScaler("cpu", enabled=False), flat, flags, 64, 4.0, False)
        gradients.append(flat[0].clone())
    assert torch.dist(*gradients) <= 1e-12 * gradients[0].norm()


def test_a_compiled_network_is_traced_anew_when_a_part_freezes_or_thaws(monkeypatch):
    times = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: times.append(epoch))
    model = YoloNasPose("n")
    flat_gradients([p for p in model.parameters() if p.requires_grad], 1)
    for epoch in range(5):
        freeze(model, {"backbone": 1, "neck": -2, "bn": 0}, epoch, 5, compiled=True)
        freeze(model, {"backbone": 1, "neck": -2, "bn": 0}, epoch, 5, compiled=True)
    assert times == [0, 1, 3]
    freeze(model, {}, epoch, 5)
    assert times == [0, 1, 3]  # without --compile, nothing is traced


@pytest.mark.long
def test_a_compiled_backbone_learns_once_it_thaws():
    """With all norms frozen, torch 2.6 would go on with the graph of the frozen backbone."""
    model = YoloNasPose("n")
    flat, _ = flat_gradients([p for p in model.parameters() if p.requires_grad], 1)
    model.compile(fullgraph=True, backend="aot_eager")
    for epoch in (0, 1):
        freeze(model, {"backbone": 1, "bn": 0}, epoch, 2, compiled=True)
        flat.zero_()
        out = model(torch.rand(1, 3, 64, 64))
        (out.box_logits.square().mean() + out.kpt_offsets.square().mean()).backward()
        moved = [p.piece.any() for p in model.backbone.parameters() if hasattr(p, "piece")]
        assert any(moved) == bool(epoch)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compiled_training_is_eager_training(dtype, tmp_path):
    """The first gradient in float64, as a new network's moves by 1e-2 with the rounding of float32
    norms; and in both the losses of 20 steps of the recipe."""
    draw_dataset(str(tmp_path / "people"), train=8, val=1, side=128)
    flags = parse_args(["--data", str(tmp_path / "people"), "--image-size", "128"])
    fill_recipe(flags)
    data, *_ = open_data(flags, 0)
    batches = [collate([data[0, i] for i in half]) for half in (range(4), range(4, 8))]
    gradients, losses = [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = YoloNasPose("n").to(dtype, memory_format=torch.channels_last)
        parameters = [p for p in model.parameters() if p.requires_grad]
        flat = flat_gradients(parameters, len(TERMS) + 3)
        optimizer = torch.optim.AdamW(parameters, lr=2e-3 * 4 / 480)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        if compiled:
            model.compile(fullgraph=True)
        losses.append([])
        for step in range(20):
            done = train_step(model, None, PoseLoss(torch.tensor(data.skeleton.sigmas)),
                              iter([batches[step % 2]]), optimizer, scaler, flat, flags, 128, 4.0,
                              False)
            losses[-1].append(sum(done.sums[1:]) / done.sums[0])
            if step == 0:
                gradients.append(flat[0].clone())
    difference = torch.dist(*gradients) / gradients[0].norm()
    print(dtype, "gradient", difference.item(), "losses", losses)
    assert difference <= 1e-4 or dtype == torch.float32
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-2)
    assert losses[0][-1] < losses[0][0]
