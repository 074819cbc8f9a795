"""Fishr in two phases equals back-propagation through all silos at once; the four algorithms follow their equations."""

import copy
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict
from torch import nn
from torch.nn import functional as F

from fedvision.arrays import nbytes, pack
from fedvision.data import Examples
from fedvision.errors import AggregationError, TooFewAnswersError
from fedvision.grids.passing import PassingGrid
from fedvision.learners.classifier import Classifier
from fedvision.learners.learner import Learner
from fedvision.models import MLP
from fedvision.registry import strategies
from fedvision.seeds import generator
from fedvision.silo import Silo
from strategies.fedsgd import FedSGD
from strategies.fishr import Fishr, FishrInterGeo, FishrIntraArith, FishrIntraGeo
from strategies.geometric import Geometric

NAMES = ["fishr", "fishr-inter-geo", "fishr-intra-arith", "fishr-intra-geo"]
SGD = {"name": "SGD", "lr": 0.1}
SHAPE, FEATURES = (1, 2, 3), 6


@dataclass(frozen=True, kw_only=True)
class Toy(Classifier):
    """A classifier of six features in float64, whose head may be of two layers."""

    classes: int = 3
    deep: bool = False

    def build(self, spec=None, rng=None):
        with torch.random.fork_rng():
            torch.manual_seed(4)
            model = MLP(SHAPE, (5,), 1 if self.classes == 2 else self.classes)
            if self.deep:
                model.classifier = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, model.classifier.out_features))
            return model.double()


def parts_of(sizes, classes=3):
    """Silos of different sizes, whose inputs and labels are spread differently."""
    parts = []
    for silo, n in enumerate(sizes):
        rng = generator(7, "examples", silo)
        image = (0.5 + 0.5 * silo) * torch.randn(n, *SHAPE, generator=rng).double() + 0.2 * silo
        parts.append(Examples({"image": image, "label": torch.randint(classes, (n,), generator=rng)}))
    return parts


# ---- the equations, silo by silo and example by example ---------------------------------------------------------------


def nll(model, part):
    """Mean loss of a part; BCE where there is one logit."""
    logits = model(part.image)
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], part.label.double())
    return F.cross_entropy(logits, part.label)


def looped_variance(model, part):
    """C_e, one vector: the population variance of per-example gradients of the head; differentiable."""
    head = list(model.classifier.parameters())
    rows = []
    for i in range(len(part)):
        gradients = torch.autograd.grad(nll(model, part[i : i + 1]), head, create_graph=True)
        rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    return torch.stack(rows).var(0, unbiased=False)


def central_penalty(model, parts, shares=None):
    """E sum_e p_e ||C_e - Cbar||^2 with Cbar = sum_e p_e C_e, and its gradient through all silos, Cbar included."""
    shares = [1 / len(parts)] * len(parts) if shares is None else shares
    variances = [looped_variance(model, part) for part in parts]
    cbar = sum(share * c for share, c in zip(shares, variances, strict=True))
    value = len(parts) * sum(share * (c - cbar).square().sum() for share, c in zip(shares, variances, strict=True))
    return value.item(), dict(zip(dict(model.named_parameters()), torch.autograd.grad(value, list(model.parameters())), strict=True))


def mean_gradient(model, part):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(nll(model, part), list(model.parameters())), strict=True))


def naive_geometric(gradients, threshold=0.0):
    """The weighted geometric mean of a list of arrays, in NumPy."""
    g = np.stack([gradient.numpy() for gradient in gradients])
    logs, above = np.log(np.abs(g) + 1e-10), g > 0
    result = np.zeros(g.shape[1:])
    for group, sign in ((above, 1), (~above, -1)):
        count = group.sum(0)
        mean_log = np.where(group, logs, 0).sum(0) / np.maximum(count, 1)
        result += sign * np.where(count > 0, count / len(g) * np.exp(mean_log), 0)
    return torch.from_numpy(np.where(np.abs(np.sign(g).mean(0)) < threshold, 0, result))


def distance(one, other):
    """||one - other|| / ||other|| over all arrays."""
    assert one.keys() == other.keys()
    difference = sum((one[name] - other[name]).square().sum() for name in other)
    return float((difference / sum(other[name].square().sum() for name in other)).sqrt())


