"""The app's own part: its data, its model, its loss. Nothing here is federated."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from fedvision.data import Examples, Spec
from fedvision.learners.learner import Learner, Loss
from fedvision.metrics import Metrics
from fedvision.seeds import global_generators


@dataclass(frozen=True, kw_only=True)
class DigitReader(Learner):
    """Ten classes of handwritten digits, one hidden layer."""

    def build(self, spec: Spec, rng: torch.Generator) -> nn.Module:
        with global_generators(rng):
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, spec.classes))

    def loss(self, model: nn.Module, batch: Examples, progress: float, rng: torch.Generator) -> Loss:
        return Loss(F.cross_entropy(model(batch.image), batch.label))

    def evaluate(self, model: nn.Module, batch: Examples) -> Metrics:
        logits = model(batch.image)
        loss = F.cross_entropy(logits, batch.label, reduction="sum")
        return Metrics.of_batch({"loss": loss, "accuracy": (logits.argmax(1) == batch.label).sum()}, len(batch))


def new_model() -> nn.Module:
    return DigitReader().build(Spec((1, 8, 8), 10), torch.Generator().manual_seed(0))


@cache
def examples_of(client: int, clients: int) -> tuple[Examples, Examples]:
    """What a client trains on, and the fifth of its digits that it keeps to evaluate; some clients write fainter than others."""
    digits = load_digits()
    mine = np.arange(client, len(digits.target), clients)
    ink = 0.4 + 0.6 * (client + 1) / clients
    image = torch.tensor(digits.images[mine] / 16 * ink, dtype=torch.float32)[:, None]
    examples = Examples({"image": image, "label": torch.tensor(digits.target[mine])})
    cut = len(examples) // 5
    return examples[cut:], examples[:cut]
