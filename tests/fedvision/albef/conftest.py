import json

import numpy as np
import pytest
import torch

from fedvision.albef.bert import TextSize
from fedvision.albef.vision import VisionSize


@pytest.fixture(scope="session")
def arrays(golden):
    """The reference's arrays, by name."""
    with np.load(golden / "albef_tiny.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file if file[name].dtype.kind in "fiub"}


@pytest.fixture
def group(arrays):
    """What one group of the reference's arrays holds, by the rest of the names."""

    def of(prefix):
        found = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
        if not found:
            pytest.skip(f"the reference's arrays have no group {prefix}")
        return found

    return of


@pytest.fixture(scope="session")
def keys(golden):
    """Names and shapes of the reference's tiny networks, by kind."""
    return json.loads((golden / "albef_tiny_keys.json").read_text())["models"]


@pytest.fixture
def inputs(arrays):
    """The reference's images, token ids and their mask."""
    return arrays["in/image"], arrays["in/input_ids"], arrays["in/attention_mask"].bool()


@pytest.fixture
def vision():
    """The size of the reference's image encoder."""
    return VisionSize(side=32, patch=8, width=32, depth=2, heads=4)


@pytest.fixture
def text():
    """The size of its text network."""
    return TextSize(vocabulary=100, width=32, heads=4, perceptron=64, layers=4, fusion=2, positions=32, context=32)


@pytest.fixture
def agree():
    """Whether two tensors agree to the tolerances of the reference's arrays."""

    def check(ours, theirs, what="", atol=2e-5, rtol=1e-4):
        assert ours.shape == theirs.shape, f"{what}: shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
        far = (ours - theirs).abs().max().item() if ours.numel() else 0.0
        assert torch.allclose(ours, theirs, atol=atol, rtol=rtol), f"{what} is off by {far}"

    return check
