"""Examples: named tensors that share their first dimension."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from fedvision.errors import DataError

IMAGE, LABEL, ENVIRONMENT = "image", "label", "environment"
"""The field names that every data set shares: inputs, float [n, ...], or uint8 [n, ...] that stand for value / 255; the class index,
int64 [n], -1 where unlabeled; the number of the domain, int64 [n]."""

CAPTION, DEPTH, SEMSEG, LABELS, OBJECTS = "caption", "depth", "semseg", "labels", "objects"
"""The field names of sets that have more: texts in several wordings, uint8 [n, wordings, length] (``fedvision.data.texts``); meters,
float32 [n, 1, h, w], larger is farther, 0 where nothing was measured; class ids, uint8 [n, h, w], ``IGNORED`` where none is known;
all classes to be seen, uint8 [n, classes] of 0 and 1; what is where, float32 [n, 4, columns] (``fedvision.data.scenes``)."""

QUESTION, ANSWER, ANSWER_WEIGHT = "question", "answer", "answer_weight"
"""The field names of sets of questions: several for each example, uint8 [n, questions, length]; the different answers to each that people
gave, uint8 [n, questions, answers, length], and how much each of them counts, float32 [n, questions, answers], 0 where there is none."""

HYPOTHESIS, VERDICT = "hypothesis", "verdict"
"""The field names of sets for entailment: sentences, uint8 [n, hypotheses, length]; what the picture says of each, int64 [n, hypotheses]:
0: it contradicts it, 1: it leaves it open, 2: it entails it, -1: there is no such sentence."""

SECOND_IMAGE, SECOND_OBJECTS, STATEMENT, TRUTH = "second_image", "second_objects", "statement", "truth"
"""The field names of sets of pairs of pictures: the right one, as ``image``, which is the left one; what is where in it, as ``objects``;
sentences about both, uint8 [n, statements, length]; whether each is true, int64 [n, statements] of 0 and 1, -1 where there is none."""

EXPRESSION, BOX, PROPOSALS = "expression", "box", "proposals"
"""The field names of sets for grounding: words that fit one thing in the picture only, uint8 [n, expressions, length]; where it is, float32
[n, expressions, 4], left, top, right and bottom in pixels; boxes to choose from, float32 [n, proposals, 4]; all 0 where there is none."""

TEXTS = (CAPTION, QUESTION, ANSWER, HYPOTHESIS, STATEMENT, EXPRESSION)
"""The fields that hold texts, uint8 [n, ..., length] (``fedvision.data.texts``)."""

IGNORED = 255
"""The id in a semantic map of pixels that count for nothing."""

NOTHING = {SEMSEG: IGNORED, VERDICT: -1, TRUTH: -1}
"""The value where an example lacks a field, of those whose 0 means something."""


def has(field: str) -> str:
    """The name of the field, bool [n], that says which examples have ``field``; where it is False, the values of ``field`` mean nothing.

    They are 0 then, or what ``NOTHING`` says. Where there is no such field, all examples have what there is a field of; where
    there is no ``field`` either, none has it. ``Examples.having`` knows all of this.

    >>> has("depth")
    'has_depth'
    """
    return f"has_{field}"


@dataclass(frozen=True)
class Examples:
    """A set of examples, or a batch of them: one tensor a field, example i at index i of each.

    Attributes:
        fields: ``image`` float [n, ...] or uint8 [n, ...], which stand for value / 255; ``label`` int64 [n], -1 where it is
            not known; ``environment`` int64 [n] where known; ... ``has_<field>`` bool [n], where some examples lack a field.

    Example:
        >>> batch = Examples({"image": torch.zeros(3, 1, 8, 8), "label": torch.tensor([0, 1, 1])})
        >>> len(batch), len(batch[1:])
        (3, 2)
    """

    fields: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.fields.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"the fields of a data set differ in length: {lengths}; give one value per example in each")

    def __len__(self) -> int:
        return len(next(iter(self.fields.values()), ()))

    def __getitem__(self, index: slice | Tensor) -> "Examples":
        """The examples at ``index``: a slice gives views, a tensor of indices copies."""
        return Examples({name: values[index] for name, values in self.fields.items()})

    def __contains__(self, field: str) -> bool:
        return field in self.fields

    def having(self, field: str) -> Bool[Tensor, "n"]:
        """Which examples have ``field``: those that ``has_<field>`` says, all if there is none, none if there is no ``field``.

        >>> batch = Examples({"image": torch.zeros(2, 3, 8, 8), "depth": torch.zeros(2, 1, 8, 8), "has_depth": torch.tensor([True, False])})
        >>> [batch.having(field).tolist() for field in ("image", "depth", "semseg")]
        [[True, True], [True, False], [False, False]]
        """
        if field not in self.fields:
            like = next(iter(self.fields.values()), torch.empty(0))
            return torch.zeros(len(self), dtype=torch.bool, device=like.device)
        values = self.fields[field]
        return self.fields.get(has(field), torch.ones(len(values), dtype=torch.bool, device=values.device))

    def batches(self, size: int) -> Iterator["Examples"]:
        """Consecutive batches of ``size`` in storage order, the last one possibly smaller."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def to(self, device: torch.device | str) -> "Examples":
        """The same examples on ``device``; themselves if they are there."""
        return Examples({name: values.to(device) for name, values in self.fields.items()})

    def decoded(self) -> "Examples":
        """The same examples with images, the second ones of pairs too, as float32 in [0, 1], if they are stored as bytes."""
        bytes_ = [name for name in (IMAGE, SECOND_IMAGE) if name in self.fields and self.fields[name].dtype == torch.uint8]
        return Examples({**self.fields, **{name: self.fields[name].to(torch.float32) / 255 for name in bytes_}}) if bytes_ else self

    @property
    def device(self) -> torch.device:
        """Where the examples are."""
        return self.image.device

    @property
    def image(self) -> Tensor:
        """Inputs, float or uint8 [n, ...]."""
        return self.fields[IMAGE]

    @property
    def label(self) -> Tensor:
        """Class indices, int64 [n]; -1 where the class is not known."""
        return self.fields[LABEL]


def concatenate(parts: Sequence[Examples]) -> Examples:
    """All examples of ``parts`` in order; the parts must have the same fields and shapes."""
    names = list(parts[0].fields)
    for i, part in enumerate(parts):
        if list(part.fields) != names:
            raise DataError(f"part {i} has the fields {list(part.fields)}, part 0 has {names}; give all the same fields")
        for name in names:
            here, first = part.fields[name].shape[1:], parts[0].fields[name].shape[1:]
            if here != first:
                raise DataError(f"field {name!r} of part {i} has shape {tuple(here)} per example, part 0 has {tuple(first)}")
    return Examples({name: torch.cat([part.fields[name] for part in parts]) for name in names})
