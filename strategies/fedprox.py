"""FedProx: local training that stays near the global model."""

from dataclasses import dataclass

import torch
from flwr.app import RecordDict
from torch import Tensor

from fedvision.arrays import Named
from fedvision.registry import strategies
from fedvision.settings import NonNegative
from strategies.fedavg import AveragingStrategy
from strategies.strategy import Silo, Update, batchable, protects


def proximal(params: Named, anchor: Named, mu: float) -> Tensor:
    """The proximal term mu / 2 * ||w - w0||^2, a scalar."""
    return mu / 2 * torch.stack([(params[name] - anchor[name]).square().sum() for name in params]).sum()


@strategies("fedprox")
@dataclass(kw_only=True)
class FedProx(AveragingStrategy):
    """FedAvg whose clients pay mu / 2 ||w - w0||^2 for leaving the global model w0.

    Attributes:
        mu: weight of the proximal term; 0 is FedAvg.

    Source: Li et al., arXiv 1812.06127, algorithm 2.
    """

    partial = True
    mu: NonNegative = 0.01

    @batchable
    @protects("example", "client")
    def client_update(self, silo: Silo, content: RecordDict) -> Update:
        """The locally trained model."""
        params = silo.params
        anchor = {name: param.detach().clone() for name, param in params.items()}
        return self.trained(silo, lambda: proximal(params, anchor, self.mu))
