"""The ClientApp: used unchanged by every engine."""

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.silo import Silo
from fedvision.arrays import array_records, config_of, unpack
from fedvision.assembly import Assembly, assembly_of
from fedvision.data import Examples
from fedvision.evaluation import evaluate, evaluate_by_environment, load
from fedvision.grids.roster import present
from fedvision.metrics import prefixed
from fedvision.seeds import generator, global_generators
from strategies.strategy import Update, reply

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """A round's training: the strategy's client half on this client's examples."""
    return _work(message, context, "fit", lambda assembly: assembly.strategy.client_update)


@app.query("statistics")
def statistics(message: Message, context: Context) -> Message:
    """What a strategy asks before training."""
    return _work(message, context, "statistics", lambda assembly: assembly.strategy.client_statistics)


@app.query("roster")
def roster(message: Message, context: Context) -> Message:
    """Which partition this node holds; asked before there is an assembly."""
    return present(message, context)


@app.evaluate()
def evaluation(message: Message, context: Context) -> Message:
    """The global model on this client's own examples, of the parts that the server asks for."""
    assembly, client = _this(context)
    load(assembly.model, unpack(array_records(message.content)["arrays"]))
    metrics: dict[str, Any] = {"num-examples": 0}
    for part, examples in _parts(assembly, client, config_of(message.content)).items():
        measure = evaluate_by_environment if part == "validation" else evaluate
        metrics |= prefixed(part, measure(assembly.learner, assembly.model, examples))
        metrics["num-examples"] += len(examples)
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


def _work(message: Message, context: Context, purpose: str, half: Callable[[Assembly], Callable[[Silo, RecordDict], Update]]) -> Message:
    assembly, client = _this(context)
    config = config_of(message.content)
    rng = generator(assembly.experiment.seed, purpose, int(config["server-round"]), client)
    with global_generators(rng):
        silo = Silo(
            assembly.learner,
            assembly.model,
            unpack(array_records(message.content)["arrays"]),
            assembly.data.train[client],
            context.state,
            rng,
            float(config.get("progress", 0.0)),
        )
        update = half(assembly)(silo, message.content)
    metrics = {**prefixed("train", silo.loss_parts()), **update.metrics}
    return reply(message, Update(update.records, metrics), len(silo.train))


def _this(context: Context) -> tuple[Assembly, int]:
    return assembly_of(context.run_id, context.run_config), int(context.node_config["partition-id"])


def _parts(assembly: Assembly, client: int, config: Mapping[str, Any]) -> dict[str, Examples]:
    asked = str(config.get("parts", "validation")).split()
    held = {"train": assembly.data.train[client]}
    if assembly.data.validation is not None:
        held["validation"] = assembly.data.validation[client]
    return {part: held[part] for part in asked if part in held and len(held[part])}
