from dataclasses import dataclass

import torch
from torch import nn

from fedvision.data.examples import ENVIRONMENT, IMAGE, LABEL, Examples
from fedvision.evaluation import BATCH, evaluate, evaluate_by_environment, measured
from fedvision.learners.classifier import Classifier
from fedvision.seeds import generator


@dataclass(frozen=True, kw_only=True)
class Ranked(Classifier):
    """A classifier that also says how many examples there are, and whether it was asked as evaluation asks."""

    def overall(self, model, examples):
        return {"examples": float(len(examples)), "quiet": float(torch.is_inference_mode_enabled() and not model.training)}


def parts(n):
    images = torch.rand(n, 1, 4, 4, generator=generator(0, "images"))
    examples = Examples({IMAGE: images, LABEL: torch.arange(n) % 3, ENVIRONMENT: torch.arange(n) % 2})
    learner = Ranked(model="mlp")
    return learner, nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), examples


def test_what_does_not_add_is_measured_once_over_all_examples():
    learner, model, examples = parts(BATCH + 3)
    found = evaluate(learner, model, examples)
    assert (found["examples"], found["quiet"]) == (BATCH + 3, 1.0)
    assert found.keys() >= {"loss", "accuracy"}
    by_environment = evaluate_by_environment(learner, model, examples)
    assert by_environment["examples"] == BATCH + 3 and "environment1_accuracy" in by_environment


def test_without_examples_nothing_is_measured():
    learner, model, examples = parts(4)
    assert evaluate(learner, model, examples[:0]) == {}


def test_what_adds_can_be_measured_alone():
    learner, model, examples = parts(7)
    found = measured(learner, model, examples).result()
    assert "examples" not in found and found["loss"] == evaluate(learner, model, examples)["loss"]
