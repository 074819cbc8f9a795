"""Pictures of a pre-trained network: what is given, covered, predicted and changed is what they say."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from fedvision.data.examples import IGNORED
from fedvision.multimae.decoders import DecoderSize
from fedvision.multimae.modalities import DEPTH_MAP, RGB, semantic
from fedvision.multimae.model import Autoencoder, Size
from fedvision.multimae.pictures import COVER, NOTHING, Subject, edited_patch, galleries, palette, single_input, visible_patches
from fedvision.multimae.views import image_normalization
from fedvision.seeds import generator, global_generators

SEMSEG = semantic(5, embedding=4)
ALL = (RGB, DEPTH_MAP, SEMSEG)


def subject(seed=0, modalities=ALL, inputs=ALL, outputs=ALL, **changes):
    """A random picture of 4 x 4 patches, and a network that knows nothing."""
    with global_generators(generator(seed)):
        model = Autoencoder(inputs, outputs, Size(16, 1, 2), DecoderSize(16, 1, 2), 8, (4, 4)).eval()
    rng = generator(seed, "picture")
    image, depth = torch.rand(1, 3, 32, 32, generator=rng), torch.randn(1, 1, 32, 32, generator=rng)
    semseg = torch.zeros(1, 8, 8, dtype=torch.int64)
    semseg[0, 2:4, 2:6] = 3
    values = {"rgb": image_normalization(3)(image), "depth": depth, "semseg": semseg} | changes
    named = {modality.name: modality for modality in modalities}
    return Subject(model, {name: values[name] for name in named}, named)


def patch(picture, number):
    row, column = divmod(number, 4)
    return picture[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]


def cell(gallery, row, column):
    return gallery.pictures[list(gallery.rows).index(row)][list(gallery.columns).index(column)]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


# ---- painting -------------------------------------------------------------------------------------------------------


def test_a_picture_is_painted_as_it_was_before_its_normalization():
    image = torch.rand(1, 3, 32, 32, generator=generator(0))
    painted = subject(rgb=image_normalization(3)(image)).target("rgb")
    assert np.abs(painted / 255 - image[0].permute(1, 2, 0).numpy()).max() < 1 / 255


def test_classes_have_the_colors_of_the_palette_pixel_by_pixel():
    one = subject()
    painted = one.target("semseg")
    assert painted.shape == (32, 32, 3)
    assert (painted[9, 9] == palette()[3]).all() and (painted[0, 0] == palette()[0]).all()
    ids = one.values["semseg"][0].numpy().repeat(4, 0).repeat(4, 1)
    assert (painted == palette()[ids]).all()


def test_predicted_depth_has_the_colors_of_the_targets_range():
    one = subject()
    target = one.values["depth"]
    same, beyond = one.painted("depth", target), one.painted("depth", target.clamp(max=0) + 100 * (target > 0))
    assert (same == one.target("depth")).all()
    brightest = same.reshape(-1, 3)[target.flatten().argmax()]
    assert (beyond[(target > 0)[0, 0].numpy()] == brightest).all()


def test_what_is_not_known_is_light_gray_whatever_the_modality():
    depth, semseg = torch.full((1, 1, 32, 32), torch.nan), torch.full((1, 8, 8), IGNORED)
    one = subject(rgb=torch.full((1, 3, 32, 32), torch.nan), depth=depth, semseg=semseg)
    assert all((one.target(name) == NOTHING).all() for name in ("rgb", "depth", "semseg"))


def test_the_colors_of_classes_are_distinct_and_not_the_covers():
    colors = palette()
    assert colors.shape == (256, 3) and len(np.unique(colors[:40], axis=0)) == 40
    first = colors[:20].astype(int)
    apart = np.abs(first[:, None] - first[None]).sum(2) + 1000 * np.eye(20, dtype=int)
    assert apart.min() > 30
    assert (np.abs(colors.astype(int) - COVER).max(1) > 15).all()


def test_a_cover_lies_on_the_patches_that_are_not_visible():
    one = subject()
    shown = torch.zeros(16, dtype=torch.bool)
    shown[[1, 6]] = True
    for name in ("rgb", "depth", "semseg"):
        covered = one.covered(name, {name: shown})
        for number in range(16):
            expected = patch(one.target(name), number) if number in (1, 6) else COVER
            assert (patch(covered, number) == expected).all()
    assert (one.covered("rgb", {}) == COVER).all()


# ---- predictions ----------------------------------------------------------------------------------------------------


def test_predictions_show_what_was_given_and_are_the_networks_elsewhere():
    one = subject()
    shown = torch.zeros(16, dtype=torch.bool)
    shown[[0, 5]] = True
    found = one.predicted({"rgb": shown})
    raw = one.model(one.values, torch.tensor([[0, 5]]))
    for number in range(16):
        source = one.values["rgb"] if number in (0, 5) else raw["rgb"]
        assert torch.equal(patch(found["rgb"][0, 0], number), patch(source[0, 0], number))
    assert torch.equal(found["depth"], raw["depth"]) and torch.equal(found["semseg"], raw["semseg"].argmax(1))


def test_single_inputs_leave_the_given_one_out_and_end_with_the_targets():
    one = subject()
    shown = single_input([one, subject(1)])
    assert list(shown.rows)[:4] == ["0: from rgb", "0: from depth", "0: from semseg", "0: target"] and len(shown.rows) == 8
    assert list(shown.columns) == ["given", "rgb", "depth", "semseg"]
    assert (cell(shown, "0: from depth", "given") == one.target("depth")).all() and cell(shown, "0: from depth", "depth") is None
    alone = one.model({"depth": one.values["depth"]}, None, ["semseg"])["semseg"].argmax(1)
    assert (cell(shown, "0: from depth", "semseg") == one.painted("semseg", alone)).all()
    assert (cell(shown, "0: target", "rgb") == one.target("rgb")).all()


def test_more_patches_show_those_of_before_and_some_more():
    shown = visible_patches([subject()], 6)
    assert list(shown.rows) == ["0: 3 of 48", "0: 6 of 48", "0: 12 of 48", "0: 24 of 48"]
    uncovered = []
    for row in shown.rows:
        given = [cell(shown, row, f"{name}: given") for name in ("rgb", "depth", "semseg")]
        uncovered.append({(i, n) for i, picture in enumerate(given) for n in range(16) if not (patch(picture, n) == COVER).all()})
    assert [len(each) for each in uncovered] == [3, 6, 12, 24]
    assert all(before < after for before, after in pairwise(uncovered))


@pytest.mark.parametrize(("visible", "rows"), [(1, ["1", "2", "4"]), (16, ["8", "16", "32", "36"]), (48, ["24", "36", "48"])])
def test_the_numbers_of_patches_stay_within_what_there_is(visible, rows):
    assert list(visible_patches([subject()], visible).rows) == [f"0: {count} of 48" for count in rows]


# ---- edits ----------------------------------------------------------------------------------------------------------


def test_an_edit_changes_one_patch_of_what_is_given_and_nothing_else():
    one = subject()
    shown = edited_patch([one])
    assert list(shown.rows) == [
        "0: rgb as it is", "0: rgb in red", "0: rgb in blue", "0: semseg as it is", "0: semseg 3 to 0", "0: semseg 3 to 4"
    ]  # fmt: skip
    for name, variants in (("rgb", ["0: rgb in red", "0: rgb in blue"]), ("semseg", ["0: semseg 3 to 0", "0: semseg 3 to 4"])):
        before = [cell(shown, f"0: {name} as it is", f"{other}: given") for other in ("rgb", "depth", "semseg")]
        for row in variants:
            after = [cell(shown, row, f"{other}: given") for other in ("rgb", "depth", "semseg")]
            changed = {(i, n) for i in range(3) for n in range(16) if (patch(before[i], n) != patch(after[i], n)).any()}
            assert len(changed) == 1 and {i for i, _ in changed} == {("rgb", "depth", "semseg").index(name)}
    (number,) = {n for n in range(16) if not (patch(cell(shown, "0: semseg as it is", "semseg: given"), n) == COVER).all()}
    assert number in (5, 6)  # where the object is
    assert (patch(cell(shown, "0: semseg 3 to 4", "semseg: given"), number) == palette()[4]).any()


def test_an_edit_moves_the_predictions():
    shown = edited_patch([subject()])
    before, after = (cell(shown, f"0: rgb {what}", "rgb: predicted").astype(int) for what in ("as it is", "in red"))
    assert (before != after).any()


def test_a_red_patch_is_red_and_a_blue_one_blue():
    shown = edited_patch([subject(rgb=image_normalization(3)(torch.full((1, 3, 32, 32), 0.8)))])
    for color, channel in (("red", 0), ("blue", 2)):
        given = cell(shown, f"0: rgb in {color}", "rgb: given")
        (number,) = {n for n in range(16) if not (patch(given, n) == COVER).all()}
        assert patch(given, number)[0, 0].argmax() == channel


# ---- what there is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "outputs", "there", "names"),
    [
        (ALL, ALL, ALL, ["single-input", "visible-patches", "edited-patch"]),
        ((RGB,), (RGB,), (RGB,), ["visible-patches", "edited-patch"]),
        ((DEPTH_MAP,), (DEPTH_MAP,), (DEPTH_MAP,), ["visible-patches"]),
        ((RGB,), (DEPTH_MAP, SEMSEG), ALL, ["single-input", "visible-patches", "edited-patch"]),
        (ALL, ALL, (RGB, SEMSEG), ["single-input", "visible-patches", "edited-patch"]),
        (ALL, (RGB,), ALL, ["single-input", "visible-patches", "edited-patch"]),
    ],
    ids=["all", "rgb alone", "depth alone", "translation", "a set without depth", "rgb from all"],
)
def test_there_are_pictures_of_whatever_modalities_there_are(inputs, outputs, there, names):
    assert list(galleries([subject(0, there, inputs, outputs), subject(1, there, inputs, outputs)], 6)) == names


@pytest.mark.parametrize("ids", [0, IGNORED])
def test_a_map_of_one_class_is_not_edited(ids):
    shown = edited_patch([subject(semseg=torch.full((1, 8, 8), ids))])
    assert not any("semseg" in row for row in shown.rows)


def test_an_example_that_lacks_a_modality_has_pictures_too():
    one = subject(depth=torch.full((1, 1, 32, 32), torch.nan))
    assert list(galleries([one], 6)) == ["single-input", "visible-patches", "edited-patch"]
