"""The conformance suite of learners: what federated training relies on, as a function anyone can run on their own class.

>>> check_learner("classifier")
"""

import random
import re
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from itertools import chain
from typing import Any

import numpy as np
import tomli_w
import torch
from flwr.app import RecordDict
from torch import Tensor, nn
from torch.func import functional_call, grad

from fedvision import settings
from fedvision.data.examples import (
    ANSWER,
    ANSWER_WEIGHT,
    CAPTION,
    HYPOTHESIS,
    IMAGE,
    LABEL,
    QUESTION,
    SECOND_IMAGE,
    SEMSEG,
    STATEMENT,
    TRUTH,
    VERDICT,
    Examples,
)
from fedvision.data.federated import Spec
from fedvision.data.texts import encode_texts
from fedvision.gallery import TAKEN, Gallery
from fedvision.holdings import Holdings
from fedvision.learners.learner import Learner, is_mean_over_examples
from fedvision.metrics import Metrics, total
from fedvision.registry import learners
from fedvision.seeds import generator, global_generators
from fedvision.silo import Silo


def check_learner(learner: Learner | str, examples: Examples | None = None, spec: Spec | None = None) -> None:
    """Hold a learner to its contract.

    Args:
        learner: a learner, or a registered or dotted name, built with its default settings.
        examples: five or more training examples that the learner can learn from; random images with labels, maps and texts if not given.
        spec: of the data that the examples come from; read off them if not given.

    Raises:
        AssertionError: the learner breaks the contract; the message says how.
    """
    learner = learners.find(learner)() if isinstance(learner, str) else learner
    examples = _images() if examples is None else examples
    spec = spec or Spec(tuple(examples.image.shape[1:]), max(int(examples.label.max()) + 1, 2))
    for check in CHECKS:
        check(Case(learner, examples, spec))


@dataclass(frozen=True)
class Case:
    """A learner under test, and the data it is tested on."""

    learner: Learner
    examples: Examples
    spec: Spec

    @property
    def name(self) -> str:
        """Of the learner's class."""
        return type(self.learner).__name__

    def model(self, purpose: str = "model") -> nn.Module:
        """A model, always the same for the same purpose."""
        return self.learner.build(self.spec, generator(0, purpose))

    def view(self, index: slice | Tensor = slice(None)) -> Examples:
        """The batch of a step, as the loss sees it, when it is the turn of these examples."""
        return self.learner.draw(self.model(), self.examples, index, generator(0, "view"))

    def loss(self, model: Callable[..., Any], batch: Examples, progress: float = 0.5, purpose: str = "loss") -> Tensor:
        """The loss, with generators lent as a client lends them."""
        rng = generator(0, purpose)
        with global_generators(rng):
            return self.learner.loss(model, batch, progress, rng).total  # type: ignore[arg-type]


def settings_come_from_a_file(case: Case) -> None:
    """A learner is a frozen dataclass with a summary, whose settings survive being written to TOML."""
    kind = type(case.learner)
    assert is_dataclass(kind) and kind.__dataclass_params__.frozen, f"{case.name} is not a frozen dataclass"  # type: ignore[attr-defined]
    assert (kind.__doc__ or "").strip().split("\n")[0], f"{case.name}'s docstring has no first line to list it by"
    values = {f.name: getattr(case.learner, f.name) for f in fields(kind)}
    written = tomli_w.dumps({name: value for name, value in values.items() if value is not None})
    resolved = settings.resolve(kind, tomllib.loads(written), "learner")
    assert kind(**resolved) == case.learner, f"{case.name} written to TOML and read again is {resolved}, not {values}"


