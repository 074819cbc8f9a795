"""A federation of a few lines, for tests that compare a strategy's rounds with a naive loop."""

from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message
from torch import nn

from fedvision.arrays import pack, unpack
from fedvision.data import Examples
from fedvision.grids.in_process import InProcessGrid
from fedvision.learners.learner import Learner
from fedvision.silo import Silo
from strategies.strategy import Strategy, reply


class Federation:
    """A strategy's rounds over clients in this process, without an experiment around them.

    Attributes:
        arrays: the global model.
        messages: what clients were sent in the latest round, and what they answered.
    """

    def __init__(self, strategy: Strategy, learner: Learner, model: nn.Module, parts: list[Examples]) -> None:
        self.strategy, self.learner, self.model, self.parts = strategy, learner, model, parts
        self.arrays = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.messages: list[tuple[Message, Message]] = []
        self.grid = InProcessGrid(self._client, {}, len(parts))

    def round(self, number: int, failures: int = 0) -> dict[str, Any]:
        """Train one round, in which so many clients fail; its metrics."""
        self.messages = []
        with self.grid:
            messages = self.strategy.configure_train(number, pack(self.arrays), ConfigRecord(), self.grid)
            arrays, metrics = self.strategy.aggregate_train(number, self.grid.send_and_receive(messages))
        assert len(self.strategy.failures) == failures, self.strategy.failures
        self.arrays = {name: tensor.clone() for name, tensor in unpack(arrays).items()}
        return dict(metrics)

    def answers(self, kind: str = "train") -> list[dict[str, dict[str, torch.Tensor]]]:
        """The array records of the latest round's answers to messages of one kind, in the order of the clients."""
        contents = [answer.content for message, answer in self.messages if message.metadata.message_type == kind]
        return [{name: unpack(record) for name, record in content.array_records.items()} for content in contents]

    def _client(self, message: Message, context: Context) -> Message:
        train = self.parts[context.node_id]
        silo = Silo(self.learner, self.model, unpack(message.content.array_records["arrays"]), train, context.state)
        half = self.strategy.client_update if message.metadata.message_type == "train" else self.strategy.client_statistics
        answer = reply(message, half(silo, message.content), len(train))
        self.messages.append((message, answer))
        return answer


@pytest.fixture
def federate() -> type[Federation]:
    """``federate(strategy, learner, model, parts).round(1)``."""
    return Federation
