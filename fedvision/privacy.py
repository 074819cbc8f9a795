"""Differential privacy: what is protected and how strongly, the accountant as a value, clipping and noise as pure functions.

A table ``[privacy]`` of an experiment is a ``Privacy``; what it has cost so far is a ``Ledger``. See docs/privacy.md.

>>> ledger = Ledger().spent(noise_multiplier=1.1, sample_rate=0.05, steps=100).spent(1.1, 0.05, 100)
>>> ledger.entries
((1.1, 0.05, 200),)
>>> round(ledger.epsilon(delta=1e-4, accountant="rdp"), 2)
3.8
"""

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal, Protocol

import numpy as np
import torch
from annotated_types import Gt, Lt
from flwr.app import ConfigRecord, RecordDict
from jaxtyping import Float
from torch import Tensor

from fedvision.arrays import config_of
from fedvision.errors import ExperimentError
from fedvision.settings import NonNegative, Positive

RECORD = "privacy"
"""The record of a client's state, and of the server's, in which what has been spent is kept."""

EPSILON = "epsilon"
"""The metric of an answer that says what its client has spent; the largest of a round counts."""

Accountant = Literal["rdp", "prv"]
Unit = Literal["example", "client"]


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """What a run keeps to itself: (epsilon, delta)-differential privacy of its training examples, or of its clients.

    Attributes:
        unit: what may be there or not without showing: one training example of a client, whose noise the client adds itself; or a
            whole client, whose noise the server adds, which must therefore be trusted.
        clipping_norm: how long one example's gradient, or one client's change of the model, may be; ``inf`` clips nothing.
        noise_multiplier: the noise's standard deviation in clipping norms; 0 protects nothing. Either this or ``target_epsilon``.
        target_epsilon: what the run may spend if a client takes part in all of its rounds; the noise follows from it.
        delta: with what probability the guarantee may fail; below 1 / the number of examples of a client, or of clients.
        accountant: ``rdp``, which is quick and an upper bound, or ``prv``, which is tighter and takes a second or so a round.
        clipping: of per-example gradients: ``explicit`` forms them, ``ghost`` only their norms, and goes backwards a second time;
            ``auto`` takes ``ghost`` where opacus knows the norms of every layer that learns.
        secure: whether noise and sampling come from the operating system's entropy instead of the seed; the run cannot be repeated then.
        validation_in_the_clear: whether clients tell how well the model does on their validation examples, which nothing protects.
    """

    clipping_norm: Positive
    delta: Annotated[float, Gt(0), Lt(1)]
    unit: Unit = "example"
    noise_multiplier: NonNegative | None = None
    target_epsilon: Positive | None = None
    accountant: Accountant = "rdp"
    clipping: Literal["auto", "ghost", "explicit"] = "auto"
    secure: bool = False
    validation_in_the_clear: bool = False

    def __post_init__(self) -> None:
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            given = f"privacy.noise_multiplier = {self.noise_multiplier}, privacy.target_epsilon = {self.target_epsilon}"
            raise ExperimentError(f"{given}; give exactly one of the two")
        if math.isinf(self.clipping_norm) and self.noise_multiplier != 0:
            raise ExperimentError("privacy.clipping_norm = inf needs noise without bound; give a norm, or noise_multiplier = 0")

    def noise(self, sample_rate: float, steps: int) -> float:
        """The noise multiplier of a run in which so many steps see each example, or client, with probability ``sample_rate``.

        Raises:
            ExperimentError: no noise reaches the target.
        """
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.target_epsilon is not None
        return _noise_for(self.target_epsilon, self.delta, sample_rate, steps, self.accountant)


# ---- accounting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ledger:
    """What has been released: an accountant's state as a value.

    Attributes:
        entries: (noise multiplier, sample rate, steps) of Poisson-sampled Gaussian mechanisms, one after the other.
    """

    entries: tuple[tuple[float, float, int], ...] = ()

    def spent(self, noise_multiplier: float, sample_rate: float, steps: int) -> "Ledger":
        """The ledger after so many more steps."""
        if self.entries and self.entries[-1][:2] == (noise_multiplier, sample_rate):
            return Ledger((*self.entries[:-1], (noise_multiplier, sample_rate, self.entries[-1][2] + steps)))
        return Ledger((*self.entries, (noise_multiplier, sample_rate, steps)))

    def epsilon(self, delta: float, accountant: Accountant) -> float:
        """Epsilon at ``delta``, as opacus' accountant of this name computes it; infinite where a step was without noise."""
        if any(noise == 0 for noise, _, _ in self.entries):
            return math.inf
        return _epsilon(self.entries, delta, accountant) if self.entries else 0.0

    def record(self) -> ConfigRecord:
        """The ledger as it is kept in a client's or the server's state."""
        noise, rates, steps = (list(column) for column in zip(*self.entries, strict=True)) if self.entries else ([], [], [])
        return ConfigRecord({"noise_multipliers": noise, "sample_rates": rates, "steps": steps})

    @classmethod
    def of(cls, state: RecordDict) -> "Ledger":
        """The ledger that a state holds; an empty one if none."""
        if RECORD not in state:
            return cls()
        kept = config_of(state, RECORD)
        columns = (kept[name] for name in ("noise_multipliers", "sample_rates", "steps"))
        return cls(tuple((float(noise), float(rate), int(steps)) for noise, rate, steps in zip(*columns, strict=True)))


