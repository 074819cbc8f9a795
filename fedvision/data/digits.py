"""Real handwritten digits that need no download, plain, colored and rotated.

The colored and the rotated environments are those of FedILC's Color-MNIST and Rotated-CIFAR10; ``torchvision_sets``
builds the published ones with the same two functions, ``color_environments`` and ``rotated_environments``.

Source: FedILC, arXiv 2205.09305, section 5; IRM, arXiv 1907.02893, section 5.2 (Colored MNIST).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate, pad

from fedvision.data.examples import ENVIRONMENT, IMAGE, LABEL, Examples
from fedvision.data.pool import Pool
from fedvision.errors import DataError
from fedvision.registry import datasets
from fedvision.settings import Fraction, NonNegative

COLOR_FLIPS = (0.15, 0.30, 0.45, 0.60, 0.75)
ANGLES = (10.0, 25.0, 40.0, 60.0, 75.0, 90.0, -10.0, -40.0, -90.0)


@datasets("digits")
def digits(*, test_fraction: Fraction = 0.2, rng: np.random.Generator) -> Pool:
    """1,797 real handwritten digits, 8x8 pixels in gray, 10 classes; needs no download.

    Images [n, 1, 8, 8] with values k/16 in [0, 1].

    Args:
        test_fraction: share of every class that no client gets; strictly between 0 and 1.
        rng: draws the test set.

    Raises:
        DataError: a ``test_fraction`` that leaves no image to train or to test on.

    Source: scikit-learn's ``load_digits``, the test part of UCI "Optical Recognition of Handwritten Digits".
    """
    images, labels = _scanned()
    test, train = stratified(labels.numpy(), test_fraction, rng)
    if not len(test) or not len(train):
        raise DataError(f"digits.test_fraction = {test_fraction} leaves no image to train or to test on; choose e.g. 0.2")
    everything = Examples({IMAGE: images[:, None], LABEL: labels})
    return Pool(everything[torch.from_numpy(train)], everything[torch.from_numpy(test)], classes=10)


@datasets("color-digits")
def color_digits(
    *,
    color_flips: tuple[Fraction, ...] = COLOR_FLIPS,
    label_flip: Fraction = 0.0,
    test_color_flip: Fraction = 0.90,
    test_label_flip: Fraction = 0.15,
    rng: np.random.Generator,
) -> Pool:
    """Color-MNIST made of the embedded digits: is it below 5, where color misleads; one environment a color flip.

    Images [n, 2, 14, 14] in [0, 1] (8x8, padded by 3 zeros on each side), 2 classes; shuffled, then as ``color-mnist``.

    Args:
        color_flips: probability that color and label disagree, one per environment.
        label_flip: probability that a training or validation label is wrong.
        test_color_flip: as ``color_flips``, out of distribution.
        test_label_flip: as ``label_flip``, out of distribution.
        rng: draws shuffling, labels and colors.
    """
    images, labels = _scanned()
    order = torch.from_numpy(rng.permutation(len(images)))
    return color_environments(
        pad(images, (3, 3, 3, 3))[order],
        labels[order],
        color_flips=color_flips,
        label_flip=label_flip,
        test_color_flip=test_color_flip,
        test_label_flip=test_label_flip,
        rng=rng,
    )


@datasets("rotated-digits")
def rotated_digits(*, angles: tuple[float, ...] = ANGLES, test_angle: NonNegative = 90.0, rng: np.random.Generator) -> Pool:
    """Rotated-CIFAR10's nine rotations, of the embedded digits: one environment an angle.

    Images [n, 1, 16, 16] in [0, 1] (8x8, enlarged bilinearly), 10 classes; shuffled, then as ``rotated-cifar10``.

    Args:
        angles: degrees counter-clockwise, one per environment.
        test_angle: out of distribution, angles are uniform in [-test_angle, test_angle] degrees.
        rng: draws shuffling and test angles.
    """
    images, labels = _scanned()
    order = torch.from_numpy(rng.permutation(len(images)))
    enlarged = interpolate(images[:, None], size=(16, 16), mode="bilinear", align_corners=False)
    return rotated_environments(enlarged[order], labels[order], angles, test_angle, rng)


def color_environments(
    images: Tensor,
    numbers: Tensor,
    *,
    color_flips: Sequence[float],
    label_flip: float,
    test_color_flip: float,
    test_label_flip: float,
    rng: np.random.Generator,
) -> Pool:
    """Color-MNIST's environments of gray digits.

    The last sixth is the out-of-distribution test set. The others are shuffled, four fifths to train on, one to
    validate on, both dealt round-robin to the environments: 40,000 + 10,000 + 10,000 of MNIST's 60,000.

    Args:
        images: [n, h, w] in [0, 1].
        numbers: the digits shown, int64 [n].
        color_flips: one probability an environment.
        label_flip: probability of a wrong label in the environments.
        test_color_flip: probability that color and label disagree in the test set.
        test_label_flip: probability of a wrong label in the test set.
        rng: draws shuffling, labels and colors.

    Raises:
        DataError: no environments.
    """
    if not color_flips:
        raise DataError("color_flips is empty; give one probability per environment, such as [0.15, 0.3, 0.45, 0.6, 0.75]")
    seen = len(images) - len(images) // 6
    order, cut = rng.permutation(seen), seen * 4 // 5

    def dealt(rows: np.ndarray) -> Examples:
        turn = np.arange(len(rows)) % len(color_flips)
        return _labeled(*colored(images[rows], numbers[rows], np.asarray(color_flips)[turn], label_flip, rng), turn)

    train, validation = dealt(order[:cut]), dealt(order[cut:])
    test = _labeled(*colored(images[seen:], numbers[seen:], test_color_flip, test_label_flip, rng))
    return Pool(train, test, classes=2, validation=validation)


def colored(
    images: Tensor, numbers: Tensor, color_flip: np.ndarray | float, label_flip: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Digits in two colors, with the label that the color hints at or belies.

    label = (number < 5), flipped with probability ``label_flip``; color = label, flipped with probability
    ``color_flip``; of the two channels the one that is not the color is zero.

    Args:
        images: [n, h, w].
        numbers: the digits shown, [n].
        color_flip: one probability for all, or one an image [n].
        label_flip: one probability for all.
        rng: draws the flips of the labels, then those of the colors.

    Returns:
        Images [n, 2, h, w] and labels int64 [n] in {0, 1}.
    """
    label = (numbers < 5) ^ _coins(len(numbers), label_flip, rng)
    color = label ^ _coins(len(numbers), color_flip, rng)
    channels = torch.stack([~color, color], dim=1)[:, :, None, None]
    return images[:, None] * channels, label.long()


