"""The vision transformer of DINO, which Leopart begins with: timm's blocks, for pictures of any size, and where its class token looks."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fedvision import transformers
from fedvision.errors import ExperimentError


@dataclass(frozen=True)
class VisionSize(transformers.VisionSize):
    """The size of a vision transformer; the defaults are those of DINO's small one."""

    width: int = 384
    heads: int = 6


class Observed(NamedTuple):
    """What a vision transformer says of pictures.

    Attributes:
        tokens: after the last normalization, that of the class first.
        attention: of the class token to each patch, in each head of the last block; what it gives to itself is left out, so that
            the sum is below 1.
    """

    tokens: Float[Tensor, "b tokens width"]
    attention: Float[Tensor, "b heads patches"]


class VisionTransformer(nn.Module):
    """DINO's: a class token and patches, learned positions, blocks that normalize first, a last normalization.

    Its arrays are called as those of timm's ``vit_small_patch16_224`` are.

    Args:
        size: of everything.
        rng: draws the weights: normal with deviation 0.02, cut off at -2 and 2; biases are 0.
        drop_path: probability that a picture skips the last block's branches; it rises linearly from 0 at the first block's.

    Source: DINO, arXiv 2104.14294, of whose small network ``VisionSize`` has the defaults.
    """

    cls_token: nn.Parameter
    pos_embed: nn.Parameter
    patch_embed: Any
    blocks: Any
    norm: Any

    def __init__(self, size: VisionSize, rng: torch.Generator, drop_path: float = 0.0) -> None:
        super().__init__()
        built = transformers.vision_transformer(size, rng, drop_path)
        self.cls_token, self.pos_embed = built.cls_token, built.pos_embed
        self.patch_embed, self.blocks, self.norm = built.patch_embed, built.blocks, built.norm
        for positions in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(positions, std=0.02, generator=rng)
        initialized(self, rng)

    @property
    def patch(self) -> int:
        """Pixels a side of a patch."""
        return self.patch_embed.proj.kernel_size[0]  # type: ignore[no-any-return]

    def grid(self, images: Float[Tensor, "b c h w"]) -> tuple[int, int]:
        """Rows and columns of the patches of pictures.

        Raises:
            ExperimentError: patches do not divide them.
        """
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch:
            fact = f"patches of {self.patch} pixels do not divide pictures of {height} x {width}"
            raise ExperimentError(f"{fact}; choose learner.global_size, local_size and resolution as multiples of learner.patch")
        return height // self.patch, width // self.patch

    def embedded(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b tokens width"]:
        """What the first block is given."""
        positions = scaled_positions(self.pos_embed, *self.grid(images))
        patches = self.patch_embed.proj(images).flatten(2).mT
        return torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + positions

    def tokens(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b tokens width"]:
        """What the last normalization gives, the class token first."""
        return self.norm(self.blocks(self.embedded(images)))  # type: ignore[no-any-return]

    def observed(self, images: Float[Tensor, "b c h w"]) -> Observed:
        """The same, and where the class token looks in the last block."""
        before = self.blocks[:-1](self.embedded(images))
        return Observed(self.norm(self.blocks[-1](before)), class_attention(self.blocks[-1], before))


def initialized(model: nn.Module, rng: torch.Generator) -> None:
    """Draw the weights of linear and convolutional layers, normal with deviation 0.02, and set their biases to 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.02, generator=rng)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def class_attention(block: Any, tokens: Float[Tensor, "b tokens width"]) -> Float[Tensor, "b heads patches"]:
    """How much the class token looks at each patch in each head of a block, given what goes into it.

    softmax(q_0 K^T / sqrt(d)) without its first column; it is not made to sum to 1 again.
    """
    queries, keys, _ = block.attn.qkv(block.norm1(tokens)).unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    looks = (queries[:, :, :1] * block.attn.scale) @ keys.mT
    return looks.softmax(-1)[:, :, 0, 1:]  # type: ignore[no-any-return]


def scaled_positions(positions: Float[Tensor, "1 tokens width"], rows: int, columns: int) -> Float[Tensor, "1 others width"]:
    """Positions of a class token and of a square of patches, the latter interpolated bicubically to another grid.

    Args:
        positions: of a square; of the same they are returned as they are.
        rows: of the other grid.
        columns: of the other grid.

    Raises:
        ExperimentError: positions of no class token and square.

    Source: DINO, arXiv 2104.14294, whose implementation scales by (rows + 0.1) / side, and samples where this factor says, not
        where the sides of the grids would; networks that were trained so need it so.
    """
    side = transformers.positions_side(positions)
    if rows == columns == side:
        return positions
    square = positions[:, 1:].mT.unflatten(2, (side, side))
    scale = ((rows + 0.1) / side, (columns + 0.1) / side)
    scaled = F.interpolate(square, scale_factor=scale, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], scaled.flatten(2).mT], dim=1)
