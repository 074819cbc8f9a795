"""Modalities: what there is of one picture, and how a network takes and predicts it."""

from dataclasses import dataclass
from typing import Literal

from fedvision.data.examples import DEPTH, IMAGE, SEMSEG
from fedvision.errors import ExperimentError
from fedvision.settings import Count

RGB_NAME, DEPTH_NAME, SEMSEG_NAME = "rgb", "depth", "semseg"
"""The names that published checkpoints use."""


@dataclass(frozen=True, kw_only=True)
class Modality:
    """One modality.

    Attributes:
        name: in state dicts and settings.
        field: of the examples.
        channels: of its values; of a map of classes their number.
        kind: what is done before the network sees it. ``image``: normalized as ImageNet's are; ``depth``: standardized, each
            picture by itself; ``values``: nothing; ``classes``: whole numbers, which are embedded.
        loss: of the prediction.
        stride: so many pixels a side one value stands for.
        embedding: width of a class's embedding.
        padded: whether a further class stands for what is not known, in checkpoints after fine-tuning.
        interpolated: whether embeddings are shrunk bilinearly before they are projected, instead of projected patch by patch.
    """

    name: str
    field: str
    channels: Count
    kind: Literal["image", "depth", "values", "classes"] = "values"
    loss: Literal["mse", "l1", "cross-entropy"] = "l1"
    stride: Count = 1
    embedding: Count = 64
    padded: bool = False
    interpolated: bool = False

    def __post_init__(self) -> None:
        if "." in self.name or not self.name:
            raise ExperimentError(f"a modality cannot be called {self.name!r}; choose a name without dots")
        if (self.kind == "classes") != (self.loss == "cross-entropy"):
            fact = f"modality {self.name!r} has kind = {self.kind!r} and loss = {self.loss!r}"
            raise ExperimentError(f"{fact}; 'classes' and 'cross-entropy' go together")
        if self.field == IMAGE and self.kind == "classes":
            raise ExperimentError(f"modality {self.name!r} takes the field 'image' for classes; use kind = 'image' or 'values'")

    def cell(self, patch: int) -> int:
        """Values a side of one patch of so many pixels.

        Raises:
            ExperimentError: the patch is no multiple of ``stride``.
        """
        if patch % self.stride:
            fact = f"patches of {patch} pixels cannot hold values of {self.stride} pixels each"
            raise ExperimentError(f"modality {self.name!r}: {fact}; make learner.patch a multiple of the stride")
        return patch // self.stride


RGB = Modality(name=RGB_NAME, field=IMAGE, channels=3, kind="image", loss="mse")
DEPTH_MAP = Modality(name=DEPTH_NAME, field=DEPTH, channels=1, kind="depth", loss="l1")


def semantic(classes: int, stride: int = 4, embedding: int = 64, padded: bool = False, interpolated: bool = False) -> Modality:
    """The map of so many classes, one value for ``stride`` x ``stride`` pixels."""
    return Modality(
        name=SEMSEG_NAME,
        field=SEMSEG,
        channels=classes,
        kind="classes",
        loss="cross-entropy",
        stride=stride,
        embedding=embedding,
        padded=padded,
        interpolated=interpolated,
    )
