"""What goes wrong on other people's machines, and files full of noise: one line, nothing lost."""
import argparse
import errno
import fcntl
import io
import json
import math
import multiprocessing
import os
import pty
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data import (COCO_NAMES, MOSAIC, MOSAIC_HEAVY, PAD_MODES, UNREADABLE, CocoPose, DataError,
                  collate, flatten, open_image, read_json, read_skeleton)
from evaluate import load_model, numbers
from loss import PoseLoss
from model import YoloNasPose, decode, load_weights, write_atomically
from people import draw_dataset
from schedule import param_groups
from test_distributed import FLAGS, ROOT, checkpoint, run_here, same_run

JUNK = [None, -1, 0, 3, 0.5, "x", "", [], {}, [[]], True, math.nan, math.inf, -1e30, 1e308, 2**70,
        [1, 2], {"id": 1}, "../../x", 10**400]
MODES = ["RGB", "L", "CMYK", "P", "RGBA", "LA", "1", "I;16", "F"]
VALUES = {int: "-1 0 1 2 3 100 2147483648 9223372036854775808 1.5 x",
          float: "nan inf -inf 1e-300 1e300 0 0.05 0.5 1 1.5 -0.1 x",
          str: "nowhere 0 2 auto 3e nane 1e400 a:b left_eye:right_eye", numbers: "1 1,2 , 1,,2 nan",
          train.factors: "backbone=0.1 neck=nan heads=-1 mask=2 x=1 = backbone=0,neck=0,heads=0",
          train.epochs_of: "bn neck backbone:1 bn:-1 bn:0 x : backbone:-1,neck,bn"}
FEW = "-1 0 1 2"  # for what takes its time if there are many


# ---- noise ----

def random_set(folder: Path, rng: np.random.Generator) -> dict:
    """Images of any shape and kind, and people anywhere: on, beside and around them."""
    k, images, annotations = int(rng.integers(1, 6)), [], []
    for i in range(int(rng.integers(1, 5))):
        width, height = (int(2 ** rng.uniform(0, 8)) for _ in "wh")
        pixels = rng.integers(256, size=(height, width, 3), dtype=np.uint8)
        mode = MODES[rng.integers(len(MODES))]
        suffix = {"CMYK": "jpg", "F": "tiff"}.get(mode, "png")
        image = Image.fromarray(pixels)
        image = image.convert("L").convert("I").convert("I;16") if mode == "I;16" else \
            image.convert(mode)
        image.save(folder / f"{i}.{suffix}")
        if rng.random() < 0.05:
            os.truncate(folder / f"{i}.{suffix}", int(rng.integers(100)))
        images.append({"id": i, "file_name": f"{i}.{suffix}", "width": width, "height": height})
        for _ in range(int(rng.integers(0, 6))):
            box = rng.normal(0.3, 0.5, 4) * [width, height, width, height]
            box[2:] = np.abs(box[2:]) * rng.integers(0, 2)
            points = np.column_stack([rng.normal(0.5, 0.5, (k, 2)) * [width, height],
                                      rng.integers(0, 3, k) * bool(box[2:].all())])
            shape = (rng.random(8) * height).tolist()
            annotations.append({"id": len(annotations), "image_id": i, "bbox": box.tolist(),
                                "keypoints": points.ravel().tolist(), "segmentation": [shape],
                                "iscrowd": int(rng.random() < 0.1)})
    return {"images": images, "annotations": annotations, "categories": [
        {"id": 1, "name": "person", "keypoints": [f"left_{i}" for i in range(k)]}]}


def spoil(coco: dict, rng: np.random.Generator) -> None:
    """Put something that does not belong there somewhere into the json, or take something out."""
    place = coco
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        if not keys:
            return
        key = keys[rng.integers(len(keys))]
        if isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.8:
            place = place[key]
        elif rng.random() < 0.2:
            del place[key]
            return
        else:
            place[key] = JUNK[rng.integers(len(JUNK))]
            return


