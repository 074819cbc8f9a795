import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedvision.data.examples import Examples
from fedvision.metrics import total
from fedvision.multimae.losses import standardized_depth
from fedvision.multimae.tasks import (
    Classification,
    DepthRegression,
    Segmentation,
    depth_loss,
    depth_metrics,
    judged,
    mean_where,
    pixel_loss,
    zero_ignored,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unknown_where(values, missing):
    return torch.where(missing, torch.nan, values)


@pytest.fixture
def depths(arrays):
    """The reference's predictions and targets, normalized, which are not known everywhere."""
    target = unknown_where(arrays["depthloss/target"], ~arrays["depthloss/mask_valid"])
    return arrays["depthloss/pred"], target


@pytest.mark.golden
@pytest.mark.parametrize("kind", ["berhu", "l1", "mse"])
def test_losses_of_depth_are_the_references(arrays, depths, kind):
    assert depth_loss(kind, *depths).item() == pytest.approx(arrays[f"depthloss/{kind}"].item(), rel=1e-5)


@pytest.mark.golden
def test_metrics_of_depth_are_the_references_where_all_pixels_are_one_picture(arrays, depths):
    """The reference takes them over a batch, ours are a picture's: its batch, laid out as one picture."""
    meters = (values * 777.5723 + 2070.7764 for values in depths)
    found = {name: value.item() for name, value in depth_metrics(*(one.reshape(1, 1, 16, 8) for one in meters)).items()}
    names = {
        "rmse": "rmse",
        "rel": "rel",
        "srel": "srel",
        "log_rmse": "log10",
        "delta1": "delta_1",
        "delta2": "delta_2",
        "delta3": "delta_3",
    }
    for ours, theirs in names.items():
        assert found[ours] == pytest.approx(arrays[f"depthloss/metric_{theirs}"].item(), rel=1e-4), ours


@pytest.mark.golden
def test_depth_is_standardized_for_fine_tuning_as_in_the_reference(arrays):
    """Padding (254) is not known; it becomes the mean, which is 0."""
    depth = arrays["ftdepth/raw"]
    found = standardized_depth(unknown_where(depth, depth == 254)[None, None])[0, 0]
    known = depth != 254
    assert known.any() and not known.all()
    assert torch.allclose(found[known], arrays["ftdepth/standardised"][known], atol=2e-5, rtol=1e-4)


@pytest.mark.golden
def test_classes_that_are_counted_from_one_are_reduced_as_in_the_reference(arrays):
    assert torch.equal(zero_ignored(arrays["ftdepth/lab_raw"]), arrays["ftdepth/lab_reduced"])


def naive_berhu(prediction, target):
    differences = [p - t for p, t in zip(prediction, target, strict=True) if not math.isnan(t)]
    c = max(0.2 * max((abs(d) for d in differences), default=0.0), 1e-5)
    costs = [abs(d) if abs(d) < c else (d * d + c * c) / (2 * c) for d in differences]
    return sum(costs) / max(len(costs), 1)


@given(st.integers(0, 1000), st.floats(0, 1))
def test_berhu_is_its_formula(seed, missing):
    prediction, target = random(2, 1, 3, 4, seed=seed), random(2, 1, 3, 4, seed=seed + 1)
    target = unknown_where(target, torch.rand(target.shape, generator=torch.Generator().manual_seed(seed)) < missing)
    expected = naive_berhu(prediction.flatten().tolist(), target.flatten().tolist())
    assert depth_loss("berhu", prediction, target).item() == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_no_gradient_flows_through_the_threshold_of_berhu():
    prediction, target = torch.tensor([[[[5.0, 0.1]]]], requires_grad=True), torch.zeros(1, 1, 1, 2)
    [slope] = torch.autograd.grad(depth_loss("berhu", prediction, target), prediction)
    assert torch.allclose(slope, torch.tensor([[[[5.0 / 1.0 / 2, 1.0 / 2]]]]))  # d / c over two pixels, with c = 1


@pytest.mark.parametrize("kind", ["berhu", "l1", "mse"])
def test_where_no_depth_is_known_the_loss_is_zero_and_so_is_its_gradient(kind):
    prediction = random(2, 1, 3, 3).requires_grad_()
    loss = depth_loss(kind, prediction, torch.full((2, 1, 3, 3), torch.nan))
    [slope] = torch.autograd.grad(loss, prediction)
    assert loss == 0 and not slope.any()


def test_metrics_of_depth_are_means_over_the_known_pixels_of_a_picture():
    truth = torch.tensor([[[[2.0, 4.0], [torch.nan, 1.0]]], [[[torch.nan] * 2] * 2]])
    found = depth_metrics(torch.tensor([[[[3.0, 4.0], [9.0, 2.0]]]] * 2), truth)
    assert found["rmse"].tolist() == pytest.approx([math.sqrt((1 + 0 + 1) / 3), 0])
    assert found["rel"].tolist() == pytest.approx([(0.5 + 0 + 1) / 3, 0])
    assert found["srel"].tolist() == pytest.approx([(0.5 + 0 + 1) / 3, 0])
    assert found["log_rmse"].tolist() == pytest.approx([math.sqrt((math.log(1.5) ** 2 + math.log(2) ** 2) / 3), 0])
    assert [found[f"delta{k}"][0].item() for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 2 / 3])  # ratios 1.5, 1, 2


