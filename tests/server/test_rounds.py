import math
from itertools import count

import pytest
import torch

from clients.app import app as client_app
from fedvision.arrays import unpack
from fedvision.assembly import Assembly, installed
from fedvision.data import FederatedData
from fedvision.errors import AggregationError, RunError
from fedvision.grids.in_process import InProcessGrid
from fedvision.learners.classifier import Classifier
from fedvision.trees import load_weights
from server.checkpoint import Checkpoint
from server.folder import RunFolder
from server.record import read_rows
from server.rounds import Session
from strategies.fedsgd import FedSGD

RUNS = count(1000)


@pytest.fixture
def ran(experiment, federated, tmp_path):
    """Runs a session over the in-process grid; returns its rows. ``at`` names the folder, other arguments go to the session."""

    def run(at: str = "run", changes: dict | None = None, data: FederatedData | None = None, **arguments) -> list[dict]:
        assembly, run_id = Assembly.of(experiment(**(changes or {})), data or federated), next(RUNS)
        folder = RunFolder(tmp_path / at)
        with installed(run_id, assembly), InProcessGrid(client_app, {"run-id": run_id}, assembly.data.num_clients) as grid:
            Session(assembly, folder, "identity", **arguments).run(grid)
        return list(read_rows(folder.rounds))

    return run


def same(one: list[dict], other: list[dict]) -> bool:
    """Rows that agree in everything but the time they took."""
    return [row | {"seconds": 0} for row in one] == [row | {"seconds": 0} for row in other]


