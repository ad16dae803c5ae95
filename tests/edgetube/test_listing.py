"""Which files of a folder are clips."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from edgetube import listing, video
from edgetube.contract import InputContract
from edgetube.errors import InputError

CONTRACT = InputContract(4, 16, 24, fps=10.0)

CODECS = {
    "3gp": "h263", "asf": "wmv2", "avi": "mpeg4", "dv": "dvvideo", "f4v": "mpeg4", "flv": "flv", "gif": "gif",
    "h264": "libx264", "m2ts": "mpeg2video", "m4v": "mpeg4", "mjpeg": "mjpeg", "mkv": "mpeg4", "mov": "mjpeg",
    "mp4": "mpeg4", "mpg": "mpeg1video", "mts": "libx264", "mxf": "mpeg2video", "nut": "mpeg4", "ogv": "libtheora",
    "ts": "mpeg2video", "vob": "mpeg2video", "webm": "libvpx", "wmv": "wmv1", "y4m": "rawvideo",
}  # fmt: skip
"""By suffix, what cameras and archives put into such files, and FFmpeg can also write."""

FORMATS = {
    "f4v": "mp4",
    "m2ts": "mpegts",
    "m4v": "mp4",
    "mts": "mpegts",
    "ogv": "ogg",
    "wmv": "asf",
    "y4m": "yuv4mpegpipe",
}
LAYOUTS = {"gif": "rgb8", "mjpeg": "yuvj420p", "mov": "yuvj420p"}


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder: Path, wanted: frozenset[str] = listing.VIDEOS) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in listing.walk(folder, wanted).files]


def test_hidden_files_and_what_systems_leave_behind_are_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "b.mp4", "a/z.MOV", ".b.mp4", ".cache/c.mp4", "a/._z.MOV", "a/@eaDir/z.MOV/x.mp4", "__MACOSX/b.mp4")
    assert found(tmp_path) == ["a/z.MOV", "b.mp4"]


def test_a_hidden_folder_that_is_named_outright_is_searched(tmp_path: Path) -> None:
    touch(tmp_path, ".clips/a.mp4")
    assert found(tmp_path / ".clips") == ["a.mp4"]


def test_links_are_followed(tmp_path: Path) -> None:
    touch(tmp_path, "store/tilt/a.mp4", "set/pan/b.mp4")
    (tmp_path / "set" / "tilt").symlink_to(tmp_path / "store" / "tilt")
    (tmp_path / "set" / "again").symlink_to(tmp_path / "store" / "tilt")
    (tmp_path / "set" / "c.mp4").symlink_to(tmp_path / "set" / "pan" / "b.mp4")
    assert found(tmp_path / "set") == ["again/a.mp4", "c.mp4", "pan/b.mp4", "tilt/a.mp4"]


@pytest.mark.parametrize("target", ["..", ".", "../.."])
def test_a_link_back_is_named(tmp_path: Path, target: str) -> None:
    touch(tmp_path, "set/a/b/c.mp4")
    (tmp_path / "set" / "a" / "b" / "loop").symlink_to(target)
    with pytest.raises(InputError, match=r"set/a/b/loop is a link back to .*, which holds it: remove the link"):
        listing.walk(tmp_path / "set", listing.VIDEOS)


def test_a_broken_link_is_missed_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").symlink_to("nowhere.mp4")
    assert found(tmp_path) == ["a.mp4"]
    with pytest.raises(InputError, match=r"a\.mp4 is a link to nowhere\.mp4, which is not there"):
        video.load(tmp_path / "a.mp4", CONTRACT)


def test_other_files_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.json", "c/d.json", "c/README", ".DS_Store")
    listed = listing.walk(tmp_path, listing.VIDEOS)
    assert listed.foreign == {".json": 2, "without suffix": 1}
    assert listed.note(tmp_path) == f"3 files of {tmp_path} left out, not clips: 2 .json, 1 without suffix"
    with pytest.raises(InputError, match=r"holds no clip \(4 files .*left out.*\); known are \.npy \.npz"):
        listing.walk(tmp_path, listing.ARRAYS).required(tmp_path, listing.ARRAYS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no clip \(it is empty\)"):
        listing.walk(tmp_path / "empty", listing.ARRAYS).required(tmp_path, listing.ARRAYS)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_not_silently_left_out(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(InputError, match="closed cannot be read: Permission denied"):
        listing.walk(tmp_path, listing.VIDEOS)


@pytest.mark.parametrize(("suffix", "codec"), CODECS.items())
def test_every_container_that_plays_is_found(tmp_path: Path, suffix: str, codec: str, rng: np.random.Generator) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    path = tmp_path / f"clip.{suffix}"
    size = (720, 576) if suffix == "dv" else (176, 144)
    with av.open(str(path), "w", format=FORMATS.get(suffix)) as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, LAYOUTS.get(suffix, "yuv420p")
        for _ in range(12):
            pixels = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    (listed,) = listing.walk(tmp_path, listing.VIDEOS).files
    assert listed == path
    assert video.load(listed, CONTRACT).frames.shape == CONTRACT.shape


def test_suffixes_that_ffmpeg_declares_for_video_are_known() -> None:
    still_or_sound = {"avif", "heic", "heif", "isma", "m4a", "m4b", "mka", "mks", "mpo", "j2k"}
    for name in (
        "mov",
        "matroska",
        "avi",
        "flv",
        "dv",
        "h264",
        "hevc",
        "vvc",
        "obu",
        "m4v",
        "mjpeg",
        "yuv4mpegpipe",
        "dhav",
    ):
        declared = av.format.ContainerFormat(name, "r").extensions - still_or_sound
        assert {f".{suffix}" for suffix in declared} <= listing.VIDEOS, name
    assert not listing.VIDEOS & listing.IMAGES
