"""The contract of a learner: what one client learns."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedvision.data.examples import Examples
from fedvision.data.federated import Spec
from fedvision.metrics import Metrics


@dataclass(frozen=True)
class Loss:
    """A loss on one batch.

    Attributes:
        total: scalar to minimize, a mean over the batch.
        parts: its named terms, each a scalar; a run records their means as ``train_<name>``.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


Method = TypeVar("Method", bound=Callable[..., Loss])


def mean_over_examples(loss: Method) -> Method:
    """Declare that a learner's ``loss`` on a batch, parts too, is the mean of those on its examples one by one.

    Clients with batches of different sizes can then be computed together. A class that overrides the method declares it anew.
    """
    loss.mean_over_examples = True  # type: ignore[attr-defined]
    return loss


def is_mean_over_examples(learner: "Learner") -> bool:
    """Whether a learner has declared it of its loss."""
    return getattr(learner.loss, "mean_over_examples", False)


@dataclass(frozen=True, kw_only=True)
class Learner(ABC):
    """A model, its views of an example, its loss and its metrics: one paper. It knows nothing of federations.

    A subclass is a frozen dataclass whose fields are its settings in the experiment file.
    ``fedvision.learners.check.check_learner`` is the test suite that every learner passes.
    """

    @abstractmethod
    def build(self, spec: Spec, rng: torch.Generator) -> nn.Module:
        """A freshly initialized model for data of this shape; the same generator state gives the same weights."""

    @abstractmethod
    def loss(self, model: Callable[..., Any], batch: Examples, progress: float, rng: torch.Generator) -> Loss:
        """The training loss on a batch.

        Args:
            model: from ``build``, or anything that is called like it (``torch.func.functional_call``).
            batch: a non-empty batch, as ``train_view`` left it.
            progress: how much of the training is done, in [0, 1].
            rng: for whatever the loss draws.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, batch: Examples) -> Metrics:
        """The metrics on a batch, which add up over batches; called without gradients, in evaluation mode."""

    def train_view(self, batch: Examples, rng: torch.Generator) -> Examples:
        """The batch as the loss sees it, augmented; by default as it is."""
        return batch

    def head(self, model: nn.Module) -> nn.Module | None:
        """The classifier head within ``model``, for strategies that look at it; None if there is none."""
        return None
