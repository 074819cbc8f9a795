import itertools
import math

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align

from fedvision.leopart.assignment import assigned, balanced, entropy
from fedvision.leopart.foreground import blurred, foreground, heaviest, without_specks
from fedvision.leopart.losses import aligned, cell_errors, drawn_features, region_mask, swapped_loss
from fedvision.seeds import generator


def drawn(*shape, purpose="values"):
    return torch.rand(*shape, generator=generator(0, purpose))


# ---- assignments ----------------------------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_assignments_are_the_references(iterations, arrays, agree):
    agree(balanced(arrays["sk_scores"], 0.05, iterations), arrays[f"sk_q_{iterations}"])


def test_assignments_are_scaled_row_by_row_and_column_by_column():
    scores = drawn(6, 4) * 2 - 1
    q = np.exp(scores.double().numpy() / 0.05).T
    q /= q.sum()
    for _ in range(3):
        for k in range(4):
            q[k] /= q[k].sum() * 4
        for i in range(6):
            q[:, i] /= q[:, i].sum() * 6
    q /= q.sum(0)
    assert np.allclose(balanced(scores, 0.05, 3).numpy(), q.T, atol=1e-5)


def test_many_iterations_use_all_prototypes_alike_whatever_epsilon():
    for epsilon in (1e-4, 0.05, 10.0):
        found = balanced(drawn(60, 5) * 2 - 1, epsilon, 500)
        assert found.isfinite().all() and torch.allclose(found.sum(1), torch.ones(60), atol=1e-4)
        assert epsilon < 1e-3 or torch.allclose(found.sum(0), torch.full((5,), 12.0), rtol=1e-2)


def test_what_is_remembered_changes_assignments_and_is_not_among_them():
    scores, others = drawn(4, 3), drawn(9, 3, purpose="others")
    together = balanced(torch.cat([others, scores]), 0.05, 3)[9:]
    assert torch.equal(assigned(scores, others, 0.05, 3), together)
    assert not torch.allclose(assigned(scores, None, 0.05, 3), together, atol=1e-3)


def test_the_entropy_of_assignments_that_are_sure_is_nothing():
    assert entropy(torch.eye(4)) == 0 and entropy(torch.full((2, 4), 0.25)).item() == pytest.approx(math.log(4))


# ---- foreground -----------------------------------------------------------------------------------------------------


def test_the_foreground_is_the_fewest_patches_that_hold_the_mass():
    maps = drawn(5, 6, 7)
    for mass in (0.3, 0.6, 0.95):
        found = heaviest(maps, mass)
        for picture, mask in zip(maps, found, strict=True):
            values = sorted(picture.flatten().tolist())
            smaller, background = 0.0, []
            for value in values:
                smaller += value
                if smaller / sum(values) <= 1 - mass:
                    background.append(value)
            assert sorted(picture[~mask].tolist()) == pytest.approx(background)


def test_specks_are_dropped_and_corners_connect():
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 1, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    expected = torch.zeros_like(mask)
    expected[0, 4] = expected[1, 3] = expected[2, 2] = True
    both = without_specks(torch.stack([mask, mask.flip(0)]))
    assert torch.equal(both[0], expected) and torch.equal(both[1], expected.flip(0))


def test_regions_do_not_go_on_in_the_next_picture():
    speck = torch.zeros(3, 4, 4, dtype=torch.bool)
    speck[:, 1, 1] = True
    assert not without_specks(speck).any()


@pytest.mark.parametrize("side", [1, 2, 3, 14])
def test_attention_of_few_patches_has_a_foreground_too(side):
    found = foreground(drawn(4, 3, side, side))
    assert found.shape == (4, side, side) and found.dtype == torch.bool
    assert blurred(drawn(4, side, side)).isfinite().all()


# ---- regions --------------------------------------------------------------------------------------------------------


@pytest.mark.golden
def test_regions_are_the_references(arrays, agree):
    boxes = arrays["box_gc"][:, 0] / 16
    agree(aligned(arrays["roi_in"], boxes, 7).flatten(0, 1), arrays["roi_out"])


