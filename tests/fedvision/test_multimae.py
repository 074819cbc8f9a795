"""The learner; its network and mathematics are tested in tests/fedvision/multimae."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import run
from fedvision.data import Examples, Spec
from fedvision.data.scenes import scenes
from fedvision.errors import DataError, ExperimentError
from fedvision.experiment import Experiment
from fedvision.holdings import Holdings
from fedvision.learners.check import check_learner
from fedvision.learners.multimae import VISIBLE, MultiMAE
from fedvision.metrics import confusion, overlap, total
from fedvision.seeds import generator
from fedvision.silo import Silo

SMALL = {
    "patch": 8, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "class_embedding": 4, "width": 16, "depth": 1, "heads": 2,
    "visible": 12, "semantic_classes": 5, "crop_scale": (1.0, 1.0),
}  # fmt: skip


def small(**settings):
    return MultiMAE(**SMALL | settings)


@pytest.fixture(scope="module")
def pool():
    fields = ("image", "label", "depth", "semseg")
    return scenes(examples=64, test_examples=20, size=32, classes=4, fields=fields, rng=np.random.default_rng(0))


@pytest.fixture(scope="module")
def batch(pool):
    return pool.train[:10].decoded()


SPEC = Spec((3, 32, 32), 4, ("image", "label", "depth", "semseg"))


def lacking(batch, **gaps):
    """The examples without some fields: by field, which examples have it."""
    return Examples({**batch.fields, **{f"has_{field}": torch.tensor(there) for field, there in gaps.items()}})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"alpha": 0.2, "subsets": True, "translations": (("depth", "semseg"), ("rgb", "depth"))},
        {"inputs": ("rgb",), "outputs": ("rgb",), "visible": 4},
        {"inputs": ("rgb",), "outputs": ("depth", "semseg"), "normalized_rgb": False, "visible": None},
        {"crop_scale": (0.5, 1.0), "resolution": 24, "grid": 4, "global_tokens": 2},
    ],
)
def test_it_keeps_the_contract(pool, settings):
    check_learner(small(**settings), pool.train[:8].decoded(), SPEC)


def test_the_loss_is_the_sum_of_what_the_masked_patches_say(batch):
    learner = small()
    model, view = learner.build(SPEC, generator(0, "model")), learner.train_view(batch, generator(0, "view"))
    found = learner.loss(model, view, 0.0, generator(0, "loss"))
    assert list(found.parts) == ["rgb", "depth", "semseg", "norm_rgb"]
    assert torch.isclose(found.total, sum(found.parts.values()))
    predictions = model({name: view.fields[name] for name in ("rgb", "depth", "semseg")}, view.fields[VISIBLE])
    error, pixels = 0.0, 0
    means = []
    for i in range(len(batch)):
        error, pixels = 0.0, 0
        for patch in set(range(16, 32)) - set(view.fields[VISIBLE][i].tolist()):  # those of depth, the second modality
            row, column = divmod(patch - 16, 4)
            place = (i, 0, slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
            error += (predictions["depth"][place] - view.fields["depth"][place]).abs().sum().item()
            pixels += 64
        means.append(error / pixels)
    assert found.parts["depth"].item() == pytest.approx(np.mean(means), rel=1e-4)


def test_a_sixth_of_all_patches_is_visible_unless_said(batch):
    assert small(visible=None).train_view(batch, generator(0, "view")).fields[VISIBLE].shape == (10, 8)
    assert small(visible=None, inputs=("rgb",)).train_view(batch, generator(0, "view")).fields[VISIBLE].shape == (10, 3)


def test_a_batch_without_a_modality_neither_sees_nor_predicts_it(batch):
    learner = small()
    model = learner.build(SPEC, generator(0, "model"))
    without = Examples({name: values for name, values in batch.fields.items() if name not in ("depth", "semseg")})
    for given in (without, lacking(batch, depth=[False] * 10, semseg=[False] * 10)):
        view = learner.train_view(given, generator(0, "view"))
        assert list(view.fields) == ["rgb", VISIBLE]
        found = learner.loss(model, view, 0.0, generator(0, "loss"))
        assert list(found.parts) == ["rgb", "norm_rgb"]
        found.total.backward()
        reached = {name.split(".")[1] for name, param in model.named_parameters() if param.grad is not None and "adapters" in name}
        assert reached == {"rgb", "norm_rgb"}
        model.zero_grad(set_to_none=True)


def test_an_example_that_lacks_a_modality_learns_from_its_others(batch):
    learner, there = small(), [True] * 5 + [False] * 5
    model = learner.build(SPEC, generator(0, "model"))
    given = lacking(batch, depth=there)
    view = learner.train_view(given, generator(0, "view"))
    assert not ((view.fields[VISIBLE][5:] >= 16) & (view.fields[VISIBLE][5:] < 32)).any()
    found = learner.loss(model, view, 0.0, generator(0, "loss"))
    having = Examples({name: values[:5] for name, values in view.fields.items()})
    assert torch.isclose(found.parts["depth"], learner.loss(model, having, 0.0, generator(0, "loss")).parts["depth"])
    noise = torch.where(torch.tensor(there)[:, None, None, None], batch.fields["depth"], 7.0)
    other = learner.train_view(Examples({**given.fields, "depth": noise}), generator(0, "view"))
    assert torch.equal(learner.loss(model, other, 0.0, generator(0, "loss")).total, found.total)


def test_a_silo_without_anything_to_predict_teaches_nothing(batch):
    learner = small(outputs=("depth",), normalized_rgb=False)
    model, given = learner.build(SPEC, generator(0, "model")), lacking(batch, depth=[False] * 10)
    loss = learner.loss(model, learner.train_view(given, generator(0, "view")), 0.0, generator(0, "loss")).total
    params = [param for param in model.parameters() if param.requires_grad]
    assert loss == 0 and torch.autograd.grad(loss, params, allow_unused=True) == (None,) * len(params)
    with torch.inference_mode():
        assert learner.evaluate(model, given).result() == {}


def test_batches_that_lack_different_things_are_evaluated_together(pool):
    learner = small(translations=(("rgb", "depth"),))
    model, examples = learner.build(SPEC, generator(0, "model")).eval(), pool.test.decoded()
    given = lacking(examples, depth=[False] * 6 + [True] * 14)
    with torch.inference_mode():
        whole = learner.evaluate(model, given).result()
        parts = total(learner.evaluate(model, part) for part in given.batches(5)).result()
    assert whole == pytest.approx(parts, rel=1e-4)


def test_a_fully_visible_modality_has_a_loss_of_zero_and_no_nan(batch):
    learner = small(visible=48)
    model = learner.build(SPEC, generator(0, "model"))
    found = learner.loss(model, learner.train_view(batch, generator(0, "view")), 0.0, generator(0, "loss"))
    assert found.total == 0
    slopes = torch.autograd.grad(found.total, [p for p in model.parameters() if p.requires_grad], materialize_grads=True)
    assert not any(slope.any() or slope.isnan().any() for slope in slopes)


def test_evaluation_does_not_depend_on_the_batch(pool):
    learner = small(translations=(("depth", "semseg"),))
    model = learner.build(SPEC, generator(0, "model")).eval()
    examples = lacking(pool.test.decoded(), depth=[True, False] * 10)
    with torch.inference_mode():
        whole = learner.evaluate(model, examples).result()
        parts = total(learner.evaluate(model, part) for part in examples.batches(7)).result()
    assert whole == pytest.approx(parts, rel=1e-4)
    assert {"loss", "rgb", "depth", "depth_to_semseg_miou", "depth_to_semseg_cross_entropy"} <= whole.keys()


def test_parts_are_means_over_the_examples_that_have_the_modality(pool):
    learner = small(translations=(("depth", "semseg"), ("rgb", "depth")))
    model = learner.build(SPEC, generator(0, "model")).eval()
    examples, there = pool.test.decoded(), [True] * 6 + [False] * 14
    with torch.inference_mode():
        having = learner.evaluate(model, examples[:6]).result()
        mixed = learner.evaluate(model, lacking(examples, depth=there)).result()
        nobody = learner.evaluate(model, lacking(examples, depth=[False] * 20)).result()
    same = ("depth", "depth_to_semseg_miou", "depth_to_semseg_cross_entropy", "rgb_to_depth_l1")
    # masks depend on what else a picture has, translations do not
    assert mixed["depth"] == pytest.approx(having["depth"], rel=1e-4)
    assert all(mixed[name] == pytest.approx(having[name], rel=1e-4) for name in same)
    assert not set(same) & nobody.keys()
    assert "rgb" in nobody


def test_a_translation_is_measured_over_every_pixel(pool):
    learner = small(translations=(("rgb", "depth"), ("depth", "semseg")))
    model, examples = learner.build(SPEC, generator(0, "model")).eval(), pool.test[:5].decoded()
    with torch.inference_mode():
        found = learner.evaluate(model, examples).result()
        rgb, depth, semseg = (small(flip=0.0).train_view(examples, generator(0, "v")).fields[name] for name in ("rgb", "depth", "semseg"))
        error = (model({"rgb": rgb})["depth"] - depth).abs().mean().item()
        table = confusion(semseg, model({"depth": depth})["semseg"].argmax(1), 5)
    assert found["rgb_to_depth_l1"] == pytest.approx(error, rel=1e-4)
    assert found["depth_to_semseg_miou"] == pytest.approx(overlap(table.numpy())["miou"])


def test_further_modalities_need_no_code(batch):
    heat = {"heat": {"channels": 2, "loss": "mse"}, "depth": {"channels": 1, "kind": "values", "loss": "l1"}}
    learner = small(inputs=("rgb", "heat"), outputs=("heat", "depth"), modalities=heat, visible=8)
    model = learner.build(Spec((3, 32, 32), 4), generator(0, "model"))
    with_heat = Examples({**batch.fields, "heat": torch.rand(10, 2, 32, 32, generator=generator(0, "heat"))})
    view = learner.train_view(with_heat, generator(0, "view"))
    found = learner.loss(model, view, 0.0, generator(0, "loss"))
    assert list(found.parts) == ["heat", "depth"]
    assert {view.fields["heat"].shape, view.fields["depth"].shape} == {(10, 2, 32, 32), (10, 1, 32, 32)}
    assert view.fields["depth"].min() > 0  # as it is, not standardized
    check_learner(learner, with_heat)


def test_positions_travel_only_where_they_may_be_learned_ones(tmp_path):
    learner = small()
    model = learner.build(SPEC, generator(0, "model"))
    held = Holdings.of(learner, model)
    assert model.state_dict().keys() - held.shared.keys() == {name for name in model.state_dict() if name.endswith("pos_emb")}
    weights = {name: tensor + 1 if name.endswith("pos_emb") else tensor for name, tensor in model.state_dict().items()}
    save_file(weights, tmp_path / "learned.safetensors")
    later = small(checkpoint=str(tmp_path / "learned.safetensors"))
    begun = Holdings.of(later, later.build(SPEC, generator(1, "model"))).shared
    assert begun.keys() == weights.keys()
    assert all(torch.equal(begun[name], tensor) for name, tensor in weights.items())


def test_weight_decay_is_on_every_parameter(batch):
    """As in the public implementation: biases, norms and tokens too."""
    learner = small()
    model = learner.build(SPEC, generator(0, "model"))
    silo = Silo(learner, model, Holdings.of(learner, model).shared, batch, rng=generator(0, "fit"))
    before = silo.arrays()
    silo.descend(silo.batches(5, epochs=1), {"name": "AdamW", "lr": 0.0, "weight_decay": 0.5})
    assert all(torch.equal(before[name], after) for name, after in silo.arrays().items())
    assert learner.groups(model) == ()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"inputs": ("rgb", "deepth")}, "learner.inputs = .*did you mean 'depth'"),
        ({"outputs": ()}, "learner.outputs = .*one at least"),
        ({"inputs": ("rgb", "rgb")}, "name each modality once"),
        ({"translations": (("semseg", "normals"),)}, "learner.translations has 'semseg' to 'normals'; choose of the inputs"),
    ],
)
def test_wrong_settings_are_refused(settings, reason):
    with pytest.raises(ExperimentError, match=reason):
        small(**settings)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ({"learner.modalities": {"heat": {"chanels": 1}}}, "learner.modalities: heat.chanels: .*did you mean 'channels'"),
        ({"learner.modalities": {"heat": 3}}, "heat = 3: expected a table"),
        ({"learner.modalities": {"heat": {"channels": 1, "kind": "classes"}}}, "'classes' and 'cross-entropy' go together"),
        ({"learner.visible": 0}, "learner.visible = 0: expected whole number >= 1"),
    ],
)
def test_wrong_tables_are_refused_when_the_file_is_read(override, reason):
    with pytest.raises(ExperimentError, match=reason):
        Experiment.load("multimae-tiny", override)


@pytest.mark.parametrize(
    ("spec", "settings", "reason"),
    [
        (Spec((7,), 2), {}, r"need images, the inputs have shape \(7,\)"),
        (Spec((3, 32, 32), 4, ("image", "label")), {}, "modality 'depth' is the field 'depth', which the data lack .*data.fields"),
        (Spec((3, 30, 32), 4), {}, "learner.patch = 8 does not divide images of 30 x 32; .*learner.resolution"),
        (Spec((3, 30, 30), 4), {"resolution": 20}, "learner.patch = 8 does not divide images of 20 x 20"),
        (SPEC, {"patch": 6, "resolution": 30}, "patches of 6 pixels cannot hold values of 4"),
        (SPEC, {"width": 18, "heads": 3}, "3 heads and a width of 18"),
    ],
)
def test_data_and_sizes_that_do_not_fit_are_refused(spec, settings, reason):
    with pytest.raises(ExperimentError, match=reason):
        small(**settings).build(spec, generator(0, "model"))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"visible": 49}, "49 patches are to be visible, and an example has 48"),
        ({"semantic_classes": 3}, "raise learner.semantic_classes"),
        ({"inputs": ("depth",)}, "a batch has none of the modalities depth"),
    ],
)
def test_batches_that_do_not_fit_are_refused(batch, settings, reason):
    given = lacking(batch, depth=[False] * 10) if "inputs" in settings else batch
    with pytest.raises(DataError, match=reason):
        small(**settings).train_view(given, generator(0, "view"))


@pytest.mark.slow
def test_a_step_of_the_papers_size_has_finite_gradients():
    learner, rng = Experiment.load("multimae-imagenet").build_learner(), generator(0, "paper")
    ids = torch.randint(133, (2, 256, 256), generator=rng, dtype=torch.uint8)
    fields = {"image": torch.rand(2, 3, 256, 256, generator=rng), "depth": torch.rand(2, 1, 256, 256, generator=rng), "semseg": ids}
    model = learner.build(Spec((3, 256, 256), 0, tuple(fields)), rng).train()
    batch = learner.train_view(Examples(fields), rng)
    assert batch.fields[VISIBLE].shape == (2, 98)
    learner.loss(model, batch, 0.0, rng).total.backward()
    gradients = {name: param.grad for name, param in model.named_parameters() if param.requires_grad}
    assert len(gradients) == 351 - 7, "all but the positions"
    assert all(slope.isfinite().all() and slope.any() for slope in gradients.values())


@pytest.mark.slow
def test_the_tiny_run_reaches_the_marks_of_the_specification(tmp_path):
    """Against predictions that know the training set's averages only, at the same masked patches; and across modalities."""
    done = run("multimae-tiny", {"data.draw_seed": 1, "evaluate_every": 10}, out=tmp_path / "run", draw=False)
    last = done.rounds.iloc[-1]
    data = done.experiment.load_data()
    learner = done.experiment.build_learner()
    baseline = baselines(learner, data)
    assert last["test_rgb"] <= 0.75 * baseline["rgb"]
    assert last["test_depth"] <= 0.88 * baseline["depth"]
    assert last["test_semseg"] <= 0.65 * baseline["semseg"]
    assert last["test_depth_to_semseg_miou"] >= 0.32


