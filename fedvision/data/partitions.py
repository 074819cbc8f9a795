"""Partitions: which examples each client holds, as pure functions of labels or environments and a generator.

A partition returns one int64 array of indices a client; no example goes to two clients. Those that need a
sampling scheme run flwr-datasets' partitioners, on the shuffled labels alone: no image passes through them.
"""

import warnings
from typing import TYPE_CHECKING, Literal

import numpy as np

from fedvision.errors import DataError
from fedvision.registry import partitions
from fedvision.settings import Count, Positive

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

Parts = list[np.ndarray]
"""Client i holds the examples at the indices ``parts[i]``, int64."""

FORESEEN = (
    "The specified min_partition_size",  # Dirichlet draws again; giving up is an error of ours
    "The sum of the partition_sizes does not sum",  # the user asked for fewer examples than there are
    "Classes: .* will NOT be used",  # fewer clients than classes: said in the docstring of `pathological`
    "Specifying null_placement in SortOptions",  # pyarrow to datasets, when shards sort the labels
)
"""Beginnings of the warnings of flwr-datasets, and of what it calls, that are no news here."""


@partitions("environment")
def environment(environments: np.ndarray, rng: np.random.Generator, *, environments_per_client: Count = 1) -> Parts:
    """One client per environment (domain, hospital, angle), in ascending order of the environments.

    Args:
        environments: int64 [n].
        rng: not used; nothing is drawn.
        environments_per_client: how many consecutive environments a client gets; the last gets what is left.

    Raises:
        DataError: fewer environments than one client should get.

    Example:
        >>> environment(np.array([7, 2, 7, 5]), np.random.default_rng(0), environments_per_client=2)
        [array([1, 3]), array([0, 2])]
    """
    known, number = np.unique(environments, return_inverse=True)
    if len(known) < environments_per_client:
        raise DataError(
            f"partition 'environment': environments_per_client = {environments_per_client}, but the data has only {len(known)} "
            f"environment(s); set it to at most {len(known)}"
        )
    client = number // environments_per_client
    return np.split(np.argsort(client, kind="stable"), np.cumsum(np.bincount(client))[:-1])


@partitions("iid")
def iid(labels: np.ndarray, rng: np.random.Generator, *, clients: Count = 10) -> Parts:
    """Equal shares of the shuffled examples; sizes differ by one at most.

    In NumPy: flwr-datasets' ``IidPartitioner`` gives the same sizes, but only one client at a time,
    at about a millisecond each (minutes for 100,000 clients).
    """
    _enough(len(labels), clients, "iid")
    return np.array_split(rng.permutation(len(labels)), clients)


@partitions("dirichlet")
def dirichlet(
    labels: np.ndarray,
    rng: np.random.Generator,
    *,
    clients: Count = 10,
    alpha: Positive = 0.5,
    min_size: Count = 1,
    balanced: bool = False,
) -> Parts:
    """Label skew: each class is shared out among the clients by proportions from a Dirichlet distribution.

    Args:
        labels: class indices, [n].
        rng: where every draw comes from.
        clients: how many.
        alpha: concentration; 0.1: a client sees few classes, 100: nearly iid.
        min_size: a draw that leaves a client fewer examples is drawn again, 10 times.
        balanced: a client that holds more than its average share gets no further class.

    Raises:
        DataError: too many clients, or no draw gives each ``min_size`` examples.

    Source: Yurochkin et al. 2019, arXiv 1905.12022; flwr-datasets' ``DirichletPartitioner``.
    """
    from flwr_datasets.partitioner import DirichletPartitioner

    _enough(len(labels), clients * min_size, "dirichlet", f"clients * min_size = {clients} * {min_size}")
    partitioner = DirichletPartitioner(
        clients, "label", float(alpha), min_partition_size=min_size, self_balancing=balanced, seed=_seed(rng)
    )
    return _dealt_by(
        partitioner,
        labels,
        rng,
        f"partition 'dirichlet': 11 draws with alpha = {alpha} left one of {clients} clients with fewer than min_size = {min_size} "
        f"of {len(labels)} examples; raise alpha, lower clients or min_size, or set balanced = true",
    )


