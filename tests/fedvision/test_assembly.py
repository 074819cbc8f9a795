import pytest
import torch

from fedvision.assembly import Assembly, assembly_of, installed
from fedvision.data import Examples, Spec
from fedvision.errors import ExperimentError, RunError
from fedvision.evaluation import BATCH, evaluate
from fedvision.learners.classifier import Classifier
from fedvision.models import MLP
from fedvision.seeds import generator


def test_the_parts_fit_together(experiment, federated):
    assembly = Assembly.of(experiment(seed=3), federated)
    assert assembly.data is federated
    assert assembly.strategy.seed == 3
    assert assembly.model.hidden1.in_features == 32
    assert assembly.device == torch.device("cpu")


def test_the_initial_weights_are_a_copy_that_depends_on_the_seed(experiment, federated):
    one, same, other = (Assembly.of(experiment(seed=seed), federated) for seed in (0, 0, 1))
    assert all(torch.equal(one.initial[name], same.initial[name]) for name in one.initial)
    assert not torch.equal(one.initial["hidden1.weight"], other.initial["hidden1.weight"])
    with torch.no_grad():
        one.model.hidden1.weight.zero_()
    assert one.initial["hidden1.weight"].any()


def test_parts_are_built_once_a_run_from_its_configuration(experiment, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(experiment().to_toml())
    config = {"experiment": str(file), "overrides": "rounds=1; strategy.name=fedavg ;"}
    first = assembly_of(77_001, config)
    assert first is assembly_of(77_001, config) is not assembly_of(77_002, config)
    assert (first.experiment.rounds, first.experiment.strategy.name) == (1, "fedavg")


def test_the_configuration_may_hold_the_text_of_an_experiment(experiment):
    built = assembly_of(77_004, {"experiment": experiment(seed=5).to_toml(), "overrides": "rounds=1"})
    assert (built.experiment.seed, built.experiment.rounds) == (5, 1)


def test_a_process_that_builds_its_parts_computes_with_the_experiments_threads(experiment, monkeypatch):
    told = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    assembly_of(77_005, {"experiment": experiment(threads=3).to_toml()})
    assert told == [3]


def test_an_installed_assembly_is_used_within_its_block_only(experiment, federated):
    assembly = Assembly.of(experiment(), federated)
    with installed(77_003, assembly):
        assert assembly_of(77_003, {"experiment": "nowhere"}) is assembly
    with pytest.raises(ExperimentError, match="no experiment 'nowhere'"):
        assembly_of(77_003, {"experiment": "nowhere"})


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_first(experiment, federated, device):
    with pytest.raises(ExperimentError, match=rf"engine.device = '{device}' cannot be used .*fedvision doctor"):
        Assembly.of(experiment(engine={"name": "in-process", "device": device}), federated)


def test_evaluation_in_batches_is_that_of_the_whole():
    learner, n = Classifier(hidden=(2,)), 2 * BATCH + 7
    rng = generator(0)
    examples = Examples({"image": torch.rand(n, 3, generator=rng), "label": torch.arange(n) % 2})
    model = learner.build(Spec((3,), 2), rng).train()
    whole = learner.evaluate(model, examples).result()
    assert evaluate(learner, model, examples) == pytest.approx(whole, rel=1e-5)
    assert not model.training


def test_nothing_to_evaluate_is_no_metrics():
    learner = Classifier(hidden=(2,))
    assert evaluate(learner, MLP((3,), (2,), 1), Examples({"image": torch.zeros(0, 3), "label": torch.zeros(0, dtype=torch.int64)})) == {}


def test_arrays_make_a_model_to_look_at(experiment, federated):
    one, other = (Assembly.of(experiment(seed=seed), federated) for seed in (0, 1))
    model = one.loaded({**other.initial, "superfluous": torch.ones(1)})
    assert model is one.model and not model.training
    assert all(torch.equal(tensor, other.initial[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"hidden1.bias": torch.ones(1)}, r"'hidden1.bias' has shape \(1,\), the model needs \(6,\)"), (None, "none of that name")],
)
def test_arrays_of_another_model_are_refused_and_change_nothing(experiment, federated, change, message):
    assembly = Assembly.of(experiment(), federated)
    before = {name: tensor.clone() for name, tensor in assembly.model.state_dict().items()}
    with pytest.raises(RunError, match=message):
        assembly.loaded({**assembly.initial, **change} if change else {})
    assert all(torch.equal(tensor, before[name]) for name, tensor in assembly.model.state_dict().items())
