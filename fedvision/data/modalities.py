"""Which silo has what: fields that some clients' examples lack."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from fedvision.data.examples import ENVIRONMENT, LABEL, LABELS, NOTHING, Examples, has
from fedvision.data.federated import FederatedData, Silos
from fedvision.errors import DataError, ExperimentError
from fedvision.settings import nearest

TARGETS = (LABEL, LABELS, ENVIRONMENT)
"""What examples are told apart by; ``[labels]`` hides labels."""


@dataclass(frozen=True, kw_only=True)
class Modalities:
    """Which fields each client's examples have; the others' values are overwritten. ``[modalities]`` of a file.

    Only fields that some entry names can be missing. The test set, and what the server trains on, keep everything.

    Attributes:
        silos: the fields of each client: client i has those of entry i modulo their number.

    Example:
        >>> three = Modalities(silos=(("image",), ("image", "depth"), ("image", "depth", "semseg")))
        >>> three.missing
        ('depth', 'semseg')
        >>> three.of(4)
        ('image', 'depth')
    """

    silos: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        shown = f"[modalities] silos = {[list(entry) for entry in self.silos]}"
        if not self.silos or not all(self.silos):
            raise ExperimentError(f'{shown}: a silo is left with nothing; name at least one field in every entry, as ["image"]')
        for entry in self.silos:
            for name in entry:
                if name in TARGETS:
                    raise ExperimentError(
                        f"{shown}: {name!r} is no modality; every client keeps it without being named ([labels] hides labels)"
                    )
            if len(set(entry)) < len(entry):
                raise ExperimentError(f"{shown}: {list(entry)} names a field twice; name it once")

    @property
    def missing(self) -> tuple[str, ...]:
        """The fields that some client lacks, in the order in which they are named."""
        named = dict.fromkeys(name for entry in self.silos for name in entry)
        return tuple(name for name in named if not all(name in entry for entry in self.silos))

    def of(self, client: int) -> tuple[str, ...]:
        """The fields of a client, among those that are named."""
        return self.silos[client % len(self.silos)]

    def hidden(self, data: FederatedData) -> FederatedData:
        """The same data, of which each client's training and validation examples have the fields of their silo only.

        Each of ``missing`` is joined by its ``has_<field>``, and is 0 (or what ``NOTHING`` says) where it is False.

        Raises:
            DataError: a field that the data do not have, more entries than clients, or a client none of whose examples has anything.
        """
        if len(self.silos) > data.num_clients:
            fact = f"[modalities] has {len(self.silos)} entries, the data {data.num_clients} clients"
            raise DataError(f"{fact}; give at most one entry a client, or make more clients")
        known = [name for name in data.train.examples.fields if name not in TARGETS and not name.startswith(has(""))]
        for name in dict.fromkeys(name for entry in self.silos for name in entry):
            if name not in known:
                raise DataError(f"[modalities] names the field {name!r}, which {data.name!r} does not have; {nearest(name, known)}")
        train = self._hidden(data.train)
        self._check_something_left(train, data.name)
        return replace(data, train=train, validation=None if data.validation is None else self._hidden(data.validation))

    def _hidden(self, silos: Silos) -> Silos:
        fields: dict[str, Tensor] = dict(silos.examples.fields)
        for name in self.missing:
            here = silos.examples.having(name).clone()
            for client, (start, stop) in enumerate(pairwise(silos.offsets)):
                if name not in self.of(client):
                    here[start:stop] = False
            fields[name] = blanked(name, fields[name], here)
            fields[has(name)] = here
        return Silos(Examples(fields), silos.offsets)

    def _check_something_left(self, train: Silos, name: str) -> None:
        for client in range(len(train)):
            examples, own = train[client], self.of(client)
            if not any(examples.having(field).any() for field in own):
                fact = f"none of the training examples of client {client} has any of {list(own)}"
                raise DataError(f"[modalities] of {name!r}: {fact}; give that silo a field that its examples have")


def blanked(field: str, values: Tensor, here: Tensor) -> Tensor:
    """A copy of a field's values, overwritten where ``here`` is False: by what ``NOTHING`` says, else by 0."""
    copy = values.clone()
    copy[~here] = NOTHING.get(field, 0)
    return copy


def held(silos: Silos) -> Mapping[str, Tensor]:
    """How many examples of each client have a field, int64 [clients], by field, of those that some example lacks."""
    marked = [name for name in silos.examples.fields if has(name) in silos.examples]
    return {name: torch.stack([silos[client].having(name).sum() for client in range(len(silos))]) for name in marked}
