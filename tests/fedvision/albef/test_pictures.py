"""Pictures of a network of pictures and words: maps, boxes, words and ranks are what they say."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import colormaps

from fedvision.albef import gradcam
from fedvision.albef.pictures import (
    RIGHT,
    VEIL,
    Looks,
    Subject,
    boxed,
    galleries,
    masked_place,
    masked_words,
    nearest_images,
    nearest_texts,
    overlay,
    where_words_look,
    word_chances,
    words_on_images,
)
from fedvision.data.examples import IMAGE
from fedvision.data.federated import Spec
from fedvision.gallery import enlarged, painted
from fedvision.learners.albef import ALBEF
from fedvision.seeds import generator

COLOR = (255, 0, 9)
CAPTIONS = ("a large red circle", "a small blue striped star", "a large red circle", "a star", "a pink blob", "a large brown ring")


@pytest.fixture(scope="module")
def learner():
    return ALBEF(patch=8, xavier=True, deviation=0.3, queue=8)


@pytest.fixture(scope="module")
def network(learner):
    return learner.build(Spec((3, 32, 32), 2, (IMAGE, "caption")), generator(0, "model")).eval()


@pytest.fixture
def subject(learner, network):
    """Random pictures, of which two have one caption."""
    return shown(learner, network, CAPTIONS)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def shown(learner, network, captions):
    images = torch.rand(len(captions), 3, 32, 32, generator=generator(0, "images"))
    pictures = [painted(image) for image in images]
    return Subject(network, learner.pieces, pictures, learner.views(images), *learner.tokens(list(captions)))


def noise(height=24, width=16):
    return painted(torch.rand(3, height, width, generator=generator(0, "noise")))


def lines(note):
    """The lines of a note: names, percents, and whether they are marked."""
    return [(line.removesuffix(f" {RIGHT}").rsplit(" ", 1), line.endswith(RIGHT)) for line in note.split("\n")]


# ---- drawing --------------------------------------------------------------------------------------------------------


def cubic(distance, a=-0.75):
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def interpolated(heat, height, width):
    """The map at each pixel's center, by cubic convolution; beyond its edge it is as at the edge."""
    rows, columns = len(heat), len(heat[0])
    result = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            y, x = (i + 0.5) * rows / height - 0.5, (j + 0.5) * columns / width - 0.5
            for m in range(math.floor(y) - 1, math.floor(y) + 3):
                for n in range(math.floor(x) - 1, math.floor(x) + 3):
                    value = heat[min(max(m, 0), rows - 1)][min(max(n, 0), columns - 1)]
                    result[i, j] += cubic(y - m) * cubic(x - n) * value
    return result


def test_a_map_lies_over_a_gray_picture_up_to_its_largest_value():
    picture, heat = noise(), torch.tensor([[0.0, 1.0, 4.0], [2.0, -3.0, 0.5]])
    expected, large = np.zeros(picture.shape), interpolated(heat.tolist(), 24, 16)
    for i in range(24):
        for j in range(16):
            color = np.array(colormaps["inferno"](max(large[i, j], 0.0) / large.max())[:3])
            expected[i, j] = VEIL * 255 * color + (1 - VEIL) * picture[i, j].mean()
    drawn = overlay(picture, heat)
    assert drawn.dtype == np.uint8
    assert np.abs(drawn - expected).max() <= 2.5  # a step of the color map, and rounding


def test_a_map_s_scale_does_not_matter():
    heat = torch.rand(4, 4, generator=generator(0))
    assert (overlay(noise(), heat) == overlay(noise(), 1e-6 * heat)).all()


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_where_nothing_matters_a_picture_is_dark(value):
    drawn = overlay(noise(), torch.full((4, 4), value))
    assert np.abs(drawn - (1 - VEIL) * noise().mean(2, keepdims=True)).max() <= 3


