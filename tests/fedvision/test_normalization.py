import numpy as np
import pytest
import torch

from fedvision.normalization import Normalization, renormalized
from fedvision.seeds import generator

IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = Normalization((0.5,) * 3, (0.5,) * 3)
IDENTITY = Normalization.none(3)
PAIRS = {
    "imagenet_to_identity": (IMAGENET, IDENTITY),
    "half_to_identity": (HALF, IDENTITY),
    "half_to_imagenet": (HALF, IMAGENET),
    "imagenet_to_half": (IMAGENET, HALF),
}


@pytest.fixture(scope="module")
def arrays(golden):
    with np.load(golden / "usi.npz") as file:
        return dict(file)


def of_the_reference(images, own, other):
    """What USI's reference code computes."""
    mean, std, mean_other, std_other = (torch.tensor(values)[:, None, None] for values in (own.mean, own.std, other.mean, other.std))
    return images * std / std_other - (mean_other - mean)


@pytest.mark.golden
@pytest.mark.parametrize("pair", PAIRS)
def test_from_one_normalization_to_another_as_in_the_golden_arrays(arrays, pair):
    if f"norm_{pair}_exact" not in arrays:
        pytest.skip(f"the golden arrays hold no {pair}")
    plain, given, exact, reference = (
        torch.from_numpy(arrays[f"norm_{name}"]) for name in ("rgb01", f"{pair}_student_in", f"{pair}_exact", f"{pair}_reference")
    )
    own, other = PAIRS[pair]
    assert torch.allclose(own(plain), given, atol=1e-5)
    assert torch.allclose(renormalized(given, own, other), exact, atol=1e-5)
    assert torch.allclose(of_the_reference(given, own, other), reference, atol=1e-5)


@pytest.mark.parametrize("pair", PAIRS)
def test_from_one_normalization_to_another_is_exact(pair):
    own, other = PAIRS[pair]
    images = torch.rand(2, 3, 4, 5, generator=generator(0))
    assert torch.allclose(renormalized(own(images), own, other), other(images), atol=1e-6)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_references_formula_holds_only_where_the_teacher_divides_by_one(pair):
    own, other = PAIRS[pair]
    images = own(torch.rand(2, 3, 4, 5, generator=generator(0)))
    gap = (of_the_reference(images, own, other) - renormalized(images, own, other)).abs().max()
    assert gap < 1e-5 if other.std == (1.0,) * 3 else gap > 0.01


def test_the_same_normalization_changes_no_bit():
    images = torch.rand(2, 3, 4, 5, generator=generator(0))
    assert renormalized(images, HALF, HALF) is images


def test_what_was_normalized_can_be_undone():
    images = torch.rand(2, 3, 4, 5, generator=generator(0))
    assert torch.allclose(IMAGENET.undone(IMAGENET(images)), images, atol=1e-6)


def test_timm_knows_the_normalization_of_its_models():
    assert Normalization.of_timm("resnet50") == IMAGENET
    assert Normalization.of_timm("vit_small_patch16_224") == HALF
    assert Normalization.of_timm("tresnet_v2_l") == IDENTITY


def test_gray_images_get_the_average_of_the_channels():
    gray = Normalization.of_timm("resnet50", 1)
    assert gray.mean == pytest.approx((0.449,)) and gray.std == pytest.approx((0.226,))
