"""Tasks about scenes: every answer, verdict, truth and box is read again from the table of objects, by other means."""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fedvision.data.examples import Examples
from fedvision.data.scenes import COLORS, COLUMNS, FIELDS, MENTIONED, SHAPES, TEXTURES, scenes
from fedvision.data.scenes.captions import DIALECTS, size_word
from fedvision.data.scenes.hypotheses import SECRETS
from fedvision.data.scenes.questions import ANSWERS
from fedvision.data.scenes.shown import others
from fedvision.data.texts import decode_texts

SIZE = 32
TASKS = FIELDS[FIELDS.index("question") :]
SETTINGS = {
    "plain": {"objects": (1, 2)},
    "crowded": {"objects": (2, 4), "classes": 20},
    "two classes": {"objects": (1, 4), "classes": 2},
    "dialects": {"objects": (1, 3), "domains": 4, "shift": ("palette", "wording"), "shift_strength": 1.0},
}
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]
BACK = {word: plain for dialect in DIALECTS for plain, word in dialect.items()}
IN_DIALECT = re.compile(r"\b(" + "|".join(sorted(map(re.escape, BACK), key=len, reverse=True)) + r")\b")


def drawn(seed=0, examples=250, fields=("image", "objects", *TASKS), **settings):
    return scenes(examples=examples, test_examples=40, size=SIZE, fields=fields, rng=np.random.default_rng(seed), **settings)


@pytest.fixture(scope="module", params=SETTINGS)
def train(request):
    return drawn(**SETTINGS[request.param]).train


def plain(text):
    """A text with every word of a dialect as the plain one."""
    return IN_DIALECT.sub(lambda found: BACK[found[0]], text)


@dataclass(frozen=True)
class Object:
    """What the table says of an object."""

    size: str
    color: str
    texture: str
    shape: str
    x: float
    y: float
    depth: float
    box: tuple

    @property
    def words(self):
        return {self.size, self.color, self.texture, self.shape, "object"}


def objects(table):
    """The objects of one picture that may be mentioned."""
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in table.tolist()]
    return [
        Object(
            size_word(row["radius"] / SIZE),
            list(COLORS)[int(row["color"])],
            TEXTURES[int(row["texture"])],
            list(SHAPES)[int(row["shape"])],
            row["x"] / SIZE,
            row["y"] / SIZE,
            row["depth"],
            (row["left"], row["top"], row["right"], row["bottom"]),
        )
        for row in rows
        if row["visible"] >= MENTIONED
    ]


def meant(words, seen):
    """The objects that all of some words fit."""
    return [thing for thing in seen if set(words.split()) <= thing.words]


def the(words, seen):
    """The only object that some words fit."""
    [thing] = meant(words, seen)
    return thing


def told(train, *fields):
    """(objects, text, target, ...) for every text of every picture; the fields of which the first is a text."""
    for i in range(len(train)):
        seen = objects(train.fields["objects"][i])
        texts = [bytes(row).rstrip(b"\0").decode() for row in train.fields[fields[0]][i].numpy()]
        for number, text in enumerate(texts):
            yield seen, plain(text), *(train.fields[field][i, number] for field in fields[1:])


# ---- questions ------------------------------------------------------------------------------------------------------


def answered(question, seen):
    """The answer by reading."""
    if found := re.fullmatch(r"what (color|shape|size) is the (.+)\?", question):
        return getattr(the(found[2], seen), found[1])
    if found := re.fullmatch(r"what texture does the (.+) have\?", question):
        return the(found[1], seen).texture
    if question == "how many objects are there?":
        return NUMBERS[len(seen)]
    if found := re.fullmatch(r"how many (\w+) objects are there\?", question):
        return NUMBERS[len(meant(found[1], seen))]
    if found := re.fullmatch(r"is there an? (\w+ \w+)\?", question):
        return "yes" if meant(found[1], seen) else "no"
    if found := re.fullmatch(r"is the (.+) to the left or to the right of the (.+)\?", question):
        return "left" if the(found[1], seen).x < the(found[2], seen).x - 0.1 else "right"
    if found := re.fullmatch(r"is the (.+) nearer than the (.+)\?", question):
        return "yes" if the(found[1], seen).depth < the(found[2], seen).depth else "no"
    assert question == "which object is nearest?"
    return min(seen, key=lambda thing: thing.depth).shape


