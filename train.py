"""Train YOLO-NAS-Pose.

    python train.py                                                # drawn people, minutes on a CPU
    python train.py --data coco --out runs/coco                    # COCO keypoints, one device
    torchrun --nproc-per-node 8 train.py --data coco --out runs/8  # eight GPUs
    python train.py --out runs/coco --resume                       # go on after a stop

Read in this order: RECIPES, FLAGS, main, train_step.

Axes    B images of this process and micro-batch   G images of one optimizer step, all processes

N processes train the same model as one: each step takes the same G images in the same order, norms
see all processes' images (SyncBatchNorm), and the gradient is summed first, then divided once. A
resumed run equals an unbroken one bit for bit: a sample depends on (seed, epoch, index), the
learning rate on the step, and the checkpoint holds everything else.
"""
import argparse
import datetime
import errno
import fcntl
import math
import os
import re
import resource
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Waiting CPU threads spin briefly, then sleep: without sleep they starve the loader processes, and
# sleeping at once halves the speed. OpenMP reads this variable when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data import (COCO_NAMES, FLIP, MOSAIC, MOSAIC_HEAVY, PAD_MODES, PLAIN, Augment, Cache,
                  CocoPose, DataError, Skeleton, check_files, describe, find_split, fingerprint,
                  flatten, make_loader, random_size, read_json, read_skeleton, resize,
                  stop_workers, stream)
from draw import Log, print_plan, say, svg_chart, write_file
from evaluate import (check_names, check_places, evaluate, extremes, from_rank_0, gather,
                      load_model, numbers, quiet_coco, save_people, to_input, val_batches)
from loss import DISTILL_TERMS, MASK_TERMS, LossWeights, PoseLoss
from model import (SIZES, YoloNasPose, decode, load_file, load_last, load_weights, save_last,
                   sync_batch_norm, write_atomically)
from people import draw_dataset
from schedule import (EMA, EarlyStopping, WarmupEnd, curves, lr_share, make_optimizer, make_plan,
                      make_scheduler, param_groups, scaled_lr, set_momentum, sigma_scale)

AMP_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AUGMENTS = {"mosaic": MOSAIC, "heavy": MOSAIC_HEAVY, "flip": FLIP, "none": PLAIN}

# The recipes. lr is meant for lr_batch images per step; scaled_lr adapts it to the actual number.
COMMON = {"image_size": 640, "epochs": 1000, "patience": 100, "eval_every": 1, "warmup": "auto",
          "warmup_start": 0.0, "warmup_momentum": None, "warmup_bias_lr": None, "momentum": 0.9,
          "final_ratio": 0.05, "weight_decay": 1e-6, "ema_decay": 0.997, "sigma_start": 8.0,
          "sigma_epochs": 5.0}
NS = {**COMMON, "lr": 2e-3, "ema": "threshold", "dfl_weight": 0.01, "pose_weight": 34.0,
      "augment": "mosaic"}
ML = {**COMMON, "ema": "exp", "dfl_weight": 0.5, "pose_weight": 10.0, "augment": "heavy"}
RECIPES = {
    "n": {**NS, "batch_size": 60, "lr_batch": 480},
    "s": {**NS, "batch_size": 48, "lr_batch": 384},
    "m": {**ML, "batch_size": 32, "lr_batch": 256, "lr": 1e-4},
    "l": {**ML, "batch_size": 24, "lr_batch": 192, "lr": 8e-5},
}
# The rates of m and l assume a trained detector's weights. For random weights: these, untested.
FROM_SCRATCH = {"lr": 2e-3, "lr_batch": 384}
# SGD has Ultralytics' rates: in the warmup, momentum and rates rise, but the biases' rate falls.
OPTIMIZERS = {"adamw": {}, "sgd": {"lr": 0.01, "lr_batch": 64, "momentum": 0.937,
                                   "warmup_momentum": 0.8, "warmup_bias_lr": 0.1}}
# For two CPU cores: small images; the keypoint tolerance narrows nearly to the end.
DEMO = {"image_size": 96, "epochs": 8, "batch_size": 16, "lr_batch": 16, "lr": 2.5e-3,
        "augment": "flip", "eval_every": 2, "warmup": "50", "ema_decay": 0.99, "sigma_epochs": 7.5}

OUT = "runs/train"

# Flags that --resume may change. The images per step stay the same, but may be split differently;
# labels and teacher may lie elsewhere, but must be the same.
PATHS = ("data", "train_json", "train_images", "val_json", "val_images")
MAY_CHANGE = ("epochs", "max_steps", "workers", "batch_size", "auto_batch", "accumulate",
              "eval_every", "log_every", "save_every", "sync_check", "max_skipped", "max_bad",
              "patience", "teacher", *PATHS)


def factors(text: str) -> dict[str, float]:
    """Parse a flag value like backbone=0.1,neck=0.5 into {part: factor}."""
    found = dict(item.split("=") for item in text.split(","))
    known = {"backbone", "neck", "heads", "mask"}
    if not found.keys() <= known or len(found) < len(text.split(",")):
        raise argparse.ArgumentTypeError(f"{text}, expected each once: backbone, neck, heads, mask")
    if not all(0 <= float(factor) < math.inf for factor in found.values()):
        raise argparse.ArgumentTypeError(f"{text}, expected factors of 0 or more")
    return {part: float(factor) for part, factor in found.items()}


def epochs_of(text: str) -> dict[str, int]:
    """Parse a flag value like backbone:-1,bn into {part: epochs}; 0 means all epochs."""
    found = {part: int(n or 0) for part, _, n in (item.partition(":") for item in text.split(","))}
    parts = {"backbone", "neck", "bn"}
    if not found.keys() <= parts or len(found) < len(text.split(",")) or ":0" in text:
        raise argparse.ArgumentTypeError(f"{text}, expected each once: backbone, neck, bn, alone "
                                         f"or with epochs, like backbone:5 or backbone:-1")
    return found