def building_depends_on_the_generator_alone(case: Case) -> None:
    """The same generator gives the same weights, whatever the global generators hold; another gives others."""
    with _untouched(f"{case.name}.build"):
        first = case.model().state_dict()
    with global_generators(generator(1, "elsewhere")):
        second = case.model().state_dict()
    assert _same(first, second), f"{case.name}.build gives other weights for the same generator"
    params = dict(case.model().named_parameters())
    other = dict(case.model("another model").named_parameters())
    assert any(param.requires_grad for param in params.values()), f"{case.name} has nothing to train"
    assert not _same(params, other), f"{case.name}.build does not draw its weights from the generator"
    odd = [name for name, tensor in first.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    assert not odd, f"{case.name}.build gives {odd} values that are not finite"


def views_leave_the_examples_alone(case: Case) -> None:
    """A training view has as many examples, is drawn from the generator, and changes nothing in place."""
    before = {name: values.clone() for name, values in case.examples.fields.items()}
    with _untouched(f"{case.name}.train_view"):
        view, again = (case.learner.train_view(case.examples, generator(0, "view")) for _ in range(2))
    assert len(view) == len(case.examples), f"{case.name}.train_view makes {len(view)} examples of {len(case.examples)}"
    assert _same(before, dict(case.examples.fields)), f"{case.name}.train_view changes the examples in place"
    assert _same(dict(view.fields), dict(again.fields)), f"{case.name}.train_view differs for the same generator"


def drawing_leaves_everything_alone(case: Case) -> None:
    """A step's batch depends on the generator and on whose turn it is, however they are named; nothing else changes."""
    examples, model = _copied(dict(case.examples.fields)), case.model()
    state, turn = _copied(model.state_dict()), slice(1, 4)
    with _untouched(f"{case.name}.draw"):
        batch, again = (case.learner.draw(model, case.examples, turn, generator(0, "view")) for _ in range(2))
    assert len(batch), f"{case.name}.draw makes an empty batch of three examples"
    assert _same(examples, dict(case.examples.fields)), f"{case.name}.draw changes the examples in place"
    assert _same(state, model.state_dict()), f"{case.name}.draw changes the model"
    assert _same(dict(batch.fields), dict(again.fields)), f"{case.name}.draw differs for the same generator"
    indexed = case.view(torch.arange(len(case.examples))[turn])
    assert _same(dict(batch.fields), dict(indexed.fields)), f"{case.name}.draw differs for a slice and for its indices"


def the_loss_can_be_minimized(case: Case) -> None:
    """The loss is a finite scalar at any time of the training, and some parameter moves it."""
    model, batch = case.model().train(), case.view()
    for progress in (0.0, 0.5, 1.0):
        with _untouched(f"{case.name}.loss"):
            loss = case.loss(model, batch, progress)
        assert loss.shape == (), f"{case.name}.loss is of shape {tuple(loss.shape)}, expected a scalar"
        assert loss.isfinite(), f"{case.name}.loss is {loss.item()} at progress {progress}"
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    slopes = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
    odd = [name for name, slope in zip(params, slopes, strict=True) if not slope.isfinite().all()]
    assert not odd, f"{case.name}.loss has gradients of {odd} that are not finite"
    assert any(slope.any() for slope in slopes), f"{case.name}.loss does not depend on any parameter"


def the_loss_repeats(case: Case) -> None:
    """The same model, batch and generator give the same loss; computing it changes neither weights nor batch."""
    model, batch = case.model().train(), case.view()
    params, fields_before = _copied(dict(model.named_parameters())), _copied(dict(batch.fields))
    first = case.loss(model, batch)
    assert _same(params, dict(model.named_parameters())), f"{case.name}.loss changes the model's parameters"
    assert _same(fields_before, dict(batch.fields)), f"{case.name}.loss changes the batch in place"
    with global_generators(generator(1, "elsewhere")):
        second = case.loss(case.model().train(), batch)
    assert torch.equal(first, second), f"{case.name}.loss is {first.item()}, then {second.item()} for the same generator"


def the_parts_of_the_loss_are_numbers(case: Case) -> None:
    """Every named term is a finite scalar."""
    rng = generator(0, "loss")
    with global_generators(rng):
        loss = case.learner.loss(case.model().train(), case.view(), 0.5, rng)
    odd = [name for name, part in loss.parts.items() if part.shape != () or not part.isfinite()]
    assert not odd, f"{case.name}.loss has parts {odd} that are not finite scalars"


def the_loss_takes_anything_called_like_the_model(case: Case) -> None:
    """The loss is a function of the parameters: ``torch.func`` differentiates it as autograd does."""
    model, batch = case.model().eval(), case.view()
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}

    def loss_at(values: dict[str, Tensor]) -> Tensor:
        return case.loss(lambda *inputs, **options: functional_call(model, values, inputs, options), batch)

    slopes = torch.autograd.grad(case.loss(model, batch), list(params.values()), materialize_grads=True)
    functional = grad(loss_at)({name: param.detach() for name, param in params.items()})
    odd = [name for name, slope in zip(params, slopes, strict=True) if not torch.allclose(slope, functional[name], rtol=1e-3, atol=1e-6)]
    assert not odd, f"{case.name}.loss through torch.func.functional_call has other gradients of {odd}"


