"""Views of images: the weak one of consistency training, a whole batch at once; crops that are resized."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Num, Shaped
from torch import Tensor

from fedvision.seeds import global_generators

SHIFT = 0.125
"""How far the weak view moves an image at most, as a fraction of its side."""

Box = tuple[int, int, int, int]
"""Top, left, height and width of a crop."""


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


def crop_boxes(images: Shaped[Tensor, "n ..."], scale: tuple[float, float], ratio: tuple[float, float], rng: torch.Generator) -> list[Box]:
    """A crop of each image, drawn as torchvision's ``RandomResizedCrop`` draws it.

    Args:
        images: whose last axes are height and width.
        scale: area of a crop, least and most, as a fraction of the image's.
        ratio: its width over its height, least and most.
        rng: for the draws.
    """
    from torchvision.transforms import RandomResizedCrop

    with global_generators(rng):
        return [RandomResizedCrop.get_params(one[None], list(scale), list(ratio)) for one in images]  # type: ignore[arg-type]


def resized(
    images: Num[Tensor, "n c h w"], size: tuple[int, int], boxes: Sequence[Box] | None = None, smooth: bool = True, cubic: bool = True
) -> Num[Tensor, "n c height width"]:
    """Images, or a crop of each, at another size; they themselves, if nothing is to be done.

    Args:
        images: of any values.
        size: height and width afterwards.
        boxes: a crop of each.
        smooth: between values, with what is made smaller smoothed before; or to the nearest value, as classes need it.
        cubic: smooth ones bicubically, or bilinearly.
    """
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as geometry

    if boxes is None and size == tuple(images.shape[-2:]):
        return images
    between = InterpolationMode.BICUBIC if cubic else InterpolationMode.BILINEAR
    mode = between if smooth else InterpolationMode.NEAREST_EXACT
    if boxes is None:
        return geometry.resize(images, list(size), mode, antialias=True)  # type: ignore[no-any-return]
    pairs = zip(images, boxes, strict=True)
    return torch.stack([geometry.resized_crop(one, *box, list(size), mode, antialias=True) for one, box in pairs])


def mirrored(images: Shaped[Tensor, "n ..."], chosen: Bool[Tensor, "n"]) -> Shaped[Tensor, "n ..."]:
    """Images with left and right in each other's place where they are chosen."""
    return torch.where(along(chosen.to(images.device), images), images.flip(-1), images)


def along(vector: Shaped[Tensor, "n"], like: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "n ..."]:
    """One value an example, with as many axes as ``like`` has, so that they go together."""
    return vector.reshape(-1, *[1] * (like.ndim - 1))


def _shifts(n: int, most: int, rng: torch.Generator) -> Int[Tensor, "n"]:
    """Whole numbers of pixels in [-most, most]."""
    return torch.randint(-most, most + 1, (n,), generator=rng)
