"""The parts of a run, built once in each process that takes part in it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedvision.arrays import Named
from fedvision.data import FederatedData
from fedvision.data.examples import LABEL
from fedvision.errors import ExperimentError, RunError
from fedvision.experiment import Experiment, parse_overrides
from fedvision.holdings import Holdings
from fedvision.learners.learner import Learner, composes_its_batches, is_mean_over_examples
from fedvision.protection import check_model, check_protected
from fedvision.seeds import generator


@dataclass(frozen=True)
class Assembly:
    """An experiment with its parts built: what server and clients of one process share.

    Attributes:
        experiment: what was asked for.
        data: the clients' data; moved to ``device`` as it is used.
        learner: what the clients learn.
        strategy: a Flower strategy, with this project's client half.
        model: the process's one model; its weights are whatever was computed last.
        holdings: which of its arrays are shared, and which each client keeps to itself.
        device: where tensors live.
    """

    experiment: Experiment
    data: FederatedData
    learner: Learner
    strategy: Any
    model: nn.Module
    holdings: Holdings
    device: torch.device

    @classmethod
    def of(cls, experiment: Experiment, data: FederatedData | None = None) -> "Assembly":
        """Build every part once, so that what cannot work fails before anything starts.

        Args:
            experiment: names the parts.
            data: used instead of the data set that the experiment names.
        """
        device = _device(experiment.device)
        strategy, learner = experiment.build_strategy(), experiment.build_learner()
        data = experiment.load_data() if data is None else data
        _check_fit(experiment, data, learner, strategy)
        privacy = experiment.privacy
        if privacy is not None:
            check_protected(privacy, experiment.rounds, data, learner, strategy)
        model = learner.build(data.spec, generator(experiment.seed, "model")).to(device)
        if privacy is None or privacy.unit == "client":
            model = laid_out(model)  # opacus takes rows of pixels for channels then (1.6)
        holdings = Holdings.of(learner, model)
        if holdings.keeps_trained(model) and not hasattr(strategy, "client_optimizer"):
            kept = f"parameters such as {holdings.keeps_trained(model)[0]!r} stay with the clients, who take no steps with"
            raise ExperimentError(f"{kept} strategy {experiment.strategy.name}; choose one with local steps, as fedavg")
        if privacy is not None:
            check_model(privacy, data, learner, model)
            if privacy.unit == "client":
                trained = {name for name, param in model.named_parameters() if param.requires_grad and name in holdings.shared}
                strategy.protect(privacy, experiment.rounds, trained)
        assembly = cls(experiment, data.to(device), learner, strategy, model, holdings, device)
        if assembly.remembering:
            strategy.remember()
        return assembly

    @property
    def initial(self) -> Named:
        """The initial global model: its shared weights and buffers."""
        return self.holdings.shared

    def loaded(self, arrays: Named) -> nn.Module:
        """The model with these shared arrays, in evaluation mode; what silos keep is as one begins with it.

        Raises:
            RunError: arrays of another model.
        """
        self.check_fits(arrays, "give those of this learner")
        on_device = {name: arrays[name].to(own.device, own.dtype) for name, own in self.holdings.shared.items()}
        self.holdings.load(self.model, on_device)
        return self.model.eval()

    def check_fits(self, arrays: Named, remedy: str) -> None:
        """Refuse shared arrays of another model.

        Raises:
            RunError: with the first that does not fit, and the remedy.
        """
        for name, own in self.holdings.shared.items():
            shape = tuple(arrays[name].shape) if name in arrays else "none of that name"
            if shape != tuple(own.shape):
                fact = f"the weights do not fit the model: {name!r} has shape {shape}, the model needs {tuple(own.shape)}"
                raise RunError(f"{fact}; {remedy}")

    @property
    def remembering(self) -> bool:
        """Whether clients keep anything from one round to the next."""
        optimizer = getattr(self.strategy, "client_optimizer", {})
        strategy = getattr(self.strategy, "client_memory", ()) or optimizer.get("keep", False)
        return bool(strategy or self.holdings.private or self._accounting)

    @property
    def _accounting(self) -> bool:
        """Whether clients keep an account of what they have spent."""
        return self.experiment.privacy is not None and self.experiment.privacy.unit == "example"


def _check_fit(experiment: Experiment, data: FederatedData, learner: Learner, strategy: Any) -> None:
    """Refuse examples without labels where the learner needs them, and strategies that ask for what there is not."""
    if LABEL in data.train.examples and not learner.learns_unlabeled:
        missing = int((data.train.examples.label < 0).sum())
        if missing:
            fact = f"{missing} of {len(data.train.examples)} training examples have no label, which learner {experiment.learner.name} needs"
            raise ExperimentError(f"{fact}; choose another, as doublematch, or leave them out with [labels] drop = true")
    if getattr(strategy, "per_example", False) and composes_its_batches(learner) and not is_mean_over_examples(learner):
        fact = f"strategy {experiment.strategy.name} needs the gradient of each example"
        raise ExperimentError(f"{fact}, and the loss of learner {experiment.learner.name} is no mean over examples; choose e.g. fedavg")
    if data.server is not None and not hasattr(strategy, "trained"):
        fact = f"strategy {experiment.strategy.name} has no local steps that the server could take on its own labels"
        raise ExperimentError(f"{fact}; choose one that has, as fedavg")


def laid_out(model: nn.Module) -> nn.Module:
    """The model, with channels as the fastest-running dimension on a CPU: most convolutions take less time so."""
    on_cpu = all(param.device.type == "cpu" for param in model.parameters())
    return model.to(memory_format=torch.channels_last) if on_cpu else model  # type: ignore[call-overload, no-any-return]


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ExperimentError(f"engine.device = {name!r} cannot be used ({reason}); `fedvision doctor` lists the devices") from error


_installed: dict[int, Assembly] = {}


@contextmanager
def installed(run_id: int, assembly: Assembly) -> Iterator[None]:
    """Let the apps of this process use ``assembly`` for the run ``run_id`` instead of building their own."""
    _installed[run_id] = assembly
    try:
        yield
    finally:
        del _installed[run_id]


def install(run_id: int, assembly: Assembly) -> None:
    """Let the apps of this process use ``assembly`` for the run ``run_id``, for as long as the process lives."""
    _installed[run_id] = assembly


def at_hand(run_id: int) -> Assembly | None:
    """The parts of a run, if they have been built in this process."""
    return _installed.get(run_id)


def assembly_of(
    run_id: int, run_config: Mapping[str, Any], own_data: Callable[[Experiment], FederatedData | None] = lambda experiment: None
) -> Assembly:
    """The parts of a run; built on first use from the run's configuration, then kept.

    The process that builds them computes with as many threads as the experiment says from then on.

    Args:
        run_id: Flower's.
        run_config: ``experiment``, a bundled name, a path or the text of a file, and ``overrides``, as ``--set`` takes
            them, separated by ``;``.
        own_data: the data that this process has instead of the experiment's; None: the experiment's.

    Raises:
        FedVisionError: there is no such experiment, or its parts do not fit together.
    """
    if run_id not in _installed:
        experiment = _experiment(run_config)
        torch.set_num_threads(experiment.threads)
        _installed[run_id] = Assembly.of(experiment, own_data(experiment))
    return _installed[run_id]


def _experiment(run_config: Mapping[str, Any]) -> Experiment:
    overrides = parse_overrides(part for part in str(run_config.get("overrides", "")).split(";") if part.strip())
    named = str(run_config["experiment"])
    return Experiment.parse(named, overrides, "run-config") if "\n" in named else Experiment.load(named, overrides)