def baselines(learner, data):
    """By modality, the error at the masked patches of the test pictures of the mean, the median and the frequencies of each place."""

    class Averages(torch.nn.Module):
        def forward(self, inputs, visible, outputs):
            n = len(visible)
            return {name: table.expand(n, *table.shape) for name, table in tables.items()}

    seen = learner.train_view(data.train.examples.decoded(), generator(0, "view")).fields
    frequencies = torch.nn.functional.one_hot(seen["semseg"], 5).float().mean(0).permute(2, 0, 1)
    tables = {"rgb": seen["rgb"].mean(0), "depth": seen["depth"].median(0).values, "semseg": (frequencies + 1e-6).log()}
    tables["norm_rgb"] = torch.zeros_like(tables["rgb"])
    plain = MultiMAE(**{**{f: getattr(learner, f) for f in ("patch", "visible", "alpha", "semantic_classes")}, "translations": ()})
    with torch.inference_mode():
        return plain.evaluate(Averages(), data.test.decoded()).result()


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_a_run_draws_what_its_model_makes_of_its_test_pictures(tmp_path):
    settings = {**{f"learner.{name}": value for name, value in SMALL.items() if name != "crop_scale"}, "rounds": 1, "strategy.steps": 1}
    done = run("multimae-tiny", settings | {"data.examples": 32, "data.test_examples": 4, "tensorboard": False}, out=tmp_path / "run")
    names = {path.stem for path in (done.path / "figures").iterdir()}
    assert {"single-input", "visible-patches", "edited-patch"} <= names


def test_examples_that_lack_something_are_drawn_last(pool):
    learner = small()
    model = learner.build(SPEC, generator(0, "model")).eval()
    examples, rest = pool.test[:6].decoded(), [2, 3, 5]
    gaps = lacking(examples, depth=[False, False, True, True, False, True])
    with torch.inference_mode():
        found, whole = (learner.pictures(model, each)["single-input"] for each in (gaps, examples[torch.tensor(rest)]))
    assert all(
        (a is None) == (b is None) and (a is None or np.array_equal(a, b))
        for one, other in zip(found.pictures, whole.pictures, strict=True)
        for a, b in zip(one, other, strict=True)
    )
