"""Examples of scenes from a recipe: pictures, their maps and texts, and the tasks about them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedvision.data.examples import (
    ANSWER,
    ANSWER_WEIGHT,
    BOX,
    CAPTION,
    DEPTH,
    ENVIRONMENT,
    EXPRESSION,
    HYPOTHESIS,
    IMAGE,
    LABEL,
    LABELS,
    OBJECTS,
    PROPOSALS,
    QUESTION,
    SECOND_IMAGE,
    SECOND_OBJECTS,
    SEMSEG,
    STATEMENT,
    TRUTH,
    VERDICT,
)
from fedvision.data.scenes.captions import captions
from fedvision.data.scenes.expressions import expressions
from fedvision.data.scenes.hypotheses import hypotheses
from fedvision.data.scenes.layouts import SLOTS, Layouts, layouts
from fedvision.data.scenes.objects import multi_hot, objects_table
from fedvision.data.scenes.pairs import statements
from fedvision.data.scenes.pixels import blurred, depth_maps, draw, quantized, semantic_maps
from fedvision.data.scenes.questions import questions
from fedvision.data.scenes.shown import Shown, shown
from fedvision.data.scenes.styles import Styles, styles
from fedvision.data.texts import encode_texts
from fedvision.errors import DataError
from fedvision.seeds import numpy_generator
from fedvision.settings import nearest

ASKED, SUPPOSED = {QUESTION, ANSWER, ANSWER_WEIGHT}, {HYPOTHESIS, VERDICT}
PAIRED, REFERRED = {SECOND_IMAGE, SECOND_OBJECTS, STATEMENT, TRUTH}, {EXPRESSION, BOX, PROPOSALS}
"""The fields of each task; they are drawn by a generator of its own, if one of them is asked for."""

FIELDS = (
    IMAGE, LABEL, LABELS, CAPTION, DEPTH, SEMSEG, OBJECTS, QUESTION, ANSWER, ANSWER_WEIGHT, HYPOTHESIS, VERDICT, SECOND_IMAGE,
    SECOND_OBJECTS, STATEMENT, TRUTH, EXPRESSION, BOX, PROPOSALS,
)  # fmt: skip
"""The fields that scenes can have, besides ``environment``."""

PIXELS_AT_ONCE = 2**17
"""So many pixels are drawn at once, so that they stay in the processor's cache."""


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
    questions: int
    hypotheses: int
    statements: int
    expressions: int
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


def drawn_examples(recipe: Recipe, seed: int, part: str, number: int, domains: Sequence[int]) -> dict[str, Tensor]:
    """So many pictures of some domains, with the fields that are asked for; another ``part`` is drawn independently."""
    rng, noise_rng = numpy_generator(seed, "scenes", part), numpy_generator(seed, "scenes", part, "noise")
    order = rng.permutation(number)
    environment, label = np.asarray(domains)[order % len(domains)], order // len(domains) % recipe.classes
    style = styles(seed, max(domains) + 1, recipe.shift, recipe.shift_strength * recipe.shifts)
    layout = _layouts(recipe, environment, label, style, rng)
    fields = _pictures(recipe, layout, noise_rng)
    if CAPTION in recipe.fields:
        table = fields[OBJECTS].numpy()
        fields[CAPTION] = encode_texts(captions(table, recipe.size, recipe.wordings, layout.dialect, layout.wording))
    fields |= {LABEL: torch.from_numpy(label), ENVIRONMENT: torch.from_numpy(environment)}
    fields |= Tasks(recipe, seed, part, layout, style).fields(fields)
    kept = (*recipe.fields, ENVIRONMENT) if recipe.shifts else recipe.fields
    return {field: values for field, values in fields.items() if field in kept}


def _layouts(recipe: Recipe, environment: np.ndarray, label: np.ndarray, style: Styles, rng: np.random.Generator) -> Layouts:
    return layouts(environment, label, style, recipe.classes, recipe.objects, round(20 * recipe.clutter), rng)


def _pictures(recipe: Recipe, layout: Layouts, noise_rng: np.random.Generator) -> dict[str, Tensor]:
    """The fields that need pixels, drawn so many pictures at a time."""
    step = max(1, PIXELS_AT_ONCE // recipe.size**2)
    blocks = [_rendered(recipe, layout[start : start + step], noise_rng) for start in range(0, len(layout), step)]
    return {field: torch.from_numpy(np.concatenate([block[field] for block in blocks])) for field in blocks[0]}


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
    if ({OBJECTS, LABELS, CAPTION} | ASKED | SUPPOSED | PAIRED | REFERRED) & set(recipe.fields):
        fields[OBJECTS] = objects_table(layout, drawn, recipe.size)
        fields[LABELS] = multi_hot(fields[OBJECTS], recipe.classes)
    return fields


@dataclass(frozen=True)
class Tasks:
    """The tasks about some pictures, each drawn by a generator of its own, so that none changes with the others.

    Attributes:
        recipe, seed, part: as ``drawn_examples`` has them.
        layout: of the pictures.
        style: of the domains.
    """

    recipe: Recipe
    seed: int
    part: str
    layout: Layouts
    style: Styles

    def fields(self, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The fields of those tasks of which one is asked for, about pictures whose other fields are ``drawn``."""
        recipe, asked, made = self.recipe, set(self.recipe.fields), dict[str, Tensor]()
        if asked & ASKED:
            rng = self._generator(QUESTION)
            made |= questions(self._shown(drawn, rng), recipe.questions, rng)
        if asked & SUPPOSED:
            rng = self._generator(HYPOTHESIS)
            made |= hypotheses(self._shown(drawn, rng), recipe.hypotheses, rng)
        if asked & REFERRED:
            rng = self._generator(EXPRESSION)
            made |= expressions(self._shown(drawn, rng), drawn[OBJECTS].numpy(), recipe.size, recipe.expressions, rng)
        return made | self._paired(drawn) if asked & PAIRED else made

    def _paired(self, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The second pictures, of the same domains and of any classes, and the statements."""
        rng, label_rng = self._generator(SECOND_IMAGE), self._generator(SECOND_IMAGE, "label")
        label = label_rng.integers(self.recipe.classes, size=len(self.layout))
        layout = _layouts(self.recipe, self.layout.environment, label, self.style, rng)
        second = _pictures(replace(self.recipe, fields=(IMAGE, OBJECTS)), layout, self._generator(SECOND_IMAGE, "noise"))
        rng = self._generator(STATEMENT)
        left, right = self._shown(drawn, rng), self._shown(second, rng)
        return {SECOND_IMAGE: second[IMAGE], SECOND_OBJECTS: second[OBJECTS]} | statements(left, right, self.recipe.statements, rng)

    def _shown(self, drawn: Mapping[str, Tensor], rng: np.random.Generator) -> list[Shown]:
        return shown(drawn[OBJECTS].numpy(), self.recipe.size, self.layout.dialect, self.layout.environment, rng)

    def _generator(self, *purpose: str) -> np.random.Generator:
        return numpy_generator(self.seed, "scenes", self.part, *purpose)
