"""``python -m benchmarks.speed.backbones``: how fast trained networks are, beside how accurate they are.

Images a second of the forward pass in evaluation mode, BatchNorm folded into convolutions. The networks take turns in every
repeat; the first turn warms up. Accuracies are read from runs or from a file of the user's: none is known in advance.

Source: USI, arXiv 2204.03475, on the trade-off of speed and accuracy.
Differs: PyTorch's own kernels, where the paper has TensorRT on GPUs and OpenVINO on CPUs; compare on one machine only.
"""

import argparse
import csv
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import cpu_count, getloadavg
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.figures import COLORS, save
from benchmarks.runs import Run, threads
from benchmarks.speed.results import machine
from fedvision.assembly import Assembly
from fedvision.backbones import backbone, resolution
from fedvision.errors import FedVisionError, RunError
from fedvision.files import write_atomically
from fedvision.folding import folded
from fedvision.seeds import generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ABSENT = "–"


@dataclass(frozen=True)
class Backbone:
    """A network to time.

    Attributes:
        name: for tables.
        network: in evaluation mode.
        image_shape: (channels, height, width) of its input.
        accuracy: fraction of a test set; None: not known.
        source: of the accuracy, in words.
    """

    name: str
    network: nn.Module
    image_shape: tuple[int, ...]
    accuracy: float | None = None
    source: str = ""

    @property
    def parameters(self) -> int:
        """How many it has."""
        return sum(param.numel() for param in self.network.parameters())


@dataclass(frozen=True)
class How:
    """How networks are timed.

    Attributes:
        batch: images a forward pass.
        repeats: timed passes of each network, beside the first.
        threads: of the CPU.
        dtype: of weights and images.
        device: where they are.
        fold: whether BatchNorm is folded into convolutions.
    """

    batch: int = 32
    repeats: int = 10
    threads: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    fold: bool = True


@dataclass(frozen=True)
class Row:
    """What was measured of one network: the median, least and most images a second over the repeats."""

    name: str
    accuracy: float | None
    source: str
    parameters: int
    image_shape: tuple[int, ...]
    images_a_second: float
    least: float
    most: float


# ---- networks -------------------------------------------------------------------------------------------------------


def of_run(path: Path) -> Backbone:
    """The network that a finished run trained, with its accuracy on the test set after the last round.

    Raises:
        RunError: the folder holds no finished run, or one that measured no accuracy on a test set.
    """
    run = Run.open(path)
    assembly = Assembly.of(run.experiment)
    assembly.holdings.load(assembly.model, run.state)
    known = run.rounds.reindex(columns=["test_accuracy"])["test_accuracy"].dropna()
    if known.empty:
        raise RunError(f"{path} holds no test_accuracy; give a run that evaluates a test set")
    network: Any = assembly.model
    for part in ("network", "backbone"):  # of learners that keep averages, teachers, heads beside it
        network = getattr(network, part, network)
    spec = assembly.data.spec
    return Backbone(_called(run, path), network.eval().float().cpu(), spec.image_shape, float(known.iloc[-1]), f"run {path.name}")


def _called(run: Run, path: Path) -> str:
    """A network by its learner's model, and by its widths where it has any; by its run where the learner names no model."""
    chosen = run.experiment.learner.settings
    widths = (chosen.get("widths") or chosen.get("hidden") or ()) if chosen.get("model") in ("cnn", "mlp") else ()
    name = str(chosen.get("model") or path.name)
    return " ".join([name, "-".join(map(str, widths))]).strip()


def of_timm(name: str, classes: int = 1000, side: int | None = None) -> Backbone:
    """A timm model with random weights, at its own resolution if none is given: how fast it is, not how accurate.

    Raises:
        ExperimentError: unknown name, or a resolution that it cannot take.
    """
    network = backbone(name, classes, 3, side, generator(0, "backbone")).eval()
    return Backbone(name, network, (3, *(side or resolution(name),) * 2))


def accuracies(path: Path) -> dict[str, float]:
    """Accuracies by name: a CSV file with the columns ``name`` and ``accuracy``, or a JSON object of numbers.

    Raises:
        RunError: a file of another form, or an accuracy that is no fraction.
    """
    try:
        text = path.read_text(encoding="utf-8")
        pairs = json.loads(text) if path.suffix == ".json" else {row["name"]: row["accuracy"] for row in csv.DictReader(text.splitlines())}
        found = {name: float(value) for name, value in pairs.items()}
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        expected = "a CSV file with the columns name and accuracy, or a JSON object of numbers"
        raise RunError(f"{path} cannot be read ({error!r}); give {expected}") from error
    odd = {name: value for name, value in found.items() if not 0 <= value <= 1}
    if odd:
        raise RunError(f"{path} has accuracies {odd}; write fractions in [0, 1], such as 0.81 for 81%")
    return found


# ---- measuring ------------------------------------------------------------------------------------------------------


def measured(backbones: Sequence[Backbone], how: How) -> list[Row]:
    """Time all networks, taking turns."""
    with threads(how.threads), torch.inference_mode():
        passes = [_prepared(backbone, how) for backbone in backbones]
        for each in passes:
            _seconds(*each, how)
        turns = [[_seconds(*each, how) for each in passes] for _ in range(how.repeats)]
    speeds = [[how.batch / turn[at] for turn in turns] for at in range(len(backbones))]
    return [_row(backbone, speed) for backbone, speed in zip(backbones, speeds, strict=True)]


def _row(backbone: Backbone, speeds: Sequence[float]) -> Row:
    found = (median(speeds), min(speeds), max(speeds))
    return Row(backbone.name, backbone.accuracy, backbone.source, backbone.parameters, backbone.image_shape, *found)


