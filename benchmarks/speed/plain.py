"""The yardstick: what a competent person writes in plain PyTorch, without a framework, in one process or several."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch
import torch.multiprocessing
from torch import Tensor, nn

from benchmarks.speed.jobs import Job

Weights = dict[str, Tensor]


class Trainer:
    """One model and one optimizer, used for one client after the other.

    Args:
        job: what is trained.
        images: all clients' inputs, client by client.
        labels: likewise.
    """

    def __init__(self, job: Job, images: Tensor, labels: Tensor) -> None:
        self.job, self.images, self.labels = job, images, labels
        self.model = job.build()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=job.rate)

    def fit(self, client: int, weights: Weights) -> Weights:
        """The client's model after its local steps from ``weights``; or, in a job without local steps, its gradient."""
        self.model.load_state_dict(weights)
        start, stop = client * self.job.examples, (client + 1) * self.job.examples
        for first in range(start, stop, self.job.batch or self.job.examples):
            batch = slice(first, min(first + (self.job.batch or self.job.examples), stop))
            self.optimizer.zero_grad()
            self.job.loss(self.model(self.images[batch]), self.labels[batch]).backward()
            if self.job.batch is not None:
                self.optimizer.step()
        return self.model.state_dict() if self.job.batch is not None else _gradient(self.model)

    def add_all(self, clients: Iterable[int], weights: Weights, total: Weights, share: float) -> None:
        """Add ``share`` of each client's answer to ``total``, in place."""
        for client in clients:
            for name, tensor in self.fit(client, weights).items():
                total[name].add_(tensor, alpha=share)


def one_process(job: Job, rounds: int, on_round: Callable[[int], None]) -> Weights:
    """One client after the other, one thread; the final weights."""
    torch.set_num_threads(1)
    trainer = Trainer(job, job.data.train.examples.image, job.data.train.examples.label)
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    cohorts = job.cohorts(rounds)
    on_round(0)
    for number, clients in enumerate(cohorts, 1):
        mean = _zeros(weights)
        trainer.add_all(clients, weights, mean, 1 / len(clients))
        _move(job, weights, mean)
        on_round(number)
    return weights


def several_processes(job: Job, rounds: int, on_round: Callable[[int], None], workers: int) -> Weights:
    """The clients of a round split between ``workers`` processes that share weights, sums and data; the final weights."""
    torch.set_num_threads(1)
    weights = {name: tensor.clone().share_memory_() for name, tensor in job.build().state_dict().items()}
    cohorts, crew = job.cohorts(rounds), [Worker.start(job, weights) for _ in range(workers)]
    try:
        for worker in crew:
            worker.pipe.recv()
        on_round(0)
        for number, clients in enumerate(cohorts, 1):
            for i, worker in enumerate(crew):
                worker.pipe.send((clients[i::workers], 1 / len(clients)))
            for worker in crew:
                worker.pipe.recv()
            _move(job, weights, {name: torch.stack([worker.total[name] for worker in crew]).sum(0) for name in weights})
            on_round(number)
    finally:
        for worker in crew:
            worker.stop()
    return weights


@dataclass(frozen=True)
class Worker:
    """A process that trains some of each round's clients.

    Attributes:
        process: the process.
        pipe: takes (clients, share of each) and answers when the total is there; None ends the process.
        total: the sum over the clients, in shared memory.
    """

    process: BaseProcess
    pipe: Connection
    total: Weights

    @classmethod
    def start(cls, job: Job, weights: Weights) -> "Worker":
        """A new process for ``job``, which sees ``weights`` in shared memory."""
        context = torch.multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        total = {name: torch.zeros_like(tensor).share_memory_() for name, tensor in weights.items()}
        examples = job.data.train.examples
        data = (examples.image.share_memory_(), examples.label.share_memory_())
        process = context.Process(target=work, args=(replace(job), data, weights, total, there), daemon=True)  # without its data
        process.start()
        there.close()  # so that waiting for a worker that died is an error
        return cls(process, here, total)

    def stop(self) -> None:
        """End the process."""
        if self.process.is_alive():
            self.pipe.send(None)
        self.process.join()


def work(job: Job, data: tuple[Tensor, Tensor], weights: Weights, total: Weights, pipe: Connection) -> None:
    """What a worker's process does."""
    torch.set_num_threads(1)
    trainer = Trainer(job, *data)
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        clients: Sequence[int] = task[0]
        for tensor in total.values():
            tensor.zero_()
        trainer.add_all(clients, weights, total, task[1])
        pipe.send("done")


def _move(job: Job, weights: Weights, mean: Weights) -> None:
    """The next global weights, in place: the mean of the models, or one step along the mean of the gradients."""
    for name, tensor in weights.items():
        if job.batch is not None:
            tensor.copy_(mean[name])
        else:
            tensor.add_(mean[name], alpha=-job.rate)


def _gradient(model: nn.Module) -> Weights:
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def _zeros(weights: Weights) -> Weights:
    return {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
