"""Annotation files: JSON lists of records about pictures, and what data sets made of them have in common."""

import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedvision.data.texts import encode_texts
from fedvision.errors import DataError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def read_json(file: Path, setting: str) -> Any:
    """What a JSON file holds.

    Args:
        file: its path.
        setting: that names it, for messages.

    Raises:
        DataError: there is no such file, or it is no JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON ({error}); set {setting} to the annotation file") from error


@dataclass(frozen=True)
class Record:
    """One entry of an annotation file.

    Attributes:
        values: by key.
        where: it stands, for messages.
    """

    values: Mapping[str, Any]
    where: str

    def value(self, key: str) -> Any:
        """What stands under a key.

        Raises:
            DataError: there is no such key.
        """
        if key not in self.values:
            raise DataError(f"{self.where} has no {key!r}, only {', '.join(map(repr, self.values))}; add it")
        return self.values[key]

    def key(self, key: str) -> int | str:
        """The identity that stands under a key.

        Raises:
            DataError: there is none, or it is neither a whole number nor a text.
        """
        value = self.value(key)
        if not isinstance(value, int | str):
            raise DataError(f"{self.where} has {key!r} = {value!r}; give a whole number or a text")
        return value

    def text(self, key: str) -> str:
        """The text under a key, without white space around it.

        Raises:
            DataError: there is none, or it is empty.
        """
        return self.texts(key)[0]

    def texts(self, key: str) -> list[str]:
        """The texts under a key, where one may stand alone.

        Raises:
            DataError: there is none, or one is empty or no text.
        """
        value = self.value(key)
        some = value if isinstance(value, list) else [value]
        if not some or not all(isinstance(text, str) and text.strip() for text in some):
            raise DataError(f"{self.where} has {key!r} = {value!r}, which is no text; write one, or leave the record out")
        return [text.strip() for text in some]

    def box(self, key: str) -> tuple[float, float, float, float]:
        """The box under a key, which has left, top, width and height, as left, top, right and bottom.

        Raises:
            DataError: it is none.
        """
        return box_of(self.value(key), f"{self.where}, {key!r}")


def box_of(value: Any, where: str) -> tuple[float, float, float, float]:
    """A box of left, top, width and height as left, top, right and bottom.

    Raises:
        DataError: it is none, or has no area.

    >>> box_of([10, 20, 5, 5], "the example")
    (10.0, 20.0, 15.0, 25.0)
    """
    numbers = (
        isinstance(value, list | tuple)
        and len(value) == 4
        and all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in value)
    )
    if not numbers or min(value[2:]) <= 0:
        raise DataError(f"{where}: {value!r} is no box; give left, top, width and height in pixels, the last two above 0")
    left, top, width, height = map(float, value)
    return left, top, left + width, top + height


def records(file: Path, setting: str, kind: str, within: str | None = None) -> list[Record]:
    """The records of a file, which is a JSON list of tables.

    Args:
        file: its path.
        setting: that names it, for messages.
        kind: what the file should be like, for messages.
        within: the list stands under this key.

    Raises:
        DataError: a file that is missing or of another kind.
    """
    return listed(read_json(file, setting), str(file), kind, within)


def listed(content: Any, where: str, kind: str, within: str | None = None) -> list[Record]:
    """The records of what was read.

    Raises:
        DataError: it is of another kind.
    """
    found = content.get(within) if within is not None and isinstance(content, dict) else content
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise DataError(f"{where} does not hold a list of tables{f' under {within!r}' if within else ''}; give {kind}")
    return [Record(entry, f"{where}, {f'{within}, ' if within else ''}record {number}") for number, entry in enumerate(found)]


def grouped(pairs: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    """Values by key, both in the order in which they come.

    >>> grouped([("a", 1), ("b", 2), ("a", 3)])
    {'a': [1, 3], 'b': [2]}
    """
    groups: dict[K, list[V]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def divided(groups: Mapping[K, V], test_fraction: float, where: str, rng: np.random.Generator) -> tuple[dict[K, V], dict[K, V]]:
    """The groups to train on, and a random share of all to test on.

    Args:
        groups: what is not to be torn apart, such as all that is said of one picture.
        test_fraction: the share.
        where: they are from, for messages.
        rng: draws them.

    Raises:
        DataError: nothing is left to train on, or to test on.
    """
    keys, cut = list(groups), round(test_fraction * len(groups))
    if not 0 < cut < len(keys):
        fact = f"{where} leaves {len(keys) - cut} pictures to train and {cut} to test on"
        raise DataError(f"{fact}; set data.test_fraction, e.g. 0.2, or data.test_annotations")
    order = rng.permutation(len(keys))
    train, test = ({keys[i]: groups[keys[i]] for i in part} for part in (order[cut:], order[:cut]))
    return train, test


def in_parts(groups: Mapping[K, Sequence[V]], most: int) -> list[tuple[K, Sequence[V]]]:
    """Groups of at most so many; a larger one comes again with the rest.

    >>> in_parts({"a": [1, 2, 3], "b": [4]}, 2)
    [('a', [1, 2]), ('a', [3]), ('b', [4])]
    """
    return [(key, some[start : start + most]) for key, some in groups.items() for start in range(0, len(some), most)]


def check_there(pictures: Iterable[Path], where: str, setting: str) -> None:
    """Nothing, if all pictures are there.

    Raises:
        DataError: some are missing.
    """
    named = list(dict.fromkeys(pictures))
    missing = [file for file in named if not file.is_file()]
    if missing:
        raise DataError(f"{where} names {len(named)} pictures, of which {len(missing)} are missing, such as {missing[0]}; set {setting}")


def encoded(texts: Sequence[Sequence[str]], number: int) -> Tensor:
    """Texts as ``encode_texts`` has them, uint8 [n, number, length], where fewer than ``number`` are followed by empty ones."""
    return encode_texts([[*some, *[""] * (number - len(some))] for some in texts])


def filled(values: Sequence[Sequence[V]], number: int, nothing: Any) -> Tensor:
    """Numbers [n, number, ...] by example, where fewer than ``number`` are followed by ``nothing``."""
    return torch.tensor([[*some, *[nothing] * (number - len(some))] for some in values])
