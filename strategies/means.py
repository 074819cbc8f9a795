"""Sums and means of the clients' answers, folded one answer at a time.

An accumulator is a commutative monoid: running sums over the answers, and a formula of these sums.
So answers may arrive in any order, the partial sums of disjoint groups of clients merge by
addition, and the memory does not grow with the number of clients. First come the formulas for one
block of coordinates, as pure functions; then the thin classes that walk over the arrays block by
block, so that intermediate values stay in cache.

>>> mean = ArithmeticMean()
>>> mean.add({"bias": torch.tensor([1.0, 2.0])}, weight=3)
>>> mean.add({"bias": torch.tensor([5.0, 6.0])}, weight=1)
>>> mean.result()
{'bias': tensor([2., 3.])}
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from fedvision.errors import AggregationError

Array = np.ndarray[Any, np.dtype[Any]] | Tensor
"""A block of numbers, of either library."""

FLOOR = 1e-10
"""Added to every magnitude, so that the logarithm of an exact zero is finite."""

CENTRE = 1e-5
"""Logarithms are taken of magnitudes divided by this. The floor and 1 then lie equally far from 0,
which halves the rounding error of long sums of logarithms."""

CACHE_BLOCK = 131_072
"""Coordinates handled at a time where a formula makes several passes: its operands stay in cache,
and calling the library costs little beside the work."""

STREAM_BLOCK = 1_048_576
"""Coordinates handled at a time where a formula makes one pass, and so reuses nothing."""

SUM_DTYPES = (torch.float32, torch.float64)
"""The types that sums are kept in."""


def fold_sum(total: Tensor, g: Tensor, weight: float) -> None:
    """Add one answer to a weighted sum, in place: ``S += w g``.

    With ``S`` the ``total`` [b], ``g`` a block [b] of the answer and ``w`` its ``weight``.
    """
    total.add_(g, alpha=weight)


@np.errstate(over="ignore", invalid="ignore")
def fold_geometric(sums: Array, g: Array, weight: float, scratch: Array) -> None:
    """Add one answer to the running sums of the weighted geometric mean, in place.

    Per coordinate, with ``g`` the answer, ``w`` its weight, ``c = CENTRE`` and
    ``l = log(|g|/c + FLOOR/c)``, the rows of ``sums`` grow by::

        w l [g > 0]      w l [g <= 0]      w [g > 0]      w sign(g)

    The last row is optional. Either group has its own sum of logarithms: to take one as the
    difference of two sums would cancel digits.

    Args:
        sums: [3, b] or [4, b]. All arrays are NumPy's, or all are torch's.
        g: [b], below 1e33 in magnitude; left as it is.
        weight: ``w``, at least 0.
        scratch: of the shape of ``sums``, to be overwritten.

    Source:
        FedILC, arXiv 2205.09305, the weighted geometric mean over silos.
    """
    library: Any = torch if isinstance(g, Tensor) else np
    positive_log, negative_log, positive, *signs = scratch
    library.abs(g, out=negative_log)
    library.multiply(negative_log, 1 / CENTRE, out=negative_log)
    library.add(negative_log, FLOOR / CENTRE, out=negative_log)
    library.log(negative_log, out=negative_log)
    library.multiply(negative_log, weight, out=negative_log)
    library.greater(g, 0, out=positive)
    library.multiply(negative_log, positive, out=positive_log)
    library.subtract(negative_log, positive_log, out=negative_log)
    for sign in signs:
        library.less(g, 0, out=sign)
        library.subtract(positive, sign, out=sign)
    library.multiply(scratch[2:], weight, out=scratch[2:])
    library.add(sums, scratch, out=sums)


def group_mean(log_sum: Tensor, weight: Tensor, total: Tensor) -> Tensor:
    """One sign group's term of the geometric mean: ``W/E c exp(L/W)``, and 0 for an empty group.

    With ``L`` the group's ``log_sum`` [b], ``W`` its ``weight`` [b], ``E`` the ``total`` weight of
    all answers, above 0, and ``c = CENTRE``. Where ``W`` is 0, so is ``L``.
    """
    mean_log = log_sum / weight.clamp_min(torch.finfo(weight.dtype).tiny)
    return mean_log.exp_().mul_(weight).mul_(CENTRE / total)


def geometric_mean(sums: Tensor, total: Tensor) -> Tensor:
    """The weighted geometric mean [b] of a block, from the sums [3, b] of `fold_geometric`.

    With ``P`` the answers above 0, ``N`` the others, ``w`` an answer's weight, ``W_P`` and ``W_N``
    the groups' weights and ``E = W_P + W_N`` the ``total``::

        W_P/E (prod_P |g|^w)^(1/W_P)  -  W_N/E (prod_N |g|^w)^(1/W_N)

    Source:
        FedILC, arXiv 2205.09305, the weighted geometric mean over silos.

    Differs:
        Weights take the place of the counts ``|P|``, ``|N|`` and ``E``; with equal weights it is
        the paper's formula. An exact zero belongs to ``N``, as in the reference code.
    """
    positive_log, negative_log, weight = sums.unbind()
    positive = group_mean(positive_log, weight, total)
    return positive.sub_(group_mean(negative_log, total - weight, total))


def agreement(signs: Tensor, total: Tensor) -> Tensor:
    """How far the answers agree on the sign, in [0, 1]: ``|sum w sign(g)| / E``, ``sign(0) = 0``.

    With ``signs`` the sum ``sum w sign(g)`` [b] and ``E`` the ``total`` weight.

    Source:
        FedILC, arXiv 2205.09305, the optional agreement mask.
    """
    return signs.abs().div_(total)


def _fast(tensor: Tensor) -> Array:
    """The same memory as a NumPy array if it is a CPU's.

    NumPy's logarithm takes 0.4 times as long as torch's. And it computes in the calling thread;
    torch's threads wait for each other at every pass, which takes tens of times as long where
    other work keeps the cores busy.
    """
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU in NumPy's memory, whose large pages fault in 5 times faster than torch's."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = np.zeros(size, np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)


class Layout(NamedTuple):
    """What an accumulator remembers of an array: its shape and its type."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def sum_dtype(self) -> torch.dtype:
        """The type its sums are kept in: float64 for float64 and integers, else float32."""
        wide = self.dtype == torch.float64 or not self.dtype.is_floating_point
        return torch.float64 if wide else torch.float32

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class Accumulator(ABC):
    """A running combination of named arrays that grows by answers and merges with its like.

    An answer need not have all arrays: each is combined over the answers that have it, and the
    result has those that any answer of positive weight has. The first answer with an array fixes its
    shape and type. Whether a client may leave an array out is for others to say
    (``strategies.strategy.Inspection``).

    Sums are kept in float32 for float32 and shorter types, in float64 for float64 and integers;
    an integer result (``num_batches_tracked``) is rounded. An answer is only read while it is
    added: nothing of it is changed or kept.

    A new kind says how many running sums a coordinate has and how many coordinates to take at a
    time, how an answer is folded into the sums (`_fold_block`), and what they come to (`_answer`).
    """

    def __init__(self, sums: int, block: int, **settings: float) -> None:
        self._sum_count, self._block, self._settings = sums, block, settings
        self._layouts: dict[str, Layout] = {}
        self._sums: dict[str, Tensor] = {}
        self._scratch: dict[torch.dtype, Tensor] = {}
        # A total for each array and type of sum: rounded alike, it equals the weight of all answers.
        self._totals = {dtype: torch.zeros(0, dtype=dtype) for dtype in SUM_DTYPES}
        self._places: dict[str, int] = {}
        self._weight, self._count = 0.0, 0

    @property
    def weight(self) -> float:
        """The total weight of the answers so far."""
        return self._weight

    @property
    def count(self) -> int:
        """The number of answers so far."""
        return self._count

    @torch.no_grad()
    def add(self, update: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Fold one answer in; a refused answer changes nothing.

        Args:
            update: the answer's arrays by name, real, of any shape. Contiguous ones are read in
                place, others are copied one at a time.
            weight: finite and at least 0, for instance the client's number of examples.

        Raises:
            AggregationError: the weight is out of range, or a shape or type is not that of an
                earlier answer.
        """
        if not (math.isfinite(weight) and weight >= 0):
            raise AggregationError(f"An answer weighs {weight}; give a finite weight, at least 0.")
        layouts = {name: Layout(array.shape, array.dtype) for name, array in update.items()}
        self._admit(layouts, update)
        for name, array in update.items():
            self._fold(self._sums[name], array.reshape(-1), float(weight))
        for total in self._totals.values():
            if len(update) == len(total):
                total.add_(weight)
            else:
                total[self._where(update)] += weight
        self._weight += weight
        self._count += 1

    @torch.no_grad()
    def merge(self, other: "Accumulator") -> None:
        """Fold in all answers of another accumulator, which stays as it is.

        Raises:
            AggregationError: ``other`` is of another kind, or has other settings, or an array of
                another shape or type.
        """
        if type(other) is not type(self) or other._settings != self._settings:
            fact = f"{self!r} cannot merge with {other!r}"
            raise AggregationError(f"{fact}; give both the same kind and settings.")
        if not other._count:
            return
        self._admit(other._layouts, other._sums)
        for name, sums in other._sums.items():
            self._sums[name].add_(sums.to(self._sums[name].device))
        for dtype, total in self._totals.items():
            total[self._where(other._sums)] += other._totals[dtype]
        self._weight += other._weight
        self._count += other._count

    @torch.no_grad()
    def result(self) -> dict[str, Tensor]:
        """Combine all answers so far into fresh arrays; more answers may follow.

        Raises:
            AggregationError: no answer has a positive weight, or an integer result does not fit
                its type.
        """
        if not self.weight > 0:
            fact = f"{self!r} has {self.count} answers of total weight {self.weight:g}"
            raise AggregationError(f"{fact}; add at least one answer of positive weight.")
        weights = self._totals[torch.float64].tolist()
        return {name: self._combine(name) for name, weight in zip(self._sums, weights, strict=True) if weight > 0}

    @abstractmethod
    def _fold_block(self, sums: Tensor, g: Tensor, weight: float, scratch: Tensor) -> None:
        """Fold an answer's block ``g`` [b] into its ``sums``; ``scratch`` has the sums' shape."""

    @abstractmethod
    def _answer(self, sums: Tensor, total: Tensor) -> Tensor:
        """A fresh block [b] of the result, from the sums [sums, b] and the total weight."""

    def _admit(self, layouts: Mapping[str, Layout], arrays: Mapping[str, Tensor]) -> None:
        """Check an answer's arrays against those of earlier ones, or make room for the first of a name."""
        _check_same(self._layouts, layouts)
        fresh = {name: layout for name, layout in layouts.items() if name not in self._layouts}
        if not fresh:
            return
        _check_real(fresh)
        self._layouts |= fresh
        self._sums |= {name: self._room(layout, arrays[name].device) for name, layout in fresh.items()}
        self._places = {name: place for place, name in enumerate(self._sums)}
        self._totals = {dtype: torch.cat([total, total.new_zeros(len(fresh))]) for dtype, total in self._totals.items()}

    def _where(self, arrays: Mapping[str, Tensor]) -> list[int]:
        """The places of the totals of some arrays."""
        return [self._places[name] for name in arrays]

    def _room(self, layout: Layout, device: torch.device) -> Tensor:
        return _zeros((self._sum_count, layout.shape.numel()), layout.sum_dtype, device)

    def _fold(self, sums: Tensor, flat: Tensor, weight: float) -> None:
        """Fold a flat array block by block, converted to the sums' type and device if need be."""
        as_is = flat.dtype == sums.dtype and flat.device == sums.device
        room = self._lend(sums, min(flat.numel(), self._block))
        sum_blocks, blocks = torch.split(sums, self._block, 1), torch.split(flat, self._block)
        for sum_block, block in zip(sum_blocks, blocks, strict=True):
            scratch = room[:, : block.numel()]
            g = block if as_is else scratch[-1].copy_(block)
            self._fold_block(sum_block, g, weight, scratch[:-1])

    def _lend(self, sums: Tensor, size: int) -> Tensor:
        """Scratch for ``size`` coordinates: a row for each sum, and one for a converted answer."""
        scratch = self._scratch.get(sums.dtype)
        if scratch is None or scratch.shape[1] < size or scratch.device != sums.device:
            scratch = self._scratch[sums.dtype] = sums.new_empty(self._sum_count + 1, size)
        return scratch

    def _combine(self, name: str) -> Tensor:
        """The result of one array, in its own shape and type."""
        layout, sums = self._layouts[name], self._sums[name]
        total = self._totals[sums.dtype][self._places[name]]
        result = _zeros(layout.shape, layout.dtype, sums.device)
        sum_blocks = torch.split(sums, CACHE_BLOCK, 1)
        blocks = torch.split(result.view(-1), CACHE_BLOCK)
        for sum_block, block in zip(sum_blocks, blocks, strict=True):
            values = self._answer(sum_block, total)
            if not layout.dtype.is_floating_point:
                _check_fits(name, values.round_(), layout.dtype)
            block.copy_(values)
        return result

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_scratch": {}}

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self._settings.items())
        return f"{type(self).__name__}({settings})"


