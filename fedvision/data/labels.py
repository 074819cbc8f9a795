"""Which few examples keep their labels, when the others lose theirs."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fedvision.data.examples import LABEL, Examples
from fedvision.data.federated import FederatedData, Silos
from fedvision.errors import DataError, ExperimentError
from fedvision.settings import Count, Natural, PositiveFraction

LABELED = "labeled"
"""The field that marks the chosen examples while they are dealt."""


def labeled_split(labels: Int[np.ndarray, "n"], count: int, fold: int) -> Int[np.ndarray, "count"]:
    """Indices of ``count`` labeled examples, sorted; of every class in proportion to its frequency.

    The examples of each class are shuffled, class by class. Then one after the other is taken from the class that lags
    behind most: with the largest f_c / max f - t_c / max(max t, 1), f_c being the examples of class c and t_c those taken;
    from the first of several such.

    Args:
        labels: class of each example; -1 for one that never had a label.
        count: how many to choose.
        fold: which of the reproducible splits, from 1; the papers average over folds 1 to 5.

    Raises:
        DataError: fewer labels than ``count``, or a fold below 1.

    Source: the splits of FixMatch's and DoubleMatch's public implementations; ``fold`` is NumPy's legacy seed.
    Differs: a class none of whose examples is left is passed over, which balanced data never meets.

    >>> labeled_split(np.array([0, 0, 0, 0, 1, 1]), 3, fold=1)
    array([2, 3, 4])
    """
    members = [np.flatnonzero(labels == c) for c in range(int(labels.max(initial=-1)) + 1)]
    held = np.array([len(member) for member in members], dtype=np.int64)
    if not 1 <= count <= held.sum():
        raise DataError(f"{count} labels were asked for, of {held.sum()} labeled examples; choose between 1 and {held.sum()}")
    if fold < 1:
        raise DataError(f"fold {fold} of the labels does not exist; count from 1")
    rng = np.random.RandomState(fold)  # the published splits come from the legacy generator
    for member in members:
        rng.shuffle(member)
    taken = np.zeros_like(held)
    for _ in range(count):
        lag = held / held.max() - taken / max(taken.max(), 1)
        taken[np.where(taken < held, lag, -np.inf).argmax()] += 1
    return np.sort(np.concatenate([member[:t] for member, t in zip(members, taken, strict=True)]))


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Which training examples keep their labels; the others' are hidden from every learner as -1. ``[labels]`` of a file.

    Test and validation sets keep theirs. Give ``count`` or ``fraction``, not both.

    Attributes:
        count: how many labels all clients have together, chosen by ``labeled_split`` before the examples are dealt.
        fraction: share of each client's examples that are labeled, above 0, at least one, chosen by ``labeled_split``.
        fold: which of the reproducible choices, from 1; the experiment's seed + 1 if not given.
        unlabeled_clients: so many of the clients, the last ones, lose all labels.
        at: where the labeled examples are: with their clients, or with the server, which then trains on them after each round.
        drop: whether unlabeled examples are left out altogether, as a supervised baseline has it.
    """

    count: Count | None = None
    fraction: PositiveFraction | None = None
    fold: Count | None = None
    unlabeled_clients: Natural = 0
    at: Literal["clients", "server"] = "clients"
    drop: bool = False

    def __post_init__(self) -> None:
        if (self.count is None) == (self.fraction is None):
            raise ExperimentError(f"[labels] count = {self.count}, fraction = {self.fraction}: give one of the two")
        if self.at == "server" and (self.drop or self.unlabeled_clients):
            raise ExperimentError('[labels] at = "server": no client has labels then; leave out drop and unlabeled_clients')

    def marked(self, examples: Examples) -> Examples:
        """The examples with what ``hidden`` needs to know of them once they are dealt."""
        if self.count is None:
            return examples
        chosen = torch.zeros(len(examples), dtype=torch.bool)
        chosen[torch.from_numpy(labeled_split(examples.label.numpy(), self.count, self.fold or 1))] = True
        return Examples({**examples.fields, LABELED: chosen})

    def hidden(self, data: FederatedData) -> FederatedData:
        """The same data with all labels hidden but those that were chosen.

        Raises:
            DataError: clients that would be left without any example, or more unlabeled clients than there are.
        """
        train = data.train
        if self.unlabeled_clients >= len(train) or LABEL not in train.examples:
            fact = f"{len(train)} clients and the fields {list(train.examples.fields)}"
            raise DataError(f"[labels] unlabeled_clients = {self.unlabeled_clients}: the data has {fact}; some client needs labels")
        labeled = self._labeled(train)
        labeled[train.offsets[len(train) - self.unlabeled_clients] :] = False
        known = Examples({name: values for name, values in train.examples.fields.items() if name != LABELED})
        if self.drop:
            parts = [start + labeled[start:stop].nonzero()[:, 0].numpy() for start, stop in pairwise(train.offsets)]
            return replace(data, train=Silos.dealt(known, parts), validation=_unmarked(data.validation))
        seen = labeled if self.at == "clients" else torch.zeros_like(labeled)
        hidden = Examples({**known.fields, LABEL: torch.where(seen, known.label, -1)})
        server = known[labeled.nonzero()[:, 0]] if self.at == "server" else None
        return replace(data, train=Silos(hidden, train.offsets), validation=_unmarked(data.validation), server=server)

    def _labeled(self, train: Silos) -> Tensor:
        """Which of the clients' examples are labeled, bool [n]."""
        if self.count is not None:
            return train.examples.fields[LABELED].clone()
        assert self.fraction is not None, "one of the two is given"
        labeled = torch.zeros(len(train.examples), dtype=torch.bool)
        for start, stop in pairwise(train.offsets):
            labels = train.examples.label[start:stop].numpy()
            count = min(max(round(self.fraction * len(labels)), 1), int((labels >= 0).sum()))
            if count:
                labeled[start + torch.from_numpy(labeled_split(labels, count, self.fold or 1))] = True
        return labeled


def _unmarked(silos: Silos | None) -> Silos | None:
    if silos is None:
        return None
    return Silos(Examples({name: values for name, values in silos.examples.fields.items() if name != LABELED}), silos.offsets)
