"""The ten shapes, as signed distances, and which pixels they cover.

A shape lies in the circle of radius 1 about (0, 0); x points right, y down. Its function gives about the distance of a place
to its outline: negative inside, 0 on it, positive outside.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Fragments:
    """The pixels that some shapes cover, one entry a pixel and shape.

    Attributes:
        of: which shape, int64 [fragments].
        row: of the pixel.
        column: of the pixel.
        depth: how far the pixel's center lies inside the outline, in pixels, >= 0.
    """

    of: np.ndarray
    row: np.ndarray
    column: np.ndarray
    depth: np.ndarray


def circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A disk of radius 0.93."""
    return np.asarray(np.hypot(x, y) - 0.93)


def square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Half a side is 0.7."""
    return np.asarray(np.maximum(np.abs(x), np.abs(y)) - 0.7)


def triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Three equal sides, one of them at the bottom."""
    return np.asarray(np.maximum(y, 0.75**0.5 * np.abs(x) - 0.5 * y) - 0.5)


def star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points, one at the top: folded onto the half of one point, which one line bounds."""
    cos, sin = 0.8090169943749475, 0.5877852522924731  # of a tenth of a turn
    x, y = np.abs(x), -y
    across = 2 * np.maximum(cos * x - sin * y, 0)
    x, y = x - across * cos, y + across * sin
    across = 2 * np.maximum(-cos * x - sin * y, 0)
    x, y = np.abs(x + across * cos), y + across * sin - 1
    to_x, to_y = 0.45 * sin, 0.45 * cos - 1
    return np.asarray((y * to_x - x * to_y) / (to_x**2 + to_y**2) ** 0.5)


def cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Two bars, 1.9 long and 0.6 wide."""
    x, y = np.abs(x), np.abs(y)
    return np.asarray(np.maximum(np.maximum(x, y) - 0.95, np.minimum(x, y) - 0.3))


def ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """From radius 0.44 to 0.96."""
    return np.asarray(np.abs(np.hypot(x, y) - 0.7) - 0.26)


def crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A disk less another one to the right."""
    return np.asarray(np.maximum(np.hypot(x, y) - 0.96, 0.8 - np.hypot(x - 0.5, y)))


def heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A square on its corner, and a disk on each of its upper sides."""
    x, y = np.abs(x), y - 0.12
    return np.asarray(np.minimum((x + np.abs(y)) * 0.5**0.5, np.hypot(x - 0.375, y + 0.375)) - 0.53)


def arrow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """It points up."""
    x = np.abs(x)
    head = np.maximum(y, 0.794 * x - 0.608 * (y + 0.98))
    return np.asarray(np.minimum(head, np.maximum(x - 0.26, np.abs(y - 0.4) - 0.55)))


def hourglass(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Two triangles that meet in the middle."""
    x, y = np.abs(x), np.abs(y)
    return np.maximum(y - 0.82, 0.857 * (x - 0.6 * y - 0.07))


def scrap(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A strip that is no shape to be named: clutter."""
    return np.asarray(np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.3))


SHAPES: dict[str, Distance] = {
    "circle": circle, "square": square, "triangle": triangle, "star": star, "cross": cross,
    "ring": ring, "crescent": crescent, "heart": heart, "arrow": arrow, "hourglass": hourglass,
}  # fmt: skip
SCRAP = len(SHAPES)
"""The number of ``scrap``, after those of the shapes with names."""

_DISTANCES = (*SHAPES.values(), scrap)


def covered(shape: np.ndarray, x: np.ndarray, y: np.ndarray, radius: np.ndarray, angle: np.ndarray, size: int) -> Fragments:
    """The pixels whose centers lie in each of some shapes; only a window about each is looked at.

    Args:
        shape: numbers in the order of ``SHAPES``, int64 [shapes].
        x: of the centers, as shares of the picture's side.
        y: the same.
        radius: the same, of the circle about the shape.
        angle: turned clockwise by so many radians.
        size: the picture's side in pixels.
    """
    found = []
    for kind in np.unique(shape):
        some = np.flatnonzero(shape == kind)
        side = min(size, int(np.ceil(2 * radius[some].max() * size)) + 1)
        window = np.arange(side)
        rows, columns = (np.clip(np.floor((at[some] - radius[some]) * size), 0, size - side)[:, None] + window for at in (y, x))
        down = ((rows + 0.5) / size - y[some, None]) / radius[some, None]
        right = ((columns + 0.5) / size - x[some, None]) / radius[some, None]
        cos, sin = np.cos(angle[some])[:, None, None], np.sin(angle[some])[:, None, None]
        down, right = down[:, :, None], right[:, None, :]
        distance = _DISTANCES[kind](cos * right + sin * down, cos * down - sin * right)
        which, row, column = np.nonzero(distance <= 0)
        depth = -distance[which, row, column] * radius[some][which] * size
        found.append((some[which], rows[which, row].astype(np.int64), columns[which, column].astype(np.int64), depth))
    if not found:
        none = np.empty(0, np.int64)
        return Fragments(none, none, none, np.empty(0))
    return Fragments(*(np.concatenate(parts) for parts in zip(*found, strict=True)))
