"""Robust aggregation: rules that a minority of wrong answers cannot move far.

These rules need all answers of a round at once, so their memory grows with the cohort; the only such exception here.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Lt
from flwr.app import RecordDict
from jaxtyping import Float
from torch import Tensor

from fedvision.arrays import Named
from fedvision.errors import AggregationError
from fedvision.registry import strategies
from fedvision.settings import Count, Natural
from strategies.fedavg import LocalStrategy
from strategies.strategy import Fold, Records, Silo, Update, batchable, protects

BLOCK = 1 << 16
"""Coordinates that are sorted at a time."""


def median(stacked: Float[Tensor, "clients n"]) -> Float[Tensor, "n"]:
    """Median over clients of each coordinate, the mean of the middle two for an even number."""
    ordered, middle = stacked.sort(0).values, len(stacked) // 2
    return ordered[middle] if len(stacked) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def trimmed_mean(stacked: Float[Tensor, "clients n"], fraction: float) -> Float[Tensor, "n"]:
    """Mean of each coordinate without the ``fraction`` smallest and largest values.

    Args:
        fraction: in [0, 0.5); floor(fraction * clients) values are cut on either side.
    """
    cut = math.floor(fraction * len(stacked) + 1e-9)  # 0.29 * 100 is a little less than 29
    return stacked.sort(0).values[cut : len(stacked) - cut].mean(0)


def krum_scores(vectors: Float[Tensor, "clients n"], byzantine: int) -> Float[Tensor, "clients"]:
    """Krum's score of each client: the sum of squared distances to its clients - byzantine - 2 nearest others.

    Args:
        vectors: one flattened model a client.
        byzantine: how many clients may lie, f; clients >= 2 f + 3.

    Returns:
        One score a client; the smallest is the most trustworthy.
    """
    nearest = len(vectors) - byzantine - 2
    squared = torch.stack([(vectors - vector).square().sum(1) for vector in vectors])
    squared.fill_diagonal_(torch.inf)
    return squared.sort(1).values[:, :nearest].sum(1)


class Collection:
    """All answers of a round, for a rule that needs them at once; weights do not count.

    Args:
        combine: the answers -> the result, by name.
    """

    def __init__(self, combine: Callable[[list[Named]], Named]) -> None:
        self._combine = combine
        self._answers: list[Named] = []

    @property
    def count(self) -> int:
        """The number of answers so far."""
        return len(self._answers)

    def add(self, update: Named, weight: float = 1.0) -> None:
        """Keep one answer; it must not change afterwards."""
        self._answers.append(dict(update))

    def result(self) -> Named:
        """What the rule makes of all answers."""
        return self._combine(self._answers)


def by_coordinate(answers: list[Named], rule: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """A rule on [clients, n] applied to every array, in blocks of coordinates; integers are rounded."""
    result = {}
    for name, like in answers[0].items():
        flat = [answer[name].reshape(-1) for answer in answers]
        whole = torch.empty_like(like).reshape(-1)
        for start in range(0, len(whole), BLOCK):
            stacked = torch.stack([vector[start : start + BLOCK] for vector in flat])
            block = rule(stacked if like.is_floating_point() else stacked.double())
            whole[start : start + BLOCK] = block if like.is_floating_point() else block.round()
        result[name] = whole.reshape(like.shape)
    return result


@dataclass(kw_only=True)
class RobustStrategy(LocalStrategy):
    """Local training as in FedAvg, then a robust rule over the clients' models, all counting equally.

    The rules need complete models: what a client did not train counts as unchanged.
    """

    weight_by: Literal["clients"] = "clients"

    @abstractmethod
    def combine(self, answers: list[Named]) -> Named:
        """The rule."""

    @batchable
    @protects("example", otherwise="its rule is no mean: one client may move it by more than its clipped change")
    def client_update(self, silo: Silo, content: RecordDict) -> Update:
        """The locally trained model."""
        return self.trained(silo)

    def accumulators(self) -> dict[str, Fold]:
        """Everything."""
        return {"arrays": Collection(self.combine)}

    def server_update(self, arrays: Named, aggregates: Records) -> Named:
        """What the rule says."""
        return aggregates["arrays"]


@strategies("fedmedian")
@dataclass(kw_only=True)
class FedMedian(RobustStrategy):
    """The median over clients of each coordinate.

    Source: Yin et al., arXiv 1803.01498, definition 1.
    """

    def combine(self, answers: list[Named]) -> Named:
        """Median by coordinate."""
        return by_coordinate(answers, median)


@strategies("trimmed-mean")
@dataclass(kw_only=True)
class TrimmedMean(RobustStrategy):
    """The mean over clients of each coordinate, without its smallest and largest values.

    Attributes:
        trim_fraction: share of the clients cut on either side, below 0.5.

    Source: Yin et al., arXiv 1803.01498, definition 2.
    """

    trim_fraction: Annotated[float, Ge(0), Lt(0.5)] = 0.2

    def combine(self, answers: list[Named]) -> Named:
        """Trimmed mean by coordinate."""
        return by_coordinate(answers, lambda stacked: trimmed_mean(stacked, self.trim_fraction))


@strategies("krum")
@dataclass(kw_only=True)
class Krum(RobustStrategy):
    """The client's model that lies nearest to its neighbors; or the mean of the best few (Multi-Krum).

    Attributes:
        byzantine: how many clients may lie, f; a round needs at least 2 f + 3 answers.
        selected: how many of the best models are averaged.

    Source: Blanchard et al., NeurIPS 2017, "Machine Learning with Adversaries", section 4.
    """

    byzantine: Natural = 0
    selected: Count = 1

    def combine(self, answers: list[Named]) -> Named:
        """Mean of the models with the lowest scores."""
        least = 2 * self.byzantine + 3
        if len(answers) < least:
            fact = f"krum with byzantine = {self.byzantine} needs at least {least} answers, got {len(answers)}"
            raise AggregationError(f"{fact}; lower it or add clients")
        if self.selected > len(answers):
            raise AggregationError(f"krum averages selected = {self.selected} models but got {len(answers)} answers; lower it")
        floats = [name for name, value in answers[0].items() if value.is_floating_point()]
        vectors = torch.stack([torch.cat([answer[name].reshape(-1) for name in floats]) for answer in answers])
        best = krum_scores(vectors, self.byzantine).argsort(stable=True)[: self.selected]
        return by_coordinate([answers[i] for i in best.tolist()], lambda stacked: stacked.mean(0))
