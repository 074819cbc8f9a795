"""Exponential moving averages of a network's weights."""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn


class Averaged(nn.Module):
    """A network, and a slowly moving average of it that is not trained.

    Called, it is the network. In its state dict the two are ``network.*`` and ``average.*``.

    Args:
        network: what is trained.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.average = copy.deepcopy(network).requires_grad_(False)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What the network says."""
        return self.network(*inputs, **options)

    @torch.no_grad()
    def begin(self) -> None:
        """Put the average where the network is."""
        self.follow(0.0)

    @torch.no_grad()
    def follow(self, decay: float, buffers: Literal["copied", "averaged"] = "copied") -> None:
        """Move the average towards the network: ``average <- decay average + (1 - decay) network``.

        Args:
            decay: in [0, 1].
            buffers: whether buffers, such as BatchNorm's running statistics, are those of the network or move as
                parameters do; whole numbers are copied in any case.
        """
        follow(self.average, self.network, decay, buffers)


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, decay: float, buffers: Literal["copied", "averaged"] = "copied") -> None:
    """Move the weights of one network towards those of another of its kind, see ``Averaged.follow``; tied weights once."""
    ours, theirs = dict(average.named_parameters()), dict(network.named_parameters())
    own, others = dict(average.named_buffers()), dict(network.named_buffers())
    floating = {name for name, buffer in own.items() if buffer.is_floating_point()} if buffers == "averaged" else set()
    averaged = [(ours[name], theirs[name]) for name in ours] + [(own[name], others[name]) for name in floating]
    _lerp([average for average, _ in averaged], [value for _, value in averaged], 1 - decay)
    for name in own.keys() - floating:
        own[name].copy_(others[name])


def warmed_up(decay: float, steps: int) -> float:
    """``decay``, or less in the first steps, so that a short run's average does not remember its random beginning.

    Args:
        decay: the final one.
        steps: taken so far.

    >>> warmed_up(0.999, 0), warmed_up(0.999, 90)
    (0.1, 0.91)
    """
    return min(decay, (1 + steps) / (10 + steps))


def _lerp(averages: list[Tensor], values: list[Tensor], weight: float) -> None:
    if averages:
        torch._foreach_lerp_(averages, [value.detach() for value in values], weight)
