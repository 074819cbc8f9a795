import pytest
import torch
from torch.nn import functional as F

from fedvision.errors import ExperimentError
from fedvision.leopart.network import Leopart, Network, uniform_streak, unit_rows
from fedvision.leopart.vision import VisionSize, VisionTransformer, scaled_positions
from fedvision.seeds import generator

golden = pytest.mark.golden

SMALL = VisionSize(side=32, patch=8, width=16, depth=2, heads=2)


def built(**settings):
    return Leopart(SMALL, 8, 4, 5, generator(0, "model"), **settings)


def images(side=32, n=2):
    return torch.rand(n, 3, side, side, generator=generator(0, "images", side))


@golden
def test_tokens_of_crops_of_any_size_are_the_references(reference, arrays, agree):
    model = reference().model
    with torch.no_grad():
        for side in (64, 96, 32):
            agree(model.tokens(arrays[f"vit_x{side}"]), arrays[f"vit_tokens{side}"], f"tokens of {side}")
        seen = model.observed(arrays["vit_x64"])
    agree(seen.tokens, arrays["vit_tokens64"])
    agree(seen.attention, arrays["vit_clsattn64"])


@golden
def test_embeddings_and_scores_are_the_references(reference, arrays, agree):
    with torch.no_grad():
        seen = reference().model([arrays["vit_x64"], arrays["vit_x32"]], unit=False)
    agree(seen.embeddings, arrays["head_emb"])
    agree(seen.scores, arrays["head_scores"])


@golden
def test_positions_are_scaled_as_the_reference_scales_them(arrays, agree):
    for side, grid in ((96, 6), (448, 28), (224, 14)):
        agree(scaled_positions(arrays["pos_in"], grid, grid), arrays[f"pos_{side}"], f"positions for {side}")


@golden
def test_names_and_shapes_are_the_references(reference, keys):
    tiny = {name: list(tensor.shape) for name, tensor in reference().state_dict().items() if name not in ("queue", "uniform_steps")}
    assert tiny == keys["tiny"]
    with torch.device("meta"):
        small = Network(VisionSize(), 2048, 256, 300, torch.Generator())
    assert {name: list(tensor.shape) for name, tensor in small.state_dict().items()} == keys["vits16"]


def test_the_published_networks_have_the_papers_numbers_of_parameters():
    def count(module):
        return sum(param.numel() for param in module.parameters())

    with torch.device("meta"):
        small = Network(VisionSize(), 2048, 256, 300, torch.Generator())
        base = Network(VisionSize(patch=8, width=768, heads=12), 2048, 256, 300, torch.Generator())
    assert (count(small.projection_head), count(small.prototypes), count(small)) == (5_509_376, 76_800, 27_251_840)
    assert count(small) - count(small.projection_head) - count(small.prototypes) == 21_665_664
    assert count(base) == 92_180_480 and base.pos_embed.shape == (1, 785, 768)


def test_it_computes_what_timms_transformer_does_at_the_size_of_its_positions():
    import timm

    model = VisionTransformer(SMALL, generator(0, "model"))
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
    theirs = timm.create_model("vit_small_patch16_224", **settings).eval()
    theirs.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.allclose(theirs.forward_features(images()), model.tokens(images()), atol=1e-5)


def test_pictures_need_not_be_squares():
    model = VisionTransformer(SMALL, generator(0, "model"))
    assert model.tokens(torch.rand(1, 3, 16, 40, generator=generator(0))).shape == (1, 1 + 2 * 5, 16)
    with pytest.raises(ExperimentError, match=r"patches of 8 pixels do not divide pictures of 32 x 20; choose learner\.global_size"):
        model.tokens(torch.zeros(1, 3, 32, 20))


def test_attention_is_a_part_of_a_softmax_over_all_tokens():
    model = VisionTransformer(SMALL, generator(0, "model"))
    attention = model.observed(images()).attention
    assert attention.shape == (2, 2, 16) and (attention > 0).all() and (attention.sum(-1) < 1).all()


def test_crops_of_one_size_go_together_and_none_looks_at_another():
    network = built().model
    crops = [images(), images().flip(0), images(16)]
    seen = network(crops)
    assert [each.shape for each in seen.tokens] == [(4, 16, 16), (2, 4, 16)] and seen.scores.shape == (4 * 16 + 2 * 4, 5)
    alone = torch.cat([network([crop]).scores for crop in crops])
    assert torch.allclose(seen.scores, alone, atol=1e-6)
    assert torch.allclose(seen.embeddings.norm(dim=1), torch.ones(72))


def test_a_step_along_the_gradient_of_unit_rows_is_one_of_rows_that_were_normalized_before():
    weight = torch.randn(3, 4, generator=generator(0)).requires_grad_()
    plain = F.normalize(weight.detach(), dim=1).requires_grad_()
    [ours] = torch.autograd.grad(unit_rows(weight).pow(3).sum(), weight)
    [theirs] = torch.autograd.grad(plain.pow(3).sum(), plain)
    assert torch.equal(unit_rows(weight), plain) and torch.equal(ours, theirs)


@pytest.mark.parametrize("copied", [False, True])
def test_a_teacher_begins_at_the_transformer_and_its_head_where_it_is_asked_to(copied):
    model = built(copied=copied)
    assert torch.equal(model.teacher.blocks[1].mlp.fc1.weight, model.model.blocks[1].mlp.fc1.weight)
    for name in ("prototypes.weight", "projection_head.2.weight"):
        assert torch.equal(model.teacher.state_dict()[name], model.model.state_dict()[name]) == copied


def test_a_teacher_follows_normalized_prototypes():
    model = built()
    own, theirs = (F.normalize(module.prototypes.weight.detach(), dim=1) for module in (model.model, model.teacher))
    model.follow(0.75)
    assert torch.allclose(model.teacher.prototypes.weight, 0.75 * theirs + 0.25 * own)
    assert torch.equal(model.model.prototypes.weight, own)


def test_a_queue_has_the_newest_first_and_counts_once_it_is_full():
    model = built(queue=5)
    fresh = torch.arange(1.0, 13.0).view(2, 6, 1).expand(-1, -1, 4)
    assert model.full == [False, False] and model.remembered_scores(0) is None
    model.remember(fresh[:, :3])
    assert model.queue[0, :, 0].tolist() == [1, 2, 3, 0, 0] and model.full == [False, False]
    model.remember(torch.stack([fresh[0, 3:6], torch.zeros(3, 4)]))  # nothing was drawn of the second crop
    assert model.queue[0, :, 0].tolist() == [4, 5, 6, 1, 2] and model.queue[1, :, 0].tolist() == [7, 8, 9, 0, 0]
    assert model.full == [True, False] and model.remembered_scores(0).shape == (5, 5) and model.remembered_scores(1) is None
    model.remember(fresh)
    assert model.queue[0, :, 0].tolist() == [1, 2, 3, 4, 5]


def test_uniform_steps_are_counted_in_a_row():
    steps = torch.zeros(1, dtype=torch.int64)
    for loss, expected in ((1.6094, 1), (1.6, 2), (1.59, 0), (1.615, 1)):  # ln 5 = 1.6094
        steps = uniform_streak(steps, torch.tensor(loss), 5)
        assert steps.item() == expected, loss
