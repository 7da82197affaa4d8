"""Curves against closed forms, averages by hand, stopping by a script of numbers."""
import math

import pytest
import torch
from torch import nn

from model import YoloNasPose
from schedule import (EMA, EarlyStopping, check_warmup, ema_decay, linear_scaled_lr, make_scheduler,
                      param_groups, sigma_scale, warmup_cosine)


def test_the_rate_meets_its_ends():
    def at(step):
        return warmup_cosine(step, total_steps=101, warmup_steps=20, final_ratio=0.05)
    assert at(0) == 0 and at(10) == 0.5 and at(20) == 1
    assert at(60) == pytest.approx(0.05 + 0.95 / 2)  # middle of the cosine
    assert at(100) == pytest.approx(0.05)  # the last step that is taken
    assert at(101) == at(1000) == pytest.approx(0.05)
    rates = [at(step) for step in range(20, 101)]
    assert rates == sorted(rates, reverse=True)
    assert warmup_cosine(0, 10, 4, 0.1, start_ratio=0.2) == 0.2


def test_lambda_lr_follows_the_curve_and_a_resumed_one_stands_on_it():
    def rates(start, state=None):
        p = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.AdamW([p], lr=3e-3)
        if state:
            optimizer.load_state_dict(state)
        scheduler = make_scheduler(optimizer, 30, 5, 0.1, step=start)
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
    assert straight == pytest.approx([3e-3 * warmup_cosine(s, 30, 5, 0.1) for s in range(30)])
    state["param_groups"][0]["lr"] = 99.0  # what a checkpoint holds must not win over the curve
    assert rates(12, state)[0] == straight[12:]


def test_a_warmup_longer_than_training_is_refused():
    check_warmup(9, 10)
    with pytest.raises(ValueError, match="train longer or warm up less"):
        check_warmup(10, 10)


def test_equal_global_batches_get_equal_rates():
    assert linear_scaled_lr(2e-3, 480, 480) == 2e-3
    assert linear_scaled_lr(2e-3, 60, 480) == pytest.approx(2.5e-4)


def test_keypoint_tolerance_shrinks_evenly_to_sigma():
    assert [sigma_scale(s, 10, 4.0) for s in (0, 5, 10, 11)] == [4, 2, 1, 1]
    assert sigma_scale(0, 0, 4.0) == 1


def test_ema_decays_are_the_closed_forms():
    assert ema_decay("threshold", 0.997, 1, 100) == 2 / 11
    assert ema_decay("threshold", 0.997, 10_000, 100) == 0.997
    assert ema_decay("exp", 0.997, 50, 100, beta=50) == 0.997 * (1 - math.exp(-25))
    assert ema_decay("constant", 0.9, 1, 100) == 0.9
    with pytest.raises(ValueError, match="choose threshold"):
        ema_decay("linear", 0.9, 1, 100)


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


def test_decay_is_for_all_but_biases_and_norms_and_frozen_parameters_are_left_out():
    """Counts of the reference: 351 and 200 tensors, 35 and 35 of them dead placeholders."""
    model = YoloNasPose("n")
    decayed, plain = param_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) == 200 - 35
    assert len(plain["params"]) == 351 - 35 - 72
    names = {id(p): name for name, p in model.named_parameters()}
    assert sum(names[id(p)].endswith("alpha") for p in decayed["params"]) == 19
