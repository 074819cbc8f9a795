"""The digits, and the colored and rotated environments, against naive versions written from the specification."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from fedvision.data.digits import (
    ANGLES,
    COLOR_FLIPS,
    color_digits,
    color_environments,
    colored,
    digits,
    rotated,
    rotated_digits,
    rotated_environments,
    stratified,
)
from fedvision.data.federated import FederatedData
from fedvision.data.partitions import environment
from fedvision.data.pool import deal
from fedvision.errors import DataError
from fedvision.registry import datasets
from fedvision.settings import resolve

PUBLISHED = {"color_flips": COLOR_FLIPS, "label_flip": 0.0, "test_color_flip": 0.90, "test_label_flip": 0.15}


def rng(seed=0):
    return np.random.default_rng(seed)


def rows(images):
    return sorted(image.numpy().tobytes() for image in images)


@pytest.mark.parametrize("name", ["digits", "color-digits", "rotated-digits"])
def test_the_embedded_sets_are_registered_seeded_and_in_range(name):
    make = datasets.find(name)
    values = resolve(make, {}, "data", frozenset({"rng"}))
    one, again, other = make(**values, rng=rng(1)), make(**values, rng=rng(1)), make(**values, rng=rng(2))
    assert torch.equal(one.train.image, again.train.image)
    assert torch.equal(one.test.image, again.test.image)
    assert not torch.equal(one.train.image, other.train.image)
    for part in filter(None, (one.train, one.test, one.validation)):
        assert part.image.dtype == torch.float32
        assert part.label.dtype == torch.int64
        assert part.image.min() >= 0
        assert part.image.max() <= 1
        assert set(part.label.tolist()) == set(range(one.classes))


# digits


def test_digits_are_scikit_learns_scaled_to_one():
    pool = digits(rng=rng())
    assert pool.train.image.shape[1:] == (1, 8, 8)
    everything = torch.cat([pool.train.image, pool.test.image])
    assert rows(everything) == rows(torch.tensor(load_digits().images / 16, dtype=torch.float32)[:, None])


def test_digits_keep_their_labels():
    pool = digits(rng=rng())
    known = {
        (image / 16).astype(np.float32).tobytes(): label for image, label in zip(load_digits().images, load_digits().target, strict=True)
    }
    assert [known[image.numpy().tobytes()] for image in pool.train.image] == pool.train.label.tolist()


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_digits_test_set_holds_its_fraction_of_every_class(fraction):
    pool = digits(test_fraction=fraction, rng=rng())
    counts = np.bincount(load_digits().target)
    assert abs(len(pool.test) - fraction * 1797) <= 0.5
    assert np.abs(np.bincount(pool.test.label.numpy()) - fraction * counts).max() < 1


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_digits_refuse_an_empty_half(fraction):
    with pytest.raises(DataError, match=f"test_fraction = {fraction} leaves no image"):
        digits(test_fraction=fraction, rng=rng())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=50), st.floats(0, 1), st.integers(0, 99))
def test_stratified_halves_are_disjoint_cover_all_and_keep_the_mix(labels, fraction, seed):
    labels = np.array(labels)
    taken, rest = stratified(labels, fraction, rng(seed))
    assert np.array_equal(np.sort(np.concatenate([taken, rest])), np.arange(len(labels)))
    assert abs(len(taken) - fraction * len(labels)) <= 0.5 + 1e-9
    for label in np.unique(labels):
        assert abs((labels[taken] == label).sum() - fraction * (labels == label).sum()) <= 1


# colors


def naively_colored(images, numbers, color_flips, label_flip, generator):
    """One image at a time, from the words of the specification; all label coins are tossed before all color coins."""
    label_coins, color_coins = generator.random(len(images)), generator.random(len(images))
    results, labels = [], []
    for i in range(len(images)):
        label = 1 if numbers[i] < 5 else 0
        if label_coins[i] < label_flip:
            label = 1 - label
        color = 1 - label if color_coins[i] < color_flips[i] else label
        image = np.stack([images[i], images[i]])
        image[1 - color] = 0
        results.append(image)
        labels.append(label)
    return np.stack(results), labels


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32))
def test_colored_agrees_with_a_naive_loop(n, color_flip, label_flip, seed):
    images, numbers = rng(seed).random((n, 3, 3), dtype=np.float32), rng(seed).integers(10, size=n)
    image, label = colored(torch.tensor(images), torch.tensor(numbers), np.full(n, color_flip), label_flip, rng(seed + 1))
    naive_image, naive_label = naively_colored(images, numbers, [color_flip] * n, label_flip, rng(seed + 1))
    assert np.array_equal(image.numpy(), naive_image)
    assert label.tolist() == naive_label


def test_without_flips_color_is_the_label_and_the_label_is_below_five():
    numbers = torch.arange(10)
    image, label = colored(torch.ones(10, 2, 2), numbers, 0.0, 0.0, rng())
    assert label.tolist() == [1] * 5 + [0] * 5
    assert image[:, 1, 0, 0].tolist() == label.tolist()
    assert image.sum(dim=1).eq(1).all()


def test_the_color_follows_the_flipped_label():
    image, label = colored(torch.ones(10, 2, 2), torch.arange(10), 0.0, 1.0, rng())
    assert label.tolist() == [0] * 5 + [1] * 5
    assert image[:, 1, 0, 0].tolist() == label.tolist()


@pytest.mark.parametrize(("n", "train", "validation", "test"), [(60_000, 40_000, 10_000, 10_000), (1797, 1198, 300, 299)])
def test_color_environments_have_the_published_proportions(n, train, validation, test):
    pool = color_environments(torch.zeros(n, 1, 1), torch.zeros(n).long(), **PUBLISHED, rng=rng())
    assert (len(pool.train), len(pool.validation), len(pool.test)) == (train, validation, test)
    for part in (pool.train, pool.validation):
        assert part.fields["environment"].tolist() == [i % 5 for i in range(len(part))]


def disagreement(examples):
    """Share of examples whose color is not their label, and share whose label is not (number < 5) for all numbers 0."""
    color = examples.image.flatten(2).sum(2)[:, 1] > 0
    return (color.long() != examples.label).float().mean().item(), (examples.label == 0).float().mean().item()


def test_color_environments_disagree_as_often_as_published():
    pool = color_environments(torch.ones(60_000, 1, 1), torch.zeros(60_000).long(), **PUBLISHED, rng=rng())
    for part in (pool.train, pool.validation):
        for number, flip in enumerate(COLOR_FLIPS):
            found, wrong = disagreement(part[part.fields["environment"] == number])
            assert found == pytest.approx(flip, abs=0.05)
            assert wrong == 0
    found, wrong = disagreement(pool.test)
    assert found == pytest.approx(0.90, abs=0.02)
    assert wrong == pytest.approx(0.15, abs=0.02)


def test_color_environments_shuffle_all_but_the_last_sixth():
    images = torch.arange(1, 61).float().view(60, 1, 1)
    pool = color_environments(images, torch.zeros(60).long(), **PUBLISHED, rng=rng())
    seen, held, tested = (part.image.amax(dim=(1, 2, 3)).tolist() for part in (pool.train, pool.validation, pool.test))
    assert tested == list(range(51, 61))
    assert sorted(seen + held) == list(range(1, 51))
    assert seen != sorted(seen)
    assert max(seen) > 40


def test_color_digits_are_digits_padded_with_zeros():
    pool = color_digits(rng=rng())
    assert pool.train.image.shape == (1198, 2, 14, 14)
    gray = torch.cat([part.image for part in (pool.train, pool.validation, pool.test)]).sum(dim=1)
    assert gray[:, :3].sum() == gray[:, -3:].sum() == gray[:, :, :3].sum() == gray[:, :, -3:].sum() == 0
    originals = torch.tensor(load_digits().images / 16, dtype=torch.float32)
    assert rows(gray[:, 3:11, 3:11]) == rows(originals)


def test_color_digits_labels_say_whether_the_digit_is_below_five():
    pool = color_digits(rng=rng())
    known = {
        (image / 16).astype(np.float32).tobytes(): label for image, label in zip(load_digits().images, load_digits().target, strict=True)
    }
    below = [int(known[image[:, 3:11, 3:11].sum(0).numpy().tobytes()] < 5) for image in pool.train.image]
    assert below == pool.train.label.tolist()


def test_color_digits_take_other_flips():
    pool = color_digits(color_flips=(0.0, 1.0), test_color_flip=0.0, test_label_flip=0.0, rng=rng())
    assert disagreement(pool.train[pool.train.fields["environment"] == 0])[0] == 0
    assert disagreement(pool.train[pool.train.fields["environment"] == 1])[0] == 1
    assert disagreement(pool.test)[0] == 0


def test_environments_without_flips_or_angles_are_refused():
    with pytest.raises(DataError, match="color_flips is empty"):
        color_digits(color_flips=(), rng=rng())
    with pytest.raises(DataError, match="angles is empty"):
        rotated_digits(angles=(), rng=rng())


# rotations


@pytest.mark.parametrize(("degrees", "quarters"), [(0, 0), (90, 1), (180, 2), (-90, -1)])
def test_quarter_turns_are_counter_clockwise_and_exact(degrees, quarters):
    images = torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotated(images, torch.full((3,), float(degrees))), images.rot90(quarters, (2, 3)))


@pytest.mark.parametrize("degrees", [10.0, -40.0, 75.0, 33.3])
def test_rotated_agrees_with_torchvision(degrees):
    from torchvision.transforms.v2.functional import InterpolationMode, rotate

    images = torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    theirs = rotate(images, degrees, interpolation=InterpolationMode.BILINEAR)
    torch.testing.assert_close(rotated(images, torch.full((3,), degrees)), theirs, atol=1e-4, rtol=0)


def test_each_image_turns_by_its_own_angle():
    images = torch.rand(5000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    degrees = torch.arange(5000) % 4 * 90.0
    turned = rotated(images, degrees)
    for quarters in range(4):
        torch.testing.assert_close(turned[quarters::4], images[quarters::4].rot90(quarters, (2, 3)))


@pytest.mark.parametrize(("n", "train", "validation", "test"), [(50_000, 30_000, 10_000, 10_000), (1797, 1078, 360, 359)])
def test_rotated_environments_have_the_published_proportions(n, train, validation, test):
    pool = rotated_environments(torch.zeros(n, 1, 1, 1), torch.zeros(n).long(), ANGLES, 90.0, rng())
    assert (len(pool.train), len(pool.validation), len(pool.test)) == (train, validation, test)
    for part in (pool.train, pool.validation):
        assert part.fields["environment"].tolist() == [i % 9 for i in range(len(part))]


def test_rotated_environments_turn_each_image_by_the_angle_of_its_environment():
    images = torch.rand(90, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    pool = rotated_environments(images, torch.arange(90), ANGLES, 0.0, rng())
    assert pool.train.label.tolist() == list(range(54))
    assert pool.validation.label.tolist() == list(range(54, 72))
    for part, first in ((pool.train, 0), (pool.validation, 54)):
        for i in range(len(part)):
            wanted = rotated(images[first + i : first + i + 1], torch.tensor([ANGLES[i % 9]]))
            assert torch.equal(part.image[i : i + 1], wanted)
    assert torch.allclose(pool.test.image, images[72:])


def test_test_images_turn_by_angles_within_the_bound_on_both_sides():
    bar = torch.zeros(1000, 1, 15, 15)
    bar[:, :, :7, 7] = 1  # a hand that points up
    pool = rotated_environments(bar, torch.zeros(1000).long(), ANGLES, 90.0, rng())
    image = pool.test.image[:, 0]
    place = torch.arange(15.0) - 7
    x, y = (image.sum(1) @ place), -(image.sum(2) @ place)
    angle = torch.rad2deg(torch.atan2(-x, y))
    assert angle.abs().max() < 91
    assert angle.min() < -80
    assert angle.max() > 80
    assert angle.mean().abs() < 12


def test_rotated_digits_are_enlarged_digits():
    pool = rotated_digits(angles=(0.0,), test_angle=0.0, rng=rng())
    assert pool.train.image.shape == (1078, 1, 16, 16)
    means = torch.cat([part.image for part in (pool.train, pool.validation, pool.test)]).mean(dim=(1, 2, 3)).sort().values
    originals = torch.tensor(load_digits().images / 16, dtype=torch.float32).mean(dim=(1, 2)).sort().values
    torch.testing.assert_close(means, originals, atol=1e-5, rtol=0)


def test_rotated_digits_make_three_silos_of_three_environments():
    pool = rotated_digits(rng=rng())
    data = deal("rotated-digits", pool, environment, {"environments_per_client": 3}, 0.2, rng())
    assert isinstance(data, FederatedData)
    assert data.num_clients == 3
    for silos in (data.train, data.validation):
        assert [sorted(set(silos[i].fields["environment"].tolist())) for i in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
