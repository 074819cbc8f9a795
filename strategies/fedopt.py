"""Adaptive federated optimization: the server treats the mean change of the clients' models as a gradient."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import RecordDict
from torch import Tensor

from fedvision.arrays import Named
from fedvision.registry import strategies
from fedvision.settings import Fraction, Positive
from strategies.fedavg import LocalStrategy
from strategies.means import ArithmeticMean
from strategies.strategy import Fold, Records, Silo, Update, batchable, protects


@dataclass(kw_only=True)
class ServerOptimizedStrategy(LocalStrategy):
    """Local training as in FedAvg, then a server step along Delta = mean of the clients' parameters - global ones.

    Buffers, such as BatchNorm's running statistics, are averaged: a step too far would make a variance negative. A parameter that nobody
    trained in a round stays where it is, and so do its moments.

    Attributes:
        server_lr: the server's step size, eta.

    Source: Reddi et al., arXiv 2003.00295, algorithm 2.
    """

    partial = True
    server_lr: Positive = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._moments: dict[str, dict[str, Tensor]] = {}

    @abstractmethod
    def direction(self, name: str, delta: Tensor) -> Tensor:
        """The step for one parameter, its moments brought up to date."""

    @batchable
    @protects("example", "client")
    def client_update(self, silo: Silo, content: RecordDict) -> Update:
        """The locally trained model, parameters and buffers apart."""
        loss = self.descended(silo)
        params = {name: param.detach().clone() for name, param in silo.params.items()}
        return Update({"params": params, "buffers": silo.buffers()}, {"train_loss": loss}, self.left_out(silo))

    def accumulators(self) -> dict[str, Fold]:
        """A mean over clients."""
        return {"params": ArithmeticMean()}

    def server_update(self, arrays: Named, aggregates: Records) -> Named:
        """One step along each parameter's direction."""
        means = aggregates["params"]
        return {name: arrays[name] + self.server_lr * self.direction(name, means[name] - arrays[name]) for name in means}

    def state(self) -> dict[str, Any]:
        """The moments."""
        return self._moments

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on with the moments of ``state``."""
        self._moments = {kind: dict(moments) for kind, moments in state.items()}

    def _moment(self, kind: str, like: Tensor, name: str) -> Tensor:
        return self._moments.setdefault(kind, {}).setdefault(name, torch.zeros_like(like))


@strategies("fedavgm")
@dataclass(kw_only=True)
class FedAvgM(ServerOptimizedStrategy):
    """FedAvg with momentum at the server.

    Attributes:
        momentum: beta of v <- beta v + Delta.

    Source: Hsu et al., arXiv 1909.06335.
    """

    momentum: Fraction = 0.9

    def direction(self, name: str, delta: Tensor) -> Tensor:
        """Momentum: v, after v <- beta v + Delta."""
        return self._moment("v", delta, name).mul_(self.momentum).add_(delta)


@dataclass(kw_only=True)
class AdaptiveStrategy(ServerOptimizedStrategy):
    """Server steps scaled by a second moment: m / (sqrt(v) + tau), without bias correction, as in the paper.

    Attributes:
        beta1: of the first moment, m <- beta1 m + (1 - beta1) Delta.
        beta2: of the second moment.
        tau: how adaptive the step is; larger is less.

    Differs: v starts at 0, as in Flower; the paper asks for at least tau^2.
    """

    server_lr: Positive = 0.01
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    tau: Positive = 1e-3

    @abstractmethod
    def second_moment(self, v: Tensor, squared: Tensor) -> None:
        """Bring v up to date with Delta^2, in place."""

    def direction(self, name: str, delta: Tensor) -> Tensor:
        """The adaptive step m / (sqrt(v) + tau)."""
        m, v = self._moment("m", delta, name), self._moment("v", delta, name)
        m.mul_(self.beta1).add_(delta, alpha=1 - self.beta1)
        self.second_moment(v, delta.square())
        return m / (v.sqrt() + self.tau)


@strategies("fedadam")
@dataclass(kw_only=True)
class FedAdam(AdaptiveStrategy):
    """Adam at the server, on the clients' mean change.

    Source: Reddi et al., arXiv 2003.00295, algorithm 2 (FedAdam).
    """

    def second_moment(self, v: Tensor, squared: Tensor) -> None:
        """Adam's v <- beta2 v + (1 - beta2) Delta^2."""
        v.mul_(self.beta2).add_(squared, alpha=1 - self.beta2)


@strategies("fedyogi")
@dataclass(kw_only=True)
class FedYogi(AdaptiveStrategy):
    """Yogi at the server, on the clients' mean change.

    Source: Reddi et al., arXiv 2003.00295, algorithm 2 (FedYogi).
    """

    def second_moment(self, v: Tensor, squared: Tensor) -> None:
        """Yogi's v <- v - (1 - beta2) Delta^2 sign(v - Delta^2)."""
        v.sub_(squared * (v - squared).sign(), alpha=1 - self.beta2)
