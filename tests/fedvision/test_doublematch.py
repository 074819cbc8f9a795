import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedvision import ctaugment
from fedvision.data import Examples, Spec
from fedvision.data.digits import digits
from fedvision.data.labels import labeled_split
from fedvision.errors import ExperimentError
from fedvision.evaluation import evaluate
from fedvision.learners.check import check_learner
from fedvision.learners.doublematch import (
    PROBE_LEVELS,
    PROBE_OPERATIONS,
    STRONG,
    DoubleMatch,
    Projecting,
    SemiSupervised,
    checkpoint_names,
    confident,
    cosine_loss,
    kernels,
    pseudo_label_loss,
    similarity_loss,
    softmax_loss,
    squared_loss,
    supervised_loss,
)
from fedvision.seeds import generator, numpy_generator
from fedvision.silo import Silo
from fedvision.wide_resnet import SIZES, WideResNet, from_reference, to_reference

SPEC = Spec((3, 16, 16), 3)


def random(*shape, grad=False):
    return torch.randn(*shape, generator=generator(0, *shape)).requires_grad_(grad)


# ---- the losses -----------------------------------------------------------------------------------------------------


def test_the_supervised_loss_is_the_mean_cross_entropy():
    logits, labels = random(5, 3), torch.tensor([0, 1, 2, 0, 1])
    naive = sum(-math.log(math.exp(row[y]) / sum(map(math.exp, row))) for row, y in zip(logits.tolist(), labels.tolist(), strict=True)) / 5
    assert supervised_loss(logits, labels).item() == pytest.approx(naive, rel=1e-5)


def test_without_labels_the_supervised_loss_vanishes():
    logits = random(0, 3, grad=True)
    loss = supervised_loss(logits, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and logits.grad.shape == (0, 3)


def test_pseudo_labels_count_where_the_weak_view_is_confident_and_are_divided_by_all():
    weak = torch.tensor([[5.0, 0.0], [0.1, 0.0], [0.0, 4.0]])
    strong = random(3, 2)
    expected = (F.cross_entropy(strong[:1], torch.tensor([0])) + F.cross_entropy(strong[2:], torch.tensor([1]))) / 3
    assert confident(weak, 0.95).tolist() == [True, False, True]
    assert torch.allclose(pseudo_label_loss(weak, strong, 0.95), expected)


def test_a_prediction_at_the_threshold_is_confident():
    assert confident(torch.zeros(1, 2), 0.5).tolist() == [True]


def test_pseudo_labels_teach_the_strong_view_alone_and_only_where_confident():
    weak, strong = torch.tensor([[5.0, 0.0], [0.1, 0.0]], requires_grad=True), random(2, 2, grad=True)
    pseudo_label_loss(weak, strong, 0.95).backward()
    assert weak.grad is None and strong.grad[0].any() and not strong.grad[1].any()


def test_the_similarity_is_one_less_the_cosine():
    u, v = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]), torch.tensor([[5.0, 0.0], [0.0, -1.0], [1.0, 0.0]])
    assert cosine_loss(u, v).item() == pytest.approx(1 - (1 - 1 + math.sqrt(0.5)) / 3)


def test_squares_are_averaged_over_features_too():
    assert squared_loss(torch.zeros(2, 4), torch.full((2, 4), 3.0)).item() == 9


def test_the_temperature_divides_the_target_alone():
    u, z = random(4, 6), random(4, 6) + 1
    p = torch.softmax(z / 0.1, 1)
    expected = -(p * u.log_softmax(1)).sum(1).mean()
    assert torch.allclose(softmax_loss(u, z, 0.1), expected)


@pytest.mark.parametrize("kind", ["cosine", "mse", "softmax"])
def test_no_similarity_moves_the_weak_embedding(kind):
    projected, target = random(3, 4, grad=True), (random(3, 4) + 1).requires_grad_()
    similarity_loss(kind, projected, target, 0.5).backward()
    assert target.grad is None and projected.grad.any()


def test_an_embedding_of_zeros_has_a_finite_gradient():
    projected = torch.zeros(2, 3, requires_grad=True)
    cosine_loss(projected, torch.zeros(2, 3)).backward()
    assert projected.grad.isfinite().all()


def test_weight_decay_is_for_kernels():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    assert kernels(dict(model.named_parameters())) == (["0.weight", "2.weight"], ["0.bias", "1.weight", "1.bias", "2.bias"])


# ---- a step ---------------------------------------------------------------------------------------------------------


