"""The loss against the reference's numbers, a slow version, hand computations and invariances."""
import copy
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch._subclasses import FakeTensorMode

import data
import loss
from loss import (DISTILL_TERMS, LossWeights, PoseLoss, assign, distribution_focal_loss, mask_loss,
                  oks)
from model import BINS, RawOutput, YoloNasPose, decode, make_anchors
from reference import LOSS_INPUT, committed, full, image

SIGMAS = torch.tensor([.026, .025, .025, .035, .035, .079, .079, .072, .072, .062, .062, .107, .107,
                       .087, .087, .089, .089], dtype=torch.float64)
RECIPES = {"recipe_ns": LossWeights(), "recipe_ml": LossWeights(dfl=0.5, pose_reg=10.0)}
CHANGED = "cls, iou, dfl, pose_cls, pose_reg, their sum: one that you changed differs, rightly"
MODES = pytest.mark.parametrize("reference", [True, False], ids=["reference", "ours"])


def padded(dump: dict, b: int) -> dict[str, Tensor]:
    """The reference's rows (N, image and values) as targets (B, N, values): most are padding."""
    image_of = dump["target_boxes"][:, 0].astype(int)
    n = len(image_of)
    out = {"boxes": torch.zeros(b, n, 4).double(), "joints": torch.zeros(b, n, 17, 3).double(),
           "crowd": torch.zeros(b, n, 1).double()}
    for name, t in out.items():
        t[image_of, range(n)] = torch.tensor(dump[f"target_{name}"][..., 1:]).double()
    return {"boxes": out["boxes"], "keypoints": out["joints"], "crowd": out["crowd"][..., 0] > 0}


