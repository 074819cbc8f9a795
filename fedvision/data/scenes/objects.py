"""The table of objects: what is where in every picture, as numbers."""

import numpy as np

from fedvision.data.scenes.layouts import SLOTS, Layouts
from fedvision.data.scenes.pixels import Drawn

COLUMNS = ("present", "class", "shape", "color", "texture", "radius", "x", "y", "depth", "visible", "left", "top", "right", "bottom")
"""The columns of the field ``objects``, float32 [n, 4, 14].

Rows come from the nearest to the farthest; those without an object are 0. ``present`` is 1; ``class``, ``shape``, ``color`` and
``texture`` are numbers (in ``SHAPES``, ``COLORS``, ``TEXTURES``); ``radius``, ``x`` and ``y``, of the circle about the object, are in
pixels from the picture's left upper corner; ``depth`` is in meters; ``visible`` is the share of the object's pixels that none
before it hides; ``left``, ``top``, ``right`` and ``bottom`` bound these, in pixels: a box of one pixel has right = left + 1.
"""

MENTIONED = 0.2
"""Objects of which so much is visible count for the field ``labels`` and are mentioned in captions."""


def objects_table(layout: Layouts, drawn: Drawn, size: int) -> np.ndarray:
    """The table of some pictures, float32 [n, 4, columns]."""
    n = len(layout)
    pixels = np.bincount(((drawn.owner + 1) + (SLOTS + 1) * np.arange(n)[:, None, None]).ravel(), minlength=n * (SLOTS + 1))
    visible = pixels.reshape(n, SLOTS + 1)[:, 1:] / np.maximum(drawn.whole, 1)
    named = {
        "present": np.ones((n, SLOTS)),
        "class": layout.category,
        "shape": layout.shape,
        "color": layout.color,
        "texture": layout.texture,
        "radius": layout.radius * size,
        "x": layout.x * size,
        "y": layout.y * size,
        "depth": layout.depth,
        "visible": visible,
    } | dict(zip(COLUMNS[-4:], _boxes(drawn.owner), strict=True))
    table = np.stack([named[column] for column in COLUMNS], axis=2) * layout.present[:, :, None]
    return np.asarray(table.astype(np.float32))


def _boxes(owner: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Left, top, right and bottom of each object's pixels [n, slots]; all 0 where it has none."""
    shown = owner[:, None] == np.arange(SLOTS)[:, None, None]
    rows, columns = shown.any(axis=3), shown.any(axis=2)
    some, size = rows.any(axis=2), owner.shape[1]
    left, top = columns.argmax(axis=2), rows.argmax(axis=2)
    right, bottom = (size - values[..., ::-1].argmax(axis=2) for values in (columns, rows))
    return left * some, top * some, right * some, bottom * some


def multi_hot(table: np.ndarray, classes: int) -> np.ndarray:
    """The classes of the objects that count, uint8 [n, classes] of 0 and 1."""
    category, visible = (table[:, :, COLUMNS.index(name)] for name in ("class", "visible"))
    counts = visible >= MENTIONED
    return np.asarray(((category[:, :, None] == np.arange(classes)) & counts[:, :, None]).any(axis=1).astype(np.uint8))
