"""What is where: the objects of every picture and its background, drawn before any pixel is.

All lengths are shares of the picture's side, so that one layout can be drawn in any size. A camera looks at a floor that
meets a wall: a place on the floor that is seen ``d`` below the horizon is ``camera / d`` meters away. Objects stand on the
floor or float above it; the first of a picture is the largest and the nearest, the others come in order of their distance.
"""

from dataclasses import dataclass

import numpy as np

from fedvision.data.scenes.shapes import SHAPES
from fedvision.data.scenes.styles import Styles, colors_of, drawn, rgb

SLOTS = 4
"""No picture has more objects."""

TRIES = 4
"""So many places are tried for an object that is not to be hidden."""


@dataclass(frozen=True, eq=False)
class Layouts:
    """n pictures. Arrays of objects are [n, 4], those of an object that is not there hold what it would be.

    Attributes:
        environment: number of the domain, int64 [n].
        present: is there such an object? The first always is.
        category: its class; that of the picture is that of the first.
        shape: number in ``SHAPES``.
        color: number in ``COLORS``.
        texture: number in ``TEXTURES``.
        radius: of the circle about the object.
        x: of its center.
        y: the same, downward.
        angle: turned clockwise by so many radians.
        grain: angle of its texture in radians.
        depth: in meters, falling nowhere from one object to the next.
        paint: red, green and blue [n, 4, 3].
        horizon: height of the eye, downward from the top [n].
        skirting: where the wall meets the floor, below the horizon [n].
        camera: meters times share of the side [n].
        background: number in ``BACKGROUNDS`` [n].
        walls: colors of wall and floor [n, 2, 3].
        weave: random numbers in [0, 1) for the background's pattern [n, 6].
        scraps: x, y, radius and angle of the clutter [n, scraps, 4].
        scrap_paint: its colors [n, scraps, 3].
        blur: deviation of the Gaussian [n].
        dialect: of the captions [n]; 0: plain words.
        wording: random numbers in [0, 1) for the captions [n].
    """

    environment: np.ndarray
    present: np.ndarray
    category: np.ndarray
    shape: np.ndarray
    color: np.ndarray
    texture: np.ndarray
    radius: np.ndarray
    x: np.ndarray
    y: np.ndarray
    angle: np.ndarray
    grain: np.ndarray
    depth: np.ndarray
    paint: np.ndarray
    horizon: np.ndarray
    skirting: np.ndarray
    camera: np.ndarray
    background: np.ndarray
    walls: np.ndarray
    weave: np.ndarray
    scraps: np.ndarray
    scrap_paint: np.ndarray
    blur: np.ndarray
    dialect: np.ndarray
    wording: np.ndarray

    def __len__(self) -> int:
        return len(self.environment)

    def __getitem__(self, rows: slice) -> "Layouts":
        return Layouts(**{name: values[rows] for name, values in vars(self).items()})


def layouts(
    environment: np.ndarray,
    label: np.ndarray,
    styles: Styles,
    classes: int,
    objects: tuple[int, int],
    scraps: int,
    rng: np.random.Generator,
) -> Layouts:
    """Layouts of pictures whose domains [n] and classes [n] are given.

    Args:
        environment: rows of ``styles``.
        label: classes of the pictures.
        styles: of the domains.
        classes: number of classes; class k has shape k % 10, and of more than ten classes color k // 10.
        objects: the fewest and the most of a picture.
        scraps: strips that clutter each background.
        rng: draws the rest.
    """
    n = len(label)
    horizon = 0.1 + 0.2 * rng.random(n)
    skirting = horizon + 0.06 + 0.12 * rng.random(n)
    camera = 1.0 + 0.4 * rng.random(n)
    present = np.arange(SLOTS) < objects[0] + np.floor((objects[1] - objects[0] + 1) * rng.random((n, 1)))
    category = _categories(label, classes, rng)
    radius, foot = _sizes(skirting, rng)
    x, y = _places(radius, foot, rng)
    tint, color = _colors(category, classes, styles, environment, rng)
    walls, paint = _backdrop(styles, environment, rng), rgb(*tint) * (0.94 + 0.06 * rng.random((n, SLOTS, 1)))
    jitter = 0.4 * (rng.random((n, SLOTS)) - 0.5)
    speaks = rng.random(n) < styles.wording[environment]
    return Layouts(
        environment=environment,
        present=present,
        category=category,
        shape=category % len(SHAPES),
        color=color,
        texture=drawn(styles.textures[environment], rng.random((n, SLOTS))),
        radius=radius,
        x=x,
        y=y,
        angle=styles.rotation[environment][:, None] + jitter,
        grain=np.pi * rng.random((n, SLOTS)),
        depth=0.97 * (camera / (foot.T - horizon)).T,
        paint=paint,
        horizon=horizon,
        skirting=skirting,
        camera=camera,
        background=drawn(styles.backgrounds[environment], rng.random(n)),
        walls=walls,
        weave=rng.random((n, 6)),
        scraps=rng.random((n, scraps, 4)) * [1, 1, 0.06, 2 * np.pi] + [0, 0, 0.04, 0],
        scrap_paint=rgb(360 * rng.random((n, scraps)), 0.3 + 0.6 * rng.random((n, scraps)), 0.3 + 0.7 * rng.random((n, scraps))),
        blur=styles.blur[environment],
        dialect=styles.dialect[environment] * speaks,
        wording=rng.random(n),
    )


