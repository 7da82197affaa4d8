"""Decides which anchor learns which person, and computes the losses.

Owns OKS, the task-aligned assigner, the five loss terms, and those of a mask and a teacher. Knows
nothing of images, files or optimizers: imports only torch; can be read, tested, replaced alone.

Read in this order: oks, assign, PoseLoss.

Axes    B images   A anchors   M people in one image   K keypoints   R distance bins
        P slots for anchors that learn a person
Units   coordinates are pixels of the padded network input; boxes are x1, y1, x2, y2;
        a keypoint is x, y, v with v = 0 not labeled, 1 labeled but hidden, 2 labeled and visible

Papers  task-aligned assignment (TOOD)     https://arxiv.org/abs/2108.07755
        focal loss; with soft targets      https://arxiv.org/abs/1708.02002, 2006.04388 (QFL, DFL)
        complete IoU                       https://arxiv.org/abs/1911.08287
        OKS as a training loss             https://arxiv.org/abs/2204.06806
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# COCO's OKS uses the segment's area; here, and in data.py where that is missing, 0.53 of the box.
BODY_SHARE_OF_BOX = 0.53
EPS = 1e-9
TOPK = 13  # most anchors that learn a person; PoseLoss has no room for more, and drops them unseen
TERMS = ("cls", "iou", "dfl", "pose_cls", "pose_reg")  # always; optional:
MASK_TERMS, DISTILL_TERMS = ("mask",), ("kd_cls", "kd_box", "kd_pose")


def oks(pred: Tensor, target: Tensor, labeled: Tensor, area: Tensor, sigmas: Tensor) -> Tensor:
    """Object keypoint similarity (https://cocodataset.org/#keypoints-eval): how poses match.

    pred     (..., K, 2)  predicted x, y, px
    target   (..., K, 2)  labeled x, y, px
    labeled  (..., K)     bool, or weights in [0, 1]; unlabeled keypoints do not count
    area     (...)        object area, px^2
    sigmas   (K,)         spread of each keypoint as a share of sqrt(area); belongs to the data set
    returns  (...)        mean over labeled keypoints of exp(-distance^2 / (8 sigma^2 area));
                          0 where no keypoint is labeled.

    Leading axes broadcast: people (B, M, 1, K, 2) and anchors (B, 1, A, K, 2) give (B, M, A).
    Raises ValueError if the numbers of keypoints and of sigmas differ.
    """
    if pred.shape[-2] != len(sigmas):
        raise ValueError(f"pose has {pred.shape[-2]} keypoints but there are {len(sigmas)} sigmas; "
                         f"both must come from the same data set")
    labeled = labeled.to(pred.dtype)                                              # (..., K)
    scale = -1 / (8 * sigmas.square() * (area[..., None] + EPS))                  # (..., K) 1/px^2
    if pred.shape == target.shape:  # all at once: a GPU takes longer to start kernels than to run
        near = ((pred - target).square().sum(-1) * scale).clamp(min=-80).exp()    # (..., K)
        return (near * labeled).sum(-1) / (labeled.sum(-1) + EPS)
    total = pred.new_zeros(())
    for k in range(len(sigmas)):  # nothing is larger than (...)
        d = pred[..., k, 0] - target[..., k, 0]                                   # (...) px
        near = d * d
        d = pred[..., k, 1] - target[..., k, 1]  # reused names free large tensors
        near = torch.addcmul(near, d, d) * scale[..., k]
        near = near.clamp(min=-80).exp()  # a CPU's exp is 15 times as slow if it underflows
        total = torch.addcmul(total, near, labeled[..., k])
    return F.threshold(total, 1e-33, 0.0) / (labeled.sum(-1) + EPS)  # clamped: < 1e-33 to K = 55


def pairwise_iou(people: Tensor, anchors: Tensor) -> Tensor:
    """IoU of boxes (B, M, 4) with boxes (B, A, 4) px, to (B, M, A).

    Unlike torchvision's box_iou it takes a batch, and has an eps, as padding rows have area 0.
    """
    x1, y1, x2, y2 = people[:, :, None].unbind(-1)                                # (B, M, 1) each
    u1, v1, u2, v2 = anchors[:, None].unbind(-1)                                  # (B, 1, A) each
    width = torch.minimum(x2, u2).sub_(torch.maximum(x1, u1)).clamp_(min=0)       # (B, M, A)
    overlap = width.mul_(torch.minimum(y2, v2).sub_(torch.maximum(y1, v1)).clamp_(min=0))
    area = (people[..., 2:] - people[..., :2]).clamp(min=0).prod(-1)              # (B, M)
    anchor_area = (anchors[..., 2:] - anchors[..., :2]).clamp(min=0).prod(-1)     # (B, A)
    return overlap / (area[:, :, None] + anchor_area[:, None] - overlap + EPS)


def inside(centers: Tensor, boxes: Tensor) -> Tensor:
    """Which anchor centers (A, 2) lie in which boxes (B, M, 4): bool (B, M, A)."""
    x, y = centers.unbind(-1)                                                     # (A,) each
    x1, y1, x2, y2 = boxes[:, :, None].unbind(-1)                                 # (B, M, 1) each
    return (x - x1 > EPS) & (y - y1 > EPS) & (x2 - x > EPS) & (y2 - y > EPS)


@torch.no_grad()
def assign(scores: Tensor, boxes: Tensor, keypoints: Tensor, gt_boxes: Tensor, gt_keypoints: Tensor,
           people: Tensor, centers: Tensor, sigmas: Tensor, topk: int = TOPK, alpha: float = 1.0,
           beta: float = 6.0, oks_floor: float = 0.1) -> tuple[Tensor, Tensor]:
    """Choose the anchors that learn each person (task-aligned assignment).

    1. quality     box IoU x OKS: how well an anchor already predicts a person
    2. metric      score^alpha x quality^beta: how well it finds and places the person
    3. candidates  per person, the topk anchors of highest metric whose center is in the box
    4. conflicts   a candidate of several people goes to the person of highest quality among all
                   whose box contains its center (in the reference, among all people)
    5. weight      the metric, rescaled so that its maximum per person equals that of the quality

    scores     (B, A) in [0, 1]                 gt_boxes      (B, M, 4)    px
    boxes      (B, A, 4)    px                  gt_keypoints  (B, M, K, 3) px, px, v
    keypoints  (B, A, K, 2) px                  people        (B, M)       bool, False for padding
    centers    (A, 2)       px                  sigmas        (K,)
    returns    person (B, A) int64, a row of gt_boxes, or -1 for background;
               weight (B, A) in [0, 1], the class target; 0 for background
    M >= 1, but an image may have no people.

    An untrained network has an OKS near 0, whose 6th power is lost beside any epsilon, so that the
    reference gives about half of the people no target at all. Two changes prevent this: an OKS
    below oks_floor counts as oks_floor, so that IoU ranks the first anchors; and quality is divided
    by the person's best before it is raised to beta. oks_floor = 0: exactly the reference, 4 too.
    """
    visible = gt_keypoints[..., 2] > 0                                            # (B, M, K)
    area = BODY_SHARE_OF_BOX * (gt_boxes[..., 2:] - gt_boxes[..., :2]).prod(-1)   # (B, M) px^2
    # 1
    similarity = oks(keypoints[:, None], gt_keypoints[:, :, None, :, :2], visible[:, :, None],
                     area[:, :, None], sigmas)                                    # (B, M, A)
    quality = pairwise_iou(gt_boxes, boxes).mul_(similarity.clamp_(min=oks_floor))   # (B, M, A)
    allowed = inside(centers, gt_boxes) & people[..., None]                       # (B, M, A)
    # 2
    ours = oks_floor > 0
    takers, eps = (allowed, torch.finfo(quality.dtype).tiny) if ours else (people[..., None], EPS)
    relative = quality * takers                                                   # (B, M, A)
    if ours:
        relative /= relative.amax(2, keepdim=True).clamp(min=eps)
    metric = relative.pow_(beta).mul_(scores[:, None].pow(alpha))                 # (B, M, A)
    # 3
    top = (metric * allowed).topk(min(topk, metric.shape[2]), dim=2).indices      # (B, M, topk)
    wanted = torch.zeros_like(allowed).scatter_(2, top, True) & allowed           # (B, M, A)
    # 4
    first = wanted.int().argmax(1)                                                # (B, A)
    best_person = (quality * takers).argmax(1)                                    # (B, A)
    claims = wanted.sum(1)                                                        # (B, A)
    person = torch.where(claims > 1, best_person, first).masked_fill(claims == 0, -1)
    rows = torch.arange(people.shape[1], device=person.device)[:, None]           # (M, 1)
    owned = person[:, None] == rows                                               # (B, M, A)
    # 5
    metric *= owned
    scale = quality.mul_(owned).amax(2, keepdim=True) / (metric.amax(2, keepdim=True) + eps)
    return person, (metric * scale).amax(1)


def focal_bce(logits: Tensor, target: Tensor) -> Tensor:
    """|p - target|^2 x binary cross-entropy, for targets in [0, 1]. Any shape, elementwise."""
    error = (logits.sigmoid() - target).square()
    return error * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def distribution_focal_loss(box_logits: Tensor, distances: Tensor) -> Tensor:
    """Cross-entropy of the two bins around each true distance, mean over the four sides.

    box_logits (..., 4, R), distances (..., 4) in strides, clamped to the range of the bins -> (...)
    """
    distances = distances.clamp(0, box_logits.shape[-1] - 1 - 0.01)               # (..., 4)
    bins = torch.arange(box_logits.shape[-1], device=distances.device)            # (R,)
    share = (1 - (distances[..., None] - bins).abs()).clamp(min=0)                # (..., 4, R)
    return -(share * box_logits.log_softmax(-1)).sum(-1).mean(-1)


def complete_iou_loss(boxes: Tensor, target: Tensor, eps: float = 1e-10) -> Tensor:
    """1 - IoU + distance of the centers + difference in shape (CIoU). Boxes (..., 4) to (...).

    Unlike torchvision's, no mask picks boxes and no prod has a gradient: both wait for a GPU.
    """
    size, target_size = boxes[..., 2:] - boxes[..., :2], target[..., 2:] - target[..., :2]
    low, high = torch.minimum(boxes, target), torch.maximum(boxes, target)        # (..., 4)
    overlap = torch.mul(*(low[..., 2:] - high[..., :2]).clamp(min=0).unbind(-1))
    iou = overlap / (torch.mul(*size.unbind(-1)) + target_size.prod(-1) - overlap + eps)
    apart = (boxes[..., :2] + boxes[..., 2:] - target[..., :2] - target[..., 2:]) / 2
    hull = high[..., 2:] - low[..., :2]                                           # (..., 2)
    distance = apart.square().sum(-1) / (hull.square().sum(-1) + eps)
    angle = torch.atan2(*target_size.unbind(-1)) - torch.atan2(*size.unbind(-1))
    shape = 4 / math.pi ** 2 * angle.square()
    with torch.no_grad():
        alpha = shape / (1 - iou + shape + eps)
    return 1 - iou + distance + alpha * shape


def take(values: Tensor, index: Tensor) -> Tensor:
    """Pick the rows `index` (B, P) of values (B, N, ...): (B, P, ...)."""
    index = index.view(*index.shape, *[1] * (values.ndim - 2))                    # (B, P, 1, ...)
    return values.gather(1, index.expand(-1, -1, *values.shape[2:]))  # by [] its gradient sorts


class LossWeights(NamedTuple):
    """The weight of each term. The defaults are for sizes n and s."""

    cls: float = 1.0        # person or background
    iou: float = 2.5        # box
    dfl: float = 0.01       # box, as a distribution; m and l: 0.5
    pose_cls: float = 1.0   # keypoint labeled or not
    pose_reg: float = 34.0  # keypoint position; m and l: 10
    mask: float = 1.0       # people's pixels, if the network has a mask branch


def mask_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy, the mean over an image's pixels, summed over images: ().

    logits (B, h, w); mask (B, h, w): 0 nobody, 1 somebody, 2 unknown, whose loss is set to 0.
    """
    wrong = F.binary_cross_entropy_with_logits(logits, (mask == 1).to(logits), reduction="none")
    return (wrong * (mask != 2)).mean((1, 2)).sum()


class PoseLoss:
    """The five weighted terms of YOLO-NAS-Pose, and the mask's: sums that are not yet normalized.

    The caller divides the gradient once per optimizer step, by the sum of assigned scores over all
    images of the step, on all processes and in all accumulated batches: only then do these add up
    to the gradient of one large batch. The mask term, a sum over images, is divided by that, too:
    it is large while scores are small. A term's name is its field in LossWeights; distill's differ.

    reference=True follows the original exactly, for crowds and in the assigner (see assign).
    Otherwise crowd regions and people without labeled keypoints are ignore regions: an anchor in
    one, unless it is assigned to a person, counts neither as person nor as background.
    """

    def __init__(self, sigmas: Tensor, weights: LossWeights = LossWeights(),
                 reference: bool = False, label_smoothing: float = 0.0):
        self.sigmas, self.weights, self.reference = sigmas, weights, reference
        self.label_smoothing, self.terms = label_smoothing, TERMS
        self.oks_floor = 0.0 if reference else 0.1

    def __call__(self, raw, decoded, targets: dict[str, Tensor],
                 sigma_scale: float = 1.0) -> tuple[dict, Tensor]:
        """Weighted term sums {name: ()} and the assigned-score sum (), in float32 at least.

        raw      model.RawOutput, after promote()
        decoded  model.Decoded of it
        targets  boxes (B, M, 4) px, of area 0 in padding rows; keypoints (B, M, K, 3) px, px, v;
                 crowd (B, M) bool; M >= 1. With a mask branch also mask, as in mask_loss
        """
        gt_boxes, gt_keypoints, crowd = (targets[name] for name in ("boxes", "keypoints", "crowd"))
        gt_boxes, gt_keypoints = gt_boxes.to(raw.centers), gt_keypoints.to(raw.centers)
        sigmas = self.sigmas.to(raw.centers) * sigma_scale
        real = (gt_boxes[..., 2:] > gt_boxes[..., :2]).all(-1)                    # (B, M)
        labeled = (gt_keypoints[..., 2] > 0).any(-1)                              # (B, M)
        people = real if self.reference else real & labeled & ~crowd              # (B, M)

        # Some images at a time: if one is crowded, each (B, M, A) tensor takes 17 MB, not a GB.
        some = max(2 ** 22 // (gt_boxes.shape[1] * len(raw.centers)), 1)
        batch = (decoded.scores, decoded.boxes, decoded.keypoints, gt_boxes, gt_keypoints, people)
        parts = [assign(*images, raw.centers, sigmas, oks_floor=self.oks_floor)
                 for images in zip(*(t.split(some) for t in batch))]
        person, weight = (torch.cat(part) for part in zip(*parts))                # (B, A) twice
        if self.reference:
            weight = weight * ~take(crowd, person.clamp(min=0))
            counted = torch.ones_like(weight)                                     # (B, A)
        else:
            ignored = inside(raw.centers, gt_boxes) & (real & ~people)[..., None]    # (B, M, A)
            counted = 1.0 - (ignored.any(1) & (person < 0)).to(weight)            # (B, A)
        smooth = weight + self.label_smoothing * (0.5 - weight)                   # (B, A)
        cls = (focal_bce(raw.cls_logits, smooth) * counted).sum()

        # At most TOPK anchors learn each person. Always taking TOPK * M, those of highest weight,
        # avoids waiting for the GPU to count them; slots left over have weight 0.
        slots = min(TOPK * gt_boxes.shape[1], weight.shape[1])
        share, anchor = weight.topk(slots, dim=1)                                 # (B, P)
        row = take(person, anchor).clamp(min=0)                                   # (B, P)
        terms = {"cls": cls, **self.person_terms(raw, decoded, anchor, take(gt_boxes, row),
                                                 take(gt_keypoints, row), share, sigmas)}
        if raw.mask_logits is not None:
            terms["mask"] = mask_loss(raw.mask_logits, targets["mask"])
        return ({name: value * getattr(self.weights, name) for name, value in terms.items()},
                share.sum())

    def person_terms(self, raw, decoded, anchor: Tensor, boxes: Tensor, keypoints: Tensor,
                     weight: Tensor, sigmas: Tensor) -> dict[str, Tensor]:
        """The four terms of the anchors that learn a person: their indices are anchor (B, P).

        Their targets: boxes (B, P, 4) px, keypoints (B, P, K, 3) px, px, v; weight (B, P).
        sigmas (K,) are already multiplied by sigma_scale.
        """
        # A slot without a person gets a box of 1 x 1 px: its weight is 0, its loss must be finite.
        unit_box = (torch.arange(4, device=boxes.device) > 1).to(boxes)           # 0, 0, 1, 1
        boxes = torch.where(weight[..., None] > 0, boxes, unit_box)               # (B, P, 4)
        strides, centers = raw.strides[anchor], raw.centers[anchor]               # (B, P, 1 or 2)
        iou = complete_iou_loss(take(decoded.boxes, anchor) / strides, boxes / strides)   # (B, P)
        distances = torch.cat([centers - boxes[..., :2], boxes[..., 2:] - centers], -1) / strides
        dfl = distribution_focal_loss(take(raw.box_logits, anchor), distances)    # (B, P)

        labeled = (keypoints[..., 2] > 0).to(weight)                              # (B, P, K)
        kpt_logits = take(raw.kpt_logits, anchor)                                 # (B, P, K)
        balance = 0.75 - 0.5 * labeled
        pose_cls = (balance * focal_bce(kpt_logits, labeled)).mean(-1)            # (B, P)
        area = BODY_SHARE_OF_BOX * (boxes[..., 2:] - boxes[..., :2]).prod(-1)     # (B, P) px^2
        similarity = oks(take(decoded.keypoints, anchor), keypoints[..., :2], labeled, area, sigmas)
        pose_reg = labeled.amax(-1) - similarity                                  # (B, P) 1 - OKS
        terms = {"iou": iou, "dfl": dfl, "pose_cls": pose_cls, "pose_reg": pose_reg}
        return {name: (term * weight).sum() for name, term in terms.items()}

    def distill(self, raw, decoded, teacher_raw, teacher, sigma_scale: float = 1.0,
                conf: float = 0.3, slots: int = 300) -> dict[str, Tensor]:
        """How far a network is from its teacher: weighted sums {name: ()}, 0 if they are equal.

        kd_cls   all anchors: the class loss with the teacher's score as the soft target; weighted
                 3 times LossWeights.cls, which made students better than 1 time
        kd_box   Kullback-Leibler divergence of box distributions, mean of the sides; iou's weight
        kd_pose  1 - OKS to the teacher's keypoints, weighted by their scores; pose_reg's weight

        kd_box and kd_pose take the anchors that the teacher scores at least conf, at most `slots`
        per image, weighted by that score. raw and teacher_raw are model.RawOutput after promote(),
        decoded and teacher the model.Decoded of these; the teacher's have no gradients.
        Knowledge distillation: https://arxiv.org/abs/1503.02531; of distributions: 2102.12252.
        """
        weight, anchor = teacher.scores.topk(min(slots, teacher.scores.shape[1]), dim=1)   # (B, P)
        weight = weight * (weight >= conf)
        log_p, log_q = (take(r.box_logits, anchor).log_softmax(-1) for r in (raw, teacher_raw))
        divergence = (log_q.exp() * (log_q - log_p)).sum(-1).mean(-1)             # (B, P)
        boxes, sure = take(teacher.boxes, anchor), take(teacher.kpt_scores, anchor)
        area = BODY_SHARE_OF_BOX * (boxes[..., 2:] - boxes[..., :2]).prod(-1)     # (B, P) px^2
        similarity = oks(take(decoded.keypoints, anchor), take(teacher.keypoints, anchor), sure,
                         area, self.sigmas.to(area) * sigma_scale)                # (B, P)
        missed = sure.sum(-1) / (sure.sum(-1) + EPS) - similarity                 # (B, P)
        return {"kd_cls": focal_bce(raw.cls_logits, teacher.scores).sum() * 3 * self.weights.cls,
                "kd_box": (divergence * weight).sum() * self.weights.iou,
                "kd_pose": (missed * weight).sum() * self.weights.pose_reg}
