"""A reader sees the old file or the new one; a failed write leaves the old one and nothing else."""

import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from edgetube.files import atomic_write, exchange, replacing


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(("data", "written"), [("a\nü\n", b"a\n\xc3\xbc\n"), (b"\x00\r\n", b"\x00\r\n"), ("", b"")])
def test_the_bytes_are_those_that_were_given(tmp_path: Path, data: str | bytes, written: bytes) -> None:
    path = atomic_write(tmp_path / "x.json", data)
    assert path == tmp_path / "x.json"
    assert path.read_bytes() == written
    assert names(tmp_path) == ["x.json"]


def test_an_older_file_is_replaced_and_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old, and longer than the new one")
    reader = (tmp_path / "x").open()
    atomic_write(tmp_path / "x", "new")
    assert reader.read() == "old, and longer than the new one"
    assert (tmp_path / "x").read_text() == "new"
    reader.close()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_text("old")

    def fail() -> None:
        with replacing(tmp_path / "x.npz") as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (tmp_path / "x.npz").read_text() == "old"
    assert names(tmp_path) == ["x.npz"]


def test_a_failed_rename_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").touch()
    with pytest.raises(OSError, match="folder"):
        atomic_write(tmp_path / "folder", "text")
    assert names(tmp_path) == ["folder"]


def test_the_temporary_path_keeps_suffix_and_folder_and_is_hidden(tmp_path: Path) -> None:
    with replacing(tmp_path / "values.npz") as part:
        assert part.parent == tmp_path
        assert part.suffix == ".npz"
        assert part.name.startswith(".")
        np.savez(part, x=np.arange(3))  # which appends .npz to every other name
    with np.load(tmp_path / "values.npz") as data:
        assert data["x"].tolist() == [0, 1, 2]


def test_a_name_of_the_greatest_length_can_be_written(tmp_path: Path) -> None:
    assert atomic_write(tmp_path / ("x" * 255), "text").read_text() == "text"


def test_writers_at_once_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    texts = [str(i) * 100_000 for i in range(8)]
    failed = []

    def write(text: str) -> None:
        try:
            for _ in range(10):
                atomic_write(tmp_path / "x", text)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert (tmp_path / "x").read_text() in texts
    assert names(tmp_path) == ["x"]


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("sync"), sync(handle))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (done.append("rename"), replace(self, to))[1])
    atomic_write(tmp_path / "x", "text")
    assert done[:2] == ["sync", "rename"]


def test_two_folders_swap_their_names_or_keep_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    swapped = exchange(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path / "a") == (["b"] if swapped else ["a"])
    assert names(tmp_path / "b") == (["a"] if swapped else ["b"])
    assert not exchange(tmp_path / "a", tmp_path / "none")
    assert names(tmp_path) == ["a", "b"]


def test_a_system_that_cannot_swap_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert not exchange(tmp_path, tmp_path)
