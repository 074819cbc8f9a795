"""Augmentation of images: timm's for photographs, mixing, and repeating in a pass.

Source: timm; mixup, arXiv 1710.09412; CutMix, arXiv 1905.04899; repeated augmentation, arXiv 1901.09335.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fedvision.errors import ExperimentError
from fedvision.normalization import Normalization
from fedvision.seeds import global_generators, legacy_generators

Transform = Callable[..., Tensor]
"""A PIL image -> a normalized tensor [3, height, width]."""


def mixed(
    images: Float[Tensor, "n channels height width"], labels: Int[Tensor, "n"], classes: int, mixup: float, cutmix: float, seed: int
) -> tuple[Float[Tensor, "n channels height width"], Float[Tensor, "n classes"]]:
    """A batch mixed with its mirror image, i with n - 1 - i, all by one share; either blended or with a box of the other.

    Where both ``mixup`` and ``cutmix`` are given, a fair coin says which. The last image of an odd batch stays as it is.

    Args:
        images: normalized or not.
        labels: class indices.
        classes: number of classes.
        mixup: alpha of the Beta(alpha, alpha) that the share of a blend is drawn from; 0: no blends.
        cutmix: the same for the area of the box; 0: no boxes.
        seed: of all draws, in [0, 2**32).

    Returns:
        New images, and soft targets whose rows sum to 1: the shares of the classes.
    """
    targets = F.one_hot(labels, classes).to(images.dtype)
    even = len(images) - len(images) % 2
    if even == 0 or mixup == cutmix == 0:
        return images, targets
    with legacy_generators(seed):
        blends, shares = _mixup(classes, mixup, cutmix)(images[:even].clone(), labels[:even])
    return torch.cat([blends, images[even:]]), torch.cat([shares.to(images.dtype), targets[even:]])


def repeated_order(n: int, repeats: int, epoch: int, replicas: int = 1, rank: int = 0, selected_round: int = 0) -> Int[Tensor, "visits"]:
    """The examples that a pass of repeated augmentation visits: each ``repeats`` times in a row, until the pass is full.

    A pass stays as long as one without repeats, so with one replica it sees about n / ``repeats`` different examples.

    Args:
        n: number of examples.
        repeats: visits of each.
        epoch: seed of the permutation.
        replicas: processes that share the pass; each takes every ``replicas``-th visit.
        rank: which of them.
        selected_round: n is rounded down to a multiple of it, if it is no less; 0: it is not.

    >>> repeated_order(6, 3, epoch=0).tolist()
    [2, 2, 2, 5, 5, 5]
    """
    from timm.data.distributed_sampler import RepeatAugSampler

    sampler = RepeatAugSampler(range(n), replicas, rank, num_repeats=repeats, selected_round=selected_round)
    sampler.set_epoch(epoch)
    return torch.tensor(list(sampler), dtype=torch.int64)


@cache
def training_transform(
    resolution: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
    randaugment: str,
    interpolation: str,
    normalization: Normalization,
) -> Transform:
    """The training view of a photograph, by timm: a random crop resized, mirrored, RandAugment, normalized.

    Args:
        resolution: pixels a side of the result.
        scale: the crop's area as a fraction of the image's, least and most.
        ratio: the crop's width over its height, least and most.
        flip: probability of mirroring.
        randaugment: timm's description, such as ``"rand-m7-mstd0.5-inc1"``; empty: none, and no color jitter in its stead.
        interpolation: ``"bicubic"``, ``"bilinear"`` or ``"random"`` of both.
        normalization: of three channels.

    Raises:
        ExperimentError: a description that timm does not understand.
    """
    from timm.data.transforms_factory import create_transform

    try:
        return create_transform(  # type: ignore[no-any-return]
            (3, resolution, resolution),
            is_training=True,
            scale=scale,
            ratio=ratio,
            hflip=flip,
            color_jitter=None,  # type: ignore[arg-type]
            auto_augment=randaugment or None,
            interpolation=interpolation,
            mean=normalization.mean,
            std=normalization.std,
        )
    except (AssertionError, KeyError, ValueError) as error:
        what = f"randaugment = {randaugment!r}, interpolation = {interpolation!r}"
        raise ExperimentError(f"timm does not know {what} ({error!r}); write e.g. 'rand-m7-mstd0.5-inc1' and 'bicubic'") from error


@cache
def evaluation_transform(resolution: int, crop: float, interpolation: str, normalization: Normalization) -> Transform:
    """The evaluation view of a photograph, by timm: the shorter side resized to resolution / crop, the center cut out, normalized."""
    from timm.data.transforms_factory import create_transform

    return create_transform(  # type: ignore[no-any-return]
        (3, resolution, resolution), crop_pct=crop, interpolation=interpolation, mean=normalization.mean, std=normalization.std
    )


def transformed(
    images: Float[Tensor, "n channels height width"], transform: Transform, rng: torch.Generator | None = None
) -> Float[Tensor, "n channels resolution resolution"]:
    """Photographs, image by image through a transform of timm's, which draws from ``rng``.

    Args:
        images: in [0, 1], of three channels, or of one, which is treated as gray.
        transform: what to do with each.
        rng: for the transform; None: it draws nothing.

    Raises:
        ExperimentError: images of two channels, or of more than three.
    """
    channels = images.shape[1]
    if channels not in (1, 3):
        raise ExperimentError(f"timm's views need images of one or three channels, these have {channels}; use augmentation = 'shift'")
    with nullcontext() if rng is None else _lent(rng):
        return torch.stack([transform(_picture(image))[:channels] for image in images]).to(images.device)


def drawn_seed(rng: torch.Generator) -> int:
    """A seed in [0, 2**32) for code that wants one."""
    return int(torch.randint(2**32, (), generator=rng))


@contextmanager
def _lent(rng: torch.Generator) -> Iterator[None]:
    seed = drawn_seed(rng)
    with global_generators(rng), legacy_generators(seed):
        yield


def _picture(image: Float[Tensor, "channels height width"]) -> Image.Image:
    """The PIL image of a tensor in [0, 1]."""
    values = (image * 255).round().clamp(0, 255).to(torch.uint8).expand(3, -1, -1)
    return Image.fromarray(np.ascontiguousarray(values.permute(1, 2, 0).cpu().numpy()))


@cache
def _mixup(classes: int, mixup: float, cutmix: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from timm.data.mixup import Mixup

    return Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=classes)  # type: ignore[no-any-return]
