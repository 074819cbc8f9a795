"""Strategies whose clients send gradients: the server's optimizer takes one step a round."""

from collections.abc import Mapping, Sequence
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

    A parameter without a gradient in a round stays where it is, and so does what the optimizer remembers of it.

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
        """The parameters in ``gradient`` after one step of the server's optimizer along it; others stay, their moments too."""
        unknown = [name for name in gradient if name not in self._params]
        if unknown:
            self._admit(arrays, unknown)
        if self._optimizer is None:
            return {}
        for name, param in self._params.items():
            param.copy_(arrays[name])
            param.grad = gradient.get(name)
        self._optimizer.step()
        return {name: self._params[name].clone() for name in gradient}

    def _admit(self, arrays: Named, unknown: Sequence[str]) -> None:
        """Make the optimizer again, over parameters that have a gradient for the first time too; the moments of the others last."""
        state = self._memory()
        names = dict.fromkeys([*state.pop("names", self._params), *unknown])
        self._params = {name: torch.empty_like(arrays[name]) for name in names}
        self._optimizer = optimizers.build(self.server_optimizer, self._params.values())
        if state:
            groups = [{**group, "params": list(range(len(names)))} for group in state["param_groups"]]
            self._optimizer.load_state_dict({**state, "param_groups": groups})

    def state(self) -> dict[str, Any]:
        """The server optimizer's moments, and the parameters that they are of, in its order."""
        return self._memory()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on with the moments of ``state``."""
        self._remembered, self._optimizer, self._params = dict(state), None, {}

    def _memory(self) -> dict[str, Any]:
        if self._optimizer is None:
            return dict(self._remembered)
        return {**self._optimizer.state_dict(), "names": list(self._params)}

    def server_update(self, arrays: Named, aggregates: Records) -> Named:
        """One optimizer step along the aggregated gradient."""
        return self.step(arrays, aggregates["gradient"])
