"""Questions, entailment, pairs and expressions about your own pictures, on small files in the true formats."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fedvision.data.picture_pairs import nlvr2
from fedvision.data.pictures import read_images
from fedvision.data.referring_expressions import refcoco
from fedvision.data.texts import decode_texts
from fedvision.data.visual_entailment import snli_ve
from fedvision.data.visual_questions import vqa
from fedvision.errors import DataError
from fedvision.registry import datasets
from fedvision.settings import resolve


def rng():
    return np.random.default_rng(0)


def picture(folder, name, size=(40, 20)):
    """A picture whose right half is white."""
    values = np.zeros((size[1], size[0], 3), np.uint8)
    values[:, size[0] // 2 :] = 255
    (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(folder / "images" / name)
    return name


def written(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return name


def texts(part, field):
    return decode_texts(part.fields[field])


@pytest.mark.parametrize("name", ["vqa", "snli-ve", "nlvr2", "refcoco"])
def test_the_sets_are_registered_and_want_only_a_root(name):
    assert resolve(datasets.find(name), {"root": "data"}, "data", frozenset({"rng"}))["test_fraction"] == 0.2


@pytest.mark.parametrize("make", [vqa, snli_ve, nlvr2, refcoco])
def test_a_folder_or_a_file_that_is_missing_is_named(make, tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*nowhere; set data\.root"):
        make(root=str(tmp_path / "nowhere"), rng=rng())
    with pytest.raises(DataError, match=r"json cannot be read as JSON .*; set data\.\w+ to the annotation file"):
        make(root=str(tmp_path), rng=rng())


def test_whole_pictures_are_stretched(tmp_path):
    picture(tmp_path, "wide.png", (64, 16))
    file = tmp_path / "images" / "wide.png"
    stretched, cut = (read_images([file], 16, fit=fit)[0, 0, 8] for fit in ("stretch", "crop"))
    assert (stretched[:7] == 0).all() and (stretched[9:] == 255).all()
    assert (cut[:7] == 0).all() and (cut[9:] == 255).all()
    values = np.zeros((16, 64), np.uint8)
    values[:, -8:] = 255
    Image.fromarray(values).save(file)
    assert read_images([file], 16, fit="stretch")[0, 0, 8, -1] > 200  # what is at the edge is there
    assert read_images([file], 16)[0, 0, 8, -1] == 0


# ---- questions ------------------------------------------------------------------------------------------------------


def asked(folder, number=5):
    """ALBEF's records: ten answers from VQA, one from Visual Genome."""
    return [
        {
            "image": picture(folder, f"val2014/{i}.jpg"),
            "question": f"what is {i}-{k}?",
            "question_id": 10 * i + k,
            "dataset": "vqa",
            "answer": ["yes"] * 5 + ["no"] * 3 + [f"maybe {i}"] * 2,
        }
        for i in range(number)
        for k in range(1 + i % 2)
    ]


def test_albefs_lists_are_read(tmp_path):
    written(tmp_path, "vqa_train.json", asked(tmp_path))
    pool = vqa(root=str(tmp_path), size=8, rng=rng())
    assert (len(pool.train), len(pool.test), pool.classes) == (4, 1, 0)
    assert pool.train.image.shape == (4, 3, 8, 8) and set(pool.train.label.tolist()) == {-1}
    found = {
        tuple(questions): (decode_texts(part.fields["answer"][i]), part.fields["answer_weight"][i].tolist())
        for part in (pool.train, pool.test)
        for i, questions in enumerate(texts(part, "question"))
    }
    assert set(found) == {tuple(f"what is {i}-{k}?" for k in range(1 + i % 2)) for i in range(5)}
    answers, weights = found["what is 0-0?",]
    assert answers[0] == ["yes", "no", "maybe 0"] and weights[0] == pytest.approx([0.5, 0.3, 0.2])
    assert all(not weight for one in weights[1:] for weight in one)
    assert pool.train.fields["answer"].dtype == torch.uint8 and pool.train.fields["answer_weight"].dtype == torch.float32


