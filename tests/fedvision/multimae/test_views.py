import pytest
import torch

from fedvision.data.examples import Examples
from fedvision.errors import DataError
from fedvision.multimae.losses import standardized_depth
from fedvision.multimae.modalities import DEPTH_MAP, RGB, Modality, semantic
from fedvision.multimae.views import Moves, as_seen, image_normalization, present, raw
from fedvision.seeds import generator

SEMSEG = semantic(5, stride=2)
ALL = (RGB, DEPTH_MAP, SEMSEG)


def numbered(n=4, side=8):
    """Pictures whose maps hold the number of each pixel, so that it can be told where a pixel went."""
    number = torch.arange(side * side, dtype=torch.float32).view(1, 1, side, side)
    return Examples(
        {
            "image": (number / side**2).expand(n, 3, -1, -1).contiguous(),
            "depth": (1 + number).expand(n, -1, -1, -1).contiguous(),
            "semseg": (number[:, 0] % 5).to(torch.uint8).expand(n, -1, -1).contiguous(),
            "label": torch.zeros(n, dtype=torch.int64),
        }
    )


def with_gaps():
    """The third has no depth, the fourth no picture."""
    gaps = {"has_depth": torch.tensor([True, True, False, True]), "has_image": torch.tensor([True, True, True, False])}
    return Examples({**numbered().fields, **gaps})


def test_modalities_are_there_where_the_examples_have_them():
    assert present(with_gaps(), ALL).tolist() == [[True, True, True], [True, True, True], [True, False, True], [False, True, True]]
    without = Examples({name: values for name, values in numbered().fields.items() if name != "depth"})
    assert present(without, ALL).tolist() == [[True, False, True]] * 4


def test_what_is_not_known_is_marked():
    batch = with_gaps()
    batch.fields["depth"][0, 0, 3, 3] = 0.0  # not measured
    batch.fields["semseg"][0, 1, 1] = 255
    values = raw(batch, ALL)
    assert values["depth"].isnan().sum((1, 2, 3)).tolist() == [1, 0, 64, 0]
    assert values["rgb"].isnan().flatten(1).all(1).tolist() == [False, False, False, True]
    assert (values["semseg"] == 255).sum((1, 2)).tolist() == [1, 0, 0, 0]
    assert values["semseg"].dtype == torch.int64


def test_what_no_example_has_is_left_out():
    batch = Examples({**numbered().fields, "has_depth": torch.zeros(4, dtype=torch.bool)})
    assert list(raw(batch, ALL)) == ["rgb", "semseg"]


def where_from(values):
    """The number of the pixel that each value of depth was, and whether its picture and its class are still that pixel's."""
    number = (values["depth"] - 1).round()
    side = 8
    with_picture = torch.allclose(values["rgb"], (number / side**2).expand(-1, 3, -1, -1), atol=1e-6)
    return number, with_picture and torch.equal(values["semseg"], (number[:, 0] % 5).long())


def test_flips_move_all_modalities_alike():
    flipped = Moves(flip=0.5)(raw(numbered(64), ALL), generator(0, "view"))
    number, together = where_from(flipped)
    assert together
    straight = number[:, 0, 0, 0] == 0
    assert 16 < straight.sum() < 48
    assert (number[~straight, 0, 0, 0] == 7).all()


def test_crops_move_all_modalities_alike():
    moves = Moves(scale=(0.2, 0.9))
    values = raw(numbered(16), (DEPTH_MAP, SEMSEG))
    moved = moves(values, generator(0, "view"))
    assert torch.equal(moved["semseg"], ((moved["depth"][:, 0] - 1) % 5).long())  # both to the nearest pixel
    assert len({tuple(one.flatten().tolist()) for one in moved["depth"]}) > 8
    again = moves(values, generator(0, "view"))
    assert all(torch.equal(moved[name], again[name]) for name in moved)


def test_pictures_are_resized_with_their_maps():
    values = Moves(resolution=4)(raw(numbered(), ALL))
    assert {name: tuple(held.shape) for name, held in values.items()} == {"rgb": (4, 3, 4, 4), "depth": (4, 1, 4, 4), "semseg": (4, 4, 4)}
    assert set(values["semseg"].flatten().tolist()) <= set(range(5))
    same = raw(numbered(), ALL)
    assert all(Moves(resolution=8)(same)[name] is same[name] for name in same)


def test_a_crop_of_a_picture_that_is_not_there_is_not_there():
    moved = Moves(scale=(0.3, 0.5), flip=0.5)(raw(with_gaps(), ALL), generator(0, "view"))
    assert moved["rgb"].isnan().flatten(1).all(1).tolist() == [False, False, False, True]


def test_the_network_sees_normalized_pictures_standardized_depth_and_every_second_class():
    batch = numbered()
    seen = as_seen(raw(batch, ALL), {m.name: m for m in ALL})
    assert torch.equal(seen["rgb"], image_normalization(3)(batch.image))
    assert torch.equal(seen["depth"], standardized_depth(batch.fields["depth"]))
    assert torch.equal(seen["semseg"], batch.fields["semseg"][:, 1::2, 1::2].long())


def test_classes_are_shrunk_as_to_the_nearest_center():
    ids = torch.randint(5, (2, 12, 12), generator=torch.Generator().manual_seed(0))
    for stride in (2, 3, 4):
        seen = as_seen({"semseg": ids}, {"semseg": semantic(5, stride=stride)})["semseg"]
        nearest = torch.nn.functional.interpolate(ids[:, None].double(), scale_factor=1 / stride, mode="nearest-exact")[:, 0]
        assert torch.equal(seen, nearest.long())


@pytest.mark.parametrize(
    ("changed", "modality", "reason"),
    [
        ({"semseg": torch.full((4, 8, 8), 7)}, SEMSEG, "holds the class 7, modality 'semseg' has 5 .*raise learner.semantic_classes"),
        ({"semseg": torch.zeros(4, 1, 8, 8)}, SEMSEG, r"has the shape \[1, 8, 8\] per example, modality 'semseg' is \[height, width\]"),
        (
            {"heat": torch.zeros(4, 2, 8, 8)},
            Modality(name="heat", field="heat", channels=1),
            r"'heat' has the shape \[2, 8, 8\] .* is \[1, height, width\].*modalities.heat.channels",
        ),
    ],
)
def test_fields_that_do_not_fit_are_refused(changed, modality, reason):
    with pytest.raises(DataError, match=reason):
        raw(Examples({**numbered().fields, **changed}), [modality])
