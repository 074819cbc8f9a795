import pytest
import torch

from fedvision.backbones import backbone
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
