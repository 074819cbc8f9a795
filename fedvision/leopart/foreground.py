"""What is in front, as the class token's attention tells: most of its mass, without specks."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

BLUR = (7, 0.6)
"""Patches a side of the Gaussian kernel that smooths attention, and its deviation in patches."""

SPECK = 2
"""Patches that a connected region must exceed."""


def foreground(attention: Float[Tensor, "n heads rows columns"], mass: float = 0.6) -> Bool[Tensor, "n rows columns"]:
    """Which patches are in front.

    The mean over heads is smoothed; of each picture the fewest patches are taken that hold ``mass`` of the attention; regions of one
    or two patches, diagonal neighbors included, are dropped.

    Args:
        attention: of the class token to each patch.
        mass: share of the attention that the foreground holds, in [0, 1].

    Source: arXiv 2204.13101, section 3.2; kernel and specks are the public implementation's.
    """
    return without_specks(heaviest(blurred(attention.mean(1)), mass))


def blurred(maps: Float[Tensor, "n rows columns"]) -> Float[Tensor, "n rows columns"]:
    """Maps smoothed by a Gaussian, reflected beyond their edges as far as they reach, and where they are too small by a narrower one."""
    from torchvision.transforms.v2 import functional as filters

    reach = min(BLUR[0] // 2, min(maps.shape[1:]) - 1)
    if reach < 1:
        return maps
    return filters.gaussian_blur(maps[:, None], [2 * reach + 1] * 2, [BLUR[1]] * 2)[:, 0]  # type: ignore[no-any-return]


def heaviest(maps: Float[Tensor, "n rows columns"], mass: float) -> Bool[Tensor, "n rows columns"]:
    """Where a map is largest: the sum of its smaller values, the own one included, exceeds 1 - ``mass`` of all."""
    flat = maps.flatten(1)
    values, order = flat.sort(1)
    share = (values / values.sum(1, keepdim=True)).cumsum(1)
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, order, share > 1 - mass).view(maps.shape)


def without_specks(masks: Bool[Tensor, "n rows columns"]) -> Bool[Tensor, "n rows columns"]:
    """Masks without their regions of ``SPECK`` patches or fewer; regions go on over corners."""
    import numpy as np
    from scipy import ndimage

    found = masks.cpu().numpy()
    apart = np.zeros((3, 3, 3), dtype=int)
    apart[1] = 1  # neighbors are those within the same picture
    regions, _ = ndimage.label(found, structure=apart)
    sizes = np.bincount(regions.ravel())
    return torch.from_numpy(found & (sizes[regions] > SPECK)).to(masks.device)
