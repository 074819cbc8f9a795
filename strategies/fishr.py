"""Fishr in a federation: silos agree on the variance of their classifier head's gradients.

The FedILC paper's four algorithms (arXiv 2205.09305) differ in two means: how a client combines the gradients of its
own examples, and how the server combines the clients' gradients. The penalty is common to all:

    C_e     variance over silo e's examples of the per-example gradients of the head's parameters
    Cbar    mean of C_e over silos
    L       sum_e || C_e - Cbar ||^2

and the server follows ``mean gradient + lambda * grad L``. Because sum_e (C_e - Cbar) = 0, the terms of grad L that
pass through Cbar cancel, so each silo can compute its share with Cbar held constant: it is asked for C_e first
(phase 1), is told Cbar, and answers with its gradients (phase 2). No silo sees another's statistics, and the sum
equals the gradient that a central server would find by back-propagating through all silos at once.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from fedvision.arrays import Named, array_records, config_of, pack, unpack
from fedvision.errors import AggregationError
from fedvision.registry import strategies
from fedvision.settings import Count, Fraction, Natural, NonNegative
from strategies.gradient import GradientStrategy
from strategies.means import Accumulator, ArithmeticMean, WeightedGeometricMean
from strategies.per_example import Moments, moments
from strategies.strategy import Fold, Records, Silo, Update, one_by_one, protects


def constant_sum(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts together, cut off from their graphs."""
    whole: Moments = {}
    for part in parts:
        for name, (total, squares) in part.items():
            before = whole.get(name, (0, 0))
            whole[name] = before[0] + total.detach(), before[1] + squares.detach()
    return whole


def variance(sums: Moments, count: int) -> dict[str, Tensor]:
    """C: the population variance from moments over ``count`` examples, E[g^2] - E[g]^2, by parameter."""
    return {name: squares / count - (total / count).square() for name, (total, squares) in sums.items()}


def distance(c: Named, cbar: Named) -> Tensor:
    """||C - Cbar||^2 over all arrays; scalar."""
    return torch.stack([(c[name] - cbar[name]).square().sum() for name in c]).sum()


def surrogate(batch: Moments, whole: Moments, count: int, cbar: Named) -> Tensor:
    """A scalar whose gradient, summed over the batches of a silo, is that of ||C - Cbar||^2; it lets a silo of any
    size go through the model in batches.

    With S1 = sum g, S2 = sum g^2 over all ``count`` examples, C = S2/n - (S1/n)^2 and D = C - Cbar:

        d||D||^2 = <2 D / n, dS2> - <4 D S1 / n^2, dS1>

    Args:
        batch: S1, S2 of one batch, differentiable.
        whole: S1, S2 of the silo; constants.
        cbar: the mean variance; constant.
    """
    terms = []
    c = variance(whole, count)
    for name, (total, squares) in batch.items():
        d = c[name] - cbar[name]
        terms.append((2 * d / count * squares).sum() - (4 * d * whole[name][0] / count**2 * total).sum())
    return torch.stack(terms).sum()


