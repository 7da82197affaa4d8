"""Train YOLO-NAS-Pose.

    python train.py                                             # drawn people, minutes on a CPU
    python train.py --data coco --model n                       # COCO keypoints, one device
    torchrun --nproc-per-node 8 train.py --data coco --model n  # eight GPUs
    python train.py --out runs/coco --resume                    # go on after a stop

Read in this order: RECIPES, parse_args, main, train_step.

Axes    B images of this process and micro-batch   G images of one optimizer step, all processes
"""
import argparse
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator

# CPU threads that wait for each other spin briefly, then sleep: never sleeping starves the loader
# processes, sleeping at once costs half the speed. OpenMP reads it when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from data import (FLIP, MOSAIC, MOSAIC_HEAVY, PAD_MODES, PLAIN, Annotations, CocoPose, Skeleton,
                  Stream, collate, find_split, flatten, make_loader, read_json, read_skeleton)
from draw import contact_sheet, draw_people
from evaluate import evaluate, quiet_coco, select, to_input, val_batches
from loss import LossWeights, PoseLoss
from model import SIZES, YoloNasPose, decode, load_weights
from people import draw_dataset
from schedule import (EMA, EarlyStopping, check_warmup, linear_scaled_lr, make_scheduler,
                      param_groups, sigma_scale)

AMP_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AUGMENTS = {"mosaic": MOSAIC, "heavy": MOSAIC_HEAVY, "flip": FLIP, "none": PLAIN}

# What a flag is when it is not given. lr belongs to lr_batch images a step and is scaled.
COMMON = {"image_size": 640, "epochs": 1000, "patience": 100, "eval_every": 1, "warmup": None,
          "warmup_start": 0.0, "final_ratio": 0.05, "weight_decay": 1e-6, "ema_decay": 0.997,
          "sigma_start": 8.0, "sigma_epochs": 5.0}
NS = {**COMMON, "lr": 2e-3, "ema": "threshold", "dfl_weight": 0.01, "pose_weight": 34.0,
      "augment": "mosaic"}