@lru_cache(maxsize=4096)
def _epsilon(entries: tuple[tuple[float, float, int], ...], delta: float, accountant: Accountant) -> float:
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis import rdp
    from opacus.accountants.rdp import RDPAccountant

    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.simplefilter("ignore")  # an order at the end of its range still gives a bound; log(1 - q) of q = 1
        if accountant == "prv":
            held = PRVAccountant()
            held.history = list(entries)
            return float(held.get_epsilon(delta=delta))
        orders = tuple(RDPAccountant.DEFAULT_ALPHAS)
        total = sum(steps * np.asarray(_renyi_of_a_step(noise, rate, orders)) for noise, rate, steps in entries)
        return float(rdp.get_privacy_spent(orders=orders, rdp=total, delta=delta)[0])


@lru_cache(maxsize=4096)
def _renyi_of_a_step(noise: float, rate: float, orders: tuple[float, ...]) -> tuple[float, ...]:
    """The Renyi divergence of one step at each order; those of steps add up."""
    from opacus.accountants.analysis import rdp

    return tuple(rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=orders))


@lru_cache(maxsize=1024)
def _noise_for(target: float, delta: float, rate: float, steps: int, accountant: Accountant) -> float:
    from opacus.accountants.utils import get_noise_multiplier

    arguments = {"target_epsilon": target, "target_delta": delta, "sample_rate": rate, "steps": steps, "accountant": accountant}
    try:
        with warnings.catch_warnings(), np.errstate(divide="ignore"):
            warnings.simplefilter("ignore")
            return float(get_noise_multiplier(**arguments, epsilon_tolerance=min(0.01, target / 100)))
    except (ValueError, RuntimeError) as error:
        planned = f"privacy.target_epsilon = {target} at delta = {delta} cannot be met in {steps} steps at a sampling rate of {rate:.4g}"
        raise ExperimentError(f"{planned} ({error}); allow more, or train less") from error


# ---- clipping and noise -------------------------------------------------------------------------------------------------


def clipping_factors(norms: Float[Tensor, "n"], clipping_norm: float) -> Float[Tensor, "n"]:
    """By what each of n vectors of these norms is multiplied so that none is longer than ``clipping_norm``: min(1, C / norm).

    >>> clipping_factors(torch.tensor([0.0, 1.0, 4.0]), 2.0)
    tensor([1.0000, 1.0000, 0.5000])
    """
    return (clipping_norm / norms).clamp(max=1.0)


def norms_of(gradients: Sequence[Float[Tensor, "n ..."]]) -> Float[Tensor, "n"]:
    """The norm of each of n vectors that are given in parts."""
    return torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)  # type: ignore[no-any-return]


def clipped_sum(gradients: Sequence[Float[Tensor, "n ..."]], clipping_norm: float) -> list[Tensor]:
    """The sum of n vectors, given in parts, each clipped as a whole; in parts."""
    factors = clipping_factors(norms_of(gradients), clipping_norm)
    return [torch.tensordot(factors, gradient, dims=1) for gradient in gradients]


class Entropy(Protocol):
    """Where noise and sampling come from."""

    def fractions(self, count: int) -> Float[Tensor, "count"]:
        """Numbers in [0, 1)."""

    def gaussian(self, like: Tensor) -> Tensor:
        """Standard normal numbers, of a tensor's shape, type and device."""


@dataclass(frozen=True)
class Seeded:
    """A generator: who knows the seed knows the noise.

    Attributes:
        rng: on the CPU.
    """

    rng: torch.Generator

    def fractions(self, count: int) -> Float[Tensor, "count"]:
        """Numbers in [0, 1)."""
        return torch.rand(count, generator=self.rng, dtype=torch.float64)

    def gaussian(self, like: Tensor) -> Tensor:
        """Standard normal numbers, of a tensor's shape, type and device."""
        return torch.randn(like.shape, generator=self.rng, dtype=like.dtype).to(like.device)


class OperatingSystem:
    """The operating system's entropy: nobody can draw the same again.

    A normal number is half the sum of four, which hides the grid of floating-point numbers on which each lies.
    """

    def fractions(self, count: int) -> Float[Tensor, "count"]:
        """Numbers in [0, 1), of 53 bits."""
        bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(11)
        return torch.from_numpy(bits.astype(np.float64) / 2.0**53)

    def gaussian(self, like: Tensor) -> Tensor:
        """Standard normal numbers, of a tensor's shape, type and device."""
        count = like.numel()
        quarters = torch.special.ndtri((self.fractions(4 * count) * 2.0**53 + 0.5) / 2.0**53).reshape(4, count)
        return (quarters.sum(0) / 2).reshape(like.shape).to(like.device, like.dtype)  # type: ignore[no-any-return]


def entropy(secure: bool, rng: torch.Generator) -> Entropy:
    """The operating system's if ``secure``, else ``rng``."""
    return OperatingSystem() if secure else Seeded(rng)
