"""Your own pictures, a folder a class."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fedvision.data.digits import stratified
from fedvision.data.examples import IMAGE, LABEL, Examples
from fedvision.data.pictures import ENDINGS, existing, pictures_below, read_images
from fedvision.data.pool import Pool
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
