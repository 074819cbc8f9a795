import pytest
import timm
import torch
from safetensors.torch import save_file

from fedvision.errors import ExperimentError
from fedvision.seeds import generator, global_generators
from fedvision.teachers import published


@pytest.fixture(scope="module")
def network():
    with global_generators(generator(5)):
        return timm.create_model("test_resnet", num_classes=4, in_chans=1).eval()


def test_a_teacher_has_the_weights_of_its_file(network, tmp_path):
    torch.save({"state_dict_ema": {f"module.{name}": tensor for name, tensor in network.state_dict().items()}}, tmp_path / "it.pth")
    save_file(network.state_dict(), tmp_path / "it.safetensors")
    images = torch.rand(2, 1, 32, 32, generator=generator(0))
    for name in ("it.pth", "it.safetensors"):
        teacher = published("test_resnet", 4, 1, checkpoint=tmp_path / name).eval()
        assert torch.equal(teacher(images), network(images))


def test_a_file_for_other_classes_is_refused(network, tmp_path):
    save_file(network.state_dict(), tmp_path / "it.safetensors")
    with pytest.raises(
        ExperimentError, match=r"as 'test_resnet' of 7 classes, does not fit ResNet: 2 of another shape: .*\[4.* instead of"
    ):
        published("test_resnet", 7, 1, checkpoint=tmp_path / "it.safetensors")


def test_downloaded_weights_for_other_classes_are_refused():
    with pytest.raises(ExperimentError, match="'tresnet_v2_l' are for 1000 classes, the data has 10; give a checkpoint"):
        published("tresnet_v2_l", 10, 3)


def test_without_a_network_a_file_is_asked_for(monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ExperimentError, match=r"cannot be downloaded \(no route to host\); give them as a checkpoint file"):
        published("tresnet_v2_l", 1000, 3)


def test_an_unknown_model_is_refused_with_the_nearest():
    with pytest.raises(ExperimentError, match="unknown timm model 'tresnet_v2_1'; did you mean 'tresnet_v2_l'"):
        published("tresnet_v2_1", 10, 3)