def weighted(answers, record, weights):
    total = sum(weights)
    return {name: sum(w * answer[record][name] for w, answer in zip(weights, answers, strict=True)) / total for name in answers[0][record]}


# ---- the penalty's gradient -------------------------------------------------------------------------------------------

CASES = [
    pytest.param(classes, deep, id=f"{'binary' if classes == 2 else 'multi-class'} {'non-linear' if deep else 'linear'} head")
    for classes in (2, 3)
    for deep in (False, True)
]


@pytest.mark.parametrize(("classes", "deep"), CASES)
@pytest.mark.parametrize("weight_by", ["clients", "examples"])
@pytest.mark.parametrize("sizes", [(6, 9), (4, 7, 3, 11, 5)], ids=["two silos", "five silos"])
def test_two_phases_give_the_gradient_of_the_penalty_through_all_silos(federate, classes, deep, weight_by, sizes):
    learner, parts = Toy(classes=classes, deep=deep), parts_of(sizes, classes)
    weights = sizes if weight_by == "examples" else [1] * len(sizes)
    model = learner.build()
    value, expected = central_penalty(model, parts, [w / sum(weights) for w in weights])

    federation = federate(FishrInterGeo(penalty_weight=3.0, weight_by=weight_by, server_optimizer=SGD), learner, model, parts)
    metrics = federation.round(1)
    found = weighted(federation.answers(), "penalty", weights)
    assert distance(found, {name: 3 * slope for name, slope in expected.items()}) < 1e-10
    assert metrics["penalty"] == pytest.approx(3 * value, rel=1e-10)


@pytest.mark.parametrize(("classes", "deep"), CASES)
def test_the_penalty_travels_within_the_gradient_under_an_arithmetic_mean(federate, classes, deep):
    learner, parts = Toy(classes=classes, deep=deep), parts_of((6, 9, 4), classes)
    model = learner.build()
    plain = [mean_gradient(model, part) for part in parts]
    _, slope = central_penalty(model, parts)
    federation = federate(Fishr(penalty_weight=3.0, server_optimizer=SGD), learner, model, parts)
    federation.round(1)
    expected = {name: sum(g[name] for g in plain) / 3 + 3 * slope[name] for name in slope}
    assert distance(weighted(federation.answers(), "gradient", [1, 1, 1]), expected) < 1e-10


