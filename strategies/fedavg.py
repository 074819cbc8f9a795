"""FedAvg: clients train locally, the server averages their models."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from flwr.app import RecordDict
from torch import Tensor

from fedvision import optimizers
from fedvision.arrays import Named
from fedvision.data import Examples
from fedvision.optimizers import ClientOptimizer
from fedvision.registry import strategies
from fedvision.settings import Count
from fedvision.silo import step_count
from strategies.means import ArithmeticMean
from strategies.strategy import Fold, Records, Silo, Strategy, Update, batchable, protects


def sgd() -> dict[str, Any]:
    """Plain gradient descent."""
    return {"name": "SGD", "lr": 0.05}


@dataclass(kw_only=True)
class LocalStrategy(Strategy):
    """Strategies whose clients take local optimizer steps from the global model.

    Attributes:
        epochs: passes over the client's examples in a round.
        steps: exactly so many optimizer steps in a round, instead of ``epochs``.
        batch_size: examples a step; the last batch of an epoch may be smaller.
        shuffle: whether each epoch visits the examples in a new order.
        client_optimizer: any torch optimizer, with a ``schedule`` of its rate over the whole training if given; it starts
            afresh in every round, unless ``keep = true`` has each client remember its own.
        arranged: whether clients put rows whose order means nothing, as those of prototypes, in the order of the global model's rows that
            they are most like before they answer, so that the mean is of rows that belong together. See decision 0015.
    """

    weight_by: Literal["clients", "examples"] = "examples"
    epochs: Count = 1
    steps: Count | None = None
    batch_size: Count = 32
    shuffle: bool = True
    client_optimizer: ClientOptimizer = field(default_factory=sgd)
    arranged: bool = False

    def __post_init__(self) -> None:
        optimizers.checked_for_clients(self.client_optimizer)

    def local_batches(self, silo: Silo) -> Iterator[Examples]:
        """The batches of one round of local training."""
        return silo.batches(self.batch_size, self.shuffle, self.epochs, self.steps)

    def local_steps(self, examples: int) -> int:
        """How many optimizer steps a client with so many examples takes in a round."""
        return step_count(examples, self.batch_size, self.epochs, self.steps)

    def descended(self, silo: Silo, penalty: Callable[[], Tensor] | None = None) -> float:
        """The mean loss of local training, after which the silo's model is what its answer is made of."""
        loss = silo.descend(self.local_batches(silo), self.client_optimizer, penalty)
        if self.arranged:
            silo.arrange()
        return loss

    def trained(self, silo: Silo, penalty: Callable[[], Tensor] | None = None) -> Update:
        """The answer of plain local training."""
        loss = self.descended(silo, penalty)
        return Update({"arrays": silo.arrays()}, {"train_loss": loss}, self.left_out(silo))


@dataclass(kw_only=True)
class AveragingStrategy(LocalStrategy):
    """Local strategies whose server takes the mean of the clients' models."""

    def accumulators(self) -> dict[str, Fold]:
        """A mean over clients."""
        return {"arrays": ArithmeticMean()}

    def server_update(self, arrays: Named, aggregates: Records) -> Named:
        """The mean model."""
        return aggregates["arrays"]


@strategies("fedavg")
@dataclass(kw_only=True)
class FedAvg(AveragingStrategy):
    """Local epochs or steps at the clients, then the mean of their models weighted by examples.

    Source: McMahan et al., arXiv 1602.05629, algorithm 1.
    """

    partial = True

    @batchable
    @protects("example", "client")
    def client_update(self, silo: Silo, content: RecordDict) -> Update:
        """The locally trained model."""
        return self.trained(silo)
