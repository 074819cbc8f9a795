"""Pseudo labels, by networks of transformers with few random weights that are made here."""

import builtins
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from fedvision import pseudo_labels
from fedvision.data.paired_folders import paired_folders
from fedvision.errors import DataError, ExperimentError
from fedvision.pseudo_labels import Depth, Network, Semseg, as_bytes, as_numbers, label
from fedvision.seeds import generator, global_generators

transformers = pytest.importorskip("transformers", reason="the extra pseudo-labels is not installed")

NAMES = {number: f"thing {number}" for number in range(6)}


def dpt():
    config = transformers.DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[4] * 4, fusion_hidden_size=8, reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    return transformers.DPTForDepthEstimation(config), transformers.DPTImageProcessor(size={"height": 32, "width": 32})


def glpn():
    config = transformers.GLPNConfig(depths=[1] * 4, hidden_sizes=[4] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8)
    return transformers.GLPNForDepthEstimation(config), transformers.GLPNImageProcessor(size_divisor=32)


def segformer(names=NAMES):
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 8], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 1], mlp_ratios=[2, 2], decoder_hidden_size=8, num_labels=len(names), id2label=names,
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config), transformers.SegformerImageProcessor(size={"height": 32, "width": 32})


def mask2former():
    swin = transformers.SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=8,
        depths=[1] * 4,
        num_heads=[1] * 4,
        window_size=2,
        out_features=[f"stage{i}" for i in range(1, 5)],
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_layers=1, decoder_layers=2,
        num_attention_heads=1, encoder_feedforward_dim=8, dim_feedforward=8, num_queries=3, num_labels=len(NAMES), id2label=NAMES,
    )  # fmt: skip
    return transformers.Mask2FormerForUniversalSegmentation(config), transformers.Mask2FormerImageProcessor(
        size={"height": 32, "width": 32}
    )


@pytest.fixture(scope="session")
def network(tmp_path_factory):
    """The folder of a small network with random weights, by the function that makes it."""
    made = {}
    transformers.utils.logging.disable_progress_bar()

    def folder(make, *arguments):
        key = (make.__name__, *map(len, arguments))
        if key not in made:
            path = tmp_path_factory.mktemp(make.__name__)
            with global_generators(generator(0)):
                for part in make(*arguments):
                    part.save_pretrained(path)
            made[key] = str(path)
        return made[key]

    return folder


def picture(number, height=40, width=48):
    """A random picture of large squares."""
    squares = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(squares).resize((width, height), Image.Resampling.NEAREST)


@pytest.fixture
def folder(tmp_path):
    """A folder of five pictures of two sizes, one of them in a folder of its own."""
    for number, name in enumerate(("a.png", "b.jpg", "c.png", "deep/d.png", "e.f.png")):
        path = tmp_path / "rgb" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, 40, 48 if number % 2 else 40).save(path)
    return tmp_path


def maps(folder, kind):
    return {str(path.relative_to(folder / kind)): np.asarray(Image.open(path)) for path in sorted((folder / kind).rglob("*.png"))}


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "semseg"), [(dpt, segformer), (glpn, mask2former)])
def test_a_folder_of_pictures_becomes_one_that_paired_folders_reads(folder, network, depth, semseg):
    assert label(folder, [Depth(network(depth)), Semseg(network(semseg))], batch=3) == {"depth": 5, "semseg": 5}
    names = ["a.png", "b.png", "c.png", "deep/d.png", "e.f.png"]
    assert list(maps(folder, "depth")) == list(maps(folder, "semseg")) == names
    for kind, dtype in (("depth", np.uint16), ("semseg", np.uint8)):
        assert [map_.shape for map_ in maps(folder, kind).values()] == [(40, 40), (40, 48), (40, 40), (40, 48), (40, 40)]
        assert {map_.dtype for map_ in maps(folder, kind).values()} == {np.dtype(dtype)}
    pool = paired_folders(root=str(folder), size=32, semantic_classes=6, rng=np.random.default_rng(0))
    assert len(pool.train) + len(pool.test) == 5
    assert pool.train.fields["semseg"].max() < 6 and pool.train.fields["depth"].min() > 0


def test_maps_do_not_depend_on_which_pictures_are_made_together(folder, network):
    wanted = [Depth(network(dpt)), Semseg(network(segformer))]
    label(folder, wanted, batch=5)
    together = {kind: maps(folder, kind) for kind in ("depth", "semseg")}
    for kind in together:
        for path in (folder / kind).rglob("*.png"):
            path.unlink()
    label(folder, wanted, batch=1)
    assert all(np.array_equal(map_, together["semseg"][name]) for name, map_ in maps(folder, "semseg").items())
    for name, map_ in maps(folder, "depth").items():
        assert np.abs(map_.astype(int) - together["depth"][name]).max() < 700, name  # a hundredth: the weights are random


