"""The vision transformer that ALBEF's pictures go through: timm's, with all of its tokens."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedvision.errors import ExperimentError
from fedvision.multimae.positions import by_place, resized
from fedvision.seeds import global_generators


@dataclass(frozen=True)
class VisionSize:
    """The size of a vision transformer; the defaults are those of ALBEF's pre-training.

    Attributes:
        side: of the pictures in pixels, a multiple of ``patch``.
        patch: pixels a side.
        channels: of the pictures.
        width: of a token's vector, a multiple of ``heads``.
        depth: number of blocks.
        heads: of their attention.
    """

    side: int = 256
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


def image_encoder(size: VisionSize, rng: torch.Generator, xavier: bool = False) -> nn.Module:
    """A vision transformer: pictures [b, channels, side, side] -> tokens [b, 1 + patches, width], that of the class first.

    Args:
        size: of everything.
        rng: draws the weights.
        xavier: whether linear layers begin uniform by Xavier's rule, better for narrow networks, or normal with deviation 0.02.
    """
    from timm.models.vision_transformer import VisionTransformer

    with global_generators(rng):
        model = VisionTransformer(
            img_size=size.side,
            patch_size=size.patch,
            in_chans=size.channels,
            num_classes=0,
            global_pool="",
            embed_dim=size.width,
            depth=size.depth,
            num_heads=size.heads,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
    nn.init.trunc_normal_(model.pos_embed, std=0.02, generator=rng)  # type: ignore[arg-type]
    nn.init.trunc_normal_(model.cls_token, std=0.02, generator=rng)  # type: ignore[arg-type]
    for module in model.modules():
        if xavier and isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=rng)
    return model


def resized_positions(positions: Float[Tensor, "1 rows width"], grid: int) -> Float[Tensor, "1 other width"]:
    """Positions of a class token and of a square of patches, the latter interpolated bicubically to another square.

    Args:
        positions: of one square.
        grid: rows and columns of the other; positions of the same are returned as they are.

    Raises:
        ExperimentError: positions of no class token and square.
    """
    side = math.isqrt(positions.shape[1] - 1)
    if side**2 != positions.shape[1] - 1:
        raise ExperimentError(f"{positions.shape[1]} positions are not those of a class token and a square of patches; give such ones")
    if side == grid:
        return positions
    square = positions[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    return torch.cat([positions[:, :1], by_place(resized(square, (grid, grid), "bicubic"))], 1)
