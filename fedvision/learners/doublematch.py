"""DoubleMatch: semi-supervised classification with pseudo-labels and self-supervised similarity of embeddings.

A labeled batch x with labels y and an unlabeled one, of which a weak and a strong view are taken, go through the network at
once. p is what a classifier predicts, z the embedding of a weak view, v that of a strong view and h a linear head:

    l = l_l(p(x), y) + w_p l_p + w_s l_s(h(v), z)

Source: arXiv 2205.05575, and its public implementation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fedvision import ctaugment
from fedvision.data.examples import IMAGE, LABEL, Examples, concatenate
from fedvision.data.federated import Spec
from fedvision.ema import Averaged, warmed_up
from fedvision.errors import ExperimentError
from fedvision.learners.classifier import correct, cross_entropy, scores
from fedvision.learners.learner import Group, Holding, Learner, Loss
from fedvision.metrics import Metrics
from fedvision.registry import learners
from fedvision.seeds import global_generators
from fedvision.settings import Count, Fraction, Natural, NonNegative, Positive, PositiveFraction
from fedvision.views import signed, weak
from fedvision.wide_resnet import SIZES, WideResNet, averaged, initialized, reference_names

STRONG, PROBE_OPERATIONS, PROBE_LEVELS = "strong", "probe_operations", "probe_levels"
"""Fields of a batch besides images, which are weak views, and labels: the strong view, in labeled rows the probe; and its policy."""

Similarity = Literal["cosine", "mse", "softmax"]

# ---- the losses -----------------------------------------------------------------------------------------------------


def supervised_loss(logits: Float[Tensor, "b classes"], labels: Int[Tensor, "b"]) -> Float[Tensor, ""]:
    """l_l: mean cross-entropy of labeled examples; 0 where there is none."""
    return F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)


def confident(weak: Float[Tensor, "n classes"], threshold: float) -> Bool[Tensor, "n"]:
    """Where the prediction on the weak view has at least probability ``threshold``.

    Differs: "at least" as in the reference; the paper's mask is of those above it.
    """
    return weak.detach().softmax(1).amax(1) >= threshold


def pseudo_label_loss(weak: Float[Tensor, "n classes"], strong: Float[Tensor, "n classes"], threshold: float) -> Float[Tensor, ""]:
    """l_p: cross-entropy of the strong view against the class that the weak view says, where it is confident.

    It is a mean over all n, the others counting 0. No gradient reaches the weak view.

    Args:
        weak: logits.
        strong: logits.
        threshold: in [0, 1].
    """
    losses = F.cross_entropy(strong, weak.detach().argmax(1), reduction="none")
    return (losses * confident(weak, threshold)).mean()


def cosine_loss(projected: Float[Tensor, "n d"], target: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """l_s: one less the mean cosine between h(v) and z, in [0, 2]; no gradient reaches z.

    Differs: the 1, as in the reference; the paper's is -cos, with the same gradients.
    """
    return 1 - (F.normalize(projected, eps=1e-6) * F.normalize(target.detach(), eps=1e-6)).sum(1).mean()


def squared_loss(projected: Float[Tensor, "n d"], target: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """l_s of the ablation: mean over examples and features of (h(v) - z)^2, neither normalized; no gradient reaches z."""
    return F.mse_loss(projected, target.detach())


def softmax_loss(projected: Float[Tensor, "n d"], target: Float[Tensor, "n d"], temperature: float) -> Float[Tensor, ""]:
    """l_s of the ablation: mean cross-entropy of softmax(h(v)) against softmax(z / temperature); no gradient reaches z.

    Differs: the temperature divides only z, as in the reference.
    """
    return F.cross_entropy(projected, (target.detach() / temperature).softmax(1))


def similarity_loss(
    kind: Similarity, projected: Float[Tensor, "n d"], target: Float[Tensor, "n d"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """l_s, of one of three kinds; ``temperature`` is for ``softmax`` alone."""
    if kind == "softmax":
        return softmax_loss(projected, target, temperature)
    return cosine_loss(projected, target) if kind == "cosine" else squared_loss(projected, target)


def kernels(parameters: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Names of the kernels of convolutions and linear layers, which weight decay pulls to 0; then those of the rest.

    Differs: the paper's formula decays all parameters, the reference these.
    """
    both: tuple[list[str], list[str]] = ([], [])
    for name, parameter in parameters.items():
        both[parameter.ndim < 2].append(name)
    return both


# ---- the model ------------------------------------------------------------------------------------------------------


