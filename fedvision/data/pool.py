"""A pool: a data set before it is dealt to clients, and the dealing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np

from fedvision.data.examples import ENVIRONMENT, LABEL, Examples
from fedvision.data.federated import FederatedData, Silos
from fedvision.errors import DataError

DEALT = frozenset({"labels", "environments", "rng"})
"""The arguments that a partition gets from the pool; the rest are its settings."""

Partition = Callable[..., list[np.ndarray]]
"""``(labels or environments, rng, **settings) -> one array of indices a client``."""


@dataclass(frozen=True)
class Pool:
    """A data set that still has to be split among clients.

    Attributes:
        train: examples to deal; with the field ``environment`` where their domain is known.
        test: examples that no client gets.
        classes: number of classes.
        validation: examples to validate on, dealt together with ``train``; None: clients hold back some of their own.
    """

    train: Examples
    test: Examples
    classes: int
    validation: Examples | None = None


def deal(
    name: str, pool: Pool, partition: Partition, settings: Mapping[str, Any], validation_fraction: float, rng: np.random.Generator
) -> FederatedData:
    """Deal ``pool`` to clients: ``partition`` says who trains on what, and each client may hold back a part to validate.

    Where the pool brings a validation set, ``partition`` deals the training examples followed by the validation examples
    as one set, so that a client validates on the environments and classes that it trains on.

    Args:
        name: the data set's, for tables and error messages.
        pool: the examples.
        partition: who gets which.
        settings: of the partition.
        validation_fraction: share in [0, 1) of each client's examples that it validates on and does not train on;
            of no effect where the pool brings a validation set of its own.
        rng: for the partition, and then for what clients hold back.

    Raises:
        DataError: a client would end up without a training example.
    """
    parts = [np.asarray(part, dtype=np.int64) for part in partition(**_asked_for(partition, pool, rng), **settings)]
    if pool.validation is not None:
        first = len(pool.train)
        train = Silos.dealt(pool.train, [part[part < first] for part in parts])
        validation = Silos.dealt(pool.validation, [part[part >= first] - first for part in parts])
        return FederatedData(name, train, validation, pool.test, pool.classes)
    if validation_fraction == 0:
        return FederatedData(name, Silos.dealt(pool.train, parts), None, pool.test, pool.classes)
    shuffled = [rng.permutation(part) for part in parts]
    cuts = [int(len(part) * validation_fraction) for part in parts]
    train = Silos.dealt(pool.train, [part[cut:] for part, cut in zip(shuffled, cuts, strict=True)])
    validation = Silos.dealt(pool.train, [part[:cut] for part, cut in zip(shuffled, cuts, strict=True)])
    return FederatedData(name, train, validation, pool.test, pool.classes)


def _asked_for(partition: Partition, pool: Pool, rng: np.random.Generator) -> dict[str, Any]:
    """The arguments among ``DEALT`` that ``partition`` names; labels and environments [n] of all examples to deal."""
    wanted = DEALT & signature(partition).parameters.keys()
    given: dict[str, Any] = {"rng": rng} if "rng" in wanted else {}
    if "labels" in wanted:
        given["labels"] = _field(pool, LABEL, "class labels; choose another partition, such as 'environment'")
    if "environments" in wanted:
        given["environments"] = _field(pool, ENVIRONMENT, "environments; choose another partition, such as 'dirichlet' or 'iid'")
    return given


def _field(pool: Pool, field: str, otherwise: str) -> np.ndarray:
    sets = [pool.train] if pool.validation is None else [pool.train, pool.validation]
    if any(field not in examples for examples in sets):
        raise DataError(f"this data set has no {otherwise}")
    return np.concatenate([examples.fields[field].numpy() for examples in sets])
