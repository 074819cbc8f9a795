"""The learners of ALBEF's tasks."""

import json

import numpy as np
import pytest
import torch

from fedvision.albef import losses
from fedvision.albef.answering import telling_losses
from fedvision.data.examples import (
    ANSWER,
    ANSWER_WEIGHT,
    BOX,
    CAPTION,
    EXPRESSION,
    HYPOTHESIS,
    IMAGE,
    PROPOSALS,
    QUESTION,
    SECOND_IMAGE,
    STATEMENT,
    TRUTH,
    VERDICT,
    Examples,
)
from fedvision.data.federated import Spec
from fedvision.data.scenes import scenes
from fedvision.data.texts import decode_texts, encode_texts
from fedvision.errors import DataError, ExperimentError
from fedvision.evaluation import evaluate
from fedvision.holdings import Holdings
from fedvision.learners.about_pictures import drawn_places
from fedvision.learners.albef_assignment import ALBEFAssignment
from fedvision.learners.albef_judge import ALBEFEntailment, ALBEFPairReasoning
from fedvision.learners.albef_retrieval import NUMBER, POSITIVE, ALBEFRetrieval
from fedvision.learners.albef_vqa import ANSWER_IDS, ALBEFAnswering, vote_accuracy
from fedvision.learners.check import check_learner
from fedvision.learners.image_text import IDS, WORDS
from fedvision.seeds import generator

FIELDS = (
    IMAGE, CAPTION, QUESTION, ANSWER, ANSWER_WEIGHT, HYPOTHESIS, VERDICT, SECOND_IMAGE, STATEMENT, TRUTH, EXPRESSION, BOX, PROPOSALS,
)  # fmt: skip
SPEC = Spec((3, 32, 32), 2, FIELDS)
TINY = {"patch": 8, "xavier": True, "deviation": 0.1}
KINDS = {
    "retrieval": ALBEFRetrieval,
    "ve": ALBEFEntailment,
    "nlvr2": ALBEFPairReasoning,
    "assignment": ALBEFAssignment,
    "vqa": ALBEFAnswering,
}


@pytest.fixture(scope="module")
def drawn():
    """Scenes with everything that can be asked of them."""
    return scenes(examples=24, test_examples=8, size=32, objects=(1, 3), fields=FIELDS, rng=np.random.default_rng(0)).train


@pytest.fixture
def some(drawn):
    """Six of them."""
    return drawn[:6].decoded()


def learner(kind, **settings):
    return KINDS[kind](**(TINY | ({"queue": 8} if kind == "retrieval" else {}) | settings))


def built(own):
    return own.build(SPEC, generator(0, "model"))


def drawn_batch(own, model, examples, turn=slice(None), seed=0):
    return own.draw(model, examples, turn, generator(seed, "view"))


def loss_of(own, model, batch, progress=0.5):
    return own.loss(model, batch, progress, generator(0, "loss"))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("retrieval", {"reranked": 3, "dropout": 0.0}),
        ("retrieval", {"trained_on": "expression", "texts_drawn": 2, "grounding": "similarity", "alpha": 0.0}),
        ("ve", {"blind": True, "ramp": 1.0}),
        ("ve", {"texts_drawn": 2, "alpha": 0.0, "crop_scale": (0.5, 1.0), "flip": 0.5, "randaugment": True, "resolution": 24}),
        ("nlvr2", {"blind": True}),
        ("assignment", {}),
        ("vqa", {"shortlist": 4, "blind": True}),
        ("vqa", {"texts_drawn": 2, "alpha": 0.0, "shortlist": 2, "people": 10, "copies": "shared"}),
    ],
)
def test_the_tasks_are_learners(some, kind, settings):
    check_learner(learner(kind, **settings), some, SPEC)


@pytest.mark.parametrize("kind", KINDS)
def test_data_without_what_a_task_needs_are_refused(kind):
    with pytest.raises(ExperimentError, match=r"the data lack the field .*data\.fields"):
        learner(kind).build(Spec((3, 32, 32), 2, (IMAGE,)), generator(0, "model"))
    with pytest.raises(DataError, match="give every silo that field"):
        learner(kind).train_view(Examples({IMAGE: torch.rand(2, 3, 32, 32)}), generator(0, "view"))


