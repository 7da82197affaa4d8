"""An hour of training in which something breaks every minute, beside the same run left alone.

    python tests/soak.py runs/soak            # about an hour on two cores; prints a table

Both runs have two processes under torchrun, three images that cannot be read and three steps that
are not finite. At the end weights, averages, optimizer, best.pt and logs must have the same bits.
"""
import argparse
import collections
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two processes on one GPU are refused
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from people import draw_dataset
from test_distributed import DRIVER, family, logged_steps, same_run

NAN_AT = """
place, size, real = [0], t.random_size, t.to_input
def random_size(*given):
    place[0] = given[3]  # in the stream, which a resumed run goes on with
    return size(*given)
def to_input(images, model):
    x = real(images, model)
    if model.training and place[0] in (40, 400, 1200) and os.environ["RANK"] == "1":
        x[0, 0, 5, 5] = float("nan")
    return x
t.random_size, t.to_input = random_size, to_input
"""


class Run:
    """train.py under torchrun, what it prints in a file, and how often it was started."""

    def __init__(self, out: Path, flags: list[str]):
        self.out, self.flags, self.starts, self.started = out, flags, 0, 0.0

    def start(self) -> None:
        script = self.out.parent / "train_with_nans.py"
        flags = ["--resume"] if self.starts else self.flags
        with open(f"{self.out}.txt", "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                 "2", "--max-restarts", "100", str(script), "--out", str(self.out), *flags],
                stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.starts, self.started = self.starts + 1, time.time()

    def ranks(self) -> list[int]:
        """Process ids of the two trainers, once they are there."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def gone_on(self) -> bool:
        """Is it alive, and has it written a checkpoint since it was started, besides the one
        before? Two faults on the only checkpoint there is do lose the run."""
        last, before = (self.out / name for name in ("last.pt", "previous.pt"))
        return self.process.poll() is None and last.exists() and before.exists() and \
            last.stat().st_mtime > self.started

    def kill(self) -> None:
        for pid in family(self.process.pid):
            send(pid, signal.SIGKILL)
        self.process.wait()

    def ask(self, number: int) -> None:
        """A signal to the launcher, which hands it on; the run must end by itself."""
        self.process.send_signal(number)
        self.process.wait(timeout=120)

    def costs(self) -> tuple[float, int]:
        """GB and open files of the first trainer and its loader processes."""
        pids = family(self.ranks()[0])
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        return pages * 4096 / 2**30, sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it ended by itself


def while_writing(run: Run) -> None:
    """SIGKILL for all at a moment when a checkpoint is half written."""
    deadline = time.monotonic() + 60
    while not list(run.out.glob("*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.0002)
    run.kill()


def damaged(run: Run, harm) -> None:
    """SIGKILL for all, and something happens to last.pt before the run goes on."""
    run.kill()
    last = run.out / "last.pt"
    harm(last, last.read_bytes())


def no_room(run: Run) -> None:
    """No file of the trainers may grow beyond 5 MB: the next checkpoint fails."""
    for pid in run.ranks():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (5 << 20, 5 << 20))


FAULTS = {
    "SIGKILL, launcher and all processes": Run.kill,
    "SIGKILL, all, a checkpoint half written": while_writing,
    "SIGKILL, one of the two processes": lambda run: send(run.ranks()[1], signal.SIGKILL),
    "SIGKILL, process 0": lambda run: send(run.ranks()[0], signal.SIGKILL),
    "SIGKILL, a loader process": lambda run: send(family(run.ranks()[0])[-1], signal.SIGKILL),
    "SIGTERM": lambda run: run.ask(signal.SIGTERM),
    "SIGINT": lambda run: run.ask(signal.SIGINT),
    "SIGHUP": lambda run: run.ask(signal.SIGHUP),
    "disk full in the middle of a checkpoint": no_room,
    "SIGKILL, then last.pt cut in half": lambda run: damaged(
        run, lambda path, old: path.write_bytes(old[:len(old) // 2])),
    "SIGKILL, then last.pt full of noise": lambda run: damaged(
        run, lambda path, old: path.write_bytes(random.Random(0).randbytes(1000))),
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("out", type=Path)
    p.add_argument("--epochs", type=int, default=50, help="of 25 steps; default: 50")
    p.add_argument("--minutes", type=float, default=60, help="no faults later; default: 60")
    p.add_argument("--every", type=float, default=60, help="seconds between faults; default: 60")
    p.add_argument("--seed", type=int, default=0, help="of the faults; default: 0")
    args = p.parse_args()
    args.out.mkdir(parents=True)
    data = args.out / "people"
    draw_dataset(str(data), train=200, val=40, side=96)
    for name in ("000010", "000100", "000150"):
        image = data / "train2017" / f"{name}.jpg"
        image.write_bytes(image.read_bytes()[:700])
    (args.out / "train_with_nans.py").write_text(DRIVER % NAN_AT)
    flags = f"--data {data} --image-size 96 --epochs {args.epochs} --batch-size 4 --workers 1 " \
            "--save-every 10 --eval-every 10 --augment flip --lr 1e-3 --lr-batch 8 " \
            "--log-every 25 --patience 1000000 --average-best 3"
    alone, broken = (Run(args.out / name, flags.split()) for name in ("alone", "broken"))
    rng, costs, begun = random.Random(args.seed), {"alone": [], "broken": []}, time.monotonic()
    tried, plan = collections.Counter(), []
    alone.start(), broken.start()
    next_fault = begun + args.every
    while alone.process.poll() is None or broken.process.poll() != 0:
        time.sleep(1)
        if broken.process.poll() not in (None, 0):
            broken.start()
        for run in (alone, broken) if time.monotonic() >= next_fault else ():
            # 2: a trainer and its loader; an evaluation has a loader of its own, of 0.7 GB
            if run.process.poll() is None and len(run.ranks()) == len(family(run.ranks()[0])) == 2:
                costs[run.out.name].append(run.costs())
        if time.monotonic() >= next_fault:
            next_fault += args.every
            if broken.gone_on() and len(broken.ranks()) == 2 and \
                    time.monotonic() < begun + 60 * args.minutes:
                plan = plan or rng.sample(list(FAULTS), len(FAULTS))
                tried[name := plan.pop()] += 1
                minutes = (time.monotonic() - begun) / 60
                print(f"{minutes:5.1f} min  line {logged_steps(broken.out)}  {name}", flush=True)
                FAULTS[name](broken)
                broken.started = time.time()
    print(f"{(time.monotonic() - begun) / 60:.1f} minutes, {sum(tried.values())} faults, launchers "
          f"started {broken.starts} times; exit codes {alone.process.poll()}, "
          f"{broken.process.poll()}")
    for name in FAULTS:
        print(f"{tried[name]:3} x {name}")
    for name, (first, *_, last) in costs.items():
        print(f"{name}: {first[0]:.2f} -> {last[0]:.2f} GB, {first[1]} -> {last[1]} open files")
    same_run(alone.out, broken.out)
    print("0 tensors differ, logs are equal")


if __name__ == "__main__":
    main()
