"""The networks of ALBEF's tasks, held to the reference's arrays."""

from dataclasses import replace

import pytest
import torch

from fedvision.albef import losses
from fedvision.albef.answering import Answering
from fedvision.albef.assignment import FIRST, NEITHER, SECOND, Assigned, Assignment, assigned, drawn_assignment
from fedvision.albef.bert import TextSize
from fedvision.albef.judge import Entailment, PairReasoning
from fedvision.albef.losses import Negatives
from fedvision.albef.retrieval import NOTHING, Retrieval
from fedvision.albef.vision import VisionSize
from fedvision.errors import ExperimentError
from fedvision.seeds import generator


@pytest.fixture
def paired(text):
    """The size of the reference's text network for two pictures: two layers of words, twice two of pictures."""
    return replace(text, layers=6, paired=True)


@pytest.fixture
def made(vision, text, paired):
    """Makes each of the reference's tiny networks, by its kind in the key lists."""
    rng = generator(0, "model")
    makers = {
        "retrieval": lambda: Retrieval(vision, text, 16, 16, rng),
        "ve": lambda: Entailment(vision, text, rng),
        "nlvr": lambda: PairReasoning(vision, paired, rng),
        "nlvr_ta": lambda: Assignment(vision, paired, 16, rng),
        "vqa": lambda: Answering(vision, text, rng),
    }
    return lambda kind: makers[kind]().eval()


@pytest.mark.golden
@pytest.mark.parametrize("kind", ["retrieval", "ve", "nlvr", "nlvr_ta", "vqa"])
def test_names_and_shapes_are_those_of_the_reference(made, keys, kind):
    own = {name: list(value.shape) for name, value in made(kind).state_dict().items()}
    assert own == {name: shape for name, (shape, _) in keys[kind].items()}


@pytest.mark.parametrize(
    ("make", "all_params", "trained"),
    [
        (lambda vision, text, rng: Retrieval(vision, text, 256, 65536, rng), 419_120_131, 209_560_835),
        (Entailment, 419_516_934, 209_758_467),
        (lambda vision, text, rng: PairReasoning(vision, replace(text, layers=18, paired=True), rng), 518_762_500, 259_381_250),
        (Answering, 580_672_116, 290_336_058),
    ],
    ids=["retrieval", "ve", "nlvr", "vqa"],
)
def test_the_published_networks_have_their_numbers_of_parameters(make, all_params, trained):
    with torch.device("meta"):
        model = make(VisionSize(side=384), TextSize(), generator(0, "model"))
    assert sum(param.numel() for param in model.parameters()) == all_params
    assert sum(param.numel() for param in model.parameters() if param.requires_grad) == trained


# ---- retrieval ------------------------------------------------------------------------------------------------------


def found(network, inputs, given, distill=True):
    """The reference's forward pass of retrieval: the copies move first, then all is computed."""
    network.follow(0.995)
    taught, every = network.teach(*inputs), torch.arange(4)
    negatives = (Negatives(every, given["neg_image_idx_for_text"]), Negatives(every, given["neg_text_idx_for_image"]))
    seen = network(*inputs, lambda *_: negatives, taught)
    truth = losses.shared_out(network.positive(given["image_ids"]))
    targets = [losses.distilled(truth, advice, float(given["alpha"])) if distill else truth for advice in seen.taught]
    itc = sum(losses.contrastive_loss(own, target) for own, target in zip(seen.own, targets, strict=True)) / 2
    return taught, seen, truth, targets, itc, losses.matching_loss(seen.matches, 4)


@pytest.fixture
def retrieval(made, group):
    network = made("retrieval")
    network.load_state_dict(group("ret/sd/"))
    return network


