"""Runs under differential privacy: epsilon in every row, kept over resumes and engines, and refusals before anything starts."""

import math

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import run
from benchmarks.display import numbers
from fedvision.assembly import Assembly
from fedvision.data import FederatedData
from fedvision.errors import EngineError, ExperimentError
from fedvision.experiment import Experiment
from fedvision.privacy import Ledger
from fedvision.seeds import generator
from server.checkpoint import Checkpoint
from server.record import read_rows

EXAMPLE = {"unit": "example", "clipping_norm": 1.0, "noise_multiplier": 1.5, "delta": 0.01}
CLIENT = {"unit": "client", "clipping_norm": 0.5, "noise_multiplier": 1.0, "delta": 0.01}
FEDAVG = {"name": "fedavg", "batch_size": 5, "weight_by": "clients", "client_optimizer": {"name": "SGD", "lr": 0.2}}


def data(sizes=(20, 12, 15), shape=(1, 4, 4)) -> FederatedData:
    rng = generator(7)
    pairs = [(torch.rand(n, *shape, generator=rng), torch.randint(3, (n,), generator=rng)) for n in (*sizes, 10)]
    return FederatedData.from_arrays(train=pairs[:-1], validation=[pairs[-1]] * len(sizes), test=pairs[-1], classes=3)


def trained(here, *, privacy=None, strategy=FEDAVG, on_round=lambda row: None, resume=False, held=None, out="run", **changed):
    tables = {"name": "private", "rounds": 4, "tensorboard": False, "data": {"name": "digits"}, "strategy": strategy}
    tables |= {"learner": {"name": "classifier", "hidden": [4]}} | ({} if privacy is None else {"privacy": privacy})
    experiment = Experiment.from_tables({**tables, **changed})
    return run(experiment, data=held or data(), out=here / out, draw=False, on_round=on_round, resume=resume)


def rows(done):
    return list(read_rows(done.path / "rounds.jsonl"))


