"""Views of images: the weak one of consistency training, a whole batch at once."""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

SHIFT = 0.125
"""How far the weak view moves an image at most, as a fraction of its side."""


def signed(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Images in [0, 1] as images in [-1, 1]."""
    return images * 2 - 1


def weak(images: Shaped[Tensor, "n c h w"], rng: torch.Generator, flip: bool = True, shift: float = SHIFT) -> Shaped[Tensor, "n c h w"]:
    """Each image mirrored with probability 1/2 and moved by its own random number of pixels; reflected where it leaves a gap.

    Args:
        images: of any values; not changed.
        rng: for the draws, on the CPU; every image takes three of them, whatever ``flip`` and ``shift`` are.
        flip: whether left and right may change places.
        shift: the farthest an image moves, as a fraction of each side: 4 pixels of 32 and 12 of 96.

    Source: arXiv 2205.05575: flip and translation; reflection as in its public implementation.
    """
    n, channels, height, width = images.shape
    flips = (torch.rand(n, generator=rng) < 0.5) & flip
    down, right = _shifts(n, int(shift * height), rng), _shifts(n, int(shift * width), rng)
    rows = reflected(torch.arange(height) + down[:, None], height)
    columns = reflected(torch.arange(width) + right[:, None], width)
    columns = torch.where(flips[:, None], width - 1 - columns, columns)
    pixels = (rows[:, :, None] * width + columns[:, None, :]).flatten(1).to(images.device)
    return images.flatten(2).gather(2, pixels[:, None].expand(-1, channels, -1)).view_as(images)


def reflected(index: Int[Tensor, "*n side"], side: int) -> Int[Tensor, "*n side"]:
    """Positions outside 0, ..., side - 1 mirrored at the first or last one, which is not repeated.

    >>> reflected(torch.arange(-2, 7), 5).tolist()
    [2, 1, 0, 1, 2, 3, 4, 3, 2]
    """
    return (side - 1) - ((side - 1) - index.abs()).abs()


def _shifts(n: int, most: int, rng: torch.Generator) -> Int[Tensor, "n"]:
    """Whole numbers of pixels in [-most, most]."""
    return torch.randint(-most, most + 1, (n,), generator=rng)
