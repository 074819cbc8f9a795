"""What networks have in common that go by timm's vision transformer: their size, its blocks, a square of positions."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedvision.errors import ExperimentError
from fedvision.seeds import global_generators


@dataclass(frozen=True)
class VisionSize:
    """The size of a vision transformer.

    Attributes:
        side: pixels of the square pictures whose patches have a position each, a multiple of ``patch``.
        patch: pixels a side.
        channels: of the pictures.
        width: of a token's vector, a multiple of ``heads``.
        depth: number of blocks.
        heads: of their attention.
    """

    side: int = 224
    patch: int = 16
    channels: int = 3
    width: int = 768
    depth: int = 12
    heads: int = 12

    def __post_init__(self) -> None:
        if self.side % self.patch:
            raise ExperimentError(f"learner.patch = {self.patch} does not divide pictures of {self.side} pixels; choose one that does")
        if self.width % self.heads:
            raise ExperimentError(f"a vision transformer of width {self.width} cannot have {self.heads} heads; choose a divisor")

    @property
    def grid(self) -> int:
        """Rows and columns of patches."""
        return self.side // self.patch


def vision_transformer(size: VisionSize, rng: torch.Generator, drop_path: float = 0.0) -> Any:
    """timm's, whose output is all of its tokens after the last normalization, with weights as timm draws them.

    Args:
        size: of everything.
        rng: draws the weights.
        drop_path: probability that a picture skips the last block's branches; it rises linearly from 0 at the first block's.
    """
    from timm.models.vision_transformer import VisionTransformer

    with global_generators(rng):
        return VisionTransformer(
            img_size=size.side,
            patch_size=size.patch,
            in_chans=size.channels,
            num_classes=0,
            global_pool="",
            embed_dim=size.width,
            depth=size.depth,
            num_heads=size.heads,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            drop_path_rate=drop_path,
        )


def positions_side(positions: Float[Tensor, "1 tokens width"]) -> int:
    """Rows and columns of the square of patches that positions are of, beside that of a class token.

    Raises:
        ExperimentError: positions of no class token and square.

    >>> positions_side(torch.zeros(1, 1 + 14 * 14, 8))
    14
    """
    side = math.isqrt(positions.shape[1] - 1)
    if side**2 != positions.shape[1] - 1:
        raise ExperimentError(f"{positions.shape[1]} positions are not those of a class token and a square of patches; give such ones")
    return side
