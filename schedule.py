"""What changes as training goes on: learning rate, weight average, when to stop.

Owns the schedule, the scaling of the rate with the batch, the parameter groups, EMA and
EarlyStopping. The rate depends on the step alone, so a resumed run needs none of its state; EMA
and EarlyStopping do remember, and have a state_dict. Imports only torch.

Linear scaling of the rate with the batch   https://arxiv.org/abs/1706.02677
Cosine decay                                https://arxiv.org/abs/1608.03983
"""
import copy
import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def linear_scaled_lr(lr: float, global_batch: int, reference_batch: int) -> float:
    """Learning rate for `global_batch` images per step, given the one for `reference_batch`."""
    return lr * global_batch / reference_batch


def warmup_cosine(step: int, total_steps: int, warmup_steps: int, final_ratio: float,
                  start_ratio: float = 0.0) -> float:
    """Share of the peak learning rate at optimizer step `step`, counted from 0.

    Straight from start_ratio at step 0 to 1 at warmup_steps, then a cosine that reaches
    final_ratio at the last step, total_steps - 1, and stays there.
    """
    if step < warmup_steps:
        return start_ratio + (1 - start_ratio) * step / warmup_steps
    t = (step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1)
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * min(t, 1.0)))


def sigma_scale(step: int, steps: int, start: float) -> float:
    """How much wider than sigma keypoints may miss at `step`: start at step 0, 1 from `steps` on.

    A new network's keypoints miss by many sigmas, where OKS is 0 and flat: nothing pulls them in.
    """
    return start ** (1 - min(step / steps, 1)) if steps > 0 else 1.0


def check_warmup(warmup_steps: int, total_steps: int) -> None:
    """Raise ValueError if the warmup does not fit into the training."""
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup of {warmup_steps} steps does not fit into {total_steps} steps of "
                         f"training; train longer or warm up less")


def make_scheduler(optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int,
                   final_ratio: float, start_ratio: float = 0.0, step: int = 0) -> LambdaLR:
    """warmup_cosine as a LambdaLR that stands at `step`; its step() comes after the optimizer's.

    The groups' lr (when resuming, their initial_lr) is the peak.
    """
    return LambdaLR(optimizer, lambda step: warmup_cosine(step, total_steps, warmup_steps,
                                                          final_ratio, start_ratio),
                    last_epoch=step - 1)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameters that train, for the optimizer: decay on all but biases and norms.

    Bottlenecks' alphas decay, as in the original.
    """
    norms = {id(p) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
             for p in m.parameters()}
    decayed, plain = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (plain if name.endswith("bias") or id(p) in norms else decayed).append(p)
    return [{"params": decayed, "weight_decay": weight_decay},
            {"params": plain, "weight_decay": 0.0}]


def ema_decay(kind: str, decay: float, step: int, total_steps: int, beta: float = 50.0) -> float:
    """How much of the average stays at optimizer step `step`, counted from 1.

    threshold  min(decay, (1 + step) / (10 + step)): early steps are forgotten soon
    exp        decay * (1 - exp(-beta * step / total_steps)): the longer the run, the slower
    constant   decay
    """
    if kind == "threshold":
        return min(decay, (1 + step) / (10 + step))
    if kind == "exp":
        return decay * (1 - math.exp(-beta * step / total_steps))
    if kind == "constant":
        return decay
    raise ValueError(f"EMA kind {kind!r} unknown; choose threshold, exp or constant")


class EMA:
    """A moving average of weights and BatchNorm statistics; `model` is what you evaluate and ship.

    Integer buffers (BatchNorm's counter) are copied.
    """

    def __init__(self, source: nn.Module, kind: str, decay: float, total_steps: int):
        self.kind, self.decay, self.total_steps = kind, decay, total_steps
        self.model = copy.deepcopy(source).eval().requires_grad_(False)
        pairs = list(zip(self.model.state_dict().values(), source.state_dict().values()))
        self.floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self.counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the source after optimizer step `step`, counted from 1."""
        decay = ema_decay(self.kind, self.decay, step, self.total_steps)
        mean, new = zip(*self.floats)
        torch._foreach_lerp_(mean, new, 1 - decay)
        if self.counters:
            mean, new = zip(*self.counters)
            torch._foreach_copy_(mean, new)

    def state_dict(self) -> dict:
        return self.model.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state)


class EarlyStopping:
    """Says stop after `patience` epochs without a metric better by min_delta. Higher is better.

    Epochs, not evaluations: how often one looks does not change when training stops.
    """

    def __init__(self, patience: int, min_delta: float = 1e-4):
        self.patience, self.min_delta = patience, min_delta
        self.best, self.best_epoch = -math.inf, 0

    def update(self, metric: float, epoch: int) -> bool:
        """Record the metric after `epoch` epochs; True means stop now."""
        if metric > self.best + self.min_delta:
            self.best, self.best_epoch = metric, epoch
        return epoch - self.best_epoch >= self.patience

    def state_dict(self) -> dict:
        return {"best": self.best, "best_epoch": self.best_epoch}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.best_epoch = state["best"], state["best_epoch"]