@pytest.mark.parametrize(
    "box",
    [(2, 3, 9, 12), (1.4, 2.6, 7.3, 8.2), (-5, -5, 12, 40), (10, 20, 50, 50), (3, 3, 5, 4), (4, 4, 0, 9), (40, 40, 3, 3)],
    ids=["inside", "fractions", "over the corner", "over the other", "no inside", "no width", "outside"],
)
def test_a_frame_is_inside_its_box_and_the_picture_is_left_elsewhere(box):
    picture, (left, top, width, height) = noise(), box
    first = [min(max(round(edge), 0), side) for edge, side in ((top, 24), (left, 16))]
    end = [min(max(round(edge), 0), side) for edge, side in ((top + height, 24), (left + width, 16))]
    expected = picture.copy()
    for i in range(24):
        for j in range(16):
            inside = all(first[axis] <= at < end[axis] for axis, at in enumerate((i, j)))
            deep = all(first[axis] + 3 <= at < end[axis] - 3 for axis, at in enumerate((i, j)))
            if inside and not deep:
                expected[i, j] = COLOR
    before = picture.copy()
    assert (boxed(picture, box, COLOR) == expected).all()
    assert (picture == before).all()


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_an_image_of_any_channels_is_painted_in_color(channels):
    image = torch.rand(channels, 5, 4, generator=generator(0))
    drawn = painted(image)
    expected = image if channels == 3 else image.mean(0).expand(3, -1, -1)
    assert drawn.shape == (5, 4, 3)
    assert np.abs(drawn / 255 - expected.permute(1, 2, 0).numpy()).max() < 1 / 255


# ---- where words look -----------------------------------------------------------------------------------------------


def looks(words, title="0"):
    maps = torch.rand(len(words), 4, 4, generator=generator(len(words)))
    return Looks(title, noise(), "a note", words, maps, maps.sum(0) if words else torch.zeros(4, 4))


def test_a_long_text_goes_on_in_the_next_rows():
    long, short = looks(list("abcdefgh")), looks(["x"], "1")
    drawn = where_words_look([long, short], "Seen.")
    assert list(drawn.rows) == ["0", "", "1"] and len(drawn.columns) == 2 + 6
    assert [[note.split("\n")[0] for note in row] for row in drawn.notes] == [
        ["a note", "", *"abcdef"], ["", "", "g", "h", *[""] * 4], ["a note", "", "x", *[""] * 5],
    ]  # fmt: skip
    assert (drawn.pictures[0][0] == long.picture).all() and (drawn.pictures[0][1] == overlay(long.picture, long.whole)).all()
    for number, cell in enumerate([*drawn.pictures[0][2:], *drawn.pictures[1][2:4]]):
        assert (cell == overlay(long.picture, long.maps[number])).all()
    assert [cell is None for cell in drawn.pictures[1]] == [True, True, False, False, *[True] * 4]


def test_below_a_word_is_its_share_of_all_maps():
    maps = torch.stack([torch.full((2, 2), value) for value in (3.0, 1.0, 0.01, 0.0)])
    (row,) = where_words_look([Looks("0", noise(), "", list("abcd"), maps, maps.mean(0))], "").notes
    assert list(row[2:]) == ["a\n75%", "b\n25%", "c\n<1%", "d\n0%"]


def test_texts_without_words_have_the_map_of_the_whole_alone():
    drawn = where_words_look([looks([])], "")
    assert list(drawn.columns) == ["picture", "whole text"] and len(drawn.rows) == 1