@final
class Sum(Accumulator):
    """The weighted sum ``sum w x``.

    >>> total = Sum()
    >>> total.add({"bias": torch.tensor([1.0, -2.0])})
    >>> total.add({"bias": torch.tensor([10.0, 20.0])}, weight=0.5)
    >>> total.result()
    {'bias': tensor([6., 8.])}
    """

    def __init__(self) -> None:
        super().__init__(sums=1, block=STREAM_BLOCK)

    def _fold_block(self, sums: Tensor, g: Tensor, weight: float, scratch: Tensor) -> None:
        fold_sum(sums[0], g, weight)

    def _answer(self, sums: Tensor, total: Tensor) -> Tensor:
        return sums[0].clone()


@final
class ArithmeticMean(Accumulator):
    """The weighted arithmetic mean ``sum w x / sum w``, as in federated averaging.

    >>> mean = ArithmeticMean()
    >>> mean.add({"bias": torch.tensor([0.0, 8.0])}, weight=30)
    >>> mean.add({"bias": torch.tensor([4.0, 0.0])}, weight=10)
    >>> mean.result(), mean.weight, mean.count
    ({'bias': tensor([1., 6.])}, 40.0, 2)

    Source:
        Federated averaging, arXiv 1602.05629, Algorithm 1.
    """

    def __init__(self) -> None:
        super().__init__(sums=1, block=STREAM_BLOCK)

    def _fold_block(self, sums: Tensor, g: Tensor, weight: float, scratch: Tensor) -> None:
        fold_sum(sums[0], g, weight)

    def _answer(self, sums: Tensor, total: Tensor) -> Tensor:
        return sums[0] / total