def test_a_map_is_what_the_network_says_of_that_picture(folder, network):
    label(folder, [Semseg(network(segformer))], batch=5)
    for name in ("a.png", "deep/d.png"):
        found = transformers.pipeline("image-segmentation", model=network(segformer))(str(folder / "rgb" / name), subtask="semantic")
        expected = sum(int(each["label"].removeprefix("thing ")) * (np.asarray(each["mask"]) > 0) for each in found)
        assert np.array_equal(maps(folder, "semseg")[name], expected) and len(np.unique(expected)) > 1


def test_what_is_there_is_kept(folder, network):
    progress = []
    label(folder, [Semseg(network(segformer))])
    kept = folder / "semseg" / "c.png"
    Image.fromarray(np.full((40, 40), 3, np.uint8)).save(kept)
    for name in ("a.png", "b.png"):
        (folder / "semseg" / name).unlink()
    made = label(folder, [Semseg(network(segformer))], batch=1, on_progress=lambda kind, done: progress.append((kind, done)))
    assert made == {"semseg": 2} and progress == [("semseg", 3), ("semseg", 4), ("semseg", 5)]
    assert (maps(folder, "semseg")["c.png"] == 3).all()


def test_of_a_complete_folder_no_network_is_loaded(folder, network, monkeypatch):
    label(folder, [Semseg(network(segformer))])
    monkeypatch.setattr(pseudo_labels, "required", lambda: pytest.fail("the network is loaded"))
    assert label(folder, [Semseg(network(segformer))]) == {"semseg": 0}


def test_train_and_test_are_labeled_both(folder, network):
    for part in ("train", "test"):
        (folder / part).mkdir()
    (folder / "rgb").rename(folder / "train" / "rgb")
    (folder / "test" / "rgb").mkdir()
    picture(9).save(folder / "test" / "rgb" / "a.png")
    assert label(folder, [Semseg(network(segformer))]) == {"semseg": 6}
    pool = paired_folders(root=str(folder), size=32, modalities=("semseg",), semantic_classes=6, rng=np.random.default_rng(0))
    assert (len(pool.train), len(pool.test)) == (5, 1)


def test_a_file_tells_the_networks_and_their_classes(folder, network):
    label(folder, [Semseg(network(segformer))])
    label(folder, [Depth(network(dpt), inverse=True)])
    told = json.loads((folder / "labels.json").read_text())
    assert told["semseg"] == {"model": network(segformer), "classes": list(NAMES.values())}
    assert told["depth"] == {"model": network(dpt), "inverse": True, "scale": None}


def test_pictures_are_not_turned_as_their_metadata_say(folder, network):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture(0, 40, 48).save(folder / "rgb" / "b.jpg", exif=exif)
    label(folder, [Depth(network(dpt)), Semseg(network(segformer))])
    assert maps(folder, "depth")["b.png"].shape == (40, 48)
    assert len(paired_folders(root=str(folder), size=32, semantic_classes=6, rng=np.random.default_rng(0)).train) == 4


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_inverse_depth_is_turned_round(folder, network):
    label(folder, [Depth(network(dpt))])
    near = maps(folder, "depth")
    for path in [*(folder / "depth").rglob("*.png"), folder / "labels.json"]:
        path.unlink()
    label(folder, [Depth(network(dpt), inverse=True)])
    for name, map_ in maps(folder, "depth").items():
        assert np.abs(map_.astype(int) + near[name] - 65536).max() <= 1


def test_meters_stay_meters(folder, network):
    label(folder, [Depth(network(glpn), scale=1000)])
    meters = Network.load(network(glpn), "depth-estimation")([picture(0, 40, 40)])[0]
    pool = paired_folders(root=str(folder), size=40, modalities=("depth",), depth_scale=1000, rng=np.random.default_rng(0))
    read = torch.cat([pool.train.fields["depth"], pool.test.fields["depth"]])
    assert (read[:, 0] - meters).abs().flatten(1).max(1).values.min() < 0.01


def test_a_map_without_depth_is_a_plane_and_no_warning():
    assert (as_numbers(torch.full((2, 3), 7.0)) == 1).all()


def test_meters_that_do_not_fit_become_the_largest_and_never_nothing():
    assert as_numbers(torch.tensor([[0.0, -1.0, 1e9]]), scale=1000).tolist() == [[1, 1, 65535]]


def test_depth_that_is_not_finite_is_refused():
    with pytest.raises(DataError, match="depth that is not finite"):
        as_numbers(torch.tensor([[1.0, torch.nan]]))


def test_what_is_no_class_is_unknown():
    assert as_bytes(torch.tensor([[-1, 0, 254, 255, 300]])).tolist() == [[255, 0, 254, 255, 255]]


