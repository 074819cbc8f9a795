"""Which of several boxes a map of what matters points at, and whether it is the right one.

A box is (left, top, right, bottom) in pixels of the picture, the last two just beyond it: its width is right - left.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

FOUND = 0.5
"""From this overlap on a box is the right one."""


def enlarged(maps: Float[Tensor, "b g g"], size: tuple[int, int]) -> Float[Tensor, "b h w"]:
    """Maps of patches as maps of pixels, interpolated bicubically.

    Args:
        maps: of patches.
        size: height and width of the picture.
    """
    return F.interpolate(maps[:, None], size=size, mode="bicubic", align_corners=False)[:, 0]


def box_scores(pixels: Float[Tensor, "h w"], boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n"]:
    """The sum of a map inside each box, divided by the square root of its area; -inf for a box without any.

    Args:
        pixels: what matters.
        boxes: their sides are cut to whole pixels.
    """
    summed = F.pad(pixels.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    height, width = pixels.shape
    ends = boxes.long()
    left, right = ends[:, 0].clamp(0, width), ends[:, 2].clamp(0, width)
    top, bottom = ends[:, 1].clamp(0, height), ends[:, 3].clamp(0, height)
    inside = summed[bottom, right] - summed[top, right] - summed[bottom, left] + summed[top, left]
    area = areas(boxes).double()
    return torch.where(area > 0, inside / area.clamp(min=1e-12).sqrt(), -torch.inf).to(pixels)


def areas(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """Width times height."""
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def overlaps(boxes: Float[Tensor, "n 4"], box: Float[Tensor, "*n 4"]) -> Float[Tensor, "n"]:
    """Intersection over union of boxes with one, or with as many.

    The last pixel of a side is right - 1; two sides share min(last) - max(first) + 1 pixels, and boxes that share a single column or
    row do not meet.

    >>> overlaps(torch.tensor([[0.0, 0, 4, 4], [2, 0, 6, 4], [9, 9, 11, 11]]), torch.tensor([0.0, 0, 4, 4])).tolist()
    [1.0, 0.3333333432674408, 0.0]
    """
    first, last = torch.maximum(boxes[:, :2], box[..., :2]), torch.minimum(boxes[:, 2:], box[..., 2:]) - 1
    inside = torch.where((first < last).all(1), (last - first + 1).prod(1), 0.0)
    return inside / (areas(boxes) + areas(box) - inside)


def most_central(boxes: Float[Tensor, "n 4"], size: tuple[int, int]) -> Int[Tensor, ""]:
    """The box whose center is nearest to the picture's, whatever is asked: a baseline.

    Args:
        boxes: to choose from.
        size: height and width of the picture.
    """
    height, width = size
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    return (centers - centers.new_tensor([width / 2, height / 2])).square().sum(1).argmin()
