"""What a learner shows of a model."""

from collections.abc import Mapping

import torch

from fedvision.arrays import Named
from fedvision.assembly import Assembly
from fedvision.gallery import Gallery
from fedvision.learners.learner import draws_pictures


def of_learner(assembly: Assembly, arrays: Named) -> Mapping[str, Gallery]:
    """What an experiment's learner shows of a model on the first test examples.

    Args:
        assembly: whose model is overwritten.
        arrays: the shared arrays of the model.
    """
    if not draws_pictures(assembly.learner) or not len(assembly.data.test):
        return {}
    model = assembly.loaded(arrays)
    with torch.inference_mode():
        return assembly.learner.pictures(model, assembly.data.test[: assembly.learner.shown].to(assembly.device).decoded())
