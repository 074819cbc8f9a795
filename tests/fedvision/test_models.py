import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from fedvision.models import CNN, MLP, SmallCNN, xavier
from fedvision.seeds import generator, global_generators


@pytest.fixture(autouse=True)
def _constructors_draw_from_a_lent_generator():
    with global_generators(generator(0, "test")):
        yield


def parameters(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def test_the_mlp_has_the_papers_size_on_color_mnist():
    model = MLP((2, 14, 14), (390, 390), 1)
    assert parameters(model) == (392 * 390 + 390) + (390 * 390 + 390) + (390 + 1) == 306_151
    assert [name for name, _ in model.named_parameters()] == [
        "hidden1.weight", "hidden1.bias", "hidden2.weight", "hidden2.bias", "classifier.weight", "classifier.bias",
    ]  # fmt: skip


def test_the_mlp_has_the_papers_size_on_eicu():
    sizes = [1399, 1024, 1024, 512, 1]
    expected = sum(fan_in * fan_out + fan_out for fan_in, fan_out in pairwise(sizes))
    assert parameters(MLP((1399,), (1024, 1024, 512), 1, relu=2)) == expected == 3_008_513


def test_the_cnn_has_the_papers_size_on_rotated_cifar():
    convolutions = (3 * 64 * 9 + 64) + (64 * 128 * 9 + 128) + (128 * 128 * 9 + 128)
    norms = 2 * (64 + 128 + 128)
    linear = (128 * 128 + 128) + (128 * 10 + 10)
    assert parameters(CNN((3, 16, 16), (64, 128, 128), 10)) == convolutions + norms + linear == 241_674


def test_the_mlp_is_its_formula():
    model, x = MLP((2, 3), (5, 4), 2), torch.randn(7, 2, 3)
    h = (x.reshape(7, 6) @ model.hidden1.weight.T + model.hidden1.bias).clamp_min(0)
    h = (h @ model.hidden2.weight.T + model.hidden2.bias).clamp_min(0)
    assert torch.allclose(model.features(x), h, atol=1e-6)
    assert torch.allclose(model(x), h @ model.classifier.weight.T + model.classifier.bias, atol=1e-6)


@pytest.mark.parametrize("relu", [0, 1, 2, 3])
def test_only_the_first_layers_are_followed_by_a_relu(relu):
    model, x = MLP((6,), (5, 4, 3), 1, relu), torch.randn(50, 6)
    h, layers = x, [model.hidden1, model.hidden2, model.hidden3]
    for i, layer in enumerate(layers):
        h = layer(h).relu() if i < relu else layer(h)
    assert torch.equal(model.features(x), h)
    assert (model.features(x) < 0).any() == (relu < 3)


def test_an_mlp_without_hidden_layers_is_logistic_regression():
    model = MLP((2, 2), (), 3)
    assert parameters(model) == 4 * 3 + 3
    assert torch.equal(model(torch.ones(1, 2, 2)), model.classifier(torch.ones(1, 4)))


@pytest.mark.parametrize("side", [14, 15, 16, 17, 28, 32])
def test_the_cnn_takes_images_of_any_side_from_14(side):
    model = CNN((1, side, side), (8, 8, 16), 5)
    assert model(torch.rand(2, 1, side, side)).shape == (2, 5)
    assert model.features(torch.rand(2, 1, side, side)).shape == (2, 16)


def test_images_of_13_pixels_are_too_small_for_the_cnn():
    assert CNN.final_side(13) == 0
    assert CNN.final_side(14) == 1


def test_the_logits_are_the_classifier_of_the_features():
    for model in (MLP((1, 16, 16), (5,), 3), CNN((1, 16, 16), (8, 8, 8), 3)):
        x = torch.rand(2, 1, 16, 16)
        assert torch.equal(model(x), model.classifier(model.features(x)))


def test_xavier_weights_fill_their_range_and_biases_are_zero():
    model = xavier(
        nn.Sequential(nn.Linear(200, 100), nn.Conv2d(10, 20, 3), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)), generator(0, "x")
    )
    for module, fans in ((model[0], 300), (model[1], 10 * 9 + 20 * 9)):
        bound = math.sqrt(6 / fans)
        weight = module.weight.detach()
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert not module.bias.any()
    assert torch.equal(model[3].weight, torch.ones(4))


def test_xavier_draws_from_its_generator_alone():
    first, second = (xavier(nn.Linear(4, 4), generator(0, "x")).weight for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, xavier(nn.Linear(4, 4), generator(1, "x")).weight)


@pytest.mark.parametrize("side", [1, 8, 33])
def test_the_small_cnn_takes_images_of_any_size(side):
    model = SmallCNN(2, (4, 6, 8), 5).eval()
    images = torch.rand(3, 2, side, side, generator=generator(0))
    assert model(images).shape == (3, 5) and torch.equal(model.classifier(model.features(images)), model(images))
    assert model.body(images).shape[2] == math.ceil(side / 4)  # halved twice
