"""FedSGD: the server follows the mean of the clients' full-batch gradients."""

from dataclasses import dataclass

from flwr.app import RecordDict

from fedvision.registry import strategies
from strategies.gradient import GradientStrategy
from strategies.means import ArithmeticMean
from strategies.strategy import Fold, Silo, Update, batchable, protects


@strategies("fedsgd")
@dataclass(kw_only=True)
class FedSGD(GradientStrategy):
    """The arithmetic mean of full-batch gradients, then one step of the server's optimizer.

    Source: McMahan et al., arXiv 1602.05629, section 2.
    Differs: clients count equally by default, as in arXiv 2205.09305; ``weight_by = "examples"`` is McMahan's.
    """

    partial = True

    @batchable
    @protects(otherwise="its clients send gradients of all of their examples, which nothing clips or noises")
    def client_update(self, silo: Silo, content: RecordDict) -> Update:
        """The gradient of the mean loss over all of the client's examples."""
        loss, gradient = silo.gradient(silo.batches(self.chunk_size, shuffle=False))
        return Update({"gradient": gradient, "buffers": silo.buffers()}, {"train_loss": loss}, self.left_out(silo))

    def accumulators(self) -> dict[str, Fold]:
        """A mean over clients."""
        return {"gradient": ArithmeticMean()}
