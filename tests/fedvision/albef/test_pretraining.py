import json

import pytest
import torch

from fedvision.albef import losses
from fedvision.albef.bert import TextSize
from fedvision.albef.losses import Negatives
from fedvision.albef.model import Pretraining
from fedvision.albef.vision import VisionSize
from fedvision.seeds import generator

pytestmark = pytest.mark.golden


@pytest.fixture
def network(vision, text, group):
    model = Pretraining(vision, text, 16, 16, generator(0, "model")).eval()
    model.load_state_dict(group("pre/sd/"))
    return model


def chosen(given):
    every = torch.arange(4)
    return lambda *_: (
        Negatives(every, given["neg_image_idx_for_text"]),
        Negatives(every, given["neg_text_idx_for_image"]),
    )


def passed(network, inputs, given):
    """The reference's forward pass: the copies move first, then all is computed."""
    images, ids, mask = inputs
    network.follow(0.995)
    taught = network.teach(images, ids, mask, given["mlm_input_ids"])
    selected = given["mlm_labels"] != losses.UNSELECTED
    return taught, network(images, ids, mask, chosen(given), taught, given["mlm_input_ids"], selected)


def summed(seen, given):
    alpha, truth = float(given["alpha"]), losses.shared_out(torch.eye(4, 20).bool())
    targets = [losses.distilled(truth, advice, alpha) for advice in seen.taught]
    directions = [losses.contrastive_loss(own, target) for own, target in zip(seen.own, targets, strict=True)]
    labels = given["mlm_labels"][given["mlm_labels"] != losses.UNSELECTED]
    return {
        "i2t": directions[0],
        "t2i": directions[1],
        "itc": sum(directions) / 2,
        "itm": losses.matching_loss(seen.matches, 4),
        "mlm": losses.word_loss(seen.words, labels, seen.taught_words, alpha),
    }


def test_names_and_shapes_are_those_of_the_reference(vision, text, keys):
    own = {name: list(value.shape) for name, value in Pretraining(vision, text, 16, 16, generator(0, "model")).state_dict().items()}
    assert own == {name: shape for name, (shape, _) in keys["pretrain"].items()}


@pytest.mark.parametrize("case", ["pre/a04/", "pre/a00/"])
def test_features_similarities_and_logits_are_those_of_the_reference(network, inputs, group, agree, case):
    given = group(case)
    taught, seen = passed(network, inputs, given)
    features = network.encoded(*inputs)
    agree(features.images, given["image_embeds"], "images")
    agree(features.texts, given["text_embeds"], "texts")
    agree(features.image, given["image_feat"], "image")
    agree(features.text, given["text_feat"], "text")
    agree(taught.image, given["image_feat_m"], "copy's image")
    agree(taught.text, given["text_feat_m"], "copy's text")
    agree(seen.own.image_to_text, given["sim_i2t"], "similarities", atol=1e-4)
    agree(seen.own.text_to_image, given["sim_t2i"], "similarities", atol=1e-4)
    agree(seen.taught.image_to_text, given["sim_i2t_m"], "taught", atol=1e-4)
    agree(seen.taught.text_to_image, given["sim_t2i_m"], "taught", atol=1e-4)
    agree(seen.matches, given["vl_output"], "matches")
    selected = given["mlm_labels"] != losses.UNSELECTED
    agree(seen.words, given["mlm_logits"][selected], "words", atol=5e-5)
    agree(seen.taught_words, given["logits_m"][selected], "taught words", atol=5e-5)
    for own, name in zip(seen.own, ("weights_i2t", "weights_t2i"), strict=True):
        agree(losses.negative_weights(own[:, :4], torch.eye(4).bool()), given[name], name)


@pytest.mark.parametrize("case", ["pre/a04/", "pre/a00/"])
def test_losses_and_their_gradients_are_those_of_the_reference(network, inputs, group, agree, case):
    given = group(case)
    found = summed(passed(network, inputs, given)[1], given)
    for name, value in found.items():
        agree(value, given[f"loss_{name}"], name)
    (found["itc"] + found["itm"] + found["mlm"]).backward()
    gradients = {name: param.grad for name, param in network.named_parameters() if param.grad is not None}
    for name, value in group(f"{case}grad/").items():
        agree(gradients[name], value, name, atol=1e-4, rtol=1e-3)
    norm = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm()
    agree(norm, given["grad_global_l2"], "norm of the gradient", rtol=1e-4)


def test_what_a_step_leaves_behind_is_what_the_reference_leaves(network, inputs, group, agree):
    given = group("pre/a04/")
    taught, _ = passed(network, inputs, given)
    assert network.enqueue(taught.image, taught.text).tolist() == [4, 5, 6, 7]
    agree(network.image_queue, given["image_queue_after"], "images")
    agree(network.text_queue, given["text_queue_after"], "texts")
    assert torch.equal(network.queue_ptr, given["queue_ptr_after"])
    for name, value in group("pre/sd_after_fwd/").items():
        agree(network.state_dict()[name].float(), value.float(), name)


def test_words_are_masked_as_the_reference_masks_them(inputs, group):
    given, (_, ids, _) = group("pre/a04/"), inputs
    draws = (given[f"mlm_bernoulli_{name}"].bool() for name in ("mask", "replace80", "rand50"))
    masked = losses.replaced_words(ids, (0, 1), 3, *draws, given["mlm_randint"])
    assert torch.equal(masked.ids, given["mlm_input_ids"])
    assert torch.equal(masked.targets, given["mlm_labels"])


def test_the_published_network_has_its_numbers_of_parameters_and_its_names(golden):
    published = json.loads((golden / "albef_full_pretrain_keys.json").read_text())
    model = Pretraining(VisionSize(), TextSize(), 256, 65536, generator(0, "model"))
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == {
        name: shape if not isinstance(shape[0] if shape else 0, list) else shape[0] for name, shape in published.items()
    }
    assert sum(param.numel() for param in model.parameters()) == 419_873_911
    assert sum(param.numel() for param in model.parameters() if param.requires_grad) == 209_937_725
