import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks import run
from fedvision import cache, teachers
from fedvision.data import Examples, Spec
from fedvision.data.digits import digits
from fedvision.ema import Averaged
from fedvision.errors import ExperimentError
from fedvision.evaluation import evaluate
from fedvision.holdings import Holdings
from fedvision.learners import usi
from fedvision.learners.check import check_learner
from fedvision.learners.usi import TARGET, USI, cross_entropy, distillation, objective
from fedvision.normalization import Normalization
from fedvision.registry import datasets
from fedvision.seeds import generator, global_generators, numpy_generator
from fedvision.silo import Silo


@pytest.fixture(scope="module")
def arrays(golden):
    with np.load(golden / "usi.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file if name.startswith("kd_")}


def logits(*purpose):
    return torch.randn(6, 10, generator=generator(0, *purpose))


@pytest.mark.golden
def test_the_losses_are_the_references(arrays):
    student, teacher, targets = (arrays[f"kd_{name}"] for name in ("student_logits", "teacher_logits", "soft_targets"))
    student = student.requires_grad_()
    ce, kd = cross_entropy(student, targets), distillation(student, teacher)
    assert torch.isclose(ce, arrays["kd_ce"], rtol=1e-5)
    assert torch.isclose(kd, arrays["kd_kl"], rtol=1e-5)
    assert torch.isclose(objective(ce, kd, 5), arrays["kd_total_alpha5"], rtol=1e-5)
    assert torch.isclose(objective(ce, kd, 5, only_teacher=True), arrays["kd_only_alpha5"], rtol=1e-5)
    [slope] = torch.autograd.grad(objective(ce, kd, 5), student)
    assert torch.allclose(slope, arrays["kd_grad_total"], rtol=1e-5, atol=1e-6)


@pytest.mark.golden
def test_the_temperatures_are_the_references(arrays):
    checked = [name for name in arrays if name.startswith("kd_kl_tau")]
    assert checked
    for name in checked:
        found = distillation(arrays["kd_student_logits"], arrays["kd_teacher_logits"], float(name.removeprefix("kd_kl_tau")))
        assert torch.isclose(found, arrays[name], rtol=1e-5)


def test_the_losses_follow_their_equations():
    student, teacher, targets = logits("student"), logits("teacher"), logits("targets").softmax(1)
    log_s, p_t = [[x - math.log(sum(map(math.exp, row))) for x in row] for row in student.tolist()], teacher.softmax(1).tolist()
    ce = sum(-y * s for ys, ss in zip(targets.tolist(), log_s, strict=True) for y, s in zip(ys, ss, strict=True)) / 6
    kd = sum(t * (math.log(t) - s) for ts, ss in zip(p_t, log_s, strict=True) for t, s in zip(ts, ss, strict=True)) / 6
    assert cross_entropy(student, targets).item() == pytest.approx(ce, rel=1e-5)
    assert distillation(student, teacher).item() == pytest.approx(kd, rel=1e-5)


def test_the_gradient_is_that_of_the_closed_form():
    student, teacher, targets = logits("student").requires_grad_(), logits("teacher"), logits("targets").softmax(1)
    [slope] = torch.autograd.grad(objective(cross_entropy(student, targets), distillation(student, teacher), 5), student)
    p_s, p_t = student.softmax(1), teacher.softmax(1)
    assert torch.allclose(slope, (p_s - targets + 5 * (p_s - p_t)) / 6, atol=1e-6)


def test_without_weight_the_teacher_changes_nothing():
    assert objective(2.5, 1e9, 0.0) == 2.5


def test_a_student_that_agrees_with_its_teacher_has_nothing_to_learn_from_it():
    assert distillation(logits("same"), logits("same") + 3).item() == pytest.approx(0, abs=1e-6)


def test_rescaling_undoes_what_the_temperature_does_to_the_size_of_the_gradient():
    student, teacher = logits("student"), logits("teacher")
    assert torch.isclose(distillation(student, teacher, 4, rescaled=True), 16 * distillation(student, teacher, 4))
    sizes = []
    for temperature in (50.0, 100.0):
        variable = student.clone().requires_grad_()
        [slope] = torch.autograd.grad(distillation(variable, teacher, temperature, rescaled=True), variable)
        sizes.append(slope.norm())
    assert torch.isclose(*sizes, rtol=0.05)


def test_impossible_classes_of_a_sure_teacher_are_no_trouble():
    teacher = torch.tensor([[200.0, 0.0, -200.0]])
    assert distillation(torch.zeros(1, 3), teacher).item() == pytest.approx(math.log(3))


# ---- the paper's networks -------------------------------------------------------------------------------------------

PARAMETERS = {
    "resnet50": 25_557_032,
    "tresnet_m": 31_389_032,
    "tresnet_l": 55_989_256,
    "tresnet_v2_l": 46_174_824,
    "volo_d1_224": 26_632_040,
    "levit_384": 39_128_836,
    "vit_small_patch16_224": 22_050_664,
    "mobilenetv3_large_100": 5_483_032,
    "efficientnet_b0": 5_288_548,
    "mixer_b16_224": 59_880_472,
    "resmlp_12_224": 15_350_872,
    "convnext_small": 50_223_688,
    "regnety_032": 19_436_338,
    "swin_small_patch4_window7_224": 49_606_258,
    "tnt_s_patch16_224": 23_768_584,
    "edgenext_small": 5_586_832,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_papers_networks_have_their_published_sizes(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(param.numel() for param in model.parameters()) == PARAMETERS[name]


# ---- the learner ----------------------------------------------------------------------------------------------------

DIGITS = Spec((1, 8, 8), 10)
IMAGES = Spec((3, 16, 16), 3)
TEACHER = {"model": "cnn", "widths": [8, 16], "data": {"name": "digits"}, "steps": 20}
SMALL = {"augmentation": "none", "widths": (4, 8)}


@pytest.fixture(scope="module")
def pool():
    return digits(test_fraction=597 / 1797, rng=numpy_generator(0, "data"))


def some(n=6, spec=DIGITS):
    return Examples({"image": torch.rand(n, *spec.image_shape, generator=generator(0)), "label": torch.arange(n) % spec.classes})


def trained(learner, examples, steps, seed=0, spec=DIGITS, batch_size=64, lr=2e-3):
    """A model of the learner after some steps of the recipe's optimizer."""
    model, rng = learner.build(spec, generator(seed, "model")), generator(seed, "fit")
    with global_generators(rng):
        silo = Silo(learner, model, Holdings.of(learner, model).shared, examples, rng=rng, span=1.0)
        silo.descend(silo.batches(batch_size, steps=steps), usi.adamw() | {"lr": lr})
    return model


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "learner",
    [
        USI(augmentation="shift", ema_decay=0),
        USI(average="private", ema_warmup=True, repeats=3),
        USI(model="test_resnet", resolution=32),
        USI(model="test_vit", resolution=32, ema_decay=0, drop_path=0.1),
    ],
    ids=["shift", "private", "timm", "transformer"],
)
def test_learners_of_other_settings_conform(learner):
    check_learner(learner)


@pytest.mark.parametrize("change", [{}, {"only_teacher": True, "temperature": 2.0, "rescaled": True}, {"alpha": 0.0}], ids=str)
def test_a_learner_with_a_teacher_conforms(change):
    check_learner(USI(teacher=TEACHER, **change), some(), DIGITS)


def test_a_batch_is_augmented_mixed_and_has_soft_labels():
    learner, train = USI(), Examples({"image": (255 * some(8).image).byte(), "label": some(8).label})
    model = learner.build(DIGITS, generator(0))
    index = torch.tensor([3, 1, 4, 5])
    batch, again = (learner.draw(model, train, index, generator(0)) for _ in range(2))
    assert batch.image.shape == (4, 1, 8, 8) and batch.image.dtype == torch.float32
    assert batch.label.tolist() == [3, 1, 4, 5]
    targets = batch.fields[TARGET]
    assert torch.allclose(targets.sum(1), torch.ones(4)) and (targets[0, [3, 5]] > 0).all()
    assert same(dict(batch.fields), dict(again.fields))
    assert not torch.equal(batch.image, learner.draw(model, train, index, generator(1)).image)


def test_the_loss_is_that_of_the_paper():
    learner = USI(teacher=TEACHER, temperature=2.0, rescaled=True, **SMALL)
    model, rng = learner.build(DIGITS, generator(0)).train(), generator(0)
    batch = learner.draw(model, some(), slice(0, 6), rng)
    loss = learner.loss(model, batch, 0.5, rng)
    student, advice = model.network(batch.image), model.teacher(batch.image)
    ce, kd = cross_entropy(student, batch.fields[TARGET]), 4 * distillation(student, advice, 2.0)
    assert torch.isclose(loss.parts["labels"], ce) and torch.isclose(loss.parts["teacher"], kd)
    assert torch.isclose(loss.total, ce + 5 * kd)
    alone = replace(learner, only_teacher=True).loss(model, batch, 0.5, rng)
    assert torch.isclose(alone.total, 5 * kd)


def test_without_mixing_soft_labels_are_the_labels():
    learner, rng = USI(mixup=0, cutmix=0, **SMALL), generator(0)
    model = learner.build(DIGITS, rng)
    batch = learner.draw(model, some(), slice(0, 6), rng)
    hard = Examples({name: values for name, values in batch.fields.items() if name != TARGET})
    assert torch.equal(learner.loss(model, batch, 0, rng).total, learner.loss(model, hard, 0, rng).total)


def test_the_teacher_sees_the_same_images_in_its_own_normalization():
    half, imagenet = Normalization((0.5,) * 3, (0.5,) * 3), Normalization.of_timm("resnet50")
    pupil = usi.Pupil(nn.Identity(), nn.Identity(), (half, imagenet), 3)
    images = torch.rand(2, 3, 4, 4, generator=generator(0))
    seen, taught = pupil(half(images), taught=True)
    assert torch.equal(seen, half(images)) and torch.allclose(taught, imagenet(images), atol=1e-6)


def test_the_teacher_never_changes():
    learner = USI(teacher=TEACHER, **SMALL)
    before = learner.build(DIGITS, generator(0))
    after = trained(learner, some(20), 5)
    assert same(before.teacher.state_dict(), after.teacher.state_dict())
    assert not after.train().teacher.training and after.student.training
    assert not any(param.requires_grad for param in after.teacher.parameters())


def test_the_teacher_stays_where_it_is():
    learner = USI(teacher=TEACHER, **SMALL)
    model = learner.build(DIGITS, generator(0))
    held = Holdings.of(learner, model)
    assert {name.split(".")[0] for name in held.shared} == {"student", "steps"} and not held.private
    assert {learner.holding(name) for name in model.state_dict() if name.startswith("teacher")} == {"constant"}


def test_without_weight_the_teacher_makes_no_difference_to_any_bit():
    plain, idle, taught = (
        trained(USI(**SMALL, **table), some(20), 5) for table in ({}, {"teacher": TEACHER, "alpha": 0}, {"teacher": TEACHER})
    )
    assert same(plain.student.state_dict(), idle.student.state_dict())
    assert not same(plain.student.state_dict(), taught.student.state_dict())


def test_with_repeats_a_pass_visits_some_examples_several_times():
    order = USI(repeats=3).order(12, generator(0))
    assert len(order) == 12 and sorted(order.bincount(minlength=12).tolist()) == [0] * 8 + [3] * 4
    assert torch.equal(order, USI(repeats=3).order(12, generator(0)))
    assert sorted(USI().order(12, generator(0)).tolist()) == list(range(12))


# ---- its average and its optimizer ----------------------------------------------------------------------------------


def test_the_average_is_timms():
    from timm.utils.model_ema import ModelEmaV3

    learner = USI(ema_decay=0.9, **SMALL)
    model, rng = learner.build(DIGITS, generator(0)), generator(1)
    reference = ModelEmaV3(copy.deepcopy(model.network), decay=0.9)
    for _ in range(3):
        for tensor in model.network.state_dict().values():
            tensor.add_(torch.randint(5, tensor.shape, generator=rng).to(tensor.dtype))
        learner.follow(model, some(), 0.5)
        reference.update(model.network)
    expected = reference.module.state_dict()
    assert all(torch.allclose(tensor, expected[name]) for name, tensor in model.average.state_dict().items())
    assert int(model.steps) == 3


def test_a_warmed_up_average_follows_quickly_at_first():
    learner = USI(ema_decay=0.99, ema_warmup=True, **SMALL)
    model = learner.build(DIGITS, generator(0))
    with torch.no_grad():
        model.network.classifier.bias.fill_(1)
    before = model.average.classifier.bias.clone()
    learner.follow(model, some(), 0.5)
    assert torch.allclose(model.average.classifier.bias, 0.1 * before + 0.9)


@pytest.mark.parametrize("where", ["shared", "private"])
def test_the_average_travels_or_stays(where):
    learner = USI(average=where, **SMALL)
    model = learner.build(DIGITS, generator(0))
    names = {name for name in model.state_dict() if name.startswith("student.average.")} | {"steps"}
    assert names and names <= getattr(Holdings.of(learner, model), where).keys()


def test_an_average_of_ones_own_begins_at_the_weights_that_were_sent():
    for where in ("private", "shared"):
        learner = USI(average=where, **SMALL)
        model = learner.build(DIGITS, generator(0))
        with torch.no_grad():
            model.network.classifier.bias.fill_(3)
        learner.begin(model)
        assert bool((model.average.classifier.bias == 3).all()) == (where == "private")


def test_without_decay_there_is_no_average():
    model = USI(ema_decay=0, **SMALL).build(DIGITS, generator(0))
    assert not isinstance(model.student, Averaged) and "steps" not in model.state_dict()
    assert set(evaluate(USI(ema_decay=0, **SMALL), model, some())) == {"loss", "accuracy", "top5_accuracy"}


def test_both_the_network_and_its_average_are_measured():
    learner = USI(**SMALL)
    model = learner.build(DIGITS, generator(0))
    with torch.no_grad():
        model.average.classifier.bias[3] = 100  # it says 3, always
    found = evaluate(learner, model, some(10))
    assert found["average_accuracy"] == 0.1 and found["average_loss"] > found["loss"]


@pytest.mark.parametrize("name", ["cnn", "test_vit", "test_resnet"])
def test_vectors_and_what_a_network_names_are_not_decayed(name):
    learner = USI(model=name, augmentation="none") if name == "cnn" else USI(model=name, resolution=32)
    model = learner.build(IMAGES, generator(0))
    [group] = learner.groups(model)
    params = dict(model.network.named_parameters())
    named = model.network.no_weight_decay() if hasattr(model.network, "no_weight_decay") else set()
    expected = {f"student.network.{key}" for key, param in params.items() if param.ndim <= 1 or key.endswith(".bias") or key in named}
    assert set(group.names) == expected and not group.decayed
    assert name != "test_vit" or "student.network.pos_embed" in expected


def test_the_head_is_the_networks():
    for learner in (USI(**SMALL), USI(model="test_resnet", resolution=32)):
        model = learner.build(IMAGES, generator(0))
        assert learner.head(model) is (model.network.classifier if learner.model == "cnn" else model.network.get_classifier())


def test_a_network_of_two_heads_has_no_head():
    learner = USI(model="levit_128s", ema_decay=0)
    with torch.device("meta"):
        network = timm.create_model("levit_128s", num_classes=3)
    assert learner.head(usi.Pupil(network, None, (Normalization.none(3),) * 2, 3)) is None


# ---- its views ------------------------------------------------------------------------------------------------------


def test_photographs_are_seen_at_the_resolution_of_the_recipe():
    learner = USI(model="test_resnet", resolution=32)
    model = learner.build(Spec((3, 40, 40), 3), generator(0))
    examples = some(2, Spec((3, 40, 40), 3))
    assert learner.train_view(examples, generator(0)).image.shape == (2, 3, 32, 32)
    seen = []
    model.network.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    evaluate(learner, model, examples)
    assert seen[0].shape == (2, 3, 32, 32)


def test_images_are_normalized_as_the_network_expects():
    examples = some(2, IMAGES)
    seen = USI(model="test_resnet", augmentation="none").train_view(examples, generator(0)).image
    assert torch.equal(seen, Normalization.of_timm("test_resnet")(examples.image))


# ---- its teachers ---------------------------------------------------------------------------------------------------


def test_a_teacher_is_the_same_wherever_it_is_made(monkeypatch):
    learner = USI(teacher=TEACHER, **SMALL)
    first = learner.build(DIGITS, generator(0)).teacher.state_dict()
    monkeypatch.setattr(teachers, "_taught", {})
    from_disk = learner.build(DIGITS, generator(1)).teacher.state_dict()
    monkeypatch.setattr(teachers, "_taught", {})
    monkeypatch.setenv(cache.VARIABLE, "off")
    anew = learner.build(DIGITS, generator(2)).teacher.state_dict()
    assert same(first, from_disk) and same(first, anew)
    other = USI(teacher={**TEACHER, "seed": 1}, **SMALL).build(DIGITS, generator(0)).teacher.state_dict()
    assert not same(first, other)


def test_a_teacher_is_trained_once_for_a_process(monkeypatch):
    USI(teacher=TEACHER, **SMALL).build(DIGITS, generator(0))
    monkeypatch.setattr(teachers, "_trained", None)
    USI(teacher=TEACHER, **SMALL).build(DIGITS, generator(1))


def test_a_teacher_may_come_from_a_file(tmp_path):
    network = timm.create_model("test_resnet", num_classes=3).eval()
    save_file(network.state_dict(), tmp_path / "teacher.safetensors")
    learner = USI(teacher={"model": "test_resnet", "checkpoint": str(tmp_path / "teacher.safetensors")}, **SMALL)
    model = learner.build(IMAGES, generator(0)).eval()
    images = some(2, IMAGES).image
    with torch.no_grad():
        expected = network(Normalization.of_timm("test_resnet")(images))
        assert torch.allclose(model.advice(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"model": "tresnet_v2_l"}, "a teacher needs weights: give either teacher.checkpoint"),
        ({"checkpoint": "a.pth", "pretrained": True}, "a teacher needs weights"),
        ({"checkpoint": "nowhere.pth"}, "there is no checkpoint nowhere.pth"),
        ({"model": "tresnet_v2_l", "pretrained": True}, "are for 1000 classes, the data has 10"),
        ({"chekpoint": "a.pth"}, "learner.teacher.chekpoint: Published has no such setting; did you mean 'checkpoint'"),
        ({**TEACHER, "step": 3}, "learner.teacher.step: Trained has no such setting; did you mean 'steps'"),
        ({**TEACHER, "data": "digits"}, "learner.teacher.data = 'digits': expected a table with a name"),
        ({**TEACHER, "data": {"name": "digit"}}, "unknown data set 'digit'; did you mean 'digits'"),
        ({**TEACHER, "data": {"name": "digits", "size": 3}}, "learner.teacher.data.size: digits has no such setting"),
        ({**TEACHER, "data": {"name": "rotated-digits"}}, r"has inputs \[1, 16, 16\] of 10 classes, the clients have inputs \[1, 8, 8\]"),
        ({**TEACHER, "optimizer": {"name": "Adamw"}}, "unknown optimizer 'Adamw'; did you mean 'AdamW'"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(table, message):
    with pytest.raises(ExperimentError, match=message):
        USI(teacher=table, **SMALL).build(DIGITS, generator(0))


def test_a_public_set_is_one_that_is_not_dealt_to_clients(monkeypatch, federated):
    monkeypatch.setitem(datasets.entries, "test-dealt", lambda: federated)
    with pytest.raises(ExperimentError, match=r"learner\.teacher\.data: 'test-dealt' comes dealt to clients"):
        USI(teacher={**TEACHER, "data": {"name": "test-dealt"}}, **SMALL).build(DIGITS, generator(0))


def test_a_wrong_teacher_is_refused_before_anything_starts(experiment):
    with pytest.raises(ExperimentError, match="a teacher needs weights"):
        experiment(learner={"name": "usi", "teacher": {"model": "resnet18"}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"only_teacher": True}, "leaves nothing to learn from without a teacher"),
        ({"only_teacher": True, "teacher": TEACHER, "alpha": 0}, "leaves nothing to learn from"),
        ({"resolution": 32, "augmentation": "none"}, "learner.resolution needs augmentation = 'imagenet'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(change, message):
    with pytest.raises(ExperimentError, match=message):
        USI(**change)


def test_tables_are_refused():
    with pytest.raises(ExperimentError, match=r"needs images, the inputs have shape \(7,\); use learner classifier"):
        USI().build(Spec((7,), 2), generator(0))


# ---- in a federation, and whether it helps --------------------------------------------------------------------------


def test_a_run_sends_no_teacher_and_records_both_terms(experiment, tmp_path, no_figures):
    learner = {"name": "usi", "teacher": TEACHER, "average": "private", "augmentation": "none", "widths": [4, 8]}
    done = run(experiment(rounds=1, learner=learner, strategy={"name": "fedavg", "steps": 2}), out=tmp_path / "run")
    assert {name.split(".")[1] for name in done.state} == {"network"}
    assert {"train_labels", "train_teacher", "test_average_accuracy"} <= set(done.rounds.columns)


@pytest.mark.slow
def test_a_teacher_helps_a_student_of_few_labels(pool):
    """The teacher has seen all 1,200 labels, the student 100: as the paper's teacher has seen ImageNet-21k."""
    lesson = {"widths": [32, 64, 64], "data": {"name": "digits", "test_fraction": 597 / 1797}, "steps": 300}

    def accuracy(seed, **table):
        learner = USI(augmentation="none", widths=(6, 12, 12), ema_decay=0, **table)
        few = pool.train[torch.from_numpy(numpy_generator(seed, "few").permutation(len(pool.train))[:100])]
        return 100 * evaluate(learner, trained(learner, few, 200, seed), pool.test)["accuracy"]

    taught, alone = ([accuracy(seed, **table) for seed in range(5)] for table in ({"teacher": lesson}, {}))
    assert np.mean(taught) - np.mean(alone) >= 1.5
    assert np.mean(taught) >= 70
