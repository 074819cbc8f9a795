"""What the learners of several modalities share: which there are, the size of the encoder, how pictures are moved."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator

from fedvision import settings
from fedvision.data.federated import Spec
from fedvision.errors import ExperimentError
from fedvision.learners.learner import Holding, Learner
from fedvision.multimae.modalities import DEPTH_MAP, DEPTH_NAME, RGB, RGB_NAME, SEMSEG_NAME, Modality, semantic
from fedvision.multimae.model import SIZES, Size
from fedvision.multimae.views import Moves
from fedvision.settings import Count, Fraction, Positive, PositiveFraction, nearest

Names = tuple[str, ...]

KNOWN = {RGB_NAME: RGB, DEPTH_NAME: DEPTH_MAP, SEMSEG_NAME: semantic(133)}
"""The modalities that need no table."""


def modality_of(name: str, table: Any, known: Modality | None = None) -> Modality:
    """The modality of a table, which may say of a known one what is different; a new one's field is called as it is.

    Raises:
        ExperimentError: an unknown setting, or values that do not go together.
    """
    if not isinstance(table, Mapping):
        raise ExperimentError(f"{name} = {table!r}: expected a table, as {name} = {{ channels = 1 }}")
    given = {"field": name} if known is None else {key: value for key, value in asdict(known).items() if key != "name"}
    return Modality(name=name, **settings.resolve(Modality, given | dict(table), name, frozenset({"name"})))


def _checked(tables: dict[str, Any]) -> dict[str, Any]:
    for name, table in tables.items():
        modality_of(name, table, KNOWN.get(name))
    return tables


@dataclass(frozen=True, kw_only=True)
class Multimodal(Learner):
    """A learner of pictures of several modalities, with an encoder of patches.

    Attributes:
        modalities: further ones than ``rgb``, ``depth`` and ``semseg``, or other settings of these: a table each,
            ``fedvision.multimae.modalities.Modality``.
        semantic_classes: number of classes of ``semseg``.
        semantic_stride: pixels a side that one class stands for, as the encoder takes it.
        class_embedding: width of a class's embedding.
        encoder: its size, by name.
        width: of the encoder's tokens, if not that size's.
        depth: number of its blocks, if not that size's.
        heads: of its attention, if not that size's.
        global_tokens: that the encoder has besides the patches'.
        patch: pixels a side.
        grid: rows and columns of patches that positions are made for, and interpolated from; the pictures' own if not given.
        resolution: pixels a side that pictures are resized to; their own if not given.
        crop_scale: area of a random crop, least and most, as a fraction of the picture's; [1, 1]: none.
        crop_ratio: its width over its height, least and most.
        flip: probability that left and right change places.
        checkpoint: file of weights to begin with: MultiMAE's, timm's, MAE's, or a run's ``model.safetensors``, see
            ``fedvision.multimae.weights``.
    """

    pads_unknown: ClassVar[bool] = False
    """Whether there is a further class for pixels of which none is known."""

    modalities: Annotated[dict[str, Any], AfterValidator(_checked)] = field(default_factory=dict)
    semantic_classes: Count = 133
    semantic_stride: Count = 4
    class_embedding: Count = 64
    encoder: Literal["tiny", "base", "large"] = "tiny"
    width: Count | None = None
    depth: Count | None = None
    heads: Count | None = None
    global_tokens: Count = 1
    patch: Count = 16
    grid: Count | None = None
    resolution: Count | None = None
    crop_scale: tuple[PositiveFraction, PositiveFraction] = (1.0, 1.0)
    crop_ratio: tuple[Positive, Positive] = (0.75, 4 / 3)
    flip: Fraction = 0.5
    checkpoint: str | None = None

    @cached_property
    def known(self) -> Mapping[str, Modality]:
        """All modalities that the settings speak of, by name."""
        classes = semantic(self.semantic_classes, self.semantic_stride, self.class_embedding, self.pads_unknown)
        known = KNOWN | {SEMSEG_NAME: classes}
        return known | {name: modality_of(name, table, known.get(name)) for name, table in self.modalities.items()}

    @property
    def size(self) -> Size:
        """Of the encoder."""
        given = {key: value for key in ("width", "depth", "heads") if (value := getattr(self, key))}
        return replace(SIZES[self.encoder], **given)

    @property
    def moves(self) -> Moves:
        """How pictures are moved in training."""
        return Moves(scale=self.crop_scale, ratio=self.crop_ratio, flip=self.flip, resolution=self.resolution)

    def check_named(self, key: str, names: Names) -> None:
        """Refuse names of modalities that are unknown, or twice there.

        Raises:
            ExperimentError: such names, or none.
        """
        known = [*KNOWN, *self.modalities]
        odd = [name for name in names if name not in known]
        if odd or not names or len(set(names)) < len(names):
            hint = nearest(odd[0], known) if odd else "name each modality once, and one at least"
            raise ExperimentError(f"learner.{key} = {list(names)}: {hint}; further ones belong into learner.modalities")

    def of_data(self, spec: Spec, used: Iterable[Modality], where: str) -> list[Modality]:
        """Modalities as these data have them.

        Args:
            spec: of the data.
            used: the modalities.
            where: the settings that name them, for messages.

        Raises:
            ExperimentError: data that are no images, or that lack a field.
        """
        if len(spec.image_shape) != 3:
            fact = f"learners of modalities need images, the inputs have shape {spec.image_shape}"
            raise ExperimentError(f"{fact}; choose other data")
        for modality in used:
            if spec.fields and modality.field not in spec.fields:
                fact = f"modality {modality.name!r} is the field {modality.field!r}, which the data lack ({', '.join(spec.fields)})"
                raise ExperimentError(f"{fact}; add it to data.fields or data.modalities, or leave it out of {where}")
        return [replace(m, channels=spec.image_shape[0]) if m.kind == "image" else m for m in used]

    def sides(self, spec: Spec) -> tuple[int, int]:
        """Rows and columns of patches of what the network sees.

        Raises:
            ExperimentError: sizes that the patch does not divide.
        """
        height, width = spec.image_shape[1:] if self.resolution is None else (self.resolution,) * 2
        if height % self.patch or width % self.patch:
            fact = f"learner.patch = {self.patch} does not divide images of {height} x {width}"
            raise ExperimentError(f"{fact}; choose another, or have them resized with learner.resolution")
        return height // self.patch, width // self.patch

    def positions(self, spec: Spec) -> tuple[int, int]:
        """Rows and columns that positions are made for: as many of each, which other grids are interpolated from."""
        return (self.grid or max(self.sides(spec)),) * 2

    def holding(self, name: str) -> Holding:
        """Positions never change; they travel where they may be a checkpoint's own, so that the final model has them."""
        return "constant" if name.endswith("pos_emb") and self.checkpoint is None else super().holding(name)
