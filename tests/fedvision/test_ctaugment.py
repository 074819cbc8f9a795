"""The operations against the reference's pictures; rates and policies against the equations."""

import numpy as np
import pytest
import torch
from PIL import Image

from fedvision.ctaugment import (
    BINS,
    CUTOUT,
    NAMES,
    OPERATIONS,
    ROWS,
    Policies,
    applied,
    bytes_of,
    cutout,
    initial_rates,
    probe_policies,
    proximity,
    rate_to_p,
    signed_of_bytes,
    strong_policies,
    updated,
)
from fedvision.seeds import generator

NOWHERE = (0.0, 0.0)


@pytest.fixture(scope="module")
def arrays(golden):
    with np.load(golden / "doublematch.npz") as file:
        return dict(file)


def policies(*steps, n=1):
    """The same steps, (name, first level, second level), for n images."""
    operations = torch.tensor([[NAMES.index(name) for name, *_ in steps]])
    levels = torch.tensor([[[*levels, 0.0, 0.0][:2] for _, *levels in steps]], dtype=torch.float64)
    return Policies(operations.expand(n, -1), levels.expand(n, -1, -1), torch.full((n, len(steps), 2), 0.5))


def pictures(n, channels=3, side=16):
    return torch.rand(n, channels, side, side, generator=generator(0)) * 2 - 1


# ---- operations -----------------------------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("name", NAMES)
def test_an_operation_makes_the_references_pictures(arrays, name):
    picture, operation = Image.fromarray(arrays["cta_in_uint8"]), OPERATIONS[name]
    for i, level in enumerate(arrays["cta_levels"].tolist()):
        if f"cta_{name}_{i}" in arrays:  # cutout has its own test
            made = operation.function(picture, NOWHERE, *[level, 0.5][: len(operation.bins)])
            near(made, arrays[f"cta_{name}_{i}"])


@pytest.mark.golden
@pytest.mark.parametrize("method", range(6))
def test_every_method_of_rescaling_is_the_references(arrays, method):
    picture = Image.fromarray(arrays["cta_in_uint8"])
    near(OPERATIONS["rescale"].function(picture, NOWHERE, 0.6, (method + 0.5) / 6), arrays[f"cta_rescale_method{method}"])


@pytest.mark.golden
def test_a_cutout_is_the_references(arrays):
    picture = Image.fromarray(arrays["cta_in_uint8"])
    place = tuple((at + 0.5) / 32 for at in arrays["cta_cutout_seed5_loc"].tolist())
    near(cutout(picture, place, 1.0), arrays["cta_cutout_seed5"])


def near(picture, expected):
    """Within one, which versions of Pillow may differ by."""
    assert np.abs(np.asarray(picture).astype(int) - expected).max() <= 1


@pytest.mark.golden
def test_the_operations_are_the_references(arrays):
    listed = arrays["cta_ops"].tolist()
    assert [(name, str(operation.bins)) for name, operation in OPERATIONS.items()] == [tuple(line) for line in listed]


def test_operations_leave_the_picture_alone():
    picture = Image.fromarray(bytes_of(pictures(1))[0].permute(1, 2, 0).numpy())
    before = np.asarray(picture).copy()
    for operation in OPERATIONS.values():
        operation.function(picture, (0.5, 0.5), *[0.9] * len(operation.bins))
        assert np.array_equal(before, np.asarray(picture))


@pytest.mark.parametrize(("side", "size"), [(32, 16), (96, 48), (8, 4)])
def test_a_full_cutout_covers_half_of_each_side(side, size):
    x = torch.ones(1, 3, side, side)
    gray = applied(x, policies(("cutout", 1.0))) < 0.5
    assert gray.sum() == 3 * size**2
    start = side // 2 - size // 2
    assert gray[0, :, start : start + size, start : start + size].all()


