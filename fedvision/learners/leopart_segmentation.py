"""Leopart judged with labels: a head that says the class of every pixel, on patches that are not trained any more, or are.

Source: arXiv 2204.13101, section 4 and appendix; what the paper leaves open from what its public implementation does.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from fedvision.data.examples import IGNORED, IMAGE, SEMSEG, Examples
from fedvision.data.federated import Spec
from fedvision.errors import DataError, ExperimentError
from fedvision.learners.learner import Holding, Learner, Loss
from fedvision.learners.leopart import SIZES
from fedvision.leopart.backbones import transformer
from fedvision.leopart.heads import FCNHead, LinearHead, Segmenter
from fedvision.leopart.vision import VisionSize
from fedvision.metrics import Metrics, confusion, total
from fedvision.multimae.tasks import TARGET, pixel_loss
from fedvision.multimae.views import image_normalization
from fedvision.registry import learners
from fedvision.settings import Count, Fraction, Positive, PositiveFraction
from fedvision.views import crop_boxes, mirrored, resized

BACKBONE = "backbone."
"""What the names of the transformer's arrays begin with."""

AT_ONCE = 16
"""So many pictures are evaluated at once: the scores of their pixels take memory."""


@learners("leopart-segmentation")
@dataclass(frozen=True, kw_only=True)
class LeopartSegmentation(Learner):
    """The class of every pixel, from the patches of a vision transformer as Leopart left it.

    Pixels of class 255 count nowhere. A frozen transformer does not travel: each silo reads it from its own copy of the checkpoint, and
    the final ``model.safetensors`` holds the head alone.

    Attributes:
        networks: size of the transformer, by name.
        width: of its tokens, if not that size's.
        depth: number of its blocks, if not that size's.
        heads: of its attention, if not that size's.
        patch: pixels a side.
        checkpoint: file of its weights: Leopart's, DINO's, timm's, or a run's ``model.safetensors``; random ones if not given.
        frozen: whether it is not trained.
        drop_path: rate of stochastic depth in its last block, growing linearly from 0 in the first, where it is trained.
        head_kind: ``linear`` or ``fcn``.
        head_width: channels of ``fcn``.
        dropout: rate at which ``fcn`` drops channels.
        semantic_classes: how many classes there are.
        resolution: pixels a side that pictures are resized to; their own if not given.
        side: rows and columns of the scores and labels in training, and of what ``fcn`` works at.
        crop_scale: area of a random crop, least and most, as a fraction of the picture's; [1, 1]: none.
        crop_ratio: its width over its height, least and most.
        flip: probability that left and right change places.

    Source: arXiv 2204.13101, section 4 and appendix. The other half of the recipe belongs to the strategy: SGD with rate 0.01, momentum
        0.9 and weight decay 1e-4, schedule ``epoch-steps``.
    Differs: a class that neither occurs nor is predicted is left out of the mean IoU, and does not count as 0; ``fcn`` is evaluated at the
        size that it is trained at.
    """

    learns_unlabeled = True

    networks: Literal["tiny", "small", "base"] = "tiny"
    width: Count | None = None
    depth: Count | None = None
    heads: Count | None = None
    patch: Count = 16
    checkpoint: str | None = None
    frozen: bool = True
    drop_path: Fraction = 0.0
    head_kind: Literal["linear", "fcn"] = "linear"
    head_width: Count = 512
    dropout: Fraction = 0.1
    semantic_classes: Count = 21
    resolution: Count | None = None
    side: Count = 100
    crop_scale: tuple[PositiveFraction, PositiveFraction] = (0.8, 1.0)
    crop_ratio: tuple[Positive, Positive] = (0.75, 4 / 3)
    flip: Fraction = 0.5

    def __post_init__(self) -> None:
        if self.semantic_classes > IGNORED:
            raise ExperimentError(f"learner.semantic_classes = {self.semantic_classes}; ids are bytes, choose at most {IGNORED}")

    # ---- the model -----------------------------------------------------------------------------------------------

    def build(self, spec: Spec, rng: torch.Generator) -> Segmenter:
        """The transformer, with the checkpoint's weights if there is one, and a new head.

        Raises:
            ExperimentError: data that are no pictures; sizes that do not fit together; a checkpoint that does not.
        """
        size = self.size(spec)
        backbone = transformer(size, rng, 0.0 if self.frozen else self.drop_path, self.checkpoint)
        return Segmenter(backbone, self._head(size.width, rng), self.frozen)

    def size(self, spec: Spec) -> VisionSize:
        """Of the transformer for these data.

        Raises:
            ExperimentError: data that are no pictures; a patch that does not divide them.
        """
        if len(spec.image_shape) != 3:
            raise ExperimentError(f"Leopart needs images, the inputs have shape {spec.image_shape}; choose other data")
        channels, *sides = spec.image_shape
        if any(side % self.patch for side in ([self.resolution] if self.resolution else sides)):
            fact = f"learner.patch = {self.patch} does not divide images of {' x '.join(map(str, sides))}"
            raise ExperimentError(f"{fact}; choose another, or have them resized with learner.resolution")
        given = {key: value for key in ("width", "depth", "heads") if (value := getattr(self, key))}
        return replace(SIZES[self.networks].vision, side=self.resolution or max(sides), patch=self.patch, channels=channels, **given)

    def _head(self, width: int, rng: torch.Generator) -> LinearHead | FCNHead:
        if self.head_kind == "linear":
            return LinearHead(width, self.semantic_classes, rng)
        return FCNHead(width, self.semantic_classes, self.side, rng, self.head_width, self.dropout)

    def holding(self, name: str) -> Holding:
        """A frozen transformer never changes."""
        return "constant" if self.frozen and name.startswith(BACKBONE) else super().holding(name)

    @property
    def digest(self) -> str:
        """Of the checkpoint's file."""
        if self.checkpoint is None or not Path(self.checkpoint).is_file():
            return ""
        with Path(self.checkpoint).open("rb") as file:
            hasher = blake2b(digest_size=8)
            while block := file.read(2**20):
                hasher.update(block)
        return hasher.hexdigest()

    # ---- batches -------------------------------------------------------------------------------------------------

    def train_view(self, batch: Examples, rng: torch.Generator) -> Examples:
        """Pictures cropped, mirrored and normalized, and the classes of so many of their pixels as there are scores.

        Returns:
            ``image`` [n, c, h, w]; ``target`` uint8 [n, side, side].

        Raises:
            DataError: maps of another shape, or with other classes.
        """
        ids, images = self._ids(batch), batch.image
        boxes = crop_boxes(images, self.crop_scale, self.crop_ratio, rng) if self.crop_scale != (1.0, 1.0) else None
        seen = resized(images, self._seen_at(images), boxes, cubic=False)
        maps = resized(ids[:, None], self._seen_at(images), boxes, smooth=False)
        flipped = torch.rand(len(batch), generator=rng) < self.flip
        pictures = image_normalization(images.shape[1])(mirrored(seen, flipped))
        return Examples({IMAGE: pictures, TARGET: reduced(mirrored(maps, flipped)[:, 0], self.side)})

    def _seen_at(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[-2:]
        return self.resolution or height, self.resolution or width

    def _ids(self, batch: Examples) -> UInt8[Tensor, "n h w"]:
        """The maps of a batch; 255 everywhere where there is none."""
        if SEMSEG not in batch:
            return torch.full((len(batch), *batch.image.shape[-2:]), IGNORED, dtype=torch.uint8, device=batch.device)
        ids = batch.fields[SEMSEG]
        if ids.shape[1:] != batch.image.shape[-2:]:
            fact = f"maps of {list(ids.shape[1:])} do not lie on images of {list(batch.image.shape[-2:])}"
            raise DataError(f"{fact}; give each pixel of the image one class")
        wrong = ids[((ids < 0) | (ids >= self.semantic_classes)) & (ids != IGNORED)]
        if len(wrong):
            fact = f"field {SEMSEG!r} holds the class {int(wrong[0])}, beyond 0..{self.semantic_classes - 1} and {IGNORED}"
            raise DataError(f"{fact}; raise learner.semantic_classes")
        return ids.to(torch.uint8)

    # ---- loss and metrics ----------------------------------------------------------------------------------------

    def loss(self, model: Callable[..., Any], batch: Examples, progress: float, rng: torch.Generator) -> Loss:
        """Cross-entropy, the mean over the pixels of the batch whose class is known; where none is, a 0 that teaches nothing."""
        target = batch.fields[TARGET]
        if (target == IGNORED).all():
            return Loss(torch.zeros((), device=target.device, requires_grad=True))
        return Loss(pixel_loss(model(batch.image, tuple(target.shape[1:])), target.long()))

    def evaluate(self, model: nn.Module, batch: Examples) -> Metrics:
        """``miou``, ``macc`` and ``aacc`` of all pixels of the maps, of pictures of which some class is known."""
        return total(self._measured(model, part) for part in batch.batches(AT_ONCE))

    def _measured(self, model: nn.Module, batch: Examples) -> Metrics:
        ids = self._ids(batch)
        known = (ids != IGNORED).flatten(1).any(1)
        images, truth = batch.image[known], ids[known].long()
        if not len(truth):
            return Metrics(0, {})
        seen = image_normalization(images.shape[1])(resized(images, self._seen_at(images), cubic=False))
        scores = model(seen, tuple(truth.shape[1:]))
        each = torch.stack([pixel_loss(scores[i : i + 1], truth[i : i + 1]) for i in range(len(truth))])
        return Metrics.of_batch(
            {"loss": each.double().sum()}, len(truth), confusions={"": confusion(truth, scores.argmax(1), scores.shape[1])}
        )


def reduced(ids: UInt8[Tensor, "n h w"], side: int) -> UInt8[Tensor, "n side side"]:
    """Of maps of classes the nearest pixels of a square of so many rows and columns: that at floor(i h / side)."""
    return ids if tuple(ids.shape[1:]) == (side, side) else F.interpolate(ids[:, None], (side, side), mode="nearest")[:, 0]
