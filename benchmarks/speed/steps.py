"""Steps of networks as large as published: seconds, memory, whether gradients are finite: ``python -m benchmarks.speed.steps``.

Each is a process of its own, so that its memory is its own: weights, what silos begin with, gradients, AdamW's moments.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import nn

import benchmarks
from benchmarks.speed.learners import CAPTION, PRESETS, Preset, drawn
from fedvision.data import Examples, Spec
from fedvision.errors import EngineError
from fedvision.experiment import Experiment
from fedvision.holdings import Holdings
from fedvision.seeds import generator, global_generators
from fedvision.silo import Silo
from fedvision.wordpiece import SPECIAL

VOCABULARY = "a vocabulary"
"""Stands in a preset's changes for the file of a vocabulary as large as BERT's."""

PUBLISHED = {
    "MultiMAE, ViT-B at 224 pixels, 2 pictures": PRESETS["MultiMAE, ViT-B at 224 pixels, 2 pictures"],
    "ALBEF, ViT-B and BERT at 256 pixels, 2 pictures": Preset(
        "albef-tiny",
        Spec((3, 256, 256), 0, ("image", "caption")),
        2,
        {
            "learner.networks": "base",
            "learner.patch": 16,
            "learner.vocabulary": VOCABULARY,
            "learner.dropout": 0.1,
            "learner.deviation": 0.02,
            "learner.xavier": False,
            "learner.momentum": 0.995,
            "learner.ramp": 0.0,
        },
    ),
}


class Step(NamedTuple):
    """What a step takes.

    Attributes:
        seconds: of one, after the first.
        processor_seconds: that all threads together computed; beside other work it tells more than the seconds.
        gibibytes: the most that the process had in memory.
        parameters: of the network, those of slowly moving copies included.
        finite: whether all gradients of the last step are.
    """

    seconds: float
    processor_seconds: float
    gibibytes: float
    parameters: int
    finite: bool


class Clock:
    """When the use of each batch ended: seconds, and those of the processor."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.processor: list[float] = []

    def watched(self, batches: Iterable[Examples]) -> Iterator[Examples]:
        """The batches; one is over when the next is asked for."""
        for batch in batches:
            yield batch
            self.wall.append(time.perf_counter())
            self.processor.append(time.process_time())


def measured(preset: Preset, steps: int = 2) -> Step:
    """Train in this process; the first step is not counted.

    Args:
        preset: what is trained.
        steps: how many are counted.
    """
    with TemporaryDirectory() as folder:
        words = [*SPECIAL, *dict.fromkeys(CAPTION)]
        vocabulary = Path(folder) / "vocab.txt"
        vocabulary.write_text("\n".join([*words, *(f"##{i}" for i in range(30522 - len(words)))]))
        changes = {key: str(vocabulary) if value == VOCABULARY else value for key, value in preset.changes.items()}
        experiment = Experiment.load(preset.experiment, changes)
        learner: Any = experiment.build_learner()
        model = learner.build(preset.spec, generator(0, "model"))
    optimizer = {key: value for key, value in experiment.strategy.settings["client_optimizer"].items() if key != "keep"}
    holdings, rng, clock = Holdings.of(learner, model), generator(0, "ours"), Clock()
    with global_generators(rng):
        silo = Silo(learner, model, holdings.shared, drawn(preset.spec), None, rng, 0.0, 1.0, holdings)
        silo.descend(clock.watched(silo.batches(preset.batch, steps=1 + steps)), optimizer)
    seconds, processor_seconds = ((ends[-1] - ends[0]) / steps for ends in (clock.wall, clock.processor))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return Step(seconds, processor_seconds, peak, sum(param.numel() for param in model.parameters()), _finite(model))


def alone(name: str, threads: int, steps: int = 2) -> Step:
    """``measured`` in a process of its own.

    Raises:
        EngineError: it failed.
    """
    line = [sys.executable, "-m", "benchmarks.speed.steps", "--child", name, "--threads", str(threads), "--steps", str(steps)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=Path(benchmarks.__file__).parent.parent)
    if done.returncode:
        raise EngineError(f"the process of {name} ended with status {done.returncode}; its last words:\n{done.stderr[-3000:]}")
    told: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Step(**told)


def _finite(model: nn.Module) -> bool:
    gradients = [param.grad for param in model.parameters() if param.grad is not None]
    return bool(gradients) and all(bool(gradient.isfinite().all()) for gradient in gradients)


def main() -> None:
    """Print a line for each network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="that are counted")
    parser.add_argument("--only", default="", help="of the lines, those that begin so")
    parser.add_argument("--child", choices=PUBLISHED, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(measured(PUBLISHED[arguments.child], arguments.steps)._asdict()))
        return
    for name in (name for name in PUBLISHED if name.startswith(arguments.only)):
        found = alone(name, arguments.threads, arguments.steps)
        spent = f"{found.seconds:>6.1f} s, {found.processor_seconds:>6.1f} s of processors, {found.gibibytes:>5.1f} GiB"
        told = "gradients are finite" if found.finite else "gradients are NOT FINITE"
        print(f"{name:<50}{found.parameters:>12,} parameters {spent}, {told}", flush=True)


if __name__ == "__main__":
    main()
