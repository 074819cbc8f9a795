"""The heads that Leopart is judged with, where pixels have labels: a linear one, and a fully convolutional one.

Letters in shapes: b = pictures; rows and columns are those of patches.

Source: Leopart, arXiv 2204.13101, section 4 and appendix; what the paper leaves open from what its public implementation does.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fedvision.leopart.vision import VisionTransformer
from fedvision.seeds import global_generators


def upsampled(maps: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c height width"]:
    """Maps at another size, between pixels bilinearly, corners not aligned."""
    return maps if tuple(maps.shape[-2:]) == size else F.interpolate(maps, size, mode="bilinear", align_corners=False)


class LinearHead(nn.Module):
    """A linear map of the vector at each place to the scores of the classes.

    The paper interpolates vectors, and then maps them; here scores are interpolated, which comes to the same, since both are linear and
    the weights of an interpolation sum to 1, and takes the memory of classes instead of that of vectors.

    Args:
        width: of the vectors.
        classes: how many.
        rng: draws the weights, as torch does.
    """

    def __init__(self, width: int, classes: int, rng: torch.Generator) -> None:
        super().__init__()
        with global_generators(rng):
            self.conv_seg = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Float[Tensor, "b width rows columns"], size: tuple[int, int]) -> Float[Tensor, "b classes height width"]:
        """Scores of the classes at this size."""
        return upsampled(self.conv_seg(maps), size)


class Convolved(nn.Module):
    """A convolution of 3 x 3 that keeps the size, and a rectifier.

    Args:
        channels: that it takes.
        hidden: that it gives.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, hidden, 3, padding=1)

    def forward(self, maps: Float[Tensor, "b channels h w"]) -> Float[Tensor, "b hidden h w"]:
        """relu(conv(maps))."""
        return F.relu(self.conv(maps))


class FCNHead(nn.Module):
    """Two convolutions, a third that sees what they were given too, and a linear map; nothing is normalized.

    Vectors are interpolated to the size that it is trained at, and there it is also evaluated, since convolutions know distances; scores
    are then interpolated to the size of the picture.

    Args:
        width: of the vectors.
        classes: how many.
        side: rows and columns that it works at; those of the patches if None.
        rng: draws the weights, as torch does.
        hidden: channels.
        dropout: rate at which whole channels are dropped before the linear map.
    """

    def __init__(self, width: int, classes: int, side: int | None, rng: torch.Generator, hidden: int = 512, dropout: float = 0.1) -> None:
        super().__init__()
        self.side = side
        with global_generators(rng):
            self.convs = nn.Sequential(Convolved(width, hidden), Convolved(hidden, hidden))
            self.conv_cat = Convolved(width + hidden, hidden)
            self.conv_seg = nn.Conv2d(hidden, classes, 1)
        self.dropout = nn.Dropout2d(dropout)

    def scores(self, maps: Float[Tensor, "b width h w"]) -> Float[Tensor, "b classes h w"]:
        """Scores of the classes at the size of what is given."""
        joined = self.conv_cat(torch.cat([maps, self.convs(maps)], dim=1))
        return self.conv_seg(self.dropout(joined))  # type: ignore[no-any-return]

    def forward(self, maps: Float[Tensor, "b width rows columns"], size: tuple[int, int]) -> Float[Tensor, "b classes height width"]:
        """Scores of the classes at this size."""
        whole = tuple(maps.shape[-2:]) if self.side is None else (self.side, self.side)
        return upsampled(self.scores(upsampled(maps, whole)), size)  # type: ignore[arg-type]


class Segmenter(nn.Module):
    """A vision transformer, and a head that says the class of every pixel.

    Args:
        backbone: the transformer.
        head: takes the vectors of its patches by place, and a size.
        frozen: whether the transformer is not trained.
    """

    backbone: VisionTransformer
    head: Any

    def __init__(self, backbone: VisionTransformer, head: LinearHead | FCNHead, frozen: bool = True) -> None:
        super().__init__()
        self.backbone, self.head = backbone.requires_grad_(not frozen), head

    def forward(self, images: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b classes height width"]:
        """Scores of the classes of every pixel at this size."""
        return self.head(by_place(self.backbone, images), size)  # type: ignore[no-any-return]


def by_place(backbone: VisionTransformer, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b width rows columns"]:
    """The vectors of the patches, without that of the class."""
    return backbone.tokens(images)[:, 1:].mT.unflatten(2, backbone.grid(images))  # type: ignore[no-any-return]
