"""What a silo says of its own data."""

import pytest
import torch

from fedvision.assembly import Assembly
from fedvision.errors import DataError, RunError
from fedvision.experiment import Experiment
from fedvision.own_data import OwnData


def told(tmp_path, text: str) -> OwnData:
    (tmp_path / "silo.toml").write_text(text)
    return OwnData.load(tmp_path / "silo.toml")


def test_a_silo_that_names_no_data_has_its_share_of_the_experiments(tmp_path):
    assert told(tmp_path, "# nothing\n").dealt(Experiment.load("quickstart"), 1) is None


def test_all_of_a_silos_data_is_its_own(tmp_path):
    experiment = Experiment.load("quickstart", {"validation_fraction": 0.5})
    own = told(tmp_path, '[data]\nname = "digits"\n').dealt(experiment, 2)
    whole = Experiment.load("quickstart", {"data": {"name": "digits"}, "partition": {"name": "iid", "clients": 1}}).load_data()
    assert own.train.sizes[:2] == [0, 0] and own.validation.sizes[:2] == [0, 0]
    assert len(own.train[2]) + len(own.validation[2]) == len(whole.train[0])


def test_a_silo_may_know_fewer_classes_than_the_federation(tmp_path):
    assert told(tmp_path, 'classes = 12\n[data]\nname = "digits"\n').dealt(Experiment.load("quickstart"), 0).classes == 12
    with pytest.raises(DataError, match=r"has 10 classes, classes = 3"):
        told(tmp_path, 'classes = 3\n[data]\nname = "digits"\n').dealt(Experiment.load("quickstart"), 0)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("rounds = 3\n", "rounds: a silo does not decide this"),
        ('[data]\nname = "digit"\n', "unknown data set 'digit'; did you mean 'digits'"),
        ('[data]\nname = "digits"\nroot = 1\n', "data.root: .* has no such setting"),
        ("classes = 0\n", "classes = 0"),
        ("classes = \n", "cannot be read"),
    ],
)
def test_a_wrong_file_is_answered_with_what_is_wrong(tmp_path, text, fact):
    with pytest.raises(DataError, match=fact):
        told(tmp_path, text)


def test_a_file_that_is_not_there_is_no_silent_default(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        OwnData.load(tmp_path / "absent.toml")


def test_a_model_for_other_data_is_refused(tmp_path):
    experiment = Experiment.load("quickstart")
    assembly = Assembly.of(experiment, told(tmp_path, '[data]\nname = "digits"\n').dealt(experiment, 0))
    theirs = {name: torch.zeros(1) for name in assembly.initial}
    with pytest.raises(RunError, match=r"do not fit the model.*; mend it"):
        assembly.check_fits(theirs, "mend it")
