"""A learner at work on the examples of one place: gradients and local steps, on the process's one model."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, repeat
from typing import Any

import torch
from flwr.app import RecordDict
from torch import Tensor, nn

from fedvision.arrays import Named
from fedvision.data import Examples
from fedvision.holdings import Holdings
from fedvision.interchange import arrange
from fedvision.learners.learner import Learner, Loss, follows_its_steps
from fedvision.optimizers import Stepper
from fedvision.reach import Reach


class Silo:
    """A client that holds the global model of a round; the ``Silo`` that strategies work with.

    The model is lent, not copied: a process has one, and each client loads the global arrays into it.

    Args:
        learner: what is learned.
        model: a model of that learner; overwritten.
        arrays: the global parameters and buffers, by the model's state-dict names.
        train: the client's training examples.
        state: what the client keeps between rounds.
        rng: all randomness of this answer.
        progress: how much of the training is done, in [0, 1].
        span: how much of the training this answer is; ``progress`` moves on by so much over the batches of ``batches``.
        holdings: which of the model's arrays the client keeps to itself; as the learner says, beginning with those
            that the model holds now, if not given.

    Attributes:
        work: how many examples have been asked for in batches, one that was asked for twice counting twice.
    """

    def __init__(
        self,
        learner: Learner,
        model: nn.Module,
        arrays: Named,
        train: Examples,
        state: RecordDict | None = None,
        rng: torch.Generator | None = None,
        progress: float = 0.0,
        span: float = 0.0,
        holdings: Holdings | None = None,
    ) -> None:
        self.learner, self.model, self.train, self.progress = learner, model, train, progress
        self.state = RecordDict() if state is None else state
        self.rng = torch.Generator().manual_seed(0) if rng is None else rng
        self.work = 0
        self._parts, self._sent = Tally(), arrays
        self._begun, self._span = progress, span
        self._holdings = Holdings.of(learner, model) if holdings is None else holdings
        self._shared = self._holdings.load(model, arrays, self.state)
        self._reach = Reach(model)
        model.train()

    @property
    def params(self) -> dict[str, Tensor]:
        """The model's trainable parameters that are shared, by name, as they are in the model."""
        return {name: param for name, param in self._trained.items() if name in self._shared}

    def arrays(self) -> dict[str, Tensor]:
        """A copy of all of the model's shared arrays: parameters and buffers."""
        return {name: _copy(tensor) for name, tensor in self._shared.items()}

    def buffers(self) -> dict[str, Tensor]:
        """A copy of the model's shared arrays that are not trained, such as BatchNorm's running statistics."""
        trained = set(self.params)
        return {name: _copy(tensor) for name, tensor in self._shared.items() if name not in trained}

    @property
    def untrained(self) -> frozenset[str]:
        """The shared arrays that no gradient of the loss has reached here: parameters, and the buffers that go with them.

        A penalty reaches whatever it is about and teaches nothing, so it does not count. Empty before anything was trained.
        """
        return self._reach.untrained & self._shared.keys()

    def keep(self) -> None:
        """Remember in ``state`` what of the model stays here."""
        self._holdings.keep(self.model, self.state)

    def loss(self, model: Callable[..., Any], batch: Examples) -> Tensor:
        """The learner's mean loss on a batch; ``model`` may be the silo's, or anything that is called like it."""
        return self.learner.loss(model, batch, self.progress, self.rng).total

    def batches(self, size: int, shuffle: bool = True, epochs: int = 1, steps: int | None = None) -> Iterator[Examples]:
        """Passes over the training examples in batches of ``size``, as the learner's loss sees them.

        Args:
            size: examples a batch; the last of a pass may be smaller.
            shuffle: whether each pass visits the examples in a new order.
            epochs: how many passes.
            steps: exactly so many batches, instead of ``epochs``.
        """
        total = step_count(len(self.train), size, epochs, steps)
        for step, index in enumerate(visits(self.learner, len(self.train), size, shuffle, epochs, steps, self.rng, self.train.device)):
            self.progress = self._begun + self._span * step / total
            batch = self.learner.draw(self.model, self.train, index, self.rng)
            self.work += len(batch)
            yield batch

    def gradient(self, batches: Iterable[Examples]) -> tuple[float, dict[str, Tensor]]:
        """Mean loss over the examples of all batches, and its gradient by parameter name; zero where there is none.

        What precedes and follows a step does so here too, once: to a server that takes the step, this answer is one.
        """
        params, losses = self.params, Tally()
        sums: list[Tensor] | None = None
        for batch in batches:
            loss = self._seen(batch, losses)
            self._reach.follow(params, loss.total)
            gradients = torch.autograd.grad(loss.total, list(params.values()), materialize_grads=True)
            if sums is None:
                sums = [gradient * len(batch) for gradient in gradients]  # not in place: autograd may hand out one tensor twice
            else:
                torch._foreach_add_(sums, gradients, alpha=len(batch))
        assert sums is not None, "a client holds at least one example"
        torch._foreach_div_(sums, losses.examples)
        self._precede(batch, loss)
        self._follow(batch)
        return losses.means()["loss"], dict(zip(params, sums, strict=True))

    def descend(self, batches: Iterable[Examples], optimizer: dict[str, Any], penalty: Callable[[], Tensor] | None = None) -> float:
        """One optimizer step a batch, in place; the mean loss per example seen on the way, without the penalty.

        Args:
            batches: from ``batches``.
            optimizer: a table, ``fedvision.optimizers.ClientOptimizer``; where it says so, its memory is kept in ``state``.
            penalty: is added to the loss.
        """
        trained, losses = self._trained, Tally()
        params = list(trained.values())
        step = Stepper(optimizer, trained, self.learner.groups(self.model), self.state)
        for batch in batches:
            loss = self._seen(batch, losses)
            self._reach.follow(trained, loss.total)
            whole = loss.total if penalty is None else loss.total + penalty()
            gradients = torch.autograd.grad(whole, params, allow_unused=True)
            self._precede(batch, loss)
            step(gradients, self.progress)
            self._follow(batch)
        step.end()
        return losses.means().get("loss", 0.0)

    def arrange(self) -> None:
        """Put rows whose order means nothing in that of the global model's which they are most like, see ``Learner.interchangeable``."""
        arrange(self.learner, self.model, self._sent, self.state)

    def loss_parts(self) -> dict[str, float]:
        """The named parts of the loss, each a mean per example over the batches trained on."""
        return self._parts.means()

    @property
    def _trained(self) -> dict[str, Tensor]:
        """All of the model's trainable parameters, also those that stay here."""
        return {name: param for name, param in self.model.named_parameters() if param.requires_grad}

    @torch.no_grad()
    def _precede(self, batch: Examples, loss: Loss) -> None:
        if follows_its_steps(self.learner):
            self.learner.precede(self.model, batch, loss, self.progress)

    @torch.no_grad()
    def _follow(self, batch: Examples) -> None:
        if follows_its_steps(self.learner):
            self.learner.follow(self.model, batch, self.progress)

    def _seen(self, batch: Examples, losses: "Tally") -> Loss:
        """The loss on a batch of training; it is counted among ``losses``, and its parts are remembered."""
        loss = self.learner.loss(self.model, batch, self.progress, self.rng)
        losses.add({"loss": loss.total}, len(batch))
        self._parts.add(loss.parts, len(batch))
        return loss


