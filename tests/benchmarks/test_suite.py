from pathlib import Path

import pytest
import tomli_w
import torch

from benchmarks.bench import stages
from benchmarks.suite import Suite, bundled, folder
from fedvision.assembly import Assembly
from fedvision.errors import ExperimentError
from fedvision.experiment import Experiment, merged

FISHR = {"label": "Fishr", "strategy": {"name": "fishr"}}


@pytest.fixture
def load(write_suite):
    """Loads the small suite with changes by dotted key; other arguments go to ``Suite.load``."""

    def load(changes=None, **arguments) -> Suite:
        return Suite.load(write_suite(changes), **arguments)

    return load


def of(suite: Suite, row: str, column: str = "digits") -> Experiment:
    """The experiment of a row's first seed."""
    return next(cell.experiment for cell in suite.cells if (cell.row, cell.column, cell.seed) == (row, column, 0))


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", sorted(bundled()))
def test_every_cell_of_a_bundled_suite_resolves(name, quick):
    suite = Suite.load(name, quick, seeds=2)
    runs = len(suite.strategies) * len(suite.experiments) + sum(len(sweep.rows) * len(sweep.values) for sweep in suite.sweeps)
    assert len(suite.cells) == suite.seeds * runs > 0
    for cell in suite.cells:
        asked = suite.strategies[cell.row].strategy
        assert asked is None or cell.experiment.strategy.name == asked["name"]
        assert cell.experiment.seed == cell.seed
        cell.experiment.build_strategy()


@pytest.mark.parametrize("name", sorted(bundled()))
def test_the_quick_form_of_a_bundled_suite_is_smaller(name):
    def work(suite: Suite) -> int:
        return sum(cell.experiment.rounds for cell in suite.cells)

    assert work(Suite.load(name, quick=True)) < work(Suite.load(name)) / 3


def test_quick_replaces_what_it_names_and_nothing_else(load):
    changes = {
        "experiments.digits.set": {"rounds": 9, "threads": 2},
        "quick": {"seeds": 1, "experiments": {"digits": {"set": {"rounds": 1}}}},
    }
    whole, quick = load(changes), load(changes, quick=True)
    assert (whole.seeds, quick.seeds) == (2, 1)
    assert (of(whole, "fedsgd").rounds, of(quick, "fedsgd").rounds) == (9, 1)
    assert of(whole, "fedsgd").threads == of(quick, "fedsgd").threads == 2
    assert quick.experiments["digits"].title == "Digits"


def test_seeds_that_are_asked_for_count_more_than_the_quick_ones(load):
    assert {cell.seed for cell in load({"quick": {"seeds": 1}}, quick=True, seeds=3).cells} == {0, 1, 2}


def test_seeds_come_one_after_the_other_so_that_all_rows_fill_up_together(load):
    assert [(cell.seed, cell.row) for cell in load().cells] == [(0, "fedsgd"), (0, "fedavg"), (1, "fedsgd"), (1, "fedavg")]


def test_only_keeps_the_rows_and_columns_that_it_names():
    suite = Suite.load("fedilc", seeds=1)
    some = suite.only(["fishr-inter-geo", "synthetic-icu"])
    assert {(cell.row, cell.column) for cell in some.cells} == {("fishr-inter-geo", "synthetic-icu")}
    assert {cell.swept for cell in some.cells} == {
        None,
        *(("Figure 2: OOD test loss against lambda", value) for value in (0.0, 0.01, 0.1, 1.0, 10.0)),
    }
    assert {cell.column for cell in suite.only(["fedsgd"]).cells} == set(suite.experiments)
    assert {cell.row for cell in suite.only(["color-digits"]).cells} == set(suite.strategies)
    assert suite.only([]).cells == suite.cells


def test_only_changes_no_cell_that_it_keeps():
    suite = Suite.load("fedilc", seeds=1)
    assert set(map(repr, suite.only(["fishr"]).cells)) < set(map(repr, suite.cells))


