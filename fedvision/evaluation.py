"""Loading global arrays into a model, and evaluating it."""

import torch
from torch import nn

from fedvision.arrays import Named
from fedvision.data import Examples
from fedvision.learners.learner import Learner
from fedvision.metrics import total

BATCH = 1024
"""Examples evaluated at a time."""


def load(model: nn.Module, arrays: Named) -> None:
    """Copy ``arrays`` into ``model`` by state-dict name."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(arrays[name])


def evaluate(learner: Learner, model: nn.Module, examples: Examples) -> dict[str, float]:
    """The learner's metrics over ``examples``, without gradients and in evaluation mode; empty for no examples."""
    model.eval()
    with torch.inference_mode():
        return total(learner.evaluate(model, batch) for batch in examples.batches(BATCH)).result()
