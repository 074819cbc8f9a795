"""The losses of pre-training: errors where patches are masked, and the targets' standardizations.

What is not known of a target (NaN, or class 255) counts nowhere, and nothing divides by 0: where the reference's gradient of an
example without any masked patch is NaN, ours is 0.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from fedvision.data.examples import IGNORED

EPS = 1e-6
"""Added to variances."""


def squared_errors(prediction: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
    """Mean over channels of (prediction - target)^2; 0 where the target is NaN."""
    return _difference(prediction, target).square().mean(1)


def absolute_errors(prediction: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
    """Mean over channels of |prediction - target|; 0 where the target is NaN."""
    return _difference(prediction, target).abs().mean(1)


def class_errors(logits: Float[Tensor, "b c h w"], target: Int[Tensor, "b h w"], smoothing: float = 0.0) -> Float[Tensor, "b h w"]:
    """Cross-entropy of each pixel; 0 where its class is 255.

    Args:
        logits: of the classes.
        target: class ids.
        smoothing: share of the target that is spread over all classes.
    """
    return F.cross_entropy(logits, target.long(), ignore_index=IGNORED, reduction="none", label_smoothing=smoothing)


def known(target: Tensor) -> Bool[Tensor, "b h w"]:
    """Which pixels of a target are known: values [b, c, h, w] that are not NaN, classes [b, h, w] that are not 255."""
    return ~target.isnan().any(1) if target.is_floating_point() else target != IGNORED


def masked_means(errors: Float[Tensor, "b h w"], counted: Bool[Tensor, "b h w"]) -> tuple[Float[Tensor, "b"], Bool[Tensor, "b"]]:
    """Each example's mean error over the pixels that count, and whether it has any; 0 where it has none."""
    pixels = counted.flatten(1).sum(1)
    total = torch.where(counted, errors, 0.0).flatten(1).sum(1)
    return total / pixels.clamp(min=1), pixels > 0


def masked_loss(errors: Float[Tensor, "b h w"], counted: Bool[Tensor, "b h w"]) -> Float[Tensor, ""]:
    """The mean of ``masked_means`` over the examples that have pixels that count; 0 if none has.

    Source: arXiv 2204.01678, section 3.4, with the averages of its public implementation.
    """
    means, there = masked_means(errors, counted)
    return means.sum() / there.sum().clamp(min=1)


def spread(masked: Bool[Tensor, "b n"], grid: tuple[int, int], cell: int) -> Bool[Tensor, "b h w"]:
    """A mask of patches as one of values, ``cell`` x ``cell`` a patch."""
    return masked.unflatten(1, grid).repeat_interleave(cell, 1).repeat_interleave(cell, 2)  # type: ignore[no-any-return]


def standardized_patches(images: Float[Tensor, "b c h w"], patch: int) -> Float[Tensor, "b c h w"]:
    """Images with each patch, all its channels together, brought to mean 0 and (unbiased) variance 1."""
    b, c, h, w = images.shape
    parts = images.reshape(b, c, h // patch, patch, w // patch, patch)
    variance, mean = torch.var_mean(parts, dim=(1, 3, 5), keepdim=True)
    return ((parts - mean) / (variance + EPS).sqrt()).reshape(b, c, h, w)


def standardized_depth(depth: Float[Tensor, "b 1 h w"], trimmed: float = 0.1) -> Float[Tensor, "b 1 h w"]:
    """Depth less its mean over its (unbiased) deviation, each picture by itself, both without the farthest and nearest pixels.

    Args:
        depth: in any unit; NaN where it is not known, which it is afterwards too.
        trimmed: share of the known pixels left out on either side, in [0, 0.5). Of n the sorted ones from int(trimmed n) up to,
            not including, int((1 - trimmed) n) count.
    """
    flat = depth.flatten(1)
    there = ~flat.isnan()
    n = there.sum(1, keepdim=True).double()
    first, end = (trimmed * n).long(), ((1 - trimmed) * n).long()
    rank = torch.arange(flat.shape[1], device=flat.device)
    counted = (rank >= first) & (rank < end)
    ordered = torch.where(counted, flat.masked_fill(~there, torch.inf).sort(1).values, 0.0)
    size = counted.sum(1, keepdim=True)
    mean = ordered.sum(1, keepdim=True) / size.clamp(min=1)
    deviations = torch.where(counted, ordered - mean, 0.0)
    variance = deviations.square().sum(1, keepdim=True) / (size - 1).clamp(min=1)
    return ((flat - mean) / (variance + EPS).sqrt()).view_as(depth)


def _difference(prediction: Tensor, target: Tensor) -> Tensor:
    return torch.where(target.isnan(), 0.0, prediction - target.nan_to_num(0.0))