def scene() -> tuple[RawOutput, dict[str, Tensor]]:
    """Raw outputs of a half trained network for four images of 128 x 160 px, and their targets.

    Each anchor says, with errors of some px, where one of eight people is, most often the first of
    a group. The two groups are of four people in almost one place, who contest the same anchors.
    Row 3 is a crowd, row 4 has no labeled keypoint, row 7 is padding.
    """
    g = torch.Generator().manual_seed(0)

    def uniform(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    group = torch.tensor([[16.0, 12.0], [64.0, 40.0]]).repeat_interleave(4, 0)             # (M, 2)
    low, side = group + 8 * uniform(4, 8, 2), 52 + 12 * uniform(4, 8, 2)                   # px
    boxes = torch.cat([low, low + side], -1)                                               # px
    share = (uniform(4, 1, 17, 2) + 0.06 * uniform(4, 8, 17, 2)) / 1.06   # where in the box
    xy = low[:, :, None] + side[:, :, None] * share                                        # px
    v = torch.randint(0, 3, (4, 8, 17, 1), generator=g)
    targets = {"boxes": boxes, "keypoints": torch.cat([xy, v], -1),
               "crowd": torch.zeros(4, 8, dtype=torch.bool)}

    centers, strides = (t.double() for t in make_anchors(128, 160, torch.device("cpu")))
    a, rows = len(centers), torch.arange(4)[:, None]
    told = torch.tensor([[6.0, 0, 0, 1, 6, 1, 1, 1]]).repeat(4, 1).multinomial(a, True, generator=g)
    box = boxes[rows, told]                                                                # px
    reach = torch.cat([centers - box[..., :2], box[..., 2:] - centers], -1) / strides
    box_logits = uniform(4, a, 4, BINS) - (torch.arange(BINS) - reach[..., None]).square() / 2
    xy = xy[rows, told] + 6 * (uniform(4, a, 17, 2) - 0.5)                                 # px
    offsets = (xy - (centers - strides / 2)[:, None]) / strides[:, None]
    targets["crowd"][:, 3] = True
    targets["keypoints"][:, 4, :, 2] = 0
    targets["boxes"][:, 7] = targets["keypoints"][:, 7] = 0
    return RawOutput(4 * uniform(4, a) - 3, box_logits, offsets, 4 * uniform(4, a, 17) - 2,
                     centers, strides), targets


def loss_of(raw: RawOutput, targets: dict[str, Tensor], **kwargs) -> Tensor:
    """The five terms and the sum of assigned scores, (6,)."""
    terms, score_sum = PoseLoss(SIGMAS, **kwargs)(raw, decode(raw), targets)
    return torch.stack([*terms.values(), score_sum])


def reference_terms(raw: RawOutput, targets: dict, weights: LossWeights) -> Tensor:
    """As the reference reports them: divided by the sum of scores, at least 1; and their sum."""
    *terms, score_sum = loss_of(raw, targets, weights=weights, reference=True)
    terms = torch.stack(terms) / score_sum.clamp(min=1)
    return torch.cat([terms, terms.sum()[None]])


def test_terms_and_gradients_of_n_are_the_references(model_n):
    """Its keypoints are pixel indices: +0.5. Norms below 1e-9 are its rounding noise around 0."""
    dump = committed("reference_n.npz")
    model = copy.deepcopy(model_n).train().requires_grad_(True)
    targets = padded(dump, 4)
    targets["keypoints"][..., :2] += 0.5
    raw = model(image(*LOSS_INPUT)).promote()
    names, parameters = zip(*sorted(model.named_parameters()))
    for recipe, weights in RECIPES.items():
        terms = reference_terms(raw, targets, weights)
        np.testing.assert_allclose(terms.detach(), dump[f"{recipe}/components"], rtol=1e-6,
                                   err_msg=CHANGED)
        gradients = torch.autograd.grad(terms[-1], parameters, retain_graph=True)
        for name, gradient, want in zip(names, gradients, dump[f"{recipe}/grad_norms"]):
            assert gradient.norm().item() == pytest.approx(want, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_terms_and_gradients_of_raw_tensors_are_the_references(recipe):
    dump = full("losscases.npz")
    centers, strides = (torch.tensor(dump[name]).double() for name in ("anchor_points", "stride"))
    cls, box, xy, kpt = leaves = [
        torch.tensor(dump[f"pred_{name}"]).double().requires_grad_()
        for name in ("cls_logits", "distri", "pose_coords", "pose_logits")]
    offsets = (xy - (centers - strides / 2)[:, None]) / strides[:, None]
    raw = RawOutput(cls[..., 0], box.reshape(3, -1, 4, BINS), offsets, kpt, centers, strides)
    terms = reference_terms(raw, padded(dump, 3), RECIPES[recipe])
    np.testing.assert_allclose(terms.detach(), dump[f"{recipe}_f64/components"], rtol=1e-6,
                               err_msg=CHANGED)
    gradients = torch.autograd.grad(terms[-1], leaves)
    for name, g in zip(("cls", "distri", "pose", "pose_logits"), gradients):
        np.testing.assert_allclose(g.norm(), dump[f"{recipe}_f64/grad_{name}_norm"], rtol=1e-6)
    nobody = {name: torch.zeros_like(t) for name, t in padded(dump, 3).items()}
    np.testing.assert_allclose(reference_terms(raw, nobody, LossWeights()).detach(),
                               dump["empty_f64/components"], rtol=1e-6)


@pytest.mark.parametrize("case, rule", [("oks", {}), ("oks_topk5_b2", {"topk": 5, "beta": 2.0})])
def test_assignment_is_the_references(case, rule):
    """The reference gives an anchor of a crowd the weight 0 afterwards; PoseLoss does that here."""
    dump = committed("assigner.npz")
    pred, boxes, poses, centers, gt_boxes, gt_poses = (torch.tensor(dump[name]) for name in (
        "pred_scores", "pred_bboxes", "pred_poses", "anchor_points", "gt_bboxes", "gt_poses"))
    people, crowd = (dump[name][..., 0] > 0 for name in ("pad_gt_mask", "gt_crowd"))
    person, weight = assign(pred[..., 0], boxes, poses, gt_boxes, gt_poses, torch.tensor(people),
                            centers, SIGMAS.float(), oks_floor=0.0, **rule)
    person, want = person.numpy(), dump[f"{case}/scores"][..., 0]
    of_crowd = (person >= 0) & np.take_along_axis(crowd, person.clip(0), 1)
    np.testing.assert_allclose(np.where(of_crowd, 0, weight), want, rtol=5e-6)
    np.testing.assert_array_equal(person[want > 0], dump[f"{case}/person"][want > 0])
    assert of_crowd.any() and (want > 0).sum() > 30


def slow_assign(scores, boxes, poses, centers, gt_boxes, gt_poses, people, sigmas, topk, floor):
    """assign for one image, number by number. Also return how often two and nobody's wish met."""
    m, a, eps = len(gt_boxes), len(scores), 1e-9
    quality, inside = np.zeros((m, a)), np.zeros((m, a), bool)
    for g, i in np.ndindex(m, a):
        (x1, y1, x2, y2), (u1, v1, u2, v2) = gt_boxes[g], boxes[i]
        overlap = max(0, min(x2, u2) - max(x1, u1)) * max(0, min(y2, v2) - max(y1, v1))
        union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - overlap
        labeled = [k for k in range(len(sigmas)) if gt_poses[g, k, 2] > 0]
        similarity = 0
        for k in labeled:
            d2 = sum((poses[i, k] - gt_poses[g, k, :2]) ** 2)
            area = 0.53 * (x2 - x1) * (y2 - y1) + eps
            similarity += math.exp(-d2 / (2 * (2 * sigmas[k]) ** 2 * area)) / (len(labeled) + eps)
        quality[g, i] = overlap / (union + eps) * max(similarity, floor)
        x, y = centers[i]
        inside[g, i] = people[g] and min(x - x1, y - y1, x2 - x, y2 - y) > eps
    metric = np.zeros((m, a))
    for g in range(m):
        if floor:  # ours: outside of its box somebody gets nothing
            metric[g] = scores * (inside[g] * quality[g] / max(*(inside * quality)[g], 1e-99)) ** 6
        else:
            metric[g] = scores * quality[g] ** 6
    wanted = [[i for i in np.argsort(-row)[:topk] if row[i] > 0] for row in metric * inside]
    person, surprises = np.full(a, -1), 0
    for i in range(a):
        claims = [g for g in range(m) if i in wanted[g]]
        if len(claims) == 1:
            person[i] = claims[0]
        elif claims:
            takers = [g for g in range(m) if (inside[g, i] if floor else people[g])]
            person[i] = max(takers, key=lambda g: quality[g, i])
            surprises += person[i] not in claims
    weight = np.zeros(a)
    for g in range(m):
        mine = person == g
        if mine.any():
            best = max(metric[g, mine]) + (0 if floor else eps)
            weight[mine] = metric[g, mine] / best * max(quality[g, mine])
    return person, weight, surprises


@pytest.mark.parametrize("topk, floor", [(13, 0.0), (5, 0.0), (13, 0.1), (5, 0.1)])
def test_assignment_is_that_of_the_slow_version(topk, floor):
    """Crowds and padding are no people; some anchors must go to one who did not ask for them."""
    raw, targets = scene()
    out = decode(raw)
    targets["boxes"][:, 6] += 300   # no anchor lies in it
    people = ~targets["crowd"] & (targets["boxes"][..., 2] > 0)
    people[1] = False
    person, weight = assign(out.scores, out.boxes, out.keypoints, targets["boxes"],
                            targets["keypoints"], people, raw.centers, SIGMAS, topk,
                            oks_floor=floor)
    surprises = 0
    for i in range(4):
        inputs = (out.scores[i], out.boxes[i], out.keypoints[i], raw.centers, targets["boxes"][i],
                  targets["keypoints"][i], people[i], SIGMAS)
        want, want_weight, n = slow_assign(*(t.numpy() for t in inputs), topk, floor)
        np.testing.assert_array_equal(person[i], want)
        np.testing.assert_allclose(weight[i], want_weight, rtol=1e-12, atol=1e-12)
        surprises += n
    assert surprises


@MODES
def test_a_fresh_network_teaches_every_person_only_under_our_rule(reference):
    """The best anchor of each person should weigh its own quality; epsilon must not eat it."""
    torch.manual_seed(0)
    out = decode(YoloNasPose("n")(image(9, 4, 256, 256).float()))
    low, side = 160 * torch.rand(4, 5, 2), 32 + 64 * torch.rand(4, 5, 2)                   # px
    boxes = torch.cat([low, low + side], -1)                                               # px
    xy = low[:, :, None] + side[:, :, None] * torch.rand(4, 5, 17, 2)
    floor = 0.0 if reference else 0.1
    poses = torch.cat([xy, torch.full((4, 5, 17, 1), 2.0)], -1)
    person, weight = assign(out.scores, out.boxes, out.keypoints, boxes, poses,
                            torch.ones(4, 5, dtype=torch.bool), make_anchors(256, 256, "cpu")[0],
                            SIGMAS.float(), oks_floor=floor)
    best = torch.stack([(weight * (person == m)).amax(1) for m in range(5)], 1)            # (B, M)
    assert (best > 1e-3).all() != reference


@MODES
def test_nothing_waits_for_the_gpu(reference):
    """Fake tensors hold no values: a mask that picks rows, or .item(), would raise. The gradients'
    operators are torch's own; some (prod's) ask for a value."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        raw, targets = scene()
        raw = RawOutput(*raw[:6])
        criterion = PoseLoss(SIGMAS, reference=reference)
        criterion(raw, decode(raw), targets)
        criterion.distill(raw, decode(raw), raw, decode(raw))
    told, targets = scene()
    raw = RawOutput(*(t.clone().requires_grad_(i < 4) for i, t in enumerate(told[:6])))
    terms, _ = criterion(raw, decode(raw), targets)
    terms |= criterion.distill(raw, decode(raw), told, decode(told))
    with torch.profiler.profile() as profile:
        sum(terms.values()).backward()
    found = {event.key for event in profile.key_averages()}
    assert "aten::sigmoid_backward" in found and not found & {"aten::item", "aten::nonzero"}


def test_a_persons_area_is_the_same_share_of_the_box_everywhere():
    """A constant of two files, which do not import each other."""
    assert loss.BODY_SHARE_OF_BOX == data.BODY_SHARE_OF_BOX


def test_oks_by_hand():
    """d^2 = 200 px^2, sigma = 0.5, area = 100 px^2: exp(-200 / (8 * 0.25 * 100)) = 1/e."""
    pred, target = torch.tensor([[10.0, 10.0], [99.0, 99.0]]), torch.zeros(2, 2)
    labeled, sigmas = torch.tensor([True, False]), torch.tensor([0.5, 0.5])
    area = torch.tensor(100.0)
    assert oks(pred, target, labeled, area, sigmas).item() == pytest.approx(math.exp(-1), rel=1e-6)
    assert oks(pred, target, labeled & False, area, sigmas) == 0


def test_oks_is_that_of_pycocotools():
    rng = np.random.default_rng(0)
    target = np.concatenate([rng.uniform(0, 200, (5, 17, 2)), rng.integers(0, 3, (5, 17, 1))], -1)
    pred = target[:, None, :, :2] + rng.normal(0, 8, (5, 7, 17, 2))
    area = rng.uniform(2000, 9000, 5)
    scorer = COCOeval(iouType="keypoints")
    scorer._gts[0, 1] = [{"keypoints": t.ravel(), "area": a, "bbox": [0, 0, 1, 1], "ignore": 0}
                         for t, a in zip(target, area)]
    for m in range(5):
        scorer._dts[0, 1] = [{"keypoints": np.c_[p, np.ones(17)].ravel(), "score": -i}
                             for i, p in enumerate(pred[m])]
        t = torch.tensor(target[m])
        for poses in t[:, :2], t[:, :2].expand(7, 17, 2):  # keypoint by keypoint, all at once
            got = oks(torch.tensor(pred[m]), poses, t[:, 2] > 0, torch.tensor(area[m]), SIGMAS)
            np.testing.assert_allclose(got, scorer.computeOks(0, 1)[:, m], rtol=1e-8)


def test_oks_refuses_the_sigmas_of_another_skeleton():
    with pytest.raises(ValueError, match="17 keypoints but there are 14 sigmas"):
        oks(torch.zeros(17, 2), torch.zeros(17, 2), torch.ones(17), torch.ones(()), torch.ones(14))


@pytest.mark.parametrize("distance, low, share", [(3.0, 3, 1.0), (2.25, 2, 0.75), (0.0, 0, 1.0),
                                                  (-7.0, 0, 1.0), (99.0, 15, 0.01)])
def test_distance_loss_is_the_cross_entropy_of_two_bins(distance, low, share):
    """A distance of 2.25 is bin 2 to 75 % and bin 3 to 25 %; beyond the reach it is 15.99."""
    logits = torch.rand(4, BINS, dtype=torch.float64)
    loss = distribution_focal_loss(logits, torch.full((4,), distance, dtype=torch.float64))
    want = (share * F.cross_entropy(logits, torch.full((4,), low))
            + (1 - share) * F.cross_entropy(logits, torch.full((4,), low + 1)))
    torch.testing.assert_close(loss, want)


@MODES
def test_images_add_up_and_padding_adds_nothing(reference):
    raw, targets = scene()
    whole = loss_of(raw, targets, reference=reference)
    targets = {name: torch.cat([t, torch.zeros_like(t)], 1) for name, t in targets.items()}
    parts = [loss_of(RawOutput(*(t[i:i + 1] for t in raw[:4]), *raw[4:]),
                     {name: t[i:i + 1] for name, t in targets.items()}, reference=reference)
             for i in range(4)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)
    assert (whole > 0.1).all()


@MODES
def test_nobody_leaves_the_class_loss_and_zero_gradients_elsewhere(reference):
    """Background everywhere: the sum of p^2 * log(1 + e^logit). Every output gets a gradient."""
    raw, targets = scene()
    leaves = [t.requires_grad_() for t in raw[:4]]
    nobody = {name: torch.zeros_like(t[:, :1]) for name, t in targets.items()}
    terms = loss_of(raw, nobody, reference=reference)
    want = (raw.cls_logits.sigmoid().square() * torch.log1p(raw.cls_logits.exp())).sum()
    torch.testing.assert_close(terms, torch.stack([want] + 5 * [want * 0]))
    cls, *others = torch.autograd.grad(terms.sum(), leaves)
    assert (cls != 0).all() and all((g == 0).all() for g in others)


@MODES
def test_unclaimed_anchors_in_ignore_boxes_are_no_background(reference):
    raw, targets = scene()
    out = decode(raw)
    people = torch.tensor([True, True, True, False, False, True, True, False]).expand(4, 8)
    person, _ = assign(out.scores, out.boxes, out.keypoints, targets["boxes"],
                       targets["keypoints"], people, raw.centers, SIGMAS)
    low, high = targets["boxes"][:, 3:5, None].split(2, -1)                         # (B, 2, 1, 2)
    covered = ((raw.centers > low) & (raw.centers < high)).all(-1).any(1)           # (B, A)
    ignored = covered & (person < 0)
    logits = raw.cls_logits.requires_grad_()
    gradient, = torch.autograd.grad(loss_of(raw, targets, reference=reference)[0], logits)
    assert ignored.sum() > 50 and (covered & ~ignored).sum() > 20
    assert torch.equal(gradient == 0, ignored & (not reference))


def test_a_wider_tolerance_is_that_of_wider_sigmas():
    raw, targets = scene()
    wide, _ = PoseLoss(SIGMAS)(raw, decode(raw), targets, sigma_scale=3.0)
    want, _ = PoseLoss(3 * SIGMAS)(raw, decode(raw), targets)
    plain, _ = PoseLoss(SIGMAS)(raw, decode(raw), targets)
    assert wide == want and wide["pose_reg"] < plain["pose_reg"]
    moved = raw._replace(kpt_offsets=raw.kpt_offsets + 0.1)
    wide, want, plain = (
        PoseLoss(sigmas).distill(moved, decode(moved), raw, decode(raw), *scale)["kd_pose"]
        for sigmas, scale in ((SIGMAS, [3.0]), (3 * SIGMAS, []), (SIGMAS, [])))
    assert wide == want < plain


def test_the_loss_itself_teaches_people_whose_keypoints_are_far_off():
    """One anchor, its box 128 x 128 px, somebody's 128 x 96: IoU 3/4. OKS is 0 and counts as 0.1;
    under the reference's rule nobody is there to learn."""
    raw = RawOutput(torch.zeros(1, 1), torch.zeros(1, 1, 4, BINS), torch.zeros(1, 1, 1, 2),
                    torch.zeros(1, 1, 1), torch.full((1, 2), 4.0), torch.full((1, 1), 8.0))
    target = {"boxes": torch.tensor([[[-60.0, -60, 68, 36]]]), "crowd": torch.zeros(1, 1) > 0,
              "keypoints": torch.tensor([[[[60.0, 30, 2]]]])}
    for reference, want in ((False, 0.75 * 0.1), (True, 0)):
        criterion = PoseLoss(torch.tensor([0.025]), reference=reference)
        terms, scores = criterion(raw, decode(raw), target)
        assert scores.item() == pytest.approx(want, abs=1e-6)
        assert terms["pose_reg"].item() == pytest.approx(34 * want, rel=1e-5, abs=1e-4)


def test_label_smoothing_moves_the_class_target_towards_a_half():
    """With logits at the smoothed target of background the class loss is at its least, by hand."""
    raw = RawOutput(torch.zeros(1, 4), torch.zeros(1, 4, 4, BINS), torch.zeros(1, 4, 1, 2),
                    torch.zeros(1, 4, 1), torch.full((4, 2), 4.0), torch.full((4, 1), 8.0))
    nobody = {"boxes": torch.zeros(1, 1, 4), "keypoints": torch.zeros(1, 1, 1, 3),
              "crowd": torch.zeros(1, 1, dtype=torch.bool)}
    for smoothing in (0.0, 0.2):
        terms, _ = PoseLoss(torch.ones(1), label_smoothing=smoothing)(raw, decode(raw), nobody)
        target = smoothing / 2
        assert terms["cls"].item() == pytest.approx(4 * (0.5 - target) ** 2 * math.log(2))


def test_mask_loss_is_the_mean_cross_entropy_of_known_pixels_and_images_add_up():
    logits = torch.tensor([[[0.0, 2.0], [-1.0, 5.0]]])
    mask = torch.tensor([[[1, 0], [1, 2]]], dtype=torch.uint8)
    want = (math.log(2) + math.log(1 + math.exp(2)) + math.log(1 + math.exp(1))) / 4
    assert mask_loss(logits, mask) == pytest.approx(want, rel=1e-6)
    both = mask_loss(torch.cat([logits, -logits]), torch.cat([mask, mask]))
    assert both == pytest.approx(float(mask_loss(logits, mask) + mask_loss(-logits, mask)))


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    """And one that is a little off learns in every term, and comes nearer by its gradient."""
    raw, targets = scene()
    raw = RawOutput(*(t if t is None else t.double() for t in raw))
    criterion = PoseLoss(SIGMAS)
    equal = criterion.distill(raw, decode(raw), raw, decode(raw))
    assert set(equal) == set(DISTILL_TERMS) and all(abs(v) < 1e-7 for v in equal.values())
    g = torch.Generator().manual_seed(1)
    leaves = [(t + 0.05 * torch.randn(t.shape, generator=g, dtype=torch.float64)).requires_grad_()
              for t in raw[:3]]
    student = raw._replace(cls_logits=leaves[0], box_logits=leaves[1], kpt_offsets=leaves[2])
    terms = criterion.distill(student, decode(student), raw, decode(raw))
    assert all(v > 1e-6 for v in terms.values())
    gradients = torch.autograd.grad(sum(terms.values()), leaves)
    for leaf, truth, gradient in zip(leaves, raw, gradients):
        assert ((leaf - truth) * gradient).sum() > 0


def test_a_teachers_terms_by_hand():
    """One anchor of score 0.5, one keypoint of score 0.8 that the student has 2 sigma off."""
    centers, strides = torch.tensor([[4.0, 4.0]]), torch.tensor([[8.0]])

    def said(score: float, bins: list, offset: float) -> RawOutput:
        box = torch.full((1, 1, 4, BINS), -1e9)
        for bin, p in bins:
            box[..., bin] = math.log(p)
        logit = torch.logit(torch.tensor([[score]]))
        return RawOutput(logit, box, torch.tensor([[[[offset, 0.0]]]]),
                         torch.logit(torch.tensor([[[0.8]]])), centers, strides)
    teacher, student = said(0.5, [(2, 0.25), (3, 0.75)], 0.5), said(0.2, [(2, 0.5), (3, 0.5)], 1.0)
    area = 0.53 * (2 * 2.75 * 8) ** 2
    criterion = PoseLoss(torch.tensor([0.1]), LossWeights(cls=2.0, iou=3.0, pose_reg=5.0))
    terms = criterion.distill(student, decode(student), teacher, decode(teacher))
    assert terms["kd_cls"] == pytest.approx(6 * 0.3 ** 2 * -(math.log(0.2) + math.log(0.8)) / 2)
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert terms["kd_box"] == pytest.approx(3 * 0.5 * kl, rel=1e-5)
    want = 5 * 0.5 * (1 - math.exp(-16 / (8 * 0.01 * area)))
    assert terms["kd_pose"] == pytest.approx(want, rel=1e-5)
    for score, learns in ((0.29, False), (0.31, True)):
        unsure = said(score, [(2, 0.25), (3, 0.75)], 0.5)
        terms = criterion.distill(student, decode(student), unsure, decode(unsure))
        assert (terms["kd_box"] > 0) == (terms["kd_pose"] > 0) == learns


def crowded(images: int, people: int, size: int) -> tuple[RawOutput, dict[str, Tensor]]:
    """Random outputs for images of `size` px, and targets of random people."""
    centers, strides = make_anchors(size, size, torch.device("cpu"))
    g, a = torch.Generator().manual_seed(0), len(centers)
    cls, box, xy, kpt = (torch.randn(images, a, *shape, generator=g).requires_grad_() for shape in
                         ((), (4, BINS), (17, 2), (17,)))
    low, side = (torch.rand(images, people, 2, generator=g) * size / 2 for _ in range(2))
    share = torch.rand(images, people, 17, 2, generator=g)
    keypoints = torch.cat([low[:, :, None] + share * side[:, :, None],
                           torch.full((images, people, 17, 1), 2.0)], -1)
    return RawOutput(cls, box, xy, kpt, centers, strides), {
        "boxes": torch.cat([low, low + side], -1), "keypoints": keypoints,
        "crowd": torch.zeros(images, people, dtype=torch.bool)}


def test_a_batch_assigned_in_parts_is_the_sum_of_its_images():
    """Three images of 260 people and 8,400 anchors are more than the loss takes at once."""
    raw, targets = crowded(3, 260, 640)
    whole = loss_of(raw, targets)
    each = [loss_of(raw._replace(**{name: getattr(raw, name)[i:i + 1] for name in raw._fields[:4]}),
                    {name: t[i:i + 1] for name, t in targets.items()}) for i in range(3)]
    np.testing.assert_allclose(whole.detach(), sum(each).detach(), rtol=1e-5)


def test_the_loss_of_crowds_needs_little_memory():
    """Growth of the largest memory of a fresh process, 16 images of 640 px with 50 people each."""
    code = """if True:
        import resource
        from test_loss import PoseLoss, SIGMAS, crowded, decode
        raw, targets = crowded(16, 50, 640)
        decoded, criterion = decode(raw), PoseLoss(SIGMAS)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        criterion(raw, decoded, targets)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert int(ran.stdout) / 1024 < 150, "MB"
