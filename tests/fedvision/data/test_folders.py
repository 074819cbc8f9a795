"""Your own pictures: folders of classes, captions in JSON, folders of paired modalities."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import display, figures
from fedvision.data.captioned_images import captions
from fedvision.data.card import card
from fedvision.data.image_folders import image_folder, unlabeled_images
from fedvision.data.paired_folders import paired_folders
from fedvision.data.partitions import iid
from fedvision.data.pictures import read_images
from fedvision.data.pool import deal
from fedvision.data.texts import decode_texts
from fedvision.errors import DataError
from fedvision.registry import datasets
from fedvision.settings import resolve


def rng(seed=0):
    return np.random.default_rng(seed)


def picture(path, color=(255, 0, 0), size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


@pytest.mark.parametrize("name", ["image-folder", "unlabeled-images", "captions", "paired-folders"])
def test_the_sets_are_registered_and_want_only_a_root(name):
    assert resolve(datasets.find(name), {"root": "data"}, "data", frozenset({"rng"}))["test_fraction"] == 0.2


@pytest.mark.parametrize("make", [image_folder, unlabeled_images, captions, paired_folders])
def test_a_folder_that_is_missing_is_named(make, tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*nowhere; set [\w-]+\.root"):
        make(root=str(tmp_path / "nowhere"), rng=rng())


def test_pictures_are_cut_to_the_square_in_the_middle(tmp_path):
    values = np.zeros((8, 16, 3), np.uint8)
    values[:, 4:12] = 200
    Image.fromarray(values).save(tmp_path / "wide.png")
    Image.fromarray(values[:, 4:12, 0]).save(tmp_path / "gray.png")
    image = read_images([tmp_path / "wide.png", tmp_path / "gray.png"], 8)
    assert image.dtype == torch.uint8 and (image == 200).all()
    assert read_images([], 8).shape == (0, 3, 8, 8)


# ---- a folder a class -----------------------------------------------------------------------------------------------


def test_classes_are_the_folders_by_name(tmp_path):
    for part, number in (("train", 3), ("test", 2), ("validation", 1)):
        for label, color in (("cat", (250, 0, 0)), ("ant", (0, 250, 0)), ("bee", (0, 0, 250))):
            for i in range(number):
                picture(tmp_path / part / label / f"{i}.png", color)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no picture")
    pool = image_folder(root=str(tmp_path), size=8, rng=rng())
    assert pool.classes == 3
    assert pool.train.label.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert pool.train.image.shape == (9, 3, 8, 8)
    assert pool.train.image[:, :, 0, 0].tolist() == [[0, 250, 0]] * 3 + [[0, 0, 250]] * 3 + [[250, 0, 0]] * 3
    assert (len(pool.test), len(pool.validation)) == (6, 3)


def test_without_a_test_folder_every_class_gives_its_share(tmp_path):
    for label in ("a", "b"):
        for i in range(5):
            picture(tmp_path / label / f"deep/{i}.jpg")
    pool = image_folder(root=str(tmp_path), size=4, test_fraction=0.4, rng=rng())
    assert torch.bincount(pool.train.label).tolist() == [3, 3]
    assert torch.bincount(pool.test.label).tolist() == [2, 2]


def test_wrong_folders_of_classes_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds 0 folder\(s\) of classes"):
        image_folder(root=str(tmp_path), rng=rng())
    for label in ("a", "b"):
        picture(tmp_path / "train" / label / "1.png")
    with pytest.raises(DataError, match="not both of 'train' and 'test'; add the other"):
        image_folder(root=str(tmp_path), rng=rng())
    picture(tmp_path / "test" / "B" / "1.png")
    with pytest.raises(DataError, match="the class 'B', which is not trained on; did you mean 'b'"):
        image_folder(root=str(tmp_path), rng=rng())
    (tmp_path / "train" / "c").mkdir()
    with pytest.raises(DataError, match=r"train/c holds no picture \(\.bmp"):
        image_folder(root=str(tmp_path), rng=rng())


# ---- captions -------------------------------------------------------------------------------------------------------


def coco(folder, numbers, name="captions.json"):
    """Annotations as COCO's: the pictures in one list, the captions in another, in no order."""
    images = [{"id": 7 + i, "file_name": picture(folder / "images" / f"{i}.jpg").name, "height": 16, "width": 20} for i in numbers]
    texts = [{"id": k, "image_id": 7 + i, "caption": f" picture {i}, wording {k}"} for k in range(3) for i in reversed(numbers)]
    (folder / name).write_text(json.dumps({"info": {}, "images": images, "annotations": texts}))


