import pytest
import torch
from torch import nn

from fedvision.backbones import backbone, group_normalized
from fedvision.errors import ExperimentError
from fedvision.seeds import generator


def test_a_network_depends_on_the_generator_alone():
    one, same, other = (backbone("test_resnet", 4, 1, None, generator(seed)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_network_takes_images_of_the_size_asked_for(name):
    images = torch.rand(2, 1, 64, 64, generator=generator(0))
    assert backbone(name, 4, 1, 64, generator(0)).eval()(images).shape == (2, 4)


def test_options_that_are_not_given_are_left_out():
    backbone("test_resnet", 4, 3, None, generator(0), drop_path_rate=None)


def test_options_that_a_network_does_not_have_are_refused():
    with pytest.raises(ExperimentError, match="timm cannot build 'test_resnet' with cubism = 2"):
        backbone("test_resnet", 4, 3, None, generator(0), cubism=2)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "mobilenetv3_small_050"])
def test_with_group_norm_no_example_depends_on_others_and_names_and_weights_stay(name):
    own, grouped = backbone(name, 4, 3, 64, generator(0)), group_normalized(backbone(name, 4, 3, 64, generator(0)))
    params = dict(grouped.named_parameters())
    assert all(torch.equal(param, params[name]) for name, param in own.named_parameters()) and len(params) == len(list(own.parameters()))
    assert not list(grouped.buffers()) and not any(isinstance(module, nn.BatchNorm2d) for module in grouped.modules())
    images = torch.rand(3, 3, 64, 64, generator=generator(1))
    grouped.train()
    assert torch.allclose(grouped(images)[1:2], grouped(images[1:2]), atol=1e-5)
    norms = [module for module in grouped.modules() if isinstance(module, nn.GroupNorm)]
    assert norms and all(module.num_channels >= 2 * module.num_groups for module in norms)


def test_group_norm_keeps_the_activation_that_is_part_of_a_norm():
    own, grouped = (
        backbone("test_efficientnet", 4, 3, 64, generator(0)),
        group_normalized(backbone("test_efficientnet", 4, 3, 64, generator(0))),
    )
    before, after = (nn.Sequential(model.bn1.drop, model.bn1.act) for model in (own, grouped))
    assert str(before) == str(after)
    assert grouped.bn1(torch.randn(1, grouped.bn1.num_channels, 4, 4, generator=generator(1))).min() > -0.5  # SiLU has no lower value


def test_odd_numbers_of_channels_make_one_group():
    assert group_normalized(nn.Sequential(nn.BatchNorm2d(9)))[0].num_groups == 1
    assert group_normalized(nn.Sequential(nn.BatchNorm2d(64)))[0].num_groups == 32