# {group: (flag, type or choices, default, help)}. bool: a switch; None: none, or the recipe's.
FLAGS = {
    "data": [
        ("data", str, None, "COCO root: annotations/person_keypoints_SPLIT.json, and SPLIT/ or "
         "images/SPLIT/; default: people drawn by people.py"),
        ("train-split", str, "train2017", "name of the split to train on"),
        ("val-split", str, "val2017", "name of the split to evaluate"),
        ("train-json", str, None, "labels to train on; this and the next three replace --data"),
        ("train-images", str, None, "folder of the images that --train-json names"),
        ("val-json", str, None, "labels to evaluate on"),
        ("val-images", str, None, "folder of the images that --val-json names"),
        ("only-people", bool, False, "train only on images with a labeled person"),
        ("flip-pairs", str, None, "names that a mirror swaps, A:B,C:D; default: left x, right x"),
        ("sigmas", numbers, None, "spread of each keypoint, for loss and AP, as a share of "
         "sqrt(area); default: the json's, else COCO's for COCO's names, else 0.05"),
        ("image-size", int, None, "side of the padded input, px"),
        ("train-pad", PAD_MODES, "center", "where the padding of the square input goes"),
        ("val-pad", PAD_MODES, "bottom_right", "the same in evaluation; both as in the original"),
        ("cache", ("none", "ram", "disk"), "none", "keep decoded images, in memory or in a file "
         "FOLDER.*.cache beside their folder, on a local disk; zooming in then gets softer"),
        ("workers", int, None, "loader processes; default: cores per process minus 1, at most 8"),
    ],
    "augmentation": [
        ("augment", tuple(AUGMENTS), None, "strength; each flag below changes one number of it"),
        ("mosaic", float, None, "probability of a 2 x 2 collage"),
        ("close-mosaic", int, 0, "number of last epochs without mosaic"),
        ("mixup", float, None, "probability of a blend with another sample"),
        ("flip", float, None, "probability of a mirror image"),
        ("bgr", float, None, "probability that red and blue are swapped"),
        ("rotate90", float, None, "probability of quarter turns"),
        ("scale", float, None, "zoom by a factor from 1 - X to 1 + X"),
        ("occlude", float, None, "probability that a person is partly covered"),
        ("multi-scale", float, 0.0, "each step at 1 - X to 1 + X times --image-size"),
    ],
    "model": [
        ("model", tuple(RECIPES), "n", "size of the network"),
        ("weights", str, None, "start from this checkpoint's weights"),
        ("mask", bool, False, "add a branch that predicts a person mask, from segmentations"),
        ("teacher", str, None, "distillation: learn from this checkpoint's model, too"),
        ("teacher-model", tuple(SIZES), None, "size of the teacher, for an official file"),
        ("distill-weight", float, 1.0, "weight of the teacher's loss terms"),
    ],
    "optimization": [
        ("recipe", ("nanopose", "reference"), "nanopose",
         "reference: the original's rules for the first steps and for crowds"),
        ("epochs", int, None, "passes over the training images"),
        ("max-steps", int, None, "stop --epochs' schedule at this step; --resume forgets it"),
        ("batch-size", int, None, "images per process and micro-batch"),
        ("auto-batch", bool, False, "if memory runs out, begin again with half the micro-batch"),
        ("accumulate", int, 1, "micro-batches per step"),
        ("optimizer", tuple(OPTIMIZERS), "adamw", "optimizer"),
        ("momentum", float, None, "SGD's momentum, or Adam's beta1"),
        ("lr", float, None, "peak learning rate for --lr-batch images per step"),
        ("lr-batch", int, None, "images per step that --lr is meant for"),
        ("lr-scale", ("linear", "sqrt", "none"), "linear", "how --lr grows with images per step"),
        ("max-lr", float, math.inf, "upper limit of the scaled learning rate"),
        ("lr-mult", factors, {}, "factors on parts' learning rates, like backbone=0.1,neck=0.5"),
        ("warmup", str, None, "length: steps, epochs (3e), or auto: 3 epochs of less than 10,000 "
         "images, else 1000 steps; above 256 images per step, at least 100 log2(images per step); "
         "at most half of the steps of a --restarts cycle"),
        ("warmup-shape", ("linear", "power", "cosine"), "linear", "shape of the rise"),
        ("warmup-gamma", float, 2.0, "exponent of --warmup-shape power"),
        ("warmup-start", float, None, "learning rate at step 0 / peak"),
        ("warmup-momentum", float, None, "momentum at step 0"),
        ("warmup-bias-lr", float, None, "learning rate of biases at step 0"),
        ("warmup-mult", factors, {}, "factors on parts while warming up, like backbone=0.1"),
        ("dynamic-warmup", bool, False, "extend while the loss does not fall, up to 3 times "
         "--warmup, or half of the steps of a --restarts cycle"),
        ("schedule", ("cosine", "linear", "step", "flat"), "cosine", "learning rate after warmup"),
        ("lr-steps", numbers, [], "for step: epochs after which the rate drops, like 90,120, "
         "counted from each restart"),
        ("lr-factor", float, 0.1, "for step: factor of each drop"),
        ("restarts", int, 0, "how often warmup and schedule begin again"),
        ("final-ratio", float, None, "last learning rate / peak"),
        ("weight-decay", float, None, "weight decay, not on biases and norms"),
        ("clip-norm", float, math.inf, "clip the gradient to this norm"),
        ("dfl-weight", float, None, "weight of the box distribution term"),
        ("pose-weight", float, None, "weight of the keypoint position term"),
        ("label-smoothing", float, 0.0, "moves the person targets 0 and 1 inwards by X / 2"),
        ("ema", ("threshold", "exp", "constant"), None, "how the weight average's decay grows"),
        ("ema-decay", float, None, "largest decay of the weight average"),
        ("sigma-start", float, None, "keypoint tolerance at step 0, as a multiple of sigma"),
        ("sigma-epochs", float, None, "epochs until the tolerance has shrunk to sigma"),
        ("amp", tuple(AMP_DTYPES), "no", "autocast type; no: float32, but TF32 in a GPU's "
         "convolutions, PyTorch's default"),
        ("compile", bool, False, "torch.compile the network: minutes to start, then 5 to 20 %% "
         "faster in bf16 on a CPU, no faster on a GPU at 96 px, untried there at larger sizes"),
        ("double", bool, False, "train in float64: slow, to check equivalences"),
        ("freeze", epochs_of, {}, "freeze backbone, neck or bn (all norms) for the first epochs "
         "(backbone:5), the last (backbone:-1), or all; frozen norms keep their statistics"),
        ("no-sync-bn", bool, False, "norms use each process's own images only"),
        ("max-skipped", int, 20, "stop after this many non-finite steps in a row; fp16 looks "
         "for its scale in the first ones"),
        ("max-bad", int, 10, "stop when more images cannot be read; others take their place"),
        ("deterministic", bool, False, "the same bits in every run on a GPU; slower"),
    ],
    "run": [
        ("out", str, OUT, "folder of checkpoints, log.jsonl, pictures"),
        ("resume", bool, False, "continue the run in --out with its flags; of these only "
         f"{', '.join(MAY_CHANGE).replace('_', '-')} may be changed"),
        ("dry-run", bool, False, "check the data, train 20 or --max-steps steps, print plan, ETA, "
         "draw curves and the first batch into OUT/dry_run; nothing else"),
        ("save-every", int, None, "steps between checkpoints within an epoch"),
        ("save-epochs", numbers, [], "after these epochs keep the averaged weights, as epoch_N.pt"),
        ("average-best", int, 0, "at the end, average the N best epochs into average.pt"),
        ("sync-check", int, None, "steps between comparisons of all tensors of all processes"),
        ("eval-every", int, None, "epochs between evaluations"),
        ("patience", int, None, "stop after N epochs without a better AP (OKS while AP is 0.001 "
         "or less)"),
        ("log-every", int, 50, "steps between progress lines; step 5 prints a first ETA"),
        ("seed", int, 0, "random seed of weights, order, augmentation"),
    ],
}
METAVARS = {str: "TEXT", int: "N", float: "X", numbers: "X,X,...", factors: "PART=X,...",
            epochs_of: "PART:EPOCHS,..."}
