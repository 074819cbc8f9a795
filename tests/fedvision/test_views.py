import pytest
import torch
from torch.nn.functional import pad

from fedvision.seeds import generator
from fedvision.views import reflected, signed, weak


def naive(image, flip, down, right, most):
    """Mirrored, padded by reflection and cropped, as the words say."""
    padded = pad(image.flip(2) if flip else image, (most,) * 4, mode="reflect")
    return padded[:, most + down : most + down + image.shape[1], most + right : most + right + image.shape[2]]


def candidates(image, most):
    """Every weak view of one image."""
    moves = range(-most, most + 1)
    return {(f, d, r): naive(image, f, d, r, most) for f in (False, True) for d in moves for r in moves}


def test_a_weak_view_is_a_mirrored_reflected_padded_crop():
    images = torch.rand(200, 3, 16, 16, generator=generator(0))
    seen = []
    for image, view in zip(images, weak(images, generator(1)), strict=True):
        found = [key for key, candidate in candidates(image, 2).items() if torch.equal(candidate, view)]
        assert len(found) == 1
        seen += found
    flips, downs, rights = (set(part) for part in zip(*seen, strict=True))
    assert flips == {False, True} and downs == rights == {-2, -1, 0, 1, 2}
    assert len(set(seen)) > 40  # each image has its own


def test_without_flips_left_stays_left():
    images = torch.arange(64.0).view(1, 1, 8, 8).expand(50, -1, -1, -1)
    views = weak(images, generator(0), flip=False)
    assert (views[..., 4, 2] < views[..., 4, 3]).all()


def test_without_flips_and_shifts_nothing_changes():
    images = torch.rand(5, 1, 6, 9, generator=generator(0))
    assert torch.equal(weak(images, generator(1), flip=False, shift=0), images)


@pytest.mark.parametrize(("side", "pixels"), [(32, 4), (96, 12), (8, 1)])
def test_images_move_by_up_to_an_eighth(side, pixels):
    rows = torch.arange(float(side))[:, None].expand(300, 1, side, side)
    moved = weak(rows, generator(0))[:, 0, side // 2, 0] - side // 2
    assert (moved.min().item(), moved.max().item()) == (-pixels, pixels)


def test_bytes_and_floats_get_the_same_view():
    images = torch.randint(256, (6, 3, 16, 16), generator=generator(0), dtype=torch.uint8)
    views = weak(images, generator(1))
    assert views.dtype == torch.uint8 and torch.equal(views.float(), weak(images.float(), generator(1)))


def test_a_weak_view_leaves_the_images_alone():
    images = torch.rand(5, 1, 8, 8, generator=generator(0))
    before = images.clone()
    weak(images, generator(1))
    assert torch.equal(images, before)


def test_reflection_does_not_repeat_the_edge():
    row = torch.arange(5.0).view(1, 1, 5)
    assert torch.equal(row[0, 0, reflected(torch.arange(-3, 8), 5)], pad(row, (3, 3), mode="reflect")[0, 0])


def test_signed_images_reach_from_minus_1_to_1():
    assert signed(torch.tensor([[[[0.0, 0.5, 1.0]]]])).flatten().tolist() == [-1.0, 0.0, 1.0]
