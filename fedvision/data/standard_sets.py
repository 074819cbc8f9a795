"""The usual labeled sets, from the files that torchvision knows: MNIST, CIFAR, SVHN, STL-10, and VOC's semantic maps.

Images are uint8, standing for value / 255. Training and test examples are the published ones.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedvision.data.examples import IMAGE, LABEL, Examples
from fedvision.data.pictures import Fit
from fedvision.data.pool import Pool
from fedvision.data.semantic_maps import check_pairs, read_ids, with_maps
from fedvision.data.torchvision_sets import from_files
from fedvision.errors import DataError
from fedvision.registry import datasets
from fedvision.settings import Count, Natural


@datasets("mnist")
def mnist(*, root: str, download: bool = False) -> Pool:
    """MNIST: 60,000 + 10,000 handwritten digits, uint8 [n, 1, 28, 28], 10 classes; its files needed.

    Args:
        root: folder that holds, or will hold, ``MNIST/raw``.
        download: fetch the files if they are missing.

    Raises:
        DataError: missing or broken files.
    """
    from torchvision.datasets import MNIST

    files = {name.removesuffix(".gz"): None for name, _ in MNIST.resources}
    with from_files("MNIST", Path(root) / "MNIST" / "raw", files, download):
        train, test = (MNIST(root, train=train, download=download) for train in (True, False))
    return Pool(_labeled(train.data[:, None], train.targets), _labeled(test.data[:, None], test.targets), classes=10)


@datasets("cifar10")
def cifar10(*, root: str, download: bool = False) -> Pool:
    """CIFAR-10: 50,000 + 10,000 small photographs, uint8 [n, 3, 32, 32], 10 classes; its files needed.

    Args:
        root: folder that holds, or will hold, ``cifar-10-batches-py``.
        download: fetch the files if they are missing.

    Raises:
        DataError: missing or altered files. They are pickles, opened only if their MD5 sums are the published ones.
    """
    from torchvision.datasets import CIFAR10

    return _cifar(CIFAR10, "CIFAR-10", root, download)


@datasets("cifar100")
def cifar100(*, root: str, download: bool = False) -> Pool:
    """CIFAR-100: 50,000 + 10,000 small photographs, uint8 [n, 3, 32, 32], 100 classes; its files needed.

    Args:
        root: folder that holds, or will hold, ``cifar-100-python``.
        download: fetch the files if they are missing.

    Raises:
        DataError: missing or altered files. They are pickles, opened only if their MD5 sums are the published ones.
    """
    from torchvision.datasets import CIFAR100

    return _cifar(CIFAR100, "CIFAR-100", root, download)


@datasets("svhn")
def svhn(*, root: str, download: bool = False, extra: bool = False) -> Pool:
    """SVHN: 73,257 + 26,032 house numbers, uint8 [n, 3, 32, 32], 10 classes, class k: digit k; its files needed.

    Args:
        root: folder that holds, or will hold, ``train_32x32.mat`` and ``test_32x32.mat``.
        download: fetch the files if they are missing.
        extra: train on the 531,131 easier examples of ``extra_32x32.mat`` too.

    Raises:
        DataError: missing or altered files.
    """
    from torchvision.datasets import SVHN

    splits = ["train", "test", *(["extra"] if extra else [])]
    files = {SVHN.split_list[split][1]: SVHN.split_list[split][2] for split in splits}
    with from_files("SVHN", Path(root), files, download):
        parts = [SVHN(root, split=split, download=download) for split in splits]
    train, test, *more = (_labeled(torch.from_numpy(part.data), torch.from_numpy(part.labels)) for part in parts)
    if more:
        train = Examples({name: torch.cat([values, more[0].fields[name]]) for name, values in train.fields.items()})
    return Pool(train, test, classes=10)


@datasets("stl10")
def stl10(*, root: str, download: bool = False, unlabeled: bool = True, fold: Natural | None = None) -> Pool:
    """STL-10: 5,000 labeled and 100,000 unlabeled + 8,000 photographs, uint8 [n, 3, 96, 96], 10 classes; its files needed.

    Unlabeled examples have the label -1 and come after the labeled ones. ``stl10_folds`` reads the official ten folds.

    Args:
        root: folder that holds, or will hold, ``stl10_binary``.
        download: fetch the files if they are missing.
        unlabeled: whether clients get the unlabeled examples too, 2.8 GB.
        fold: which of the official folds of 1,000 labels, 0 to 9, keeps them; if not given, all 5,000 stay.

    Raises:
        DataError: missing or altered files.
    """
    from torchvision.datasets import STL10

    with from_files("STL-10", Path(root) / STL10.base_folder, dict(STL10.train_list + STL10.test_list), download):
        train = STL10(root, split="train+unlabeled" if unlabeled else "train", download=download)
        test = STL10(root, split="test")
    first, second = (_labeled(torch.from_numpy(part.data), torch.from_numpy(part.labels.astype(np.int64))) for part in (train, test))
    return Pool(first if fold is None else _of_fold(first, root, fold), second, classes=10)


def _of_fold(train: Examples, root: str, fold: int) -> Examples:
    folds = stl10_folds(root)
    if fold >= len(folds):
        raise DataError(f"stl10.fold = {fold}: there are the folds 0 to {len(folds) - 1}")
    kept = torch.full_like(train.label, -1)
    kept[folds[fold]] = train.label[folds[fold]]
    return Examples({**train.fields, LABEL: kept})


def stl10_folds(root: str | Path) -> list[Tensor]:
    """The official folds of STL-10's protocol: ten times the indices of 1,000 labeled training examples, int64 [1000].

    Args:
        root: folder that holds ``stl10_binary/fold_indices.txt``.

    Raises:
        DataError: the file is missing or holds something else.
    """
    file = Path(root) / "stl10_binary" / "fold_indices.txt"
    try:
        return [torch.tensor([int(index) for index in line.split()]) for line in file.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); put STL-10's unpacked files there") from error


AUGMENTED = ("trainaug", "train_aug", "SegmentationClassAug")
"""Names that VOC's list of further training pictures goes by."""


