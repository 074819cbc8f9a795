"""USI: any network trained by one recipe, with the predictions of a strong teacher beside the labels.

Source: Solving ImageNet: a Unified Scheme for Training any Backbone to Top Results, arXiv 2204.03475.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import AfterValidator
from torch import Tensor, nn
from torch.nn import functional as F

from fedvision import settings
from fedvision.augmentation import drawn_seed, evaluation_transform, mixed, repeated_order, training_transform, transformed
from fedvision.backbones import backbone, interpolation, resolution
from fedvision.data.examples import IMAGE, Examples
from fedvision.data.federated import Spec
from fedvision.ema import Averaged, warmed_up
from fedvision.errors import ExperimentError
from fedvision.folding import folded
from fedvision.learners.classifier import correct, scores
from fedvision.learners.learner import Group, Holding, Learner, Loss, mean_over_examples
from fedvision.metrics import Metrics
from fedvision.models import SmallCNN
from fedvision.normalization import Normalization, renormalized
from fedvision.optimizers import ClientOptimizer
from fedvision.registry import learners
from fedvision.seeds import generator, global_generators
from fedvision.settings import Count, Fraction, Natural, NonNegative, Positive, PositiveFraction
from fedvision.teachers import Lesson, published, taught
from fedvision.views import weak

TARGET = "target"
"""The field of a batch that holds its soft labels, float [n, classes]."""

Ratio = tuple[Positive, Positive]


def cross_entropy(logits: Float[Tensor, "n classes"], targets: Float[Tensor, "n classes"]) -> Float[Tensor, ""]:
    """CE = 1/n sum_i sum_c -y_ic log softmax(z_i)_c, with soft targets y."""
    return -(targets * logits.log_softmax(1)).sum(1).mean()


def distillation(
    student: Float[Tensor, "n classes"], teacher: Float[Tensor, "n classes"], temperature: float = 1.0, rescaled: bool = False
) -> Float[Tensor, ""]:
    """KD = 1/n sum_i KL(softmax(t_i / tau) || softmax(s_i / tau)): how far the student's prediction is from the teacher's.

    Args:
        student: logits s.
        teacher: logits t.
        temperature: tau > 0; more than 1 softens both.
        rescaled: times tau^2, which keeps the gradient's size whatever tau is.

    Source: arXiv 2204.03475, equation 2; tau^2: Hinton et al., arXiv 1503.02531, section 2.
    """
    own, goal = (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    divergence = F.kl_div(own, goal, reduction="batchmean", log_target=True)
    return divergence * temperature**2 if rescaled else divergence


def objective(
    labels: Float[Tensor, ""] | float, teacher: Float[Tensor, ""] | float, alpha: float, only_teacher: bool = False
) -> Float[Tensor, ""] | float:
    """L = CE + alpha KD, or alpha KD alone.

    Args:
        labels: CE.
        teacher: KD.
        alpha: weight of the teacher, 0 or more.
        only_teacher: whether the labels are left out.
    """
    return alpha * teacher if only_teacher else labels + alpha * teacher


class Pupil(nn.Module):
    """A network that is trained, a slowly moving average of it, and a teacher that never changes.

    Called, it is the network. In its state dict they are ``student.network.*``, ``student.average.*`` and ``teacher.*``;
    without an average the network is ``student.*``.

    Args:
        student: a network, or one with its average.
        teacher: None: it learns from labels alone. It is always in evaluation mode.
        normalizations: of the images that the student and the teacher expect.
        classes: that it tells apart.
    """

    steps: Tensor

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, normalizations: tuple[Normalization, Normalization], classes: int
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.classes = student, teacher, classes
        self.own, self.teachers = normalizations
        if isinstance(student, Averaged):
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        if teacher is not None:
            teacher.requires_grad_(False).eval()

    @property
    def network(self) -> nn.Module:
        """What is trained."""
        return self.student.network if isinstance(self.student, Averaged) else self.student

    @property
    def average(self) -> nn.Module | None:
        """Its average, if there is one."""
        return self.student.average if isinstance(self.student, Averaged) else None

    def forward(self, images: Float[Tensor, "n channels height width"], taught: bool = False) -> Any:
        """The network's logits [n, classes] on images as it expects them; if ``taught``, and the teacher's on the same."""
        logits = self.student(images)
        return (logits, self.advice(images)) if taught else logits

    @torch.no_grad()
    def advice(self, images: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n classes"]:
        """The teacher's logits on images as the student expects them."""
        assert self.teacher is not None, "there is no teacher"
        return self.teacher(renormalized(images, self.own, self.teachers))  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> "Pupil":
        """Set the mode of all but the teacher."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self


@dataclass(frozen=True, kw_only=True)
class Published:
    """A teacher with published weights, in the table ``learner.teacher``.

    Attributes:
        model: a timm name. The paper's is ``tresnet_v2_l``.
        checkpoint: file of its weights, see ``fedvision.teachers.published``.
        pretrained: whether timm downloads them instead.
    """

    model: str = "tresnet_v2_l"
    checkpoint: str | None = None
    pretrained: bool = False

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (not self.pretrained):
            raise ExperimentError("a teacher needs weights: give either teacher.checkpoint, teacher.pretrained = true or teacher.data")

    def network(self, spec: Spec, side: int) -> nn.Module:
        """The teacher for images of ``side`` pixels."""
        return published(self.model, spec.classes, spec.image_shape[0], side, self.checkpoint)

    def normalization(self, channels: int) -> Normalization:
        """Of the images that it expects."""
        return Normalization.of_timm(self.model, channels)


def adamw() -> dict[str, Any]:
    """The recipe's optimizer, in one cycle."""
    return {"name": "AdamW", "lr": 2e-3, "weight_decay": 2e-2, "schedule": {"name": "one-cycle"}}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A teacher that is trained here first, on labels of a public data set that no client holds.

    It mirrors the pre-training of the paper's teacher on ImageNet-21k, which no client could afford, with as many labels as one
    likes: say so where results are shown. It is trained once and kept in the cache on disk. A data set that is drawn from a
    seed needs another one than the clients'. The digits are few: a teacher of digits has seen the clients' own, and unless
    ``seed`` is the experiment's, some of the test set.

    Attributes:
        model: ``cnn`` or a timm name.
        widths: of the cnn.
        data: the public set, a table as the experiment's ``data``.
        steps: of training.
        batch_size: examples a step.
        optimizer: with its schedule.
        seed: of the public set, the weights and the batches.
    """

    model: str = "cnn"
    widths: tuple[Count, ...] = (32, 64, 64)
    data: dict[str, Any]
    steps: Count = 300
    batch_size: Count = 64
    optimizer: ClientOptimizer = field(default_factory=adamw)
    seed: Natural = 0

    def network(self, spec: Spec, side: int) -> nn.Module:
        """The teacher for data of this shape; it is trained if it never was."""
        learner = USI(model=self.model, widths=self.widths, augmentation="none", mixup=0, cutmix=0, ema_decay=0)
        lesson = Lesson(self.data, self.steps, self.batch_size, self.optimizer, self.seed)
        return taught(learner, lesson, spec).network  # type: ignore[return-value]

    def normalization(self, channels: int) -> Normalization:
        """Of the images that it expects."""
        return _normalization(self.model, channels)


def teacher_of(table: Mapping[str, Any]) -> Published | Trained:
    """The teacher of a table: one that is trained here if the table has ``data``, else a published one.

    Raises:
        ExperimentError: an unknown setting, or a teacher without weights.
    """
    if "data" not in table:
        return Published(**settings.resolve(Published, table, "learner.teacher"))
    if not isinstance(table["data"], Mapping) or "name" not in table["data"]:
        raise ExperimentError(f"learner.teacher.data = {table['data']!r}: expected a table with a name, as {{ name = 'scenes' }}")
    return Trained(**settings.resolve(Trained, table, "learner.teacher"))


def _checked(table: dict[str, Any]) -> dict[str, Any]:
    teacher_of(table)
    return table


@learners("usi")
@dataclass(frozen=True, kw_only=True)
class USI(Learner):
    """Any network by one recipe: heavy augmentation, mixing, and a teacher's predictions beside the labels.

    The other half of the recipe belongs to the strategy: AdamW at 2e-3 with weight decay 2e-2 and the schedule
    ``epoch-cosine`` (that of the reference code; the paper says one-cycle, which ``one-cycle`` is), batches of 128 on each of 8
    GPUs, 310 epochs.

    Attributes:
        model: a timm name, or ``cnn``, a small one for small images.
        widths: of the cnn's convolutions.
        teacher: a table, see ``Published`` and ``Trained``; none: labels alone.
        alpha: weight of the teacher's predictions; with 0 the teacher is not even asked.
        only_teacher: whether the labels are left out.
        temperature: of the predictions of both.
        rescaled: whether the teacher's term is multiplied by the temperature squared; the reference code has neither.
        augmentation: ``imagenet``: timm's, image by image: crop, flip, RandAugment; ``shift``: by a few pixels, and flip,
            for small images; ``none``.
        resolution: pixels a side that ``imagenet`` crops to; the model's own if not given, and of a cnn the images' own.
        crop_scale: area of a crop, least and most, as a fraction of the image's.
        crop_ratio: width over height of a crop, least and most.
        interpolation: of crops in training; in evaluation it is the model's own.
        randaugment: timm's description; empty: none.
        flip: probability that left and right change places; under ``shift`` 1/2 or 0.
        shift: the farthest that ``shift`` moves an image, as a fraction of its side.
        mixup: alpha of Beta(alpha, alpha) of blended images; 0: none.
        cutmix: the same for images with a box of another; 0: none.
        repeats: visits of each image in a row, of those that a pass visits; the paper has 3, and 1 on a single GPU.
        evaluation_crop: side of the center that is evaluated under ``imagenet``, as a fraction of the resized image's.
        drop_path: rate of stochastic depth; the model's own default if not given.
        ema_decay: of the moving average of weights and buffers; 0: none. The paper's remembers 17,000 steps, so that in a shorter
            run it knows the random beginning: lower it, or warm it up.
        ema_warmup: whether the decay begins low, ``fedvision.ema.warmed_up``.
        average: whether the moving average travels and is averaged too, or each silo keeps its own; the server, that has none,
            then evaluates the network's weights under both names.

    Source: arXiv 2204.03475, Table 1; what the paper leaves open from its reference code.
    Differs: batches are mixed as floats, not as rounded bytes; an odd batch leaves its last image unmixed; both the network and
    its average are evaluated, and neither is chosen on the test set.
    """

    model: str = "cnn"
    widths: tuple[Count, ...] = (16, 32, 32)
    teacher: Annotated[dict[str, Any], AfterValidator(_checked)] | None = None
    alpha: NonNegative = 5.0
    only_teacher: bool = False
    temperature: Positive = 1.0
    rescaled: bool = False
    augmentation: Literal["imagenet", "shift", "none"] = "imagenet"
    resolution: Count | None = None
    crop_scale: tuple[PositiveFraction, PositiveFraction] = (0.08, 1.0)
    crop_ratio: Ratio = (0.75, 4 / 3)
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    randaugment: str = "rand-m7-mstd0.5-inc1"
    flip: Fraction = 0.5
    shift: Fraction = 0.125
    mixup: NonNegative = 0.8
    cutmix: NonNegative = 1.0
    repeats: Count = 1
    evaluation_crop: PositiveFraction = 0.95
    drop_path: Fraction | None = None
    ema_decay: Fraction = 0.99996
    ema_warmup: bool = False
    average: Literal["shared", "private"] = "shared"

    def __post_init__(self) -> None:
        if self.only_teacher and (self.teacher is None or self.alpha == 0):
            raise ExperimentError("learner.only_teacher leaves nothing to learn from without a teacher; give one and alpha > 0")
        if self.resolution is not None and self.augmentation != "imagenet":
            raise ExperimentError(f"learner.resolution needs augmentation = 'imagenet'; under {self.augmentation!r} images keep their size")

    def build(self, spec: Spec, rng: torch.Generator) -> nn.Module:
        """The network, its average and its teacher."""
        if len(spec.image_shape) != 3:
            raise ExperimentError(f"learner usi needs images, the inputs have shape {spec.image_shape}; use learner classifier")
        channels, *sides = spec.image_shape
        network, side = self._network(spec, rng), self._side(max(sides))
        teacher = None if self.teacher is None else teacher_of(self.teacher)
        own = _normalization(self.model, channels)
        return Pupil(
            Averaged(network) if self.ema_decay else network,
            None if teacher is None else _prepared(teacher.network(spec, side), channels, side),
            (own, own if teacher is None else teacher.normalization(channels)),
            spec.classes,
        )

    # ---- batches -----------------------------------------------------------------------------------------------------

    def order(self, examples: int, rng: torch.Generator) -> Tensor:
        """With ``repeats``, some examples several times in a row, and the others in another pass."""
        if self.repeats == 1:
            return super().order(examples, rng)
        return repeated_order(examples, self.repeats, drawn_seed(rng))

    def draw(self, model: nn.Module, train: Examples, index: slice | Tensor, rng: torch.Generator) -> Examples:
        """The training view, mixed, with soft labels."""
        batch = self.train_view(train[index].decoded(), rng)
        images, targets = mixed(batch.image, batch.label, model.classes, self.mixup, self.cutmix, drawn_seed(rng))  # type: ignore[arg-type]
        return Examples({**batch.fields, IMAGE: images, TARGET: targets})

    def train_view(self, batch: Examples, rng: torch.Generator) -> Examples:
        """Augmented images, as the network expects them."""
        return Examples({**batch.fields, IMAGE: self._augmented(batch.image, rng)})

    def _augmented(self, images: Tensor, rng: torch.Generator) -> Tensor:
        own = _normalization(self.model, images.shape[1])
        if self.augmentation == "imagenet":
            return transformed(images, self._transform(max(images.shape[2:]), own), rng)
        return own(weak(images, rng, self.flip > 0, self.shift) if self.augmentation == "shift" else images)

    def _transform(self, side: int, own: Normalization) -> Callable[..., Tensor]:
        shape = (self._side(side), self.crop_scale, self.crop_ratio)
        return training_transform(*shape, self.flip, self.randaugment, self.interpolation, own.in_color())

    def _side(self, side: int) -> int:
        """Pixels a side of what the network sees of images with ``side``."""
        if self.augmentation != "imagenet":
            return side
        return self.resolution or (side if self.model == "cnn" else resolution(self.model))

    # ---- loss and metrics --------------------------------------------------------------------------------------------

    @mean_over_examples
    def loss(self, model: Callable[..., Any], batch: Examples, progress: float, rng: torch.Generator) -> Loss:
        """Cross-entropy with the labels, plus alpha times the divergence from the teacher's predictions on the same images."""
        if self.teacher is None or self.alpha == 0:
            labels = _label_loss(model(batch.image), batch)
            return Loss(labels, {"labels": labels})
        student, advice = model(batch.image, taught=True)
        parts = {"labels": _label_loss(student, batch), "teacher": distillation(student, advice, self.temperature, self.rescaled)}
        return Loss(objective(**parts, alpha=self.alpha, only_teacher=self.only_teacher), parts)  # type: ignore[arg-type]

    def evaluate(self, model: nn.Module, batch: Examples) -> Metrics:
        """Loss and accuracy of the network, and of its average as ``average_loss`` and ``average_accuracy``.

        Of more than five classes also ``top5_accuracy``; AUROC and AUPRC for two.
        """
        images, labels = self._evaluated(batch.image), batch.label
        logits = model(images)
        sums = _sums(logits, labels)
        if model.average is not None:
            averaged = _sums(model.average(images), labels)  # type: ignore[operator]
            sums |= {f"average_{name}": averaged[name] for name in ("loss", "accuracy")}
        scored = scores(logits)
        return Metrics.of_batch(sums, len(batch), scored, None if scored is None else labels)

    def _evaluated(self, images: Tensor) -> Tensor:
        own = _normalization(self.model, images.shape[1])
        if self.augmentation != "imagenet":
            return own(images)
        how = "bicubic" if self.model == "cnn" else interpolation(self.model)
        return transformed(images, evaluation_transform(self._side(max(images.shape[2:])), self.evaluation_crop, how, own.in_color()))

    # ---- steps and state ---------------------------------------------------------------------------------------------

    def groups(self, model: nn.Module) -> Sequence[Group]:
        """No weight decay on biases, on vectors such as the scales of normalization, and on what the network names itself."""
        from timm.optim._param_groups import param_groups_weight_decay

        network: Any = model.network
        exempt = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
        groups = param_groups_weight_decay(network, 1.0, no_weight_decay_list=exempt)
        free = {id(param) for group in groups if not group["weight_decay"] for param in group["params"]}
        return [Group([name for name, param in model.named_parameters() if id(param) in free], decayed=False)]

    def follow(self, model: nn.Module, batch: Examples, progress: float) -> None:
        """The moving average moves."""
        if isinstance(model.student, Averaged):
            steps: Any = model.steps
            model.student.follow(warmed_up(self.ema_decay, int(steps)) if self.ema_warmup else self.ema_decay, "averaged")
            steps.add_(1)

    def holding(self, name: str) -> Holding:
        """The teacher never changes; the average may stay in the silo."""
        if name.startswith("teacher."):
            return "constant"
        if self.average == "private" and (name.startswith("student.average.") or name == "steps"):
            return "private"
        return super().holding(name)

    def begin(self, model: nn.Module) -> None:
        """A silo's own average begins at the weights that it follows."""
        if self.average == "private" and isinstance(model.student, Averaged):
            model.student.begin()

    def head(self, model: nn.Module) -> nn.Module | None:
        """The last layer of the network; None where there are two, as LeViT has."""
        network: Any = model.network
        head = network.classifier if isinstance(network, SmallCNN) else network.get_classifier()
        return head if isinstance(head, nn.Module) else None

    def _network(self, spec: Spec, rng: torch.Generator) -> nn.Module:
        channels, *sides = spec.image_shape
        if self.model != "cnn":
            return backbone(self.model, spec.classes, channels, self._side(max(sides)), rng, drop_path_rate=self.drop_path)
        with global_generators(rng):
            return SmallCNN(channels, self.widths, spec.classes)


def _label_loss(logits: Tensor, batch: Examples) -> Tensor:
    targets = batch.fields[TARGET] if TARGET in batch else F.one_hot(batch.label, logits.shape[1]).to(logits.dtype)
    return cross_entropy(logits, targets)


def _sums(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Loss and accuracies, summed over a batch."""
    sums = {"loss": F.cross_entropy(logits, labels, reduction="none").double().sum(), "accuracy": correct(logits, labels).sum()}
    if logits.shape[1] > 5:
        sums["top5_accuracy"] = (logits.topk(5).indices == labels[:, None]).sum()
    return sums


def _normalization(model: str, channels: int) -> Normalization:
    return Normalization.none(channels) if model == "cnn" else Normalization.of_timm(model, channels)


def _prepared(teacher: nn.Module, channels: int, side: int) -> nn.Module:
    """The teacher, with BatchNorm folded into its convolutions."""
    return folded(teacher, torch.rand(1, channels, side, side, generator=generator(0, "folding")))
