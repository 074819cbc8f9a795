"""Captions: what is to be seen, in several wordings and dialects; every word of them is true of the objects' table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedvision.data.scenes.objects import COLUMNS, MENTIONED
from fedvision.data.scenes.shapes import SHAPES
from fedvision.data.scenes.styles import COLORS, TEXTURES

DIALECTS: tuple[dict[str, str], ...] = (
    {},
    {
        "circle": "disk", "square": "box", "ring": "annulus", "cross": "plus sign", "crescent": "sickle", "star": "pentagram",
        "large": "big", "small": "little", "medium": "mid-sized", "picture": "rendering", "striped": "banded",
    },
    {
        "red": "crimson", "blue": "azure", "green": "emerald", "yellow": "golden", "white": "snowy", "purple": "violet",
        "cyan": "turquoise", "pink": "rosy", "brown": "chestnut", "orange": "amber", "picture": "painting",
    },
    {
        "large": "huge", "small": "tiny", "medium": "middling", "picture": "photo", "dotted": "spotted", "checkered": "chequered",
        "heart": "love heart", "triangle": "wedge", "crescent": "moon", "arrow": "pointer", "hourglass": "sandglass",
    },
)  # fmt: skip
"""Words that take the place of the plain ones. The first dialect has none."""


@dataclass(frozen=True)
class Thing:
    """An object in words, and where it is: x and y as shares of the picture's side, y downward."""

    size: str
    color: str
    texture: str
    shape: str
    x: float
    y: float

    def worded(self, dialect: dict[str, str]) -> "Thing":
        """The same in a dialect."""
        size, color, texture, shape = (dialect.get(word, word) for word in (self.size, self.color, self.texture, self.shape))
        return Thing(size, color, texture, shape, self.x, self.y)


@dataclass(frozen=True)
class Sight:
    """What a caption is of: the first object, another one to compare it with if there is any, all of them, and the word for it all."""

    first: Thing
    other: Thing | None
    things: Sequence[Thing]
    picture: str


def captions(table: np.ndarray, size: int, wordings: int, dialect: np.ndarray, chance: np.ndarray) -> list[list[str]]:
    """Captions of n pictures, ``wordings`` each, in order of the ``WORDINGS`` from one on that the dialect begins with.

    Objects of which less than ``MENTIONED`` is to be seen are not mentioned.

    Args:
        table: of the objects [n, 4, columns].
        size: the side of the pictures in pixels.
        wordings: how many for each.
        dialect: number in ``DIALECTS`` [n].
        chance: numbers in [0, 1), which choose what the first object is compared with [n].
    """
    return [
        _wordings(sight(rows, size, float(luck), DIALECTS[number]), wordings, 2 * int(number))
        for rows, number, luck in zip(table, dialect, chance, strict=True)
    ]


def _wordings(seen: Sight, number: int, start: int) -> list[str]:
    return [WORDINGS[(start + i) % len(WORDINGS)](seen) for i in range(number)]


def sight(rows: np.ndarray, size: int, chance: float, dialect: dict[str, str]) -> Sight:
    """What is to be seen in one picture: rows of the objects' table [4, columns]."""
    things = [thing.worded(dialect) for thing in things_of(rows, size)]
    others = things[1:]
    return Sight(things[0], others[int(chance * len(others))] if others else None, things, dialect.get("picture", "picture"))


def things_of(rows: np.ndarray, size: int) -> list[Thing]:
    """The objects of one picture that may be mentioned, the nearest first, in plain words."""
    return [_thing(row, size) for row in rows.tolist() if row[_VISIBLE] >= MENTIONED]


_SHAPES, _COLORS = tuple(SHAPES), tuple(COLORS)
_SHAPE, _COLOR, _TEXTURE, _RADIUS, _X, _Y, _VISIBLE = map(COLUMNS.index, ("shape", "color", "texture", "radius", "x", "y", "visible"))