class Views(NamedTuple):
    """What the network makes of a batch's views.

    Attributes:
        logits: of all views.
        embeddings: of all views.
        projected: h of the embeddings of the strong ones.
    """

    logits: Float[Tensor, "n classes"]
    embeddings: Float[Tensor, "n d"]
    projected: Float[Tensor, "strong d"]


class Projecting(nn.Module):
    """A network with a linear head on its embedding, which training needs and testing does not.

    Args:
        backbone: the network.
    """

    def __init__(self, backbone: WideResNet) -> None:
        super().__init__()
        self.backbone = backbone
        width = backbone.classifier.in_features
        self.projection = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "n c h w"], strong: int = 0) -> Views:
        """Logits and embeddings of all images, projections of the last ``strong`` of them."""
        z = self.backbone.features(x)
        return Views(self.backbone.classifier(z), z, self.projection(z[len(z) - strong :]))


class SemiSupervised(Averaged):
    """All that DoubleMatch's training remembers: the network, the moving average that is tested, CTAugment's rates.

    The average's running statistics are those of the network.

    Args:
        network: with its projection head.
    """

    rates: Tensor
    steps: Tensor

    def __init__(self, network: Projecting) -> None:
        super().__init__(network)
        self.register_buffer("rates", ctaugment.initial_rates())
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.average.eval()

    def train(self, mode: bool = True) -> "SemiSupervised":
        """As every module, save that the average is never trained."""
        super().train(mode)
        self.average.eval()
        return self


def checkpoint_names(model: SemiSupervised) -> dict[str, str]:
    """What the reference's checkpoints call each array of the network and of its average, by their names in the state dict.

    For ``fedvision.wide_resnet.from_reference`` and ``to_reference``.
    """
    backbone = reference_names(model.network.backbone, projection=None)  # type: ignore[arg-type]
    head = {"projection.weight": "classify/projection_head/kernel", "projection.bias": "classify/projection_head/bias"}
    names = {f"backbone.{ours}": theirs for ours, theirs in backbone.items()} | head
    return {f"{part}.{ours}": theirs for part, of in (("network", names), ("average", averaged(names))) for ours, theirs in of.items()}


# ---- the learner ----------------------------------------------------------------------------------------------------


