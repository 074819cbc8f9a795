import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from fedvision.multimae.losses import (
    absolute_errors,
    class_errors,
    known,
    masked_loss,
    spread,
    squared_errors,
    standardized_depth,
    standardized_patches,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.golden
def test_depth_is_standardized_as_in_the_reference(arrays):
    assert torch.allclose(standardized_depth(arrays["in/depth_raw"]), arrays["in/depth"], atol=2e-5)


def naive_depth(values, trimmed=0.1):
    """One picture's, from the recipe; None where a value is not known."""
    ordered = sorted(value for value in values if not math.isnan(value))
    middle = ordered[int(trimmed * len(ordered)) : int((1 - trimmed) * len(ordered))]
    mean, variance = statistics.fmean(middle), statistics.variance(middle)
    return [(value - mean) / math.sqrt(variance + 1e-6) for value in values]


@given(st.integers(0, 1000), st.floats(0, 0.4))
def test_depth_is_standardized_without_its_extremes(seed, missing):
    depth = 3 + random(2, 1, 6, 7, seed=seed)
    depth[torch.rand(depth.shape, generator=torch.Generator().manual_seed(seed)) < missing] = torch.nan
    for found, given_ in zip(standardized_depth(depth), depth, strict=True):
        expected = torch.tensor(naive_depth(given_.flatten().tolist()))
        assert torch.allclose(found.flatten(), expected, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_depth_of_which_little_is_known_is_still_finite():
    depth = torch.full((3, 1, 4, 4), torch.nan)
    depth[1, 0, 0, 0], depth[2, 0, :2] = 5.0, 2.0
    found = standardized_depth(depth)
    assert found[0].isnan().all()
    assert found[1, 0, 0, 0].isfinite()
    assert not found[2, 0, :2].any()


@pytest.mark.parametrize("patch", [2, 4])
def test_patches_are_standardized_over_all_their_values(patch):
    images = random(2, 3, 8, 4)
    found = standardized_patches(images, patch)
    for b in range(2):
        for top in range(0, 8, patch):
            for left in range(0, 4, patch):
                part = images[b, :, top : top + patch, left : left + patch]
                expected = (part - part.mean()) / (part.var(unbiased=True) + 1e-6).sqrt()
                assert torch.allclose(found[b, :, top : top + patch, left : left + patch], expected, atol=1e-5)


def naive_masked(errors, counted):
    means = []
    for one, mask in zip(errors.tolist(), counted.tolist(), strict=True):
        chosen = [e for row, flags in zip(one, mask, strict=True) for e, flag in zip(row, flags, strict=True) if flag]
        if chosen:
            means.append(sum(chosen) / len(chosen))
    return sum(means) / len(means) if means else 0.0


@given(st.integers(0, 1000), st.floats(0, 1))
def test_masked_losses_are_means_over_examples_of_means_over_pixels(seed, share):
    errors = random(5, 3, 4, seed=seed).abs()
    counted = torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(seed)) < share
    assert masked_loss(errors, counted).item() == pytest.approx(naive_masked(errors, counted), rel=1e-5, abs=1e-7)


def test_an_example_without_masked_patches_has_a_gradient_of_zero():
    prediction = random(2, 3, 4, 4).requires_grad_()
    counted = torch.ones(2, 4, 4, dtype=torch.bool)
    counted[0] = False
    for mask in (counted, torch.zeros_like(counted)):
        [slope] = torch.autograd.grad(masked_loss(squared_errors(prediction, random(2, 3, 4, 4, seed=1)), mask), prediction)
        assert slope.isfinite().all()
        assert not slope[0].any()
    assert masked_loss(torch.ones(2, 4, 4), torch.zeros_like(counted)) == 0


def test_errors_are_means_over_channels():
    prediction, target = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    assert torch.allclose(squared_errors(prediction, target), ((prediction - target) ** 2).mean(1))
    assert torch.allclose(absolute_errors(prediction, target), (prediction - target).abs().mean(1))


def test_what_is_not_known_has_no_error_and_no_gradient():
    prediction, target = random(1, 1, 2, 2).requires_grad_(), torch.tensor([[[[torch.nan, 1.0], [2.0, torch.nan]]]])
    for errors in (squared_errors, absolute_errors):
        found = errors(prediction, target)
        assert found.isfinite().all()
        [slope] = torch.autograd.grad(found.sum(), prediction)
        assert (slope[known(target)[:, None]] != 0).all()
        assert not slope[~known(target)[:, None]].any()
    logits, ids = random(1, 5, 2, 2).requires_grad_(), torch.tensor([[[255, 1], [4, 255]]])
    assert class_errors(logits, ids)[ids == 255].eq(0).all()
    assert known(ids).tolist() == [[[False, True], [True, False]]]


def test_classes_have_cross_entropy_smoothed_if_asked():
    logits, ids = random(2, 5, 3, 3), torch.randint(5, (2, 3, 3), generator=torch.Generator().manual_seed(0))
    p = logits.log_softmax(1)
    right = -p.gather(1, ids[:, None])[:, 0]
    assert torch.allclose(class_errors(logits, ids), right)
    assert torch.allclose(class_errors(logits, ids, smoothing=0.1), 0.9 * right - 0.1 * p.mean(1), atol=1e-6)
    assert torch.allclose(class_errors(logits, ids), F.cross_entropy(logits, ids, reduction="none"))


def test_a_mask_of_patches_is_one_of_pixels():
    masked = torch.tensor([[True, False, False, True, False, True]])
    found = spread(masked, (2, 3), 2)
    assert found.shape == (1, 4, 6)
    for row in range(4):
        for column in range(6):
            assert found[0, row, column] == masked[0, 3 * (row // 2) + column // 2]
