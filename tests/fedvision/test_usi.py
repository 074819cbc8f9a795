import math

import numpy as np
import pytest
import timm
import torch

from fedvision.learners.usi import cross_entropy, distillation, objective
from fedvision.seeds import generator


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
