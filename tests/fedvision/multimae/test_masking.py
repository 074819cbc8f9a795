import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedvision.errors import DataError
from fedvision.multimae.masking import dirichlet, drawn, kept, masks_of, visible_of, wished
from fedvision.seeds import generator

NAMES = ("rgb", "depth", "semseg")


@pytest.mark.golden
@pytest.mark.parametrize(("prefix", "visible"), [("mask", 8), ("mask_full", 98)])
def test_masks_are_the_references(arrays, prefix, visible):
    noises = [arrays[f"{prefix}/noise_{name}"] for name in NAMES]
    keep = kept(wished(arrays[f"{prefix}/dirichlet"], noises, visible), arrays[f"{prefix}/noise_all"], visible)
    assert torch.equal(keep, arrays[f"{prefix}/ids_keep"])
    n = noises[0].shape[1]
    masks = masks_of(keep, {name: slice(i * n, (i + 1) * n) for i, name in enumerate(NAMES)})
    for name in NAMES:
        assert torch.equal(masks[name].long(), arrays[f"{prefix}/task_mask_{name}"].long())


@pytest.mark.golden
def test_masks_of_ones_own_show_each_example_as_many_patches_as_they_say(arrays):
    """The reference gives every example as many as the whole batch has, and one global token: 25 instead of 8 + 1."""
    masks = {name: arrays[f"mask/task_mask_{name}"].bool() for name in NAMES}
    assert arrays["quirk/encoder_tokens_with_explicit_masks_B3"] == 3 * 8 + 1
    assert torch.equal(visible_of(masks), arrays["mask/ids_keep"].sort(1).values)


@pytest.mark.parametrize("masked", [[[True, False], [False, False]], [[True, True], [True, True]]])
def test_masks_that_show_different_numbers_or_nothing_are_refused(masked):
    with pytest.raises(DataError, match=r"examples of these masks show \d, \d patches"):
        visible_of({"rgb": torch.tensor(masked)})


def naive_wish(share, noise, visible):
    """The mask of one modality of one example, written from the recipe."""
    count = round(share * visible)  # Python's round is to even, too
    order = sorted(range(len(noise)), key=lambda i: noise[i])
    return [order[i] < count for i in range(len(noise))]


def test_wishes_are_those_of_the_recipe():
    rng = torch.Generator().manual_seed(0)
    shares = torch.tensor([[0.5, 0.25, 0.25], [0.05, 0.05, 0.9], [1.0, 0.0, 0.0]], dtype=torch.float64)
    noises = [torch.rand(3, n, generator=rng) for n in (6, 4, 5)]
    found = wished(shares, noises, 10)
    for row in range(3):
        expected = [
            one for share, noise in zip(shares[row], noises, strict=True) for one in naive_wish(share.item(), noise[row].tolist(), 10)
        ]
        assert found[row].tolist() == expected


@given(st.integers(0, 2**32), st.integers(1, 9), st.sampled_from([0.05, 1.0, 1e6]), st.booleans())
def test_exactly_so_many_patches_are_visible_and_only_of_modalities_that_are_there(seed, visible, alpha, subsets):
    present = torch.rand(7, 3, generator=torch.Generator().manual_seed(seed)) < 0.5
    present[:, seed % 3] = True
    counts = dict.fromkeys(NAMES, 9)
    found = drawn(counts, present, visible, alpha, generator(seed, "masks"), subsets)
    assert found.shape == (7, visible)
    assert all(len(set(row)) == visible for row in found.tolist())
    assert present.gather(1, found // 9).all()
    assert torch.equal(found, drawn(counts, present, visible, alpha, generator(seed, "masks"), subsets))


def test_a_large_alpha_shares_equally_and_a_small_one_does_not():
    present = torch.ones(500, 3, dtype=torch.bool)

    def counts(alpha):
        found = drawn(dict.fromkeys(NAMES, 100), present, 30, alpha, generator(0, "masks"))
        return torch.stack([(found // 100 == i).sum(1) for i in range(3)], dim=1).double()

    assert (counts(1e6) == 10).all()
    assert counts(0.1).std(0).min() > 10 > counts(1.0).std(0).max() > 5
    assert (counts(1.0).mean(0) - 10).abs().max() < 1


def test_subsets_are_drawn_all_alike():
    present = torch.ones(7000, 3, dtype=torch.bool)
    shares = dirichlet(present, 1.0, np.random.default_rng(0), subsets=True)
    _, frequencies = (shares > 0).unique(dim=0, return_counts=True)
    assert len(frequencies) == 7
    assert (frequencies / 7000 - 1 / 7).abs().max() < 0.02


def test_shares_sum_to_one_over_what_is_there():
    present = torch.tensor([[True, False, True], [False, False, True], [True, True, True]])
    shares = dirichlet(present, 0.01, np.random.default_rng(0))
    assert torch.allclose(shares.sum(1), torch.ones(3, dtype=torch.float64))
    assert not shares[~present].any()


def test_more_visible_patches_than_an_example_has_are_refused():
    present = torch.tensor([[True, True], [True, False]])
    with pytest.raises(DataError, match="6 patches are to be visible, and an example has 4"):
        drawn({"rgb": 4, "depth": 4}, present, 6, 1.0, generator(0, "masks"))
