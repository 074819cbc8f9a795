"""Figures of a run and of a comparison."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fedvision.data import FederatedData
from fedvision.data.card import class_counts
from fedvision.files import write_atomically
from fedvision.gallery import SIDE, Gallery, Picture, enlarged
from server.folder import RunFolder
from server.record import read_rows
from server.rounds import complete

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmarks.suite import Sweep

COLORS = ["#2563a8", "#d1495b", "#2a9d6f", "#b8860b", "#7b4ea3", "#4b5563", "#e07b39", "#0f9bb0"]
"""One color a strategy, in order; when they are used up, they come again with the next of LINES or HATCHES."""

LINES = ["-", "--", ":", "-."]
HATCHES = ["", "///", "...", "xxx"]

RIGHTNESS = {"accuracy": "accuracy", "miou": "mIoU", "delta1": "share of depths within a quarter"}
"""Metrics of how right a model is, the first of which a run's curves show, and what their axes are called."""

PARTS = {"train": "training silos", "validation": "silo validation", "test": "test"}
MOST_CLIENTS = 60
"""The partition's picture shows so many clients at most."""


def of_run(folder: RunFolder, data: FederatedData, galleries: Mapping[str, Gallery] | None = None) -> list[Path]:
    """The pictures of one run: its curves, its partition, some examples, and what its learner shows.

    Args:
        folder: of the run.
        data: that it was made with.
        galleries: its learner's, by name.
    """
    rounds = pd.DataFrame([complete(row) for row in read_rows(folder.rounds)])
    drawn = {"curves": curves(rounds) if len(rounds) else None, "partition": partition(data), "examples": examples(data)}
    drawn |= {name: gallery(shown) for name, shown in (galleries or {}).items()}
    return [save(figure, folder.figures / f"{name}.png") for name, figure in drawn.items() if figure is not None]


def curves(rounds: pd.DataFrame) -> "Figure":
    """Loss by round, and how right the model is, one line for each set of examples they were measured on."""
    metrics = ["loss", *(metric for metric in RIGHTNESS if _measured(rounds, metric))][:2]
    figure, panels = _panels(len(metrics))
    for axes, metric in zip(panels, metrics, strict=True):
        for color, (part, label) in zip(COLORS, PARTS.items(), strict=False):
            name = f"{part}_{metric}"
            shown = rounds.reindex(columns=["round", name]).dropna()
            if len(shown) > 1 or len(shown) == len(rounds):
                axes.plot(shown["round"], shown[name], color=color, label=label, marker="o" if len(shown) == 1 else None)
        _whole_numbers(axes)
        axes.set(xlabel="round", ylabel=RIGHTNESS.get(metric, metric))
        _legend(axes)
    return figure


def _measured(rounds: pd.DataFrame, metric: str) -> bool:
    return any(f"{part}_{metric}" in rounds and rounds[f"{part}_{metric}"].notna().any() for part in PARTS)


def partition(data: FederatedData) -> "Figure | None":
    """Examples of each class that each client holds, as stacked bars; None if no example is labeled."""
    from matplotlib import colormaps

    shown = min(data.num_clients, MOST_CLIENTS)
    counts = class_counts(data.train, data.classes)
    if not counts.any():
        return None
    figure, (axes,) = _panels(1, width=min(4.0 + 0.25 * shown, 12.0))
    left = np.zeros(shown)
    palette = colormaps["tab20" if data.classes > 10 else "tab10"]
    for label in range(data.classes):
        axes.bar(range(shown), counts[:shown, label], bottom=left, color=palette(label % palette.N), label=f"class {label}", width=0.8)
        left += counts[:shown, label]
    more = f" (the first {shown} of {data.num_clients})" if shown < data.num_clients else ""
    axes.set(xlabel=f"client{more}", ylabel="training examples", title=f"Partition of {data.name}")
    axes.margins(x=0.02)
    _whole_numbers(axes)
    if data.classes <= 20:
        axes.legend(frameon=False, fontsize=8, bbox_to_anchor=(1.0, 1.0), loc="upper left", ncols=1 + (data.classes > 10))
    return figure


