"""The YOLO-NAS-Pose network and the meaning of its outputs.

Owns every layer, the table of sizes, decode (raw outputs to pixels), BatchNorm synced over
processes, and checkpoint files: reads and writes ours, reads official ones. Knows nothing about
targets, losses, thresholds or images.

Read in this order: SIZES, QARepVGG, CSPLayer, Backbone, Neck, Head, RawOutput, decode, YoloNasPose.

Axes    B images   C channels   H, W height and width   K keypoints   R = 17 bins of a distance
        A anchors: one per cell of each level; their number is the sum of H/s * W/s over strides s
Units   pixels of the padded input, continuous: pixel i covers [i, i + 1)
Names   attributes are named as in the official checkpoints, so that these load without a table

Papers  RepVGG, three branches that fold into one     https://arxiv.org/abs/2101.03697
        QARepVGG, the norm after the sum              https://arxiv.org/abs/2212.01593
        spatial pyramid pooling                       https://arxiv.org/abs/1406.4729
        distances as distributions (GFL)              https://arxiv.org/abs/2006.04388
"""
import math
import errno
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

STRIDES = (8, 16, 32)
BINS = 17  # a box side lies 0 to 16 strides from the anchor
BN_EPS = 1e-6


class Size(NamedTuple):
    """One variant of the network: a row of numbers."""

    stem: int            # channels
    stages: tuple        # 4 x (channels, hidden channels, bottlenecks, keep every output?)
    neck: tuple          # 4 x (channels, hidden channels, bottlenecks): up, up, down, down
    heads: tuple         # 3 x (box channels, pose channels)
    bn_momentum: float   # weight of the new batch in the running statistics


SIZES = {
    "n": Size(32,
              ((64, 32, 2, False), (128, 48, 3, False), (256, 64, 4, False), (512, 128, 2, False)),
              ((128, 48, 2), (64, 32, 2), (128, 48, 2), (256, 48, 2)),
              ((48, 48), (88, 168), (168, 168)), 0.03),
    "s": Size(48,
              ((96, 32, 2, False), (192, 64, 3, False), (384, 96, 5, False), (768, 192, 2, False)),
              ((192, 64, 2), (96, 48, 2), (192, 64, 2), (384, 64, 2)),
              ((64, 64), (128, 256), (256, 256)), 0.1),
    "m": Size(48,
              ((96, 64, 2, True), (192, 128, 3, True), (384, 256, 5, True), (768, 384, 2, False)),
              ((192, 192, 2), (96, 64, 3), (192, 192, 2), (384, 256, 3)),
              ((96, 96), (192, 384), (384, 384)), 0.1),
    "l": Size(48,
              ((96, 96, 2, True), (192, 128, 3, True), (384, 256, 5, True), (768, 512, 2, True)),
              ((192, 128, 4), (96, 128, 4), (192, 128, 4), (384, 256, 4)),
              ((128, 128), (256, 512), (512, 512)), 0.03),
}


class ConvBNReLU(nn.Module):
    """Convolution, norm, ReLU: (B, c_in, H, W) -> (B, c_out, H / stride, W / stride)"""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=BN_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fuse(self) -> None:
        """Fold the norm into the convolution. For inference only."""
        self.conv, self.bn = fuse_conv_bn_eval(self.conv, self.bn), nn.Identity()