# No number may be negative. Those in POSITIVE must not be 0, those in SHARES not exceed 1.
POSITIVE = ("image_size", "epochs", "batch_size", "accumulate", "lr", "lr_batch", "max_lr",
            "eval_every", "patience", "log_every", "clip_norm", "max_steps", "save_every",
            "sync_check", "max_skipped", "sigma_start")
SHARES = ("mosaic", "mixup", "flip", "bgr", "rotate90", "scale", "occlude", "multi_scale",
          "label_smoothing", "ema_decay")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; exit with code 2 and one line of advice if a value cannot work.

    Flags that were not given are None until fill_recipe; `given` lists the names of the others.
    """
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage="%(prog)s [flags]")
    for title, rows in FLAGS.items():
        group = p.add_argument_group(title)
        for name, kind, default, text in rows:
            default = "the recipe's" if name.replace("-", "_") in RECIPES["n"] else default
            text += "" if kind is bool or default in (None, {}, []) else f"; default: {default}"
            how = ({"action": "store_true", "default": None} if kind is bool else
                   {"choices": kind} if isinstance(kind, tuple) else
                   {"type": kind, "metavar": METAVARS[kind]})
            group.add_argument(f"--{name}", help=text, **how)
    args = p.parse_args(argv)
    values = {name: value for name, value in sorted(vars(args).items()) if value is not None}
    args.given = list(values)

    def check(name: str, fine: bool, expected: str) -> None:
        if not fine:
            p.error(f"--{name.replace('_', '-')} {values[name]} {expected}")
    for name, value in ((name, x) for name, value in values.items()
                        for x in (value if isinstance(value, list) else [value])):
        if isinstance(value, int | float):
            check(name, value >= 0, "must be 0 or more")
            check(name, value > 0 or name not in POSITIVE, "must be positive")
            check(name, value <= 1 or name not in SHARES, "must lie in 0 to 1")
            check(name, value < 1 or "momentum" not in name and name != "ema_decay",
                  "must be less than 1")
            check(name, value < 2**63 or name in ("clip_norm", "max_lr"), "is too large")
    check("out", args.out != "", "must name a folder")
    size = args.image_size or 32
    check("image_size", size % 32 == 0, "must be a multiple of 32, the largest stride")
    if args.dry_run and args.resume:
        p.error("--resume goes on with a run, --dry-run makes none; give one of them")
    if args.double and args.amp in ("bf16", "fp16"):
        p.error(f"--double trains in float64, --amp {args.amp} does not; give one of them")
    if args.optimizer == "sgd" and args.momentum == 0:
        p.error("--momentum 0 is nothing for --optimizer sgd, whose momentum is Nesterov's")
    slowed = {name for name in ("lr_mult", "warmup_mult") if "mask" in values.get(name, ())}
    for names, fine, flag in (
            ({"teacher_model", "distill_weight"}, args.teacher is not None, "teacher"),
            ({"lr_steps", "lr_factor"}, args.schedule == "step", "schedule step"),
            ({"final_ratio"}, args.schedule in (None, "cosine", "linear") or args.restarts,
             "schedule cosine or linear"),
            ({"lr_batch"}, args.lr_scale != "none", "lr-scale linear or sqrt"),
            ({"warmup_gamma"}, args.warmup_shape == "power", "warmup-shape power"),
            (slowed, args.mask, "mask")):
        for name in sorted(values.keys() & names):
            check(name, fine or args.resume, f"has no effect without --{flag}")
    missing = sorted({*PATHS} - {"data"} - values.keys())
    if 0 < len(missing) < 4 and not (args.data or args.resume):
        p.error(f"without --data all of --train-json, --train-images, --val-json and --val-images "
                f"are needed; --{missing[0].replace('_', '-')} is missing")
    args.out = args.out or OUT  # already here: --resume reads the run there
    check_places(p, [], [], new=args.out)
    args.out += "/dry_run" if args.dry_run else ""
    return args


def fill_recipe(args: argparse.Namespace) -> dict[str, str]:
    """Set every flag that was not given. Return where each value came from."""
    defaults = {name.replace("-", "_"): default for rows in FLAGS.values()
                for name, _, default, _ in rows}
    size, optimizer = args.model or defaults["model"], args.optimizer or defaults["optimizer"]
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    rows = (  # (source, does it apply?, values); later rows win
        ("default", True, defaults),
        (f"recipe {size}", True, RECIPES[size]),
        ("from scratch, untested", size in ("m", "l") and not args.weights, FROM_SCRATCH),
        ("demo", not args.data and not args.train_json, DEMO),
        (optimizer, True, OPTIMIZERS[optimizer]),
        ("reference", args.recipe == "reference", {"sigma_epochs": 0.0}),
        ("dry run", args.dry_run, {"max_steps": 20, "log_every": 20}),
        ("machine", True, {"workers": min(max(share - 1, 1), 8)}))
    source = {}
    for name in defaults:
        kept = "divided anew" if name in ("batch_size", "accumulate") else "saved"  # see cut_batch
        source[name] = "flag" if name in args.given else kept if args.resume else "default"
        if getattr(args, name) is None:
            source[name], row = next((origin, row) for origin, applies, row in reversed(rows)
                                     if applies and name in row)
            setattr(args, name, row[name])
    return source


def setup_distributed(args: argparse.Namespace) -> tuple[int, int, torch.device, str]:
    """Join torchrun's process group if there is one. Return (rank, world_size, device, launch).

    launch is a unique name for this torchrun launch; it stays when torchrun restarts its processes.
    Tensors travel over NCCL, or gloo without GPUs; other objects always over gloo. No process waits
    longer than 10 minutes, many times what process 0 takes to score COCO's 5,000 images.
    Raises ValueError if launcher, GPUs, port or other machines' flags do not allow that.
    """
    torch.set_flush_denormal(True)  # denormal numbers take a CPU 10 to 100 times as long
    env, gpus, wait = os.environ, torch.cuda.device_count(), datetime.timedelta(minutes=10)
    if "LOCAL_RANK" not in env:
        for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            if int(env.get(name) or 1) > 1:
                raise ValueError(f"{name} is {env[name]}, but LOCAL_RANK is not set; start by "
                                 f"torchrun, or, if each is meant to train alone, unset {name}")
        if gpus > 1:
            say(f"check         uses one of {gpus} GPUs; all: torchrun --nproc-per-node {gpus}")
        return 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"), ""
    missing = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - env.keys()
    if missing:
        raise ValueError(f"LOCAL_RANK is set, but not {', '.join(sorted(missing))}; start by "
                         f"torchrun, or unset LOCAL_RANK to train on one process")
    local_rank, rank, world_size = (int(env[n]) for n in ("LOCAL_RANK", "RANK", "WORLD_SIZE"))
    if 0 < gpus <= local_rank:
        raise ValueError(f"torchrun started local rank {local_rank}, but this machine has {gpus} "
                         f"GPUs; use --nproc-per-node {gpus} or fewer")
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    is_master = rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(host, port, is_master=is_master, timeout=wait, multi_tenant=True)
    except RuntimeError as error:
        raise ValueError(f"{host}:{port}: {str(error).splitlines()[0]}; is the port taken? Choose "
                         f"another --master-port") from None
    # A restart's store still holds what nccl's watchdogs wrote, which would end this start, too.
    env.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    start = name_of_start(store, rank, world_size, wait)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", rank=rank, timeout=wait,
                            world_size=world_size, store=dist.PrefixStore(start, store))
    may_differ = ("out", "weights", "teacher", "workers", "given")  # contents: see make_model
    check_alike({"torch": torch.__version__, "device": device.type} | {
        f"--{name.replace('_', '-')}": bool(value) if name in PATHS else value
        for name, value in vars(args).items() if name not in may_differ})
    if gpus:  # nccl takes its buffers now: later, torch may hold all of the memory
        dist.all_reduce(torch.zeros(1, device=device))
    # torchrun's store outlives its processes, so the first start's name stays there. Nodes may
    # differ in TORCHELASTIC_RESTART_COUNT, so it cannot be the name.
    return rank, world_size, device, store.compare_set("launch", "", start).decode()


def check_alike(mine: dict) -> None:
    """Raise ValueError if one of these values, {name: value}, differs between processes."""
    for rank, (host, other) in enumerate(gather((socket.gethostname(), mine))):
        for name in [name for name in mine if mine[name] != other[name]]:
            raise ValueError(f"{name}: {other[name]} in process {rank} on {host}, {mine[name]} on "
                             f"{socket.gethostname()}; start all machines in the same way")


def name_of_start(store: dist.Store, rank: int, world_size: int, wait: datetime.timedelta) -> str:
    """Agree with the other processes on a name for this start that no earlier start used.

    In torch 2.14 a restart finds the addresses of dead processes in the store, and machines do not
    agree on the number of restarts. So process 0 chooses a name and answers each of the others; a
    process that has read the name of an earlier start gets no answer, and reads again.
    """
    me, started = f"{socket.gethostname()} {os.getpid()} {time.time_ns()}", time.monotonic()
    if rank == 0:
        store.set("leader", me)
        for other in range(1, world_size):
            store.set(f"welcome {store.get(f'{me} {other}').decode()}", me)
        return me
    while time.monotonic() < started + wait.total_seconds():
        store.set(f"{store.get('leader').decode()} {rank}", me)
        try:
            store.wait([f"welcome {me}"], datetime.timedelta(seconds=2))
            return store.get(f"welcome {me}").decode()
        except dist.DistStoreError:
            continue
    raise ValueError(f"process 0 was not seen within {wait}; do all nodes run the same command?")


def open_data(args: argparse.Namespace, rank: int) -> tuple[CocoPose, CocoPose, COCO, dict]:
    """The training set, the validation set and its labels; and fingerprints, {what: text}, of what
    must be the same on all machines and after --resume. Raises ValueError and OSError."""
    random_size(args.image_size, args.multi_scale, args.seed, 0)  # raises if it has no other size
    if not args.data and not args.train_json:
        args.data = "drawn_people"
        from_rank_0(draw_dataset(args.data) if rank == 0 else None)  # the others wait
    sets = []
    for split, name in ("train", args.train_split), ("val", args.val_split):  # train: its skeleton
        path, folder = getattr(args, f"{split}_json"), getattr(args, f"{split}_images")
        if not (path and folder):
            default_path, default_folder = find_split(args.data, name)
            path, folder = path or default_path, folder or default_folder
        labels = read_json(path)
        annotations = flatten(labels, args.only_people and split == "train", args.mask)
        check_files(annotations, folder, headers=split == "val")
        if split == "train":
            skeleton = read_skeleton(labels, args.flip_pairs, args.sigmas)
        check_names(path, labels["categories"][0]["keypoints"], skeleton.names)
        if not any(any(a["keypoints"][2::3]) and not a["iscrowd"] for a in labels["annotations"]):
            raise ValueError(f"{path}: nobody in it has a labeled keypoint; check the export")
        sets.append((annotations, folder, skeleton, args.image_size))
    contents = {"keypoints": str(skeleton), "labels to train on": fingerprint(sets[0][0]),
                "labels to evaluate": fingerprint(sets[1][0])}
    check_alike(contents)
    mine, others = (set(map(f"{os.path.realpath(folder)}/".__add__, annotations.files.tolist()))
                    for annotations, folder, *_ in sets)
    if mine & others and rank == 0:
        say(f"check         {len(mine & others)} of {len(others)} images to evaluate are also "
            f"trained on: AP says nothing about new ones")
    augment, names = AUGMENTS[args.augment], {*Augment._fields} & {*vars(args)}
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.scale is not None:
        changes["scale"] = (1 - args.scale, 1 + args.scale)
        if not augment.affine:  # the strength has no turns and shifts: zoom only
            changes |= {"affine": 1.0, "degrees": 0.0, "translate": 0.0}
    if args.close_mosaic:
        none = args.close_mosaic >= args.epochs and not args.resume
        if none or not augment._replace(**changes).mosaic:
            raise ValueError(f"--close-mosaic {args.close_mosaic}: no epoch of {args.epochs} has a "
                             f"mosaic then; give fewer, or --mosaic above 0")
        changes["last_mosaic"] = args.epochs - args.close_mosaic
    augment = augment._replace(**changes)
    cached = args.cache != "none" and not (args.cache == "disk" and args.dry_run)
    caches = [Cache(a, folder, args.image_size, args.cache) if cached else None
              for a, folder, *_ in sets]
    train_set = CocoPose(*sets[0], args.train_pad, augment, args.seed, args.recipe != "reference",
                         caches[0], spare=args.max_bad)
    val_set = CocoPose(*sets[1], args.val_pad, cache=caches[1])
    return train_set, val_set, quiet_coco(labels), contents


def flat_gradients(parameters: list[nn.Parameter], extra: int) -> tuple[Tensor, Tensor]:
    """Put all gradients into one flat tensor. Return it, and its last `extra` elements, unused.

    From now on each p.grad is a view into it, also kept as p.piece, so that one all-reduce, one
    division and one norm cover all of them. A parameter without a gradient counts as 0. Never call
    zero_grad(): it would detach p.grad from the flat tensor.
    """
    sizes = [-(-p.numel() // 16) * 16 for p in parameters]  # 64-byte aligned: fast kernels
    flat = torch.zeros(sum(sizes) + extra, dtype=parameters[0].dtype, device=parameters[0].device)
    for i, p in enumerate(parameters):
        p.piece = flat.as_strided(p.size(), p.stride(), sum(sizes[:i]))  # fused needs p's strides
        p.grad = p.piece
    return flat, flat[sum(sizes):]


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """Copies, made together: a GPU takes longer to start a kernel for each than to run it."""
    made = {}
    for dtype in {t.dtype for t in tensors}:
        some = [t for t in tensors if t.dtype == dtype]
        made |= zip(some, torch.cat([t.flatten() for t in some]).split([t.numel() for t in some]))
    return [made[t].view_as(t) for t in tensors]


def average_statistics(model: nn.Module) -> None:
    """Average the running statistics of unsynced norms over all processes. One all-reduce: one for
    each of size n's 270 tensors would take a quarter of a second over gloo."""
    moving = [t for norm in model.modules() if isinstance(norm, nn.BatchNorm2d) and norm.training
              for t in (norm.running_mean, norm.running_var)]
    if moving:  # else all are frozen
        mean = torch.cat(moving)
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
        torch._foreach_copy_(moving, mean.split([len(t) for t in moving]))


