"""Photographs with a class for every pixel, from small files in the true formats: VOC's augmented set, COCO's panoptic maps, folders."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import run
from fedvision.data.coco_panoptic import STUFF, THINGS, coco_stuff, coco_things
from fedvision.data.image_folders import unlabeled_images
from fedvision.data.partitions import iid
from fedvision.data.pictures import read_images
from fedvision.data.pool import deal
from fedvision.data.standard_sets import voc_segmentation
from fedvision.errors import DataError
from fedvision.registry import datasets
from fedvision.settings import resolve


def rng(seed=0):
    return np.random.default_rng(seed)


def photograph(path, width=24, height=16, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)).save(path)


def palette_map(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values.astype(np.uint8)).convert("P")
    picture.putpalette(list(range(256)) * 3)
    picture.save(path)


def rewritten(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# ---- VOC ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def voc(tmp_path):
    """VOC 2012 with two pictures to train on, three in the augmented set, and one to test on; 24 x 16, the left half is of class 15."""
    base = tmp_path / "VOCdevkit" / "VOC2012"
    values = np.zeros((16, 24))
    values[:, :12], values[:, 12:14] = 15, 255
    for seed, name in enumerate("abcd"):
        photograph(base / "JPEGImages" / f"{name}.jpg", seed=seed)
        palette_map(base / "SegmentationClassAug" / f"{name}.png", values)
        if name != "c":
            palette_map(base / "SegmentationClass" / f"{name}.png", values)
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name, pictures in (("train", "ab"), ("val", "d"), ("trainaug", "abc")):
        (lists / f"{name}.txt").write_text("".join(f"{picture}\n" for picture in pictures))
    return base


def test_voc_trains_on_the_augmented_set_if_asked(voc):
    read = partial(voc_segmentation, root=str(voc.parents[1]), size=24, fit="stretch")
    assert [len(part) for part in (read().train, read(train="trainaug").train, read(train="trainaug").test)] == [2, 3, 1]


@pytest.mark.parametrize("name", ["train_aug", "SegmentationClassAug"])
def test_voc_takes_other_lists_of_the_augmented_set_too(voc, name):
    lists = voc / "ImageSets" / "Segmentation"
    (lists / "trainaug.txt").unlink()
    with pytest.raises(DataError, match=r"there is no .*trainaug\.txt; put that list there, or set voc-segmentation\.train = 'train'"):
        voc_segmentation(root=str(voc.parents[1]), train="trainaug")
    (lists / f"{name}.txt").write_text("/JPEGImages/c.jpg /SegmentationClassAug/c.png\n")
    pool = voc_segmentation(root=str(voc.parents[1]), train="trainaug", size=8)
    assert torch.equal(pool.train.image, read_images([voc / "JPEGImages" / "c.jpg"], 8))
    (lists / f"{name}.txt").write_text("\n")
    with pytest.raises(DataError, match=rf"{name}\.txt lists no picture"):
        voc_segmentation(root=str(voc.parents[1]), train="trainaug")


def test_stretched_pictures_are_whole_and_bilinear_and_their_maps_nearest(voc):
    pool = voc_segmentation(root=str(voc.parents[1]), train="trainaug", size=48, fit="stretch")
    with Image.open(voc / "JPEGImages" / "a.jpg") as picture:
        expected = np.asarray(picture.resize((48, 48), Image.Resampling.BILINEAR))
    assert np.array_equal(pool.train.image[0].permute(1, 2, 0), expected)
    row = [15] * 24 + [255] * 4 + [0] * 20
    assert pool.train.fields["semseg"].tolist() == [[row] * 48] * 3
    cropped = voc_segmentation(root=str(voc.parents[1]), size=16).train.fields["semseg"]
    assert cropped.tolist() == [[[15] * 8 + [255] * 2 + [0] * 6] * 16] * 2


def test_a_map_of_voc_that_does_not_fit_is_named(voc):
    read = partial(voc_segmentation, root=str(voc.parents[1]), train="trainaug")
    file = voc / "SegmentationClassAug" / "b.png"
    palette_map(file, np.full((16, 24), 21))
    with pytest.raises(DataError, match=r"b\.png has the id 21, beyond 0\.\.20 and 255; get the file anew"):
        read()
    palette_map(file, np.zeros((16, 20)))
    with pytest.raises(DataError, match=r"b\.png is 20x16, its picture .*b\.jpg is 24x16; make them the same size"):
        read()
    Image.new("RGB", (24, 16)).save(file)
    with pytest.raises(DataError, match=r"b\.png cannot be read: it has the mode RGB, where one whole number a pixel is expected"):
        read()
    file.unlink()
    with pytest.raises(DataError, match=r"1 of 3 maps are missing, such as .*b\.png; put the unpacked files of VOC there"):
        read()


# ---- COCO -----------------------------------------------------------------------------------------------------------

CATEGORIES = [
    (1, "person", "person", 1),
    (17, "cat", "animal", 1),
    (187, "sky-other-merged", "sky", 0),
    (193, "grass-merged", "plant", 0),
    (183, "other", "other", 0),
]
"""Id, name, supercategory, and whether it is a thing."""

SEGMENTS = {66051: 1, 5: 17, 300: 187, 70000: 193, 9: 183}
"""Of every picture: the id of each segment, from left to right, and its category; the last columns belong to none."""


@pytest.fixture
def coco(tmp_path):
    """COCO's files with four pictures to train on and two to test on, of 24 x 16; four columns a segment."""
    ids = np.repeat([*SEGMENTS, 0], 4)[None].repeat(16, axis=0)
    colors = np.stack([ids % 256, ids // 256 % 256, ids // 256**2], axis=-1).astype(np.uint8)
    first = 0
    for part, number in (("train2017", 4), ("val2017", 2)):
        maps = tmp_path / "annotations" / f"panoptic_{part}"
        maps.mkdir(parents=True)
        named = range(first, first + number)
        for picture in named:
            photograph(tmp_path / part / f"{picture:012}.jpg", seed=picture)
            Image.fromarray(colors).save(maps / f"{picture:012}.png")
        segments = [
            {"id": one, "category_id": category, "iscrowd": 0, "area": 64, "bbox": [0, 0, 4, 16]} for one, category in SEGMENTS.items()
        ]
        content = {
            "images": [{"id": picture, "file_name": f"{picture:012}.jpg", "width": 24, "height": 16} for picture in reversed(named)],
            "annotations": [{"image_id": picture, "file_name": f"{picture:012}.png", "segments_info": segments} for picture in named],
            "categories": [{"id": one, "name": name, "supercategory": above, "isthing": thing} for one, name, above, thing in CATEGORIES],
        }
        maps.with_suffix(".json").write_text(json.dumps(content))
        first += number
    return tmp_path


def annotations(root, part="train"):
    return root / "annotations" / f"panoptic_{part}2017.json"


SETS = {"coco-things": (coco_things, THINGS), "coco-stuff": (coco_stuff, STUFF)}


@pytest.mark.parametrize("name", SETS)
def test_cocos_sets_are_registered_and_want_only_a_root(name):
    make, classes = SETS[name]
    assert datasets.find(name) is make
    assert resolve(make, {"root": "data"}, "data", frozenset({"rng"}))["test_images"] == "val2017"
    assert list(classes) == sorted(classes) and len(set(classes)) == {"coco-things": 12, "coco-stuff": 15}[name]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("coco-things", [THINGS.index("person")] * 4 + [THINGS.index("animal")] * 4 + [255] * 16),
        ("coco-stuff", [255] * 8 + [STUFF.index("sky")] * 4 + [STUFF.index("plant")] * 4 + [255] * 8),
    ],
)
def test_coco_has_the_supercategories_of_one_kind_and_ignores_the_rest(coco, name, row):
    make, classes = SETS[name]
    pool = make(root=str(coco), size=24, fit="stretch", rng=rng())
    assert (len(pool.train), len(pool.test), pool.classes) == (4, 2, len(classes))
    assert pool.train.fields["semseg"].dtype == torch.uint8
    assert pool.train.fields["semseg"].tolist() == [[row] * 24] * 4
    seen = sorted(set(row) - {255})
    assert [values.nonzero()[:, 0].tolist() for values in pool.test.fields["labels"]] == [seen, seen]
    assert pool.train.label.tolist() == [-1] * 4


