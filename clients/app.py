"""The ClientApp: used unchanged by every engine."""

from collections.abc import Callable
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.silo import Silo
from fedvision.arrays import unpack
from fedvision.assembly import Assembly, assembly_of
from fedvision.data import Examples
from fedvision.evaluation import evaluate, evaluate_by_environment, load
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


@app.evaluate()
def evaluation(message: Message, context: Context) -> Message:
    """The global model on this client's own examples, of the parts that the server asks for."""
    assembly, client = _this(context)
    load(assembly.model, unpack(message.content.array_records["arrays"]))
    metrics: dict[str, Any] = {"num-examples": 0}
    for part, examples in _parts(assembly, client, message.content.config_records["config"]).items():
        measure = evaluate_by_environment if part == "validation" else evaluate
        metrics |= prefixed(part, measure(assembly.learner, assembly.model, examples))
        metrics["num-examples"] += len(examples)
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


def _work(message: Message, context: Context, purpose: str, half: Callable[[Assembly], Callable[[Silo, RecordDict], Update]]) -> Message:
    assembly, client = _this(context)
    config = message.content.config_records["config"]
    rng = generator(assembly.experiment.seed, purpose, int(config["server-round"]), client)  # type: ignore[arg-type]
    with global_generators(rng):
        silo = Silo(
            assembly.learner,
            assembly.model,
            unpack(message.content.array_records["arrays"]),
            assembly.data.train[client],
            context.state,
            rng,
            float(config.get("progress", 0.0)),  # type: ignore[arg-type]
        )
        update = half(assembly)(silo, message.content)
    return reply(message, update, len(silo.train))


def _this(context: Context) -> tuple[Assembly, int]:
    return assembly_of(context.run_id, context.run_config), int(context.node_config["partition-id"])


def _parts(assembly: Assembly, client: int, config: ConfigRecord) -> dict[str, Examples]:
    asked = str(config.get("parts", "validation")).split()
    held = {"train": assembly.data.train[client]}
    if assembly.data.validation is not None:
        held["validation"] = assembly.data.validation[client]
    return {part: held[part] for part in asked if part in held and len(held[part])}