def the_loss_is_a_mean_if_declared(case: Case) -> None:
    """A loss that is declared ``mean_over_examples`` is the mean of the losses of the examples, parts too."""
    if not is_mean_over_examples(case.learner):
        return
    model, batch, rng = case.model().eval(), case.view(), generator(0, "loss")

    def measured(part: Examples) -> dict[str, Tensor]:
        loss = case.learner.loss(model, part, 0.5, rng)
        return {"loss": loss.total, **loss.parts}

    whole, each = measured(batch), [measured(one) for one in batch.batches(1)]
    for name, value in whole.items():
        mean = torch.stack([one[name] for one in each]).mean()
        odd = f"{case.name} is declared mean_over_examples, but {name} of a batch is {value}, and the mean of its examples' is {mean}"
        assert torch.isclose(value, mean, rtol=1e-4, atol=1e-6), odd


def metrics_add(case: Case) -> None:
    """The metrics of two halves add up to those of the whole; evaluating changes nothing in the model."""
    model = case.model().eval()
    before, half = _copied(model.state_dict()), len(case.examples) // 2
    with torch.inference_mode(), _untouched(f"{case.name}.evaluate"):
        whole = case.learner.evaluate(model, case.examples)
        halves = total(case.learner.evaluate(model, part) for part in (case.examples[:half], case.examples[half:]))
    assert isinstance(whole, Metrics) and whole.count == len(case.examples), f"{case.name}.evaluate does not count its examples"
    assert "loss" in whole.sums, f"{case.name}.evaluate measures {sorted(whole.sums)}, no loss"
    for name, value in whole.result().items():
        other = halves.result().get(name, float("nan"))
        assert np.isclose(value, other, rtol=1e-4, atol=1e-6, equal_nan=True), f"{case.name}: {name} is {value}, or {other} in two halves"
    assert np.isfinite(whole.result()["loss"]), f"{case.name}.evaluate gives the loss {whole.result()['loss']}"
    assert _same(before, model.state_dict()), f"{case.name}.evaluate changes the model"


def what_is_measured_over_all_are_numbers(case: Case) -> None:
    """What does not add is a number, under a name that ``evaluate`` has not; measuring it repeats and changes nothing."""
    model = case.model().eval()
    before, fields_before = _copied(model.state_dict()), _copied(dict(case.examples.fields))
    with torch.inference_mode(), _untouched(f"{case.name}.overall"):
        found, again = (dict(case.learner.overall(model, case.examples)) for _ in range(2))
        added = case.learner.evaluate(model, case.examples).result()
    odd = [name for name, value in found.items() if not isinstance(value, float | int) or not np.isfinite(value)]
    assert not odd, f"{case.name}.overall measures {odd}, which are no finite numbers"
    assert found == again, f"{case.name}.overall is {found}, then {again} for the same model and examples"
    assert not found.keys() & added.keys(), f"{case.name}.overall and evaluate both measure {sorted(found.keys() & added.keys())}"
    assert _same(before, model.state_dict()), f"{case.name}.overall changes the model"
    assert _same(fields_before, dict(case.examples.fields)), f"{case.name}.overall changes the examples in place"


