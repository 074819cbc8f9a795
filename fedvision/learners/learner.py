"""The contract of a learner: what one client learns."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from fedvision.data.examples import Examples
from fedvision.data.federated import Spec
from fedvision.gallery import Gallery
from fedvision.metrics import Metrics

Holding = Literal["shared", "private", "constant"]
"""What a federation does with an array of a model: it travels and is averaged, it stays in the silo, or it never changes."""


@dataclass(frozen=True)
class Loss:
    """A loss on one batch.

    Attributes:
        total: scalar to minimize, a mean over the batch.
        parts: its named terms, each a scalar; a run records their means as ``train_<name>``.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Parameters that the optimizer treats alike.

    Attributes:
        names: theirs, in ``model.named_parameters()``.
        lr_factor: times the optimizer's learning rate.
        decayed: whether the optimizer's weight decay applies to them.
    """

    names: Sequence[str]
    lr_factor: float = 1.0
    decayed: bool = True


@dataclass(frozen=True)
class Interchangeable:
    """Rows of an array whose order means nothing, as those of prototypes: in another order the model says the same.

    Attributes:
        name: of the array, in the model's state dict; it travels.
        alike: further arrays whose rows go with these, as those of a teacher that each silo has.
    """

    name: str
    alike: tuple[str, ...] = ()


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

    Attributes:
        learns_unlabeled: whether training examples may lack a label, that is, have the label -1.
        shown: how many examples of the test set ``pictures`` is given, at most.
        private: patterns such as ``"*.norm*"`` of the model's arrays that stay in the silo, besides those that the
            learner keeps there anyway.
    """

    learns_unlabeled: ClassVar[bool] = False
    shown: ClassVar[int] = 8
    private: tuple[str, ...] = ()

    # ---- what every learner says ---------------------------------------------------------------------------------

    @abstractmethod
    def build(self, spec: Spec, rng: torch.Generator) -> nn.Module:
        """A freshly initialized model for data of this shape; the same generator state gives the same weights.

        Everything that training remembers is in its state dict: moving averages, queues, augmentation policies.
        """

    @abstractmethod
    def loss(self, model: Callable[..., Any], batch: Examples, progress: float, rng: torch.Generator) -> Loss:
        """The training loss on a batch.

        Args:
            model: from ``build``, or anything that is called like it (``torch.func.functional_call``).
            batch: a non-empty batch, as ``draw`` left it.
            progress: how much of the training is done, in [0, 1].
            rng: for whatever the loss draws.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, batch: Examples) -> Metrics:
        """The metrics on a batch, which add up over batches; called without gradients, in evaluation mode."""

    def overall(self, model: nn.Module, examples: Examples) -> Mapping[str, float]:
        """What is measured over all examples together and does not add, as ranks among them; by default nothing.

        Called as ``evaluate`` is, once, beside it.

        Args:
            model: from ``build``.
            examples: all of them, as they are stored: ``batches`` and ``decoded`` give what ``evaluate`` is given.
        """
        return {}

    # ---- what some say too: batches --------------------------------------------------------------------------------

    def train_view(self, batch: Examples, rng: torch.Generator) -> Examples:
        """The batch as the loss sees it, augmented; by default as it is."""
        return batch

    def order(self, examples: int, rng: torch.Generator) -> Tensor:
        """In which order a pass over so many examples visits them; as many indices."""
        return torch.randperm(examples, generator=rng)

    def draw(self, model: nn.Module, train: Examples, index: slice | Tensor, rng: torch.Generator) -> Examples:
        """The batch of a step, given whose turn it is; by default the training view of these.

        Args:
            model: as it is before the step; for what the views depend on. Not to be changed.
            train: all of the client's training examples.
            index: of those whose turn it is.
            rng: for whatever is drawn.
        """
        return self.train_view(train[index].decoded(), rng)

    # ---- steps and state -------------------------------------------------------------------------------------------

    def groups(self, model: nn.Module) -> Sequence[Group]:
        """The parameter groups of the optimizer; empty if it treats all alike."""
        return ()

    def precede(self, model: nn.Module, batch: Examples, loss: Loss, progress: float) -> None:  # noqa: B027
        """What comes between a batch's loss and the step: averages of the weights that the loss was of, in place, without gradients.

        Changes of what is trained are where the step begins; the gradient has been computed and stays as it is.
        """

    def follow(self, model: nn.Module, batch: Examples, progress: float) -> None:  # noqa: B027
        """What follows a step: moving averages, queues, policies, updated in place; called without gradients."""

    def holding(self, name: str) -> Holding:
        """What a federation does with the array of this name in the model's state dict; see ``private``."""
        return "private" if any(fnmatchcase(name, pattern) for pattern in self.private) else "shared"

    def begin(self, model: nn.Module) -> None:  # noqa: B027
        """Set what a silo keeps by what it has just been sent, where it keeps nothing yet; called without gradients.

        The private arrays are then the initial model's: a moving average, for one, must begin at the weights it follows.
        """

    def interchangeable(self, model: nn.Module) -> Sequence[Interchangeable]:
        """Rows of the model whose order means nothing; two silos may have the same ones in another order. By default none."""
        return ()

    @property
    def digest(self) -> str:
        """A fingerprint of what the settings name without saying what is in it, as a vocabulary; a run with another is another run."""
        return ""

    def head(self, model: nn.Module) -> nn.Module | None:
        """The classifier head within ``model``, for strategies that look at it; None if there is none."""
        return None

    def pictures(self, model: nn.Module, examples: Examples) -> Mapping[str, Gallery]:
        """What the model does, to be looked at, by the names of the files; by default nothing.

        Called without gradients, in evaluation mode; nothing may be changed.

        Args:
            model: as a run left it.
            examples: the first of the test set, ``shown`` at most.
        """
        return {}


def composes_its_batches(learner: Learner) -> bool:
    """Whether a learner's batches are more than training views of the examples whose turn it is, in random order."""
    return type(learner).draw is not Learner.draw or type(learner).order is not Learner.order


def draws_pictures(learner: Learner) -> bool:
    """Whether a learner has pictures of its own."""
    return type(learner).pictures is not Learner.pictures


def follows_its_steps(learner: Learner) -> bool:
    """Whether something of a learner precedes or follows each step."""
    return type(learner).follow is not Learner.follow or type(learner).precede is not Learner.precede
