"""Readings: how the curve of a run, a metric over its rounds, becomes one number."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

Selection = Callable[[pd.DataFrame], int | None]
"""The rounds of a run -> which of them is meant; None if that cannot be told."""


@dataclass(frozen=True)
class Reading:
    """One way to read a curve.

    Attributes:
        heading: of its column in a table.
        meaning: the end of a sentence that begins with the heading.
        of: (rounds, metric) -> the number; NaN if there is none.
    """

    heading: str
    meaning: str
    of: Callable[[pd.DataFrame, str], float]


def lowest(column: str) -> Selection:
    """The round, of those after training began, in which ``column`` is lowest; None if it was never measured.

    A run that trained nothing has the initial model only, round 0.
    """

    def select(rounds: pd.DataFrame) -> int | None:
        if len(rounds) == 1:
            return 0
        trained = rounds[column].to_numpy(dtype=float)[1:]
        return None if np.isnan(trained).all() else 1 + int(np.nanargmin(trained))

    return select


honest = lowest("validation_loss")
"""The round in which the silos' validation loss is lowest."""


def at(select: Selection) -> Callable[[pd.DataFrame, str], float]:
    """A metric in the round that is selected."""

    def read(rounds: pd.DataFrame, metric: str) -> float:
        index = select(rounds)
        return math.nan if index is None else float(rounds[metric].iloc[index])

    return read


def early(rounds: pd.DataFrame, metric: str) -> float:
    """The mean of a metric over the evaluations in the first third of the training."""
    begun = rounds[(rounds["round"] >= 1) & (rounds["round"] <= rounds["round"].iloc[-1] / 3)]
    return float(begun[metric].mean())


def late(rounds: pd.DataFrame, metric: str) -> float:
    """The median of a metric over the last 20 evaluations."""
    return float(rounds[metric].dropna().iloc[1:].tail(20).median())


READINGS = {
    "paper": Reading("lowest test loss", "is the round of FedILC's protocol, and peeks at the test set", at(lowest("test_loss"))),
    "honest": Reading("silo validation", "is the round that the silos would choose", at(honest)),
    "last": Reading("last round", "chooses nothing", at(lambda rounds: len(rounds) - 1)),
    "early": Reading("mean of first third", "tells how fast a method learns", early),
    "late": Reading("median of last 20", "evaluations is the protocol of DoubleMatch's tables", late),
}
"""By the names that a suite uses."""
