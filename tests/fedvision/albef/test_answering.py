import math

import pytest
import torch

from fedvision.albef.answering import Answering, Answers, answering_loss, following, telling_losses
from fedvision.seeds import generator


@pytest.fixture
def network(vision, text):
    """A network whose weights are large enough for its predictions to differ."""
    model = Answering(vision, text, generator(0, "model"), deviation=0.3).eval()
    rng = generator(1, "model")
    with torch.no_grad():
        for param in [*model.visual_encoder_m.parameters(), *model.text_encoder_m.parameters(), *model.text_decoder_m.parameters()]:
            param.add_(torch.randn(param.shape, generator=rng), alpha=0.1)
    return model


@pytest.fixture
def answers():
    """Five answers, of which the third question gets none: [CLS] a [SEP] and longer ones."""
    ids = torch.tensor([[1, 7, 2, 0], [1, 9, 8, 2], [1, 7, 2, 0], [1, 30, 31, 2], [1, 7, 8, 2]])
    return Answers(ids, ids != 0, torch.tensor([0, 0, 1, 3, 3]))


def alone(network, suffix, image, question, answer):
    """Logits of one answer without padding, token by token, each from only what was told before."""
    see, read, decoder = (getattr(network, name + suffix) for name in network.followed)
    everything = torch.ones(1, len(question), dtype=torch.bool)
    states = read(question[None], everything, [see(image[None])])
    told = [decoder.bert.told(answer[None, :n], torch.ones(1, n, dtype=torch.bool), [states]) for n in range(1, len(answer))]
    return torch.stack([decoder.words(hidden[0, -1]) for hidden in told])


def naive_loss(network, inputs, answers, weights, alpha):
    """The loss, answer by answer and token by token, as the specification has it."""
    images, ids, mask = inputs
    total = 0.0
    for answer, there, question, weight in zip(answers.ids, answers.mask, answers.question, weights, strict=True):
        given = images[question], ids[question][mask[question]], answer[there]
        own, taught = alone(network, "", *given), alone(network, "_m", *given)
        for z, teacher, token in zip(own, taught, answer[there][1:], strict=True):
            hard, soft = -z.log_softmax(0)[token], -(teacher.softmax(0) * z.log_softmax(0)).sum()
            total = total + weight * ((1 - alpha) * hard + alpha * soft)
    return total / len(images)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_the_loss_is_a_weighted_sum_over_tokens_divided_by_the_number_of_questions(network, inputs, answers, alpha):
    weights = torch.tensor([0.7, 0.3, 1.0, 0.5, 0.5])
    logits, taught = network(*inputs, answers, network.teach(*inputs, answers))
    losses = telling_losses(logits, following(answers.ids, answers.mask), taught, alpha)
    ours, naive = answering_loss(losses, weights, 4), naive_loss(network, inputs, answers, weights, alpha)
    assert torch.allclose(ours, naive, atol=1e-4, rtol=1e-5)
    ours.backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in network.parameters() if param.requires_grad)


def test_without_a_teacher_labels_alone_count(network, inputs, answers):
    assert network(*inputs, answers).taught is None
    logits, targets = network(*inputs, answers).own, following(answers.ids, answers.mask)
    assert torch.equal(telling_losses(logits, targets, None, 0.4), telling_losses(logits, targets, logits, 0.0))


def test_a_loss_that_can_be_computed_by_hand():
    logits = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0]], [[0.0, math.log(3)], [5.0, -5.0]]])
    losses = telling_losses(logits, torch.tensor([[0, 1], [1, -100]]), None, 0.0)
    assert losses.tolist() == pytest.approx([math.log(2) + math.log(4), math.log(4 / 3)])
    assert float(answering_loss(losses, torch.tensor([1.0, 0.5]), 4)) == pytest.approx((math.log(8) + math.log(4 / 3) / 2) / 4)


# ---- ranking --------------------------------------------------------------------------------------------------------


def naive_ranking(network, image, question, candidates, shortlist):
    """The answers of one question and their probabilities, as the specification has it."""
    first = alone(network, "", image, question, candidates[0][:2])[0].softmax(0)
    chosen = sorted(range(len(candidates)), key=lambda a: -float(first[candidates[a][1]]))[:shortlist]
    scores = {}
    for a in chosen:
        logits = alone(network, "", image, question, candidates[a])
        whole = sum(float(z.log_softmax(0)[token]) for z, token in zip(logits, candidates[a][1:], strict=True))
        scores[a] = math.log(float(first[candidates[a][1]])) + whole
    best = sorted(scores, key=lambda a: -scores[a])
    weights = torch.tensor([scores[a] for a in best]).softmax(0)
    return best, weights.tolist()


@pytest.mark.parametrize("shortlist", [3, 6, 50])
def test_answers_are_ranked_as_one_by_one(network, inputs, shortlist, monkeypatch):
    monkeypatch.setattr("fedvision.albef.answering.AT_ONCE", 5)
    images, ids, mask = inputs
    ends = [[7], [9, 8], [30, 31, 40], [5], [60], [77, 7]]
    candidates = [torch.tensor([1, *words, 2]) for words in ends]
    padded = torch.zeros(6, 5, dtype=torch.int64)
    for row, candidate in zip(padded, candidates, strict=True):
        row[: len(candidate)] = candidate
    with torch.no_grad():
        ranked = network.ranked(network.asked(*inputs), mask, padded, padded != 0, shortlist)
        for q in range(4):
            best, probabilities = naive_ranking(network, images[q], ids[q][mask[q]], candidates, shortlist)
            assert ranked.answers[q].tolist() == best
            assert ranked.probabilities[q].tolist() == pytest.approx(probabilities, abs=1e-5)


def test_the_first_token_is_counted_twice(network, inputs):
    with torch.no_grad():
        states, mask = network.asked(*inputs), inputs[2]
        ids = torch.tensor([[1, 7, 2], [1, 9, 2]])
        logits = network(*inputs, Answers(ids.repeat(4, 1), torch.ones(8, 3, dtype=torch.bool), torch.arange(4).repeat_interleave(2))).own
        p = logits.log_softmax(2)
        scores = torch.stack([2 * p[:, 0].gather(1, ids.repeat(4, 1)[:, 1:2])[:, 0] + p[:, 1, 2]]).view(4, 2)
        ranked = network.ranked(states, mask, ids, ids != 0, 2)
    assert torch.allclose(ranked.probabilities, scores.softmax(1).sort(1, descending=True).values, atol=1e-5)