@pytest.mark.parametrize("seed", range(int(os.environ.get("FUZZ", 40))))
def test_any_labels_train_or_are_refused_by_name(tmp_path, seed):
    """Random sets, half of them spoilt, through reading, augmentation, loss and a step of AdamW."""
    rng = np.random.default_rng(seed)
    coco = random_set(tmp_path, rng)
    if seed % 2:
        spoil(coco, rng)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(coco))
    try:
        coco = read_json(str(path))
        annotations = flatten(coco, masks=bool(seed % 3))
        skeleton = read_skeleton(coco, "")
    except ValueError as error:
        assert seed % 2 or "no annotation has a segmentation" in str(error)
        assert 0 < len(str(error)) < 400 and "\n" not in str(error)
        return
    augment = (MOSAIC, MOSAIC_HEAVY)[seed % 2]._replace(mixup=0.5, occlude=0.5, rotate90=0.5)
    dataset = CocoPose(annotations, str(tmp_path), skeleton, 64, PAD_MODES[seed % 2], augment, seed,
                       spare=len(coco["images"]))
    try:
        images, targets = collate([dataset[epoch, i % len(dataset)] for epoch in (0, 1)
                                   for i in range(2)])
    except DataError as error:  # no image at all can be read
        assert str(tmp_path) in str(error)
        return
    torch.manual_seed(seed)
    k = len(skeleton.names)
    model = YoloNasPose("n", k, mask="mask" in targets)
    optimizer = torch.optim.AdamW(param_groups(model, 1e-3, 1e-5))
    raw = model(images.float() / 255)
    terms, scores = PoseLoss(torch.full((k,), 0.07))(raw, decode(raw), targets)
    (sum(terms.values()) / scores.clamp(min=1)).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.state_dict().values())