def interchangeable_rows_change_places(case: Case) -> None:
    """In another order interchangeable rows, and what goes with them, leave all metrics as they are."""
    model = case.model().eval()
    state, held = model.state_dict(), Holdings.of(case.learner, model)
    for rows in case.learner.interchangeable(model):
        unknown = [name for name in (rows.name, *rows.alike) if name not in state or len(state[name]) != len(state[rows.name])]
        assert rows.name in held.shared, f"{case.name}.interchangeable names {rows.name!r}, which does not travel"
        assert not unknown, f"{case.name}.interchangeable names {unknown}, which are no arrays of the model with as many rows"
        with torch.inference_mode():
            before = case.learner.evaluate(model, case.examples).result()
            for name in (rows.name, *rows.alike):
                state[name].copy_(state[name].flip(0))
            after = case.learner.evaluate(model, case.examples).result()
        odd = [name for name, value in before.items() if not np.isclose(value, after[name], rtol=1e-4, atol=1e-6, equal_nan=True)]
        assert not odd, f"{case.name}: {odd} change with the order of {rows.name!r}, which is said to mean nothing"


def one_example_is_enough(case: Case) -> None:
    """A batch of one works: the last batch of a client may hold no more. (BatchNorm cannot train on it.)"""
    model, one = case.model(), case.examples[:1]
    normalized = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    loss = case.loss(model.train(not normalized), case.learner.draw(model, one, slice(0, 1), generator(0, "view")))
    assert loss.isfinite(), f"{case.name}.loss of one example is {loss.item()}"
    with torch.inference_mode():
        count = case.learner.evaluate(model.eval(), one).count
    assert count == 1, f"{case.name}.evaluate counts {count} examples in a batch of one"


def groups_are_of_parameters(case: Case) -> None:
    """Parameter groups name parameters of the model, each once."""
    model = case.model()
    names = [name for group in case.learner.groups(model) for name in group.names]
    unknown = sorted(set(names) - {name for name, _ in model.named_parameters()})
    assert not unknown, f"{case.name}.groups names {unknown}, which are no parameters of the model"
    assert len(names) == len(set(names)), f"{case.name}.groups names some parameter twice"


