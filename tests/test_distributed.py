"""N processes train the same model as one, and a killed run is the unbroken one, bit by bit.

The short forms run always, on drawn people. `pytest --long` runs the full ones; with COCO_ROOT they
train on real images.
"""
import argparse
import fcntl
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train as t
from compare import apart, report, tensors
from data import COCO_NAMES
from model import YoloNasPose, sync_batch_norm
from people import draw_dataset

ROOT = Path(__file__).parents[1]
FLAGS = ["--image-size", "64", "--warmup", "4", "--augment", "flip", "--clip-norm", "50",
         "--lr", "2e-3", "--lr-batch", "8", "--log-every", "1"]
# Runs train.py with something changed first: DRIVER % "code", where t is the module.
DRIVER = ("import sys; sys.path.insert(0, {root!r}); import train as t, torch, os, signal, time\n"
          "%s\nt.guarded_main()").format(root=str(ROOT))


def command(processes: int = 1, patch: str | None = None, restarts: int = 0) -> list[str]:
    """How to start train.py, in one process or under torchrun."""
    launcher = [sys.executable]
    if processes > 1 or restarts:
        launcher += ["-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint",
                     "localhost:0", "--rdzv-id", "same", "--nproc-per-node", str(processes),
                     "--max-restarts", str(restarts)]
    if patch is None:
        return [*launcher, str(ROOT / "train.py")]
    path = Path(os.environ["PATCHES"]) / f"{abs(hash(patch))}.py"
    path.write_text(DRIVER % patch)
    return [*launcher, str(path)]


