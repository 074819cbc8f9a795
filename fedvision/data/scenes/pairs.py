"""Statements about two pictures, the left one and the right one, each true or false.

A pair is told only what could be true of it as well as false: of every kind of statement as many are true as false.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedvision.data.examples import STATEMENT, TRUTH
from fedvision.data.scenes.captions import article
from fedvision.data.scenes.questions import NUMBERS
from fedvision.data.scenes.shown import Shown, in_order, one_of
from fedvision.data.texts import encode_texts

TRIES = 4
"""So many times each kind of statement is tried before a pair is left with fewer statements than wanted."""

TOTALS = (*NUMBERS, "five", "six", "seven", "eight")

Told = tuple[list[str], list[str]]
"""Statements that are true of a pair, and statements that are false."""


def statements(left: Sequence[Shown], right: Sequence[Shown], number: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """Statements about n pairs of pictures: ``statement`` [n, number, length] and ``truth`` [n, number].

    In every two in a row one is true and one is false. No pair is told the same twice; where there is too little to tell, the last
    statements are empty, and their truth -1. Words are those of the left picture's dialect.
    """
    told = [_of_one(one, other, number, rng) for one, other in zip(left, right, strict=True)]
    return {
        STATEMENT: encode_texts([[text for text, _ in some] for some in told]),
        TRUTH: torch.tensor([[truth for _, truth in some] for some in told]).reshape(len(left), number),
    }


def _of_one(left: Shown, right: Shown, number: int, rng: np.random.Generator) -> list[tuple[str, int]]:
    truths = [truth for _ in range(0, number, 2) for truth in rng.permutation(2).tolist()][:number]
    told: dict[str, int] = {}
    for kind in in_order(KINDS, TRIES * max(number, len(KINDS)), rng):
        if len(told) == number:
            break
        true, false = kind(left, right, rng)
        if true and false:
            truth = truths[len(told)]
            told.setdefault(one_of(true if truth else false, rng), truth)
    return [*told.items(), *[("", -1)] * (number - len(told))]


# ---- kinds ----------------------------------------------------------------------------------------------------------


def _both(attribute: str, words: str, left: Shown, right: Shown, rng: np.random.Generator) -> Told:
    """Both pictures show a star."""
    here, there = _values(left, attribute), _values(right, attribute)

    def said(value: str) -> str:
        return f"both pictures show {words.format(article(left.word(value)), left.word(value))}"

    return [said(value) for value in here if value in there], [said(value) for value in _apart(here, there) + _apart(there, here)]


def _only(left: Shown, right: Shown, rng: np.random.Generator) -> Told:
    """Only the left picture shows a star."""
    here, there = _values(left, "shape"), _values(right, "shape")
    sides = [("left", "right", value) for value in _apart(here, there)] + [("right", "left", value) for value in _apart(there, here)]
    told = [[f"only the {side} picture shows {article(left.word(value))}" for side in both] for *both, value in sides]
    return [true for true, _ in told], [false for _, false in told]


def _sides(left: Shown, right: Shown, rng: np.random.Generator) -> Told:
    """The left picture shows a red star and the right one a blue circle."""
    here, there = ([(thing.color, thing.shape) for thing in side.things] for side in (left, right))

    def said(one: tuple[str, str], other: tuple[str, str]) -> str:
        first, second = (article(" ".join(map(left.word, words))) for words in (one, other))
        return f"the left picture shows {first} and the right one {second}"

    pairs = [(one, other) for one in here for other in there if one not in there or other not in here]
    return [said(one, other) for one, other in pairs], [said(other, one) for one, other in pairs]


def _total(left: Shown, right: Shown, rng: np.random.Generator) -> Told:
    """There are three objects in the two pictures; it is false of one more or one less."""
    total = len(left.things) + len(right.things)
    other = total + one_of((-1, 1), rng)
    true, false = (
        f"there are {TOTALS[number]} objects in the two pictures" if 2 <= number < len(TOTALS) else "" for number in (total, other)
    )
    return [true], [false] if false else []


def _more(left: Shown, right: Shown, rng: np.random.Generator) -> Told:
    """The left picture shows more objects than the right one."""
    if len(left.things) == len(right.things):
        return [], []
    told = [[f"the {side} picture shows more objects than the {other} one"] for side, other in (("left", "right"), ("right", "left"))]
    return (told[0], told[1]) if len(left.things) > len(right.things) else (told[1], told[0])


KINDS: tuple[Callable[[Shown, Shown, np.random.Generator], Told], ...] = (
    partial(_both, "shape", "{0}"),
    partial(_both, "color", "something {1}"),
    partial(_both, "texture", "something {1}"),
    _only,
    _sides,
    _total,
    _more,
)


def _values(side: Shown, attribute: str) -> list[str]:
    return list(dict.fromkeys(getattr(thing, attribute) for thing in side.things))


def _apart(here: Sequence[str], there: Sequence[str]) -> list[str]:
    return [value for value in here if value not in there]
