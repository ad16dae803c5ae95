"""Clips that are kept between exports: the same bytes or none."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetube.calibration import store
from edgetube.calibration.clips import Clips, collect
from edgetube.contract import InputContract
from edgetube.datasets import ClipSet, Item
from edgetube.errors import InputError
from edgetube.files import PREFIX
from edgetube.video import Clip

CONTRACT = InputContract(2, 16, 16)
SIZE = 4 * 2 * 16 * 16 * 3


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGETUBE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EDGETUBE_CLIPS_GB", "1")
    monkeypatch.setattr(store, "WORTH_S", 0.0)
    return tmp_path / "cache" / "clips"


class Source:
    """Four clips, and how often one was read."""

    def __init__(self, name: str = "mine", version: str = "1", broken: int = -1) -> None:
        self.reads = 0
        items = [Item(str(i), "ab"[i % 2], partial(self.read, i, i == broken), version) for i in range(4)]
        self.set = ClipSet(name, tuple(items))

    def read(self, index: int, broken: bool, contract: InputContract) -> Clip:
        self.reads += 1
        if broken:
            raise InputError("broken")
        return Clip(
            str(index), np.random.default_rng(index).integers(0, 256, contract.shape, np.uint8), "ab"[index % 2]
        )

    def collect(self, workspace: Path, contract: InputContract = CONTRACT) -> Clips:
        return collect(self.set, contract, ("a", "b"), workspace, keep=True)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.frames"))


def same(one: Clips, other: Clips) -> None:
    assert (one.name, one.names, one.sha256, one.notes) == (other.name, other.names, other.sha256, other.notes)
    np.testing.assert_array_equal(list(one.frames), list(other.frames))
    np.testing.assert_array_equal(one.labels, other.labels)


def test_read_once_and_the_same_as_without_a_cache(tmp_path: Path, folder: Path) -> None:
    source = Source()
    first, again = source.collect(tmp_path), source.collect(tmp_path)
    assert source.reads == 4
    plain = collect(source.set, CONTRACT, ("a", "b"), tmp_path)
    same(first, again)
    same(first, plain)
    assert [path.stat().st_size for path in entries(folder)] == [SIZE]


@pytest.mark.parametrize(
    ("other", "contract"),
    [(Source(version="2"), CONTRACT), (Source("yours"), CONTRACT), (Source(), InputContract(2, 16, 16, fps=7.0))],
    ids=["the clips", "the set", "the input"],
)
def test_read_again_when_the_key_changes(tmp_path: Path, other: Source, contract: InputContract) -> None:
    Source().collect(tmp_path)
    other.collect(tmp_path, contract)
    assert other.reads == 4


def test_clips_without_a_version_are_not_kept(tmp_path: Path, folder: Path) -> None:
    Source(version="").collect(tmp_path)
    assert not folder.exists()


def test_a_set_with_an_unreadable_clip_or_one_that_was_read_quickly_is_not_kept(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="1 of 4 clips of mine cannot be read"):
        Source(broken=2).collect(tmp_path)
    assert list(folder.iterdir()) == []
    monkeypatch.setattr(store, "WORTH_S", 1000.0)
    clips = Source().collect(tmp_path)
    assert list(folder.iterdir()) == []
    assert len(list(clips.frames)) == 4


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Any] = {
    "a flipped bit": flip,
    "a shorter file": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "no frames": lambda path: path.unlink(),
    "no record": lambda path: path.with_suffix(".json").unlink(),
    "half a record": lambda path: path.with_suffix(".json").write_text('{"shape": [4'),
    "a record of another kind": lambda path: path.with_suffix(".json").write_text("[]"),
    "another label": lambda path: path.with_suffix(".json").write_text(
        path.with_suffix(".json").read_text().replace('"a"', '"b"')
    ),
    "fewer names": lambda path: path.with_suffix(".json").write_text(
        json.dumps({**json.loads(path.with_suffix(".json").read_text()), "names": ["0"]})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_dropped_and_made_again(tmp_path: Path, folder: Path, damage: str) -> None:
    first, source = collect(Source().set, CONTRACT, ("a", "b"), tmp_path), Source()
    source.collect(tmp_path)
    DAMAGE[damage](entries(folder)[0])
    same(first, source.collect(tmp_path))
    assert source.reads == 8
    same(first, source.collect(tmp_path))
    assert source.reads == 8


def test_the_least_recently_used_entries_make_room(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = Source("1"), Source("2"), Source("3")
    for age, source in enumerate((first, second)):
        source.collect(tmp_path)
        for path in folder.iterdir():
            os.utime(path, (time.time() - 100 + age,) * 2)
    first.collect(tmp_path)  # used, and so younger than the second
    monkeypatch.setenv("EDGETUBE_CLIPS_GB", str(2.5 * SIZE / 1e9))
    abandoned, live = folder / f"{PREFIX}1-x.frames", folder / f"{PREFIX}2-x.frames"
    abandoned.touch()
    live.touch()
    os.utime(abandoned, (0, 0))
    third.collect(tmp_path)
    assert len(entries(folder)) == 2 + 1
    assert not abandoned.exists()
    assert live.exists()
    for source, reads in ((first, 4), (third, 4), (second, 8)):
        source.collect(tmp_path)
        assert source.reads == reads


def test_a_set_beyond_the_limit_or_the_free_space_is_not_kept(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGETUBE_CLIPS_GB", "0")
    Source().collect(tmp_path)
    assert not folder.exists()
    monkeypatch.setenv("EDGETUBE_CLIPS_GB", "1")
    monkeypatch.setattr(store, "FREE_SHARE", 0.0)
    Source().collect(tmp_path)
    assert entries(folder) == []


@pytest.mark.parametrize("given", ["many", "-1", "nan", "inf"])
def test_a_limit_that_is_no_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("EDGETUBE_CLIPS_GB", given)
    with pytest.raises(InputError, match=r"EDGETUBE_CLIPS_GB is .*; expected gigabytes, 0 to keep no clips"):
        Source().collect(tmp_path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fixed").mkdir(mode=0o500)
    monkeypatch.setenv("EDGETUBE_CACHE", str(tmp_path / "fixed"))
    assert len(Source().collect(tmp_path)) == 4


def test_a_cache_that_is_a_file_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGETUBE_CACHE", str(tmp_path / "file"))
    assert len(Source().collect(tmp_path)) == 4