def tiny(**settings):
    """A learner small enough to be tried often."""
    return DoubleMatch(**({"scales": 2, "filters": 8, "repeat": 1, "labeled_batch": 4, "threshold": 0.35} | settings))


def examples(n=12, labeled=5, spec=SPEC):
    """Random images, the first few of which have labels."""
    label = torch.where(torch.arange(n) < labeled, torch.arange(n) % spec.classes, -1)
    return Examples({"image": torch.rand(n, *spec.image_shape, generator=generator(0, "images")), "label": label})


def drawn(learner, train, index=slice(None), spec=SPEC):
    model = learner.build(spec, generator(0, "model")).train()
    return model, learner.draw(model, train, index, generator(0, "draw"))


def loss_of(learner, model, batch):
    return learner.loss(model, batch, 0.0, generator(0, "loss"))


def test_a_batch_is_labeled_rows_and_the_unlabeled_ones_whose_turn_it_is():
    _, batch = drawn(tiny(), examples(), slice(3, 10))
    assert len(batch) == 4 + 7
    assert (batch.label[:4] >= 0).all() and (batch.label[4:] == -1).all()  # two of which have a label that is not looked at
    assert batch.image.shape == batch.fields[STRONG].shape == (11, 3, 16, 16)
    for views in (batch.image, batch.fields[STRONG]):
        assert views.min() >= -1 and views.max() <= 1 and views.min() < -0.9


def test_examples_may_be_named_by_their_indices_and_stored_as_bytes():
    train = examples()
    stored = Examples({**train.fields, "image": (train.image * 255).round().to(torch.uint8)})
    _, by_slice = drawn(tiny(), stored, slice(3, 10))
    _, by_index = drawn(tiny(), stored, torch.arange(3, 10))
    assert all(torch.equal(by_slice.fields[name], by_index.fields[name]) for name in by_slice.fields)
    _, floats = drawn(tiny(), train, slice(3, 10))
    assert torch.allclose(by_slice.image, floats.image, atol=1 / 255 + 1e-6)


def test_labeled_rows_repeat_evenly_where_there_are_few():
    label = examples(labeled=3).label
    _, batch = drawn(tiny(labeled_batch=8), examples(labeled=3))
    assert sorted(batch.label[:8].bincount(minlength=3).tolist()) == [2, 3, 3]
    _, batch = drawn(tiny(labeled_batch=3), examples(labeled=3))
    assert sorted(batch.label[:3].tolist()) == sorted(label[:3].tolist())


def test_every_unlabeled_example_has_two_views_of_its_own():
    train = examples()
    train = Examples({**train.fields, "image": train.image[:1].expand(12, -1, -1, -1)})
    _, batch = drawn(tiny(augmentation="weak"), train)
    views = torch.cat([batch.image[4:], batch.fields[STRONG][4:]])
    assert len(views.unique(dim=0)) > 12


def test_drawing_changes_neither_model_nor_examples():
    train, learner = examples(), tiny()
    model = learner.build(SPEC, generator(0))
    before, state = {name: values.clone() for name, values in train.fields.items()}, {n: t.clone() for n, t in model.state_dict().items()}
    first, second = (learner.draw(model, train, slice(0, 6), generator(1)) for _ in range(2))
    assert all(torch.equal(before[name], train.fields[name]) for name in before)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(first.fields[name], second.fields[name]) for name in first.fields)


def test_the_loss_is_the_weighted_sum_of_its_parts():
    learner = tiny(pseudo_weight=0.5, similarity_weight=3.0)
    model, batch = drawn(learner, examples())
    loss = loss_of(learner, model, batch)
    supervised, pseudo, similarity, mask = (loss.parts[name] for name in ("supervised", "pseudo", "similarity", "mask"))
    assert torch.allclose(loss.total, supervised + 0.5 * pseudo + 3 * similarity)
    assert 0 < mask <= 1 and min(supervised, pseudo, similarity) > 0


def test_the_loss_is_the_papers_on_views_that_share_their_statistics():
    learner = tiny(similarity_weight=2.0)
    model, batch = drawn(learner, examples())
    views = torch.cat([batch.image, batch.fields[STRONG][4:]])
    z = model.network.backbone.features(views)
    logits, h = model.network.backbone.classifier(z), model.network.projection(z[16:])
    p = logits[4:16].softmax(1)
    expected = F.cross_entropy(logits[:4], batch.label[:4]) + 2 * (1 - F.cosine_similarity(h, z[4:16]).mean())
    for i in range(12):
        if p[i].max() >= 0.35:
            expected = expected + F.cross_entropy(logits[16 + i : 17 + i], p[i : i + 1].argmax(1)) / 12
    model, batch = drawn(learner, examples())
    assert torch.allclose(loss_of(learner, model, batch).total, expected, atol=1e-5)