def told(examples):
    return decode_texts(examples.fields["caption"])


def test_coco_files_are_read(tmp_path):
    coco(tmp_path, range(5))
    pool = captions(root=str(tmp_path), size=8, rng=rng())
    assert (len(pool.train), len(pool.test), pool.classes) == (4, 1, 0)
    assert sorted(told(pool.train) + told(pool.test)) == [[f"picture {i}, wording {k}" for k in range(3)] for i in range(5)]
    assert pool.train.image.shape == (4, 3, 8, 8)
    assert set(pool.train.label.tolist()) == {-1}


def test_a_test_file_of_its_own_is_the_test_set(tmp_path):
    coco(tmp_path, range(3), "train.json")
    coco(tmp_path, range(3, 5), "val.json")
    pool = captions(root=str(tmp_path), annotations="train.json", test_annotations="val.json", size=8, wordings=2, rng=rng())
    assert told(pool.train) == [[f"picture {i}, wording {k}" for k in range(2)] for i in range(3)]
    assert [len(some) for some in told(pool.test)] == [2, 2]


def test_karpathys_splits_are_respected(tmp_path):
    splits = ["train", "restval", "val", "test", "train"]
    images = [
        {
            "filename": picture(tmp_path / "images" / "sub" / f"{i}.jpg").name,
            "filepath": "sub",
            "split": split,
            "sentences": [{"raw": f"number {i}.", "tokens": ["number", str(i)]}] * (1 + i % 2),
        }
        for i, split in enumerate(splits)
    ]
    (tmp_path / "dataset.json").write_text(json.dumps({"dataset": "flickr30k", "images": images}))
    pool = captions(root=str(tmp_path), annotations="dataset.json", size=8, rng=rng())
    assert told(pool.train) == [["number 0."], ["number 1.", "number 1."], ["number 4."]]
    assert told(pool.test) == [["number 2."], ["number 3.", "number 3."]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds a list, not a table"),
        ("{}", r"is no caption file \(KeyError\('images'\)\)"),
        ('{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 2, "caption": "x"}]}', r"KeyError\(2\)"),
        ('{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": []}', r"no caption for 1\.jpg"),
        ('{"images": [{"filename": "1.jpg", "sentences": [{"raw": "x"}]}]}', r"names 1 pictures, of which 1 are missing, such as .*1\.jpg"),
    ],
)
def test_wrong_caption_files_are_refused(tmp_path, content, message):
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(DataError, match=message):
        captions(root=str(tmp_path), rng=rng())


def test_pictures_with_captions_can_be_dealt_and_have_a_card(tmp_path, capsys):
    coco(tmp_path, range(6))
    data = deal("captions", captions(root=str(tmp_path), size=8, rng=rng()), iid, {"clients": 2}, 0.0, rng())
    assert card(data).counts.shape == (2, 0)
    assert figures.partition(data) is None
    assert figures.examples(data) is not None
    display.print_card(display.Console(), data)
    assert "2 clients" in capsys.readouterr().out


def test_pictures_with_captions_may_be_stretched_instead_of_cropped(tmp_path):
    (tmp_path / "images").mkdir()
    half = np.zeros((8, 16, 3), np.uint8)
    half[:, :4] = 255  # the crop to the middle leaves none of it
    Image.fromarray(half).save(tmp_path / "images" / "half.png")
    listed = {"images": [{"id": 0, "file_name": "half.png"}], "annotations": [{"image_id": 0, "caption": "half"}]}
    (tmp_path / "captions.json").write_text(json.dumps(listed))
    whole = {fit: captioned_examples(tmp_path, fit).image.float().mean() for fit in ("crop", "stretch")}
    assert whole["crop"] == 0 and abs(whole["stretch"] - 255 / 4) < 12


def captioned_examples(folder, fit):
    both = {"annotations": "captions.json", "test_annotations": "captions.json"}
    return captions(root=str(folder), size=8, fit=fit, rng=rng(), **both).train


# ---- paired modalities ----------------------------------------------------------------------------------------------


