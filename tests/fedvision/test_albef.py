import pytest
import torch
from safetensors.torch import save_file

from fedvision.albef.losses import UNSELECTED
from fedvision.data.examples import CAPTION, IMAGE, LABEL, Examples
from fedvision.data.federated import Spec
from fedvision.data.texts import encode_texts
from fedvision.errors import DataError, ExperimentError
from fedvision.holdings import Holdings
from fedvision.learners.albef import ALBEF, MASKED, TARGETS
from fedvision.learners.aligned import all_texts
from fedvision.learners.check import check_learner
from fedvision.learners.image_text import IDS, WORDS, drawn_texts
from fedvision.seeds import generator
from fedvision.silo import Silo

SPEC = Spec((3, 32, 32), 2, (IMAGE, LABEL, CAPTION))
TINY = {"patch": 8, "xavier": True, "deviation": 0.1, "queue": 8}


def captioned(n=6):
    """Pictures of n colors, with two captions each, of which the last has only one."""
    colors = ["red", "blue", "green", "white", "pink", "brown", "cyan", "orange"]
    texts = [[f"a large {colors[i % 8]} circle", f"the circle is {colors[i % 8]}"] for i in range(n - 1)] + [["a small star"]]
    images = torch.rand(n, 3, 32, 32, generator=generator(0, "images"))
    return Examples({IMAGE: images, CAPTION: encode_texts(texts), LABEL: torch.full((n,), -1)})


def learner(**settings):
    return ALBEF(**(TINY | settings))


def loss_of(learner, model, batch, progress=0.5):
    return learner.loss(model, batch, progress, generator(0, "loss"))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dropout": 0.0, "ramp": 1.0, "probes": ("red", "blue")},
        {"distilled": ()},
        {"distilled": ("mlm",), "copies": "shared"},
        {"hard_negatives": False},
        {"contrastive": False},
        {"crop_scale": (0.5, 1.0), "flip": 0.5, "randaugment": True, "resolution": 24},
    ],
)
def test_albef_is_a_learner(settings):
    check_learner(learner(**settings), captioned(), SPEC)


def test_a_step_leaves_copies_behind_and_features_in_the_queue():
    own = learner(momentum=0.5, dropout=0.0)
    model = own.build(SPEC, generator(0, "model"))
    batch = own.draw(model, captioned(), slice(0, 3), generator(0, "view"))
    with torch.no_grad():
        model.vision_proj.weight += 1.0
        before = model.vision_proj_m.weight.clone()
        own.follow(model, batch, 0.0)
    assert torch.allclose(model.vision_proj_m.weight, before + 0.5)
    assert torch.allclose(model.image_queue[:, :3].mT, batch.fields["taught_image"])
    assert model.queue_ptr.item() == 3


def test_a_queue_goes_around_whatever_the_batch():
    own = learner(queue=5)
    model = own.build(SPEC, generator(0, "model"))
    for turn in range(3):
        own.follow(model, own.draw(model, captioned(), slice(0, 2), generator(turn, "view")), 0.0)
    assert model.queue_ptr.item() == 1
    own.follow(model, own.draw(model, captioned(), slice(0, 6), generator(9, "view")), 0.0)
    assert model.image_queue.isfinite().all() and model.queue_ptr.item() == 1


def test_a_batch_of_one_has_no_pair_that_does_not_match():
    own = learner()
    model = own.build(SPEC, generator(0, "model"))
    loss = loss_of(own, model, own.draw(model, captioned(), slice(0, 1), generator(0, "view")))
    assert loss.parts["itm"] == 0 and loss.total.isfinite()


def test_a_batch_without_masked_words_teaches_no_words():
    own = learner(mask_probability=0.0)
    model = own.build(SPEC, generator(0, "model"))
    loss = loss_of(own, model, own.draw(model, captioned(), slice(0, 4), generator(0, "view")))
    assert loss.parts["mlm"] == 0
    loss.total.backward()
    assert all(param.grad is None or param.grad.isfinite().all() for param in model.parameters())


def test_an_empty_caption_is_the_token_of_the_beginning_alone():
    own, model = learner(), learner().build(SPEC, generator(0, "model"))
    empty = Examples({**captioned().fields, CAPTION: encode_texts([[""]] * 6)})
    batch = own.draw(model, empty, slice(0, 4), generator(0, "view"))
    assert batch.fields[IDS].tolist() == [[own.pieces.begin]] * 4
    assert loss_of(own, model, batch).total.isfinite()


def test_a_caption_that_is_too_long_is_cut_off():
    own = learner(longest=4)
    batch = own.train_view(captioned(), generator(0, "view"))
    assert batch.fields[IDS].shape[1] == 4