def test_only_refuses_an_unknown_name_with_the_nearest(load):
    with pytest.raises(ExperimentError, match=r"--only fedsdg: no strategy or experiment of 'small'; did you mean 'fedsgd'\?"):
        load().only(["digits", "fedsdg"])


def test_a_strategy_setting_reaches_only_the_strategies_that_have_it(load):
    suite = load(overrides={"strategy.epochs": 3})
    assert of(suite, "fedavg").strategy.settings["epochs"] == 3
    assert "epochs" not in of(suite, "fedsgd").strategy.settings
    assert of(suite, "fedsgd").fingerprint == of(load(), "fedsgd").fingerprint


def test_a_setting_within_a_setting_reaches_the_strategies_that_have_the_outer_one(load):
    suite = load(overrides={"strategy.client_optimizer.lr": 0.5})
    assert of(suite, "fedavg").strategy.settings["client_optimizer"]["lr"] == 0.5
    assert "client_optimizer" not in of(suite, "fedsgd").strategy.settings


def test_an_override_of_anything_else_reaches_every_row(load):
    suite = load(overrides={"rounds": 7, "learner.hidden": [3]})
    assert {(cell.experiment.rounds, tuple(cell.experiment.learner.settings["hidden"])) for cell in suite.cells} == {(7, (3,))}


def test_a_data_setting_reaches_only_the_data_sets_that_have_it():
    suite = Suite.load("fedilc", seeds=1, overrides={"data.root": "/files", "data.download": True})
    assert of(suite, "fedsgd", "color-digits").data.settings["download"] is True
    assert "download" not in of(suite, "fedsgd", "synthetic-icu").data.settings


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("strategy.penalty_weight", "--set strategy.penalty_weight: none of the suite's strategies has that setting"),
        ("strategy.name", "--set strategy.name: none of the suite's strategies has that setting"),
        ("data.colour", "--set data.colour: none of the suite's data sets has that setting"),
        ("data.root", "--set data.root: none of the suite's data sets has that setting"),
        ("seed", "--set seed: a suite runs the seeds 0, 1, ...; say how many with --seeds"),
    ],
)
def test_an_override_that_reaches_no_run_is_refused(load, key, message):
    with pytest.raises(ExperimentError) as caught:
        load(overrides={key: 1})
    assert message in str(caught.value)


def test_an_offer_reaches_only_the_strategies_that_have_the_setting(load):
    changes = {"experiments.digits.offer": {"epochs": 4, "server_optimizer": {"name": "SGD", "lr": 0.5}}}
    suite = load(changes)
    assert of(suite, "fedavg").strategy.settings["epochs"] == 4
    assert "epochs" not in of(suite, "fedsgd").strategy.settings
    assert of(suite, "fedsgd").strategy.settings["server_optimizer"] == {"name": "SGD", "lr": 0.5}


def test_a_rows_own_setting_counts_more_than_an_offer_and_less_than_an_override(load):
    changes = {"experiments.digits.offer": {"epochs": 4}, "strategies.fedavg.strategy": {"name": "fedavg", "epochs": 5}}
    assert of(load(changes), "fedavg").strategy.settings["epochs"] == 5
    assert of(load(changes, overrides={"strategy.epochs": 6}), "fedavg").strategy.settings["epochs"] == 6


def test_a_root_switches_to_the_real_experiments():
    suite = Suite.load("fedilc", seeds=1, overrides={"data.root": "/files"})
    data = {name: of(suite, "fedsgd", name).data for name in suite.experiments}
    assert {name: some.name for name, some in data.items()} == {
        "color-digits": "color-mnist",
        "rotated-digits": "rotated-cifar10",
        "synthetic-icu": "eicu",
    }
    assert data["color-digits"].settings["root"] == data["rotated-digits"].settings["root"] == "/files"
    assert data["synthetic-icu"].settings["path"] == "/files/eicu.csv"
    assert of(suite, "fedsgd", "color-digits").rounds == Experiment.load("color-mnist").rounds


