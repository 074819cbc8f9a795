"""Tasks of fine-tuning: what is to be predicted, what a prediction costs, and how it is judged.

What is not known of a target (label -1, class 255, depth NaN) counts nowhere, and nothing divides by 0.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from fedvision.data.examples import IGNORED, SEMSEG, Examples
from fedvision.metrics import Metrics, confusion
from fedvision.multimae.finetuned import CLS_HEAD, DEPTH_HEAD, SEMSEG_HEAD
from fedvision.multimae.losses import class_errors, known
from fedvision.multimae.modalities import DEPTH_MAP, Modality, semantic

TARGET = "target"
"""The field of a batch that holds what is to be predicted."""

PADDING = 254
"""The id of pixels beyond the picture in maps that the public implementation has padded."""

LEAST_DEPTH = 1e-6
"""Depths are divided by, and taken the logarithm of, as if they were at least that."""

DepthLoss = Literal["berhu", "l1", "mse"]


def mean_where(errors: Float[Tensor, "*n"], counted: Bool[Tensor, "*n"]) -> Float[Tensor, ""]:
    """The mean of the errors that count, over the whole batch; 0 if none does."""
    return torch.where(counted, errors, 0.0).sum() / counted.sum().clamp(min=1)


def pixel_loss(logits: Float[Tensor, "b classes h w"], ids: Int[Tensor, "b h w"]) -> Float[Tensor, ""]:
    """Cross-entropy, the mean over all pixels of the batch whose class is known."""
    return mean_where(class_errors(logits, ids), known(ids))


def depth_loss(kind: DepthLoss, prediction: Float[Tensor, "b 1 h w"], target: Float[Tensor, "b 1 h w"]) -> Float[Tensor, ""]:
    """The mean over all pixels of the batch whose depth is known, of |d|, d^2 or berHu(d), where d = prediction - target.

    berHu(d) is |d| below a threshold c and (d^2 + c^2) / (2 c) from there on, with c a fifth of the batch's largest |d|, 1e-5 at
    least, through which no gradient flows.

    Args:
        kind: which.
        prediction: of depths.
        target: NaN where not known.

    Source: Laina et al., arXiv 1606.00373, section 3.2.
    """
    there = ~target.isnan()
    d = torch.where(there, prediction - target.nan_to_num(0.0), 0.0).abs()
    if kind == "berhu":
        c = (0.2 * d.detach().max()).clamp(min=1e-5)
        d = torch.where(d < c, d, (d.square() + c.square()) / (2 * c))
    return mean_where(d.square() if kind == "mse" else d, there)


def depth_metrics(prediction: Float[Tensor, "b 1 h w"], truth: Float[Tensor, "b 1 h w"]) -> dict[str, Float[Tensor, "b"]]:
    """How far predicted depths p are from true ones t, means over each picture's pixels where t is known; 0 where none is.

    Args:
        prediction: in the unit of the truth.
        truth: NaN where not known.

    Returns:
        ``rmse``, the root of the mean of (p - t)^2; ``rel``, of |p - t| / t; ``srel``, of (p - t)^2 / t; ``log_rmse``, the root of the
        mean of (ln p - ln t)^2; ``delta1``, ``delta2``, ``delta3``, the shares of max(p / t, t / p) < 1.25, 1.25^2, 1.25^3.

    Source: Eigen et al., arXiv 1406.2283, section 4; as the public implementation of arXiv 2204.01678 does, which calls
        ``log_rmse`` log10. Differs: it takes them over batches, and averages these.
    """
    there = ~truth.isnan().flatten(1)
    p, t = prediction.flatten(1).double(), torch.where(there, truth.flatten(1).double(), 1.0)
    above, below = p.clamp(min=LEAST_DEPTH), t.clamp(min=LEAST_DEPTH)

    def mean(values: Tensor) -> Tensor:
        return torch.where(there, values, 0.0).sum(1) / there.sum(1).clamp(min=1)

    ratio = torch.maximum(above / below, below / above)
    return {
        "rmse": mean((p - t).square()).sqrt(),
        "rel": mean((p - t).abs() / below),
        "srel": mean((p - t).square() / below),
        "log_rmse": mean((above.log() - below.log()).square()).sqrt(),
        **{f"delta{k}": mean((ratio < 1.25**k).double()) for k in (1, 2, 3)},
    }


def zero_ignored(ids: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """Classes counted from 1 as counted from 0; 0, which stood for none of them, and what is padded become 255.

    >>> zero_ignored(torch.tensor([0, 1, 150, 254, 255])).tolist()
    [255, 0, 149, 255, 255]
    """
    ids = ids.long()
    return torch.where((ids == 0) | (ids >= PADDING), IGNORED, ids - 1)


class Task(ABC):
    """What is to be predicted of a picture: how its target is taken, what a prediction costs, and how it is judged.

    Attributes:
        head: name of the head that predicts it.
    """

    head: ClassVar[str]

    @property
    def modality(self) -> Modality | None:
        """What is predicted, called ``target``, so that it can be moved as the picture is; None: the label."""
        return None

    def cleaned(self, batch: Examples) -> Examples:
        """The examples, with classes counted as the task counts them."""
        return batch

    def aimed(self, values: Tensor) -> Tensor:
        """What the head is to predict, of the modality's values."""
        return values

    @abstractmethod
    def loss(self, prediction: Tensor, target: Tensor) -> Float[Tensor, ""]:
        """What is minimized; 0 where nothing of the target is known."""

    @abstractmethod
    def metrics(self, prediction: Tensor, target: Tensor) -> Metrics:
        """How good the predictions are for examples of which something is known; ``loss`` is the mean of what each alone has."""

    def _alone(self, prediction: Tensor, target: Tensor) -> Float[Tensor, ""]:
        """The sum of the losses of examples one by one."""
        each = [self.loss(prediction[i : i + 1], target[i : i + 1]) for i in range(len(target))]
        return torch.stack(each).double().sum()


