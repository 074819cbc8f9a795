"""Strategies whose clients send gradients: the server's optimizer takes one step a round."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedvision import optimizers
from fedvision.arrays import Named
from fedvision.optimizers import Optimizer
from fedvision.settings import Count
from strategies.strategy import Records, Strategy


def adam() -> dict[str, Any]:
    """The FedILC paper's server optimizer on Color-MNIST."""
    return {"name": "Adam", "lr": 3e-4, "weight_decay": 1e-2}


@dataclass(kw_only=True)
class GradientStrategy(Strategy):
    """One server step a round along the clients' combined gradient.

    Attributes:
        server_optimizer: any torch optimizer; its state lives at the server and is checkpointed.
        chunk_size: how many examples a client pushes through the model at a time; bounds its memory and
            moves only last bits, except that BatchNorm sees chunks.
    """

    server_optimizer: Optimizer = field(default_factory=adam)
    chunk_size: Count = 256

    def __post_init__(self) -> None:
        self._params: dict[str, Tensor] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._remembered: dict[str, Any] = {}
        optimizers.checked(self.server_optimizer)

    def step(self, arrays: Named, gradient: Named) -> dict[str, Tensor]:
        """The parameters after one step of the server's optimizer along ``gradient``."""
        if self._optimizer is None:
            self._params = {name: torch.empty_like(arrays[name]) for name in gradient}
            self._optimizer = optimizers.build(self.server_optimizer, self._params.values())
            if self._remembered:
                self._optimizer.load_state_dict(self._remembered)
        for name, param in self._params.items():
            param.copy_(arrays[name])
            param.grad = gradient[name]
        self._optimizer.step()
        return {name: param.clone() for name, param in self._params.items()}

    def state(self) -> dict[str, Any]:
        """The server optimizer's moments."""
        return self._optimizer.state_dict() if self._optimizer is not None else self._remembered

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on with the moments of ``state``."""
        self._remembered, self._optimizer = dict(state), None

    def server_update(self, arrays: Named, aggregates: Records) -> Named:
        """One optimizer step along the aggregated gradient."""
        return self.step(arrays, aggregates["gradient"])
