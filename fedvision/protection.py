"""Whether ``[privacy]`` covers all that an experiment would send: found out before anything starts, by declarations and by trying."""

from typing import Any

from torch import nn

from fedvision.data import FederatedData
from fedvision.errors import ExperimentError
from fedvision.learners.learner import Learner, composes_its_batches, follows_its_steps, is_mean_over_examples
from fedvision.privacy import Privacy
from fedvision.private_silo import incompatible, mixing, remembering
from fedvision.silo import step_count

TRIED = 3
"""How many examples a trial takes."""


def check_protected(privacy: Privacy, rounds: int, data: FederatedData, learner: Learner, strategy: Any) -> None:
    """Refuse what ``[privacy]`` does not cover.

    Raises:
        ExperimentError: the strategy, the learner or the server's own examples would tell more, or no noise meets the target.
    """
    asked = f"privacy.unit = {privacy.unit!r}"
    name = type(strategy).__name__
    if privacy.unit not in getattr(strategy.client_update, "protects", ()):
        reason = getattr(strategy.client_update, "unprotected", "") or "its client_update is not declared @protects"
        raise ExperimentError(f"{asked} does not cover strategy {name}, since {reason}; choose e.g. fedavg")
    if data.server is not None:
        raise ExperimentError(f"{asked} does not cover the {len(data.server)} examples that the server trains on; deal them to clients")
    if privacy.unit == "example":
        _check_examples(privacy, rounds, data, learner, strategy)
    else:
        _check_clients(privacy, rounds, data, strategy)


def check_model(privacy: Privacy, data: FederatedData, learner: Learner, model: nn.Module) -> None:
    """Refuse models with a layer that mixes or remembers examples.

    Raises:
        ExperimentError: the layer, and why.
    """
    fault = incompatible(model) if privacy.unit == "example" else remembering(model)
    if fault is None and privacy.unit == "example":
        try:
            few = data.train[data.train.sizes.index(max(data.train.sizes))][:TRIED].to(next(model.parameters()).device)
            fault = mixing(learner, model, few, privacy.clipping)
        except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
            fault = f"opacus cannot form its per-example gradients ({str(error).splitlines()[0][:200]}); another privacy.clipping may do"
    if fault is not None:
        raise ExperimentError(f"[privacy] cannot train this model: {fault}")


def _check_examples(privacy: Privacy, rounds: int, data: FederatedData, learner: Learner, strategy: Any) -> None:
    name = type(learner).__name__
    if not is_mean_over_examples(learner):
        fact = f"the loss of learner {name} is not declared a mean over examples, so that one example is in more than one term of it"
        raise ExperimentError(f"privacy.unit = 'example': {fact}; choose e.g. classifier, or unit = 'client'")
    if composes_its_batches(learner) or follows_its_steps(learner):
        fact = f"learner {name} composes its own batches, or does more with them before or after a step"
        raise ExperimentError(f"privacy.unit = 'example': {fact}, as a teacher does; choose e.g. classifier, or unit = 'client'")
    if not hasattr(strategy, "local_steps"):
        raise ExperimentError(
            f"privacy.unit = 'example' needs local steps, which strategy {type(strategy).__name__} has not; choose e.g. fedavg"
        )
    if not strategy.shuffle:
        raise ExperimentError("strategy.shuffle = false: [privacy] samples the examples of each step at random; leave it out")
    sizes = [size for size in data.train.sizes if size]
    if privacy.delta >= 1 / max(sizes):
        fact = f"privacy.delta = {privacy.delta}: a client has {max(sizes)} examples"
        raise ExperimentError(f"{fact}, and delta must be below 1 / {max(sizes)} = {1 / max(sizes):.2g}")
    smallest = min(sizes)
    steps = step_count(smallest, strategy.batch_size, strategy.epochs, strategy.steps)
    privacy.noise(min(strategy.batch_size, smallest) / smallest, max(rounds, 1) * steps)


def _check_clients(privacy: Privacy, rounds: int, data: FederatedData, strategy: Any) -> None:
    if strategy.weight_by != "clients":
        fact = f"strategy.weight_by = {strategy.weight_by!r}: a client with many examples would count for more than the noise hides"
        raise ExperimentError(f'{fact}; set strategy.weight_by = "clients"')
    if privacy.delta >= 1 / data.num_clients:
        fact = f"privacy.delta = {privacy.delta}: there are {data.num_clients} clients"
        raise ExperimentError(f"{fact}, and delta must be below 1 / {data.num_clients} = {1 / data.num_clients:.2g}")
    privacy.noise(strategy.fraction, max(rounds, 1))