def test_every_answer_is_that_of_the_table(train):
    kinds = Counter()
    for seen, question, answer, weight in told(train, "question", "answer", "answer_weight"):
        said = plain(bytes(answer[0].numpy()).rstrip(b"\0").decode())
        assert weight.tolist() == [float(question != "")]
        if question:
            assert said == answered(question, seen), (question, seen)
            kinds[" ".join(question.split()[:2])] += 1
        else:
            assert said == ""
    assert kinds["what color"] > 20 and kinds["which object"] > 20 and kinds["is there"] > 20 and kinds["is the"] > 20


def test_left_and_right_are_told_only_where_they_are_clear(train):
    for seen, question, _ in told(train, "question", "answer"):
        if found := re.fullmatch(r"is the (.+) to the left or to the right of the (.+)\?", question):
            assert abs(the(found[1], seen).x - the(found[2], seen).x) > 0.119


def test_no_answer_is_the_rule(train):
    answers = Counter(texts[0] for some in train.fields["answer"] for texts in decode_texts(some) if texts)
    assert max(answers.values()) / sum(answers.values()) < 0.2
    assert set(answers) <= set(ANSWERS)
    assert 0.6 < answers["yes"] / answers["no"] < 1.6
    assert answers.keys() >= {"large", "one", "two"} or answers.keys() >= {"big", "huge"}


def test_no_picture_is_asked_the_same_twice_or_too_little(train):
    for texts in decode_texts(train.fields["question"]):
        assert len(set(texts)) == len(texts) == 4


def test_where_there_is_too_little_to_ask_questions_are_empty():
    train = drawn(objects=(1, 1), questions=40, examples=20, fields=("image", "question", "answer_weight")).train
    numbers = [len(texts) for texts in decode_texts(train.fields["question"])]
    assert all(5 < number < 40 for number in numbers)
    assert train.fields["answer_weight"].sum((1, 2)).tolist() == numbers


# ---- hypotheses -----------------------------------------------------------------------------------------------------


def holds(thing, quality):
    """Whether a quality holds, None: nobody can tell."""
    return None if quality in SECRETS else quality in thing.words


def judged(sentence, seen):
    """2: entailed, 1: open, 0: contradicted."""
    if found := re.fullmatch(r"the (.+) is to the (left|right) of the (.+)", sentence):
        one, other = the(found[1], seen), the(found[3], seen)
        return 2 * ((one.x < other.x) == (found[2] == "left"))
    found = re.fullmatch(r"the (.+) is (\w+)(?: or (\w+))?", sentence)
    things = meant(found[1], seen)
    if not things:
        return 0
    [thing] = things
    values = [holds(thing, quality) for quality in (found[2], found[3]) if quality]
    return 2 if True in values else 1 if None in values else 0


def test_every_verdict_is_that_of_the_table(train):
    for seen, sentence, verdict in told(train, "hypothesis", "verdict"):
        assert int(verdict) == (judged(sentence, seen) if sentence else -1), (sentence, seen)


def test_verdicts_are_balanced_in_every_picture(train):
    assert train.fields["verdict"].dtype == torch.int64
    whole = (train.fields["verdict"] >= 0).all(1)
    assert whole.float().mean() > 0.98
    assert (train.fields["verdict"][whole].sort(dim=1).values == torch.arange(3)).all()


def test_a_sentence_does_not_give_its_verdict_away():
    train = drawn(examples=1500, fields=("image", "objects", "hypothesis", "verdict"), objects=(1, 3)).train
    by_form, by_secret = defaultdict(Counter), defaultdict(Counter)
    for _, sentence, verdict in told(train, "hypothesis", "verdict"):
        secrets = [word for word in sentence.split() if word in SECRETS]
        form = "either" if " or " in sentence else "secret" if secrets else "placed" if " of the " in sentence else "seen"
        by_form[form][int(verdict)] += 1
        for secret in secrets:
            by_secret[secret][int(verdict)] += 1
    shares = {form: {verdict: times / counts.total() for verdict, times in counts.items()} for form, counts in by_form.items()}
    assert shares.keys() == {"either", "secret", "placed", "seen"}
    assert set(shares["either"]) == {0, 1, 2} and min(shares["either"].values()) > 0.15 and max(shares["either"].values()) < 0.5
    for form, verdicts in (("secret", {0, 1}), ("seen", {0, 2}), ("placed", {0, 2})):
        assert set(shares[form]) == verdicts and max(shares[form].values()) < 0.6
    assert by_secret.keys() == set(SECRETS)
    assert all(max(counts.values()) / counts.total() < 0.55 for counts in by_secret.values())


