"""Local steps under example-level privacy against plain ones of the same client: ``python -m benchmarks.speed.privacy``.

All ways take turns within every repeat and are compared with the plain steps of the same repeat, so that the ratios hold on another
machine, or beside other work, where the seconds do not. The first repeat warms up and is not counted. Every batch has all examples, in
plain steps and in private ones; otherwise a Poisson-sampled one would have more or fewer.
"""

import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from benchmarks.speed.aggregation import seconds
from benchmarks.speed.learners import options
from fedvision.assembly import laid_out
from fedvision.data import Examples, Spec
from fedvision.learners.classifier import Classifier
from fedvision.learners.learner import Learner
from fedvision.privacy import Privacy
from fedvision.private_silo import PrivateSilo
from fedvision.seeds import generator
from fedvision.silo import Silo

PLAIN, WAYS = "plain", ("ghost", "explicit")
OPTIMIZER = {"name": "SGD", "lr": 0.01}
Loop = Callable[[int], object]
"""So many steps of training."""


@dataclass(frozen=True)
class Preset:
    """What is measured.

    Attributes:
        learner: of random images.
        spec: theirs.
        batch: images a step.
    """

    learner: Learner
    spec: Spec
    batch: int = 128


DIGITS, PICTURES = Spec((2, 14, 14), 2), Spec((3, 32, 32), 10)
PRESETS = {
    "MLP, 390-390": Preset(Classifier(), DIGITS),
    "MLP, 1024-1024": Preset(Classifier(hidden=(1024, 1024)), DIGITS),
    "CNN at 16 pixels": Preset(Classifier(model="cnn"), Spec((3, 16, 16), 10)),
    "ResNet-18 with GroupNorm at 32 pixels, 16 images": Preset(Classifier(model="resnet18", normalization="group"), PICTURES, 16),
}


def loops(preset: Preset) -> dict[str, Loop]:
    """A client's steps, plain and with each way of clipping; each on a model of its own."""
    examples = drawn(preset)
    ways = {way: Privacy(clipping_norm=1.0, noise_multiplier=1.0, delta=1e-6, clipping=way) for way in WAYS}  # type: ignore[arg-type]
    return {PLAIN: _loop(preset, examples, None)} | {way: _loop(preset, examples, privacy) for way, privacy in ways.items()}


def drawn(preset: Preset) -> Examples:
    """As many random examples as are in a batch."""
    rng = generator(0, "images")
    labels = torch.randint(preset.spec.classes, (preset.batch,), generator=rng)
    return Examples({"image": torch.rand(preset.batch, *preset.spec.image_shape, generator=rng), "label": labels})


def ratios(preset: Preset, steps: int, repeats: int) -> dict[str, list[float]]:
    """The time of each way of clipping over that of plain steps, in each repeat."""
    compared = loops(preset)
    measured = [{name: seconds(partial(loop, steps)) for name, loop in compared.items()} for _ in range(repeats + 1)]
    return {way: [taken[way] / taken[PLAIN] for taken in measured[1:]] for way in WAYS}


def markdown(found: Mapping[str, Mapping[str, list[float]]]) -> str:
    """A table of medians, and of the least and the most."""
    lines = ["| private / plain | " + " | ".join(f"`{way}`" for way in WAYS) + " |", "|---|" + "---:|" * len(WAYS)]
    for name, by_way in found.items():
        cells = (f"{statistics.median(of):.1f} [{min(of):.1f} to {max(of):.1f}]" for of in by_way.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _loop(preset: Preset, examples: Examples, privacy: Privacy | None) -> Loop:
    model: nn.Module = preset.learner.build(preset.spec, generator(0, "model"))
    model = laid_out(model) if privacy is None else model  # as each is in a run
    arrays = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kind: Callable[..., Silo] = Silo if privacy is None else partial(PrivateSilo, privacy=privacy, rounds=1)

    def train(steps: int) -> None:
        silo = kind(preset.learner, model, arrays, examples, rng=generator(0, "steps"))
        silo.descend(silo.batches(preset.batch, steps=steps), OPTIMIZER)

    return train


def main() -> None:
    """Print a table."""
    arguments = options(__doc__, steps=3)
    before = os.getloadavg()[0]
    chosen = {name: preset for name, preset in PRESETS.items() if name.startswith(arguments.only)}
    print(markdown({name: ratios(preset, arguments.steps, arguments.repeats) for name, preset in chosen.items()}))
    load = f"load {before:.1f} before, {os.getloadavg()[0]:.1f} after, on {os.cpu_count()} cores"
    print(f"\nmedian [least to most] of {arguments.repeats} repeats of {arguments.steps} steps, {arguments.threads} thread(s); {load}")


if __name__ == "__main__":
    main()