def _categories(label: np.ndarray, classes: int, rng: np.random.Generator) -> np.ndarray:
    """Classes of the objects [n, slots]: the picture's, and others that differ from it and, if there are enough, from each other."""
    others = np.argsort(rng.random((len(label), classes - 1)), axis=1, kind="stable")
    others = others[:, np.arange(SLOTS - 1) % (classes - 1)]
    return np.concatenate([label[:, None], (label[:, None] + 1 + others) % classes], axis=1)


def _sizes(skirting: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Radii [n, slots], and the rows where the objects, or what they float above, stand on the floor, the nearest first."""
    n = len(skirting)
    first = 0.23 + 0.11 * rng.random((n, 1))
    radius = np.concatenate([first, first * (0.45 + 0.3 * rng.random((n, SLOTS - 1)))], axis=1)
    nearest = 0.78 + 0.2 * rng.random((n, 1))
    behind = -np.sort(-rng.random((n, SLOTS - 1)), axis=1)
    highest = skirting[:, None] + 0.04
    return radius, np.concatenate([nearest, highest + (nearest - 0.04 - highest) * behind], axis=1)


def _places(radius: np.ndarray, foot: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Centers [n, slots] inside the picture; of an object's tries, the first that is clear of those before it, else the clearest."""
    n = len(radius)
    x, y = np.empty((n, SLOTS)), np.empty((n, SLOTS))
    for slot in range(SLOTS):
        r, ground = radius[:, slot, None], foot[:, slot, None]
        across, up = rng.random((n, TRIES)), rng.random((n, TRIES)) ** 2
        tried_x = r + (1 - 2 * r) * across
        tried_y = np.maximum(ground - r - np.maximum(ground - 2 * r, 0) * up, 0.8 * r)
        gaps = [np.hypot(tried_x - x[:, i, None], tried_y - y[:, i, None]) - 0.85 * (r + radius[:, i, None]) for i in range(slot)]
        best = np.argmax(np.minimum.reduce([np.zeros((n, TRIES)), *gaps]), axis=1)[:, None]
        x[:, slot], y[:, slot] = (np.take_along_axis(tried, best, axis=1)[:, 0] for tried in (tried_x, tried_y))
    return x, y


def _colors(
    category: np.ndarray, classes: int, styles: Styles, environment: np.ndarray, rng: np.random.Generator
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Hue, saturation and value of the objects in the colors of their domain, and the colors' numbers, all [n, slots]."""
    uniform = rng.random(category.shape)
    color = category // len(SHAPES) if classes > len(SHAPES) else drawn(styles.colors[environment], uniform)
    hue, saturation, value = colors_of(color)
    shifted, faded, dimmed = (values[environment][:, None] for values in (styles.hue, styles.saturation, styles.value))
    return (hue + shifted, saturation * faded, value * dimmed), color


def _backdrop(styles: Styles, environment: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Colors of wall and floor [n, 2, 3]: paler than any object but the white ones, the floor darker than the wall."""
    n = len(environment)
    hue = styles.backdrop_hue[environment, None] + styles.backdrop_spread[environment, None] * (2 * rng.random((n, 2)) - 1)
    value = styles.backdrop_value[environment, None] + 0.12 * (2 * rng.random((n, 2)) - 1) + [0.06, -0.1]
    return rgb(hue, 0.12 + 0.25 * rng.random((n, 2)), value)