def test_a_root_goes_to_an_experiment_that_reads_files_itself(load):
    suite = load({"experiments.digits.experiment": "color-mnist"}, overrides={"data.root": "/files"})
    assert of(suite, "fedsgd").data.settings["root"] == "/files"


def test_a_seed_fixes_data_and_initial_weights_for_all_rows_alike(load):
    suite = load({"strategies.fishr": FISHR, "experiments.digits.experiment": "quickstart"}, overrides={"learner.hidden": [4]})
    built = {(cell.seed, cell.row): Assembly.of(cell.experiment) for cell in suite.cells}

    def same(a: Assembly, b: Assembly) -> bool:
        weights = all(torch.equal(a.initial[name], b.initial[name]) for name in a.initial)
        assert weights == (a.data.digest == b.data.digest)
        return weights

    for seed in range(2):
        assert all(same(built[seed, "fedsgd"], built[seed, row]) for row in suite.strategies)
    assert not same(built[0, "fedsgd"], built[1, "fedsgd"])


def test_cells_of_equal_experiments_share_one_folder(load, tmp_path):
    sweep = {"title": "Epochs", "column": "digits", "rows": ["fedavg"], "key": "strategy.epochs", "values": [1, 2]}
    twin = {"label": "FedAvg again", "strategy": {"name": "fedavg", "epochs": 1}}
    suite = load({"sweeps": [sweep], "strategies.twin": twin}, seeds=1)
    folders = {(cell.row, cell.swept): folder(tmp_path, cell.experiment) for cell in suite.cells}
    assert folders["fedavg", None] == folders["twin", None] == folders["fedavg", ("Epochs", 1)]
    assert len(set(folders.values())) == 3  # fedsgd, and fedavg with one and with two epochs
    assert all(path.is_relative_to(tmp_path) for path in folders.values())