@pytest.mark.parametrize("deep", [False, True], ids=["linear head", "non-linear head"])
def test_one_silo_alone_agrees_with_itself(federate, deep):
    learner = Toy(deep=deep)
    federation = federate(FishrInterGeo(server_optimizer=SGD), learner, learner.build(), parts_of((7,)))
    assert federation.round(1)["penalty"] == 0
    assert all(not slope.any() for slope in federation.answers()[0]["penalty"].values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("deep", [False, True], ids=["linear head", "non-linear head"])
def test_a_silo_that_goes_through_in_chunks_answers_the_same(federate, name, deep):
    learner, answers = Toy(deep=deep), []
    for chunk_size in (256, 4, 1):
        strategy = strategies.find(name)(chunk_size=chunk_size, server_optimizer=SGD)
        federation = federate(strategy, learner, learner.build(), parts_of((11, 9)))
        federation.round(1)
        answers.append(weighted(federation.answers(), "penalty" if strategy.apart else "gradient", [1, 1]))
    assert distance(answers[1], answers[0]) < 1e-12
    assert distance(answers[2], answers[0]) < 1e-12


@pytest.mark.parametrize(("classes", "deep"), CASES)
def test_c_is_the_population_variance_of_the_gradients_of_single_examples(federate, classes, deep):
    learner, parts = Toy(classes=classes, deep=deep), parts_of((6, 9), classes)
    model = learner.build()
    expected = [looped_variance(model, part) for part in parts]
    federation = federate(Fishr(chunk_size=4, server_optimizer=SGD), learner, model, parts)
    federation.round(1)
    for answer, c in zip(federation.answers("query.statistics"), expected, strict=True):
        found = torch.cat([answer["variance"][f"classifier.{name}"].reshape(-1) for name, _ in model.classifier.named_parameters()])
        assert torch.allclose(found, c, rtol=1e-10, atol=1e-14)
        assert not torch.allclose(found, c * 6 / 5, rtol=1e-3), "n - 1 in the denominator"


def test_the_gradient_reaches_every_parameter_through_the_features(federate):
    learner = Toy()
    federation = federate(FishrInterGeo(server_optimizer=SGD), learner, learner.build(), parts_of((6, 9)))
    federation.round(1)
    assert all(slope.abs().max() > 0 for slope in federation.answers()[0]["penalty"].values())


def test_a_model_without_a_head_is_refused():
    class Headless(Learner):
        def build(self, spec, rng):
            raise NotImplementedError

        def loss(self, model, batch, progress, rng):
            raise NotImplementedError

        def evaluate(self, model, batch):
            raise NotImplementedError

    model = Toy().build()
    silo = Silo(Headless(), model, dict(model.state_dict()), parts_of((4,))[0])
    with pytest.raises(AggregationError, match="Headless names no classifier head"):
        Fishr().client_statistics(silo, RecordDict())


# ---- whole rounds against a naive server ------------------------------------------------------------------------------


def naive_rounds(name, model, parts, rounds, penalty_in, batch_size=4, threshold=0.0, stale=False, lr=0.1):
    """Centralised rounds of the four algorithms with plain descent, in float64; the penalty's value in each."""
    values, previous = [], None
    for number in range(1, rounds + 1):
        batch = batch_size if "intra" in name else 10**6
        gradients = [[mean_gradient(model, piece) for piece in part.batches(batch)] for part in parts]
        names = list(dict(model.named_parameters()))

        def geo(items, key):
            return naive_geometric([item[key] for item in items], threshold)

        def arith(items, key):
            return sum(item[key] for item in items) / len(items)

        within = geo if name == "fishr-intra-geo" else arith
        across = geo if name == "fishr-inter-geo" else arith
        silos = [{key: within(batches, key) for key in names} for batches in gradients]
        step = {key: across(silos, key) for key in names}
        weight, value = penalty_in(number), 0.0
        if stale:
            variances = [looped_variance(model, part) for part in parts]
            slopes = dict.fromkeys(names, 0.0)
            if previous is not None:
                total = sum((c - previous).square().sum() for c in variances)
                slopes = dict(zip(names, torch.autograd.grad(total, list(model.parameters()), retain_graph=True), strict=True))
                value = total.item()
            previous = sum(variances).detach() / len(parts)
        else:
            value, slopes = central_penalty(model, parts)
        values.append(weight * value)
        with torch.no_grad():
            for key, param in model.named_parameters():
                param.sub_(lr * (step[key] + weight * slopes[key]))
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}, values


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stale", [False, True], ids=["exact", "stale"])
def test_rounds_equal_those_of_a_server_that_sees_all_examples(federate, name, stale):
    learner, parts = Toy(), parts_of((6, 9, 5))
    options = {"batch_size": 4, "shuffle": False} if "intra" in name else {}
    strategy = strategies.find(name)(penalty_weight=2.0, penalty="stale" if stale else "exact", server_optimizer=SGD, **options)
    federation = federate(strategy, learner, learner.build(), parts)
    metrics = [federation.round(number) for number in (1, 2, 3, 4)]
    expected, values = naive_rounds(name, learner.build(), parts, 4, lambda number: 2.0, stale=stale)
    assert distance(federation.arrays, expected) < 1e-9
    assert [found.get("penalty", 0.0) for found in metrics] == pytest.approx(values, rel=1e-8)
    assert values[-1] > 0


def test_the_stale_penalty_is_another_than_the_exact_one_and_absent_at_first(federate):
    learner, parts = Toy(), parts_of((6, 9, 5))
    exact, stale = (federate(Fishr(penalty=kind, server_optimizer=SGD), learner, learner.build(), parts) for kind in ("exact", "stale"))
    assert "penalty" in exact.round(1)
    assert "penalty" not in stale.round(1)
    assert stale.round(2)["penalty"] != pytest.approx(exact.round(2)["penalty"], rel=1e-6)


@pytest.mark.parametrize("final", [0.0, 5.0])
def test_lambda_changes_after_the_first_rounds(federate, final):
    learner, parts = Toy(), parts_of((6, 9))
    strategy = Fishr(penalty_weight=2.0, penalty_weight_final=final, penalty_anneal_rounds=2, server_optimizer=SGD)
    federation = federate(strategy, learner, learner.build(), parts)
    metrics = [federation.round(number) for number in (1, 2, 3, 4)]
    expected, values = naive_rounds("fishr", learner.build(), parts, 4, lambda number: 2.0 if number <= 2 else final)
    assert distance(federation.arrays, expected) < 1e-9
    assert [found.get("penalty", 0.0) for found in metrics] == pytest.approx(values, rel=1e-8)
    assert [strategy.penalty_weight_in(number) for number in (1, 2, 3, 9)] == [2, 2, final, final]


