"""Colors of classes in pictures: the same everywhere."""

import colorsys

import numpy as np

from fedvision.data.examples import IGNORED

NOTHING = 235
"""The gray of what is not known."""


def palette() -> np.ndarray:
    """A color for each class id, uint8 [256, 3]: neighbors differ much, none is gray but that of what is not known.

    >>> palette()[:2].tolist(), palette()[255].tolist()
    ([[31, 119, 180], [255, 127, 14]], [235, 235, 235])
    """
    first = ["1f77b4", "ff7f0e", "2ca02c", "d62728", "9467bd", "bcbd22", "17becf", "e377c2", "8c564b"]
    colors = [tuple(bytes.fromhex(color)) for color in first]
    for number in range(len(first), IGNORED):
        hue, value = number * 0.618034 % 1, (1.0, 0.75, 0.5)[number % 3]
        colors.append(tuple(round(255 * each) for each in colorsys.hsv_to_rgb(hue, 0.55 + 0.4 * (number % 2), value)))
    return np.array([*colors, (NOTHING,) * 3], np.uint8)
