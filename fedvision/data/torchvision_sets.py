"""FedILC's two image data sets as published, from the files of MNIST and CIFAR-10.

Source: FedILC, arXiv 2205.09305, section 5. The constructions are in ``fedvision.data.digits``.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from fedvision.data.digits import ANGLES, COLOR_FLIPS, color_environments, rotated_environments
from fedvision.data.pool import Pool
from fedvision.errors import DataError
from fedvision.registry import datasets
from fedvision.settings import Fraction, NonNegative


@datasets("color-mnist")
def color_mnist(
    *,
    root: str,
    download: bool = False,
    color_flips: tuple[Fraction, ...] = COLOR_FLIPS,
    label_flip: Fraction = 0.0,
    test_color_flip: Fraction = 0.90,
    test_label_flip: Fraction = 0.15,
    rng: np.random.Generator,
) -> Pool:
    """Color-MNIST with 5 environments: is the digit below 5, where color misleads; MNIST's files needed.

    Images [n, 2, 14, 14] in [0, 1] (every second row and column), 2 classes: 40,000 to train and 10,000 to validate on,
    from MNIST's first 50,000 training images, shuffled; its last 10,000 are the out-of-distribution test set.

    Args:
        root: folder that holds, or will hold, ``MNIST/raw``.
        download: fetch the files if they are missing.
        color_flips: probability that color and label disagree, one per environment.
        label_flip: probability that a training or validation label is wrong.
        test_color_flip: as ``color_flips``, out of distribution.
        test_label_flip: as ``label_flip``, out of distribution.
        rng: draws shuffling, labels and colors.

    Raises:
        DataError: missing or broken files.
    """
    from torchvision.datasets import MNIST

    files = {name.removesuffix(".gz"): None for name, _ in MNIST.resources}
    with from_files("MNIST", Path(root) / "MNIST" / "raw", files, download):
        mnist = MNIST(root, train=True, download=download)
    images = mnist.data[:, ::2, ::2].float() / 255
    return color_environments(
        images,
        mnist.targets.long(),
        color_flips=color_flips,
        label_flip=label_flip,
        test_color_flip=test_color_flip,
        test_label_flip=test_label_flip,
        rng=rng,
    )


@datasets("rotated-cifar10")
def rotated_cifar10(
    *,
    root: str,
    download: bool = False,
    angles: tuple[float, ...] = ANGLES,
    test_angle: NonNegative = 90.0,
    rng: np.random.Generator,
) -> Pool:
    """Rotated-CIFAR10 with 9 environments, one an angle, for 3 silos of 3 environments; CIFAR-10's files needed.

    Images [n, 3, 16, 16] in [0, 1] (every second row and column, then rotated), 10 classes, in the files' order:
    30,000 to train and 10,000 to validate on; the last 10,000 training images are the out-of-distribution test set.
    Three environments a silo: partition ``environment`` with ``environments_per_client = 3``.

    Args:
        root: folder that holds, or will hold, ``cifar-10-batches-py``.
        download: fetch the files if they are missing.
        angles: degrees counter-clockwise, one per environment.
        test_angle: out of distribution, angles are uniform in [-test_angle, test_angle] degrees.
        rng: draws the test angles.

    Raises:
        DataError: missing or altered files. The files are pickles: torchvision opens them only if their
            MD5 sums are the published ones.
    """
    from torchvision.datasets import CIFAR10

    files = dict(CIFAR10.train_list + CIFAR10.test_list + [[CIFAR10.meta["filename"], CIFAR10.meta["md5"]]])
    with from_files("CIFAR-10", Path(root) / CIFAR10.base_folder, files, download):
        cifar = CIFAR10(root, train=True, download=download)
    images = torch.from_numpy(cifar.data[:, ::2, ::2]).permute(0, 3, 1, 2).float() / 255
    return rotated_environments(images, torch.tensor(cifar.targets), angles, test_angle, rng)


@contextmanager
def from_files(name: str, folder: Path, files: Mapping[str, str | None], download: bool) -> Iterator[None]:
    """Turns torchvision's failures into one message: which files are missing or broken, and how to mend it.

    Args:
        name: of the data set.
        folder: where its files are.
        files: their names in there, with their MD5 sums where these are known.
        download: whether torchvision may fetch them.
    """
    try:
        yield
    except (RuntimeError, OSError, ValueError, KeyError, AssertionError) as error:
        tried = f"the download failed ({str(error).splitlines()[0]}); " if download and str(error) else ""
        remedy = f"{tried}put the unpacked files {', '.join(files)} there" + ("" if download else ", or set download = true to fetch them")
        raise DataError(f"{name} cannot be read from {folder}: {_faults(folder, files) or repr(error)}; {remedy}") from error


def _faults(folder: Path, files: Mapping[str, str | None]) -> str:
    """Which of the files are missing, and which differ from their MD5 sums where these are known."""
    from torchvision.datasets.utils import check_integrity

    missing = [file for file in files if not (folder / file).is_file()]
    altered = [file for file in files if file not in missing and not check_integrity(folder / file, files[file])]
    words = (f"{fact} {', '.join(some)}" for fact, some in (("missing", missing), ("not the published file", altered)) if some)
    return "; ".join(words)
