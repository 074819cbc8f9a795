"""Views of ALBEF's pictures, each operation against Pillow or a loop over pixels."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from fedvision.albef import views
from fedvision.albef.views import NAMES, Operations, Views, augmented, drawn_operations, image_normalization, warped
from fedvision.seeds import generator


def photographs(n=4, channels=3, side=20):
    """Smooth colors with some noise, of all of whose values few are extreme."""
    rng = generator(0, "photographs")
    coarse = torch.rand(n, channels, 4, 4, generator=rng)
    fine = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return (0.1 + 0.7 * fine + 0.1 * torch.rand(fine.shape, generator=rng)).clamp(0, 1)


def as_bytes(images):
    return (images * 255).round().to(torch.uint8)


def only(kind, n, sign=1.0):
    """One operation for all."""
    return Operations(torch.full((n, 1), NAMES.index(kind)), torch.full((n, 1), sign))


def by_pillow(picture, operation):
    changed = operation(Image.fromarray(picture.permute(1, 2, 0).numpy()))
    return torch.from_numpy(np.asarray(changed).copy()).permute(2, 0, 1)


PILLOW = {
    "identity": lambda picture: picture,
    "autocontrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "brightness": lambda picture: ImageEnhance.Brightness(picture).enhance(1.36),
    "sharpness": lambda picture: ImageEnhance.Sharpness(picture).enhance(1.36),
}


@pytest.mark.parametrize("kind", PILLOW)
def test_operations_on_colors_are_pillows(kind):
    pictures = as_bytes(photographs())
    for found, picture in zip(augmented(pictures, only(kind, 4)), pictures, strict=True):
        far = (found.int() - by_pillow(picture, PILLOW[kind]).int()).abs()
        assert far.max() <= 1, kind  # where one rounds and the other cuts
    assert kind == "identity" or not torch.equal(augmented(pictures, only(kind, 4)), pictures)


def naively(picture, source):
    """Each pixel from the four around where it comes from."""
    channels, height, width = picture.shape
    moved = torch.empty(picture.shape)
    for y in range(height):
        for x in range(width):
            column, row = source(x, y)
            left, top = math.floor(column), math.floor(row)
            value = torch.zeros(channels)
            for j, down in ((top, 1 - (row - top)), (top + 1, row - top)):
                for i, right in ((left, 1 - (column - left)), (left + 1, column - left)):
                    inside = 0 <= i < width and 0 <= j < height
                    value += down * right * (picture[:, j, i].float() if inside else torch.full((channels,), 128.0))
            moved[:, y, x] = value
    return moved


def turned(x, y, sign, side):
    middle, angle = (side - 1) / 2, math.radians(21 * sign)
    dx, dy = x - middle, y - middle
    return middle + math.cos(angle) * dx - math.sin(angle) * dy, middle + math.sin(angle) * dx + math.cos(angle) * dy


SOURCES = {
    "shear_x": lambda x, y, sign: (x + sign * 0.21 * y, y),
    "shear_y": lambda x, y, sign: (x, y + sign * 0.21 * x),
    "translate_x": lambda x, y, sign: (x + sign * 7, y),
    "translate_y": lambda x, y, sign: (x, y + sign * 7),
    "rotate": lambda x, y, sign: turned(x, y, sign, 20),
}


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("kind", SOURCES)
def test_operations_that_move_a_picture_are_those_of_a_loop_over_pixels(kind, sign):
    pictures = as_bytes(photographs(2))
    found = augmented(pictures, only(kind, 2, sign)).float()
    for moved, picture in zip(found, pictures, strict=True):
        expected = naively(picture, lambda x, y: SOURCES[kind](x, y, sign))
        assert (moved - expected).abs().max() <= 0.51
    assert (found == 128).any()


def test_a_rotation_by_pillow_is_the_same():
    picture = as_bytes(photographs(1, side=32))[0]
    turned = Image.fromarray(picture.permute(1, 2, 0).numpy()).rotate(21, Image.Resampling.BILINEAR, fillcolor=(128,) * 3)
    expected = torch.from_numpy(np.asarray(turned).copy()).permute(2, 0, 1).float()
    found = augmented(picture[None], only("rotate", 1))[0].float()
    inside = slice(8, 24)
    assert (found - expected)[:, inside, inside].abs().max() <= 2


def test_pictures_of_a_batch_move_independently_and_are_the_same_again():
    pictures = as_bytes(photographs(1)).expand(64, -1, -1, -1).contiguous()
    operations = drawn_operations(64, generator(0, "view"))
    changed = augmented(pictures, operations)
    assert len({one.numpy().tobytes() for one in changed}) > 12
    assert torch.equal(changed, augmented(pictures, drawn_operations(64, generator(0, "view"))))
    assert torch.equal(pictures, as_bytes(photographs(1)).expand(64, -1, -1, -1))
    alone = [augmented(pictures[i : i + 1], Operations(*(part[i : i + 1] for part in operations)))[0] for i in range(64)]
    assert torch.equal(torch.stack(alone), changed)


def test_all_operations_are_drawn_as_often_and_left_out_half_of_the_time():
    kinds, signs = drawn_operations(20_000, generator(0, "view"))
    counts = torch.bincount(kinds.flatten(), minlength=10) / kinds.numel()
    assert kinds.shape == (20_000, 2)
    assert torch.allclose(counts[1:], torch.tensor(0.05), atol=0.005) and abs(float(counts[0]) - 0.55) < 0.01
    assert set(signs.unique().tolist()) == {-1.0, 1.0} and abs(float(signs.mean())) < 0.02


def test_operations_follow_each_other():
    pictures = as_bytes(photographs(2))
    both = Operations(torch.tensor([[3, 9], [9, 3]]), torch.ones(2, 2))
    brightened, rotated = only("brightness", 2), only("rotate", 2)
    first, last = augmented(augmented(pictures, brightened), rotated), augmented(augmented(pictures, rotated), brightened)
    assert torch.equal(augmented(pictures, both), torch.stack([first[0], last[1]]))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_pictures_of_other_than_three_channels_are_augmented_channel_by_channel(channels):
    pictures = as_bytes(photographs(10, channels))
    operations = Operations(torch.arange(10)[:, None], torch.ones(10, 1))
    found = augmented(pictures, operations)
    for channel in range(channels):
        assert torch.equal(found[:, channel : channel + 1], augmented(pictures[:, channel : channel + 1], operations))


def test_with_everything_off_pictures_are_only_normalized(monkeypatch):
    for name in ("resized", "crop_boxes", "mirrored", "augmented"):
        if name != "resized":
            monkeypatch.setattr(views, name, lambda *_: pytest.fail("nothing is to be done"))
    images = photographs()
    expected = (images - torch.tensor(views.CLIP.mean)[:, None, None]) / torch.tensor(views.CLIP.std)[:, None, None]
    assert torch.equal(Views()(images, generator(0, "view")), expected)
    assert torch.equal(Views(20, (0.2, 1.0), 0.5, True)(images), expected)


def test_the_view_of_tests_is_the_whole_picture_resized_as_pillow_does():
    images = photographs(2, side=40)[:, :, :, :30]
    found = image_normalization(3).undone(Views(16, (0.2, 0.5), 0.5, True)(images))
    for one, image in zip(found, as_bytes(images), strict=True):
        expected = by_pillow(image, lambda picture: picture.resize((16, 16), Image.Resampling.BICUBIC))
        assert (255 * one - expected).abs().max() < 1.5


def test_a_crop_is_a_part_of_the_picture_of_an_allowed_size_and_half_of_the_pictures_are_mirrored():
    side = 64
    rows, columns = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing="ij")
    places = torch.stack([rows, columns]).expand(200, -1, -1, -1)  # each pixel holds where it is
    seen = image_normalization(2).undone(Views(side, (0.2, 0.6), 0.5)(places, generator(0, "view")))
    middle = slice(8, -8)  # where the border does not matter
    height = (seen[:, 0, -9, 32] - seen[:, 0, 8, 32]) * side / (side - 17)
    width = (seen[:, 1, 32, -9] - seen[:, 1, 32, 8]) * side / (side - 17)
    area = height * width.abs()
    assert area.min() > 0.18 and area.max() < 0.63 and area.std() > 0.05
    assert 70 < (width < 0).sum() < 130
    assert seen[:, 0, middle, middle].std((1, 2)).min() > 0.05


def test_a_view_does_not_leave_the_range_of_pictures_and_does_not_change_them():
    images = (torch.rand(8, 3, 24, 24, generator=generator(0, "view")) > 0.5).float()
    before = images.clone()
    for view in (Views(32, (0.5, 1.0)), Views(32, (0.5, 1.0), 0.5, True), Views(24, randaugment=True)):
        seen = image_normalization(3).undone(view(images, generator(1, "view")))
        assert seen.min() > -1e-5 and seen.max() < 1 + 1e-5
        assert torch.equal(view(images, generator(1, "view")), view(images, generator(1, "view")))
    assert torch.equal(images, before)


def test_a_picture_that_stays_where_it_is_stays_as_it_is():
    pictures = as_bytes(photographs())
    assert torch.equal(warped(pictures, torch.eye(3)[:2].expand(4, -1, -1)), pictures)
