"""Metrics: sums over examples, so that they add over batches and machines."""

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

Value = TypeVar("Value")


@dataclass(frozen=True)
class Metrics:
    """What was measured on some examples; ``a + b`` is what was measured on both.

    Attributes:
        count: number of examples.
        sums: name -> sum of a quantity over the examples; its mean is reported.
        scores: of a binary task, the score of class 1 for each example; for areas under curves.
        labels: the true class (0 or 1) of each scored example.
        shares: name -> sum of a quantity, and how many it is over, where not all examples have it; its mean is reported.
        confusions: prefix -> how often each class [classes, classes], a row each, was taken for each, a column each; the prefix
            with ``miou``, ``macc`` and ``aacc`` is reported, see ``overlap``.

    Example:
        >>> (Metrics(2, {"loss": 1.0}) + Metrics(1, {"loss": 0.5})).result()
        {'loss': 0.5}
    """

    count: int
    sums: Mapping[str, float]
    scores: tuple[np.ndarray, ...] = ()
    labels: tuple[np.ndarray, ...] = field(default=())
    shares: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    confusions: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of_batch(
        cls,
        sums: Mapping[str, Tensor],
        count: int,
        scores: Tensor | None = None,
        labels: Tensor | None = None,
        shares: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        confusions: Mapping[str, Tensor] | None = None,
    ) -> "Metrics":
        """Metrics of one batch from its tensors: scalar sums, and scores [n] with labels [n] for binary tasks; see the attributes."""
        scored = () if scores is None else (scores.detach().double().cpu().numpy(),)
        truth = () if labels is None else (labels.cpu().numpy(),)
        plain = {name: float(value.detach()) for name, value in sums.items()}
        means = {name: (float(total.detach()), float(number)) for name, (total, number) in (shares or {}).items()}
        tables = {prefix: table.double().cpu().numpy() for prefix, table in (confusions or {}).items()}
        return cls(count, plain, scored, truth, means, tables)

    def __add__(self, other: "Metrics") -> "Metrics":
        if not other.count:
            return self
        if not self.count:
            return other
        sums = {name: self.sums[name] + other.sums[name] for name in self.sums}
        shares = _added(self.shares, other.shares, lambda one, two: (one[0] + two[0], one[1] + two[1]))
        tables = _added(self.confusions, other.confusions, operator.add)
        return Metrics(self.count + other.count, sums, self.scores + other.scores, self.labels + other.labels, shares, tables)

    def result(self) -> dict[str, float]:
        """Means over the examples; AUROC and AUPRC over the whole set for binary tasks (NaN with one class only).

        What no example had is left out.
        """
        if not self.count:
            return {}
        means = {name: total / self.count for name, total in self.sums.items()}
        means |= {name: total / number for name, (total, number) in self.shares.items() if number}
        for prefix, table in self.confusions.items():
            means |= {f"{prefix}{name}": value for name, value in overlap(table).items()}
        return means | (areas(np.concatenate(self.scores), np.concatenate(self.labels)) if self.scores else {})


def _added(one: Mapping[str, Value], other: Mapping[str, Value], add: Callable[[Value, Value], Value]) -> dict[str, Value]:
    """What both have added up, and what one of them has as it is."""
    return {**other, **{name: add(value, other[name]) if name in other else value for name, value in one.items()}}


def total(parts: Iterable[Metrics]) -> Metrics:
    """The sum of all parts."""
    result = Metrics(0, {})
    for part in parts:
        result = result + part
    return result


def areas(scores: Float[np.ndarray, "n"], labels: Int[np.ndarray, "n"]) -> dict[str, float]:
    """Area under the ROC curve and average precision of ``scores`` for class 1 of ``labels``, which are 0 or 1."""
    if labels.min() == labels.max() or not np.isfinite(scores).all():
        return {"auroc": math.nan, "auprc": math.nan}
    from sklearn import config_context
    from sklearn.metrics import average_precision_score, roc_auc_score

    with config_context(assume_finite=True, skip_parameter_validation=True):  # what it would check is known to hold
        return {"auroc": float(roc_auc_score(labels, scores)), "auprc": float(average_precision_score(labels, scores))}


def confusion(truth: Int[Tensor, "..."], predicted: Int[Tensor, "..."], classes: int) -> Int[Tensor, "classes classes"]:
    """How often each class, a row each, was taken for each, a column each; a truth beyond the classes counts nowhere.

    >>> import torch
    >>> confusion(torch.tensor([0, 0, 1, 255]), torch.tensor([0, 1, 1, 0]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    counted = (truth >= 0) & (truth < classes)
    pairs = truth[counted].long() * classes + predicted[counted].long()
    return pairs.bincount(minlength=classes**2).view(classes, classes)


def overlap(table: Float[np.ndarray, "classes classes"]) -> dict[str, float]:
    """How well a map of classes was predicted, from pooled counts, in [0, 1].

    Args:
        table: rows true classes, columns predicted ones.

    Returns:
        ``miou``: mean over classes of the pixels where truth and prediction agree over those where either has the class;
        ``macc``: mean over classes of the share of their pixels that is right; ``aacc``: the share of all pixels. Classes that
        occur in neither are left out of the first, classes without a true pixel of the second. Empty without any pixel.
    """
    right, true, seen = np.diag(table), table.sum(1), table.sum(0)
    if not true.sum():
        return {}
    union = true + seen - right
    return {
        "miou": float((right[union > 0] / union[union > 0]).mean()),
        "macc": float((right[true > 0] / true[true > 0]).mean()),
        "aacc": float(right.sum() / true.sum()),
    }


def prefixed(prefix: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """``{"loss": 1}`` as ``{"test_loss": 1}``."""
    return {f"{prefix}_{name}": value for name, value in metrics.items()}


def spread(accuracies: Iterable[float]) -> dict[str, float]:
    """How evenly a model serves several environments.

    Args:
        accuracies: one in [0, 1] an environment.

    Returns:
        ``variance`` (population), ``entropy`` of the accuracies normalized to sum 1, in nats (at most the logarithm
        of their number, reached when all are equal; NaN if all are 0), and ``worst``, the lowest. Empty for fewer than two.

    Source: arXiv 2205.09305, Table 3, which prints variance x 1000 and entropy x 10.
    """
    values = np.asarray(list(accuracies), dtype=np.float64)
    if len(values) < 2:
        return {}
    p = values[values > 0] / values.sum() if values.sum() else np.array([math.nan])
    return {"variance": float(values.var()), "entropy": float(-(p * np.log(p)).sum()), "worst": float(values.min())}