@partitions("inner-dirichlet")
def inner_dirichlet(
    labels: np.ndarray,
    rng: np.random.Generator,
    *,
    clients: Count = 10,
    alpha: Positive = 0.5,
    sizes: tuple[Count, ...] | None = None,
) -> Parts:
    """Label skew at given sizes: each client draws its mix of classes from a Dirichlet distribution.

    Takes about 50 microseconds an example. Examples beyond the sum of ``sizes`` go to nobody.

    Args:
        labels: class indices, [n].
        rng: where every draw comes from.
        clients: how many.
        alpha: concentration over the classes; 0.1: a client sees few classes, 100: nearly the same mix for all.
        sizes: examples per client, one number a client; None: equal shares of all examples.

    Raises:
        DataError: sizes that do not fit, or a client whose classes are used up.

    Source: Acar et al. 2021 (FedDyn), arXiv 2111.04263; flwr-datasets' ``InnerDirichletPartitioner``.
    """
    from flwr_datasets.partitioner import InnerDirichletPartitioner

    _enough(len(labels), clients, "inner-dirichlet")
    shares = [len(labels) // clients + (client < len(labels) % clients) for client in range(clients)] if sizes is None else list(sizes)
    if len(shares) != clients:
        raise DataError(f"partition 'inner-dirichlet': {len(shares)} sizes for clients = {clients}; give one size per client")
    _enough(len(labels), sum(shares), "inner-dirichlet", f"the sum of sizes, {sum(shares)},")
    return _dealt_by(
        InnerDirichletPartitioner(shares, "label", float(alpha), seed=_seed(rng)),
        labels,
        rng,
        f"partition 'inner-dirichlet': the classes that some client draws with alpha = {alpha} are used up before it holds its share "
        f"of {len(labels)} examples; raise alpha, or give sizes with a smaller sum",
        invalid="ignore",  # 0 / 0 where all classes of a client are used up: harmless if it is full, an error of NumPy's if not
    )


@partitions("shards")
def shards(labels: np.ndarray, rng: np.random.Generator, *, clients: Count = 10, shards_per_client: Count = 2) -> Parts:
    """Label skew: the examples sorted by class are cut into equal shards, and each client draws some of them.

    The remainder of n / (clients * shards_per_client) examples goes to nobody.

    Raises:
        DataError: more shards than examples.

    Source: McMahan et al. 2017, arXiv 1602.05629; flwr-datasets' ``ShardPartitioner``.
    """
    from flwr_datasets.partitioner import ShardPartitioner

    wanted = f"clients * shards_per_client = {clients} * {shards_per_client}"
    _enough(len(labels), clients * shards_per_client, "shards", wanted)
    partitioner = ShardPartitioner(clients, "label", num_shards_per_partition=shards_per_client, seed=_seed(rng))
    return _dealt_by(partitioner, labels, rng, f"partition 'shards': {len(labels)} examples cannot be cut into {wanted}; lower either")


@partitions("pathological")
def pathological(
    labels: np.ndarray,
    rng: np.random.Generator,
    *,
    clients: Count = 10,
    classes_per_client: Count = 2,
    assignment: Literal["first-deterministic", "deterministic", "random"] = "first-deterministic",
) -> Parts:
    """Label skew: every client holds exactly ``classes_per_client`` classes, each split evenly among its holders.

    Examples of a class that no client holds go to nobody (possible where clients are few, or with "random").

    Args:
        labels: class indices, [n].
        rng: where every draw comes from.
        clients: how many.
        classes_per_client: how many classes each holds.
        assignment: "first-deterministic": the first class of client i is i modulo the classes, the others are drawn;
            "deterministic": client i holds the classes i, i + 1, ...; "random": all are drawn.

    Raises:
        DataError: more classes per client than there are, or a class with fewer examples than holders.

    Source: Li et al. 2021, arXiv 2102.02079; flwr-datasets' ``PathologicalPartitioner``.
    """
    from flwr_datasets.partitioner import PathologicalPartitioner

    _enough(len(labels), clients, "pathological")
    classes = len(np.unique(labels))
    if classes_per_client > classes:
        raise DataError(
            f"partition 'pathological': classes_per_client = {classes_per_client}, but the data has {classes} class(es); "
            f"set it to at most {classes}"
        )
    return _dealt_by(
        PathologicalPartitioner(clients, "label", classes_per_client, assignment, seed=_seed(rng)),
        labels,
        rng,
        f"partition 'pathological': with clients = {clients} and classes_per_client = {classes_per_client} some class has more holders "
        f"than examples ({len(labels)} in all); lower either, or set assignment = 'deterministic' for an even spread",
    )


@partitions("linear-sizes")
def linear_sizes(labels: np.ndarray, rng: np.random.Generator, *, clients: Count = 10) -> Parts:
    """Size skew: client i (from 1) holds a share proportional to i of the shuffled examples.

    Raises:
        DataError: so many clients that the first would hold nothing.
    """
    from flwr_datasets.partitioner import LinearPartitioner

    return _dealt_by(LinearPartitioner(clients), labels, rng, _nothing_left("linear-sizes", clients, len(labels)))


@partitions("square-sizes")
def square_sizes(labels: np.ndarray, rng: np.random.Generator, *, clients: Count = 10) -> Parts:
    """Size skew: client i (from 1) holds a share proportional to i squared of the shuffled examples.

    Raises:
        DataError: so many clients that the first would hold nothing.
    """
    from flwr_datasets.partitioner import SquarePartitioner

    return _dealt_by(SquarePartitioner(clients), labels, rng, _nothing_left("square-sizes", clients, len(labels)))


@partitions("exponential-sizes")
def exponential_sizes(labels: np.ndarray, rng: np.random.Generator, *, clients: Count = 5) -> Parts:
    """Size skew: client i (from 1) holds a share proportional to e to the power i of the shuffled examples.

    Raises:
        DataError: so many clients that the first would hold nothing (more than about 1 + ln n).
    """
    from flwr_datasets.partitioner import ExponentialPartitioner

    return _dealt_by(ExponentialPartitioner(clients), labels, rng, _nothing_left("exponential-sizes", clients, len(labels)))


def _dealt_by(
    partitioner: "Partitioner",
    labels: np.ndarray,
    rng: np.random.Generator,
    impossible: str,
    invalid: Literal["raise", "ignore"] = "raise",
) -> Parts:
    """What a partitioner of flwr-datasets deals of the shuffled examples; ``impossible`` is the error if it cannot.

    The assignment is read from the partitioner's own table: its public ``load_partition`` makes a data set a client
    and takes 2 ms for each. A test holds the two against each other.
    """
    from datasets import Dataset

    order = rng.permutation(len(labels))
    classes = np.unique(labels, return_inverse=True)[1][order]
    partitioner.dataset = Dataset.from_dict({"label": classes, "index": order})
    try:
        with warnings.catch_warnings(), np.errstate(over="raise", divide="raise", invalid=invalid):
            for message in FORESEEN:
                warnings.filterwarnings("ignore", message=message)
            clients = partitioner.num_partitions  # makes the assignment
    except (ValueError, FloatingPointError) as error:
        raise DataError(impossible) from error
    index = np.asarray(partitioner.dataset["index"][:], dtype=np.int64)  # shards have sorted it
    rows = partitioner._partition_id_to_indices
    return [index[np.asarray(rows[client], dtype=np.int64)] for client in range(clients)]


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**63))


def _enough(examples: int, needed: int, name: str, what: str | None = None) -> None:
    if needed > examples:
        raise DataError(
            f"partition {name!r}: {what or f'clients = {needed}'} is more than the {examples} examples there are; "
            f"lower it to at most {examples}"
        )


def _nothing_left(name: str, clients: int, examples: int) -> str:
    return f"partition {name!r}: with clients = {clients} the smallest share of {examples} examples is less than one; lower clients"
