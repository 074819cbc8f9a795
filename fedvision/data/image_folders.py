"""Your own pictures, a folder a class, or without any class."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fedvision.data.digits import stratified
from fedvision.data.examples import IGNORED, IMAGE, LABEL, SEMSEG, Examples
from fedvision.data.paired_folders import pairs_below
from fedvision.data.pictures import ENDINGS, Fit, existing, pictures_below, read_images
from fedvision.data.pool import Pool
from fedvision.data.semantic_maps import read_ids
from fedvision.errors import DataError
from fedvision.registry import datasets
from fedvision.settings import Count, Fraction, nearest


@datasets("image-folder")
def image_folder(*, root: str, size: Count = 64, test_fraction: Fraction = 0.2, rng: np.random.Generator) -> Pool:
    """Your pictures, a folder a class, as torchvision's ImageFolder has them; classes in the order of their names.

    Either ``root/train/CLASS/...`` and ``root/test/CLASS/...`` (and ``root/validation/CLASS/...``), or ``root/CLASS/...``,
    of which every class gives its share to the test set.

    Args:
        root: the folder.
        size: of the pictures in pixels.
        test_fraction: share of the test set where there is no folder ``test``; strictly between 0 and 1.
        rng: draws the test set.

    Raises:
        DataError: a folder that is missing or empty, test classes that nobody trains on, a file that is no picture.
    """
    folder = existing(Path(root), "set data.root")
    parts = [part for part in ("train", "test", "validation") if (folder / part).is_dir()]
    if not parts:
        everything, classes = _classified(folder, None, size)
        held, kept = stratified(everything.label.numpy(), test_fraction, rng)
        if not len(held) or not len(kept):
            raise DataError(f"data.test_fraction = {test_fraction} leaves no picture to train or to test on; choose e.g. 0.2")
        return Pool(everything[torch.from_numpy(kept)], everything[torch.from_numpy(held)], len(classes))
    if not {"train", "test"} <= set(parts):
        raise DataError(
            f"{folder} has a folder {parts[0]!r} but not both of 'train' and 'test'; add the other, or put the classes into {folder} itself"
        )
    train, classes = _classified(folder / "train", None, size)
    test, *validation = (_classified(folder / part, classes, size)[0] for part in parts[1:])
    return Pool(train, test, len(classes), *validation)


@datasets("unlabeled-images")
def unlabeled_images(
    *,
    root: str,
    size: Count = 224,
    fit: Fit = "crop",
    semantic_classes: Count = 150,
    test_fraction: Fraction = 0.2,
    rng: np.random.Generator,
) -> Pool:
    """Your pictures without classes, in a folder and the folders in it; what is learned may be tested on semantic maps.

    Either ``root/train/...`` and ``root/test/...``, or all anywhere in ``root``, of which a random share is the test set. Where there is
    ``root/test/semseg``, the test set's pictures are in ``root/test/rgb``, and their maps, of the same names, in there. Fields: ``image``;
    ``label``, which is -1; of the test set, if it has maps, ``semseg`` uint8 [n, size, size] of 0 to ``semantic_classes`` - 1, and 255.

    Args:
        root: the folder.
        size: of the pictures in pixels.
        fit: ``crop``: the largest square in the middle of each; ``stretch``: all of it.
        semantic_classes: ids in the semantic maps run from 0 to ``semantic_classes`` - 1, or are 255.
        test_fraction: share of the test set where there are no folders ``train`` and ``test``; strictly between 0 and 1.
        rng: draws the test set.

    Raises:
        DataError: a folder that is missing or empty, a file that is no picture, a picture without its map, or one that does not fit.
    """
    folder = existing(Path(root), "set data.root")
    if semantic_classes > IGNORED:
        raise DataError(f"unlabeled-images.semantic_classes = {semantic_classes}; ids are stored in a byte, choose at most {IGNORED}")
    if not (folder / "train").is_dir() or not (folder / "test").is_dir():
        files = _some(folder)
        order, cut = rng.permutation(len(files)), round(test_fraction * len(files))
        if not 0 < cut < len(files):
            fact = f"unlabeled-images.test_fraction = {test_fraction} of {len(files)} pictures leaves none to train or to test on"
            raise DataError(f"{fact}; choose e.g. 0.2")
        train, test = ([files[number] for number in part] for part in (order[cut:], order[:cut]))
        return Pool(_unlabeled(train, size, fit), _unlabeled(test, size, fit), classes=0)
    train, maps = _some(folder / "train"), folder / "test" / SEMSEG
    if not maps.is_dir():
        return Pool(_unlabeled(train, size, fit), _unlabeled(_some(folder / "test"), size, fit), classes=0)
    pairs = pairs_below(folder / "test", (SEMSEG,))
    ids = read_ids([pair[SEMSEG] for pair in pairs], size, fit, semantic_classes, "raise unlabeled-images.semantic_classes")
    test_set = _unlabeled([pair["rgb"] for pair in pairs], size, fit)
    return Pool(_unlabeled(train, size, fit), Examples({**test_set.fields, SEMSEG: ids}), classes=0)


def _some(folder: Path) -> list[Path]:
    """The pictures in a folder and in the folders in it."""
    files = pictures_below(folder)
    if not files:
        raise DataError(f"{folder} holds no picture ({', '.join(ENDINGS)}); put some there")
    return files


def _unlabeled(files: Sequence[Path], size: int, fit: Fit) -> Examples:
    images = read_images(files, size, fit, Image.Resampling.BILINEAR)
    return Examples({IMAGE: images, LABEL: torch.full((len(files),), -1)})


def _classified(folder: Path, classes: Sequence[str] | None, size: int) -> tuple[Examples, list[str]]:
    """The pictures of a folder of classes, and these; if they are given, there must be no other."""
    found = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if classes is None and len(found) < 2:
        raise DataError(
            f"{folder} holds {len(found)} folder(s) of classes; put the pictures of each class into a folder of its own, at least two"
        )
    known = found if classes is None else list(classes)
    for name in found:
        if name not in known:
            raise DataError(f"{folder} has the class {name!r}, which is not trained on; {nearest(name, known)}")
    files = {name: pictures_below(folder / name) for name in found}
    for name, some in files.items():
        if not some:
            raise DataError(f"{folder / name} holds no picture ({', '.join(ENDINGS)}); add some or remove the folder")
    labels = torch.tensor([known.index(name) for name, some in files.items() for _ in some], dtype=torch.int64)
    return Examples({IMAGE: read_images([file for some in files.values() for file in some], size), LABEL: labels}), known
