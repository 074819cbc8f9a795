"""CTAugment: image operations whose strengths are drawn where a classifier still recognizes the image.

Everything here is a function of ``rates``: one float [19, 17], a row for each parameter of an operation and a column for
each bin of its range [0, 1). Policies are drawn from the rates as they are; applying them is another matter, and
may be spread over threads without the rates going stale.

Source: ReMixMatch, arXiv 1911.09785; DoubleMatch, arXiv 2205.05575, with the settings of its
public implementation.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Num, Shaped, UInt8
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

DECAY = 0.99
"""Of the rates."""

THRESHOLD = 0.8
"""Bins whose rate is less than this share of the best one's are not drawn."""

DEPTH = 2
"""Operations a policy."""

# ---- the operations -------------------------------------------------------------------------------------------------

Picture = Image.Image
Place = tuple[float, float]
"""Where in the picture, (x, y) in [0, 1)."""

METHODS = (
    Image.Resampling.LANCZOS,
    Image.Resampling.BICUBIC,
    Image.Resampling.BILINEAR,
    Image.Resampling.BOX,
    Image.Resampling.HAMMING,
    Image.Resampling.NEAREST,
)
"""Of ``rescale``, in the order of its second parameter."""


@dataclass(frozen=True)
class Operation:
    """An operation on pictures, gray or in color.

    Attributes:
        function: (picture, place, one level in [0, 1] a parameter) -> picture.
        bins: of each parameter.
    """

    function: Callable[..., Picture]
    bins: tuple[int, ...] = (17,)


def _blended(operation: Callable[[Picture], Picture]) -> Operation:
    """From the picture, at level 0, to what the operation makes of it, at 1."""
    return Operation(lambda picture, place, level: Image.blend(picture, operation(picture), level))


def _enhanced(enhancer: Callable[[Picture], ImageEnhance._Enhance]) -> Operation:
    """By a factor from 0.1 to 2."""
    return Operation(lambda picture, place, level: enhancer(picture).enhance(0.1 + 1.9 * level))


def _moved(coefficients: Callable[[float], tuple[float, ...]]) -> Operation:
    """Each pixel (x, y) is taken from (a x + b y + c, d x + e y + f), of coefficients of an amount in [-0.3, 0.3]."""

    def transform(picture: Picture, place: Place, level: float) -> Picture:
        return picture.transform(picture.size, Image.Transform.AFFINE, coefficients((2 * level - 1) * 0.3))

    return Operation(transform)


def cutout(picture: Picture, place: Place, level: float) -> Picture:
    """A gray square of up to half the shorter side around ``place``, less what of it lies outside."""
    half = (1 + int(level * min(picture.size) * 0.499)) // 2
    x, y = (int(at * side) for at, side in zip(place, picture.size, strict=True))
    box = (max(0, x - half), max(0, y - half), min(picture.width, x + half), min(picture.height, y + half))
    covered = picture.copy()
    if half:
        covered.paste(127 if picture.mode == "L" else (127, 127, 127), box)
    return covered


def _posterize(picture: Picture, place: Place, level: float) -> Picture:
    """1 to 8 bits a channel."""
    return ImageOps.posterize(picture, 1 + int(7.999 * level))


def _rescale(picture: Picture, place: Place, level: float, method: float) -> Picture:
    """Without a border of up to a quarter of each side, as large as before."""
    width, height = picture.size
    border = 0.25 * level
    crop = picture.crop((border * width, border * height, width * (1 - border), height * (1 - border)))  # type: ignore[arg-type]
    return crop.resize(picture.size, METHODS[int(5.99 * method)])


def _rotate(picture: Picture, place: Place, level: float) -> Picture:
    """-45 to 45 degrees counter-clockwise; black comes in."""
    return picture.rotate(round((2 * level - 1) * 45))


def _solarize(picture: Picture, place: Place, level: float) -> Picture:
    """Values from the threshold on inverted."""
    return ImageOps.solarize(picture, int(255.999 * level))