@pytest.mark.parametrize(("height", "width", "cells"), [(14, 14, 7), (6, 6, 7), (5, 9, 2), (1, 1, 7)])
def test_regions_are_torchvisions(height, width, cells):
    maps = drawn(3, 4, height, width)
    corners = drawn(3, 6, 4, purpose="boxes") * torch.tensor([width, height, width, height])
    boxes = torch.cat([corners[..., :2].minimum(corners[..., 2:]), corners[..., :2].maximum(corners[..., 2:])], dim=-1)
    boxes[0, 0] = torch.tensor([0.0, 0.0, width, height])
    found, theirs = aligned(maps, boxes, cells), roi_align(maps, list(boxes), cells, aligned=True)
    assert torch.allclose(found.flatten(0, 1), theirs, atol=1e-5)


def test_cells_count_that_lie_within_the_mask():
    masks = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    masks[..., :2] = True
    boxes = torch.tensor([[[[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 2.0, 2.0], [2.0, 2.0, 4.0, 4.0]]]])
    found = region_mask(masks, boxes, 4)[0, 0]
    assert found[0].tolist() == [[True, True, False, False]] * 4
    assert found[1, :, :3].all() and not found[1, :, 3].any()  # the last sample is halfway to a place that is not masked
    assert not found[2].any()


# ---- the loss -------------------------------------------------------------------------------------------------------


def naive(predictions, targets, counted, temperature):
    """The loss by loops: 1/2 sum_g 1/(V-1) sum_{v != g} mean over cells that count."""
    n, teachers, crops, _, cells, _ = predictions.shape
    whole = 0.0
    for g in range(teachers):
        for v in range(crops):
            if v == g:
                continue
            errors = []
            for i, row, column in itertools.product(range(n), range(cells), range(cells)):
                if counted[i, g, v, row, column]:
                    logs = (predictions[i, g, v, :, row, column] / temperature).log_softmax(0)
                    errors.append(-(targets[i, g, v, :, row, column] * logs).sum().item())
            whole += (sum(errors) / len(errors) if errors else 0.0) / (crops - 1) / teachers
    return whole


@pytest.mark.parametrize("share", [1.0, 0.5, 0.05])
def test_the_loss_is_the_papers(share):
    shape = (2, 2, 4, 3, 2, 2)
    predictions, targets = drawn(*shape) * 2 - 1, drawn(*shape, purpose="targets").softmax(3)
    counted = drawn(2, 2, 4, 2, 2, purpose="counted") < share
    counted[:, 0, 1] = share == 1.0  # where nothing counts there is no error, and a crop all the same
    found = swapped_loss(cell_errors(predictions, targets, 0.1), counted)
    assert found.item() == pytest.approx(naive(predictions, targets, counted, 0.1), abs=1e-5)


def test_without_any_cell_that_counts_the_loss_is_nothing_and_has_a_gradient():
    predictions = drawn(1, 2, 3, 4, 2, 2).requires_grad_()
    errors = cell_errors(predictions, drawn(1, 2, 3, 4, 2, 2), 0.1)
    loss = swapped_loss(errors, torch.zeros(1, 2, 3, 2, 2, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and torch.equal(predictions.grad, torch.zeros_like(predictions))


# ---- the queue ------------------------------------------------------------------------------------------------------


def test_a_queue_takes_the_first_of_an_order_and_no_more_than_there_are():
    embeddings = torch.arange(1.0, 6.0)[:, None].expand(-1, 2)
    assert drawn_features(embeddings, torch.tensor([4, 0, 2]), 2)[:, 0].tolist() == [5, 1]
    assert drawn_features(embeddings, torch.tensor([4]), 3)[:, 0].tolist() == [5, 0, 0]
    assert drawn_features(embeddings, torch.tensor([], dtype=torch.int64), 1).tolist() == [[0, 0]]
