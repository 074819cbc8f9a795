"""The wide residual network of MixMatch, FixMatch and DoubleMatch, and the names of its variables in their checkpoints.

Source: arXiv 1605.07146; arXiv 2205.05575, with the sizes of its public implementation.
"""

from collections.abc import Mapping
from math import sqrt

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

SLOPE = 0.1
"""Of the LeakyReLUs below zero."""

EPSILON = 1e-3
"""Added to the variances of the batch norms."""

SIZES = {
    "wrn-28-2": {"scales": 3, "filters": 32, "repeat": 4},
    "wrn-28-8": {"scales": 3, "filters": 128, "repeat": 4},
    "wrn-37-2": {"scales": 4, "filters": 32, "repeat": 4},
}
"""The published networks: for CIFAR-10 and SVHN, for CIFAR-100, and for STL-10."""


class SameConv2d(nn.Conv2d):
    """A convolution with bias whose output has ceil(side / stride) pixels, padded by zeros as TensorFlow's "SAME" pads.

    An odd number of zeros puts the extra one at the bottom and on the right, unlike ``nn.Conv2d(padding=1)``.
    """

    def forward(self, input: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        """The convolved images."""
        top, bottom = same_padding(input.shape[2], self.kernel_size[0], self.stride[0])
        left, right = same_padding(input.shape[3], self.kernel_size[1], self.stride[1])
        if top == bottom and left == right:
            return F.conv2d(input, self.weight, self.bias, self.stride, (top, left))
        return F.conv2d(F.pad(input, (left, right, top, bottom)), self.weight, self.bias, self.stride)


def same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after a side of ``side`` pixels.

    >>> same_padding(32, 3, 1), same_padding(32, 3, 2), same_padding(31, 3, 2), same_padding(32, 1, 2)
    ((1, 1), (0, 1), (1, 1), (0, 0))
    """
    outputs = -(-side // stride)
    zeros = max((outputs - 1) * stride + kernel - side, 0)
    return zeros // 2, zeros - zeros // 2


class Block(nn.Module):
    """A pre-activation residual block of two 3x3 convolutions.

    Args:
        inputs: channels that come in.
        outputs: channels that go out; a 1x1 convolution leads past the block where they are others.
        stride: of the first convolution, and of the 1x1.
        first: the network's first block, whose shortcut starts after its activation and not before.
        momentum: of the batch norms.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, first: bool, momentum: float) -> None:
        super().__init__()
        self.first = first
        self.norm1 = nn.BatchNorm2d(inputs, EPSILON, momentum)
        self.conv1 = SameConv2d(inputs, outputs, 3, stride)
        self.norm2 = nn.BatchNorm2d(outputs, EPSILON, momentum)
        self.conv2 = SameConv2d(outputs, outputs, 3)
        self.shortcut = None if inputs == outputs else SameConv2d(inputs, outputs, 1, stride)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        """Shortcut plus residual."""
        activated = F.leaky_relu(self.norm1(x), SLOPE)
        y = F.leaky_relu(self.norm2(self.conv1(activated)), SLOPE)
        past = activated if self.first else x
        return self.conv2(y) + (past if self.shortcut is None else self.shortcut(past))  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    """A wide residual network of batch norms before the convolutions, which have biases.

    Stage s = 0, 1, ... has ``repeat`` blocks of width ``filters`` * 2^s; from the second on, its first block halves the sides.

    Args:
        channels: of the images, whose values lie in [-1, 1].
        classes: number of logits.
        scales: number of stages.
        filters: width of the first stage.
        repeat: blocks a stage.
        momentum: of the batch norms: the share of a batch in the running statistics. (TensorFlow counts the rest, 0.999.)

    Its weights are torch's until ``initialized`` or ``from_reference`` give it the reference's.

    >>> with torch.device("meta"):
    ...     network = WideResNet(3, 10, **SIZES["wrn-28-2"])
    >>> sum(p.numel() for p in network.parameters())
    1469642
    """

    def __init__(self, channels: int, classes: int, scales: int, filters: int, repeat: int, momentum: float = 0.001) -> None:
        super().__init__()
        widths = [filters << scale for scale in range(scales)]
        self.stem = SameConv2d(channels, 16, 3)
        self.stages = nn.ModuleList()
        inputs = 16
        for scale, width in enumerate(widths):
            stage = nn.ModuleList()
            for block in range(repeat):
                stage.append(Block(inputs, width, 2 if scale and not block else 1, first=not scale and not block, momentum=momentum))
                inputs = width
            self.stages.append(stage)
        self.norm = nn.BatchNorm2d(inputs, EPSILON, momentum)
        self.classifier = nn.Linear(inputs, classes)

    @property
    def blocks(self) -> list[tuple[str, Block]]:
        """Every block with its name, in order."""
        return [(name, module) for name, module in self.named_modules() if isinstance(module, Block)]

    def features(self, x: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n d"]:
        """The embedding: channels of the last stage, averaged over the image."""
        x = self.stem(x)
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                x = block(x)
        return F.leaky_relu(self.norm(x), SLOPE).mean((2, 3))

    def forward(self, x: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n classes"]:
        """Logits."""
        return self.classifier(self.features(x))  # type: ignore[no-any-return]


def initialized(model: nn.Module, rng: torch.Generator) -> nn.Module:
    """Give a model the reference's initial weights, in place.

    Convolutions get N(0, 2 / (kernel area * outputs)), linear layers a normal of variance 2 / (inputs + outputs) that is
    cut off at two deviations, biases 0. Batch norms start as torch makes them: as the identity, with statistics 0 and 1.

    Differs: the cut normal is rescaled to have that variance, as in the reference, and unlike ``xavier_normal_``.
    """
    cut = 0.87962566103423978  # the deviation of a standard normal that is cut off at 2
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", generator=rng)
        elif isinstance(module, nn.Linear):
            deviation = sqrt(2 / (module.in_features + module.out_features)) / cut
            nn.init.trunc_normal_(module.weight, 0, deviation, -2 * deviation, 2 * deviation, generator=rng)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


# ---- the reference's variables --------------------------------------------------------------------------------------


def reference_names(network: WideResNet, projection: str | None = "projection") -> dict[str, str]:
    """What the reference's checkpoints call each tensor of ``network``.

    Args:
        network: gives the number of stages and blocks.
        projection: our name of DoubleMatch's projection head; None: without it.

    Returns:
        Name in ``network.state_dict()`` (or ``projection.weight``) -> the reference's, in its order of creation.
    """
    names: dict[str, str] = {}
    made = {"conv2d": 0, "batch_normalization": 0}

    def add(module: str, kind: str, parts: Mapping[str, str]) -> None:
        number = made.get(kind, 0)
        made[kind] = number + 1
        scope = f"classify/{kind}_{number}" if number else f"classify/{kind}"
        names.update({f"{module}.{ours}": f"{scope}/{theirs}" for ours, theirs in parts.items()})

    layer = {"weight": "kernel", "bias": "bias"}
    norm = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    add("stem", "conv2d", layer)
    for name, block in network.blocks:
        add(f"{name}.norm1", "batch_normalization", norm)
        add(f"{name}.conv1", "conv2d", layer)
        add(f"{name}.norm2", "batch_normalization", norm)
        add(f"{name}.conv2", "conv2d", layer)
        if block.shortcut is not None:
            add(f"{name}.shortcut", "conv2d", layer)
    add("norm", "batch_normalization", norm)
    add("classifier", "dense", layer)
    if projection is not None:
        add(projection, "projection_head", layer)
    return names


def averaged(names: Mapping[str, str]) -> dict[str, str]:
    """What the reference calls the moving averages of its variables; moving statistics have none, and keep their names."""
    return {ours: theirs if "/moving_" in theirs else f"{theirs}/ExponentialMovingAverage" for ours, theirs in names.items()}


def from_reference(arrays: Mapping[str, np.ndarray], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The reference's variables as tensors of ours.

    Args:
        arrays: variables by the reference's names, e.g. an ``npz`` made of a checkpoint.
        names: from ``reference_names`` or ``averaged``.

    Raises:
        KeyError: a variable is missing.
    """
    return {ours: torch.from_numpy(_transposed(arrays[theirs], KERNEL_OF)) for ours, theirs in names.items()}


def to_reference(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Our tensors as the reference's variables: the inverse of ``from_reference``."""
    return {theirs: _transposed(state[ours].detach().cpu().numpy(), KERNEL_TO) for ours, theirs in names.items()}


KERNEL_OF = {4: (3, 2, 0, 1), 2: (1, 0)}
"""Axes of our kernels in the reference's, by their number: [height, width, in, out] and [in, out] there."""

KERNEL_TO = {4: (2, 3, 1, 0), 2: (1, 0)}
"""Axes of the reference's kernels in ours: [out, in, height, width] and [out, in] here."""


def _transposed(array: np.ndarray, axes: Mapping[int, tuple[int, ...]]) -> np.ndarray:
    return np.array(array.transpose(axes[array.ndim]) if array.ndim in axes else array, order="C")