def spoilt_bytes(good: bytes, rng: np.random.Generator) -> bytes:
    """Noise, nothing, a part of the file, or the file with some bytes changed."""
    kind = rng.integers(5)
    if kind == 0:
        return rng.bytes(int(rng.integers(2000)))
    if kind == 1:
        return good[:int(rng.integers(len(good)))]
    if kind == 2:
        return good[int(rng.integers(len(good))):]
    changed = bytearray(good)
    for _ in range(int(rng.integers(1, 20)) if kind == 3 else len(good) // 50):
        changed[rng.integers(min(len(good), 4000) if kind == 3 else len(good))] = rng.integers(256)
    return bytes(changed)


@pytest.fixture(scope="module")
def small_checkpoint() -> bytes:
    """A file as train.py writes it, but of three tensors."""
    file = io.BytesIO()
    state = {name: torch.rand(3, 4) for name in ("a", "b", "heads.head1.pose_pred.bias")}
    torch.save({"format": "nanopose", "args": {"model": "n"}, "model": state, "bad": []}, file)
    return file.getvalue()


def test_noise_in_a_checkpoint_is_refused_by_name(tmp_path, small_checkpoint, capsys):
    model, last = YoloNasPose("n"), tmp_path / "last.pt"
    for seed in range(int(os.environ.get("FUZZ", 150))):
        last.write_bytes(spoilt_bytes(small_checkpoint, np.random.default_rng(seed)))
        for read in (load_model, lambda path: load_weights(model, path)):
            with pytest.raises(ValueError, match="last.pt"):
                read(str(last))
        found = train.load_last(str(tmp_path))
        assert found is None or isinstance(found, dict)
        last.unlink(missing_ok=True)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_noise_in_an_image_is_one_named_error(tmp_path, suffix):
    path, outcomes = tmp_path / f"x.{suffix}", {True: 0, False: 0}
    Image.fromarray(np.random.default_rng(0).integers(256, size=(90, 70, 3), dtype=np.uint8)
                    ).save(path)
    good = path.read_bytes()
    assert open_image(str(path), 70, 90, 0.4)[0].shape == (3, 45, 35)
    for seed in range(int(os.environ.get("FUZZ", 200))):
        path.write_bytes(spoilt_bytes(good, np.random.default_rng(seed)))
        try:
            pixels, _ = open_image(str(path), 70, 90, 0.4)
            outcomes[len(pixels) == 3] += 1
        except UNREADABLE:
            outcomes[False] += 1
    assert outcomes[False] > outcomes[True]


def test_noise_in_a_json_is_one_named_error(tmp_path):
    path = tmp_path / "x.json"
    good = json.dumps(random_set(tmp_path, np.random.default_rng(3))).encode()
    path.write_bytes(good)
    coco = read_json(str(path))
    assert len(flatten(coco).ids) and read_skeleton(coco).names  # without noise nothing is wrong
    for seed in range(int(os.environ.get("FUZZ", 300))):
        path.write_bytes(spoilt_bytes(good, np.random.default_rng(seed)))
        try:
            coco = read_json(str(path))
            flatten(coco), read_skeleton(coco)
        except ValueError as error:
            assert "\n" not in str(error)


def png_of(width: int, height: int) -> bytes:
    """A file that claims to be that large and holds nothing."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(
            ">I", zlib.crc32(kind + content))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(
        ">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["animated", "long", "bomb", "empty"])
def test_odd_images_train_or_are_named(tmp_path, kind):
    """An animation shows its first picture; 20,000 x 30 px fit; a bomb is not unpacked."""
    width, height = {"long": (20_000, 30), "bomb": (40_000, 40_000)}.get(kind, (60, 40))
    path = tmp_path / "x.gif" if kind == "animated" else tmp_path / "x.png"
    if kind == "animated":
        first, second = (Image.new("RGB", (60, 40), color) for color in ("red", "blue"))
        first.save(path, save_all=True, append_images=[second])
    elif kind == "long":
        Image.new("RGB", (width, height), "red").save(path)
    else:
        path.write_bytes(png_of(width, height) if kind == "bomb" else b"")
    coco = {"images": [{"id": 1, "file_name": path.name, "width": width, "height": height}],
            "annotations": [], "categories": [{"id": 1, "name": "person", "keypoints": ["a"]}]}
    size = 640 if kind == "long" else 64  # where 30 of 20,000 px are nearly a row
    dataset = CocoPose(flatten(coco), str(tmp_path), read_skeleton(coco), size, "center")
    if kind in ("animated", "long"):
        red, green, blue = dataset[0, 0]["image"][(size - 1) // 2, size // 2].astype(int)
        assert red - blue > 50 and abs(green - blue) < 50
    else:
        with pytest.raises(DataError, match="x.png: "):
            dataset[0, 0]


# ---- the machine ----

@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw_dataset(str(folder / "people"), train=12, val=4, side=64)
    return folder / "people"


def flags_for(data: Path, out: Path, *more) -> list:
    return ["--data", data, "--out", out, *FLAGS, "--batch-size", "2", "--save-every", "1",
            "--eval-every", "9", *more]


@pytest.mark.parametrize("seed", range(int(os.environ.get("FUZZ", 40)) // 4))
def test_any_flags_train_or_are_refused_by_name(data, tmp_path, capsys, seed):
    """One to five flags with random values: two steps whose weights are finite, or one line."""
    rng = np.random.default_rng(seed)
    given = ["--image-size", 32, "--batch-size", 2, "--workers", 0, "--epochs", 2, "--max-steps", 2]
    rows = [row for group in train.FLAGS.values() for row in group if row[0] not in (
        "data", "out", "model", "cache", "compile", "deterministic", "image-size")]
    for i in rng.choice(len(rows), rng.integers(1, 6), replace=False):
        name, kind, *_ = rows[i]
        few = name in ("batch-size", "accumulate", "workers", "epochs")
        values = kind if isinstance(kind, tuple) else (FEW if few else VALUES.get(kind, "")).split()
        given += [f"--{name}" + (f"={rng.choice(values)}" if values else "")]
    try:
        run_here("--data", data, "--out", tmp_path / "run", *given)
    except SystemExit as stopped:
        said = stopped.code if stopped.code != 2 else capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("train.py: ") and "\n" not in said and len(said) < 600
    for path in tmp_path.glob("run/*.pt"):
        assert all(t.isfinite().all() for t in checkpoint(path.parent, path.name)["model"].values())


def test_a_folder_that_is_removed_while_it_trains_is_named(data, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(SystemExit, match="No such file.*run/.*mend what it names") as stopped:
        run_here(*flags_for(data, out, "--epochs", 2, "--workers", 0), after=1,
                 then=lambda: shutil.rmtree(out))
    assert "\n" not in str(stopped.value)


def test_a_full_disk_a_dead_loader_and_a_closed_terminal_lose_nothing(data, tmp_path, capsys):
    """Each ends the run, in one line where it can be seen; it goes on to an unbroken run's bits."""
    out = tmp_path / "run"
    most, room = resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(SystemExit, match="last.pt.*make room") as stopped:
            run_here(*flags_for(data, out, "--epochs", 2, "--workers", 0), after=2,
                     then=lambda: resource.setrlimit(most, (5 << 20, room[1])))
    finally:
        resource.setrlimit(most, room)
    assert "File too large" in str(stopped.value) and "\n" not in str(stopped.value)
    assert not list(out.glob("*.tmp")) and checkpoint(out)["step"] == 1

    others = multiprocessing.active_children()
    with pytest.raises(SystemExit, match="DataLoader worker.*--workers") as stopped:
        run_here("--out", out, "--resume", "--workers", 1, after=3, then=lambda: [
            loader.kill() for loader in multiprocessing.active_children() if loader not in others])
    assert "\n" not in str(stopped.value)

    def in_a_terminal():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    before, (terminal, inside) = checkpoint(out)["step"], pty.openpty()
    run = subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--out", str(out), "--resume"],
                           stdin=inside, stdout=inside, stderr=inside, start_new_session=True,
                           preexec_fn=in_a_terminal)
    os.close(inside)
    said = b""
    while b"step %d/" % (before + 2) not in said:
        said += os.read(terminal, 1000)
    os.killpg(run.pid, signal.SIGHUP)  # as a shell does, to loader processes, too
    os.close(terminal)  # the system sends SIGHUP, and what the run says from now on is an error
    assert run.wait(timeout=60) == 128 + signal.SIGHUP and checkpoint(out)["step"] >= before + 2
    run_here("--out", out, "--resume", "--save-every", 99)
    run_here(*flags_for(data, tmp_path / "whole", "--epochs", 2, "--save-every", 99))
    assert capsys.readouterr().err == ""
    same_run(tmp_path / "whole", out)


