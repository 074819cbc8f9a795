"""Schedules against torch's, timm's and the papers' own."""

import math

import numpy as np
import pytest
import torch

from fedvision.errors import ExperimentError
from fedvision.schedules import epoch_cosine, factor, gamma_cosine, one_cycle


@pytest.mark.golden
@pytest.mark.parametrize(("gamma", "key"), [(7 / 8, "lr_7_8"), (5 / 8, "lr_5_8")])
def test_the_gamma_cosine_is_that_of_doublematch(golden, gamma, key):
    with np.load(golden / "doublematch.npz") as arrays:
        rates = [0.03 * gamma_cosine(images / 22_528_000, gamma=gamma) for images in arrays["lr_images"]]
        np.testing.assert_allclose(rates, arrays[key], atol=1e-8)


@pytest.mark.golden
def test_the_epoch_cosine_is_that_of_usi(golden):
    rates = [2e-3 * epoch_cosine(epoch / 310) for epoch in range(310)]
    with np.load(golden / "usi.npz") as arrays:
        np.testing.assert_allclose(rates, arrays["lr_per_epoch"], rtol=1e-12)


def test_the_epoch_cosine_is_timms():
    from timm.scheduler import CosineLRScheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    timms = CosineLRScheduler(optimizer, t_initial=20, lr_min=0.01, warmup_t=3, warmup_lr_init=0.05)
    settings = {"epochs": 20, "warmup": 3, "cooldown": 2, "initial": 0.1, "final": 0.02}
    for epoch in range(22):
        assert 0.5 * epoch_cosine((epoch + 0.5) / 22, **settings) == pytest.approx(timms._get_lr(epoch)[0])


def test_the_one_cycle_is_torchs():
    steps = 1001
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.9)
    torchs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=steps, cycle_momentum=False)
    for step in range(steps):
        assert one_cycle(step / (steps - 1)) == pytest.approx(optimizer.param_groups[0]["lr"], abs=4e-3)
        optimizer.step()
        if step < steps - 1:
            torchs.step()


def test_progress_beyond_the_end_is_the_end():
    assert gamma_cosine(1.5) == gamma_cosine(1.0) == pytest.approx(math.cos(7 / 16 * math.pi))
    assert epoch_cosine(1.0) == 5e-4 and one_cycle(1.2) == pytest.approx(4e-6)


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"name": "cosin"}, "unknown schedule 'cosin'; .*known: constant, gamma-cosine"),
        ("one-cycle", "unknown schedule 'one-cycle'"),
        ({"name": "gamma-cosine", "gama": 1}, "schedule.gama: gamma_cosine has no such setting; did you mean 'gamma'"),
        ({"name": "gamma-cosine", "gamma": 1.5}, r"schedule.gamma = 1.5: expected number"),
        ({"name": "gamma-cosine", "progress": 0.5}, "schedule.progress: gamma_cosine has no such setting"),
    ],
)
def test_a_wrong_schedule_is_refused(table, reason):
    with pytest.raises(ExperimentError, match=reason):
        factor(table)


def test_the_warm_up_begins_at_nothing_and_the_cosine_where_it_ends():
    steps, warmup = 400, 40
    rate = factor({"name": "warmup-cosine", "warmup": warmup / steps, "final": 0.1})
    for step in range(steps + 1):
        falling = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        assert rate(step / steps) == pytest.approx(step / warmup if step < warmup else falling)
    assert factor({"name": "warmup-cosine", "warmup": 0.0})(0.0) == 1.0
    assert factor({"name": "warmup-cosine"})(1.0) == pytest.approx(0.0)


def test_the_staircase_of_albef_has_its_rates():
    """30 epochs of 4000 steps, of which 2000 warm up in 20 stairs of 100, from 1e-5 to 1e-4; then a cosine to 1e-5 by epochs."""
    schedule = factor({"name": "staircase-cosine", "epochs": 30, "warmup": 2000 / 120_000})
    for step in (0, 99, 100, 101, 1999, 2000, 3999, 4000, 7999, 60_000, 119_999):
        epoch = step // 4000
        expected = 1e-5 + min(step // 100, 20) * 9e-5 / 20 if epoch == 0 else 1e-5 + 9e-5 * (1 + math.cos(math.pi * epoch / 30)) / 2
        assert 1e-4 * schedule(step / 120_000) == pytest.approx(expected), step
    assert factor({"name": "staircase-cosine"})(0.0) == 1.0


def test_the_steps_by_epochs_are_torchs():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    torchs = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[3, 8, 10], gamma=0.2)
    schedule = factor({"name": "epoch-steps", "epochs": 12, "drops": [3, 8, 10], "drop": 0.2})
    for epoch in range(12):
        for step in range(7):
            assert 0.01 * schedule((7 * epoch + step) / 84) == pytest.approx(optimizer.param_groups[0]["lr"]), (epoch, step)
        optimizer.step()
        torchs.step()
    assert factor({"name": "epoch-steps"})(19.99 / 25) == 1.0 and factor({"name": "epoch-steps"})(1.0) == pytest.approx(0.1)
