"""Federated data: what each client holds, what it validates on, and a test set that nobody trains on."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedvision.data.examples import IMAGE, LABEL, Examples, concatenate
from fedvision.errors import DataError

Arrays = Any
"""What a user brings: a NumPy array or a torch tensor, or anything ``numpy.asarray`` understands."""


@dataclass(frozen=True)
class Spec:
    """What a learner must know of the data to build its model.

    Attributes:
        image_shape: shape of one input, e.g. (2, 14, 14).
        classes: number of classes; 2 for binary tasks.
        fields: names of what training examples have; empty where that is not known.
        test_fields: names of what those of the test set have; empty where that is not known.
    """

    image_shape: tuple[int, ...]
    classes: int
    fields: tuple[str, ...] = field(default=(), repr=False, compare=False)
    test_fields: tuple[str, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Silos:
    """Examples dealt to clients: client i holds ``examples[offsets[i]:offsets[i + 1]]``, as views, not copies."""

    examples: Examples
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, parts: Sequence[Examples]) -> "Silos":
        """One client a part."""
        offsets = np.cumsum([0, *(len(part) for part in parts)])
        return cls(concatenate(parts), tuple(int(o) for o in offsets))

    @classmethod
    def dealt(cls, examples: Examples, parts: Sequence[np.ndarray]) -> "Silos":
        """Client i gets the examples at the indices ``parts[i]``, in that order."""
        offsets = np.cumsum([0, *(len(part) for part in parts)])
        order = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *(np.asarray(part, dtype=np.int64) for part in parts)]))
        return cls(examples[order], tuple(int(o) for o in offsets))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, client: int) -> Examples:
        if not 0 <= client < len(self):
            raise IndexError(client)
        return self.examples[self.offsets[client] : self.offsets[client + 1]]

    def only(self, clients: Sequence[int]) -> "Silos":
        """Some of the clients, renumbered in this order."""
        return Silos.of([self[client] for client in clients])

    def to(self, device: torch.device) -> "Silos":
        """The same examples on ``device``."""
        return Silos(self.examples.to(device), self.offsets)

    @property
    def sizes(self) -> list[int]:
        """Examples per client."""
        return [stop - start for start, stop in zip(self.offsets, self.offsets[1:], strict=False)]


@dataclass(frozen=True)
class FederatedData:
    """The data of one federation.

    Attributes:
        name: for tables and error messages.
        train: the clients' training examples.
        validation: the clients' own validation examples, one (possibly empty) part a client; or None.
        test: examples that no client holds.
        classes: number of classes.
        server: labeled examples that the server itself trains on; None if it has none.
        elsewhere: whether clients without training examples here hold theirs elsewhere; each must hold one if not.

    Example:
        >>> x, y = np.zeros((4, 1, 8, 8), np.float32), np.array([0, 1, 2, 1])
        >>> data = FederatedData.from_arrays(train=[(x, y), (x, y)], test=(x, y))
        >>> data.num_clients, data.spec
        (2, Spec(image_shape=(1, 8, 8), classes=3))
    """

    name: str
    train: Silos
    validation: Silos | None
    test: Examples
    classes: int
    server: Examples | None = None
    elsewhere: bool = False

    def __post_init__(self) -> None:
        if self.num_clients == 0:
            raise DataError(f"data set {self.name!r} has no clients; give at least one (x, y) pair in `train`")
        empty = [i for i, size in enumerate(self.train.sizes) if size == 0]
        if len(empty) == self.num_clients or (empty and not self.elsewhere):
            raise DataError(f"data set {self.name!r}: client(s) {empty[:10]} hold no training example; give each at least one")
        if self.validation is not None and len(self.validation) != self.num_clients:
            raise DataError(
                f"data set {self.name!r} has {self.num_clients} training parts and {len(self.validation)} validation parts; "
                "give one validation part per client (it may be empty), or None"
            )

    @classmethod
    def from_arrays(
        cls,
        train: Sequence[tuple[Arrays, Arrays]],
        validation: Sequence[tuple[Arrays, Arrays]] | None = None,
        *,
        test: tuple[Arrays, Arrays],
        name: str = "arrays",
        classes: int | None = None,
    ) -> "FederatedData":
        """A user's own arrays: one (inputs, labels) pair a client.

        Args:
            train: inputs [n, ...] (any numeric type, used as float32) and labels [n] or [n, 1]:
                whole numbers from 0, or 0.0 and 1.0 for a binary task; -1 for an example whose label is not known.
            validation: the same, one pair a client; None if the clients keep no validation set.
            test: one pair that no client holds.
            name: for tables and error messages.
            classes: the number of classes, if larger than the largest label seen + 1.

        Raises:
            DataError: a pair whose lengths differ, labels that are no class indices, inputs of unequal shape.
        """
        silos = Silos.of([_examples(pair, f"train[{i}]", least=-1) for i, pair in enumerate(train)]) if train else Silos(Examples({}), (0,))
        held = None
        if validation is not None:
            held = Silos.of([_examples(pair, f"validation[{i}]") for i, pair in enumerate(validation)])
        tested = _examples(test, "test")
        known = [part for part in (silos.examples, *([held.examples] if held else []), tested) if len(part)]
        for part in known:
            if part.image.shape[1:] != known[0].image.shape[1:]:
                raise DataError(
                    f"inputs differ in shape: {tuple(known[0].image.shape[1:])} in train, {tuple(part.image.shape[1:])} "
                    "in validation or test; give all the same shape"
                )
        largest = max((int(part.label.max()) for part in known), default=0)
        if classes is not None and largest >= classes:
            raise DataError(f"label {largest} does not fit classes = {classes}; labels run from 0 to classes - 1")
        return cls(name, silos, held, tested, classes or max(largest + 1, 2))

    @property
    def num_clients(self) -> int:
        """How many clients hold data."""
        return len(self.train)

    @property
    def spec(self) -> Spec:
        """The shapes a model is built for."""
        held = self.train.examples
        return Spec(tuple(held.image.shape[1:]), self.classes, tuple(held.fields), tuple(self.test.fields))

    @cached_property
    def digest(self) -> str:
        """A fingerprint of every value, so that a run on other data is another run."""
        hasher = blake2b(repr((self.name, self.classes)).encode(), digest_size=8)
        silos = [self.train] if self.validation is None else [self.train, self.validation]
        for dealt in silos:
            hasher.update(repr(dealt.offsets).encode())
        own = () if self.server is None else (self.server,)
        for examples in (*(dealt.examples for dealt in silos), self.test, *own):
            for name, values in examples.fields.items():
                hasher.update(repr((name, values.dtype, tuple(values.shape))).encode())
                hasher.update(values.cpu().contiguous().numpy().data)
        return hasher.hexdigest()

    def only(self, clients: Sequence[int]) -> "FederatedData":
        """The data without the other clients.

        Raises:
            DataError: no client, one that does not exist, or one twice.
        """
        odd = [client for client in clients if not 0 <= client < self.num_clients]
        if odd or not clients or len(set(clients)) < len(clients):
            fact = f"participants = {list(clients)} of {self.num_clients} clients"
            raise DataError(f"{fact}; name some of 0 to {self.num_clients - 1}, each once")
        validation = None if self.validation is None else self.validation.only(clients)
        return replace(self, train=self.train.only(clients), validation=validation)

    def to(self, device: torch.device) -> "FederatedData":
        """The same data on ``device``; itself if it is there."""
        if self.test.image.device == device:
            return self
        validation = None if self.validation is None else self.validation.to(device)
        server = None if self.server is None else self.server.to(device)
        return replace(self, train=self.train.to(device), validation=validation, test=self.test.to(device), server=server)


def _examples(pair: tuple[Arrays, Arrays], where: str, least: int = 0) -> Examples:
    """One user's pair as ``Examples``, checked; labels from ``least``."""
    try:
        x, y = pair
    except (TypeError, ValueError):
        raise DataError(f"{where} is not a pair; give (inputs, labels)") from None
    inputs, labels = _tensor(x, f"{where} inputs").to(torch.float32), _tensor(y, f"{where} labels")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or inputs.ndim < 2:
        raise DataError(
            f"{where}: inputs have shape {tuple(inputs.shape)} and labels {tuple(labels.shape)}; "
            "give inputs [n, ...] and labels [n] or [n, 1]"
        )
    if len(inputs) != len(labels):
        raise DataError(f"{where}: {len(inputs)} inputs but {len(labels)} labels; give one label per input")
    whole = labels.to(torch.int64)
    if len(labels) and (not torch.equal(whole.to(labels.dtype), labels) or int(whole.min()) < least):
        raise DataError(f"{where}: labels must be class indices 0, 1, 2, ...; got values such as {labels[:5].tolist()}")
    return Examples({IMAGE: inputs.contiguous(), LABEL: whole})


def _tensor(values: Arrays, what: str) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().cpu()
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise DataError(f"{what} have the type {array.dtype}; give numbers")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
