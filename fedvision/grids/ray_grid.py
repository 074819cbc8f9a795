"""The Ray grid: clients answer in worker processes, on this machine or on those of a Ray cluster.

A worker is a Ray actor that lives as long as the run and keeps learner, model and data warm. Nothing that matters is kept
there: what clients remember between rounds stays with the grid, so a worker that dies is replaced and its clients answer
again, with the same result. Tensors travel through Ray's shared memory: a round's content is written there once, and
neither side copies what it reads. As in one process, nobody writes to what was sent: others read the same memory.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from flwr.app import ArrayRecord, Error, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedvision.arrays import pack, unpack
from fedvision.assembly import Assembly, at_hand, install
from fedvision.data import FederatedData
from fedvision.errors import EngineError
from fedvision.experiment import Experiment
from fedvision.grids import ray_session
from fedvision.grids.local import Answer, Desk, LocalGrid
from fedvision.grids.workplace import check_gpus_seen
from fedvision.registry import engines
from fedvision.settings import Count, NonNegative, Positive

log = logging.getLogger("fedvision")

WORKER_DIED = 8
"""Flower's error code for a client whose process ended before it answered."""

ATTEMPTS = 3
"""How many workers may die over one client before it is given up for the round."""

TASKS_AHEAD = 3
"""How many tasks a worker has on average, done or not, whose answers the server has not read: none waits, memory is bounded."""

TASKS_PER_WORKER = 4
"""Into how many tasks a worker's share of a cohort is cut, if not told otherwise; small ones even out the load."""

MOST_CLIENTS_PER_TASK = 32
"""If not told otherwise; all answers of a task lie in shared memory together."""

PATIENCE = 120
"""Seconds for the workers to start."""

CAUSES = {
    "low on memory": "the machine ran out of memory",
    "exits with a connection error": "its process was killed, or crashed",
    "exit code": "its process ended by itself",
}
"""What Ray says of a worker's death, in short."""


class Letter(NamedTuple):
    """A message to one client without its content, and what that client kept."""

    metadata: Metadata
    state: RecordDict | None


class Worker:
    """What runs in a worker process.

    Args:
        desk: where this process's clients answer.
        parts: the experiment and its data, unless the client app brings its own.
        threads: CPU threads to compute with.
    """

    def __init__(self, desk: Desk, parts: tuple[Experiment, FederatedData] | None, threads: int) -> None:
        import ray

        ray_session.share_tensors(ray)
        torch.set_num_threads(threads)
        self._desk = desk.__enter__()
        if parts is not None:
            install(desk.run_id, Assembly.of(*parts))

    def ready(self) -> None:
        """Return once the worker can work."""

    def answer(self, content: RecordDict, letters: Sequence[Letter]) -> list[Answer]:
        """The answers of several clients to messages of the same content."""
        messages = [Message(content, metadata=letter.metadata) for letter in letters]  # type: ignore[call-overload]
        states = {letter.metadata.dst_node_id: letter.state for letter in letters if letter.state is not None}
        return [answer for _, answer in self._desk.answers(messages, states)]


@dataclass(eq=False)
class Task:
    """Messages of the same content on their way through one worker.

    Attributes:
        content: a reference to it in shared memory.
        messages: in partition-id order.
        worker: who has it.
        answers: a reference to the answers to come.
        deaths: how many workers died over it.
    """

    content: Any
    messages: Sequence[Message]
    worker: Any = None
    answers: Any = None
    deaths: int = 0