class Step(NamedTuple):
    """What an optimizer step reports: the last four are of this process, the others of all."""

    sums: list[float]    # sum of assigned scores, then the sum of each loss term
    norm: float          # of the gradient, before clipping
    finite: bool         # if not, the model is as before, only the place in the stream moved
    stop: bool           # some process was told to stop
    bad: bool            # some process met images that cannot be read
    waited: float        # seconds this process waited for data
    image_ids: list[int]   # of the images this process has seen
    mine: list[float]    # `sums` of this process
    errors: list[str]    # messages about its images that cannot be read


def train_step(model: nn.Module, teacher: nn.Module | None, criterion: PoseLoss, batches: Iterator,
               optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
               gradients: tuple[Tensor, Tensor], args: argparse.Namespace, size: int,
               sigma_scale: float, stop: bool) -> Step:
    """Take an optimizer step: `accumulate` micro-batches on each process, of images of `size` px.

    gradients is what flat_gradients returns; its extra elements carry the assigned-score sum, the
    terms, the number of bad images, and `stop`, which asks all processes to stop after this step.
    """
    waited, image_ids, errors = 0.0, [], []
    flat, tail = gradients
    sums, device = tail[:-2], flat.device  # views of flat: all processes' from all_reduce on
    half = torch.autocast(device.type, AMP_DTYPES[args.amp], enabled=args.amp != "no")
    flat.zero_()
    before = copies(list(model.buffers()))
    for _ in range(args.accumulate):
        start = time.monotonic()
        images, targets = next(batches)
        waited += time.monotonic() - start
        image_ids += targets["image_id"].tolist()
        errors += targets["bad"]
        targets = {name: targets[name].to(device, non_blocking=True) for name in
                   ("boxes", "keypoints", "crowd", "mask") if name in targets}
        images, targets = resize(to_input(images, model), targets, size)
        with half:
            raw = model(images)
        raw = raw.promote()  # the assigner's 6th power would underflow in half precision
        decoded = decode(raw)
        terms, score_sum = criterion(raw, decoded, targets, sigma_scale)
        if teacher:
            with torch.no_grad(), half:
                told = teacher(images).promote()
            terms |= {name: args.distill_weight * term for name, term in criterion.distill(
                raw, decoded, told, decode(told), sigma_scale).items()}
        assert terms.keys() == set(criterion.terms), "criterion.terms lacks a term: see make_model"
        # Summed losses are too large for float16; this constant divisor cancels below.
        scaler.scale(sum(terms.values()) / args.batch_size).backward()
        sums += torch.stack([score_sum, *(terms[name] for name in criterion.terms)]).detach()
    tail[-2], tail[-1] = len(errors), stop
    mine = sums.clone()  # of this process
    if dist.is_initialized():
        dist.all_reduce(flat)
        if args.no_sync_bn:
            average_statistics(model)
    scaler.unscale_(optimizer)
    # The only normalization: by the sum of the scores assigned in the whole step, at least 1.
    gradient = flat[:-len(tail)]
    gradient *= args.batch_size / sums[0].clamp(min=1)
    norm = torch.linalg.vector_norm(gradient)
    values = torch.cat([mine, tail, norm[None]]).tolist()  # waits for the GPU, once a step
    mine, (*total, bad, stops, norm) = values[:len(sums)], values[len(sums):]
    finite = math.isfinite(norm) and all(map(math.isfinite, total))
    if finite:
        if norm > args.clip_norm:
            gradient *= args.clip_norm / norm
        scaler.step(optimizer)
    else:
        torch._foreach_copy_(list(model.buffers()), before)
    scaler.update()
    return Step(total, norm, finite, stops > 0, bad > 0, waited, image_ids, mine, errors)


