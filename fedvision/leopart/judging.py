"""What Leopart's features are judged by: classes found by clusters, objects found without labels, and their foreground.

Nothing here knows the network: all of it follows from the features of the patches of some images, from where its attention looks, and
from the true maps of classes.

Source: arXiv 2204.13101, sections 4.1 to 4.4; what the paper leaves open from what its public implementation does.
Differs: the published numbers of CBFE and CD rest on labels of the training images, by which thresholds were chosen. With
    ``calibration = 0`` no label chooses anything here, and all images are judged; otherwise a share of them is used as the
    reference uses its training images, and is not judged. How many clusters there are is never chosen. Communities are sought among
    patches, not among pixels of enlarged maps. On top of CBFE alone, the patches of the foreground are clustered into one fewer than
    there are classes, and the background is the last cluster.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Lt
from jaxtyping import Bool, Float, Int
from pydantic import AfterValidator
from torch import Tensor

from fedvision.data.examples import IGNORED
from fedvision.errors import DataError
from fedvision.leopart import clustered_foreground as cbfe
from fedvision.leopart import communities as cd
from fedvision.leopart import matching
from fedvision.leopart.clusters import clustered, clustered_by_direction, reduced, resized
from fedvision.leopart.masks import jaccard, mean_boundary_f1
from fedvision.seeds import numpy_generator
from fedvision.settings import Count, Fraction, Natural, Positive, PositiveFraction, resolve

MARKOV_TIMES = (0.4, 1.0, 2.0)
"""That are tried if labels choose."""


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How features are judged; as published, but for ``calibration``.

    Attributes:
        clusters: numbers of clusters, each taken for the class that most of its pixels are of.
        seeds: of k-means, over which mIoU is averaged.
        restarts: of k-means, of which the best is kept.
        iterations: of k-means, at most.
        dimensions: to which features are reduced.
        size: pixels a side of the maps on which classes and foreground are compared.
        foreground_clusters: of which some are the foreground.
        community_clusters: of the foreground, the parts that make communities.
        link_threshold: the least share of each other's neighbors that links two parts; 0: as many communities of several parts as
            classes, without the background, are wanted, which needs no labels but their number.
        markov_time: of Infomap; the longer, the larger the communities.
        modules: how many communities are preferred; 0: as many as there are.
        community_seeds: of Infomap, over which mIoU is averaged.
        boundary: how near boundaries must be, as a share of the maps' side.
        calibration: the share of the labeled images that choose the threshold of the foreground, that of the links and the Markov
            time, and are not judged; 0: thresholds need no labels.
    """

    clusters: tuple[Count, ...] = (500, 300, 100)
    seeds: Count = 5
    restarts: Count = 5
    iterations: Count = 100
    dimensions: Count = 50
    size: Count = 100
    foreground_clusters: Count = 200
    community_clusters: Count = 149
    link_threshold: Fraction = 0.09
    markov_time: Positive = 2.0
    modules: Natural = 20
    community_seeds: Count = 10
    boundary: PositiveFraction = 16 / 448
    calibration: Annotated[float, Ge(0), Lt(1)] = 0.0


def judging_of(table: Mapping[str, Any]) -> Judging:
    """The settings of a learner's table ``judging``.

    Raises:
        ExperimentError: an unknown setting, or a value of the wrong type or range.

    >>> judging_of({"clusters": [24], "calibration": 0.2}).clusters
    (24,)
    """
    return Judging(**resolve(Judging, table, "learner.judging"))


def _checked(table: dict[str, Any]) -> dict[str, Any]:
    judging_of(table)
    return table


JudgingTable = Annotated[dict[str, Any], AfterValidator(_checked)]
"""A learner's setting that ``judging_of`` takes, checked when the experiment is read."""


