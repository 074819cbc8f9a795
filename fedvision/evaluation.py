"""Evaluating a model."""

import torch
from torch import nn

from fedvision.data import Examples
from fedvision.data.examples import ENVIRONMENT
from fedvision.learners.learner import Learner
from fedvision.metrics import Metrics, total

BATCH = 1024
"""Examples evaluated at a time."""


def evaluate(learner: Learner, model: nn.Module, examples: Examples) -> dict[str, float]:
    """The learner's metrics over ``examples``, without gradients and in evaluation mode; empty for no examples."""
    return measured(learner, model, examples).result() | _overall(learner, model, examples)


def evaluate_by_environment(learner: Learner, model: nn.Module, examples: Examples) -> dict[str, float]:
    """As ``evaluate``, and the accuracy in each environment among the examples as ``environment3_accuracy``."""
    if ENVIRONMENT not in examples:
        return evaluate(learner, model, examples)
    held = examples.fields[ENVIRONMENT]
    parts = {int(e): measured(learner, model, examples[(held == e).nonzero()[:, 0]]) for e in held.unique()}
    accuracies = {f"environment{e}_accuracy": accuracy for e, part in parts.items() if (accuracy := _accuracy(part)) is not None}
    return total(parts.values()).result() | _overall(learner, model, examples) | accuracies


def _accuracy(part: Metrics) -> float | None:
    """The mean accuracy over the examples, or over what they have of what it is of."""
    right, number = (part.sums["accuracy"], part.count) if "accuracy" in part.sums else part.shares.get("accuracy", (0.0, 0))
    return right / number if number else None


def measured(learner: Learner, model: nn.Module, examples: Examples) -> Metrics:
    """What adds of the learner's metrics over ``examples``: not what is measured over all of them together."""
    model.eval()
    with torch.inference_mode():
        return total(learner.evaluate(model, batch.decoded()) for batch in examples.batches(BATCH))


def _overall(learner: Learner, model: nn.Module, examples: Examples) -> dict[str, float]:
    with torch.inference_mode():
        return dict(learner.overall(model.eval(), examples)) if len(examples) else {}