def test_words_look_as_if_their_picture_were_alone(subject, network):
    drawn = words_on_images(subject, 2)
    assert list(drawn.rows) == ["0", "1"]
    for number, words in enumerate((4, 5)):
        alone = [values[number : number + 1] for values in (subject.images, subject.ids, subject.mask)]
        alone[1:] = [values[:, : 1 + words] for values in alone[1:]]  # without padding
        watched = gradcam.match(network, *alone, 2)
        maps = (watched.attention * watched.gradient.clamp(min=0)).mean(1)[0, 1:, 1:].reshape(words, 4, 4)
        picture = enlarged(subject.pictures[number])
        assert (drawn.pictures[number][0] == picture).all()
        for cell, each in zip(drawn.pictures[number][2:], maps, strict=False):
            assert np.abs(cell.astype(int) - overlay(picture, each)).max() <= 2
        logits = network.itm_head(network.text_encoder.bert(*alone[1:], [network.visual_encoder(alone[0])])[:, 0])[0]
        assert drawn.notes[number][0] == f"match {float(logits.softmax(0)[1]):.0%}"
        assert [note.split("\n")[0] for note in drawn.notes[number][2 : 2 + words]] == CAPTIONS[number].split()


# ---- masked words ---------------------------------------------------------------------------------------------------


def numbers(subject, *words):
    return {subject.pieces.words.index(word) for word in words}


def test_the_first_probe_is_masked_else_the_word_of_the_fewest_captions(subject):
    words = [subject.pieces.words.index(word) for word in ("circle", "red", "star")]
    place = lambda number, probes=(): masked_place(subject, number, probes)  # noqa: E731
    assert [place(0, words), place(1, words), place(3, words)] == [3, 5, 2]
    assert place(1) == 2  # small, before blue and striped, all of one caption
    assert place(3) == 2  # star is in two captions, a in all


def test_only_words_of_one_token_are_masked(learner, network, subject):
    assert subject.words(4) == [("a", slice(1, 2)), ("pink", slice(2, 3)), ("blob", slice(3, 7))]
    assert masked_place(subject, 4, ()) == 2
    assert [masked_place(shown(learner, network, ["", "blob"]), number, ()) for number in (0, 1)] == [None, None]


def test_a_word_of_several_tokens_looks_where_all_of_them_look(subject, network):
    alone = [values[4:5] for values in (subject.images, subject.ids, subject.mask)]
    maps = gradcam.over_words(gradcam.match(network, *alone, 2), alone[2])[0]
    drawn = words_on_images(subject, 5)
    assert [note.split("\n")[0] for note in drawn.notes[4][2:5]] == ["a", "pink", "blob"]
    expected = overlay(enlarged(subject.pictures[4]), maps[3:7].sum(0))
    assert np.abs(drawn.pictures[4][4].astype(int) - expected).max() <= 2


def test_masked_words_are_taken_for_what_the_copies_say(subject, network):
    probes = numbers(subject, "red", "blue", "pink", "brown")
    drawn = masked_words(subject, probes, 2)
    assert list(drawn.columns) == ["a large [MASK] circle", "a small [MASK] striped star"]
    assert list(drawn.rows) == ["its picture", "another picture"]
    for row, looked in enumerate(((0, 1), (3, 4))):
        for column, number in enumerate(looked):
            assert (drawn.pictures[row][column] == subject.pictures[number]).all()
            ids = subject.ids[column : column + 1, : 5 + column].clone()
            truth = subject.pieces.words[int(ids[0, 3])]
            ids[0, 3] = subject.pieces.mask
            hidden = network.text_encoder_m.bert(ids, ids > 0, [network.visual_encoder_m(subject.images[number : number + 1])])
            chances = network.text_encoder_m.words(hidden[0, 3]).softmax(0)
            order = chances.argsort(descending=True)[:5].tolist()
            told = lines(drawn.notes[row][column])
            assert [name for (name, _), _ in told[:5]] == [subject.pieces.words[token] for token in order]
            assert [percent for (_, percent), _ in told[:5]] == [f"{float(chances[token]):.0%}" for token in order]
            assert [name for (name, _), right in told if right] == [truth]