def start(*flags, **how) -> subprocess.Popen:
    """In a process group of its own, so that all of it can be killed."""
    return subprocess.Popen([*command(**how), *map(str, flags)], start_new_session=True, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def train(*flags, code: int = 0, **how) -> str:
    """Run to the end and return what was printed."""
    return end(start(*flags, **how), code)


def end(run: subprocess.Popen, code: int = 0) -> str:
    """Wait for it and return what was printed."""
    out, err = run.communicate(timeout=500)
    assert run.returncode == code, out + err
    return out + err


def run_here(*flags, patch: str = "", after: int = 0, then: Callable = lambda: None) -> None:
    """The same in this process, one that has imported all; patches of t.to_input are taken back.
    When step `after` is logged, `then` is called."""
    log = t.Log.step

    def step(self, step: int, *given) -> None:
        log(self, step, *given)
        if step == after:
            then()
    with pytest.MonkeyPatch.context() as changes:
        changes.setattr(t, "to_input", t.to_input)
        exec(patch, {"t": t, "os": os, "torch": torch})
        changes.setattr(t.Log, "step", step)
        changes.setattr(sys, "argv", ["train.py", *map(str, flags)])
        try:
            t.guarded_main()
        finally:
            lock = Path(flags[flags.index("--out") + 1], "lock")
            if lock.exists():
                lock.open().close()  # which ends this process's lock


def checkpoint(folder: Path, name: str = "last.pt") -> dict:
    return torch.load(folder / name, weights_only=True)


def norm_some(norm: torch.nn.Module, x: torch.Tensor, weigh: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradients of input, weight and bias, and statistics after one step of a norm."""
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = norm(x)
    (y * weigh).sum().backward()
    return [y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean,
            norm.running_var]


def norm_images(dtype: torch.dtype) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A norm, five images far from 0, and weights of their outputs."""
    g = torch.Generator().manual_seed(0)
    norm = torch.nn.BatchNorm2d(3, eps=1e-6, momentum=0.3, dtype=dtype)
    norm.weight.data, norm.bias.data = (torch.randn(3, generator=g).to(dtype) for _ in range(2))
    x, weigh = (torch.randn(5, 3, 4, 6, generator=g, dtype=torch.float64) for _ in range(2))
    return norm, (300 + x * torch.tensor([1.0, 2, 3])[:, None, None]).to(dtype), weigh.to(dtype)


def norm_share(rank: int, folder: str) -> None:
    """Process 0 has three of the images, process 1 two."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    found = []
    for dtype in (torch.float64, torch.float32):
        norm, *both = norm_images(dtype)
        x, weigh = (t[3 * rank:3 + 2 * rank] for t in both)
        found.append(norm_some(sync_batch_norm(torch.nn.Sequential(norm))[0], x, weigh))
    torch.save(found, f"{folder}/{rank}.pt")
    # Else gloo's threads may still hold tensors when the interpreter ends, and abort it.
    torch.distributed.destroy_process_group()


def test_a_synced_norm_is_one_norm_of_all_images(tmp_path):
    """Also where processes bring unequal numbers, and the mean is 300 times the spread."""
    other = torch.multiprocessing.get_context("spawn").Process(target=norm_share,
                                                               args=(1, str(tmp_path)))
    other.start()
    norm_share(0, str(tmp_path))
    other.join()
    norm, *both = norm_images(torch.float64)
    want = norm_some(norm, *both)
    shares = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for zero, one, tolerance in zip(*shares, (1e-10, 2e-3)):
        found = [torch.cat([zero[i], one[i]]) for i in (0, 1)] + [zero[i] + one[i] for i in (2, 3)]
        assert torch.equal(zero[4], one[4]) and torch.equal(zero[5], one[5])
        for a, b in zip([*found, *zero[4:]], want):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_norms_that_are_not_synced_go_on_with_the_mean_of_all_processes(monkeypatch):
    """Of three processes the others have 10 and 20 more; frozen norms keep their own."""
    norms = torch.nn.Sequential(*(torch.nn.BatchNorm2d(2) for _ in range(3)))
    for i, norm in enumerate(norms):
        norm.running_mean += i
        norm.running_var += 5 * i
    norms[1].eval()
    monkeypatch.setattr(t.dist, "all_reduce", lambda mine: mine.copy_(3 * mine + 30))
    monkeypatch.setattr(t.dist, "get_world_size", lambda: 3)
    t.average_statistics(norms)
    for i, norm in enumerate(norms):
        more = 10 if i != 1 else 0
        assert norm.running_mean.tolist() == [i + more] * 2
        assert norm.running_var.tolist() == [1 + 5 * i + more] * 2


def largest_difference(a: Path, b: Path) -> tuple[float, str]:
    """Largest relative distance between trained tensors of two runs, and the tensor's name."""
    a, b = checkpoint(a)["model"], checkpoint(b)["model"]
    return max((apart(a[n], b[n]), n) for n in a if a[n].is_floating_point())


def distance(a: Path, b: Path) -> float:
    """Relative distance of all trained tensors, laid end to end."""
    return apart(*(torch.cat([t.flatten() for t in checkpoint(p)["model"].values()
                              if t.is_floating_point()]) for p in (a, b)))


def assert_same_model(a: Path, b: Path) -> None:
    """But for rounding. In the bias of a norm, 0 at first and with next to no gradient, Adam makes
    more of it than the long test's gentle rates do: 9e-10 of its norm in 5 steps were seen."""
    assert distance(a, b) <= 1e-10 and largest_difference(a, b)[0] <= 1e-8


def same_run(a: Path, b: Path) -> None:
    """Weights, averages, optimizer, best.pt and the log are equal, but for what the clock says."""
    names = [{file.name for file in p.glob("*.pt")} for p in (a, b)]
    assert names[0] == names[1]
    for name in names[0]:
        one, two = (tensors(checkpoint(p, name)) for p in (a, b))
        assert one.keys() == two.keys() and len(one) > 800
        assert [k for k in one if not torch.equal(one[k], two[k])] == []
    logs = [[{k: v for k, v in json.loads(line).items()
              if k not in ("img_s", "data_wait", "memory_gb")}
             for line in (p / "log.jsonl").read_text().splitlines()] for p in (a, b)]
    assert logs[0] == logs[1]


def family(pid: int) -> list[int]:
    """A process and all it has started: torchrun gives its processes sessions of their own."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid] + [p for child in children for p in family(int(child))]


def kill(run: subprocess.Popen) -> None:
    """SIGKILL for the whole family; the launcher first, so that it cannot react."""
    for pid in family(run.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # a child that ended by itself
    run.communicate()


def logged_steps(folder: Path) -> int:
    path = folder / "log.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def kill_and_resume(data: Path, folder: Path, flags: list, processes: int, kills: int, seed: int,
                    epochs: int = 4) -> None:
    """Compare an unbroken run, of 3 or more steps an epoch, with one that is killed at random
    moments, every third time in the middle of writing a file."""
    rng = random.Random(seed)
    flags = ["--data", data, *FLAGS, "--epochs", epochs, "--batch-size", 4 // processes,
             "--save-every", 2, "--eval-every", 1, *flags]
    run = start(*flags, "--out", folder / "killed", processes=processes)
    for number, lines in enumerate(sorted(rng.sample(range(1, 4 * epochs - 1), kills))):
        deadline = time.time() + 120
        while logged_steps(folder / "killed") < lines and time.time() < deadline:
            assert run.poll() is None, run.communicate()
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))
        while number % 3 == 2 and time.time() < deadline and not list(folder.glob("killed/*.tmp")):
            time.sleep(0.0002)
        assert run.poll() is None, run.communicate()  # it was alive
        kill(run)
        run = start("--out", folder / "killed", "--resume", processes=processes)
    end(run)
    whole = [*flags, "--out", folder / "unbroken"]
    train(*whole, processes=processes) if processes > 1 else run_here(*whole)
    same_run(folder / "unbroken", folder / "killed")


def small_set(folder: Path, train: int, val: int) -> Path:
    """A COCO folder of images of COCO_ROOT, or drawn; every third to train on shows nobody."""
    os.environ["PATCHES"] = str(folder)
    root, people = Path(os.environ.get("COCO_ROOT", folder / "drawn")), folder / "people"
    if not root.exists():
        draw_dataset(str(root), train=train, val=val, side=128)
    (people / "annotations").mkdir(parents=True)
    for split, count in (("train2017", train), ("val2017", val)):
        name = f"annotations/person_keypoints_{split}.json"
        labels = json.loads((root / name).read_text())
        labels["images"] = sorted(labels["images"], key=lambda i: i["id"])[:count]
        known = {i["id"] for n, i in enumerate(labels["images"]) if n % 3 or split == "val2017"}
        labels["annotations"] = [a for a in labels["annotations"] if a["image_id"] in known]
        (people / name).write_text(json.dumps(labels))
        (people / split).symlink_to((root / split).absolute())
    return people


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small_set(tmp_path_factory.mktemp("few"), 12, 4)


def run_of(data: Path, out: Path, processes: int, batch: int, accumulate: int = 1, *more,
           steps: int = 5, **how) -> Path:
    flags = ("--data", data, "--out", out, *FLAGS, "--epochs", 8, "--max-steps", steps, "--workers",
             0, "--batch-size", batch, "--accumulate", accumulate, *more)
    if processes == 1 and not how:
        run_here(*flags)
    else:
        said = train(*flags, processes=processes, **how)
        (out / "said").write_text(said)
    return out


SEEDS = """
real = t.train_step
def train_step(*given):
    t.say(f"step seed {torch.initial_seed()}")  # in one piece: two processes write there
    return real(*given)
t.train_step = train_step
"""


def test_two_processes_train_the_model_of_one(data, tmp_path):
    one, two = tmp_path / "1x4", tmp_path / "2x2"
    run_of(data, one, 1, 4, 1, "--double")
    run_of(data, two, 2, 2, 1, "--double", "--sync-check", "2", patch=SEEDS)
    assert_same_model(two, one)
    seeds = re.findall("step seed ([0-9]+)", (two / "said").read_text())
    assert len(seeds) == len(set(seeds)) == 10  # of 5 steps: a Dropout differs on each process
    logs = [(p / "log.jsonl").read_text().splitlines() for p in (one, two)]
    logs = [[json.loads(line) for line in log] for log in logs]
    assert [line.keys() for line in logs[0]] == [line.keys() for line in logs[1]]
    for a, b in zip(*logs):  # process 0 scores what both have seen
        assert a.get("loss", a.get("OKS")) == pytest.approx(b.get("loss", b.get("OKS")), rel=1e-6)
    assert any(line.get("OKS", 0) > 0 for line in logs[0])


def test_accumulation_is_a_larger_batch(data, tmp_path):
    one, two = tmp_path / "1x4", tmp_path / "1x2x2"
    run_of(data, one, 1, 4, 1, "--double", "--freeze", "bn")
    run_of(data, two, 1, 2, 2, "--double", "--freeze", "bn")
    assert_same_model(two, one)


# Each patch changes train.py (module t) before main() runs.
KILL_RANK_1_TWICE = """
real = t.train_step
def train_step(model, *a, **k):
    done = sum(os.path.exists(os.environ["PATCHES"] + f"/killed{n}") for n in (0, 1))
    result = real(model, *a, **k)
    calls[0] += 1
    if os.environ["RANK"] == "1" and done < 2 and calls[0] == 2:
        open(os.environ["PATCHES"] + f"/killed{done}", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return result
calls, t.train_step = [0], train_step
"""
NAN_IMAGE = """
real, calls = t.to_input, [0]
def to_input(images, model):
    x = real(images, model)
    calls[0] += 1
    if calls[0] == 3 and os.environ.get("RANK", "0") == "0":
        x[0, 0, 5, 5] = float("nan")
    return x
t.to_input = to_input
"""
INF_GRADIENT = """
real, calls = t.PoseLoss.__call__, [0]
def call(self, *a):
    terms, scores = real(self, *a)
    calls[0] += 1
    if calls[0] == 3 and os.environ.get("RANK", "0") == "0":
        terms["iou"].register_hook(lambda g: g * float("inf"))
    return terms, scores
t.PoseLoss.__call__ = call
"""
DROPOUT = """
from evaluate import to_input
t.to_input = lambda images, model: torch.dropout(to_input(images, model), 0.3, model.training)
"""
ALWAYS_NAN = "t.to_input = lambda images, model: images.float() * float('nan')"
OUT_OF_MEMORY = """
real, calls = t.train_step, [0]
def train_step(*given):
    calls[0] += 1
    if calls[0] == 3 and given[7].batch_size > 1:
        raise torch.OutOfMemoryError("pretended")
    return real(*given)
t.train_step = train_step
"""
SCRIPTED_AP = """
import evaluate
real, real_update, last = t.Log.step, t.EarlyStopping.update, [0]
def step(self, step, *a):
    last[0] = step
    real(self, step, *a)
def update(self, metric, epoch):
    stop = real_update(self, metric, epoch)
    with open(sys.argv[sys.argv.index("--out") + 1] + os.environ["RANK"], "a") as f:
        f.write(f"{epoch} {self.best} {self.best_epoch} {stop}\\n")
    return stop
def keypoint_ap(*a):
    assert os.environ.get("RANK", "0") == "0", "only process 0 scores"
    return {"AP": [0.1, 0.4, 0.3, 0.4, 0.2, 0.35, 0.9][last[0] // 3 - 1]}
t.Log.step, t.EarlyStopping.update, evaluate.keypoint_ap = step, update, keypoint_ap
"""


# Whatever a run has to remember, or must draw by step, epoch and index alone. The loss of the first
# 2 of 12 steps does not fall, so that the warmup's end moves.
STATEFUL = ["--optimizer", "sgd", "--warmup", "2", "--dynamic-warmup", "--restarts", "1", "--ema",
            "exp", "--mixup", "0.5", "--occlude", "0.5", "--mosaic", "0.5", "--close-mosaic", "1",
            "--multi-scale", "0.5", "--average-best", "2", "--save-epochs", "2", "--freeze",
            "backbone:1,bn:-1", "--patience", "3", "--mask", "--distill-weight", "0.5",
            "--accumulate", "1"]


def teacher(folder: Path) -> list:
    """The flag for a teacher of random weights."""
    torch.manual_seed(5)
    torch.save({"format": "nanopose", "args": {"model": "n"}, "skeleton": {"names": COCO_NAMES},
                "model": YoloNasPose("n").state_dict()}, folder / "teacher.pt")
    return ["--teacher", folder / "teacher.pt"]


def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(data, tmp_path):
    kill_and_resume(data, tmp_path, [*STATEFUL, *teacher(tmp_path), "--workers", 1,
                                      "--batch-size", 2], processes=1, kills=1, seed=0, epochs=2)


def test_two_checkpoints_are_compared_tensor_by_tensor():
    a = tensors({"model": {"w": torch.tensor([3.0, 4.0]), "n": torch.tensor(1)},
                 "optimizer": {"state": [{"m": torch.zeros(2)}]}, "step": 3})
    assert report(a, {**a}) == ("3 tensors, 0 differ", True)
    text, equal = report({**a, "model/w": torch.tensor([3.0, 4.5])}, a)
    assert not equal and text.startswith("3 tensors, 1 differ, like model/w; of the weights most "
                                         "model/w, by 0.1 of its norm, and all by 0.1: in float32")
    wide = {"model/w": torch.tensor([3.0, 4.0], dtype=torch.float64)}
    for factor, said in ((1.001, "by 0.001: more than rounding does in a few steps"),
                         (1 + 1e-12, "by 1e-12: equal but for rounding")):
        assert report({"model/w": factor * wide["model/w"]}, wide)[0].endswith(said)
    for other in ({**a, "model/w": torch.zeros(3)}, {"model/w": a["model/w"]}):
        assert report(a, other)[0].startswith(("1 tensors are not", "2 tensors are not"))


def test_random_layers_draw_by_step(data, tmp_path, monkeypatch):
    """Dropout that somebody adds draws after a stop what it would have drawn."""
    flags = ["--data", data, *FLAGS, "--epochs", 8, "--batch-size", 2, "--workers", 0]
    for out, stops in ((tmp_path / "one", [3]), (tmp_path / "two", [2, 3])):
        for step in stops:
            run_here(*(["--resume"] if (out / "last.pt").exists() else flags),
                     "--out", out, "--max-steps", step, patch=DROPOUT)
    one, two = (tensors(checkpoint(tmp_path / name)) for name in ("one", "two"))
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.mark.long
@pytest.mark.parametrize("processes, amp", [(1, "bf16"), (2, "no"), (2, "bf16")])
def test_what_has_most_to_remember_goes_on_bit_for_bit(data, tmp_path, processes, amp):
    kill_and_resume(data, tmp_path, [*STATEFUL, *teacher(tmp_path), "--workers", 2, "--amp", amp],
                    processes, kills=3, seed=processes)


@pytest.mark.long
def test_short_memory_begins_anew_by_itself_with_auto(data, tmp_path):
    said = train("--data", data, "--out", tmp_path / "run", *FLAGS, "--epochs", 30, "--workers", 1,
                 "--auto-batch", "--eval-every", 30, "--save-every", 1, patch=OUT_OF_MEMORY)
    assert "60 images of 64 px do not fit" in said and "30 images of 64 px do not fit" in said
    assert "15 images x 1 processes x 4 micro-batches = 60" in said
    assert checkpoint(tmp_path / "run")["step"] == 6


@pytest.mark.long
def test_one_process_under_torchrun_is_the_same_run(data, tmp_path):
    one = run_of(data, tmp_path / "plain", 1, 4, 1, steps=6)
    two = run_of(data, tmp_path / "torchrun", 1, 4, 1, steps=6, restarts=1)
    a, b = (tensors(checkpoint(p)) for p in (one, two))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.long
def test_a_dead_process_restarts_all_and_the_result_is_the_same(data, tmp_path):
    one = run_of(data, tmp_path / "unbroken", 2, 2, 1, "--save-every", 1, steps=6)
    two = run_of(data, tmp_path / "killed", 2, 2, 1, "--save-every", 1, steps=6,
                 patch=KILL_RANK_1_TWICE, restarts=3)
    assert {p.name for p in data.parent.glob("killed?")} == {"killed0", "killed1"}
    said = (two / "said").read_text()
    assert said.count("another process of this run is gone") == 2 and "Traceback" not in said
    assert said.count(f"goes on from  {two}, step") == 2
    said = train("--data", data, "--out", two, "--seed", 7, processes=2, restarts=1, code=1)
    assert "already holds a run" in said  # and its restart is not taken for one of that run
    assert checkpoint(two)["args"]["seed"] == 0
    a, b = (tensors(checkpoint(p)) for p in (one, two))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.long
def test_a_dead_process_on_one_of_two_machines_restarts_all(data, tmp_path):
    """Two launchers on this one; they do not agree on how often they have started anew."""
    one = run_of(data, tmp_path / "unbroken", 2, 2, 1, "--save-every", 1, steps=6)
    for path in data.parent.glob("killed?"):
        path.unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--data", data, "--out", tmp_path / "killed", *FLAGS, "--epochs", 8, "--max-steps", 6,
             "--workers", 0, "--batch-size", 2, "--save-every", 1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node",
              "1", "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint",
              f"localhost:{port}", command(1, KILL_RANK_1_TWICE)[-1]]
    nodes = [subprocess.Popen([*launch, *map(str, flags)], text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
             for _ in range(2)]
    said = "".join(node.communicate(timeout=300)[0] for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], said
    assert {p.name for p in data.parent.glob("killed?")} == {"killed0", "killed1"}
    assert said.count(f"goes on from  {tmp_path / 'killed'}, step") == 2, said
    a, b = (tensors(checkpoint(p)) for p in (one, tmp_path / "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.long
def test_usr1_under_torchrun_ends_the_run_though_it_may_restart(data, tmp_path):
    said = train("--data", data, "--out", tmp_path / "run", *FLAGS, "--epochs", 90, "--workers", 0,
                 "--batch-size", 2, processes=2, restarts=2, patch="""
real = t.Log.step
def step(self, step, *a):
    real(self, step, *a)
    if step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGUSR1)
t.Log.step = step""")
    assert "stopped at step 4" in said and "goes on from" not in said
    assert checkpoint(tmp_path / "run")["step"] == 4


@pytest.mark.long
def test_a_signal_saves_at_the_next_step_and_fewer_processes_go_on(data, tmp_path):
    one = run_of(data, tmp_path / "unbroken", 2, 2, 1, "--double", steps=7)
    flags = ("--data", data, "--out", tmp_path / "moved", *FLAGS, "--epochs", 8, "--max-steps", 7,
             "--workers", 0, "--batch-size", 2, "--double")
    run = start(*flags, processes=2, patch="""
real = t.Log.step
def step(self, step, *a):
    real(self, step, *a)
    if step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
t.Log.step = step""")
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0 and "stopped at step 4" in out, out + err  # or it were restarted
    assert checkpoint(tmp_path / "moved")["step"] == 4
    said = train("--out", tmp_path / "moved", "--resume", "--max-steps", 7)
    assert "4 images x 1 processes x 1 micro-batches = 4" in said
    assert checkpoint(tmp_path / "moved")["step"] == 7
    assert_same_model(tmp_path / "moved", one)


def test_one_process_skips_steps_that_are_not_finite(data, tmp_path, monkeypatch):
    """Only two in a row would be too many. The average and the warmup, which hears all processes'
    loss, count the others; and a resumed run goes on in the stream of images, which counts all."""
    ids, updates, losses, step = [], [], [], t.train_step

    def train_step(*given) -> t.Step:
        result = step(*given)
        ids.extend(result.image_ids)
        return result._replace(mine=[0.0] * len(result.mine))
    monkeypatch.setattr(t, "train_step", train_step)
    for part, seen in (t.EMA, updates), (t.WarmupEnd, losses):
        monkeypatch.setattr(part, "update", lambda self, *given, real=part.update, seen=seen: (
            seen.append(given[-1]), real(self, *given)))
    twice = NAN_IMAGE.replace("calls[0] == 3", "calls[0] in (2, 4)")
    run_here("--data", data, "--out", tmp_path, *FLAGS, "--epochs", 8, "--batch-size", 2,
             "--workers", 0, "--max-steps", 3, "--max-skipped", 2, patch=twice)
    run_here("--out", tmp_path, "--resume", "--max-steps", 4)
    state = checkpoint(tmp_path)
    assert (state["step"], state["skipped"]) == (4, 2)
    assert all(t.isfinite().all() for t in tensors(state).values())
    assert updates == [1, 2, 3, 4] and min(losses) > 0 and len(set(ids)) == len(ids) == 12


@pytest.mark.long
@pytest.mark.parametrize("patch, what", [(NAN_IMAGE, "scores"), (INF_GRADIENT, "gradient")])
def test_a_step_that_is_not_finite_changes_nothing(data, tmp_path, patch, what):
    out = run_of(data, tmp_path / "run", 2, 2, 1, "--sync-check", 1, steps=4, patch=patch)
    state = checkpoint(out)
    assert (state["step"], state["skipped"]) == (4, 1)
    assert all(t.isfinite().all() for t in tensors(state).values())
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "AP" not in line] == [1, 2, 2, 3, 4]
    assert lines[2]["skipped"] == 1 and what in lines[2]["not_finite"]


def test_too_many_skipped_steps_end_the_run_and_name_the_images(data, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        run_here("--data", data, "--out", tmp_path, *FLAGS, "--epochs", 8,
                 "--batch-size", 2, "--workers", 0, "--max-skipped", 3, patch=ALWAYS_NAN)
    said = str(stopped.value)
    assert "3 steps in a row were not finite (scores, cls" in said and "images" in said
    assert checkpoint(tmp_path)["step"] == 0


@pytest.mark.long
def test_out_of_memory_leaves_a_smaller_micro_batch_to_go_on_with(data, tmp_path):
    one = run_of(data, tmp_path / "enough", 1, 4, 1, "--double", "--freeze", "bn", steps=6)
    flags = ("--out", tmp_path / "little", "--max-steps", 6)
    said = train("--data", data, *flags, *FLAGS, "--epochs", 8, "--workers", 0, "--batch-size", 4,
                 "--double", "--freeze", "bn", "--save-every", 1, patch=OUT_OF_MEMORY, code=1)
    assert "4 images of 64 px do not fit" in said and "Traceback" not in said
    train("--resume", *flags, patch=OUT_OF_MEMORY, code=1)
    said = train("--resume", *flags, patch=OUT_OF_MEMORY)
    assert "1 images x 1 processes x 4 micro-batches = 4" in said
    assert "peak lr       1.00e-03" in said
    assert_same_model(tmp_path / "little", one)


@pytest.mark.long
def test_both_processes_stop_at_the_same_epoch_also_after_a_resume(data, tmp_path):
    flags = ("--data", data, *FLAGS, "--epochs", 8, "--workers", 0, "--batch-size", 2,
             "--patience", 3, "--eval-every", 1)
    said = train(*flags, "--out", tmp_path / "a", processes=2, patch=SCRIPTED_AP)
    train(*flags, "--out", tmp_path / "b", "--max-steps", 10, processes=2, patch=SCRIPTED_AP)
    again = train("--out", tmp_path / "b", "--resume", processes=2, patch=SCRIPTED_AP)
    want = ["1 0.1 1 False", "2 0.4 2 False", "3 0.4 2 False", "4 0.4 2 False", "5 0.4 2 True"]
    for run in "a0", "a1", "b0", "b1":
        assert (tmp_path / run).read_text().splitlines() == want
    assert "stopped early (--patience) at step 15" in said
    assert "stopped early (--patience) at step 15" in again
    assert checkpoint(tmp_path / "a", "best.pt")["step"] == 6
    assert "stopped early" in train("--out", tmp_path / "a", "--resume")


def test_while_ap_is_0_the_best_epochs_are_those_of_highest_oks(data, tmp_path, monkeypatch):
    scores = iter((0.3, 0.1, 0.2, 0.25))  # the last one is the average's
    monkeypatch.setattr(t, "evaluate", lambda *_: ({"AP": 0.0, "OKS": next(scores)}, {}))
    monkeypatch.setattr(t, "extremes", lambda *_: [])
    run_here("--data", data, "--out", tmp_path, *FLAGS, "--epochs", 3, "--batch-size",
             4, "--workers", 0, "--eval-every", 1, "--average-best", 2)
    assert [epoch for _, epoch in checkpoint(tmp_path)["best"]] == [1, 3]
    assert checkpoint(tmp_path, "best.pt")["step"] == 3  # not written again by worse epochs
    assert (tmp_path / "best_2.pt").exists()  # until the next evaluation: see finish_epoch
    assert next(scores, None) is None and (tmp_path / "average.pt").exists()


def test_a_resume_that_ends_at_an_evaluation_already_done_averages_too(data, tmp_path, monkeypatch,
                                                                       capsys):
    scores = iter((0.3, 0.2, 0.25))
    monkeypatch.setattr(t, "evaluate", lambda *_: ({"AP": 0.0, "OKS": next(scores)}, {}))
    monkeypatch.setattr(t, "extremes", lambda *_: [])
    run_here("--data", data, "--out", tmp_path, *FLAGS, "--epochs", 3, "--batch-size",
             4, "--workers", 0, "--eval-every", 1, "--average-best", 2, "--max-steps", 6)
    assert not (tmp_path / "average.pt").exists()
    run_here("--out", tmp_path, "--resume", "--patience", 1)
    average = checkpoint(tmp_path, "average.pt")["model"]
    one, two = (checkpoint(tmp_path, f"best_{epoch}.pt")["model"] for epoch in (1, 2))
    assert all(torch.allclose(average[n], (one[n] + two[n]) / 2) for n in one if "num" not in n)
    assert "average of 2  AP 0.000" in capsys.readouterr().out and next(scores, None) is None


def test_resume_mends_what_is_damaged_and_refuses_what_would_be_another_run(data, tmp_path,
                                                                            monkeypatch, capsys):
    out, resume = tmp_path / "run", ("--out", tmp_path / "run", "--resume")
    run_here("--data", data, "--out", out, *FLAGS, "--epochs", 8, "--batch-size", 4,
             "--workers", 0, "--save-every", 1, "--max-steps", 2)
    last = (out / "last.pt").read_bytes()
    (out / "last.pt").write_bytes(last[:len(last) // 2])
    run_here(*resume, "--max-steps", 3, "--accumulate", 2)
    said = capsys.readouterr().out
    assert "renamed to last.pt.damaged" in said and "1 done, 2 now" in said
    assert "2 images x 1 processes x 2 micro-batches = 4" in said
    assert "accumulate 2" in [line for line in said.splitlines() if line.startswith("flag ")][-1]
    assert "\ndivided anew  batch-size 2\n" in said
    assert checkpoint(out)["step"] == 3 and (out / "last.pt.damaged").exists()
    (out / "last.pt").write_bytes(b"")
    with pytest.raises(SystemExit, match="--lr 0.1 differs from the 0.002"):
        run_here(*resume, "--lr", 0.1)
    assert "last.pt is damaged, or no checkpoint" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="takes 4 images, which are not 1 processes x 3"):
        run_here(*resume, "--batch-size", 3)
    with pytest.raises(ValueError, match="takes 4 images, which 3 processes cannot share equally"):
        t.cut_batch(argparse.Namespace(**checkpoint(out, "previous.pt")["args"]),
                    checkpoint(out, "previous.pt"), 3)
    state = checkpoint(out, "previous.pt")
    with pytest.raises(SystemExit, match="has another network, loss or .* 'tracker'"):
        log = argparse.Namespace(total_steps=9, load_state_dict=lambda _: None)
        parts = {"log": log, "tracker": torch.nn.Identity()}
        t.take_up(dict(state), argparse.Namespace(step=0), parts, "", state["contents"])
    log = argparse.Namespace(total_steps=1)  # which is not touched
    with pytest.raises(SystemExit, match="step 3 already, and would end at step 1 with"):
        t.take_up(dict(state), None, {"log": log}, "", state["contents"])
    for what in "keypoints", "labels to train on", "labels to evaluate", "teacher":
        with pytest.raises(SystemExit, match=f"not the {what} of the run"):
            t.take_up(dict(state), argparse.Namespace(), {}, "", state["contents"] | {what: "x"})
    torch.save({**state, "args": {**state["args"], "noise": 0.5}}, out / "last.pt")
    with pytest.raises(SystemExit, match="run has noise, which are unknown here"):
        run_here(*resume)
    state["model"]["new"] = state["model"].pop("heads.head1.cls_pred.bias")
    torch.save(state, out / "last.pt")
    with pytest.raises(SystemExit, match="has another network, loss or .* key"):
        run_here(*resume)
    fork, held = torch.multiprocessing.get_context("fork"), os.open(out / "lock", os.O_RDWR)
    locked = fork.Event()
    other = fork.Process(daemon=True, target=lambda: (fcntl.lockf(held, fcntl.LOCK_EX),
                                                      locked.set(), time.sleep(60)))
    other.start()
    assert locked.wait(30)
    with pytest.raises(SystemExit, match="another process is writing"):
        run_here(*resume)
    other.kill()


PERMUTED = """
real = t.stream
t.stream = lambda *place: (batch[::-1] for batch in real(*place))
"""
OWN_NORMALISER = """
real = t.dist.all_reduce
def all_reduce(x, *a):
    if x.numel() > 1_000_000:  # gradients, then 7 numbers, of which the first is the normaliser
        x[:-7] /= x[-7].clamp(min=1) * t.dist.get_world_size()
        real(x, *a)
        x[-7] = 1
    else:
        real(x, *a)
t.dist.all_reduce = all_reduce
"""


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> list:
    """Flags for 48 + 8 images with the default recipe."""
    return ["--data", small_set(tmp_path_factory.mktemp("uneven"), 48, 8), "--image-size", 128,
            "--augment", "flip", "--clip-norm", 20, "--warmup", 4, "--workers", 0, "--epochs", 20,
            "--max-steps", 20, "--eval-every", 20]


def people_by_process(flags: list) -> list[list[int]]:
    """Labeled people in each of 4 processes' 2 images, step by step."""
    from data import flatten, stream
    a = flatten(json.loads((flags[1] / "annotations/person_keypoints_train2017.json").read_text()))
    streams = [stream(len(a.ids), 0, 2, 0, rank, 4) for rank in range(4)]
    return [[sum(int((a.keypoints[a.offsets[i]:a.offsets[i + 1], :, 2] > 0).any(-1).sum())
                 for _, i in next(s)) for s in streams] for _ in range(20)]


@pytest.mark.long
def test_every_split_of_20_steps_trains_the_same_model(uneven, tmp_path, capsys):
    def go(name, processes, batch, accumulate, *more, patch=None):
        train(*uneven, "--out", tmp_path / name, "--batch-size", batch, "--accumulate", accumulate,
              *more, processes=processes, patch=patch)
        return tmp_path / name

    people = people_by_process(uneven)
    assert any(min(step) == 0 < max(step) for step in people)
    one, figures = go("f64 1x8", 1, 8, 1, "--double"), {"people, first steps": people[:3]}
    for n, b in ((2, 4), (4, 2)):
        run = go(f"f64 {n}x{b}", n, b, 1, "--double")
        figures[f"float64 {n}x{b}"] = largest_difference(run, one)
    for what, more, patch in (("unsynced norms", ["--no-sync-bn"], None),
                              ("own normalisers", [], OWN_NORMALISER)):
        wrong = go(f"f64 {what}", 2, 4, 1, "--double", *more, patch=patch)
        figures[f"float64 2x4, {what}"] = largest_difference(wrong, one)
    frozen = go("f64 frozen 1x8", 1, 8, 1, "--double", "--freeze", "bn")
    for n, b, a in ((1, 4, 2), (2, 2, 2)):
        run = go(f"f64 frozen {n}x{b}x{a}", n, b, a, "--double", "--freeze", "bn")
        figures[f"float64 {n}x{b}x{a}, frozen norms"] = largest_difference(run, frozen)
    single = go("f32 1x8", 1, 8, 1)
    figures["float32 1x8 permuted"] = distance(go("f32 p", 1, 8, 1, patch=PERMUTED), single)
    for n, b in ((2, 4), (4, 2)):
        figures[f"float32 {n}x{b}"] = distance(go(f"f32 {n}x{b}", n, b, 1), single)
    with capsys.disabled():
        print(*(f"{name}: {value}" for name, value in figures.items()), sep="\n")
    for name, value in figures.items():
        if "unsynced" in name or "own" in name:
            assert value[0] > 1e-5, name
        elif name.startswith("float64"):
            assert value[0] <= 1e-10, name
    limit = 3 * figures["float32 1x8 permuted"]
    assert max(figures["float32 2x4"], figures["float32 4x2"]) <= limit


@pytest.mark.long
@pytest.mark.parametrize("amp", ["no", "bf16"])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_twenty_kills(data, tmp_path, workers, processes, amp):
    """Eight kinds of runs; with three kills for half of them and two for the others that is 20."""
    kills = 3 if (workers == 0) == (processes == 1) else 2
    seed = workers * 100 + processes * 10 + (amp == "bf16")
    kill_and_resume(data, tmp_path, ["--workers", workers, "--amp", amp], processes, kills, seed)
