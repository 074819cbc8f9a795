"""Views: the modalities of a batch as the network sees them, moved together, so that each pixel keeps its maps."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from fedvision.data.examples import IGNORED, Examples
from fedvision.errors import DataError
from fedvision.multimae.losses import standardized_depth
from fedvision.multimae.modalities import Modality
from fedvision.normalization import Normalization
from fedvision.views import Box, along, crop_boxes, mirrored, resized

IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Of red, green and blue."""

Values = dict[str, Tensor]
"""By modality: float [n, channels, height, width], NaN where not known, or classes int [n, height, width], ``IGNORED`` there."""


def present(batch: Examples, modalities: Iterable[Modality]) -> Bool[Tensor, "n modalities"]:
    """Which modalities each example has, on the CPU."""
    return torch.stack([batch.having(modality.field) for modality in modalities], dim=1).cpu()


def raw(batch: Examples, modalities: Iterable[Modality]) -> Values:
    """The modalities that some example of a batch has, marked where they are not known.

    Raises:
        DataError: a field of a shape or with classes that the modality does not have.
    """
    held = {modality: batch.having(modality.field) for modality in modalities}
    return {modality.name: _marked(batch.fields[modality.field], there, modality) for modality, there in held.items() if there.any()}


@dataclass(frozen=True, kw_only=True)
class Moves:
    """How pictures are moved at random.

    Attributes:
        scale: area of a crop, least and most, as a fraction of the picture's; (1, 1): none.
        ratio: its width over its height, least and most.
        flip: probability that left and right change places.
        resolution: pixels a side afterwards; as before if None.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    resolution: int | None = None

    def __call__(self, values: Values, rng: torch.Generator | None = None) -> Values:
        """All modalities moved alike; without a generator only resized."""
        boxes = None
        if rng is not None and self.scale != (1.0, 1.0):
            boxes = crop_boxes(next(iter(values.values())), self.scale, self.ratio, rng)
        if boxes is not None or self.resolution is not None:
            values = {name: self._resized(held, boxes) for name, held in values.items()}
        if rng is None or not self.flip:
            return values
        flipped = torch.rand(len(next(iter(values.values()))), generator=rng) < self.flip
        return {name: mirrored(held, flipped) for name, held in values.items()}

    def _resized(self, values: Tensor, boxes: list[Box] | None) -> Tensor:
        """Cropped and resized: pictures bicubically, maps to the nearest value."""
        height, width = values.shape[-2:]
        pictures = values.ndim == 4 and values.shape[1] == 3
        channeled = values if values.ndim == 4 else values[:, None]
        moved = resized(channeled, (self.resolution or height, self.resolution or width), boxes, smooth=pictures)
        return values if moved is channeled else moved.reshape(*values.shape[:-2], *moved.shape[-2:])


def as_seen(values: Values, modalities: Mapping[str, Modality]) -> Values:
    """Values as the network sees them: pictures normalized, depth standardized, of maps of classes one a ``stride``."""
    return {name: _as_seen(held, modalities[name]) for name, held in values.items()}


def image_normalization(channels: int) -> Normalization:
    """ImageNet's; of other than three channels each gets the average."""
    return IMAGENET.of_channels(channels)


def _marked(values: Tensor, there: Bool[Tensor, "n"], modality: Modality) -> Tensor:
    _check(values, modality)
    if modality.kind == "classes":
        marked = torch.where(along(there, values), values.to(torch.int64), IGNORED)
        _check_classes(marked, modality)
        return marked
    known = along(there, values).expand_as(values)
    if modality.kind == "depth":
        known = known & (values > 0)
    return torch.where(known, values.float(), torch.nan)


def _check(values: Tensor, modality: Modality) -> None:
    shape = list(values.shape[1:])
    if modality.kind == "classes":
        fits = len(shape) == 2
    else:
        fits = len(shape) == 3 and (modality.kind == "image" or shape[0] == modality.channels)
    if not fits:
        expected = "[height, width]" if modality.kind == "classes" else f"[{modality.channels}, height, width]"
        fact = f"field {modality.field!r} has the shape {shape} per example, modality {modality.name!r} is {expected}"
        raise DataError(f"{fact}; name another field, or set learner.modalities.{modality.name}.channels")


def _check_classes(ids: Tensor, modality: Modality) -> None:
    wrong = ids[((ids < 0) | (ids >= modality.channels)) & (ids != IGNORED)]
    if len(wrong):
        fact = f"field {modality.field!r} holds the class {int(wrong[0])}, modality {modality.name!r} has {modality.channels} (0, 1, ...)"
        raise DataError(f"{fact}; raise learner.semantic_classes, or write {IGNORED} for pixels to be ignored")


def _as_seen(values: Tensor, modality: Modality) -> Tensor:
    if modality.kind == "image":
        return image_normalization(values.shape[1])(values)
    if modality.kind == "depth":
        return standardized_depth(values)
    return values[..., modality.stride // 2 :: modality.stride, modality.stride // 2 :: modality.stride]
