"""The command line. What takes seconds to import is imported by the command that needs it."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.deploy.commands import app as deploy
from fedvision.errors import FedVisionError

FAILED, CLIENTS_FAILED, INTERRUPTED = 1, 3, 130
"""Exit statuses: an error; finished, but some clients' answers were lost or refused; stopped by Ctrl-C."""

console = Console()
complaints = Console(stderr=True)
app = typer.Typer(
    name="fedvision",
    help="Federated learning for computer vision: run experiments, compare strategies.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(deploy)

ExperimentArgument = Annotated[str, typer.Argument(help="An experiment file, or the name of a bundled experiment (see `fedvision list`).")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a value, e.g. --set strategy.fraction=0.5. May be repeated."),
]


def main() -> None:
    """Run the command line; errors that a user can mend are printed without a traceback."""
    debug = "--debug" in sys.argv
    _quieten(debug)
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a script's background job was told to ignore the first
        signal.signal(number, _interrupt)
    try:
        app([argument for argument in sys.argv[1:] if argument != "--debug"], standalone_mode=True)
    except FedVisionError as error:
        _complain(str(error), debug)
        sys.exit(FAILED)
    except Exception as error:
        _complain(f"{type(error).__name__}: {error}\n(this is not an error that FedVision expects; --debug shows where it happened)", debug)
        sys.exit(FAILED)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and log messages.")] = False,
) -> None:
    """Federated learning for computer vision: run experiments, compare strategies."""


class Layout(StrEnum):
    """Of exported weights."""

    multimae = "multimae"
    albef = "albef"
    leopart = "leopart"
    timm = "timm"


@app.command()
def run(
    experiment: ExperimentArgument,
    overrides: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/NAME-FINGERPRINT if not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that the folder holds.")] = False,
    initial: Annotated[Path | None, typer.Option(help="Start from the weights of this safetensors file.")] = None,
) -> None:
    """Run one experiment: train, evaluate, record, draw."""
    from benchmarks import display, runs
    from fedvision.experiment import Experiment, parse_overrides

    resolved = Experiment.load(experiment, parse_overrides(overrides or []))
    with (
        _interruptible("everything up to the last checkpoint is kept; go on with --resume"),
        display.of_rounds(console, resolved) as on_round,
    ):
        done = runs.run(resolved, initial=initial, out=out, resume=resume, on_round=on_round)
    display.print_summary(console, done)
    failed = int(done.rounds["failures"].sum())
    if failed:
        complaints.print(f"[yellow]{failed} answers of clients were lost or refused[/]: {display.failed_clients(done)}", soft_wrap=True)
        raise typer.Exit(CLIENTS_FAILED)


@app.command()
def bench(
    suite: Annotated[str, typer.Argument(help="A suite file, or the name of a bundled suite (see `fedvision list suites`).")],
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds, instead of the suite's own number.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this strategy or experiment of the suite. May be repeated.")] = None,
    overrides: SetOption = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time; one a core if not given.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The suite's small form.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; bench/NAME if not given.")] = None,
) -> None:
    """Compare strategies: run a suite, or what is missing of it, and report."""
    from benchmarks import bench, display, report
    from benchmarks.suite import Suite
    from fedvision.experiment import parse_overrides

    loaded = Suite.load(suite, quick, seeds, parse_overrides(overrides or [])).only(only or [])
    path = out or Path("bench") / loaded.name
    advice = "finished runs are kept; the same command goes on"
    with _interruptible(advice), display.of_cells(console, loaded, path) as on_progress:
        results = bench.bench(loaded, path, jobs, on_progress)
    report.print_tables(console, results)
    for file in report.write(results):
        console.print(f"{'picture' if file.suffix == '.png' else 'report'}: {file}", soft_wrap=True, highlight=False)
    if results.failures:
        raise typer.Exit(CLIENTS_FAILED)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
) -> None:
    """Print the summary of finished or unfinished runs, and draw their curves side by side."""
    from benchmarks import display, figures
    from benchmarks.runs import Run

    done = [Run.open(path) for path in runs]
    for run in done:
        display.print_summary(console, run)
    if len(done) > 1:
        tables = display.named(done)
        curves = figures.comparison(tables, figures.in_common(tables))
        console.print(f"picture: {figures.save(curves, Path('comparison.png'))}", soft_wrap=True)


