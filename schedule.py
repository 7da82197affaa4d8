"""What changes during training: learning rate, weight average, when to stop.

Owns the schedule, the scaling of the rate with the batch, the optimizer and its groups, EMA and
EarlyStopping. The rate depends only on the step and the end of the warmup. WarmupEnd and
EarlyStopping have a state_dict; of EMA, its model is saved. Imports only torch.

Linear scaling of the rate with the batch   https://arxiv.org/abs/1706.02677
Cosine decay                                https://arxiv.org/abs/1608.03983
"""
import argparse
import copy
import math
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def scaled_lr(lr: float, global_batch: int, reference_batch: int, rule: str = "linear",
              largest: float = math.inf) -> float:
    """Learning rate for `global_batch` images per step, given lr, the one for `reference_batch`.

    rule: linear, sqrt, or none, which keeps lr. Images of all processes and micro-batches count.
    """
    power = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}[rule]
    return min(lr * (global_batch / reference_batch) ** power, largest)


def warmup_steps(text: str, images: int, global_batch: int) -> int:
    """Optimizer steps of a warmup given as steps, as epochs like 3e, or auto.

    auto: 3 epochs if there are fewer than 10,000 images, else 1000 steps; with more than 256 images
    per step, at least 100 log2(images per step) steps. Raises ValueError for other text.
    """
    if text == "auto":
        steps = math.ceil(3 * images / global_batch) if images < 10_000 else 1000
        return max(steps, round(100 * math.log2(global_batch))) if global_batch > 256 else steps
    try:
        number = float(text.removesuffix("e"))
        return math.ceil(number * images / global_batch) if text.endswith("e") else round(number)
    except (ValueError, OverflowError):
        raise ValueError(f"--warmup {text}: expected steps (1000), epochs (3e) or auto") from None


class Plan(NamedTuple):
    """The learning rate schedule of a run: optimizer steps, and rates as shares of the peak."""

    total_steps: int
    warmup: int                 # steps until the peak
    final_ratio: float = 0.05   # share at the last step
    start_ratio: float = 0.0    # share at step 0
    shape: str = "linear"       # of the warmup: linear, power or cosine
    gamma: float = 2.0          # exponent, for shape power
    decay: str = "cosine"       # after the warmup: see lr_share
    drops: tuple | list = ()    # for decay step: steps at which the rate is multiplied by `drop`
    drop: float = 0.1
    restarts: int = 0           # how often warmup and decay start again (SGDR)


def ramp(step: float, plan: Plan) -> float:
    """Progress of the warmup: 0 at step 0, 1 from step plan.warmup on."""
    t = min(step / plan.warmup, 1.0) if plan.warmup else 1.0
    return {"linear": t, "power": t ** plan.gamma, "cosine": 0.5 - 0.5 * math.cos(math.pi * t)
            }[plan.shape]


def lr_share(step: int, plan: Plan) -> float:
    """Share of the peak learning rate at optimizer step `step`, counted from 0.

    Rises from start_ratio at step 0 to 1 at plan.warmup; then a cosine or a line falls to
    final_ratio at the last step, total_steps - 1, and stays there. A restart warms up from there.
    """
    if plan.decay not in ("cosine", "linear", "step", "flat"):
        raise ValueError(f"schedule {plan.decay!r} is unknown; add it to lr_share")
    cycle = plan.total_steps / (plan.restarts + 1)
    number = min(int(step / cycle), plan.restarts)
    step, low = step - number * cycle, plan.final_ratio if number else plan.start_ratio
    if step < plan.warmup:
        return low + (1 - low) * ramp(step, plan)
    if plan.decay == "flat":
        return 1.0
    if plan.decay == "step":
        return plan.drop ** sum(step >= drop for drop in plan.drops)
    t = min((step - plan.warmup) / max(cycle - 1 - plan.warmup, 1), 1.0)
    share = 1 - t if plan.decay == "linear" else 0.5 * (1 + math.cos(math.pi * t))
    return plan.final_ratio + (1 - plan.final_ratio) * share