def discovered(
    tokens: Float[Tensor, "n rows columns width"],
    attention: Bool[Tensor, "n rows columns"],
    semseg: Int[Tensor, "n h w"],
    classes: int,
    settings: Judging,
) -> "Discovery":
    """What is found in some images; see ``judged``."""
    return Discovery(_numbers(tokens), _numbers(attention).astype(bool), _numbers(semseg).astype(np.int64), classes, settings)


def judged(
    tokens: Float[Tensor, "n rows columns width"],
    attention: Bool[Tensor, "n rows columns"],
    semseg: Int[Tensor, "n h w"],
    classes: int,
    settings: Judging,
) -> dict[str, float]:
    """How well classes and foreground are found, each in [0, 1].

    Args:
        tokens: features of patches.
        attention: where the network's attention looks, as a mask.
        semseg: classes of pixels, 0: background, 255: not known. Images of which nothing is known are clustered, not judged.
        classes: that there are, with the background.
        settings: how.

    Returns:
        ``overclustering_<k>``: mIoU of so many clusters, each taken for one class; ``clusters_miou``: of as many clusters as
        classes, matched one to one; ``cbfe_miou``: the same within the foreground that is found; ``communities_miou``: of
        communities of parts in it; ``attention_jaccard`` and ``attention_boundary_f1``: how well attention agrees with the true
        foreground; ``cbfe_jaccard`` and ``cbfe_boundary_f1``: how well the foreground that is found does. What is of no image, as
        the foreground where none is, is left out.

    Raises:
        DataError: features that are not finite, or shapes that do not belong together.
        ExperimentError: the packages of the extra ``parts`` are not installed.
    """
    found = discovered(tokens, attention, semseg, classes, settings)
    if not found.judged.any():
        return {}
    overclustered = {f"overclustering_{number}": found.overclustering(number) for number in settings.clusters}
    masks = {"attention": found.attention, "cbfe": found.foreground}
    return {
        **overclustered,
        "clusters_miou": found.clusters_miou,
        "cbfe_miou": found.cbfe_miou,
        "communities_miou": found.communities_miou,
        **{name: value for mask in masks for name, value in found.agreement(mask, masks[mask]).items() if not math.isnan(value)},
    }


def _numbers(values: Tensor) -> np.ndarray:
    return (values.float() if values.dtype == torch.bfloat16 else values).detach().cpu().numpy()


