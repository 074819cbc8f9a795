"""Scenes: every field agrees with the pixels, with the others, and with the settings."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedvision.data.examples import TEXTS
from fedvision.data.federated import FederatedData
from fedvision.data.partitions import environment as by_environment
from fedvision.data.pool import deal
from fedvision.data.scenes import BACKGROUNDS, COLORS, COLUMNS, FIELDS, MENTIONED, SHAPES, SHIFTS, TEXTURES, scenes
from fedvision.data.scenes.captions import DIALECTS, WORDINGS, size_word
from fedvision.data.scenes.layouts import layouts
from fedvision.data.scenes.objects import objects_table
from fedvision.data.scenes.pixels import background, blurred, depth_maps, draw, semantic_maps
from fedvision.data.scenes.shapes import covered
from fedvision.data.scenes.styles import colors_of, rgb, styles
from fedvision.data.texts import decode_texts
from fedvision.errors import DataError, ExperimentError
from fedvision.registry import datasets, partitions
from fedvision.settings import resolve
from fedvision.wordpiece import SPECIAL, WordPiece, cleaned_caption, words_of

SOME = {"examples": 60, "test_examples": 20}
CROWDED = SOME | {"objects": (2, 4), "fields": FIELDS}


def rng(seed=0):
    return np.random.default_rng(seed)


def made(seed=0, **settings):
    return scenes(**SOME | settings, rng=rng(seed))


def crowd(n=40, classes=10, scraps=3, style=None, fewest=2):
    """Layouts of pictures with up to four objects."""
    style = styles(0, 1, (), 0.0) if style is None else style
    return layouts(np.zeros(n, int), np.arange(n) % classes, style, classes, (fewest, 4), scraps, rng(1))


def column(table, name):
    return table[..., COLUMNS.index(name)]


# ---- fields ---------------------------------------------------------------------------------------------------------


def test_it_is_registered_with_settings_that_a_file_can_give():
    values = {"objects": [1, 3], "shift": ["blur"], "fields": ["image", "depth"], "size": 64, "draw_seed": 3}
    settings = resolve(datasets.find("scenes"), values, "data", frozenset({"rng"}))
    assert settings["objects"] == (1, 3)
    with pytest.raises(ExperimentError, match=r"data\.shift"):
        resolve(datasets.find("scenes"), {"shift": ["colour"]}, "data", frozenset({"rng"}))


def test_fields_have_the_types_and_shapes_of_the_contract():
    pool = made(fields=FIELDS, size=24, wordings=3, classes=12)
    shapes = {name: (values.dtype, tuple(values.shape[1:])) for name, values in pool.train.fields.items()}
    lengths = {name: shapes[name][1][-1] for name in TEXTS}
    assert shapes == {
        "image": (torch.uint8, (3, 24, 24)),
        "label": (torch.int64, ()),
        "labels": (torch.uint8, (12,)),
        "caption": (torch.uint8, (3, lengths["caption"])),
        "depth": (torch.float32, (1, 24, 24)),
        "semseg": (torch.uint8, (24, 24)),
        "objects": (torch.float32, (4, len(COLUMNS))),
        "question": (torch.uint8, (4, lengths["question"])),
        "answer": (torch.uint8, (4, 1, lengths["answer"])),
        "answer_weight": (torch.float32, (4, 1)),
        "hypothesis": (torch.uint8, (3, lengths["hypothesis"])),
        "verdict": (torch.int64, (3,)),
        "second_image": (torch.uint8, (3, 24, 24)),
        "second_objects": (torch.float32, (4, len(COLUMNS))),
        "statement": (torch.uint8, (2, lengths["statement"])),
        "truth": (torch.int64, (2,)),
        "expression": (torch.uint8, (2, lengths["expression"])),
        "box": (torch.float32, (2, 4)),
        "proposals": (torch.float32, (8, 4)),
    }
    assert (len(pool.train), len(pool.test), pool.classes) == (60, 20, 12)


def test_only_the_fields_asked_for_are_kept_and_the_others_do_not_change_them():
    few, all_of_them = made(), made(fields=FIELDS)
    assert list(few.train.fields) == ["image", "label"]
    for field in few.train.fields:
        assert torch.equal(few.train.fields[field], all_of_them.train.fields[field])


def test_unknown_fields_are_refused_with_the_known_ones():
    with pytest.raises(DataError, match=r"'dept'; did you mean 'depth'\? known: image, label, labels, caption, depth, semseg, objects"):
        made(fields=("image", "dept"))
    with pytest.raises(DataError, match="has no 'image'"):
        made(fields=("label",))


def test_an_unknown_shift_is_refused():
    with pytest.raises(DataError, match="'pallete'; did you mean 'palette'"):
        made(domains=2, shift=("pallete",))


@pytest.mark.parametrize("objects", [(3, 2), (0, 1), (2, 5)])
def test_a_range_of_objects_that_is_none_is_refused(objects):
    with pytest.raises(DataError, match="the fewest and the most objects"):
        made(objects=objects)


# ---- randomness -----------------------------------------------------------------------------------------------------


def same(one, other):
    return all(torch.equal(one.fields[field], other.fields[field]) for field in one.fields)


def test_the_same_seed_draws_the_same_and_another_another(monkeypatch):
    monkeypatch.setenv("FEDVISION_CACHE", "off")
    one, again, other = (made(seed, noise=0.1, fields=FIELDS) for seed in (1, 1, 2))
    assert same(one.train, again.train) and same(one.test, again.test)
    assert not torch.equal(one.train.image, other.train.image)


def test_a_seed_of_its_own_makes_it_independent_of_the_experiments():
    assert same(made(1, draw_seed=5).train, made(2, draw_seed=5).train)
    assert not torch.equal(made(1, draw_seed=5).train.image, made(1, draw_seed=6).train.image)


def test_the_test_set_does_not_depend_on_the_number_of_training_examples():
    assert same(made(examples=60).test, made(examples=30).test)


def test_what_is_on_disk_is_what_was_drawn(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDVISION_CACHE", str(tmp_path))
    drawn = made(fields=FIELDS, domains=2)
    assert len(list(tmp_path.iterdir())) == 2
    read = made(fields=FIELDS, domains=2)
    assert same(drawn.train, read.train) and list(drawn.train.fields) == list(read.train.fields)
    made(fields=FIELDS, domains=2, noise=0.1)
    assert len(list(tmp_path.iterdir())) == 4


def test_the_pixels_are_those_that_were_drawn_when_this_test_was_written():
    """If this fails because scenes are drawn differently, raise VERSION in fedvision/data/scenes: files on disk are outdated."""
    image = made(draw_seed=0, objects=(1, 4), clutter=0.3).train.image.double()
    assert (image.mean().item(), image.std().item()) == pytest.approx((121.24985, 44.41370), abs=1e-4)


# ---- maps and pixels ------------------------------------------------------------------------------------------------


def test_pixels_of_the_background_show_the_background_and_nothing_else():
    layout = crowd()
    drawn = draw(layout, 32)
    behind = (drawn.owner < 0)[:, None].repeat(3, axis=1)
    assert np.array_equal(drawn.image[behind], background(layout, 32)[behind])
    assert 0.3 < behind.mean() < 0.95


def test_pixels_of_an_object_differ_from_the_background():
    layout = crowd(scraps=0)
    drawn = draw(layout, 32)
    differs = np.abs(drawn.image - background(layout, 32)).max(axis=1) > 0.02
    assert differs[drawn.owner >= 0].mean() > 0.97


def test_the_nearest_object_owns_a_pixel():
    """Against a naive painter: every object alone, pixel by pixel the one with the smallest depth."""
    layout, size = crowd(20), 32
    drawn = draw(layout, size)
    nearest, owner = np.full((20, size, size), np.inf), np.full((20, size, size), -1)
    for slot in range(4):
        alone = replace(layout, present=layout.present & (np.arange(4) == slot))
        here = (draw(alone, size).owner == slot) & (layout.depth[:, slot, None, None] < nearest)
        owner[here] = slot
        nearest[here] = np.broadcast_to(layout.depth[:, slot, None, None], here.shape)[here]
    assert np.array_equal(drawn.owner, owner)
    assert np.array_equal(np.isin(np.arange(4), drawn.owner), [True] * 4)


def test_a_window_about_a_shape_covers_all_of_it():
    """Against the whole picture as the window: the shape's function at every pixel."""
    size, n = 40, 44
    shape, angle = np.arange(n) % 11, 2 * np.pi * rng().random(n)
    x, y, radius = (low + span * rng(2).random(n) for low, span in ((0.2, 0.6), (0.2, 0.6), (0.05, 0.3)))
    found = covered(shape, x, y, radius, angle, size)
    mask = np.zeros((n, size, size), bool)
    mask[found.of, found.row, found.column] = True
    for i in range(n):
        pair = np.array([i, i])
        whole = covered(shape[pair], x[pair], y[pair], np.array([radius[i], 0.6]), angle[pair], size)  # its large neighbor makes it so
        seen = np.zeros((size, size), bool)
        seen[whole.row[whole.of == 0], whole.column[whole.of == 0]] = True
        assert np.array_equal(mask[i], seen)
        rows, columns = np.nonzero(mask[i])
        away = np.hypot((columns + 0.5) / size - x[i], (rows + 0.5) / size - y[i])
        assert len(rows) and away.max() <= 1.02 * radius[i]
        assert away.max() >= 0.7 * radius[i] - 1 / size  # it reaches about as far as it says


