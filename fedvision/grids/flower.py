"""Flower's own runtime: server and clients run where a SuperLink starts them."""

import json
import logging
import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tomli_w

from fedvision.errors import EngineError
from fedvision.experiment import COMPONENTS, Experiment
from fedvision.grids.local_superlink import LOCAL, commands, last_words, local_superlink
from fedvision.grids.runtime import Runtime
from fedvision.grids.workplace import PACKAGES, check_gpus_seen
from fedvision.registry import engines
from fedvision.settings import NonNegative, Positive

log = logging.getLogger("fedvision")

RUNS = "FEDVISION_RUNS"
"""The environment variable that says where a ServerApp of Flower's keeps runs: ``runs`` in its current folder if not set."""

NEWS_SECONDS, STATUS_SECONDS, PATIENCE_SECONDS = 0.2, 5.0, 300.0
"""How often to look for new rows, and to ask for the status of a run whose log has ended before it; how long to wait for an answer."""


@engines("flower")
@dataclass(frozen=True, kw_only=True)
class FlowerRuntime(Runtime):
    """Flower's own runtime: a simulation on this machine, or silos behind a SuperLink.

    Attributes:
        connection: a SuperLink connection of Flower's ``config.toml``; ``local``: a simulation on this machine, with
            a SuperLink that is started for the run and ended after it.
        runs: for other connections: where the folder with the coordinator's runs is mounted on this machine.
        deadline: seconds until an answer to the server's messages comes too late and counts as lost; none if not given.
        gpus_per_worker: of a simulation: the share of a GPU that Ray sets aside for each worker.
        device: where server and clients compute: ``cpu`` or ``cuda``.
    """

    connection: str = LOCAL
    runs: str = ""
    deadline: Positive | None = None
    gpus_per_worker: NonNegative = 0.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.connection != LOCAL and not self.runs:
            raise EngineError(
                f"engine.connection = {self.connection!r} needs engine.runs, the folder where the coordinator's {RUNS} is mounted here"
            )
        if self.connection == LOCAL:
            check_gpus_seen(self.device, self.gpus_per_worker)

    def check(self, experiment: Experiment) -> None:
        """Refuse parts that are the user's own code."""
        for kind in COMPONENTS:
            name = getattr(experiment, kind).name
            package = name.partition(":")[0].split(".")[0]
            if ":" in name and package not in PACKAGES and not _installed(package):
                own = f"{kind} {name!r} is code of your own, which Flower's processes do not have"
                raise EngineError(f"{own}; install its package with every silo and the coordinator, or use engine.name=in-process")

    def follow(self, experiment: Experiment, clients: int, folder: Path) -> Generator[None, None, None]:
        """Start a run and follow it; see ``Runtime``."""
        place = self._simulation(experiment, folder) if self.connection == LOCAL else self._silos(experiment, folder)
        with place as (environment, theirs), tempfile.TemporaryDirectory(prefix="fedvision-") as scratch:
            submitted = Submission(self.connection, environment, Path(scratch))
            for _ in submitted.follow(experiment, self._federation(clients)):
                _bring(theirs, folder, ["rounds.jsonl"])
                yield
            _bring(theirs, folder)
            submitted.check(folder, theirs)

    def _federation(self, clients: int) -> str:
        """The simulated federation, as ``flwr run`` takes it; silos are what they are."""
        if self.connection != LOCAL:
            return ""
        return f"num-supernodes={clients} client-resources-num-cpus=1 client-resources-num-gpus={self.gpus_per_worker}"

    @contextmanager
    def _simulation(self, experiment: Experiment, folder: Path) -> Iterator[tuple[dict[str, str], Path]]:
        """A SuperLink of our own, whose ServerApp finds ``folder`` under the name that it gives its run."""
        with local_superlink(RUNS) as environment:
            link = Path(environment[RUNS]) / _name(experiment)
            link.symlink_to(folder.absolute(), target_is_directory=True)
            yield environment, link

    @contextmanager
    def _silos(self, experiment: Experiment, folder: Path) -> Iterator[tuple[dict[str, str], Path]]:
        yield commands(), Path(self.runs).expanduser() / _name(experiment)


