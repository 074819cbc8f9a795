"""The cache on disk: computed once, and never worse than no cache."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

from fedvision.cache import VARIABLE, cache_folder, cached


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


class Maker:
    """Counts how often it is asked."""

    def __init__(self, value=1.0):
        self.calls, self.value = 0, value

    def __call__(self):
        self.calls += 1
        return {"b": torch.full((3, 2), self.value).t(), "a": torch.arange(4, dtype=torch.uint8)[1:], "none": torch.zeros(0, 3)}


def same(one, other):
    return list(one) == list(other) and all(torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one)


def test_a_result_is_made_once_and_read_afterwards(folder):
    make = Maker()
    first, second = cached("toy", {"n": 3, "kinds": ("a", "b")}, make), cached("toy", {"kinds": ["a", "b"], "n": 3}, make)
    assert make.calls == 1
    assert same(first, second)
    assert all(tensor.is_contiguous() for tensor in (*first.values(), *second.values()))
    assert [file.suffix for file in folder.iterdir()] == [".safetensors"]


@pytest.mark.parametrize(("kind", "key"), [("other", {"n": 3}), ("toy", {"n": 4}), ("toy", {"n": 3, "m": None})])
def test_another_kind_or_key_is_another_result(folder, kind, key):
    make = Maker()
    cached("toy", {"n": 3}, make)
    cached(kind, key, make)
    assert make.calls == 2


def test_a_key_that_json_cannot_express_is_refused(folder):
    with pytest.raises(TypeError):
        cached("toy", {"n": object()}, Maker())


@pytest.mark.parametrize("damage", [b"", b"nonsense", "half", "flip"])
def test_a_damaged_file_is_made_anew(folder, damage, caplog):
    make = Maker()
    first = cached("toy", {}, make)
    [file] = folder.iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    broken = {"half": bytes(content[: len(content) // 2]), "flip": bytes(content)}.get(damage, damage)
    file.write_bytes(broken)
    with caplog.at_level(logging.WARNING):
        assert same(cached("toy", {}, make), first)
    assert "it is made anew" in caplog.text
    assert same(cached("toy", {}, make), first)
    assert make.calls == 2


def test_a_folder_that_cannot_be_written_costs_a_warning_only(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "cache"))
    make = Maker()
    with caplog.at_level(logging.WARNING):
        assert same(cached("toy", {}, make), cached("toy", {}, make))
    assert make.calls == 2
    assert "going on without" in caplog.text


def test_a_failed_write_leaves_nothing_behind(folder, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"a part")
        raise OSError("no space left on device")

    monkeypatch.setattr("fedvision.cache.save_file", full)
    cached("toy", {}, Maker())
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("value", ["", "off"])
def test_it_can_be_switched_off(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, value)
    make = Maker()
    assert same(cached("toy", {}, make), cached("toy", {}, make))
    assert make.calls == 2
    assert list(tmp_path.iterdir()) == []


def test_it_lies_in_the_users_cache_folder_by_default(monkeypatch):
    monkeypatch.delenv(VARIABLE)
    assert cache_folder() == Path.home() / ".cache" / "fedvision"
    monkeypatch.setenv(VARIABLE, "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"


def test_the_tests_do_not_write_to_the_users_home():
    assert Path.home() not in cache_folder().parents


def test_tensors_that_share_memory_are_kept_apart(folder):
    shared = torch.arange(6)

    def make():
        return {"whole": shared, "again": shared, "part": shared[2:]}

    made, read = cached("toy", {}, make), cached("toy", {}, make)
    assert same(made, read)
    assert read["part"].tolist() == [2, 3, 4, 5]


def test_two_that_make_the_same_at_once_do_not_disturb_each_other(folder):
    both = Barrier(2, timeout=30)

    def make():
        both.wait()  # neither has found a file
        return Maker(7.0)()

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: cached("toy", {}, make), range(2))
    assert same(one, other)
    assert len(list(folder.iterdir())) == 1
    assert same(cached("toy", {}, Maker(0.0)), one)
