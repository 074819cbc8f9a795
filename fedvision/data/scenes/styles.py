"""Colors, textures and backgrounds by name, and the style of a domain: what it prefers of them, and how it is photographed."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from fedvision.errors import DataError
from fedvision.seeds import numpy_generator
from fedvision.settings import nearest

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (358, 0.87, 0.88), "blue": (222, 0.8, 0.9), "yellow": (56, 0.85, 0.97), "green": (130, 0.75, 0.68), "white": (0, 0.0, 0.98),
    "purple": (275, 0.65, 0.75), "orange": (28, 0.92, 0.98), "cyan": (180, 0.7, 0.9), "pink": (330, 0.5, 1.0), "brown": (24, 0.68, 0.42),
}  # fmt: skip
"""Hue in degrees, saturation and value in [0, 1], of each color."""

TEXTURES = ("plain", "striped", "checkered", "dotted", "zigzagged")
BACKGROUNDS = ("plain", "gradient", "stripes", "tiles", "clouds")
SHIFTS = ("palette", "texture", "background", "blur", "rotation", "wording")
"""In what domains can differ."""

DIALECTS = 4
"""So many ways there are to word captions (``captions.DIALECTS``)."""


@dataclass(frozen=True, eq=False)
class Styles:
    """The styles of several domains, the first dimension of every array.

    Attributes:
        hue: degrees added to every object's color; at most 6, less than half the way to the next color.
        saturation: factor of every color's.
        value: factor of every color's.
        colors: how often an object has each color [domains, colors], where the class leaves that open; rows sum to 1.
        textures: how often it has each texture [domains, textures].
        backgrounds: how often each kind [domains, kinds].
        backdrop_hue: degrees, the middle of the hues of walls and floors.
        backdrop_spread: degrees about it.
        backdrop_value: in [0, 1], the middle of their values.
        blur: deviation of the Gaussian, as a share of the picture's side.
        rotation: radians by which objects are turned.
        dialect: of the captions.
        wording: how often a caption is in the dialect, not in plain words.
    """

    hue: np.ndarray
    saturation: np.ndarray
    value: np.ndarray
    colors: np.ndarray
    textures: np.ndarray
    backgrounds: np.ndarray
    backdrop_hue: np.ndarray
    backdrop_spread: np.ndarray
    backdrop_value: np.ndarray
    blur: np.ndarray
    rotation: np.ndarray
    dialect: np.ndarray
    wording: np.ndarray


def styles(seed: int, domains: int, shift: Collection[str], strength: float) -> Styles:
    """The styles of domains 0 .. ``domains`` - 1; each depends on its number and the other arguments only.

    Args:
        seed: of the data set.
        domains: how many.
        shift: in what domains differ, of ``SHIFTS``.
        strength: in [0, 1]; 0: not at all.

    Raises:
        DataError: an unknown kind of shift.
    """
    for kind in shift:
        if kind not in SHIFTS:
            raise DataError(f"scenes.shift names {kind!r}; {nearest(kind, list(SHIFTS))}")
    rng = numpy_generator(seed, "scenes", "styles")
    palette, texture, background, blur, rotation, wording = (strength * (kind in shift) for kind in SHIFTS)
    hue, saturation, value, backdrop, brightness, sharpness, turn = (_spread(rng, domains) for _ in range(7))
    return Styles(
        hue=6 * palette * (2 * hue - 1),
        saturation=1 - 0.15 * palette * saturation,
        value=1 - 0.2 * palette * value,
        colors=_preferences(rng, domains, len(COLORS), 3, palette),
        textures=_preferences(rng, domains, len(TEXTURES), 1, texture),
        backgrounds=_preferences(rng, domains, len(BACKGROUNDS), 1, background),
        backdrop_hue=360 * backdrop,
        backdrop_spread=np.full(domains, 180 - 165 * palette),
        backdrop_value=0.58 + 0.2 * palette * (2 * brightness - 1),
        blur=0.025 * blur * sharpness,
        rotation=np.pi / 2 * rotation * (2 * turn - 1),
        dialect=_order(rng, DIALECTS)[np.arange(domains) % DIALECTS] * ("wording" in shift),
        wording=np.full(domains, float(wording)),
    )


def _spread(rng: np.random.Generator, domains: int) -> np.ndarray:
    """Numbers in [0, 1) that lie apart from each other however many there are: steps of the golden section from a random one."""
    return (rng.random() + np.arange(domains) * 0.6180339887498949) % 1


def _order(rng: np.random.Generator, number: int) -> np.ndarray:
    return np.argsort(rng.random(number), kind="stable")


def _preferences(rng: np.random.Generator, domains: int, kinds: int, preferred: int, strength: float) -> np.ndarray:
    """How often each of ``kinds`` comes, [domains, kinds]: all alike at strength 0, ``preferred`` of them only at strength 1."""
    order = _order(rng, kinds)
    chosen = order[(np.arange(domains)[:, None] * preferred + np.arange(preferred)) % kinds]
    focus = np.zeros((domains, kinds))
    np.put_along_axis(focus, chosen, 1 / preferred, axis=1)
    return strength * focus + (1 - strength) / kinds


def drawn(weights: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Numbers drawn by weight: weights [n, kinds] and numbers in [0, 1) [n, ...] -> int64 [n, ...]."""
    limits = np.cumsum(weights, axis=1)[:, :-1].reshape(len(weights), *[1] * (uniform.ndim - 1), -1)
    return np.asarray((uniform[..., None] >= limits).sum(axis=-1))


def rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Colors [...] with hues in degrees as red, green and blue in [0, 1], [..., 3]."""
    sector = (np.array([5.0, 3.0, 1.0]) + np.asarray(hue)[..., None] / 60) % 6
    share = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return np.asarray(np.asarray(value)[..., None] * (1 - np.asarray(saturation)[..., None] * share))


def colors_of(numbers: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue, saturation and value of colors given by number, each of the shape of ``numbers``."""
    table = np.array(list(COLORS.values()))[np.asarray(numbers)]
    return table[..., 0], table[..., 1], table[..., 2]