class Submission:
    """One run, as Flower's command line sees it.

    Args:
        connection: of Flower's ``config.toml``.
        environment: of Flower's commands.
        scratch: a folder for what they read and write.
    """

    def __init__(self, connection: str, environment: Mapping[str, str], scratch: Path) -> None:
        self._connection = connection
        self._environment = dict(environment)
        self._scratch = scratch
        self._log = scratch / "flower.log"
        self._described: dict[str, Any] = {}
        self._patience = PATIENCE_SECONDS

    def follow(self, experiment: Experiment, federation: str) -> Generator[None, None, None]:
        """Submit the run; yield until it has ended, and stop it if that is cut short."""
        config = self._scratch / "run.toml"
        config.write_text(tomli_w.dumps({"experiment": experiment.to_toml(), "overrides": ""}))
        line = ["flwr", "run", str(_app()), self._connection, "--stream", "--run-config", str(config)]
        line += ["--federation-config", federation] if federation else []
        with self._log.open("wb") as file:
            streaming = subprocess.Popen(
                line, env=self._environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
        try:
            while streaming.poll() is None:
                yield
                time.sleep(NEWS_SECONDS)
            while not self._finished():
                yield
                time.sleep(STATUS_SECONDS)
        except BaseException:
            self._stop()
            raise
        finally:
            streaming.kill()
            streaming.wait()

    def check(self, folder: Path, theirs: Path) -> None:
        """Look at how the run ended.

        Args:
            folder: of the run, where Flower's log is kept if it failed.
            theirs: the folder's name to the ServerApp.

        Raises:
            EngineError: it did not complete; with the cause.
        """
        if self._status() == "finished:completed":
            return
        folder.mkdir(parents=True, exist_ok=True)
        kept = shutil.copy(self._log, folder / "flower.log")
        details = str(self._described.get("status-details", "")).replace(str(theirs), str(folder))
        cause = re.sub(r"^(ServerApp|Simulation) failed with exception: ", "", details)
        ended = f"Flower's run {self._described['run-id']} is {self._status()}: {cause}"
        raise EngineError(f"{ended}; what is done is kept: mend the cause and go on with --resume (its log: {kept})")

    def _finished(self) -> bool:
        """Whether the run has ended; a SuperLink that does not answer is taken for one that is started again, for a while.

        Raises:
            EngineError: it has not answered for too long.
        """
        try:
            ended = self._status().startswith("finished")
        except EngineError as error:
            self._patience -= STATUS_SECONDS
            if self._patience < 0 or self._number() is None:
                raise
            log.warning("the SuperLink does not answer; the run may go on: %s", error)
            return False
        self._patience = PATIENCE_SECONDS
        return ended

    def _number(self) -> str | None:
        """Flower's number of the run; None before it has one."""
        found = re.search(r"started run (\d+)", self._log.read_text(errors="replace"))
        return found and found[1]

    def _status(self) -> str:
        """``pending``, ``starting``, ``running``, or how the run has finished."""
        if not str(self._described.get("status", "")).startswith("finished"):
            self._described = self._list()
        return str(self._described["status"])

    def _list(self) -> dict[str, Any]:
        number = self._number()
        if number is None:
            raise EngineError(f"`flwr run` on the connection {self._connection!r} failed: {last_words(self._log)}")
        listed = self._command("list", self._connection, "--run-id", number, "--format", "json")
        try:
            answer = json.loads(listed.stdout)
            return dict(answer["runs"][0])
        except ValueError:
            said = listed.stdout + listed.stderr
        except LookupError:
            said = str(answer.get("error-message", listed.stdout))
        told = " ".join(said.split()) or "nothing"
        raise EngineError(f"`flwr list {self._connection}` does not tell of run {number}, but says: {told}")

    def _stop(self) -> None:
        number = self._number()
        if number is not None and self._connection != LOCAL:  # our own SuperLink ends with the run
            self._command("stop", number, self._connection)

    def _command(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["flwr", *arguments], env=self._environment, capture_output=True, text=True, check=False)


def _app() -> Path:
    """The folder that is bundled: that of this code.

    Raises:
        EngineError: it is no Flower app.
    """
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / "pyproject.toml").is_file():
        raise EngineError(f"{root} has no pyproject.toml, which says what Flower sends to the clients; run from a checkout of FedVision")
    return root


def _installed(package: str) -> bool:
    """Whether a package is one of the environment's, not one of the current folder's."""
    spec = find_spec(package)
    origin = Path((spec and spec.origin) or Path.cwd()).resolve()
    environment = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return any(origin.is_relative_to(folder) for folder in environment) or not origin.is_relative_to(Path.cwd().resolve())


def _name(experiment: Experiment) -> str:
    return f"{experiment.name}-{experiment.fingerprint}"


def _bring(theirs: Path, folder: Path, names: list[str] | None = None) -> None:
    """Copy a run's files here, all or those of ``names``; not where their folder and ours are one."""
    if not theirs.is_dir() or (folder.exists() and theirs.samefile(folder)):
        return
    for source in [path for path in theirs.rglob("*") if path.is_file()] if names is None else [theirs / name for name in names]:
        target = folder / source.relative_to(theirs)
        if source.exists() and not (target.exists() and target.stat().st_size == source.stat().st_size and names):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