def test_cocos_maps_lie_on_their_pictures_whatever_their_order(coco):
    pool = coco_things(root=str(coco), size=24, fit="stretch", rng=rng())
    files = [coco / "train2017" / f"{number:012}.jpg" for number in range(4)]
    assert torch.equal(pool.train.image, read_images(files, 24, "stretch", Image.Resampling.BILINEAR))
    cropped = coco_things(root=str(coco), size=16, rng=rng())
    assert cropped.test.fields["semseg"][0, 0].tolist() == [THINGS.index("animal")] * 4 + [255] * 12


def test_a_share_of_coco_is_drawn(coco):
    every = coco_stuff(root=str(coco), size=8, rng=rng()).train.image
    some = [coco_stuff(root=str(coco), size=8, fraction=0.5, rng=rng(seed)) for seed in (0, 0, 1, 2, 3)]
    assert all(len(pool.train) == 2 and len(pool.test) == 2 for pool in some)
    assert torch.equal(some[0].train.image, some[1].train.image)
    assert any(not torch.equal(some[0].train.image, other.train.image) for other in some[2:])
    assert all(any(torch.equal(one, other) for other in every) for one in some[0].train.image)


def put(key, number, name, value):
    """A change of one value in an annotation file."""
    return lambda content: content[key][number].update({name: value})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put("annotations", 1, "image_id", 77), r"annotations, record 1 has 'image_id' = 77, but there is no such picture under 'images'"),
        (put("categories", 0, "supercategory", "people"), r"record 0 has the supercategory 'people', which is none of accessory, animal"),
        (put("categories", 3, "supercategory", "person"), r"record 3 has the supercategory 'person', which is none of building, ceiling"),
        (put("categories", 1, "id", 18), r"'segments_info', record 1 has 'category_id' = 17, but there is no such category"),
        (put("annotations", 0, "segments_info", {}), r"'segments_info' does not hold a list of tables; give COCO's panoptic annotations"),
        (put("annotations", 0, "segments_info", [{"id": 0, "category_id": 1}]), r"has 'id' = 0; give a whole number above 0"),
        (put("annotations", 2, "segments_info", []), r"000000000002\.png has the segment 5, which its annotation does not describe"),
        (put("annotations", 2, "file_name", "2.png"), r"1 of 4 maps are missing, such as .*2\.png; unpack COCO's archives"),
        (put("images", 0, "file_name", "3.jpg"), r"1 of 4 pictures are missing, such as .*3\.jpg"),
        (lambda content: content.pop("categories"), r"does not hold a list of tables under 'categories'"),
        (lambda content: content.update(annotations=[]), r"describes no picture"),
        (lambda content: content["images"][0].pop("file_name"), r"images, record 0 has no 'file_name'"),
    ],
)
def test_what_is_wrong_in_cocos_annotations_is_named(coco, change, reason):
    rewritten(annotations(coco), change)
    with pytest.raises(DataError, match=reason):
        coco_things(root=str(coco), size=24, rng=rng())


