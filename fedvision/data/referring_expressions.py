"""Your own expressions that refer to things in pictures, with boxes and proposals, from JSON as ALBEF's for RefCOCO+."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedvision.data.annotations import box_of, check_there, divided, encoded, filled, grouped, in_parts, read_json, records
from fedvision.data.examples import BOX, EXPRESSION, IMAGE, LABEL, PROPOSALS, Examples
from fedvision.data.pictures import existing, read_images, sizes
from fedvision.data.pool import Pool
from fedvision.errors import DataError
from fedvision.registry import datasets
from fedvision.settings import Count, Fraction

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of the picture's file."""

NO_BOX: Box = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Reference:
    """What is referred to: its box, and the picture's id in the file of detections."""

    box: Box
    picture: str


@dataclass(frozen=True)
class Expression:
    """Words, and what they refer to, if that is known."""

    text: str
    reference: Reference | None


@datasets("refcoco")
def refcoco(
    *,
    root: str,
    annotations: str = "refcoco+_train.json",
    test_annotations: str | None = None,
    refs: str = "refs.json",
    instances: str | None = None,
    detections: str = "dets.json",
    images: str = "images",
    test_fraction: Fraction = 0.2,
    size: Count = 224,
    expressions: Count = 8,
    most_proposals: Count = 100,
    rng: np.random.Generator,
) -> Pool:
    """Your expressions for things in pictures, with boxes and proposals, from JSON as ALBEF's for RefCOCO+.

    Fields: ``image``, all of a picture, stretched to a square, and the boxes with it; ``expression``, ``box`` and ``proposals``
    (``fedvision.data.examples``); ``label`` is -1. A record is ``{image, text, ref_id}``, ``text`` being one or a list. A picture with more
    expressions is there again.

    Args:
        root: folder that the other paths start from.
        annotations: the JSON file to train on. Its references may be unknown: their boxes are 0.
        test_annotations: that of the test set; not given: a random share of the pictures is it.
        refs: JSON list of ``{ref_id, image_id, bbox: [left, top, width, height]}``, or with ``ann_id`` instead of ``bbox``.
        instances: JSON as COCO's, whose ``annotations`` have ``id`` and ``bbox``, where ``refs`` have ``ann_id``.
        detections: JSON table of the image's id -> list of [left, top, width, height], the proposals of a detector.
        images: folder of the pictures.
        test_fraction: share of the test set where no file says what it is; strictly between 0 and 1.
        size: of the pictures in pixels.
        expressions: of an example.
        most_proposals: of a picture; later ones are left out.
        rng: draws the test set.

    Raises:
        DataError: a missing file or picture, JSON of another kind, an unknown reference in the test set.
    """
    folder = existing(Path(root), "set data.root")
    known = _references(folder / refs, None if instances is None else folder / instances)
    train = _said(folder / annotations, folder / images, known, "data.annotations", whole=test_annotations is None)
    if test_annotations is not None:
        test = _said(folder / test_annotations, folder / images, known, "data.test_annotations", whole=True)
    else:
        train, test = divided(train, test_fraction, str(folder / annotations), rng)
    proposed = _detections(folder / detections, most_proposals)
    return Pool(_examples(train, proposed, size, expressions), _examples(test, proposed, size, expressions), classes=0)


def _references(file: Path, instances: Path | None) -> dict[int | str, Reference]:
    """References by id."""
    boxes = {}
    if instances is not None:
        found = records(instances, "data.instances", "a file as COCO's instances", "annotations")
        boxes = {record.key("id"): record for record in found}
    references = {}
    for record in records(file, "data.refs", "a list of {ref_id, image_id, bbox}"):
        own = record if "bbox" in record.values else boxes.get(record.key("ann_id"))
        if own is None:
            fact = f"{record.where} has the 'ann_id' {record.values['ann_id']!r}, which {instances or 'no file'} knows"
            raise DataError(f"{fact}; add 'bbox', or set data.instances to COCO's instances")
        references[record.key("ref_id")] = Reference(own.box("bbox"), str(record.key("image_id")))
    return references


def _said(file: Path, images: Path, known: Mapping[int | str, Reference], setting: str, whole: bool) -> dict[Path, list[Expression]]:
    """Expressions by picture; each of a known reference, if ``whole``."""
    pairs = []
    for record in records(file, setting, "a list of {image, text, ref_id} as ALBEF's"):
        reference = known.get(record.key("ref_id")) if whole or "ref_id" in record.values else None
        if reference is None and whole:
            raise DataError(f"{record.where} has the 'ref_id' {record.values['ref_id']!r}, which data.refs does not know; add it there")
        pairs += [(images / record.text("image"), Expression(text, reference)) for text in record.texts("text")]
    found = grouped(pairs)
    check_there(found, str(file), "data.images")
    return found


def _detections(file: Path, most: int) -> dict[str, list[Box]]:
    """Proposals by the picture's id."""
    content = read_json(file, "data.detections")
    if not isinstance(content, dict) or not all(isinstance(boxes, list) for boxes in content.values()):
        raise DataError(f"{file} is no table of lists; give one of the image's id -> list of [left, top, width, height]")
    return {key: [box_of(box, f"{file}, {key!r}") for box in boxes[:most]] for key, boxes in content.items()}


def _examples(said: Mapping[Path, Sequence[Expression]], proposed: Mapping[str, Sequence[Box]], size: int, expressions: int) -> Examples:
    parts = in_parts(said, expressions)
    number = max((len(some) for _, some in parts), default=0)
    boxes = [[NO_BOX if one.reference is None else one.reference.box for one in some] for _, some in parts]
    offered = [_offered(some, proposed) for _, some in parts]
    most = max(map(len, offered), default=0)
    scale = size / torch.tensor(sizes([picture for picture, _ in parts])).reshape(-1, 1, 2).repeat(1, 1, 2)
    return Examples(
        {
            IMAGE: read_images([picture for picture, _ in parts], size, fit="stretch"),
            EXPRESSION: encoded([[one.text for one in some] for _, some in parts], number),
            BOX: filled(boxes, number, NO_BOX).reshape(len(parts), number, 4) * scale,
            PROPOSALS: filled(offered, most, NO_BOX).reshape(len(parts), most, 4) * scale,
            LABEL: torch.full((len(parts),), -1),
        }
    )


def _offered(some: Sequence[Expression], proposed: Mapping[str, Sequence[Box]]) -> Sequence[Box]:
    """The proposals of the picture that some expressions are about."""
    pictures = [one.reference.picture for one in some if one.reference is not None]
    return next((proposed[picture] for picture in pictures if picture in proposed), ())