def test_lambda_stays_if_no_final_value_is_given():
    assert Fishr(penalty_weight=2.0, penalty_anneal_rounds=3).penalty_weight_in(9) == 2


@pytest.mark.parametrize("penalty", ["exact", "stale"])
@pytest.mark.parametrize(
    ("penalized", "plain"),
    [
        (Fishr, FedSGD),
        (FishrInterGeo, Geometric),
        (partial(FishrInterGeo, agreement_threshold=0.6), partial(Geometric, agreement_threshold=0.6)),
    ],
    ids=["fishr", "fishr-inter-geo", "fishr-inter-geo with a threshold"],
)
def test_lambda_zero_gives_the_bits_of_the_algorithm_without_penalty(federate, penalized, plain, penalty):
    learner, parts = Toy(), parts_of((6, 9, 5))
    one = federate(penalized(penalty_weight=0.0, penalty=penalty), learner, learner.build(), parts)
    other = federate(plain(), learner, learner.build(), parts)
    for number in (1, 2, 3):
        one.round(number)
        other.round(number)
    assert all(torch.equal(one.arrays[name], other.arrays[name]) for name in other.arrays)


def test_a_single_mini_batch_makes_the_intra_variants_vanilla_fishr(federate):
    learner, parts, found = Toy(), parts_of((6, 9, 5)), {}
    for kind in (Fishr, FishrIntraArith, FishrIntraGeo):
        federation = federate(kind(server_optimizer=SGD), learner, learner.build(), parts)
        federation.round(1)
        found[kind] = federation.arrays
    assert distance(found[FishrIntraArith], found[Fishr]) < 1e-12
    assert distance(found[FishrIntraGeo], found[Fishr]) < 1e-8  # the floor of the logarithm


@pytest.mark.parametrize("kind", [FishrIntraArith, FishrIntraGeo])
def test_mini_batches_count_equally_the_smaller_last_one_included(kind):
    learner, part = Toy(), parts_of((9,))[0]
    model = learner.build()
    silo = Silo(learner, model, dict(model.state_dict()), part)
    loss, combined = kind(batch_size=4, shuffle=False).own_gradient(silo)
    pieces = [mean_gradient(model, piece) for piece in (part[:4], part[4:8], part[8:])]
    for name, found in combined.items():
        values = [piece[name] for piece in pieces]
        expected = sum(values) / 3 if kind is FishrIntraArith else naive_geometric(values)
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert loss == pytest.approx(nll(model, part).item(), rel=1e-12)


def test_shuffling_draws_other_mini_batches_from_the_silos_generator():
    learner, part = Toy(), parts_of((9,))[0]
    model = learner.build()

    def combined(seed, shuffle=True):
        silo = Silo(learner, model, dict(model.state_dict()), part, rng=generator(seed))
        return FishrIntraGeo(batch_size=4, shuffle=shuffle).own_gradient(silo)[1]["classifier.weight"]

    assert torch.equal(combined(1), combined(1))
    assert not torch.allclose(combined(1), combined(2))
    assert torch.equal(combined(1, shuffle=False), combined(2, shuffle=False))


@pytest.mark.parametrize("name", ["fishr-inter-geo", "fishr-intra-geo"])
@pytest.mark.parametrize("threshold", [0.3, 1.0])
def test_coordinates_without_agreement_on_the_sign_move_by_the_penalty_alone(federate, name, threshold):
    learner, parts = Toy(), parts_of((6, 9, 5))
    options = {"batch_size": 4, "shuffle": False} if "intra" in name else {}
    strategy = strategies.find(name)(penalty_weight=2.0, agreement_threshold=threshold, server_optimizer=SGD, **options)
    federation = federate(strategy, learner, learner.build(), parts)
    federation.round(1)
    expected, _ = naive_rounds(name, learner.build(), parts, 1, lambda number: 2.0, threshold=threshold)
    without, _ = naive_rounds(name, learner.build(), parts, 1, lambda number: 2.0)
    assert distance(federation.arrays, expected) < 1e-9
    assert distance(without, expected) > 1e-6