ML = {**COMMON, "ema": "exp", "dfl_weight": 0.5, "pose_weight": 10.0, "augment": "heavy"}
RECIPES = {
    "n": {**NS, "batch_size": 60, "lr_batch": 480},
    "s": {**NS, "batch_size": 48, "lr_batch": 384},
    "m": {**ML, "batch_size": 32, "lr_batch": 256, "lr": 1e-4},
    "l": {**ML, "batch_size": 24, "lr_batch": 192, "lr": 8e-5},
}
# The rates of m and l are for weights of a trained detector. From random weights: untested.
FROM_SCRATCH = {"lr": 2e-3, "lr_batch": 384}
# A few minutes on two CPU cores: small images, and the wide tolerance nearly to the end.
DEMO = {"image_size": 96, "epochs": 8, "batch_size": 16, "lr_batch": 16, "lr": 2.5e-3,
        "augment": "flip", "eval_every": 2, "warmup": 50, "ema_decay": 0.99, "sigma_epochs": 7.5}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; exit with code 2 and one line of advice if a value cannot work."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    recipe = "; default: the recipe's"
    g = p.add_argument_group("data")
    g.add_argument("--data", metavar="DIR", help="COCO root: annotations/person_keypoints_SPLIT."
                   "json and SPLIT/ or images/SPLIT/; default: people drawn by people.py")
    g.add_argument("--train-split", default="train2017")
    g.add_argument("--val-split", default="val2017")
    for split in ("train", "val"):
        g.add_argument(f"--{split}-json", metavar="FILE", help="instead of --data")
        g.add_argument(f"--{split}-images", metavar="DIR", help="instead of --data")
    g.add_argument("--only-people", action="store_true",
                   help="train on images with a labeled person only")
    g.add_argument("--flip-pairs", metavar="A:B,C:D",
                   help="keypoints that a mirror exchanges; default: left_* with right_*")
    g.add_argument("--sigmas", metavar="S,S,...", help="spread of each keypoint as a share of "
                   "sqrt(area); default: the json's, COCO's for COCO's names, else 0.05")
    g.add_argument("--image-size", type=int, help="side of the padded input, px" + recipe)
    g.add_argument("--train-pad", choices=PAD_MODES, default="center")
    g.add_argument("--val-pad", choices=PAD_MODES, default="bottom_right")
    g.add_argument("--augment", choices=sorted(AUGMENTS), help="strength" + recipe)
    g.add_argument("--workers", type=int, help="loader processes for each process; "
                   "default: one less than its share of the cores, at most 8")

    g = p.add_argument_group("model")
    g.add_argument("--model", choices=sorted(SIZES), default="n", help="size; default: n")
    g.add_argument("--weights", metavar="FILE", help="start from this checkpoint's weights")

    g = p.add_argument_group("optimization")
    g.add_argument("--recipe", choices=["nanopose", "reference"], default="nanopose",
                   help="reference: the original's rules for the first steps and for crowds")
    g.add_argument("--epochs", type=int, help="passes over the training images" + recipe)
    g.add_argument("--max-steps", type=int, help="stop after this many optimizer steps; the "
                   "schedule stays that of --epochs")
    g.add_argument("--batch-size", type=int, help="images per process and micro-batch" + recipe)
    g.add_argument("--accumulate", type=int, default=1, help="micro-batches a step; default: 1")
    g.add_argument("--lr", type=float, help="peak learning rate for --lr-batch images a step; "
                   "scaled linearly to the real number" + recipe)
    g.add_argument("--lr-batch", type=int, help="images a step that --lr is meant for" + recipe)
    g.add_argument("--warmup", type=int, help="optimizer steps until the peak; default: 1000, or "
                   "3 epochs of less than 10,000 images")
    g.add_argument("--warmup-start", type=float, help="share of the peak at step 0" + recipe)
    g.add_argument("--final-ratio", type=float, help="last learning rate / peak" + recipe)
    g.add_argument("--weight-decay", type=float, help="not on biases and norms" + recipe)
    g.add_argument("--clip-norm", type=float, default=math.inf,
                   help="largest gradient norm; default: inf")
    g.add_argument("--dfl-weight", type=float, help="of the box distribution term" + recipe)
    g.add_argument("--pose-weight", type=float, help="of the keypoint position term" + recipe)
    g.add_argument("--ema", choices=["threshold", "exp", "constant"],
                   help="how the decay of the weight average grows" + recipe)
    g.add_argument("--ema-decay", type=float, help="largest decay" + recipe)
    g.add_argument("--sigma-start", type=float, help="keypoint tolerance at step 0, as a multiple "
                   "of sigma" + recipe)
    g.add_argument("--sigma-epochs", type=float,
                   help="epochs until that tolerance has shrunk to sigma" + recipe)
    g.add_argument("--amp", choices=sorted(AMP_DTYPES), default="no", help="autocast type")

    g = p.add_argument_group("run")
    g.add_argument("--out", default="runs/train", metavar="DIR",
                   help="checkpoints, log.jsonl, pictures; default: runs/train")
    g.add_argument("--resume", action="store_true", help="go on from --out; saved flags win")
    g.add_argument("--eval-every", type=int, help="epochs between evaluations" + recipe)
    g.add_argument("--patience", type=int,
                   help="stop after so many epochs without a better AP" + recipe)
    g.add_argument("--log-every", type=int, default=50, help="steps between lines; default: 50")
    g.add_argument("--seed", type=int, default=0)

    args = p.parse_args(argv)
    args.sigmas = args.sigmas and [float(s) for s in args.sigmas.split(",")]
    if args.image_size is not None and (args.image_size % 32 or args.image_size < 32):
        p.error(f"--image-size {args.image_size} must be a multiple of 32, the largest stride")
    for flag in ("epochs", "batch_size", "accumulate", "lr", "lr_batch", "eval_every", "patience",
                 "log_every", "clip_norm", "max_steps"):
        value = getattr(args, flag)
        if value is not None and not value > 0:
            p.error(f"--{flag.replace('_', '-')} {value} must be positive")
    for flag in ("train_json", "train_images", "val_json", "val_images"):
        if not args.data and not getattr(args, flag) and any(
                getattr(args, f) for f in ("train_json", "train_images", "val_json", "val_images")):
            p.error(f"without --data all of --train-json, --train-images, --val-json and "
                    f"--val-images are needed; --{flag.replace('_', '-')} is missing")
    return args


