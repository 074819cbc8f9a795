"""Positions of patches: fixed sines and cosines in two dimensions, and their interpolation to other grids."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fedvision.errors import ExperimentError


def sincos(rows: int, columns: int, width: int) -> Float[Tensor, "1 width rows columns"]:
    """sin(a w_k), cos(a w_k), sin(b w_k), cos(b w_k) of each place, with w_k = 10000^(-k / (width / 4)); a its row, b its column.

    Args:
        rows: of the grid.
        columns: of the grid. Where it is not square, a and b are those of the transposed grid, counted along its rows, which is
            what published checkpoints have; make a square one, and ``resized`` it.
        width: a multiple of 4.

    Raises:
        ExperimentError: another width.

    Source: arXiv 2204.01678, section 3.1; the order of channels and places is that of its public checkpoints.
    """
    if width % 4:
        raise ExperimentError(f"a width of {width} has no sine-cosine positions; choose a multiple of 4")
    a, b = torch.meshgrid(torch.arange(columns, dtype=torch.float64), torch.arange(rows, dtype=torch.float64), indexing="ij")
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    waves = [wave(place.reshape(-1) * frequencies[:, None]) for place in (a, b) for wave in (torch.sin, torch.cos)]
    return torch.cat(waves).reshape(1, width, rows, columns).float()


def resized(positions: Float[Tensor, "1 width _ _"], grid: tuple[int, int], mode: str) -> Float[Tensor, "1 width rows columns"]:
    """Positions interpolated to another grid; as they are, if it is the same.

    Args:
        positions: of one grid.
        grid: rows and columns of the other.
        mode: ``bicubic`` or ``bilinear``.
    """
    if tuple(positions.shape[2:]) == grid:
        return positions
    return F.interpolate(positions, size=grid, mode=mode, align_corners=False)


def by_place(positions: Float[Tensor, "1 width rows columns"]) -> Float[Tensor, "1 places width"]:
    """Positions of one place after the other, row by row."""
    return positions.flatten(2).transpose(1, 2)
