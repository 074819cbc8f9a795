"""Photographs with a class for every pixel: their files checked and read, one byte a pixel."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from fedvision.data.examples import IGNORED, IMAGE, LABEL, LABELS, SEMSEG, Examples
from fedvision.data.pictures import Fit, filled, fitted, numbers, read_images, sizes
from fedvision.errors import DataError


def check_pairs(pictures: Sequence[Path], maps: Sequence[Path], remedy: str) -> None:
    """Nothing, if all files are there and each map is as large as its picture.

    Args:
        pictures: their files.
        maps: the same in number.
        remedy: where missing files belong, for messages.

    Raises:
        DataError: otherwise.
    """
    for kind, files in (("picture", pictures), ("map", maps)):
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise DataError(f"{len(missing)} of {len(files)} {kind}s are missing, such as {missing[0]}; {remedy}")
    for picture, seen, ids, size in zip(pictures, sizes(pictures), maps, sizes(maps), strict=True):
        if seen != size:
            raise DataError(f"{ids} is {size[0]}x{size[1]}, its picture {picture} is {seen[0]}x{seen[1]}; make them the same size")


def read_ids(files: Sequence[Path], size: int, fit: Fit, classes: int, remedy: str) -> UInt8[Tensor, "n size size"]:
    """Maps whose numbers are the classes, 0 to ``classes`` - 1, or 255; never interpolated.

    Args:
        files: of gray pictures, or such with a palette.
        size: of the squares in pixels.
        fit: what of each.
        classes: their number, at most 255.
        remedy: what to do about another number, for messages.

    Raises:
        DataError: a file that is no such map, or that has another number anywhere.
    """

    def one(number: int, picture: Image.Image) -> np.ndarray:
        whole = numbers(picture)
        found = np.unique(np.asarray(whole))
        wrong = found[((found < 0) | (found >= classes)) & (found != IGNORED)]
        if len(wrong):
            raise DataError(f"{files[number]} has the id {wrong[0]}, beyond 0..{classes - 1} and {IGNORED}; {remedy}")
        return fitted(whole, size, Image.Resampling.NEAREST, fit)

    return filled(files, one, (size, size), np.uint8)


def with_maps(pictures: Sequence[Path], semseg: UInt8[Tensor, "n size size"], fit: Fit, first: int, classes: int) -> Examples:
    """Examples of photographs and their maps: ``image``, ``semseg``, ``labels`` and ``label``, which is -1.

    Args:
        pictures: their files, resized bilinearly.
        semseg: their maps.
        fit: what of each.
        first: the id of the first class that ``labels`` speak of.
        classes: how many these are.
    """
    images = read_images(pictures, semseg.shape[-1], fit, Image.Resampling.BILINEAR)
    labels, unlabeled = seen(semseg, first, classes), torch.full((len(pictures),), -1)
    return Examples({IMAGE: images, SEMSEG: semseg, LABELS: labels, LABEL: unlabeled})


def seen(semseg: UInt8[Tensor, "n h w"], first: int, classes: int) -> UInt8[Tensor, "n classes"]:
    """Which classes some pixel of each map has, counted from the id ``first``.

    >>> seen(torch.tensor([[[0, 2], [255, 2]]], dtype=torch.uint8), 1, 3).tolist()
    [[0, 1, 0]]
    """
    there = torch.zeros(len(semseg), IGNORED + 1, dtype=torch.uint8)
    for ids, row in zip(semseg, there, strict=True):
        row[ids.flatten().long()] = 1
    return there[:, first : first + classes].contiguous()