@engines("ray")
class RayGrid(LocalGrid):
    """Clients in Ray actors, on all cores of this machine or of a cluster; answers in partition-id order.

    Attributes:
        workers: how many actors; if not given, one for every ``cpus_per_worker`` of this machine or of the cluster.
        cpus_per_worker: CPUs that Ray sets aside for each; a cluster places workers by it.
        gpus_per_worker: likewise; 0.25 lets four workers share a GPU.
        clients_per_task: clients that a worker answers for in one go; if not given, a quarter of its share of a cohort,
            and ``batch_clients`` at least.
        address: of a running Ray cluster, such as ``auto`` or ``ray://head:10001``; if not given, a Ray of our own.
        device: where clients compute: ``cpu`` or ``cuda``.
        batch_clients: how many clients of a task train in one go.
    """

    def __init__(
        self,
        client_app: ClientApp,
        run_config: Mapping[str, Any],
        clients: int,
        *,
        workers: Count | None = None,
        cpus_per_worker: Positive = 1.0,
        gpus_per_worker: NonNegative = 0.0,
        clients_per_task: Count | None = None,
        address: str | None = None,
        device: str = "cpu",
        batch_clients: Count = 1,
    ) -> None:
        super().__init__(client_app, run_config, clients, batch_clients)
        check_gpus_seen(device, gpus_per_worker)
        self._wanted, self._clients_per_task, self._address, self._device = workers, clients_per_task, address, device
        self._each = {"num_cpus": cpus_per_worker, "num_gpus": gpus_per_worker}
        self._pool: list[Any] = []

    def __enter__(self) -> Self:
        super().__enter__()
        with ExitStack() as stack:
            stack.push(super().__exit__)
            self._ray = stack.enter_context(ray_session.session(self._address, (self._wanted or 1) * self._each["num_cpus"]))
            ray_session.share_tensors(self._ray)
            self._equip()
            self._pool = self._staff()
            stack.callback(self._dismiss)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    # ---- answers -------------------------------------------------------------------------------------------------

    def _work(self, messages: Sequence[Message]) -> Iterator[tuple[Message, Answer]]:
        waiting, flying = deque(self._tasks(messages)), deque[Task]()
        while waiting or flying:
            while waiting and len(flying) < TASKS_AHEAD * len(self._pool):
                flying.append(self._assigned(waiting.popleft(), flying))
            task = flying.popleft()
            try:
                answers = self._ray.get(task.answers)
            except self._ray.exceptions.RayError as death:
                self._replace(task.worker, death)
                task.deaths += 1
                if task.deaths == 1:
                    flying.appendleft(self._assigned(task, flying))
                    continue
                answers = self._one_by_one(task, flying)
            for message, answer in zip(task.messages, answers, strict=True):
                yield message, self._received(answer)
            del answers, answer  # or they would stay in shared memory while the next are awaited

    def _tasks(self, messages: Sequence[Message]) -> Iterator[Task]:
        """Neighbors with the same content, a few at a time."""
        share = min(-(-len(messages) // (TASKS_PER_WORKER * len(self._pool))), MOST_CLIENTS_PER_TASK)
        size = self._clients_per_task or max(share, self._desk.batch_clients)
        for _, alike in groupby(messages, key=lambda message: id(message.content)):
            group = list(alike)
            content = self._ray.put(group[0].content)
            yield from (Task(content, group[start : start + size]) for start in range(0, len(group), size))

    def _assigned(self, task: Task, flying: Collection[Task]) -> Task:
        """The task, given to the worker that has least to do."""
        unread = [other.answers for other in flying]
        unfinished = self._ray.wait(unread, num_returns=len(unread), timeout=0)[1] if unread else []
        busy = Counter(other.worker for other in flying if other.answers in unfinished)
        task.worker = min(self._pool, key=lambda worker: busy[worker])
        task.answers = self._ask(task.worker, task.content, task.messages)
        return task

    def _ask(self, worker: Any, content: Any, messages: Sequence[Message]) -> Any:
        letters = [Letter(message.metadata, self._states.get(message.metadata.dst_node_id)) for message in messages]
        return worker.answer.remote(content, letters)

    def _one_by_one(self, task: Task, flying: Collection[Task]) -> Iterator[Answer]:
        """Each client of a task on a worker that does nothing else, so that the one over which workers die is known."""
        worker = self._pool.pop()
        others = [other.answers for other in flying if other.worker is worker]
        if others:
            self._ray.wait(others, num_returns=len(others))
        for message in task.messages:
            deaths: list[Exception] = []
            while len(deaths) < ATTEMPTS:
                try:
                    [answer] = self._ray.get(self._ask(worker, task.content, [message]))
                    break
                except self._ray.exceptions.RayError as death:
                    deaths.append(death)
                    worker = self._hire()
            else:
                reason = f"{ATTEMPTS} worker processes died over this client, at last because: {_cause(deaths[-1])}"
                answer = Answer(Error(WORKER_DIED, reason), None)
            yield answer
        self._pool.append(worker)

    def _received(self, answer: Answer) -> Answer:
        """The answer on the server's device; what the client keeps, in memory of its own."""
        state = None if answer.state is None else _converted(answer.state, torch.clone)
        if self._device == "cpu" or isinstance(answer.result, Error):
            return Answer(answer.result, state)
        return Answer(_converted(answer.result, lambda tensor: tensor.to(self._device)), state)

    # ---- workers -------------------------------------------------------------------------------------------------

    def _equip(self) -> None:
        """Put what workers start with into shared memory."""
        assembly = at_hand(self._desk.run_id)
        parts = None if assembly is None else (assembly.experiment, assembly.data.to(torch.device("cpu")))
        threads = 1 if assembly is None else assembly.experiment.threads
        self._equipment = [self._ray.put(self._desk), self._ray.put(parts), threads]
        self._class = self._ray.remote(Worker)

    def _staff(self) -> list[Any]:
        """The workers asked for, or as many as there is room for, ready to work."""
        total = self._ray.cluster_resources()
        room = [total.get(kind, 0) // self._each[key] for kind, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")) if self._each[key]]
        number = self._wanted or int(min(room))
        if not 0 < number <= min(room):
            need = f"{number or 1} worker(s) of {self._each['num_cpus']:g} CPUs and {self._each['num_gpus']:g} GPUs"
            has = f"{total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs"
            raise EngineError(f"engine: {need} do not fit into Ray's {has}; ask for fewer workers, or less for each")
        workers = [self._hire() for _ in range(number)]
        try:
            self._ray.get([worker.ready.remote() for worker in workers], timeout=PATIENCE)
        except self._ray.exceptions.RayError as error:
            raise EngineError(f"engine: Ray's workers do not start: {_cause(error)}") from error
        return workers

    def _hire(self) -> Any:
        return self._class.options(**self._each).remote(*self._equipment)

    def _replace(self, worker: Any, death: Exception) -> None:
        if worker in self._pool:
            log.warning("a worker died (%s); another takes its place", _cause(death))
            self._pool[self._pool.index(worker)] = self._hire()
            self._ray.kill(worker)

    def _dismiss(self) -> None:
        for worker in self._pool:
            self._ray.kill(worker)
        self._pool = []


def _converted(content: RecordDict, convert: Callable[[Tensor], Tensor]) -> RecordDict:
    """The content with every tensor converted."""
    records = {
        name: pack({key: convert(tensor) for key, tensor in unpack(record).items()}) if isinstance(record, ArrayRecord) else record
        for name, record in content.items()
    }
    return RecordDict(records)


def _cause(error: Exception) -> str:
    """What one of Ray's long messages comes to."""
    text = " ".join(str(error).split())
    for sign, cause in CAUSES.items():
        if sign in text:
            return cause
    return text[-200:] or type(error).__name__
