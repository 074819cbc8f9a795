"""Measure the aggregation against reading its inputs once, which nothing can beat.

    python -m benchmarks.speed.aggregation --clients 50 --parameters 10000000 --threads 1 2 --flower

All methods run in turn within every repeat, and are compared with the reading of the same repeat:
the ratios hold on another machine, or beside other work, where the seconds do not. The first
repeat warms up and is not counted. A client's answer is one float32 array.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fedvision.seeds import generator
from strategies.means import Accumulator, ArithmeticMean, WeightedGeometricMean

READING = "reading the inputs once"
ARITHMETIC = "arithmetic mean"
GEOMETRIC = "weighted geometric mean"
Answers = Sequence[Mapping[str, Tensor]]
Methods = Mapping[str, Callable[[], object]]


def random_answers(clients: int, parameters: int) -> list[dict[str, Tensor]]:
    """Answers of the size of gradients: normal, with a standard deviation of 1e-3."""
    rng = generator(0, "benchmark")
    arrays = (torch.empty(parameters).normal_(0, 1e-3, generator=rng) for _ in range(clients))
    return [{"weight": array} for array in arrays]


def read(answers: Answers) -> float:
    """Touch every number once."""
    return sum(float(answer["weight"].sum()) for answer in answers)


def aggregate(accumulator: Accumulator, answers: Answers) -> dict[str, Tensor]:
    """Fold all answers and combine them."""
    for answer in answers:
        accumulator.add(answer)
    return accumulator.result()


def flower_mean(answers: Answers) -> Callable[[], object]:
    """Flower's own arithmetic mean of the answers, which it keeps as bytes, all at once."""
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    weight = MetricRecord({"weight": 1.0})
    arrays = [ArrayRecord(dict(answer)) for answer in answers]
    records = [RecordDict({"arrays": record, "metrics": weight}) for record in arrays]
    return lambda: aggregate_arrayrecords(records, "weight")


def methods(answers: Answers, with_flower: bool) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    measured: dict[str, Callable[[], object]] = {
        READING: lambda: read(answers),
        ARITHMETIC: lambda: aggregate(ArithmeticMean(), answers),
        GEOMETRIC: lambda: aggregate(WeightedGeometricMean(), answers),
        "the same with an agreement mask": lambda: aggregate(WeightedGeometricMean(0.5), answers),
    }
    if with_flower:
        measured["Flower's aggregate_arrayrecords"] = flower_mean(answers)
    return measured


def seconds(method: Callable[[], object]) -> float:
    """The wall time of one call."""
    start = time.perf_counter()
    method()
    return time.perf_counter() - start


def interleaved(measured: Methods, repeats: int) -> dict[str, list[float]]:
    """The seconds of every method in every repeat, the methods taking turns."""
    times: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(repeats + 1):
        for name, method in measured.items():
            times[name].append(seconds(method))
    return {name: taken[1:] for name, taken in times.items()}


def markdown(times: Mapping[str, Sequence[float]], title: str) -> str:
    """A table of medians, and of the ratios to the reading of the same repeat."""
    lines = [f"| {title} | median s | times reading: median | least to most |"]
    lines.append("|---|---|---|---|")
    for name, taken in times.items():
        ratios = [own / reading for own, reading in zip(taken, times[READING], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        middle = f"{statistics.median(taken):.3f} | {statistics.median(ratios):.2f}"
        lines.append(f"| {name} | {middle} | {spread} |")
    return "\n".join(lines)


def measured(clients: int, parameters: int, repeats: int, threads: Sequence[int], with_flower: bool) -> dict[str, dict[str, list[float]]]:
    """The seconds of every method in every repeat, by the number of threads."""
    answers = random_answers(clients, parameters)
    found, compared = {}, methods(answers, with_flower)
    for number in dict.fromkeys(threads):
        torch.set_num_threads(number)
        found[str(number)] = interleaved(compared, repeats)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5, help="beside one that warms up")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--flower", action="store_true", help="beside Flower's own mean; slow")
    parser.add_argument("--json", action="store_true", help="print the seconds of every repeat as JSON, and nothing else")
    options = parser.parse_args(arguments)
    found = measured(options.clients, options.parameters, options.repeats, options.threads, options.flower)
    if options.json:
        print(json.dumps(found))
        return
    for threads, times in found.items():
        print(markdown(times, f"{options.clients} x {options.parameters:,} float32, {threads} thread(s)"), end="\n\n")


if __name__ == "__main__":
    main()
