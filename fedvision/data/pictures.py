"""Picture files as tensors, all of one size; read by a few threads, since decoding lets go of Python's lock."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from fedvision.errors import DataError

ENDINGS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

Fit = Literal["crop", "stretch"]
"""How a picture becomes a square: ``crop``, the largest one in its middle; ``stretch``, all of it."""

T = TypeVar("T")

_READERS = min(16, 2 * (os.cpu_count() or 1))


def existing(folder: Path, remedy: str) -> Path:
    """The folder itself.

    Raises:
        DataError: there is none.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; {remedy}")
    return folder


def pictures_below(folder: Path) -> list[Path]:
    """The picture files in a folder and in the folders in it, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())


def read_images(files: Sequence[Path], size: int, fit: Fit = "crop", smooth: Image.Resampling | None = None) -> Tensor:
    """Pictures in color, uint8 [n, 3, size, size].

    Args:
        files: their paths.
        size: of the squares in pixels.
        fit: what of each.
        smooth: how they are resized; bilinearly where they are cropped and bicubically where they are stretched, if not given.

    Raises:
        DataError: a file that is no picture.
    """
    usual = Image.Resampling.BICUBIC if fit == "stretch" else Image.Resampling.BILINEAR

    def one(number: int, picture: Image.Image) -> np.ndarray:
        return fitted(picture.convert("RGB"), size, smooth or usual, fit)

    return filled(files, one, (size, size, 3), np.uint8).permute(0, 3, 1, 2)


def read_maps(files: Sequence[Path], size: int) -> Tensor:
    """Maps with one whole number a pixel (of 8 or 16 bits, or with a palette), int32 [n, size, size]; as images, but never interpolated.

    Raises:
        DataError: a file that is no picture, or one in color.
    """
    return filled(files, lambda _, picture: fitted(numbers(picture), size, Image.Resampling.NEAREST), (size, size), np.int32)


GRAY_16 = ("I;16", "I;16L", "I;16B")
"""Pillow's modes of 16 bits of gray."""


@dataclass(frozen=True)
class Values:
    """What the pictures of a folder hold a pixel.

    Attributes:
        name: in words.
        channels: how many numbers.
        largest: what a picture has where the value is 1.
    """

    name: str
    channels: int
    largest: int


def values_of(files: Sequence[Path]) -> Values:
    """What pictures hold that are read as values; the same in all of them.

    Raises:
        DataError: pictures of several kinds, or one that is neither in gray (8 or 16 bits) nor in color; no pictures.
    """
    gray, deep, color = Values("8 bits of gray", 1, 255), Values("16 bits of gray", 1, 65535), Values("color", 3, 255)
    kinds = {"L": gray, "RGB": color, **dict.fromkeys(GRAY_16, deep)}
    modes = _of_each(files, lambda picture: picture.mode)
    for file, mode in zip(files, modes, strict=True):
        if mode not in kinds:
            raise DataError(f"{file} has the mode {mode}, where gray (8 or 16 bits) or color (RGB) is expected; save it as such a PNG")
        if kinds[mode] != kinds[modes[0]]:
            fact = f"{file} is in {kinds[mode].name}, {files[0]} in {kinds[modes[0]].name}"
            raise DataError(f"{fact}; save all pictures of a folder alike")
    return kinds[modes[0]]


def read_values(files: Sequence[Path], size: int, kind: Values) -> Float[Tensor, "n channels size size"]:
    """Pictures of one kind as values, float32 in [0, 1], of its largest; resized as images are.

    Raises:
        DataError: a file that is no picture.
    """

    def one(number: int, picture: Image.Image) -> np.ndarray:
        bands = [np.asarray(band, dtype=np.float32) / kind.largest for band in picture.split()]
        return np.stack([fitted(Image.fromarray(band), size, Image.Resampling.BILINEAR) for band in bands])

    return filled(files, one, (kind.channels, size, size), np.float32).clamp_(0, 1)


def numbers(picture: Image.Image) -> Image.Image:
    """A picture with one whole number a pixel, of 32 bits.

    Raises:
        ValueError: it has colors.
    """
    if picture.mode not in ("1", "L", "P", "I", *GRAY_16):
        raise ValueError(
            f"it has the mode {picture.mode}, where one whole number a pixel is expected; save it as a PNG with 8 or 16 bits of gray"
        )
    return Image.fromarray(np.asarray(picture).astype(np.int32))


def fitted(picture: Image.Image, size: int, resampling: Image.Resampling, fit: Fit = "crop") -> np.ndarray:
    """A picture as a square of so many pixels a side."""
    if picture.size == (size, size):
        return np.asarray(picture)
    if fit == "stretch":
        return np.asarray(picture.resize((size, size), resampling))
    return np.asarray(ImageOps.fit(picture, (size, size), method=resampling))


def filled(files: Sequence[Path], what: Callable[[int, Image.Image], np.ndarray], shape: tuple[int, ...], dtype: Any) -> Tensor:
    """What is made of each picture, in order, without holding it twice.

    Args:
        files: of the pictures.
        what: is made of a picture and its number, of this shape.
        shape: of each.
        dtype: of all.

    Raises:
        DataError: a file that is no picture.
    """
    values = np.empty((len(files), *shape), dtype)

    def fill(number: int) -> None:
        values[number] = _opened(files[number], partial(what, number))

    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(fill, range(len(files))))
    return torch.from_numpy(values)


def sizes(files: Sequence[Path]) -> list[tuple[int, int]]:
    """Width and height of each picture, from the beginning of its file."""
    return _of_each(files, lambda picture: picture.size)


def _of_each(files: Sequence[Path], what: Callable[[Image.Image], T]) -> list[T]:
    """``what`` of each picture, in order."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda file: _opened(file, what), files))


def _opened(file: Path, what: Callable[[Image.Image], T]) -> T:
    try:
        with Image.open(file) as picture:
            return what(picture)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{file} cannot be read: {error}; mend or remove it") from error
