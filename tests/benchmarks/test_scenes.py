"""The picture of scenes in the documentation, and what measures how fast they are drawn."""

import os

from benchmarks import figures_scenes
from benchmarks.speed import scenes


def test_the_picture_shows_domains_and_maps_with_captions():
    above, below = figures_scenes.picture().subfigs
    [domains] = above.axes
    assert [tick.get_text() for tick in domains.get_yticklabels()] == [f"domain {i}" for i in range(5)]
    assert domains.get_xticklabels()[9].get_text() == "9: hourglass"
    assert all(panel.get_xlabel().count("“") == 3 for panel in below.axes)


def test_the_speed_is_measured_without_the_cache(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("FEDVISION_CACHE", str(tmp_path))
    monkeypatch.setattr(scenes, "PIXELS", 20_000)
    monkeypatch.setattr(scenes, "SIZES", (32,))
    scenes.main()
    assert "32 x 32" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert os.environ["FEDVISION_CACHE"] == str(tmp_path)
