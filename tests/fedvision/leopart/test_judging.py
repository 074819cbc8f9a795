"""Features of patches are judged by what is found with them; labels choose nothing, unless they are asked to."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedvision.data.examples import IGNORED
from fedvision.errors import DataError, ExperimentError
from fedvision.leopart.clusters import clustered, resized
from fedvision.leopart.communities import linked
from fedvision.leopart.judging import Discovery, Judging, JudgingTable, judged, judging_of
from fedvision.leopart.masks import mean_boundary_f1
from fedvision.leopart.matching import by_assignment, by_precision, counted
from fedvision.settings import check, resolve

SETTINGS = Judging(
    clusters=(12, 6),
    seeds=2,
    restarts=2,
    iterations=20,
    dimensions=6,
    size=16,
    foreground_clusters=8,
    community_clusters=6,
    link_threshold=0.25,
    markov_time=1.0,
    modules=0,
    community_seeds=2,
)
CLASSES, SIDE = 4, 8


def scene(rng, images=12):
    """Objects of three classes, each of two halves that differ, on a background: features, attention, true classes."""
    semseg, parts = np.zeros((images, SIDE, SIDE), int), np.zeros((images, SIDE, SIDE), int)
    for i in range(images):
        top, left, kind = *rng.integers(0, SIDE - 4, 2), 1 + i % 3
        semseg[i, top : top + 4, left : left + 4] = kind
        parts[i, top : top + 4, left : left + 4] = 2 * kind - 1 + (np.arange(4) > 1)
    tokens = np.eye(7)[parts] * 8 + rng.normal(size=(images, SIDE, SIDE, 7)) * 0.3
    attention = (semseg > 0) & (rng.random(semseg.shape) < 0.7)
    enlarged = semseg.repeat(2, 1).repeat(2, 2)
    return torch.from_numpy(tokens).float(), torch.from_numpy(attention), torch.from_numpy(enlarged.astype(np.uint8))


@pytest.fixture
def scenes():
    return scene(np.random.default_rng(0))


def found(scenes, settings=SETTINGS):
    tokens, attention, semseg = (each.numpy() for each in scenes)
    return Discovery(tokens, attention, semseg.astype(int), CLASSES, settings)


# ---- what is measured -----------------------------------------------------------------------------------------------


def test_features_that_say_what_is_where_find_it(scenes):
    scores = judged(*scenes, CLASSES, SETTINGS)
    assert list(scores) == [
        "overclustering_12",
        "overclustering_6",
        "clusters_miou",
        "cbfe_miou",
        "communities_miou",
        "attention_jaccard",
        "attention_boundary_f1",
        "cbfe_jaccard",
        "cbfe_boundary_f1",
    ]
    assert scores["overclustering_12"] == 1.0 and scores["communities_miou"] == 1.0
    assert scores["cbfe_jaccard"] == scores["cbfe_boundary_f1"] == 1.0
    assert 0.5 < scores["attention_jaccard"] < 0.8
    assert scores["clusters_miou"] < scores["communities_miou"], "objects have two parts, classes one cluster"


def test_features_of_nothing_find_little(scenes):
    tokens, attention, semseg = scenes
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))
    scores = judged(noise, attention, semseg, CLASSES, SETTINGS)
    assert all(scores[name] < 0.4 for name in ("overclustering_12", "clusters_miou", "cbfe_miou", "communities_miou", "cbfe_jaccard"))


def test_the_same_features_are_judged_alike(scenes):
    assert judged(*scenes, CLASSES, SETTINGS) == judged(*scenes, CLASSES, SETTINGS)


def test_miou_is_the_mean_over_the_seeds(scenes):
    tokens = scenes[0] + 2 * torch.randn(scenes[0].shape, generator=torch.Generator().manual_seed(1))
    one, both = (found((tokens, *scenes[1:]), replace(SETTINGS, seeds=number)) for number in (1, 2))
    points = both.points.reshape(-1, both.points.shape[-1])
    truth = resized(both.semseg, 16, 16)
    single = []
    for seed in range(2):
        maps = resized(clustered(points, 5, seed, 2, 20).reshape(12, SIDE, SIDE), 16, 16)
        single.append(by_precision(counted(truth, maps, CLASSES, 5)))
    assert single[0] != single[1], "another seed finds other clusters"
    assert one.overclustering(5) == single[0] and both.overclustering(5) == pytest.approx(np.mean(single))


def test_parts_of_an_object_are_one_community(scenes):
    one = found(scenes)
    objects = resized(one.semseg, SIDE, SIDE)
    groups = one.communities(1)[one.parts]
    assert len({(kind, group) for kind, group in zip(objects.ravel(), groups.ravel(), strict=True)}) == CLASSES
    assert len(np.unique(one.parts[objects == 1])) > 1


def test_the_background_is_one_of_the_neighbors(scenes):
    one = found(scenes)
    assert one.neighbors.shape == (7, 7) and one.neighbors[6].sum() == pytest.approx(1.0)
    assert (one.parts[~one.foreground] == 6).all() and (one.parts[one.foreground] < 6).all()


def test_boundaries_are_as_near_as_a_share_of_the_side(scenes):
    tokens, attention, semseg = scenes
    wide, narrow = (judged(tokens, attention, semseg, CLASSES, replace(SETTINGS, boundary=share)) for share in (0.5, 0.06))
    assert wide["attention_boundary_f1"] > narrow["attention_boundary_f1"]
    large = semseg.repeat_interleave(2, 1).repeat_interleave(2, 2)
    scores = judged(tokens, attention, large, CLASSES, replace(SETTINGS, boundary=0.1))
    wanted = mean_boundary_f1(large.numpy() > 0, resized(attention.numpy(), 32, 32), 3.2)
    assert scores["attention_boundary_f1"] == pytest.approx(wanted)


def test_the_foreground_is_clustered_into_one_fewer_than_the_classes(scenes):
    one = found(scenes)
    wanted = [by_assignment(one.counts(one.clustered_foreground(CLASSES - 1, seed), CLASSES, one.judged)) for seed in range(2)]
    assert one.cbfe_miou == pytest.approx(np.mean(wanted))
    assert one.cbfe_miou != pytest.approx(by_assignment(one.counts(one.clustered_foreground(CLASSES, 0), CLASSES + 1, one.judged)))


def test_communities_are_sought_with_every_seed(scenes, monkeypatch):
    seeds = []
    monkeypatch.setattr(Discovery, "communities", lambda self, seed: seeds.append(seed) or np.zeros(7, int))
    assert found(scenes, replace(SETTINGS, community_seeds=3)).communities_miou > 0 and seeds == [1, 2, 3]


# ---- labels ---------------------------------------------------------------------------------------------------------


def test_without_calibration_labels_choose_nothing(scenes):
    tokens, attention, semseg = scenes
    other = semseg.flip(0).roll(3, 1)
    for settings in (SETTINGS, replace(SETTINGS, link_threshold=0.0)):
        one, two = (found((tokens, attention, labels), settings) for labels in (semseg, other))
        assert (one.foreground == two.foreground).all() and one.link == two.link
        assert (one.communities(1) == two.communities(1)).all() and one.judged.all()


def test_with_calibration_labels_choose_and_are_not_judged(scenes):
    one = found(scenes, replace(SETTINGS, calibration=0.4))
    assert one.calibrating.sum() == 4 and (one.judged == ~one.calibrating).all()
    assert one.link[1] in {0.4, 1.0, 2.0}
    assert one.communities_miou > 0.9


def test_labels_that_choose_change_what_is_found(scenes):
    tokens, attention, semseg = scenes
    settings = replace(SETTINGS, calibration=0.4)
    upside = torch.where(semseg == 0, 1, 0).to(semseg.dtype)
    assert (found(scenes, settings).foreground != found((tokens, attention, upside), settings).foreground).any() or (
        found(scenes, settings).link != found((tokens, attention, upside), settings).link
    )


def test_the_labels_of_judged_images_choose_nothing(scenes):
    tokens, attention, semseg = scenes
    settings = replace(SETTINGS, calibration=0.4)
    one = found(scenes, settings)
    changed = semseg.clone()
    changed[torch.from_numpy(one.judged)] = 1
    two = found((tokens, attention, changed), settings)
    assert (one.foreground == two.foreground).all() and one.link == two.link


def test_clusters_are_foreground_where_attention_marks_them_in_the_same_images(scenes):
    tokens, attention, semseg = scenes
    settings = replace(SETTINGS, calibration=0.4)
    known = torch.from_numpy(found(scenes, settings).calibrating)
    one = found((tokens, attention & known[:, None, None], semseg), settings)
    assert one.foreground[known].any() and not one.foreground[~known].any()


def test_too_few_labels_to_share_choose_nothing(scenes):
    tokens, attention, semseg = scenes
    assert judged(tokens[:2], attention[:2], semseg[:2], CLASSES, replace(SETTINGS, calibration=0.4)) == judged(
        tokens[:2], attention[:2], semseg[:2], CLASSES, SETTINGS
    )


def test_links_can_be_chosen_by_the_number_of_classes(scenes):
    one = found(scenes, replace(SETTINGS, link_threshold=0.0))
    threshold, markov_time = one.link
    assert markov_time == 1.0 and threshold > 0 and len(linked(one.neighbors, threshold)[0])
    assert one.communities_miou > 0.9


# ---- what is missing ------------------------------------------------------------------------------------------------


def test_images_of_which_nothing_is_known_are_not_judged(scenes):
    tokens, attention, semseg = scenes
    unknown = semseg.clone()
    unknown[:5] = IGNORED
    one = found((tokens, attention, unknown))
    assert one.judged.tolist() == [False] * 5 + [True] * 7
    assert judged(tokens, attention, torch.full_like(semseg, IGNORED), CLASSES, SETTINGS) == {}
    assert judged(tokens[:0], attention[:0], semseg[:0], CLASSES, SETTINGS) == {}


def test_attention_that_looks_nowhere_finds_no_foreground(scenes):
    tokens, attention, semseg = scenes
    scores = judged(tokens, torch.zeros_like(attention), semseg, CLASSES, SETTINGS)
    assert scores["cbfe_jaccard"] == scores["attention_jaccard"] == scores["cbfe_boundary_f1"] == 0
    background = (semseg == 0).float().mean()
    assert scores["communities_miou"] == scores["cbfe_miou"] == pytest.approx(float(background) / CLASSES)


def test_where_there_is_no_foreground_and_none_is_found_nothing_is_said_of_it(scenes):
    tokens, attention, semseg = scenes
    scores = judged(tokens, torch.zeros_like(attention), torch.zeros_like(semseg), CLASSES, SETTINGS)
    assert not [name for name in scores if "jaccard" in name or "boundary" in name]
    assert scores["cbfe_miou"] == 1 / CLASSES


def test_fewer_patches_than_clusters_are_judged_all_the_same(scenes):
    tokens, attention, semseg = scenes
    scores = judged(tokens[:1, :2, :2], attention[:1, :2, :2], semseg[:1], CLASSES, replace(SETTINGS, clusters=(500,)))
    assert all(0 <= value <= 1 for value in scores.values()) and "overclustering_500" in scores


def test_features_that_are_all_the_same_are_judged_all_the_same(scenes):
    tokens, attention, semseg = scenes
    scores = judged(torch.ones_like(tokens), attention, semseg, CLASSES, SETTINGS)
    assert scores["clusters_miou"] == pytest.approx(float((semseg == 0).float().mean()) / CLASSES)


def test_one_class_is_background(scenes):
    tokens, attention, semseg = scenes
    assert judged(tokens, attention, torch.zeros_like(semseg), 1, SETTINGS)["clusters_miou"] == 1.0


def test_features_that_are_not_finite_are_refused(scenes):
    with pytest.raises(DataError, match="not finite"):
        judged(scenes[0] * torch.nan, *scenes[1:], CLASSES, SETTINGS)


def test_shapes_that_do_not_belong_together_are_refused(scenes):
    tokens, attention, semseg = scenes
    with pytest.raises(DataError, match=r"\[12, 8, 8, 7\] and \[12, 4, 8\] and \[12, 16, 16\], with 4 classes; give"):
        judged(tokens, attention[:, :4], semseg, CLASSES, SETTINGS)
    with pytest.raises(DataError, match="with 0 classes"):
        judged(*scenes, 0, SETTINGS)


def test_a_class_beyond_those_that_there_are_is_refused(scenes):
    with pytest.raises(DataError, match=r"maps hold the class 3, beyond 0\.\.2 and 255; raise learner\.semantic_classes"):
        judged(*scenes, 3, SETTINGS)


def test_features_of_half_precision_are_taken(scenes):
    tokens, attention, semseg = scenes
    assert judged(tokens.bfloat16(), attention, semseg, CLASSES, SETTINGS)["communities_miou"] == 1.0


# ---- settings -------------------------------------------------------------------------------------------------------


def test_settings_are_those_of_the_paper_unless_others_are_given():
    assert Judging().clusters == (500, 300, 100) and (Judging().foreground_clusters, Judging().community_clusters) == (200, 149)
    assert (Judging().link_threshold, Judging().markov_time, Judging().modules, Judging().calibration) == (0.09, 2.0, 20, 0.0)
    assert Judging().boundary * 448 == 16


def test_settings_are_checked():
    assert Judging(**resolve(Judging, {"clusters": [8], "calibration": 0.2}, "learner.judging")).clusters == (8,)
    for wrong in ({"calibration": 1.0}, {"clusters": [0]}, {"markov_time": 0.0}, {"link_threshold": 1.5}, {"kmeans": 3}):
        with pytest.raises(ExperimentError, match=r"learner\.judging\."):
            resolve(Judging, wrong, "learner.judging")


def test_settings_are_a_table_of_an_experiment():
    assert judging_of({"clusters": [8], "seeds": 3}) == Judging(clusters=(8,), seeds=3)
    assert check({"seeds": 3}, JudgingTable, "learner.judging") == {"seeds": 3}
    with pytest.raises(ExperimentError, match=r"learner\.judging\.seeds = 0"):
        check({"seeds": 0}, JudgingTable, "learner.judging")
