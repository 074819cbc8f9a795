"""Looking into a finished run: how inconsistent two of its silos are at the final model."""

from pathlib import Path

from benchmarks.runs import Run, threads
from fedvision.assembly import Assembly
from fedvision.data import Examples, FederatedData
from fedvision.errors import RunError
from fedvision.inconsistency import Inconsistency, inconsistency


def diagnose(
    run: str | Path,
    silos: tuple[int, int],
    epsilon: float = 0.01,
    *,
    radius: float = 0.1,
    steps: int = 50,
    starts: int = 1,
    data: FederatedData | None = None,
) -> Inconsistency:
    """The inconsistency score of two silos' training examples at the final model of a run.

    Args:
        run: the folder of a finished run.
        silos: two different clients, by number.
        epsilon: how much a silo's loss may differ to be taken for the same, above 0; in units of the loss.
        radius: how far from the model to look, as a share of its norm.
        steps: of each gradient search; see ``fedvision.inconsistency``.
        starts: how many searches begin from differently disturbed models.
        data: what the run was given instead of the data set that its experiment names.

    Raises:
        RunError: no run, an unfinished one, other data than the run's, or no such two silos.
    """
    done = Run.open(run)
    if done.manifest.get("status") != "finished":
        raise RunError(f"the run in {run} has not finished (status: {done.manifest.get('status')}); go on with --resume first")
    assembly = Assembly.of(done.experiment, data)
    digest = done.manifest["data"]["digest"]
    if assembly.data.digest != digest:
        raise RunError(f"the run in {run} was made with other data ({digest}) than this ({assembly.data.digest}); give that as `data`")
    a, b = _examples(assembly.data, silos)
    with threads(done.experiment.threads):
        return inconsistency(assembly.learner, assembly.model, done.state, a, b, epsilon=epsilon, radius=radius, steps=steps, starts=starts)


def _examples(data: FederatedData, silos: tuple[int, int]) -> tuple[Examples, Examples]:
    a, b = silos
    if a == b or not {a, b} <= set(range(data.num_clients)):
        raise RunError(f"silos {a} and {b}: expected two different ones of 0 to {data.num_clients - 1}")
    return data.train[a], data.train[b]
