"""Which few examples keep their labels, when the others lose theirs."""

import numpy as np
from jaxtyping import Int

from fedvision.errors import DataError


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