OPERATIONS: dict[str, Operation] = {
    "autocontrast": _blended(ImageOps.autocontrast),
    "blur": _blended(lambda picture: picture.filter(ImageFilter.BLUR)),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "cutout": Operation(cutout),
    "equalize": _blended(ImageOps.equalize),
    "invert": _blended(ImageOps.invert),
    "identity": Operation(lambda picture, place: picture, ()),
    "posterize": Operation(_posterize, (8,)),
    "rescale": Operation(_rescale, (17, 6)),
    "rotate": Operation(_rotate),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": _moved(lambda amount: (1, amount, 0, 0, 1, 0)),
    "shear_y": _moved(lambda amount: (1, 0, 0, amount, 1, 0)),
    "smooth": _blended(lambda picture: picture.filter(ImageFilter.SMOOTH)),
    "solarize": Operation(_solarize),
    "translate_x": _moved(lambda amount: (1, 0, amount, 0, 1, 0)),
    "translate_y": _moved(lambda amount: (1, 0, 0, 0, 1, amount)),
}
"""The operations by name, in the order of their indices.

``color`` changes no gray picture; the translations, by less than half a pixel, change none, as in the reference.
"""

NAMES = tuple(OPERATIONS)
CUTOUT = NAMES.index("cutout")

# ---- the rates ------------------------------------------------------------------------------------------------------

BINS = tuple(bins for operation in OPERATIONS.values() for bins in operation.bins)
"""Of each of the 19 parameters, in the order of the operations."""


def _rows() -> list[list[int]]:
    """Row of the first and second parameter of each operation; -1 where it has none."""
    ends = np.cumsum([len(operation.bins) for operation in OPERATIONS.values()])
    starts = [end - len(operation.bins) for end, operation in zip(ends, OPERATIONS.values(), strict=True)]
    return [[*range(start, end), -1, -1][:2] for start, end in zip(starts, ends, strict=True)]


ROWS = torch.tensor(_rows())
"""Row of the rates of each operation's first and second parameter [19, 2]; -1 where it has none."""


def initial_rates() -> Float[Tensor, "parameters bins"]:
    """Rates 1; 0 where a parameter has fewer bins than others."""
    return (torch.arange(max(BINS)) < torch.tensor(BINS)[:, None]).float()


def rate_to_p(rates: Float[Tensor, "*n bins"], decay: float = DECAY, threshold: float = THRESHOLD) -> Float[Tensor, "*n bins"]:
    """How likely each bin is to be drawn, relative to the best one, which has 1; bins below the threshold have 0."""
    p = rates + (1 - decay)
    p = p / p.amax(-1, keepdim=True)
    return torch.where(p < threshold, 0, p)


