"""One client at work: gradients, local steps, evaluation, on the process's one model."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, repeat
from typing import Any

import torch
from flwr.app import RecordDict
from torch import Tensor, nn

from fedvision import optimizers
from fedvision.arrays import Named
from fedvision.data import Examples
from fedvision.evaluation import load
from fedvision.learners.learner import Learner


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
    ) -> None:
        self.learner, self.model, self.train, self.progress = learner, model, train, progress
        self.state = RecordDict() if state is None else state
        self.rng = torch.Generator().manual_seed(0) if rng is None else rng
        self.work = 0
        self._parts = Tally()
        self._held = load(model, arrays)
        model.train()

    @property
    def params(self) -> dict[str, Tensor]:
        """The model's trainable parameters by name, as they are in the model."""
        return {name: param for name, param in self.model.named_parameters() if param.requires_grad}

    def arrays(self) -> dict[str, Tensor]:
        """A copy of all of the model's arrays: parameters and buffers."""
        return {name: _copy(tensor) for name, tensor in self._held.items()}

    def buffers(self) -> dict[str, Tensor]:
        """A copy of the model's persistent buffers, such as BatchNorm's running statistics."""
        params = {name for name, _ in self.model.named_parameters()}
        return {name: _copy(tensor) for name, tensor in self._held.items() if name not in params}

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
        device = self.train.image.device
        for index in visits(len(self.train), size, shuffle, epochs, steps, self.rng, device):
            batch = self.train[index]
            self.work += len(batch)
            yield self.learner.train_view(batch, self.rng)

    def gradient(self, batches: Iterable[Examples]) -> tuple[float, dict[str, Tensor]]:
        """Mean loss over the examples of all batches, and its gradient by parameter name."""
        params, losses = self.params, Tally()
        sums: list[Tensor] | None = None
        for batch in batches:
            gradients = torch.autograd.grad(self._seen(batch, losses), list(params.values()), materialize_grads=True)
            if sums is None:
                sums = [gradient * len(batch) for gradient in gradients]  # not in place: autograd may hand out one tensor twice
            else:
                torch._foreach_add_(sums, gradients, alpha=len(batch))
        assert sums is not None, "a client holds at least one example"
        torch._foreach_div_(sums, losses.examples)
        return losses.means()["loss"], dict(zip(params, sums, strict=True))

    def descend(self, batches: Iterable[Examples], optimizer: dict[str, Any], penalty: Callable[[], Tensor] | None = None) -> float:
        """One optimizer step a batch, in place; the mean loss per example seen on the way, without the penalty."""
        params, losses = list(self.params.values()), Tally()
        step = optimizers.stepper(optimizer, params)
        for batch in batches:
            loss = self._seen(batch, losses)
            step(torch.autograd.grad(loss if penalty is None else loss + penalty(), params, allow_unused=True))
        return losses.means().get("loss", 0.0)

    def loss_parts(self) -> dict[str, float]:
        """The named parts of the loss, each a mean per example over the batches trained on."""
        return self._parts.means()

    def _seen(self, batch: Examples, losses: "Tally") -> Tensor:
        """The loss on a batch of training; it is counted among ``losses``, and its parts are remembered."""
        loss = self.learner.loss(self.model, batch, self.progress, self.rng)
        losses.add({"loss": loss.total}, len(batch))
        self._parts.add(loss.parts, len(batch))
        return loss.total


def visits(
    examples: int, size: int, shuffle: bool, epochs: int, steps: int | None, rng: torch.Generator, device: torch.device | None = None
) -> Iterator[slice | Tensor]:
    """Where the examples of each batch are; an order is drawn when the first batch of its pass is asked for.

    Args:
        examples: how many there are.
        size, shuffle, epochs, steps: as ``Silo.batches`` has them.
        rng: what orders are drawn from.
        device: where indices are needed.
    """
    passes = repeat(None) if steps else repeat(None, epochs)
    return islice(chain.from_iterable(_visit(examples, size, shuffle, rng, device) for _ in passes), steps)


def _visit(examples: int, size: int, shuffle: bool, rng: torch.Generator, device: torch.device | None) -> Iterator[slice | Tensor]:
    order = torch.randperm(examples, generator=rng).to(device) if shuffle else None
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
