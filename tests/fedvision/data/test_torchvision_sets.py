"""Color-MNIST and Rotated-CIFAR10 from small files in the true formats."""

import hashlib
import pickle
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, MNIST

from fedvision.data.digits import ANGLES, rotated
from fedvision.data.torchvision_sets import color_mnist, rotated_cifar10
from fedvision.errors import DataError
from fedvision.registry import datasets
from fedvision.settings import resolve

FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


def rng(seed=0):
    return np.random.default_rng(seed)


def idx(values):
    """Bytes of an array in MNIST's format: magic number with type 8 (bytes) and dimensions, sizes, values."""
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


@pytest.fixture
def mnist(tmp_path):
    """A folder with 60 training images, and what they hold."""
    images, labels = rng().integers(256, size=(60, 28, 28)), np.arange(60) % 10
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, values in zip(FILES, (images, labels, images[:2], labels[:2]), strict=True):
        (folder / name).write_bytes(idx(values))
    return tmp_path, images, labels


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder with 50 training images in 5 batches, whose checksums stand in for the published ones."""
    images, labels = rng().integers(256, size=(50, 3, 32, 32), dtype=np.uint8), np.arange(50) % 10
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()

    def written(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def batch(rows):
        return {"data": images[rows].reshape(len(images[rows]), -1), "labels": labels[rows].tolist()}

    train = [written(f"data_batch_{i + 1}", batch(slice(10 * i, 10 * i + 10))) for i in range(5)]
    test = [written("test_batch", batch(slice(0, 2)))]
    _, meta = written("batches.meta", {"label_names": [str(i) for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", test)
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": meta})
    return tmp_path, images, labels


@pytest.mark.parametrize("name", ["color-mnist", "rotated-cifar10"])
def test_the_sets_are_registered_and_want_only_a_root(name):
    assert resolve(datasets.find(name), {"root": "/data"}, "data", frozenset({"rng"}))["download"] is False


def test_color_mnist_takes_every_second_pixel_of_the_training_files(mnist):
    root, images, labels = mnist
    pool = color_mnist(root=str(root), rng=rng())
    assert (len(pool.train), len(pool.validation), len(pool.test)) == (40, 10, 10)
    small = (images[:, ::2, ::2] / 255).astype(np.float32)
    torch.testing.assert_close(pool.test.image.sum(dim=1), torch.tensor(small[50:]))
    known = {image.tobytes(): label for image, label in zip(small, labels, strict=True)}
    for part in (pool.train, pool.validation):
        assert part.image.shape[1:] == (2, 14, 14)
        numbers = [known[image.sum(0).numpy().tobytes()] for image in part.image]
        assert part.label.tolist() == [int(number < 5) for number in numbers]


def test_color_mnist_has_five_environments_and_other_flips_on_demand(mnist):
    pool = color_mnist(root=str(mnist[0]), color_flips=(0.0, 1.0), rng=rng())
    color = pool.train.image[:, 1].flatten(1).amax(1).gt(0).long()
    assert torch.equal(color ^ pool.train.label, pool.train.fields["environment"])
    assert color_mnist(root=str(mnist[0]), rng=rng()).train.fields["environment"].unique().tolist() == [0, 1, 2, 3, 4]


def test_rotated_cifar_takes_every_second_pixel_in_the_files_order(cifar):
    root, images, labels = cifar
    pool = rotated_cifar10(root=str(root), rng=rng())
    assert (len(pool.train), len(pool.validation), len(pool.test)) == (30, 10, 10)
    assert torch.cat([pool.train.label, pool.validation.label, pool.test.label]).tolist() == labels.tolist()
    small = torch.tensor(images[:, :, ::2, ::2]).float() / 255
    wanted = rotated(small[:30], torch.tensor([ANGLES[i % 9] for i in range(30)]))
    torch.testing.assert_close(pool.train.image, wanted)
    torch.testing.assert_close(pool.validation.image[5:6], rotated(small[35:36], torch.tensor([ANGLES[5]])))


def test_rotated_cifar_test_angles_come_from_the_generator(cifar):
    one, again, other = (rotated_cifar10(root=str(cifar[0]), rng=rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.test.image, again.test.image)
    assert not torch.equal(one.test.image, other.test.image)
    assert torch.equal(one.train.image, other.train.image)


def test_missing_mnist_files_are_named_with_their_folder_and_the_remedy(tmp_path):
    with pytest.raises(DataError) as caught:
        color_mnist(root=str(tmp_path), rng=rng())
    message = str(caught.value)
    assert str(tmp_path / "MNIST" / "raw") in message
    assert all(name in message for name in FILES)
    assert "download = true" in message


def test_only_the_missing_mnist_files_are_called_missing(mnist):
    (mnist[0] / "MNIST" / "raw" / FILES[2]).unlink()
    with pytest.raises(DataError, match=f": missing {FILES[2]}; put"):
        color_mnist(root=str(mnist[0]), rng=rng())


@pytest.mark.parametrize("content", [b"", b"no idx file at all", idx(np.zeros((60, 28, 28)))[:1000]])
def test_a_broken_mnist_file_is_an_error_of_ours(mnist, content):
    (mnist[0] / "MNIST" / "raw" / FILES[0]).write_bytes(content)
    with pytest.raises(DataError, match="MNIST cannot be read from"):
        color_mnist(root=str(mnist[0]), rng=rng())


def test_missing_cifar_files_are_named_with_their_folder_and_the_remedy(tmp_path):
    with pytest.raises(DataError) as caught:
        rotated_cifar10(root=str(tmp_path), rng=rng())
    message = str(caught.value)
    assert str(tmp_path / "cifar-10-batches-py") in message
    assert all(name in message for name in ["data_batch_1", "data_batch_5", "test_batch", "batches.meta"])
    assert "download = true" in message


@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_an_altered_cifar_file_is_never_unpickled(cifar, name, monkeypatch):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (cifar[0] / "sprung",))

    (cifar[0] / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match=f"not the published file {name}; put"):
        rotated_cifar10(root=str(cifar[0]), rng=rng())
    assert not (cifar[0] / "sprung").exists()


def test_a_failed_download_says_so(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", unreachable)
    for make, name in ((color_mnist, "MNIST"), (rotated_cifar10, "CIFAR-10")):
        with pytest.raises(DataError, match=f"{name} cannot be read .*; the download failed .*; put the unpacked files"):
            make(root=str(tmp_path), download=True, rng=rng())


def test_the_published_files_are_those_that_torchvision_knows():
    assert [name.removesuffix(".gz") for name, _ in MNIST.resources] == FILES