def test_depth_and_semantic_maps_are_those_of_the_pixels_owner():
    layout = crowd(classes=100)
    owner = draw(layout, 48).owner
    depth, semseg = depth_maps(layout, owner), semantic_maps(layout, owner)
    for slot in range(4):
        which, row, col = np.nonzero(owner == slot)
        assert np.array_equal(depth[which, row, col], layout.depth[which, slot].astype(np.float32))
        assert np.array_equal(semseg[which, row, col], 1 + layout.category[which, slot])
    assert np.array_equal(semseg == 0, owner < 0)


def test_objects_are_in_front_of_the_background_and_the_first_is_the_nearest():
    layout = crowd(200)
    owner = draw(layout, 32).owner
    floor = depth_maps(layout, np.full_like(owner, -1))
    assert (depth_maps(layout, owner)[owner >= 0] < floor[owner >= 0]).all()
    assert (np.diff(layout.depth, axis=1) >= 0).all() and (layout.depth[:, 0] < layout.depth[:, 1]).all()
    assert (layout.radius[:, :1] > layout.radius[:, 1:]).all()
    assert (np.diff(floor[:, :, 0], axis=1) <= 0).all()  # the floor comes nearer toward the bottom
    assert floor.min() > 0.5 and floor.max() < 30


def test_maps_of_a_pool_agree_with_each_other_and_with_the_label():
    train = made(**CROWDED).train
    semseg, depth, table = (train.fields[name] for name in ("semseg", "depth", "objects"))
    assert torch.equal(column(table, "class")[:, 0].long(), train.label)
    for i in range(len(train)):
        for row in table[i][column(table[i], "visible") > 0]:
            here = semseg[i] == 1 + int(column(row, "class"))
            assert column(row, "depth") in depth[i, 0][here]


