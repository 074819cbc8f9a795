"""Pixels: pictures, depth maps and the owner of every pixel, drawn from layouts; no loop over pictures.

A pixel belongs to the nearest object that its center lies in; where it lies in none it shows the background and nothing
else. Inside an object's outline, within half a pixel of it, what is behind shines through by up to a half, which
smooths edges. Blur and noise come last and change the picture only.

Everything is computed in float64 and rounded once, at the end: machines whose sines differ in the last bits draw the same bytes,
but for a value that lies on the very border between two.
"""

from dataclasses import dataclass

import numpy as np

from fedvision.data.scenes.layouts import SLOTS, Layouts
from fedvision.data.scenes.shapes import SCRAP, Fragments, covered
from fedvision.data.scenes.styles import BACKGROUNDS, TEXTURES

OUTLINE = 0.05
"""Width of an object's dark outline, in its radii; at least 0.6 pixels."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """Some pictures.

    Attributes:
        image: red, green and blue in [0, 1], before blur and noise, [n, 3, h, w].
        owner: which object a pixel shows, 0 .. 3; -1: the background; int8 [n, h, w].
        whole: pixels that each object would have without those before it, [n, 4].
    """

    image: np.ndarray
    owner: np.ndarray
    whole: np.ndarray


def draw(layout: Layouts, size: int) -> Drawn:
    """Pictures of ``size`` x ``size`` pixels."""
    n = len(layout)
    canvas = background(layout, size).transpose(1, 0, 2, 3).reshape(3, -1)
    owner = np.full(n * size * size, -1, np.int8)
    whole = np.zeros((n, SLOTS), np.int64)
    for slot in reversed(range(SLOTS)):  # from the farthest to the nearest
        seen = np.flatnonzero(layout.present[:, slot])
        shape, x, y, radius, angle = (values[seen, slot] for values in (layout.shape, layout.x, layout.y, layout.radius, layout.angle))
        found = covered(shape, x, y, radius, angle, size)
        pixel = (seen[found.of] * size + found.row) * size + found.column
        _blend(canvas, pixel, _surface(layout, seen, slot, found, size), found.depth)
        owner[pixel] = slot
        whole[seen, slot] = np.bincount(found.of, minlength=len(seen))
    return Drawn(canvas.reshape(3, n, size, size).transpose(1, 0, 2, 3), owner.reshape(n, size, size), whole)


def _blend(canvas: np.ndarray, pixel: np.ndarray, color: np.ndarray, depth: np.ndarray) -> None:
    """Paint colors [3, fragments] onto the canvas [3, pixels], half through at the outline."""
    cover = np.minimum(0.5 + depth, 1)
    behind = canvas[:, pixel]
    canvas[:, pixel] = behind + cover * (color - behind)


def _surface(layout: Layouts, seen: np.ndarray, slot: int, found: Fragments, size: int) -> np.ndarray:
    """The colors of an object's pixels [3, fragments]: its paint, its texture, light from the upper left, a dark outline."""
    radius, angle = layout.radius[seen, slot], layout.angle[seen, slot] + layout.grain[seen, slot]
    right = ((found.column + 0.5) / size - layout.x[seen, slot][found.of]) / radius[found.of]
    down = ((found.row + 0.5) / size - layout.y[seen, slot][found.of]) / radius[found.of]
    cos, sin = np.cos(angle)[found.of], np.sin(angle)[found.of]
    tone = _texture(layout.texture[seen, slot][found.of], cos * right + sin * down, cos * down - sin * right)
    width = np.maximum(OUTLINE * radius * size, 0.6)[found.of]
    inner = np.clip(found.depth - width + 0.5, 0, 1)
    light = (1 - 0.1 * (right + down)) * (1 - 0.42 * tone) * (0.35 + 0.65 * inner)
    return np.asarray(np.minimum(layout.paint[seen, slot][found.of].T * light, 1))


