from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Lt

from fedvision.errors import ExperimentError
from fedvision.settings import (
    Count,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    PositiveFraction,
    check,
    describe,
    nearest,
    parameters,
    resolve,
)


def default_table() -> dict[str, Any]:
    return {"name": "Adam", "lr": 0.1}


@dataclass(kw_only=True)
class Thing:
    size: Count
    share: Fraction = 0.5
    mode: Literal["exact", "stale"] = "exact"
    widths: tuple[Count, ...] | None = None
    table: dict[str, Any] = field(default_factory=default_table)
    memory: list[int] = field(default_factory=list, init=False)


def thing(**values):
    return resolve(Thing, {"size": 2, **values}, "thing")


def test_defaults_are_filled_in():
    assert thing() == {"size": 2, "share": 0.5, "mode": "exact", "widths": None, "table": default_table()}


def test_defaults_that_are_tables_are_not_shared():
    first = thing()
    first["table"]["lr"] = 7
    assert thing()["table"]["lr"] == 0.1


def test_whole_numbers_pass_as_numbers_and_lists_as_tuples():
    values = thing(share=1, widths=[3, 4])
    assert values["share"] == 1.0 and isinstance(values["share"], float)
    assert values["widths"] == (3, 4)


def test_a_table_without_a_name_refines_the_default_one():
    assert thing(table={"lr": 0.2})["table"] == {"name": "Adam", "lr": 0.2}


def test_a_table_with_a_name_replaces_the_default_one():
    assert thing(table={"name": "SGD"})["table"] == {"name": "SGD"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"sise": 3}, "thing.sise: Thing has no such setting; did you mean 'size'? known: mode, share, size, table, widths"),
        ({"memory": []}, "no such setting"),
        ({"size": "3"}, "thing.size = '3': expected whole number >= 1"),
        ({"size": 2.5}, "expected whole number"),
        ({"size": True}, "expected whole number"),
        ({"size": 0}, "expected whole number >= 1"),
        ({"share": 1.5}, "thing.share = 1.5: expected number >= 0 and <= 1"),
        ({"share": float("nan")}, "expected number"),
        ({"share": "half"}, "expected number"),
        ({"mode": "fast"}, "expected one of 'exact', 'stale'"),
        ({"widths": [3, 0]}, "expected list of whole number"),
        ({"widths": 3}, "expected list of whole number"),
        ({"table": 3}, "expected table"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key_and_what_was_expected(value, message):
    with pytest.raises(ExperimentError) as caught:
        thing(**value)
    assert message in str(caught.value)


def test_a_missing_setting_is_named_with_its_type():
    with pytest.raises(ExperimentError, match=r"thing.size is missing; Thing needs it \(whole number >= 1\)"):
        resolve(Thing, {}, "thing")


def test_what_the_caller_supplies_is_no_setting():
    assert "size" not in resolve(Thing, {}, "thing", without=frozenset({"size"}))
    with pytest.raises(ExperimentError, match="no such setting"):
        resolve(Thing, {"size": 1}, "thing", without=frozenset({"size"}))


def test_functions_have_settings_too():
    def load(path: str, *rest: int, limit: Natural = 3, **more: Any) -> None: ...

    assert list(parameters(load)) == ["path", "limit"]
    assert resolve(load, {"path": "x"}, "data") == {"path": "x", "limit": 3}


def test_what_is_not_annotated_is_not_checked():
    def load(anything, other="x"): ...

    assert resolve(load, {"anything": [1, "a"]}, "data") == {"anything": [1, "a"], "other": "x"}


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        (Fraction, [0, 1, 0.5], [-0.1, 1.1]),
        (PositiveFraction, [1e-9, 1], [0, 1.1]),
        (Positive, [1e-9, 7], [0, -1]),
        (NonNegative, [0, 7.5], [-1e-9]),
        (Count, [1, 9], [0, -1]),
        (Natural, [0, 9], [-1]),
        (Annotated[float, Ge(0), Lt(0.5)], [0, 0.4], [0.5]),
    ],
)
def test_ranges_end_where_they_say(annotation, good, bad):
    for value in good:
        assert check(value, annotation, "x") == value
    for value in bad:
        with pytest.raises(ExperimentError, match="expected"):
            check(value, annotation, "x")


def test_types_are_described_in_words():
    assert describe(list[str]) == "list of text"
    assert describe(int | None) == "whole number"
    assert describe(bool) == "true or false"
    assert describe(dict[str, Any]) == "table"
    assert describe(PositiveFraction) == "number > 0 and <= 1"
    assert describe(Annotated[float, Ge(0), Lt(0.5)]) == "number >= 0 and < 0.5"


def test_a_hint_guesses_only_what_is_near():
    assert nearest("fedsdg", ["fedavg", "fedsgd"]).startswith("did you mean 'fedsgd'?")
    assert nearest("zzz", ["fedavg", "fedsgd"]) == "known: fedavg, fedsgd"
    assert nearest("zzz", []) == "known: none"
