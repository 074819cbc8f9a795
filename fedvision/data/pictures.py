"""Picture files as tensors, all of one size; read by a few threads, since decoding lets go of Python's lock."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fedvision.errors import DataError

ENDINGS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

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


def read_images(files: Sequence[Path], size: int) -> Tensor:
    """Pictures in color, uint8 [n, 3, size, size]: the largest square in the middle of each, resized bilinearly.

    Raises:
        DataError: a file that is no picture.
    """
    return _read(files, lambda picture: _fitted(picture.convert("RGB"), size, Image.Resampling.BILINEAR), (size, size, 3)).permute(
        0, 3, 1, 2
    )


def read_maps(files: Sequence[Path], size: int) -> Tensor:
    """Maps with one whole number a pixel (of 8 or 16 bits, or with a palette), int32 [n, size, size]; as images, but never interpolated.

    Raises:
        DataError: a file that is no picture, or one in color.
    """
    return _read(files, lambda picture: _fitted(_numbers(picture), size, Image.Resampling.NEAREST), (size, size))


def _numbers(picture: Image.Image) -> Image.Image:
    if picture.mode not in ("1", "L", "P", "I", "I;16", "I;16L", "I;16B"):
        raise ValueError(
            f"it has the mode {picture.mode}, where one whole number a pixel is expected; save it as a PNG with 8 or 16 bits of gray"
        )
    return Image.fromarray(np.asarray(picture).astype(np.int32))


def _fitted(picture: Image.Image, size: int, resampling: Image.Resampling) -> np.ndarray:
    if picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), method=resampling)
    return np.asarray(picture)


def _read(files: Sequence[Path], convert: Callable[[Image.Image], np.ndarray], shape: tuple[int, ...]) -> Tensor:
    """What ``convert`` makes of each picture, in order."""

    def one(file: Path) -> np.ndarray:
        try:
            with Image.open(file) as picture:
                return convert(picture)
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{file} cannot be read: {error}; mend or remove it") from error

    with ThreadPoolExecutor(_READERS) as pool:
        read = list(pool.map(one, files))
    return torch.from_numpy(np.stack(read)) if read else torch.empty(0, *shape)


def sizes(files: Sequence[Path]) -> list[tuple[int, int]]:
    """Width and height of each picture, from the beginning of its file."""

    def one(file: Path) -> tuple[int, int]:
        try:
            with Image.open(file) as picture:
                return picture.size
        except (OSError, SyntaxError) as error:
            raise DataError(f"{file} cannot be read: {error}; mend or remove it") from error

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(one, files))