@pytest.mark.golden
def test_retrieval_compares_and_matches_as_the_reference_does(retrieval, inputs, group, agree):
    given = group("ret/")
    taught, seen, truth, targets, itc, itm = found(retrieval, inputs, given)
    agree(truth, given["sim_targets"], "truth")
    for name, own, target in zip(("i2t", "t2i"), seen.own, targets, strict=True):
        agree(own, given[f"sim_{name}"], name, atol=1e-4)
        agree(target, given[f"sim_{name}_targets"], name)
        same = given["image_ids"][:, None] == given["image_ids"]
        agree(losses.negative_weights(own[:, :4], same), given[f"weights_{name}"], name)
    agree(seen.matches, given["vl_output"], "matches")
    agree(itc, given["loss_itc"], "itc")
    agree(itm, given["loss_itm"], "itm")
    (itc + itm).backward()
    gradients = {name: param.grad for name, param in retrieval.named_parameters() if param.grad is not None}
    for name, value in group("ret/grad/").items():
        agree(gradients[name], value, name, atol=1e-4, rtol=1e-3)
    retrieval.remember(taught.image, taught.text, given["image_ids"])
    assert torch.equal(retrieval.idx_queue, given["idx_queue_after"])
    assert torch.equal(retrieval.queue_ptr, given["queue_ptr_after"])


@pytest.mark.golden
def test_retrieval_without_a_teacher_has_the_reference_s_losses(retrieval, inputs, group, agree):
    given = group("ret/")
    *_, itc, itm = found(retrieval, inputs, given, distill=False)
    agree(itc, given["nodistill_loss_itc"], "itc")
    agree(itm, given["nodistill_loss_itm"], "itm")


def test_a_queue_of_nothing_belongs_to_no_image(made):
    network = made("retrieval")
    assert (network.idx_queue == NOTHING).all()
    assert network.positive(torch.tensor([0, 4, 0]))[:, :3].tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    assert not network.positive(torch.tensor([0, 4, 0]))[:, 3:].any()


def test_numbers_of_images_are_remembered_beside_their_features(made):
    network = made("retrieval")
    features = torch.eye(16)
    network.remember(features[:10], features[:10], torch.arange(10))
    network.remember(features, features, torch.arange(20, 36))
    network.remember(features[:2], features[:2], torch.tensor([7, 8]))
    assert network.idx_queue[0].tolist() == [26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 7, 8, 22, 23, 24, 25]
    many = torch.arange(40)
    network.remember(features[many % 16], features[many % 16], many)
    assert sorted(network.idx_queue[0].tolist()) == list(range(24, 40))
    for place, number in enumerate(network.idx_queue[0].tolist()):
        assert network.image_queue[:, place].argmax() == number % 16


# ---- judging a text by pictures -------------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize(("kind", "prefix"), [("ve", "ve/"), ("nlvr", "nlvr/")])
def test_a_text_is_judged_as_the_reference_judges_it(made, inputs, group, agree, kind, prefix):
    network, given, (image, ids, mask) = made(kind), group(prefix), inputs
    network.load_state_dict(group(f"{prefix}sd/"))
    pictures = given["image"].chunk(2) if kind == "nlvr" else [image]
    agree(network(pictures, ids, mask), given["prediction"], "prediction")
    network.follow(0.995)
    taught = network.teach(pictures, ids, mask)
    agree(losses.class_loss(network(pictures, ids, mask), given["targets"], taught, float(given["alpha"])), given["loss"], "loss")


def test_layers_for_two_pictures_share_what_they_look_for_at_each(made):
    layers = made("nlvr").text_encoder.layers
    for one, two in ((2, 3), (4, 5)):
        first, second = layers[one].crossattention.self, layers[two].crossattention.self
        assert first.key is second.key
        assert first.value is second.value
        assert first.query is not second.query
    assert layers[2].crossattention.self.key is not layers[4].crossattention.self.key


def test_which_picture_is_first_matters(made, inputs):
    network, (image, ids, mask) = made("nlvr"), inputs
    assert not torch.allclose(network([image, image.flip(0)], ids, mask), network([image.flip(0), image], ids, mask), atol=1e-4)


