import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedvision.albef.ranking import UNSCORED, image_ranks, recalls, shortlisted, text_ranks

IMAGE = torch.tensor([0, 0, 1, 2, 2, 2])
"""Whose each of six texts is."""


def naive_text_rank(row, own):
    """Places by sorting, where equal scores of others come first."""
    order = sorted(range(len(row)), key=lambda t: (-row[t], t in own))
    return min(order.index(t) for t in own)


@given(st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), min_size=3, max_size=3))
def test_ranks_are_places_in_a_sorted_list(rows):
    owned = [{t for t in range(6) if IMAGE[t] == i} for i in range(3)]
    scores = torch.tensor(rows).float()
    assert text_ranks(scores, IMAGE).tolist() == [naive_text_rank(row, own) for row, own in zip(rows, owned, strict=True)]
    columns = scores.T
    naive = [naive_text_rank(row, {int(IMAGE[t])}) for t, row in enumerate(columns.tolist())]
    assert image_ranks(columns, IMAGE).tolist() == naive


def test_recall_that_can_be_counted_by_hand():
    texts = torch.tensor([[9.0, 0, 8, 7, 6, 5], [9, 8, 7, 6, 5, 4], [9, 8, 7, 1, 2, 3]])
    images = torch.tensor([[3.0, 2, 1], [1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3], [3, 2, 1]])
    measured = recalls(texts, images, IMAGE, (1, 2, 3))
    assert [measured[f"text_recall@{k}"] for k in (1, 2, 3)] == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    assert [measured[f"image_recall@{k}"] for k in (1, 2, 3)] == pytest.approx([3 / 6, 4 / 6, 1])
    assert measured["text_recall"] == pytest.approx(4 / 9)
    assert measured["image_recall"] == pytest.approx(13 / 18)
    assert measured["recall"] == pytest.approx((4 / 9 + 13 / 18) / 2)


def test_who_says_the_same_of_all_finds_nothing():
    assert recalls(torch.zeros(3, 6), torch.zeros(6, 3), IMAGE, (1,))["recall"] == 0.0


@pytest.mark.parametrize("length", [1, 4, 9, 20])
@pytest.mark.parametrize("at_once", [1, 5, 1000])
def test_a_shortlist_is_scored_and_the_rest_is_not(length, at_once):
    rng = torch.Generator().manual_seed(0)
    similarities, second = torch.randn(6, 9, generator=rng), torch.randn(6, 9, generator=rng)
    ours = shortlisted(similarities, length, lambda row, column: second[row, column], at_once)
    for i in range(6):
        best = sorted(range(9), key=lambda j: -similarities[i, j])[:length]
        assert ours[i].tolist() == [float(second[i, j]) if j in best else UNSCORED for j in range(9)]
