"""Scenes: small pictures of shapes in a room, drawn from a seed, with labels, captions, depth and semantic maps that agree.

``layouts`` says what is where, ``styles`` how domains differ, ``pixels`` draws it, ``captions`` puts it into words.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor

from fedvision.cache import cached
from fedvision.data.examples import CAPTION, DEPTH, ENVIRONMENT, IMAGE, LABEL, LABELS, OBJECTS, SEMSEG, Examples
from fedvision.data.pool import Pool
from fedvision.data.scenes.captions import WORDINGS, captions
from fedvision.data.scenes.layouts import SLOTS, Layouts, layouts
from fedvision.data.scenes.objects import COLUMNS, MENTIONED, multi_hot, objects_table
from fedvision.data.scenes.pixels import blurred, depth_maps, draw, quantized, semantic_maps
from fedvision.data.scenes.shapes import SHAPES
from fedvision.data.scenes.styles import BACKGROUNDS, COLORS, SHIFTS, TEXTURES, styles
from fedvision.data.texts import encode_texts
from fedvision.errors import DataError
from fedvision.registry import datasets
from fedvision.seeds import numpy_generator
from fedvision.settings import Count, Fraction, nearest

__all__ = ["BACKGROUNDS", "COLORS", "COLUMNS", "FIELDS", "MENTIONED", "SHAPES", "SHIFTS", "TEXTURES", "scenes"]

FIELDS = (IMAGE, LABEL, LABELS, CAPTION, DEPTH, SEMSEG, OBJECTS)
"""The fields that scenes can have, besides ``environment``."""

VERSION = 1
"""Raise it when the same settings begin to give other pictures: what is on disk is not read any more."""

PIXELS_AT_ONCE = 2**17
"""So many pixels are drawn at once, so that they stay in the processor's cache."""

Classes = Annotated[int, Ge(2), Le(100)]
Side = Annotated[int, Ge(16), Le(512)]
Objects = Annotated[int, Ge(1), Le(SLOTS)]
Wordings = Annotated[int, Ge(1), Le(len(WORDINGS))]
Shift = Literal["palette", "texture", "background", "blur", "rotation", "wording"]


@dataclass(frozen=True)
class Recipe:
    """What pictures depend on, besides the seed and their number; the settings of ``scenes``."""

    size: int
    classes: int
    objects: tuple[int, int]
    clutter: float
    noise: float
    domains: int
    shift: tuple[str, ...]
    shift_strength: float
    held_out: bool
    wordings: int
    fields: tuple[str, ...]

    def __post_init__(self) -> None:
        for field in self.fields:
            if field not in FIELDS:
                raise DataError(f"scenes.fields names {field!r}; {nearest(field, list(FIELDS))}")
        if IMAGE not in self.fields:
            raise DataError(f"scenes.fields = {list(self.fields)} has no {IMAGE!r}; name it too")
        if not 1 <= self.objects[0] <= self.objects[1] <= SLOTS:
            raise DataError(f"scenes.objects = {list(self.objects)}; give the fewest and the most objects of a picture, 1 to {SLOTS}")

    @property
    def shifts(self) -> bool:
        """Whether there is more than one domain."""
        return self.domains > 1 or self.held_out


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
        fields: that are kept.
        draw_seed: of the pictures; not given: they follow the experiment's seed.
        rng: draws the seed, if none is given.

    Raises:
        DataError: an unknown field or shift, or no range of objects.
    """
    recipe = Recipe(size, classes, objects, clutter, noise, domains, tuple(shift), shift_strength, held_out, wordings, tuple(fields))
    seed = int(rng.integers(2**62)) if draw_seed is None else draw_seed
    parts = {"train": (examples, list(range(domains))), "test": (test_examples, [domains] if held_out else list(range(domains)))}
    train, test = (_kept(recipe, seed, part, number, among) for part, (number, among) in parts.items())
    return Pool(train, test, classes)


def _kept(recipe: Recipe, seed: int, part: str, number: int, domains: Sequence[int]) -> Examples:
    """``drawn_examples``, from disk where they have been drawn before."""
    key = asdict(recipe) | {"version": VERSION, "seed": seed, "part": part, "number": number, "domains": list(domains)}
    kept = cached("scenes", key, lambda: drawn_examples(recipe, seed, part, number, domains))
    return Examples({field: kept[field] for field in (*FIELDS, ENVIRONMENT) if field in kept})


def drawn_examples(recipe: Recipe, seed: int, part: str, number: int, domains: Sequence[int]) -> dict[str, Tensor]:
    """So many pictures of some domains, with the fields that are asked for; another ``part`` is drawn independently."""
    rng, noise_rng = numpy_generator(seed, "scenes", part), numpy_generator(seed, "scenes", part, "noise")
    order = rng.permutation(number)
    environment, label = np.asarray(domains)[order % len(domains)], order // len(domains) % recipe.classes
    style = styles(seed, max(domains) + 1, recipe.shift, recipe.shift_strength * recipe.shifts)
    layout = layouts(environment, label, style, recipe.classes, recipe.objects, round(20 * recipe.clutter), rng)
    step = max(1, PIXELS_AT_ONCE // recipe.size**2)
    blocks = [_rendered(recipe, layout[start : start + step], noise_rng) for start in range(0, number, step)]
    fields = {field: torch.from_numpy(np.concatenate([block[field] for block in blocks])) for field in blocks[0]}
    if CAPTION in recipe.fields:
        table = fields[OBJECTS].numpy()
        fields[CAPTION] = encode_texts(captions(table, recipe.size, recipe.wordings, layout.dialect, layout.wording))
    fields |= {LABEL: torch.from_numpy(label), ENVIRONMENT: torch.from_numpy(environment)}
    kept = (*recipe.fields, ENVIRONMENT) if recipe.shifts else recipe.fields
    return {field: values for field, values in fields.items() if field in kept}


def _rendered(recipe: Recipe, layout: Layouts, noise_rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The fields of some pictures that need their pixels."""
    drawn = draw(layout, recipe.size)
    image = blurred(drawn.image, layout.blur * recipe.size)
    if recipe.noise:
        image = image + recipe.noise * noise_rng.standard_normal(image.shape)
    fields = {IMAGE: quantized(image)}
    if DEPTH in recipe.fields:
        fields[DEPTH] = depth_maps(layout, drawn.owner)[:, None]
    if SEMSEG in recipe.fields:
        fields[SEMSEG] = semantic_maps(layout, drawn.owner)
    if {OBJECTS, LABELS, CAPTION} & set(recipe.fields):
        fields[OBJECTS] = objects_table(layout, drawn, recipe.size)
        fields[LABELS] = multi_hot(fields[OBJECTS], recipe.classes)
    return fields