def test_visual_genomes_answers_weigh_a_half_and_have_a_folder_of_their_own(tmp_path):
    genome = [{"image": "VG/1.jpg", "question": "who?", "answer": "a man", "dataset": "vg"}]
    (tmp_path / "images" / "VG").mkdir(parents=True)
    picture(tmp_path, "1.jpg")
    (tmp_path / "genome" / "VG").mkdir(parents=True)
    (tmp_path / "images" / "1.jpg").rename(tmp_path / "genome" / "VG" / "1.jpg")
    files = (written(tmp_path, "vg.json", genome), written(tmp_path, "train.json", asked(tmp_path, 1)))
    test = (written(tmp_path, "test.json", [{"image": "val2014/0.jpg", "question": "and this?"}]),)
    pool = vqa(root=str(tmp_path), annotations=files, test_annotations=test, genome_images="genome", size=8, rng=rng())
    assert texts(pool.train, "question") == [["who?"], ["what is 0-0?"]]
    assert pool.train.fields["answer_weight"][:, 0].tolist() == [[0.5, 0.0, 0.0], pytest.approx([0.5, 0.3, 0.2])]
    assert decode_texts(pool.train.fields["answer"][0]) == [["a man"]]
    assert pool.test.fields["answer"].shape == (1, 1, 1, 0) and pool.test.fields["answer_weight"].tolist() == [[[0]]]


def test_vqas_own_files_are_read(tmp_path):
    picture(tmp_path, "val2014/COCO_val2014_000000000042.jpg")
    questions = {"data_subtype": "val2014", "questions": [{"image_id": 42, "question": "what?", "question_id": 42000}]}
    given = {"annotations": [{"question_id": 42000, "image_id": 42, "answers": [{"answer": "net", "answer_id": 1}, {"answer": "a net"}]}]}
    settings = {"annotations": (written(tmp_path, "q.json", questions),), "test_annotations": ("q.json",), "root": str(tmp_path), "size": 8}
    pool = vqa(**settings, answers=(written(tmp_path, "a.json", given),), rng=rng())
    assert texts(pool.train, "question") == [["what?"]]
    assert decode_texts(pool.train.fields["answer"][0]) == [["net", "a net"]]
    assert pool.train.fields["answer_weight"].tolist() == [[[0.5, 0.5]]]
    with pytest.raises(DataError, match=r"q\.json, questions, record 0 has no answer; .* data\.answers"):
        vqa(**settings, rng=rng())


def test_pictures_with_many_questions_come_again_and_rare_answers_are_left_out(tmp_path):
    records = [{"image": picture(tmp_path, "a.jpg"), "question": f"q{i}", "answer": ["x", "y", "y"]} for i in range(5)]
    records += [{"image": picture(tmp_path, "b.jpg"), "question": "q", "answer": ["z"]}]
    written(tmp_path, "train.json", records)
    settings = {"annotations": ("train.json",), "test_annotations": ("train.json",), "size": 8}
    pool = vqa(root=str(tmp_path), **settings, questions=2, most_answers=1, rng=rng())
    assert texts(pool.train, "question") == [["q0", "q1"], ["q2", "q3"], ["q4"], ["q"]]
    assert pool.train.fields["answer"].shape[:3] == (4, 2, 1)
    assert decode_texts(pool.train.fields["answer"][0]) == [["y"], ["y"]]
    assert pool.train.fields["answer_weight"][2].tolist() == [[pytest.approx(2 / 3)], [0.0]]


# ---- entailment -----------------------------------------------------------------------------------------------------


def test_snli_ve_is_read(tmp_path):
    labels = ["entailment", "neutral", "contradiction"]
    for i in range(4):
        picture(tmp_path, f"{i}.jpg")
    records = [{"image": str(i % 4), "sentence": f" it is {i}. ", "label": labels[i % 3]} for i in range(9)]
    written(tmp_path, "ve_train.json", records)
    written(tmp_path, "ve_test.json", [{"image": "0.jpg", "sentence": "it rains", "label": "neutral"}])
    pool = snli_ve(root=str(tmp_path), test_annotations="ve_test.json", size=8, rng=rng())
    assert texts(pool.train, "hypothesis")[:2] == [["it is 0.", "it is 4.", "it is 8."], ["it is 1.", "it is 5."]]
    assert pool.train.fields["verdict"].tolist() == [[2, 1, 0], [1, 0, -1], [0, 2, -1], [2, 1, -1]]
    assert pool.test.fields["verdict"].tolist() == [[1]] and pool.test.image.shape == (1, 3, 8, 8)
    drawn = snli_ve(root=str(tmp_path), test_fraction=0.5, hypotheses=2, size=8, rng=rng())
    said = [{text.split()[2] for some in texts(part, "hypothesis") for text in some} for part in (drawn.train, drawn.test)]
    assert not said[0] & said[1] and len(said[0] | said[1]) == 9


# ---- pairs ----------------------------------------------------------------------------------------------------------