def _prepared(backbone: Backbone, how: How) -> tuple[nn.Module, torch.Tensor]:
    images = torch.rand(how.batch, *backbone.image_shape, generator=generator(0, "images"))
    network = folded(backbone.network, images[:1]) if how.fold else backbone.network
    if len(backbone.image_shape) == 3 and how.device == "cpu":
        network, images = network.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.to(how.device, DTYPES[how.dtype]), images.to(how.device, DTYPES[how.dtype])


def _seconds(network: nn.Module, images: torch.Tensor, how: How) -> float:
    start = time.perf_counter()
    network(images)
    if how.device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


# ---- telling --------------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """A table, fastest first, below what it was measured on."""
    lines = ["; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in about.items()) + ".", ""]
    lines += [
        "| network | images a second | least to most | accuracy | parameters | input | accuracy from |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -row.images_a_second):
        accuracy = ABSENT if row.accuracy is None else f"{100 * row.accuracy:.1f}%"
        shape, spread = "x".join(map(str, row.image_shape)), f"{row.least:,.1f} to {row.most:,.1f}"
        cells = [row.name, f"{row.images_a_second:,.1f}", spread, accuracy, f"{row.parameters:,}", shape, row.source or ABSENT]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(rows: Sequence[Row], about: Mapping[str, Any]) -> "Figure | None":
    """Accuracy by images a second, a point a network; the line joins those that no other beats in both. None without accuracies."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    known = [row for row in rows if row.accuracy is not None]
    if not known:
        return None
    drawn = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = drawn.subplots()
    best = frontier(known)
    axes.plot(*_points(best), color=COLORS[0], linewidth=1.2, alpha=0.6, zorder=1)
    for row in known:
        x, y = row.images_a_second, 100 * (row.accuracy or 0)
        axes.errorbar(x, y, xerr=[[x - row.least], [row.most - x]], fmt="o", color=COLORS[0] if row in best else COLORS[5], capsize=2)
        axes.annotate(row.name, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlabel=_axis(about), ylabel="test accuracy, %")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.3, y=0.2)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


def frontier(rows: Sequence[Row]) -> list[Row]:
    """Those that no other beats in both speed and accuracy, fastest first."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (-row.images_a_second, -(row.accuracy or 0))):
        if not best or (row.accuracy or 0) > (best[-1].accuracy or 0):
            best.append(row)
    return best


def _points(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row.images_a_second for row in rows], [100 * (row.accuracy or 0) for row in rows]


def _axis(about: Mapping[str, Any]) -> str:
    counted = f"{about['threads']} thread{'s' if about['threads'] > 1 else ''}" if about["device"] == "cpu" else about["device"]
    return f"images a second ({counted}, {about['dtype']}, batch {about['batch']}), log scale"


def write(rows: Sequence[Row], about: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``backbones.md``, ``backbones.json`` and, if an accuracy is known, ``backbones.png``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps({"about": about, "backbones": [asdict(row) for row in rows]}, indent=1) + "\n"
    texts = {folder / "backbones.md": markdown(rows, about), folder / "backbones.json": numbers}
    for path, text in texts.items():
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))  # type: ignore[misc]
    picture = figure(rows, about)
    return [*texts, *([] if picture is None else [save(picture, folder / "backbones.png")])]


# ---- the command line -----------------------------------------------------------------------------------------------


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.backbones", description="Speed of networks beside their accuracy.")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--models", default="", help="timm models with random weights, e.g. resnet50,mobilenetv3_large_100")
    parser.add_argument("--accuracies", type=Path, help="CSV (name, accuracy) or JSON file for --models; without, speed only")
    parser.add_argument("--resolution", type=int, help="of --models; their own if not given")
    parser.add_argument("--batch", type=int, default=How.batch)
    parser.add_argument("--repeats", type=int, default=How.repeats, help="beside one that warms up")
    parser.add_argument("--threads", type=int, default=How.threads)
    parser.add_argument("--dtype", choices=DTYPES, default=How.dtype)
    parser.add_argument("--device", default=How.device)
    parser.add_argument("--no-folding", action="store_true", help="leave BatchNorm as it is")
    parser.add_argument("--out", type=Path, default=Path("bench/backbones"), help="folder of the table, the numbers and the picture")
    chosen = parser.parse_args(arguments)
    if not chosen.runs and not chosen.models:
        parser.error("give folders of runs, or --models")
    return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, write it and print the table."""
    chosen = options(arguments)
    how = How(chosen.batch, chosen.repeats, chosen.threads, chosen.dtype, chosen.device, not chosen.no_folding)
    known = accuracies(chosen.accuracies) if chosen.accuracies else {}
    named = [of_timm(name.strip(), side=chosen.resolution) for name in chosen.models.split(",") if name.strip()]
    backbones = [of_run(path) for path in chosen.runs] + [_with_accuracy(each, known, chosen.accuracies) for each in named]
    about = {**asdict(how), "load at the start": f"{getloadavg()[0]:.1f} of {cpu_count()} cores", **_computer(how.device)}
    rows = measured(backbones, how)
    for path in write(rows, about, chosen.out):
        print(path)
    print(markdown(rows, about))


def _with_accuracy(backbone: Backbone, known: Mapping[str, float], file: Path | None) -> Backbone:
    if backbone.name not in known:
        return backbone
    return Backbone(backbone.name, backbone.network, backbone.image_shape, known[backbone.name], str(file))


def _computer(device: str) -> dict[str, str]:
    gpu = {"GPU": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {}
    return {**{name: value for name, value in machine().items() if name in ("CPU", "cores", "torch", "Python")}, **gpu}


if __name__ == "__main__":
    try:
        main()
    except FedVisionError as error:
        raise SystemExit(f"error: {error}") from None