def test_broken_files_of_coco_are_named(coco):
    file = coco / "annotations" / "panoptic_val2017" / "000000000004.png"
    Image.new("L", (24, 16)).save(file)
    with pytest.raises(DataError, match=r"000000000004\.png cannot be read: it has the mode L, where the red, green and blue"):
        coco_stuff(root=str(coco), size=8, rng=rng())
    Image.new("RGB", (24, 15)).save(file)
    with pytest.raises(DataError, match=r"000000000004\.png is 24x15, its picture .*000000000004\.jpg is 24x16"):
        coco_stuff(root=str(coco), size=8, rng=rng())
    annotations(coco).write_text("{")
    with pytest.raises(DataError, match=r"panoptic_train2017\.json cannot be read as JSON .* set data\.annotations"):
        coco_stuff(root=str(coco), size=8, rng=rng())
    annotations(coco).write_text("[]")
    with pytest.raises(DataError, match=r"panoptic_train2017\.json holds a list, not a table"):
        coco_stuff(root=str(coco), size=8, rng=rng())
    with pytest.raises(DataError, match=r"there is no folder .*nowhere; set data\.root"):
        coco_stuff(root=str(coco / "nowhere"), rng=rng())


# ---- pictures without classes ---------------------------------------------------------------------------------------


def test_a_folder_of_pictures_is_a_training_set_without_classes(tmp_path):
    for number in range(10):
        photograph(tmp_path / ("deep/er" if number % 2 else ".") / f"{number}.png", seed=number)
    pool = unlabeled_images(root=str(tmp_path), size=8, rng=rng())
    assert (len(pool.train), len(pool.test), pool.classes) == (8, 2, 0)
    assert set(pool.train.fields) == {"image", "label"} and pool.train.label.tolist() == [-1] * 8
    both = torch.cat([pool.train.image, pool.test.image])
    every = read_images([tmp_path / ("deep/er" if number % 2 else ".") / f"{number}.png" for number in range(10)], 8)
    assert sorted(both.flatten(1).tolist()) == sorted(every.flatten(1).tolist())
    dealt = deal("pictures", pool, iid, {"clients": 3}, 0.0, rng())
    assert sum(dealt.train.sizes) == 8 and dealt.spec.fields == ("image", "label")


