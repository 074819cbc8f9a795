"""Your own pictures with captions, from the JSON files of COCO and of Karpathy's splits."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedvision.data.examples import CAPTION, IMAGE, LABEL, Examples
from fedvision.data.pictures import Fit, existing, read_images
from fedvision.data.pool import Pool
from fedvision.data.texts import encode_texts
from fedvision.errors import DataError
from fedvision.registry import datasets
from fedvision.settings import Count, Fraction


@dataclass(frozen=True)
class Captioned:
    """A picture's file, its captions, and the part of the data that it belongs to, if the annotations say so."""

    file: Path
    texts: list[str]
    part: str | None = None


@datasets("captions")
def captions(
    *,
    root: str,
    annotations: str = "captions.json",
    images: str = "images",
    test_annotations: str | None = None,
    test_images: str | None = None,
    test_fraction: Fraction = 0.2,
    size: Count = 224,
    fit: Fit = "crop",
    wordings: Count = 5,
    rng: np.random.Generator,
) -> Pool:
    """Your pictures with captions, from JSON as COCO's or as Karpathy's splits of Flickr30k and COCO.

    Fields: ``image``; ``caption`` uint8 [n, wordings, length] (``fedvision.data.texts``), empty where a picture has fewer; ``label`` is -1.
    The test set is that of ``test_annotations``, else the pictures of the splits ``val`` and ``test``, else a random share.

    Args:
        root: folder that the other paths start from.
        annotations: the JSON file.
        images: folder that holds the pictures it names.
        test_annotations: JSON file of the test set, such as COCO's ``captions_val2017.json``.
        test_images: folder of its pictures; not given: ``images``.
        test_fraction: share of the test set where nothing else says what it is; strictly between 0 and 1.
        size: of the pictures in pixels.
        fit: ``crop``: the largest square in the middle of each; ``stretch``: all of it, as ALBEF sees pictures to be found.
        wordings: captions a picture; further ones are left out.
        rng: draws the test set.

    Raises:
        DataError: a missing file, JSON of another kind, pictures without a caption.
    """
    folder = existing(Path(root), "set data.root")
    train = captioned(folder / annotations, folder / images)
    if test_annotations is not None:
        test = captioned(folder / test_annotations, folder / (test_images or images))
    elif any(item.part in ("val", "test") for item in train):
        test = [item for item in train if item.part in ("val", "test")]
        train = [item for item in train if item.part not in ("val", "test")]
    else:
        order = rng.permutation(len(train))
        cut = round(test_fraction * len(train))
        train, test = [train[i] for i in order[cut:]], [train[i] for i in order[:cut]]
    if not train or not test:
        raise DataError(
            f"{folder / annotations} leaves {len(train)} pictures to train and {len(test)} to test on; set data.test_fraction, e.g. 0.2"
        )
    return Pool(_with_captions(train, size, fit, wordings), _with_captions(test, size, fit, wordings), classes=0)


def captioned(file: Path, images: Path) -> list[Captioned]:
    """What an annotation file says, in its order of pictures.

    Args:
        file: JSON as of COCO or of Karpathy's splits.
        images: folder of the pictures.

    Raises:
        DataError: a file that is missing or of another kind, a picture that is missing or has no caption.
    """
    content = _json(file)
    try:
        listed = _of_karpathy(content, images) if "annotations" not in content else _of_coco(content, images)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is no caption file ({error!r}); give one with 'images' and 'annotations' as COCO's, or with 'images' as Karpathy's"
        ) from error
    for item in listed:
        if not item.texts:
            raise DataError(f"{file} has no caption for {item.file.name}; add one or leave the picture out")
    missing = [item.file for item in listed if not item.file.is_file()]
    if missing:
        raise DataError(f"{file} names {len(listed)} pictures, of which {len(missing)} are missing, such as {missing[0]}; set data.images")
    return listed


def _of_coco(content: Mapping[str, Any], images: Path) -> list[Captioned]:
    texts: dict[Any, list[str]] = {picture["id"]: [] for picture in content["images"]}
    for annotation in content["annotations"]:
        texts[annotation["image_id"]].append(annotation["caption"].strip())
    return [Captioned(images / picture["file_name"], texts[picture["id"]]) for picture in content["images"]]


def _of_karpathy(content: Mapping[str, Any], images: Path) -> list[Captioned]:
    return [
        Captioned(
            images / picture.get("filepath", "") / picture["filename"],
            [sentence["raw"].strip() for sentence in picture["sentences"]],
            picture.get("split"),
        )
        for picture in content["images"]
    ]


def _json(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON ({error}); set data.annotations to the annotation file") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a {type(content).__name__}, not a table; set data.annotations to a file as of COCO or Karpathy")
    return content


def _with_captions(some: Sequence[Captioned], size: int, fit: Fit, wordings: int) -> Examples:
    texts = encode_texts([item.texts[:wordings] for item in some])
    return Examples({IMAGE: read_images([item.file for item in some], size, fit), CAPTION: texts, LABEL: torch.full((len(some),), -1)})
