"""The inconsistency of two silos of a run: found from its folder alone, and refused where the folder does not suffice."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import run
from benchmarks.diagnosis import diagnose
from fedvision.data import FederatedData
from fedvision.errors import RunError
from fedvision.experiment import Experiment
from fedvision.inconsistency import inconsistency

TABLES = {
    "name": "small",
    "rounds": 1,
    "tensorboard": False,
    "data": {"name": "digits"},
    "partition": {"name": "iid", "clients": 3},
    "learner": {"name": "classifier", "hidden": [4]},
    "strategy": {"name": "fedavg"},
}


def own_data(seed=0):
    rng = np.random.default_rng(seed)
    pairs = [(rng.normal(size=(12, 1, 2, 3)), np.arange(12) % 2) for _ in range(3)]
    return FederatedData.from_arrays(pairs[:2], test=pairs[2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a run of a named data set."""
    return run(Experiment.from_tables(TABLES), out=tmp_path_factory.mktemp("named") / "run").path


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Of a run on arrays of one's own."""
    return run(Experiment.from_tables(TABLES), data=own_data(), out=tmp_path_factory.mktemp("own") / "run").path


def test_the_folder_of_a_run_is_enough(folder):
    experiment = Experiment.from_tables(TABLES)
    data, learner = experiment.load_data(), experiment.build_learner()
    model = learner.build(data.spec, torch.Generator())
    arrays = load_file(folder / "model.safetensors")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = inconsistency(learner, model, arrays, data.train[0], data.train[2], epsilon=0.02, steps=3)
    torch.set_num_threads(threads)
    assert diagnose(folder, (0, 2), 0.02, steps=3) == expected
    assert torch.get_num_threads() == threads
    assert expected.score > 0.02


def test_the_settings_of_the_search_matter(folder):
    score = diagnose(folder, (0, 2), 0.02, steps=3).score
    for changed in ({"epsilon": 0.2}, {"steps": 6}, {"radius": 0.01}):
        assert diagnose(folder, (0, 2), **{"epsilon": 0.02, "steps": 3, **changed}).score != score
    assert diagnose(folder, (0, 2), 0.02, steps=3, starts=2).score >= score


def test_exchanged_silos_have_the_same_score(folder):
    one, other = diagnose(folder, (0, 1), steps=3), diagnose(folder, (1, 0), steps=3)
    assert (one.within_a, one.within_b, one.score) == (other.within_b, other.within_a, other.score)


def test_a_run_on_own_arrays_needs_them_again(own):
    assert diagnose(own, (0, 1), steps=3, data=own_data()).score > 0
    for data in (None, own_data(seed=1)):
        with pytest.raises(RunError, match="was made with other data"):
            diagnose(own, (0, 1), data=data)


@pytest.mark.parametrize("silos", [(0, 0), (0, 3), (-1, 1)])
def test_silos_that_are_not_there_are_refused(folder, silos):
    with pytest.raises(RunError, match=f"silos {silos[0]} and {silos[1]}: expected two different ones of 0 to 2"):
        diagnose(folder, silos)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        diagnose(tmp_path, (0, 1))


def test_an_unfinished_run_is_refused(folder, tmp_path):
    manifest = json.loads((folder / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"status": "interrupted"}))
    with pytest.raises(RunError, match=r"has not finished \(status: interrupted\); go on with --resume"):
        diagnose(tmp_path, (0, 1))