# ---- wrong inputs ---------------------------------------------------------------------------------------------------


def test_maps_of_two_networks_are_not_mixed(folder, network):
    label(folder, [Depth(network(dpt))])
    (folder / "depth" / "a.png").unlink()
    for other in (Depth(network(glpn)), Depth(network(dpt), inverse=True)):
        with pytest.raises(DataError, match=r"are there already, of depth by model = .*, inverse = False, scale = None; go on with that"):
            label(folder, [other])


def test_a_damaged_picture_is_named_and_the_others_are_kept(folder, network):
    (folder / "rgb" / "c.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"c\.png cannot be read: .*what is done is kept"):
        label(folder, [Semseg(network(segformer))], batch=1)
    assert list(maps(folder, "semseg")) == ["a.png", "b.png"]
    picture(2).save(folder / "rgb" / "c.png")
    assert label(folder, [Semseg(network(segformer))]) == {"semseg": 3}


def test_a_full_disk_leaves_whole_maps_only(folder, network, monkeypatch):
    saved, original = [], Image.Image.save

    def save(image, path, **options):
        saved.append(path)
        if len(saved) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(image, path, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(DataError, match=r"c\.png cannot be written .*No space left"):
        label(folder, [Semseg(network(segformer))])
    assert sorted(path.name for path in (folder / "semseg").iterdir()) == ["a.png", "b.png"]


def test_two_pictures_of_one_name_are_refused(folder, network):
    picture(0).save(folder / "rgb" / "a.jpg")
    with pytest.raises(DataError, match=r"a\.jpg and .*a\.png would have the same map; rename one"):
        label(folder, [Semseg(network(segformer))])


@pytest.mark.parametrize(("make", "message"), [(lambda path: None, "there is no folder"), (lambda path: path.mkdir(), "holds no picture")])
def test_a_folder_without_pictures_is_refused(tmp_path, make, message):
    make(tmp_path / "rgb")
    with pytest.raises(DataError, match=message):
        label(tmp_path, [Semseg("unused")])


@pytest.mark.parametrize(("make", "kind"), [(segformer, Depth), (dpt, Semseg)])
def test_a_network_for_something_else_is_refused(folder, network, make, kind):
    with pytest.raises(ExperimentError, match=f"cannot be used for {kind.task} .*; give a folder written by save_pretrained"):
        label(folder, [kind(network(make))])
    assert not (folder / "labels.json").exists()


def test_a_network_that_is_not_there_is_refused(folder):
    with pytest.raises(ExperimentError, match="'/no/such/network' cannot be used for depth-estimation"):
        label(folder, [Depth("/no/such/network")])


def test_more_classes_than_a_byte_holds_are_refused(folder, network):
    many = network(segformer, {number: str(number) for number in range(256)})
    with pytest.raises(ExperimentError, match="tells 256 classes apart, and maps of bytes hold at most 255"):
        label(folder, [Semseg(many)])


@pytest.mark.parametrize(("settings", "message"), [({"inverse": True, "scale": 1000}, "has no meters"), ({"scale": 0.0}, "above 0")])
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ExperimentError, match=message):
        Depth("unused", **settings)


def test_without_the_extra_the_command_to_install_it_is_told(folder, monkeypatch):
    original = builtins.__import__

    def without(name, *arguments, **options):
        if name == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'")
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ExperimentError, match=r"not installed; pip install 'fedvision\[pseudo-labels\]'"):
        label(folder, [Depth("unused")])


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_makes_maps_and_tells_how_many(folder, network, fedvision):
    ended = fedvision("pseudo-labels", folder, "--depth", network(dpt), "--inverse", "--semseg", network(segformer), "--batch", 2)
    assert (ended.status, ended.err) == (0, "")
    assert "depth: 5 maps made, 0 were there" in ended.out and "semseg: 5 maps made, 0 were there" in ended.out
    assert "maps 10/10  semseg" in ended.out
    ended = fedvision("pseudo-labels", folder, "--depth", network(dpt), "--inverse")
    assert ended.status == 0 and "depth: 0 maps made, 5 were there" in ended.out


def test_the_command_needs_a_network(folder, fedvision):
    ended = fedvision("pseudo-labels", folder)
    assert ended.status == 1 and "name a network with --depth, with --semseg, or with both" in ended.err


def test_the_doctor_tells_of_the_extra(fedvision):
    assert re.search(rf"ok +transformers +{transformers.__version__}", fedvision("doctor").out)


def test_the_doctor_tells_how_to_get_the_extra(fedvision, monkeypatch):
    monkeypatch.setattr("benchmarks.doctor.find_spec", lambda name: None)
    ended = fedvision("doctor")
    assert ended.status == 0 and "pip install 'fedvision[pseudo-labels]'" in ended.out