def proximity(p: Float[Tensor, "n classes"], labels: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """How near predictions are to the labels: 1 - sum |p - onehot| / 2, the probability of the true class."""
    onehot = torch.nn.functional.one_hot(labels, p.shape[1])
    return 1 - (p - onehot).abs().sum(1) / 2


def updated(
    rates: Float[Tensor, "parameters bins"],
    operations: Int[Tensor, "n depth"],
    levels: Float[Tensor, "n depth 2"],
    proximities: Float[Tensor, "n"],
    decay: float = DECAY,
) -> Float[Tensor, "parameters bins"]:
    """Rates after probes: those of the bins that a probe's levels fell in move by 1 - decay towards its proximity.

    One probe after the other, so that of two in the same bin the second counts more.
    """
    table = rates.detach().cpu().numpy().copy()
    rows = ROWS[operations.cpu()].flatten(1).tolist()
    for row, level, near in zip(rows, levels.flatten(1).tolist(), proximities.tolist(), strict=True):
        for parameter, value in zip(row, level, strict=True):
            if parameter >= 0:
                bin_ = int(value * BINS[parameter] * 0.999)
                table[parameter, bin_] = decay * table[parameter, bin_] + (1 - decay) * near
    return torch.from_numpy(table).to(rates.device)


# ---- policies -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Policies:
    """What is done to each of n images, operation after operation.

    Attributes:
        operations: index in ``NAMES`` of each step.
        levels: in [0, 1), of the first and second parameter of each step; 0 for those that it does not have.
        places: (x, y) in [0, 1) where a cutout lies.
    """

    operations: Int[Tensor, "n steps"]
    levels: Float[Tensor, "n steps 2"]
    places: Float[Tensor, "n steps 2"]

    def __len__(self) -> int:
        return len(self.operations)


def probe_policies(n: int, rng: torch.Generator, depth: int = DEPTH) -> Policies:
    """Random operations of any strength, for learning the rates."""
    operations = torch.randint(len(NAMES), (n, depth), generator=rng)
    levels = torch.rand(n, depth, 2, dtype=torch.float64, generator=rng)
    return Policies(operations, levels.where(ROWS[operations] >= 0, 0), _places(n, depth, rng))


def strong_policies(
    rates: Float[Tensor, "parameters bins"],
    n: int,
    rng: torch.Generator,
    depth: int = DEPTH,
    decay: float = DECAY,
    threshold: float = THRESHOLD,
    cutout_level: float = 1.0,
) -> Policies:
    """Random operations, of strengths in bins drawn by their rates, and a cutout, by default of the greatest size."""
    drawn = probe_policies(n, rng, depth)
    rows = ROWS[drawn.operations]
    p = rate_to_p(rates.cpu(), decay, threshold)[rows.clamp(min=0)]
    bins = torch.multinomial(p.flatten(0, -2), 1, generator=rng).view(rows.shape)
    levels = ((bins + drawn.levels) / torch.tensor(BINS)[rows]).where(rows >= 0, 0)
    return Policies(
        torch.cat([drawn.operations, torch.full((n, 1), CUTOUT)], 1),
        torch.cat([levels, levels.new_tensor([cutout_level, 0.0]).expand(n, 1, 2)], 1),
        torch.cat([drawn.places, _places(n, 1, rng)], 1),
    )


def no_policies(n: int, depth: int = DEPTH) -> Policies:
    """Policies that change nothing."""
    nothing = torch.zeros(n, depth, 2, dtype=torch.float64)
    return Policies(torch.full((n, depth), NAMES.index("identity")), nothing, nothing)


def _places(n: int, steps: int, rng: torch.Generator) -> Float[Tensor, "n steps 2"]:
    return torch.rand(n, steps, 2, dtype=torch.float64, generator=rng)


# ---- applying them --------------------------------------------------------------------------------------------------


def applied(images: Num[Tensor, "n c h w"], policies: Policies, workers: int = 0) -> Float[Tensor, "n c h w"]:
    """Images as their policies change them, in [-1, 1].

    Args:
        images: of 1 or 3 channels; bytes, or floats in [-1, 1], which are rounded to bytes first.
        policies: one an image.
        workers: threads that share the images; 0: this one does all. The result does not depend on it.
    """
    if not len(images):
        return images.float()
    arrays = bytes_of(images).permute(0, 2, 3, 1).cpu().numpy()
    tasks = zip(arrays, policies.operations.tolist(), policies.levels.tolist(), policies.places.tolist(), strict=True)
    if workers:
        with ThreadPoolExecutor(workers) as pool:
            changed = list(pool.map(lambda task: _changed(*task), tasks))
    else:
        changed = [_changed(*task) for task in tasks]
    return signed_of_bytes(torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2)).contiguous().to(images.device)


def bytes_of(images: Num[Tensor, "*n"]) -> UInt8[Tensor, "*n"]:
    """Values in [-1, 1] as bytes; bytes as they are."""
    return images if images.dtype == torch.uint8 else (127.5 * (1 + images)).round().clamp(0, 255).to(torch.uint8)


def signed_of_bytes(values: UInt8[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Bytes as values in [-1, 1]."""
    return values.float() / 127.5 - 1


def _changed(
    array: Shaped[np.ndarray, "h w c"], operations: list[int], levels: list[list[float]], places: list[Place]
) -> Shaped[np.ndarray, "h w c"]:
    """One image, after all its operations."""
    picture = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    for index, level, place in zip(operations, levels, places, strict=True):
        operation = OPERATIONS[NAMES[index]]
        picture = operation.function(picture, place, *level[: len(operation.bins)])
    return np.asarray(picture).reshape(array.shape)