def test_probes_are_not_in_the_loss():
    learner = tiny()
    model, batch = drawn(learner, examples())
    strong = batch.fields[STRONG].clone()
    strong[:4] = 0
    other = Examples({**batch.fields, STRONG: strong})
    again, _ = drawn(learner, examples())
    assert torch.equal(loss_of(learner, model, batch).total, loss_of(learner, again, other).total)


def test_unmasked_examples_teach_by_their_strong_view_alone():
    learner = tiny(threshold=1.0, pseudo_weight=1.0)
    model, batch = drawn(learner, examples(labeled=0))
    model.eval()  # or statistics would mix the examples
    images, strong = batch.image.requires_grad_(), batch.fields[STRONG].requires_grad_()
    loss_of(learner, model, batch).total.backward()
    assert images.grad is None or not images.grad.any()
    assert all(row.any() for row in strong.grad)


def gradients(loss, model):
    params = dict(model.network.named_parameters())
    return dict(zip(params, torch.autograd.grad(loss, list(params.values()), materialize_grads=True), strict=True))


def test_without_similarity_it_is_fixmatch():
    learner = tiny(similarity_weight=0.0)
    model, batch = drawn(learner, examples())
    loss = loss_of(learner, model, batch)
    assert torch.allclose(loss.total, loss.parts["supervised"] + loss.parts["pseudo"])
    slopes = gradients(loss.total, model)
    assert not slopes["projection.weight"].any() and slopes["backbone.stem.weight"].any()


@pytest.mark.parametrize("kind", ["cosine", "mse", "softmax"])
def test_every_similarity_trains_the_projection(kind):
    learner = tiny(similarity=kind, similarity_temperature=0.1)
    model, batch = drawn(learner, examples())
    assert gradients(loss_of(learner, model, batch).total, model)["projection.weight"].any()


def test_without_labels_the_rest_of_the_loss_remains():
    learner = tiny()
    model, batch = drawn(learner, examples(labeled=0))
    assert len(batch) == 12 and (batch.label == -1).all()
    loss = loss_of(learner, model, batch)
    assert loss.parts["supervised"] == 0 and loss.parts["similarity"] > 0 and loss.total.isfinite()
    rates = model.rates.clone()
    learner.follow(model, batch, 0.0)
    assert torch.equal(rates, model.rates) and model.steps == 1


@pytest.mark.parametrize("labeled", [0, 1])
@pytest.mark.parametrize("supervised_only", [False, True])
def test_a_single_example_is_enough(labeled, supervised_only):
    learner = tiny(supervised_only=supervised_only)
    train = examples(n=1, labeled=labeled)
    model, batch = drawn(learner, train)
    loss = loss_of(learner, model, batch).total
    assert loss.isfinite() and all(slope.isfinite().all() for slope in gradients(loss, model).values())
    learner.follow(model, batch, 0.0)


def test_the_baseline_sees_labeled_examples_alone():
    learner = tiny(supervised_only=True)
    model, batch = drawn(learner, examples())
    loss = loss_of(learner, model, batch)
    again, _ = drawn(learner, examples())
    assert torch.allclose(loss.total, F.cross_entropy(again(batch.image[:4]).logits, batch.label[:4]))
    assert set(loss.parts) == {"supervised"}
    learner.follow(model, batch, 0.0)
    assert torch.equal(model.rates, ctaugment.initial_rates())


def test_without_labels_the_baseline_learns_nothing():
    learner = tiny(supervised_only=True)
    model, batch = drawn(learner, examples(labeled=0))
    loss = loss_of(learner, model, batch).total
    assert loss == 0 and not any(slope.any() for slope in gradients(loss, model).values())


def test_only_kernels_of_the_network_decay():
    learner = tiny()
    model = learner.build(SPEC, generator(0))
    decayed, others = learner.groups(model)
    params = dict(model.named_parameters())
    assert decayed.decayed and not others.decayed
    assert {*decayed.names, *others.names} == {name for name, param in params.items() if param.requires_grad}
    assert all(params[name].ndim > 1 for name in decayed.names) and all(params[name].ndim == 1 for name in others.names)
    assert "network.projection.weight" in decayed.names and "network.backbone.classifier.bias" in others.names