def test_a_loader_that_dies_while_a_file_is_written_is_named(tmp_path, monkeypatch):
    """torch.save then ends with an error of its own, about the file."""
    class Dies(io.FileIO):
        def write(self, content):
            if self.tell() > 100:  # torch's handler of the signal that a child ended
                raise RuntimeError("DataLoader worker (pid 7) is killed")
            return super().write(content)
    monkeypatch.setattr("model.open", lambda path, mode: Dies(path, "w"), raising=False)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        write_atomically(str(tmp_path / "last.pt"), {"a": torch.ones(999)})
    assert not os.listdir(tmp_path)


def test_a_taken_port_is_said_in_one_line(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1]),
                 "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        for name, value in where.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match="is the port taken"):
            train.setup_distributed(train.parse_args([]))


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_would_each_train_alone_are_refused(name, monkeypatch):
    """srun or mpirun without torchrun, or a job that names no local rank."""
    monkeypatch.setenv(name, "1")
    assert train.setup_distributed(train.parse_args([]))[:2] == (0, 1)
    monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match=f"{name} is 2, but LOCAL_RANK is not set.*torchrun"):
        train.setup_distributed(train.parse_args([]))


def test_a_local_rank_alone_is_no_launcher(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    for name in "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT":
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="but not MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE;"):
        train.setup_distributed(train.parse_args([]))