def sync_check(model: nn.Module, mine: list[float], rank: int) -> None:
    """Compare weights and buffers of all processes; end the run at the first that differs.
    mine is this process's Step.mine."""
    state = model.state_dict()
    marks, losses = zip(*gather(([fingerprint([t.cpu().numpy()]) for t in state.values()],
                                 sum(mine[1:]))))
    for other, theirs in enumerate(marks):
        wrong = [name for name, a, b in zip(state, marks[0], theirs) if a != b]
        if wrong:
            sys.exit(f"train.py: --sync-check: {wrong[0]} differs between processes 0 and {other}; "
                     f"do their machines run the same code and versions?" if rank == 0 else 1)
    if rank == 0:
        say(f"sync check: {len(state)} tensors are equal on {len(losses)} processes; loss sums of "
            f"their images {min(losses):.4g} to {max(losses):.4g}")


def read_run(args: argparse.Namespace, rank: int, launch: str) -> dict | None:
    """The checkpoint to go on from, with --resume or after a restart by torchrun; else None.

    Flags not given get its values. Raises ValueError if the run, its folder and flags do not fit.
    """
    saved, lost = from_rank_0((load_last(args.out), any(Path(args.out).glob("*.pt.damaged")))
                              if rank == 0 else None)
    if not saved:
        if args.resume:
            raise ValueError(f"--resume: no intact last.pt or previous.pt in {args.out}; give a "
                             f"run's --out, which nodes must share, or start anew with --weights")
        if lost:
            raise ValueError(f"{args.out} held a run, whose checkpoints are damaged (*.damaged); "
                             f"give another --out, or empty this one")
        return None
    restarted = launch and saved["launch"] == launch
    if not (args.resume or restarted):
        if saved["step"] == 0:
            return None  # it ended, maybe by an error, before its first step: nothing would be lost
        raise ValueError(f"{args.out} already holds a run; add --resume to go on with it, or give "
                         f"another --out")
    there = from_rank_0([b for b in saved["best"] if os.path.exists(f"{args.out}/best_{b[1]}.pt")])
    if rank == 0 and len(there) < len(saved["best"]):
        say(f"check         best_EPOCH.pt files are gone; --average-best has {len(there)} so far")
    if rank == 0 and saved["stopper"]["best_epoch"] and not os.path.exists(f"{args.out}/best.pt"):
        say(f"check         best.pt is not in {args.out}; only a better epoch will write it again")
    saved["best"] = there
    unknown = sorted(saved["args"].keys() - vars(args).keys())
    if unknown:
        raise ValueError(f"the run in {args.out} has {', '.join(unknown)}, which are unknown here; "
                         f"go on with the code that began it")
    if restarted:  # the saved flags are this launch's; these are each machine's own
        args.given = [name for name in args.given if name in ("workers", "teacher", *PATHS)]
    for name in args.given:
        new, old = getattr(args, name), saved["args"].get(name)
        may = name in (*MAY_CHANGE, "out", "resume") and (name != "teacher" or old)
        if new != old and not may:
            raise ValueError(f"--{name.replace('_', '-')} {new} differs from the {old} of the run "
                             f"in {args.out}; leave it out, or start a new run in another --out")
    asked = {"workers"} & {*saved["args"].get("given", ())}  # else this machine's number
    here = {"out", "resume", "given", "max_steps", *args.given, *({"workers"} - asked)}
    here |= set(PATHS) if "data" in here else set()
    vars(args).update({name: v for name, v in saved["args"].items() if name not in here})
    args.given += asked
    args.resume = True
    return saved