def test_nlvr2_is_read(tmp_path):
    for name, size in (("a", (30, 30)), ("b", (30, 10)), ("c", (10, 30))):
        picture(tmp_path, f"train/{name}.png", size)
    pairs = [("a", "b", "True"), ("b", "a", "False"), ("a", "b", False), ("c", "b", True)]
    records = [
        {"images": [f"train/{one}.png", f"train/{two}.png"], "sentence": f"s{i}", "label": t} for i, (one, two, t) in enumerate(pairs)
    ]
    written(tmp_path, "nlvr_train.json", records)
    pool = nlvr2(root=str(tmp_path), test_annotations="nlvr_train.json", size=8, rng=rng())
    assert texts(pool.train, "statement") == [["s0", "s2"], ["s1"], ["s3"]]
    assert pool.train.fields["truth"].tolist() == [[1, 0], [0, -1], [1, -1]]
    assert torch.equal(pool.train.image[0], pool.train.fields["second_image"][1])
    assert torch.equal(pool.train.image[1], pool.train.fields["second_image"][0])
    assert len(nlvr2(root=str(tmp_path), test_fraction=0.4, size=8, rng=rng()).test) == 1


# ---- expressions ----------------------------------------------------------------------------------------------------


def referring(folder):
    """Two pictures of 40 x 20 pixels, three expressions, one by the id of an instance."""
    names = [picture(folder, f"train2014/COCO_train2014_00000000000{i}.jpg") for i in (1, 2)]
    records = [
        {"image": names[0], "text": "the man", "ref_id": 7},
        {"image": names[0], "text": ["a dog", "brown dog"], "ref_id": 8},
        {"image": names[1], "text": "left one", "ref_id": 9},
    ]
    refs = [
        {"ref_id": 7, "image_id": 1, "bbox": [10, 5, 20, 10]},
        {"ref_id": 8, "image_id": 1, "ann_id": 100, "split": "val"},
        {"ref_id": 9, "image_id": 2, "ann_id": 101},
    ]
    boxes = [{"id": 100, "bbox": [0.0, 0.0, 4.0, 2.0], "image_id": 1}, {"id": 101, "bbox": [20, 10, 20, 10], "image_id": 2}]
    written(folder, "refcoco+_train.json", records)
    written(folder, "refs.json", refs)
    written(folder, "instances.json", {"images": [], "annotations": boxes})
    written(folder, "dets.json", {"1": [[10, 5, 20, 10], [0, 0, 40, 20]], "3": [[1, 1, 1, 1]]})
    return {"root": str(folder), "instances": "instances.json", "size": 10}


def test_refcoco_is_read_with_boxes_in_the_pixels_of_the_stretched_picture(tmp_path):
    settings = referring(tmp_path)
    pool = refcoco(**settings, test_annotations="refcoco+_train.json", rng=rng())
    assert texts(pool.train, "expression") == [["the man", "a dog", "brown dog"], ["left one"]]
    assert pool.train.fields["box"].tolist() == [
        [[2.5, 2.5, 7.5, 7.5], [0, 0, 1, 1], [0, 0, 1, 1]],
        [[5, 5, 10, 10], [0] * 4, [0] * 4],
    ]
    assert pool.train.fields["proposals"].tolist() == [[[2.5, 2.5, 7.5, 7.5], [0, 0, 10, 10]], [[0] * 4] * 2]
    assert pool.train.fields["box"].dtype == pool.train.fields["proposals"].dtype == torch.float32
    few = refcoco(**settings, test_fraction=0.5, most_proposals=1, expressions=2, rng=rng())
    assert len(few.train) + len(few.test) == 3 and few.train.fields["proposals"].shape[1] <= 1
    left, right = pool.train.image[0, 0, :, [2, 7]].T
    assert (left < 20).all() and (right > 235).all()


def test_references_may_be_unknown_in_training_only(tmp_path):
    settings = referring(tmp_path)
    known = json.loads((tmp_path / "refcoco+_train.json").read_text())
    unknown = [{"image": known[0]["image"], "text": "somebody", "ref_id": 99}, {"image": known[0]["image"], "text": "nobody"}]
    written(tmp_path, "more.json", unknown)
    pool = refcoco(**settings, annotations="more.json", test_annotations="refcoco+_train.json", rng=rng())
    assert not pool.train.fields["box"].any() and pool.train.fields["proposals"].shape == (1, 0, 4)
    with pytest.raises(DataError, match=r"more\.json, record 0 has the 'ref_id' 99, which data\.refs does not know"):
        refcoco(**settings, test_annotations="more.json", rng=rng())


# ---- files that are wrong -------------------------------------------------------------------------------------------