class WarmupEnd:
    """The step at which the warmup ends. If dynamic, the end moves a tenth of `planned` later
    after each tenth in which the loss did not fall, up to 3 times that, at most to step `most`."""

    def __init__(self, planned: int, dynamic: bool = False, most: float = math.inf):
        self.planned, self.dynamic, self.end = planned, dynamic, planned
        self.most = max(planned, min(3 * planned, most))
        self.total, self.before = 0.0, math.inf

    def update(self, step: int, loss: float) -> None:
        """Add the loss, equal on all processes, of optimizer step `step`, counted from 1."""
        self.total, window = self.total + loss, max(self.planned // 10, 1)
        if step % window == 0:
            if self.dynamic and step <= self.end and self.total >= self.before:
                self.end = min(self.end + window, self.most)
            self.total, self.before = 0.0, self.total

    def state_dict(self) -> dict:
        return {"end": self.end, "total": self.total, "before": self.before}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)
        # --epochs may differ, and with it the plan
        self.end = max(self.planned, min(self.end, self.most)) if self.dynamic else self.planned


def sigma_scale(step: int, steps: int, start: float) -> float:
    """Factor that widens the sigmas of OKS at `step`: `start` at step 0, 1 from step `steps` on.

    An untrained network's keypoints miss by many sigmas, where OKS is 0 and has no gradient.
    """
    return start ** (1 - min(step / steps, 1)) if steps > 0 else 1.0