class QARepVGG(nn.Module):
    """Sum of 3x3 conv + norm, 1x1 conv and, with identity, the input; then a norm and ReLU.

    (B, c_in, H, W) -> (B, c_out, H / stride, W / stride). fuse() makes it one 3x3 convolution.
    The norm after the sum subtracts the mean, so the biases before it have no effect: their
    gradient is 0 but for rounding. They are frozen, or Adam would turn that noise into full steps.
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1, identity: bool = False):
        super().__init__()
        self.stride, self.identity = stride, identity
        self.branch_3x3 = nn.Sequential(OrderedDict(
            conv=nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False),
            bn=nn.BatchNorm2d(c_out, eps=BN_EPS)))
        self.branch_1x1 = nn.Conv2d(c_in, c_out, 1)
        self.post_bn = nn.BatchNorm2d(c_out, eps=BN_EPS)
        self.branch_3x3.bn.bias.requires_grad_(False)
        self.branch_1x1.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.branch_3x3, nn.Conv2d):  # fused
            return F.relu(self.branch_3x3(x), inplace=True)
        # Slicing, then stride 1: a strided 1x1 convolution of a channels_last RGB image writes
        # out of bounds in its backward pass on the CPU (oneDNN #6035).
        strided = x[:, :, ::self.stride, ::self.stride] if self.stride > 1 else x
        y = self.branch_3x3(x) + self.branch_1x1(strided)                # (B, c_out, H/s, W/s)
        if self.identity:
            y = y + x
        return F.relu(self.post_bn(y), inplace=True)

    def fuse(self) -> None:
        """Become one 3x3 convolution. For inference only."""
        conv = fuse_conv_bn_eval(self.branch_3x3.conv, self.branch_3x3.bn)
        conv.weight += F.pad(self.branch_1x1.weight, (1, 1, 1, 1))                 # (C, c, 3, 3)
        conv.bias += self.branch_1x1.bias
        if self.identity:
            conv.weight[..., 1, 1].diagonal().add_(1)
        self.branch_3x3 = fuse_conv_bn_eval(conv, self.post_bn)
        self.branch_1x1 = self.post_bn = nn.Identity()


class Bottleneck(nn.Module):
    """Two 3x3 blocks and a skip connection scaled by a learned alpha. (B, C, H, W) -> the same."""

    def __init__(self, channels: int, rep: bool):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.cv1, self.cv2 = (QARepVGG(channels, channels, identity=True) if rep else
                              ConvBNReLU(channels, channels, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha.to(x.dtype) * x + self.cv2(self.cv1(x))  # float32 alpha would widen x


class CSPLayer(nn.Module):
    """Cross-stage partial layer: one path goes through `depth` bottlenecks, the other skips them.

    (B, c_in, H, W) -> (B, c_out, H, W). keep_all merges the outputs of conv1 and of all
    bottlenecks, not only the last. rep: bottlenecks of QARepVGG, otherwise of plain convolutions.
    """

    def __init__(self, c_in: int, c_out: int, hidden: int, depth: int, keep_all: bool = False,
                 rep: bool = True):
        super().__init__()
        self.keep_all = keep_all
        self.conv1 = ConvBNReLU(c_in, hidden, 1)
        self.conv2 = ConvBNReLU(c_in, hidden, 1)
        self.conv3 = ConvBNReLU(hidden * (2 + keep_all * depth), c_out, 1)
        self.bottlenecks = nn.ModuleList(Bottleneck(hidden, rep) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        deep = [self.conv1(x)]                                           # (B, hidden, H, W)
        for bottleneck in self.bottlenecks:
            deep.append(bottleneck(deep[-1]))                            # (B, hidden, H, W)
        kept = deep if self.keep_all else deep[-1:]
        return self.conv3(torch.cat([*kept, self.conv2(x)], dim=1))      # (B, c_out, H, W)


class SPP(nn.Module):
    """Spatial pyramid pooling: max over windows of 5, 9 and 13 cells. (B, C, H, W) -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.cv1 = ConvBNReLU(channels, channels // 2, 1)
        self.cv2 = ConvBNReLU(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # A window of 9 is one of 5 over one of 5. Rows and columns apart: torch.compile makes slow
        # code of 5 x 5 on a CPU (a quarter of a second for 4 maps of 256 x 10 x 10).
        pooled = [self.cv1(x)]                                           # (B, C/2, H, W)
        for _ in range(3):
            columns = F.max_pool2d(pooled[-1], (5, 1), 1, (2, 0))
            pooled.append(F.max_pool2d(columns, (1, 5), 1, (0, 2)))
        return self.cv2(torch.cat(pooled, dim=1))


class Backbone(nn.Module):
    """Images (B, 3, H, W) to features at strides 4, 8, 16, 32."""

    def __init__(self, size: Size):
        super().__init__()
        self.stem = nn.Sequential(OrderedDict(conv=QARepVGG(3, size.stem, stride=2)))
        channels = [size.stem, *(row[0] for row in size.stages)]
        for i, (c_out, *row) in enumerate(size.stages):  # each halves the resolution
            setattr(self, f"stage{i + 1}", nn.Sequential(OrderedDict(
                downsample=QARepVGG(channels[i], c_out, stride=2),
                blocks=CSPLayer(c_out, c_out, *row))))
        self.context_module = SPP(channels[-1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c2 = self.stage1(self.stem(x))                                   # (B, C, H/4, W/4)
        c3 = self.stage2(c2)                                             # (B, C, H/8, W/8)
        c4 = self.stage3(c3)                                             # (B, C, H/16, W/16)
        c5 = self.context_module(self.stage4(c4))                        # (B, C, H/32, W/32)
        return c2, c3, c4, c5


class UpStage(nn.Module):
    """Upsample x and merge it with the backbone's features of the next two finer levels.

    x (B, ., H, W), skip (B, ., 2H, 2W), fine (B, ., 4H, 4W) -> x with fewer channels (B, C, H, W),
    which a DownStage reuses, and the merged features (B, C, 2H, 2W).
    """

    def __init__(self, c_in: int, c_skip: int, c_fine: int, c_out: int, hidden: int, depth: int):
        super().__init__()
        self.reduce_skip1 = ConvBNReLU(c_skip, c_out, 1)
        self.reduce_skip2 = ConvBNReLU(c_fine, c_out, 1)
        self.conv = ConvBNReLU(c_in, c_out, 1)
        self.upsample = nn.ConvTranspose2d(c_out, c_out, 2, stride=2)
        self.downsample = ConvBNReLU(c_out, c_out, 3, stride=2)
        self.reduce_after_concat = ConvBNReLU(3 * c_out, c_out, 1)
        self.blocks = CSPLayer(c_out, c_out, hidden, depth)
        self.upsample.bias.requires_grad_(False)  # the next norm cancels it, as in QARepVGG

    def forward(self, x: Tensor, skip: Tensor, fine: Tensor) -> tuple[Tensor, Tensor]:
        reduced = self.conv(x)                                           # (B, C, H, W)
        y = torch.cat([self.upsample(reduced), self.reduce_skip1(skip),
                       self.downsample(self.reduce_skip2(fine))], dim=1)   # (B, 3C, 2H, 2W)
        return reduced, self.blocks(self.reduce_after_concat(y))         # (B, C, 2H, 2W)


class DownStage(nn.Module):
    """Downsample x and merge it with skip: (B, c_in, 2H, 2W), (B, ., H, W) -> (B, c_out, H, W)"""

    def __init__(self, c_in: int, c_skip: int, c_out: int, hidden: int, depth: int):
        super().__init__()
        self.conv = ConvBNReLU(c_in, c_out // 2, 3, stride=2)
        self.blocks = CSPLayer(c_out // 2 + c_skip, c_out, hidden, depth, rep=False)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.blocks(torch.cat([self.conv(x), skip], dim=1))       # (B, c_out, H, W)


class Neck(nn.Module):
    """Features at strides 4, 8, 16, 32 to pyramid levels at strides 8, 16, 32 (PAFPN)."""

    def __init__(self, size: Size):
        super().__init__()
        c2, c3, c4, c5 = (row[0] for row in size.stages)
        up1, up2, down1, down2 = size.neck
        self.neck1 = UpStage(c5, c4, c3, *up1)
        self.neck2 = UpStage(up1[0], c3, c2, *up2)
        self.neck3 = DownStage(up2[0], up2[0], *down1)
        self.neck4 = DownStage(down1[0], up1[0], *down2)

    def forward(self, c2: Tensor, c3: Tensor, c4: Tensor, c5: Tensor) -> list[Tensor]:
        coarse, x = self.neck1(c5, c4, c3)
        middle, p3 = self.neck2(x, c3, c2)                               # (B, C, H/8, W/8)
        p4 = self.neck3(p3, middle)                                      # (B, C, H/16, W/16)
        p5 = self.neck4(p4, coarse)                                      # (B, C, H/32, W/32)
        return [p3, p4, p5]


def head_conv(c_in: int, c_out: int, kernel: int) -> nn.Module:
    """A ConvBNReLU named `seq`, as in the official heads."""
    return nn.Sequential(OrderedDict(seq=ConvBNReLU(c_in, c_out, kernel)))


class Head(nn.Module):
    """One level's features (B, c_in, h, w) to the raw outputs of its anchors, one per cell.

    Returns person and keypoint logits (B, 1 + K, h, w), box (B, 4 * R, h, w), pose (B, 2K, h, w).
    The keypoint logits come from the box branch: the architecture search left them there.
    """

    def __init__(self, c_in: int, box: int, pose: int, pose_depth: int, num_keypoints: int):
        super().__init__()
        self.pose_stem = head_conv(c_in, pose, 1)
        self.bbox_stem = head_conv(c_in, box, 1)
        self.cls_convs = nn.Sequential(head_conv(box, box, 3))
        self.reg_convs = nn.Sequential(head_conv(box, box, 3))
        self.pose_convs = nn.Sequential(*(head_conv(pose, pose, 3) for _ in range(pose_depth)))
        self.cls_pred = nn.Conv2d(box, 1 + num_keypoints, 1)
        self.reg_pred = nn.Conv2d(box, 4 * BINS, 1)
        self.pose_pred = nn.Conv2d(pose, 2 * num_keypoints, 1)
        # Every score starts at 0.01, or the loss of the background would dominate the first steps.
        nn.init.constant_(self.cls_pred.bias, -math.log(99))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        box, pose = self.bbox_stem(x), self.pose_stem(x)
        return (self.cls_pred(self.cls_convs(box)), self.reg_pred(self.reg_convs(box)),
                self.pose_pred(self.pose_convs(pose)))


class RawOutput(NamedTuple):
    """All outputs of the network, before any threshold. s is the stride of the anchor's level."""

    cls_logits: Tensor   # (B, A)        person or background
    box_logits: Tensor   # (B, A, 4, R)  center to left, top, right, bottom edge; bin r is r * s px
    kpt_offsets: Tensor  # (B, A, K, 2)  x, y from the cell's top left corner, in strides
    kpt_logits: Tensor   # (B, A, K)     keypoint labeled or not
    centers: Tensor      # (A, 2)        cell centers, px
    strides: Tensor      # (A, 1)        px
    mask_logits: Tensor | None = None   # (B, H/2, W/2) somebody's pixel or not, with mask=True

    def promote(self) -> "RawOutput":
        """The same in float32 or wider: decoding in half precision would be off by pixels."""
        dtype = torch.promote_types(self.cls_logits.dtype, torch.float32)
        return RawOutput(*(t if t is None else t.to(dtype) for t in self))


class Decoded(NamedTuple):
    """Raw outputs as pixels and probabilities, one row per anchor."""

    boxes: Tensor       # (B, A, 4)     x1, y1, x2, y2, px
    scores: Tensor      # (B, A)        person, in [0, 1]
    keypoints: Tensor   # (B, A, K, 2)  x, y, px
    kpt_scores: Tensor  # (B, A, K)     in [0, 1]


def make_anchors(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """One anchor per cell of every level. Return centers (A, 2) px and strides (A, 1) px."""
    levels = []
    for s in STRIDES:
        y, x = ((torch.arange(side // s, device=device) + 0.5) * s for side in (height, width))
        y, x = (t.flatten() for t in torch.meshgrid(y, x, indexing="ij"))         # (H/s * W/s,)
        levels.append(torch.stack([x, y, torch.full_like(x, s)], dim=1))          # (H/s * W/s, 3)
    return torch.cat(levels).split([2, 1], dim=1)


def decode(raw: RawOutput) -> Decoded:
    """Raw outputs to boxes, scores and keypoints in px of the padded input. Differentiable.

    Computed in float32, or in float64 if raw is. Boxes are not clipped to the image.
    """
    raw = raw.promote()
    bins = torch.arange(BINS, device=raw.centers.device, dtype=raw.centers.dtype)  # (R,) strides
    edges = (raw.box_logits.softmax(-1) * bins).sum(-1) * raw.strides              # (B, A, 4) px
    boxes = torch.cat([raw.centers - edges[..., :2], raw.centers + edges[..., 2:]], dim=-1)
    corners = raw.centers - raw.strides / 2                                        # (A, 2) px
    keypoints = corners[:, None] + raw.kpt_offsets * raw.strides[:, None]          # (B, A, K, 2)
    return Decoded(boxes, raw.cls_logits.sigmoid(), keypoints, raw.kpt_logits.sigmoid())


class YoloNasPose(nn.Module):
    """Images (B, 3, H, W), RGB in [0, 1], H and W multiples of 32, to a RawOutput.

    size is a key of SIZES. mask adds a branch on the finest level that separates people's pixels
    from the background. Raises ValueError for an unknown size.
    """

    def __init__(self, size: str, num_keypoints: int = 17, mask: bool = False):
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"size {size!r} unknown; choose one of {', '.join(SIZES)}")
        row = SIZES[size]
        self.backbone = Backbone(row)
        self.neck = Neck(row)
        levels = [row.neck[i][0] for i in (1, 2, 3)]
        self.heads = nn.ModuleDict({
            f"head{i + 1}": Head(levels[i], *row.heads[i], depth, num_keypoints)
            for i, depth in enumerate((2, 2, 3))})
        # Last, so the other weights start the same without it. A cell predicts 4 x 4 mask pixels.
        self.mask = nn.Sequential(ConvBNReLU(levels[0], levels[0], 3),
                                  nn.Conv2d(levels[0], 16, 1)) if mask else None
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = row.bn_momentum

    def forward(self, images: Tensor) -> RawOutput:
        levels = self.neck(*self.backbone(images))
        maps = [head(x) for head, x in zip(self.heads.values(), levels)]
        cls, box, pose = (torch.cat([m.flatten(2) for m in kind], dim=2).transpose(1, 2)
                          for kind in zip(*maps))                        # (B, A, c) each
        centers, strides = make_anchors(*images.shape[2:], images.device)
        mask = F.pixel_shuffle(self.mask(levels[0]), 4)[:, 0] if self.mask else None
        return RawOutput(cls[..., 0], box.unflatten(2, (4, BINS)), pose.unflatten(2, (-1, 2)),
                         cls[..., 1:], centers, strides, mask)

    @torch.no_grad()
    def fuse(self) -> "YoloNasPose":
        """Fold the branches and norms of each block into one convolution, in place. Returns self.

        The outputs in eval mode stay the same; training is no longer possible.
        """
        for module in self.eval().modules():
            if isinstance(module, (ConvBNReLU, QARepVGG)):
                module.fuse()
        return self.requires_grad_(False)


class SyncNorm(torch.autograd.Function):
    """Batch norm of x (B, C, H, W) over all processes' pixels; also returns mean, var, number.

    Squares are summed about each process's own mean, then shifted: about 0 they would cancel. The
    gradient, https://arxiv.org/abs/1502.03167, sums over all processes: each loss depends on all x.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        c, wide = x.shape[1], x.to(torch.promote_types(x.dtype, torch.float32))
        own = wide.mean((0, 2, 3))                                                # (C,)
        squares = (wide - own[:, None, None]).square_().sum((0, 2, 3))            # (C,)
        mine = torch.cat([own, squares, own.new_tensor([x.numel() / c])])
        shares = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(shares, mine)
        own, squares, pixels = torch.stack(shares).split([c, c, 1], 1)            # (processes, ...)
        total = pixels.sum()
        mean = (own * pixels).sum(0) / total                                      # (C,)
        var = (squares + pixels * (own - mean).square()).sum(0) / total           # (C,)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), total)
        ctx.mark_non_differentiable(mean, var, total)
        return F.batch_norm(wide, mean, var, weight, bias, eps=eps).to(x.dtype), mean, var, total

    @staticmethod
    def backward(ctx, grad: Tensor, *_) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, total = ctx.saved_tensors
        wide = grad.to(mean.dtype)                                                # (B, C, H, W)
        normed = (x - mean[:, None, None]).mul_(scale[:, None, None])             # (B, C, H, W)
        sums = torch.stack([wide.sum((0, 2, 3)), (wide * normed).sum((0, 2, 3))])   # (2, C)
        means = sums.clone()
        dist.all_reduce(means)
        mean, slope = (means / total)[..., None, None]                            # (C, 1, 1) each
        out = (wide - normed.mul_(slope)).sub_(mean).mul_((weight * scale)[:, None, None])
        return out.to(x.dtype), sums[1], sums[0], None  # of this process: train_step sums


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that trains on the statistics of all processes, each with one or more images."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        y, mean, var, total = SyncNorm.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * total / (total - 1), self.momentum)
            self.num_batches_tracked += 1
        return y


def sync_batch_norm(model: nn.Module) -> nn.Module:
    """Sync norms over all processes: torch's SyncBatchNorm on a GPU, the class above on a CPU."""
    if next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SyncBatchNorm
    return model


# What torch.load may raise for a damaged file; which one depends on the bytes.
DAMAGED = (pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError,
           RuntimeError, ValueError, LookupError, TypeError, AttributeError, OverflowError)


def load_file(path: str):
    """Load to the CPU what torch.save wrote, after verifying its checksums.

    Raises OSError, or ValueError if the file is damaged or needs pickled code, which is never run.
    """
    if not os.path.isfile(path):
        found = "a folder" if os.path.isdir(path) else "no such file"
        raise FileNotFoundError(f"{path}: {found}; expected a checkpoint, as best.pt in a run's "
                                f"folder; if it has moved, give its new path")
    with open(path, "rb") as f:
        try:
            wrong = "no archive of torch.save"
            if zipfile.is_zipfile(f):
                wrong = zipfile.ZipFile(f).testzip()  # the first damaged part
                f.seek(0)
                if wrong is None:
                    return torch.load(f, map_location="cpu", weights_only=True)
        except DAMAGED as error:
            if getattr(error, "errno", None) not in (None, errno.EINVAL):  # the disk, not the file
                raise OSError(error.errno, error.strerror, path) from None
            wrong = (str(error) or type(error).__name__).splitlines()[0]
    raise ValueError(f"{path} is damaged, or no checkpoint of plain tensors: {wrong}")


def read_weights(path: str) -> tuple[dict[str, Tensor], dict]:
    """Read a checkpoint, ours or official. Return its state_dict in our convention, and the file.

    From our files it takes the EMA weights if there are any; a bare state_dict is accepted, too.
    An official file (super-gradients) holds ema_net or net, or is the state_dict itself; it is
    recognized by its placeholders for fused kernels (rbr_reparam), which are dropped. Its network
    takes BGR and predicts pixel indices; ours, RGB and continuous coordinates, half a pixel larger:
    its weights are converted. Raises as load_file does; ValueError for other contents.
    """
    found = load_file(path)
    file = found if isinstance(found, dict) else {}
    keys = ("ema", "model") if "format" in file else ("ema_net", "net")
    state = next((file[key] for key in keys if key in file), file)
    if not (isinstance(state, dict) and state and all(map(torch.is_tensor, state.values()))):
        raise ValueError(f"{path} is no checkpoint: it holds {list(file)[:5] or type(found)}; give "
                         f"a .pt of train.py or an official .pth")
    if "format" in file:
        return state, file
    official = any(".rbr_reparam." in name for name in state)
    state = {name.removeprefix("module."): t for name, t in state.items()
             if ".rbr_reparam." not in name}
    for name, tensor in state.items() if official else ():
        if name.startswith("backbone.stem.") and tensor.ndim == 4:
            state[name] = tensor.flip(1)
        elif name.endswith("pose_pred.bias"):  # of heads.head1, 2 or 3
            state[name] = tensor + 0.5 / STRIDES[int(name[len("heads.head")]) - 1]
    return state, file


# Layers whose weights have rows for each keypoint: (rows before these, rows per keypoint).
KEYPOINT_ROWS = {"cls_pred": (1, 1), "pose_pred": (0, 2)}


def rows_by_name(state: dict[str, Tensor], own: dict[str, Tensor], names: list[str],
                 old_names: list[str]) -> list[str]:
    """Convert state's KEYPOINT_ROWS layers from old_names' keypoints to those of names, in place:
    shared names keep their rows, new ones get own's. Returns the names of the changed tensors.
    """
    shared, done = [keypoint for keypoint in names if keypoint in old_names], []
    to, at = ([known.index(keypoint) for keypoint in shared] for known in (names, old_names))
    for name, new in own.items():
        layer, old = name.split(".")[-2], state.get(name)
        if layer not in KEYPOINT_ROWS or old is None or old.shape[1:] != new.shape[1:]:
            continue
        before, each = KEYPOINT_ROWS[layer]
        if (shared or before) and len(old) == before + each * len(old_names):
            state[name], done = new.clone(), [*done, name]
            state[name][:before] = old[:before]
            rows, old_rows = (t[before:].unflatten(0, (-1, each)) for t in (state[name], old))
            rows[to] = old_rows[at]
    return done


def load_weights(model: nn.Module, path: str, names: Sequence[str] = (),
                 official_names: Sequence[str] = ()) -> dict[str, list[str]]:
    """Copy the tensors of a checkpoint that fit by name and shape into the model.

    names are the model's keypoints. If the file's (if it lists none, but has as many: those of
    official_names) differ, the last layers keep the rows of the person and the shared names; if no
    name is shared but there are as many, they keep all rows by position. Returns the names of
    tensors: "loaded", "in part", "skipped" (other shape), "missing" (only in the model), "unused"
    (only in the file); and four lists of keypoint names. Raises as read_weights does; ValueError if
    nothing fits.
    """
    (state, file), own = read_weights(path), model.state_dict()
    rows = state.get("heads.head1.pose_pred.bias", ())
    unnamed = official_names if len(rows) == 2 * len(official_names) else ()
    old_names = file["skeleton"]["names"] if "skeleton" in file else unnamed
    other = set(names) & set(old_names) or len(names) != len(old_names)
    part = rows_by_name(state, own, names, old_names) if other and names != old_names else []
    fits = {n: t for n, t in state.items() if n in own and own[n].shape == t.shape}
    if not fits:
        raise ValueError(f"{path}: none of its {len(state)} tensors fits; is it YOLO-NAS-Pose?")
    model.load_state_dict(fits, strict=False)
    by_place = names != old_names and not part and len(rows) == 2 * len(names)
    return {"loaded": [n for n in own if n in fits and n not in part], "in part": part,
            "skipped": [n for n in own if n in state and n not in fits],
            "missing": [n for n in own if n not in state],
            "unused": sorted(set(state).difference(own)),
            "names no keypoints, taken for": [] if "skeleton" in file else list(old_names),
            "keypoints by place": list(names) if by_place else [],
            "new keypoints": [n for n in names if n not in old_names and not by_place],
            "kept keypoints": [n for n in names if n in old_names] if part else []}


def write_atomically(path: str, content: dict) -> None:
    """torch.save that leaves the old file or the new one whole, whenever the job is killed.

    Raises OSError with the path if writing fails.
    """
    try:
        with open(path + ".tmp", "wb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:  # torch.save reports the first as the second
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        reason = error.__context__ or error
        if isinstance(reason, OSError):
            reason.filename = path
        raise reason


def save_last(out: str, state: dict) -> None:
    """Write out/last.pt; the one before it becomes previous.pt."""
    last = os.path.join(out, "last.pt")
    write_atomically(last + ".new", state)  # complete before any older file is touched
    if os.path.exists(last):
        os.replace(last, os.path.join(out, "previous.pt"))
    os.replace(last + ".new", last)


def load_last(out: str) -> dict | None:
    """The newest undamaged checkpoint in `out`, or None. Damaged ones are renamed *.damaged."""
    for name in ("last.pt", "previous.pt"):
        path = os.path.join(out, name)
        if os.path.exists(path):
            try:
                return load_file(path)
            except ValueError as error:
                os.replace(path, path + ".damaged")
                print(f"{error}; renamed to {name}.damaged")
    return None
