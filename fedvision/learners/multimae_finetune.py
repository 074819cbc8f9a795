"""Fine-tuning of MultiMAE: a picture's class, the class of each pixel, or its depth, from any of its modalities.

Source: arXiv 2204.01678, section 4 and appendix; what the paper leaves open from what its public implementation does.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from fedvision.augmentation import drawn_seed, mixed, training_transform, transformed
from fedvision.data.examples import Examples
from fedvision.data.federated import Spec
from fedvision.errors import DataError, ExperimentError
from fedvision.learners.learner import Group, Loss
from fedvision.learners.multimodal import Multimodal, Names
from fedvision.metrics import Metrics, total
from fedvision.multimae.dpt import DPTHead, evenly
from fedvision.multimae.finetuned import CLS_HEAD, MultiViT
from fedvision.multimae.heads import ConvNeXtHead, Head, LinearHead, SegmenterHead
from fedvision.multimae.modalities import RGB_NAME
from fedvision.multimae.photographs import Colors, Zoom
from fedvision.multimae.tasks import TARGET, Classification, DepthLoss, DepthRegression, Segmentation, Task, judged
from fedvision.multimae.transformer import initialized
from fedvision.multimae.views import Values, as_seen, image_normalization, raw
from fedvision.multimae.weights import initialized_from
from fedvision.registry import learners
from fedvision.seeds import global_generators
from fedvision.settings import Count, Fraction, NonNegative, Positive, PositiveFraction

HEADS: Mapping[str, tuple[str, ...]] = {
    "classification": ("linear",),
    "semseg": ("convnext", "segmenter", "dpt"),
    "depth": ("dpt", "convnext"),
}
"""The heads of each task, its usual one first."""

AT_ONCE = 32
"""So many examples are evaluated at once: what is predicted of their pixels takes memory."""

Jitter = tuple[NonNegative, NonNegative, NonNegative, Annotated[float, Ge(0), Le(0.5)]]


@learners("multimae-finetune")
@dataclass(frozen=True, kw_only=True)
class MultiMAEFineTuning(Multimodal):
    """MultiMAE's encoder with a head for one task: a picture's class, the class of each pixel, or its depth.

    Nothing is masked. A picture that lacks a modality is encoded without its patches, unless the head reads them; then its values
    are the mean ones. What is not known of a target (label -1, class 255, no depth) counts nowhere: a silo that knows nothing of it
    learns nothing, and leaves the weights as they are.

    Attributes:
        task: ``classification``; ``semseg``, the class of each pixel; ``depth``, in meters.
        inputs: the modalities that the encoder sees: ``rgb``, ``depth``, ``semseg``, or of ``modalities``.
        head: ``linear`` for classes of pictures; ``convnext`` or ``dpt`` for pixels, ``segmenter`` for their classes only. The paper's
            if not given: ``linear``, ``convnext``, and ``dpt`` for depth.
        reads: the modalities whose patches a head for pixels takes; ``rgb`` if not given, and all inputs where that is none.
        pooling: what the linear head takes: the mean of all tokens, or the global one.
        head_width: channels of a patch in the ConvNeXt head (8 times the encoder's width if not given), width of the Segmenter's
            tokens (the encoder's), or of DPT's layers (256, or the encoder's width if that is less).
        head_depth: number of blocks of the ConvNeXt head (4 if not given) or of the Segmenter (2).
        first_ignored: whether classes of pixels are counted from 1, and 0 stands for none of them, as in ADE20K.
        depth_mean: meters, that targets are normalized with; NYUv2's.
        depth_deviation: meters, that targets are normalized with; NYUv2's.
        depth_loss: ``berhu``, ``l1`` or ``mse``, of normalized depths.
        drop_path: rate of stochastic depth in the last block, growing linearly from 0 in the first.
        layer_decay: d: the learning rate of block i, counted from 1, of L is multiplied by d^(L + 1 - i), that of what comes before
            the first by d^(L + 1).
        zoom: factors, least and most, that pictures are made smaller or larger by, in a frame of the same size.
        colors: brightness, contrast, saturation and hue, by how much they change, see ``fedvision.multimae.photographs.Colors``.
        colors_changed: probability that they do.
        gray: probability that a picture becomes gray.
        randaugment: timm's description, as ``rand-m9-mstd0.5-inc1``, for a picture's class from ``rgb`` alone; empty: none.
        evaluation_crop: side of the center that is evaluated, as a fraction of the picture's.
        mixup: alpha of Beta(alpha, alpha) of blended pictures, for classification; 0: none.
        cutmix: the same for pictures with a box of another; 0: none.
        smoothing: share of a picture's class that is spread over all, in training.

    Source: arXiv 2204.01678, section 4 and appendix. The other half of the recipe belongs to the strategy: AdamW (0.9, 0.999) with
        weight decay 0.05 and schedule ``warmup-cosine``.
    Differs: float32 throughout, and no random erasing; where depth is not known, it does not enter a picture's standardization.
    """

    pads_unknown: ClassVar[bool] = True

    task: Literal["classification", "semseg", "depth"] = "classification"
    inputs: Names = (RGB_NAME,)
    head_kind: Literal["linear", "convnext", "segmenter", "dpt"] | None = None
    reads: Names = ()
    pooling: Literal["mean", "global"] = "mean"
    head_width: Count | None = None
    head_depth: Count | None = None
    first_ignored: bool = False
    depth_mean: float = 2.0707764
    depth_deviation: Positive = 0.7775723
    depth_loss: DepthLoss = "berhu"
    drop_path: Fraction = 0.1
    layer_decay: PositiveFraction = 0.75
    zoom: tuple[Positive, Positive] = (1.0, 1.0)
    colors: Jitter = (0.0, 0.0, 0.0, 0.0)
    colors_changed: Fraction = 0.5
    gray: Fraction = 0.0
    randaugment: str = ""
    evaluation_crop: PositiveFraction = 1.0
    mixup: NonNegative = 0.8
    cutmix: NonNegative = 1.0
    smoothing: Fraction = 0.1

    def __post_init__(self) -> None:
        self.check_named("inputs", self.inputs)
        if self.head_kind not in (None, *HEADS[self.task]):
            fact = f"learner.head_kind = {self.head_kind!r} is no head for learner.task = {self.task!r}"
            raise ExperimentError(f"{fact}; choose {' or '.join(HEADS[self.task])}")
        if unread := [name for name in self.reads if name not in self.inputs]:
            raise ExperimentError(
                f"learner.reads names {unread[0]!r}, which is not among learner.inputs = {list(self.inputs)}; add it there"
            )
        predicted = self._task.modality
        if shown := [name for name in self.inputs if predicted and self.known[name].field == predicted.field]:
            fact = f"learner.inputs names {shown[0]!r}, whose field is what learner.task = {self.task!r} is to predict"
            raise ExperimentError(f"{fact}; leave it out, or give it another field in learner.modalities")
        self._check_views()

    def _check_views(self) -> None:
        """Refuse changes of pictures that the inputs do not allow."""
        if self.randaugment and (self.task != "classification" or self.inputs != (RGB_NAME,)):
            fact = "learner.randaugment moves pictures without their maps"
            raise ExperimentError(f"{fact}; leave it out, or choose task = 'classification' and inputs = ['rgb']")
        whole = [name for name in self.inputs if self.known[name].kind == "classes" or self.known[name].stride > 1]
        if self._mixes and whole:
            fact = f"learner.mixup and learner.cutmix cannot mix {whole[0]!r}, which has classes, or less than a value a pixel"
            raise ExperimentError(f"{fact}; set both to 0")
        if self.zoom[0] > self.zoom[1]:
            raise ExperimentError(f"learner.zoom = {list(self.zoom)}; give the least factor first")

    @property
    def learns_unlabeled(self) -> bool:  # type: ignore[override]
        """Whether the task needs no class of the whole picture."""
        return self.task != "classification"

    @property
    def _mixes(self) -> bool:
        return self.task == "classification" and bool(self.mixup or self.cutmix)

    @property
    def _task(self) -> Task:
        if self.task == "classification":
            return Classification(self.smoothing)
        if self.task == "semseg":
            return Segmentation(self.semantic_classes, self.first_ignored)
        return DepthRegression(self.depth_mean, self.depth_deviation, self.depth_loss)

    # ---- the model -----------------------------------------------------------------------------------------------

    def build(self, spec: Spec, rng: torch.Generator) -> MultiViT:
        """The encoder, with the checkpoint's weights if there is one, and a new head.

        Raises:
            ExperimentError: data that are no images, lack a field or have no classes; sizes that do not fit together; a checkpoint
                that does not.
        """
        modalities = self.of_data(spec, [self.known[name] for name in self.inputs], "learner.inputs")
        self.of_data(spec, [self._task.modality] if self._task.modality else [], "learner.task")
        grid = self.positions(spec)
        with global_generators(rng):
            heads = {self._task.head: self._head(spec)}
            model = MultiViT(modalities, heads, self.size, self.patch, grid, self.global_tokens, self.drop_path)
        initialized(model, rng)
        if self.checkpoint is not None:
            initialized_from(model, self.checkpoint)
        return model

    def _head(self, spec: Spec) -> Head:
        kind, size = self.head_kind or HEADS[self.task][0], self.size
        if kind == "linear":
            if spec.classes < 2:
                raise ExperimentError("learner.task = 'classification': pictures of these data have no classes; choose 'semseg' or 'depth'")
            return LinearHead(size.width, spec.classes, self.pooling == "mean")
        channels = self.semantic_classes if self.task == "semseg" else 1
        reads = self.reads or ((RGB_NAME,) if RGB_NAME in self.inputs else self.inputs)
        if kind == "convnext":
            return ConvNeXtHead(size.width, channels, reads, self.head_width or 8 * size.width, self.head_depth or 4)
        if kind == "segmenter":
            return SegmenterHead(size.width, channels, reads, self.head_width or size.width, self.head_depth or 2, size.heads)
        if any(side % 2 for side in self.sides(spec)):
            fact = f"a DPT head needs even numbers of patches, here are {' x '.join(map(str, self.sides(spec)))}"
            raise ExperimentError(f"{fact}; choose learner.resolution as a multiple of {2 * self.patch}")
        predicts: Literal["classes", "regression"] = "classes" if self.task == "semseg" else "regression"
        return DPTHead(size.width, channels, reads, predicts, evenly(size.depth), features=self.head_width or min(256, size.width))

    def groups(self, model: nn.Module) -> Sequence[Group]:
        """A group a block, with a rate of its own; vectors, biases and global tokens do not decay.

        Source: the public implementation of arXiv 2204.01678; the rates, BEiT, arXiv 2106.08254.
        """
        assert isinstance(model, MultiViT)
        last, names = len(model.encoder) + 1, defaultdict[tuple[int, bool], list[str]](list)
        for name, param in model.named_parameters():
            if param.requires_grad:
                decayed = param.ndim > 1 and not name.endswith(".bias") and name != "global_tokens"
                names[_layer(name, last), decayed].append(name)
        return [Group(held, self.layer_decay ** (last - layer), decayed) for (layer, decayed), held in sorted(names.items())]

    def head(self, model: nn.Module) -> nn.Module | None:
        """The linear classifier of pictures; None for other tasks."""
        assert isinstance(model, MultiViT)
        return model.output_adapters[CLS_HEAD].head if self.task == "classification" else None  # type: ignore[return-value]

    # ---- batches -------------------------------------------------------------------------------------------------

    def draw(self, model: nn.Module, train: Examples, index: slice | Tensor, rng: torch.Generator) -> Examples:
        """The training view; for classification mixed, with soft targets [n, classes]."""
        batch = self.train_view(train[index].decoded(), rng)
        if not self._mixes:
            return batch
        names, classes = [name for name in self.inputs if name in batch], self.head(model).out_features  # type: ignore[union-attr]
        together = torch.cat([batch.fields[name] for name in names], dim=1)
        pictures, targets = mixed(together, batch.fields[TARGET], classes, self.mixup, self.cutmix, drawn_seed(rng))  # type: ignore[arg-type]
        parts = pictures.split([batch.fields[name].shape[1] for name in names], dim=1)
        return Examples({**dict(zip(names, parts, strict=True)), TARGET: targets})

    def train_view(self, batch: Examples, rng: torch.Generator) -> Examples:
        """The modalities that the batch has, changed at random, as the network takes them, and what is to be predicted.

        Returns:
            By modality, as ``MultiViT`` takes them; ``target``: labels [n], classes [n, h, w] or normalized depths [n, 1, h, w], unless
            the batch has none.
        """
        values = self._values(batch)
        if self.randaugment:
            return Examples({RGB_NAME: self._photographs(values[RGB_NAME], rng), TARGET: batch.label})
        if RGB_NAME in values and not self._colors.idle:
            values[RGB_NAME] = self._colors(values[RGB_NAME], rng)
        return self._seen(batch, Zoom(*self.zoom)(self.moves(values, rng), rng))

    @property
    def _colors(self) -> Colors:
        brightness, contrast, saturation, hue = self.colors
        changed = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
        return Colors(**changed, probability=self.colors_changed, gray=self.gray)

    def _values(self, batch: Examples) -> Values:
        """What the batch has of inputs and target, marked where it is not known.

        Raises:
            DataError: it has none of the inputs.
        """
        inputs, target = [self.known[name] for name in self.inputs], self._task.modality
        values = raw(self._task.cleaned(batch), [*inputs, *([target] if target else [])])
        if not values.keys() & set(self.inputs):
            fact = f"a batch has none of the modalities {', '.join(self.inputs)}, but the fields {', '.join(batch.fields)}"
            raise DataError(f"{fact}; give every silo one of learner.inputs")
        return values

    def _seen(self, batch: Examples, values: Values) -> Examples:
        """Values as the network takes them, and what is to be predicted."""
        inputs = as_seen({name: held for name, held in values.items() if name != TARGET}, self.known)
        if self._task.modality is None:
            return Examples({**inputs, TARGET: batch.label})
        return Examples({**inputs, **({TARGET: self._task.aimed(values[TARGET])} if TARGET in values else {})})

    def _photographs(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """By timm's transforms, image by image."""
        own = image_normalization(images.shape[1]).in_color()
        shape = (self.resolution or max(images.shape[2:]), self.crop_scale, self.crop_ratio)
        changed = transformed(images.nan_to_num(0.0), training_transform(*shape, self.flip, self.randaugment, "bicubic", own), rng)
        return torch.where(images.isnan().flatten(1).all(1)[:, None, None, None], torch.nan, changed)

    # ---- loss and metrics ----------------------------------------------------------------------------------------

    def loss(self, model: Callable[..., Any], batch: Examples, progress: float, rng: torch.Generator) -> Loss:
        """The task's loss; where the batch has nothing of what is to be predicted a 0 that depends on no weight, and teaches none."""
        if TARGET not in batch:
            return Loss(torch.zeros((), requires_grad=True))
        prediction = model({name: batch.fields[name] for name in self.inputs if name in batch})[self._task.head]
        return Loss(self._task.loss(prediction, batch.fields[TARGET]))

    def evaluate(self, model: nn.Module, batch: Examples) -> Metrics:
        """The task's metrics, on the examples of which something is known of what is to be predicted."""
        return total(self._measured(model, part) for part in batch.batches(AT_ONCE))

    def _measured(self, model: nn.Module, batch: Examples) -> Metrics:
        centers = {name: _center(held, self.evaluation_crop) for name, held in self._values(batch).items()}
        seen = self._seen(batch, self.moves(centers))
        seen = seen[judged(seen.fields[TARGET])] if TARGET in seen else seen[:0]
        if not len(seen):
            return Metrics(0, {})
        predictions = model({name: seen.fields[name] for name in self.inputs if name in seen})
        return self._task.metrics(predictions[self._task.head], seen.fields[TARGET])


def _layer(name: str, last: int) -> int:
    """Of a parameter: 0 before the encoder, 1, 2, ... for its blocks, the last one for heads."""
    if name.startswith("encoder."):
        return int(name.split(".")[1]) + 1
    return last if name.startswith("output_adapters.") else 0


def _center(values: Tensor, fraction: float) -> Tensor:
    """The middle of pictures or maps, of so many of their sides."""
    sides = [round(side * fraction) for side in values.shape[-2:]]
    top, left = ((whole - side) // 2 for whole, side in zip(values.shape[-2:], sides, strict=True))
    return values[..., top : top + sides[0], left : left + sides[1]]
