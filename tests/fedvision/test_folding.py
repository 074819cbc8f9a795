import pytest
import timm
import torch
from torch import nn

from fedvision.folding import folded
from fedvision.seeds import generator, global_generators


def norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def used(model):
    """The model with statistics as of after some training."""
    rng = generator(0, "statistics")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=rng)
            module.running_var.uniform_(0.5, 2, generator=rng)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=rng)
    return model


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "tresnet_m", "efficientnet_b0", "regnety_002"])
def test_folding_changes_the_speed_alone(name):
    with global_generators(generator(0)):
        model = used(timm.create_model(name, num_classes=5))
    images = torch.rand(2, 3, 64, 64, generator=generator(0, "images"))
    faster = folded(model, images)
    with torch.no_grad():
        assert torch.allclose(faster(images), model.eval()(images), rtol=1e-4, atol=1e-5)
    assert norms(model) > 0 and norms(faster) == 0


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        h = self.convolution(x)
        return self.norm(h) + h


class ActivationBetween(TwoReaders):
    def forward(self, x):
        return self.norm(self.convolution(x).relu())


class SharedNorm(TwoReaders):
    def forward(self, x):
        return self.norm(self.convolution(x)) + self.norm(self.convolution(x + 1))


@pytest.mark.parametrize("kind", [TwoReaders, ActivationBetween, SharedNorm])
def test_what_cannot_be_folded_is_left_as_it_is(kind):
    with global_generators(generator(0)):
        model = used(kind())
    images = torch.rand(2, 3, 5, 5, generator=generator(0, "images"))
    same = folded(model, images)
    assert norms(same) == 1
    assert torch.equal(same(images), model.eval()(images))
