"""Heads of fine-tuning: what becomes of encoded tokens, for a picture as a whole or for its pixels."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fedvision.errors import ExperimentError
from fedvision.multimae.transformer import LayerNorm, block

PLACES = 4
"""The ConvNeXt head predicts so many places a side of each patch."""


@dataclass(frozen=True)
class Encoded:
    """What a head sees of a batch.

    Attributes:
        layers: tokens [b, n, width] after each of the blocks that the head asks for; those of patches, then the global ones.
        spans: where the patches of each modality are among them.
        grid: rows and columns of patches.
        size: height and width of the picture in pixels.
    """

    layers: Sequence[Float[Tensor, "b n width"]]
    spans: Mapping[str, slice]
    grid: tuple[int, int]
    size: tuple[int, int]

    def patches(self, names: Sequence[str], layer: int = -1) -> Float[Tensor, "b patches channels"]:
        """The tokens of each place, those of the modalities ``names`` side by side."""
        return torch.cat([self.layers[layer][:, self.spans[name]] for name in names], dim=2)


class Head(nn.Module, ABC):
    """What predicts something from encoded tokens.

    Attributes:
        reads: the modalities whose patches it must have; empty if it makes do with whatever there is.
        taps: the blocks of the encoder, counted from 0, whose tokens it wants; empty: the last alone.
    """

    reads: tuple[str, ...] = ()
    taps: tuple[int, ...] = ()

    @abstractmethod
    def forward(self, encoded: Encoded) -> Float[Tensor, "b channels ..."]:
        """Of each class its logit, or of each pixel its logits or values [b, channels, height, width]."""


class LinearHead(Head):
    """A linear classifier of normalized tokens.

    Args:
        width: of a token.
        classes: that it tells apart.
        pooled: whether it takes the mean of all tokens, the global one included; the global one, which is the last, if not.
    """

    def __init__(self, width: int, classes: int, pooled: bool = True) -> None:
        super().__init__()
        self.pooled = pooled
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, encoded: Encoded) -> Float[Tensor, "b classes"]:
        """Logits."""
        tokens = encoded.layers[-1]
        return self.head(self.norm(tokens.mean(1) if self.pooled else tokens[:, -1]))  # type: ignore[no-any-return]


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, and a perceptron with GELU at every place, added to what they were given; channels [b, c, h, w].

    Source: arXiv 2201.03545, Figure 4. Differs: no scale of each layer.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = LayerNorm(channels)
        self.pwconv1, self.pwconv2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """As many channels."""
        mixed = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + self.pwconv2(F.gelu(self.pwconv1(mixed))).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


class ConvNeXtHead(Head):
    """Every patch becomes 4 x 4 places, at which ConvNeXt blocks tell classes.

    Args:
        width: of a token.
        classes: that it tells apart.
        reads: the modalities whose patches it takes, side by side.
        embedding: channels of a patch, a multiple of 16, which its places share.
        depth: number of blocks.

    Raises:
        ExperimentError: channels that the places cannot share.

    Source: arXiv 2204.01678, appendix on semantic segmentation.
    """

    def __init__(self, width: int, classes: int, reads: Sequence[str], embedding: int = 6144, depth: int = 4) -> None:
        super().__init__()
        if embedding % PLACES**2:
            raise ExperimentError(f"{PLACES**2} places cannot share {embedding} channels; choose learner.head_width among their multiples")
        self.reads, channels = tuple(reads), embedding // PLACES**2
        self.proj_dec = nn.Linear(width * len(self.reads), embedding)
        self.blocks = nn.Sequential(*(ConvNeXtBlock(channels) for _ in range(depth)))
        self.final_layer = nn.Conv2d(channels, classes, 1)

    def forward(self, encoded: Encoded) -> Float[Tensor, "b classes height width"]:
        """Logits of each pixel."""
        rows, columns = encoded.grid
        x = self.proj_dec(encoded.patches(self.reads)).unflatten(1, (rows, columns)).unflatten(3, (PLACES, PLACES, -1))
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # b rows columns p q c -> b c (rows p) (columns q)
        return enlarged(self.final_layer(self.blocks(x)), encoded.size)


class SegmenterHead(Head):
    """Tokens of classes join those of patches; a patch is of the classes whose tokens it comes to resemble.

    Args:
        width: of a token.
        classes: that it tells apart.
        reads: the modalities whose patches it takes, side by side.
        embedding: width of its own tokens, a multiple of ``heads``.
        depth: number of blocks.
        heads: of their attention.

    Raises:
        ExperimentError: a width that the heads cannot share.

    Source: arXiv 2105.05633, section 3.2.
    """

    def __init__(self, width: int, classes: int, reads: Sequence[str], embedding: int = 768, depth: int = 2, heads: int = 12) -> None:
        super().__init__()
        if embedding % heads:
            raise ExperimentError(f"{heads} heads cannot share a width of {embedding}; choose learner.head_width among their multiples")
        self.reads = tuple(reads)
        self.proj_dec = nn.Linear(width * len(self.reads), embedding)
        self.cls_emb = nn.Parameter(torch.zeros(1, classes, embedding))
        self.blocks = nn.Sequential(*(block(embedding, heads) for _ in range(depth)))
        self.decoder_norm = LayerNorm(embedding)
        self.patch_proj, self.classes_proj = (nn.Linear(embedding, embedding, bias=False) for _ in range(2))
        self.mask_norm = LayerNorm(classes)

    def forward(self, encoded: Encoded) -> Float[Tensor, "b classes height width"]:
        """Logits of each pixel: cosines of patches and classes, normalized over classes."""
        x = self.proj_dec(encoded.patches(self.reads))
        x = self.blocks(torch.cat([x, self.cls_emb.expand(len(x), -1, -1)], dim=1))
        n, classes = x.shape[1] - self.cls_emb.shape[1], self.cls_emb.shape[1]
        patches, shown = self.decoder_norm(x).split([n, classes], dim=1)
        patches, shown = F.normalize(self.patch_proj(patches), dim=2), F.normalize(self.classes_proj(shown), dim=2)
        logits = self.mask_norm(patches @ shown.transpose(1, 2))
        return enlarged(logits.transpose(1, 2).unflatten(2, encoded.grid), encoded.size)


def enlarged(maps: Float[Tensor, "b c _ _"], size: tuple[int, int]) -> Float[Tensor, "b c height width"]:
    """Maps interpolated bilinearly to pixels; as they are, if they have that size."""
    return maps if tuple(maps.shape[2:]) == size else F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
