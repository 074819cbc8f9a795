"""The vision transformer that ALBEF's pictures go through: timm's, with all of its tokens."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedvision import transformers
from fedvision.multimae.positions import by_place, resized


@dataclass(frozen=True)
class VisionSize(transformers.VisionSize):
    """The size of a vision transformer; the defaults are those of ALBEF's pre-training."""

    side: int = 256


def image_encoder(size: VisionSize, rng: torch.Generator, xavier: bool = False) -> nn.Module:
    """A vision transformer: pictures [b, channels, side, side] -> tokens [b, 1 + patches, width], that of the class first.

    Args:
        size: of everything.
        rng: draws the weights.
        xavier: whether linear layers begin uniform by Xavier's rule, better for narrow networks, or normal with deviation 0.02.
    """
    model = transformers.vision_transformer(size, rng)
    nn.init.trunc_normal_(model.pos_embed, std=0.02, generator=rng)
    nn.init.trunc_normal_(model.cls_token, std=0.02, generator=rng)
    for module in model.modules():
        if xavier and isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=rng)
    return model  # type: ignore[no-any-return]


def resized_positions(positions: Float[Tensor, "1 rows width"], grid: int) -> Float[Tensor, "1 other width"]:
    """Positions of a class token and of a square of patches, the latter interpolated bicubically to another square.

    Args:
        positions: of one square.
        grid: rows and columns of the other; positions of the same are returned as they are.

    Raises:
        ExperimentError: positions of no class token and square.
    """
    side = transformers.positions_side(positions)
    if side == grid:
        return positions
    square = positions[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    return torch.cat([positions[:, :1], by_place(resized(square, (grid, grid), "bicubic"))], 1)
