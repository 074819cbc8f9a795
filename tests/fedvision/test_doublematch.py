import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedvision.learners.doublematch import (
    confident,
    cosine_loss,
    kernels,
    pseudo_label_loss,
    similarity_loss,
    softmax_loss,
    squared_loss,
    supervised_loss,
)
from fedvision.seeds import generator


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
    decayed, others = kernels(model.parameters())
    assert [p.shape for p in decayed] == [(4, 3, 3, 3), (2, 4)] and len(others) == 4