def examples(data: FederatedData, shown: int = 8) -> "Figure | None":
    """The first examples of each client and of the test set, a row each; None for inputs that are no images.

    One channel is shown in gray, two as red and green, three as they are; others are averaged.
    """
    if len(data.spec.image_shape) != 3:
        return None
    rows = {f"client {client}": data.train[client][:shown] for client in range(min(data.num_clients, 10))} | {"test": data.test[:shown]}
    figure, panels = _panels(1, width=0.55 * shown + 1.2, height=0.55 * len(rows) + 0.5)
    axes = panels[0]
    side = max(data.spec.image_shape[1:]) + 2
    canvas = np.ones((side * len(rows), side * shown, 3))
    for row, batch in enumerate(rows.values()):
        for column, image in enumerate(_pixels(batch.image.cpu().numpy())):
            height, width = image.shape[:2]
            canvas[row * side : row * side + height, column * side : column * side + width] = image
    axes.imshow(canvas)
    axes.grid(False)
    axes.set(xticks=[], yticks=side * np.arange(len(rows)) + side / 2 - 1, yticklabels=list(rows), title=f"Examples of {data.name}")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def _pixels(images: np.ndarray) -> np.ndarray:
    """Images [n, channels, height, width] of any range as RGB [n, height, width, 3] in [0, 1]."""
    low, high = images.min(), images.max()
    scaled = (images - low) / max(high - low, 1e-12)
    if images.shape[1] == 2:
        scaled = np.concatenate([scaled, np.zeros_like(scaled[:, :1])], axis=1)
    elif images.shape[1] != 3:
        scaled = scaled.mean(axis=1, keepdims=True).repeat(3, axis=1)
    return np.asarray(scaled.transpose(0, 2, 3, 1))