# ---- what follows a step --------------------------------------------------------------------------------------------


def moved(model):
    """The network, as after a step."""
    with torch.no_grad():
        for param in model.network.parameters():
            param.add_(1.0)
    return model


def test_the_average_follows_the_weights_and_takes_over_the_statistics():
    learner = tiny(ema_decay=0.9)
    model, batch = drawn(learner, examples())
    loss_of(learner, model, batch)
    before = model.average.backbone.stem.weight.clone()
    learner.follow(moved(model), batch, 0.0)
    assert torch.allclose(model.average.backbone.stem.weight, before + 0.1, atol=1e-6)
    assert torch.equal(model.average.backbone.norm.running_mean, model.network.backbone.norm.running_mean)
    assert model.average.backbone.norm.running_mean.any()


def test_a_warmed_up_average_follows_faster_at_first():
    learner = tiny(ema_decay=0.9, ema_warmup=True)
    model, batch = drawn(learner, examples())
    before = model.average.backbone.stem.weight.clone()
    learner.follow(moved(model), batch, 0.0)
    assert torch.allclose(model.average.backbone.stem.weight, before + 0.9, atol=1e-6)
    for _ in range(200):
        learner.follow(model, batch, 0.0)
    assert model.steps == 201 and torch.allclose(model.average.backbone.stem.weight, before + 1, atol=1e-5)


def test_rates_move_by_the_averages_probability_of_the_true_class():
    learner = tiny()
    model, batch = drawn(learner, examples())
    learner.follow(model, batch, 0.0)
    with torch.no_grad():
        p = model.average(batch.fields[STRONG][:4]).logits.softmax(1)
    near = p.gather(1, batch.label[:4, None])[:, 0]
    plan = (batch.fields[PROBE_OPERATIONS][:4], batch.fields[PROBE_LEVELS][:4])
    assert torch.allclose(model.rates, ctaugment.updated(ctaugment.initial_rates(), *plan, near))
    assert (model.rates < ctaugment.initial_rates()).any()


def test_the_average_is_never_in_training_mode():
    model = tiny().build(SPEC, generator(0)).train()
    assert model.network.training and model.network.backbone.norm.training
    assert not any(module.training for module in model.average.modules())


