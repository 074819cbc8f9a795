import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedvision.augmentation import evaluation_transform, mixed, repeated_order, training_transform, transformed
from fedvision.errors import ExperimentError
from fedvision.normalization import Normalization
from fedvision.seeds import generator

PLAIN = Normalization.none(3)
RECIPE = (0.8, 1.0)
RANDAUGMENT = "rand-m7-mstd0.5-inc1"


def images(n=4, channels=3, side=8):
    return torch.rand(n, channels, side, side, generator=generator(0, "images"))


def training(resolution=8, scale=(0.08, 1.0), flip=0.5, randaugment="", interpolation="bicubic"):
    return training_transform(resolution, scale, (3 / 4, 4 / 3), flip, randaugment, interpolation, PLAIN)


@pytest.fixture(scope="module")
def arrays(golden):
    with np.load(golden / "usi.npz") as file:
        return dict(file)


@pytest.fixture
def nobody_draws_globally():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    yield
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert np.array_equal(before[2][1], np.random.get_state()[1]) and before[2][2] == np.random.get_state()[2]


# ---- mixing ---------------------------------------------------------------------------------------------------------


@pytest.mark.golden
def test_mixing_is_the_references(arrays):
    seeds = [int(name.removeprefix("mix_out_seed")) for name in arrays if name.startswith("mix_out_seed")]
    assert seeds
    for seed in seeds:
        mix, targets = mixed(torch.from_numpy(arrays["mix_in"]), torch.from_numpy(arrays["mix_labels"]), 5, *RECIPE, seed)
        assert torch.allclose(mix, torch.from_numpy(arrays[f"mix_out_seed{seed}"]), atol=1e-6)
        assert torch.allclose(targets, torch.from_numpy(arrays[f"mix_target_seed{seed}"]), atol=1e-6)


@given(st.integers(1, 7), st.integers(0, 2**32 - 1), st.sampled_from([RECIPE, (0.8, 0.0), (0.0, 1.0), (0.0, 0.0)]))
def test_targets_are_shares_of_the_classes(n, seed, alphas):
    mix, targets = mixed(images(n), torch.arange(n) % 3, 3, *alphas, seed)
    assert mix.shape == (n, 3, 8, 8) and targets.shape == (n, 3)
    assert (targets >= 0).all() and torch.allclose(targets.sum(1), torch.ones(n))
    assert mix.min() >= 0 and mix.max() <= 1


def test_a_blend_has_the_share_of_its_target():
    given_, labels = images(4), torch.arange(4)
    mix, targets = mixed(given_, labels, 4, 0.8, 0.0, seed=3)
    share = targets[0, 0]
    assert 0 < share < 1
    assert torch.allclose(mix, share * given_ + (1 - share) * given_.flip(0), atol=1e-6)


def test_a_box_has_the_area_of_its_target():
    black, white = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    for seed in range(5):
        mix, targets = mixed(torch.cat([black, white]), torch.tensor([0, 1]), 2, 0.0, 1.0, seed)
        assert mix[0].mean().item() == pytest.approx(targets[0, 1].item(), abs=1e-6)


def test_the_last_image_of_an_odd_batch_stays_as_it_is():
    given_ = images(5)
    mix, targets = mixed(given_, torch.arange(5), 5, *RECIPE, seed=1)
    assert torch.equal(mix[4], given_[4]) and targets[4].tolist() == [0, 0, 0, 0, 1]
    assert not torch.equal(mix[:4], given_[:4])


def test_mixing_repeats_and_changes_nothing_else(nobody_draws_globally):
    given_ = images(4)
    before = given_.clone()
    one, other = (mixed(given_, torch.arange(4), 4, *RECIPE, seed=2)[0] for _ in range(2))
    assert torch.equal(one, other) and torch.equal(given_, before)


# ---- repeating ------------------------------------------------------------------------------------------------------


@pytest.mark.golden
def test_repeated_orders_are_the_references(arrays):
    names = [name for name in arrays if name.startswith("ra_n")]
    assert names
    for name in names:
        n, rank = (int(part) for part in name.removeprefix("ra_n").split("_rank"))
        found = repeated_order(n, 3, epoch=1, replicas=3, rank=rank, selected_round=256)
        assert found.tolist() == arrays[name].tolist()


@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 2**31))
def test_a_pass_is_as_long_as_without_repeats(n, repeats, epoch):
    order = repeated_order(n, repeats, epoch)
    assert len(order) == n and order.min() >= 0 and order.max() < n
    assert len(order.unique()) == -(-n // repeats)


# ---- views ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("randaugment", ["", RANDAUGMENT])
def test_photographs_are_cropped_and_augmented(channels, randaugment, nobody_draws_globally):
    given_ = images(6, channels, 12)
    one, same = (transformed(given_, training(10, randaugment=randaugment), generator(0)) for _ in range(2))
    assert one.shape == (6, channels, 10, 10) and torch.equal(one, same)
    assert not torch.equal(one, transformed(given_, training(10, randaugment=randaugment), generator(1)))
    assert one.min() >= 0 and one.max() <= 1


def test_a_crop_of_everything_changes_only_the_resolution_of_values():
    given_ = images(2)
    whole = transformed(given_, training(8, scale=(1.0, 1.0), flip=0.0), generator(0))
    assert whole.shape == given_.shape
    center = transformed(given_, evaluation_transform(8, 1.0, "bicubic", PLAIN), generator(0))
    assert torch.allclose(center, given_, atol=0.5 / 255 + 1e-6)


def test_evaluation_cuts_out_the_center():
    framed = torch.zeros(1, 3, 20, 20)
    framed[..., 5:15, 5:15] = 1
    seen = transformed(framed, evaluation_transform(10, 0.5, "bilinear", PLAIN), generator(0))
    assert seen.shape == (1, 3, 10, 10) and (seen == 1).all()


def test_views_are_normalized():
    half = Normalization((0.5,) * 3, (0.5,) * 3)
    seen = transformed(torch.ones(1, 3, 8, 8), evaluation_transform(8, 0.95, "bilinear", half), generator(0))
    assert torch.allclose(seen, torch.ones(()))


def test_images_that_are_no_photographs_are_refused():
    with pytest.raises(ExperimentError, match="these have 2; use augmentation = 'shift'"):
        transformed(images(channels=2), training(), generator(0))


@pytest.mark.parametrize("wrong", [{"randaugment": "rand-x3"}, {"randaugment": "nonsense"}, {"interpolation": "cubistic"}])
def test_a_view_that_timm_does_not_know_is_refused(wrong):
    with pytest.raises(ExperimentError, match=r"write e\.g\. 'rand-m7-mstd0.5-inc1' and 'bicubic'"):
        training(**wrong)
