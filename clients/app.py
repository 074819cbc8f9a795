"""The ClientApp: used unchanged by every engine."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from flwr import clientapp
from flwr.app import Context, Message, MetricRecord, RecordDict

from clients.batching import require_batchable
from clients.cohort import Cohort
from clients.memory import recalled
from fedvision.arrays import Named, array_records, config_of, unpack
from fedvision.assembly import Assembly, assembly_of
from fedvision.data import Examples
from fedvision.errors import AggregationError, EngineError, ExperimentError, RunError
from fedvision.evaluation import evaluate_by_environment, measured
from fedvision.grids.roster import present
from fedvision.metrics import prefixed
from fedvision.own_data import SILO, OwnData
from fedvision.privacy import EPSILON
from fedvision.private_silo import PrivateSilo
from fedvision.seeds import generator, global_generators
from fedvision.silo import Silo
from strategies.strategy import Silo as AnySilo
from strategies.strategy import Update, reply

SAFE_TO_TELL = (AggregationError, EngineError, ExperimentError, RunError)
"""Errors that name settings, sizes and what the server sent; those of data name files, those of libraries anything."""


class ClientApp(clientapp.ClientApp):
    """Flower's, which can also train several clients in one go; see ``fedvision.grids.local.AnswersTogether``."""

    def answer_together(self, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        """Several clients' answers to training messages of the same content, as one computation.

        Raises:
            EngineError: the strategy, the learner or the model does not allow it.
        """
        assembly, content = _this(contexts[0])[0], messages[0].content
        require_batchable(assembly)
        clients = [_this(context)[1] for context in contexts]
        config, train = config_of(content), assembly.data.train
        rngs = [_generator(assembly, "fit", config, client) for client in clients]
        with ExitStack() as lent:
            for rng in rngs:  # which moves each as it does where a client answers alone
                lent.enter_context(global_generators(rng))
            arrays = unpack(array_records(content)["arrays"])
            cohort = Cohort(assembly.learner, assembly.model, arrays, train, clients, rngs, float(config.get("progress", 0.0)))
            update = assembly.strategy.client_update(cast(AnySilo, cohort), content)
        updates = _with_parts(update, cohort.loss_parts()).parted(len(cohort))
        each = zip(messages, updates, clients, cohort.work, strict=True)
        return [reply(message, update, len(train[client]), work) for message, update, client, work in each]


app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """A round's training: the strategy's client half on this client's examples."""
    with discreet(context):
        return _work(message, context, "fit", lambda assembly: assembly.strategy.client_update)


@app.query("statistics")
def statistics(message: Message, context: Context) -> Message:
    """What a strategy asks before training."""
    with discreet(context):
        return _work(message, context, "statistics", lambda assembly: assembly.strategy.client_statistics)


@app.query("roster")
def roster(message: Message, context: Context) -> Message:
    """Which partition this node holds; asked before there is an assembly."""
    return present(message, context)


@app.evaluate()
def evaluation(message: Message, context: Context) -> Message:
    """The global model on this client's own examples, of the parts that the server asks for."""
    with discreet(context):
        assembly, client = _this(context)
        config = config_of(message.content)
        with recalled(assembly, context, config, "evaluate"):
            assembly.holdings.load(assembly.model, _arrays(assembly, message, context), context.state)
        metrics: dict[str, Any] = {"num-examples": 0}
        for part, examples in _parts(assembly, client, config).items():
            held = assembly.learner, assembly.model, examples
            found = evaluate_by_environment(*held) if part == "validation" else measured(*held).result()
            metrics |= prefixed(part, found)
            metrics["num-examples"] += len(examples)
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


@contextmanager
def discreet(context: Context) -> Iterator[None]:
    """Keep errors that may name what is in a silo's own data in its log; the server learns of which kind they are.

    Raises:
        RunError: in place of another error.
    """
    try:
        yield
    except Exception as error:
        if SILO not in context.node_config or isinstance(error, SAFE_TO_TELL):
            raise
        raise RunError(f"{type(error).__name__}; what it says may tell of the silo's data, and is in the silo's log only") from error


def _work(message: Message, context: Context, phase: str, half: Callable[[Assembly], Callable[[Silo, RecordDict], Update]]) -> Message:
    assembly, client = _this(context)
    config = config_of(message.content)
    rng = _generator(assembly, phase, config, client)
    with recalled(assembly, context, config, phase), global_generators(rng):
        silo = _silo(assembly)(
            assembly.learner,
            assembly.model,
            _arrays(assembly, message, context),
            assembly.data.train[client],
            context.state,
            rng,
            float(config.get("progress", 0.0)),
            float(config.get("span", 0.0)),
            assembly.holdings,
        )
        update = half(assembly)(silo, message.content)
        silo.keep()
    if assembly.experiment.privacy is None:
        update = _with_parts(update, silo.loss_parts())
    else:  # no number that nothing protects
        update = replace(update, metrics={EPSILON: silo.epsilon} if isinstance(silo, PrivateSilo) else {})
    return reply(message, update, len(silo.train), silo.work)


def _silo(assembly: Assembly) -> Callable[..., Silo]:
    """What a client works in."""
    privacy = assembly.experiment.privacy
    if privacy is None or privacy.unit == "client":
        return Silo
    return partial(PrivateSilo, privacy=privacy, rounds=assembly.experiment.rounds)


def _generator(assembly: Assembly, purpose: str, config: Mapping[str, Any], client: int) -> torch.Generator:
    return generator(assembly.experiment.seed, purpose, int(config["server-round"]), client)


def _with_parts(update: Update, parts: Mapping[str, Any]) -> Update:
    return replace(update, metrics={**prefixed("train", parts), **update.metrics})


def _this(context: Context) -> tuple[Assembly, int]:
    client, file = int(context.node_config["partition-id"]), context.node_config.get(SILO)
    if file is None:
        return assembly_of(context.run_id, context.run_config), client
    own = OwnData.load(str(file))
    return assembly_of(context.run_id, context.run_config, lambda experiment: own.dealt(experiment, client)), client


def _arrays(assembly: Assembly, message: Message, context: Context) -> Named:
    """The global model's arrays; a silo with data of its own may have built another model."""
    arrays = unpack(array_records(message.content)["arrays"])
    if SILO in context.node_config:
        shape, classes = assembly.data.spec.image_shape, assembly.data.classes
        assembly.check_fits(arrays, f"this silo's data has the shape {shape} and {classes} classes: mend its silo.toml")
    return arrays


def _parts(assembly: Assembly, client: int, config: Mapping[str, Any]) -> dict[str, Examples]:
    asked = str(config.get("parts", "validation")).split()
    held = {"train": assembly.data.train[client]}
    if assembly.data.validation is not None:
        held["validation"] = assembly.data.validation[client]
    return {part: held[part] for part in asked if part in held and len(held[part])}
