"""How many pictures of ``scenes`` are drawn in a second on one core: ``python -m benchmarks.speed.scenes``."""

import os
import time
from unittest.mock import patch

import numpy as np
import torch

from fedvision.cache import VARIABLE
from fedvision.data.examples import QUESTION
from fedvision.data.scenes import FIELDS, scenes

SIZES = (32, 64, 96, 224)
FIELD_SETS = {
    "image, label": ("image", "label"),
    "image, label, depth, semseg": ("image", "label", "depth", "semseg"),
    "all of pictures, five captions": FIELDS[: FIELDS.index(QUESTION)],
    "tasks and second pictures too": FIELDS,
}
PIXELS = 4_000_000
"""About so many are drawn for one measurement."""


def pictures_a_second(size: int, fields: tuple[str, ...], repeats: int = 3) -> float:
    """The best of some repeats; one or two objects a picture, nothing kept on disk."""
    number = max(PIXELS // size**2, 20)
    with patch.dict(os.environ, {VARIABLE: "off"}):
        return max(number / _seconds(number, size, fields, seed) for seed in range(repeats))


def _seconds(number: int, size: int, fields: tuple[str, ...], seed: int) -> float:
    start = time.perf_counter()
    scenes(examples=number, test_examples=1, size=size, fields=fields, draw_seed=seed, rng=np.random.default_rng(0))
    return time.perf_counter() - start


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    print(f"{'pictures a second':<32}" + "".join(f"{f'{size} x {size}':>12}" for size in SIZES))
    for name, fields in FIELD_SETS.items():
        print(f"{name:<32}" + "".join(f"{pictures_a_second(size, fields):>12,.0f}" for size in SIZES), flush=True)


if __name__ == "__main__":
    main()
