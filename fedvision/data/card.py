"""A data card: how much every client holds, of what, and how far its classes are from everybody's."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedvision.data.examples import LABEL
from fedvision.data.federated import FederatedData, Silos
from fedvision.data.modalities import held
from fedvision.errors import DataError


@dataclass(frozen=True, eq=False)
class Card:
    """What a federation's training data look like, client by client.

    Attributes:
        name: of the data set.
        train: training examples per client, int64 [clients].
        validation: validation examples per client, int64 [clients]; zeros if clients keep none.
        counts: training examples of each class, int64 [clients, classes]; no columns if the data have no labels;
            unlabeled ones (-1) count nowhere.
        total_variation: distance of each client's class frequencies p from those of all clients together q,
            TV(p, q) = 1/2 sum_c |p_c - q_c|, float64 [clients] in [0, 1].
        jensen_shannon: JS(p, q) = 1/2 KL(p || m) + 1/2 KL(q || m) with m = (p + q) / 2, in bits (logarithms to
            base 2), float64 [clients] in [0, 1].
        held: training examples per client that have a field, int64 [clients], by field, of those that some examples lack.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    counts: np.ndarray
    total_variation: np.ndarray
    jensen_shannon: np.ndarray
    held: Mapping[str, np.ndarray]

    @property
    def unlabeled(self) -> np.ndarray:
        """Training examples per client whose label is not known, int64 [clients]."""
        return np.asarray(self.train - self.counts.sum(axis=1))

    @property
    def mean_total_variation(self) -> float:
        """Mean over clients, each counting the same; 0: all have the same mix of classes."""
        return float(self.total_variation.mean())

    @property
    def mean_jensen_shannon(self) -> float:
        """Mean over clients, each counting the same, in bits."""
        return float(self.jensen_shannon.mean())


def card(data: FederatedData) -> Card:
    """The data card of a federation.

    Raises:
        DataError: a label that is not below the number of classes.
    """
    counts = class_counts(data.train, data.classes)
    p, q = frequencies(counts), frequencies(counts.sum(axis=0, keepdims=True))
    return Card(
        name=data.name,
        train=np.asarray(data.train.sizes, dtype=np.int64),
        validation=np.asarray(data.validation.sizes if data.validation is not None else [0] * data.num_clients, dtype=np.int64),
        counts=counts,
        total_variation=total_variation(p, q),
        jensen_shannon=jensen_shannon(p, q),
        held={field: counts.numpy() for field, counts in held(data.train).items()},
    )


def class_counts(silos: Silos, classes: int) -> np.ndarray:
    """Examples of each class that each client holds, int64 [clients, classes]; no columns if there are no labels.

    Unlabeled examples, whose label is -1, count for no class.

    Raises:
        DataError: a label outside -1..classes-1.
    """
    if LABEL not in silos.examples:
        return np.zeros((len(silos), 0), dtype=np.int64)
    labels = silos.examples.label.cpu().numpy()
    if len(labels) and not -1 <= labels.min() <= labels.max() < classes:
        raise DataError(
            f"labels run from {labels.min()} to {labels.max()}, the data set has {classes} classes; give labels 0..{classes - 1}, or -1"
        )
    client, labeled = np.repeat(np.arange(len(silos)), silos.sizes), labels >= 0
    return np.bincount((client * classes + labels)[labeled], minlength=len(silos) * classes).reshape(len(silos), classes)


def frequencies(counts: np.ndarray) -> np.ndarray:
    """Counts [..., classes] as shares of their row; a row without any count stays zero."""
    return np.asarray(counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1))


def total_variation(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Half the sum of absolute differences of two distributions [..., classes]: 0 if equal, 1 if disjoint.

    >>> float(total_variation(np.array([0.5, 0.5]), np.array([1.0, 0.0])))
    0.5
    """
    return np.asarray(np.abs(p - q).sum(axis=-1) / 2)


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of two distributions [..., classes], in bits: 0 if equal, 1 if disjoint."""
    m = (p + q) / 2
    return np.asarray((_divergence(p, m) + _divergence(q, m)) / 2)


def _divergence(p: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence in bits, where m > 0 wherever p > 0; terms with p = 0 count 0."""
    ratio = np.divide(p, m, out=np.ones_like(m), where=p > 0)
    return np.asarray(np.maximum((p * np.log2(ratio)).sum(axis=-1), 0.0))