def bits(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


class Stopped(BaseException):
    """A test stops a run here."""


def stop_after(number: int):
    def on_round(row):
        if row["round"] == number:
            raise Stopped

    return on_round


def test_a_run_has_one_row_a_round_and_begins_with_the_initial_model(ran):
    rows = ran()
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert [row["clients"] for row in rows] == [0, 3, 3, 3]
    # the clients' loss before the first step is that of the initial model
    assert rows[1]["train_loss"] == pytest.approx(rows[0]["train_loss"])
    assert rows[3]["train_loss"] < rows[1]["train_loss"]
    assert all(row["seconds"] > 0 for row in rows)


def test_rows_hold_every_metric_of_every_part(ran):
    rows = ran()
    for part in ("train", "validation", "test"):
        assert {f"{part}_{name}" for name in ("loss", "accuracy", "auroc", "auprc")} <= rows[0].keys()
    assert {"validation_loss", "test_loss", "test_accuracy", "train_loss"} <= rows[2].keys()


def test_bytes_are_those_of_the_arrays_each_way(ran):
    rows = ran()
    parameters = 32 * 6 + 6 + 6 + 1
    assert [(row["bytes_up"], row["bytes_down"]) for row in rows] == [(0, 0)] + [(3 * 4 * parameters,) * 2] * 3


def test_clients_are_told_the_progress_of_the_training(ran, monkeypatch):
    told, honest = [], Classifier.loss

    def listening(self, model, batch, progress, rng):
        told.append(progress)
        return honest(self, model, batch, progress, rng)

    monkeypatch.setattr(Classifier, "loss", listening)
    ran(changes={"rounds": 4})
    assert told == [0.0] * 3 + [0.25] * 3 + [0.5] * 3 + [0.75] * 3


def test_only_the_cohort_sends_and_receives(ran):
    rows = ran(changes={"strategy__fraction": 0.34})
    assert {row["clients"] for row in rows[1:]} == {1}
    assert {row["bytes_up"] for row in rows[1:]} == {4 * 205}


def test_no_rounds_only_evaluate_the_initial_model(ran, tmp_path, experiment, federated):
    [row] = ran(changes={"rounds": 0})
    assert row["round"] == 0 and math.isfinite(row["test_loss"])
    initial = Assembly.of(experiment(), federated).initial
    final = load_weights(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(final[name], initial[name]) for name in initial)


def test_clients_without_validation_sets_are_not_asked_for_them(ran, federated):
    data = FederatedData("tiny", federated.train, None, federated.test, 2)
    rows = ran(data=data)
    assert not any(name.startswith("validation") for row in rows for name in row)
    assert all(math.isfinite(row["test_loss"]) for row in rows)


def test_an_empty_validation_set_does_not_count(ran, federated):
    def pair(examples):
        return examples.image, examples.label

    held = [pair(federated.validation[0]), (torch.zeros(0, 2, 4, 4), torch.zeros(0)), (torch.zeros(0, 2, 4, 4), torch.zeros(0))]
    test = pair(federated.test)
    some = FederatedData.from_arrays([pair(part) for part in federated.train], held, test=test)
    one = FederatedData.from_arrays([pair(federated.train[0])], held[:1], test=test)
    assert ran("some", {"rounds": 0}, some)[0]["validation_loss"] == ran("one", {"rounds": 0}, one)[0]["validation_loss"]


def test_evaluation_may_be_less_frequent_but_never_misses_the_last_round(ran):
    rows = ran(changes={"rounds": 5, "evaluate_every": 2})
    assert ["test_loss" in row for row in rows] == [True, False, True, False, True, True]
    assert all("train_loss" in row for row in rows)


def test_frequent_evaluation_does_not_change_the_training(ran, tmp_path):
    ran("often", {"evaluate_every": 1})
    ran("seldom", {"evaluate_every": 3})
    assert bits(tmp_path / "often") == bits(tmp_path / "seldom")


@pytest.mark.parametrize("strategy", [{"name": "fedsgd"}, {"name": "fedavg", "fraction": 0.67}, {"name": "scaffold"}, {"name": "fedadam"}])
@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_ends_with_the_same_bits(ran, tmp_path, strategy, every):
    changes = {"rounds": 5, "strategy": strategy, "checkpoint_every": every}
    expected = ran("whole", changes)
    with pytest.raises(Stopped):
        ran("stopped", changes, on_round=stop_after(3))
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    rows = ran("stopped", changes, resume=True)
    assert same(rows, expected)
    assert bits(tmp_path / "stopped") == bits(tmp_path / "whole")


def test_a_run_stopped_before_its_first_checkpoint_starts_again(ran, tmp_path):
    expected = ran("whole")
    with pytest.raises(Stopped):
        ran("stopped", on_round=stop_after(0))
    (tmp_path / "stopped" / "checkpoint.safetensors").unlink()
    assert same(ran("stopped", resume=True), expected)
    assert bits(tmp_path / "stopped") == bits(tmp_path / "whole")


def test_resuming_tells_the_rows_of_before_too(ran):
    with pytest.raises(Stopped):
        ran(on_round=stop_after(2))
    told = []
    ran(resume=True, on_round=lambda row: told.append(row["round"]))
    assert told == [0, 1, 2, 3]


def test_resuming_a_finished_run_changes_nothing(ran, tmp_path):
    rows = ran()
    before = bits(tmp_path / "run")
    assert ran(resume=True) == rows
    assert bits(tmp_path / "run") == before


def test_a_checkpoint_of_another_run_is_refused(ran, tmp_path):
    ran()
    file = tmp_path / "run" / "checkpoint.safetensors"
    kept = Checkpoint.load(file)
    Checkpoint(kept.round, "another", kept.arrays, kept.strategy).save(file)
    with pytest.raises(RunError, match="holds a run of another experiment, data or initial weights"):
        ran(resume=True)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(ran, tmp_path):
    changes = {"strategy": {"name": "fedavg", "fraction": 0.67, "batch_size": 3}}
    assert same(ran("one", changes), ran("same", changes))
    ran("other", changes | {"seed": 1})
    assert bits(tmp_path / "one") == bits(tmp_path / "same") != bits(tmp_path / "other")


def test_the_users_generators_do_not_matter_and_are_left_alone(ran, tmp_path):
    before = torch.get_rng_state()
    ran("one", {"strategy": {"name": "fedavg"}})
    assert torch.equal(before, torch.get_rng_state())
    with torch.random.fork_rng(devices=[]):
        torch.rand(7)
        ran("other", {"strategy": {"name": "fedavg"}})
    assert bits(tmp_path / "one") == bits(tmp_path / "other")


def test_a_run_may_start_from_given_weights(ran, experiment, federated):
    initial = {name: torch.full_like(tensor, 0.25) for name, tensor in Assembly.of(experiment(), federated).initial.items()}
    rows = ran(initial=initial)
    assert rows[0]["test_accuracy"] == 0.5 and rows[0]["test_auroc"] == 1.0  # all predicted as class 1; the scores rise with brightness
    assert all(tensor.eq(0.25).all() for tensor in initial.values())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda own: own | {"classifier.weight": torch.zeros(1, 7)}, "'classifier.weight' has shape (1, 7), the model needs (1, 6)"),
        (lambda own: own | {"more": torch.zeros(1)}, "'more' has shape (1,), the model needs none of that name"),
        (lambda own: {name: own[name] for name in list(own)[1:]}, "'hidden1.weight' has shape none, the model needs (6, 32)"),
        (lambda own: {}, "the model needs"),
    ],
)
def test_weights_that_do_not_fit_are_refused(ran, experiment, federated, spoil, message):
    own = dict(Assembly.of(experiment(), federated).initial)
    with pytest.raises(RunError) as caught:
        ran(initial=spoil(own))
    assert message in str(caught.value) and "give weights of this learner" in str(caught.value)


