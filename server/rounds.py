"""The rounds of a run: train, evaluate, record, checkpoint."""

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.serverapp import Grid

from fedvision.arrays import Named, config_of, pack, unpack
from fedvision.assembly import Assembly
from fedvision.errors import RunError, TooFewAnswersError
from fedvision.evaluation import evaluate
from fedvision.metrics import prefixed, spread
from fedvision.privacy import EPSILON, RECORD, Ledger
from fedvision.seeds import generator, global_generators
from fedvision.silo import Silo
from fedvision.trees import save_tensors
from server.checkpoint import Checkpoint
from server.clock import ClockedGrid
from server.folder import RunFolder
from server.meter import MeteredGrid
from server.record import RunRecord, read_rows

Row = dict[str, Any]

ANOTHER = "another experiment, data or initial weights"

HEARD = "heard"
"""The record of what the server keeps that says of which round each client's latest counted answer was."""

ENVIRONMENT_ACCURACY = re.compile(r"validation_environment\d+_accuracy")


@dataclass(frozen=True)
class Session:
    """One run at the server.

    Attributes:
        assembly: the experiment and its parts.
        folder: where the run is recorded.
        identity: of experiment, data and initial weights; a checkpoint of another identity is refused.
        initial: weights to start from; the model's own initialization if None.
        resume: whether to go on from the folder's checkpoint, if there is one.
        on_round: told each row as it is recorded, also those of before a resumed run.
        own: what the server keeps from round to round for training on its own examples, as a silo does.
    """

    assembly: Assembly
    folder: RunFolder
    identity: str
    initial: Named | None = None
    resume: bool = False
    on_round: Callable[[Row], None] = lambda row: None
    own: RecordDict = field(default_factory=RecordDict, init=False)

    def run(self, grid: Grid) -> None:
        """Run all rounds that are left and write the final model."""
        done, arrays = self._start(grid)
        rounds = self.assembly.experiment.rounds
        record = RunRecord(self.folder, done, self.assembly.experiment.tensorboard)
        for row in read_rows(self.folder.rounds):
            self.on_round(row)
        try:
            metered, clock = self._watched(grid)
            if done < 0:
                self._keep(record, self._initial_row(arrays, metered), arrays, grid)
            for number in range(max(done, 0) + 1, rounds + 1):
                row, arrays = self._round(number, arrays, metered, clock)
                self._keep(record, row, arrays, grid)
        finally:
            record.close()
        save_tensors(self.folder.model, self.assembly.holdings.exported(unpack(arrays)))

    def _start(self, grid: Grid) -> tuple[int, ArrayRecord]:
        """The last finished round (-1: none, not even round 0's evaluation) and the model after it."""
        if self.resume and self.folder.checkpoint.exists():
            checkpoint = Checkpoint.load(self.folder.checkpoint)
            if checkpoint.identity != self.identity:
                raise RunError(f"{self.folder.path} holds a run of {ANOTHER}; choose another folder with --out")
            self.assembly.strategy.load_state(checkpoint.strategy)
            if checkpoint.round > 0 and self.assembly.remembering and checkpoint.clients is None and not getattr(grid, "keeps", False):
                lost = f"what the clients of {self.folder.path} kept from round to round was lost with Flower's run"
                raise RunError(f"{lost}; start again in another folder, and give each silo a folder of its own: state = in its node-config")
            self.own.update(checkpoint.server)
            self._tell_heard()
            if checkpoint.clients:
                grid.load_client_states(checkpoint.clients)  # type: ignore[attr-defined]
            return checkpoint.round, pack(self._on_device(checkpoint.arrays))
        return -1, pack(self._on_device(self._initial_arrays()))

    def _tell_heard(self) -> None:
        """Have the strategy know which answers of clients were counted before the run was resumed."""
        if self.assembly.strategy.heard is not None and HEARD in self.own:
            heard = config_of(self.own, HEARD)
            self.assembly.strategy.heard.update(zip(heard["clients"], heard["rounds"], strict=True))

    def _initial_arrays(self) -> Named:
        own, tied = self.assembly.initial, self.assembly.holdings.tied
        if self.initial is None:
            return own
        needed, given = ({name: tuple(tensor.shape) for name, tensor in arrays.items()} for arrays in (own, self.initial))
        odd = sorted(name for name in needed.keys() | given.keys() - tied.keys() if needed.get(name) != given.get(name))
        if odd:
            fact = f"{odd[0]!r} has shape {given.get(odd[0], 'none')}, the model needs {needed.get(odd[0], 'none of that name')}"
            raise RunError(f"initial weights do not fit the model: {fact}; give weights of this learner")
        return {name: self.initial[name].to(own[name].dtype) for name in own}

    def _watched(self, grid: Grid) -> tuple[MeteredGrid, ClockedGrid | None]:
        """The grid with a meter of its bytes, and with a clock if clients' behavior is simulated."""
        experiment = self.assembly.experiment
        if experiment.behavior is None:
            return MeteredGrid(grid), None
        clock = ClockedGrid(grid, experiment.behavior, experiment.seed)
        return MeteredGrid(clock), clock

    def _round(self, number: int, arrays: ArrayRecord, grid: MeteredGrid, clock: ClockedGrid | None) -> tuple[Row, ArrayRecord]:
        began = time.perf_counter()
        strategy, experiment = self.assembly.strategy, self.assembly.experiment
        grid.reset()
        if clock is not None:
            clock.reset()
        arrays, trained = self._trained(number, arrays, grid, clock)
        arrays, learned = self._learned(number, arrays)
        due = number % experiment.evaluate_every == 0 or number == experiment.rounds
        row = {
            "round": number,
            **trained,
            **learned,
            **self._spent(trained),
            **(self._evaluation(number, arrays, grid, "validation") if due else {}),
            "clients": strategy.answered,
            "failures": len(strategy.failures),
            "failed": [str(failure) for failure in strategy.failures],
            "bytes_up": grid.bytes_up,
            "bytes_down": grid.bytes_down,
        }
        if clock is not None:
            row |= {"simulated_seconds": clock.seconds, "dropped": clock.dropped, "late": clock.late}
        return row | {"seconds": time.perf_counter() - began}, arrays

    def _trained(self, number: int, arrays: ArrayRecord, grid: Grid, clock: ClockedGrid | None) -> tuple[ArrayRecord, dict[str, float]]:
        """The model after a round of training; as before, if too few of the clients are there and in time."""
        strategy, config = self.assembly.strategy, self._config(number)
        try:
            replies = grid.send_and_receive(strategy.configure_train(number, arrays, config, grid))
            following, metrics = strategy.aggregate_train(number, replies)
        except TooFewAnswersError:
            if clock is None or not clock.dropped + clock.late:
                raise
            strategy.answered = 0
            return arrays, {}
        return following, _numbers(metrics)

    def _learned(self, number: int, arrays: ArrayRecord) -> tuple[ArrayRecord, dict[str, float]]:
        """The model after the server has trained on its own labeled examples, if it has any, as a client would."""
        assembly = self.assembly
        if assembly.data.server is None:
            return arrays, {}
        rng, rounds = generator(assembly.experiment.seed, "server", number), assembly.experiment.rounds
        with global_generators(rng):
            silo = Silo(
                assembly.learner,
                assembly.model,
                unpack(arrays),
                assembly.data.server,
                self.own,
                rng,
                (number - 1) / rounds,
                1 / rounds,
                assembly.holdings,
            )
            update = assembly.strategy.trained(silo)
        silo.keep()
        return pack({**unpack(arrays), **update.records["arrays"]}), {"server_loss": float(update.metrics["train_loss"])}

    def _spent(self, trained: Mapping[str, float]) -> Row:
        """What the run has spent of its clients' privacy: by the client that has spent most, or by all rounds so far."""
        privacy, strategy = self.assembly.experiment.privacy, self.assembly.strategy
        if privacy is None:
            return {}
        if privacy.unit == "client":
            ledger = Ledger.of(self.own).spent(strategy.guard.noise_multiplier, strategy.guard.rate, 1)
            self.own[RECORD] = ledger.record()
            return {EPSILON: ledger.epsilon(privacy.delta, privacy.accountant), "delta": privacy.delta}
        before = float(config_of(self.own, RECORD)[EPSILON]) if RECORD in self.own else 0.0
        spent = max(before, trained.get(EPSILON, 0.0))
        self.own[RECORD] = ConfigRecord({EPSILON: spent})
        return {EPSILON: spent, "delta": privacy.delta}

    def _initial_row(self, arrays: ArrayRecord, grid: Grid) -> Row:
        """Round 0: the initial model, on the training examples too of the clients that evaluate."""
        began, strategy = time.perf_counter(), self.assembly.strategy
        row = {"round": 0, **self._evaluation(0, arrays, grid, "train validation")}
        failed = [str(failure) for failure in strategy.failures]
        counts = {"clients": 0, "failures": len(failed), "failed": failed, "bytes_up": 0, "bytes_down": 0}
        privacy = self.assembly.experiment.privacy
        spent = {} if privacy is None else {EPSILON: 0.0, "delta": privacy.delta}
        return row | spent | counts | {"seconds": time.perf_counter() - began}

    def _evaluation(self, number: int, arrays: ArrayRecord, grid: Grid, parts: str) -> dict[str, float]:
        assembly, strategy = self.assembly, self.assembly.strategy
        metrics: dict[str, float] = {}
        if assembly.experiment.privacy is not None:
            parts = "validation" if assembly.experiment.privacy.validation_in_the_clear else ""
        if "train" in parts or ("validation" in parts and assembly.data.validation is not None):
            config = ConfigRecord({"parts": parts})
            replies = grid.send_and_receive(strategy.configure_evaluate(number, arrays, config, grid))
            metrics |= _numbers(strategy.aggregate_evaluate(number, replies))
            by_environment = [value for name, value in metrics.items() if ENVIRONMENT_ACCURACY.fullmatch(name)]
            metrics |= prefixed("environment", spread(by_environment))
        assembly.holdings.load(assembly.model, unpack(arrays))
        return metrics | prefixed("test", evaluate(assembly.learner, assembly.model, assembly.data.test))

    def _keep(self, record: RunRecord, row: Row, arrays: ArrayRecord, grid: Grid) -> None:
        record.append(row)
        experiment = self.assembly.experiment
        if row["round"] % experiment.checkpoint_every == 0 or row["round"] == experiment.rounds:
            held: Mapping[int, RecordDict] | None = getattr(grid, "client_states", lambda: None)()
            state, heard = self.assembly.strategy.state(), self.assembly.strategy.heard
            if heard is not None:
                self.own[HEARD] = ConfigRecord({"clients": list(heard.keys()), "rounds": list(heard.values())})
            Checkpoint(row["round"], self.identity, unpack(arrays), state, held, self.own).save(self.folder.checkpoint)
        self.on_round(row)

    def _config(self, number: int) -> ConfigRecord:
        """What clients are told of the time: how much of the training is done, and how much of it this round is."""
        rounds = self.assembly.experiment.rounds
        return ConfigRecord({"progress": (number - 1) / rounds, "span": 1 / rounds})

    def _on_device(self, arrays: Named) -> Named:
        return {name: tensor.to(self.assembly.device) for name, tensor in arrays.items()}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if name != "num-examples"}


COLUMNS = [
    "round", "train_loss", "validation_loss", "test_loss", "test_accuracy",
    "clients", "failures", "bytes_up", "bytes_down", "seconds",
]  # fmt: skip
"""The columns that every table of rounds has; a run adds others."""


def complete(row: Row) -> Row:
    """``row`` with every column of ``COLUMNS``, NaN where nothing was measured."""
    measured = {key: math.nan if value is None else value for key, value in row.items()}
    return dict.fromkeys(COLUMNS, math.nan) | measured