def test_what_was_learned_without_classes_can_be_tested_on_maps(tmp_path):
    for number in range(3):
        photograph(tmp_path / "train" / f"{number}.jpg", seed=number)
        photograph(tmp_path / "test" / "rgb" / f"{number}.jpg", seed=9 + number)
        palette_map(tmp_path / "test" / "semseg" / f"{number}.png", np.tile([number, 255], (16, 12)))
    read = partial(unlabeled_images, root=str(tmp_path), size=24, fit="stretch", rng=rng())
    pool = read()
    assert (len(pool.train), len(pool.test)) == (3, 3)
    assert "semseg" not in pool.train
    assert [ids.unique().tolist() for ids in pool.test.fields["semseg"]] == [[0, 255], [1, 255], [2, 255]]
    with pytest.raises(DataError, match=r"2\.png has the id 2, beyond 0\.\.1 and 255; raise unlabeled-images\.semantic_classes"):
        read(semantic_classes=2)
    with pytest.raises(DataError, match=r"semantic_classes = 256; ids are stored in a byte, choose at most 255"):
        read(semantic_classes=256)
    (tmp_path / "test" / "semseg" / "1.png").unlink()
    with pytest.raises(DataError, match=r"1\.jpg has no semseg map"):
        read()


def test_silos_learn_from_pictures_without_classes_and_are_judged_by_the_maps_of_others(tmp_path):
    for number in range(4):
        photograph(tmp_path / "train" / f"{number}.jpg", 32, 32, seed=number)
        photograph(tmp_path / "test" / "rgb" / f"{number}.jpg", 32, 32, seed=9 + number)
        palette_map(tmp_path / "test" / "semseg" / f"{number}.png", np.repeat([[number, 0]], 16, axis=1).repeat(32, axis=0))
    data = {"name": "unlabeled-images", "root": str(tmp_path), "size": 32}
    judging = {"clusters": [5], "seeds": 1, "restarts": 1, "foreground_clusters": 10, "community_clusters": 6, "size": 32}
    changes = {"data": data, "rounds": 1, "evaluate_every": 1, "strategy.steps": 1, "partition.clients": 2, "learner.local_size": 16}
    done = run("leopart-tiny", {**changes, "learner.judging": judging}, out=tmp_path / "run", draw=False)
    assert done.rounds["failures"].sum() == 0 and np.isfinite(done.rounds["test_loss"]).all()
    judged = [name for name in done.rounds.columns if "miou" in name]
    assert judged and np.isfinite(done.rounds[judged].iloc[-1]).all()


def test_folders_without_pictures_are_named(tmp_path):
    with pytest.raises(DataError, match=r"holds no picture \(\.bmp, .*\); put some there"):
        unlabeled_images(root=str(tmp_path), rng=rng())
    photograph(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"test_fraction = 0\.2 of 1 pictures leaves none to train or to test on; choose e\.g\. 0\.2"):
        unlabeled_images(root=str(tmp_path), rng=rng())
    photograph(tmp_path / "train" / "a.png")
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match=r"test holds no picture"):
        unlabeled_images(root=str(tmp_path), rng=rng())
    photograph(tmp_path / "test" / "a.png")
    assert len(unlabeled_images(root=str(tmp_path), size=8, rng=rng()).test) == 1
