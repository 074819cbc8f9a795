import math

import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as geometry

from fedvision.leopart.colors import Colors, blurred_by, jittered_by, with_brightness, with_contrast, with_hue, with_saturation
from fedvision.leopart.crops import GLOBAL, MultiCrop, intersections, overlaps, random_boxes, resized_crops
from fedvision.seeds import generator


def images(n=3, channels=3, height=40, width=48):
    return torch.rand(n, channels, height, width, generator=generator(0, "images"))


def area(boxes):
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


@pytest.mark.golden
@pytest.mark.parametrize(("name", "sizes"), [("box", [64, 64, 32, 32]), ("box24", [224, 224, 96, 96, 96, 96])])
def test_what_crops_share_is_the_references(name, sizes, arrays, agree):
    found = overlaps(arrays[f"{name}_abs"], sizes)
    agree(found.of_global, arrays[f"{name}_gc"], "gc", atol=1e-4)
    agree(found.of_crop, arrays[f"{name}_all"], "all", atol=1e-4)


def test_what_crops_share_by_hand():
    boxes = torch.tensor([[0, 0, 20, 10], [10, 0, 40, 30], [10, 5, 20, 15]])
    found = overlaps(boxes, [20, 60, 10])
    assert found.of_global[0, 1].tolist() == [10, 0, 20, 20]  # rows of crop 0 are twice as high
    assert found.of_global[1, 0].tolist() == [0, 0, 20, 20]
    assert found.of_crop[1, 0].tolist() == found.of_global[1, 0].tolist()
    assert found.of_crop[2, 1].tolist() == [0, 0, 10, 10] and found.of_crop[2, 0].tolist() == [0, 0, 10, 5]
    assert found.of_crop[0, 0].tolist() == [0, 0, 20, 20]


@pytest.mark.parametrize("size", [(40, 48), (200, 30), (9, 9)])
def test_every_crop_overlaps_with_every_global_one(size):
    crops = MultiCrop(32, 16, local_crops=4)
    boxes = crops.boxes(200, size, generator(0, "boxes"))
    assert boxes.shape == (200, 6, 4) and (boxes[..., :2] >= 0).all()
    assert (boxes[..., 2] <= size[1]).all() and (boxes[..., 3] <= size[0]).all() and (boxes[..., 2:] > boxes[..., :2]).all()
    whole = size[0] * size[1]
    assert (area(intersections(boxes[:, 0], boxes[:, 1])) > int(0.02 * whole)).all()
    for crop in range(GLOBAL, 6):
        for other in range(GLOBAL):
            assert (area(intersections(boxes[:, crop], boxes[:, other])) > int(0.01 * whole)).all()


def test_a_crop_that_cannot_overlap_so_much_is_put_in_the_middle():
    crops = MultiCrop(32, 16, local_crops=1, global_scale=(0.25, 0.3), local_scale=(0.05, 0.06), overlap=0.2)
    boxes = crops.boxes(50, (40, 48), generator(0, "boxes"))
    shared = intersections(boxes[:, 0], boxes[:, 1])
    assert (area(shared) > 0).all() and (area(intersections(boxes[:, 2], shared)) > 0).all()


def test_boxes_have_the_areas_and_ratios_that_they_are_asked_for():
    boxes = random_boxes(2000, (100, 100), (0.25, 1.0), generator(0, "boxes"))
    width, height = (boxes[:, 2:] - boxes[:, :2]).double().unbind(1)
    shares, ratios = width * height / 1e4, width / height
    assert 0.24 < shares.min() < 0.27 and shares.max() <= 1.0 and abs(shares.mean() - 0.58) < 0.03
    assert 0.73 < ratios.min() < 0.77 and 1.3 < ratios.max() < 1.37 and abs(ratios.log().mean()) < 0.02
    # where nothing fits it is the middle, as large as ratios allow
    assert random_boxes(2, (10, 100), (1.0, 1.0), generator(0, "boxes")).tolist() == [[43, 0, 56, 10]] * 2


