"""Leopart: patches of the same part of an object get the same prototype, whatever crop they are seen in.

A slowly moving teacher assigns the patches of two large crops to prototypes, all of which are used alike; from each other crop the
assignments are predicted, cell by cell of the region that both show:

    l = 1/2 sum_g 1/(V - 1) sum_{v != g} mean over cells of -sum_k q_k log p_k

Source: Self-Supervised Learning of Object Parts for Semantic Segmentation, arXiv 2204.13101; what the paper leaves open from what its
public implementation does.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fedvision.data.examples import SEMSEG, Examples
from fedvision.data.federated import Spec
from fedvision.errors import ExperimentError
from fedvision.gallery import Gallery, painted
from fedvision.learners.learner import Group, Holding, Interchangeable, Learner, Loss
from fedvision.leopart import assignment, losses
from fedvision.leopart.colors import Colors
from fedvision.leopart.crops import GLOBAL, IMAGENET, Cropped, MultiCrop
from fedvision.leopart.foreground import foreground
from fedvision.leopart.judging import JudgingTable, discovered, judged, judging_of
from fedvision.leopart.network import HEADS, Guidance, Leopart, Network, Seen, uniform_streak
from fedvision.leopart.pictures import galleries
from fedvision.leopart.vision import VisionSize
from fedvision.leopart.weights import initialized_from
from fedvision.metrics import Metrics, total
from fedvision.registry import learners
from fedvision.seeds import global_generators, own_generator
from fedvision.settings import Count, Fraction, Natural, NonNegative, Positive, PositiveFraction
from fedvision.views import resized

GLOBAL_CROPS, LOCAL_CROPS, OF_GLOBAL, OF_CROP = "global_crops", "local_crops", "of_global", "of_crop"
"""The fields of a batch that hold its crops, and what they share; see ``Cropped`` and ``Overlaps``."""

ASSIGNED, COUNTED, FRESH = "assigned", "counted", "fresh"
"""Those that hold what the teacher says of it: to which prototype each patch of the global crops belongs, float32 [n, 2, patches, k];
which cells of what crops share count, bool [n, 2, crops, cells, cells], if not all do; features for the queues, if there are any,
float32 [n, 2, some, features]."""

UNIFORM_STEPS = "uniform_steps"
"""The one that says in how many steps in a row before this one predictions have been uniform, int64 [n]."""

ALARM = 20
"""Steps in a row with uniform predictions that are a collapse."""

BATCH = 64
"""Pictures that are evaluated together."""

DRAWN = 6
"""Pictures in which it is shown what is found in all."""

log = logging.getLogger("fedvision")

Order = Callable[[Int[Tensor, "some"]], Int[Tensor, "some"]]
"""Puts the indices of patches in a random order."""


@dataclass(frozen=True)
class Size:
    """The sizes of the networks.

    Attributes:
        vision: of the transformer; side, patch and channels are the data's.
        hidden: width of the head.
        features: numbers of the vectors that prototypes are compared with.
        prototypes: how many.
        queue: such vectors that are remembered of each global crop.
        teacher_head: see ``LeopartLearner``.
    """

    vision: VisionSize
    hidden: int = 2048
    features: int = 256
    prototypes: int = 300
    queue: int = 8192
    teacher_head: Literal["copied", "random"] = "random"


SIZES: Mapping[str, Size] = {
    "tiny": Size(VisionSize(width=64, depth=3, heads=4), hidden=128, features=32, prototypes=16, queue=0, teacher_head="copied"),
    "small": Size(VisionSize()),
    "base": Size(VisionSize(width=768, depth=12, heads=12)),
}


@learners("leopart")
@dataclass(frozen=True, kw_only=True)
class LeopartLearner(Learner):
    """Unsupervised training of a vision transformer's patches, so that they cluster into the parts of objects.

    It refines a network that knows something already: ``checkpoint`` is DINO's in the paper. A batch has fewer patches that count than
    a queue takes of it where pictures show little foreground; then those that there are are taken.

    Attributes:
        networks: their size, by name; ``small`` is as published, and ``base`` with ``patch = 8``.
        width: of the transformer's tokens, if not that size's.
        depth: number of its blocks, if not that size's.
        heads: of its attention, if not that size's.
        patch: pixels a side.
        prototypes: how many; the size's if not given.
        features: numbers of the vectors that they are compared with; the size's if not given.
        global_size: pixels a side of the two large crops; what patches fill of the pictures' shorter side if not given.
        local_size: pixels a side of the small ones; what patches fill of 3/7 of ``global_size`` if not given.
        local_crops: how many small ones.
        global_scale: area of a large crop, least and most, as a fraction of the picture's.
        local_scale: that of a small one.
        overlap: the fraction of the picture's area that each crop shares with each large one, at least, and the large ones twice of.
        jitter: how far brightness, contrast and saturation may be from 1, and hue from 0, a share of the circle.
        jittered: probability that a crop's colors change.
        gray: probability that it becomes gray.
        blurred: probability that it is blurred.
        blur: deviation of the Gaussian that blurs, in pixels, least and most.
        mask: which patches teach: those in the ``foreground`` or the ``background``, as the teacher's attention tells, or ``all``.
        mass: share of the attention that the foreground holds.
        cells: rows and columns that the region which two crops share is cut into.
        temperature: that scores are divided by in predictions.
        epsilon: that they are divided by in assignments.
        iterations: of the assignments' balancing.
        taught: whether a teacher makes the assignments, or the network itself.
        teacher_head: whether its head and prototypes begin as the network's or with random weights of their own; the size's if not given.
        momentum: of the teacher to begin with: ``teacher <- momentum teacher + (1 - momentum) network``; it rises to 1 along a cosine.
        copies: whether each silo keeps a teacher of its own, or it travels and is averaged too.
        queue: features of earlier patches that are assigned along with each large crop's, once there are so many; 0: none; the size's
            if not given.
        remembered: patches for each picture of a batch that a queue takes of it.
        drop_path: probability that a picture skips the last block's branches, in the network that learns.
        head_rate: what the optimizer's rate is times for head and prototypes.
        resolution: pixels a side of the pictures whose tokens are evaluated; what patches fill of their own if not given.
        judging: how classes and objects are found in the test set, of which none is trained on, and judged by its field ``semseg``: a
            table, ``fedvision.leopart.judging.Judging``; not at all if not given.
        semantic_classes: of ``semseg``, with the background.
        checkpoint: file of weights to begin with: DINO's, timm's, MultiMAE's, Leopart's, or the ``model.safetensors`` of a run, of ALBEF,
            too, whose image encoder is taken.

    Source: arXiv 2204.13101; the defaults are the paper's, whose ``networks`` are ``small``. The other half of the recipe belongs to
        the strategy: AdamW with rate 1e-5, schedule ``cosine``, and weight decay 0.04 with decay_schedule ``cosine`` to 12.5 times.
    Differs: without a teacher, assignments come from one more look of the network at the large crops, which drops other paths; a
        queue is used when it is full itself, whatever the other one is; a queue takes fewer patches where there are not enough, where the
        public implementation fails; without any cell that counts the loss is 0; one device, so a queue has all 8192 vectors.
    """

    learns_unlabeled = True
    shown = 256  # pictures, of which most are only for the clusters
    networks: Literal["tiny", "small", "base"] = "tiny"
    width: Count | None = None
    depth: Count | None = None
    heads: Count | None = None
    patch: Count = 16
    prototypes: Count | None = None
    features: Count | None = None
    global_size: Count | None = None
    local_size: Count | None = None
    local_crops: Natural = 4
    global_scale: tuple[PositiveFraction, PositiveFraction] = (0.25, 1.0)
    local_scale: tuple[PositiveFraction, PositiveFraction] = (0.05, 0.25)
    overlap: Fraction = 0.01
    jitter: tuple[NonNegative, NonNegative, NonNegative, NonNegative] = (0.8, 0.8, 0.8, 0.2)
    jittered: Fraction = 0.8
    gray: Fraction = 0.2
    blurred: Fraction = 0.5
    blur: tuple[Positive, Positive] = (0.1, 2.0)
    mask: Literal["foreground", "background", "all"] = "foreground"
    mass: Fraction = 0.6
    cells: Count = 7
    temperature: Positive = 0.1
    epsilon: Positive = 0.05
    iterations: Count = 3
    taught: bool = True
    teacher_head: Literal["copied", "random"] | None = None
    momentum: Fraction = 0.9995
    copies: Literal["private", "shared"] = "private"
    queue: Natural | None = None
    remembered: Count = 10
    drop_path: Fraction = 0.1
    head_rate: Positive = 10.0
    resolution: Count | None = None
    judging: JudgingTable | None = None
    semantic_classes: Count = 21
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in {"global_scale": self.global_scale, "local_scale": self.local_scale, "blur": self.blur}.items():
            if least > most:
                raise ExperimentError(f"learner.{name} = [{least}, {most}]; give the least first")
        if self.jitter[3] > 0.5:
            raise ExperimentError(f"learner.jitter moves hues by {self.jitter[3]} of their circle; give at most 0.5")

    # ---- the model -----------------------------------------------------------------------------------------------

    @property
    def size(self) -> Size:
        """Of the networks."""
        named = SIZES[self.networks]
        vision = replace(named.vision, **self._given("width", "depth", "heads"))
        return replace(named, vision=vision, **self._given("prototypes", "features", "queue", "teacher_head"))

    def _given(self, *names: str) -> dict[str, Any]:
        """The settings of these names that are given."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def build(self, spec: Spec, rng: torch.Generator) -> Leopart:
        """The network, its teacher and its queues, with the weights of ``checkpoint``.

        Raises:
            ExperimentError: data that are no pictures; sizes that do not fit together; a checkpoint that does not.
        """
        if len(spec.image_shape) != 3:
            raise ExperimentError(f"learner leopart needs pictures, the inputs have shape {spec.image_shape}; choose other data")
        if self.judging is not None and spec.fields and SEMSEG not in spec.fields:
            raise ExperimentError(
                f"learner.judging needs the field {SEMSEG}, which the data lack; add it to data.fields, or leave judging out"
            )
        channels, *sides = spec.image_shape
        crops, size = self._crops(min(sides)), self.size
        vision = replace(size.vision, side=crops.global_size, patch=self.patch, channels=channels)
        head = size.hidden, size.features, size.prototypes
        model = Leopart(vision, *head, rng, self.drop_path, size.queue, self.taught, size.teacher_head == "copied")
        if self.checkpoint is not None:
            initialized_from(model, self.checkpoint)
        return model

    def _crops(self, side: int) -> MultiCrop:
        """How pictures are cropped whose shorter side this is.

        Raises:
            ExperimentError: crops that no patch fits into, or that patches do not fill; small ones that are larger than large ones.
        """
        whole = self.global_size or side // self.patch * self.patch
        small = self.local_size or max(whole * 3 // 7 // self.patch, 1) * self.patch
        if not whole:
            raise ExperimentError(f"learner.patch = {self.patch} is larger than pictures of {side} pixels; choose a smaller one")
        for name, pixels in (("global_size", whole), ("local_size", small)):
            if pixels % self.patch:
                raise ExperimentError(f"learner.patch = {self.patch} does not divide learner.{name} = {pixels}; choose a multiple")
        if small > whole:
            raise ExperimentError(f"learner.local_size = {small} is larger than the large crops' {whole}; choose a smaller one")
        colors = Colors(self.jitter, self.jittered, self.gray, self.blurred, self.blur)
        return MultiCrop(whole, small, self.local_crops, self.global_scale, self.local_scale, self.overlap, colors)

    def groups(self, model: nn.Module) -> Sequence[Group]:
        """Transformer and head, each decayed and, where it has one dimension, not decayed.

        Source: arXiv 2204.13101, appendix, and its public implementation, where positions and the class token decay.
        """
        assert isinstance(model, Leopart)
        params = {f"model.{name}": param for name, param in model.model.named_parameters()}
        heads = tuple(f"model.{begin}" for begin in HEADS)

        def named(head: bool, decayed: bool) -> list[str]:
            return [name for name, param in params.items() if name.startswith(heads) == head and (param.ndim > 1) == decayed]

        rates = ((False, 1.0), (True, self.head_rate))
        return [Group(named(head, decayed), rate, decayed) for head, rate in rates for decayed in (True, False)]

    # ---- batches -------------------------------------------------------------------------------------------------

    def train_view(self, batch: Examples, rng: torch.Generator) -> Examples:
        """Crops in other colors, and what they share."""
        return _fields(self._crops(min(batch.image.shape[-2:]))(batch.image, rng))

    def draw(self, model: nn.Module, train: Examples, index: slice | Tensor, rng: torch.Generator) -> Examples:
        """The training view, and what the teacher says of it."""
        assert isinstance(model, Leopart)
        view = super().draw(model, train, index, rng)
        with global_generators(rng):
            said = self.said(model, view, lambda patches: patches[torch.randperm(len(patches), generator=rng)])
        return Examples({**view.fields, **said, UNIFORM_STEPS: model.uniform_steps.expand(len(view)).clone()})

    @torch.no_grad()
    def said(self, model: Leopart, view: Examples, order: Order) -> dict[str, Tensor]:
        """What the teacher says of a batch.

        Args:
            model: as it is before the step.
            view: its crops.
            order: says which patches queues take; called once for each large crop.

        Returns:
            The fields ``assigned``, ``counted`` and ``fresh``, of which the latter two may be missing.
        """
        crops = view.fields[GLOBAL_CROPS]
        guidance = Guidance(*(each.unflatten(0, (-1, GLOBAL)) for each in model.guide.guidance(crops.flatten(0, 1))))  # type: ignore[misc]
        masks = self.masks(guidance.attention, model.guide.grid(crops[0]))
        balance = self.epsilon, self.iterations
        assigned = [
            assignment.assigned(scores.flatten(0, 1), model.remembered_scores(crop), *balance).view(scores.shape)
            for crop, scores in enumerate(guidance.scores.unbind(1))
        ]
        said = {ASSIGNED: torch.stack(assigned, 1)}
        if masks is not None:
            said[COUNTED] = losses.region_mask(masks, view.fields[OF_GLOBAL] / self.patch, self.cells)
        if model.queue.shape[1]:
            said[FRESH] = self._fresh(guidance.embeddings, masks, model.queue.shape[1], order)
        return said

    def masks(self, attention: Float[Tensor, "n g heads patches"], grid: tuple[int, int]) -> Bool[Tensor, "n g rows columns"] | None:
        """Which patches count; None if all do."""
        if self.mask == "all":
            return None
        front = foreground(attention.flatten(0, 1).unflatten(2, grid), self.mass).unflatten(0, attention.shape[:2])
        return front if self.mask == "foreground" else ~front  # type: ignore[no-any-return]

    def _fresh(
        self, embeddings: Float[Tensor, "n g patches features"], masks: Tensor | None, queue: int, order: Order
    ) -> Float[Tensor, "n g some features"]:
        """For each queue some vectors of patches that count, shared out among the pictures; zeros where there are not enough."""
        n = len(embeddings)
        number = min(self.remembered * n, queue)
        chosen = []
        for crop, each in enumerate(embeddings.unbind(1)):
            flat = each.flatten(0, 1)
            there = torch.ones(len(flat), dtype=torch.bool) if masks is None else masks[:, crop].flatten().cpu()
            chosen.append(losses.drawn_features(flat, order(there.nonzero()[:, 0]).to(flat.device), number))
        rows = math.ceil(number / n)
        padded = torch.nn.functional.pad(torch.stack(chosen), (0, 0, 0, rows * n - number))
        return padded.unflatten(1, (n, rows)).transpose(0, 1)  # type: ignore[no-any-return]

    # ---- loss ----------------------------------------------------------------------------------------------------

    def loss(self, model: Callable[..., Any], batch: Examples, progress: float, rng: torch.Generator) -> Loss:
        """The swapped loss; its parts tell of its health.

        ``assignment_entropy`` is that of the teacher's assignments, at most ln k; ``token_std`` the deviation of the network's tokens
        among all patches, 0 if they are all alike; ``collapsed`` whether predictions have been uniform for 20 steps; ``counted`` which
        share of the cells counts, if not all do.
        """
        fields = batch.fields
        seen = model(_in_order(batch))
        errors = self._errors(seen, batch, fields[ASSIGNED])
        counted = fields.get(COUNTED)
        parts = {
            "assignment_entropy": assignment.entropy(fields[ASSIGNED]),
            "token_std": seen.tokens[0].detach().flatten(0, 1).std(0, correction=0).mean(),
            "collapsed": (fields[UNIFORM_STEPS] >= ALARM).float().mean(),
            **({} if counted is None else {"counted": counted.float().mean()}),
        }
        return Loss(losses.swapped_loss(errors, counted), parts)

    def _errors(self, seen: Seen, batch: Examples, assigned: Float[Tensor, "n g patches k"]) -> Float[Tensor, "n g v o o"]:
        """How far predictions are from assignments, in each cell of what a large crop and another one share."""
        of_global, of_crop = (batch.fields[name] / self.patch for name in (OF_GLOBAL, OF_CROP))
        begin, predictions = 0, list[Tensor]()
        for crops in (batch.fields[name] for name in (GLOBAL_CROPS, LOCAL_CROPS) if name in batch):
            n, number, _, height, width = crops.shape
            grid = height // self.patch, width // self.patch
            rows = number * n * math.prod(grid)
            scores = seen.scores[begin : begin + rows].unflatten(0, (number, n, *grid)).permute(1, 0, 4, 2, 3)
            begin += rows
            first = 0 if not predictions else GLOBAL
            boxes = of_crop[:, first : first + number]
            regions = losses.aligned(scores.flatten(0, 1), boxes.flatten(0, 1), self.cells)
            predictions.append(regions.unflatten(0, (n, number)).transpose(1, 2))
        grid = tuple(side // self.patch for side in batch.fields[GLOBAL_CROPS].shape[-2:])  # type: ignore[assignment]
        maps = assigned.mT.unflatten(3, grid).flatten(0, 1)
        targets = losses.aligned(maps, of_global.flatten(0, 1), self.cells).unflatten(0, assigned.shape[:2])
        return losses.cell_errors(torch.cat(predictions, dim=2), targets, self.temperature)

    # ---- state ---------------------------------------------------------------------------------------------------

    def precede(self, model: nn.Module, batch: Examples, loss: Loss, progress: float) -> None:
        """Prototypes get length 1, queues take what they were given, the teacher moves; a collapse is told of."""
        assert isinstance(model, Leopart)
        if FRESH in batch:
            model.remember(batch.fields[FRESH].transpose(0, 1).flatten(1, 2))
        model.follow(self.momentum_at(progress))
        model.uniform_steps.copy_(uniform_streak(model.uniform_steps, loss.total.detach(), model.model.prototypes.out_features))
        if int(model.uniform_steps) == ALARM:
            fact = f"leopart has collapsed: for {ALARM} steps predictions have been uniform, with the loss ln {self.size.prototypes}"
            log.warning("%s; begin with a checkpoint, or choose a lower rate in strategy.client_optimizer", fact)

    def momentum_at(self, progress: float) -> float:
        """The teacher's momentum at a time of the training: half a cosine from ``momentum`` to 1."""
        return 1 - (1 - self.momentum) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2

    def holding(self, name: str) -> Holding:
        """The teacher, the queue and the count of uniform steps stay; a queue holds features of the silo's own pictures."""
        own = "queue", "uniform_steps", *(("teacher.",) if self.copies == "private" else ())
        return "private" if name.startswith(own) else super().holding(name)

    def begin(self, model: nn.Module) -> None:
        """The teacher begins at the network, see ``teacher_head``."""
        assert isinstance(model, Leopart)
        if self.copies == "private":
            model.begin()

    def interchangeable(self, model: nn.Module) -> Sequence[Interchangeable]:
        """Prototypes; a teacher's go with the network's, which predicts by their numbers what it assigns."""
        assert isinstance(model, Leopart)
        alike = () if model.teacher is None else ("teacher.prototypes.weight",)
        return (Interchangeable("model.prototypes.weight", alike),)

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self, model: nn.Module, batch: Examples) -> Metrics:
        """``loss``, on crops that are always the same for a picture, in its own colors; ``token_std``, the deviation within a picture.

        Assignments are those of each patch by itself, softmax(s / epsilon): to balance them among pictures is no sum over pictures.
        """
        assert isinstance(model, Leopart)
        return total(self._measured(model, part) for part in batch.batches(BATCH))

    def _measured(self, model: Leopart, batch: Examples) -> Metrics:
        crops = self._crops(min(batch.image.shape[-2:])).plain(batch.image, [own_generator(image) for image in batch.image])
        view = _fields(crops)
        guidance = model.guide.guidance(crops.global_crops.flatten(0, 1))
        assigned = (guidance.scores / self.epsilon).softmax(-1).unflatten(0, (-1, GLOBAL))
        seen = model(_in_order(view))
        spread = seen.tokens[0][: GLOBAL * len(batch)].std(1, correction=0).mean(1)
        loss = losses.swapped_loss(self._errors(seen, view, assigned)).double() * len(batch)
        return Metrics.of_batch({"loss": loss, "token_std": spread.double().sum() / GLOBAL}, len(batch))

    def overall(self, model: nn.Module, examples: Examples) -> Mapping[str, float]:
        """What is found without labels, see ``fedvision.leopart.judging.judged``; nothing without ``judging``."""
        if self.judging is None:
            return {}
        settings = judging_of(self.judging)
        return judged(*self._looks(model, examples), examples.fields[SEMSEG], self.semantic_classes, settings)

    def _looks(self, model: nn.Module, examples: Examples) -> tuple[Float[Tensor, "n rows columns width"], Bool[Tensor, "n rows columns"]]:
        """Tokens of the patches, and where attention looks."""
        parts = [batch.decoded().image for batch in examples.batches(BATCH)]
        masks = [foreground(self.attention(model, images), self.mass) for images in parts]
        return torch.cat([self.tokens(model, images) for images in parts]), torch.cat(masks)

    def pictures(self, model: nn.Module, examples: Examples) -> Mapping[str, Gallery]:
        """Classes, foreground and neighboring parts that are found in some pictures; nothing without ``judging``."""
        if self.judging is None:
            return {}
        semseg, settings = examples.fields[SEMSEG], judging_of(self.judging)
        found = discovered(*self._looks(model, examples), semseg, self.semantic_classes, settings)
        return galleries([painted(image) for image in examples.image[:DRAWN]], found)

    def tokens(self, model: nn.Module, images: Tensor) -> Float[Tensor, "n rows columns width"]:
        """The network's tokens of the patches of pictures, after the last normalization, as all evaluation sees them.

        Args:
            model: from ``build``.
            images: in [0, 1].
        """
        network = _network(model)
        seen = self.looked_at(images)
        found = torch.cat([network.tokens(part)[:, 1:] for part in seen.split(BATCH)])
        return found.unflatten(1, network.grid(seen))  # type: ignore[no-any-return]

    def attention(self, model: nn.Module, images: Tensor) -> Float[Tensor, "n heads rows columns"]:
        """Where the network's class token looks in the last block; see ``tokens``."""
        network = _network(model)
        seen = self.looked_at(images)
        found = torch.cat([network.observed(part).attention for part in seen.split(BATCH)])
        return found.unflatten(2, network.grid(seen))  # type: ignore[no-any-return]

    def looked_at(self, images: Tensor) -> Float[Tensor, "n c height width"]:
        """Pictures in [0, 1], resized to ``resolution`` and normalized."""
        fits = tuple(side // self.patch * self.patch for side in images.shape[-2:])
        size = (self.resolution, self.resolution) if self.resolution else fits
        return IMAGENET.of_channels(images.shape[1])(resized(images, size).clamp(0.0, 1.0))  # type: ignore[arg-type]


def _network(model: nn.Module) -> Network:
    assert isinstance(model, Leopart)
    return model.model


def _fields(crops: Cropped) -> Examples:
    """Crops as a batch."""
    local = {LOCAL_CROPS: crops.local_crops} if crops.local_crops.shape[1] else {}
    return Examples({GLOBAL_CROPS: crops.global_crops, **local, OF_GLOBAL: crops.overlaps.of_global, OF_CROP: crops.overlaps.of_crop})


def _in_order(batch: Examples) -> list[Tensor]:
    """The crops of a batch, the large ones first."""
    return [crop for name in (GLOBAL_CROPS, LOCAL_CROPS) if name in batch for crop in batch.fields[name].unbind(1)]
