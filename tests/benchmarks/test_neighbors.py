"""The instrument of neighbors: its ways count the same. Nothing here is timed."""

import pytest

from benchmarks.speed.neighbors import BY_IMAGE, BY_PIXEL, OURS, WAYS, interleaved, main, markdown, random_maps


@pytest.mark.parametrize("name", [BY_IMAGE, BY_PIXEL])
def test_the_plain_ways_count_what_ours_counts(name):
    maps = random_maps(3, 5, 4)
    assert WAYS[name](maps, 5) == pytest.approx(WAYS[OURS](maps, 5), abs=1e-12)


def test_the_first_repeat_is_not_counted():
    calls = []
    times = interleaved({OURS: lambda maps, number: calls.append(number)}, random_maps(1, 2, 3), 3, 4)
    assert calls == [3] * 5 and len(times[OURS]) == 4


def test_ratios_are_those_of_the_same_repeat():
    lines = markdown({OURS: [1.0, 2.0], BY_IMAGE: [3.0, 4.0]}, "tiny").splitlines()
    assert lines[2] == "| all images at once | 1.500 | 1.0 | 1.0 to 1.0 |" and lines[3] == "| image by image | 3.500 | 2.5 | 2.0 to 3.0 |"


def test_the_command_prints_both_tables(capsys):
    main(["--images", "4", "--side", "5", "--clusters", "6", "--small", "2", "--repeats", "1"])
    shown = capsys.readouterr().out
    assert "| 2 images of 5 x 5, 6 clusters |" in shown and "| 4 images of 5 x 5, 6 clusters |" in shown and "pixel by pixel" in shown
