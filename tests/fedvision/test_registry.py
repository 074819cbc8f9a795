import subprocess
import sys

import pytest

from fedvision import registry
from fedvision.errors import ExperimentError
from fedvision.registry import Registry

ALL = {
    "strategies": registry.strategies,
    "learners": registry.learners,
    "datasets": registry.datasets,
    "partitions": registry.partitions,
    "engines": registry.engines,
}


@pytest.fixture
def shelf() -> Registry:
    return Registry("thing", "fedvision.grids")


def test_a_registered_class_is_found_by_name(shelf):
    @shelf("box")
    class Box:
        """A box.

        It is square.
        """

    assert shelf.find("box") is Box
    assert shelf.names() == ["box"]
    assert shelf.summary("box") == "A box."


def test_a_taken_name_is_refused(shelf):
    shelf("box")(int)
    with pytest.raises(ExperimentError, match=r"the thing name 'box' is taken by <class 'int'>; choose another"):
        shelf("box")(float)


def test_a_module_may_be_imported_again(shelf):
    def again():
        class Box: ...

        return Box

    shelf("box")(again())
    latest = again()
    shelf("box")(latest)
    assert shelf.find("box") is latest


def test_an_unknown_name_hints_at_the_nearest(shelf):
    shelf("box")(int)
    with pytest.raises(ExperimentError, match=r"unknown thing 'bux'; did you mean 'box'\? known: box, or 'package.module:Name'"):
        shelf.find("bux")


def test_a_class_elsewhere_is_found_by_its_dotted_name(shelf):
    assert shelf.find("collections:OrderedDict").__name__ == "OrderedDict"


@pytest.mark.parametrize("name", ["nowhere.module:Class", "collections:Nothing", ":Class", "collections:", "..x:Class", "a b:c"])
def test_a_dotted_name_that_leads_nowhere_is_refused(shelf, name):
    with pytest.raises(ExperimentError, match=r"cannot be imported.*write 'package.module:Name'"):
        shelf.find(name)


def test_a_dotted_name_of_a_value_is_refused(shelf):
    with pytest.raises(ExperimentError, match=r"'math:pi' is 3\.14.*neither a class nor a function"):
        shelf.find("math:pi")


@pytest.mark.parametrize("kind", ALL)
def test_everything_that_is_registered_has_a_summary(kind):
    names = ALL[kind].names()
    assert names
    for name in names:
        summary = ALL[kind].summary(name)
        assert summary, f"{name} has no docstring"
        assert summary.endswith("."), f"the summary of {name} is no sentence: {summary!r}"


def test_the_names_that_the_readme_promises_are_there():
    assert {"fedsgd", "geometric", "fedavg"} <= set(registry.strategies.names())
    assert {"digits", "color-digits"} <= set(registry.datasets.names())
    assert {"iid", "dirichlet", "inner-dirichlet", "shards", "pathological", "environment"} <= set(registry.partitions.names())
    assert "classifier" in registry.learners.names()
    assert "in-process" in registry.engines.names()


def test_learners_are_known_without_the_libraries_that_take_seconds_to_import():
    """Every process of a run imports them all, whichever it trains."""
    heavy = "{'timm', 'torchvision', 'torch._dynamo'}"
    code = f"import sys; from fedvision.registry import learners; learners.names(); print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
