"""DPT: a head that looks at the tokens of four blocks, and puts them together from the coarsest to the finest."""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fedvision.errors import DataError
from fedvision.multimae.heads import Encoded, Head, enlarged


class ResidualUnit(nn.Module):
    """ReLU, convolution, ReLU, convolution, added to what it was given."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """As many channels."""
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))  # type: ignore[no-any-return]


class Fusion(nn.Module):
    """One step from coarse to fine: what came from below and this layer, added up, refined and made twice as large.

    ``resConfUnit1`` refines the layer; the coarsest step has nothing from below to add it to, and leaves its own unused.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(channels, channels, 1)
        self.resConfUnit1, self.resConfUnit2 = ResidualUnit(channels), ResidualUnit(channels)  # names of published checkpoints

    def forward(self, layer: Float[Tensor, "b c h w"], below: Float[Tensor, "b c h w"] | None) -> Float[Tensor, "b c 2h 2w"]:
        """Twice as many rows and columns."""
        x = layer if below is None else below + self.resConfUnit1(layer)
        return self.out_conv(doubled(self.resConfUnit2(x)))  # type: ignore[no-any-return]


class DPTHead(Head):
    """Dense prediction from four layers of tokens, at 4, 2, 1 and 1/2 times the resolution of patches.

    In its state dict every ``scratch.layer<i>_rn`` is also ``scratch.layer_rn.<i - 1>``, and ``act_<i>_postprocess`` also
    ``act_postprocess.<i - 1>``, as in published checkpoints.

    Args:
        width: of a token.
        channels: of the prediction.
        reads: the modalities whose patches it takes, side by side.
        kind: ``regression`` of values, or ``classes``.
        taps: the four blocks of the encoder that it looks at, counted from 0; ``evenly`` gives the usual ones.
        layers: channels of each; an eighth, a quarter, a half and all of ``width`` if not given.
        features: channels that all are brought to.

    Source: arXiv 2103.13413, section 3. Differs: the prediction is interpolated to the size of the picture where patches are not
        of 16 pixels.
    """

    def __init__(
        self,
        width: int,
        channels: int,
        reads: Sequence[str],
        kind: Literal["regression", "classes"],
        taps: Sequence[int],
        layers: Sequence[int] | None = None,
        features: int = 256,
    ) -> None:
        super().__init__()
        self.reads, self.taps = tuple(reads), tuple(taps)
        layers = layers or [max(width // share, 1) for share in (8, 4, 2, 1)]
        self.scratch = nn.Module()
        for i, layer in enumerate(layers, 1):
            self.scratch.add_module(f"layer{i}_rn", nn.Conv2d(layer, features, 3, padding=1, bias=False))
        self.scratch.layer_rn = nn.ModuleList(getattr(self.scratch, f"layer{i}_rn") for i in range(1, 5))
        for i in range(1, 5):
            self.scratch.add_module(f"refinenet{i}", Fusion(features))
        self.head = (_values if kind == "regression" else _classes)(features, channels)
        for i, (layer, resized) in enumerate(zip(layers, _resizings(layers), strict=True), 1):
            self.add_module(f"act_{i}_postprocess", nn.Sequential(nn.Conv2d(width * len(self.reads), layer, 1), *resized))
        self.act_postprocess = nn.ModuleList(getattr(self, f"act_{i}_postprocess") for i in range(1, 5))

    def forward(self, encoded: Encoded) -> Float[Tensor, "b channels height width"]:
        """Logits or values of each pixel.

        Raises:
            DataError: an odd number of rows or columns of patches, which do not meet again after halving.
        """
        rows, columns = encoded.grid
        if rows % 2 or columns % 2:
            fact = f"DPT cannot halve and double {rows} x {columns} patches"
            raise DataError(f"{fact}; choose learner.resolution so that there are even numbers of them: twice the patch divides it")
        path: Tensor | None = None
        for i in (3, 2, 1, 0):
            tokens = encoded.patches(self.reads, i).transpose(1, 2).unflatten(2, encoded.grid)
            layer = self.scratch.layer_rn[i](self.act_postprocess[i](tokens))  # type: ignore[index, operator]
            path = getattr(self.scratch, f"refinenet{i + 1}")(layer, path)
        return enlarged(self.head(path), encoded.size)


def evenly(depth: int) -> tuple[int, ...]:
    """The last block of each quarter of an encoder, counted from 0.

    >>> evenly(12), evenly(24), evenly(2)
    ((2, 5, 8, 11), (5, 11, 17, 23), (0, 0, 1, 1))
    """
    return tuple(-(-depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4))


def doubled(maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 2h 2w"]:
    """Maps with twice as many rows and columns, interpolated so that corners stay where they are."""
    return F.interpolate(maps, scale_factor=2.0, mode="bilinear", align_corners=True)


def _resizings(layers: Sequence[int]) -> list[list[nn.Module]]:
    """What brings each layer to its resolution."""
    return [
        [nn.ConvTranspose2d(layers[0], layers[0], 4, stride=4)],
        [nn.ConvTranspose2d(layers[1], layers[1], 2, stride=2)],
        [],
        [nn.Conv2d(layers[3], layers[3], 3, stride=2, padding=1)],
    ]


def _values(features: int, channels: int) -> nn.Sequential:
    half = features // 2
    first, second = nn.Conv2d(features, half, 3, padding=1), nn.Conv2d(half, 32, 3, padding=1)
    return nn.Sequential(first, _Doubling(), second, nn.ReLU(), nn.Conv2d(32, channels, 1))


def _classes(features: int, channels: int) -> nn.Sequential:
    first, last = nn.Conv2d(features, features, 3, padding=1, bias=False), nn.Conv2d(features, channels, 1)
    return nn.Sequential(first, nn.Identity(), nn.ReLU(), nn.Dropout(0.1), last, _Doubling())


class _Doubling(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return doubled(maps)