@pytest.mark.parametrize("change, said", [
    (["--eval-every", "2"], "--eval-every: 2 in process 1 on .*, 3 on"),
    (["--dry-run"], "--dry-run: True in process 1 on .*, None on"),
    (["--train-json", "d"], "--data: False in process 1 on"), ("torch", "torch: 1.0 in process 1"),
    (["--out", "x", "--data", "y", "--workers", "3", "--weights", "z"], None)])
def test_machines_that_are_started_in_another_way_are_refused(monkeypatch, change, said):
    """Paths and what does not touch the model may differ; what these hold is compared later."""
    files = ["--train-images", "d", "--val-json", "d", "--val-images", "d"]
    here = train.parse_args(["--eval-every", "3", "--out", "here", "--data", "here"])
    there = train.parse_args(["--eval-every", "3", "--out", "there", *(
        files if "--train-json" in change else ["--data", "there"]), *(
            change if isinstance(change, list) else [])])
    where = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "0"}
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    for name in ("TCPStore", "init_process_group", "PrefixStore"):
        monkeypatch.setattr(torch.distributed, name, lambda *given, **how: Store())
    monkeypatch.setattr(train, "name_of_start", lambda *given: "")
    seen = []
    monkeypatch.setattr(train, "gather", lambda mine: seen.append(mine) or [mine])
    with monkeypatch.context() as other:
        if change == "torch":
            other.setattr(torch, "__version__", "1.0")
        train.setup_distributed(there)
    monkeypatch.setattr(train, "gather", lambda mine: [mine, seen[0]])
    if said is None:
        assert train.setup_distributed(here)[3] == "launch"
    else:
        with pytest.raises(ValueError, match=said):
            train.setup_distributed(here)


class Store:
    """What setup_distributed asks of torch's."""

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        return key.encode()


def test_first_weights_are_those_of_process_0(monkeypatch):
    """Whatever another machine drew, or has in its file."""
    first = YoloNasPose("n").state_dict()
    monkeypatch.setattr(train, "from_rank_0", lambda mine: first)
    args = train.parse_args([])
    train.fill_recipe(args)
    skeleton = read_skeleton({"categories": [{"keypoints": COCO_NAMES}]})
    model, *_ = train.make_model(args, skeleton, torch.device("cpu"), {})
    assert all(torch.equal(first[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("change", ["keypoints", "labels to train on", "labels to evaluate",
                                    "teacher"])
def test_machines_whose_files_differ_are_refused(data, tmp_path, monkeypatch, change):
    """Of the same names and sizes: sigmas of the category, a box, a weight."""
    def at(folder: Path, changed: bool) -> argparse.Namespace:
        folder.mkdir()
        shutil.copytree(data, folder / "people")
        for split in "train", "val":
            path = folder / f"people/annotations/person_keypoints_{split}2017.json"
            labels = json.loads(path.read_text())
            if changed and change == "keypoints":
                labels["categories"][0]["sigmas"] = 17 * [0.1]
            if changed and change[10:] == {"train": "train on", "val": "evaluate"}[split]:
                labels["annotations"][0]["bbox"][2] += 1
            path.write_text(json.dumps(labels))
        torch.manual_seed(0)
        model = YoloNasPose("n")
        with torch.no_grad():
            model.neck.neck1.conv.bn.bias += changed and change == "teacher"
        torch.save({"format": "nanopose", "args": {"model": "n"}, "skeleton": {
            "names": COCO_NAMES}, "model": model.state_dict()}, folder / "teacher.pt")
        args = train.parse_args(["--data", str(folder / "people"), "--teacher",
                                 str(folder / "teacher.pt")])
        train.fill_recipe(args)
        return args

    def start(args: argparse.Namespace) -> None:
        train_set, _, _, contents = train.open_data(args, 0)
        train.make_model(args, train_set.skeleton, torch.device("cpu"), contents)
    seen = []
    monkeypatch.setattr(train, "gather", lambda mine: seen.append(mine) or [mine])
    start(at(tmp_path / "there", True))
    other = iter(seen)
    monkeypatch.setattr(train, "gather", lambda mine: [mine, next(other)])
    with pytest.raises(ValueError, match=f"^{change}: .* in process 1"):
        start(at(tmp_path / "here", False))


def test_a_folder_that_cannot_be_locked_is_used_and_said(tmp_path, monkeypatch, capsys):
    def lockf(*given):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "lockf", lockf)
    train.lock(str(tmp_path), new=True)
    assert "cannot be locked (No locks available): start no second" in capsys.readouterr().out


def test_a_machine_that_does_not_see_the_runs_folder_is_named(tmp_path, monkeypatch, capsys):
    """Restarted there, process 0 would find no checkpoint."""
    train.lock(str(tmp_path / "run"), new=True)
    for there in True, False:
        monkeypatch.setattr(train, "gather", lambda mine: [mine, ("far", there)])
        train.check_shared(str(tmp_path / "run"), 0)
        assert ("far does not see this --out" in capsys.readouterr().out) != there
    monkeypatch.setattr(train, "gather", lambda mine: [("near", True), mine])
    train.check_shared(str(tmp_path / "elsewhere"), 1)
    assert capsys.readouterr().out == ""  # process 0 says it


def test_a_disk_that_does_not_answer_is_not_a_damaged_checkpoint(tmp_path, monkeypatch):
    torch.save({"format": "nanopose"}, tmp_path / "last.pt")

    def load(*given, **how):
        raise OSError(errno.ESTALE, "Stale file handle")
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(OSError, match="Stale file handle"):
        train.load_last(str(tmp_path))
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(tmp_path, monkeypatch, capsys):
    (tmp_path / "log.jsonl").touch()
    (tmp_path / "last.pt").write_bytes(b"noise")
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path), "--data", "nowhere"])
    with pytest.raises(SystemExit, match="held a run, whose checkpoints are damaged"):
        train.main()
    assert sorted(os.listdir(tmp_path)) == ["last.pt.damaged", "log.jsonl"]