def fill_recipe(args: argparse.Namespace) -> dict[str, str]:
    """Set every flag that was not given from the recipe. Return where each value came from."""
    rows = [(f"recipe {args.model}", RECIPES[args.model])]
    if args.model in "ml" and not args.weights:
        rows.append(("from scratch, untested", FROM_SCRATCH))
    if not args.data and not args.train_json:
        rows.append(("demo", DEMO))
    if args.recipe == "reference":
        rows.append(("reference", {"sigma_epochs": 0.0}))
    source = {}
    for name in COMMON | RECIPES[args.model]:
        if getattr(args, name) is not None:
            source[name] = "flag"
        else:
            source[name], row = next((s, r) for s, r in reversed(rows) if name in r)
            setattr(args, name, row[name])
    return source


def setup_distributed() -> tuple[int, int, torch.device]:
    """Join torchrun's process group if there is one. Return (rank, world_size, device).

    Without torchrun this process is rank 0 of 1. Without GPUs the processes talk over gloo.
    Raises RuntimeError if torchrun started more processes than this machine has GPUs.
    """
    if "LOCAL_RANK" not in os.environ:
        return 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return dist.get_rank(), dist.get_world_size(), torch.device("cpu")
    local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= gpus:
        raise RuntimeError(f"torchrun started local rank {local_rank}, but this machine has {gpus} "
                           f"GPUs; use --nproc-per-node {gpus} or fewer")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return dist.get_rank(), dist.get_world_size(), device


def open_data(args: argparse.Namespace,
              rank: int) -> tuple[tuple[Annotations, str], tuple[Annotations, str], dict, Skeleton]:
    """(train annotations, image folder), the same of val, val's json, and the keypoint set."""
    if not args.data and not args.train_json:
        args.data = "drawn_people"
        if rank == 0:
            draw_dataset(args.data)
        if dist.is_initialized():
            dist.barrier()
    found = {}
    for split, name in (("train", args.train_split), ("val", args.val_split)):
        path, folder = getattr(args, f"{split}_json"), getattr(args, f"{split}_images")
        if not (path and folder):
            default_path, default_folder = find_split(args.data, name)
            path, folder = path or default_path, folder or default_folder
        labels = read_json(path)
        found[split] = flatten(labels, args.only_people and split == "train"), folder
        if split == "train":
            skeleton = read_skeleton(labels, args.flip_pairs, args.sigmas)
        elif labels["categories"][0]["keypoints"] != skeleton.names:
            raise ValueError(f"{path} names other keypoints than the training json; use one set")
        if not any(a["num_keypoints"] and not a["iscrowd"] for a in labels["annotations"]):
            raise ValueError(f"{path}: nobody in it has a labeled keypoint; check the export")
    return found["train"], found["val"], labels, skeleton


