"""The network against the reference's graph, executed; and three whole optimizer steps of DoubleMatch through it."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedvision.learners.doublematch import confident, kernels, pseudo_label_loss, similarity_loss, supervised_loss
from fedvision.seeds import generator
from fedvision.wide_resnet import SIZES, SameConv2d, WideResNet, averaged, from_reference, initialized, reference_names, to_reference

TINY = {"scales": 3, "filters": 8, "repeat": 2}
WEIGHT_DECAY, SIMILARITY_WEIGHT, THRESHOLD = 5e-4, 2.0, 0.31


@pytest.fixture(scope="module")
def arrays(golden):
    with np.load(golden / "doublematch.npz") as file:
        return dict(file)


def reference_network(arrays, prefix="init/"):
    """The tiny network with its projection head, as the reference left it."""
    network = WideResNet(3, 5, **TINY)
    network.add_module("projection", nn.Linear(32, 32))
    names = reference_names(network)
    network.load_state_dict(taken(arrays, names, prefix) | counters(network))
    return network


def taken(arrays, names, prefix):
    return from_reference({name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}, names)


def counters(network):
    """torch counts the batches that a norm has seen, the reference does not."""
    return {name: value for name, value in network.state_dict().items() if name.endswith("num_batches_tracked")}


def images(array):
    return torch.from_numpy(array).movedim(-1, -3).contiguous()


def all_views(arrays):
    """Labeled, weak, strong."""
    unlabeled = images(arrays["in_y"])
    return torch.cat([images(arrays["in_xt"]), unlabeled[:, 0], unlabeled[:, 1]])


def close(ours, theirs, tolerance=1e-5):
    theirs = theirs if isinstance(theirs, torch.Tensor) else torch.from_numpy(np.asarray(theirs))
    assert torch.allclose(ours.detach(), theirs.to(ours.dtype), rtol=tolerance, atol=tolerance), (ours - theirs).abs().max()


# ---- mechanics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "classes", "parameters", "width", "convolutions"),
    [("wrn-28-2", 10, 1_469_642, 128, 28), ("wrn-28-8", 100, 23_409_092, 512, 28), ("wrn-37-2", 10, 5_933_770, 256, 37)],
)
def test_the_published_networks_have_the_published_sizes(size, classes, parameters, width, convolutions):
    with torch.device("meta"):
        network = WideResNet(3, classes, **SIZES[size])
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network.classifier.in_features == width
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == convolutions


@pytest.mark.parametrize(("size", "trainable"), [("wrn-28-2", 110), ("wrn-37-2", 144)])
def test_a_checkpoint_has_as_many_variables_as_the_references(size, trainable):
    with torch.device("meta"):
        names = reference_names(WideResNet(3, 10, **SIZES[size]))
    assert sum("/moving_" not in theirs for theirs in names.values()) == trainable


@pytest.mark.parametrize(("side", "stride", "expected"), [(8, 1, 8), (8, 2, 4), (7, 2, 4), (1, 2, 1)])
def test_a_convolution_keeps_the_side_divided_by_the_stride(side, stride, expected):
    assert SameConv2d(1, 2, 3, stride)(torch.zeros(1, 1, side, side)).shape == (1, 2, expected, expected)


def test_even_sides_are_padded_at_the_bottom_and_on_the_right():
    convolution = SameConv2d(1, 1, 3, 2)
    nn.init.ones_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    assert convolution(torch.ones(1, 1, 4, 4)).tolist() == [[[[9.0, 6.0], [6.0, 4.0]]]]


def test_images_of_any_channels_and_sides_become_logits():
    network = WideResNet(1, 4, 2, 8, 1).eval()
    x = torch.rand(2, 1, 9, 6, generator=generator(0))
    assert torch.equal(network(x), network.classifier(network.features(x)))
    assert network(x).shape == (2, 4) and network.features(x).shape == (2, 16)


def test_only_the_first_block_shortcuts_from_behind_its_activation():
    assert [block.first for _, block in WideResNet(3, 5, **TINY).blocks] == [True] + 5 * [False]


def test_weights_start_with_the_references_variances():
    network = initialized(WideResNet(3, 100, 3, 64, 1), generator(0))
    kernel, dense = network.stages[2][0].conv2.weight, network.classifier.weight
    assert kernel.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.01)
    assert dense.std().item() == pytest.approx(math.sqrt(2 / 356), rel=0.02)
    assert dense.abs().max() <= 2 * math.sqrt(2 / 356) / 0.8796
    assert not any(bias.any() for name, bias in network.named_parameters() if name.endswith("bias"))


def test_the_same_generator_initializes_the_same():
    first, second, other = (initialized(WideResNet(3, 5, **TINY), generator(seed)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["stem.weight"], other["stem.weight"])


def test_reference_variables_survive_the_way_there_and_back():
    network = WideResNet(3, 5, **TINY)
    names = reference_names(network, projection=None)
    variables = to_reference(network.state_dict(), names)
    assert variables["classify/conv2d/kernel"].shape == (3, 3, 3, 16) and variables["classify/dense/kernel"].shape == (32, 5)
    back = from_reference(variables, names)
    assert back.keys() | counters(network).keys() == network.state_dict().keys()
    assert all(torch.equal(back[name], network.state_dict()[name]) for name in back)


def test_averaged_variables_are_read_beside_the_moving_statistics():
    network = WideResNet(3, 5, **TINY)
    names = reference_names(network, projection=None)
    variables = to_reference(network.state_dict(), names)
    suffix = "/ExponentialMovingAverage"
    both = {name if "/moving_" in name else name + suffix: array for name, array in variables.items()}
    read = from_reference(both, averaged(names))
    assert read.keys() == names.keys() and torch.equal(read["stem.weight"], network.stem.weight)


# ---- against the reference ------------------------------------------------------------------------------------------


@pytest.mark.golden
def test_variables_are_called_as_the_reference_calls_them(arrays):
    names = reference_names(WideResNet(3, 5, **TINY))
    assert [theirs for theirs in names.values() if "/moving_" not in theirs] == arrays["var_names"].tolist()
    assert {theirs for theirs in names.values() if "/moving_" in theirs} == set(arrays["moving_names"].tolist())


@pytest.mark.golden
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_logits_and_embeddings_are_the_references(arrays, mode):
    network = reference_network(arrays).train(mode == "train")
    x = all_views(arrays)
    close(network(x), arrays[f"cat_logits_{mode}"])
    close(network.features(x), arrays[f"cat_embeds_{mode}"])
    if mode == "train":
        close(network.projection(network.features(x)), arrays["cat_proj_train"])


def terms(arrays, network, kind="cosine", temperature=1.0):
    """The loss terms of a batch: supervised, pseudo-labels, similarity, squared kernels; and where the mask is 1."""
    labels = torch.from_numpy(arrays["in_label"]).long()
    z = network.features(all_views(arrays))
    (_, weak_z, strong_z), (labeled, weak, strong) = (x.split([4, 8, 8]) for x in (z, network.classifier(z)))
    parameters = dict(network.named_parameters())
    decay = sum(parameters[name].square().sum() / 2 for name in kernels(parameters)[0])
    losses = [
        supervised_loss(labeled, labels),
        pseudo_label_loss(weak, strong, THRESHOLD),
        similarity_loss(kind, network.projection(strong_z), weak_z, temperature),
        decay,
    ]
    return losses, confident(weak, THRESHOLD)


def gradient_norm(loss, network):
    slopes = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True, materialize_grads=True)
    return torch.stack([slope.norm() for slope in slopes]).norm()


@pytest.mark.golden
@pytest.mark.parametrize(("kind", "temperature"), [("cosine", 1.0), ("mse", 1.0), ("softmax", 1.0), ("softmax", 0.1)])
def test_each_similarity_and_its_gradient_are_the_references(arrays, kind, temperature):
    if f"us_{kind}_{temperature}" not in arrays:
        pytest.skip(f"no reference values of {kind} with temperature {temperature}")
    network = reference_network(arrays).train()
    losses, _ = terms(arrays, network, kind, temperature)
    close(torch.stack([losses[2], gradient_norm(losses[2], network)]), arrays[f"us_{kind}_{temperature}"])


@pytest.mark.golden
def test_three_steps_are_the_references(arrays):
    network, expected = reference_network(arrays).train(), dict(zip(arrays["step_keys"].tolist(), arrays["step_vals"].T, strict=True))
    parameters = dict(network.named_parameters())
    groups = [[parameters[name] for name in names] for names in kernels(parameters)]
    groups = [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (WEIGHT_DECAY, 0.0), strict=True)]
    optimizer = torch.optim.SGD(groups, lr=0.03, momentum=0.9, nesterov=True)
    average = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    for step in range(3):
        evaluates_to(network, arrays, f"eval_raw_before_step{step}")
        if f"eval_ema_before_step{step}" in arrays:
            evaluates_to(network, arrays, f"eval_ema_before_step{step}", average)
        losses, mask = terms(arrays, network)
        for name, loss in zip(("xe", "xeu", "us", "wd"), losses, strict=True):
            close(loss, expected[f"losses/{name}"][step])
            close(gradient_norm(loss, network), expected[f"loss_gradient_magnitudes/{name}"][step])
        close(mask.float().mean(), expected["monitors/mask"][step])
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * math.cos(5 / 8 * math.pi * step * 4 / (2 * 1024))
        close(torch.tensor(optimizer.param_groups[0]["lr"]), expected["monitors/lr"][step])
        supervised, pseudo, similarity, _ = losses
        optimizer.zero_grad()
        (supervised + pseudo + SIMILARITY_WEIGHT * similarity).backward()
        for name, parameter in network.named_parameters():  # before the step, as the reference's race came out
            average[name].lerp_(parameter.detach(), 1 - 0.999)
        optimizer.step()
    after = taken(arrays, reference_names(network), "after3/")
    for name, value in after.items():
        close(network.state_dict()[name], value)
    evaluates_to(network, arrays, "eval_raw_after3")
    if "eval_ema_after3" in arrays:
        evaluates_to(network, arrays, "eval_ema_after3", average)
    if f"ema3/{arrays['var_names'][0]}" in arrays:
        for name, theirs in reference_names(network).items():
            if name in average:
                close(average[name], from_reference({theirs: arrays[f"ema3/{theirs}"]}, {name: theirs})[name], 1e-6)


def evaluates_to(network, arrays, expected, parameters=None):
    """The probabilities in evaluation mode, with other parameters perhaps, are the expected ones."""
    network.eval()
    with torch.no_grad():
        logits = torch.func.functional_call(network, parameters or {}, (images(arrays["in_eval"]),))
    close(F.softmax(logits, 1), arrays[expected])
    network.train()
