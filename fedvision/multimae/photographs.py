"""Photographs in training: their colors changed, and pictures made larger or smaller together with their maps."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from fedvision.data.examples import IGNORED
from fedvision.multimae.views import Values
from fedvision.seeds import global_generators

GRAY = 128 / 255
"""What pictures are continued with beyond their edges."""


@dataclass(frozen=True, kw_only=True)
class Colors:
    """How the colors of pictures are changed at random; torchvision's ``ColorJitter`` and ``RandomGrayscale``.

    Attributes:
        brightness: a factor is drawn from 1 - b to 1 + b.
        contrast: the same.
        saturation: the same.
        hue: a share of the circle of hues, drawn from -h to h, at most a half.
        probability: that a picture's colors are changed at all.
        gray: probability that a picture becomes gray.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    probability: float = 0.5
    gray: float = 0.0

    @property
    def idle(self) -> bool:
        """Whether nothing is ever changed."""
        return not self.gray and not (self.probability and any((self.brightness, self.contrast, self.saturation, self.hue)))

    def __call__(self, images: Float[Tensor, "n 3 h w"], rng: torch.Generator) -> Float[Tensor, "n 3 h w"]:
        """Other images, each changed by itself; in [0, 1], NaN where not known."""
        if self.idle:
            return images
        from torchvision.transforms import v2

        jitter = v2.ColorJitter(self.brightness, self.contrast, self.saturation, self.hue)
        changing = v2.Compose([v2.RandomApply([jitter], p=self.probability), v2.RandomGrayscale(p=self.gray)])
        with global_generators(rng):
            changed = torch.stack([changing(image) for image in images.nan_to_num(0.0)])
        return torch.where(images.isnan(), torch.nan, changed)


@dataclass(frozen=True)
class Zoom:
    """Pictures made larger or smaller by a random factor, of which a window of the former size is shown.

    Of a larger one it is anywhere; a smaller one lies in its upper left corner, and beyond it everything is unknown, and gray where
    it is a picture's.

    Attributes:
        least: factor.
        most: factor.
    """

    least: float = 1.0
    most: float = 1.0

    def __call__(self, values: Values, rng: torch.Generator) -> Values:
        """All modalities alike, each example by itself."""
        if self.least == self.most == 1.0:
            return values
        n, shown = len(next(iter(values.values()))), torch.tensor(next(iter(values.values())).shape[-2:])
        factors = self.least + (self.most - self.least) * torch.rand(n, 1, generator=rng)
        sides = (factors * shown).round().long().clamp(min=1)
        corners = (torch.rand(n, 2, generator=rng) * (sides - shown + 1).clamp(min=1)).long()
        windows = torch.cat([sides, corners], dim=1).tolist()
        return {name: torch.stack([_zoomed(*pair) for pair in zip(held, windows, strict=True)]) for name, held in values.items()}


def _zoomed(one: Shaped[Tensor, "*c h w"], window: list[int]) -> Shaped[Tensor, "*c h w"]:
    """Resized, and shown as large as before.

    Args:
        one: picture or map.
        window: rows and columns that it is resized to; row and column of these where what is shown begins.
    """
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as geometry

    shown, (height, width, top, left) = one.shape[-2:], window
    picture = one.shape[:-2] == (3,)
    mode = InterpolationMode.BILINEAR if picture else InterpolationMode.NEAREST_EXACT
    resized = geometry.resize(one.reshape(-1, *shown), [height, width], mode, antialias=True)
    beyond = GRAY if picture else torch.nan if one.is_floating_point() else IGNORED
    padding = [0, 0, max(shown[1] - width, 0), max(shown[0] - height, 0)]
    padded = geometry.pad(resized, padding, fill=beyond)
    return geometry.crop(padded, top, left, *shown).reshape(one.shape)  # type: ignore[no-any-return]