def all_reduce_gradients(parameters: list[nn.Parameter], sums: Tensor) -> Tensor:
    """Sum gradients and `sums` over processes, in one flat tensor; gradients stay in .grad.

    A parameter that got no gradient takes part with zeros. Returns the summed sums.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if not dist.is_initialized():
        return sums
    grads = [p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in grads] + [sums.to(grads[0].dtype)])
    dist.all_reduce(flat)
    pieces = flat.split([g.numel() for g in grads] + [len(sums)])
    torch._foreach_copy_(grads, [piece.view_as(g) for piece, g in zip(pieces, grads)])
    return pieces[-1]


def train_step(model: nn.Module, criterion: PoseLoss, batches: Iterator,
               optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
               parameters: list[nn.Parameter], device: torch.device,
               args: argparse.Namespace, sigma_scale: float) -> tuple[Tensor, Tensor, float]:
    """One optimizer step over `accumulate` micro-batches.

    Returns [assigned-score sum, five term sums] (6,), the gradient norm () and the seconds spent
    waiting for data.
    """
    sums, waited = torch.zeros(6, device=device), 0.0
    for _ in range(args.accumulate):
        start = time.time()
        images, targets = next(batches)
        waited += time.time() - start
        targets = {name: t.to(device, non_blocking=True) for name, t in targets.items()
                   if name in ("boxes", "keypoints", "crowd")}
        with torch.autocast(device.type, AMP_DTYPES[args.amp], enabled=args.amp != "no"):
            raw = model(to_input(images, device))
        raw = raw.promote()  # the assigner takes a 6th power, which is 0 in half precision
        terms, score_sum = criterion(raw, decode(raw), targets, sigma_scale)
        # Summed losses are large for float16; a constant keeps them in range and cancels below.
        scaler.scale(sum(terms.values()) / len(images)).backward()
        sums += torch.stack([score_sum, *terms.values()]).detach()
    sums = all_reduce_gradients(parameters, sums)
    scaler.unscale_(optimizer)
    # The one division: by the scores assigned in the whole step, at least 1.
    divisor = sums[0].clamp(min=1) / len(images)
    torch._foreach_div_([p.grad for p in parameters], divisor)
    norm = nn.utils.clip_grad_norm_(parameters, args.clip_norm, foreach=True)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return sums, norm, waited


def save_checkpoint(path: str, state: dict) -> None:
    """Write a dict of tensors and plain values; a job killed midway leaves the old file intact."""
    with open(path + ".tmp", "wb") as f:
        torch.save({"format": "nanopose", **state}, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


@torch.no_grad()
def save_people(path: str, dataset: CocoPose, keys: list[tuple[int, int]],
                model: nn.Module | None = None, device: torch.device | None = None) -> None:
    """A sheet of up to 16 inputs with their labels, or with what a model (in eval mode) sees.

    keys are (epoch, index). Of predictions those of score 0.3 or more are drawn.
    """
    names, edges = dataset.skeleton.names, dataset.skeleton.edges
    samples = [dataset[key] for key in keys[:16]]
    sheet = [Image.fromarray(sample["image"]) for sample in samples]
    if model is None:
        sheet = [draw_people(image, sample["boxes"], sample["keypoints"], names, edges)
                 for image, sample in zip(sheet, samples)]
    else:
        out = decode(model(to_input(collate(samples)[0], device)))
        pose = torch.cat([out.keypoints, out.kpt_scores[..., None]], -1)            # (B, A, K, 3)
        for i, image in enumerate(sheet):
            kept = select(out.boxes[i], out.scores[i], conf=0.3)                    # (D,)
            boxes, poses, scores = (t[i, kept].cpu().numpy()
                                    for t in (out.boxes, pose, out.scores))
            sheet[i] = draw_people(image, boxes, poses, names, edges, scores)
    contact_sheet(sheet).save(path, quality=90)


def epoch_ends(epochs: int, images: int, global_batch: int) -> dict[int, int]:
    """{optimizer step: epoch that is complete after it}, steps and epochs counted from 1."""
    return {math.ceil(e * images / global_batch): e for e in range(1, epochs + 1)}


class Log:
    """Progress lines and log.jsonl, one line an interval, from rank 0."""

    def __init__(self, args: argparse.Namespace, rank: int, step: int, stop: int,
                 global_batch: int, images: int):
        self.path = os.path.join(args.out, "log.jsonl") if rank == 0 else None
        self.every, self.stop, self.start_step = args.log_every, stop, step
        self.global_batch, self.images = global_batch, images
        self.sums, self.waited, self.steps = 0.0, 0.0, 0
        self.begin = self.interval = time.time()

    def write(self, values: dict) -> None:
        """Append one json line."""
        if self.path:
            with open(self.path, "a") as f:
                f.write(json.dumps(values) + "\n")

    def evaluation(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Report the ten numbers; -1 means that nobody labeled is of that size."""
        self.write({"step": step, "epoch": epoch, **metrics})
        known = [f"{name} {value:.3f}" for name, value in metrics.items() if value != -1]
        print(f"epoch {epoch}  " + "  ".join(known), flush=True)
        self.interval = time.time()

    def step(self, step: int, sums: Tensor, norm: Tensor, waited: float, lr: float,
             memory: float) -> None:
        """Take in one optimizer step; every --log-every steps, and first at step 5, report.

        sums as train_step returns them, waited in seconds, memory in GB.
        """
        self.sums, self.waited, self.steps = self.sums + sums, self.waited + waited, self.steps + 1
        done = step - self.start_step
        if not (step % self.every == 0 or done == 5 or step == self.stop) or not self.path:
            return
        score_sum, *terms = self.sums.tolist()  # the GPU waits here
        seconds = time.time() - self.interval
        names = ("cls", "iou", "dfl", "pose_cls", "pose_reg")
        terms = {name: term / max(score_sum, 1.0) for name, term in zip(names, terms)}
        values = {"step": step, "epoch": round(step * self.global_batch / self.images, 3),
                  "loss": sum(terms.values()), **terms,
                  "scores": score_sum / self.steps / self.global_batch, "lr": lr,
                  "grad_norm": float(norm), "img_s": self.steps * self.global_batch / seconds,
                  "data_wait": self.waited / seconds, "memory_gb": memory}
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(f"loss is not finite at step {step}: {terms}")
        self.write(values)
        eta = (time.time() - self.begin) / done * (self.stop - step)
        print(f"epoch {values['epoch']:.2f}  step {step}/{self.stop}  loss {values['loss']:.3f} ("
              + " ".join(f"{name} {value:.3f}" for name, value in terms.items())
              + f")  lr {lr:.2e}  norm {values['grad_norm']:.1f}  {values['img_s']:.1f} img/s  "
              f"data {values['data_wait']:.0%}  {memory:.1f} GB  ETA {eta / 60:.1f} min",
              flush=True)
        self.sums, self.waited, self.steps, self.interval = 0.0, 0.0, 0, time.time()