# ---- what travels -------------------------------------------------------------------------------------------------------

HEAD = {"classifier.weight", "classifier.bias"}
MODEL = HEAD | {"hidden1.weight", "hidden1.bias"}


def carried(federation, kind):
    """Names of arrays by record in the messages of one kind: down, and up."""
    pairs = [(message, answer) for message, answer in federation.messages if message.metadata.message_type == kind]
    both = [[{name: set(record) for name, record in side.content.array_records.items()} for side in pair] for pair in pairs]
    assert all(pair == both[0] for pair in both), "clients are not treated alike"
    return both[0] if both else None


@pytest.mark.parametrize("name", NAMES)
def test_phase_one_brings_only_what_is_as_large_as_the_head(federate, name):
    federation = federate(strategies.find(name)(), Toy(), Toy().build(), parts_of((6, 9)))
    federation.round(1)
    assert carried(federation, "query.statistics") == [{"arrays": MODEL}, {"variance": HEAD}]


@pytest.mark.parametrize("name", NAMES)
def test_phase_two_brings_one_record_of_the_size_of_the_model(federate, name):
    federation = federate(strategies.find(name)(), Toy(), Toy().build(), parts_of((6, 9)))
    federation.round(1)
    up = {"gradient": MODEL} | ({"penalty": MODEL} if name == "fishr-inter-geo" else {})
    assert carried(federation, "train") == [{"arrays": MODEL, "variance": HEAD}, up]


@pytest.mark.parametrize("name", NAMES)
def test_the_stale_penalty_needs_one_phase(federate, name):
    federation = federate(strategies.find(name)(penalty="stale"), Toy(), Toy().build(), parts_of((6, 9)))
    federation.round(1)
    assert carried(federation, "train") == [{"arrays": MODEL}, {"gradient": MODEL, "variance": HEAD}]
    federation.round(2)
    up = {"gradient": MODEL, "variance": HEAD} | ({"penalty": MODEL} if name == "fishr-inter-geo" else {})
    assert carried(federation, "train") == [{"arrays": MODEL, "variance": HEAD}, up]
    assert carried(federation, "query.statistics") is None


@pytest.mark.parametrize("name", NAMES)
def test_without_a_penalty_nothing_is_asked_and_only_gradients_travel(federate, name):
    federation = federate(strategies.find(name)(penalty_weight=0.0), Toy(), Toy().build(), parts_of((6, 9)))
    assert "penalty" not in federation.round(1)
    assert carried(federation, "train") == [{"arrays": MODEL}, {"gradient": MODEL}]
    assert carried(federation, "query.statistics") is None


def test_a_round_of_fishr_costs_one_model_and_one_head_up(federate):
    federation = federate(Fishr(), Toy(), Toy().build(), parts_of((6, 9)))
    federation.round(1)
    up = sum(nbytes(answer.content) for _, answer in federation.messages)
    size = {name: 8 * tensor.numel() for name, tensor in federation.arrays.items()}
    assert up == 2 * (sum(size.values()) + sum(size[name] for name in HEAD))


# ---- the protocol -------------------------------------------------------------------------------------------------------


def test_a_silo_that_fails_in_phase_one_is_left_out_of_cbar_and_of_the_sum(federate):
    learner, parts = Toy(), parts_of((6, 9, 5))
    federation = federate(FishrInterGeo(penalty_weight=1.0, server_optimizer=SGD), learner, learner.build(), parts)
    answer = federation.strategy.client_statistics
    federation.strategy.client_statistics = lambda silo, content: 1 / 0 if len(silo.train) == 9 else answer(silo, content)
    federation.round(1, failures=1)
    _, expected = central_penalty(learner.build(), [parts[0], parts[2]])
    assert [failure.client for failure in federation.strategy.failures] == [1]
    assert distance(weighted(federation.answers(), "penalty", [1, 1]), expected) < 1e-10


def test_too_few_variances_stop_the_round(federate):
    federation = federate(Fishr(min_clients=2), Toy(), Toy().build(), parts_of((6, 9)))
    federation.strategy.client_statistics = lambda silo, content: 1 / 0
    with pytest.raises(AggregationError, match=r"0 usable answers.*ZeroDivisionError"):
        federation.round(1)