@learners("doublematch")
@dataclass(frozen=True, kw_only=True)
class DoubleMatch(Learner):
    """Semi-supervised classification of images, of which few have labels: DoubleMatch, and FixMatch without its similarity.

    The client's examples whose turn it is are a step's unlabeled ones, whether they have a label or not;
    ``labeled_batch`` more are drawn from those whose label is not -1. Weight decay applies to kernels alone.

    Attributes:
        network: the paper's for CIFAR-10 and SVHN, for CIFAR-100, or for STL-10.
        scales: number of stages, if not the network's.
        filters: width of the first stage, if not the network's.
        repeat: blocks a stage, if not the network's.
        bn_momentum: share of a batch in BatchNorm's running statistics; a run of a few hundred steps needs e.g. 0.05.
        labeled_batch: labeled examples a step; they repeat where a client has fewer.
        threshold: how probable a class must be for the weak view to be a pseudo-label.
        pseudo_weight: of the loss of pseudo-labels.
        similarity: how h(v) is compared with z.
        similarity_temperature: of z, for ``softmax``.
        similarity_weight: of the similarity's loss; 0 makes it FixMatch.
        supervised_only: train on the labeled views alone: the baseline of all semi-supervised learning.
        augmentation: of the strong view: CTAugment and a cutout, or nothing more than the weak view's.
        cutout: size of the cutout in [0, 1]: of half the image's side, rounded.
        flip: whether left and right may change places: not for digits.
        workers: threads that make strong views; 0: the training's own does.
        ema_decay: of the moving average that is tested.
        ema_warmup: whether that decay is lower in the first steps, as a short run needs it.
        average: whether the moving average travels and is averaged as the weights are, or each silo keeps its own, beginning
            at the weights it is first sent.

    Source: arXiv 2205.05575; the defaults are CIFAR-10's with 4,000 labels in its public implementation, whose
        optimizer is SGD with momentum 0.9, Nesterov, weight decay 5e-4 and rate 0.03 with schedule ``gamma-cosine``,
        in batches of 448.
    Differs: every step draws its labeled examples anew, where the reference passes over them in shuffled order;
        CTAugment's rates are never stale, where its worker processes are some batches behind.
    """

    learns_unlabeled = True
    network: Literal["wrn-28-2", "wrn-28-8", "wrn-37-2"] = "wrn-28-2"
    scales: Count | None = None
    filters: Count | None = None
    repeat: Count | None = None
    bn_momentum: PositiveFraction = 0.001
    labeled_batch: Count = 64
    threshold: Fraction = 0.95
    pseudo_weight: NonNegative = 1.0
    similarity: Similarity = "cosine"
    similarity_temperature: Positive = 1.0
    similarity_weight: NonNegative = 5.0
    supervised_only: bool = False
    augmentation: Literal["ctaugment", "weak"] = "ctaugment"
    cutout: Fraction = 1.0
    flip: bool = True
    workers: Natural = 0
    ema_decay: Fraction = 0.999
    ema_warmup: bool = False
    average: Literal["shared", "private"] = "shared"

    def build(self, spec: Spec, rng: torch.Generator) -> SemiSupervised:
        """Network, projection head, their average, and rates.

        Raises:
            ExperimentError: data that are no images, or that CTAugment cannot change.
        """
        if len(spec.image_shape) != 3:
            raise ExperimentError(f"learner doublematch needs images, the inputs have shape {spec.image_shape}; choose other data")
        channels = spec.image_shape[0]
        if self.augmentation == "ctaugment" and channels not in (1, 3):
            fact = f"learner.augmentation = 'ctaugment' changes images of 1 or 3 channels, the data has {channels}"
            raise ExperimentError(f"{fact}; choose 'weak'")
        with global_generators(rng):  # torch's constructors know no others
            network = Projecting(WideResNet(channels, spec.classes, **self._size(), momentum=self.bn_momentum))
        return SemiSupervised(initialized(network, rng))  # type: ignore[arg-type]

    def _size(self) -> dict[str, int]:
        given = {"scales": self.scales, "filters": self.filters, "repeat": self.repeat}
        return SIZES[self.network] | {name: value for name, value in given.items() if value is not None}

    # ---- a step --------------------------------------------------------------------------------------------------

    def draw(self, model: nn.Module, train: Examples, index: slice | Tensor, rng: torch.Generator) -> Examples:
        """The labeled rows, then the unlabeled ones, whose label is -1 here.

        Returns:
            Images [n, c, h, w] in [-1, 1], weak views; ``strong``, of the same shape, in labeled rows the probe;
            labels; ``probe_operations`` [n, 2] and ``probe_levels`` [n, 2, 2], of no meaning in unlabeled rows.
        """
        labeled = self._labeled(train[_repeated(train.label, self.labeled_batch, rng)].decoded(), rng)
        return concatenate([labeled, self._unlabeled(train[index].decoded(), model, rng)])

    def loss(self, model: Callable[..., Any], batch: Examples, progress: float, rng: torch.Generator) -> Loss:
        """The paper's, and its three terms unweighted; ``mask`` is the share of examples with a pseudo-label.

        All views go through the network at once, so that they share BatchNorm's statistics; probes do not. BatchNorm needs
        more than one value a channel, which is the case with one unlabeled example, of which there are two views.
        Without labels the supervised term is 0, and with ``supervised_only`` the whole loss.
        """
        labeled = int((batch.label >= 0).sum())
        if self.supervised_only:
            return self._supervised(model, batch, labeled)
        strong = batch.fields[STRONG][labeled:]
        seen: Views = model(torch.cat([batch.image, strong]), strong=len(strong))
        of_labeled, of_weak, of_strong = seen.logits.split([labeled, len(strong), len(strong)])
        z = seen.embeddings[labeled : len(batch)]
        supervised = supervised_loss(of_labeled, batch.label[:labeled])
        pseudo = pseudo_label_loss(of_weak, of_strong, self.threshold)
        similarity = similarity_loss(self.similarity, seen.projected, z, self.similarity_temperature)
        mask = confident(of_weak, self.threshold).to(z.dtype).mean()
        total = supervised + self.pseudo_weight * pseudo + self.similarity_weight * similarity
        return Loss(total, {"supervised": supervised, "pseudo": pseudo, "similarity": similarity, "mask": mask})

    def groups(self, model: nn.Module) -> Sequence[Group]:
        """Kernels, which decay, and the rest, which does not."""
        decayed, others = kernels({name: param for name, param in model.named_parameters() if param.requires_grad})
        return Group(decayed), Group(others, decayed=False)

    def follow(self, model: nn.Module, batch: Examples, progress: float) -> None:
        """The average moves; what it makes of the labeled examples' probes moves the rates.

        Differs: the average follows the weights after the step; in the reference their order is undefined.
        """
        assert isinstance(model, SemiSupervised)
        steps = int(model.steps)
        model.follow(warmed_up(self.ema_decay, steps) if self.ema_warmup else self.ema_decay)
        model.steps += 1
        labeled = batch[batch.label >= 0]
        if self.augmentation == "ctaugment" and not self.supervised_only and len(labeled):
            p = model.average(labeled.fields[STRONG]).logits.softmax(1)
            near = ctaugment.proximity(p, labeled.label)
            model.rates.copy_(ctaugment.updated(model.rates, labeled.fields[PROBE_OPERATIONS], labeled.fields[PROBE_LEVELS], near))

    # ---- the federation, testing ---------------------------------------------------------------------------------

    def holding(self, name: str) -> Holding:
        """Rates stay in the silo; the average and the number of its steps as ``average`` says."""
        follows = name == "steps" or name.startswith("average.")
        return "private" if name == "rates" or (follows and self.average == "private") else super().holding(name)

    def begin(self, model: nn.Module) -> None:
        """An average of the silo's own begins at the weights."""
        assert isinstance(model, SemiSupervised)
        if self.average == "private":
            model.begin()

    def evaluate(self, model: nn.Module, batch: Examples) -> Metrics:
        """Loss and accuracy of the average on the examples with a label; AUROC and AUPRC for two classes."""
        assert isinstance(model, SemiSupervised)
        batch = batch[batch.label >= 0]
        logits, labels = model.average(signed(batch.image)).logits, batch.label
        sums = {"loss": cross_entropy(logits, labels).double().sum(), "accuracy": correct(logits, labels).sum()}
        scored = scores(logits)
        return Metrics.of_batch(sums, len(batch), scored, None if scored is None else labels)

    def head(self, model: nn.Module) -> nn.Module | None:
        """The classifier of the network that is trained."""
        assert isinstance(model, SemiSupervised)
        return model.network.backbone.classifier  # type: ignore[union-attr, return-value]

    # ---- views ---------------------------------------------------------------------------------------------------

    def _labeled(self, examples: Examples, rng: torch.Generator) -> Examples:
        """Weak views, and probes made of them."""
        view = weak(signed(examples.image), rng, self.flip)
        plan = ctaugment.probe_policies(len(view), rng)
        probing = self.augmentation == "ctaugment" and not self.supervised_only
        return _rows(view, ctaugment.applied(view, plan, self.workers) if probing else view, examples.label, plan)

    def _unlabeled(self, examples: Examples, model: nn.Module, rng: torch.Generator) -> Examples:
        """A weak view, and another that becomes the strong one."""
        images, nothing = signed(examples.image), torch.full_like(examples.label, -1)
        view, strong = weak(images, rng, self.flip), weak(images, rng, self.flip)
        if self.augmentation == "ctaugment" and not self.supervised_only:
            assert isinstance(model, SemiSupervised)
            plan = ctaugment.strong_policies(model.rates, len(images), rng, cutout_level=self.cutout)
            strong = ctaugment.applied(strong, plan, self.workers)
        return _rows(view, strong, nothing, ctaugment.no_policies(len(images)))

    def _supervised(self, model: Callable[..., Any], batch: Examples, labeled: int) -> Loss:
        """l_l alone. Where no example has a label, the network sees the unlabeled ones, and their loss counts 0."""
        images = batch.image[: labeled or len(batch)]
        logits: Tensor = model(images).logits
        loss = supervised_loss(logits, batch.label[:labeled]) if labeled else 0 * logits.sum()
        return Loss(loss, {"supervised": loss})


def _rows(view: Float[Tensor, "n c h w"], strong: Float[Tensor, "n c h w"], labels: Int[Tensor, "n"], plan: ctaugment.Policies) -> Examples:
    device = view.device
    probe = {PROBE_OPERATIONS: plan.operations.to(device), PROBE_LEVELS: plan.levels.to(device)}
    return Examples({IMAGE: view, STRONG: strong, LABEL: labels, **probe})


def _repeated(labels: Int[Tensor, "n"], count: int, rng: torch.Generator) -> Int[Tensor, "k"]:
    """Indices of ``count`` random labeled examples: passes over all of them, each in a new order; none if there is none."""
    labeled = (labels >= 0).nonzero()[:, 0]
    passes = -(-count // len(labeled)) if len(labeled) else 0
    orders = [torch.randperm(len(labeled), generator=rng) for _ in range(passes)]
    return labeled[torch.cat([*orders, torch.zeros(0, dtype=torch.int64)])[:count].to(labels.device)]