def test_a_client_with_nan_data_is_refused_by_name_in_every_round(ran, federated):
    images = federated.train.examples.image.clone()
    images[:8] = math.nan
    train = [(images[a:b], federated.train.examples.label[a:b]) for a, b in ((0, 8), (8, 20), (20, 36))]
    test = federated.test.image, federated.test.label
    rows = ran(data=FederatedData.from_arrays(train, test=test))
    for row in rows[1:]:
        assert (row["clients"], row["failures"]) == (2, 1)
        assert row["failed"][0].startswith("client 0: array 'hidden1.weight' holds NaN")
        assert math.isfinite(row["train_loss"]) and math.isfinite(row["test_loss"])


def test_too_few_clients_stop_the_run_resumably(ran, federated, monkeypatch):
    honest, fail = FedSGD.client_update, {"now": False}

    def failing(self, silo, content):
        if content["config"]["server-round"] == 2 and fail["now"]:
            raise MemoryError("out of memory")
        return honest(self, silo, content)

    expected = ran("whole")
    monkeypatch.setattr(FedSGD, "client_update", failing)
    fail["now"] = True
    with pytest.raises(AggregationError, match=r"round 2: 0 usable answers.*client 0: MemoryError: out of memory"):
        ran("stopped")
    fail["now"] = False
    assert same(ran("stopped", resume=True), expected)


def test_a_failure_in_the_evaluation_is_recorded_too(ran, monkeypatch):
    honest = Classifier.evaluate

    def failing(self, model, batch):
        if len(batch) == 4:  # the validation sets of the clients 0 and 1
            raise MemoryError("out of memory")
        return honest(self, model, batch)

    monkeypatch.setattr(Classifier, "evaluate", failing)
    rows = ran()
    assert rows[0]["failed"][0] == "client 0: MemoryError: out of memory"
    assert rows[0]["failures"] == 2 and rows[0]["clients"] == 0
    assert rows[1]["failures"] == 2 and rows[1]["clients"] == 3


def test_batch_norms_buffers_are_part_of_the_global_model(ran, tmp_path):
    # `test_resnet` is timm's smallest; images of 4x4 suffice for one forward pass of it
    ran(changes={"learner": {"name": "classifier", "model": "test_resnet"}, "strategy__fraction": 0.67})
    final = load_weights(tmp_path / "run" / "model.safetensors")
    kept = Checkpoint.load(tmp_path / "run" / "checkpoint.safetensors").arrays
    assert final["bn1.num_batches_tracked"] == 3 and final["bn1.num_batches_tracked"].dtype == torch.int64
    assert final["bn1.running_mean"].any()
    assert all(torch.equal(final[name], kept[name]) for name in kept)


def test_a_checkpoint_holds_the_final_model(ran, tmp_path):
    ran()
    kept = Checkpoint.load(tmp_path / "run" / "checkpoint.safetensors")
    final = load_weights(tmp_path / "run" / "model.safetensors")
    assert kept.round == 3 and kept.identity == "identity"
    assert all(torch.equal(kept.arrays[name], final[name]) for name in final)
    assert kept.strategy["state"][0]["step"] == 3


def test_what_clients_keep_is_checkpointed(ran, tmp_path):
    ran(changes={"strategy": {"name": "scaffold"}})
    kept = Checkpoint.load(tmp_path / "run" / "checkpoint.safetensors")
    assert set(kept.clients) == {0, 1, 2}
    assert any(tensor.any() for tensor in unpack(kept.clients[0]["control"]).values())
