"""The heads that Leopart is judged with, against the reference's arrays, and against what the paper does one step after another."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedvision.leopart.heads import FCNHead, LinearHead, Segmenter, by_place, upsampled
from fedvision.leopart.vision import VisionSize, VisionTransformer
from fedvision.seeds import generator

TINY = VisionSize(side=16, patch=4, width=8, depth=1, heads=2)


def rng(*purpose):
    return generator(0, *purpose)


def maps(*shape):
    return torch.randn(*shape, generator=rng("maps"))


def parameters(module):
    return sum(param.numel() for param in module.parameters())


@pytest.mark.golden
def test_the_convolutional_head_is_the_references(golden):
    with np.load(golden / "leopart.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file if name.startswith("fcn_")}
    state = {name.removeprefix("fcn_sd/"): value for name, value in arrays.items() if name.startswith("fcn_sd/")}
    head = FCNHead(8, 5, None, rng("head"), hidden=6).eval()
    head.load_state_dict(state)  # strictly: the names are the reference's
    assert torch.allclose(head.scores(arrays["fcn_x"]), arrays["fcn_y"], atol=1e-5)
    assert torch.equal(head(arrays["fcn_x"], (10, 10)), head.scores(arrays["fcn_x"]))


def test_the_heads_are_as_large_as_published():
    assert parameters(LinearHead(384, 21, rng("head"))) == 8_085
    assert parameters(FCNHead(384, 21, 100, rng("head"))) == 8_269_845


def test_interpolating_scores_is_interpolating_vectors():
    head, vectors = LinearHead(8, 5, rng("head")), maps(2, 8, 7, 7)
    apart = F.interpolate(vectors, (25, 30), mode="bilinear", align_corners=False)
    each = torch.stack([head.conv_seg.weight[:, :, 0, 0] @ one.flatten(1) + head.conv_seg.bias[:, None] for one in apart])
    assert torch.allclose(head(vectors, (25, 30)), each.unflatten(2, (25, 30)), atol=1e-5)


def test_bilinear_upsampling_is_between_the_four_nearest_centers():
    given, size = maps(1, 1, 3, 4), (7, 10)
    naive = torch.empty(size)
    for i in range(size[0]):
        for j in range(size[1]):
            y, x = (max((at + 0.5) * side / new - 0.5, 0.0) for at, side, new in ((i, 3, 7), (j, 4, 10)))
            top, left = int(y), int(x)
            below, right = min(top + 1, 2), min(left + 1, 3)
            dy, dx = y - top, x - left
            upper = (1 - dx) * given[0, 0, top, left] + dx * given[0, 0, top, right]
            lower = (1 - dx) * given[0, 0, below, left] + dx * given[0, 0, below, right]
            naive[i, j] = (1 - dy) * upper + dy * lower
    assert torch.allclose(upsampled(given, size)[0, 0], naive, atol=1e-6)
    assert upsampled(given, (3, 4)) is given


def test_the_convolutional_head_works_at_the_size_that_it_is_trained_at():
    head, vectors = FCNHead(8, 5, 12, rng("head"), hidden=6).eval(), maps(2, 8, 4, 4)
    trained = head(vectors, (12, 12))
    assert torch.equal(trained, head.scores(upsampled(vectors, (12, 12))))
    assert torch.equal(head(vectors, (32, 32)), upsampled(trained, (32, 32)))


def test_only_training_drops_channels_and_whole_ones():
    head, vectors = FCNHead(8, 5, None, rng("head"), hidden=6, dropout=0.5), maps(4, 8, 4, 4)
    dropped = []
    head.dropout.register_forward_hook(
        lambda module, given, result: dropped.append((result == 0).flatten(2).all(2) & (given[0] > 0).flatten(2).any(2))
    )
    head.train()(vectors, (4, 4))
    head.eval()(vectors, (4, 4))
    assert dropped[0].any() and not dropped[1].any()


def test_the_vectors_of_patches_lie_where_the_patches_do():
    backbone = VisionTransformer(TINY, rng("backbone")).eval()
    images = maps(2, 3, 8, 16)
    placed, tokens = by_place(backbone, images), backbone.tokens(images)
    assert placed.shape == (2, 8, 2, 4)
    for row in range(2):
        for column in range(4):
            assert torch.equal(placed[:, :, row, column], tokens[:, 1 + 4 * row + column])


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_transformer_has_no_gradient(frozen):
    model = Segmenter(VisionTransformer(TINY, rng("backbone")), LinearHead(8, 5, rng("head")), frozen)
    model(maps(1, 3, 16, 16), (10, 10)).sum().backward()
    assert all((param.grad is None) == frozen for param in model.backbone.parameters())
    assert all(param.grad is not None for param in model.head.parameters())
