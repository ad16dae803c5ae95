"""Slow files are made once, by one process, and made anew when what they hang on changes."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from edgetube import cache
from edgetube.errors import BackendError

KEY = {"graph": "abc", "TensorRT": "10.3.0", "GPU": "Orin (8.7)"}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGETUBE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Maker:
    """Writes its number and keeps the reasons that it was told."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def __call__(self, path: Any, reason: Any) -> None:
        self.reasons.append(reason)
        path.write_bytes(b"engine %d" % len(self.reasons))


def test_made_once_and_found_again(place: Path) -> None:
    make = Maker()
    first = cache.make_once("demo", ".engine", KEY, make)
    again = cache.make_once("demo", ".engine", KEY, make)
    assert first.path == again.path
    assert first.path.read_bytes() == b"engine 1"
    assert first.path.parent == place
    assert (first.reason, again.reason) == ("first load on this machine", "")
    assert len(make.reasons) == 1


def test_a_change_makes_a_new_one_and_says_which() -> None:
    make = Maker()
    old = cache.make_once("demo", ".engine", KEY, make)
    new = cache.make_once("demo", ".engine", KEY | {"TensorRT": "10.7.0"}, make)
    assert new.reason == "changed: TensorRT 10.3.0 -> 10.7.0"
    assert new.path.read_bytes() == b"engine 2"
    assert cache.make_once("demo", ".engine", KEY, make).path == old.path
    assert old.path.read_bytes() == b"engine 1"


def test_other_names_do_not_matter() -> None:
    make = Maker()
    cache.make_once("demo", ".engine", KEY, make)
    assert cache.make_once("other", ".engine", KEY | {"graph": "xyz"}, make).reason == "first load on this machine"


@pytest.mark.parametrize("damage", ["file", "record", "no record"])
def test_a_damaged_entry_is_made_again(damage: str) -> None:
    make = Maker()
    path = cache.make_once("demo", ".engine", KEY, make).path
    record = path.with_name(path.name + ".json")
    if damage == "file":
        path.write_bytes(b"cut")
    elif damage == "record":
        record.write_text("{")
    else:
        record.unlink()
    assert cache.make_once("demo", ".engine", KEY, make).reason == "the one in the cache is damaged"
    assert path.read_bytes() == b"engine 2"


def test_a_failed_build_leaves_nothing_and_is_tried_again(place: Path) -> None:
    def fail(path: Any, _: Any) -> None:
        path.write_bytes(b"half")
        raise BackendError("the builder failed")

    with pytest.raises(BackendError, match="the builder failed"):
        cache.make_once("demo", ".engine", KEY, fail)
    assert not list(place.glob("*.engine"))
    assert cache.make_once("demo", ".engine", KEY, Maker()).path.read_bytes() == b"engine 1"


def _slow_make(path: Any, reason: Any) -> None:
    time.sleep(0.3)
    with path.parent.joinpath("builds").open("a") as log:
        log.write(f"{reason}\n")
    path.write_bytes(b"engine")


def _load(queue: Any, start: Any) -> None:
    start.wait()
    queue.put(cache.make_once("demo", ".engine", KEY, _slow_make).reason)


def test_two_processes_that_start_at_once_build_once(place: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue, start = context.Queue(), context.Barrier(2)
    processes = [context.Process(target=_load, args=(queue, start)) for _ in range(2)]
    for process in processes:
        process.start()
    reasons = sorted(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    assert reasons == ["", "first load on this machine"]
    assert (place / "builds").read_text().splitlines() == ["first load on this machine"]


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGETUBE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BackendError, match=r"cannot write to the cache .*; set EDGETUBE_CACHE to another folder"):
        cache.make_once("demo", ".engine", KEY, Maker())


def test_the_folder_follows_the_platform_s_habit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGETUBE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "edgetube"
