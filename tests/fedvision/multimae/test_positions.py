import math

import pytest
import torch

from fedvision.errors import ExperimentError
from fedvision.multimae.positions import by_place, resized, sincos


def naive(side, width):
    """Of a square grid, from the formula, channel by channel."""
    quarter = width // 4
    table = torch.zeros(1, width, side, side)
    for row in range(side):
        for column in range(side):
            for k in range(quarter):
                w = 10000 ** (-k / quarter)
                values = (math.sin(row * w), math.cos(row * w), math.sin(column * w), math.cos(column * w))
                for part, value in enumerate(values):
                    table[0, part * quarter + k, row, column] = value
    return table


@pytest.mark.parametrize(("side", "width"), [(1, 4), (3, 8), (4, 32)])
def test_positions_are_sines_and_cosines(side, width):
    assert torch.allclose(sincos(side, side, width), naive(side, width), atol=1e-6)


@pytest.mark.golden
def test_positions_are_the_references(arrays):
    assert torch.allclose(sincos(4, 4, 32), arrays["posemb/tiny_4x4_d32"], atol=1e-6)
    assert torch.allclose(sincos(2, 3, 8), arrays["posemb/nonsquare_2x3_d8"], atol=1e-6)
    full = sincos(14, 14, 768)
    assert torch.allclose(full, arrays["posemb/full_14x14_d768"].float(), atol=1e-3)
    assert full.double().sum().item() == pytest.approx(arrays["posemb/full_sum"].item(), rel=1e-6)


def test_positions_of_the_same_grid_stay_as_they_are():
    table = sincos(4, 4, 8)
    assert resized(table, (4, 4), "bicubic") is table
    assert resized(table, (6, 5), "bilinear").shape == (1, 8, 6, 5)


def test_positions_come_row_by_row():
    table = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert by_place(table).flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_an_odd_width_is_refused():
    with pytest.raises(ExperimentError, match="width of 30 has no"):
        sincos(2, 2, 30)