def step_count(examples: int, size: int, epochs: int = 1, steps: int | None = None) -> int:
    """How many batches ``Silo.batches`` makes of so many examples."""
    return steps or epochs * math.ceil(examples / size)


def visits(
    learner: Learner,
    examples: int,
    size: int,
    shuffle: bool,
    epochs: int,
    steps: int | None,
    rng: torch.Generator,
    device: torch.device | None = None,
) -> Iterator[slice | Tensor]:
    """Where the examples of each batch are; an order is drawn when the first batch of its pass is asked for.

    Args:
        learner: says in which order, where they are shuffled.
        examples: how many there are.
        size, shuffle, epochs, steps: as ``Silo.batches`` has them.
        rng: what orders are drawn from.
        device: where indices are needed.
    """
    passes = repeat(None) if steps else repeat(None, epochs)
    return islice(chain.from_iterable(_visit(learner, examples, size, shuffle, rng, device) for _ in passes), steps)


def _visit(
    learner: Learner, examples: int, size: int, shuffle: bool, rng: torch.Generator, device: torch.device | None
) -> Iterator[slice | Tensor]:
    order = learner.order(examples, rng).to(device) if shuffle else None
    for start in range(0, examples, size):
        here = slice(start, min(start + size, examples))
        yield here if order is None else order[here]


class Tally:
    """Means over examples of batches' means; kept as tensors, so that a GPU is not waited for at every batch."""

    def __init__(self) -> None:
        self.examples = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, means: Named, examples: int) -> None:
        """Count one batch."""
        self.examples += examples
        for name, mean in means.items():
            total = mean.detach().double() * examples
            self._sums[name] = self._sums[name].add_(total) if name in self._sums else total

    def means(self) -> dict[str, float]:
        """The means so far."""
        return {name: total.item() / self.examples for name, total in self._sums.items()}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)