@pytest.mark.parametrize("size", [32, 64])
def test_boxes_and_visible_shares_are_those_of_the_pixels(size):
    layout = crowd()
    drawn = draw(layout, size)
    table = objects_table(layout, drawn, size)
    for i in range(len(layout)):
        for slot in range(4):
            rows, columns = np.nonzero(drawn.owner[i] == slot)
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 0, 0]
            assert [column(table[i, slot], side) for side in ("left", "top", "right", "bottom")] == box
            if layout.present[i, slot]:
                assert column(table[i, slot], "visible") == pytest.approx(len(rows) / drawn.whole[i, slot])
            else:
                assert not table[i, slot].any()
    assert (column(table, "visible")[:, 0] == 1).all()  # nothing hides the first


def test_labels_are_the_classes_of_what_is_to_be_seen():
    train = made(**CROWDED).train
    table = train.fields["objects"]
    for i in range(len(train)):
        counts = column(table[i], "visible") >= MENTIONED
        assert train.fields["labels"][i].nonzero().flatten().tolist() == sorted(set(column(table[i], "class")[counts].long().tolist()))
    assert train.fields["labels"].gather(1, train.label[:, None]).all()


def test_the_same_scenes_are_drawn_in_any_size():
    small, large = made(size=32, draw_seed=1), made(size=96, draw_seed=1)
    shrunk = torch.nn.functional.avg_pool2d(large.train.image.double(), 3)
    assert (shrunk - small.train.image).abs().mean() < 4
    assert torch.equal(small.train.label, large.train.label)


# ---- classes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 10, 37, 100])
def test_classes_are_balanced_in_every_domain(classes):
    pool = made(classes=classes, examples=900, domains=3)
    for domain in range(3):
        counts = torch.bincount(pool.train.label[pool.train.fields["environment"] == domain], minlength=classes)
        assert counts.sum() == 300 and counts.max() - counts.min() <= 1


