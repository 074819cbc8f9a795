"""Measure rounds of a large model over gRPC: a coordinator and three silos with TLS and keys, on this machine.

    python -m benchmarks.speed.silos --megabytes 200 --rounds 3

Silos take one step on few examples, so that what is measured is the way of the arrays. They are random, since Flower sends
equal arrays once. Every process reports its own peak of resident memory.
"""

import argparse
import json
import math
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.deploy.demonstration import SILOS, silos
from benchmarks.deploy.keys import Federation
from benchmarks.deploy.places import Loopback
from fedvision.errors import EngineError
from fedvision.experiment import Experiment
from server.record import read_rows

PROGRAMS = ("flower-superlink", "flower-superexec", "flwr-serverapp", "flower-supernode", "flwr-clientapp")
"""What runs in a federation, by the names of the commands."""

LOOK_SECONDS = 0.5
"""How often to look at the processes; a peak is the system's own, so only those of processes that end in between are missed."""


def settings(megabytes: float, rounds: int) -> dict[str, Any]:
    """What makes ``quickstart`` an experiment whose model, an MLP with two equal hidden layers, is so large."""
    data = Experiment.load("quickstart").load_data()
    inputs, parameters = math.prod(data.spec.image_shape), megabytes * 1e6 / 4
    width = round((math.sqrt(inputs**2 + 4 * parameters) - inputs) / 2)
    return {
        "rounds": rounds,
        "evaluate_every": rounds,
        "checkpoint_every": rounds,
        "tensorboard": False,
        "participants": list(range(SILOS)),
        "learner.hidden": [width, width],
        "strategy.name": "fedavg",
        "strategy.steps": 1,
        "strategy.batch_size": 8,
    }


@contextmanager
def peaks() -> Iterator[dict[str, int]]:
    """The peak resident memory in bytes of each program of ``PROGRAMS`` that runs within the block; of several, the largest."""
    found: dict[str, int] = {}
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_SECONDS):
            for name, held in _resident():
                found[name] = max(found.get(name, 0), held)

    watching = threading.Thread(target=look, daemon=True)
    watching.start()
    try:
        yield found
    finally:
        ended.set()
        watching.join()


def measured(megabytes: float, rounds: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows of a run, and the peaks of its processes.

    Raises:
        EngineError: the run failed.
    """
    asked = [word for key, value in settings(megabytes, rounds).items() for word in ("--set", f"{key}={json.dumps(value)}")]
    with tempfile.TemporaryDirectory(prefix="fedvision-") as scratch:
        federation = Federation.make(Path(scratch) / "federation", [], SILOS, days=1)
        with peaks() as found, silos(federation.folder, Loopback.kind) as topology:
            done = topology.command("fedvision", "deploy", "run", "quickstart", *asked, "--out", f"{scratch}/run")
            if done.returncode:
                raise EngineError(f"the run failed: {done.stdout}{done.stderr}")
        return list(read_rows(Path(scratch) / "run" / "rounds.jsonl")), found


def markdown(rows: Sequence[Mapping[str, Any]], found: Mapping[str, int]) -> str:
    """Seconds a round, bytes on the way, peaks."""
    trained = [row for row in rows if row["round"] and "test_loss" not in row]
    taken = sorted(row["seconds"] for row in trained)
    model = trained[0]["bytes_down"] / SILOS
    lines = [f"{model / 1e6:.0f} MB, {SILOS} silos: {taken[0]:.1f} to {taken[-1]:.1f} s a round without evaluation", ""]
    lines += ["| process | peak MB |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {found[name] / 1e6:,.0f} |" for name in PROGRAMS if name in found)])


def _resident() -> Iterator[tuple[str, int]]:
    """Each running process of ``PROGRAMS`` with its peak so far."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            names = [name for name in PROGRAMS if any(Path(word.decode(errors="replace")).name == name for word in words[:2])]
            if names:
                [peak] = [line.split()[1] for line in (folder / "status").read_text().splitlines() if line.startswith("VmHWM")]
                yield names[0], 1024 * int(peak)
        except (OSError, ValueError):  # it has ended
            continue


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=float, default=200, help="of the model")
    parser.add_argument("--rounds", type=int, default=3, help="of which the last evaluates")
    options = parser.parse_args(arguments)
    print(markdown(*measured(options.megabytes, options.rounds)))


if __name__ == "__main__":
    main()
