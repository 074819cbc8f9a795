import numpy as np
import pytest
import torch

from fedvision.multimae.decoders import DecoderSize
from fedvision.multimae.modalities import DEPTH_MAP, RGB, semantic
from fedvision.multimae.model import Autoencoder, Size
from fedvision.multimae.transformer import initialized


@pytest.fixture(scope="session")
def arrays(golden):
    """The reference's arrays, by name."""
    with np.load(golden / "multimae_tiny.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file if file[name].dtype.kind in "fiub"}


@pytest.fixture
def group(arrays):
    """What one group of the reference's arrays calls a name, such as ``weights("pre")``."""

    def of(prefix):
        return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}

    return of


@pytest.fixture
def pictures(arrays):
    """The reference's inputs."""
    return {name: arrays[f"in/{name}"] for name in ("rgb", "depth", "semseg")}


@pytest.fixture
def autoencoder():
    """The network of the reference's arrays, with weights of its own."""
    modalities = [RGB, DEPTH_MAP, semantic(10, embedding=8)]
    model = Autoencoder(modalities, modalities, Size(32, 2, 4), DecoderSize(16, 2, 4), 16, (4, 4))
    return initialized(model, torch.Generator().manual_seed(0)).eval()