def test_a_cutout_at_the_edge_is_cut_off():
    plan = policies(("cutout", 1.0))
    gray = applied(torch.ones(1, 1, 32, 32), Policies(plan.operations, plan.levels, torch.zeros(1, 1, 2))) < 0.5
    assert gray.sum() == 64 and gray[0, 0, :8, :8].all()


def test_a_cutout_of_level_0_covers_nothing():
    x = torch.ones(1, 3, 16, 16)
    assert torch.equal(applied(x, policies(("cutout", 0.0))), x)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_every_operation_works_in_gray_and_color(name, channels):
    x = pictures(2, channels, 8)
    made = applied(x, policies((name, 0.9, 0.9), n=2))
    assert made.shape == x.shape and made.dtype == torch.float32 and made.min() >= -1 and made.max() <= 1


@pytest.mark.parametrize("name", ["identity", "translate_x", "translate_y"])
def test_an_operation_that_does_nothing_only_rounds(name):
    x = pictures(2)
    made = applied(x, policies((name, 0.999), n=2))
    assert torch.equal(made, signed_of_bytes(bytes_of(x))) and (made - x).abs().max() <= 1 / 255 + 1e-6


def test_images_may_be_bytes():
    x = pictures(4)
    plan = strong_policies(initial_rates(), 4, generator(1))
    assert torch.equal(applied(x, plan), applied(bytes_of(x), plan))