def test_only_networks_travel(some):
    for kind in ("retrieval", "ve", "nlvr2", "vqa"):
        held = Holdings.of(learner(kind), built(learner(kind)))
        heads = {name.split(".")[0] for name in held.shared}
        assert not [head for head in heads if head.endswith("_m") or "queue" in head]
        assert {"visual_encoder_m", "text_encoder_m"} <= {name.split(".")[0] for name in held.private}
    held = Holdings.of(learner("retrieval"), built(learner("retrieval")))
    assert {"image_queue", "text_queue", "idx_queue", "queue_ptr"} <= set(held.private)


@pytest.mark.parametrize("kind", ["retrieval", "ve", "nlvr2", "vqa"])
def test_copies_follow_each_step(some, kind):
    own = learner(kind, momentum=0.5, dropout=0.0)
    model = built(own)
    batch = drawn_batch(own, model, some)
    with torch.no_grad():
        weight, copy = model.visual_encoder.norm.weight, model.visual_encoder_m.norm.weight
        weight += 1.0
        own.follow(model, batch, 0.0)
    assert torch.allclose(copy, weight - 0.5)


@pytest.mark.parametrize("kind", ["ve", "nlvr2", "vqa"])
def test_without_a_weight_of_theirs_copies_are_not_asked(some, kind):
    assert "taught" in drawn_batch(learner(kind), built(learner(kind)), some)
    own = learner(kind, alpha=0.0)
    assert "taught" not in drawn_batch(own, built(own), some)


# ---- which texts are drawn ------------------------------------------------------------------------------------------


def test_each_text_is_drawn_as_often_and_a_missing_one_never():
    there = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    drawn = torch.stack([drawn_places(there, generator(seed, "places")) for seed in range(900)])
    assert [(drawn[:, 0] == place).sum() / 900 for place in range(3)] == pytest.approx([0.5, 0, 0.5], abs=0.06)
    assert (drawn[:, 1] == 0).all()
    assert [(drawn[:, 2] == place).sum() / 900 for place in range(3)] == pytest.approx([1 / 3] * 3, abs=0.06)


