"""Whether several clients of an experiment can train at once, and if not, why: found out before anything starts."""

from contextlib import ExitStack

import numpy as np
import torch

from clients.cohort import Cohort, not_a_mean, not_element_wise
from fedvision import optimizers
from fedvision.assembly import Assembly
from fedvision.data import Examples
from fedvision.data.federated import Silos
from fedvision.errors import EngineError
from fedvision.learners.learner import composes_its_batches, follows_its_steps, is_mean_over_examples
from fedvision.seeds import generator, global_generators
from fedvision.silo import Silo
from strategies.strategy import ONE_BY_ONE, obstacle

TRIED = 4
"""How many examples a trial takes."""

TOLERANCE = 1e-4
"""By how much, relatively, a loss may differ when clients are computed together; a dependence on other examples shows more."""


def check_batchable(assembly: Assembly) -> None:
    """Hold an experiment to what ``engine.batch_clients`` needs: by what its parts declare, then by trying.

    Raises:
        EngineError: the reason, and the remedy.
    """
    require_batchable(assembly)
    train = assembly.data.train
    if len(set(train.sizes)) > 1 and not is_mean_over_examples(assembly.learner):
        raise EngineError(f"{_asked(assembly)}: {not_a_mean(assembly.learner, train.sizes)}")
    few = train[int(np.argmax(train.sizes))][:TRIED]
    fault = _changed_buffer(assembly, few) or _difference(assembly, few)
    if fault is not None:
        raise EngineError(f"{_asked(assembly)}: {fault}; {ONE_BY_ONE}")


def require_batchable(assembly: Assembly) -> None:
    """Refuse what needs no trial.

    Raises:
        EngineError: the reason, and the remedy.
    """
    if assembly.experiment.privacy is not None:
        raise EngineError(f"{_asked(assembly)}: with [privacy] each client draws batches and noise of its own; {ONE_BY_ONE}")
    reason = obstacle(assembly.strategy)
    if reason is not None:
        strategy = assembly.experiment.strategy.name
        raise EngineError(f"{_asked(assembly)}: clients of strategy {strategy} must answer one by one, since {reason}; {ONE_BY_ONE}")
    if getattr(assembly.strategy, "arranged", False):
        raise EngineError(f"{_asked(assembly)}: with strategy.arranged each client puts rows in an order of its own; {ONE_BY_ONE}")
    reason = _own(assembly)
    if reason is not None:
        learner = assembly.experiment.learner.name
        raise EngineError(f"{_asked(assembly)}: clients of learner {learner} must answer one by one, since {reason}; {ONE_BY_ONE}")
    optimizer = getattr(assembly.strategy, "client_optimizer", None)
    if optimizer is not None and optimizer.keys() & optimizers.STEPPING:
        fact = "client_optimizer has a schedule or keeps its memory, by each client's own steps"
        raise EngineError(f"{_asked(assembly)}: {fact}; {ONE_BY_ONE}")
    if optimizer is not None and not optimizers.is_element_wise(optimizer):
        raise EngineError(f"{_asked(assembly)}: {not_element_wise(optimizer)}")


def _own(assembly: Assembly) -> str | None:
    """What each client of a learner has for itself; None if nothing."""
    learner = assembly.learner
    if assembly.holdings.private:
        return f"each keeps {next(iter(assembly.holdings.private))!r} to itself"
    if composes_its_batches(learner):
        return "it composes its own batches"
    if follows_its_steps(learner):
        return "it does more before or after a step"
    return "it has parameter groups" if learner.groups(assembly.model) else None


def _changed_buffer(assembly: Assembly, few: Examples) -> str | None:
    """Whether training changes a buffer of the model; they are put back."""
    model = assembly.model
    assembly.holdings.load(model, assembly.initial)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    _loss_alone(assembly, few)
    changed = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])]
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    if not changed:
        return None
    return f"training changes the model's buffer {changed[0]!r}, as BatchNorm does, and clients that share a model have none of their own"


def _difference(assembly: Assembly, few: Examples) -> str | None:
    """Whether ``torch.vmap`` meets what it cannot map over clients, or gives a client another loss than it has alone."""
    learner, alone = type(assembly.learner).__name__, _loss_alone(assembly, few)
    uneven = len(few) > 1 and len(set(assembly.data.train.sizes)) > 1
    for other in [few, few[1:]][: 1 + uneven]:
        try:
            losses = _losses_together(assembly, [few, other])
        except EngineError:
            raise
        except Exception as error:
            return f"torch.vmap cannot map the training step of learner {learner} over clients ({_sentence(error)})"
        if not np.allclose(losses, alone, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
            return f"a client of learner {learner} has the loss {alone:.6g} alone, and {losses} among others"
    return None


def _loss_alone(assembly: Assembly, few: Examples) -> float:
    rng = generator(0, "trial")
    with global_generators(rng):
        silo = Silo(assembly.learner, assembly.model, assembly.initial, few, None, rng, holdings=assembly.holdings)
        return silo.gradient(silo.batches(TRIED, shuffle=False))[0]


def _losses_together(assembly: Assembly, parts: list[Examples]) -> list[float]:
    """The first client's loss, in the two ways in which strategies have it computed."""
    rngs = [generator(0, "trial") for _ in parts]
    with ExitStack() as lent:
        for rng in rngs:
            lent.enter_context(global_generators(rng))
        cohort = Cohort(assembly.learner, assembly.model, assembly.initial, Silos.of(parts), range(len(parts)), rngs)
        whole, _ = cohort.gradient(cohort.batches(TRIED, shuffle=False))
        along = cohort.descend(cohort.batches(TRIED, shuffle=False), {"name": "SGD", "lr": 0.0})
    return [whole[0].item(), along[0].item()]


def _asked(assembly: Assembly) -> str:
    return f"engine.batch_clients = {assembly.experiment.batch_clients}"


def _sentence(error: Exception) -> str:
    """The first sentence of one of torch's long messages."""
    text = " ".join(str(error).split())
    return text.split(". ", 1)[0][:200]