# ---- pairs ----------------------------------------------------------------------------------------------------------


def is_true(statement, left, right):
    """Whether a statement about two pictures holds."""
    if found := re.fullmatch(r"both pictures show (?:something|an?) (\w+)", statement):
        return bool(meant(found[1], left) and meant(found[1], right))
    if found := re.fullmatch(r"only the (left|right) picture shows an? (\w+)", statement):
        this, other = (left, right) if found[1] == "left" else (right, left)
        return bool(meant(found[2], this) and not meant(found[2], other))
    if found := re.fullmatch(r"the left picture shows an? (\w+ \w+) and the right one an? (\w+ \w+)", statement):
        return bool(meant(found[1], left) and meant(found[2], right))
    if found := re.fullmatch(r"there are (\w+) objects in the two pictures", statement):
        return len(left) + len(right) == NUMBERS.index(found[1])
    found = re.fullmatch(r"the (left|right) picture shows more objects than the (left|right) one", statement)
    return (len(left) - len(right) if found[1] == "left" else len(right) - len(left)) > 0


def test_every_truth_is_that_of_both_tables(train):
    kinds = Counter()
    numbers = iter(train.fields["second_objects"].repeat_interleave(2, dim=0))
    for (left, statement, truth), table in zip(told(train, "statement", "truth"), numbers, strict=True):
        assert int(truth) == (is_true(statement, left, objects(table)) if statement else -1), (statement, left, objects(table))
        kinds[" ".join(statement.split()[:2])] += 1
    assert {"both pictures", "only the", "there are", "the left"} <= set(kinds)


def test_truths_are_balanced_in_every_pair_and_of_every_kind():
    train = drawn(examples=1500, fields=("image", "objects", "statement", "truth"), objects=(1, 3)).train
    counts = defaultdict(Counter)
    for _, statement, truth in told(train, "statement", "truth"):
        words = statement.split()
        counts[" ".join([*words[:2], *(word for word in ("something", "more") if word in words)])][int(truth)] += 1
    assert len(counts) >= 6
    assert all(0.4 < some[1] / some.total() < 0.6 for form, some in counts.items() if form)
    truth = train.fields["truth"]
    assert (truth < 0).float().mean() < 0.01
    assert (truth[(truth >= 0).all(1)].sum(1) == 1).all()


def test_second_pictures_are_others_of_the_same_domain():
    settings = {"domains": 5, "shift": ("texture",), "shift_strength": 1.0}
    train = drawn(examples=100, **settings).train
    assert train.fields["second_image"].shape == train.image.shape and train.fields["second_image"].dtype == torch.uint8
    assert not (train.fields["second_image"] == train.image).flatten(1).all(1).any()
    texture = COLUMNS.index("texture")
    first, second = (train.fields[field][:, 0, texture] for field in ("objects", "second_objects"))
    assert torch.equal(first, second) and len(first.unique()) == 5  # each domain has one texture
    label = COLUMNS.index("class")
    classes = [train.fields[field][:, 0, label] for field in ("objects", "second_objects")]
    assert 0.02 < (classes[0] == classes[1]).float().mean() < 0.25  # drawn independently of ten


def test_images_of_pairs_are_decoded_together():
    train = drawn(examples=4, fields=("image", "second_image")).train
    decoded = train.decoded()
    assert torch.equal(decoded.fields["second_image"], train.fields["second_image"].float() / 255)
    assert decoded.decoded() is decoded
    mixed = Examples({"image": decoded.image, "second_image": train.fields["second_image"]})
    assert torch.equal(mixed.decoded().fields["second_image"], decoded.fields["second_image"])


# ---- expressions ----------------------------------------------------------------------------------------------------


def referred(expression, seen):
    """The objects that an expression fits."""
    if expression == "the nearest object":
        return [min(seen, key=lambda thing: thing.depth)]
    words, _, place = expression.removeprefix("the ").partition(" on the " if " on the " in expression else " at the ")
    sides = {
        "": lambda thing: True,
        "left": lambda thing: thing.x < 0.4,
        "right": lambda thing: thing.x > 0.6,
        "top": lambda thing: thing.y < 0.4,
        "bottom": lambda thing: thing.y > 0.6,
    }
    return [thing for thing in meant(words, seen) if sides[place](thing)]


