"""Colors changed at random: torchvision's jitter, gray pictures and blur, each picture by its own draws and all at once."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from fedvision.views import along

GRAY = (0.2989, 0.587, 0.114)
"""How much red, green and blue count for brightness."""

Images = Float[Tensor, "n c h w"]
Factors = Float[Tensor, "n"]


@dataclass(frozen=True)
class Colors:
    """How the colors of pictures change.

    Attributes:
        jitter: how far brightness, contrast and saturation may be from 1, and hue from 0, a share of the circle, at most a half.
        jittered: probability that they change at all.
        gray: probability that a picture becomes gray.
        blurred: probability that it is blurred.
        deviation: of the Gaussian that blurs, in pixels, least and most.

    Source: arXiv 2204.13101, appendix.
    """

    jitter: tuple[float, float, float, float] = (0.8, 0.8, 0.8, 0.2)
    jittered: float = 0.8
    gray: float = 0.2
    blurred: float = 0.5
    deviation: tuple[float, float] = (0.1, 2.0)

    def __call__(self, images: Images, rng: torch.Generator) -> Images:
        """Other pictures in [0, 1]; of other than three channels only brightness and contrast change, and they are blurred."""
        n = len(images)
        jittered, gray, blurred = torch.rand(3, n, generator=rng) < torch.tensor([[self.jittered], [self.gray], [self.blurred]])
        factors = self._factors(torch.rand(4, n, generator=rng))
        order = torch.rand(n, 4, generator=rng).argsort(1)
        low, high = self.deviation
        deviations = low + (high - low) * torch.rand(n, generator=rng)
        images = _replaced(images, jittered, lambda part, chosen: jittered_by(part, factors[:, chosen], order[chosen]))
        if images.shape[1] == len(GRAY):
            images = _replaced(images, gray, lambda part, _: brightness(part).expand_as(part))
        return _replaced(images, blurred, lambda part, chosen: blurred_by(part, deviations[chosen]))

    def _factors(self, draws: Float[Tensor, "4 n"]) -> Float[Tensor, "4 n"]:
        most = torch.tensor(self.jitter)[:, None]
        center = torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None]
        low = torch.where(center > 0, (center - most).clamp(min=0), -most)
        return low + (center + most - low) * draws


def jittered_by(images: Images, factors: Float[Tensor, "4 n"], order: Int[Tensor, "n 4"]) -> Images:
    """Brightness, contrast, saturation and hue changed by factors, in an order for each picture."""
    operations = (with_brightness, with_contrast, with_saturation, with_hue)[: 4 if images.shape[1] == len(GRAY) else 2]
    for turn in range(4):
        for number, operation in enumerate(operations):
            images = _replaced(images, order[:, turn] == number, _with(operation, factors[number].to(images.device)))
    return images


def _with(operation: Callable[[Images, Factors], Images], factors: Factors) -> Callable[[Images, Tensor], Images]:
    return lambda part, chosen: operation(part, factors[chosen.to(factors.device)])


def _replaced(images: Images, chosen: Tensor, change: Callable[[Images, Tensor], Images]) -> Images:
    """Some of the pictures changed, given them and which they are; the others as they are."""
    if not chosen.any():
        return images
    chosen, changed = chosen.to(images.device), images.clone()
    changed[chosen] = change(images[chosen], chosen.cpu())
    return changed


def brightness(images: Images) -> Float[Tensor, "n 1 h w"]:
    """How bright each pixel looks; the mean of channels that are not three."""
    if images.shape[1] != len(GRAY):
        return images.mean(1, keepdim=True)
    return torch.einsum("nchw,c->nhw", images, torch.tensor(GRAY, dtype=images.dtype, device=images.device))[:, None]


def with_brightness(images: Images, factors: Factors) -> Images:
    """All values times a factor."""
    return (images * along(factors, images)).clamp(0, 1)


def with_contrast(images: Images, factors: Factors) -> Images:
    """Away from the picture's mean brightness, or towards it."""
    return _blended(images, brightness(images).mean((1, 2, 3), keepdim=True), factors)


def with_saturation(images: Images, factors: Factors) -> Images:
    """Away from gray, or towards it."""
    return _blended(images, brightness(images), factors)


def _blended(images: Images, other: Tensor, factors: Factors) -> Images:
    factors = along(factors, images)
    return (factors * images + (1 - factors) * other).clamp(0, 1)


def with_hue(images: Images, factors: Factors) -> Images:
    """Hues moved along their circle by a share of it."""
    most, at = images.max(1)
    least = images.amin(1)
    chroma = most - least
    red, green, blue = images.unbind(1)
    safe = torch.where(chroma > 0, chroma, 1)
    sixths = torch.where(at == 0, (green - blue) / safe, torch.where(at == 1, 2 + (blue - red) / safe, 4 + (red - green) / safe))
    sixths = sixths + 6 * along(factors, sixths)
    near = torch.stack([(sixths + number) % 6 for number in (5, 3, 1)], dim=1)
    return most[:, None] - chroma[:, None] * near.minimum(4 - near).clamp(0, 1)


def blurred_by(images: Images, deviations: Factors) -> Images:
    """Each picture smoothed by a Gaussian of its own deviation in pixels, reflected beyond its edges."""
    reach = min(math.ceil(3 * float(deviations.max())), min(images.shape[2:]) - 1)
    if reach < 1:
        return images
    n, channels, *_ = images.shape
    steps = torch.arange(-reach, reach + 1, device=images.device)
    kernels = (-0.5 * (steps / along(deviations.to(images.device), images[:, 0, 0])) ** 2).softmax(1).repeat_interleave(channels, 0)
    padded = F.pad(images, [reach] * 4, mode="reflect").flatten(0, 1)[None]
    rows = F.conv2d(padded, kernels[:, None, None], groups=n * channels)
    return F.conv2d(rows, kernels[:, None, :, None], groups=n * channels)[0].unflatten(0, (n, channels))  # type: ignore[no-any-return]