@dataclass(frozen=True, eq=False)
class Discovery:
    """What is found in images, each step when it is first asked for.

    Attributes:
        tokens: features of patches.
        attention: where the network's attention looks.
        semseg: classes of pixels.
        classes: that there are.
        settings: how things are found and judged.
    """

    tokens: Float[np.ndarray, "n rows columns width"]
    attention: Bool[np.ndarray, "n rows columns"]
    semseg: Int[np.ndarray, "n h w"]
    classes: int
    settings: Judging

    def __post_init__(self) -> None:
        shapes = [list(each.shape) for each in (self.tokens, self.attention, self.semseg)]
        if shapes[0][:3] != shapes[1] or len(self.semseg) != len(self.tokens) or self.classes < 1:
            fact = "features of patches, attention and maps of classes are {} and {} and {}".format(*shapes)
            raise DataError(f"{fact}, with {self.classes} classes; give [n, rows, columns, width], [n, rows, columns] and [n, h, w]")
        beyond = self.semseg[((self.semseg < 0) | (self.semseg >= self.classes)) & (self.semseg != IGNORED)]
        if len(beyond):
            fact = f"maps hold the class {beyond[0]}, beyond 0..{self.classes - 1} and {IGNORED}"
            raise DataError(f"{fact}; raise learner.semantic_classes")

    # ---- images ----------------------------------------------------------------------------------------------------

    @cached_property
    def calibrating(self) -> Bool[np.ndarray, "n"]:
        """The images whose labels choose thresholds: the share that is asked for, rounded down, of those that have labels."""
        labeled = (self.semseg != IGNORED).any((1, 2)).nonzero()[0]
        order = numpy_generator(0, "calibration").permutation(labeled)
        return np.isin(np.arange(len(self.semseg)), order[: int(self.settings.calibration * len(labeled))])

    @cached_property
    def judged(self) -> Bool[np.ndarray, "n"]:
        """The images that are judged: the others that have labels."""
        return np.asarray((self.semseg != IGNORED).any((1, 2)) & ~self.calibrating)

    @cached_property
    def truth(self) -> Int[np.ndarray, "n size size"]:
        """Classes at the size at which they are compared."""
        return resized(self.semseg, self.settings.size, self.settings.size)

    @cached_property
    def points(self) -> Float[np.ndarray, "n rows columns d"]:
        """Features of patches in fewer numbers."""
        flat = reduced(self.tokens.reshape(-1, self.tokens.shape[-1]), self.settings.dimensions)
        return flat.reshape(*self.tokens.shape[:-1], -1)

    def _clustered(self, number: int, seed: int) -> Int[np.ndarray, "n rows columns"]:
        flat = self.points.reshape(-1, self.points.shape[-1])
        own = clustered(flat, number, seed, self.settings.restarts, self.settings.iterations)
        return own.reshape(self.points.shape[:-1])

    def clustered_foreground(self, number: int, seed: int) -> Int[np.ndarray, "n rows columns"]:
        """Clusters of the foreground; the background is one more, the last."""
        own = np.full(self.foreground.shape, number)
        own[self.foreground] = clustered(self.points[self.foreground], number, seed, self.settings.restarts, self.settings.iterations)
        return own

    def counts(self, maps: Int[np.ndarray, "n rows columns"], number: int, where: Bool[np.ndarray, "n"]) -> Int[np.ndarray, "classes k"]:
        """How many pixels of each class are in each of some clusters, in some of the images."""
        size = self.settings.size
        return matching.counted(self.truth[where], resized(maps[where], size, size), self.classes, number)

    def _mean_miou(self, maps: Callable[[int], Int[np.ndarray, "n rows columns"]], number: int, match: Callable[..., float]) -> float:
        """The mean mIoU over the seeds of k-means."""
        return float(np.mean([match(self.counts(maps(seed), number, self.judged)) for seed in range(self.settings.seeds)]))

    # ---- clusters ----------------------------------------------------------------------------------------------------

    def overclustering(self, number: int) -> float:
        """The mIoU of many clusters, each taken for the class that most of its pixels are of."""
        return self._mean_miou(lambda seed: self._clustered(number, seed), number, matching.by_precision)

    @cached_property
    def clusters(self) -> Int[np.ndarray, "n rows columns"]:
        """As many clusters as classes, of the first seed."""
        return self._clustered(self.classes, 0)

    @property
    def clusters_miou(self) -> float:
        """The mIoU of as many clusters as classes, matched one to one."""
        return self._mean_miou(lambda seed: self._clustered(self.classes, seed), self.classes, matching.by_assignment)

    # ---- foreground --------------------------------------------------------------------------------------------------

    @cached_property
    def foreground(self) -> Bool[np.ndarray, "n rows columns"]:
        """Where the clusters are that attention marks."""
        number, settings = self.settings.foreground_clusters, self.settings
        flat = self.points.reshape(-1, self.points.shape[-1])
        own = clustered_by_direction(flat, number, 0, settings.restarts, settings.iterations).reshape(self.points.shape[:-1])
        if not self.calibrating.any():
            precision = cbfe.precisions(own, self.attention, number)
            return cbfe.foreground(own, precision, cbfe.separating_threshold(precision, np.bincount(own.ravel(), minlength=number)))
        return self._calibrated_foreground(own, number)

    def _calibrated_foreground(self, own: Int[np.ndarray, "n rows columns"], number: int) -> Bool[np.ndarray, "n rows columns"]:
        """The threshold is chosen with labels; precisions are those of the same images in which the foreground is found."""
        size, known = self.settings.size, self.calibrating
        maps, attention = (resized(each, size, size) for each in (own, self.attention))
        by_part = [cbfe.precisions(maps[part], attention[part], number) for part in (~known, known)]
        threshold = cbfe.labeled_threshold(cbfe.cuts(maps[known], by_part[1], self.truth[known] != matching.BACKGROUND))
        found = [cbfe.foreground(own, precision, threshold) for precision in by_part]
        return np.where(known[:, None, None], found[1], found[0])

    @property
    def cbfe_miou(self) -> float:
        """The mIoU of one fewer clusters of the foreground than classes, and the background, matched one to one."""
        number = max(self.classes - 1, 1)
        return self._mean_miou(lambda seed: self.clustered_foreground(number, seed), number + 1, matching.by_assignment)

    def agreement(self, name: str, mask: Bool[np.ndarray, "n rows columns"]) -> Mapping[str, float]:
        """How well a mask of the foreground agrees with the true one, by area and by boundary; what is not known is foreground."""
        own, size, (height, width) = mask[self.judged], self.settings.size, self.semseg.shape[1:]
        area = jaccard(self.truth[self.judged] != matching.BACKGROUND, resized(own, size, size))
        whole = self.semseg[self.judged] != matching.BACKGROUND
        near = mean_boundary_f1(whole, resized(own, height, width), self.settings.boundary * height)
        return {f"{name}_jaccard": area, f"{name}_boundary_f1": near}

    # ---- communities -------------------------------------------------------------------------------------------------

    @cached_property
    def parts(self) -> Int[np.ndarray, "n rows columns"]:
        """Clusters of the foreground; the background is the last."""
        return self.clustered_foreground(self.settings.community_clusters, 0)

    @cached_property
    def neighbors(self) -> Float[np.ndarray, "k k"]:
        """How often parts, and the background, are side by side."""
        return cd.co_occurrence(self.parts, self.settings.community_clusters + 1)

    @cached_property
    def link(self) -> tuple[float, float]:
        """The threshold of links, and the Markov time."""
        settings = self.settings
        if self.calibrating.any():
            return self._calibrated_link()
        if settings.link_threshold:
            return settings.link_threshold, settings.markov_time
        wanted = max(self.classes - 1, 1)
        return cd.unlabeled_threshold(self.neighbors, settings.markov_time, settings.modules, wanted), settings.markov_time

    def _calibrated_link(self) -> tuple[float, float]:
        """The pair that finds classes best in the images whose labels choose."""
        thresholds, times = {self.settings.link_threshold, *cd.thresholds(self.neighbors)}, {self.settings.markov_time, *MARKOV_TIMES}
        counts = self.counts(self.parts, len(self.neighbors), self.calibrating)
        pairs = [(float(threshold), time) for threshold in sorted(thresholds) for time in sorted(times)]
        return max(pairs, key=lambda pair: self._grouped_miou(counts, self._communities(pair[0], pair[1], 1)))

    def communities(self, seed: int) -> Int[np.ndarray, "k"]:
        """The community of each part, and of the background; 0: of none. Seeds begin at 1."""
        return self._communities(*self.link, seed)

    def _communities(self, threshold: float, markov_time: float, seed: int) -> Int[np.ndarray, "k"]:
        network = cd.linked(self.neighbors, threshold)
        return cd.communities(network, len(self.neighbors), markov_time, self.settings.modules, seed)

    def _grouped_miou(self, counts: Int[np.ndarray, "classes k"], groups: Int[np.ndarray, "k"]) -> float:
        return matching.by_assignment(matching.grouped(counts, groups, int(groups.max()) + 1))

    @property
    def communities_miou(self) -> float:
        """The mean mIoU of communities over Infomap's seeds, matched with classes one to one."""
        counts = self.counts(self.parts, len(self.neighbors), self.judged)
        seeds = range(1, self.settings.community_seeds + 1)
        return float(np.mean([self._grouped_miou(counts, self.communities(seed)) for seed in seeds]))
