"""Your own statements about pairs of pictures, from JSON as ALBEF's for NLVR2."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from fedvision.data.annotations import Record, check_there, divided, encoded, filled, grouped, in_parts, records
from fedvision.data.examples import IMAGE, LABEL, NOTHING, SECOND_IMAGE, STATEMENT, TRUTH, Examples
from fedvision.data.pictures import existing, read_images
from fedvision.data.pool import Pool
from fedvision.errors import DataError
from fedvision.registry import datasets
from fedvision.settings import Count, Fraction

Pair = tuple[Path, Path]
"""The left picture and the right one."""

TRUTHS = {"True": 1, "False": 0, True: 1, False: 0}
"""The labels in files, which NLVR2 writes as texts."""


@datasets("nlvr2")
def nlvr2(
    *,
    root: str,
    annotations: str = "nlvr_train.json",
    test_annotations: str | None = None,
    images: str = "images",
    test_fraction: Fraction = 0.2,
    size: Count = 224,
    statements: Count = 4,
    rng: np.random.Generator,
) -> Pool:
    """Your statements about pairs of pictures, true or false, from JSON as ALBEF's for NLVR2.

    Fields: ``image``, the left picture, and ``second_image``, the right one, each all of it, stretched to a square; ``statement`` and
    ``truth`` (``fedvision.data.examples``); ``label`` is -1. A record is ``{images: [left, right], sentence, label}``, the label being
    ``True`` or ``False``. A pair with more statements is there again.

    Args:
        root: folder that the other paths start from.
        annotations: the JSON file to train on.
        test_annotations: that of the test set; not given: a random share of the pairs is it.
        images: folder of the pictures.
        test_fraction: share of the test set where no file says what it is; strictly between 0 and 1.
        size: of the pictures in pixels.
        statements: of an example.
        rng: draws the test set.

    Raises:
        DataError: a missing file or picture, JSON of another kind, a record without two pictures, an unknown label.
    """
    folder = existing(Path(root), "set data.root")
    train = _told(folder / annotations, folder / images, "data.annotations")
    if test_annotations is not None:
        test = _told(folder / test_annotations, folder / images, "data.test_annotations")
    else:
        train, test = divided(train, test_fraction, str(folder / annotations), rng)
    return Pool(_examples(train, size, statements), _examples(test, size, statements), classes=0)


def _told(file: Path, images: Path, setting: str) -> dict[Pair, list[tuple[str, int]]]:
    """Statements and their truths by pair."""
    some = records(file, setting, "a list of {images: [left, right], sentence, label} as ALBEF's")
    found = grouped((_pair(record, images), (record.text("sentence"), _truth(record))) for record in some)
    check_there([picture for pair in found for picture in pair], str(file), "data.images")
    return found


def _pair(record: Record, images: Path) -> Pair:
    names = record.texts("images")
    if len(names) != 2:
        raise DataError(f"{record.where} has {len(names)} pictures under 'images'; give two, the left one first")
    return images / names[0], images / names[1]


def _truth(record: Record) -> int:
    label = record.value("label")
    if not isinstance(label, bool | str) or label not in TRUTHS:
        raise DataError(f"{record.where} has 'label' = {label!r}; write True or False")
    return TRUTHS[label]


def _examples(told: Mapping[Pair, Sequence[tuple[str, int]]], size: int, statements: int) -> Examples:
    parts = in_parts(told, statements)
    number = max((len(some) for _, some in parts), default=0)
    left, right = (read_images([pair[side] for pair, _ in parts], size, fit="stretch") for side in (0, 1))
    return Examples(
        {
            IMAGE: left,
            SECOND_IMAGE: right,
            STATEMENT: encoded([[text for text, _ in some] for _, some in parts], number),
            TRUTH: filled([[truth for _, truth in some] for _, some in parts], number, NOTHING[TRUTH]),
            LABEL: torch.full((len(parts),), -1),
        }
    )