def _texture(kind: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How dark the texture is at places of its object, in [0, 1]; x and y in radii, turned by the grain; all [fragments]."""
    tone = np.zeros(len(kind))
    for number, name in enumerate(TEXTURES):
        if name == "plain":
            continue
        here = np.flatnonzero(kind == number)
        u, v = x[here], y[here]
        if name == "striped":
            wave = _wave(1.7 * u)
        elif name == "checkered":
            wave = 4 * _wave(1.3 * u + 0.1) * _wave(1.3 * v + 0.1)
        elif name == "dotted":
            wave = 0.9 - np.hypot(_wave(1.6 * u + 0.5) + 1, _wave(1.6 * v + 0.5) + 1)
        else:
            wave = _wave(1.9 * v + 0.45 * _wave(1.6 * u))
        tone[here] = np.clip(0.5 + 1.5 * wave, 0, 1)
    return tone


def _wave(x: np.ndarray) -> np.ndarray:
    """A triangle wave of period 1 between -1 (at whole numbers) and 1."""
    return np.asarray(1 - 4 * np.abs(x - np.floor(x) - 0.5))


# ---- backgrounds ----------------------------------------------------------------------------------------------------


def background(layout: Layouts, size: int) -> np.ndarray:
    """The pictures without their objects: wall, floor, pattern, clutter, [n, 3, size, size] in [0, 1]."""
    at = (np.arange(size) + 0.5) / size
    floor = np.clip((at - layout.skirting[:, None]) * size + 0.5, 0, 1)[:, None, :, None]
    wall, ground = layout.walls[:, 0, :, None, None], layout.walls[:, 1, :, None, None]
    shade = 1 + 0.25 * np.maximum(at - layout.skirting[:, None], 0)[:, None, :, None]
    image = (wall + floor * (ground - wall)) * (shade * (1 + _pattern(layout, at)[:, None]))
    _clutter(layout, image, size)
    return np.asarray(np.clip(image, 0, 1, out=image))


def _pattern(layout: Layouts, at: np.ndarray) -> np.ndarray:
    """How much brighter each pixel is than plain paint, about -0.2 .. 0.2, [n, size, size]."""
    tone = np.zeros((len(layout), len(at), len(at)))
    for number, name in enumerate(BACKGROUNDS):
        some = np.flatnonzero(layout.background == number)
        if name != "plain" and len(some):
            tone[some] = _PATTERNS[name](layout.weave[some], *_ground(layout, some, at), at)
    return tone


def _ground(layout: Layouts, some: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Meters along the floor, or the wall, per share of the side, and away from the camera: both [some, size, 1]."""
    away = _away(layout.horizon[some], layout.skirting[some], layout.camera[some], at)[:, :, None]
    return away / away.max(axis=1, keepdims=True), away


def _gradient(weave: np.ndarray, near: np.ndarray, away: np.ndarray, at: np.ndarray) -> np.ndarray:
    angle = 2 * np.pi * weave[:, 0, None, None]
    return np.asarray(0.5 * (np.cos(angle) * (at - 0.5) + np.sin(angle) * (at - 0.5)[:, None]) + 0 * near)


def _stripes(weave: np.ndarray, near: np.ndarray, away: np.ndarray, at: np.ndarray) -> np.ndarray:
    across = (at - 0.5) * near * (5 + 5 * weave[:, 0, None, None]) * (1 + (near < 1))
    return np.asarray(0.14 * np.clip(2 * _wave(across + weave[:, 1, None, None]), -1, 1) * np.minimum(1, 4 * near))


def _tiles(weave: np.ndarray, near: np.ndarray, away: np.ndarray, at: np.ndarray) -> np.ndarray:
    frequency = 0.5 + 0.4 * weave[:, 0, None, None]
    wall = near >= 1
    across = np.where(wall, 8, away) * (at - 0.5) * frequency + weave[:, 1, None, None]
    along = np.where(wall, 8 * at[:, None], away) * frequency + weave[:, 2, None, None]
    fading = np.where(wall, 0.6, np.minimum(1, 2.5 / away))
    return np.asarray(0.13 * fading * np.clip(5 * _wave(across), -1, 1) * np.clip(5 * _wave(along), -1, 1))


def _clouds(weave: np.ndarray, near: np.ndarray, away: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Three plane waves; cos(a + b) as products of functions of rows and of columns."""
    tone = np.zeros((len(weave), len(at), len(at)))
    for wave in range(3):
        turn, phase = 2 * np.pi * weave[:, wave, None], 2 * np.pi * weave[:, wave + 3, None]
        rate = 2 * np.pi * (1.3 + 1.1 * wave)
        row, column = rate * np.sin(turn) * at + phase, rate * np.cos(turn) * at
        tone += (0.12 - 0.025 * wave) * (
            np.cos(row)[:, :, None] * np.cos(column)[:, None, :] - np.sin(row)[:, :, None] * np.sin(column)[:, None, :]
        )
    return tone


_PATTERNS = {"gradient": _gradient, "stripes": _stripes, "tiles": _tiles, "clouds": _clouds}


def _clutter(layout: Layouts, image: np.ndarray, size: int) -> None:
    """Paint the scraps onto the backgrounds, one of each picture after the other."""
    n = len(layout)
    for scrap in range(layout.scraps.shape[1]):
        x, y, radius, angle = layout.scraps[:, scrap].T
        found = covered(np.full(n, SCRAP), x, y, radius, angle, size)
        cover = np.minimum(0.5 + found.depth, 1)[:, None]
        behind = image[found.of, :, found.row, found.column]
        image[found.of, :, found.row, found.column] = behind + cover * (layout.scrap_paint[:, scrap][found.of] - behind)


# ---- depth, blur, noise ---------------------------------------------------------------------------------------------


def depth_maps(layout: Layouts, owner: np.ndarray) -> np.ndarray:
    """Meters to what each pixel shows, float32 [n, size, size]; objects face the camera and are flat."""
    size = owner.shape[1]
    rows = _away(layout.horizon, layout.skirting, layout.camera, (np.arange(size) + 0.5) / size)
    return np.where(owner < 0, rows[:, :, None], _of_owner(layout.depth, owner)).astype(np.float32)


def semantic_maps(layout: Layouts, owner: np.ndarray) -> np.ndarray:
    """1 + the class of the object that a pixel shows; 0: the background; uint8 [n, size, size]."""
    return np.where(owner < 0, 0, 1 + _of_owner(layout.category, owner)).astype(np.uint8)


def _of_owner(values: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """The value [n, slots] of each pixel's object, [n, size, size]."""
    index = np.maximum(owner, 0) + SLOTS * np.arange(len(owner))[:, None, None]
    return np.asarray(values.ravel()[index])


def _away(horizon: np.ndarray, skirting: np.ndarray, camera: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Meters to the floor, or the wall behind it, in each row [n, size]."""
    return np.asarray(camera[:, None] / (np.maximum(at, skirting[:, None]) - horizon[:, None]))


def blurred(image: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Images [n, 3, h, w], each under a Gaussian of its own deviation [n] in pixels; edges are continued."""
    reach = int(np.ceil(2.5 * deviation.max(initial=0)))
    if reach == 0:
        return image
    away = np.arange(-reach, reach + 1)
    weights = np.where(deviation[:, None] > 0, np.exp(-((away / np.maximum(deviation[:, None], 1e-6)) ** 2) / 2), away == 0)
    weights = (weights / weights.sum(axis=1, keepdims=True))[:, None, None, :]
    for axis in (2, 3):
        length, reaches = image.shape[axis], [(reach, reach) if a == axis else (0, 0) for a in range(4)]
        padded = np.pad(image, reaches, mode="edge")
        shifted = (padded[:, :, i : i + length] if axis == 2 else padded[:, :, :, i : i + length] for i in range(2 * reach + 1))
        image = sum(weights[..., i : i + 1] * part for i, part in enumerate(shifted))
    return image


def quantized(image: np.ndarray) -> np.ndarray:
    """Values in [0, 1], or beyond, as uint8."""
    return np.asarray(np.floor(255 * np.clip(image, 0, 1) + 0.5).astype(np.uint8))
