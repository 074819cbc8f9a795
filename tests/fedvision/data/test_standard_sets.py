"""The usual labeled sets from small files in the true formats."""

import hashlib
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR100, STL10, SVHN

from fedvision.data.card import card
from fedvision.data.partitions import iid
from fedvision.data.pool import deal
from fedvision.data.standard_sets import cifar10, cifar100, mnist, stl10, stl10_folds, svhn, voc_segmentation
from fedvision.errors import DataError
from fedvision.registry import datasets
from fedvision.settings import resolve

SETS = {"mnist": mnist, "cifar10": cifar10, "cifar100": cifar100, "svhn": svhn, "stl10": stl10, "voc-segmentation": voc_segmentation}


def rng(seed=0):
    return np.random.default_rng(seed)


def pixels(*shape):
    return rng().integers(256, size=shape, dtype=np.uint8)


def digest(file):
    return hashlib.md5(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", SETS)
def test_the_sets_are_registered_and_want_only_a_root(name):
    assert datasets.find(name) is SETS[name]
    assert resolve(datasets.find(name), {"root": "data"}, "data")["download"] is False


@pytest.mark.parametrize("name", SETS)
def test_missing_files_are_named_with_their_folder_and_the_remedy(name, tmp_path):
    with pytest.raises(
        DataError, match=r"cannot be read from .*: missing .*; put the unpacked files .* there, or set download = true"
    ) as caught:
        SETS[name](root=str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_mnist_is_read_as_it_is(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    images, labels = pixels(12, 28, 28), np.arange(12, dtype=np.uint8) % 10
    for part, some in (("train", slice(0, 8)), ("t10k", slice(8, 12))):
        for name, values in (("images-idx3", images[some]), ("labels-idx1", labels[some])):
            header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
            (folder / f"{part}-{name}-ubyte").write_bytes(header + values.tobytes())
    pool = mnist(root=str(tmp_path))
    assert torch.equal(pool.train.image, torch.from_numpy(images[:8, None]))
    assert pool.test.label.tolist() == labels[8:].tolist()


def test_cifar100_has_the_fine_labels(tmp_path, monkeypatch):
    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    images, labels = pixels(6, 3, 32, 32), [99, 0, 5, 7, 1, 2]

    def written(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, digest(folder / name)]

    def batch(some):
        return {"data": images[some].reshape(-1, 3072), "fine_labels": labels[some], "coarse_labels": [0] * len(labels[some])}

    monkeypatch.setattr(CIFAR100, "train_list", [written("train", batch(slice(0, 4)))])
    monkeypatch.setattr(CIFAR100, "test_list", [written("test", batch(slice(4, 6)))])
    meta = written("meta", {"fine_label_names": [str(i) for i in range(100)]})
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": meta[1]})
    pool = cifar100(root=str(tmp_path))
    assert pool.classes == 100
    assert torch.equal(pool.train.image, torch.from_numpy(images[:4]))
    assert pool.train.image.is_contiguous()
    assert pool.test.label.tolist() == [1, 2]
    (folder / "train").write_bytes(b"altered")
    with pytest.raises(DataError, match="not the published file train; put"):
        cifar100(root=str(tmp_path))


@pytest.fixture
def house_numbers(tmp_path, monkeypatch):
    """SVHN's three files with 4, 3 and 2 pictures."""
    images = pixels(9, 3, 32, 32)
    parts = {"train": slice(0, 4), "test": slice(4, 7), "extra": slice(7, 9)}
    labels = np.array([10, 1, 2, 10, 9, 8, 10, 3, 4], dtype=np.uint8)
    known = {}
    for part, some in parts.items():
        file = tmp_path / f"{part}_32x32.mat"
        savemat(file, {"X": images[some].transpose(2, 3, 1, 0), "y": labels[some, None]})
        known[part] = ["", file.name, digest(file)]
    monkeypatch.setattr(SVHN, "split_list", known)
    return tmp_path, images, labels % 10


def test_svhn_calls_zero_zero_and_has_extra_examples_on_demand(house_numbers):
    root, images, labels = house_numbers
    pool = svhn(root=str(root))
    assert torch.equal(pool.train.image, torch.from_numpy(images[:4])) and pool.train.label.tolist() == labels[:4].tolist()
    assert pool.test.label.tolist() == labels[4:7].tolist()
    more = svhn(root=str(root), extra=True)
    assert torch.equal(more.train.image, torch.from_numpy(images[[0, 1, 2, 3, 7, 8]]))
    assert more.train.label.tolist() == labels[[0, 1, 2, 3, 7, 8]].tolist()


def test_svhn_does_not_want_the_extra_file_unless_asked(house_numbers):
    (house_numbers[0] / "extra_32x32.mat").unlink()
    assert len(svhn(root=str(house_numbers[0])).train) == 4
    with pytest.raises(DataError, match=r"missing extra_32x32\.mat"):
        svhn(root=str(house_numbers[0]), extra=True)


@pytest.fixture
def stl(tmp_path, monkeypatch):
    """STL-10's files with 4 labeled, 3 unlabeled and 2 test pictures."""
    folder = tmp_path / STL10.base_folder
    folder.mkdir()
    images = pixels(9, 3, 96, 96)
    contents = {
        "train_X.bin": images[:4].transpose(0, 1, 3, 2),  # the files run along columns
        "train_y.bin": np.array([1, 10, 3, 4], dtype=np.uint8),
        "unlabeled_X.bin": images[4:7].transpose(0, 1, 3, 2),
        "test_X.bin": images[7:].transpose(0, 1, 3, 2),
        "test_y.bin": np.array([2, 5], dtype=np.uint8),
    }
    for name, values in contents.items():
        (folder / name).write_bytes(values.tobytes())
    (folder / "fold_indices.txt").write_text("0 2 \n1 3 \n")
    sums = [[name, digest(folder / name)] for name in contents]
    monkeypatch.setattr(STL10, "train_list", sums[:3])
    monkeypatch.setattr(STL10, "test_list", sums[3:])
    return tmp_path, images


def test_stl10_marks_unlabeled_pictures_with_minus_one(stl):
    root, images = stl
    pool = stl10(root=str(root))
    assert pool.train.label.tolist() == [0, 9, 2, 3, -1, -1, -1]
    assert torch.equal(pool.train.image, torch.from_numpy(images[:7]))
    assert pool.test.label.tolist() == [1, 4]
    assert stl10(root=str(root), unlabeled=False).train.label.tolist() == [0, 9, 2, 3]


def test_the_card_of_unlabeled_pictures_counts_the_labeled_ones(stl):
    data = deal("stl10", stl10(root=str(stl[0])), iid, {"clients": 2}, 0.0, rng())
    facts = card(data)
    assert facts.train.sum() == 7
    assert facts.counts.sum(axis=0).tolist() == [1, 0, 1, 1, 0, 0, 0, 0, 0, 1]


def test_the_official_folds_of_stl10_are_read(stl):
    assert [fold.tolist() for fold in stl10_folds(stl[0])] == [[0, 2], [1, 3]]
    (stl[0] / STL10.base_folder / "fold_indices.txt").write_text("no numbers")
    with pytest.raises(DataError, match=r"fold_indices\.txt cannot be read"):
        stl10_folds(stl[0])


@pytest.fixture
def voc(tmp_path):
    """VOC 2012 with three pictures, wide, high and square, each with a map of the id 15, a border, and background."""
    base = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True)
    for name, (width, height) in {"a": (48, 32), "b": (32, 48), "c": (32, 32)}.items():
        values = np.zeros((height, width), np.uint8)
        values[:16], values[16:18] = 15, 255
        picture = Image.fromarray(values).convert("P")
        picture.putpalette(list(range(256)) * 3)
        picture.save(base / "SegmentationClass" / f"{name}.png")
        Image.fromarray(np.dstack([values] * 3)).save(base / "JPEGImages" / f"{name}.jpg", quality=95)
    (base / "ImageSets" / "Segmentation" / "train.txt").write_text("a\nb\n")
    (base / "ImageSets" / "Segmentation" / "val.txt").write_text("c\n")
    return tmp_path


def test_voc_has_maps_that_lie_on_the_pictures(voc):
    pool = voc_segmentation(root=str(voc), size=32)
    assert (len(pool.train), len(pool.test), pool.classes) == (2, 1, 20)
    assert pool.train.image.shape == (2, 3, 32, 32) and pool.train.image.dtype == torch.uint8
    semseg = pool.train.fields["semseg"]
    assert semseg.dtype == torch.uint8 and semseg.unique().tolist() == [0, 15, 255]
    assert semseg[0, :, 0].tolist() == [15] * 16 + [255] * 2 + [0] * 14
    assert (pool.train.image[0].float().mean(0) - semseg[0].float()).abs().mean() < 8  # JPEG
    assert semseg[1, 0].tolist() == [15] * 32 and (semseg[1] == 15).sum() == 8 * 32  # the middle of the high one


def test_voc_says_which_classes_are_to_be_seen_and_is_unlabeled_otherwise(voc):
    pool = voc_segmentation(root=str(voc), size=16)
    assert pool.train.fields["labels"].nonzero().tolist() == [[0, 14], [1, 14]]
    assert pool.train.label.tolist() == [-1, -1]


def test_a_broken_picture_is_named(voc):
    file = voc / "VOCdevkit" / "VOC2012" / "JPEGImages" / "b.jpg"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"b\.jpg cannot be read: .*; mend or remove it"):
        voc_segmentation(root=str(voc), size=16)
