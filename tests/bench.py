"""What training, evaluation and loading cost on this machine, in one table.

    python tests/bench.py                                    # on drawn people, network N at 320 px
    python tests/bench.py --data coco --image-size 640       # the loader, on real images
    python tests/bench.py --json figures.json --amp bf16 --compile
    python tests/bench.py --only scale                       # what grows with the data; Linux

On a CPU: one thread, process CPU time, the least of interleaved rounds, in ms and in units: a unit
is one 3x3 convolution of 64 to 64 channels on 4 x 64 x 80 x 80, forward and backward, in the same
rounds. On a GPU: wall-clock time after synchronizing.
"""
import argparse
import copy
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import train
from data import (MOSAIC, MOSAIC_HEAVY, PLAIN, CocoPose, find_split, flatten, make_loader,
                  read_json, read_skeleton, stream)
from evaluate import to_input
from loss import TERMS, PoseLoss
from model import SIZES, YoloNasPose, decode
from people import draw_dataset
from schedule import EMA, param_groups

LOADERS = {"n, s (mosaic 0.5)": MOSAIC, "n, s without mosaic": MOSAIC._replace(mosaic=0.0),
           "m, l (heavy)": MOSAIC_HEAVY, "validation": PLAIN}


def unit(device: torch.device):
    """The convolution that everything is measured against: a function that runs it once."""
    conv = nn.Conv2d(64, 64, 3, padding=1, device=device)
    x = torch.rand(4, 64, 80, 80, device=device, requires_grad=True)
    grad = torch.rand(4, 64, 80, 80, device=device)
    return lambda: conv(x).backward(grad)


def people(batch: int, per_image: int, size: int, k: int = 17) -> dict[str, torch.Tensor]:
    """Made-up targets: `per_image` people of 1/8 to 1/2 of the side in each image."""
    g = torch.Generator().manual_seed(0)
    wide_high = size * (torch.rand(batch, per_image, 2, generator=g) * 3 + 1) / 8     # (B, M, 2) px
    corner = torch.rand(batch, per_image, 2, generator=g) * (size - wide_high)        # (B, M, 2) px
    inside = torch.rand(batch, per_image, k, 2, generator=g)                          # (B, M, K, 2)
    xy = corner[:, :, None] + inside * wide_high[:, :, None]                          # (B, M, K, 2)
    return {"boxes": torch.cat([corner, corner + wide_high], -1),
            "keypoints": torch.cat([xy, torch.full_like(xy[..., :1], 2)], -1),
            "crowd": torch.zeros(batch, per_image, dtype=torch.bool),
            "image_id": torch.arange(batch), "bad": []}


