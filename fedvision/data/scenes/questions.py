"""Questions about a picture, and their answers; all of them can be answered from the table of objects."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fedvision.data.examples import ANSWER, ANSWER_WEIGHT, QUESTION
from fedvision.data.scenes.captions import DIALECTS, article
from fedvision.data.scenes.shapes import SHAPES
from fedvision.data.scenes.shown import Shown, in_order, one_of
from fedvision.data.scenes.styles import COLORS, TEXTURES
from fedvision.data.texts import encode_texts

NUMBERS = ("zero", "one", "two", "three", "four")

ROUNDS = 4
"""So many times each kind of question is tried before a picture is left with fewer questions than wanted."""

Asked = tuple[str, str] | None
"""A question and its answer, or None: there is nothing of the kind to ask."""


def questions(seen: Sequence[Shown], number: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """Questions of n pictures: ``question`` [n, number, length], ``answer`` [n, number, 1, length], ``answer_weight`` [n, number, 1].

    No picture is asked the same twice; where there is too little to ask, the last questions are empty and weigh 0.
    """
    asked = [_of_one(one, number, rng) for one in seen]
    answers = encode_texts([[answer] for some in asked for _, answer in some])
    weights = torch.tensor([[float(question != "")] for some in asked for question, _ in some])
    return {
        QUESTION: encode_texts([[question for question, _ in some] for some in asked]),
        ANSWER: answers.reshape(len(seen), number, 1, -1),
        ANSWER_WEIGHT: weights.reshape(len(seen), number, 1),
    }


def _of_one(seen: Shown, number: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    found: dict[str, str] = {}
    for kind in in_order(KINDS, ROUNDS * max(number, len(KINDS)), rng):
        if len(found) == number:
            break
        asked = kind(seen, rng)
        if asked is not None:
            found.setdefault(*asked)
    return [*found.items(), *[("", "")] * (number - len(found))]


# ---- kinds ----------------------------------------------------------------------------------------------------------


def _color(seen: Shown, rng: np.random.Generator) -> Asked:
    """What color is the star? Red."""
    return _attribute(seen, "color", "what color is the {}?", rng)


def _shape(seen: Shown, rng: np.random.Generator) -> Asked:
    """What shape is the red object? A star."""
    return _attribute(seen, "shape", "what shape is the {}?", rng)


def _size(seen: Shown, rng: np.random.Generator) -> Asked:
    """What size is the star? Small."""
    return _attribute(seen, "size", "what size is the {}?", rng)


def _texture(seen: Shown, rng: np.random.Generator) -> Asked:
    """What texture does the star have? Dotted."""
    return _attribute(seen, "texture", "what texture does the {} have?", rng)


def _attribute(seen: Shown, name: str, question: str, rng: np.random.Generator) -> Asked:
    thing = one_of(seen.things, rng)
    words = seen.named(thing, without=name)
    return None if words is None else (question.format(words), seen.words(thing, name))


def _count(seen: Shown, rng: np.random.Generator) -> Asked:
    """How many objects are there? Two."""
    return "how many objects are there?", NUMBERS[len(seen.things)]


def _count_of_a_kind(seen: Shown, rng: np.random.Generator) -> Asked:
    """How many red objects are there? One."""
    name = one_of(("color", "texture"), rng)
    value = getattr(one_of([*seen.things, *seen.foils], rng), name)
    return f"how many {seen.word(value)} objects are there?", NUMBERS[len(seen.fitting(**{name: value}))]


def _presence(seen: Shown, rng: np.random.Generator) -> Asked:
    """Is there a red star? No: a red circle, or none of both."""
    if rng.random() < 0.5:
        return f"is there {article(seen.words(one_of(seen.things, rng), 'color', 'shape'))}?", "yes"
    colored, shaped = one_of([*seen.things, *seen.foils], rng), one_of([*seen.things, *seen.foils], rng)
    if seen.fitting(color=colored.color, shape=shaped.shape):
        return None
    said = f"{seen.word(colored.color)} {seen.word(shaped.shape)}"
    return f"is there {article(said)}?", "no"


def _side(seen: Shown, rng: np.random.Generator) -> Asked:
    """Is the circle to the left or to the right of the star? Left."""
    pairs = seen.side_by_side()
    if not pairs:
        return None
    one, other = one_of(pairs, rng)
    answer = "left" if rng.random() < 0.5 else "right"
    first, second = (one, other) if answer == "left" else (other, one)
    return f"is the {seen.named(first)} to the left or to the right of the {seen.named(second)}?", answer


def _nearest(seen: Shown, rng: np.random.Generator) -> Asked:
    """Which object is nearest? The star."""
    return "which object is nearest?", seen.word(seen.things[0].shape)


def _nearer(seen: Shown, rng: np.random.Generator) -> Asked:
    """Is the circle nearer than the star? Yes."""
    named = [thing for thing in seen.things if seen.named(thing)]
    if len(named) < 2:
        return None
    near, far = sorted(rng.choice(len(named), 2, replace=False).tolist())
    answer = "yes" if rng.random() < 0.5 else "no"
    first, second = (near, far) if answer == "yes" else (far, near)
    return f"is the {seen.named(named[first])} nearer than the {seen.named(named[second])}?", answer


KINDS: tuple[Callable[[Shown, np.random.Generator], Asked], ...] = (
    _color, _shape, _size, _texture, _count, _count_of_a_kind, _presence, _side, _nearest, _nearer,
)  # fmt: skip

ANSWERS = tuple(
    dict.fromkeys(
        dialect.get(word, word)
        for dialect in DIALECTS
        for word in (*COLORS, *SHAPES, "small", "medium", "large", *TEXTURES, *NUMBERS, "yes", "no", "left", "right")
    )
)
"""Every answer there can be, in all dialects."""
