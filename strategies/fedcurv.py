"""FedCurv: local training that spares the weights that matter to the other clients."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor, nn

from fedvision.arrays import Named, array_records, config_of, pack, unpack
from fedvision.registry import strategies
from fedvision.settings import Count, NonNegative
from strategies.fedavg import LocalStrategy
from strategies.means import ArithmeticMean, Sum
from strategies.per_example import moments
from strategies.strategy import Equally, Fold, Records, Silo, Update, one_by_one, protects


def penalty(params: Named, u: Named, v: Named) -> Tensor:
    """w^T diag(U) w - 2 w^T V, a scalar: sum_j (w - w_j)^T diag(I_j) (w - w_j) less a constant.

    Args:
        params: w.
        u: U = sum_j I_j over the other clients, by name of parameter.
        v: V = sum_j I_j w_j over the other clients.
    """
    return torch.stack([(params[name] * (u[name] * params[name] - 2 * v[name])).sum() for name in u]).sum()


def fisher(silo: Silo, chunk_size: int) -> dict[str, Tensor]:
    """I: the diagonal of the empirical Fisher information at the silo's model, the mean over its examples of squared
    per-example gradients, by name of parameter; in evaluation mode, so that examples do not mix.
    """
    layers = [module for module in silo.model.modules() if _learns(module)]
    total = {name: torch.zeros_like(param) for name, param in silo.params.items()}
    silo.model.eval()
    for batch in silo.batches(chunk_size, shuffle=False):
        for name, (_, squares) in moments(silo.loss, silo.model, layers, batch).items():
            if name in total:
                total[name] += squares.detach() / len(silo.train)
    silo.model.train()
    return total


@strategies("fedcurv")
@dataclass(kw_only=True)
class FedCurv(LocalStrategy):
    """FedAvg whose clients pay lambda sum_j (w - w_j)^T diag(I_j) (w - w_j) over the other clients j.

    w_j and I_j are the parameters and the diagonal Fisher information that client j ended the previous round with;
    clients are sent only the sums U of I_j and V of I_j w_j, and subtract their own share. Round 1 has no penalty.
    Answers are complete: where no gradient reached, a model counts as unchanged, and I_j is zero.
    The paper's tables in arXiv 2205.09305 call another algorithm by this name: see ``fishr``.

    Attributes:
        penalty_weight: lambda.
        chunk_size: examples whose per-example gradients are formed at a time.

    Source: Shoham et al., arXiv 1910.07796, section 3.
    """

    client_memory = ("u", "v", "curvature")
    per_example = True
    penalty_weight: NonNegative = 1.0
    chunk_size: Count = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self._sums: dict[str, dict[str, Tensor]] = {}

    def prepare(self, content: RecordDict, ask: Callable[[RecordDict], Iterator[RecordDict]]) -> RecordDict:
        """Tell the clients U and V of the previous round."""
        return RecordDict({**content, **{name: pack(sums) for name, sums in self._sums.items()}})

    @one_by_one("each client keeps its Fisher information between rounds")
    @protects(otherwise="its clients send their Fisher information, which nothing clips or noises")
    def client_update(self, silo: Silo, content: RecordDict) -> Update:
        """The locally trained model, its Fisher information, and their product."""
        elastic = self._elastic(silo, content)
        loss = self.descended(silo, elastic)
        information = fisher(silo, self.chunk_size)
        moment = {name: information[name] * param.detach() for name, param in silo.params.items()}
        silo.state["u"], silo.state["v"] = pack(information), pack(moment)
        silo.state["curvature"] = ConfigRecord({"round": config_of(content)["server-round"]})
        return Update({"arrays": silo.arrays(), "u": information, "v": moment}, {"train_loss": loss})

    def _elastic(self, silo: Silo, content: RecordDict) -> Callable[[], Tensor] | None:
        """The penalty for leaving where the other clients were; None before there are any."""
        if "u" not in array_records(content) or not self.penalty_weight:
            return None
        u, v = unpack(array_records(content)["u"]), unpack(array_records(content)["v"])
        this_round = int(config_of(content)["server-round"])
        if "curvature" in silo.state and config_of(silo.state, "curvature")["round"] == this_round - 1:
            u, v = _less(u, array_records(silo.state)["u"]), _less(v, array_records(silo.state)["v"])
        params = silo.params
        return lambda: self.penalty_weight * penalty(params, u, v)

    def accumulators(self) -> dict[str, Fold]:
        """The mean of models; the sums of Fisher information and of its product with them."""
        return {"arrays": ArithmeticMean(), "u": Equally(Sum()), "v": Equally(Sum())}

    def server_update(self, arrays: Named, aggregates: Records) -> Named:
        """The mean model."""
        self._sums = {name: dict(aggregates[name]) for name in ("u", "v")}
        return aggregates["arrays"]

    def state(self) -> dict[str, Any]:
        """U and V."""
        return self._sums

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on with the sums of ``state``."""
        self._sums = {name: dict(sums) for name, sums in state.items()}


def _less(sums: Named, share: ArrayRecord) -> dict[str, Tensor]:
    own = unpack(share)
    return {name: sums[name] - own[name] for name in sums}


def _learns(module: nn.Module) -> bool:
    return any(param.requires_grad for param in module.parameters(recurse=False))
