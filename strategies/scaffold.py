"""SCAFFOLD: control variates correct the drift of local training."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from flwr.app import RecordDict
from torch import Tensor

from fedvision.arrays import Named, array_records, pack, unpack
from fedvision.errors import ExperimentError
from fedvision.registry import strategies
from fedvision.settings import Positive
from strategies.fedavg import LocalStrategy
from strategies.means import ArithmeticMean
from strategies.strategy import Fold, Records, Silo, Update, one_by_one, protects


@strategies("scaffold")
@dataclass(kw_only=True)
class Scaffold(LocalStrategy):
    """Local SGD along gradient - c_i + c, where c_i and c estimate the client's and the mean gradient.

    A client keeps c_i between rounds; only its change travels. Clients count equally. Answers are complete, since c is a mean over all
    clients: where no gradient reached, it counts as zero.

    Attributes:
        server_lr: the server's step size along the clients' mean change.

    Source: Karimireddy et al., arXiv 1910.06378, algorithm 1, option II.
    """

    client_memory = ("control",)
    weight_by: Literal["clients"] = "clients"
    server_lr: Positive = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._control: dict[str, Tensor] = {}
        if self.client_optimizer["name"] != "SGD" or set(self.client_optimizer) - {"name", "lr"}:
            raise ExperimentError(f'scaffold needs plain SGD, client_optimizer = {{name = "SGD", lr = ...}}; got {self.client_optimizer}')
        if self.arranged:
            raise ExperimentError("scaffold follows each row from where it began, so strategy.arranged must be false")

    def prepare(self, content: RecordDict, ask: Callable[[RecordDict], Iterator[RecordDict]]) -> RecordDict:
        """Tell the clients c; zeros do not travel."""
        return RecordDict({**content, "control": pack(self._control)}) if self._control else content

    @one_by_one("each client keeps a control variate of its own between rounds")
    @protects("example", otherwise="the changes of its control variates are a second thing that a client sends, and are not clipped")
    def client_update(self, silo: Silo, content: RecordDict) -> Update:
        """The locally trained model, and the change of c_i."""
        start = {name: param.detach().clone() for name, param in silo.params.items()}
        c, own = _control(content, start), _control(silo.state, start)
        params = silo.params

        def correction() -> Tensor:  # a linear function, whose gradient is c - c_i
            return torch.stack([(params[name] * (c[name] - own[name])).sum() for name in params]).sum()

        loss = silo.descend(self.local_batches(silo), self.client_optimizer, correction)
        scale = 1 / (self.local_steps(len(silo.train)) * self.client_optimizer.get("lr", 1e-3))
        change = {name: scale * (start[name] - param.detach()) - c[name] for name, param in params.items()}
        silo.state["control"] = pack({name: own[name] + change[name] for name in own})
        trained = {name: param.detach().clone() for name, param in params.items()}
        return Update({"params": trained, "buffers": silo.buffers(), "control": change}, {"train_loss": loss})

    def accumulators(self) -> dict[str, Fold]:
        """The means of parameters and of changes."""
        return {"params": ArithmeticMean(), "control": ArithmeticMean()}

    def server_update(self, arrays: Named, aggregates: Records) -> Named:
        """The step x + eta mean change; c moves by the share of all clients that took part."""
        share = self.answered / self.population
        for name, change in aggregates["control"].items():
            self._control[name] = self._control.get(name, torch.zeros_like(change)) + share * change
        mean = aggregates["params"]
        if self.server_lr == 1:
            return mean
        return {name: arrays[name] + self.server_lr * (mean[name] - arrays[name]) for name in mean}

    def state(self) -> dict[str, Any]:
        """The mean control variate c."""
        return self._control

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on with the c of ``state``."""
        self._control = dict(state)


def _control(content: RecordDict, like: Named) -> Named:
    """The control variate in a message or in a client's state; zeros before there is one."""
    if "control" in array_records(content):
        return unpack(array_records(content)["control"])
    return {name: torch.zeros_like(param) for name, param in like.items()}
