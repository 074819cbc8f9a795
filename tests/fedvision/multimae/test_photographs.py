import pytest
import torch

from fedvision.multimae.photographs import GRAY, Colors, Zoom
from fedvision.seeds import generator


def images(n=6, side=8):
    return torch.rand(n, 3, side, side, generator=generator(0, "images"))


def values(n=40, side=8):
    """Depth and classes that say where a pixel was; a picture of one color."""
    number = torch.arange(side * side, dtype=torch.float32).view(1, 1, side, side).expand(n, -1, -1, -1)
    return {"rgb": torch.full((n, 3, side, side), 0.9), "depth": 1 + number, "target": (number[:, 0] % 5).long()}


def test_colors_change_each_picture_by_itself_and_repeat():
    change = Colors(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.2, probability=1.0)
    same = images()[:1].expand(4, -1, -1, -1)
    changed = change(same, generator(0, "colors"))
    assert len({tuple(one.flatten().tolist()) for one in changed}) == 4
    assert torch.equal(changed, change(same, generator(0, "colors")))
    assert changed.min() >= 0 and changed.max() <= 1


def test_colors_change_as_often_as_asked():
    changed = Colors(brightness=0.5, probability=0.3)(images(200), generator(0, "colors")) != images(200)
    assert 0.2 < changed.flatten(1).any(1).double().mean() < 0.4


def test_gray_pictures_have_three_equal_channels():
    gray = Colors(gray=1.0)(images(), generator(0, "colors"))
    assert torch.allclose(gray[:, :1], gray[:, 1:2]) and torch.allclose(gray[:, :1], gray[:, 2:])


def test_idle_colors_change_nothing_and_draw_nothing():
    rng = generator(0, "colors")
    before, given = rng.get_state(), images()
    assert Colors()(given, rng) is given
    assert Colors(brightness=1.0, probability=0.0).idle
    assert torch.equal(rng.get_state(), before)


def test_pictures_that_are_not_there_stay_so():
    given = images()
    given[2] = torch.nan
    changed = Colors(brightness=0.5, probability=1.0)(given, generator(0, "colors"))
    assert changed.isnan().flatten(1).all(1).tolist() == [False, False, True, False, False, False]


def test_zooming_in_shows_a_part_of_all_modalities_alike():
    zoomed = Zoom(2.0, 2.0)(values(), generator(0, "zoom"))
    number = zoomed["depth"] - 1
    assert torch.equal(zoomed["target"], (number[:, 0] % 5).long())
    assert not number.isnan().any()
    spans = {(int(one.min()) // 8, int(one.max()) // 8, int(one.min()) % 8) for one in number}
    assert len(spans) > 4, "windows are anywhere"
    assert all(last - first <= 4 for first, last, _ in spans)


def test_zooming_out_leaves_the_rest_unknown():
    zoomed = Zoom(0.5, 0.5)(values(3), generator(0, "zoom"))
    for name, beyond in (("depth", zoomed["depth"].isnan()[:, 0]), ("target", zoomed["target"] == 255)):
        assert not beyond[:, :4, :4].any(), name
        assert beyond[:, 4:].all() and beyond[:, :, 4:].all(), name
    assert torch.allclose(zoomed["rgb"][:, :, 4:], torch.tensor(GRAY))
    assert torch.allclose(zoomed["rgb"][:, :, :4, :4], torch.tensor(0.9))


@pytest.mark.parametrize("factors", [(0.3, 3.0), (1.0, 1.0)])
def test_zooming_keeps_the_size_and_repeats(factors):
    once, again = (Zoom(*factors)(values(), generator(0, "zoom")) for _ in range(2))
    assert {name: held.shape for name, held in once.items()} == {name: held.shape for name, held in values().items()}
    assert all(torch.equal(once[name].nan_to_num(-1), again[name].nan_to_num(-1)) for name in once)