@dataclass(kw_only=True)
class FishrStrategy(GradientStrategy):
    """What the four algorithms share: variances, penalty, protocol.

    Answers are complete, since the penalty is about all silos: where no gradient reached, it counts as zero.

    Attributes:
        penalty_weight: lambda, of the penalty summed over silos.
        penalty_weight_final: lambda after the first ``penalty_anneal_rounds`` rounds; as before if not given.
        penalty_anneal_rounds: how many rounds use ``penalty_weight`` before ``penalty_weight_final``.
        penalty: ``exact``, in two phases; or ``stale``, in one, with the previous round's Cbar.
    """

    per_example = True
    penalty_weight: NonNegative = 15.0
    penalty_weight_final: NonNegative | None = None
    penalty_anneal_rounds: Natural = 0
    penalty: Literal["exact", "stale"] = "exact"

    apart: ClassVar[bool] = False
    """Whether the penalty's gradient travels apart from the loss's; under an arithmetic mean their sum is enough."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._cbar: dict[str, Tensor] = {}
        self._penalized = False

    @abstractmethod
    def own_gradient(self, silo: Silo) -> tuple[float, dict[str, Tensor]]:
        """In the client: mean loss, and the combined gradient of its examples."""

    @abstractmethod
    def mean(self) -> Accumulator:
        """At the server: how clients' gradients are combined."""

    # ---- the client's half --------------------------------------------------------------------------------------

    def client_statistics(self, silo: Silo, content: RecordDict) -> Update:
        """Phase 1: the silo's C."""
        return Update({"variance": self._variance(silo)})

    @one_by_one("its penalty looks into the model, at the gradient of every example")
    @protects(otherwise="its clients send variances of gradients, which nothing clips or noises")
    def client_update(self, silo: Silo, content: RecordDict) -> Update:
        """Phase 2: the silo's gradient, with its share of the penalty's; its C too, if ``stale``.

        Its metric ``penalty`` averages to lambda * L, the term of the objective, before the update.
        """
        loss, gradient = self.own_gradient(silo)
        records: dict[str, Named] = {"gradient": gradient, "buffers": silo.buffers()}
        metrics = {"train_loss": loss}
        if "variance" in array_records(content):
            config: dict[str, Any] = config_of(content)
            value, slope = self._penalty(silo, unpack(array_records(content)["variance"]))
            scale = config["penalty-weight"] * config["silos"]
            metrics["penalty"] = scale * value
            share = {name: scale * slope[name] for name in slope}
            if self.apart:
                records["penalty"] = share
            else:
                records["gradient"] = {name: gradient[name] + share[name] for name in gradient}
        if self.penalty == "stale":
            records["variance"] = self._variance(silo)
        return Update(records, metrics)

    def _variance(self, silo: Silo) -> dict[str, Tensor]:
        return variance(constant_sum(self._moments(silo)), len(silo.train))

    def _penalty(self, silo: Silo, cbar: Named) -> tuple[float, dict[str, Tensor]]:
        """||C(w) - Cbar||^2 and its gradient with respect to all parameters."""
        params, count = silo.params, len(silo.train)
        parts: Iterable[Moments] = self._moments(silo)
        if count <= self.chunk_size:
            parts = list(parts)  # the graph of a single chunk serves for both
        whole = constant_sum(parts if isinstance(parts, list) else self._moments(silo))
        slope = [torch.zeros_like(param) for param in params.values()]
        for part in parts:
            scalar = surrogate(part, whole, count, cbar)
            torch._foreach_add_(slope, list(torch.autograd.grad(scalar, list(params.values()), materialize_grads=True)))
        return float(distance(variance(whole, count), cbar)), dict(zip(params, slope, strict=True))

    def _moments(self, silo: Silo) -> Iterator[Moments]:
        head = silo.learner.head(silo.model)
        if head is None:
            raise AggregationError(f"{type(silo.learner).__name__} names no classifier head, which Fishr needs; choose another strategy")
        for batch in silo.batches(self.chunk_size, shuffle=False):
            yield moments(silo.loss, silo.model, [head], batch)

    # ---- the server's half --------------------------------------------------------------------------------------

    @property
    def joint(self) -> bool:
        """Whether there is a penalty, whose terms through Cbar cancel over the silos whose mean Cbar is, and over no fewer."""
        return self._penalized and self.penalty == "exact"

    def penalty_weight_in(self, server_round: int) -> float:
        """Lambda in a round, counted from 1."""
        if self.penalty_weight_final is None or server_round <= self.penalty_anneal_rounds:
            return self.penalty_weight
        return self.penalty_weight_final

    def prepare(self, content: RecordDict, ask: Callable[[RecordDict], Iterator[RecordDict]]) -> RecordDict:
        """Tell the clients Cbar, lambda, and the number of silos: the server takes a mean, the penalty is a sum."""
        config: dict[str, Any] = config_of(content)
        weight = self.penalty_weight_in(config["server-round"])
        if weight and self.penalty == "exact":
            cbar = ArithmeticMean()
            for answer in ask(content):
                cbar.add(unpack(array_records(answer)["variance"]), self._weight(answer))
            self._require(cbar.count, config["server-round"])
            self._cbar = cbar.result()
        self._penalized = bool(weight and self._cbar)
        if not self._penalized:
            return content
        config |= {"penalty-weight": weight, "silos": len(self.cohort)}
        return RecordDict({"arrays": content["arrays"], "variance": pack(self._cbar), "config": ConfigRecord(config)})

    def accumulators(self) -> dict[str, Fold]:
        """The means of gradients, and of what else travels."""
        accumulators: dict[str, Fold] = {"gradient": self.mean()}
        if self.apart and self._penalized:
            accumulators["penalty"] = ArithmeticMean()
        if self.penalty == "stale":
            accumulators["variance"] = ArithmeticMean()
        return accumulators

    def server_update(self, arrays: Named, aggregates: Records) -> Named:
        """One optimizer step along the combined gradients."""
        self._cbar = dict(aggregates.get("variance", self._cbar))
        gradient = aggregates["gradient"]
        if "penalty" in aggregates:
            gradient = {name: gradient[name] + aggregates["penalty"][name] for name in gradient}
        return self.step(arrays, gradient)

    def state(self) -> dict[str, Any]:
        """The server optimizer's moments, and Cbar."""
        return {"optimizer": super().state(), "cbar": self._cbar}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on with a ``state``."""
        super().load_state(state["optimizer"])
        self._cbar = dict(state["cbar"])


@strategies("fishr")
@dataclass(kw_only=True)
class Fishr(FishrStrategy):
    """Vanilla Fishr across silos: full-batch gradients, arithmetic mean, variance penalty.

    Source: arXiv 2109.02934; the row "FedCurv" of the tables of arXiv 2205.09305. Shoham's FedCurv is ``fedcurv``.
    """

    def own_gradient(self, silo: Silo) -> tuple[float, dict[str, Tensor]]:
        """The gradient of the mean loss."""
        return silo.gradient(silo.batches(self.chunk_size, shuffle=False))

    def mean(self) -> Accumulator:
        """Arithmetic over silos."""
        return ArithmeticMean()


@strategies("fishr-inter-geo")
@dataclass(kw_only=True)
class FishrInterGeo(FishrStrategy):
    """Fishr, with the weighted geometric mean of the silos' full-batch gradients.

    Attributes:
        agreement_threshold: a coordinate of the mean is 0 where silos' mean sign is smaller in magnitude.

    Source: arXiv 2205.09305, Fishr+Inter-Geo.
    """

    agreement_threshold: Fraction = 0.0
    apart: ClassVar[bool] = True

    def own_gradient(self, silo: Silo) -> tuple[float, dict[str, Tensor]]:
        """The gradient of the mean loss."""
        return silo.gradient(silo.batches(self.chunk_size, shuffle=False))

    def mean(self) -> Accumulator:
        """Weighted geometric over silos."""
        return WeightedGeometricMean(self.agreement_threshold)


@dataclass(kw_only=True)
class FishrIntraStrategy(FishrStrategy):
    """Fishr whose silos combine the gradients of their own mini-batches, each counting equally.

    Attributes:
        batch_size: examples a mini-batch; the last may be smaller and counts the same.
        shuffle: whether mini-batches are drawn anew each round, or taken in storage order.
    """

    batch_size: Count = 32
    shuffle: bool = True

    @abstractmethod
    def own_mean(self) -> Accumulator:
        """In the client: how the mini-batches' gradients are combined."""

    def own_gradient(self, silo: Silo) -> tuple[float, dict[str, Tensor]]:
        """The combined gradient of the silo's mini-batches."""
        loss_sum, combined = 0.0, self.own_mean()
        for batch in silo.batches(self.batch_size, self.shuffle):
            loss, gradient = silo.gradient([batch])
            loss_sum += loss * len(batch)
            combined.add(gradient)
        return loss_sum / len(silo.train), combined.result()

    def mean(self) -> Accumulator:
        """Arithmetic over silos."""
        return ArithmeticMean()


@strategies("fishr-intra-arith")
@dataclass(kw_only=True)
class FishrIntraArith(FishrIntraStrategy):
    """Fishr, with the arithmetic mean of the gradients of each silo's mini-batches.

    Source: arXiv 2205.09305, Fishr+Intra-Arith.
    """

    def own_mean(self) -> Accumulator:
        """Arithmetic over mini-batches."""
        return ArithmeticMean()


@strategies("fishr-intra-geo")
@dataclass(kw_only=True)
class FishrIntraGeo(FishrIntraStrategy):
    """Fishr, with the weighted geometric mean of the gradients of each silo's mini-batches.

    Attributes:
        agreement_threshold: a coordinate of the mean is 0 where mini-batches' mean sign is smaller in magnitude.

    Source: arXiv 2205.09305, Fishr+Intra-Geo.
    """

    agreement_threshold: Fraction = 0.0

    def own_mean(self) -> Accumulator:
        """Weighted geometric over mini-batches."""
        return WeightedGeometricMean(self.agreement_threshold)