def test_the_average_is_tested_with_the_networks_statistics():
    learner = tiny()
    model, batch = drawn(learner, examples())
    loss_of(learner, model, batch)
    learner.follow(moved(model), batch, 0.0)
    measured = learner.evaluate(model.eval(), examples(labeled=12)).result()
    with torch.no_grad():
        logits = torch.func.functional_call(
            model.network.backbone,
            dict(model.average.backbone.named_parameters()) | dict(model.network.backbone.named_buffers()),
            (examples().image * 2 - 1,),
        )
    labels = examples(labeled=12).label
    assert measured["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert measured["accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_examples_without_a_label_are_not_tested_on():
    learner = tiny()
    model = learner.build(SPEC, generator(0)).eval()
    assert learner.evaluate(model, examples(labeled=5)) == learner.evaluate(model, examples(labeled=12)[:5])
    assert learner.evaluate(model, examples(labeled=0)).count == 0


def test_two_classes_have_areas():
    spec = Spec((3, 16, 16), 2)
    learner = tiny()
    measured = learner.evaluate(learner.build(spec, generator(0)).eval(), examples(labeled=12, spec=spec))
    assert set(measured.result()) == {"loss", "accuracy", "auroc", "auprc"}


# ---- the federation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["shared", "private"])
def test_rates_stay_in_the_silo_and_the_average_as_one_wishes(average):
    learner = tiny(average=average)
    model = learner.build(SPEC, generator(0))
    held = {name: learner.holding(name) for name in model.state_dict()}
    assert held["rates"] == "private" and held["steps"] == held["average.projection.bias"] == average
    assert {kind for name, kind in held.items() if name.startswith("network.")} == {"shared"}
    own = replace(learner, private=("network.backbone.norm.*",))
    assert own.holding("network.backbone.norm.running_mean") == "private"


@pytest.mark.parametrize("average", ["shared", "private"])
def test_an_average_of_its_own_begins_at_the_weights_that_are_sent(average):
    learner = tiny(average=average)
    model = moved(learner.build(SPEC, generator(0)))
    learner.begin(model)
    assert torch.equal(model.average.projection.bias, model.network.projection.bias) == (average == "private")


def test_the_head_is_the_trained_networks():
    learner = tiny()
    model = learner.build(SPEC, generator(0))
    assert learner.head(model) is model.network.backbone.classifier


# ---- learning -------------------------------------------------------------------------------------------------------

DIGITS = {"scales": 2, "filters": 16, "repeat": 1, "labeled_batch": 16, "flip": False, "threshold": 0.8, "similarity_weight": 0.5}
SHORT = {"bn_momentum": 0.05, "ema_decay": 0.99, "ema_warmup": True}
OPTIMIZER = {"name": "SGD", "lr": 0.06, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "schedule": {"name": "gamma-cosine"}}


def accuracy(learner, seed):
    """On held-out digits, after 300 steps on the others, 20 of which have labels."""
    pool = digits(test_fraction=0.2765, rng=numpy_generator(0, "data"))
    kept = torch.from_numpy(labeled_split(pool.train.label.numpy(), 20, fold=seed))
    label = torch.full_like(pool.train.label, -1).index_copy(0, kept, pool.train.label[kept])
    model = learner.build(Spec((1, 8, 8), 10), generator(seed, "model"))
    train = Examples({**pool.train.fields, "label": label})
    silo = Silo(learner, model, model.state_dict(), train, rng=generator(seed, "fit"), span=1.0)
    silo.descend(silo.batches(80, steps=300), OPTIMIZER)
    return evaluate(learner, model, pool.test)["accuracy"]


@pytest.mark.slow
def test_twenty_labels_and_unlabeled_digits_beat_twenty_labels():
    kinds = {"supervised": {"supervised_only": True}, "fixmatch": {"similarity_weight": 0.0}, "doublematch": {}}
    reached = {kind: [accuracy(DoubleMatch(**(DIGITS | SHORT | settings)), seed) for seed in (1, 2)] for kind, settings in kinds.items()}
    mean = {kind: sum(values) / 2 for kind, values in reached.items()}
    assert min(mean["fixmatch"], mean["doublematch"]) >= mean["supervised"] + 0.04, reached


# ---- building -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "classes", "parameters"), [("wrn-28-2", 10, 1_486_154), ("wrn-28-8", 100, 23_671_748), ("wrn-37-2", 10, 5_999_562)]
)
def test_networks_have_the_papers_sizes(network, classes, parameters):
    with torch.device("meta"):
        model = Projecting(WideResNet(3, classes, **SIZES[network]))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_network_may_be_made_smaller():
    model = DoubleMatch(network="wrn-37-2", filters=8, repeat=1).build(SPEC, generator(0))
    assert len(model.network.backbone.blocks) == 4 and model.network.backbone.classifier.in_features == 64


def test_the_references_checkpoints_fit_network_and_average():
    learner = tiny()
    model, batch = drawn(learner, examples())
    loss_of(learner, model, batch)
    learner.follow(moved(model), batch, 0.0)
    variables = to_reference(model.state_dict(), checkpoint_names(model))
    assert "classify/conv2d_1/kernel/ExponentialMovingAverage" in variables and "classify/projection_head/bias" in variables
    read, own = from_reference(variables, checkpoint_names(model)), model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in read.items())
    assert {name for name in own.keys() - read.keys() if not name.endswith("num_batches_tracked")} == {"rates", "steps"}


@pytest.mark.parametrize(
    ("learner", "spec", "message"),
    [
        (DoubleMatch(), Spec((7,), 3), "learner doublematch needs images, the inputs have shape (7,)"),
        (DoubleMatch(), Spec((2, 8, 8), 3), "changes images of 1 or 3 channels, the data has 2; choose 'weak'"),
    ],
)
def test_data_that_do_not_fit_are_refused(learner, spec, message):
    with pytest.raises(ExperimentError) as caught:
        learner.build(spec, generator(0))
    assert message in str(caught.value)


def test_images_of_other_channels_have_weak_views():
    spec = Spec((2, 8, 8), 3)
    learner = tiny(augmentation="weak")
    model, batch = drawn(learner, examples(spec=spec), spec=spec)
    assert isinstance(model, SemiSupervised) and loss_of(learner, model, batch).total.isfinite()


@pytest.mark.parametrize("settings", [{}, {"supervised_only": True}, {"augmentation": "weak", "average": "private"}, {"similarity": "mse"}])
def test_small_learners_conform(settings):
    check_learner(tiny(**settings))


def test_a_gray_learner_conforms():
    images = torch.rand(6, 1, 8, 8, generator=generator(0))
    check_learner(tiny(flip=False), Examples({"image": images, "label": torch.tensor([0, 1, 2, 0, 1, 2])}))