def test_swept_numbers_stay_whole(load):
    sweep = {"title": "Epochs", "column": "digits", "rows": ["fedavg"], "key": "strategy.epochs", "values": [1, 2]}
    swept = [cell.experiment.strategy.settings["epochs"] for cell in load({"sweeps": [sweep]}, seeds=1).cells if cell.swept]
    assert swept == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": 2}, "suite.toml.sedes: Suite has no such setting; did you mean 'seeds'?"),
        ({"seeds": 0}, "suite.toml.seeds = 0: expected whole number >= 1"),
        ({"overrides": {}}, "suite.toml.overrides: Suite has no such setting"),
        ({"quick": 3}, "suite.toml.quick = 3: expected table"),
        ({"strategies.fedavg.lable": "x"}, "suite.toml.strategies.fedavg.lable: Row has no such setting; did you mean 'label'?"),
        ({"strategies.fedavg": "fedavg"}, "suite.toml.strategies.fedavg = 'fedavg': expected table"),
        ({"strategies.fedavg.strategy": {"epochs": 1}}, 'small.strategies.fedavg.strategy has no name; write strategy = { name = "..." }'),
        ({"strategies.fedavg.strategy.name": "fedavgg"}, "unknown strategy 'fedavgg'; did you mean 'fedavg'?"),
        ({"experiments.digits.tilte": "x"}, "suite.toml.experiments.digits.tilte: Column has no such setting; did you mean 'title'?"),
        (
            {"experiments.digits.offer": {"epoch": 2}},
            "small.experiments.digits.offer: setting 'epoch' is not in the suite; did you mean 'epochs'?",
        ),
        (
            {"experiments.digits.paper": {"test_loss": {"fedsdg": [1, 2]}}},
            "paper.test_loss: row 'fedsdg' is not in the suite; did you mean 'fedsgd'?",
        ),
        ({"experiments.digits.paper": {"test_loss": {"fedsgd": [1]}}}, "digits.paper = {'test_loss': {'fedsgd': [1]}}: expected table"),
        ({"experiments.digits.target": {"metric": "test_loss"}}, "digits.target = {'metric': 'test_loss'}: expected Target"),
        ({"tables": [{"title": "x"}]}, "suite.toml.tables.1.metric is missing"),
        (
            {"tables": [{"title": "x", "metric": "y", "better": "less"}]},
            "suite.toml.tables.1.better = 'less': expected one of 'lower', 'higher'",
        ),
        (
            {"tables": [{"title": "x", "metric": "y", "columns": ["digit"]}]},
            "small.tables: column 'digit' is not in the suite; did you mean 'digits'?",
        ),
        (
            {"tables": [{"title": "x", "metric": "y", "rows": ["fedavgg"]}]},
            "small.tables: row 'fedavgg' is not in the suite; did you mean 'fedavg'?",
        ),
        ({"tables": 3}, "suite.toml.tables = 3: expected list of Report"),
        ({"sweeps": [{"title": "x", "column": "digit", "rows": [], "key": "rounds", "values": [1]}]}, "small.sweeps: column 'digit'"),
        (
            {"sweeps": [{"title": "x", "column": "digits", "rows": ["fedavgg"], "key": "rounds", "values": [1]}]},
            "small.sweeps: row 'fedavgg'",
        ),
    ],
)
def test_a_wrong_suite_is_refused_by_key(load, changes, message):
    with pytest.raises(ExperimentError) as caught:
        load(changes, quick=True)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"experiments.digits.experiment": "quickstrat"},
            "no experiment 'quickstrat': neither a file nor a bundled experiment; did you mean 'quickstart'?",
        ),
        ({"experiments.digits.set": {"ruonds": 3}}, "small/digits/fedsgd: ruonds: no such key; did you mean 'rounds'?"),
        (
            {"strategies.fedavg.strategy.epoch": 3},
            "small/digits/fedavg: strategy.epoch: FedAvg has no such setting; did you mean 'epochs'?",
        ),
        (
            {"sweeps": [{"title": "x", "column": "digits", "rows": ["fedavg"], "key": "strategy.epoch", "values": [1]}]},
            "strategy.epoch: FedAvg",
        ),
    ],
)
def test_a_wrong_cell_is_refused_before_anything_runs(load, changes, message):
    with pytest.raises(ExperimentError) as caught:
        _ = load(changes).cells
    assert message in str(caught.value)