def test_crops_are_resized_as_torchvision_does_it():
    pictures, boxes = images(), MultiCrop(32, 16).boxes(3, (40, 48), generator(0, "boxes"))
    for size in (8, 32, 64):
        found = resized_crops(pictures, boxes, size)
        for i, picture in enumerate(pictures):
            for v, (left, top, right, bottom) in enumerate(boxes[i].tolist()):
                crop = top, left, bottom - top, right - left
                theirs = geometry.resized_crop(picture, *crop, [size, size], InterpolationMode.BILINEAR, antialias=True)
                assert torch.allclose(found[i, v], theirs, atol=1e-5)


def test_crops_repeat_with_the_generator_and_pictures_stay_as_they_are():
    crops, pictures = MultiCrop(32, 16), images()
    before = pictures.clone()
    one, other = (crops(pictures, generator(0, "crops")) for _ in range(2))
    assert torch.equal(one.global_crops, other.global_crops) and torch.equal(one.local_crops, other.local_crops)
    assert one.global_crops.shape == (3, 2, 3, 32, 32) and one.local_crops.shape == (3, 4, 3, 16, 16)
    assert one.overlaps.of_global.shape == (3, 2, 6, 4) and torch.equal(pictures, before)


@pytest.mark.parametrize(
    ("ours", "theirs", "factors"),
    [
        (with_brightness, geometry.adjust_brightness, (0.3, 1.0, 1.7)),
        (with_contrast, geometry.adjust_contrast, (0.3, 1.0, 1.7)),
        (with_saturation, geometry.adjust_saturation, (0.0, 1.0, 1.7)),
        (with_hue, geometry.adjust_hue, (-0.2, 0.0, 0.45)),
    ],
)
def test_colors_change_as_torchvision_changes_them(ours, theirs, factors):
    pictures = images()
    pictures[:, :, :5] = pictures[:, :1, :5]  # some of it is gray
    found = ours(pictures, torch.tensor(factors))
    for picture, factor, changed in zip(pictures, factors, found, strict=True):
        assert torch.allclose(changed, theirs(picture, factor), atol=2e-4)


def test_changes_of_color_come_in_the_order_of_each_picture():
    factors, order = torch.tensor([[0.5, 1.5], [0.5, 1.2], [0.7, 0.3], [0.1, -0.1]]), torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3]])
    found, operations = jittered_by(images(2), factors, order), (with_brightness, with_contrast, with_saturation, with_hue)
    for i in range(2):
        picture = images(2)[i : i + 1]
        for number in order[i].tolist():
            picture = operations[number](picture, factors[number, i : i + 1])
        assert torch.allclose(found[i], picture[0], atol=1e-6)


def test_each_picture_is_blurred_by_its_own_gaussian():
    deviations = torch.tensor([0.1, 0.8, 2.0])
    found = blurred_by(images(), deviations)
    for picture, deviation, blurred in zip(images(), deviations.tolist(), found, strict=True):
        theirs = geometry.gaussian_blur(picture, [13, 13], [deviation, deviation])
        assert torch.allclose(blurred, theirs, atol=1e-5)


def test_changes_happen_as_often_as_they_are_asked_to():
    pictures = images(1, 3, 8, 8).expand(600, -1, -1, -1)
    gray = Colors(jittered=0.0, gray=0.3, blurred=0.0)(pictures, generator(0, "colors"))
    share = (gray == gray[:, :1]).all((1, 2, 3)).float().mean().item()
    assert abs(share - 0.3) < 3 * math.sqrt(0.21 / 600)
    untouched = Colors(jittered=0.0, gray=0.0, blurred=0.0)(pictures, generator(0, "colors"))
    assert torch.equal(untouched, pictures)
    changed = Colors(gray=0.0)(pictures, generator(0, "colors"))
    assert ((changed != pictures).any(3).any(2).any(1)).float().mean() == pytest.approx(0.9, abs=0.05)
    assert changed.min() >= -1e-5 and changed.max() <= 1 + 1e-5


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_pictures_of_other_than_three_channels_change_too(channels):
    changed = Colors()(images(20, channels), generator(0, "colors"))
    assert changed.shape == (20, channels, 40, 48) and changed.isfinite().all() and not torch.equal(changed, images(20, channels))
