"""``[modalities]``: which silo has what."""

from io import StringIO

import pytest
import torch
from rich.console import Console

from benchmarks import display
from fedvision.data import FederatedData
from fedvision.data.card import card
from fedvision.data.examples import IGNORED, Examples
from fedvision.data.federated import Silos
from fedvision.data.modalities import Modalities, blanked
from fedvision.errors import DataError, ExperimentError
from fedvision.experiment import Experiment

TABLES = {
    "name": "lacking",
    "rounds": 1,
    "data": {"name": "scenes", "examples": 60, "test_examples": 10, "fields": ["image", "label", "depth", "semseg", "caption"]},
    "partition": {"name": "iid", "clients": 4},
    "learner": {"name": "classifier"},
    "strategy": {"name": "fedavg"},
    "validation_fraction": 0.2,
}
THREE = [["image"], ["image", "depth"], ["depth", "semseg"]]


def loaded(**changed) -> FederatedData:
    return Experiment.from_tables({**TABLES, **changed}).load_data()


@pytest.fixture(scope="module")
def whole() -> FederatedData:
    return loaded()


@pytest.fixture(scope="module")
def some() -> FederatedData:
    return loaded(modalities={"silos": THREE})


@pytest.mark.parametrize(("field", "nothing"), [("verdict", -1), ("truth", -1), ("answer", 0), ("semseg", IGNORED)])
def test_what_is_missing_has_the_value_that_means_nothing(field, nothing):
    values = torch.ones(2, 3, dtype=torch.int64)
    assert blanked(field, values, torch.tensor([True, False])).tolist() == [[1, 1, 1], [nothing] * 3]


def had(silos: Silos, field: str) -> list[bool]:
    """Whether all of a client's examples have a field; none may be in between."""
    each = [silos[client].having(field) for client in range(len(silos))]
    assert all(mask.all() or not mask.any() for mask in each)
    return [bool(mask.all()) for mask in each]


@pytest.mark.parametrize("part", ["train", "validation"])
def test_client_i_has_the_fields_of_entry_i_modulo_their_number(some, part):
    silos = getattr(some, part)
    assert had(silos, "image") == [True, True, False, True]
    assert had(silos, "depth") == [False, True, True, False]
    assert had(silos, "semseg") == [False, False, True, False]


def test_what_is_missing_is_overwritten_and_all_else_is_as_it_was(whole, some):
    nothing = {"image": 0, "depth": 0, "semseg": IGNORED}
    for client in range(4):
        before, after = whole.train[client].fields, some.train[client]
        for name, values in before.items():
            assert after.fields[name].dtype == values.dtype
            if after.having(name).all():
                assert torch.equal(after.fields[name], values)
            else:
                assert (after.fields[name] == nothing[name]).all()


def test_the_test_set_and_the_servers_own_examples_keep_everything(whole, some):
    assert some.test.fields.keys() == whole.test.fields.keys()
    assert all(torch.equal(values, whole.test.fields[name]) for name, values in some.test.fields.items())
    at_server = loaded(modalities={"silos": THREE}, labels={"count": 20, "at": "server"})
    assert at_server.server is not None and at_server.server.having("semseg").all() and at_server.server.fields["depth"].any()
    assert had(at_server.train, "depth") == [False, True, True, False]


def test_the_data_themselves_are_not_written_to(whole):
    before = whole.train.examples.fields["depth"].clone()
    Modalities(silos=(("image",), ("depth",))).hidden(whole)
    assert torch.equal(whole.train.examples.fields["depth"], before)


def test_fields_that_no_entry_names_and_fields_that_all_have_are_not_marked(some):
    marked = loaded(modalities={"silos": [["image"], ["image", "depth"]]})
    assert "has_image" not in marked.train.examples and "has_caption" not in some.train.examples
    assert marked.train.examples.having("semseg").all()


def test_examples_that_lacked_a_field_before_still_do(whole):
    lacking = torch.arange(len(whole.train.examples)) % 2 == 0
    silos = Silos(Examples({**whole.train.examples.fields, "has_depth": lacking}), whole.train.offsets)
    data = FederatedData("lacking", silos, None, whole.test, 10)
    hidden = Modalities(silos=(("image",), ("image", "depth"))).hidden(data)
    assert not hidden.train[0].having("depth").any()
    assert torch.equal(hidden.train[1].having("depth"), silos[1].having("depth"))


def test_it_is_part_of_the_experiment_and_of_its_fingerprint():
    plain, lacking = (Experiment.from_tables({**TABLES, **more}) for more in ({}, {"modalities": {"silos": THREE}}))
    assert plain.fingerprint != lacking.fingerprint
    assert "modalities" not in plain.tables() and lacking.tables()["modalities"] == {"silos": THREE}
    assert Experiment.parse(lacking.to_toml()) == lacking
    assert Experiment.load(plain, {"modalities.silos": THREE}) == lacking


def test_the_data_card_shows_which_silo_has_what(some):
    held = card(some).held
    sizes = some.train.sizes
    assert {field: counts.tolist() for field, counts in held.items()} == {
        "image": [sizes[0], sizes[1], 0, sizes[3]],
        "depth": [0, sizes[1], sizes[2], 0],
        "semseg": [0, 0, sizes[2], 0],
    }
    out = StringIO()
    display.print_card(Console(file=out, width=200), some)
    assert "with depth" in out.getvalue() and "with caption" not in out.getvalue()


@pytest.mark.parametrize(
    ("silos", "message"),
    [
        ([["image"], []], "a silo is left with nothing; name at least one field"),
        ([], "a silo is left with nothing"),
        ([["image", "label"]], "'label' is no modality"),
        ([["image", "image"]], "names a field twice"),
        ("image", "expected list of list of text"),
    ],
)
def test_wrong_entries_are_refused_before_anything_is_loaded(silos, message):
    with pytest.raises(ExperimentError, match=message):
        Experiment.from_tables({**TABLES, "modalities": {"silos": silos}})


@pytest.mark.parametrize(
    ("silos", "message"),
    [
        ([["image"], ["dept"]], r"'dept', which 'scenes' does not have; did you mean 'depth'\? known: image, caption, depth, semseg"),
        ([["image"]] * 5, "has 5 entries, the data 4 clients"),
    ],
)
def test_entries_that_do_not_fit_the_data_are_refused(silos, message):
    with pytest.raises(DataError, match=message):
        loaded(modalities={"silos": silos})


def test_a_silo_whose_pictures_lack_the_only_field_that_it_would_have_is_refused(whole):
    nowhere = torch.zeros(len(whole.train.examples), dtype=torch.bool)
    silos = Silos(Examples({**whole.train.examples.fields, "has_depth": nowhere}), whole.train.offsets)
    with pytest.raises(DataError, match=r"none of the training examples of client 1 has any of \['depth'\]"):
        Modalities(silos=(("image",), ("depth",))).hidden(FederatedData("lacking", silos, None, whole.test, 10))