class Evil:
    def __reduce__(self):
        return os.system, ("touch EVIL",)


def test_pickled_code_in_a_checkpoint_never_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "nanopose", "model": Evil()}, "last.pt")
    with pytest.raises(ValueError, match="last.pt is damaged, or no checkpoint of plain tensors"):
        load_model("last.pt")
    assert train.load_last(".") is None and "damaged" in capsys.readouterr().out
    assert os.listdir() == ["last.pt.damaged"]


def test_a_clock_that_goes_back_does_no_harm(data, tmp_path, monkeypatch):
    hours = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: 3600.0 * next(hours))
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags_for(
        data, tmp_path / "run", "--epochs", 1, "--workers", 0, "--max-steps", 3))])
    train.main()
    rates = [json.loads(line)["img_s"] for line in (tmp_path / "run" / "log.jsonl").open()]
    assert len(rates) == 3 and min(rates) > 0


def test_a_tensor_that_differs_between_processes_is_named(monkeypatch):
    other, found = torch.nn.BatchNorm2d(2), []
    with torch.no_grad():
        other.bias += torch.tensor([1.0, -1.0])
    for norm in other, torch.nn.BatchNorm2d(2):
        norm.register_buffer("odd", torch.ones(3, dtype=torch.bool))
        monkeypatch.setattr(train, "gather", lambda mine: [*found, found.append(mine) or mine])
        if norm is other:
            train.sync_check(norm, [1.0, 2.0], 1)
    with pytest.raises(SystemExit, match="bias differs between processes 0 and 1"):
        train.sync_check(norm, [1.0, 2.0], 0)


def test_one_image_and_more_images_a_step_than_there_are(tmp_path, monkeypatch):
    draw_dataset(str(tmp_path / "one"), train=1, val=1, side=64)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags_for(
        tmp_path / "one", tmp_path / "run", "--epochs", 12, "--workers", 0))])
    train.main()
    state = checkpoint(tmp_path / "run")
    assert state["step"] == 6 and state["global_batch"] == 2 and not state["skipped"]