def step_parts(args: argparse.Namespace, device: torch.device) -> dict:
    """{part: a function that runs it once}, in order; `step` is train_step and EMA."""
    flags = train.parse_args(["--amp", args.amp])
    train.fill_recipe(flags)
    torch.manual_seed(0)
    model = YoloNasPose(args.model).to(device, memory_format=torch.channels_last).train()
    criterion = PoseLoss(torch.full((17,), 0.07, device=device))
    gradients = train.flat_gradients([p for p in model.parameters() if p.requires_grad],
                                     len(TERMS) + 3)
    optimizer = torch.optim.AdamW(param_groups(model, 1e-5, 1e-6), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    ema = EMA(model, "constant", 0.99, 1000)
    if args.compile:
        model.compile()
    b, s = args.batch_size, args.image_size
    images = torch.randint(256, (b, s, s, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    targets = people(b, args.people, s)
    at = {}

    def forward():
        with torch.autocast(device.type, train.AMP_DTYPES[args.amp], enabled=args.amp != "no"):
            at["raw"] = model(to_input(images, model))

    def loss():
        raw = at["raw"].promote()
        on_device = {name: targets[name].to(device) for name in ("boxes", "keypoints", "crowd")}
        terms, at["scores"] = criterion(raw, decode(raw), on_device)
        at["loss"] = sum(terms.values()) / b

    def backward():
        at["loss"].backward()

    def norm():
        gradients[0].mul_(1 / at["scores"].clamp(min=1).item())
        torch.linalg.vector_norm(gradients[0])

    def whole():
        train.train_step(model, None, criterion, iter([(images, targets)]), optimizer, scaler,
                         gradients, flags, s, 1.0, False)
        ema.update(1)

    return {"forward": forward, "loss, assigner": loss, "backward": backward, "norm": norm,
            "optimizer": optimizer.step, "EMA": lambda: ema.update(1), "step": whole}


class Operators(TorchDispatchMode):
    """Counts the operators started within it, but for those that only view or allocate: about the
    kernels that a GPU starts, each of which takes its CPU some microseconds."""

    FREE = {"view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "permute",
            "alias", "unsqueeze", "squeeze", "detach", "as_strided", "split", "split_with_sizes",
            "unbind", "empty", "_reshape_alias"}

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator.overloadpacket.__name__ not in self.FREE
        return operator(*args, **(kwargs or {}))


def inference_parts(args: argparse.Namespace, device: torch.device) -> dict:
    """{part: a function}: the network in eval mode as trained, and fused, at two batch sizes."""
    model = YoloNasPose(args.model).to(device, memory_format=torch.channels_last).eval()
    fused = copy.deepcopy(model).fuse()
    found = {}
    for b in (1, 8):
        x = torch.rand(b, 3, args.image_size, args.image_size, device=device)
        x = x.contiguous(memory_format=torch.channels_last)
        for name, net in (("", model), (", fused", fused)):
            found[f"inference, batch {b}{name}"] = lambda net=net, x=x: run(net, x, args.amp)
    return found


@torch.inference_mode()
def run(net: nn.Module, x: torch.Tensor, amp: str) -> None:
    """The network on images, decoded."""
    with torch.autocast(x.device.type, train.AMP_DTYPES[amp], enabled=amp != "no"):
        decode(net(x))


def least(parts: dict, rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds of each function, the least of interleaved rounds (after one to warm up)."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    best = dict.fromkeys(parts, float("inf"))
    for i in range(rounds + 1):
        for name, function in parts.items():
            start = clock()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i:
                best[name] = min(best[name], clock() - start)
    return best


def loader_rates(data: str, size: int, rounds: int) -> dict[str, float]:
    """Samples a second and core of each pipeline of LOADERS, from the least time of each sample."""
    sets, least = {}, {}
    for name, augment in LOADERS.items():
        json_path, folder = find_split(data, "val2017" if augment == PLAIN else "train2017")
        labels = read_json(json_path)
        sets[name] = CocoPose(flatten(labels), folder, read_skeleton(labels), size, "center",
                              augment)
    for _ in range(rounds):
        for name, dataset in sets.items():
            for i in range(min(len(dataset), 40)):
                start = time.process_time()
                dataset[0, i]  # the same work again: the least is the machine's
                seconds = time.process_time() - start
                least.setdefault(name, {})[i] = min(seconds, least.get(name, {}).get(i, seconds))
    return {name: len(seconds) / sum(seconds.values()) for name, seconds in least.items()}


def scale_figures() -> None:
    """What grows with the number of images: the time to read a json in which each has a person,
    the memory of a loader process, and what a training sample costs. All records name one file."""
    sets, best = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        draw_dataset(f"{folder}/one", 1, 1)
        one = read_json(find_split(f"{folder}/one", "train2017")[0])
        image, person = one["images"][0], one["annotations"][0]
        for images in (1_000, 10_000, 118_287):
            Path(f"{folder}/{images}.json").write_text(json.dumps({
                "categories": one["categories"],
                "images": [{**image, "id": i} for i in range(images)],
                "annotations": [{**person, "id": i, "image_id": i} for i in range(images)]}))
            start = time.process_time()
            labels = read_json(f"{folder}/{images}.json")
            annotations, skeleton = flatten(labels), read_skeleton(labels)
            seconds = time.process_time() - start
            del labels
            sets[images] = CocoPose(annotations, f"{folder}/one/train2017", skeleton, 320, "center",
                                    MOSAIC)
            samples = iter(make_loader(sets[images], stream(images, 0, 1), 1, torch.device("cpu")))
            for _ in range(50):
                next(samples)
            worker, = multiprocessing.active_children()
            kb = dict(line.split()[:2] for line in open(f"/proc/{worker.pid}/smaps_rollup"))
            own = (int(kb["Private_Clean:"]) + int(kb["Private_Dirty:"])) / 1000
            print(f"{images:6} images: json read in {seconds:.2f} s; a loader process takes "
                  f"{int(kb['Rss:']) / 1000:.0f} MB with torch in it, {own:.0f} MB of its own")
            worker.kill()
            worker.join()
        for i in range(12 * 40):  # 40 samples, the least time of each; sets in turn
            for images, dataset in sets.items():
                start = time.process_time()
                dataset[0, i % 40]
                spent = time.process_time() - start
                best[images, i % 40] = min(spent, best.get((images, i % 40), spent))
    for images in sets:
        ms = 1000 / 40 * sum(best[images, i] for i in range(40))
        print(f"{images:6} images: {ms:.2f} ms a sample")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", metavar="DIR", help="COCO root; default: people drawn by people.py")
    p.add_argument("--model", choices=[*SIZES], default="n")
    p.add_argument("--image-size", type=int, default=320, help="px; default: 320")
    p.add_argument("--batch-size", type=int, default=4, help="images; default: 4")
    p.add_argument("--people", type=int, default=3, help="in each image; default: 3")
    p.add_argument("--amp", choices=list(train.AMP_DTYPES), default="no")
    p.add_argument("--compile", action="store_true")
    p.add_argument("--rounds", type=int, default=12, help="default: 12")
    p.add_argument("--only", choices=["loader", "step", "inference", "scale"],
                   help="default: the first three")
    p.add_argument("--json", metavar="FILE", help="write the figures")
    args = p.parse_args()
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    if args.only == "scale":
        scale_figures()
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = {"unit": unit(device)}
    if args.only in (None, "step"):
        parts |= step_parts(args, device)
    if args.only in (None, "inference"):
        parts |= inference_parts(args, device)
    if "step" in parts and not args.compile:
        parts["step"]()  # the first one also makes the optimizer's state
        with Operators() as operators:
            parts["step"]()
        print(f"{operators.count} operators a step")
    print(f"{args.model}, {args.image_size} px, batch {args.batch_size}, {args.people} people, amp "
          f"{args.amp}, torch {torch.__version__}, {device}, one thread; about {args.rounds} steps")
    found = {"machine": f"{torch.__version__}, {device}", "flags": vars(args), "ms": {}}
    if args.only != "loader":
        seconds = least(parts, args.rounds, device)
        found["ms"] = {name: 1000 * s for name, s in seconds.items()}
        flops = 2 * 3 * 9 * 64 * 64 * 4 * 80 * 80
        print(f"unit {1000 * seconds['unit']:.1f} ms = {flops / seconds['unit'] / 1e9:.0f} GFLOP/s")
        for name, s in seconds.items():
            share = f"{s / seconds['step']:8.1%} of a step" if "step" in seconds else ""
            print(f"{name:28} {1000 * s:9.1f} ms {s / seconds['unit']:8.2f} units {share}")
    if args.only in (None, "loader"):
        if not args.data:
            args.data = "drawn_people"
            draw_dataset(args.data)
        found["samples_s"] = loader_rates(args.data, args.image_size, args.rounds)
        for name, rate in found["samples_s"].items():
            print(f"loader, {name:22} {rate:7.1f} samples/s and core")
    found["memory_gb"] = train.largest_memory(device)
    print(f"largest memory {found['memory_gb']:.1f} GB{' of the GPU' * (device.type == 'cuda')}")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