@datasets("voc-segmentation")
def voc_segmentation(
    *,
    root: str,
    download: bool = False,
    year: Literal["2007", "2008", "2009", "2010", "2011", "2012"] = "2012",
    train: Literal["train", "trainaug"] = "train",
    size: Count = 224,
    fit: Fit = "crop",
) -> Pool:
    """Pascal VOC with semantic maps: photographs of 20 classes, split train to train on and val to test on; its files needed.

    Fields: ``image`` uint8 [n, 3, size, size]; ``semseg`` uint8 [n, size, size] of 0 (background), 1 + class, and 255 (to be ignored);
    ``labels`` uint8 [n, 20], the classes to be seen in it; ``label`` is -1, since a picture has no single class.

    Args:
        root: folder that holds, or will hold, ``VOCdevkit``.
        download: fetch and unpack the archive, whether or not the files are there.
        year: of the challenge; 2012 has 1,464 + 1,449 pictures.
        train: what to train on; ``trainaug``: the 10,582 pictures of 2012 that ``ImageSets/Segmentation/trainaug.txt`` lists, with the maps
            in ``SegmentationClassAug``, which belong to Hariharan et al., ICCV 2011, and are not fetched.
        size: of the pictures in pixels.
        fit: ``crop``: the largest square in the middle of each; ``stretch``: all of it.

    Raises:
        DataError: missing or broken files, maps that differ in size from their picture, or with other ids.
    """
    from torchvision.datasets import VOCSegmentation

    folder = Path(root) / ("TrainVal/VOCdevkit/VOC2011" if year == "2011" else f"VOCdevkit/VOC{year}")
    splits = ("train", "val") if train == "train" else ("val",)
    lists = [f"ImageSets/Segmentation/{split}.txt" for split in splits]
    with from_files(f"VOC {year}", folder, dict.fromkeys(lists), download):
        parts = [VOCSegmentation(root, year=year, image_set=split, download=download and split == splits[0]) for split in splits]
    pairs = [([Path(file) for file in part.images], [Path(file) for file in part.targets]) for part in parts]
    first, second = (_segmented(*pair, size, fit) for pair in (pairs if train == "train" else [_augmented(folder), *pairs]))
    return Pool(first, second, classes=20)


def _augmented(folder: Path) -> tuple[list[Path], list[Path]]:
    """VOC's further training pictures and their maps; a line has a name, or the paths of both."""
    lists = [folder / "ImageSets" / "Segmentation" / f"{name}.txt" for name in AUGMENTED]
    there = next((file for file in lists if file.is_file()), None)
    if there is None:
        raise DataError(f"there is no {lists[0]}; put that list there, or set voc-segmentation.train = 'train'")
    names = [Path(line.split()[-1]).stem for line in there.read_text().splitlines() if line.strip()]
    if not names:
        raise DataError(f"{there} lists no picture; put the list of the augmented training set there")
    maps = folder / "SegmentationClassAug"
    return [folder / "JPEGImages" / f"{name}.jpg" for name in names], [maps / f"{name}.png" for name in names]


def _segmented(images: list[Path], maps: list[Path], size: int, fit: Fit) -> Examples:
    """VOC's pictures with their maps."""
    check_pairs(images, maps, "put the unpacked files of VOC there")
    return with_maps(images, read_ids(maps, size, fit, 21, "get the file anew"), fit, 1, 20)


def _cifar(dataset: Any, name: str, root: str, download: bool) -> Pool:
    files = dict(dataset.train_list + dataset.test_list + [[dataset.meta["filename"], dataset.meta["md5"]]])
    with from_files(name, Path(root) / dataset.base_folder, files, download):
        parts = [dataset(root, train=train, download=download) for train in (True, False)]
    train, test = (_labeled(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets)) for part in parts)
    return Pool(train, test, classes=100 if name == "CIFAR-100" else 10)


def _labeled(images: Tensor, labels: Tensor) -> Examples:
    return Examples({IMAGE: images.contiguous(), LABEL: labels.long()})