def test_the_bytes_of_the_ends_are_the_ends():
    assert bytes_of(torch.tensor([-1.0, 0.0, 1.0, 3.0])).tolist() == [0, 128, 255, 255]
    assert signed_of_bytes(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_threads_change_nothing():
    x, plan = pictures(9), strong_policies(initial_rates(), 9, generator(1))
    assert torch.equal(applied(x, plan), applied(x, plan, workers=3))


def test_no_images_are_no_trouble():
    assert applied(torch.zeros(0, 3, 8, 8), probe_policies(0, generator(0))).shape == (0, 3, 8, 8)


# ---- rates ----------------------------------------------------------------------------------------------------------


def test_there_are_19_operations_with_19_parameters():
    rates = initial_rates()
    assert len(NAMES) == 19 and rates.shape == (19, 17)
    assert rates.sum(1).tolist() == [8.0 if i == BINS.index(8) else 6.0 if i == BINS.index(6) else 17.0 for i in range(19)]
    assert sorted(ROWS[ROWS >= 0].tolist()) == list(range(19))


@pytest.mark.golden
def test_bins_are_drawn_as_in_the_reference(arrays):
    p = rate_to_p(torch.from_numpy(arrays["cta_rate_in"]))
    assert torch.allclose(p, torch.from_numpy(arrays["cta_rate_to_p"]), atol=1e-6)


@pytest.mark.golden
def test_proximity_is_the_references(arrays):
    near = proximity(torch.from_numpy(arrays["cta_prob"]), torch.from_numpy(arrays["cta_lab"]))
    assert torch.allclose(near, torch.from_numpy(arrays["cta_proximity"]), atol=1e-6)


@pytest.mark.golden
def test_rates_move_as_in_the_reference(arrays):
    rates, (rotate, rescale) = initial_rates(), (NAMES.index("rotate"), NAMES.index("rescale"))
    levels = torch.tensor([[[0.31, 0.0], [0.77, 0.4]]])
    for near, expected in zip(arrays["cta_prox"].tolist(), arrays["cta_rates_after_updates"], strict=True):
        rates = updated(rates, torch.tensor([[rotate, rescale]]), levels, torch.tensor([near]))
        moved = torch.cat([rates[ROWS[rotate, 0]], rates[ROWS[rescale, 0]], rates[ROWS[rescale, 1], :6]])
        assert torch.allclose(moved, torch.from_numpy(expected), atol=1e-6)


def test_proximity_is_the_probability_of_the_true_class():
    p = torch.softmax(torch.randn(5, 4, generator=generator(0)), 1)
    labels = torch.tensor([0, 1, 2, 3, 0])
    assert torch.allclose(proximity(p, labels), p.gather(1, labels[:, None])[:, 0])


def test_a_bin_at_the_threshold_is_still_drawn():
    assert rate_to_p(torch.tensor([0.99, 0.79, 0.78]), threshold=0.8).gt(0).tolist() == [True, True, False]


def test_bins_that_a_parameter_lacks_are_never_drawn():
    p = rate_to_p(torch.zeros(19, 17).where(initial_rates() == 0, 0.5))
    assert torch.equal(p > 0, initial_rates() > 0)


def test_probes_update_the_bins_they_fell_in_one_after_the_other():
    plan = policies(("rotate", 0.5), ("rotate", 0.51), ("identity",))
    rates = updated(initial_rates(), plan.operations, plan.levels, torch.tensor([0.2]))
    row = ROWS[NAMES.index("rotate"), 0]
    expected = initial_rates()
    expected[row, 8] = 0.99 * (0.99 * 1 + 0.01 * 0.2) + 0.01 * 0.2
    assert torch.allclose(rates, expected)


def test_the_greatest_level_falls_in_the_last_bin():
    plan = policies(("rescale", 1.0, 1.0), ("posterize", 1.0))
    rates = updated(initial_rates(), plan.operations, plan.levels, torch.tensor([0.0]))
    assert (rates != initial_rates()).nonzero()[:, 1].tolist() == [7, 16, 5]


def test_updating_leaves_the_old_rates_alone():
    before = initial_rates()
    updated(before, *_probes(3), torch.zeros(3))
    assert torch.equal(before, initial_rates())
    assert torch.equal(updated(before, *_probes(0), torch.zeros(0)), before)


def _probes(n):
    plan = probe_policies(n, generator(0))
    return plan.operations, plan.levels


# ---- policies -------------------------------------------------------------------------------------------------------


def test_a_strong_policy_ends_with_a_full_cutout():
    plan = strong_policies(initial_rates(), 50, generator(0))
    assert plan.operations.shape == (50, 3) and len(plan) == 50
    assert (plan.operations[:, 2] == CUTOUT).all() and (plan.levels[:, 2, 0] == 1).all()


def test_probes_and_strong_policies_of_untrained_rates_are_uniform():
    for plan in (probe_policies(4000, generator(0)), strong_policies(initial_rates(), 4000, generator(1))):
        drawn = plan.operations[:, :2]
        assert (drawn.flatten().bincount(minlength=19) / 8000 - 1 / 19).abs().max() < 0.012
        levels = plan.levels[:, :2][ROWS[drawn] >= 0]
        assert (torch.histc(levels.float(), 17, 0, 1) / len(levels) - 1 / 17).abs().max() < 0.01
        assert (plan.places.mean((0, 1)) - 0.5).abs().max() < 0.02


def test_parameters_that_an_operation_lacks_are_0():
    plan = strong_policies(initial_rates(), 500, generator(0))
    assert not plan.levels[ROWS[plan.operations] < 0].any()
    assert not plan.levels[plan.operations == NAMES.index("identity")].any()


def test_levels_are_drawn_where_the_classifier_recognizes_the_image():
    rates = initial_rates() * 0.5
    row = ROWS[NAMES.index("rotate"), 0]
    rates[row, 3], rates[row, 4] = 1.0, 0.9
    plan = strong_policies(rates, 3000, generator(0))
    levels = plan.levels[..., 0][plan.operations == NAMES.index("rotate")]
    assert levels.min() >= 3 / 17 and levels.max() < 5 / 17
    assert (levels < 4 / 17).double().mean().item() == pytest.approx(1 / (1 + 0.91 / 1.01), abs=0.1)


def test_the_same_generator_draws_the_same_policies():
    first, second = (strong_policies(initial_rates(), 5, generator(0)) for _ in range(2))
    assert torch.equal(first.operations, second.operations) and torch.equal(first.levels, second.levels)
    assert torch.equal(first.places, second.places)