def test_a_class_is_a_shape_and_beyond_ten_a_color():
    ten, many = (made(classes=classes, examples=200, fields=FIELDS).train.fields["objects"] for classes in (10, 57))
    assert torch.equal(column(ten, "class"), column(ten, "shape"))
    assert len(column(ten, "color")[:, 0].unique()) == len(COLORS)
    assert torch.equal(column(many, "class"), column(many, "shape") + 10 * column(many, "color"))
    assert column(many, "class").max() < 57


def test_objects_of_a_picture_are_of_different_classes_where_there_are_enough():
    layout = crowd(100)
    assert all(len(set(row)) == 4 for row in layout.category.tolist())
    assert crowd(10, classes=2).category.max() == 1


def test_shapes_colors_and_textures_can_be_told_apart():
    n = len(SHAPES)
    for angle in (0.0, 0.2, np.pi / 3):
        masks = np.zeros((n, 32, 32), bool)
        found = covered(np.arange(n), *(np.full(n, value) for value in (0.5, 0.5, 0.3, angle)), 32)
        masks[found.of, found.row, found.column] = True
        union = (masks[:, None] | masks).sum((2, 3))
        overlap = (masks[:, None] & masks).sum((2, 3)) / union
        assert (overlap[~np.eye(n, dtype=bool)] < 0.85).all()


# ---- domains --------------------------------------------------------------------------------------------------------


def test_no_domain_maps_a_color_onto_another():
    for seed in range(5):
        style = styles(seed, 20, SHIFTS, 1.0)
        hue, saturation, value = colors_of(np.arange(len(COLORS)))
        plain = rgb(hue, saturation, value)
        for domain in range(20):
            shifted = rgb(hue + style.hue[domain], saturation * style.saturation[domain], value * style.value[domain])
            distance = np.linalg.norm(_without_brightness(shifted)[:, None] - _without_brightness(plain), axis=2)
            dark = value[:, None] < 0.5
            distance += 10 * (dark != dark.T)  # brown is told from orange by its brightness
            assert (distance.argmin(axis=1) == np.arange(len(COLORS))).all()
        assert (value * style.value.min())[value > 0.5].min() > value.min() * 1.2


def _without_brightness(colors):
    """The color's direction: what hue and saturation make of white."""
    return colors / colors.max(axis=-1, keepdims=True)


@pytest.mark.parametrize("kind", SHIFTS)
def test_domains_differ_in_what_is_shifted_and_in_nothing_else(kind):
    neutral, shifted = styles(0, 4, (), 1.0), styles(0, 4, (kind,), 1.0)
    touched = {
        "palette": {"hue", "saturation", "value", "colors", "backdrop_spread", "backdrop_value"},
        "texture": {"textures"},
        "background": {"backgrounds"},
        "blur": {"blur"},
        "rotation": {"rotation"},
        "wording": {"dialect", "wording"},
    }[kind]
    differ = {name for name, values in vars(shifted).items() if not np.array_equal(values, vars(neutral)[name])}
    assert differ == touched
    assert all(len(np.unique(vars(shifted)[name], axis=0)) > 1 for name in touched - {"backdrop_spread", "wording"})


def test_a_domains_style_does_not_depend_on_how_many_there_are():
    few, many = styles(3, 2, SHIFTS, 0.7), styles(3, 9, SHIFTS, 0.7)
    assert all(np.array_equal(values, vars(many)[name][:2]) for name, values in vars(few).items())


def test_without_strength_all_domains_are_alike():
    assert all(
        (values == values[:1]).all() for name, values in vars(styles(0, 5, SHIFTS, 0.0)).items() if name not in ("backdrop_hue", "dialect")
    )
    assert styles(0, 5, SHIFTS, 0.0).wording.max() == 0


def test_full_strength_gives_each_domain_its_textures_and_backgrounds():
    pool = made(domains=5, shift_strength=1.0, fields=FIELDS, examples=200)
    environment, table = pool.train.fields["environment"], pool.train.fields["objects"]
    preferred = [column(table[environment == domain], "texture")[:, 0].unique().tolist() for domain in range(5)]
    assert sorted(preferred) == [[number] for number in range(len(TEXTURES))]
    kinds = styles(0, 5, SHIFTS, 1.0).backgrounds.argmax(axis=1)
    assert sorted(kinds) == list(range(len(BACKGROUNDS)))


def test_a_single_domain_is_not_shifted_and_has_no_environment():
    plain, shifted = made(draw_seed=1, shift=()), made(draw_seed=1, shift=("palette", "blur"), shift_strength=1.0)
    assert same(plain.train, shifted.train)
    assert "environment" not in plain.train