def take_up(saved: dict, at: argparse.Namespace, parts: dict, out: str, contents: dict) -> None:
    """Restore `at` and `parts` from the checkpoint. contents are open_data's and make_model's."""
    for what, mark in contents.items():
        if saved.get("contents", contents).get(what) != mark:  # older ones have none
            sys.exit(f"train.py: not the {what} of the run in {out}; give it its own, or start a "
                     f"new run in another --out, maybe with --weights {out}/last.pt")
    end = parts["log"].total_steps
    if saved["step"] > end:
        sys.exit(f"train.py: the run in {out} is at step {saved['step']} already, and would end at "
                 f"step {end} with these --epochs; give more")
    try:
        vars(at).update({name: saved[name] for name in vars(at)})
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    except (KeyError, RuntimeError, ValueError) as error:
        sys.exit(f"train.py: the run in {out} has another network, loss or optimizer; go on with "
                 f"the code that began it: {str(error).splitlines()[-1].strip()}")
    saved.clear()  # frees the memory of a second model, average and optimizer


def cut_batch(args: argparse.Namespace, saved: dict | None, world_size: int) -> int:
    """Set batch_size and accumulate; return the images per step, which --resume never changes.

    A given --batch-size or --accumulate is kept, but not with --auto-batch or after memory ran out,
    as scripts repeat flags. Otherwise a resumed run takes the largest micro-batch that divides a
    process's share: at most what norms saw before, and half of one that ran out of memory.
    Raises ValueError if the product is not the images per step, or a norm would get one value.
    """
    if saved:
        note = f"{args.out}/out_of_memory"
        short = from_rank_0(os.path.exists(note))
        total, given = saved["global_batch"], [] if args.auto_batch or short else args.given
        share, limit = max(total // world_size, 1), args.batch_size
        if "batch_size" not in given:
            moved = (world_size != saved["world_size"] and "batch_size" not in args.given
                     and not args.no_sync_bn)  # without it, norms see batch_size images anywhere
            if "accumulate" in given or moved:
                limit = max(share // args.accumulate, 1)  # norms see as many images as before
            if os.path.exists(note):
                limit = min(limit, int(Path(note).read_text()))
            limit = min(gather(limit))  # nodes may not share a disk
            args.batch_size = max(b for b in range(1, limit + 1) if share % b == 0)
        if "accumulate" not in given:
            args.accumulate = max(share // args.batch_size, 1)
        if total % world_size:
            raise ValueError(f"a step of this run takes {total} images, which {world_size} "
                             f"processes cannot share equally; start a number that divides them")
        if args.batch_size * args.accumulate * world_size != total:
            raise ValueError(f"a step of this run takes {total} images, which are not {world_size} "
                             f"processes x {args.batch_size} images x {args.accumulate} "
                             f"micro-batches; choose numbers whose product is {total}")
    images = args.batch_size * (1 if args.no_sync_bn else world_size)
    smallest = args.image_size * (1 - args.multi_scale)  # the coarsest level is 1 x 1 at 32 px
    if images == 1 and smallest <= 32 and args.freeze.get("bn") != 0:
        raise ValueError("--batch-size 1 at 32 px leaves norms one value to learn from; give 2, or "
                         "larger images")
    return args.batch_size * args.accumulate * world_size


def out_of_memory(args: argparse.Namespace, error: RuntimeError) -> None:
    """Note a smaller micro-batch for --resume, then end this process, or with --auto-batch restart
    it. Re-raises errors that are not about memory; cuDNN words memory errors in its own way.

    Not by an exception: other processes wait in a collective, and a clean exit would wait, too.
    """
    # by cuDNN, CUDA and nccl; the last by the CPU's allocator
    said = "unable to find an engine|ALLOC(ATION)?_FAILED|out of memory|can't allocate memory"
    if not (isinstance(error, torch.OutOfMemoryError) or re.search(said, str(error))):
        raise error
    half, advice = args.batch_size // 2, "choose a smaller --image-size or --model"
    if half:
        os.makedirs(args.out, exist_ok=True)  # a node may have a disk of its own
        write_file(f"{args.out}/out_of_memory", str(half))  # maybe by several processes
        advice = (f"try --batch-size {half}" if args.dry_run else
                  f"go on with {half}, same images a step: --resume --out {shlex.quote(args.out)}")
    say(f"train.py: {args.batch_size} images of {args.image_size} px do not fit into memory; "
        f"{advice} ({' '.join(str(error).split())[:200]})", sys.stderr)
    if half and args.auto_batch and not (args.dry_run or dist.is_initialized()):
        stop_workers()  # under torchrun, --max-restarts restarts instead
        os.execv(sys.executable, [*sys.orig_argv, "--resume"])
    os._exit(1)


def lock(out: str, new: bool) -> None:
    """Keep other runs from writing to `out` while this process, 0, lives. A new run removes the log
    and the out_of_memory note of an earlier run whose checkpoints are gone."""
    os.makedirs(out, exist_ok=True)
    handle = os.open(os.path.join(out, "lock"), os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"train.py: another process is writing to {out}; wait for its end, stop it, or "
                 f"give another --out")
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
            raise  # else the file system has no locks, like Lustre with noflock
        say(f"check         {out} cannot be locked ({error.strerror}): start no second run there")
    for name in ("log.jsonl", "out_of_memory") if new else ():
        Path(out, name).unlink(missing_ok=True)


def check_shared(out: str, rank: int) -> None:
    """Name the machines that do not see the folder that process 0 has locked."""
    sees = gather((socket.gethostname(), os.path.exists(f"{out}/lock")))
    blind = ", ".join(sorted({host for host, there in sees if not there}))
    if blind and rank == 0:
        say(f"check         {blind} does not see this --out {out}: should process 0 restart there, "
            f"the run would begin anew; name a folder that all machines share")


def make_model(args: argparse.Namespace, skeleton: Skeleton, device: torch.device, contents: dict
               ) -> tuple[YoloNasPose, YoloNasPose | None, PoseLoss, dict[str, list[str]]]:
    """The network, the same on every process, its teacher, whose fingerprint is added to contents,
    its loss, and load_weights' report."""
    if args.amp == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise ValueError("--amp bf16: this GPU, older than Ampere, only emulates it; use fp16")
    sync = dist.is_initialized() and dist.get_world_size() > 1 and not args.no_sync_bn
    if args.compile and sync:
        raise ValueError("--compile cannot trace norms that are synced over processes; add "
                         "--no-sync-bn, or leave --compile out")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it
        torch.use_deterministic_algorithms(True)
    place = {"device": device, "dtype": torch.float64 if args.double else torch.float32,
             "memory_format": torch.channels_last}
    torch.manual_seed(args.seed)
    model, teacher = YoloNasPose(args.model, len(skeleton.names), args.mask), None
    report = (load_weights(model, args.weights, skeleton.names, COCO_NAMES)
              if args.weights and not args.resume else {})
    model.load_state_dict(from_rank_0(model.state_dict()))  # last bits may differ by CPU
    if args.teacher:
        teacher, file = load_model(args.teacher, args.teacher_model)
        check_names(f"--teacher {args.teacher}", file["skeleton"]["names"], skeleton.names)
        contents["teacher"] = fingerprint(t.numpy() for t in teacher.state_dict().values())
        check_alike(contents)
        teacher = teacher.fuse().to(**place)
    criterion = PoseLoss(torch.tensor(skeleton.sigmas, device=device),
                         LossWeights(dfl=args.dfl_weight, pose_reg=args.pose_weight),
                         reference=args.recipe == "reference", label_smoothing=args.label_smoothing)
    criterion.terms += MASK_TERMS * args.mask + DISTILL_TERMS * bool(teacher)
    model = model.to(**place)
    return sync_batch_norm(model) if sync else model, teacher, criterion, report


def freeze(model: nn.Module, ranges: dict[str, int], epoch: int, epochs: int,
           compiled: bool = False) -> None:
    """Set training mode, except for the parts that are frozen in this epoch (counted from 0).

    Frozen norms are in eval mode, and frozen parameters have no gradient at all: with a gradient
    of 0 the optimizer would still move them, by weight decay and momentum.
    """
    changed = False
    frozen = {part for part, n in ranges.items()
              if n == 0 or (epoch < n if n > 0 else epoch >= epochs + n)}
    for name, module in model.named_modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        stays = name.split(".")[0] in frozen or norm and "bn" in frozen
        module.training = not stays
        for p in module.parameters(recurse=False):
            if hasattr(p, "piece"):  # set by flat_gradients; the others never train
                changed |= p.requires_grad == stays
                p.requires_grad_(not stays)
                p.grad = None if stays else p.piece
    if changed and compiled:
        torch.compiler.reset()  # torch 2.6 would go on with the graph of before


def give_up(what: str, steps: int, result: Step, rank: int) -> None:
    """End the run after too many non-finite steps in a row, naming the images of the last one."""
    guilty = what == "gradient" or not all(map(math.isfinite, result.mine))
    ids = gather(result.image_ids if guilty else [])
    images = ", ".join(str(i) for share in ids for i in share)
    sys.exit(f"train.py: {steps} steps in a row were not finite ({what}), the last with images "
             f"{images}: check these, lower --lr, or use --amp bf16 or no" if rank == 0 else 1)


def note_bad(known: list[str], limit: int, errors: list[str], rank: int) -> None:
    """Print each image that cannot be read once; end the run if there are more than `limit`."""
    new = sorted({error for share in gather(errors) for error in share} - set(known))
    known += new
    for error in new if rank == 0 else ():
        say(f"bad image: {error}; another takes its place", sys.stderr)
    if len(known) > limit:
        sys.exit(f"train.py: {len(known)} images cannot be read, more than --max-bad {limit}; they "
                 f"are named above" if rank == 0 else 1)


def catch_signals() -> list[int]:
    """Return a list that collects signals to stop: Ctrl-C, what schedulers send before they kill,
    and a closed terminal (not if nohup ignores that). A second Ctrl-C stops at once."""
    asked = []

    def take(number: int, frame) -> None:
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, take)
    return asked


def largest_memory(device: torch.device) -> float:
    """Peak memory of this process so far, GB: the GPU's, or without a GPU the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def mean_of(files: list[str]) -> dict[str, Tensor]:
    """The mean of several files' weights and statistics; counters are the last file's."""
    states = [load_file(file)["model"] for file in files]
    return {name: torch.stack([state[name] for state in states]).mean(0)
            if last.is_floating_point() else last for name, last in states[-1].items()}


def finish_epoch(args: argparse.Namespace, at: argparse.Namespace, epoch: int, ema: EMA,
                 loader: DataLoader, truth: COCO, stopper: EarlyStopping, log: Log, about: dict,
                 rank: int) -> None:
    """Evaluate the averaged weights (EMA), and keep the best.

    A best_EPOCH.pt that drops out of `at.best` is removed at the next evaluation: until then a
    checkpoint may still need it.
    """
    dataset = loader.dataset
    metrics, by_image = evaluate(ema.model, loader, truth, dataset.skeleton.sigmas)
    before, at.evaluated = stopper.best, epoch
    # While AP is near 0, OKS says which weights are better; below 0, as Log.end expects.
    score = metrics["AP"] if metrics["AP"] > 0.001 else metrics["OKS"] - 1
    stopper.update(score, epoch)
    listed = [f"best_{e}.pt" for _, e in at.best]
    at.best = sorted([*at.best, [score, epoch]], reverse=True)[:args.average_best]
    if rank == 0:
        log.evaluation(at.step, "epoch", epoch, metrics, stopper.best > before)
        save_people(f"{args.out}/predictions.jpg", dataset,
                    [(0, i) for i in range(min(16, len(dataset)))], ema.model)
        log.report(extremes(ema.model, dataset, truth, by_image))
        content = {**about, "model": ema.model.state_dict(), "step": at.step, "AP": metrics["AP"]}
        if stopper.best > before:
            write_atomically(f"{args.out}/best.pt", content)
        for name in os.listdir(args.out) if args.average_best else ():
            if re.fullmatch(r"best_\d+\.pt", name) and name not in listed:
                os.remove(f"{args.out}/{name}")
        if [score, epoch] in at.best:
            write_atomically(f"{args.out}/best_{epoch}.pt", content)


def average_best(args: argparse.Namespace, at: argparse.Namespace, model: nn.Module,
                 loader: DataLoader, truth: COCO, log: Log, about: dict, rank: int) -> None:
    """Load the mean of the best epochs' weights into model, evaluate it, write average.pt."""
    files = [f"{args.out}/best_{e}.pt" for e in sorted(e for _, e in at.best)]
    model.load_state_dict(from_rank_0(mean_of(files) if rank == 0 else None))
    metrics, _ = evaluate(model, loader, truth, loader.dataset.skeleton.sigmas)
    if rank == 0:
        log.evaluation(at.step, "average of", len(files), metrics)
        say(f"average.pt is the mean of {', '.join(map(os.path.basename, files))}")
        write_atomically(f"{args.out}/average.pt", {
            **about, "model": model.state_dict(), "step": at.step, "AP": metrics["AP"]})


def main() -> None:
    args = parse_args()
    try:
        rank, world_size, device, launch = setup_distributed(args)
        saved = None if args.dry_run else read_run(args, rank, launch)
        source = fill_recipe(args)
        train_set, val_set, truth, contents = open_data(args, rank)
        skeleton, images = train_set.skeleton, len(train_set)
        model, teacher, criterion, report = make_model(args, skeleton, device, contents)
        global_batch = cut_batch(args, saved, world_size)
        ends, plan = make_plan(args, images, global_batch)
        from_rank_0(lock(args.out, new=not saved) if rank == 0 else None)  # the others wait
        check_shared(args.out, rank)
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")

    total_steps = plan.total_steps
    peak_lr = scaled_lr(args.lr, global_batch, args.lr_batch, args.lr_scale, args.max_lr)
    gradients = flat_gradients([p for p in model.parameters() if p.requires_grad],
                               3 + len(criterion.terms))  # 3: score sum, bad, stop
    groups = param_groups(model, peak_lr, args.weight_decay, args.lr_mult)
    optimizer = make_optimizer(args.optimizer, groups, args.momentum)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    ema = EMA(model, args.ema, args.ema_decay, total_steps)
    if args.compile:  # after EMA has copied it
        model.compile(fullgraph=True)
    warmup = WarmupEnd(plan.warmup, args.dynamic_warmup, total_steps // (args.restarts + 1) // 2)
    stopper = EarlyStopping(args.patience)
    log = Log(args, rank, total_steps, global_batch, images, criterion.terms)
    parts = {"model": model, "ema": ema.model, "optimizer": optimizer, "scaler": scaler,
             "stopper": stopper, "log": log, "warmup": warmup}
    at = argparse.Namespace(step=0, skipped=0, in_a_row=0, evaluated=0, best=[], bad=[])
    if saved:
        take_up(saved, at, parts, args.out, contents)
    stop = min(total_steps, args.max_steps or total_steps)
    scheduler = make_scheduler(optimizer, plan, warmup, at.step, args.warmup_mult,
                               args.warmup_bias_lr and args.warmup_bias_lr / peak_lr)
    widen_steps = round(args.sigma_epochs * images / global_batch)
    place = images, args.seed, args.batch_size, at.step + at.skipped, rank, world_size
    batches = iter(make_loader(train_set, stream(*place, args.accumulate), args.workers, device))
    val_loader = make_loader(val_set, val_batches(len(val_set), args.batch_size, rank, world_size),
                             args.workers, device)
    about = {"format": "nanopose", "args": vars(args), "skeleton": skeleton._asdict(),
             "global_batch": global_batch, "world_size": world_size, "launch": launch,
             "contents": contents}

    def save() -> None:
        if rank == 0 and not args.dry_run:
            save_last(args.out, {**about, **vars(at),
                                 **{name: part.state_dict() for name, part in parts.items()}})

    if rank == 0 and at.step < stop and not stopper.over(at.evaluated):
        log.starts.append(print_plan(
            args, source, report, train_set, (images, len(val_set)), (world_size, global_batch),
            (total_steps, at.step, stop - at.step, plan.warmup, widen_steps), peak_lr,
            f"{device}, torch {torch.__version__}"))
        if args.dry_run:
            say("\n".join(describe(train_set, "to train on") + describe(val_set, "to evaluate")))
            for name, lines in curves(scheduler, plan, warmup, args).items():
                write_file(f"{args.out}/{name}.svg", svg_chart(lines, f"{name} by step", width=720))
    if not args.resume:
        save()  # from here on --resume works
        if rank == 0:
            save_people(f"{args.out}/first_batch.jpg", train_set, next(stream(*place)))
    written, asked, parent = at.step, catch_signals(), os.getppid()
    while not stopper.over(at.evaluated):
        epoch = 0 if args.dry_run else ends.get(at.step, 0)  # the last step's, also after a resume
        due = epoch or at.step == stop or at.step % (args.save_every or stop) == 0
        if due and at.step > written:
            written = at.step
            save()
        if epoch and epoch in args.save_epochs and rank == 0:
            write_atomically(f"{args.out}/epoch_{epoch}.pt",
                             {**about, "model": ema.model.state_dict(), "step": at.step})
        if epoch > at.evaluated and (epoch == args.epochs or  # a step may complete several epochs
                                     epoch // args.eval_every > at.evaluated // args.eval_every):
            finish_epoch(args, at, epoch, ema, val_loader, truth, stopper, log, about, rank)
            save()
        if at.step >= stop or stopper.over(at.evaluated):
            break
        if args.freeze:
            freeze(model, args.freeze, at.step * global_batch // images, args.epochs, args.compile)
        set_momentum(optimizer, plan, warmup, at.step, args.warmup_momentum, args.momentum)
        orphaned = dist.is_initialized() and os.getppid() != parent  # torchrun itself was killed
        size = random_size(args.image_size, args.multi_scale, args.seed, at.step + at.skipped)
        tolerance = sigma_scale(at.step, widen_steps, args.sigma_start)
        rate = peak_lr * lr_share(at.step, plan._replace(warmup=warmup.end))
        # For random layers that you may add, like Dropout: a resumed run draws the same numbers.
        torch.manual_seed(hash((args.seed, at.step + at.skipped, rank)))
        try:
            result = train_step(model, teacher, criterion, batches, optimizer, scaler, gradients,
                                args, size, tolerance, bool(asked) or orphaned)
        except RuntimeError as error:
            out_of_memory(args, error)
        if result.bad:
            note_bad(at.bad, args.max_bad, result.errors, rank)
        if result.finite:
            at.step, at.in_a_row = at.step + 1, 0
            ema.update(at.step)
            warmup.update(at.step, sum(result.sums[1:]) / max(result.sums[0], 1.0))
            scheduler.step()  # after warmup.update, so that a resumed run has the same rate
            log.step(at.step, result, rate, largest_memory(device))
            if args.sync_check and world_size > 1 and at.step % args.sync_check == 0:
                sync_check(model, result.mine, rank)
        else:
            at.skipped, at.in_a_row = at.skipped + 1, at.in_a_row + 1
            what = log.skip(at.step, at.skipped, result)
            if at.in_a_row >= args.max_skipped:
                give_up(what, at.in_a_row, result, rank)
        if result.stop:
            save()
            break
    if at.best and (at.evaluated >= args.epochs or stopper.over(at.evaluated)):
        average_best(args, at, ema.model, val_loader, truth, log, about, rank)
    if rank == 0:
        log.end(at.step, at.evaluated, args.epochs, stopper, args.out)
    if dist.is_initialized():
        dist.destroy_process_group()
    if asked and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun would start it again
        sys.exit(128 + asked[0])


def guarded_main() -> None:
    """Run main; end with one line on errors of data or machine, with a traceback on others."""
    try:
        main()
    except DataError as error:
        sys.exit(f"train.py: {error}")
    except OSError as error:  # mostly a full disk
        sys.exit(f"train.py: {error}; make room, or mend what it names, then go on with --resume")
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            sys.exit(f"train.py: another process of this run is gone or stuck; --resume (torchrun "
                     f"by itself) goes on from the last checkpoint: "
                     f"{' '.join(str(error).split())[:400]}")
        if "DataLoader worker" not in str(error):
            raise
        sys.exit(f"train.py: {str(error).splitlines()[0]} Out of memory, or of shared memory "
                 f"(docker: --ipc=host)? Go on with --resume, and fewer --workers")


if __name__ == "__main__":
    guarded_main()