def a_silo_goes_on_where_it_stopped(case: Case) -> None:
    """A silo's two answers are the same if its process is started anew in between, and its model built anew."""
    alone, interrupted = _Life(case), _Life(case)
    for life in (alone, alone, interrupted):
        life.answer()
    interrupted.model = case.model()
    interrupted.answer()
    odd = [name for name, tensor in alone.arrays.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    assert not odd, f"{case.name} has {odd} that are not finite after two steps"
    assert _same(alone.arrays, interrupted.arrays), f"{case.name} remembers what its model's state dict does not hold"


class _Life:
    """A silo's answers of one step each, every one of which is the next global model."""

    def __init__(self, case: Case) -> None:
        self.case, self.model, self.state = case, case.model(), RecordDict()
        self.holdings = Holdings.of(case.learner, self.model)
        self.arrays: dict[str, Tensor] = dict(self.holdings.shared)

    def answer(self) -> None:
        rng = generator(0, "silo")
        silo = Silo(self.case.learner, self.model, self.arrays, self.case.examples, self.state, rng, 0.0, 0.5, self.holdings)
        with global_generators(rng):
            silo.descend(silo.batches(len(self.case.examples)), {"name": "SGD", "lr": 1e-3})
        silo.keep()
        self.arrays = silo.arrays()


def the_head_is_part_of_the_model(case: Case) -> None:
    """The head is a module of the model with parameters, or None."""
    model = case.model()
    head = case.learner.head(model)
    if head is not None:
        assert any(module is head for module in model.modules()), f"{case.name}.head is not a module of the model"
        assert any(True for _ in head.parameters()), f"{case.name}.head has no parameters"


def pictures_leave_everything_alone(case: Case) -> None:
    """Pictures are galleries, under names that files may have; drawing them changes nothing, and they repeat."""
    model, fields_before = case.model().eval(), _copied(dict(case.examples.fields))
    before = _copied(model.state_dict())
    with torch.inference_mode(), _untouched(f"{case.name}.pictures"):
        drawn, again = (dict(case.learner.pictures(model, case.examples)) for _ in range(2))
    for name, gallery in drawn.items():
        assert re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", name), f"{case.name}.pictures names one {name!r}, expected words with hyphens"
        assert name not in TAKEN, f"{case.name}.pictures names one {name!r}, as a picture of every run is called"
        assert isinstance(gallery, Gallery), f"{case.name}.pictures gives a {type(gallery).__name__} for {name!r}, expected a Gallery"
    assert _same(before, model.state_dict()), f"{case.name}.pictures changes the model"
    assert not model.training, f"{case.name}.pictures leaves the model in training mode"
    assert _same(fields_before, dict(case.examples.fields)), f"{case.name}.pictures changes the examples in place"
    odd = [name for name in drawn.keys() | again.keys() if not _look_alike(drawn.get(name), again.get(name))]
    assert not odd, f"{case.name}.pictures draws {sorted(odd)} differently for the same model and examples"


CHECKS: tuple[Callable[[Case], None], ...] = (
    settings_come_from_a_file,
    building_depends_on_the_generator_alone,
    views_leave_the_examples_alone,
    drawing_leaves_everything_alone,
    the_loss_can_be_minimized,
    the_loss_repeats,
    the_parts_of_the_loss_are_numbers,
    the_loss_takes_anything_called_like_the_model,
    the_loss_is_a_mean_if_declared,
    metrics_add,
    what_is_measured_over_all_are_numbers,
    interchangeable_rows_change_places,
    one_example_is_enough,
    groups_are_of_parameters,
    a_silo_goes_on_where_it_stopped,
    the_head_is_part_of_the_model,
    pictures_leave_everything_alone,
)
"""What ``check_learner`` checks, in order."""


def _images() -> Examples:
    """Six random images [6, 3, 32, 32] of three classes, that of every pixel too, with a text for all that texts are good for."""
    first, second = (torch.rand(6, 3, 32, 32, generator=generator(0, "images", which)) for which in ("first", "second"))
    label = torch.tensor([0, 1, 2, 0, 1, 2])
    said = encode_texts([[f"a {color} circle"] for color in ("red", "blue", "green", "white", "pink", "brown")])
    answers = encode_texts([[color] for color in ("red", "blue", "green", "white", "pink", "brown")])[:, None]
    texts = dict.fromkeys((CAPTION, QUESTION, HYPOTHESIS, STATEMENT), said)
    told = {ANSWER: answers, ANSWER_WEIGHT: torch.ones(6, 1, 1), VERDICT: label[:, None], TRUTH: label[:, None] % 2}
    maps = label[:, None, None].expand(-1, 32, 32).to(torch.uint8).contiguous()
    return Examples({IMAGE: first, LABEL: label, SEMSEG: maps, SECOND_IMAGE: second, **texts, **told})


@contextmanager
def _untouched(what: str) -> Iterator[None]:
    """The global generators are, after the block, what they were before it."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    yield
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()
    drawn = {
        "torch": not torch.equal(before[0], after[0]),
        "random": before[1] != after[1],
        "numpy": not (np.array_equal(before[2][1], after[2][1]) and before[2][2] == after[2][2]),  # type: ignore[index]
    }
    names = [name for name, moved in drawn.items() if moved]
    assert not names, f"{what} draws from the global generator of {', '.join(names)}; draw from the generator it is given"


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether tensors hold the same; a value that is not known, NaN, is the same as another such."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    alike = one == other
    return bool((alike | (one.isnan() & other.isnan()) if one.is_floating_point() else alike).all())


def _look_alike(one: Gallery | None, other: Gallery | None) -> bool:
    if one is None or other is None or len(one.rows) != len(other.rows) or len(one.columns) != len(other.columns):
        return False
    if [list(row) for row in one.notes] != [list(row) for row in other.notes]:
        return False
    pairs = zip(chain(*one.pictures), chain(*other.pictures), strict=True)
    return all((a is None) == (b is None) and (a is None or np.array_equal(a, b)) for a, b in pairs)  # type: ignore[arg-type]
