"""COCO's panoptic maps by supercategories: things, and stuff.

Source: Kirillov et al., arXiv 1801.00868, for the files; Ziegler and Asano, arXiv 2204.13101, section 5, for the classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from fedvision.data.annotations import Record, listed, read_json
from fedvision.data.examples import IGNORED, Examples
from fedvision.data.pictures import Fit, existing, filled, fitted
from fedvision.data.pool import Pool
from fedvision.data.semantic_maps import check_pairs, with_maps
from fedvision.errors import DataError
from fedvision.registry import datasets
from fedvision.settings import Count, PositiveFraction

THINGS = (
    "accessory", "animal", "appliance", "electronic", "food", "furniture", "indoor", "kitchen", "outdoor", "person", "sports", "vehicle",
)  # fmt: skip
"""The supercategories of things; class k is the one at k."""

STUFF = (
    "building", "ceiling", "floor", "food-stuff", "furniture-stuff", "ground", "plant", "raw-material", "sky", "solid", "structural",
    "textile", "wall", "water", "window",
)  # fmt: skip
"""The supercategories of stuff; class k is the one at k."""

OTHER = "other"
"""The supercategory that is no class, of neither."""

TRAIN, TEST = "annotations/panoptic_train2017.json", "annotations/panoptic_val2017.json"

V = TypeVar("V")

KIND = "COCO's panoptic annotations"


@datasets("coco-things")
def coco_things(
    *,
    root: str,
    annotations: str = TRAIN,
    images: str = "train2017",
    test_annotations: str = TEST,
    test_images: str = "val2017",
    size: Count = 224,
    fit: Fit = "crop",
    fraction: PositiveFraction = 1.0,
    rng: np.random.Generator,
) -> Pool:
    """COCO with a class for every pixel, the 12 supercategories of things; stuff is to be ignored; its panoptic files needed.

    Fields: ``image`` uint8 [n, 3, size, size]; ``semseg`` uint8 [n, size, size] of 0 to 11, in alphabetical order, and 255; ``labels``
    uint8 [n, 12], the classes to be seen in it; ``label`` is -1.

    Args:
        root: the folder that the others are in.
        annotations: the JSON file to train on; the maps are in a folder of that name without its ending.
        images: the folder of its pictures.
        test_annotations: the JSON file to test on.
        test_images: the folder of its pictures.
        size: of the pictures in pixels.
        fit: ``crop``: the largest square in the middle of each; ``stretch``: all of it.
        fraction: share of the training pictures that are used.
        rng: draws these.

    Raises:
        DataError: missing or broken files, maps that differ in size from their picture, segments or categories that are not known.
    """
    train, test = (existing(Path(root), "set data.root") / file for file in (annotations, test_annotations))
    reading = Reading(THINGS, True, size, fit)
    return reading.pool(Part(train, Path(root) / images), Part(test, Path(root) / test_images), fraction, rng)


@datasets("coco-stuff")
def coco_stuff(
    *,
    root: str,
    annotations: str = TRAIN,
    images: str = "train2017",
    test_annotations: str = TEST,
    test_images: str = "val2017",
    size: Count = 224,
    fit: Fit = "crop",
    fraction: PositiveFraction = 1.0,
    rng: np.random.Generator,
) -> Pool:
    """COCO with a class for every pixel, 15 supercategories of stuff; things are to be ignored; its panoptic files needed.

    Fields as of ``coco-things``, ``semseg`` of 0 to 14, in alphabetical order, and 255, ``labels`` uint8 [n, 15].

    Args:
        root: the folder that the others are in.
        annotations: the JSON file to train on; the maps are in a folder of that name without its ending.
        images: the folder of its pictures.
        test_annotations: the JSON file to test on.
        test_images: the folder of its pictures.
        size: of the pictures in pixels.
        fit: ``crop``: the largest square in the middle of each; ``stretch``: all of it.
        fraction: share of the training pictures that are used.
        rng: draws these.

    Raises:
        DataError: missing or broken files, maps that differ in size from their picture, segments or categories that are not known.
    """
    train, test = (existing(Path(root), "set data.root") / file for file in (annotations, test_annotations))
    reading = Reading(STUFF, False, size, fit)
    return reading.pool(Part(train, Path(root) / images), Part(test, Path(root) / test_images), fraction, rng)


@dataclass(frozen=True)
class Part:
    """The files of a part of the data: annotations, and the folder of pictures."""

    annotations: Path
    images: Path


@dataclass(frozen=True)
class Panoptic:
    """One picture: its file, its map's, and the class of each segment by its id."""

    picture: Path
    map: Path
    segments: Mapping[int, int]


