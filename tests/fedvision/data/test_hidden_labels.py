"""``[labels]``: which training labels learners may see."""

import numpy as np
import pytest
import torch

from benchmarks import display
from fedvision.data import FederatedData
from fedvision.data.labels import Labels
from fedvision.errors import DataError, ExperimentError
from fedvision.experiment import Experiment

TABLES = {
    "name": "few",
    "rounds": 1,
    "data": {"name": "digits"},
    "partition": {"name": "iid", "clients": 5},
    "learner": {"name": "classifier"},
    "strategy": {"name": "fedavg"},
}


def loaded(**changed) -> FederatedData:
    return Experiment.from_tables({**TABLES, **changed}).load_data()


def known(data: FederatedData) -> list[int]:
    return [int((data.train[client].label >= 0).sum()) for client in range(data.num_clients)]


def test_a_count_is_spread_evenly_over_the_classes_and_the_fold_alone_says_which():
    whole, some = loaded(), loaded(labels={"count": 40})
    assert sum(known(some)) == 40 and some.train.sizes == whole.train.sizes
    labels = some.train.examples.label
    assert torch.bincount(labels[labels >= 0], minlength=10).tolist() == [4] * 10
    seen = labels >= 0
    assert torch.equal(labels[seen], whole.train.examples.label[seen]) and torch.equal(
        some.train.examples.image, whole.train.examples.image
    )
    other, again = loaded(labels={"count": 40, "fold": 2}), loaded(labels={"count": 40, "fold": 1}, partition={"name": "iid", "clients": 2})

    def images(data: FederatedData) -> set[bytes]:
        return {image.numpy().tobytes() for image in data.train.examples.image[data.train.examples.label >= 0]}

    assert images(some) == images(again) != images(other)
    assert list(some.train.examples.fields) == list(whole.train.examples.fields) and torch.equal(some.test.label, whole.test.label)


def test_a_fraction_is_of_each_client_and_at_least_one():
    some = loaded(labels={"fraction": 0.1})
    assert known(some) == [round(0.1 * size) for size in some.train.sizes]
    assert known(loaded(labels={"fraction": 0.0001})) == [1] * 5


def test_some_clients_may_have_no_labels():
    assert known(loaded(labels={"fraction": 0.1, "unlabeled_clients": 2}))[3:] == [0, 0]


def test_labels_at_the_server_leave_none_at_the_clients():
    some = loaded(labels={"count": 40, "at": "server"})
    assert known(some) == [0] * 5 and some.server is not None
    assert torch.bincount(some.server.label).tolist() == [4] * 10
    assert some.digest != loaded().digest and list(some.server.fields) == ["image", "label"]


def test_unlabeled_examples_may_be_dropped():
    some = loaded(labels={"count": 40, "drop": True}, partition={"name": "iid", "clients": 2})
    assert sum(some.train.sizes) == 40 and int(some.train.examples.label.min()) >= 0


def test_validation_keeps_its_labels():
    some = loaded(labels={"count": 40}, validation_fraction=0.2)
    assert int(some.validation.examples.label.min()) >= 0 and list(some.validation.examples.fields) == ["image", "label"]


def test_a_table_is_written_out_and_counts_for_the_fingerprint():
    some = Experiment.from_tables({**TABLES, "labels": {"count": 40}})
    assert Experiment.parse(some.to_toml()) == some and some.labels == Labels(count=40)
    assert some.fingerprint != Experiment.from_tables(TABLES).fingerprint


def test_users_may_bring_examples_without_labels():
    x = np.zeros((3, 1, 4, 4), np.float32)
    data = FederatedData.from_arrays(train=[(x, [0, -1, 2])], test=(x, [0, 1, 2]))
    assert data.train[0].label.tolist() == [0, -1, 2] and data.classes == 3
    with pytest.raises(DataError, match="test: labels must be class indices"):
        FederatedData.from_arrays(train=[(x, [0, -1, 2])], test=(x, [0, -1, 2]))


@pytest.mark.parametrize(
    ("table", "error", "reason"),
    [
        ({}, ExperimentError, "count = None, fraction = None: give one of the two"),
        ({"count": 3, "fraction": 0.5}, ExperimentError, "count = 3, fraction = 0.5: give one of the two"),
        ({"fraction": 0.0}, ExperimentError, r"labels.fraction = 0.0: expected number > 0 and <= 1"),
        ({"cuont": 3}, ExperimentError, "labels.cuont: Labels has no such setting; did you mean 'count'"),
        ({"count": 5000}, DataError, "5000 labels were asked for"),
        ({"fraction": 0.5, "unlabeled_clients": 5}, DataError, "unlabeled_clients = 5: the data has 5 clients"),
        ({"count": 40, "at": "server", "drop": True}, ExperimentError, "no client has labels then"),
        ({"count": 1, "drop": True}, DataError, r"client\(s\) .* hold no training example"),
        (7, ExperimentError, r"labels: expected a table, as \[labels\] count = 40; got 7"),
    ],
)
def test_wrong_labels_are_refused(table, error, reason):
    with pytest.raises(error, match=reason):
        loaded(labels=table)


@pytest.mark.parametrize("strategy", ["fedsgd", "fedavg"])
def test_a_learner_that_needs_labels_says_so(strategy):
    from fedvision.assembly import Assembly

    tables = {**TABLES, "labels": {"count": 40}, "strategy": {"name": strategy}}
    with pytest.raises(
        ExperimentError, match=r"1398 of 1438 training examples have no label, which learner classifier needs; .* drop = true"
    ):
        Assembly.of(Experiment.from_tables(tables))


def test_the_card_says_what_is_unlabeled_and_what_the_server_has(capsys):
    display.print_card(display.Console(width=200), loaded(labels={"fraction": 0.1}))
    some = capsys.readouterr().out
    assert "unlabeled" in some and "global distribution of known labels" in some
    display.print_card(display.Console(width=200), loaded(labels={"count": 40, "at": "server"}))
    none = capsys.readouterr().out
    assert "the server trains on 40 labeled examples of its own" in none and "no client has a label" in none
    display.print_card(display.Console(width=200), loaded())
    assert "unlabeled" not in capsys.readouterr().out
