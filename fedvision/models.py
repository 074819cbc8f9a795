"""Models that the papers define themselves; everything else comes from timm.

Each is called on inputs and returns logits, and exposes ``features`` (all but the head) and ``classifier`` (the head).
"""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn


class MLP(nn.Module):
    """A multi-layer perceptron with ReLU between its layers.

    The FedILC paper's: 392-390-390-1 on Color-MNIST; F-1024-1024-512-1 on eICU, whose third hidden layer is linear.

    Args:
        inputs: shape of one input; it is flattened.
        hidden: widths of the hidden layers, ``hidden1`` and so on in the state dict.
        outputs: number of logits.
        relu: how many of the hidden layers are followed by a ReLU; None: all.

    Source: arXiv 2205.09305, experiments; the sizes from its public implementation.
    """

    def __init__(self, inputs: Sequence[int], hidden: Sequence[int], outputs: int, relu: int | None = None) -> None:
        super().__init__()
        widths = [prod(inputs), *hidden]
        self.layers = [f"hidden{i}" for i in range(1, len(widths))]
        self.activated = len(self.layers) if relu is None else relu
        for name, (fan_in, fan_out) in zip(self.layers, pairwise(widths), strict=True):
            self.add_module(name, nn.Linear(fan_in, fan_out))
        self.classifier = nn.Linear(widths[-1], outputs)

    def features(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n width"]:
        """What the head sees."""
        h = x.flatten(1)
        for i, name in enumerate(self.layers):
            h = self.get_submodule(name)(h)
            h = h.relu() if i < self.activated else h
        return h

    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n outputs"]:
        """Logits."""
        return self.classifier(self.features(x))  # type: ignore[no-any-return]


class CNN(nn.Module):
    """The FedILC paper's convolutional network, made for 16x16 images.

    Three 3x3 convolutions (the second of stride 2), each followed by ReLU, GroupNorm and 2x2 max-pooling,
    one linear layer, and the head.

    Args:
        image_shape: (channels, height, width); at least 14x14, the smallest that survives the strides.
        widths: output channels of the three convolutions, multiples of ``groups``.
        outputs: number of logits.
        groups: of each GroupNorm.

    Source: arXiv 2205.09305, Rotated-CIFAR10; the sizes from its public implementation.
    """

    def __init__(self, image_shape: Sequence[int], widths: Sequence[int], outputs: int, groups: int = 8) -> None:
        super().__init__()
        channels, *sides = image_shape
        first, second, third = widths
        self.convolution1 = nn.Conv2d(channels, first, 3, padding=1)
        self.convolution2 = nn.Conv2d(first, second, 3, stride=2, padding=1)
        self.convolution3 = nn.Conv2d(second, third, 3, padding=1)
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(groups, width) for width in widths)
        self.hidden = nn.Linear(third * prod(self.final_side(side) for side in sides), third)
        self.classifier = nn.Linear(third, outputs)

    @staticmethod
    def final_side(side: int) -> int:
        """Pixels a side after the last pooling, of ``side`` pixels at the input."""
        return (side // 2 + 1) // 2 // 2 // 2

    def features(self, x: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n features"]:
        """What the head sees."""
        for convolution, norm in (
            (self.convolution1, self.norm1),
            (self.convolution2, self.norm2),
            (self.convolution3, self.norm3),
        ):
            x = nn.functional.max_pool2d(norm(convolution(x).relu()), 2)
        return self.hidden(x.flatten(1))  # type: ignore[no-any-return]

    def forward(self, x: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n outputs"]:
        """Logits."""
        return self.classifier(self.features(x))  # type: ignore[no-any-return]


class SmallCNN(nn.Module):
    """A plain convolutional network for images of a few pixels: 3x3 convolutions, each with BatchNorm and ReLU.

    Each but the first halves the image; the head sees the mean over what is left.

    Args:
        channels: of the images, of any size.
        widths: output channels of the convolutions.
        outputs: number of logits.
    """

    def __init__(self, channels: int, widths: Sequence[int], outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise([channels, *widths]):
            convolution = nn.Conv2d(fan_in, fan_out, 3, stride=2 if layers else 1, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(fan_out), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.classifier = nn.Linear(widths[-1], outputs)

    def features(self, x: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n features"]:
        """What the head sees."""
        return self.body(x).mean((2, 3))  # type: ignore[no-any-return]

    def forward(self, x: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n outputs"]:
        """Logits."""
        return self.classifier(self.features(x))  # type: ignore[no-any-return]


def xavier(model: nn.Module, rng: torch.Generator) -> nn.Module:
    """Give every linear and convolutional layer Xavier-uniform weights and zero biases, in place."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight, generator=rng)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
