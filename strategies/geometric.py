"""Geometric: the server follows the weighted geometric mean of the clients' full-batch gradients."""

from dataclasses import dataclass

from flwr.app import RecordDict

from fedvision.registry import strategies
from fedvision.settings import Fraction
from strategies.gradient import GradientStrategy
from strategies.means import WeightedGeometricMean
from strategies.strategy import Fold, Silo, Update, batchable, protects


@strategies("geometric")
@dataclass(kw_only=True)
class Geometric(GradientStrategy):
    """The weighted geometric mean of full-batch gradients, then one step of the server's optimizer.

    Attributes:
        agreement_threshold: a coordinate does not move where the mean sign of the clients' gradients is smaller
            in magnitude; 0 masks nothing.

    Source: FedILC, arXiv 2205.09305, row "Geometric" of its tables.
    """

    partial = True
    agreement_threshold: Fraction = 0.0

    @batchable
    @protects(otherwise="its clients send gradients of all of their examples, which nothing clips or noises")
    def client_update(self, silo: Silo, content: RecordDict) -> Update:
        """The gradient of the mean loss over all of the client's examples."""
        loss, gradient = silo.gradient(silo.batches(self.chunk_size, shuffle=False))
        return Update({"gradient": gradient, "buffers": silo.buffers()}, {"train_loss": loss}, self.left_out(silo))

    def accumulators(self) -> dict[str, Fold]:
        """A weighted geometric mean over clients."""
        return {"gradient": WeightedGeometricMean(self.agreement_threshold)}
