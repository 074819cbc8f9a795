"""The pictures of a run, drawn anew from its folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks import figures, galleries
from benchmarks.runs import Run, threads
from fedvision.data import FederatedData
from fedvision.gallery import Gallery
from fedvision.learners.learner import draws_pictures
from server.folder import RunFolder


class Drawn(NamedTuple):
    """The files of a run's pictures, and what there is to say about them."""

    files: list[Path]
    remarks: list[str]


def redraw(path: str | Path, device: str | None = None, data: FederatedData | None = None) -> Drawn:
    """Draw the curves, the partition and examples of a run, and what its learner shows of its latest model.

    Args:
        path: the run's folder; of a run that has not finished, the model of the last checkpoint is shown.
        device: where to compute, if not where the run did.
        data: what the run was given instead of the data set that its experiment names.

    Raises:
        RunError: no run, or one that was made with other data than its experiment names.
    """
    run = Run.open(path)
    assembly, arrays, remarks = run.rebuilt(data, device), run.arrays, []
    shown: Mapping[str, Gallery] = {}
    if not draws_pictures(assembly.learner):
        remarks.append(f"learner {run.experiment.learner.name} has no pictures of its own")
    elif arrays is None:
        remarks.append("there is no model yet, neither a final one nor a checkpoint: no pictures of the learner")
    else:
        with threads(run.experiment.threads):
            shown = galleries.of_learner(assembly, arrays)
    if not run.finished:
        remarks.append(f"the run has not finished (status: {run.manifest.get('status')}); shown is what there is")
    return Drawn(figures.of_run(RunFolder(run.path), assembly.data, shown), remarks)
