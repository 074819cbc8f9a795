import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedvision.albef.grounding import box_scores, enlarged, most_central, overlaps

RNG = torch.Generator().manual_seed(0)
PIXELS = torch.randn(12, 17, generator=RNG)


def naive_score(pixels, box):
    """The specification's, pixel by pixel."""
    left, top, right, bottom = box
    inside = 0.0
    for y in range(int(top), min(int(bottom), pixels.shape[0])):
        for x in range(int(left), min(int(right), pixels.shape[1])):
            inside += float(pixels[y, x])
    return inside / ((right - left) * (bottom - top)) ** 0.5


def naive_overlap(one, two):
    """Counted pixel by pixel; boxes of whole pixels."""
    pixels = [{(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])} for box in (one, two)]
    shared = pixels[0] & pixels[1]
    if len({x for x, _ in shared}) < 2 or len({y for _, y in shared}) < 2:
        return 0.0
    return len(shared) / len(pixels[0] | pixels[1])


def test_boxes_are_scored_by_what_is_inside():
    boxes = torch.tensor([[0.0, 0, 17, 12], [3, 2, 8, 6], [2.7, 1.2, 9.2, 5.1], [15, 10, 21, 16], [4, 4, 5, 5]])
    expected = [naive_score(PIXELS, box) for box in boxes.tolist()]
    assert box_scores(PIXELS, boxes).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_box_without_area_is_never_the_best():
    boxes = torch.tensor([[3.0, 3, 3, 8], [2, 2, 6, 6], [0, 0, 0, 0]])
    assert box_scores(-torch.ones(9, 9), boxes).argmax() == 1


BOX = st.tuples(*[st.integers(0, 8)] * 2, *[st.integers(1, 8)] * 2).map(lambda box: (box[0], box[1], box[0] + box[2], box[1] + box[3]))


@given(BOX, BOX)
def test_overlap_is_shared_pixels_over_all(one, two):
    ours = overlaps(torch.tensor([one]).float(), torch.tensor(two).float())
    assert float(ours) == pytest.approx(naive_overlap(one, two))


def test_overlaps_of_as_many_boxes_are_pairwise():
    boxes, others = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4]]), torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 8]])
    assert overlaps(boxes, others).tolist() == [1.0, 0.5]


def test_a_map_is_enlarged_to_pixels_and_keeps_its_peak():
    maps = torch.zeros(1, 4, 4)
    maps[0, 1, 2] = 1.0
    large = enlarged(maps, (32, 48))[0]
    assert large.shape == (32, 48)
    peak = large.argmax()
    assert (8 <= peak // 48 < 16) and (24 <= peak % 48 < 36)


def test_the_most_central_box_is_the_nearest_to_the_middle():
    assert most_central(torch.tensor([[0.0, 0, 4, 4], [6, 4, 12, 8], [12, 8, 16, 12]]), (12, 17)) == 1