def test_a_file_that_is_no_toml_or_no_text_is_refused(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("seeds = = 3")
    with pytest.raises(ExperimentError, match=r"mine\.toml: cannot be read as a suite: Invalid value"):
        Suite.load(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ExperimentError, match=r"mine\.toml: cannot be read as a suite"):
        Suite.load(file)


def test_an_unknown_suite_is_refused_with_the_nearest():
    with pytest.raises(ExperimentError, match=r"no suite 'fedicl': neither a file nor a bundled suite; did you mean 'fedilc'\?"):
        Suite.load("fedicl")


def test_rows_may_differ_in_other_settings_than_the_strategy(here):
    tables = {
        "name": "methods",
        "title": "Methods",
        "seeds": 1,
        "rows_are": "method",
        "strategies": {
            "narrow": {"label": "Narrow", "set": {"learner.hidden": [2]}},
            "wide": {"label": "Wide", "strategy": {"name": "fedavg"}, "set": {"learner.hidden": [8], "rounds": 5}},
        },
        "experiments": {"mine": {"experiment": "mine.toml", "title": "mine", "set": {"rounds": 3}, "offer": {"chunk_size": 7}}},
        "tables": [],
    }
    (here / "methods.toml").write_text(tomli_w.dumps(tables))
    narrow, wide = (cell.experiment for cell in Suite.load("methods.toml").cells)
    assert [list(one.learner.settings["hidden"]) for one in (narrow, wide)] == [[2], [8]]
    assert (narrow.strategy.name, narrow.strategy.settings["chunk_size"], wide.strategy.name) == ("fedsgd", 7, "fedavg")
    assert (narrow.rounds, wide.rounds) == (3, 5), "a row's own settings come before the column's"
    assert Suite.load("methods.toml", overrides={"rounds": 2}).cells[1].experiment.rounds == 2


@pytest.fixture
def chained(here):
    """A suite whose second column begins with the runs of its first."""
    tables = {
        "name": "chained",
        "title": "Chained",
        "seeds": 2,
        "strategies": {"narrow": {"label": "Narrow", "set": {"learner.hidden": [2]}}, "wide": {"label": "Wide"}},
        "experiments": {
            "first": {"experiment": "mine.toml", "title": "first"},
            "then": {"experiment": "mine.toml", "title": "then", "after": "first", "into": "name", "set": {"rounds": 7}},
        },
        "tables": [],
        "sweeps": [{"title": "rate", "column": "then", "rows": ["wide"], "key": "rounds", "values": [4, 5]}],
    }

    def load(changes=None, **arguments):
        (here / "chained.toml").write_text(tomli_w.dumps(merged(tables, changes or {})))
        return Suite.load("chained.toml", **arguments)

    return load


def test_a_column_may_begin_with_the_runs_of_another_of_the_same_row_and_seed(chained):
    suite = chained().within(Path("elsewhere"))
    first = {(cell.row, cell.seed): cell.experiment for cell in suite.cells if cell.column == "first"}
    then = [cell for cell in suite.cells if cell.column == "then" and cell.swept is None]
    assert len(then) == len(first) == 4
    for cell in then:
        assert cell.before.experiment == first[cell.row, cell.seed]
        assert cell.experiment.name == str(folder(Path("elsewhere"), cell.before.experiment) / "model.safetensors")
        assert cell.experiment.rounds == 7
    assert len({tuple(cell.experiment.learner.settings["hidden"]) for cell in then}) == 1, "rows speak of the first run"
    assert {tuple(one.learner.settings["hidden"]) for one in first.values()} > {(2,)}


def test_what_is_swept_is_swept_in_the_run_that_comes_before(chained):
    swept = [cell for cell in chained().cells if cell.swept]
    assert [(cell.before.experiment.rounds, cell.experiment.rounds) for cell in swept] == [(4, 7), (5, 7)] * 2


def test_runs_that_others_begin_with_come_first_and_once(chained):
    before, after = stages(chained().within(Path("here")))
    assert len(before) == 2 * 2 + 2 * 2, "those that the sweep begins with are no cells by themselves"
    assert len(after) == 2 * 2 + 2 * 2
    assert not before.keys() & after.keys()


LAST = {"experiments.last": {"experiment": "mine.toml", "title": "last", "after": "then", "into": "name", "set": {"rounds": 8}}}


def test_a_chain_of_columns_runs_link_by_link(chained):
    suite = chained(LAST).within(Path("here"))
    assert [{run.rounds for run in stage.values()} for stage in stages(suite)] == [{3, 4, 5}, {7}, {8}]
    cell = next(cell for cell in suite.cells if cell.column == "last")
    assert [link.column for link in cell.chain] == ["first", "then", "last"]
    assert cell.experiment.name == str(folder(Path("here"), cell.before.experiment) / "model.safetensors")


def test_naming_a_column_keeps_the_one_that_it_begins_with(chained):
    assert list(chained().only(["then", "wide"]).experiments) == ["first", "then"]
    assert list(chained().only(["first"]).experiments) == ["first"]
    assert list(chained(LAST).only(["last"]).experiments) == ["first", "then", "last"]


@pytest.mark.parametrize(("after", "reason"), [("frist", "did you mean 'first'"), ("then", "after = 'then' does not stand above it")])
def test_a_column_can_begin_only_with_one_above_it(chained, after, reason):
    with pytest.raises(ExperimentError, match=reason):
        chained({"experiments.then.after": after})
