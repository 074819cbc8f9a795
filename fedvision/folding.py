"""Folding: BatchNorm layers become part of the convolutions before them, which makes a network faster and changes nothing else."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

TOLERANCE = 1e-3
"""Relative to the largest output; more than rounding of a deep network, less than a wrong layer."""


@torch.no_grad()
def folded(model: nn.Module, images: Float[Tensor, "n channels height width"]) -> nn.Module:
    """A copy of a network in evaluation mode, whose BatchNorms are folded into the convolutions that feed them.

    Which convolution feeds which BatchNorm is observed in a forward pass, not guessed from names or order; layers used more
    than once keep their BatchNorm. A network that computes something else afterwards is not folded at all.

    Args:
        model: stays as it is.
        images: any that the network can be called on, e.g. one of zeros; they must show every difference.

    Differs: USI's reference folds every BatchNorm that follows a convolution in the order of ``named_modules``.
    """
    plain = deepcopy(model).eval()
    faster = deepcopy(plain)
    for convolution, norm in _pairs(faster, images):
        layer, scale = faster.get_submodule(convolution), faster.get_submodule(norm)
        _replace(faster, convolution, fuse_conv_bn_eval(layer, scale))  # type: ignore[type-var, arg-type]
        _replace(faster, norm, _remainder(scale))
    return faster if _agree(plain(images), faster(images)) else plain


def _pairs(model: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """Names of convolutions and of the BatchNorms that take their outputs, each called once."""
    calls: Counter[str] = Counter()
    outputs: list[tuple[Tensor, str]] = []  # kept, so that no other tensor takes their place in memory
    pairs: list[tuple[str, str]] = []

    def observe(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[name] += 1
        if isinstance(module, nn.Conv2d):
            outputs.append((output, name))
        else:
            pairs.extend((convolution, name) for made, convolution in outputs if made is inputs[0])

    with _hooked(model, observe):
        model(images)
    readers = Counter(convolution for convolution, _ in pairs)
    return [(one, other) for one, other in pairs if readers[one] == calls[one] == calls[other] == 1]


@contextmanager
def _hooked(model: nn.Module, observe: Callable[..., Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) or (isinstance(module, _BatchNorm) and module.track_running_stats):
                stack.callback(module.register_forward_hook(partial(observe, name)).remove)
        yield


def _remainder(norm: nn.Module) -> nn.Module:
    """What a BatchNorm does beside normalizing: timm's hold an activation."""
    rest = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]
    return nn.Sequential(*rest) if rest else nn.Identity()


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, new)


def _agree(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= TOLERANCE * one.abs().max().clamp(min=1e-6))
