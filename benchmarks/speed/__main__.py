"""``python -m benchmarks.speed``: measure, and write a report."""

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from os import cpu_count, getloadavg
from pathlib import Path

from benchmarks.speed import report, scaling
from benchmarks.speed.jobs import JOBS
from benchmarks.speed.measure import by_turns, wholes
from benchmarks.speed.methods import METHODS
from benchmarks.speed.results import Results, machine, targets

PARTS = ("rounds", "agreement", "whole", "scaling", "aggregation")
QUICK = {"repeats": 2, "turn": 2}
"""What ``--quick`` changes; besides, it only takes turns, and leaves Flower out."""


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description="Measure our engines against a plain loop and Flower.")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5, help="in which the methods take turns")
    parser.add_argument("--turn", type=int, default=5, help="rounds a turn; the first turn warms up")
    parser.add_argument("--whole-rounds", type=int, default=20, help="rounds of a whole job")
    parser.add_argument("--agreement-rounds", type=int, default=1, help="after which weights must agree to float rounding")
    parser.add_argument("--scaling-rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("bench/speed"), help="folder of the report")
    parser.add_argument("--quick", action="store_true", help="a first look in about a minute, without Flower")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        vars(chosen).update(QUICK)
        chosen.methods = [name for name in chosen.methods if METHODS[name].waits]
        chosen.parts = [part for part in chosen.parts if part == "rounds"]
    return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for; the report is written anew after every part."""
    chosen = options(arguments)
    results = Results(machine(), _settings(chosen), {name: why for name in chosen.methods if (why := METHODS[name].missing)})
    for method, reason in results.skipped.items():
        _say(f"skipped: {METHODS[method].label}: {reason}")
    methods = [name for name in chosen.methods if name not in results.skipped]
    for job in chosen.jobs:
        _measure_job(results, job, methods, chosen)
    if "scaling" in chosen.parts:
        results.cohorts = scaling.cohorts(scaling.COHORTS, 3)
        results.population = scaling.populations(scaling.POPULATIONS, chosen.scaling_rounds, chosen.repeats)
    if "aggregation" in chosen.parts:
        results.aggregation = _aggregation(chosen.repeats)
    for path in report.write(results, chosen.out):
        _say(str(path))
    for target in targets(results):
        if target.value is not None:
            _say(f"{target.name}: {target.value:.2f} {target.unit}, wanted {target.wanted}: {target.verdict}")


def _measure_job(results: Results, name: str, methods: Sequence[str], chosen: argparse.Namespace) -> None:
    job = JOBS[name]
    if "rounds" in chosen.parts:
        results.rounds[name] = by_turns(job, methods, chosen.repeats, chosen.turn, _say)
    if "agreement" in chosen.parts:
        found = wholes(job, methods, chosen.agreement_rounds, _say)
        results.differences[name] = {method: whole.difference for method, whole in found.items()}
        _say(f"{name}: largest relative difference of the weights {max(results.differences[name].values(), default=0):.1e}")
    if "whole" in chosen.parts:
        results.whole[name] = {method: whole.summary for method, whole in wholes(job, methods, chosen.whole_rounds, _say).items()}
    report.write(results, chosen.out)


def _aggregation(repeats: int) -> dict[str, dict[str, list[float]]]:
    """In a process of its own, whose memory is given back."""
    line = [sys.executable, "-m", "benchmarks.speed.aggregation", "--json", "--flower", "--repeats", str(repeats)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def _settings(chosen: argparse.Namespace) -> dict[str, str]:
    kept = {name: str(getattr(chosen, name)) for name in ("repeats", "turn", "whole_rounds", "agreement_rounds", "scaling_rounds")}
    return kept | {"load at the start": f"{getloadavg()[0]:.1f} of {cpu_count()} cores"}


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what was started is ended
    main()