def make_plan(args: argparse.Namespace, images: int,
              global_batch: int) -> tuple[dict[int, int], Plan]:
    """Return {optimizer step: the last epoch that it completes}, steps and epochs counted from 1,
    and the plan of the learning rate.

    args are train.py's flags. Raises ValueError if they do not fit the number of steps.
    """
    ends = {math.ceil(e * images / global_batch): e for e in range(1, args.epochs + 1)}
    if not args.resume and set(args.save_epochs) - set(ends.values()):
        raise ValueError(f"--save-epochs {args.save_epochs}: some of these do not end "
                         f"with a step (which may span several); choose others up to {args.epochs}")
    total, cycles = max(ends), args.restarts + 1
    warmup = warmup_steps(args.warmup, images, global_batch)
    if args.warmup == "auto":
        warmup = min(warmup, total // cycles // 2)  # at most half a cycle
    if not 0 <= warmup < total / cycles:
        raise ValueError(f"--warmup {args.warmup} is {warmup} of {total} steps of {global_batch} "
                         f"images, with {args.restarts} restarts; choose fewer, or train longer")
    drops = [epoch * images / global_batch for epoch in args.lr_steps]
    if args.schedule == "step" and not args.resume and max(drops, default=total) * cycles >= total:
        raise ValueError(f"--schedule step --lr-steps {args.lr_steps}: expected epochs below "
                         f"{args.epochs / cycles:g}, where the rate drops")
    return ends, Plan(total, warmup, final_ratio=args.final_ratio, start_ratio=args.warmup_start,
                      shape=args.warmup_shape, gamma=args.warmup_gamma, decay=args.schedule,
                      drops=drops, drop=args.lr_factor, restarts=args.restarts)


def make_scheduler(optimizer: torch.optim.Optimizer, plan: Plan, warmup: WarmupEnd, step: int = 0,
                   warmup_mult: dict[str, float] = {}, bias_ratio: float | None = None) -> LambdaLR:
    """lr_share as a LambdaLR that starts at `step`; call its step() after the optimizer's.

    The groups' lr (when resuming, their initial_lr) is the peak. In the first warmup, biases start
    at bias_ratio times it, if given, and warmup_mult's factors, which rise to 1, slow parts.
    """
    def share(group: dict, step: int) -> float:
        now = plan._replace(warmup=warmup.end)
        value, done = lr_share(step, now), ramp(step, now)
        if bias_ratio is not None and group["bias"] and step < now.warmup:
            value = bias_ratio + (1 - bias_ratio) * done
        slow = warmup_mult.get(group["part"], 1.0)
        return value * (slow + (1 - slow) * done)
    return LambdaLR(optimizer, [partial(share, g) for g in optimizer.param_groups], step - 1)


def momentum_at(plan: Plan, warmup: WarmupEnd, step: int, start: float | None,
                target: float) -> float:
    """The momentum at `step`: goes from start, if given, to target during the first warmup."""
    done = ramp(step, plan._replace(warmup=warmup.end))
    return target if start is None else start + (target - start) * done


def curves(scheduler: LambdaLR, plan: Plan, warmup: WarmupEnd, args: argparse.Namespace) -> dict:
    """Of lr and momentum (Adam: beta1): {curve: about 1000 points (step, value)}."""
    steps, found = range(0, plan.total_steps, max(plan.total_steps // 1000, 1)), {}
    for group, peak, share in zip(scheduler.optimizer.param_groups, scheduler.base_lrs,
                                  scheduler.lr_lambdas):
        points = [(step, peak * share(step)) for step in steps]
        if points not in found.values():
            found[group["part"] + (" biases" if group["bias"] else "")] = points
    if len(found) == 1:
        found = {"all parts": points}
    values = [momentum_at(plan, warmup, s, args.warmup_momentum, args.momentum) for s in steps]
    return {"lr": found, "momentum": {"momentum": list(zip(steps, values))}}


def set_momentum(optimizer: torch.optim.Optimizer, plan: Plan, warmup: WarmupEnd, step: int,
                 start: float | None, target: float) -> None:
    """Set SGD's momentum, or Adam's beta1, to its value at `step`, see momentum_at."""
    now = momentum_at(plan, warmup, step, start, target)
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (now, group["betas"][1])
        else:
            group["momentum"] = now


def param_groups(model: nn.Module, lr: float, weight_decay: float,
                 lr_mult: dict[str, float] = {}) -> list[dict]:
    """Groups of the trainable parameters, by part (backbone, neck, heads) and kind.

    Biases and norms have no weight decay; the bottlenecks' alphas do, as in the original. lr_mult
    multiplies the rate of a part. Each group names its part and whether it holds biases. Parameters
    that freeze together fill whole groups: in fused SGD, all of a group must start at once.
    """
    groups = {}
    for path, module in model.named_modules():
        part, norm = path.split(".")[0], isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                groups.setdefault((part or name, name.endswith("bias"), norm), []).append(p)
    return [{"params": params, "part": part, "bias": bias, "lr": lr * lr_mult.get(part, 1.0),
             "weight_decay": 0.0 if bias or norm else weight_decay}
            for (part, bias, norm), params in groups.items()]


def make_optimizer(kind: str, groups: list[dict], momentum: float) -> torch.optim.Optimizer:
    """Make the optimizer: adamw, or sgd with Nesterov momentum. groups are param_groups.

    Fused ones are correct only if each gradient has the memory layout of its parameter. Ours do.
    """
    if kind == "sgd":
        return torch.optim.SGD(groups, momentum=momentum, nesterov=True, fused=True)
    if kind == "adamw":
        return torch.optim.AdamW(groups, betas=(momentum, 0.999), fused=True)
    raise ValueError(f"optimizer {kind!r} is unknown; add it to make_optimizer")


def ema_decay(kind: str, decay: float, step: int, total_steps: int) -> float:
    """The EMA's decay (weight of the old average) at optimizer step `step`, counted from 1.

    threshold soon forgets the early weights; exp rises more slowly in a longer run.
    """
    return {"threshold": min(decay, (1 + step) / (10 + step)), "constant": decay,
            "exp": decay * (1 - math.exp(-50 * step / total_steps))}[kind]


class EMA:
    """A moving average of weights and BatchNorm statistics; evaluate and ship its `model`.

    Integer buffers (BatchNorm's counter) are copied. Create it once source has its final device and
    dtype: it keeps references to source's tensors.
    """

    def __init__(self, source: nn.Module, kind: str, decay: float, total_steps: int):
        self.kind, self.decay, self.total_steps = kind, decay, total_steps
        self.model = copy.deepcopy(source).eval().requires_grad_(False)
        pairs = list(zip(*([*m.parameters(), *m.buffers()] for m in (self.model, source))))
        self.floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self.counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards source after optimizer step `step`, counted from 1."""
        decay = ema_decay(self.kind, self.decay, step, self.total_steps)
        mean, new = zip(*self.floats)
        torch._foreach_lerp_(mean, new, 1 - decay)
        if self.counters:
            mean, new = zip(*self.counters)
            torch._foreach_copy_(mean, new)


class EarlyStopping:
    """Stops after `patience` epochs without a metric better by min_delta. Higher is better.

    Patience counts epochs, not evaluations, so it does not depend on how often these are done.
    """

    def __init__(self, patience: int, min_delta: float = 1e-4):
        self.patience, self.min_delta = patience, min_delta
        self.best, self.best_epoch = -math.inf, 0

    def update(self, metric: float, epoch: int) -> bool:
        """Record the metric after `epoch` epochs; True means stop now."""
        if metric > self.best + self.min_delta:
            self.best, self.best_epoch = metric, epoch
        return self.over(epoch)

    def over(self, epoch: int) -> bool:
        """Whether to stop, if `epoch` was the last one evaluated."""
        return epoch - self.best_epoch >= self.patience

    def state_dict(self) -> dict:
        return {"best": self.best, "best_epoch": self.best_epoch}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.best_epoch = state["best"], state["best_epoch"]
