import dataclasses
import json
import math
import random
import signal
import time
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks import run, runs
from fedvision.data import FederatedData
from fedvision.errors import EngineError, ExperimentError, RunError
from fedvision.experiment import Experiment
from fedvision.trees import save_tensors
from server.folder import RunFolder
from server.record import read_rows

COLUMNS = [
    "round", "train_loss", "validation_loss", "test_loss", "test_accuracy",
    "clients", "failures", "bytes_up", "bytes_down", "seconds",
]  # fmt: skip


class Stopped(BaseException):
    """A test stops a run here, as Ctrl-C would."""


def stop_after(number: int):
    def on_round(row):
        if row["round"] == number:
            raise Stopped

    return on_round


def untimed(path: Path) -> list[dict]:
    return [row | {"seconds": 0} for row in read_rows(path / "rounds.jsonl")]


def bits(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


# ---- the table, the model, the folder -------------------------------------------------------------------------------


def test_a_run_gives_a_table_a_model_and_a_folder(experiment, federated, tmp_path):
    done = run(experiment(tensorboard=True), data=federated, out=tmp_path / "run")
    assert list(done.rounds.columns[: len(COLUMNS)]) == COLUMNS
    assert done.rounds["round"].tolist() == [0, 1, 2, 3]
    assert done.rounds[COLUMNS].notna().all(axis=None)
    assert set(done.state) == {"hidden1.weight", "hidden1.bias", "classifier.weight", "classifier.bias"}
    assert done.path == tmp_path / "run"
    files = {str(path.relative_to(done.path)) for path in done.path.rglob("*") if path.is_file() and "tensorboard" not in path.parts}
    assert files == {
        "rounds.jsonl", "model.safetensors", "checkpoint.safetensors", "experiment.toml", "manifest.json",
        "figures/curves.png", "figures/examples.png", "figures/partition.png",
    }  # fmt: skip
    assert len(list((done.path / "tensorboard").iterdir())) == 1
    for picture in (done.path / "figures").iterdir():
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


def test_the_model_loads_into_a_fresh_one_of_the_learner(experiment, federated, tmp_path, no_figures):
    done = run(experiment(), data=federated, out=tmp_path / "run")
    model = done.experiment.build_learner().build(federated.spec, torch.Generator())
    model.load_state_dict(done.state)
    logits = model(federated.test.image)[:, 0]
    assert ((logits > 0) == federated.test.label.bool()).double().mean().item() == pytest.approx(done.rounds["test_accuracy"].iloc[-1])


def test_the_manifest_says_what_ran_where(experiment, federated, tmp_path, no_figures):
    manifest = run(experiment(), data=federated, out=tmp_path / "run").manifest
    assert manifest["status"] == "finished"
    assert manifest["fingerprint"] == experiment().fingerprint
    assert torch.__version__.startswith(manifest["versions"]["torch"])
    assert manifest["parameters"] == 205
    assert manifest["data"] == {"name": "tiny", "clients": 3, "digest": federated.digest}
    assert {"git_commit", "device", "python", "platform", "started", "ended", "command"} <= manifest.keys()


def test_the_resolved_experiment_repeats_the_run(experiment, federated, tmp_path, no_figures):
    done = run(experiment(), {"rounds": 2}, data=federated, out=tmp_path / "one")
    again = run(done.path / "experiment.toml", data=federated, out=tmp_path / "two")
    assert done.experiment == again.experiment
    assert bits(done.path) == bits(again.path)


def test_a_run_may_be_asked_for_by_name_by_path_or_by_value(tmp_path, experiment, no_figures):
    tiny = {"rounds": 1, "learner.hidden": [4], "tensorboard": False}
    named = run("quickstart", tiny, out=tmp_path / "named")
    value = run(Experiment.load("quickstart"), tiny, out=tmp_path / "value")
    written = run(named.path / "experiment.toml", out=str(tmp_path / "written"))
    assert bits(named.path) == bits(value.path) == bits(written.path)
    assert named.rounds["clients"].tolist() == [0, 5]


def test_no_rounds_are_one_row(experiment, federated, tmp_path, no_figures):
    done = run(experiment(rounds=0), data=federated, out=tmp_path / "run")
    assert done.rounds["round"].tolist() == [0]
    assert math.isfinite(done.rounds["test_loss"][0])
    assert done.rounds[["bytes_up", "bytes_down", "clients"]].eq(0).all(axis=None)


def test_without_validation_sets_their_loss_is_nan(experiment, federated, tmp_path):
    data = FederatedData("tiny", federated.train, None, federated.test, 2)
    done = run(experiment(rounds=1), data=data, out=tmp_path / "run")
    assert done.rounds["validation_loss"].isna().all()
    assert done.rounds["test_loss"].notna().all()


def test_users_arrays_may_be_numpy_with_labels_in_a_column(experiment, federated, tmp_path, no_figures):
    def plain(examples):
        return examples.image.double().numpy(), examples.label.float().numpy()[:, None]

    train, held = [plain(part) for part in federated.train], [plain(part) for part in federated.validation]
    data = FederatedData.from_arrays(train, held, test=plain(federated.test), name="tiny")
    assert data.digest == federated.digest
    assert untimed(run(experiment(), data=data, out=tmp_path / "a").path) == untimed(
        run(experiment(), data=federated, out=tmp_path / "b").path
    )


def test_each_round_is_told_as_it_is_recorded(experiment, federated, tmp_path, no_figures):
    told = []
    done = run(experiment(), data=federated, out=tmp_path / "run", on_round=told.append)
    assert [row["round"] for row in told] == [0, 1, 2, 3]
    assert told[2]["train_loss"] == done.rounds["train_loss"][2]


def test_the_package_names_run_without_importing_what_takes_seconds():
    assert benchmarks.run is runs.run and benchmarks.Run is runs.Run
    with pytest.raises(AttributeError, match="no attribute 'rum'"):
        benchmarks.rum  # noqa: B018


# ---- initial weights ------------------------------------------------------------------------------------------------


def test_initial_weights_may_be_a_state_dict_or_a_file(experiment, federated, tmp_path, no_figures):
    first = run(experiment(), data=federated, out=tmp_path / "first")
    as_dict = run(experiment(rounds=1), data=federated, initial=first.state, out=tmp_path / "dict")
    as_file = run(experiment(rounds=1), data=federated, initial=first.path / "model.safetensors", out=tmp_path / "file")
    as_text = run(experiment(rounds=1), data=federated, initial=str(first.path / "model.safetensors"), out=tmp_path / "text")
    assert bits(as_dict.path) == bits(as_file.path) == bits(as_text.path)
    assert as_dict.rounds["test_loss"][0] == first.rounds["test_loss"].iloc[-1]


def test_initial_weights_may_be_a_modules_own_state_dict(experiment, federated, tmp_path, no_figures):
    model = experiment().build_learner().build(federated.spec, torch.Generator())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = run(experiment(), data=federated, initial=model.state_dict(), out=tmp_path / "run")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not torch.equal(done.state["hidden1.weight"], before["hidden1.weight"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_initial_weights_of_another_precision_are_converted(experiment, federated, tmp_path, no_figures, dtype):
    model = experiment().build_learner().build(federated.spec, torch.Generator())
    initial = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    done = run(experiment(rounds=0), data=federated, initial=initial, out=tmp_path / "run")
    assert torch.equal(done.state["hidden1.weight"], initial["hidden1.weight"].float())


def test_weights_of_another_model_are_refused(experiment, federated, tmp_path, no_figures):
    save_tensors(tmp_path / "weights.safetensors", {"hidden1.weight": torch.zeros(2)})
    with pytest.raises(RunError, match="initial weights do not fit the model"):
        run(experiment(), data=federated, initial=tmp_path / "weights.safetensors", out=tmp_path / "run")


def test_missing_weights_are_refused_before_anything_starts(experiment, federated, tmp_path):
    with pytest.raises(RunError, match=r"absent.safetensors: not a readable safetensors file"):
        run(experiment(), data=federated, initial=tmp_path / "absent.safetensors", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- folders --------------------------------------------------------------------------------------------------------


def test_runs_are_numbered_if_no_folder_is_given(experiment, federated, tmp_path, monkeypatch, no_figures):
    monkeypatch.chdir(tmp_path)
    paths = [run(experiment(rounds=0), data=federated).path for _ in range(3)]
    base = f"tiny-{experiment(rounds=0).fingerprint}"
    assert [str(path) for path in paths] == [f"runs/{base}", f"runs/{base}-2", f"runs/{base}-3"]


def test_resuming_without_a_folder_finds_the_latest_run_of_this_experiment(experiment, federated, tmp_path, monkeypatch, no_figures):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Stopped):
        run(experiment(), data=federated, on_round=stop_after(1))
    done = run(experiment(), data=federated, resume=True)
    assert str(done.path) == f"runs/tiny-{experiment().fingerprint}"
    assert run(experiment(), data=federated, resume=True).path == done.path
    assert str(run(experiment(seed=5), data=federated, resume=True).path) == f"runs/tiny-{experiment(seed=5).fingerprint}"


def test_a_folder_of_the_same_run_needs_resume(experiment, federated, tmp_path, no_figures):
    run(experiment(), data=federated, out=tmp_path / "run")
    with pytest.raises(RunError, match=r"holds a finished run of this experiment; go on with --resume, or choose another"):
        run(experiment(), data=federated, out=tmp_path / "run")


def test_a_finished_run_is_returned_as_it_is(experiment, federated, tmp_path, no_figures):
    done, told = run(experiment(), data=federated, out=tmp_path / "run"), []
    before = {path: path.stat().st_mtime_ns for path in done.path.rglob("*")}
    again = run(experiment(), data=federated, out=tmp_path / "run", resume=True, on_round=told.append)
    assert again.rounds.equals(done.rounds) and len(told) == 4
    assert {path: path.stat().st_mtime_ns for path in done.path.rglob("*")} == before


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("what", ["experiment", "data", "weights"])
def test_a_folder_of_another_run_is_refused_and_left_alone(experiment, federated, tmp_path, no_figures, what, resume):
    done = run(experiment(), data=federated, out=tmp_path / "run")
    before = {path: path.read_bytes() for path in done.path.iterdir() if path.is_file()}
    other = experiment(seed=1) if what == "experiment" else experiment()
    data = dataclasses.replace(federated, name="other") if what == "data" else federated
    weights = done.state if what == "weights" else None
    with pytest.raises(RunError, match="holds a run of another experiment, data or initial weights; choose another folder with --out"):
        run(other, data=data, initial=weights, out=tmp_path / "run", resume=resume)
    assert {path: path.read_bytes() for path in done.path.iterdir() if path.is_file()} == before


def test_what_cannot_change_a_number_may_change_on_resuming(experiment, federated, tmp_path, no_figures):
    with pytest.raises(Stopped):
        run(experiment(), data=federated, out=tmp_path / "run", on_round=stop_after(1))
    done = run(experiment(checkpoint_every=2), data=federated, out=tmp_path / "run", resume=True)
    assert done.rounds["round"].tolist() == [0, 1, 2, 3]


def test_a_folder_with_other_files_is_refused(experiment, federated, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty and holds no run"):
        run(experiment(), data=federated, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_and_one_whose_run_died_at_birth_are_welcome(experiment, federated, tmp_path, no_figures):
    (tmp_path / ".manifest.json.123.part").write_text('{"sta')
    assert run(experiment(rounds=0), data=federated, out=tmp_path, resume=True).rounds["round"].tolist() == [0]


def test_a_folder_that_is_a_file_is_an_error_of_ours(experiment, federated, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError):
        run(experiment(), data=federated, out=tmp_path / "run")


# ---- the same bits --------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path, experiment, no_figures):
    changes = {"strategy": {"name": "fedavg", "fraction": 0.67}}
    one, same, other = (run(experiment(seed=seed, **changes), out=tmp_path / str(i)) for i, seed in enumerate((3, 3, 4)))
    assert bits(one.path) == bits(same.path) != bits(other.path)
    assert untimed(one.path) == untimed(same.path)


@pytest.mark.parametrize("batch_clients", [2, 3, 7])
def test_a_run_agrees_however_many_clients_train_together(experiment, tmp_path, no_figures, batch_clients):
    partition = {"name": "linear-sizes", "clients": 7}
    strategy = {"name": "fedavg", "fraction": 0.7, "epochs": 2, "client_optimizer": {"name": "Adam", "lr": 0.01}}
    local = experiment(partition=partition, strategy=strategy, validation_fraction=0.2)
    one = run(local, out=tmp_path / "one")
    other = run(local, {"engine.batch_clients": batch_clients}, out=tmp_path / "other")
    assert all(torch.allclose(one.state[name], tensor, rtol=0, atol=1e-5) for name, tensor in other.state.items())
    for expected, row in zip(untimed(one.path), untimed(other.path), strict=True):
        assert row.pop("failed") == expected.pop("failed") == []
        assert row == pytest.approx(expected, abs=1e-5)
    assert one.experiment.fingerprint != other.experiment.fingerprint


def test_what_cannot_train_together_is_refused_before_anything_starts(experiment, federated, tmp_path):
    with pytest.raises(EngineError, match=r"^engine.batch_clients = 2: clients of strategy scaffold .* set engine.batch_clients = 1$"):
        run(experiment(strategy={"name": "scaffold"}), {"engine.batch_clients": 2}, federated, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_callers_threads_and_generators_do_not_matter_and_come_back(experiment, tmp_path, no_figures):
    state, before = random.getstate(), torch.get_num_threads()
    one = run(experiment(), out=tmp_path / "one")
    torch.set_num_threads(2)
    try:
        other = run(experiment(), out=tmp_path / "other")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert bits(one.path) == bits(other.path)
    assert random.getstate() == state


def test_two_runs_in_one_process_do_not_meet(experiment, federated, tmp_path, no_figures):
    whole = run(experiment(), data=federated, out=tmp_path / "alone")
    inner = []

    def another(row):
        if row["round"] == 1:
            inner.append(run(experiment(seed=9), data=federated, out=tmp_path / "inner"))

    outer = run(experiment(), data=federated, out=tmp_path / "outer", on_round=another)
    assert bits(outer.path) == bits(whole.path) != bits(inner[0].path)


def test_a_run_interrupted_from_python_says_so_and_goes_on(experiment, federated, tmp_path, no_figures):
    whole = run(experiment(), data=federated, out=tmp_path / "whole")

    def interrupt(row):
        if row["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(experiment(), data=federated, out=tmp_path / "stopped", on_round=interrupt)
    assert RunFolder(tmp_path / "stopped").read_manifest()["status"] == "interrupted"
    done = run(experiment(), data=federated, out=tmp_path / "stopped", resume=True)
    assert done.manifest["status"] == "finished"
    assert bits(done.path) == bits(whole.path) and untimed(done.path) == untimed(whole.path)


def test_a_failed_run_says_why_in_its_manifest(experiment, federated, tmp_path, no_figures):
    def fail(row):
        raise ExperimentError("no luck today")

    with pytest.raises(ExperimentError):
        run(experiment(), data=federated, out=tmp_path / "run", on_round=fail)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["status"], manifest["reason"]) == ("failed", "no luck today")


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(here, spawned, rows_reach, no_figures):
    # big enough for a round to take some milliseconds, with a cohort and local training, so that much can differ
    changes = {
        "rounds": 60, "learner.hidden": [64, 64], "strategy.name": "fedavg", "strategy.fraction": 0.67, "strategy.batch_size": 64,
    }  # fmt: skip
    whole = run("mine.toml", changes, out="whole")
    settings = [f"--set={key}={value}" for key, value in changes.items()]
    process = spawned("run", "mine.toml", *settings, "--out", "killed")
    rows_reach(process, here / "killed", random.randint(1, 40))
    time.sleep(random.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert RunFolder(here / "killed").read_manifest()["status"] == "running"
    done = run("mine.toml", changes, out="killed", resume=True)
    assert untimed(done.path) == untimed(whole.path)
    assert bits(done.path) == bits(whole.path)
