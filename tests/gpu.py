"""Whether the GPU computes what the CPU and the original do. `python tests/gpu.py` prints

    the largest difference of size n's outputs from the original's, in float64 on the GPU
    how far loss terms, statistics and gradients of one training pass are from the CPU's in float64,
    in float64, float32, TF32 (PyTorch's default for convolutions) and bf16

Differences are norms as a share of the CPU's norm. The weights are random, so the gradients are
ill-conditioned: compare the GPU's float32 with the CPU's; in bf16 other anchors learn, too.
"""
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import people
from loss import PoseLoss
from model import YoloNasPose, decode, load_weights
from reference import INPUTS, committed, image, official_state, running_stats_n


def difference_from_the_original(device: str) -> float:
    """The largest |a - b| / (1 + |b|) over every 37th anchor's boxes, poses and scores."""
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save({"net": official_state("n", running_stats_n())}, file.name)
        load_weights(model := YoloNasPose("n"), file.name)
    model, dump, worst = model.double().to(device).eval(), committed("reference_n.npz"), 0.0
    for which, args in INPUTS.items():
        with torch.no_grad():
            out = decode(model(image(*args).to(device)))
        found = {"boxes": out.boxes, "scores": out.scores[..., None], "poses": out.keypoints - 0.5,
                 "pose_scores": out.kpt_scores}
        for name, t in found.items():
            want = dump[f"eval64_{which}/{name}"]
            apart = np.abs(t.cpu().numpy()[:, ::37] - want) / (1 + np.abs(want))
            worst = max(worst, apart.max())
    return worst


def training_pass(device: str, dtype: torch.dtype, bf16: bool = False) -> dict[str, Tensor]:
    """Loss terms, running statistics and gradients of four random images: three float64 vectors."""
    torch.manual_seed(0)
    model = YoloNasPose("n").to(device, dtype, memory_format=torch.channels_last).train()
    images = torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    targets = {name: t.to(device) for name, t in people(4, 3, 224).items() if name != "bad"}
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        raw = model(images.to(device, dtype))
    raw = raw.promote()
    criterion = PoseLoss(torch.full((17,), 0.07, device=device))
    terms, scores = criterion(raw, decode(raw), targets)
    sum(terms.values()).backward()
    kinds = {"terms": [*terms.values(), scores], "statistics": list(model.buffers()),
             "gradients": [p.grad for p in model.parameters() if p.requires_grad]}
    return {kind: torch.cat([t.detach().double().flatten().cpu() for t in tensors])
            for kind, tensors in kinds.items()}


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("gpu.py: torch finds no GPU; its CUDA build and a driver are needed")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, one pass of network N")
    print(f"outputs, float64, against the original: {difference_from_the_original('cuda'):.1e}")
    want = training_pass("cpu", torch.float64)
    for name, device, dtype, bf16, tf32 in (
            ("float64", "cuda", torch.float64, False, False),
            ("float32, CPU", "cpu", torch.float32, False, False),
            ("float32", "cuda", torch.float32, False, False),
            ("TF32", "cuda", torch.float32, False, True),
            ("bf16", "cuda", torch.float32, True, True)):
        torch.backends.cudnn.allow_tf32 = tf32
        found = training_pass(device, dtype, bf16)
        apart = {kind: ((found[kind] - t).norm() / t.norm()).item() for kind, t in want.items()}
        print(f"{name:14}" + "".join(f"  {kind} {x:.1e}" for kind, x in apart.items()))


if __name__ == "__main__":
    main()