@dataclass(frozen=True)
class Classification(Task):
    """The class of a picture: cross-entropy with labels [b], or with soft ones [b, classes].

    Attributes:
        smoothing: share of a target that is spread over all classes, in training.
    """

    head = CLS_HEAD
    smoothing: float = 0.0

    def loss(self, prediction: Tensor, target: Tensor) -> Float[Tensor, ""]:
        """The mean cross-entropy."""
        return F.cross_entropy(prediction, target, label_smoothing=self.smoothing)

    def metrics(self, prediction: Tensor, target: Tensor) -> Metrics:
        """Accuracy, of more than five classes also among the first five; AUROC and AUPRC of two."""
        loss = F.cross_entropy(prediction, target, reduction="sum")
        sums = {"loss": loss.double(), "accuracy": (prediction.argmax(1) == target).sum()}
        if prediction.shape[1] > 5:
            sums["top5_accuracy"] = (prediction.topk(5).indices == target[:, None]).sum()
        if prediction.shape[1] != 2:
            return Metrics.of_batch(sums, len(target))
        return Metrics.of_batch(sums, len(target), prediction[:, 1] - prediction[:, 0], target)


@dataclass(frozen=True)
class Segmentation(Task):
    """The class of every pixel.

    Attributes:
        classes: how many.
        first_ignored: whether ids are counted from 1, and 0 stands for none of the classes.
    """

    head = SEMSEG_HEAD
    classes: int
    first_ignored: bool = False

    @property
    def modality(self) -> Modality:
        """One id a pixel."""
        return replace(semantic(self.classes, stride=1), name=TARGET)

    def cleaned(self, batch: Examples) -> Examples:
        """Ids counted from 0."""
        if not self.first_ignored or SEMSEG not in batch:
            return batch
        return Examples({**batch.fields, SEMSEG: zero_ignored(batch.fields[SEMSEG])})

    def loss(self, prediction: Tensor, target: Tensor) -> Float[Tensor, ""]:
        """``pixel_loss``."""
        return pixel_loss(prediction, target)

    def metrics(self, prediction: Tensor, target: Tensor) -> Metrics:
        """``miou``, ``macc`` and ``aacc`` of the pixels of all pictures together."""
        table = confusion(target, prediction.argmax(1), self.classes)
        return Metrics.of_batch({"loss": self._alone(prediction, target)}, len(target), confusions={"": table})


@dataclass(frozen=True)
class DepthRegression(Task):
    """The depth of every pixel, less a mean and over a deviation that are the same for all pictures.

    Attributes:
        mean: meters.
        deviation: meters.
        kind: of the loss.
    """

    head = DEPTH_HEAD
    mean: float
    deviation: float
    kind: DepthLoss = "berhu"

    @property
    def modality(self) -> Modality:
        """Meters."""
        return replace(DEPTH_MAP, name=TARGET)

    def aimed(self, values: Tensor) -> Tensor:
        """Normalized."""
        return (values - self.mean) / self.deviation

    def loss(self, prediction: Tensor, target: Tensor) -> Float[Tensor, ""]:
        """``depth_loss``, of normalized depths."""
        return depth_loss(self.kind, prediction, target)

    def metrics(self, prediction: Tensor, target: Tensor) -> Metrics:
        """``depth_metrics`` in meters, means over pictures."""
        meters = (values * self.deviation + self.mean for values in (prediction, target))
        sums = {name: values.sum() for name, values in depth_metrics(*meters).items()}
        return Metrics.of_batch({"loss": self._alone(prediction, target), **sums}, len(target))


def judged(target: Tensor) -> Bool[Tensor, "b"]:
    """The examples of whose target something is known: labels [b], or maps."""
    return target >= 0 if target.ndim == 1 else known(target).flatten(1).any(1)
