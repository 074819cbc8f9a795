"""Scenes: small pictures of shapes in a room, drawn from a seed, with labels, captions, depth and semantic maps that agree.

``layouts`` says what is where, ``styles`` how domains differ, ``pixels`` draws it, ``captions`` puts it into words. ``questions``,
``hypotheses``, ``pairs`` and ``expressions`` make tasks of it, for which ``shown`` finds words; ``drawing`` puts all of it together.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Le

from fedvision.cache import cached
from fedvision.data.examples import ENVIRONMENT, IMAGE, LABEL, Examples
from fedvision.data.pool import Pool
from fedvision.data.scenes.captions import WORDINGS
from fedvision.data.scenes.drawing import FIELDS, Recipe, drawn_examples
from fedvision.data.scenes.layouts import SLOTS
from fedvision.data.scenes.objects import COLUMNS, MENTIONED
from fedvision.data.scenes.shapes import SHAPES
from fedvision.data.scenes.styles import BACKGROUNDS, COLORS, SHIFTS, TEXTURES
from fedvision.registry import datasets
from fedvision.settings import Count, Fraction

__all__ = ["BACKGROUNDS", "COLORS", "COLUMNS", "FIELDS", "MENTIONED", "SHAPES", "SHIFTS", "TEXTURES", "scenes"]

VERSION = 1
"""Raise it when the same settings begin to give other pictures: what is on disk is not read any more."""

Classes = Annotated[int, Ge(2), Le(100)]
Side = Annotated[int, Ge(16), Le(512)]
Objects = Annotated[int, Ge(1), Le(SLOTS)]
Wordings = Annotated[int, Ge(1), Le(len(WORDINGS))]
Shift = Literal["palette", "texture", "background", "blur", "rotation", "wording"]


@datasets("scenes")
def scenes(
    *,
    examples: Count = 4000,
    test_examples: Count = 1000,
    size: Side = 32,
    classes: Classes = 10,
    objects: tuple[Objects, Objects] = (1, 2),
    clutter: Fraction = 0.0,
    noise: Fraction = 0.0,
    domains: Count = 1,
    shift: tuple[Shift, ...] = ("palette", "texture", "background"),
    shift_strength: Fraction = 0.8,
    held_out: bool = False,
    wordings: Wordings = 5,
    questions: Count = 4,
    hypotheses: Count = 3,
    statements: Count = 2,
    expressions: Count = 2,
    fields: tuple[str, ...] = (IMAGE, LABEL),
    draw_seed: int | None = None,
    rng: np.random.Generator,
) -> Pool:
    """Pictures of one to four shapes in a room, drawn from a seed, with labels, captions, depth and semantic maps; no download.

    The class of a picture is that of its largest and nearest object: its shape and, of more than ten classes, its color.
    Classes are as frequent as each other in every domain. A domain is a style: of shifted palettes, textures, ... each has
    its own, and the class can be told in all. Fields, of which ``fields`` chooses:

    - ``image`` uint8 [n, 3, size, size]; ``label`` int64 [n]; ``labels`` uint8 [n, classes], all classes to be seen;
    - ``caption`` uint8 [n, wordings, length], as ``fedvision.data.texts`` encodes;
    - ``depth`` float32 [n, 1, size, size] in meters; ``semseg`` uint8 [n, size, size], 0: background, 1 + class: an object;
    - ``objects`` float32 [n, 4, 14], what is where (``fedvision.data.scenes.objects.COLUMNS``);
    - ``question`` uint8 [n, questions, length], ``answer`` uint8 [n, questions, 1, length], ``answer_weight`` float32 [n, questions, 1];
    - ``hypothesis`` uint8 [n, hypotheses, length], ``verdict`` int64 [n, hypotheses], 0: contradiction, 1: neutral, 2: entailment;
    - ``second_image`` as ``image``, of the same domain, ``second_objects`` as ``objects``, ``statement`` uint8 [n, statements, length],
      about both pictures, and ``truth`` int64 [n, statements] of 0 and 1;
    - ``expression`` uint8 [n, expressions, length], which fits one object only, ``box`` float32 [n, expressions, 4], left, top, right and
      bottom in pixels, and ``proposals`` float32 [n, 8, 4], boxes of objects and of none;
    - ``environment`` int64 [n], the domain, wherever there is more than one.

    Args:
        examples: to train on, over all domains.
        test_examples: that no client gets.
        size: of the pictures in pixels. The same scenes are drawn in any size.
        classes: class k has the shape k % 10, and of more than ten classes the color k // 10.
        objects: the fewest and the most of a picture.
        clutter: in [0, 1]; so many tenths of 20 strips of any color lie about in the background.
        noise: deviation of normal noise added to every pixel, whose values are in [0, 1].
        domains: how many. Partition ``environment`` makes each a silo.
        shift: in what domains differ; of no effect where there is only one.
        shift_strength: in [0, 1]; 0: not at all.
        held_out: the test set is a further domain that nobody trains on; otherwise it has all domains alike.
        wordings: captions a picture.
        questions: a picture.
        hypotheses: a picture; of three in a row one each is contradicted, left open and entailed.
        statements: a pair of pictures; of two in a row one is true.
        expressions: a picture.
        fields: that are kept.
        draw_seed: of the pictures; not given: they follow the experiment's seed.
        rng: draws the seed, if none is given.

    Raises:
        DataError: an unknown field or shift, or no range of objects.
    """
    numbers = (wordings, questions, hypotheses, statements, expressions)
    recipe = Recipe(size, classes, objects, clutter, noise, domains, tuple(shift), shift_strength, held_out, *numbers, tuple(fields))
    seed = int(rng.integers(2**62)) if draw_seed is None else draw_seed
    parts = {"train": (examples, list(range(domains))), "test": (test_examples, [domains] if held_out else list(range(domains)))}
    train, test = (_kept(recipe, seed, part, number, among) for part, (number, among) in parts.items())
    return Pool(train, test, classes)


def _kept(recipe: Recipe, seed: int, part: str, number: int, domains: Sequence[int]) -> Examples:
    """``drawn_examples``, from disk where they have been drawn before."""
    key = asdict(recipe) | {"version": VERSION, "seed": seed, "part": part, "number": number, "domains": list(domains)}
    kept = cached("scenes", key, lambda: drawn_examples(recipe, seed, part, number, domains))
    return Examples({field: kept[field] for field in (*FIELDS, ENVIRONMENT) if field in kept})