@final
class WeightedGeometricMean(Accumulator):
    """The geometric mean of either sign's answers, weighted by how many answers have that sign.

    `geometric_mean` states the formula. Three sums are kept per coordinate, four with a threshold.
    In float32, rounded sums of logarithms leave an error of up to 1e-5 of the two groups' terms
    for 50 answers, growing with their number. Whole numbers are the best weights: where sums of
    weights are rounded, a group of very small weight loses digits.

    >>> mean = WeightedGeometricMean()
    >>> for gradient in ([2.0, 1.0], [8.0, 1.0], [4.0, -1.0]):
    ...     mean.add({"bias": torch.tensor(gradient)})
    >>> mean.result()["bias"].round(decimals=3)
    tensor([4.0000, 0.3330])

    Args:
        agreement_threshold: in [0, 1]; the result is 0 where the magnitude of the answers' mean
            sign is below it. An exact zero has sign 0 here. 0 masks nothing.

    Raises:
        AggregationError: the threshold is out of range.

    Source:
        FedILC, arXiv 2205.09305.
    """

    def __init__(self, agreement_threshold: float = 0.0) -> None:
        if not 0 <= agreement_threshold <= 1:
            fact = f"agreement_threshold is {agreement_threshold}"
            raise AggregationError(f"{fact}; give a fraction in [0, 1].")
        self._masks = agreement_threshold > 0
        sums = 4 if self._masks else 3
        super().__init__(sums, CACHE_BLOCK, agreement_threshold=float(agreement_threshold))

    def _fold_block(self, sums: Tensor, g: Tensor, weight: float, scratch: Tensor) -> None:
        fold_geometric(_fast(sums), _fast(g), weight, _fast(scratch))

    def _answer(self, sums: Tensor, total: Tensor) -> Tensor:
        mean = geometric_mean(sums[:3], total)
        if self._masks:
            disagree = agreement(sums[3], total) < self._settings["agreement_threshold"]
            mean.masked_fill_(disagree, 0.0)
        return mean


def _check_real(layouts: Mapping[str, Layout]) -> None:
    for name, layout in layouts.items():
        if layout.dtype.is_complex:
            raise AggregationError(f"Array {name!r} is {layout}; send real and imaginary parts.")


def _check_same(first: Mapping[str, Layout], other: Mapping[str, Layout]) -> None:
    for name, layout in other.items():
        if layout != first.get(name, layout):
            fact = f"Array {name!r} is {layout} in one answer and {first[name]} in the first"
            raise AggregationError(f"{fact}; every client must train the same model.")


def _check_fits(name: str, values: Tensor, dtype: torch.dtype) -> None:
    if dtype == torch.bool or not values.numel():
        return
    low, high = (bound.item() for bound in values.aminmax())
    if low < torch.iinfo(dtype).min or high > torch.iinfo(dtype).max:
        fact = f"Array {name!r} comes to values from {low:g} to {high:g}, beyond {dtype}"
        raise AggregationError(f"{fact}; send it in a wider type.")