RIGHT = {
    "vqa": (vqa, "vqa_train.json", {"image": "a.jpg", "question": "q?", "answer": ["x"]}),
    "snli-ve": (snli_ve, "ve_train.json", {"image": "a.jpg", "sentence": "s", "label": "neutral"}),
    "nlvr2": (nlvr2, "nlvr_train.json", {"images": ["a.jpg", "b.jpg"], "sentence": "s", "label": "True"}),
    "refcoco": (refcoco, "refcoco+_train.json", {"image": "a.jpg", "text": "t", "ref_id": 1}),
}


def refused(name, folder, content, message):
    make, file, _ = RIGHT[name]
    written(folder, file, content)
    written(folder, "refs.json", [{"ref_id": 1, "image_id": 1, "bbox": [0, 0, 1, 1]}])
    written(folder, "dets.json", {})
    with pytest.raises(DataError, match=message):
        make(root=str(folder), rng=rng())


@pytest.mark.parametrize("name", RIGHT)
def test_files_of_another_kind_are_refused(tmp_path, name):
    file = RIGHT[name][1].replace("+", r"\+")
    refused(name, tmp_path, "[", "cannot be read as JSON")
    refused(name, tmp_path, {"a": 1}, rf"{file} does not hold a list of tables; give a list of {{")
    refused(name, tmp_path, [1], rf"{file} does not hold a list of tables")


@pytest.mark.parametrize("name", RIGHT)
def test_records_without_a_key_or_with_an_empty_text_are_refused_by_number(tmp_path, name):
    for file in ("a.jpg", "b.jpg"):
        picture(tmp_path, file)
    right = RIGHT[name][2]
    for key in right:
        cut = {other: value for other, value in right.items() if other != key}
        said = "has no answer" if key == "answer" else f"has no '{key}', only"
        refused(name, tmp_path, [right, cut], f"record 1 {said}")
    text = next(key for key in ("question", "sentence", "text") if key in right)
    for wrong in (" ", 3, None, []):
        refused(name, tmp_path, [right | {text: wrong}], f"record 0 has '{text}' = .*, which is no text")


@pytest.mark.parametrize("name", RIGHT)
def test_missing_pictures_and_too_few_of_them_are_named(tmp_path, name):
    right = RIGHT[name][2]
    refused(name, tmp_path, [right], r"names \d pictures, of which \d are missing, such as .*a\.jpg; set data\.images")
    for file in ("a.jpg", "b.jpg"):
        picture(tmp_path, file)
    refused(name, tmp_path, [right], r"leaves 1 pictures to train and 0 to test on; set data\.test_fraction")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("snli-ve", {"label": "entailed"}, "'label' = 'entailed'; did you mean 'entailment'"),
        ("nlvr2", {"label": "yes"}, "'label' = 'yes'; write True or False"),
        ("nlvr2", {"label": 1}, "'label' = 1; write True or False"),
        ("nlvr2", {"images": ["a.jpg"]}, "has 1 pictures under 'images'; give two"),
        ("refcoco", {"ref_id": [1]}, r"'ref_id' = \[1\]; give a whole number or a text"),
    ],
)
def test_wrong_values_are_refused(tmp_path, name, change, message):
    refused(name, tmp_path, [RIGHT[name][2] | change], message)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("refs.json", [{"ref_id": 7, "image_id": 1, "bbox": [1, 2, 3]}], r"refs\.json, record 0, 'bbox': \[1, 2, 3\] is no box"),
        ("refs.json", [{"ref_id": 7, "image_id": 1, "bbox": [1, 2, 0, 3]}], "is no box; give left, top, width and height"),
        ("refs.json", [{"ref_id": 7, "image_id": 1, "ann_id": 5}], r"has the 'ann_id' 5, which .*instances\.json knows|add 'bbox'"),
        ("refs.json", [{"ref_id": 7, "bbox": [1, 2, 3, 4]}], "has no 'image_id'"),
        ("dets.json", [[1, 2, 3, 4]], r"dets\.json is no table of lists"),
        ("dets.json", {"1": [[1, 2, 3, None]]}, r"dets\.json, '1': \[1, 2, 3, None\] is no box"),
        ("instances.json", {"images": []}, r"instances\.json does not hold a list of tables under 'annotations'"),
    ],
)
def test_wrong_boxes_are_refused(tmp_path, file, content, message):
    settings = referring(tmp_path)
    written(tmp_path, file, content)
    with pytest.raises(DataError, match=message):
        refcoco(**settings, test_fraction=0.5, rng=rng())
