"""Schedules: by how much the learning rate, or another value, is multiplied as training goes on, as functions of progress in [0, 1].

>>> halving = factor({"name": "gamma-cosine", "gamma": 1.0})
>>> round(halving(0.0), 3), round(halving(0.5), 3), round(halving(1.0), 3)
(1.0, 0.707, 0.0)
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fedvision import settings
from fedvision.errors import ExperimentError
from fedvision.settings import Count, Fraction, Natural, NonNegative, Positive, PositiveFraction

Factor = Callable[[float], float]


def constant(progress: float) -> float:
    """1, always."""
    return 1.0


def cosine(progress: float, *, final: NonNegative = 0.0) -> float:
    """Half a cosine from 1 to ``final``, which may be larger than 1.

    Args:
        progress: how much of the training is done.
        final: the factor at the end.

    Source: DINO, arXiv 2104.14294, whose weight decay rises so from 0.04 to 0.4.
    """
    return _between(1.0, final, min(max(progress, 0.0), 1.0))


def gamma_cosine(progress: float, *, gamma: Fraction = 7 / 8) -> float:
    """cos(gamma pi progress / 2): from 1 to cos(gamma pi / 2), which is 0.195 for 7/8 and 0.556 for 5/8.

    Args:
        progress: how much of the training is done; beyond 1 as at 1.
        gamma: how far down the cosine to go.

    Source: DoubleMatch, arXiv 2205.05575; the published formula lacks gamma, the implementation has it.
    """
    return math.cos(gamma * math.pi * min(max(progress, 0.0), 1.0) / 2)


def epoch_cosine(
    progress: float,
    *,
    epochs: Count = 300,
    warmup: Natural = 5,
    cooldown: Natural = 10,
    initial: NonNegative = 0.05,
    final: NonNegative = 5e-4,
) -> float:
    """A cosine that moves once an epoch, after a linear warm-up and before some epochs at the end's rate.

    The cosine begins at epoch 0 and is not shifted by the warm-up, so that the rate drops a little where it takes over.

    Args:
        progress: how much of the ``epochs + cooldown`` epochs is done.
        epochs: that the cosine is made for.
        warmup: epochs in which the factor rises linearly from ``initial`` towards 1.
        cooldown: epochs after the cosine, at ``final``.
        initial: the factor at the first epoch.
        final: the factor at the end of the cosine.

    Source: USI, arXiv 2204.03475, whose implementation uses timm's cosine by epochs: 1e-4, 2e-3 and 1e-6 are its rates.
    """
    epoch = min(math.floor(progress * (epochs + cooldown) + 1e-9), epochs + cooldown - 1)
    if epoch < warmup:
        return initial + epoch * (1 - initial) / warmup
    if epoch >= epochs:
        return final
    return final + (1 - final) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def one_cycle(progress: float, *, rising: PositiveFraction = 0.3, initial: Positive = 0.04, final: NonNegative = 4e-6) -> float:
    """A rise from ``initial`` to 1 and a fall to ``final``, both along half a cosine.

    Args:
        progress: how much of the training is done.
        rising: the share of the training in which the factor rises, below 1.
        initial: the factor at the beginning.
        final: the factor at the end.

    Source: Smith and Topin, arXiv 1708.07120; with torch's ``OneCycleLR``'s defaults. Differs: momentum is left alone.
    """
    if progress < rising:
        return _between(initial, 1.0, progress / rising)
    return _between(1.0, final, min((progress - rising) / max(1 - rising, 1e-9), 1.0))


def warmup_cosine(progress: float, *, warmup: Fraction = 0.05, final: NonNegative = 0.0) -> float:
    """A line from 0 to 1, then half a cosine from 1 to ``final``.

    Args:
        progress: how much of the training is done.
        warmup: the share of the training in which the factor rises, below 1.
        final: the factor at the end.

    Source: arXiv 2204.01678, appendix: 40 of 1600 epochs, by steps. The public implementation begins at 0 whatever its settings say.
    """
    if progress < warmup:
        return progress / warmup
    return _between(1.0, final, min((progress - warmup) / max(1 - warmup, 1e-9), 1.0))


def staircase_cosine(
    progress: float,
    *,
    epochs: Count = 30,
    warmup: Fraction = 0.0,
    stairs: Count = 20,
    initial: NonNegative = 0.1,
    final: NonNegative = 0.1,
) -> float:
    """A staircase from ``initial`` to 1 within the first epoch, then a cosine to ``final`` that moves once an epoch.

    Args:
        progress: how much of the training is done.
        epochs: of the training.
        warmup: the share of the training in which the factor climbs; no more than the first epoch counts. 0: it is 1 at once.
        stairs: that it climbs.
        initial: the factor at the beginning.
        final: where the cosine would end after the last epoch.

    Source: ALBEF, arXiv 2107.07651, whose implementation climbs every 100 of its first 2000 steps: 1e-5, 1e-4 and 1e-5 are its rates.
    """
    epoch = min(math.floor(progress * epochs + 1e-9), epochs - 1)
    if epoch == 0:
        climbed = min(math.floor(stairs * progress / warmup + 1e-9), stairs) / stairs if warmup else 1.0
        return initial + climbed * (1 - initial)
    return _between(1.0, final, epoch / epochs)


def epoch_steps(progress: float, *, epochs: Count = 25, drops: tuple[Natural, ...] = (20,), drop: PositiveFraction = 0.1) -> float:
    """1, multiplied by ``drop`` as each of some epochs begins; torch's ``MultiStepLR``.

    Args:
        progress: how much of the training is done.
        epochs: of the training.
        drops: the epochs, counted from 0.
        drop: the factor.
    """
    epoch = min(math.floor(progress * epochs + 1e-9), epochs - 1)
    return float(drop ** sum(epoch >= begins for begins in drops))


SCHEDULES: Mapping[str, Callable[..., float]] = {
    "constant": constant,
    "gamma-cosine": gamma_cosine,
    "epoch-cosine": epoch_cosine,
    "one-cycle": one_cycle,
    "warmup-cosine": warmup_cosine,
    "staircase-cosine": staircase_cosine,
    "epoch-steps": epoch_steps,
    "cosine": cosine,
}


def factor(table: Mapping[str, Any] | None) -> Factor:
    """The schedule of a table such as ``{name = "gamma-cosine", gamma = 0.625}``; constant if there is none.

    Raises:
        ExperimentError: unknown schedule, unknown setting, or a value that does not fit.
    """
    if table is None:
        return constant
    if not isinstance(table, Mapping) or table.get("name") not in SCHEDULES:
        given = table.get("name") if isinstance(table, Mapping) else table
        raise ExperimentError(f"unknown schedule {given!r}; {settings.nearest(str(given), list(SCHEDULES))}")
    target = SCHEDULES[table["name"]]
    given = {key: value for key, value in table.items() if key != "name"}
    return partial(target, **settings.resolve(target, given, "schedule", without=frozenset({"progress"})))


def _between(start: float, end: float, share: float) -> float:
    """Half a cosine from ``start`` to ``end``."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
