import dataclasses
import tomllib

import pytest
import torch

from fedvision.data import Spec
from fedvision.errors import DataError, ExperimentError
from fedvision.experiment import Experiment, bundled, locate, merged, parse_overrides
from fedvision.seeds import generator

TABLES = {
    "name": "tiny",
    "rounds": 3,
    "data": {"name": "digits"},
    "partition": {"name": "iid", "clients": 2},
    "learner": {"name": "classifier", "model": "mlp", "hidden": [4]},
    "strategy": {"name": "fedavg"},
}


def test_defaults_are_written_out():
    tables = Experiment.from_tables(TABLES).tables()
    assert tables["strategy"]["epochs"] == 1
    assert tables["engine"]["name"] == "in-process"
    assert tables["seed"] == 0
    assert "rng" not in tables["data"] and "seed" not in tables["strategy"]


def test_an_experiment_survives_being_written_and_read():
    experiment = Experiment.from_tables(TABLES)
    again = Experiment.parse(experiment.to_toml())
    assert again == experiment
    assert again.fingerprint == experiment.fingerprint


@pytest.mark.parametrize("name", sorted(bundled()))
def test_every_bundled_experiment_loads_and_survives_being_written(name):
    experiment = Experiment.load(name)
    again = Experiment.parse(experiment.to_toml())
    assert again == experiment
    experiment.build_learner()
    experiment.build_strategy()


def test_the_quickstart_is_the_papers():
    experiment = Experiment.load("quickstart")
    assert (experiment.data.name, experiment.strategy.name) == ("color-digits", "fedsgd")
    model = experiment.build_learner().build(Spec((2, 14, 14), 2), generator(0))
    assert sum(param.numel() for param in model.parameters()) == 306_151
    assert experiment.strategy.settings["server_optimizer"] == {"name": "Adam", "lr": 3e-4, "weight_decay": 1e-2}


def test_an_experiment_is_found_by_path_by_name_and_as_itself(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(Experiment.from_tables(TABLES).to_toml())
    experiment = Experiment.load(file)
    assert experiment == Experiment.load(str(file)) == Experiment.load(experiment) == Experiment.from_tables(TABLES)


def test_overrides_reach_into_tables_and_leave_the_original_alone():
    experiment = Experiment.from_tables(TABLES)
    changed = Experiment.load(experiment, {"strategy.epochs": 2, "rounds": 1})
    assert (changed.strategy.settings["epochs"], changed.rounds) == (2, 1)
    assert (experiment.strategy.settings["epochs"], experiment.rounds) == (1, 3)


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        ({"seed": 1}, True),
        ({"rounds": 4}, True),
        ({"name": "other"}, True),
        ({"threads": 2}, True),
        ({"strategy.epochs": 2}, True),
        ({"learner.hidden": [5]}, True),
        ({"strategy.epochs": 1}, False),
        ({"checkpoint_every": 2}, False),
        ({"tensorboard": False}, False),
        ({"engine.device": "cpu"}, False),
        ({"engine.batch_clients": 1}, False),
        ({"engine.batch_clients": 2}, True),
    ],
)
def test_the_fingerprint_depends_on_what_can_change_a_result(override, changes):
    experiment = Experiment.from_tables(TABLES)
    other = Experiment.load(experiment, override)
    assert (other.fingerprint != experiment.fingerprint) == changes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"ruonds": 3}, "ruonds: no such key; did you mean 'rounds'?"),
        ({"rounds": "3"}, "experiment.rounds = '3': expected whole number >= 0"),
        ({"rounds": -1}, "experiment.rounds = -1"),
        ({"seed": 0.5}, "experiment.seed = 0.5: expected whole number"),
        ({"evaluate_every": 0}, "experiment.evaluate_every = 0"),
        ({"validation_fraction": 2}, "experiment.validation_fraction = 2"),
        ({"strategy.name": "fedavgg"}, "unknown strategy 'fedavgg'; did you mean 'fedavg'?"),
        ({"strategy.epoch": 2}, "strategy.epoch: FedAvg has no such setting; did you mean 'epochs'?"),
        ({"strategy.epochs": "two"}, "strategy.epochs = 'two': expected whole number >= 1"),
        ({"strategy.seed": 2}, "strategy.seed: FedAvg has no such setting"),
        ({"strategy.client_optimizer.momentun": 0.9}, "optimizer SGD has no setting 'momentun'; did you mean 'momentum'?"),
        (
            {"strategy.client_optimizer.lr": -1.0},
            "strategy.client_optimizer: optimizer {'name': 'SGD', 'lr': -1.0}: Invalid learning rate: -1.0",
        ),
        ({"strategy.client_optimizer": {"name": "Sgd"}}, "unknown optimizer 'Sgd'; did you mean 'SGD'?"),
        ({"learner.name": "clasifier"}, "unknown learner 'clasifier'; did you mean 'classifier'?"),
        ({"learner.hidden": [4, "x"]}, "learner.hidden = [4, 'x']: expected list of whole number"),
        ({"data.name": "digit"}, "unknown data set 'digit'; did you mean 'digits'?"),
        ({"data": "digits"}, '[data] name = "..."'),
        ({"partition": {"clients": 2}}, "partition: expected a table with a name"),
        ({"partition.clients": 0}, "partition.clients = 0: expected whole number >= 1"),
        ({"engine.name": "in-proces"}, "unknown engine 'in-proces'; did you mean 'in-process'?"),
        ({"rounds.x": 3}, "'rounds' is a value, not a table"),
    ],
)
def test_a_wrong_value_is_refused_by_key(overrides, message):
    with pytest.raises(ExperimentError) as caught:
        Experiment.from_tables(merged(TABLES, overrides), "my.toml")
    assert message in str(caught.value)