def test_layers_in_twos_are_for_two_pictures_alone(vision, text, paired):
    with pytest.raises(ExperimentError, match="about 1"):
        Entailment(vision, paired, generator(0, "model"))
    with pytest.raises(ExperimentError, match="about 2"):
        PairReasoning(vision, text, generator(0, "model"))
    with pytest.raises(ExperimentError, match="paired"):
        Assignment(vision, text, 16, generator(0, "model"))


# ---- assigning a text to one of two pictures ------------------------------------------------------------------------


def shown(draws):
    """What draws, text by text, say: the loop of the specification."""
    result = []
    for own, (first, second, others) in enumerate(draws):
        if first > 1 / 3:
            result.append((own, others[0], 0) if second > 0.5 else (others[0], own, 1))
        else:
            result.append((others[0], others[1], 2))
    return [list(column) for column in zip(*result, strict=True)]


def test_pictures_are_assigned_as_draws_say():
    draws = [(0.2, 0.9, (3, 1)), (0.4, 0.9, (2, 0)), (0.9, 0.1, (0, 3)), (0.1, 0.2, (2, 0))]
    first, second, others = (torch.tensor(column) for column in zip(*draws, strict=True))
    ours = assigned(first <= 1 / 3, second <= 0.5, others)
    assert [values.tolist() for values in ours] == shown(draws)


def test_a_third_of_the_texts_get_neither_picture_and_none_its_own_by_chance():
    weights = torch.rand(30, 30, generator=generator(0, "weights"))
    weights[0] = 0.0
    drawn = [drawn_assignment(weights, generator(0, "draw", i)) for i in range(200)]
    first, second, truth = (torch.cat(values) for values in zip(*drawn, strict=True))
    own = torch.arange(30).repeat(200)
    for answer, own_first, own_second in ((FIRST, True, False), (SECOND, False, True), (NEITHER, False, False)):
        there = truth == answer
        assert abs(there.float().mean() - 1 / 3) < 0.02
        assert ((first[there] == own[there]) == own_first).all()
        assert ((second[there] == own[there]) == own_second).all()
    assert (first != second).all()


def test_a_picture_that_looks_alike_is_shown_more_often():
    weights = torch.full((3, 3), 0.01)
    weights[:, 1] = 0.99
    others = [drawn_assignment(weights, generator(0, "draw", i)) for i in range(300)]
    beside = torch.tensor([int(each.second[0]) for each in others if each.truth[0] == FIRST])
    assert (beside == 1).float().mean() > 0.95


def test_text_assignment_needs_three_pictures():
    with pytest.raises(ExperimentError, match="the batch has 2"):
        drawn_assignment(torch.ones(2, 2), generator(0, "draw"))


def test_the_network_is_shown_what_was_assigned(made, inputs):
    network, (image, ids, mask) = made("nlvr_ta"), inputs
    offered = []

    def choose(weights):
        offered.append(weights)
        return Assigned(torch.tensor([0, 2, 1, 0]), torch.tensor([1, 1, 3, 3]), torch.tensor([0, 1, 2, 1]))

    logits, truth = network(image, ids, mask, choose)
    tokens = network.visual_encoder(image)
    for i, (one, two) in enumerate(((0, 1), (2, 1), (1, 3), (0, 3))):
        hidden = network.text_encoder(ids[i : i + 1], mask[i : i + 1], [tokens[one : one + 1], tokens[two : two + 1]])
        assert torch.allclose(network.ta_head(hidden[0, 0]), logits[i], atol=1e-5)
    feature = torch.nn.functional.normalize(network.vision_proj(tokens[:, 0]), dim=-1)
    weights = (feature @ feature.T / 0.07).softmax(1)
    assert torch.allclose(offered[0], weights * ~torch.eye(4, dtype=torch.bool), atol=1e-6)
    assert not offered[0].requires_grad
    torch.nn.functional.cross_entropy(logits, truth).backward()
    assert all((param.grad is not None) == param.requires_grad for param in network.parameters() if param.ndim > 1)