def weights(done):
    return load_file(done.path / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_epsilon_of_each_row_is_that_of_the_client_who_has_spent_most(here):
    done = trained(here, privacy=EXAMPLE)
    for row in rows(done):
        spent = [Ledger(((1.5, 5 / n, row["round"] * math.ceil(n / 5)),)).epsilon(0.01, "rdp") for n in (20, 12, 15) if row["round"]]
        assert row["epsilon"] == pytest.approx(max(spent, default=0.0)) and row["delta"] == 0.01


def test_what_is_not_protected_is_not_told(here):
    for row in rows(trained(here, privacy=EXAMPLE)) + rows(trained(here, privacy=CLIENT, out="client")):
        assert not [name for name in row if name.startswith(("train_", "validation_"))] and "test_loss" in row
    told = rows(trained(here, privacy=EXAMPLE | {"validation_in_the_clear": True}, out="clear"))
    assert all("validation_loss" in row and "train_loss" not in row for row in told)


def distance(one, other):
    assert one.keys() == other.keys()
    return torch.cat([(one[name] - other[name]).flatten() for name in one]).norm()


RESNET = {"name": "classifier", "model": "test_resnet", "normalization": "group"}


@pytest.mark.parametrize(
    ("unit", "clipping", "learner", "shape"),
    [
        ("client", "auto", {"name": "classifier", "hidden": [4]}, (1, 4, 4)),
        ("example", "ghost", {"name": "classifier", "hidden": [4]}, (1, 4, 4)),
        ("example", "explicit", {"name": "classifier", "hidden": [4]}, (1, 4, 4)),
        ("example", "ghost", RESNET, (3, 32, 32)),
        ("example", "explicit", RESNET, (3, 32, 32)),
    ],
)
def test_without_noise_and_clipping_a_run_is_the_plain_one_if_every_batch_is_all_of_a_silo(here, unit, clipping, learner, shape):
    """Where batches are no larger than any silo: q = 1, and Poisson sampling takes all examples as shuffled batches do.

    With smaller batches the two take other examples, and no such comparison can be made.
    """
    strategy = {"name": "fedavg", "batch_size": 20, "epochs": 2, "weight_by": "clients", "client_optimizer": {"name": "SGD", "lr": 0.05}}
    seed = 3  # of weights at which no ReLU is so near its kink that the order of a sum decides
    same_job = {"strategy": strategy, "learner": learner, "held": data(shape=shape), "rounds": 2, "seed": seed}
    plain = weights(trained(here, out="plain", **same_job))
    clear = {"clipping_norm": math.inf, "noise_multiplier": 0.0, "delta": 0.01, "unit": unit, "clipping": clipping}
    done = trained(here, privacy=clear, out="private", **same_job)
    begun = weights(trained(here, out="begun", **same_job | {"rounds": 0}))
    assert distance(weights(done), plain) < 1e-4 * distance(plain, begun)
    assert rows(done)[-1]["epsilon"] is None  # infinite


def test_one_client_more_or_fewer_moves_the_released_sum_by_at_most_the_clipping_norm(here):
    held = data()
    held.train[2].image.mul_(100)
    clear = CLIENT | {"noise_multiplier": 0.0}
    begun = weights(trained(here, privacy=clear, held=held, rounds=0, out="begun"))

    def released(clients):
        done = weights(trained(here, privacy=clear, held=held.only(clients), rounds=1, out=f"{len(clients)}"))
        return len(clients) * torch.cat([(tensor - begun[name]).flatten() for name, tensor in done.items()])

    assert 0.49 < (released([0, 1, 2]) - released([0, 1])).norm() < 0.5001


@pytest.mark.parametrize("privacy", [EXAMPLE, CLIENT])
def test_a_resumed_run_ends_with_the_same_bits_and_the_same_epsilon(here, privacy):
    whole = trained(here, privacy=privacy, out="whole")

    def stop(row):
        if row["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(here, privacy=privacy, on_round=stop)
    resumed = trained(here, privacy=privacy, resume=True)
    assert same(weights(whole), weights(resumed))
    assert [row["epsilon"] for row in rows(whole)] == [row["epsilon"] for row in rows(resumed)]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*subprocess.*:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_engines_agree_on_weights_and_accounts(here):
    runs = [
        trained(here, privacy=EXAMPLE, engine=engine, out=engine["name"])
        for engine in ({"name": "in-process"}, {"name": "ray", "workers": 2})
    ]
    assert same(*map(weights, runs))
    kept = [Checkpoint.load(done.path / "checkpoint.safetensors").clients for done in runs]
    for client in range(3):
        one, other = (Ledger.of(states[client]) for states in kept)
        assert one == other and one.entries[0][2] == 4 * math.ceil((20, 12, 15)[client] / 5)
    assert [row["epsilon"] for row in rows(runs[0])] == [row["epsilon"] for row in rows(runs[1])]


@pytest.mark.parametrize("name", ["fedprox", "fedadam", "scaffold", "fedmedian"])
def test_other_strategies_train_under_example_level_privacy(here, name):
    done = trained(here, privacy=EXAMPLE, strategy={"name": name, "batch_size": 5, "client_optimizer": {"name": "SGD", "lr": 0.1}})
    assert rows(done)[-1]["epsilon"] > 0 and not rows(done)[-1]["failures"]


def test_the_target_is_spent_by_the_last_round_if_a_client_is_in_all(here):
    target = {"unit": "example", "clipping_norm": 1.0, "target_epsilon": 2.0, "delta": 0.01}
    assert 1.9 < rows(trained(here, privacy=target))[-1]["epsilon"] <= 2.0
    target = {"unit": "client", "clipping_norm": 1.0, "target_epsilon": 2.0, "delta": 0.01}
    assert 1.9 < rows(trained(here, privacy=target, out="client"))[-1]["epsilon"] <= 2.0


@pytest.mark.parametrize("name", ["fedavg", "fedyogi"])
def test_client_level_rounds_go_on_when_nobody_is_drawn(here, name):
    strategy = FEDAVG | {"name": name, "fraction": 0.2}
    done = trained(here, privacy=CLIENT, strategy=strategy, rounds=8)
    counts = [row["clients"] for row in rows(done)[1:]]
    assert 0 in counts and max(counts) > 0
    assert rows(done)[-1]["epsilon"] == pytest.approx(Ledger(((1.0, 0.2, 8),)).epsilon(0.01, "rdp"))


def test_the_progress_and_a_bench_see_epsilon(here):
    seen = []
    done = trained(here, privacy=EXAMPLE, on_round=lambda row: seen.append(numbers(row)))
    assert seen[-1].endswith(f"epsilon {done.rounds['epsilon'].iloc[-1]:.2f}  3 clients")
    assert done.rounds["epsilon"].is_monotonic_increasing and "epsilon" in done.rounds


def test_noise_of_the_operating_system_cannot_be_repeated(here):
    one, other = (trained(here, privacy=EXAMPLE | {"secure": True}, rounds=1, out=str(i)) for i in range(2))
    assert not same(weights(one), weights(other))
    assert same(*(weights(trained(here, privacy=EXAMPLE, rounds=1, out=f"seeded{i}")) for i in range(2)))


BATCH_NORM = {"name": "classifier", "model": "resnet18"}


@pytest.mark.parametrize(
    ("privacy", "changed", "reason"),
    [
        (EXAMPLE, {"strategy": {"name": "fedcurv"}}, "does not cover strategy FedCurv, since its clients send their Fisher information"),
        (EXAMPLE, {"strategy": {"name": "fishr"}}, "does not cover strategy Fishr.*, since its clients send variances of gradients"),
        (EXAMPLE, {"strategy": {"name": "fedsgd"}}, "its clients send gradients of all of their examples"),
        (CLIENT, {"strategy": {"name": "scaffold"}}, "control variates are a second thing that a client sends"),
        (CLIENT, {"strategy": {"name": "fedmedian"}}, "its rule is no mean"),
        (CLIENT, {"strategy": {"name": "flwr.serverapp.strategy:FedAvg"}}, "what it does with the answers is another project's"),
        (CLIENT, {"strategy": {"name": "fedavg"}}, r'strategy.weight_by = \'examples\': .* set strategy.weight_by = "clients"'),
        (EXAMPLE, {"strategy": FEDAVG | {"shuffle": False}}, "strategy.shuffle = false"),
        (EXAMPLE | {"delta": 0.05}, {}, r"a client has 20 examples, and delta must be below 1 / 20 = 0.05"),
        (CLIENT | {"delta": 0.5}, {}, r"there are 3 clients, and delta must be below 1 / 3"),
        (EXAMPLE | {"target_epsilon": 1.0}, {}, "give exactly one of the two"),
        (EXAMPLE | {"epsilon": 1.0}, {}, "privacy.epsilon: Privacy has no such setting; did you mean 'target_epsilon'"),
        (EXAMPLE | {"delta": 0}, {}, r"privacy.delta = 0: expected number > 0"),
    ],
)
def test_what_is_not_covered_is_refused_with_the_reason(here, privacy, changed, reason):
    with pytest.raises(ExperimentError, match=reason):
        trained(here, privacy=privacy, **changed)


@pytest.mark.parametrize("privacy", [EXAMPLE, CLIENT])
def test_batch_norm_is_refused_by_the_name_of_the_layer(here, privacy):
    fault = r"layer 'bn1' \(BatchNorm2d\) mixes .* if learner.normalization = 'group'"
    with pytest.raises(ExperimentError, match=r"\[privacy\] cannot train this model: " + fault):
        trained(here, privacy=privacy, learner=BATCH_NORM, held=data(shape=(3, 32, 32)))


@pytest.mark.parametrize("privacy", [EXAMPLE, CLIENT])
def test_with_group_norm_a_resnet_trains(here, privacy):
    done = trained(here, privacy=privacy, learner=RESNET, held=data(shape=(3, 32, 32)), rounds=1)
    assert rows(done)[-1]["epsilon"] > 0 and not rows(done)[-1]["failures"]


def test_learners_whose_examples_are_not_apart_are_refused():
    experiment = Experiment.load("albef-tiny", {"strategy.name": "fedavg"} | {f"privacy.{key}": value for key, value in EXAMPLE.items()})
    with pytest.raises(ExperimentError, match="the loss of learner ALBEF is not declared a mean over examples"):
        Assembly.of(experiment)


def test_clients_with_noise_of_their_own_are_not_stacked(here):
    with pytest.raises(EngineError, match=r"with \[privacy\] each client draws batches and noise of its own"):
        trained(here, privacy=EXAMPLE, engine={"name": "in-process", "batch_clients": 2})


def test_the_bundled_experiment_learns_at_its_epsilon(here):
    done = run("quickstart-private", {"tensorboard": False}, out=here / "run", draw=False)
    last = rows(done)[-1]
    assert last["test_accuracy"] > 0.8 and 3.9 < last["epsilon"] <= 4.0 and last["delta"] == 1e-4