def paired(folder, number=4, size=(12, 8)):
    """Pictures with depth in millimeters and ids."""
    for i in range(number):
        picture(folder / "rgb" / f"room/{i}.jpg", size=size)
        millimeters = np.full(size[::-1], 1500 + i, np.uint16)
        millimeters[0] = 0
        ids = np.full(size[::-1], i, np.uint8)
        ids[:, : size[0] // 2] = 255
        for kind, values in (("depth", millimeters), ("semseg", ids)):
            (folder / kind / "room").mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(folder / kind / f"room/{i}.png")


def test_modalities_with_the_same_names_belong_together(tmp_path):
    paired(tmp_path)
    pool = paired_folders(root=str(tmp_path), size=8, test_fraction=0.25, rng=rng())
    assert (len(pool.train), len(pool.test)) == (3, 1)
    for part in (pool.train, pool.test):
        depth, semseg = part.fields["depth"], part.fields["semseg"]
        assert depth.dtype == torch.float32 and depth.shape[1:] == (1, 8, 8)
        assert semseg.dtype == torch.uint8 and semseg.shape[1:] == (8, 8)
        assert (semseg[:, :, :4] == 255).all() and (depth[:, :, 0] == 0).all()
        torch.testing.assert_close(depth[:, 0, 1, 0], 1.5 + semseg[:, 0, 7] / 1000)


def test_train_and_test_folders_are_taken_as_they_are(tmp_path):
    paired(tmp_path / "train", 3)
    paired(tmp_path / "test", 2)
    pool = paired_folders(root=str(tmp_path), size=8, modalities=("depth",), depth_scale=500.0, rng=rng())
    assert [len(part) for part in (pool.train, pool.test)] == [3, 2]
    assert "semseg" not in pool.train
    assert pool.test.fields["depth"].max() == pytest.approx(1501 / 500)


def test_wrong_pairs_are_refused_with_file_and_remedy(tmp_path):
    paired(tmp_path)
    with pytest.raises(DataError, match=r"semseg/room/2\.png has the id 2, beyond 0\.\.1 and 255; raise paired-folders\.semantic_classes"):
        paired_folders(root=str(tmp_path), size=8, semantic_classes=2, test_fraction=0.5, rng=np.random.default_rng(5))
    picture(tmp_path / "rgb" / "room" / "3.jpg", size=(20, 20))
    with pytest.raises(DataError, match=r"depth/room/3\.png is 12x8, its picture .*3\.jpg is 20x20; make them the same size"):
        paired_folders(root=str(tmp_path), rng=rng())
    (tmp_path / "semseg" / "room" / "1.png").unlink()
    with pytest.raises(
        DataError, match=r"rgb/room/1\.jpg has no semseg map: .*semseg/room/1\.png is missing; add it or remove the picture"
    ):
        paired_folders(root=str(tmp_path), rng=rng())
    with pytest.raises(DataError, match="modalities names 'dpeth'; did you mean 'depth'"):
        paired_folders(root=str(tmp_path), modalities=("dpeth",), rng=rng())
    with pytest.raises(DataError, match="choose at most 255"):
        paired_folders(root=str(tmp_path), semantic_classes=256, rng=rng())


def test_a_picture_may_lack_a_map_if_that_is_allowed(tmp_path):
    paired(tmp_path / "train", 4)
    paired(tmp_path / "test", 2)
    for lost in ("depth/room/1", "semseg/room/1", "semseg/room/3"):
        (tmp_path / "train" / f"{lost}.png").unlink()
    (tmp_path / "test" / "depth" / "room" / "0.png").unlink()
    (tmp_path / "test" / "depth" / "room" / "1.png").unlink()
    pool = paired_folders(root=str(tmp_path), size=8, missing="allow", rng=rng())
    assert pool.train.having("depth").tolist() == [True, False, True, True]
    assert pool.train.having("semseg").tolist() == [True, False, True, False]
    assert not pool.test.having("depth").any() and pool.test.having("semseg").all()
    depth, semseg = pool.train.fields["depth"], pool.train.fields["semseg"]
    assert depth.shape == (4, 1, 8, 8) and depth[:, 0, 7, 7].tolist() == pytest.approx([1.5, 0, 1.502, 1.503])
    assert semseg.dtype == torch.uint8 and semseg[:, 7, 7].tolist() == [0, 255, 2, 255]
    assert pool.test.fields["depth"].shape == (2, 1, 8, 8) and not pool.test.fields["depth"].any()


def test_a_map_without_a_picture_is_refused_where_pictures_may_lack_maps(tmp_path):
    paired(tmp_path)
    (tmp_path / "depth" / "room" / "1.png").rename(tmp_path / "depth" / "room" / "one.png")
    with pytest.raises(DataError, match=r"depth/room/one\.png has no picture of the same name in .*rgb; rename or remove it"):
        paired_folders(root=str(tmp_path), missing="allow", rng=rng())
    paired(tmp_path)
    pool = paired_folders(root=str(tmp_path), size=8, rng=rng())  # all pictures have their maps: more maps do no harm
    assert len(pool.train) + len(pool.test) == 4 and "has_depth" not in pool.train


def test_other_folders_are_read_as_values_from_0_to_1(tmp_path):
    paired(tmp_path)
    for i in range(4):
        pixels = {
            "thermal": np.full((8, 12), 13107 * i, np.uint16),
            "edges": np.full((8, 12), 51 * i, np.uint8),
            "normals": np.stack([np.full((8, 12), 51 * (i + c), np.uint8) for c in range(3)], -1),
        }
        for kind, values in pixels.items():
            (tmp_path / kind / "room").mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(tmp_path / kind / "room" / f"{i}.png")
    pool = paired_folders(root=str(tmp_path), modalities=("thermal", "edges", "normals", "semseg"), size=8, test_fraction=0.25, rng=rng())
    for part in (pool.train, pool.test):
        i = part.fields["semseg"][:, 0, 7].float()
        for kind, offsets in (("thermal", [0]), ("edges", [0]), ("normals", [0, 1, 2])):
            values = part.fields[kind]
            assert values.dtype == torch.float32 and values.shape == (len(part), len(offsets), 8, 8)
            for channel, offset in enumerate(offsets):
                torch.testing.assert_close(values[:, channel], ((i + offset) / 5)[:, None, None].expand(-1, 8, 8))
    (tmp_path / "edges" / "room" / "2.png").unlink()
    some = paired_folders(root=str(tmp_path), modalities=("edges", "semseg"), size=8, missing="allow", test_fraction=0.25, rng=rng())
    both = torch.cat([some.train.having("edges"), some.test.having("edges")])
    ids = torch.cat([some.train.fields["semseg"], some.test.fields["semseg"]])[:, 0, 7]
    assert torch.equal(both, ids != 2)


def test_wrong_values_are_refused_with_file_and_remedy(tmp_path):
    paired(tmp_path)
    for i in range(4):
        picture(tmp_path / "normals" / "room" / f"{i}.png", size=(12, 8))
    Image.new("L", (12, 8)).save(tmp_path / "normals" / "room" / "2.png")
    with pytest.raises(DataError, match=r"normals/room/2\.png is in 8 bits of gray, .*normals/room/0\.png in color; save all .* alike"):
        paired_folders(root=str(tmp_path), modalities=("normals",), rng=rng())
    Image.new("P", (12, 8)).save(tmp_path / "normals" / "room" / "2.png")
    with pytest.raises(DataError, match=r"normals/room/2\.png has the mode P, where gray \(8 or 16 bits\) or color \(RGB\) is expected"):
        paired_folders(root=str(tmp_path), modalities=("normals",), rng=rng())
    (tmp_path / "image").mkdir()
    for name in ("image", "rgb", "label", "has_depth"):
        with pytest.raises(DataError, match=f"modalities names '{name}', which means something else"):
            paired_folders(root=str(tmp_path), modalities=(name,), rng=rng())
    with pytest.raises(DataError, match="names a folder twice"):
        paired_folders(root=str(tmp_path), modalities=("depth", "depth"), rng=rng())
    (tmp_path / "edges").mkdir()
    with pytest.raises(DataError, match="has a map in a folder 'edges'; leave 'edges' out"):
        paired_folders(root=str(tmp_path), modalities=("edges",), missing="allow", rng=rng())


def test_a_map_in_color_is_refused(tmp_path):
    paired(tmp_path)
    picture(tmp_path / "semseg" / "room" / "0.png", size=(12, 8))
    with pytest.raises(DataError, match=r"0\.png cannot be read: it has the mode RGB"):
        paired_folders(root=str(tmp_path), size=8, rng=rng())