def test_every_expression_fits_one_object_whose_box_is_given(train):
    places = 0
    for seen, expression, box in told(train, "expression", "box"):
        if not expression:
            assert not box.any()
            continue
        [thing] = referred(expression, seen)
        assert thing.box == tuple(box.tolist()), (expression, seen)
        places += " on the " in expression or " at the " in expression
    assert places > 10


def test_objects_take_turns_in_being_meant():
    train = drawn(objects=(2, 4), expressions=4, fields=("image", "objects", "expression", "box"), examples=100).train
    for table, boxes in zip(train.fields["objects"], train.fields["box"], strict=True):
        times = Counter(tuple(box) for box in boxes.tolist())
        assert len(times) == len(objects(table)) and max(times.values()) - min(times.values()) <= 1


def pixels(box):
    left, top, right, bottom = map(int, box)
    return {(x, y) for x in range(left, right) for y in range(top, bottom)}


def test_proposals_are_the_boxes_of_all_objects_and_of_none(train):
    assert train.fields["proposals"].shape[1:] == (8, 4)
    places = Counter()
    for table, proposals in zip(train.fields["objects"][:80], train.fields["proposals"].tolist()[:80], strict=True):
        own = [thing.box for thing in objects(table)]
        for box in own:
            places[proposals.index(list(box))] += 1
        for box in proposals:
            assert box == [0] * 4 or (0 <= box[0] < box[2] <= SIZE and 0 <= box[1] < box[3] <= SIZE)
            if tuple(box) not in own:
                assert all(len(pixels(box) & pixels(other)) < 0.5 * len(pixels(box) | pixels(other)) for other in own)
    assert len(places) == 8  # in no order
    assert (train.fields["proposals"].sum(-1) == 0).float().mean() < 0.02


# ---- all of them ----------------------------------------------------------------------------------------------------


def test_tasks_are_drawn_again_alike_and_not_from_each_other(monkeypatch):
    monkeypatch.setenv("FEDVISION_CACHE", "off")
    settings = {"examples": 30, "objects": (1, 3), "noise": 0.1, "domains": 2}
    whole = drawn(**settings, fields=FIELDS)
    again, other = drawn(**settings, fields=FIELDS), drawn(1, **settings, fields=FIELDS)
    for part in ("train", "test"):
        one = getattr(whole, part)
        assert all(torch.equal(values, getattr(again, part).fields[name]) for name, values in one.fields.items())
        for field in TASKS:
            alone = getattr(drawn(**settings, fields=("image", field)), part)
            assert list(alone.fields) == ["image", field, "environment"]
            assert torch.equal(alone.fields[field], one.fields[field]) and torch.equal(alone.image, one.image)
            assert field == "answer_weight" or not torch.equal(one.fields[field], getattr(other, part).fields[field])


def test_the_numbers_of_texts_are_settings():
    pool = drawn(examples=12, questions=2, hypotheses=5, statements=3, expressions=1)
    shapes = {field: pool.test.fields[field].shape[1] for field in TASKS if field not in ("second_image", "second_objects", "proposals")}
    assert list(shapes.values()) == [2, 2, 2, 5, 5, 3, 3, 1, 1]


def test_domains_ask_and_answer_in_their_dialect():
    pool = drawn(examples=400, domains=4, shift=("wording",), shift_strength=1.0)
    said = defaultdict(set)
    for field in ("question", "answer", "hypothesis", "statement", "expression"):
        texts = decode_texts(pool.train.fields[field].flatten(1, -2))
        for domain, some in zip(pool.train.fields["environment"].tolist(), texts, strict=True):
            said[domain, field] |= set(" ".join(some).replace("?", "").split())
    for field in ("question", "answer", "hypothesis", "statement", "expression"):
        for marks in ({"red"}, {"crimson"}, {"pentagram"}, {"wedge"}):
            speaking = {domain for domain in range(4) if marks & said[domain, field]}
            assert 0 < len(speaking) < 4, (field, marks)


def test_false_words_are_lent_by_others_of_the_same_domain():
    environment = np.array([0, 1, 0, 1, 0, 0, 2])
    partners = others(environment, np.random.default_rng(0))
    assert (environment[partners] == environment[:, None]).all()
    assert (partners[environment == 0] != np.flatnonzero(environment == 0)[:, None]).all()
    assert all(len(set(row)) == 3 for row in partners[environment == 0].tolist())
    assert partners[6].tolist() == [6, 6, 6]