def _thing(row: Sequence[float], size: int) -> Thing:
    names = (size_word(row[_RADIUS] / size), _COLORS[int(row[_COLOR])], TEXTURES[int(row[_TEXTURE])], _SHAPES[int(row[_SHAPE])])
    return Thing(*names, row[_X] / size, row[_Y] / size)


def size_word(radius: float) -> str:
    """The word for a radius, a share of the picture's side."""
    return "small" if radius < 0.15 else "medium" if radius < 0.27 else "large"


def relation(one: Thing, other: Thing) -> str:
    """Where the first object of a picture is, seen from another."""
    right, down = one.x - other.x, one.y - other.y
    if max(abs(right), abs(down)) < 0.12:
        return "in front of"
    if abs(right) >= abs(down):
        return "to the right of" if right > 0 else "to the left of"
    return "below" if down > 0 else "above"


OPPOSITE = {
    "in front of": "behind", "to the right of": "to the left of", "to the left of": "to the right of", "below": "above", "above": "below",
}  # fmt: skip


def article(words: str) -> str:
    """Words with the article before them.

    >>> article("orange ring"), article("hourglass"), article("huge star")
    ('an orange ring', 'an hourglass', 'a huge star')
    """
    return f"an {words}" if words.startswith(("a", "e", "i", "o", "u", "hour")) else f"a {words}"


def described(thing: Thing) -> str:
    """All that is to be seen of a thing, but its place."""
    texture = "" if thing.texture == "plain" else f"{thing.texture} "
    return f"{thing.size} {thing.color} {texture}{thing.shape}"


def listed(parts: Sequence[str]) -> str:
    """Parts of a sentence side by side.

    >>> listed(["a ring", "a star", "a box"])
    'a ring, a star and a box'
    """
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


# ---- the wordings ---------------------------------------------------------------------------------------------------


def _scene(seen: Sight) -> str:
    """A large red striped circle to the left of a small blue star."""
    first, other = seen.first, seen.other
    return f"{article(described(first))} {relation(first, other)} {article(described(other))}" if other else article(described(first))


def _inventory(seen: Sight) -> str:
    """A picture of a red circle, a blue star and a green ring."""
    return f"{article(seen.picture)} of {listed([article(f'{thing.color} {thing.shape}') for thing in seen.things])}"


def _statement(seen: Sight) -> str:
    """The red circle is to the left of the blue star."""
    first, other = seen.first, seen.other
    if other is None:
        return f"the {first.shape} is {first.size}, {first.color} and {first.texture}"
    return f"the {first.color} {first.shape} is {relation(first, other)} the {other.color} {other.shape}"


def _details(seen: Sight) -> str:
    """One can see a circle that is red and striped, and a star that is blue and plain."""
    return f"one can see {listed([f'{article(thing.shape)} that is {thing.color} and {thing.texture}' for thing in seen.things])}"


def _backwards(seen: Sight) -> str:
    """There is a star, small and blue, to the right of a circle, large and red."""
    first, other = seen.first, seen.other
    told = f"{article(first.shape)}, {first.size} and {first.color}"
    return (
        f"there is {article(other.shape)}, {other.size} and {other.color}, {OPPOSITE[relation(first, other)]} {told}"
        if other
        else f"there is {told}"
    )


def _shapes(seen: Sight) -> str:
    """This picture shows a circle and a star."""
    return f"this {seen.picture} shows {listed([article(thing.shape) for thing in seen.things])}"


def _distance(seen: Sight) -> str:
    """The circle is nearer than the star."""
    first, other = seen.first, seen.other
    return (
        f"the {first.shape} is nearer than the {other.shape}"
        if other
        else f"something {first.color} in the shape of {article(first.shape)}"
    )


def _comparison(seen: Sight) -> str:
    """The red circle is larger than the blue star."""
    first, other = seen.first, seen.other
    if other is None:
        return f"what one sees is {first.texture} and {first.color}: {article(first.shape)}"
    return f"the {first.color} {first.shape} is larger than the {other.color} {other.shape}"


WORDINGS: tuple[Callable[[Sight], str], ...] = (_scene, _inventory, _statement, _details, _backwards, _shapes, _distance, _comparison)
