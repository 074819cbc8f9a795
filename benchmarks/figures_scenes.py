"""The picture of ``scenes`` in the documentation: ``python -m benchmarks.figures_scenes`` draws ``docs/images/scenes.png`` anew."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
from torch import Tensor

from benchmarks.figures import COLORS, save
from fedvision.cache import VARIABLE
from fedvision.data.examples import CAPTION, DEPTH, ENVIRONMENT, IMAGE, SEMSEG, Examples
from fedvision.data.scenes import FIELDS, SHAPES, SHIFTS, scenes
from fedvision.data.texts import decode_texts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLACE = Path(__file__).resolve().parent.parent / "docs" / "images" / "scenes.png"
DOMAINS, COLUMNS, SIZE = 5, 10, 96
INK = "#1f2937"


def picture() -> "Figure":
    """Rows of domains, one class a column; below, pictures with their depth and semantic maps and captions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 9.9), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[5.2, 4.6], hspace=0.03)
    _domains(parts[0].subplots(1, 1), _drawn(domains=DOMAINS, shift=SHIFTS, shift_strength=0.8, objects=(1, 3)))
    _maps(parts[1].subplots(2, 2), _drawn(objects=(3, 4), fields=FIELDS, draw_seed=3))
    return figure


def _drawn(**settings: Any) -> Examples:
    """Training examples as they are drawn now, whatever the cache holds."""
    with patch.dict(os.environ, {VARIABLE: "off"}):
        return scenes(**{"examples": 100, "test_examples": 1, "size": SIZE, "draw_seed": 4} | settings, rng=np.random.default_rng(0)).train


def _domains(axes: "Axes", examples: Examples) -> None:
    """A row a domain, a column a class."""
    rows = []
    for domain in range(DOMAINS):
        of_domain = examples[examples.fields[ENVIRONMENT] == domain]
        firsts = [int((of_domain.label == label).nonzero()[0]) for label in range(COLUMNS)]
        rows.append([_rgb(of_domain.image[first]) for first in firsts])
    at = _show(axes, rows)
    axes.set_xticks(at[:COLUMNS], [f"{label}: {name}" for label, name in enumerate(SHAPES)][:COLUMNS])
    axes.set_yticks(at[:DOMAINS], [f"domain {domain}" for domain in range(DOMAINS)])


def _maps(panels: Any, examples: Examples) -> None:
    """Four pictures, each with its two maps, and two of its captions below."""
    texts = decode_texts(examples.fields[CAPTION])
    for number, axes in enumerate(panels.flat):
        depth, semseg = examples.fields[DEPTH][number, 0].numpy(), examples.fields[SEMSEG][number].numpy()
        at = _show(axes, [[_rgb(examples.image[number]), _heat(depth), _tinted(semseg)]])
        axes.set_xticks(at[:3], [IMAGE, DEPTH, SEMSEG] if number < 2 else [""] * 3)
        axes.set_yticks([])
        axes.set_xlabel("\n".join(f"“{texts[number][wording]}”" for wording in (0, 1, 4)), fontsize=8, color=INK, style="italic")


def _show(axes: "Axes", rows: list[list[np.ndarray]], gap: int = 6) -> np.ndarray:
    """Draw tiles [SIZE, SIZE, 3] with gaps between them; where the middle of each row and column is."""
    step = SIZE + gap
    canvas = np.full((len(rows) * step - gap, len(rows[0]) * step - gap, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            canvas[i * step : i * step + SIZE, j * step : j * step + SIZE] = tile
    axes.imshow(canvas, interpolation="none")
    axes.xaxis.tick_top()
    _bare(axes)
    return np.arange(max(len(rows), len(rows[0]))) * step + SIZE / 2


def _rgb(image: Tensor) -> np.ndarray:
    return np.asarray(image.permute(1, 2, 0))


def _heat(depth: np.ndarray) -> np.ndarray:
    """Near is light, far is dark, by the logarithm."""
    from matplotlib import colormaps

    far = np.log(depth / depth.min()) / np.log(depth.max() / depth.min())
    return np.asarray(255 * colormaps["magma"](0.97 - 0.9 * far)[..., :3]).astype(np.uint8)


def _tinted(semseg: np.ndarray) -> np.ndarray:
    """A color a class, the background light gray."""
    names = ("#e5e7eb", *COLORS, "#facc15", "#ec4899")
    palette = np.array([[int(name[i : i + 2], 16) for i in (1, 3, 5)] for name in names], np.uint8)
    return np.asarray(palette[semseg])


def _bare(axes: "Axes") -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)


if __name__ == "__main__":
    print(save(picture(), Path(sys.argv[1]) if len(sys.argv) > 1 else PLACE))