@dataclass(frozen=True)
class Reading:
    """How files become examples.

    Attributes:
        names: of the supercategories that are the classes.
        things: whether they are of things, or of stuff.
        size, fit: as the data sets have them.
    """

    names: Sequence[str]
    things: bool
    size: int
    fit: Fit

    def pool(self, train: Part, test: Part, fraction: float, rng: np.random.Generator) -> Pool:
        """A share of what is to be trained on, and all to be tested on."""
        some = self.panoptic(train)
        if fraction < 1:
            drawn = rng.permutation(len(some))[: max(round(fraction * len(some)), 1)]
            some = [some[number] for number in sorted(drawn)]
        return Pool(self.examples(some), self.examples(self.panoptic(test)), classes=len(self.names))

    def panoptic(self, part: Part) -> list[Panoptic]:
        """What an annotation file says, in its order.

        Raises:
            DataError: a file of another kind, a picture or a category that it does not describe.
        """
        file = part.annotations
        content, maps = read_json(file, "data.annotations"), file.with_suffix("")
        if not isinstance(content, dict):
            raise DataError(f"{file} holds a {type(content).__name__}, not a table; give {KIND}")
        classes = {record.key("id"): self._class(record) for record in _within(content, file, "categories")}
        pictures = {record.key("id"): record.text("file_name") for record in _within(content, file, "images")}
        found = []
        for record in _within(content, file, "annotations"):
            picture = _known(record, "image_id", pictures, "picture under 'images'")
            segments = listed(record.value("segments_info"), f"{record.where}, 'segments_info'", KIND)
            table = {_number(one): _known(one, "category_id", classes, "category under 'categories'") for one in segments}
            found.append(Panoptic(part.images / picture, maps / record.text("file_name"), table))
        if not found:
            raise DataError(f"{file} describes no picture; give {KIND}")
        return found

    def examples(self, some: Sequence[Panoptic]) -> Examples:
        """Pictures with their maps."""
        pictures = [one.picture for one in some]
        check_pairs(pictures, [one.map for one in some], "unpack COCO's archives of pictures and panoptic maps there")
        return with_maps(pictures, self._maps(some), self.fit, 0, len(self.names))

    def _maps(self, some: Sequence[Panoptic]) -> Tensor:
        def one(number: int, picture: Image.Image) -> np.ndarray:
            if picture.mode != "RGB":
                raise ValueError(f"it has the mode {picture.mode}, where the red, green and blue of segments are expected")
            colors = fitted(picture, self.size, Image.Resampling.NEAREST, self.fit)
            return classes_of(segment_ids(colors), some[number].segments, some[number].map)

        return filled([panoptic.map for panoptic in some], one, (self.size, self.size), np.uint8)

    def _class(self, category: Record) -> int:
        """The class of a category; 255 where it is of the other kind, or other."""
        name, thing = category.text("supercategory"), category.value("isthing")
        if name not in (*(THINGS if thing else STUFF), OTHER):
            known = ", ".join(THINGS if thing else STUFF)
            raise DataError(f"{category.where} has the supercategory {name!r}, which is none of {known}; give {KIND}")
        return self.names.index(name) if bool(thing) == self.things and name != OTHER else IGNORED


def segment_ids(colors: np.ndarray) -> np.ndarray:
    """The segment of each pixel by its color [..., 3]: red + 256 green + 256^2 blue; 0: none.

    >>> int(segment_ids(np.array([3, 2, 1], np.uint8)))
    66051
    """
    return np.asarray(colors.astype(np.int64) @ np.array([1, 256, 256**2]))


def classes_of(ids: np.ndarray, segments: Mapping[int, int], file: Path) -> np.ndarray:
    """The class of each pixel [h, w], uint8, by its segment; 255 where there is none.

    Raises:
        DataError: a segment that is not described.
    """
    table = {0: IGNORED, **segments}
    known = np.array(sorted(table))
    where = np.searchsorted(known, ids).clip(max=len(known) - 1)
    odd = ids[known[where] != ids]
    if len(odd):
        raise DataError(f"{file} has the segment {odd[0]}, which its annotation does not describe; give map and annotation of one release")
    return np.asarray(np.array([table[one] for one in known.tolist()], np.uint8)[where])


def _within(content: object, file: Path, key: str) -> list[Record]:
    return listed(content, str(file), KIND, key)


def _number(record: Record) -> int:
    value = record.key("id")
    if not isinstance(value, int) or value <= 0:
        raise DataError(f"{record.where} has 'id' = {value!r}; give a whole number above 0, red + 256 green + 256^2 blue")
    return value


def _known(record: Record, key: str, known: Mapping[int | str, V], what: str) -> V:
    """What is known under the identity that a record names."""
    value = record.key(key)
    if value not in known:
        raise DataError(f"{record.where} has {key!r} = {value!r}, but there is no such {what}; give {KIND}")
    return known[value]
