"""The ClientApp: the strategy's client half does the training, everything around it is plain Flower."""

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits_app.task import DigitReader, examples_of, new_model
from fedvision.arrays import unpack
from fedvision.evaluation import evaluate as measure
from fedvision.holdings import Holdings
from fedvision.silo import Silo
from strategies.geometric import Geometric
from strategies.strategy import reply

app = ClientApp()
learner, model, strategy = DigitReader(), new_model(), Geometric()
holdings = Holdings.of(learner, model)  # what travels, and what stays in each silo


@app.train()
def train(message: Message, context: Context) -> Message:
    examples, _ = examples_of(context.node_config["partition-id"], context.node_config["num-partitions"])
    silo = Silo(learner, model, unpack(message.content["arrays"]), examples, context.state, holdings=holdings)
    update = strategy.client_update(silo, message.content)
    silo.keep()
    return reply(message, update, len(examples))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    _, examples = examples_of(context.node_config["partition-id"], context.node_config["num-partitions"])
    holdings.load(model, unpack(message.content["arrays"]), context.state)
    metrics = MetricRecord({"num-examples": len(examples), **measure(learner, model, examples)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
