"""What the reference, super-gradients 3.7.1, computes from weights that follow from their names.

reference_n.npz  size n. running: the running statistics, in the order of the sorted names.
                 eval64_*: every 37th anchor of its outputs for INPUTS. train_a_bn: some statistics
                 after one forward in training. target_*, recipe_*: targets, loss terms and their
                 sum, and the norm of every parameter's gradient (sorted names), for LOSS_INPUT.
                 All computed in float64 but train_a_bn.
assigner.npz     inputs and results of its assigner, three images, float32, the second one empty.

The reference counts pixels by index: its keypoints are 0.5 px less than ours. Its input is BGR.
What is too large to be committed is read from the folder REFERENCE_ROOT, if that is set.
"""
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model import QARepVGG, YoloNasPose

INPUTS = {"a": (1, 2, 320, 320), "b": (2, 1, 256, 384)}   # arguments of image
LOSS_INPUT = (3, 4, 224, 224)


def committed(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(Path(__file__).with_name(name)))


def full(name: str) -> dict[str, np.ndarray]:
    """A file of REFERENCE_ROOT; the test is skipped if that is not set."""
    if "REFERENCE_ROOT" not in os.environ:
        pytest.skip("set REFERENCE_ROOT to the folder with the full outputs of the reference")
    return dict(np.load(Path(os.environ["REFERENCE_ROOT"]) / name))


def image(seed: int, b: int, h: int, w: int) -> Tensor:
    """Noisy blocks of 16 px: (B, 3, H, W) RGB in [0, 1], float64 of float32 values."""
    rng = np.random.RandomState(seed)
    blocks = rng.randint(0, 256, (b, 3, -(-h // 16), -(-w // 16)))
    pixels = blocks.repeat(16, axis=2).repeat(16, axis=3)[:, :, :h, :w]
    pixels = np.clip(pixels + rng.randint(-40, 41, pixels.shape), 0, 255)
    return torch.tensor(pixels[:, ::-1].copy()).float().div(255).double()


def value(name: str, shape: tuple) -> np.ndarray:
    """An official tensor: random numbers whose seed is its name."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith("alpha") or (len(shape) == 1 and name.endswith(".weight")):
        return rng.uniform(0.7, 1.3, shape).astype(np.float32)
    x = rng.standard_normal(shape)
    if len(shape) == 4:
        fan = shape[0] if "upsample" in name else np.prod(shape[1:])
        linear = ("upsample.weight", "branch_1x1.weight", "reg_pred.weight", "pose_pred.weight")
        gain = 0.5 if name.endswith("cls_pred.weight") else 1.0 if name.endswith(linear) else 2.0
        x = x * (gain / fan) ** 0.5
    elif name.endswith("cls_pred.bias"):
        x = x * 0.05 * 10 - 2
    else:
        x = x * (0.1 if name.endswith("bn.bias") else 0.05)
    return x.astype(np.float32)


def official_shapes(size: str) -> dict[str, tuple]:
    """The reference's state_dict: our tensors and its placeholders for fused kernels."""
    with torch.device("meta"):
        model = YoloNasPose(size)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, QARepVGG):
            c_out, c_in = module.branch_3x3.conv.weight.shape[:2]
            shapes[f"{name}.rbr_reparam.weight"] = (c_out, c_in, 3, 3)
            shapes[f"{name}.rbr_reparam.bias"] = (c_out,)
    return shapes


def official_state(size: str, running: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.tensor(running[name] if name in running else value(name, shape))
            for name, shape in official_shapes(size).items()}


def running_stats_n() -> dict[str, np.ndarray]:
    shapes = {name: shape for name, shape in sorted(official_shapes("n").items())
              if name.endswith(("running_mean", "running_var"))}
    ends = np.cumsum([shape[0] for shape in shapes.values()])
    return dict(zip(shapes, np.split(committed("reference_n.npz")["running"], ends[:-1])))
