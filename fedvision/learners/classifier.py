"""Plain classification: the papers' MLP and CNN, or any timm model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fedvision.backbones import backbone, group_normalized
from fedvision.data.examples import Examples
from fedvision.data.federated import Spec
from fedvision.errors import ExperimentError
from fedvision.learners.learner import Learner, Loss, mean_over_examples
from fedvision.metrics import Metrics
from fedvision.models import CNN, MLP, xavier
from fedvision.registry import learners
from fedvision.seeds import global_generators
from fedvision.settings import Count, Natural, nearest


def cross_entropy(logits: Float[Tensor, "n outputs"], labels: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Loss per example: binary for one logit, the log-odds of class 1; else categorical."""
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype), reduction="none")
    return F.cross_entropy(logits, labels, reduction="none")


def correct(logits: Float[Tensor, "n outputs"], labels: Int[Tensor, "n"]) -> Bool[Tensor, "n"]:
    """Whether each prediction is right; a single logit predicts class 1 when positive."""
    predicted = (logits[:, 0] > 0).to(labels.dtype) if logits.shape[1] == 1 else logits.argmax(1)
    return predicted == labels


def scores(logits: Float[Tensor, "n outputs"]) -> Float[Tensor, "n"] | None:
    """The log-odds of class 1 for binary tasks; else None."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else None


@learners("classifier")
@dataclass(frozen=True, kw_only=True)
class Classifier(Learner):
    """Image or table classification with the FedILC paper's MLP or CNN, or any timm model.

    Attributes:
        model: ``mlp``, ``cnn``, or a timm model name such as ``resnet18``.
        hidden: widths of the MLP's hidden layers, or of the CNN's three convolutions; timm models have their own.
        relu: how many of the MLP's hidden layers a ReLU follows; all if not given.
        outputs: number of logits; if not given, one (log-odds) for two classes, else one a class.
        normalization: of timm models: ``group`` puts GroupNorm in place of each BatchNorm, so that no example depends on others and no
            running statistics are averaged, as ``[privacy]`` needs it; if not given, the model's own.
    """

    model: str = "mlp"
    hidden: tuple[Count, ...] | None = None
    relu: Natural | None = None
    outputs: Count | None = None
    normalization: Literal["group"] | None = None

    def build(self, spec: Spec, rng: torch.Generator) -> nn.Module:
        """The model, with Xavier-uniform weights for the paper's own and timm's initialization for timm's."""
        outputs = self.outputs or (1 if spec.classes == 2 else spec.classes)
        if outputs < spec.classes and not (outputs == 1 and spec.classes == 2):
            raise ExperimentError(f"learner.outputs = {outputs} cannot tell {spec.classes} classes apart; leave it out")
        if self.model not in ("mlp", "cnn"):
            network = self._timm(spec, outputs, rng)
            return network if self.normalization is None else group_normalized(network)
        if self.normalization is not None:
            raise ExperimentError(f"learner.normalization is for timm models; {self.model!r} has no BatchNorm: leave it out")
        with global_generators(rng):  # torch's constructors know no others
            return self._model(spec, outputs, rng)

    @mean_over_examples
    def loss(self, model: Callable[..., Any], batch: Examples, progress: float, rng: torch.Generator) -> Loss:
        """Mean cross-entropy."""
        return Loss(cross_entropy(model(batch.image), batch.label).mean())

    def evaluate(self, model: nn.Module, batch: Examples) -> Metrics:
        """Loss and accuracy; AUROC and AUPRC for two classes."""
        logits, labels = model(batch.image), batch.label
        sums = {"loss": cross_entropy(logits, labels).double().sum(), "accuracy": correct(logits, labels).sum()}
        scored = scores(logits)
        return Metrics.of_batch(sums, len(batch), scored, None if scored is None else labels)

    def head(self, model: nn.Module) -> nn.Module | None:
        """The last layer."""
        return model.classifier if isinstance(model, MLP | CNN) else model.get_classifier()  # type: ignore

    def _model(self, spec: Spec, outputs: int, rng: torch.Generator) -> nn.Module:
        if self.model == "mlp":
            return xavier(MLP(spec.image_shape, (390, 390) if self.hidden is None else self.hidden, outputs, self.relu), rng)
        _check_images(self.model, spec)
        widths = (64, 128, 128) if self.hidden is None else self.hidden
        if len(widths) != 3 or any(width % 8 for width in widths):
            raise ExperimentError(f"learner.hidden = {list(widths)}: the cnn has three convolutions, each a multiple of 8 wide")
        if not all(CNN.final_side(side) for side in spec.image_shape[1:]):
            raise ExperimentError(f"learner.model = 'cnn' needs images of at least 14x14, the data has {spec.image_shape[1:]}; use 'mlp'")
        return xavier(CNN(spec.image_shape, widths, outputs), rng)

    def _timm(self, spec: Spec, outputs: int, rng: torch.Generator) -> nn.Module:
        import timm

        _check_images(self.model, spec)
        if not timm.is_model(self.model):
            hint = nearest(self.model, ["mlp", "cnn", *timm.list_models()])[:200]
            raise ExperimentError(f"unknown learner.model {self.model!r}; {hint} ...")
        if self.hidden is not None:
            raise ExperimentError(f"learner.hidden does not apply to the timm model {self.model!r}; leave it out")
        channels, *sides = spec.image_shape
        return backbone(self.model, outputs, channels, max(sides), rng)


def _check_images(model: str, spec: Spec) -> None:
    if len(spec.image_shape) != 3:
        raise ExperimentError(f"learner.model = {model!r} needs images, the inputs have shape {spec.image_shape}; use 'mlp'")
