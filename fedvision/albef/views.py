"""Views of ALBEF's pictures: a random crop, mirrored, two operations of RandAugment, normalized; and the one of tests.

Operations are drawn for each picture, and are done to all pictures that have drawn the same one at once.

Source: Align before Fuse, arXiv 2107.07651, section 3.5; RandAugment, arXiv 1909.13719, with the operations and magnitudes of
ALBEF's public implementation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from fedvision.normalization import Normalization
from fedvision.views import crop_boxes, mirrored, resized

CLIP = Normalization((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Of red, green and blue."""

RATIO = (3 / 4, 4 / 3)
"""A crop's width over its height, least and most."""


def image_normalization(channels: int) -> Normalization:
    """CLIP's; of other than three channels each gets the average."""
    return CLIP.of_channels(channels)


@dataclass(frozen=True)
class Views:
    """How pictures are seen: in training moved at random, each by itself; in tests resized to a square.

    Attributes:
        resolution: pixels a side of the square; if None, pictures stay as large as they are.
        crop_scale: area of a crop, least and most, as a fraction of the picture's; (1, 1): none.
        flip: probability that left and right change places.
        randaugment: whether operations of RandAugment follow.
    """

    resolution: int | None = None
    crop_scale: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    randaugment: bool = False

    def __call__(self, images: Float[Tensor, "n c h w"], rng: torch.Generator | None = None) -> Float[Tensor, "n c height width"]:
        """Pictures as the network sees them.

        Args:
            images: in [0, 1]; not changed.
            rng: for the draws, on the CPU; None: the view of tests.
        """
        height, width = images.shape[-2:]
        size = (self.resolution or height, self.resolution or width)
        boxes = crop_boxes(images, self.crop_scale, RATIO, rng) if rng is not None and self.crop_scale != (1.0, 1.0) else None
        seen = resized(images, size, boxes)
        if seen is not images:
            seen = seen.clamp_(0.0, 1.0)  # cubic interpolation leaves the range
        if rng is not None and self.flip:
            seen = mirrored(seen, torch.rand(len(seen), generator=rng) < self.flip)
        if rng is not None and self.randaugment:
            seen = augmented((seen * 255).round_().to(torch.uint8), drawn_operations(len(seen), rng)).to(images.dtype) / 255
        return image_normalization(images.shape[1])(seen)


# ---- RandAugment ----------------------------------------------------------------------------------------------------

OPERATIONS = 2
"""A picture."""

FACTOR = 1.36
"""Of brightness and sharpness; 1 changes nothing."""

SHEAR, SHIFT, ANGLE = 0.21, 7, 21
"""Of a shear in pixels a pixel, of a translation in pixels, of a rotation in degrees; either way."""

GRAY = 128
"""What comes in where a picture is moved."""

NAMES = (
    "identity", "autocontrast", "equalize", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y", "rotate",
)  # fmt: skip
"""Of the operations, in the order of their indices."""


class Operations(NamedTuple):
    """What is done to each of n pictures, one operation after the other.

    Attributes:
        kinds: indices into ``NAMES``.
        signs: 1 or -1: which way a picture is moved.
    """

    kinds: Int[Tensor, "n steps"]
    signs: Float[Tensor, "n steps"]


def drawn_operations(n: int, rng: torch.Generator, steps: int = OPERATIONS) -> Operations:
    """Operations, all as likely; each is left out with probability 1/2, and goes either way with the same probability."""
    kinds = torch.randint(len(NAMES), (n, steps), generator=rng)
    done, signs = torch.randint(2, (2, n, steps), generator=rng)
    return Operations(kinds * done, signs * 2.0 - 1.0)


def augmented(pictures: UInt8[Tensor, "n c h w"], operations: Operations) -> UInt8[Tensor, "n c h w"]:
    """Pictures after their operations; those given are not changed."""
    for kinds, signs in zip(operations.kinds.unbind(1), operations.signs.unbind(1), strict=True):
        changed = pictures.clone()
        for kind, operation in _colors().items():
            chosen = (kinds == NAMES.index(kind)).nonzero()[:, 0].to(pictures.device)
            if len(chosen):
                changed[chosen] = operation(pictures[chosen].flatten(0, 1)[:, None]).view_as(changed[chosen])
        moved = (kinds >= NAMES.index("shear_x")).nonzero()[:, 0]
        if len(moved):
            at, pairs = moved.to(pictures.device), zip(kinds[moved].tolist(), signs[moved].tolist(), strict=True)
            matrices = torch.tensor([_source(NAMES[kind], sign, *pictures.shape[-2:]) for kind, sign in pairs])
            changed[at] = warped(pictures[at], matrices.to(pictures.device))
        pictures = changed
    return pictures


def _colors() -> dict[str, Callable[[Tensor], Tensor]]:
    """Operations that leave pixels where they are, of gray pictures [n, 1, h, w]; they treat all channels alike."""
    from torchvision.transforms.v2 import functional

    return {
        "autocontrast": functional.autocontrast,
        "equalize": functional.equalize,
        "brightness": lambda pictures: functional.adjust_brightness(pictures, FACTOR),
        "sharpness": lambda pictures: functional.adjust_sharpness(pictures, FACTOR),
    }


def _source(move: str, sign: float, height: int, width: int) -> list[list[float]]:
    """Where the pixel in column x and row y comes from, as a matrix that (x, y, 1) is multiplied with.

    Shears leave the first row, or column, where it is; rotations the center.
    """
    if move == "rotate":
        cosine, sine = math.cos(math.radians(sign * ANGLE)), math.sin(math.radians(sign * ANGLE))
        x, y = (width - 1) / 2, (height - 1) / 2
        return [[cosine, -sine, x - cosine * x + sine * y], [sine, cosine, y - sine * x - cosine * y]]
    return {
        "shear_x": [[1.0, sign * SHEAR, 0.0], [0.0, 1.0, 0.0]],
        "shear_y": [[1.0, 0.0, 0.0], [sign * SHEAR, 1.0, 0.0]],
        "translate_x": [[1.0, 0.0, sign * SHIFT], [0.0, 1.0, 0.0]],
        "translate_y": [[1.0, 0.0, 0.0], [0.0, 1.0, sign * SHIFT]],
    }[move]


def warped(pictures: UInt8[Tensor, "n c h w"], matrices: Float[Tensor, "n 2 3"]) -> UInt8[Tensor, "n c h w"]:
    """Pictures whose pixels come, bilinearly, from where matrices say; gray from outside.

    Args:
        pictures: of any values.
        matrices: one a picture; times (column, row, 1) of a pixel it is the column and row that it comes from.
    """
    height, width = pictures.shape[-2:]
    rows, columns = torch.meshgrid(*(torch.arange(float(side), device=pictures.device) for side in (height, width)), indexing="ij")
    places = torch.stack([columns, rows, torch.ones_like(rows)], dim=-1)
    sources = torch.einsum("h w i, n o i -> n h w o", places, matrices)
    grid = (2 * sources + 1) / sources.new_tensor([width, height]) - 1  # of which -1 and 1 are the picture's edges
    found = F.grid_sample(pictures.float() - GRAY, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (found + GRAY).round_().clamp_(0, 255).to(torch.uint8)