def rotated_environments(images: Tensor, labels: Tensor, angles: Sequence[float], test_angle: float, rng: np.random.Generator) -> Pool:
    """Rotated-CIFAR10's environments of upright images, 10 classes.

    In the order given: the first three fifths train, the next fifth validates, both dealt round-robin to the
    environments; the last fifth is the out-of-distribution test set: 30,000 + 10,000 + 10,000 of CIFAR-10's 50,000.

    Args:
        images: [n, channels, h, w].
        labels: class indices, int64 [n].
        angles: degrees, one an environment.
        test_angle: test images turn by angles uniform in [-test_angle, test_angle].
        rng: draws the test angles.

    Raises:
        DataError: no environments.
    """
    if not angles:
        raise DataError("angles is empty; give one angle in degrees per environment, such as [10, 25, 40]")
    seen = len(images) - len(images) // 5
    order, cut = np.arange(seen), seen * 3 // 4

    def dealt(rows: np.ndarray) -> Examples:
        turn = np.arange(len(rows)) % len(angles)
        return _labeled(rotated(images[rows], torch.from_numpy(np.asarray(angles, dtype=np.float64)[turn])), labels[rows], turn)

    anyhow = torch.from_numpy(rng.uniform(-test_angle, test_angle, size=len(images) - seen))
    test = _labeled(rotated(images[seen:], anyhow), labels[seen:])
    return Pool(dealt(order[:cut]), test, classes=10, validation=dealt(order[cut:]))


def rotated(images: Tensor, degrees: Tensor) -> Tensor:
    """Each image turned counter-clockwise about its center by an angle of its own; bilinear, zeros come in from outside.

    Computed in float64 and rounded once, so that the data's fingerprint does not depend on the machine.

    Args:
        images: [n, channels, h, w] with h = w.
        degrees: [n].
    """
    blocks = zip(torch.split(images, 4096), torch.split(degrees, 4096), strict=True)
    return torch.cat([_turned(*block) for block in blocks])


def _turned(images: Tensor, degrees: Tensor) -> Tensor:
    angle = torch.deg2rad(degrees.double())
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turn = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)  # from places in the result to places in the image
    grid = affine_grid(turn, list(images.shape), align_corners=False)
    return grid_sample(images.double(), grid, align_corners=False).to(images.dtype)


def stratified(labels: np.ndarray, fraction: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices of ``fraction`` of the examples, and of the rest, both with the same mix of classes.

    Args:
        labels: class indices, [n].
        fraction: in [0, 1]; of n examples fraction * n are taken, rounded, and of every class its share, within one.
        rng: draws which, and the order.

    Returns:
        Two disjoint int64 arrays, shuffled, that cover 0..n-1.
    """
    groups = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    ends = np.floor(fraction * np.cumsum([len(group) for group in groups]) + 0.5).astype(int)
    cuts = np.diff(ends, prepend=0)
    taken = [group[:cut] for group, cut in zip(groups, cuts, strict=True)]
    rest = [group[cut:] for group, cut in zip(groups, cuts, strict=True)]
    return rng.permutation(np.concatenate(taken)), rng.permutation(np.concatenate(rest))


def _scanned() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: images [1797, 8, 8] in [0, 1], labels [1797]."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    return torch.tensor(scans.images / 16, dtype=torch.float32), torch.tensor(scans.target, dtype=torch.int64)


def _coins(n: int, probability: np.ndarray | float, rng: np.random.Generator) -> Tensor:
    """True n times over, with the given probability or probabilities."""
    return torch.from_numpy(rng.random(n) < probability)


def _labeled(images: Tensor, labels: Tensor, environments: np.ndarray | None = None) -> Examples:
    fields = {IMAGE: images, LABEL: labels}
    return Examples(fields if environments is None else {**fields, ENVIRONMENT: torch.from_numpy(environments)})