def test_predictions_below_zero_have_finite_metrics():
    found = depth_metrics(torch.full((1, 1, 2, 2), -3.0), torch.full((1, 1, 2, 2), 2.0))
    assert all(value.isfinite().all() for value in found.values())


def test_pixels_count_alike_whatever_picture_they_are_in():
    logits, ids = random(2, 3, 2, 2), torch.tensor([[[0, 255], [255, 255]], [[1, 2], [0, 2]]])
    each = [-logits[b, :, r, c].log_softmax(0)[ids[b, r, c]] for b in range(2) for r in range(2) for c in range(2) if ids[b, r, c] != 255]
    assert torch.isclose(pixel_loss(logits, ids), torch.stack(each).mean())
    assert pixel_loss(logits, torch.full((2, 2, 2), 255)) == 0


def test_a_mean_of_nothing_is_zero():
    assert mean_where(torch.tensor([torch.inf, 1.0]), torch.tensor([False, False])) == 0
    assert mean_where(torch.tensor([5.0, 1.0]), torch.tensor([True, False])) == 5


def test_smoothing_is_of_training_and_not_of_testing():
    logits, labels = random(4, 7), torch.tensor([0, 1, 2, 6])
    task = Classification(smoothing=0.1)
    p = logits.log_softmax(1)
    smooth = 0.9 * -p[range(4), labels].mean() - 0.1 * p.mean()
    assert torch.isclose(task.loss(logits, labels), smooth)
    found = task.metrics(logits, labels).result()
    assert found["loss"] == pytest.approx(-p[range(4), labels].mean().item())
    assert found.keys() == {"loss", "accuracy", "top5_accuracy"}


def test_two_classes_are_scored():
    assert {"auroc", "auprc"} <= Classification().metrics(random(6, 2), torch.tensor([0, 1] * 3)).result().keys()


@pytest.mark.parametrize("task", [Segmentation(3), DepthRegression(2.0, 0.5)])
def test_metrics_of_pixels_add_over_batches(task):
    prediction = random(5, 3 if isinstance(task, Segmentation) else 1, 4, 4)
    target = torch.randint(3, (5, 4, 4), generator=torch.Generator().manual_seed(0))
    if isinstance(task, DepthRegression):
        target = random(5, 1, 4, 4, seed=3)
    whole = task.metrics(prediction, target).result()
    parts = total(task.metrics(prediction[i : i + 2], target[i : i + 2]) for i in (0, 2, 4)).result()
    assert whole == pytest.approx(parts)
    assert {"loss", "miou"} <= whole.keys() or {"loss", "rmse", "delta1"} <= whole.keys()


def test_depth_is_judged_in_meters():
    task, meters = DepthRegression(2.0, 0.5), torch.full((1, 1, 2, 2), 3.0)
    found = task.metrics(task.aimed(meters + 0.25), task.aimed(meters)).result()
    assert found["rmse"] == pytest.approx(0.25, rel=1e-5)
    assert found["rel"] == pytest.approx(0.25 / 3, rel=1e-5)


def test_only_what_is_known_of_is_judged():
    assert judged(torch.tensor([-1, 0, 3])).tolist() == [False, True, True]
    assert judged(torch.tensor([[[255]], [[0]]])).tolist() == [False, True]
    assert judged(torch.tensor([[[[torch.nan]]], [[[1.0]]]])).tolist() == [False, True]


def test_ids_counted_from_one_are_counted_from_zero_before_anything_else():
    batch = Examples({"image": torch.zeros(1, 3, 2, 2), "semseg": torch.tensor([[[0, 1], [3, 255]]], dtype=torch.uint8)})
    assert Segmentation(3, first_ignored=True).cleaned(batch).fields["semseg"].tolist() == [[[255, 0], [2, 255]]]
    assert Segmentation(4).cleaned(batch) is batch
