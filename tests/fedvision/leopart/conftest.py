import json

import numpy as np
import pytest
import torch

from fedvision.leopart.network import Leopart
from fedvision.leopart.vision import VisionSize
from fedvision.seeds import generator


@pytest.fixture(scope="session")
def arrays(golden):
    """The reference's arrays, by name."""
    with np.load(golden / "leopart.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file}


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
    """Names and shapes of the reference's networks, by size."""
    return {size: json.loads((golden / f"leopart_{size}_keys.json").read_text())["keys"] for size in ("tiny", "vits16")}


@pytest.fixture
def agree():
    """Whether two tensors agree to the tolerances of the reference's arrays."""

    def check(ours, theirs, what="", atol=1e-5, rtol=1e-4):
        assert ours.shape == theirs.shape, f"{what}: shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
        far = (ours - theirs).abs().max().item() if ours.numel() else 0.0
        assert torch.allclose(ours.to(theirs.dtype), theirs, atol=atol, rtol=rtol), f"{what} is off by {far}"

    return check


@pytest.fixture
def reference(group):
    """The reference's tiny network and its teacher, with its weights; drop path is off."""

    def of(queue=0):
        model = Leopart(VisionSize(64, 16, 3, 32, 2, 4), 64, 16, 10, generator(0, "model"), queue=queue)
        missing, unexpected = model.load_state_dict(group("sd/"), strict=False)
        assert set(missing) == {"queue", "uniform_steps"} and not unexpected
        return model

    return of