def test_the_test_set_has_all_domains_or_one_of_its_own():
    mixed, held = made(domains=3), made(domains=3, held_out=True)
    assert mixed.test.fields["environment"].unique().tolist() == [0, 1, 2]
    assert held.test.fields["environment"].unique().tolist() == [3]
    assert held.train.fields["environment"].unique().tolist() == [0, 1, 2]
    assert made(held_out=True).train.fields["environment"].unique().tolist() == [0]


def test_a_domain_looks_the_same_whether_or_not_another_is_held_out():
    assert same(made(domains=3, draw_seed=2).train, made(domains=3, draw_seed=2, held_out=True).train)


def test_domains_make_silos_and_labels_make_skewed_partitions():
    pool = made(domains=4)
    silos = deal("scenes", pool, by_environment, {}, 0.0, rng())
    assert isinstance(silos, FederatedData) and silos.num_clients == 4
    assert all(len(silos.train[i].fields["environment"].unique()) == 1 for i in range(4))
    skewed = deal(
        "scenes", pool, partitions.find("pathological"), {"clients": 5, "classes_per_client": 2, "assignment": "random"}, 0.0, rng()
    )
    assert all(len(skewed.train[i].label.unique()) == 2 for i in range(5))


# ---- difficulty -----------------------------------------------------------------------------------------------------


def test_noise_and_clutter_change_pixels_by_what_they_say():
    plain, noisy = (made(draw_seed=1, noise=noise).train.image.double() for noise in (0.0, 0.1))
    middle = (plain > 80) & (plain < 175)
    assert (noisy - plain)[middle].std().item() == pytest.approx(0.1 * 255, rel=0.05)
    layout = crowd(scraps=10)
    tidy = replace(layout, scraps=layout.scraps[:, :0])
    assert (np.abs(background(layout, 32) - background(tidy, 32)).max(axis=1) > 0.05).mean() > 0.05


def test_clutter_is_no_object():
    layout = crowd(scraps=10)
    assert np.array_equal(draw(layout, 32).owner, draw(replace(layout, scraps=layout.scraps[:, :0]), 32).owner)


def test_the_number_of_objects_is_as_asked():
    for fewest, most in ((1, 1), (2, 3), (4, 4)):
        counts = column(made(objects=(fewest, most), fields=FIELDS, examples=200).train.fields["objects"], "present").sum(1)
        assert counts.unique().tolist() == list(range(fewest, most + 1))


def test_blur_keeps_the_mean_and_leaves_sharp_pictures_alone():
    image = rng().random((3, 3, 16, 16))
    image[:, :, :, :4] = image[:, :, :, -4:] = image[:, :, :4] = image[:, :, -4:] = 0.5
    soft = blurred(image, np.array([0.0, 0.5, 1.2]))
    np.testing.assert_allclose(soft[0], image[0])
    np.testing.assert_allclose(soft.mean((2, 3)), image.mean((2, 3)), atol=1e-3)
    assert image[1].std() > soft[1].std() > soft[2].std()


# ---- captions -------------------------------------------------------------------------------------------------------


def spoken(**settings):
    """Captions in plain words, with their rows of the objects' table that may be mentioned, in shares of the picture's side."""
    train = made(**CROWDED | {"examples": 150, "wordings": 8} | settings).train
    back = {word: plain for dialect in DIALECTS for plain, word in dialect.items()}
    pattern = re.compile(r"\b(" + "|".join(sorted(map(re.escape, back), key=len, reverse=True)) + r")\b")
    for texts, table in zip(decode_texts(train.fields["caption"]), train.fields["objects"], strict=True):
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in table.tolist() if row[COLUMNS.index("visible")] >= MENTIONED]
        things = [
            {
                "shape": list(SHAPES)[int(row["shape"])],
                "color": list(COLORS)[int(row["color"])],
                "texture": TEXTURES[int(row["texture"])],
                "size": size_word(row["radius"] / 32),
                **{name: row[name] / 32 for name in ("x", "y", "radius")},
                "depth": row["depth"],
            }
            for row in rows
        ]
        yield [pattern.sub(lambda found: back[found[0]], text) for text in texts], things


