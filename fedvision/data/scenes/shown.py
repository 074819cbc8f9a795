"""What is to be seen of each picture in plain words, how to refer to it, and what another picture of the same domain shows.

Sentences that are not true speak of what the other picture shows: they use the same words as often as those that are true, so that
nothing can be told from the words alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from fedvision.data.scenes.captions import DIALECTS, Thing, things_of

MARGIN = 0.12
"""Things whose centers differ by less in x, as shares of the side, are neither left nor right of each other."""

OTHERS = 3
"""So many other pictures lend their things."""

T = TypeVar("T")


@dataclass(frozen=True)
class Shown:
    """One picture.

    Attributes:
        things: that may be mentioned, the nearest first, in plain words.
        foils: those of other pictures of the domain.
        dialect: words that take the place of plain ones.
    """

    things: Sequence[Thing]
    foils: Sequence[Thing]
    dialect: Mapping[str, str]

    def word(self, plain: str) -> str:
        """A word in the dialect."""
        return self.dialect.get(plain, plain)

    def words(self, thing: Thing, *attributes: str) -> str:
        """Attributes of a thing in the dialect, such as ``color`` and ``shape``."""
        return " ".join(self.word(getattr(thing, name)) for name in attributes)

    def fitting(self, **attributes: str) -> list[Thing]:
        """The things that have these attributes, given in plain words."""
        return [thing for thing in self.things if all(getattr(thing, name) == value for name, value in attributes.items())]

    def named(self, thing: Thing, without: str = "") -> str | None:
        """The fewest words that fit this thing only, in the dialect; None if two attributes do not do.

        Args:
            thing: one of ``things``.
            without: an attribute that they must not say; ``shape``: ``object`` is said instead.
        """
        known = [] if without == "shape" else ["shape"]
        noun = "object" if without == "shape" else self.word(thing.shape)
        for more in ([], *([name] for name in ("color", "texture", "size") if name != without)):
            if len(self.fitting(**{name: getattr(thing, name) for name in [*more, *known]})) == 1:
                return " ".join([*(self.words(thing, name) for name in more), noun])
        return None

    def side_by_side(self) -> list[tuple[Thing, Thing]]:
        """Every two things that can be named, the first of which is to the left of the second."""
        named = [thing for thing in self.things if self.named(thing)]
        return [(one, other) for one in named for other in named if other.x - one.x >= MARGIN]


def shown(table: np.ndarray, size: int, dialect: np.ndarray, environment: np.ndarray, rng: np.random.Generator) -> list[Shown]:
    """What is to be seen of n pictures.

    Args:
        table: of the objects [n, 4, columns].
        size: the side of the pictures in pixels.
        dialect: number in ``DIALECTS`` [n].
        environment: number of the domain [n].
        rng: chooses the other pictures.
    """
    things = [things_of(rows, size) for rows in table]
    partners = others(environment, rng)
    return [
        Shown(own, [thing for other in lent for thing in things[other]], DIALECTS[number])
        for own, lent, number in zip(things, partners.tolist(), dialect.tolist(), strict=True)
    ]


def others(environment: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each picture ``OTHERS`` pictures of its domain, itself only if there are no more, int64 [n, OTHERS]."""
    partners = np.empty((len(environment), OTHERS), np.int64)
    for domain in np.unique(environment):
        own = rng.permutation(np.flatnonzero(environment == domain))
        for column in range(OTHERS):
            partners[own, column] = np.roll(own, 1 + column)
    return partners


def one_of(options: Sequence[T], rng: np.random.Generator) -> T:
    """One of them, all alike."""
    return options[int(rng.integers(len(options)))]


def in_order(makers: Sequence[Callable[..., Any]], number: int, rng: np.random.Generator) -> list[Callable[..., Any]]:
    """So many of the makers, each as often as any other up to one, in random order."""
    return [makers[i] for start in range(0, number, len(makers)) for i in rng.permutation(len(makers))][:number]
