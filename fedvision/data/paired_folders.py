"""Your own pictures with depth and semantic maps and other modalities, a folder each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedvision.data.examples import DEPTH, ENVIRONMENT, IGNORED, IMAGE, LABEL, LABELS, SEMSEG, Examples, has
from fedvision.data.pictures import ENDINGS, Values, existing, pictures_below, read_images, read_maps, read_values, sizes, values_of
from fedvision.data.pool import Pool
from fedvision.errors import DataError
from fedvision.registry import datasets
from fedvision.settings import Count, Fraction, Positive, nearest

Paired = Mapping[str, Path]
"""The files of one example, by modality, ``rgb`` among them."""

TAKEN = ("rgb", IMAGE, LABEL, LABELS, ENVIRONMENT)
"""Names that mean something else than a folder of values."""


@datasets("paired-folders")
def paired_folders(
    *,
    root: str,
    modalities: tuple[str, ...] = (DEPTH, SEMSEG),
    size: Count = 224,
    depth_scale: Positive = 1000.0,
    semantic_classes: Count = 150,
    missing: Literal["refuse", "allow"] = "refuse",
    test_fraction: Fraction = 0.2,
    rng: np.random.Generator,
) -> Pool:
    """Your pictures with depth and semantic maps and what else you have, files of the same names in a folder for each.

    They are ``root/rgb``, ``root/depth``, ``root/semseg`` and so on, of which a random share is the test set, or all in ``root/train`` and
    in ``root/test``. Names agree without their endings. Fields: ``image``; ``depth`` float32 [n, 1, size, size] in meters; ``semseg`` uint8
    [n, size, size], 255: to be ignored; of any other folder its name, float32 [n, 1 or 3, size, size] in [0, 1], the pictures' gray (of 8
    or 16 bits) or color; ``label`` is -1.

    Args:
        root: the folder.
        modalities: the folders besides rgb.
        size: of the pictures in pixels.
        depth_scale: what one meter is in the depth files: 1000 for millimeters in PNGs with 16 bits; where they say 0, nothing was
            measured, and the depth is 0.
        semantic_classes: ids in the semantic maps run from 0 to ``semantic_classes`` - 1, or are 255.
        missing: whether a picture may lack a map. If so, ``has_depth`` and the like say which have one, and a map without a picture is
            refused, since a slip in its name would make it missing; if not, maps without a picture are not read.
        test_fraction: share of the test set where there are no folders ``train`` and ``test``; strictly between 0 and 1.
        rng: draws the test set.

    Raises:
        DataError: a missing folder or file, maps that differ in size from their picture, ids out of range, values of several kinds in a
            folder, a modality whose name is taken.
    """
    folder = existing(Path(root), "set data.root")
    split = (folder / "train").is_dir() and (folder / "test").is_dir()
    parts = [folder / "train", folder / "test"] if split else [folder]
    for part in parts:
        _check_folders(part, modalities)
    if semantic_classes > IGNORED:
        raise DataError(f"paired-folders.semantic_classes = {semantic_classes}; ids are stored in a byte, choose at most {IGNORED}")
    pairs = [pairs_below(part, modalities, missing) for part in parts]
    files = {name: [pair[name] for part in pairs for pair in part if name in pair] for name in modalities if name not in (DEPTH, SEMSEG)}
    for name, of_name in files.items():
        if not of_name:
            raise DataError(f"no picture below {folder} has a map in a folder {name!r}; leave {name!r} out of data.modalities")
    reading = Reading(size, depth_scale, semantic_classes, missing, {name: values_of(of_name) for name, of_name in files.items()})
    if split:
        train, test = (reading.examples(part, modalities) for part in pairs)
        return Pool(train, test, classes=0)
    return _drawn(pairs[0], reading, modalities, test_fraction, rng)


@dataclass(frozen=True)
class Reading:
    """How files become fields.

    Attributes:
        size, depth_scale, classes, missing: as ``paired_folders`` has them, ``classes`` being ``semantic_classes``.
        values: what the pictures of the other folders hold.
    """

    size: int
    depth_scale: float
    classes: int
    missing: Literal["refuse", "allow"]
    values: Mapping[str, Values]

    def examples(self, pairs: Sequence[Paired], modalities: Sequence[str]) -> Examples:
        """The examples of these files, in their order."""
        fields = {IMAGE: read_images([pair["rgb"] for pair in pairs], self.size)}
        for name in modalities:
            there = torch.tensor([name in pair for pair in pairs], dtype=torch.bool)
            read = self._field(name, [pair[name] for pair in pairs if name in pair])
            fields[name] = read if there.all() else _spread(read, there, IGNORED if name == SEMSEG else 0)
            if self.missing == "allow":
                fields[has(name)] = there
        return Examples(fields | {LABEL: torch.full((len(pairs),), -1)})

    def _field(self, name: str, files: Sequence[Path]) -> Tensor:
        if name == DEPTH:
            return (read_maps(files, self.size).double() / self.depth_scale).float()[:, None]
        return self._semseg(files) if name == SEMSEG else read_values(files, self.size, self.values[name])

    def _semseg(self, files: Sequence[Path]) -> Tensor:
        ids = read_maps(files, self.size)
        wrong = (((ids < 0) | (ids >= self.classes)) & (ids != IGNORED)).flatten(1)
        if wrong.any():
            first = int(wrong.any(dim=1).nonzero()[0])
            value = int(ids[first].flatten()[wrong[first]][0])
            fact = f"{files[first]} has the id {value}, beyond 0..{self.classes - 1} and {IGNORED}"
            raise DataError(f"{fact}; raise paired-folders.semantic_classes")
        return ids.to(torch.uint8)


def pairs_below(folder: Path, modalities: Sequence[str], missing: Literal["refuse", "allow"] = "refuse") -> list[Paired]:
    """The examples of a folder, sorted by name.

    Raises:
        DataError: a missing folder, a map that differs in size from its picture; a picture without a map, unless that is allowed,
            and then a map without a picture.
    """
    kinds = ("rgb", *modalities)
    named = {kind: {file.relative_to(folder / kind).with_suffix(""): file for file in pictures_below(folder / kind)} for kind in kinds}
    if not named["rgb"]:
        raise DataError(f"{folder / 'rgb'} holds no picture ({', '.join(ENDINGS)}); put some there")
    for kind in modalities:
        _check_names(folder, kind, named["rgb"], named[kind], missing)
    pairs: list[Paired] = [{kind: named[kind][name] for kind in kinds if name in named[kind]} for name in named["rgb"]]
    of_picture = sizes([pair["rgb"] for pair in pairs])
    for kind in modalities:
        _check_sizes(kind, [(pair, seen) for pair, seen in zip(pairs, of_picture, strict=True) if kind in pair])
    return pairs


def _drawn(pairs: Sequence[Paired], reading: Reading, modalities: Sequence[str], test_fraction: float, rng: np.random.Generator) -> Pool:
    """A pool whose test set is a random share of the pictures."""
    order, cut = rng.permutation(len(pairs)), round(test_fraction * len(pairs))
    if not 0 < cut < len(pairs):
        raise DataError(
            f"paired-folders.test_fraction = {test_fraction} of {len(pairs)} pictures leaves none to train or to test on; choose e.g. 0.2"
        )
    train, test = (reading.examples([pairs[i] for i in part], modalities) for part in (order[cut:], order[:cut]))
    return Pool(train, test, classes=0)


def _spread(read: Tensor, there: Tensor, nothing: int) -> Tensor:
    """Values [m, ...] where ``there`` [n] is True, m times, and ``nothing`` elsewhere, [n, ...]."""
    whole = torch.full((len(there), *read.shape[1:]), nothing, dtype=read.dtype)
    whole[there] = read
    return whole


def _check_folders(folder: Path, modalities: Sequence[str]) -> None:
    existing(folder / "rgb", "it holds the pictures")
    others = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in TAKEN)
    for name in modalities:
        if name in TAKEN or name.startswith(has("")):
            raise DataError(f"data.modalities names {name!r}, which means something else; give that folder another name")
        if not (folder / name).is_dir():
            raise DataError(f"there is no folder {folder / name}: data.modalities names {name!r}; {nearest(name, others)}")
    if len(set(modalities)) < len(modalities):
        raise DataError(f"data.modalities = {list(modalities)} names a folder twice; name it once")


def _check_names(folder: Path, kind: str, pictures: Mapping[Path, Path], maps: Mapping[Path, Path], missing: str) -> None:
    if missing == "allow":
        alone = next((file for name, file in maps.items() if name not in pictures), None)
        if alone is not None:
            raise DataError(f"{alone} has no picture of the same name in {folder / 'rgb'}; rename or remove it")
        return
    for name, file in pictures.items():
        if name not in maps:
            remedy = 'add it or remove the picture, or set paired-folders.missing = "allow"'
            raise DataError(f"{file} has no {kind} map: {folder / kind / name}.png is missing; {remedy}")


def _check_sizes(kind: str, pairs: Sequence[tuple[Paired, tuple[int, int]]]) -> None:
    for (pair, seen), mapped in zip(pairs, sizes([pair[kind] for pair, _ in pairs]), strict=True):
        if seen != mapped:
            raise DataError(
                f"{pair[kind]} is {mapped[0]}x{mapped[1]}, its picture {pair['rgb']} is {seen[0]}x{seen[1]}; make them the same size"
            )