@pytest.mark.parametrize("name", NAMES)
def test_a_stale_cbar_survives_in_the_state(federate, name):
    learner, parts = Toy(), parts_of((6, 9))
    kind = strategies.find(name)
    options = {"shuffle": False} if "intra" in name else {}
    first = federate(kind(penalty="stale", **options), learner, learner.build(), parts)
    first.round(1)
    again = federate(kind(penalty="stale", **options), learner, learner.build(), parts)
    again.arrays = first.arrays
    again.strategy.load_state(copy.deepcopy(first.strategy.state()))
    assert again.round(2)["penalty"] == first.round(2)["penalty"] > 0
    assert all(torch.equal(again.arrays[key], first.arrays[key]) for key in first.arrays)


def test_the_answer_does_not_depend_on_who_else_there_is_but_through_cbar():
    learner, part = Toy(), parts_of((6,))[0]
    model = learner.build()
    cbar = {"classifier.weight": torch.full((3, 5), 0.1).double(), "classifier.bias": torch.full((3,), 0.2).double()}
    content = RecordDict({"variance": pack(cbar), "config": ConfigRecord({"penalty-weight": 2.0, "silos": 4})})
    answer = FishrInterGeo().client_update(Silo(learner, model, dict(model.state_dict()), part), content)
    c = looped_variance(model, part)
    value = 2 * 4 * (c - torch.cat([tensor.reshape(-1) for tensor in cbar.values()])).square().sum()
    slopes = dict(zip(dict(model.named_parameters()), torch.autograd.grad(value, list(model.parameters())), strict=True))
    assert answer.metrics["penalty"] == pytest.approx(value.item(), rel=1e-10)
    assert distance(dict(answer.records["penalty"]), slopes) < 1e-10
    assert distance(dict(answer.records["gradient"]), mean_gradient(model, part)) < 1e-12


# ---- who leaves between the phases ------------------------------------------------------------------------------------


class Leaving(PassingGrid):
    """Some clients say what their variance is, and answer no training message after that."""

    def __init__(self, grid, clients):
        super().__init__(grid)
        self.clients, self.asked = clients, []

    def __enter__(self):
        return self._grid.__enter__()

    def __exit__(self, *error):
        return self._grid.__exit__(*error)

    def send_and_receive(self, messages, *, timeout=None):
        sent = {message.metadata.dst_node_id: message for message in messages}
        self.asked.append(sorted(sent))
        for answer in self._grid.send_and_receive(sent.values()):
            client, training = answer.metadata.src_node_id, answer.metadata.message_type == "train"
            yield Message(Error(5, "gone"), reply_to=sent[client]) if training and client in self.clients else answer


class Without(Leaving):
    """A federation to which some clients never belonged."""

    def get_node_ids(self):
        return [node for node in self._grid.get_node_ids() if node not in self.clients]


@pytest.mark.parametrize("kind", [Fishr, FishrInterGeo, FishrIntraGeo])
def test_who_leaves_between_the_phases_leaves_no_trace(kind, federate):
    parts = parts_of((5, 7, 9))

    def a_round(wrap, failures):
        federation = federate(kind(penalty_weight=2.0, server_optimizer=SGD), Toy(), Toy().build(), parts)
        federation.grid = wrap(federation.grid, [1])
        return federation, federation.round(1, failures)

    left, metrics = a_round(Leaving, 1)
    never, expected = a_round(Without, 0)
    assert all(torch.equal(left.arrays[name], never.arrays[name]) for name in never.arrays)
    assert metrics == expected and metrics["penalty"] > 0
    assert [str(failure) for failure in left.strategy.failures] == ["client 1: gone"]
    assert (left.strategy.cohort, left.strategy.answered) == ([0, 2], 2)
    assert left.grid.asked == [[0, 1, 2], [0, 1, 2], [0, 2], [0, 2]]


def test_if_all_leave_between_the_phases_the_round_fails(federate):
    federation = federate(Fishr(penalty_weight=2.0), Toy(), Toy().build(), parts_of((5, 7)))
    federation.grid = Leaving(federation.grid, [0, 1])
    with pytest.raises(TooFewAnswersError, match="client 0: gone; client 1: gone"):
        federation.round(1)