def memory_gb(device: torch.device) -> float:
    """Largest memory so far: the GPU's, or this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def print_plan(args: argparse.Namespace, source: dict[str, str], facts: dict) -> None:
    """Every resolved value and where it came from, and what they turn into on this machine."""
    groups = {}
    for name, origin in source.items():
        groups.setdefault(origin, []).append(f"{name.replace('_', '-')} {getattr(args, name)}")
    for origin, values in groups.items():
        print(f"{origin:13} {', '.join(values)}")
    for name, value in facts.items():
        print(f"{name:13} {value}")


def read_run(args: argparse.Namespace) -> tuple[argparse.Namespace, dict | None]:
    """The flags of this run, and with --resume the checkpoint it goes on from; saved flags win."""
    path = os.path.join(args.out, "last.pt")
    if not args.resume:
        if os.path.exists(path):
            raise ValueError(f"{args.out} already holds a run; add --resume to go on with it, or "
                             f"give another --out")
        return args, None
    if not os.path.isfile(path):
        raise ValueError(f"--resume: {path} not found; give the --out of the run to go on with")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    here = {"out": args.out, "resume": True, "max_steps": args.max_steps}
    return argparse.Namespace(**{**saved["args"], **here}), saved


def main() -> None:
    args = parse_args()
    torch.set_flush_denormal(True)  # numbers near 0 cost a CPU 10 to 100 times the time of others
    rank, world_size, device = setup_distributed()
    if args.workers is None:
        share = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.workers = min(max(share - 1, 1), 8)
    try:
        args, saved = read_run(args)
        source = fill_recipe(args)
        (train, train_dir), (val, val_dir), labels, skeleton = open_data(args, rank)
        global_batch = args.batch_size * world_size * args.accumulate
        ends = epoch_ends(args.epochs, len(train.ids), global_batch)
        total_steps = max(ends)
        if args.warmup is None:
            short = len(train.ids) < 10_000
            args.warmup = math.ceil(3 * len(train.ids) / global_batch) if short else 1000
        check_warmup(args.warmup, total_steps)
        torch.manual_seed(args.seed)  # the same first weights on every process
        model = YoloNasPose(args.model, len(skeleton.names))
        report = load_weights(model, args.weights) if args.weights and saved is None else {}
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    os.makedirs(args.out, exist_ok=True)

    model = model.to(device, memory_format=torch.channels_last)
    peak_lr = linear_scaled_lr(args.lr, global_batch, args.lr_batch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), lr=peak_lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    ema = EMA(model, args.ema, args.ema_decay, total_steps)
    stopper = EarlyStopping(args.patience)
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler,
             "stopper": stopper}
    for name in parts if saved else ():
        parts[name].load_state_dict(saved[name])
    step = saved["step"] if saved else 0
    stop = min(total_steps, args.max_steps or total_steps)
    scheduler = make_scheduler(optimizer, total_steps, args.warmup, args.final_ratio,
                               args.warmup_start, step)
    widen_steps = round(args.sigma_epochs * len(train.ids) / global_batch)
    criterion = PoseLoss(torch.tensor(skeleton.sigmas, device=device),
                         LossWeights(dfl=args.dfl_weight, pose_reg=args.pose_weight),
                         reference=args.recipe == "reference")

    train_set = CocoPose(train, train_dir, skeleton, args.image_size, args.train_pad,
                         AUGMENTS[args.augment], args.seed, args.recipe != "reference")
    val_set = CocoPose(val, val_dir, skeleton, args.image_size, args.val_pad)
    stream = Stream(len(train_set), args.seed, args.batch_size, step, stop, rank, world_size,
                    args.accumulate)
    val_loader = make_loader(val_set, val_batches(len(val_set), args.batch_size, rank, world_size),
                             args.workers, device)
    truth = quiet_coco(labels)
    if rank == 0:
        print_plan(args, source, {
            **{f"weights {name}": len(tensors) for name, tensors in report.items()},
            "images": f"{len(train_set)} to train on, {len(val_set)} to evaluate, "
                      f"{args.image_size} px, {len(skeleton.names)} keypoints",
            "global batch": f"{args.batch_size} images x {world_size} processes x "
                            f"{args.accumulate} micro-batches = {global_batch}",
            "steps": f"{total_steps} for {args.epochs} epochs, of which {stop - step} now",
            "peak lr": f"{peak_lr:.2e} = {args.lr:.2e} x {global_batch} / {args.lr_batch}",
            "warmup": f"{args.warmup} steps; keypoint tolerance narrows for {widen_steps}",
            "device": f"{device}, amp {args.amp}, {args.workers} loader processes",
            "ETA": "measured on the first steps, see below"})
        if step < stop:
            save_people(f"{args.out}/first_batch.jpg", train_set, next(iter(stream)))
    log = Log(args, rank, step, stop, global_batch, len(train_set))
    about = {"args": vars(args), "skeleton": skeleton._asdict()}

    batches = iter(make_loader(train_set, stream, args.workers, device))
    stopped = False
    while step < stop and not stopped:
        model.train()
        sums, norm, waited = train_step(model, criterion, batches, optimizer, scaler, parameters,
                                        device, args,
                                        sigma_scale(step, widen_steps, args.sigma_start))
        scheduler.step()
        step += 1
        ema.update(step)
        log.step(step, sums, norm, waited, scheduler.get_last_lr()[0], memory_gb(device))
        epoch = ends.get(step)
        if epoch and (epoch % args.eval_every == 0 or step == total_steps):
            metrics, _ = evaluate(ema.model, val_loader, truth, skeleton.sigmas, device)
            best = stopper.best
            stopped = stopper.update(metrics["AP"], epoch)
            if rank == 0:
                log.evaluation(step, epoch, metrics)
                save_people(f"{args.out}/predictions.jpg", val_set,
                            [(0, i) for i in range(min(16, len(val_set)))], ema.model, device)
                if stopper.best > best:
                    save_checkpoint(f"{args.out}/best.pt", {"model": ema.state_dict(), **about,
                                                            "step": step, "AP": metrics["AP"]})
        if rank == 0 and (epoch or step == stop):
            save_checkpoint(f"{args.out}/last.pt", {
                "step": step, **about, **{name: part.state_dict() for name, part in parts.items()}})
    if rank == 0:
        print(f"{'stopped early' if stopped else 'done'} at step {step}; " + (
            f"best AP {stopper.best:.4f} after epoch {stopper.best_epoch}; see {args.out}"
            if stopper.best_epoch else f"not evaluated yet; see {args.out}"))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
