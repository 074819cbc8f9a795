"""Pictures of classes, foreground and parts show what is found."""

from dataclasses import replace

import numpy as np
import pytest

from fedvision.colors import NOTHING, palette
from fedvision.data.examples import IGNORED
from fedvision.gallery import enlarged
from fedvision.leopart.communities import linked
from fedvision.leopart.judging import Discovery, Judging
from fedvision.leopart.pictures import (
    BACKGROUND,
    DARK,
    SIDE,
    classes_found,
    community_colors,
    drawn,
    foreground,
    galleries,
    in_pictures,
    layout,
    matched,
    neighboring_parts,
)

SETTINGS = Judging(size=16, dimensions=6, foreground_clusters=6, community_clusters=4, link_threshold=0.3, markov_time=1.0, modules=0)
COLORS = np.array([BACKGROUND, *palette()[:2]], np.uint8)


@pytest.fixture
def discovery():
    """Four images of two objects, each of two halves, that features tell apart; attention looks at them."""
    rng = np.random.default_rng(0)
    semseg, parts = np.zeros((4, 8, 8), int), np.zeros((4, 8, 8), int)
    for i in range(4):
        semseg[i, 1:5, 2:6] = 1 + i % 2
        parts[i, 1:5, 2:6] = 1 + 2 * (i % 2) + (np.arange(4) > 1)
    tokens = np.eye(5)[parts] * 8 + rng.normal(size=(4, 8, 8, 5)) * 0.2
    return Discovery(tokens, semseg > 0, semseg.repeat(2, 1).repeat(2, 2), 3, SETTINGS)


@pytest.fixture
def pictures():
    return list(np.random.default_rng(1).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8))


def test_there_are_three_galleries(pictures, discovery):
    assert list(galleries(pictures, discovery)) == ["classes-found", "foreground", "neighboring-parts"]


def test_classes_have_the_same_color_wherever_they_are_found(pictures, discovery):
    gallery = classes_found(pictures, discovery)
    assert gallery.columns == ["picture", "truth", "clusters", "in the foreground", "communities"]
    for picture, truth, row in zip(pictures, discovery.semseg, gallery.pictures, strict=True):
        assert (row[0] == enlarged(picture)).all()
        assert (row[1] == COLORS[truth].repeat(9, 0).repeat(9, 1)).all()
        assert (row[4] == row[1]).all(), "communities are the objects"
        assert row[2].shape == row[3].shape == row[0].shape


def test_what_is_not_known_has_a_color_of_its_own(pictures, discovery):
    unknown = discovery.semseg.copy()
    unknown[0] = IGNORED
    assert (classes_found(pictures, replace(discovery, semseg=unknown)).pictures[0][1] == NOTHING).all()


def test_without_any_class_clusters_are_shown_as_they_are(pictures, discovery):
    unknown = replace(discovery, semseg=np.full_like(discovery.semseg, IGNORED))
    assert (matched(unknown, unknown.parts, 5) == unknown.parts).all()
    assert not any(note for row in foreground(pictures, unknown).notes for note in row)


def test_the_foreground_is_as_it_was_and_the_rest_is_dark(pictures, discovery):
    gallery = foreground(pictures, discovery)
    for i, row in enumerate(gallery.pictures):
        whole, inside = enlarged(pictures[i]), (discovery.semseg[i] > 0).repeat(9, 0).repeat(9, 1)
        for shown in row[1:]:
            assert (shown[inside] == whole[inside]).all()
            assert (shown[~inside] == (DARK * whole[~inside]).astype(np.uint8)).all()
    assert gallery.notes[0] == ["", "100%", "100%", ""]


def test_linked_parts_are_drawn_in_the_colors_of_their_communities(pictures, discovery):
    gallery = neighboring_parts(pictures, discovery)
    network, beside = gallery.pictures[0]
    groups = discovery.communities(1)
    assert network.shape == (SIDE, SIDE, 3) and beside.shape[0] == SIDE
    there = {tuple(color) for color in network.reshape(-1, 3).tolist()}
    linked_ = np.unique(linked(discovery.neighbors, discovery.link[0])[0])
    assert {tuple(color) for color in community_colors(groups[linked_]).tolist()} <= there
    assert f"{len(linked_)} of 5 parts are linked" in gallery.caption


def test_without_a_link_no_network_is_drawn(pictures, discovery):
    alone = replace(discovery, settings=replace(SETTINGS, link_threshold=1.0))
    assert neighboring_parts(pictures, alone) is None and list(galleries(pictures, alone)) == ["classes-found", "foreground"]


def test_communities_stand_beside_their_pictures():
    pictures = [np.full((8, 8, 3), 99, np.uint8)]
    shown = in_pictures(pictures, np.array([[[1, 0], [2, 2]]]))
    side = SIDE // 3
    assert (shown[:150, :150] == 99).all()
    assert shown[10, side + 10].tolist() == palette()[0].tolist() and tuple(shown[10, -20].tolist()) == BACKGROUND
    assert shown[side - 20, side + 10].tolist() == palette()[1].tolist() and (shown[side:] == 255).all()


def test_a_color_is_a_community_and_no_community_is_dark():
    colors = community_colors(np.array([[0, 1], [2, 256]]))
    assert colors.dtype == np.uint8 and tuple(colors[0, 0]) == BACKGROUND
    assert (colors[0, 1] == palette()[0]).all() and (colors[1, 0] == palette()[1]).all() and (colors[1, 1] == palette()[0]).all()


def test_linked_nodes_are_near_each_other():
    links = np.array([[0, 1], [0, 2], [1, 2], [3, 4], [3, 5], [4, 5]])
    network, groups = (links, np.ones(6)), np.array([1, 1, 1, 2, 2, 2, 0])
    places = layout(network, groups)
    distances = np.linalg.norm(places[:, None] - places, axis=2)
    assert distances[tuple(links.T)].max() < distances[:3, 3:6].min()
    assert (places >= 0).all() and (places <= 1).all() and (places == layout(network, groups)).all()


def test_the_square_is_the_node_that_it_is_asked_to_be():
    network, groups, sizes = (np.array([[0, 1]]), np.ones(1)), np.array([1, 1]), np.array([4, 4])
    left = int(layout(network, groups)[:, 0].argmin())
    for square in (0, 1):
        halves = np.array_split(drawn(network, groups, sizes, square), 2, axis=1)
        areas = [int((half == palette()[0]).all(-1).sum()) for half in halves]
        assert (areas[0] > areas[1]) == (square == left), "a square is larger than a circle as wide"