WORDS = {
    "shape": "|".join(SHAPES),
    "color": "|".join(COLORS),
    "texture": "|".join(TEXTURES),
    "size": "small|medium|large",
}
THING = (
    r"(?:(?P<size>{size}) )?(?P<color>{color})? ?(?:(?P<texture>{texture}) )?(?P<shape>{shape})"
    r"(?: that is (?P<color_>{color}) and (?P<texture_>{texture})|, (?P<size_>{size}) and (?P<color__>{color}))?"
)
THING_RE = re.compile(THING.format(**WORDS))
RELATIONS = {
    "to the left of": lambda a, b: a["x"] < b["x"] - 0.1,
    "to the right of": lambda a, b: a["x"] > b["x"] + 0.1,
    "above": lambda a, b: a["y"] < b["y"] - 0.1,
    "below": lambda a, b: a["y"] > b["y"] + 0.1,
    "in front of": lambda a, b: a["depth"] < b["depth"],
    "behind": lambda a, b: a["depth"] > b["depth"],
    "nearer than": lambda a, b: a["depth"] < b["depth"],
    "larger than": lambda a, b: a["radius"] > b["radius"],
}


def named(text):
    """What a part of a caption says of each thing it mentions."""
    return [{key.rstrip("_"): word for key, word in found.groupdict().items() if word} for found in THING_RE.finditer(text)]


def fits(said, thing):
    return all(thing[key] == word for key, word in said.items())


def test_everything_that_a_caption_names_is_there():
    mentions = 0
    for texts, things in spoken():
        for text in texts:
            if not text.startswith(("the", "something", "what")):
                assert named(text), text
            for said in named(text):
                assert any(fits(said, thing) for thing in things), (text, things)
                mentions += len(said)
    assert mentions > 2000


def test_every_relation_in_a_caption_holds():
    seen = set()
    for texts, things in spoken():
        for text in texts:
            for relation, holds in RELATIONS.items():
                if f" {relation} " not in text:
                    continue
                before, after = text.split(f" {relation} ")
                one, other = named(before)[-1], named(after)[0]
                assert any(fits(one, a) and fits(other, b) and holds(a, b) for a in things for b in things if a is not b), (text, things)
                seen.add(relation)
    assert seen == set(RELATIONS)


def test_a_single_object_is_described_truthfully():
    for texts, [thing] in spoken(objects=(1, 1), wordings=8):
        words = set(re.findall(r"\w+", " ".join(texts)))
        for key in ("shape", "color", "size", "texture"):
            others = set(WORDS[key].split("|")) - {thing[key]}
            assert thing[key] in words and not words & others


def test_captions_have_the_wordings_asked_for_and_they_differ():
    for wordings in (1, 5, len(WORDINGS)):
        texts = decode_texts(made(**CROWDED | {"wordings": wordings}).train.fields["caption"])
        assert all(len(set(some)) == wordings for some in texts)


def test_hidden_objects_are_not_mentioned():
    for texts, things in spoken():
        inventory = next(text for text in texts if " of a" in text and "picture" in text)
        assert len(named(inventory)) == len(things)


def test_domains_speak_in_dialects_and_still_tell_the_truth():
    shifted = {"domains": 4, "shift": ("wording",), "shift_strength": 1.0}
    train = made(**CROWDED | shifted).train
    texts = np.array([" ".join(some) for some in decode_texts(train.fields["caption"])])
    own = [set(" ".join(texts[(train.fields["environment"] == domain).numpy()]).split()) for domain in range(4)]
    marks = ({"large", "red"}, {"disk", "big"}, {"crimson", "golden"}, {"photo", "huge"})
    for mark in marks:
        assert sum(mark <= words for words in own) == 1
    for told, things in spoken(**shifted):
        assert all(any(fits(said, thing) for thing in things) for text in told for said in named(text))


def test_every_word_of_every_text_is_one_token_of_the_bundled_vocabulary():
    pieces, said = WordPiece.of_file("scenes"), set()
    for strength in (0.0, 1.0):
        settings = {"examples": 600, "domains": 4, "shift": ("wording",), "shift_strength": strength, "wordings": len(WORDINGS)}
        train = made(**CROWDED | settings).train
        for field in (field for field in TEXTS if field in train):
            said |= {text for texts in decode_texts(train.fields[field].flatten(1, -2)) for text in texts}
    words = {word for text in said for kind in (text, cleaned_caption(text)) for word in words_of(kind)}
    assert len(words) > 80 and words <= set(pieces.words)
    whole = {word for word in pieces.words if len(word.removeprefix("##")) > 1} - set(SPECIAL)
    assert whole <= words  # and it has no others
