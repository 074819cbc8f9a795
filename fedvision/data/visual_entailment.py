"""Your own sentences to be judged by pictures, from JSON as ALBEF's for SNLI-VE."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from fedvision.data.annotations import Record, check_there, divided, encoded, filled, grouped, in_parts, records
from fedvision.data.examples import HYPOTHESIS, IMAGE, LABEL, NOTHING, VERDICT, Examples
from fedvision.data.pictures import ENDINGS, existing, read_images
from fedvision.data.pool import Pool
from fedvision.errors import DataError
from fedvision.registry import datasets
from fedvision.settings import Count, Fraction, nearest

VERDICTS = ("contradiction", "neutral", "entailment")
"""The labels in files, in the order of their numbers."""


@datasets("snli-ve")
def snli_ve(
    *,
    root: str,
    annotations: str = "ve_train.json",
    test_annotations: str | None = None,
    images: str = "images",
    test_fraction: Fraction = 0.2,
    size: Count = 224,
    hypotheses: Count = 8,
    rng: np.random.Generator,
) -> Pool:
    """Your sentences that pictures entail, contradict or leave open, from JSON as ALBEF's for SNLI-VE.

    Fields: ``image``, all of a picture, stretched to a square; ``hypothesis`` and ``verdict`` (``fedvision.data.examples``); ``label``, -1.
    A record is ``{image, sentence, label}``, the label being ``entailment``, ``neutral`` or ``contradiction``. A picture with more
    sentences is there again.

    Args:
        root: folder that the other paths start from.
        annotations: the JSON file to train on.
        test_annotations: that of the test set; not given: a random share of the pictures is it.
        images: folder of the pictures; one that a record names without an ending ends in ``.jpg``.
        test_fraction: share of the test set where no file says what it is; strictly between 0 and 1.
        size: of the pictures in pixels.
        hypotheses: of an example.
        rng: draws the test set.

    Raises:
        DataError: a missing file or picture, JSON of another kind, an unknown label.
    """
    folder = existing(Path(root), "set data.root")
    train = _judged(folder / annotations, folder / images, "data.annotations")
    if test_annotations is not None:
        test = _judged(folder / test_annotations, folder / images, "data.test_annotations")
    else:
        train, test = divided(train, test_fraction, str(folder / annotations), rng)
    return Pool(_examples(train, size, hypotheses), _examples(test, size, hypotheses), classes=0)


def _judged(file: Path, images: Path, setting: str) -> dict[Path, list[tuple[str, int]]]:
    """Sentences and verdicts by picture."""
    some = records(file, setting, "a list of {image, sentence, label} as ALBEF's")
    found = grouped((_picture(record, images), (record.text("sentence"), _verdict(record))) for record in some)
    check_there(found, str(file), "data.images")
    return found


def _picture(record: Record, images: Path) -> Path:
    name = record.text("image")
    return images / (name if Path(name).suffix.lower() in ENDINGS else f"{name}.jpg")


def _verdict(record: Record) -> int:
    label = record.text("label")
    if label not in VERDICTS:
        raise DataError(f"{record.where} has 'label' = {label!r}; {nearest(label, list(VERDICTS))}")
    return VERDICTS.index(label)


def _examples(judged: Mapping[Path, Sequence[tuple[str, int]]], size: int, hypotheses: int) -> Examples:
    parts = in_parts(judged, hypotheses)
    number = max((len(some) for _, some in parts), default=0)
    return Examples(
        {
            IMAGE: read_images([picture for picture, _ in parts], size, fit="stretch"),
            HYPOTHESIS: encoded([[text for text, _ in some] for _, some in parts], number),
            VERDICT: filled([[verdict for _, verdict in some] for _, some in parts], number, NOTHING[VERDICT]),
            LABEL: torch.full((len(parts),), -1),
        }
    )
