"""Teachers: networks that are not trained any more, and that others learn from."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedvision import checkpoints, settings
from fedvision.backbones import backbone, check_known
from fedvision.cache import cached
from fedvision.data import Examples, Pool, Spec
from fedvision.errors import ExperimentError
from fedvision.learners.learner import Learner
from fedvision.registry import datasets
from fedvision.seeds import generator, global_generators, numpy_generator
from fedvision.silo import Silo

VERSION = 1
"""Raise it when the same lesson begins to give other teachers: what is on disk is not read any more."""

_taught: dict[str, Mapping[str, Tensor]] = {}
"""Teachers that this process has had, by what they were taught."""


def published(model: str, classes: int, channels: int, side: int | None = None, checkpoint: str | Path | None = None) -> nn.Module:
    """A timm model with published weights: those of a file, or those that timm downloads.

    Args:
        model: its name; with a tag, such as ``"tresnet_v2_l.miil_in21k_ft_in1k"``, where timm has several weights.
        classes: that it must tell apart.
        channels: of its images.
        side: of its images in pixels; None: those that it is made for.
        checkpoint: a file that ``checkpoints.read`` reads, in timm's names or in those of the architecture's authors, such as
            ``tresnet_l_v2_83_9.pth``, the teacher of the paper; None: download.

    Raises:
        ExperimentError: an unknown model, weights for other classes, a file that does not fit, or no network.
    """
    check_known(model)
    if checkpoint is None:
        return _downloaded(model, classes, channels, side)
    network = backbone(model, classes, channels, side, generator(0, "teacher"))
    checkpoints.load(network, converted(checkpoints.read(checkpoint), network), f"{checkpoint}, as {model!r} of {classes} classes,")
    return network


@dataclass(frozen=True)
class Lesson:
    """How a teacher is trained.

    Attributes:
        data: a public data set, a table as an experiment's ``data``.
        steps: of the optimizer.
        batch_size: examples a step.
        optimizer: a ``fedvision.optimizers.ClientOptimizer``.
        seed: of the data set where it is drawn, of the weights and of the batches.
    """

    data: Mapping[str, Any]
    steps: int
    batch_size: int
    optimizer: Mapping[str, Any]
    seed: int


def taught(learner: Learner, lesson: Lesson, spec: Spec) -> nn.Module:
    """A learner's model after a lesson, the same bits wherever it is made: trained with one thread once, then kept on disk.

    Args:
        learner: any.
        lesson: how it is trained.
        spec: of the data that the teacher is to see.

    Raises:
        ExperimentError: the public data set does not exist, or has another shape or number of classes.
    """
    model = learner.build(spec, generator(lesson.seed, "teacher"))
    key = {"version": VERSION, "learner": [type(learner).__qualname__, asdict(learner)], "lesson": asdict(lesson), "spec": asdict(spec)}
    name = json.dumps(key, sort_keys=True)
    if name not in _taught:
        _taught[name] = cached("teacher", key, lambda: _trained(learner, model, _public(lesson, spec), lesson))
    model.load_state_dict(_taught[name])
    return model


def _trained(learner: Learner, model: nn.Module, train: Examples, lesson: Lesson) -> dict[str, Tensor]:
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng, threads = generator(lesson.seed, "teacher", "steps"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with global_generators(rng):
            silo = Silo(learner, model, initial, train, rng=rng, span=1.0)
            silo.descend(silo.batches(lesson.batch_size, steps=lesson.steps), dict(lesson.optimizer))
    finally:
        torch.set_num_threads(threads)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _public(lesson: Lesson, spec: Spec) -> Examples:
    """The training examples of the public data set."""
    load, rest = datasets.find(lesson.data["name"]), {key: value for key, value in lesson.data.items() if key != "name"}
    arguments = settings.resolve(load, rest, "learner.teacher.data", without=frozenset({"rng"}))
    if "rng" in settings.parameters(load):
        arguments["rng"] = numpy_generator(lesson.seed, "data")
    pool = load(**arguments)
    if not isinstance(pool, Pool):
        raise ExperimentError(
            f"learner.teacher.data: {lesson.data['name']!r} comes dealt to clients; name one that is not, such as 'scenes'"
        )
    found = Spec(tuple(pool.train.image.shape[1:]), pool.classes)
    if found != spec:
        ours, theirs = (f"inputs {list(each.image_shape)} of {each.classes} classes" for each in (spec, found))
        raise ExperimentError(f"learner.teacher.data has {theirs}, the clients have {ours}; give both the same")
    return pool.train


def converted(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A published checkpoint in the names that timm's model has now, by timm's own rules for that architecture.

    For TResNet these are the names of USI's reference code, whose normalization scales by |weight| + 1e-5.
    A checkpoint in timm's names stays as it is, and so does that of an architecture without rules.
    """
    rules = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return dict(state if rules is None else rules(dict(state), model))


def _downloaded(model: str, classes: int, channels: int, side: int | None) -> nn.Module:
    import timm

    config: Any = timm.get_pretrained_cfg(model)
    if config.num_classes != classes:
        trained = f"the weights of {model!r} are for {config.num_classes} classes, the data has {classes}"
        raise ExperimentError(f"{trained}; give a checkpoint of a teacher for this data")
    try:
        return backbone(model, classes, channels, side, generator(0, "teacher"), pretrained=True)
    except Exception as error:  # of the network, of its proxy, of the hub, ...
        reason = str(error).strip().split("\n")[0]
        raise ExperimentError(f"the weights of {model!r} cannot be downloaded ({reason}); give them as a checkpoint file") from error
