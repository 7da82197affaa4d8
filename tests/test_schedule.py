"""Curves against closed forms, averages by hand, stopping by a script of numbers."""
import math
from argparse import Namespace

import pytest
import torch
from torch import nn

from model import YoloNasPose
from schedule import (EMA, EarlyStopping, Plan, WarmupEnd, curves, ema_decay, lr_share,
                      make_optimizer, make_plan, make_scheduler, momentum_at, param_groups,
                      scaled_lr, set_momentum, sigma_scale, warmup_steps)
from train import fill_recipe, parse_args


def test_the_rate_meets_its_ends():
    def at(step):
        return lr_share(step, Plan(total_steps=101, warmup=20))
    assert at(0) == 0 and at(10) == 0.5 and at(20) == 1
    assert at(60) == pytest.approx(0.05 + 0.95 / 2)  # middle of the cosine
    assert at(100) == pytest.approx(0.05)  # the last step that is taken
    assert at(101) == at(1000) == pytest.approx(0.05)
    rates = [at(step) for step in range(20, 101)]
    assert rates == sorted(rates, reverse=True)
    assert lr_share(0, Plan(10, 4, start_ratio=0.2)) == 0.2


@pytest.mark.parametrize("shape, middle", [("linear", 0.5), ("power", 0.125), ("cosine", 0.5)])
def test_warmup_shapes_reach_the_peak_without_a_jump(shape, middle):
    plan = Plan(1000, 100, shape=shape, gamma=3.0)
    rates = [lr_share(step, plan) for step in range(1000)]
    assert (rates[0], rates[50], rates[100]) == (0, pytest.approx(middle), 1)
    slope = {"linear": 0.01, "power": 0.03, "cosine": 0.01 * math.pi / 2}[shape]
    assert max(abs(a - b) for a, b in zip(rates, rates[1:])) <= slope + 1e-12


