"""Normalization of images: what a network subtracts and divides by, and from one network's to another's."""

from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each channel of images in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def none(cls, channels: int) -> "Normalization":
        """The one that leaves images as they are."""
        return cls((0.0,) * channels, (1.0,) * channels)

    @classmethod
    def of_timm(cls, model: str, channels: int = 3) -> "Normalization":
        """That of a timm model by name; of other than three channels each gets the average.

        >>> Normalization.of_timm("tresnet_v2_l")
        Normalization(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        """
        import timm

        config: Any = timm.get_pretrained_cfg(model)
        mean, std = (tuple(float(value) for value in values) for values in (config.mean, config.std))
        return cls(mean, std).of_channels(channels)

    def __call__(self, images: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n channels height width"]:
        """Images in [0, 1], normalized."""
        return (images - self._column(self.mean, images)) / self._column(self.std, images)

    def undone(self, images: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n channels height width"]:
        """Normalized images, as they were in [0, 1]."""
        return images * self._column(self.std, images) + self._column(self.mean, images)

    def of_channels(self, channels: int) -> "Normalization":
        """The same for so many channels; if they are not as many as its own, each gets the average.

        >>> Normalization((0.25, 0.75), (1.0, 1.0)).of_channels(1)
        Normalization(mean=(0.5,), std=(1.0,))
        """
        if channels == len(self.mean):
            return self
        return Normalization((fmean(self.mean),) * channels, (fmean(self.std),) * channels)

    def in_color(self) -> "Normalization":
        """The same for gray images of which all three channels are alike."""
        return Normalization(self.mean * 3, self.std * 3) if len(self.mean) == 1 else self

    @staticmethod
    def _column(values: tuple[float, ...], images: Tensor) -> Tensor:
        return torch.tensor(values, dtype=images.dtype, device=images.device)[:, None, None]


def renormalized(
    images: Float[Tensor, "n channels height width"], own: Normalization, other: Normalization
) -> Float[Tensor, "n channels height width"]:
    """Images normalized as one network expects them, as another does: (x std + mean - mean') / std'.

    Args:
        images: normalized by ``own``; mixed or not, as mixing is linear.
        own: what was done to them.
        other: what is to have been done to them, marked ' above.

    Differs: USI's reference code computes x std / std' - (mean' - mean), the same only where std' = 1.
    """
    return images if own == other else other(own.undone(images))
