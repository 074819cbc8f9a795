"""Metrics: sums over examples, so that they add over batches and machines."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Metrics:
    """What was measured on some examples; ``a + b`` is what was measured on both.

    Attributes:
        count: number of examples.
        sums: name -> sum of a quantity over the examples; its mean is reported.
        scores: of a binary task, the score of class 1 for each example; for areas under curves.
        labels: the true class (0 or 1) of each scored example.

    Example:
        >>> (Metrics(2, {"loss": 1.0}) + Metrics(1, {"loss": 0.5})).result()
        {'loss': 0.5}
    """

    count: int
    sums: Mapping[str, float]
    scores: tuple[np.ndarray, ...] = ()
    labels: tuple[np.ndarray, ...] = field(default=())

    @classmethod
    def of_batch(cls, sums: Mapping[str, Tensor], count: int, scores: Tensor | None = None, labels: Tensor | None = None) -> "Metrics":
        """Metrics of one batch from its tensors: scalar sums, and scores [n] with labels [n] for binary tasks."""
        scored = () if scores is None else (scores.detach().double().cpu().numpy(),)
        truth = () if labels is None else (labels.cpu().numpy(),)
        return cls(count, {name: float(value.detach()) for name, value in sums.items()}, scored, truth)

    def __add__(self, other: "Metrics") -> "Metrics":
        if not other.count:
            return self
        if not self.count:
            return other
        sums = {name: self.sums[name] + other.sums[name] for name in self.sums}
        return Metrics(self.count + other.count, sums, self.scores + other.scores, self.labels + other.labels)

    def result(self) -> dict[str, float]:
        """Means over the examples; AUROC and AUPRC over the whole set for binary tasks (NaN with one class only)."""
        if not self.count:
            return {}
        means = {name: total / self.count for name, total in self.sums.items()}
        return means | (areas(np.concatenate(self.scores), np.concatenate(self.labels)) if self.scores else {})


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
