"""Galleries: pictures and words in rows and columns, by which a learner shows what its model does."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedvision.errors import DataError

Picture = np.ndarray
"""In color, uint8 [height, width, 3]."""

TAKEN = ("curves", "partition", "examples")
"""What the pictures are called that every run has; galleries have other names."""


@dataclass(frozen=True)
class Gallery:
    """Pictures in rows and columns; they need not be of one size.

    Attributes:
        rows: a title for each row.
        columns: a title for each column.
        pictures: one a column in each row, uint8 [height, width, 3]; None leaves the place empty.
        caption: a sentence or two on what is to be seen.
        notes: words that stand under each picture, or in its place where it is None; empty where there are none. Line breaks stay,
            longer lines are wrapped. No notes at all if not given.

    Example:
        >>> black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
        >>> Gallery(["test 0"], ["input", "prediction"], [[black, white]], "Night becomes day.").caption
        'Night becomes day.'
    """

    rows: Sequence[str]
    columns: Sequence[str]
    pictures: Sequence[Sequence[Picture | None]]
    caption: str = ""
    notes: Sequence[Sequence[str]] = ()

    def __post_init__(self) -> None:
        self._check_places("pictures", self.pictures, "None")
        if self.notes:
            self._check_places("notes", self.notes, "an empty one")
        for title, row in zip(self.rows, self.pictures, strict=True):
            for column, picture in zip(self.columns, row, strict=True):
                _check(picture, f"{title!r}, {column!r}")

    def _check_places(self, what: str, held: Sequence[Sequence[object]], none: str) -> None:
        widths = [len(row) for row in held]
        if not self.rows or not self.columns or widths != [len(self.columns)] * len(self.rows):
            fact = f"a gallery of {len(self.rows)} rows and {len(self.columns)} columns has rows of {widths} {what}"
            raise DataError(f"{fact}; give one a column in each row, at least one of each, {none} where there is none")


def painted(image: Float[Tensor, "c h w"]) -> Picture:
    """An image in [0, 1] in color; of other than three channels, the mean in gray."""
    colors = image if len(image) == 3 else image.mean(0, keepdim=True).expand(3, -1, -1)
    return (255 * colors.clamp(0, 1)).round().permute(1, 2, 0).to(torch.uint8).cpu().numpy()


SIDE = 144
"""Small pictures of a gallery are enlarged to about so many pixels."""


def enlarged(picture: Picture) -> Picture:
    """A picture as large as galleries show it: a small one enlarged by a whole factor, so that its pixels stay crisp.

    >>> enlarged(np.zeros((32, 48, 3), np.uint8)).shape
    (96, 144, 3)
    """
    factor = enlargement(picture)
    return picture.repeat(factor, 0).repeat(factor, 1)


def enlargement(picture: Picture) -> int:
    """The factor of ``enlarged``; 1 for pictures that are large enough.

    >>> enlargement(np.zeros((32, 48, 3), np.uint8))
    3
    """
    return max(SIDE // int(max(picture.shape[:2])), 1)


def _check(picture: Picture | None, place: str) -> None:
    if picture is None:
        return
    kind = f"{picture.dtype} {list(picture.shape)}" if isinstance(picture, np.ndarray) else type(picture).__name__
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise DataError(f"the picture at {place} of a gallery is {kind}, expected uint8 [height, width, 3]; convert it")
