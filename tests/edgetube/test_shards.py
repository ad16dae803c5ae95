"""Tars of samples, against tarfile and webdataset's layout."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest

from edgetube import datasets, demo, video
from edgetube.contract import InputContract
from edgetube.errors import InputError

CONTRACT = InputContract(4, 16, 16)


def tar_of(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def movie(name: str) -> bytes:
    return demo.videos()[name].read_bytes()


def test_videos_have_the_labels_beside_them_and_are_read_from_their_place(tmp_path: Path) -> None:
    members = {
        "a/000.cls": b"3\n", "a/000.mp4": movie("zoom-in"), "a/001.mp4": movie("pan-left"),
        "a/001.json": json.dumps({"label": "pan", "id": 5}).encode(), "a/002.mp4": movie("tilt-up"),
        "a/002.note.txt": b"x", "a/._000.mp4": b"mac",
    }  # fmt: skip
    found = datasets.load(tar_of(tmp_path / "train-000.tar", members), CONTRACT)
    assert [(item.name, item.label) for item in found.items] == [
        ("train-000.tar/a/000.mp4", "3"), ("train-000.tar/a/001.mp4", "pan"), ("train-000.tar/a/002.mp4", None),
    ]  # fmt: skip
    clips = list(found.clips(CONTRACT))
    for clip, name in zip(clips, ("zoom-in", "pan-left", "tilt-up"), strict=True):
        np.testing.assert_array_equal(clip.frames, video.load(demo.videos()[name], CONTRACT).frames)


def test_a_folder_of_tars_is_one_set_and_images_are_for_models_of_images(tmp_path: Path) -> None:
    picture = demo.photo_files()[0].read_bytes()
    for i in range(2):
        tar_of(tmp_path / f"{i}.tar", {"x.jpg": picture, "x.cls": b"cat", "y.mp4": movie("zoom-in"), "y.cls": b"dog"})
    assert [item.name for item in datasets.load(tmp_path, CONTRACT).items] == ["0.tar/y.mp4", "1.tar/y.mp4"]
    found = datasets.load(tmp_path / "0.tar", CONTRACT.with_clip(frames=1))
    assert [(item.name, item.label) for item in found.items] == [("0.tar/x.jpg", "cat"), ("0.tar/y.mp4", "dog")]
    assert found.items[0].read(CONTRACT.with_clip(frames=1)).frames.shape == (1, 16, 16, 3)


def test_tars_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no clips at"):
        datasets.load(tmp_path / "none.tar", CONTRACT)
    with pytest.raises(InputError, match="holds no clips; expected a tar of webdataset"):
        datasets.load(tar_of(tmp_path / "empty.tar", {"a.txt": b"x"}), CONTRACT)
    with pytest.raises(InputError, match="cannot be read as a tar of samples"):
        datasets.load(tar_of(tmp_path / "packed.tar", {"a.mp4": movie("zoom-in")}, "w:gz"), CONTRACT)
    with pytest.raises(InputError, match="cannot be read as a tar of samples"):
        datasets.load(tar_of(tmp_path / "label.tar", {"a.mp4": b"x", "a.json": b"{"}), CONTRACT)
    with pytest.raises(InputError, match=r"deep\.tar cannot be read as a tar of samples: maximum recursion depth"):
        datasets.load(tar_of(tmp_path / "deep.tar", {"a.mp4": b"x", "a.json": 100_000 * b"["}), CONTRACT)
    found = datasets.load(tar_of(tmp_path / "broken.tar", {"a.mp4": movie("zoom-in")[:200], "a.cls": b"0"}), CONTRACT)
    with pytest.raises(InputError, match=r"broken\.tar: a\.mp4 ") as refused:
        found.items[0].read(CONTRACT)
    assert tempfile.gettempdir() not in str(refused.value).replace(str(tmp_path), "")
    assert "clip.mp4" not in str(refused.value)


def test_labels_of_nothing_are_none(tmp_path: Path) -> None:
    members = {"a.mp4": b"x", "a.cls": b"\n", "b.mp4": b"x", "b.json": b'{"label": ""}', "c.mp4": b"x", "c.json": b"[]",
               "d.mp4": b"x", "d.json": b'{"label": 0}'}  # fmt: skip
    assert [item.label for item in datasets.load(tar_of(tmp_path / "x.tar", members), CONTRACT).items] == [
        None, None, None, "0",
    ]  # fmt: skip
    np.savez(tmp_path / "x.npz", clips=np.zeros((2, *CONTRACT.shape), np.uint8), labels=np.array(["", "a"]))
    assert [item.label for item in datasets.load(tmp_path / "x.npz", CONTRACT).items] == [None, "a"]


def test_tars_that_are_none_of_a_folder_s_clips(tmp_path: Path) -> None:
    tar_of(tmp_path / "0.TAR", {"y.mp4": movie("zoom-in"), "y.cls": b"dog"})
    (tmp_path / "._0.tar").write_bytes(b"mac")
    (tmp_path / "unpacked.tar").mkdir()
    (tmp_path / "readme.md").touch()
    assert [item.name for item in datasets.load(tmp_path, CONTRACT).items] == ["0.TAR/y.mp4"]
    (tmp_path / "cat").mkdir()
    np.save(tmp_path / "cat" / "a.npy", np.zeros(CONTRACT.shape, np.uint8))
    found = datasets.load(tmp_path, CONTRACT)
    assert [(item.name, item.label) for item in found.items] == [("cat/a.npy", "cat")]
    assert found.notes == (f"2 files of {tmp_path} left out, not clips: 1 .md, 1 .tar",)
