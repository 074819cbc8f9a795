"""What is computed: three jobs, each the same mathematics for every method."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedvision.data import Examples, FederatedData, Silos, Spec
from fedvision.experiment import Experiment
from fedvision.seeds import generator

SEED = 0
TEST_EXAMPLES = 64


@dataclass(frozen=True)
class Job:
    """A federation with random data, and what its clients do in a round.

    Attributes:
        name: short, for tables.
        title: what it is.
        clients: how many there are.
        cohort: how many of them take part in a round.
        examples: per client.
        shape: of one input.
        classes: number of classes; two mean one logit.
        model: of the learner ``classifier``.
        batch: examples a local step; None: no local steps, each client sends its full gradient and the server takes one step.
        rate: the learning rate of plain gradient descent, the clients' or the server's.
    """

    name: str
    title: str
    clients: int
    cohort: int
    examples: int
    shape: tuple[int, ...] = (2, 14, 14)
    classes: int = 2
    model: str = "mlp"
    batch: int | None = None
    rate: float = 0.05

    def experiment(self, rounds: int, engine: dict[str, Any] | None = None) -> Experiment:
        """The job as our experiment; nothing but training between the first round and the last."""
        local: dict[str, Any] = {"name": "fedavg", "batch_size": self.batch, "shuffle": False}
        local["client_optimizer"] = {"name": "SGD", "lr": self.rate}
        central = {"name": "fedsgd", "server_optimizer": {"name": "SGD", "lr": self.rate}}
        tables = {
            "name": self.name,
            "rounds": rounds,
            "seed": SEED,
            "evaluate_every": max(rounds, 1),
            "checkpoint_every": max(rounds, 1),
            "tensorboard": False,
            "data": {"name": "digits"},
            "learner": {"name": "classifier", "model": self.model},
            "strategy": {"fraction": self.cohort / self.clients, **(central if self.batch is None else local)},
            "engine": engine or {"name": "in-process"},
        }
        return Experiment.from_tables(tables)

    @cached_property
    def data(self) -> FederatedData:
        """Normal inputs and uniform labels, the same in every process."""
        rng, count = generator(SEED, "speed"), self.clients * self.examples
        offsets = tuple(range(0, count + 1, self.examples))
        return FederatedData("random", Silos(self._draw(count, rng), offsets), None, self._draw(TEST_EXAMPLES, rng), self.classes)

    def build(self) -> nn.Module:
        """The model with its initial weights, the same in every process."""
        return self.experiment(1).build_learner().build(Spec(self.shape, self.classes), generator(SEED, "model"))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy; binary for a single logit."""
        if self.classes == 2:
            return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype))
        return F.cross_entropy(logits, labels)

    def cohorts(self, rounds: int) -> list[list[int]]:
        """The clients of each round, as our strategies draw them."""
        strategy, nodes = self.experiment(rounds).build_strategy(), _Nodes(self.clients)
        return [strategy._sample(number, "cohort", strategy.fraction, nodes) for number in range(1, rounds + 1)]

    def _draw(self, count: int, rng: torch.Generator) -> Examples:
        images = torch.randn(count, *self.shape, generator=rng)
        return Examples({"image": images, "label": torch.randint(self.classes, (count,), generator=rng)})


@dataclass(frozen=True)
class _Nodes:
    """As much of a grid as drawing a cohort needs."""

    clients: int

    def get_node_ids(self) -> Iterable[int]:
        return range(self.clients)


MANY_SMALL = Job("J1", "many small clients, MLP, FedAvg", clients=1000, cohort=100, examples=50, batch=10)
CONVOLUTIONS = Job("J2", "CNN, FedAvg", clients=100, cohort=10, examples=64, shape=(3, 16, 16), classes=10, model="cnn", batch=16)
CROSS_SILO = Job("J3", "cross-silo, MLP, FedSGD", clients=5, cohort=5, examples=2000)

JOBS = {job.name: job for job in (MANY_SMALL, CONVOLUTIONS, CROSS_SILO)}