def test_a_sentence_is_drawn_with_its_verdict(some):
    own = learner("ve", texts_drawn=3)
    rows = zip(decode_texts(some.fields[HYPOTHESIS]), some.fields[VERDICT].tolist(), strict=True)
    said = {(i, text): verdict for i, row in enumerate(rows) for text, verdict in zip(*row, strict=False)}
    view = drawn_batch(own, built(own), some)
    assert len(view) == 18
    for i in range(18):
        text = own.pieces.text(view.fields[IDS][i])
        assert said[i // 3, text] == view.fields[VERDICT][i]
    assert torch.equal(view.fields[IMAGE][0], view.fields[IMAGE][2])


def test_pairs_keep_their_left_and_right_picture(some):
    own = learner("nlvr2", flip=0.0)
    view = own.train_view(some, generator(0, "view"))
    assert torch.equal(view.fields[IMAGE], own.views(some.image))
    assert torch.equal(view.fields[SECOND_IMAGE], own.views(some.fields[SECOND_IMAGE]))


# ---- judging --------------------------------------------------------------------------------------------------------


def with_verdicts(examples, verdicts):
    return Examples({**examples.fields, VERDICT: torch.tensor(verdicts)})


def test_the_loss_of_sentences_is_that_of_the_network_and_its_copy(some):
    own = learner("ve", dropout=0.0, alpha=0.4, ramp=1.0)
    model = built(own)
    with torch.no_grad():
        model.cls_head_m[2].weight += 0.3
    batch = drawn_batch(own, model, some)
    ids, mask = batch.fields[IDS], batch.fields[WORDS]
    logits, taught = model([batch.image], ids, mask), model.teach([batch.image], ids, mask)
    expected = losses.class_loss(logits, batch.fields[VERDICT], taught, 0.2)
    assert torch.allclose(loss_of(own, model, batch, 0.5).total, expected)
    assert not torch.allclose(loss_of(own, model, batch, 0.0).total, expected)


def test_pictures_without_sentences_teach_nothing_and_count_nowhere(some):
    own = learner("ve", dropout=0.0)
    model = built(own).eval()
    texts = decode_texts(some.fields[HYPOTHESIS])
    none = Examples({IMAGE: some.image, HYPOTHESIS: encode_texts([[""] * 3] * 6), VERDICT: torch.full((6, 3), -1)})
    assert loss_of(own, model, drawn_batch(own, model, none)).total == 0
    assert evaluate(own, model, none) == {"loss": 0.0, "constant_accuracy": 0.0}
    half = Examples({IMAGE: some.image, HYPOTHESIS: encode_texts([*texts[:3], *[[""] * 3] * 3]), VERDICT: some.fields[VERDICT].clone()})
    half.fields[VERDICT][3:] = -1
    assert evaluate(own, model, half)["accuracy"] == pytest.approx(evaluate(own, model, some[:3])["accuracy"])
    batch, some_batch = drawn_batch(own, model, half), drawn_batch(own, model, some)
    known = Examples({name: values[:3] for name, values in some_batch.fields.items()})
    assert torch.allclose(loss_of(own, model, batch).total, loss_of(own, model, known).total, atol=1e-5)


@torch.no_grad()
def test_accuracy_is_that_of_all_sentences_one_by_one(some):
    own = learner("nlvr2", blind=True)
    model = built(own).eval()
    right, blind, costs = [], [], []
    for i, texts in enumerate(decode_texts(some.fields[STATEMENT])):
        mine = []
        for text, truth in zip(texts, some.fields[TRUTH][i].tolist(), strict=False):
            ids, mask = own.tokens([text])
            for at, hits in ((i, right), ((i + 3) % 6, blind)):
                pictures = [own.views(some.fields[name][at : at + 1]) for name in (IMAGE, SECOND_IMAGE)]
                logits = model(pictures, ids, mask)[0]
                hits.append(float(logits.argmax() == truth))
                if hits is right:
                    mine.append(-float(logits.log_softmax(0)[truth]))
        costs.append(np.mean(mine))
    measured = evaluate(own, model, some)
    assert measured["accuracy"] == pytest.approx(np.mean(right))
    assert measured["blind_accuracy"] == pytest.approx(np.mean(blind))
    assert measured["loss"] == pytest.approx(np.mean(costs), rel=1e-4)
    truths = some.fields[TRUTH][some.fields[TRUTH] >= 0].float()
    assert measured["constant_accuracy"] == pytest.approx(max(float(truths.mean()), 1 - float(truths.mean())))


# ---- text assignment ------------------------------------------------------------------------------------------------


def test_small_batches_are_assigned_nothing(some):
    own = learner("assignment")
    model = built(own)
    for number in (1, 2):
        assert loss_of(own, model, drawn_batch(own, model, some, slice(0, number))).total == 0
    assert loss_of(own, model, drawn_batch(own, model, some, slice(0, 3))).total > 0
    assert "assignment_accuracy" not in evaluate(own, model, some[:2])


def test_an_assignment_is_measured_for_first_second_and_neither(some):
    own = learner("assignment")
    model = built(own).eval()
    tokens, ids, mask = model.visual_encoder(own.views(some.image)), *own._first_tokens(some)
    right = 0
    for i in range(6):
        for truth, pair in enumerate([(i, (i + 2) % 6), ((i + 2) % 6, i), ((i + 2) % 6, (i + 4) % 6)]):
            hidden = model.text_encoder(ids[i : i + 1], mask[i : i + 1], [tokens[j : j + 1] for j in pair])
            right += int(model.ta_head(hidden[0, 0]).argmax() == truth)
    assert evaluate(own, model, some)["assignment_accuracy"] == pytest.approx(right / 18)


# ---- retrieval ------------------------------------------------------------------------------------------------------


def test_texts_of_one_picture_belong_to_it_in_the_batch_and_in_the_queue(some):
    own = learner("retrieval", texts_drawn=2, dropout=0.0)
    model = built(own)
    first = drawn_batch(own, model, some, slice(0, 3))
    assert first.fields[NUMBER].tolist() == [0, 0, 1, 1, 2, 2]
    own.follow(model, first, 0.0)
    batch = drawn_batch(own, model, some, torch.tensor([4, 1]))
    assert batch.fields[NUMBER].tolist() == [4, 4, 1, 1]
    positive = batch.fields[POSITIVE]
    assert positive[:, :4].tolist() == [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2
    assert positive[:, 4:].nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]
    seen = []

    class Asked:
        def __call__(self, images, ids, mask, choose, taught):
            seen.extend(choose(torch.zeros(4, 4), torch.zeros(4, 4)))
            return model(images, ids, mask, choose, taught)

    loss = loss_of(own, Asked(), batch)
    for negatives in seen:
        assert all((row < 2) != (other < 2) for row, other in zip(*(values.tolist() for values in negatives), strict=True))
    truth = losses.shared_out(positive)
    assert truth[2].tolist() == pytest.approx([0, 0, 0.25, 0.25, 0, 0, 0.25, 0.25, 0, 0, 0, 0])
    assert loss.total.isfinite()


def test_a_batch_of_one_picture_has_no_pair_that_does_not_match(some):
    own = learner("retrieval", texts_drawn=3)
    model = built(own)
    loss = loss_of(own, model, drawn_batch(own, model, some, slice(0, 1)))
    assert loss.parts["itm"] == 0
    assert loss.total.isfinite()


def test_boxes_that_texts_point_at_are_counted_beside_the_central_ones(some, monkeypatch):
    own = learner("retrieval")
    model = built(own).eval()
    measured = evaluate(own, model, some)
    assert 0 <= measured["grounding_accuracy"] <= 1
    assert 0 < measured["guessed_accuracy"] < 0.6

    def pointing(self, model, images, texts):
        """A map that is 1 inside the box that is asked for."""
        for text in texts:
            i, j = next(
                (i, j)
                for i, row in enumerate(decode_texts(some.fields[EXPRESSION]))
                for j, each in enumerate(row)
                if (i, each) in asked and each == text
            )
            asked.remove((i, text))
            left, top, right, bottom = some.fields[BOX][i, j].long().tolist()
            pixels = torch.full((32, 32), -0.01)
            pixels[top:bottom, left:right] = 1.0
            maps.append(pixels)
        done, maps[:] = list(maps), []
        return torch.stack(done)

    asked, maps = [(i, each) for i, row in enumerate(decode_texts(some.fields[EXPRESSION])) for each in row], []
    monkeypatch.setattr(ALBEFRetrieval, "maps", pointing)
    assert evaluate(own, model, some)["grounding_accuracy"] == 1.0
    assert (
        evaluate(own, model, Examples({name: v for name, v in some.fields.items() if name != BOX}))
        .keys()
        .isdisjoint(["grounding_accuracy"])
    )


# ---- questions ------------------------------------------------------------------------------------------------------


def test_votes_are_averaged_over_who_is_left_out():
    for given in range(11):
        each = [min((given - (left < given)) / 3, 1) for left in range(10)]
        assert float(vote_accuracy(torch.tensor(given / 10), 10)) == pytest.approx(np.mean(each), abs=1e-6)
    assert vote_accuracy(torch.tensor([0.0, 0.5, 1.0]), 1).tolist() == [0.0, 0.5, 1.0]


def asked(texts, answers, weights):
    """Pictures of noise with questions."""
    images = torch.rand(len(texts), 3, 32, 32, generator=generator(0, "images"))
    some = encode_texts([answer for row in answers for answer in row])
    shape = (len(texts), len(texts[0]), some.shape[1], some.shape[2])
    fields = {IMAGE: images, QUESTION: encode_texts(texts), ANSWER: some.reshape(shape), ANSWER_WEIGHT: torch.tensor(weights)}
    return Examples(fields)


@pytest.fixture
def few():
    """Two pictures with two questions each, of which one has two answers and one is missing."""
    texts = [["what color is the circle?", "is there a red star?"], ["how many objects are there?", ""]]
    answers = [[["red", "pink"], ["no", ""]], [["two", ""], ["", ""]]]
    return asked(texts, answers, [[[0.6, 0.4], [1.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])


def test_all_answers_of_a_question_are_told_and_end(few):
    own = learner("vqa")
    view = drawn_batch(own, built(own), few)
    told = [[own.pieces.text(answer) for answer in row] for row in view.fields[ANSWER_IDS]]
    assert told[1] == ["two", ""]
    assert told[0] in (["red", "pink"], ["no", ""])
    assert all(own.pieces.end in row for row in view.fields[ANSWER_IDS][:, 0].tolist())


@torch.no_grad()
def test_the_loss_of_answers_is_their_weighted_sum_divided_by_the_pictures(few):
    own = learner("vqa", dropout=0.0, alpha=0.0)
    model = built(own)
    for seed in range(4):
        batch = drawn_batch(own, model, few, seed=seed)
        expected = 0.0
        for i in range(2):
            for answer, there, weight in zip(
                batch.fields[ANSWER_IDS][i], batch.fields["answer_words"][i], batch.fields[ANSWER_WEIGHT][i], strict=True
            ):
                question = batch.fields[IDS][i : i + 1], batch.fields[WORDS][i : i + 1]
                states = model.asked(batch.image[i : i + 1], *question)
                ids = answer[there][None]
                hidden = model.text_decoder.bert.told(ids[:, :-1], torch.ones_like(ids[:, :-1]).bool(), [states], question[1])
                expected += float(weight * telling_losses(model.text_decoder.words(hidden), ids[:, 1:], None, 0.0)) / 2
        assert float(loss_of(own, model, batch).total) == pytest.approx(expected, rel=1e-4)


def test_questions_without_an_answer_teach_nothing(few):
    own = learner("vqa")
    model = built(own)
    silent = Examples({**few.fields, ANSWER_WEIGHT: torch.zeros(2, 2, 2)})
    loss = loss_of(own, model, drawn_batch(own, model, silent)).total
    assert loss == 0
    loss.backward()
    assert all(param.grad is None or not param.grad.any() for param in model.parameters())


def test_the_best_of_the_listed_answers_is_judged_by_who_gave_it(few, tmp_path, monkeypatch):
    (tmp_path / "answers.json").write_text(json.dumps(["two", "red", "pink", "no"]))
    own = learner("vqa", answers=str(tmp_path / "answers.json"))
    model = built(own).eval()
    for choice, (plain, official) in enumerate([(1 / 3, 1 / 3), (0.6 / 3, 1 / 3), (0.4 / 3, 1 / 3), (1 / 3, 1 / 3)]):
        monkeypatch.setattr(
            type(model),
            "ranked",
            lambda self, states, *rest, choice=choice: type("R", (), {"answers": torch.full((len(states), 1), choice)}),
        )
        assert evaluate(own, model, few)["accuracy"] == pytest.approx(plain)
        assert evaluate(learner("vqa", answers=own.answers, people=10), model, few)["accuracy"] == pytest.approx(official)
    assert evaluate(own, model, few)["constant_accuracy"] == pytest.approx(1 / 3)


def test_a_list_of_answers_that_is_none_is_refused(tmp_path):
    with pytest.raises(ExperimentError, match=r"absent\.json' cannot be read"):
        built(learner("vqa", answers=str(tmp_path / "absent.json")))
    for content, remedy in (
        ('{"yes": 1}', "no list of texts"),
        ('["yes", 3]', "no list of texts"),
        ('["yes", "yes"]', "'yes' twice"),
        ("[", "cannot be read"),
    ):
        (tmp_path / "answers.json").write_text(content)
        with pytest.raises(ExperimentError, match=remedy):
            built(learner("vqa", answers=str(tmp_path / "answers.json")))


def test_answers_of_scenes_are_among_their_choices(drawn):
    said = {text for row in decode_texts(drawn.fields[ANSWER].flatten(0, 1)) for text in row}
    assert said <= set(learner("vqa").choices)