def test_padding_and_the_beginning_are_never_masked():
    own = learner(mask_probability=1.0)
    fields = own.train_view(captioned(), generator(0, "view")).fields
    kept = (fields[IDS] == own.pieces.begin) | ~fields[WORDS]
    assert torch.equal(fields[TARGETS] == UNSELECTED, kept)
    assert torch.equal(fields[MASKED][kept], fields[IDS][kept])


def test_each_caption_is_drawn_as_often_and_a_missing_one_never():
    texts = encode_texts([["one", "two", "three"], ["only"]])
    drawn = [drawn_texts(texts, generator(seed, "texts")) for seed in range(600)]
    assert {other for _, other in drawn} == {"only"}
    assert all(150 <= sum(one == word for one, _ in drawn) <= 250 for word in ("one", "two", "three"))


def test_queues_and_copies_stay_in_the_silo_and_the_rest_travels():
    model = learner().build(SPEC, generator(0, "model"))
    held = Holdings.of(learner(), model)
    assert {name.split(".")[0] for name in held.private} == {
        "image_queue", "text_queue", "queue_ptr", "visual_encoder_m", "vision_proj_m", "text_encoder_m", "text_proj_m",
    }  # fmt: skip
    assert {name.split(".")[0] for name in held.shared} == {
        "temp", "visual_encoder", "vision_proj", "text_encoder", "text_proj", "itm_head",
    }  # fmt: skip
    shared = Holdings.of(learner(copies="shared"), model)
    assert {name.split(".")[0] for name in shared.private} == {"image_queue", "text_queue", "queue_ptr"}


def test_copies_of_a_silo_begin_at_the_weights_it_was_sent():
    own = learner()
    model = own.build(SPEC, generator(0, "model"))
    arrays = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in Holdings.of(own, model).shared.items()}
    silo = Silo(own, model, arrays, captioned())
    assert torch.equal(silo.model.vision_proj_m.weight, silo.model.vision_proj.weight)


def test_alpha_rises_over_its_ramp():
    own = learner(alpha=0.4, ramp=0.5)
    assert [own.alpha_at(progress) for progress in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.0, 0.2, 0.4, 0.4])
    assert learner(alpha=0.4).alpha_at(0.0) == 0.4


def test_what_does_not_fit_is_refused_with_a_remedy(tmp_path):
    build = lambda own, spec=SPEC: own.build(spec, generator(0, "model"))  # noqa: E731
    with pytest.raises(ExperimentError, match=r"lack the field 'caption'.*data\.fields"):
        build(learner(), Spec((3, 32, 32), 2, (IMAGE, LABEL)))
    with pytest.raises(ExperimentError, match="patch = 5 does not divide"):
        build(learner(patch=5))
    with pytest.raises(ExperimentError, match="no squares"):
        build(learner(), Spec((3, 32, 40), 2, (IMAGE, CAPTION)))
    with pytest.raises(ExperimentError, match="64 positions"):
        build(learner(longest=65))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nword\n")
    with pytest.raises(ExperimentError, match=r"has no \[MASK\]"):
        build(learner(vocabulary=str(tmp_path / "vocab.txt")))
    with pytest.raises(DataError, match="no 'caption'"):
        learner().train_view(Examples({IMAGE: torch.rand(2, 3, 32, 32)}), generator(0, "view"))


def test_weights_of_another_run_are_where_it_begins(tmp_path):
    own = learner()
    model = own.build(SPEC, generator(1, "another"))
    save_file({name: tensor.contiguous() for name, tensor in Holdings.of(own, model).shared.items()}, tmp_path / "model.safetensors")
    begun = learner(checkpoint=str(tmp_path / "model.safetensors")).build(SPEC, generator(0, "model"))
    state = model.state_dict()
    for name, tensor in begun.state_dict().items():
        if name in Holdings.of(own, model).shared:
            assert torch.equal(tensor, state[name]), name
    assert torch.equal(begun.vision_proj_m.weight, model.vision_proj.weight)


def test_pictures_and_captions_find_each_other_if_their_features_agree():
    own = learner(reranked=3)
    model = own.build(SPEC, generator(0, "model")).eval()
    examples = captioned()
    with torch.inference_mode():
        found = own.overall(model, examples)
    features = model.encoded(own.views(examples.image), *own.first_tokens(examples))
    listed, owners = all_texts(examples.fields[CAPTION])
    texts = torch.cat([model.encoded(own.views(examples.image[:1]), *own.tokens([text])).text for text in listed])
    best = (features.image @ texts.mT).argmax(1).tolist()
    assert found["text_recall@1"] == pytest.approx(sum(int(owners[text]) == image for image, text in enumerate(best)) / 6)
    assert {"image_recall@5", "recall", "reranked_recall"} <= found.keys()
