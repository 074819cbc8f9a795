"""Your own pictures with depth and semantic maps, a folder a modality."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from fedvision.data.examples import DEPTH, IGNORED, IMAGE, LABEL, SEMSEG, Examples
from fedvision.data.pictures import ENDINGS, existing, pictures_below, read_images, read_maps, sizes
from fedvision.data.pool import Pool
from fedvision.errors import DataError
from fedvision.registry import datasets
from fedvision.settings import Count, Fraction, Positive, nearest

Paired = Mapping[str, Path]
"""The files of one example, by modality, ``rgb`` among them."""


@datasets("paired-folders")
def paired_folders(
    *,
    root: str,
    modalities: tuple[str, ...] = ("depth", "semseg"),
    size: Count = 224,
    depth_scale: Positive = 1000.0,
    semantic_classes: Count = 150,
    test_fraction: Fraction = 0.2,
    rng: np.random.Generator,
) -> Pool:
    """Your pictures with depth and semantic maps, files of the same names in a folder for each.

    They are ``root/rgb``, ``root/depth`` and ``root/semseg``, of which a random share is the test set, or all three in ``root/train`` and
    in ``root/test``. Names agree without their endings. Fields: ``image``; ``depth`` float32 [n, 1, size, size] in meters; ``semseg`` uint8
    [n, size, size], 255: to be ignored; ``label`` is -1.

    Args:
        root: the folder.
        modalities: besides rgb, of ``depth`` and ``semseg``.
        size: of the pictures in pixels.
        depth_scale: what one meter is in the depth files: 1000 for millimeters in PNGs with 16 bits; where they say 0, nothing was
            measured, and the depth is 0.
        semantic_classes: ids in the semantic maps run from 0 to ``semantic_classes`` - 1, or are 255.
        test_fraction: share of the test set where there are no folders ``train`` and ``test``; strictly between 0 and 1.
        rng: draws the test set.

    Raises:
        DataError: a missing folder or file, maps that differ in size from their picture, ids out of range, an unknown modality.
    """
    folder = existing(Path(root), "set data.root")
    for name in modalities:
        if name not in ("depth", "semseg"):
            raise DataError(f"data.modalities names {name!r}; {nearest(name, ['depth', 'semseg'])}")
    if semantic_classes > IGNORED:
        raise DataError(f"paired-folders.semantic_classes = {semantic_classes}; ids are stored in a byte, choose at most {IGNORED}")

    def read(pairs: Sequence[Paired]) -> Examples:
        return _paired(pairs, modalities, size, depth_scale, semantic_classes)

    if (folder / "train").is_dir() and (folder / "test").is_dir():
        train, test = (pairs_below(folder / part, modalities) for part in ("train", "test"))
        return Pool(read(train), read(test), classes=0)
    pairs = pairs_below(folder, modalities)
    order, cut = rng.permutation(len(pairs)), round(test_fraction * len(pairs))
    if not 0 < cut < len(pairs):
        raise DataError(
            f"paired-folders.test_fraction = {test_fraction} of {len(pairs)} pictures leaves none to train or to test on; choose e.g. 0.2"
        )
    return Pool(read([pairs[i] for i in order[cut:]]), read([pairs[i] for i in order[:cut]]), classes=0)


def pairs_below(folder: Path, modalities: Sequence[str]) -> list[Paired]:
    """The examples of a folder, sorted by name.

    Raises:
        DataError: a missing folder, a picture without a map, a map that differs in size from its picture.
    """
    kinds = ("rgb", *modalities)
    for kind in kinds:
        existing(folder / kind, f"it holds the modality {kind!r}")
    named = {kind: {file.relative_to(folder / kind).with_suffix(""): file for file in pictures_below(folder / kind)} for kind in kinds}
    if not named["rgb"]:
        raise DataError(f"{folder / 'rgb'} holds no picture ({', '.join(ENDINGS)}); put some there")
    for kind in modalities:
        for name, file in named["rgb"].items():
            if name not in named[kind]:
                raise DataError(f"{file} has no {kind} map: {folder / kind / name}.png is missing; add it or remove the picture")
    pairs: list[Paired] = [{kind: named[kind][name] for kind in kinds} for name in named["rgb"]]
    of_kind = {kind: sizes([pair[kind] for pair in pairs]) for kind in kinds}
    for kind in modalities:
        for pair, seen, mapped in zip(pairs, of_kind["rgb"], of_kind[kind], strict=True):
            if seen != mapped:
                raise DataError(
                    f"{pair[kind]} is {mapped[0]}x{mapped[1]}, its picture {pair['rgb']} is {seen[0]}x{seen[1]}; make them the same size"
                )
    return pairs


def _paired(pairs: Sequence[Paired], modalities: Sequence[str], size: int, depth_scale: float, classes: int) -> Examples:
    fields = {IMAGE: read_images([pair["rgb"] for pair in pairs], size)}
    if "depth" in modalities:
        fields[DEPTH] = (read_maps([pair["depth"] for pair in pairs], size).double() / depth_scale).float()[:, None]
    if "semseg" in modalities:
        files = [pair["semseg"] for pair in pairs]
        semseg = read_maps(files, size)
        wrong = (((semseg < 0) | (semseg >= classes)) & (semseg != IGNORED)).flatten(1)
        if wrong.any():
            first = int(wrong.any(dim=1).nonzero()[0])
            value = int(semseg[first].flatten()[wrong[first]][0])
            raise DataError(
                f"{files[first]} has the id {value}, beyond 0..{classes - 1} and {IGNORED}; raise paired-folders.semantic_classes"
            )
        fields[SEMSEG] = semseg.to(torch.uint8)
    return Examples(fields | {LABEL: torch.full((len(pairs),), -1)})