@app.command("figures")
def figures_(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    device: Annotated[str | None, typer.Option(help="Where to compute, if not where the run did, e.g. cpu.")] = None,
) -> None:
    """Draw the pictures of a run anew: its curves, its partition, examples, and what its learner shows of its latest model."""
    from benchmarks import pictures

    drawn = pictures.redraw(run, device)
    for remark in drawn.remarks:
        console.print(remark, soft_wrap=True, highlight=False)
    for file in drawn.files:
        console.print(f"picture: {file}", soft_wrap=True, highlight=False)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run of MultiMAE or ALBEF, or of a fine-tuning of theirs.")],
    out: Annotated[Path, typer.Option(help="The file to write: it ends in .safetensors, or in .pth for torch.load.")],
    layout: Annotated[
        Layout | None, typer.Option(help="The paper's checkpoints', or a vision transformer's of timm; the paper's if not given.")
    ] = None,
) -> None:
    """Write a run's model as a file that other programs read."""
    from benchmarks import export

    written = export.export(run, out, layout.value if layout else None)  # type: ignore[arg-type]
    parts = sorted({".".join(name.split(".")[:2]) for name in written.dropped})
    console.print(f"{len(written.state)} arrays in {written.layout}'s layout: {out}", soft_wrap=True, highlight=False)
    if parts:
        console.print(f"without {', '.join(parts)}, for which it has no place", soft_wrap=True, highlight=False)


@app.command()
def diagnose(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    silos: Annotated[tuple[int, int], typer.Option(help="The two silos, by partition id.")] = (0, 1),
    epsilon: Annotated[float, typer.Option(help="How much a silo's loss may differ to count as unchanged.")] = 0.01,
    radius: Annotated[float, typer.Option(help="How far from the model to look, as a share of its norm.")] = 0.1,
) -> None:
    """Score how inconsistent two silos are at a run's final model, by the FedILC paper's inconsistency score."""
    from benchmarks import diagnosis

    found = diagnosis.diagnose(run, silos, epsilon, radius=radius)
    a, b = silos
    console.print(f"inconsistency score of silos {a} and {b}: at least {found.score:.4f} (epsilon {epsilon:g}, radius {radius:g})")
    console.print(f"  where silo {a}'s loss is unchanged, silo {b}'s differs from it by up to {found.within_a:.4f}")
    console.print(f"  where silo {b}'s loss is unchanged, silo {a}'s differs from it by up to {found.within_b:.4f}")


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Argument(help="experiments, suites, strategies, learners, data, partitions, or engines.")] = None,
) -> None:
    """List what an experiment file may name, with one line each."""
    from benchmarks import display

    display.print_names(console, kind)


@app.command()
def data(
    experiment: ExperimentArgument,
    overrides: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the picture; NAME-partition.png if not given.")] = None,
) -> None:
    """Print a card of an experiment's partition and draw it."""
    from benchmarks import display, figures
    from fedvision.experiment import Experiment, parse_overrides

    resolved = Experiment.load(experiment, parse_overrides(overrides or []))
    federated = resolved.load_data()
    display.print_card(console, federated)
    path = out or Path(f"{resolved.name}-partition.png")
    pictures = {path: figures.partition(federated), path.with_stem(f"{path.stem}-examples"): figures.examples(federated)}
    for place, figure in pictures.items():
        if figure is not None:
            console.print(f"picture: {figures.save(figure, place)}", soft_wrap=True)