def gallery(shown: Gallery) -> "Figure":
    """Pictures in rows and columns, with titles and notes; small ones are enlarged by whole factors, so that their pixels stay crisp."""
    from matplotlib.figure import Figure

    places = _Places.of(shown)
    high, wide = places.tops[-1], places.width * len(shown.columns)
    above = [_wrapped(title, places.width - GAP) for title in shown.columns]
    caption = textwrap.fill(shown.caption, max(wide // LETTER, 40))
    left, top, bottom = LETTER * max(map(len, shown.rows)) + 4 * GAP, _lines(*above), _lines(caption)
    across, down = left + max(wide, LETTER * min(len(shown.caption), 40)), top + high + bottom
    figure = Figure(figsize=(across / DPI, down / DPI), dpi=DPI)
    axes = figure.add_axes((left / across, bottom / down, wide / across, high / down))
    axes.imshow(places.canvas(), interpolation="nearest", aspect="auto")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=SMALL)
    axes.set_xticks((np.arange(len(above)) + 0.5) * places.width - GAP / 2, above, parse_math=False)
    axes.set_yticks([start + (places.height - GAP) / 2 for start in places.tops[:-1]], shown.rows, parse_math=False)
    for (x, y, alignment), note in places.notes():
        axes.text(x, y, note, fontsize=SMALL, ha="center", va=alignment, parse_math=False)
    figure.text(left / across, 2 * GAP / down, caption, fontsize=SMALL, color=COLORS[5], va="bottom", parse_math=False)
    return figure


DPI = 150
"""Of all pictures."""

GAP, LETTER, LINE, SMALL = 6, 9, 22, 7.5
"""Of galleries, in pixels: what is between pictures, the width and height of a letter; and a letter's size in points."""


@dataclass(frozen=True)
class _Places:
    """Where the pictures and notes of a gallery are, in pixels from its upper left corner.

    Attributes:
        cells: by row and column, a picture as it is shown, and what is under it; or, where there is no picture, in its place.
        height: of each row's pictures, with a gap.
        width: of each column, with a gap.
        tops: of each row, and where the last one ends.
    """

    cells: list[list[tuple[Picture | None, str]]]
    height: int
    width: int
    tops: list[int]

    @classmethod
    def of(cls, shown: Gallery) -> "_Places":
        """A row is as high as its notes need."""
        rows = [[None if picture is None else enlarged(picture) for picture in row] for row in shown.pictures]
        sides = [picture.shape[:2] for row in rows for picture in row if picture is not None] or [(SIDE, SIDE)]
        height, width = (max(lengths) + GAP for lengths in zip(*sides, strict=True))
        notes = shown.notes or [[""] * len(row) for row in rows]
        cells = [
            [(picture, _wrapped(note, width - GAP)) for picture, note in zip(*both, strict=True)] for both in zip(rows, notes, strict=True)
        ]
        needed = [max(height * (picture is not None) + _note(note) for picture, note in row) for row in cells]
        return cls(cells, height, width, [0, *accumulate(max(height, row) for row in needed)])

    def canvas(self) -> Picture:
        """All pictures on white, each in the middle of its place."""
        canvas = np.full((self.tops[-1], self.width * len(self.cells[0]), 3), 255, np.uint8)
        for top, row in zip(self.tops, self.cells, strict=False):
            for column, (picture, _) in enumerate(row):
                if picture is not None:
                    high, wide = picture.shape[:2]
                    y, x = top + (self.height - GAP - high) // 2, column * self.width + (self.width - GAP - wide) // 2
                    canvas[y : y + high, x : x + wide] = picture
        return canvas

    def notes(self) -> Iterator[tuple[tuple[float, float, str], str]]:
        """Each note and where it is: across its middle, and down its top under a picture, its middle without one."""
        for (top, end), row in zip(pairwise(self.tops), self.cells, strict=True):
            for column, (picture, note) in enumerate(row):
                across = (column + 0.5) * self.width - GAP / 2
                if note:
                    yield (across, (top + end) / 2, "center") if picture is None else (across, top + self.height, "top"), note


def _wrapped(text: str, width: int) -> str:
    """A text in lines that are at most so many pixels wide, a letter at least; its own line breaks stay."""
    for letters in range(max(width // LETTER * 2, 1), 0, -1):
        lines = [part for line in text.split("\n") for part in textwrap.wrap(line, letters) or [""]]
        if max(map(_width, lines)) <= width:
            break
    return "\n".join(lines)


def _width(line: str) -> float:
    """Pixels that a line needs from left to right."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    wide, _, _ = TextToPath().get_text_width_height_descent(line, FontProperties(size=SMALL), ismath=False)
    return float(wide) * DPI / 72


def _note(text: str) -> int:
    """Pixels that a note needs from top to bottom, with a gap."""
    return LINE * (text.count("\n") + 1) + 2 * GAP if text else 0


def _lines(*texts: str) -> int:
    """Pixels that the longest of some texts needs from top to bottom, with a margin."""
    return LINE * max(text.count("\n") + 1 if text else 0 for text in texts) + 3 * GAP


def comparison(runs: Mapping[str, list[pd.DataFrame]], metrics: Mapping[str, str], title: str = "", clock: str | None = None) -> "Figure":
    """A metric by round for several named groups of runs: the mean over each group, and a band of one standard deviation.

    Args:
        runs: the tables of rounds of each group, one a seed.
        metrics: column -> axis label, one panel each.
        title: above the panels.
        clock: the column of a round's seconds; curves run over its sum, in the mean over each group, instead of rounds.
    """
    figure, panels = _panels(len(metrics))
    figure.suptitle(title)
    for axes, (column, label) in zip(panels, metrics.items(), strict=True):
        for look, (name, tables) in zip(_looks(len(runs)), runs.items(), strict=True):
            table = pd.concat([rounds.set_index("round")[column] for rounds in tables], axis=1).dropna(how="all")
            mean, deviation = table.mean(axis=1), table.std(axis=1, ddof=1 if len(tables) > 1 else 0)
            x = mean.index if clock is None else _elapsed(tables, clock).reindex(mean.index)
            axes.plot(x, mean, label=name, marker="o" if len(mean) == 1 else None, **look)
            axes.fill_between(x, mean - deviation, mean + deviation, color=look["color"], alpha=0.15, linewidth=0)
        if clock is None:
            _whole_numbers(axes)
        axes.set(xlabel="round" if clock is None else clock.replace("_", " "), ylabel=label)
    _legend(panels[-1], outside=True)
    return figure


def in_common(runs: Mapping[str, list[pd.DataFrame]], further: Sequence[str] = ()) -> dict[str, str]:
    """What ``comparison`` can show of all of these runs: the test loss, and how right the models are; column -> axis label.

    Args:
        runs: the tables of rounds of each group.
        further: columns to show too; there are three panels at most.
    """
    tables = [table for group in runs.values() for table in group]
    usual = {f"test_{metric}": f"test {label}" for metric, label in {"loss": "loss", **RIGHTNESS}.items()}
    asked = usual | {column: column.replace("_", " ") for column in further if column not in usual}
    held = [column for column in asked if all(column in table and table[column].notna().any() for table in tables)]
    return {column: asked[column] for column in held[:3]}


def _elapsed(tables: list[pd.DataFrame], clock: str) -> pd.Series:
    """By round: the seconds since the beginning, in the mean over several runs."""
    return pd.concat([rounds.set_index("round")[clock].fillna(0).cumsum() for rounds in tables], axis=1).mean(axis=1)


def environments(accuracies: Mapping[str, pd.DataFrame], title: str = "") -> "Figure":
    """Accuracy in each environment as groups of bars, one bar a strategy, with one standard deviation.

    Args:
        accuracies: strategy -> one row a seed, one column an environment.
        title: above the panel.
    """
    names = list(next(iter(accuracies.values())).columns)
    figure, (axes,) = _panels(1, width=min(3.0 + 0.12 * len(names) * len(accuracies) + 2.0, 14.0))
    width = 0.8 / len(accuracies)
    for i, (label, table) in enumerate(accuracies.items()):
        look: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "hatch": HATCHES[i // len(COLORS) % len(HATCHES)]}
        at = np.arange(len(names)) + (i + 0.5) * width - 0.4
        deviation = table.std(ddof=1) if len(table) > 1 else None
        axes.bar(at, table.mean(), width, yerr=deviation, label=label, error_kw={"linewidth": 0.8}, **look)
    axes.margins(x=0.02)
    axes.set(xlabel="environment", ylabel="validation accuracy", title=title, xticks=range(len(names)), xticklabels=names)
    lowest = min(float(table.min().min()) for table in accuracies.values())
    axes.set_ylim(max(0.0, lowest - 0.1), 1.0)
    _legend(axes, outside=True)
    return figure


def sweep(lines: Mapping[str, pd.DataFrame], asked: "Sweep") -> "Figure":
    """A metric against a swept setting, mean and one standard deviation over seeds.

    Args:
        lines: strategy -> one row a seed, one column a value of the setting.
        asked: the sweep, for labels.
    """
    figure, (axes,) = _panels(1, width=7.5)
    for look, (label, table) in zip(_looks(len(lines)), lines.items(), strict=True):
        values, deviation = np.asarray(table.columns, dtype=float), table.std(ddof=1) if len(table) > 1 else None
        axes.errorbar(values, table.mean(), yerr=deviation, label=label, marker="o", capsize=3, **look)
    positive = [value for value in asked.values if value > 0]
    if positive and max(positive) / min(positive) > 20:
        axes.set_xscale("symlog", linthresh=min(positive))
    axes.set(xlabel=asked.key.split(".")[-1].replace("_", " "), ylabel=asked.metric.replace("_", " "), title=asked.title)
    _legend(axes, outside=True)
    return figure


def save(figure: "Figure", path: Path) -> Path:
    """Write a figure as PNG, atomically."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=DPI))
    return path


def _panels(number: int, width: float = 5.0, height: float = 3.6) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * number, height), layout="constrained")
    panels: list[Any] = list(np.atleast_1d(figure.subplots(1, number)))
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, panels


def _legend(axes: "Axes", outside: bool = False) -> None:
    if axes.get_legend_handles_labels()[0]:
        place: dict[str, Any] = {"bbox_to_anchor": (1.0, 1.0), "loc": "upper left"} if outside else {}
        axes.legend(frameon=False, fontsize=9, **place)


def _whole_numbers(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def _looks(number: int) -> list[dict[str, Any]]:
    return [{"color": COLORS[i % len(COLORS)], "linestyle": LINES[i // len(COLORS) % len(LINES)]} for i in range(number)]
