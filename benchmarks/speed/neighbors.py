"""Measure how neighboring parts are counted: ``python -m benchmarks.speed.neighbors``.

Ours, for all images at once, beside two plain ways: pixel by pixel, as the definition says, and image by image with a table of all
pairs of clusters for each offset, as libraries of image processing have it. The plain ways are compared on a smaller case; the ways
take turns in every repeat, so that the ratios hold beside other work, where the seconds do not. The first repeat warms up and is not
counted.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from fedvision.leopart.communities import co_occurrence, offsets
from fedvision.seeds import numpy_generator

OURS, BY_IMAGE, BY_PIXEL = "all images at once", "image by image", "pixel by pixel"
Count = Callable[[Int[np.ndarray, "n rows columns"], int], Float[np.ndarray, "k k"]]


def pixel_by_pixel(maps: Int[np.ndarray, "n rows columns"], number: int) -> Float[np.ndarray, "k k"]:
    """What ``co_occurrence`` counts, one pair of neighbors after the other."""
    sums, there = np.zeros((number, number)), np.zeros(number)
    for image in maps.tolist():
        table = np.zeros((number, number))
        for row, line in enumerate(image):
            for column, own in enumerate(line):
                for down, right in offsets():
                    if 0 <= row + down < len(image) and 0 <= column + right < len(line):
                        table[own, image[row + down][column + right]] += 1
        _fold(table, sums, there)
    return np.asarray(sums / np.maximum(there, 1)[:, None])


def image_by_image(maps: Int[np.ndarray, "n rows columns"], number: int) -> Float[np.ndarray, "k k"]:
    """The same with a table of all pairs for each image."""
    sums, there = np.zeros((number, number)), np.zeros(number)
    _, rows, columns = maps.shape
    for image in maps:
        table = np.zeros((number, number))
        for down, right in offsets():
            here = image[max(-down, 0) : rows - max(down, 0), max(-right, 0) : columns - max(right, 0)]
            beside = image[max(down, 0) : rows + min(down, 0), max(right, 0) : columns + min(right, 0)]
            np.add.at(table, (here, beside), 1)
        _fold(table, sums, there)
    return np.asarray(sums / np.maximum(there, 1)[:, None])


def _fold(table: Float[np.ndarray, "k k"], sums: Float[np.ndarray, "k k"], there: Float[np.ndarray, "k"]) -> None:
    """Add an image's shares to ``sums``, and to ``there`` which clusters it has."""
    np.fill_diagonal(table, 0)
    total = table.sum(1, keepdims=True)
    sums += table / np.maximum(total, 1)
    there += total[:, 0] > 0


WAYS: Mapping[str, Count] = {OURS: co_occurrence, BY_IMAGE: image_by_image, BY_PIXEL: pixel_by_pixel}


def random_maps(images: int, side: int, clusters: int) -> Int[np.ndarray, "n side side"]:
    """Clusters at random, the hardest case: hardly any neighbor is of the same one."""
    return numpy_generator(0, "benchmark").integers(0, clusters, (images, side, side))


def seconds(way: Count, maps: Int[np.ndarray, "n rows columns"], clusters: int) -> float:
    """The wall time of one call."""
    start = time.perf_counter()
    way(maps, clusters)
    return time.perf_counter() - start


def interleaved(ways: Mapping[str, Count], maps: Int[np.ndarray, "n rows columns"], clusters: int, repeats: int) -> dict[str, list[float]]:
    """The seconds of every way in every repeat, the ways taking turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            times[name].append(seconds(way, maps, clusters))
    return {name: taken[1:] for name, taken in times.items()}


def markdown(times: Mapping[str, Sequence[float]], title: str) -> str:
    """A table of medians, and of how many times as long as ours each took in the same repeat."""
    lines = [f"| {title} | median s | times ours: median | least to most |", "|---|---|---|---|"]
    for name, taken in times.items():
        ratios = [own / ours for own, ours in zip(taken, times[OURS], strict=True)]
        lines.append(
            f"| {name} | {statistics.median(taken):.3f} | {statistics.median(ratios):.1f} | {min(ratios):.1f} to {max(ratios):.1f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--side", type=int, default=28, help="patches a side")
    parser.add_argument("--clusters", type=int, default=500)
    parser.add_argument("--small", type=int, default=20, help="images on which the plain ways are compared")
    parser.add_argument("--repeats", type=int, default=5, help="beside one that warms up")
    options = parser.parse_args(arguments)
    for ways, images in ((WAYS, options.small), ({OURS: co_occurrence, BY_IMAGE: image_by_image}, options.images)):
        maps = random_maps(images, options.side, options.clusters)
        title = f"{images} images of {options.side} x {options.side}, {options.clusters} clusters"
        print(markdown(interleaved(ways, maps, options.clusters, options.repeats), title), end="\n\n")


if __name__ == "__main__":
    main()