@app.command()
def vocabulary(
    experiment: ExperimentArgument,
    size: Annotated[int, typer.Option(min=1, help="Tokens at most.")],
    out: Annotated[Path, typer.Option(help="The file to write: one token a line, as BERT's vocab.txt, or a list if it ends in .json.")],
    overrides: SetOption = None,
    least: Annotated[int, typer.Option(min=1, help="A silo reports only words that occur in so many of its examples.")] = 5,
    silos: Annotated[int, typer.Option(min=1, help="Only words that so many silos report are used.")] = 2,
) -> None:
    """Make a vocabulary of the words that are frequent in the silos' training texts; rare ones never leave a silo."""
    from benchmarks import vocabulary
    from fedvision.experiment import Experiment, parse_overrides

    resolved = Experiment.load(experiment, parse_overrides(overrides or []))
    made = vocabulary.write(resolved.load_data(), size, least, silos, out)
    fact = f"{len(made.tokens)} tokens from {len(made.counts)} words that at least {silos} of the silos report"
    console.print(f"{fact}: {out}", soft_wrap=True, highlight=False)
    if made.cut:
        console.print(f"{made.cut} of these words are cut into pieces; a larger --size has more of them whole", soft_wrap=True)


@app.command("pseudo-labels")
def pseudo_labels(
    folder: Annotated[Path, typer.Argument(help="Its pictures are in rgb/, or in train/rgb/ and test/rgb/.")],
    depth: Annotated[str | None, typer.Option(help="Predict depth/ with this network: a folder, or a name on Hugging Face's hub.")] = None,
    semseg: Annotated[str | None, typer.Option(help="Predict semseg/ with this network.")] = None,
    inverse: Annotated[bool, typer.Option("--inverse", help="The depth network predicts more where it is nearer, as most do.")] = False,
    scale: Annotated[float | None, typer.Option(help="The depth network predicts meters: what one is in the files, e.g. 1000.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 8,
) -> None:
    """Predict the depth and semantic maps of pictures that have none, by networks of `transformers`."""
    from benchmarks import display
    from fedvision import pseudo_labels
    from fedvision.errors import ExperimentError

    given = [
        None if depth is None else pseudo_labels.Depth(depth, inverse, scale),
        None if semseg is None else pseudo_labels.Semseg(semseg),
    ]
    wanted = [kind for kind in given if kind is not None]
    if not wanted:
        raise ExperimentError("nothing is wanted: name a network with --depth, with --semseg, or with both")
    if not console.is_terminal:
        pseudo_labels.required().utils.logging.disable_progress_bar()
    pictures, advice = pseudo_labels.count(folder), "maps that are whole are kept; the same command goes on"
    with _interruptible(advice), display.of_maps(console, pictures, len(wanted)) as on_progress:
        made = pseudo_labels.label(folder, wanted, device, batch, on_progress)
    for kind, number in made.items():
        console.print(f"{kind}: {number} maps made, {pictures - number} were there", soft_wrap=True, highlight=False)


@app.command()
def doctor() -> None:
    """Check the installation: versions, devices, optional parts, and how to get what is missing."""
    from benchmarks import doctor

    raise typer.Exit(doctor.examine(console))


@contextmanager
def _interruptible(advice: str) -> Iterator[None]:
    """End with its own exit status and a word of advice when Ctrl-C or SIGTERM stops the block."""
    try:
        yield
    except KeyboardInterrupt:
        complaints.print(f"stopped; {advice}")
        raise typer.Exit(INTERRUPTED) from None


def _complain(message: str, debug: bool) -> None:
    if debug:
        complaints.print_exception()
    complaints.print("[bold red]error:[/] ", end="")
    complaints.print(message, markup=False, highlight=False, soft_wrap=True)


def _quieten(debug: bool) -> None:
    """Keep third parties' chatter off the terminal."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("flwr").setLevel(logging.DEBUG if debug else logging.WARNING)
    logging.getLogger("fedvision.multimae").setLevel(logging.INFO)  # it tells what of a checkpoint a network began with
    for noisy in ("matplotlib", "PIL", "tensorboard", "filelock", "fsspec", "urllib3", "httpx", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _interrupt(number: int, frame: FrameType | None) -> Any:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