def test_other_schedules_are_their_closed_forms():
    step = Plan(100, 10, decay="step", drops=[50, 80], drop=0.1)
    assert [lr_share(s, step) for s in (5, 10, 49, 50, 79, 80, 99)] == pytest.approx(
        [0.5, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert [lr_share(s, Plan(100, 10, decay="flat")) for s in (0, 10, 99)] == [0, 1, 1]
    twice = Plan(200, 10, final_ratio=0.1, restarts=1)
    assert lr_share(10, twice) == lr_share(110, twice) == 1
    assert lr_share(99, twice) == lr_share(199, twice) == pytest.approx(0.1)
    assert lr_share(100, twice) == pytest.approx(0.1)  # it warms up from where it stood
    assert lr_share(105, twice) == pytest.approx(0.55)


@pytest.mark.parametrize("decay", ["cosine", "linear", "step", "flat"])
@pytest.mark.parametrize("shape", ["linear", "power", "cosine"])
def test_each_phase_at_its_start_middle_end_and_one_step_on(shape, decay):
    """Warmup of 40 steps from 0.1, then until step 1039: rates, momentum and bias rates by hand."""
    plan = Plan(1040, 40, 0.05, 0.1, shape, 3.0, decay, [540], 0.1)
    middle = {"linear": 0.5, "power": 0.5 ** 3, "cosine": 0.5}[shape]

    def decayed(k):  # k steps after the warmup, of 999
        return {"cosine": 0.05 + 0.95 * (1 + math.cos(math.pi * min(k / 999, 1))) / 2,
                "linear": 1 - 0.95 * min(k / 999, 1),
                "step": 0.1 if k >= 500 else 1.0, "flat": 1.0}[decay]
    want = {0: 0.1, 20: 0.1 + 0.9 * middle, 40: 1.0, 41: decayed(1), 539: decayed(499),
            540: decayed(500), 1039: decayed(999), 1040: decayed(1000)}
    model = nn.Module()
    model.neck = nn.Linear(2, 2)
    for step, share in want.items():
        assert lr_share(step, plan) == pytest.approx(share, rel=1e-9)
        groups = [{**group, "initial_lr": 0.01} for group in param_groups(model, 0.01, 0.0)]
        scheduler = make_scheduler(optimizer_of(groups, "sgd"), plan, WarmupEnd(40), step,
                                   bias_ratio=10.0)
        biases = 10 - 9 * {0: 0, 20: middle}.get(step, 1) if step < 40 else share
        for group in scheduler.optimizer.param_groups:
            value = biases if group["bias"] else share
            assert group["lr"] == pytest.approx(0.01 * value, rel=1e-9)
        rise = {0: 0, 20: middle}.get(step, 1)
        assert momentum_at(plan, WarmupEnd(40), step, 0.8, 0.9) == pytest.approx(0.8 + 0.1 * rise)
    points = curves(scheduler, plan, WarmupEnd(40), Namespace(warmup_momentum=0.8, momentum=0.9))
    assert set(points["lr"]) == {"neck", "neck biases"} and set(points["momentum"]) == {"momentum"}
    assert points["lr"]["neck"][20] == (20, pytest.approx(0.01 * want[20]))
    assert points["momentum"]["momentum"][0] == (0, 0.8)


def optimizer_of(groups: list[dict], kind: str = "adamw") -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    return torch.optim.AdamW(groups, lr=1.0)


def test_lambda_lr_follows_the_curve_and_a_resumed_one_stands_on_it():
    plan = Plan(30, 5, 0.1)

    def rates(start, state=None):
        p = nn.Parameter(torch.zeros(1))
        optimizer = optimizer_of([{"params": [p], "lr": 3e-3, "part": "neck", "bias": False}])
        if state:
            optimizer.load_state_dict(state)
        scheduler = make_scheduler(optimizer, plan, WarmupEnd(5), step=start)
        seen = []
        for _ in range(start, 30):
            seen.append(optimizer.param_groups[0]["lr"])
            p.grad = torch.ones(1)
            optimizer.step()
            scheduler.step()
            if len(seen) + start == 12:
                state = optimizer.state_dict()
        return seen, state
    straight, state = rates(0)
    assert straight == pytest.approx([3e-3 * lr_share(s, plan) for s in range(30)])
    state["param_groups"][0]["lr"] = 99.0  # what a checkpoint holds must not win over the curve
    assert rates(12, state)[0] == straight[12:]


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_biases_fall_momentum_rises_and_slow_parts_catch_up(kind):
    plan, model = Plan(100, 10, start_ratio=0.0), nn.Module()
    model.backbone, model.heads = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = optimizer_of(param_groups(model, 0.01, 0.1, {"heads": 2.0}), kind)
    scheduler = make_scheduler(optimizer, plan, WarmupEnd(10), 0, {"backbone": 0.5}, 0.1 / 0.01)
    for step in range(12):
        r = min(step / 10, 1)
        set_momentum(optimizer, plan, WarmupEnd(10), step, 0.8, 0.937)
        for group in optimizer.param_groups:
            peak = 0.02 if group["part"] == "heads" else 0.01
            share = 10 - 9 * r if group["bias"] and step < 10 else lr_share(step, plan)
            share *= 0.5 + 0.5 * r if group["part"] == "backbone" else 1
            assert group["lr"] == pytest.approx(peak * share)
            now = group["betas"][0] if kind == "adamw" else group["momentum"]
            assert now == pytest.approx(0.8 + 0.137 * r)
            assert group["weight_decay"] == (0 if group["bias"] else 0.1)
        optimizer.step()
        scheduler.step()


def test_a_dynamic_warmup_waits_until_the_loss_falls():
    """Windows of 10 steps; sums of losses 10, 10, 9, ... : one window does not fall."""
    fixed, moving, stuck = WarmupEnd(100), WarmupEnd(100, True), WarmupEnd(100, True)
    for step in range(1, 500):
        for end in (fixed, moving):
            end.update(step, 1.0 if step <= 20 else 20 / step)
        stuck.update(step, 1.0)
    assert (fixed.end, moving.end, stuck.end) == (100, 110, 300)
    again = WarmupEnd(100, True)
    again.load_state_dict(moving.state_dict())
    assert vars(again) == vars(moving)
    longer = WarmupEnd(150)  # the same run, resumed with more epochs
    longer.load_state_dict(fixed.state_dict())
    assert longer.end == 150
    for most, end in ((400, 150), (120, 150)):  # moved to 110, it would end before the plan
        longer = WarmupEnd(150, True, most)
        longer.load_state_dict(moving.state_dict())
        assert longer.end == end
    shorter = WarmupEnd(30, True)
    shorter.load_state_dict(moving.state_dict())
    assert shorter.end == 90


def test_warmup_lengths():
    assert warmup_steps("250", 5000, 16) == 250
    assert warmup_steps("3e", 5000, 16) == 938 == warmup_steps("auto", 5000, 16)
    assert warmup_steps("3e", 5000, 48) == 313 == warmup_steps("auto", 5000, 48)  # 312.5
    assert warmup_steps("auto", 118_287, 256) == 1000
    assert warmup_steps("auto", 5000, 512) == 900  # 100 log2(512)
    with pytest.raises(ValueError, match="expected steps"):
        warmup_steps("long", 10, 1)


@pytest.mark.parametrize("epochs, warmup, restarts, steps", [
    (100, "auto", 0, 30), (4, "auto", 0, 20), (4, "auto", 1, 10), (1, "auto", 0, 5),
    (4, "3e", 0, 30)])
def test_an_automatic_warmup_leaves_half_of_a_short_run(epochs, warmup, restarts, steps):
    """100 images in steps of 10: 3 epochs are 30 steps, as asked for or unless that is too long."""
    args = parse_args(["--epochs", str(epochs), "--warmup", warmup, "--restarts", str(restarts)])
    fill_recipe(args)
    assert make_plan(args, 100, 10)[1].warmup == steps


def test_drops_are_asked_for_in_epochs_and_planned_in_steps():
    """95 images in steps of 10: 9.5 steps an epoch; the rate drops at the first step after it."""
    args = parse_args(["--epochs", "8", "--warmup", "5", "--schedule", "step", "--lr-steps", "2,5",
                       "--lr-factor", "0.2"])
    fill_recipe(args)
    ends, plan = make_plan(args, 95, 10)
    assert [lr_share(step, plan) for step in (18, 19, 47, 48, 75)] == pytest.approx(
        [1, 0.2, 0.2, 0.04, 0.04])
    assert max(ends) == plan.total_steps == 76
    args.restarts, args.lr_steps = 3, [1.0, 2.0]  # cycles of two epochs: one drop would be missed
    with pytest.raises(ValueError, match=r"--lr-steps \[1.0, 2.0\]: expected epochs below 2,"):
        make_plan(args, 95, 10)


def test_evaluation_comes_after_the_step_that_completes_an_epoch():
    args = parse_args(["--warmup", "0", "--epochs", "3"])
    fill_recipe(args)
    assert make_plan(args, 10, 4)[0] == {3: 1, 5: 2, 8: 3}
    args.epochs = 4
    assert make_plan(args, 2, 4)[0] == {1: 2, 2: 4}  # two epochs in one step


def test_a_dynamic_warmup_ends_with_the_cycle():
    for most, end in ((math.inf, 21), (12, 12), (5, 7)):
        warmup = WarmupEnd(7, True, most)
        for step in range(1, 40):
            warmup.update(step, 1.0)
        assert warmup.end == end


def test_a_warmup_that_no_cycle_can_hold_is_refused():
    args = parse_args(["--epochs", "4", "--warmup", "12", "--restarts", "2"])
    fill_recipe(args)
    assert make_plan(args, 100, 10)[1].warmup == 12  # of cycles of 13 1/3 steps
    args.restarts = 3
    with pytest.raises(ValueError, match="is 12 of 40 steps of 10 images, with 3 restarts"):
        make_plan(args, 100, 10)


def test_equal_global_batches_get_equal_rates():
    assert scaled_lr(2e-3, 480, 480) == 2e-3
    assert scaled_lr(2e-3, 60, 480) == pytest.approx(2.5e-4)
    assert scaled_lr(2e-3, 120, 480, "sqrt") == pytest.approx(1e-3)
    assert scaled_lr(2e-3, 60, 480, "none") == 2e-3
    assert scaled_lr(2e-3, 960, 480, "linear", largest=3e-3) == 3e-3


def test_keypoint_tolerance_shrinks_evenly_to_sigma():
    assert [sigma_scale(s, 10, 4.0) for s in (0, 5, 10, 11)] == [4, 2, 1, 1]
    assert sigma_scale(0, 0, 4.0) == 1


def test_ema_decays_are_the_closed_forms():
    assert ema_decay("threshold", 0.997, 1, 100) == 2 / 11
    assert ema_decay("threshold", 0.997, 10_000, 100) == 0.997
    assert ema_decay("exp", 0.997, 2, 100) == 0.997 * (1 - math.exp(-1))
    assert ema_decay("constant", 0.9, 1, 100) == 0.9
    with pytest.raises(KeyError):
        ema_decay("linear", 0.9, 1, 100)


def test_what_is_not_known_is_not_taken_for_something_else():
    """A row of a table that nobody has written the code for."""
    with pytest.raises(ValueError, match="'nonsense' is unknown"):
        lr_share(0, Plan(100, 10, decay="nonsense"))
    with pytest.raises(ValueError, match="'nonsense' is unknown"):
        make_optimizer("nonsense", [{"params": [torch.ones(1)]}], 0.9)


def test_a_tensor_of_two_names_is_averaged_once():
    shared = nn.Linear(1, 1)
    ema = EMA(nn.Sequential(shared, shared), "constant", 0.9, 10)
    before = shared.weight.item()
    nn.init.constant_(shared.weight, before + 1)
    ema.update(1)
    assert ema.model[1].weight.item() == pytest.approx(before + 0.1)


def test_ema_by_hand_and_counters_are_copied():
    net = nn.BatchNorm1d(1).double()
    ema = EMA(net, "threshold", 0.997, total_steps=10)
    nn.init.constant_(net.weight, 4.0)
    net.num_batches_tracked += 7
    net.running_mean += 1
    ema.update(1)   # decay 2/11
    ema.update(2)   # decay 3/12
    assert ema.model.weight.item() == pytest.approx(4 - 3 * (2 / 11) * (3 / 12))
    assert ema.model.running_mean.item() == pytest.approx(1 - (2 / 11) * (3 / 12))
    assert ema.model.num_batches_tracked == 7
    assert not ema.model.training and not ema.model.weight.requires_grad


def test_early_stopping_counts_epochs_not_evaluations():
    stopper = EarlyStopping(patience=4, min_delta=0.01)
    said = [stopper.update(ap, epoch) for ap, epoch in
            ((0.1, 2), (0.2, 4), (0.205, 6), (0.1, 7))]
    assert said == [False, False, False, False]
    again = EarlyStopping(patience=4, min_delta=0.01)
    again.load_state_dict(stopper.state_dict())
    assert again.update(0.2, 8) and again.best == 0.2 and again.best_epoch == 4
    assert again.over(8) and not again.over(7)


def test_decay_is_for_all_but_biases_and_norms_and_frozen_parameters_are_left_out():
    """Counts of the reference: 351 and 200 tensors, 35 and 35 of them dead placeholders."""
    model = YoloNasPose("n")
    groups = param_groups(model, 1e-3, 0.1)
    decayed, plain = ([p for g in groups if g["weight_decay"] == decay for p in g["params"]]
                      for decay in (0.1, 0.0))
    assert len(decayed) == 200 - 35 and len(plain) == 351 - 35 - 72
    names = {id(p): name for name, p in model.named_parameters()}
    assert sum(names[id(p)].endswith("alpha") for p in decayed) == 19
    assert {g["part"] for g in groups} == {"backbone", "neck", "heads"}
    assert all(names[id(p)].endswith("bias") == g["bias"] for g in groups for p in g["params"])
