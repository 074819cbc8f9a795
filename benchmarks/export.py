"""A run's model as a file that others read."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.runs import Run
from fedvision.albef import weights as albef
from fedvision.albef.assignment import Assignment
from fedvision.albef.model import Followed
from fedvision.checkpoints import Converted
from fedvision.data import FederatedData
from fedvision.errors import RunError
from fedvision.files import write_atomically
from fedvision.leopart import weights as leopart
from fedvision.leopart.network import Leopart
from fedvision.multimae import weights as multimae
from fedvision.multimae.model import Trunk
from fedvision.trees import save_tensors

ENDINGS = (".safetensors", ".pth", ".pt")

Layout = Literal["multimae", "albef", "leopart", "timm"]
Convert = Callable[[Mapping[str, Tensor], str], Converted]


class Exported(NamedTuple):
    """What was written, in which layout, and the names of what has no place in it."""

    layout: Layout
    state: dict[str, Tensor]
    dropped: tuple[str, ...]


def export(path: str | Path, out: Path, layout: Layout | None = None, data: FederatedData | None = None) -> Exported:
    """Write the model of a run as published checkpoints are, with what never changes, such as positions.

    What silos keep to themselves is as one begins with it: slowly moving copies where the parts are that they follow.

    Args:
        path: the run's folder; of a run that has not finished, the model of the last checkpoint is written.
        out: a new file: of safetensors, or of ``torch.save`` with the weights under ``model``, as its ending says.
        layout: ``multimae``, ``albef`` or ``leopart``: all of it, as the paper's checkpoints are; ``timm``: the encoder of pictures, as a
            vision transformer of timm has it. The paper's, if not given.
        data: what the run was given instead of the data set that its experiment names.

    Raises:
        RunError: no run, one without a model or of another learner, or a file that is there or ends otherwise.
        ExperimentError: a model that timm's layout cannot hold.
    """
    if out.suffix not in ENDINGS:
        raise RunError(f"{out} ends in {out.suffix or 'nothing'}; choose a name that ends in {', '.join(ENDINGS)}")
    if out.exists():
        raise RunError(f"{out} is there already; choose another name")
    run = Run.open(path)
    arrays = run.arrays
    if arrays is None:
        raise RunError(f"the run in {path} has no model yet, neither a final one nor a checkpoint; go on with --resume")
    model = run.rebuilt(data, "cpu").loaded(arrays)
    known, learner = _layouts(model), run.experiment.learner.name
    if not known:
        fact = f"learner {learner} has no model that other programs know by its names"
        raise RunError(f"{fact}; load {run.path / 'model.safetensors'} with safetensors instead")
    chosen = layout or next(iter(known))
    if chosen not in known:
        raise RunError(f"the model of learner {learner} has no layout {chosen}; choose {' or '.join(known)}")
    written = known[chosen](model.state_dict(), f"the model of {path}")
    _write(written.state, out)
    return Exported(chosen, *written)


def _layouts(model: nn.Module) -> dict[Layout, Convert]:
    """Those that a model can be written in, its paper's first."""
    if isinstance(model, Trunk):
        return {"multimae": _whole, "timm": multimae.to_timm}
    if isinstance(model, Followed | Assignment):
        return {"albef": _whole, "timm": albef.to_timm}
    if isinstance(model, Leopart):
        return {"leopart": leopart.to_leopart, "timm": leopart.to_timm}
    return {}


def _whole(state: Mapping[str, Tensor], where: str) -> Converted:
    return Converted(dict(state), ())


def _write(state: dict[str, Tensor], out: Path) -> None:
    if out.suffix == ".safetensors":
        save_tensors(out, state)
    else:
        write_atomically(out, lambda temporary: torch.save({"model": state}, temporary))
