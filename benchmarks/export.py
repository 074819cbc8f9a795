"""A run's model as a file that others read."""

from pathlib import Path

import torch

from benchmarks.runs import Run
from fedvision.data import FederatedData
from fedvision.errors import RunError
from fedvision.multimae.model import Trunk
from fedvision.multimae.weights import Converted, Layout, to_timm
from server.checkpoint import save_tensors
from server.folder import write_atomically

ENDINGS = (".safetensors", ".pth", ".pt")


def export(path: str | Path, out: Path, layout: Layout = "multimae", data: FederatedData | None = None) -> Converted:
    """Write the model of a run on modalities as published checkpoints are, positions included.

    Args:
        path: the run's folder; of a run that has not finished, the model of the last checkpoint is written.
        out: a new file: of safetensors, or of ``torch.save`` with the weights under ``model``, as its ending says.
        layout: ``multimae``: all of it; ``timm``: the encoder and rgb, as a vision transformer of timm has them.
        data: what the run was given instead of the data set that its experiment names.

    Returns:
        What was written, and the names of what has no place in that layout.

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
    if not isinstance(model, Trunk):
        fact = f"learner {run.experiment.learner.name} has no model that other programs know by its names"
        raise RunError(f"{fact}; load {run.path / 'model.safetensors'} with safetensors instead")
    state = model.state_dict()
    written = to_timm(state, f"the model of {path}") if layout == "timm" else Converted(state, ())
    _write(written.state, out)
    return written


def _write(state: dict[str, torch.Tensor], out: Path) -> None:
    if out.suffix == ".safetensors":
        save_tensors(out, state)
    else:
        write_atomically(out, lambda temporary: torch.save({"model": state}, temporary))
