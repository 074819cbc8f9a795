"""Words that fit one object of a picture only, its box, and boxes to choose from."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fedvision.data.examples import BOX, EXPRESSION, PROPOSALS
from fedvision.data.scenes.captions import Thing
from fedvision.data.scenes.objects import COLUMNS, MENTIONED
from fedvision.data.scenes.shown import Shown, one_of
from fedvision.data.texts import encode_texts

PROPOSED = 8
"""So many proposals there are for a picture, half of them at least of no object."""

TRIES = 20
"""So many boxes beside objects, and so many anywhere, are tried to find those that are of no object."""

SAME = 0.5
"""Boxes that share so much of their union are of the same object."""

_SIDES = [COLUMNS.index(name) for name in ("left", "top", "right", "bottom")]


def expressions(seen: Sequence[Shown], table: np.ndarray, size: int, number: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """Expressions for n pictures: ``expression`` [n, number, length], ``box`` [n, number, 4], ``proposals`` [n, 8, 4].

    Objects take turns in being meant. No picture has the same expression twice; where nothing more can be said, the last are empty and
    their boxes 0. Proposals are the boxes of all objects that may be mentioned, and of no object, in random order: beside an object's, or
    of the background, sharing less than half of their union with any.

    Args:
        seen: the pictures.
        table: of the objects [n, 4, columns].
        size: the side of the pictures in pixels.
        number: of expressions a picture.
        rng: draws all of it.
    """
    boxes = [rows[rows[:, COLUMNS.index("visible")] >= MENTIONED][:, _SIDES] for rows in table]
    meant = [_of_one(one, number, rng) for one in seen]
    codes = encode_texts([[text for text, _ in some] for some in meant])
    nothing = np.zeros(4, np.float32)
    chosen = [[own[index] if index >= 0 else nothing for _, index in some] for own, some in zip(boxes, meant, strict=True)]
    proposed = np.stack([_proposals(own, size, rng) for own in boxes])
    return {EXPRESSION: codes, BOX: torch.from_numpy(np.stack(chosen)), PROPOSALS: torch.from_numpy(proposed)}


def _of_one(seen: Shown, number: int, rng: np.random.Generator) -> list[tuple[str, int]]:
    """Expressions and the place among the things of what each means; -1: there is no such."""
    order = rng.permutation(len(seen.things)).tolist()
    said: dict[str, int] = {}
    for turn in range(number * len(order)):
        if len(said) == number:
            break
        index = order[turn % len(order)]
        options = [text for text in _fitting(seen, seen.things[index]) if text not in said]
        if options:
            said[one_of(options, rng)] = index
    return [*said.items(), *[("", -1)] * (number - len(said))]


# ---- words ----------------------------------------------------------------------------------------------------------

_NAMES = (
    ("shape",), ("color", "shape"), ("texture", "shape"), ("size", "shape"), ("size", "color", "shape"), ("color", "texture", "shape"),
    ("size", "color", "texture", "shape"),
)  # fmt: skip

PLACES = {
    "on the left": lambda thing: thing.x < 0.4,
    "on the right": lambda thing: thing.x > 0.6,
    "at the top": lambda thing: thing.y < 0.4,
    "at the bottom": lambda thing: thing.y > 0.6,
}
"""Where the center of a thing is, in words that fit it."""


def _fitting(seen: Shown, thing: Thing) -> Iterator[str]:
    """Expressions that fit this thing and no other to be seen."""
    for names in _NAMES:
        alike = seen.fitting(**{name: getattr(thing, name) for name in names})
        if len(alike) == 1:
            yield f"the {seen.words(thing, *names)}"
    for noun, alike in (
        (seen.word(thing.shape), seen.fitting(shape=thing.shape)),
        (f"{seen.word(thing.color)} object", seen.fitting(color=thing.color)),
    ):
        for place, holds in PLACES.items():
            if holds(thing) and sum(map(holds, alike)) == 1:
                yield f"the {noun} {place}"
    if thing is seen.things[0]:
        yield "the nearest object"


# ---- boxes ----------------------------------------------------------------------------------------------------------


def _proposals(boxes: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Boxes of objects [objects, 4] and of none, float32 [8, 4] in random order; all 0 where none was found."""
    tried = np.round(np.clip(np.stack([_beside(boxes, rng), _anywhere(size, rng)], axis=1).reshape(-1, 4), 0, size))
    sides = tried[:, 2:] - tried[:, :2]
    distractors = tried[(sides.min(axis=1) >= 2) & (overlap(tried, boxes).max(axis=1) < SAME)][: PROPOSED - len(boxes)]
    nothing = np.zeros((PROPOSED - len(boxes) - len(distractors), 4))
    return np.asarray(rng.permutation(np.concatenate([boxes, distractors, nothing])).astype(np.float32))


def _beside(boxes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Boxes near some, of other sizes and places, [tries, 4]."""
    like = boxes[rng.integers(len(boxes), size=TRIES)]
    sides = like[:, 2:] - like[:, :2]
    center = (like[:, 2:] + like[:, :2]) / 2 + rng.uniform(-0.7, 0.7, (TRIES, 2)) * sides
    half = rng.uniform(0.25, 0.75, (TRIES, 2)) * sides
    return np.concatenate([center - half, center + half], axis=1)


def _anywhere(size: int, rng: np.random.Generator) -> np.ndarray:
    """Boxes of any size and place, [tries, 4]."""
    center, half = size * rng.random((TRIES, 2)), size * rng.uniform(0.075, 0.3, (TRIES, 2))
    return np.concatenate([center - half, center + half], axis=1)


def overlap(some: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Area that each of some boxes [m, 4] shares with each of others [n, 4], as a share of the area of both together, [m, n].

    >>> overlap(np.array([[0, 0, 2, 2]]), np.array([[0, 0, 2, 2], [1, 0, 3, 2], [2, 2, 4, 4]])).round(2).tolist()
    [[1.0, 0.33, 0.0]]
    """
    one, other = some[:, None], boxes[None]
    shared = np.clip(np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2]), 0, None).prod(axis=2)
    both = (one[..., 2:] - one[..., :2]).prod(axis=2) + (other[..., 2:] - other[..., :2]).prod(axis=2) - shared
    return np.asarray(shared / both)
