"""The same jobs as a user of Flower writes them: its Message API over its own Ray simulation, at its best setting."""

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.speed.jobs import Job
from benchmarks.speed.plain import Trainer, Weights


class TimedFedAvg(FedAvg):
    """Flower's FedAvg, which is told who trains in a round, and tells when each round has ended.

    Flower numbers its nodes at random. So each message says which client's data to train on, and the nodes that are drawn by
    Flower's own sampling act as the clients that ours drew.

    Args:
        job: what is trained.
        cohorts: the clients of each round.
        on_round: told the number of each round as it ends.
    """

    def __init__(self, job: Job, cohorts: list[list[int]], on_round: Callable[[int], None]) -> None:
        share = job.cohort / job.clients
        super().__init__(fraction_train=share, fraction_evaluate=0.0, min_train_nodes=job.cohort, min_available_nodes=job.clients)
        self.cohorts, self.on_round = cohorts, on_round

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Flower's messages, each with the client whose data to use."""
        if server_round == 1:
            self.on_round(0)
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for message, client in zip(messages, self.cohorts[server_round - 1], strict=True):
            message.content = RecordDict({"arrays": arrays, "config": ConfigRecord({"client": client})})
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Flower's mean."""
        result = super().aggregate_train(server_round, replies)
        self.on_round(server_round)
        return result


def simulate(job: Job, rounds: int, on_round: Callable[[int], None], threads: int | None = None) -> Weights:
    """Flower's Ray simulation with one client a core at a time; the final weights.

    Args:
        job: what is computed; a job of gradients is written as one full local step, which is the same mathematics.
        rounds: how many.
        on_round: told the number of each round as it ends, 0 when the first begins.
        threads: of each client; None leaves Flower's default.
    """
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    from flwr.simulation import run_simulation

    server, client, final = ServerApp(), client_app(job, threads), Weights()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = TimedFedAvg(job, job.cohorts(rounds), on_round)
        result = strategy.start(grid, ArrayRecord(job.build().state_dict()), num_rounds=rounds)
        final.update(result.arrays.to_torch_state_dict())

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, job.clients, backend_config=resources)  # type: ignore[arg-type]
    return final


def client_app(job: Job, threads: int | None) -> ClientApp:
    """A client that trains on the data of the client that the message names."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if threads is not None:
            torch.set_num_threads(threads)
        client = int(message.content["config"]["client"])  # type: ignore[arg-type, index, call-overload]
        weights = message.content["arrays"].to_torch_state_dict()  # type: ignore[union-attr]
        trained = trainer(job).fit(client, weights)
        metrics = MetricRecord({"num-examples": job.examples})
        return Message(RecordDict({"arrays": ArrayRecord(trained), "metrics": metrics}), reply_to=message)

    return app


@lru_cache(maxsize=1)
def trainer(job: Job) -> Trainer:
    """The process's model and data, made once."""
    local = replace(job, batch=job.batch or job.examples)  # the server's step along the mean gradient, taken by each client
    return Trainer(local, local.data.train.examples.image, local.data.train.examples.label)