def test_an_error_names_the_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("rounds = 3\nname = 'x'\nruonds = 4")
    with pytest.raises(ExperimentError, match=r"mine\.toml: ruonds"):
        Experiment.load(file)


@pytest.mark.parametrize("missing", ["data", "learner", "strategy"])
def test_a_missing_table_is_named(missing):
    tables = {key: value for key, value in TABLES.items() if key != missing}
    with pytest.raises(ExperimentError, match=rf"\[{missing}\] is missing; add a table"):
        Experiment.from_tables(tables)


@pytest.mark.parametrize("missing", ["name", "rounds"])
def test_a_missing_value_is_named(missing):
    tables = {key: value for key, value in TABLES.items() if key != missing}
    with pytest.raises(ExperimentError, match=rf"experiment.{missing} is missing"):
        Experiment.from_tables(tables)


def test_a_file_that_is_no_toml_is_refused(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("rounds = = 3")
    with pytest.raises(ExperimentError, match="not valid TOML"):
        Experiment.load(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ExperimentError, match="cannot be read"):
        Experiment.load(file)


def test_an_unknown_experiment_hints_at_the_nearest():
    with pytest.raises(ExperimentError, match=r"no experiment 'quickstar'.*did you mean 'quickstart'\?"):
        locate("quickstar")


def test_override_values_follow_tomls_grammar():
    given = [
        "a=1",
        "b = 1.5",
        "c=true",
        "d=[1, 2]",
        "e={x = 1}",
        'f="two words"',
        "g=fedavg",
        "h=/some/path-1.toml",
        "i.j=x:Y",
    ]
    values = list(parse_overrides(given).values())
    assert values == [1, 1.5, True, [1, 2], {"x": 1}, "two words", "fedavg", "/some/path-1.toml", "x:Y"]
    assert list(parse_overrides(given)) == ["a", "b", "c", "d", "e", "f", "g", "h", "i.j"]


@pytest.mark.parametrize("wrong", ["rounds", "=3", "a=two words", "a=[1", "a="])
def test_an_override_that_is_no_toml_is_refused(wrong):
    with pytest.raises(ExperimentError, match="--set"):
        parse_overrides([wrong])


def test_overrides_create_tables_and_leave_their_input_alone():
    tables = {"a": {"b": 1}}
    assert merged(tables, {"a.b": 2, "c.d.e": 3}) == {"a": {"b": 2}, "c": {"d": {"e": 3}}}
    assert tables == {"a": {"b": 1}}


def test_the_data_depends_on_the_seed_alone():
    one, same, other = (Experiment.from_tables(TABLES | {"seed": seed}).load_data().digest for seed in (0, 0, 1))
    assert one == same != other


def test_a_data_set_may_be_a_function_elsewhere(monkeypatch, tmp_path):
    (tmp_path / "my_own_data.py").write_text(
        "from fedvision.data import FederatedData\n"
        "def two(scale: float = 1.0):\n"
        "    pair = ([[0.0], [scale]], [0, 1])\n"
        "    return FederatedData.from_arrays([pair, pair], test=pair)\n"
        "def none():\n"
        "    return 'nothing'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = Experiment.from_tables(TABLES | {"data": {"name": "my_own_data:two", "scale": 3}}).load_data()
    assert data.num_clients == 2 and data.test.image.max() == 3
    with pytest.raises(DataError, match="returned str; return a Pool or FederatedData"):
        Experiment.from_tables(TABLES | {"data": {"name": "my_own_data:none"}}).load_data()


def test_too_many_clients_for_the_data_are_refused():
    with pytest.raises(DataError, match="clients = 5000 is more than the"):
        Experiment.from_tables(TABLES | {"partition": {"name": "iid", "clients": 5000}}).load_data()


def test_the_strategy_draws_its_cohorts_from_the_experiments_seed():
    assert Experiment.from_tables(TABLES | {"seed": 5}).build_strategy().seed == 5


def test_replacing_a_class_keeps_the_settings_that_the_new_one_has_too():
    experiment = Experiment.from_tables(TABLES | {"strategy": {"name": "fedavg", "fraction": 0.5, "epochs": 3}})
    other = Experiment.load(experiment, {"strategy.name": "fedsgd"})
    assert other.strategy.settings["fraction"] == 0.5 and "epochs" not in other.strategy.settings


def test_without_a_partition_every_environment_is_a_client():
    tables = {key: value for key, value in TABLES.items() if key != "partition"} | {"data": {"name": "color-digits"}}
    assert Experiment.from_tables(tables).load_data().num_clients == 5


def test_the_default_engine_can_be_refined_without_naming_it():
    experiment = Experiment.from_tables(TABLES | {"engine": {"device": "cuda:1"}})
    assert (experiment.engine.name, experiment.engine.settings) == ("in-process", {"device": "cuda:1", "batch_clients": 1})


def test_an_experiment_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Experiment.from_tables(TABLES).rounds = 5


def test_the_written_file_is_plain_toml():
    assert tomllib.loads(Experiment.from_tables(TABLES).to_toml())["learner"]["hidden"] == [4]


def test_participants_are_those_of_the_partition(tmp_path):
    everyone = Experiment.load("quickstart", {"data": {"name": "digits"}, "partition": {"name": "iid", "clients": 5}})
    alone = Experiment.load(everyone, {"participants": [2]})
    assert Experiment.parse(alone.to_toml()) == alone
    assert alone.fingerprint != everyone.fingerprint
    assert torch.equal(alone.load_data().train[0].image, everyone.load_data().train[2].image)