def test_the_network_has_a_row_where_its_copies_differ(learner, subject):
    network = learner.build(Spec((3, 32, 32), 2, (IMAGE, "caption")), generator(1, "model")).eval()
    bias = network.text_encoder.cls["predictions"].bias
    bias += torch.randn(bias.shape, generator=generator(2))
    moved = replace(subject, network=network)
    drawn = masked_words(moved, ())
    assert list(drawn.rows) == ["its picture", "another picture", "network"]
    ids, place = moved.ids.clone(), masked_place(moved, 1, ())
    ids[1, place] = moved.pieces.mask
    chances = word_chances(network, moved.images[1:2], ids[1:2], moved.mask[1:2], slowly=False)[0, place]
    assert lines(drawn.notes[2][1])[0][0][0] == moved.pieces.words[int(chances.argmax())]
    assert drawn.notes[0][1] != drawn.notes[2][1]


def test_without_words_there_is_nothing_to_mask(learner, network):
    assert masked_words(shown(learner, network, ["", ""]), ()) is None


# ---- what belongs together ------------------------------------------------------------------------------------------


def test_similarities_are_those_of_the_copies(subject, network):
    for i in range(3):
        for j in range(3):
            image = network.vision_proj_m(network.visual_encoder_m(subject.images[i : i + 1])[0, 0])
            text = network.text_proj_m(network.text_encoder_m.bert.read(subject.ids[j : j + 1], subject.mask[j : j + 1])[0, 0])
            expected = float(image @ text) / (float(image.norm()) * float(text.norm()) * 0.07)
            assert float(subject.similarities[i, j]) == pytest.approx(expected, abs=1e-4)


def test_the_likeliest_captions_come_first_and_equal_ones_count_once(subject):
    alike = torch.zeros(6, 6)
    alike[0, [0, 2]], alike[0, 4] = 2.0, 3.0
    alike[1, 5] = 1.0
    vars(subject)["similarities"] = alike
    drawn = nearest_texts(subject, 2)
    assert list(drawn.columns) == ["picture", "1", "2", "3", "4", "5"]
    total = math.exp(3) + math.exp(2) + 3
    assert drawn.notes[0][1] == f"a pink blob\n{math.exp(3) / total:.0%}"
    assert drawn.notes[0][2] == f"a large red circle\n{math.exp(2) / total:.0%} {RIGHT}"
    assert drawn.notes[1][1] == f"a large brown ring\n{math.e / (math.e + 4):.0%}"
    assert sum(RIGHT in note for note in drawn.notes[1]) == 1
    assert all(row[0] is not None and not any(cell is not None for cell in row[1:]) for row in drawn.pictures)


def test_the_likeliest_pictures_come_first_and_all_with_the_caption_are_marked(subject):
    alike = torch.zeros(6, 6)
    alike[:, 0] = torch.tensor([1.0, 5.0, 4.0, 0.0, 3.0, 2.0])
    vars(subject)["similarities"] = alike
    drawn = nearest_images(subject, 1)
    total = sum(math.exp(value) for value in range(6))
    assert drawn.notes[0][0] == "a large red circle" and drawn.pictures[0][0] is None
    order = (1, 2, 4, 5, 0)
    assert all((cell == subject.pictures[i]).all() for cell, i in zip(drawn.pictures[0][1:], order, strict=True))
    expected = [math.exp(value) / total for value in (5, 4, 3, 2, 1)]
    assert list(drawn.notes[0][1:]) == [
        f"{chance:.0%}{f' {RIGHT}' if i in (0, 2) else ''}" for chance, i in zip(expected, order, strict=True)
    ]


def test_what_is_not_compared_is_not_ranked(subject):
    assert list(galleries(subject, (), True)) == ["words-on-images", "masked-words", "nearest-texts", "nearest-images"]
    assert list(galleries(subject, (), False)) == ["words-on-images", "masked-words"]


def test_one_picture_and_no_words_are_enough(learner, network):
    assert list(masked_words(shown(learner, network, ["a red star"]), ()).rows) == ["its picture"]
    drawn = galleries(shown(learner, network, [""]), (), True)
    assert list(drawn) == ["words-on-images", "nearest-texts", "nearest-images"]
    assert list(drawn["nearest-texts"].notes[0]) == ["", f"\n100% {RIGHT}"]
