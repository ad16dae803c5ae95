"""Video in and out: timestamps, seeking, damage, pictures, cameras, folders, and the round trip."""

from __future__ import annotations

import gc
import io
import re
import socket
import struct
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest
from av.stream import Disposition
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, ImageSequence

from edgetube import address, decoding, preprocess, video
from edgetube.contract import InputContract
from edgetube.errors import InputError, InputWarning, MissingPackageError
from edgetube.views import Views

SIZE = 64
BITS = 8


def barcode(number: int) -> np.ndarray:
    """A frame that says its own number in eight bars, legible through any codec."""
    frame = np.zeros((SIZE, SIZE, 3), np.uint8)
    for bit in range(BITS):
        frame[:, bit * 8 : bit * 8 + 8] = 235 if number >> bit & 1 else 20
    return frame


def numbers(frames: Any) -> list[int]:
    return [sum(int(frame[SIZE // 2, bit * 8 + 4].mean() > 128) << bit for bit in range(BITS)) for frame in frames]


def encode(
    path: Path,
    codec: str = "libx264",
    form: str = "mp4",
    times: Any = None,
    fps: int = 25,
    count: int = 60,
    gop: int = 12,
    options: Any = None,
    rotation: Any = None,
) -> Any:
    """Barcodes 0, 1, 2, ...; `times` in milliseconds makes the rate vary."""
    tick = Fraction(1, 1000) if times is not None else Fraction(1, fps)
    with av.open(str(path), "w", format=form, options=options or {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width = stream.height = SIZE
        stream.pix_fmt, stream.gop_size, stream.bit_rate = "yuv420p", gop, 2_000_000
        stream.max_b_frames = 2
        if times is not None:
            stream.codec_context.time_base = tick
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for i in range(count if times is None else len(times)):
            frame = av.VideoFrame.from_ndarray(barcode(i))
            frame.pts, frame.time_base = (i if times is None else int(times[i])), tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


VARIABLE = np.cumsum(np.random.default_rng(3).integers(10, 120, 60))
FASTSTART, FRAGMENTS = {"movflags": "+faststart"}, {"movflags": "frag_keyframe+empty_moov"}
KINDS: dict[str, dict[str, Any]] = {
    "cfr.mp4": {},
    "faststart.mp4": {"options": FASTSTART},
    "fragments.mp4": {"options": FRAGMENTS},
    "one-key-frame.mp4": {"gop": 300},
    "vfr.mp4": {"times": VARIABLE},
    "cfr.mkv": {"form": "matroska"},
    "vfr.mkv": {"form": "matroska", "times": VARIABLE},
    "no-length.mkv": {"form": "matroska", "options": {"live": "1"}},
    "cfr.webm": {"form": "webm", "codec": "libvpx-vp9"},
    "h264.ts": {"form": "mpegts"},
    "mpeg2.ts": {"form": "mpegts", "codec": "mpeg2video"},
    "one-key-frame.ts": {"form": "mpegts", "gop": 300},
    "mpeg4.avi": {"form": "avi", "codec": "mpeg4"},
    "h264.avi": {"form": "avi"},
    "cfr.flv": {"form": "flv"},
    "cfr.mpg": {"form": "mpeg", "codec": "mpeg2video"},
    "raw.h264": {"form": "h264"},
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return {name: encode(folder / name, **kind) for name, kind in KINDS.items()}


def contract(frames: int = 6, fps: float | None = None, size: int = SIZE) -> InputContract:
    return InputContract(frames, size, size, fps=fps)


# ---------------------------------------------------------------------------------------------------------- timestamps


@pytest.mark.parametrize("name", KINDS)
def test_frames_have_the_times_they_were_written_with(clips: dict[str, Path], name: str) -> None:
    times, pixels = zip(*video.frames(clips[name]), strict=True)
    assert numbers(pixels) == list(range(60))
    expected = (VARIABLE - VARIABLE[0]) / 1000 if "vfr" in name else np.arange(60) / 25
    assert np.abs(np.array(times) - expected).max() <= 1e-3


def expected_numbers(times: np.ndarray, wanted: InputContract, begin: float) -> list[int]:
    """The definition in docs/preprocessing.md, read slowly over all frames."""

    def shown(second: float) -> int:
        near = np.flatnonzero(np.abs(times - second) <= preprocess.TOLERANCE + 1e-12)
        before = np.flatnonzero(times < second)
        return int(near[0] if len(near) else before[-1] if len(before) else 0)

    if wanted.fps is None:
        return [min(shown(begin) + k, len(times) - 1) for k in range(wanted.frames)]
    return [shown(begin + k / wanted.fps) for k in range(wanted.frames)]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("fps", [None, 7.0, 25.0, 60.0])
def test_load_finds_frames_by_time_wherever_it_starts(clips: dict[str, Path], name: str, fps: float | None) -> None:
    """Seeking must not change what is found: the oracle reads everything from the beginning."""
    wanted = contract(fps=fps)
    times = np.array([seconds for seconds, _ in video.frames(clips[name])])
    length, rate = (times[-1] + 0.04, 25.0) if "vfr" not in name else (times[-1] + 0.04, len(times) / times[-1])
    for start in (None, 0.0, 0.01, 0.3, 1.0, 1.7, 2.3):
        clip = video.load(clips[name], wanted, start)
        if start is None and ("vfr" in name or name.endswith(".avi")):
            continue  # the length depends on what the container says about the last frame
        begin = preprocess.window(wanted, length, rate, start)
        found = expected_numbers(times, wanted, begin)
        assert numbers(clip.frames) == found, f"start {start}"
        assert clip.start == pytest.approx(times[found[0]], abs=1e-6)
        assert clip.end == pytest.approx(times[found[-1]] + 1 / rate, abs=0.03)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_avi_with_empty_slots(tmp_path: Path, codec: str) -> None:
    """H.264 that was copied into AVI has twice as many slots as frames, and half of them are empty."""
    path = tmp_path / "copied.avi"
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream(codec, rate=50)
        stream.width = stream.height = SIZE
        stream.pix_fmt, stream.gop_size, stream.bit_rate, stream.max_b_frames = "yuv420p", 12, 2_000_000, 2
        for i in range(60):
            frame = av.VideoFrame.from_ndarray(barcode(i))
            frame.pts, frame.time_base = 2 * i, Fraction(1, 50)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames >= 118
        assert sum(packet.size > 0 for packet in container.demux(video=0)) == 60
    times, pixels = zip(*video.frames(path), strict=True)
    assert numbers(pixels) == list(range(60))
    assert times == pytest.approx(np.arange(60) / 25)
    clip = video.load(path, contract(4, fps=25.0))
    assert numbers(clip.frames) == [27, 28, 29, 30]  # 119 slots: the clip begins at (2.38 - 0.16) / 2 = 1.11 s
    assert clip.start == pytest.approx(27 / 25)


def test_middle_of_a_video_with_a_varying_rate(clips: dict[str, Path]) -> None:
    """The middle in time, not the middle frame."""
    times = [0, 100, 200, 300, 400, 500, 600, 700, 800, 900, *range(910, 1410, 10)]
    path = encode(clips["vfr.mp4"].with_name("uneven.mp4"), times=times)
    assert numbers(video.load(path, contract(4, fps=10.0)).frames) == [5, 6, 7, 8]  # 1.41 s long: starts at 0.505


def test_a_file_and_its_frames_in_memory_give_the_same_bytes(clips: dict[str, Path]) -> None:
    """One road: what calibration reads from arrays is what the runtime reads from the file."""
    wanted = InputContract(8, 40, 48, fps=9.0)
    times, pixels = zip(*video.frames(clips["cfr.mp4"]), strict=True)
    for start in (None, 0.5):
        clip = video.load(clips["cfr.mp4"], wanted, start)
        np.testing.assert_array_equal(clip.frames, preprocess.prepare(np.stack(pixels), wanted, 25.0, start))
    assert len(times) == 60


def test_short_video_repeats_its_last_frame(tmp_path: Path) -> None:
    path = encode(tmp_path / "short.mp4", count=3)
    clip = video.load(path, contract(8, fps=25.0))
    assert numbers(clip.frames) == [0, 1, 2, 2, 2, 2, 2, 2]
    assert clip.start == 0.0
    assert clip.end == pytest.approx(3 / 25)
    assert numbers(video.load(path, contract(5)).frames) == [0, 1, 2, 2, 2]


@pytest.mark.parametrize("name", KINDS)
def test_a_stride_counts_decoded_frames(clips: dict[str, Path], name: str) -> None:
    wanted = InputContract(5, SIZE, SIZE, sampling="stride", stride=7)
    assert numbers(video.load(clips[name], wanted, 0.0).frames) == [0, 7, 14, 21, 28]
    times = [seconds for seconds, _ in video.frames(clips[name])]
    for first in (3, 40, 57):  # the length that vfr.mp4 states ends after 57
        found = video.load(clips[name], wanted, times[first])
        every = list(range(first, 60, 7))[:5]
        assert numbers(found.frames) == every + every[-1:] * (5 - len(every))
        assert found.start == pytest.approx(times[first])
    if name == "cfr.mp4":
        assert numbers(video.load(clips[name], wanted).frames) == [12, 19, 26, 33, 40]  # (60 - 5 * 7) // 2


@pytest.mark.parametrize("frames", [1, 7, 16, 64])
@pytest.mark.parametrize("name", KINDS)
def test_segments_spread_over_all_decoded_frames(clips: dict[str, Path], name: str, frames: int) -> None:
    wanted = InputContract(frames, SIZE, SIZE, sampling="segments")
    clip = video.load(clips[name], wanted)
    expected = [60 * (2 * k + 1) // (2 * frames) for k in range(frames)]
    assert numbers(clip.frames) == expected
    times = [seconds for seconds, _ in video.frames(clips[name])]
    assert clip.start == pytest.approx(times[expected[0]])
    with pytest.raises(InputError, match=r"start is 0.5 s, but this model takes"):
        video.load(clips[name], wanted, 0.5)


def test_segments_of_a_file_whose_packets_are_not_its_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first guess that is wrong in either direction costs a second pass, never a frame."""
    path = encode(tmp_path / "a.mp4", count=30)
    wanted = InputContract(5, SIZE, SIZE, sampling="segments")
    for guess in (0, 1, 29, 31, 400):
        monkeypatch.setattr(decoding.Reader, "packets", lambda _, guess=guess: guess)
        assert numbers(video.load(path, wanted).frames) == [3, 9, 15, 21, 27]


def test_segments_of_a_file_that_is_cut_off_are_refused(clips: dict[str, Path], tmp_path: Path) -> None:
    """They need the end, so the whole file has to be there."""
    with pytest.raises(InputError, match="is cut off or damaged"):
        video.load(cut(clips["cfr.mkv"], tmp_path / "cut.mkv", 0.9), InputContract(4, SIZE, SIZE, sampling="segments"))


@pytest.mark.parametrize("sampling", [{"sampling": "stride", "stride": 4}, {"sampling": "segments"}])
def test_a_file_and_its_frames_in_memory_are_sampled_alike(clips: dict[str, Path], sampling: dict[str, Any]) -> None:
    wanted = InputContract(8, 40, 44, resize_size=50, filter="bicubic", crop="center-floor", **sampling)
    pixels = np.stack([frame for _, frame in video.frames(clips["cfr.mp4"])])
    np.testing.assert_array_equal(video.load(clips["cfr.mp4"], wanted).frames, preprocess.prepare(pixels, wanted))


@pytest.mark.parametrize("sampling", [{"sampling": "stride", "stride": 4}, {"sampling": "segments"}])
def test_an_image_is_one_frame_of_any_sampling(tmp_path: Path, sampling: dict[str, Any]) -> None:
    picture = barcode(5)
    Image.fromarray(picture).save(tmp_path / "a.png")
    found = video.load(tmp_path / "a.png", InputContract(1, SIZE, SIZE, **sampling)).frames
    np.testing.assert_array_equal(found[0], picture)


def test_only_sampled_frames_are_converted(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    converted = []
    rgb = decoding.rgb
    monkeypatch.setattr(video, "rgb", lambda frame: converted.append(frame.pts) or rgb(frame))
    video.load(clips["cfr.mp4"], contract(4, fps=5.0))
    video.load(clips["cfr.mp4"], InputContract(4, SIZE, SIZE, sampling="stride", stride=9))
    video.load(clips["cfr.mp4"], InputContract(4, SIZE, SIZE, sampling="segments"))
    assert len(converted) == 12


def test_a_frame_is_freed_at_once_and_not_when_the_collector_comes(clips: dict[str, Path]) -> None:
    """Each holds its pixels, and a camera brings them for months."""
    with decoding.opened(clips["cfr.mp4"]) as reader:
        gc.collect()
        gc.disable()
        try:
            for _, frame in reader.film():
                decoding.rgb(frame), decoding.turn(frame)
            del frame
            assert gc.collect() < 10
        finally:
            gc.enable()


def test_a_late_clip_does_not_decode_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "long.mp4", count=250)
    decoded = []
    clock = decoding.Reader._seconds
    monkeypatch.setattr(decoding.Reader, "_seconds", lambda *a: decoded.append(1) or clock(*a))
    assert numbers(video.load(path, contract(4), start=9.0).frames) == [225, 226, 227, 228]
    assert len(decoded) < 30


def test_image_contract_takes_the_middle_frame_or_the_one_at_start(clips: dict[str, Path]) -> None:
    assert numbers(video.load(clips["cfr.mp4"], contract(1)).frames) == [29]
    assert numbers(video.load(clips["cfr.mp4"], contract(1, fps=5.0), start=0.4).frames) == [10]


@pytest.mark.parametrize("start", [-0.1, 2.4, 99.0])
def test_start_outside_the_video_is_refused(clips: dict[str, Path], start: float) -> None:
    with pytest.raises(InputError, match=rf"start is {start} s; expected a time within the 2.400 s"):
        video.load(clips["cfr.mp4"], contract(), start)


# -------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    "name", ["cfr.mp4", "faststart.mp4", "cfr.mkv", "vfr.mkv", "cfr.webm", "mpeg4.avi", "h264.avi"]
)
def test_cut_off_files_give_the_right_clip_or_an_error(clips: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Never a clip that quietly differs; early cuts must fail, and formats with their index first survive late ones."""
    data, path = clips[name].read_bytes(), tmp_path / name
    asked = [(contract(fps=fps), start) for fps in (None, 7.0, 25.0) for start in (None, 0.0, 1.0)]
    whole = [video.load(clips[name], *ask).frames for ask in asked]
    same = refused = 0
    for percent in range(3, 100, 6):
        path.write_bytes(data[: len(data) * percent // 100])
        for ask, frames in zip(asked, whole, strict=True):
            try:
                np.testing.assert_array_equal(video.load(path, *ask).frames, frames)
                same += 1
            except InputError:
                refused += 1
    assert refused > len(asked)
    assert same > 0 or name == "cfr.mp4"  # whose index is at its end


def cut(path: Path, target: Path, part: float) -> Path:
    data = path.read_bytes()
    target.write_bytes(data[: int(len(data) * part)])
    return target


def test_cut_off_file_says_how_much_is_left(clips: dict[str, Path], tmp_path: Path) -> None:
    path = cut(clips["faststart.mp4"], tmp_path / "cut.mp4", 0.8)
    with av.open(str(clips["faststart.mp4"])) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    left = sum(p.pos + p.size <= path.stat().st_size for p in packets)
    assert 10 < left < 50
    message = rf"cut.mp4 is cut off or damaged: {left} frames \(\d\.\d\d s\) of 60 \(2\.40 s\) can be read: "
    with pytest.raises(InputError, match=message):
        video.load(path, contract(20), start=1.4)


def with_sound(path: Path, seconds: float, form: str, tagged: bool = True) -> Path:
    """Frames 0 to 59, 2.4 s of them, beside sound of another length, interleaved as a muxer does it."""
    with av.open(str(path), "w", format=form) as container:
        film = container.add_stream("libx264", rate=25)
        film.width = film.height = SIZE
        film.max_b_frames = 0
        sound = container.add_stream("flac", rate=8000, layout="mono")
        packets = []
        for i in range(60):
            frame = av.VideoFrame.from_ndarray(barcode(i))
            frame.pts, frame.time_base = i, Fraction(1, 25)
            packets += film.encode(frame)
        packets += film.encode()
        for at in range(0, int(seconds * 8000), 800):
            noise = np.random.default_rng(at).integers(-9999, 9999, (1, 800), np.int16)
            samples = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
            samples.sample_rate, samples.pts = 8000, at
            packets += sound.encode(samples)
        packets += sound.encode()
        container.mux(sorted(packets, key=lambda packet: float(packet.pts * packet.time_base)))
    if not tagged:
        path.write_bytes(path.read_bytes().replace(b"DURATION", b"DURATI0N"))
    return path


@pytest.mark.parametrize("seconds", [1.0, 2.4, 12.0])
@pytest.mark.parametrize(("form", "tagged"), [("matroska", True), ("matroska", False), ("mp4", True)])
def test_sound_may_be_longer_or_shorter(tmp_path: Path, seconds: float, form: str, tagged: bool) -> None:
    """Matroska states the length of the longest stream, and of each in a tag that not every muxer writes."""
    path = with_sound(tmp_path / "film", seconds, form, tagged)
    assert numbers(frame for _, frame in video.frames(path)) == list(range(60))
    assert numbers(video.load(path, contract(4, fps=25.0)).frames) == [28, 29, 30, 31]
    with pytest.raises(InputError, match=r"start is 5.0 s; expected a time within the 2.4\d\d s"):
        video.load(path, contract(4), start=5.0)


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize("seconds", [2.4, 12.0])
def test_a_film_with_sound_that_is_cut_off_is_refused(tmp_path: Path, seconds: float, tagged: bool) -> None:
    path = with_sound(tmp_path / "film.mkv", seconds, "matroska", tagged)
    data = path.read_bytes()
    for part in (0.2, 0.4, 0.6, 0.75) if seconds == 2.4 else (0.05, 0.1, 0.15):
        path.write_bytes(data[: int(part * len(data))])
        with pytest.raises(InputError, match=r"film.mkv is cut off or damaged: \d+ frames"):
            list(video.frames(path))
        with pytest.raises(InputError, match=r"film.mkv is cut off or damaged: \d+ frames"):
            video.load(path, contract(40, fps=25.0))


def test_streaming_a_cut_off_file_ends_with_the_error(clips: dict[str, Path], tmp_path: Path) -> None:
    path = cut(clips["cfr.mkv"], tmp_path / "cut.mkv", 0.7)
    seen: list[Any] = []
    with pytest.raises(InputError, match=r"cut.mkv is cut off or damaged: \d+ frames .* of 60"):
        seen.extend(number for _, frame in video.frames(path) for number in numbers([frame]))
    assert seen == list(range(len(seen)))
    assert len(seen) > 20


def test_fragments_that_are_whole_can_be_read(clips: dict[str, Path], tmp_path: Path) -> None:
    """A recording that lost its power: fragments carry no length, so what is there is the video."""
    data = clips["fragments.mp4"].read_bytes()
    whole = data[: data.rfind(b"moof") - 4]
    assert 0 < len(whole) < len(data)
    path = tmp_path / "recording.mp4"
    path.write_bytes(whole)
    assert len(numbers(frame for _, frame in video.frames(path))) >= 40
    assert numbers(video.load(path, contract(5), start=1.0).frames) == [25, 26, 27, 28, 29]


BROADCAST = {"h264.ts": {"form": "mpegts"}, "mpeg2.ts": KINDS["mpeg2.ts"], "mpeg2.mpg": KINDS["cfr.mpg"]}


def joined(folder: Path, name: str, offset: str) -> Path:
    """Frames 0 to 59 twice, as `cat a.ts b.ts` joins them; the clock of the second begins `offset` seconds on."""
    path = folder / name
    first = encode(path, **BROADCAST[name]).read_bytes()
    second = encode(path, **BROADCAST[name], options={"output_ts_offset": offset}).read_bytes()
    path.write_bytes(first + second)
    return path


@pytest.mark.parametrize("name", BROADCAST)
@pytest.mark.parametrize("offset", ["0", "1", "2.2", "2.4", "3600", "36000"])
def test_joined_recordings_are_one_film(tmp_path: Path, name: str, offset: str) -> None:
    """The second is shown after the first, wherever its clock begins, and a clip is found in both and across."""
    path = joined(tmp_path, name, offset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        times, pixels = zip(*video.frames(path), strict=True)
        assert numbers(pixels) == [*range(60), *range(60)]
        assert times == pytest.approx(np.arange(120) / 25, abs=0.105)
        for start in (0.4, 1.6, 2.3, 3.0, 4.4):
            begin = int(np.flatnonzero(np.array(times) <= start + 1e-3)[-1])
            expected = [min(begin + i, 119) for i in range(6)]
            assert numbers(video.load(path, contract(6), start).frames) == [i % 60 for i in expected]
        middle = (times[-1] + 1 / 25 - 6 / 25) / 2
        assert video.load(path, contract(6)).start == pytest.approx(middle, abs=0.145)


def test_a_join_is_a_warning_that_says_where(tmp_path: Path) -> None:
    path = joined(tmp_path, "h264.ts", "0")
    message = r"h264.ts is damaged or was joined at about 2.\d s: it is read, but pictures there may be wrong"
    for read in (lambda: list(video.frames(path)), lambda: video.load(path, contract(6), 2.3)):
        with pytest.warns(InputWarning, match=message) as seen:
            read()
        assert len(seen) == 1
    assert numbers(video.load(path, contract(3), 0.4).frames) == [10, 11, 12]  # nothing wrong there: no warning


def test_a_lost_packet_is_a_warning(clips: dict[str, Path], tmp_path: Path) -> None:
    """188 bytes less: pictures up to the next key frame may suffer, all others and all times are as they were."""
    data = clips["h264.ts"].read_bytes()
    path = tmp_path / "lost.ts"
    warned = 0
    for at in range(20, len(data) // 188, 7):
        path.write_bytes(data[: at * 188] + data[(at + 1) * 188 :])
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            times, pixels = zip(*video.frames(path), strict=True)
            clip = video.load(path, contract(4), start=1.0)
        found = numbers(pixels)
        wrong = [round(t * 25) for t, number in zip(times, found, strict=True) if number != round(t * 25)]
        assert len(found) >= 57
        assert not wrong or max(wrong) // 12 - min(wrong) // 12 <= 1  # groups of 12 pictures
        assert all(w.category is InputWarning for w in seen)
        assert bool(wrong) <= bool(seen)
        assert len(clip.frames) == 4
        warned += bool(seen)
    assert warned > 3


def test_a_broadcast_of_which_much_is_lost_is_refused(clips: dict[str, Path], tmp_path: Path) -> None:
    data = clips["h264.ts"].read_bytes()
    packets = [data[at : at + 188] for at in range(0, len(data), 188)]
    path = tmp_path / "lost.ts"
    path.write_bytes(b"".join(p for i, p in enumerate(packets) if i < 8 or i % 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        with pytest.raises(InputError, match=r"lost.ts is cut off or damaged: \d+ frames"):
            list(video.frames(path))


JUNK = np.random.default_rng(0).bytes(5000)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "text.mp4",
            b"this is no video\n" * 40,
            "text.mp4 cannot be decoded: it is not a video, or the file was cut off",
        ),
        ("noise.mp4", JUNK, "noise.mp4 cannot be decoded"),
        ("noise.jpg", JUNK, "noise.jpg (cannot be decoded|has no video|holds no frame|is cut off)"),
        ("notes.txt", b"hello\n" * 100, "notes.txt has no video in it"),
        ("empty.mp4", b"", r"empty.mp4 is empty \(0 bytes\)"),
    ],
)
def test_what_is_no_video_is_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    for read in (lambda: video.load(path, contract()), lambda: list(video.frames(path))):
        with pytest.raises(InputError, match=message):
            read()


@pytest.mark.parametrize("form", ["mp4", "matroska"])
def test_a_title_that_is_not_utf8_does_not_stop_a_film(tmp_path: Path, form: str) -> None:
    """PyAV before 19 has to be told so, and later ones refuse to be told."""
    path = tmp_path / "film"
    with av.open(str(path), "w", format=form) as container:
        container.metadata["title"] = "Film: XXXXXXXX"
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = SIZE
        container.mux(stream.encode(av.VideoFrame.from_ndarray(barcode(7))))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"XXXXXXXX", "Müßiggäng".encode("latin-1")[:8]))
    assert numbers(frame for _, frame in video.frames(path)) == [7]


DAMAGED = ["cfr.mp4", "fragments.mp4", "cfr.mkv", "h264.ts", "mpeg4.avi", "cfr.flv", "cfr.mpg", "raw.h264"]


@given(
    name=st.sampled_from(DAMAGED),
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=12),
    header=st.booleans(),
    keep=st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.02]),
)
def test_damaged_bytes_are_pictures_or_one_line(
    clips: dict[str, Path], name: str, places: list[tuple[float, int]], header: bool, keep: float
) -> None:
    """Whatever is in a file: frames of one size in ascending time, or our error without a line end."""
    data = bytearray(clips[name].read_bytes())
    for place, value in places:
        data[int(place * (600 if header else len(data)))] = value
    path = clips[name].with_name(f"damaged-{name}")
    path.write_bytes(data[: int(keep * len(data))])
    for read in (lambda: list(islice(video.frames(path), 100)), lambda: [(0.0, video.load(path, contract(4)).frames)]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InputWarning)
            try:
                found = read()
            except InputError as error:
                found = []
                message = str(error)
                assert "\n" not in message
                assert path.name in message
        assert all(a[0] < b[0] for a, b in pairwise(found))
        assert all(frame.dtype == np.uint8 and frame.shape[-1] == 3 for _, frame in found)


def test_index_at_the_end_is_missing(clips: dict[str, Path], tmp_path: Path) -> None:
    path = cut(clips["cfr.mp4"], tmp_path / "cut.mp4", 0.8)
    with pytest.raises(
        InputError, match=r"cut.mp4 (cannot be decoded: it is not a video, or the file was cut off|has no)"
    ):
        video.load(path, contract())


def sound(path: Path, cover: bool) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=8000, layout="mono")
        picture = container.add_stream("png") if cover else None
        if picture is not None:
            picture.width = picture.height = SIZE
            picture.pix_fmt = "rgb24"
            picture.disposition = av.stream.Disposition.attached_pic
            container.mux(picture.encode(av.VideoFrame.from_ndarray(barcode(5))))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("cover", [False, True], ids=["sound", "sound with a cover"])
def test_sound_is_refused(tmp_path: Path, cover: bool) -> None:
    path = sound(tmp_path / "song.flac", cover)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == int(cover)
    with pytest.raises(InputError, match=r"song.flac has no video in it"):
        video.load(path, contract())


@pytest.mark.parametrize("form", ["mp4", "matroska", "mov"])
@pytest.mark.parametrize("film_first", [False, True])
def test_the_film_is_read_and_not_its_thumbnail(tmp_path: Path, form: str, film_first: bool) -> None:
    """Drones and phones keep a small picture as a stream of its own, often the first, and do not mark it as a cover."""
    path = tmp_path / "drone"
    with av.open(str(path), "w", format=form) as container:
        film, thumbnail = (
            container.add_stream("libx264" if is_film else "mjpeg", rate=25)
            for is_film in ((True, False) if film_first else (False, True))
        )
        if not film_first:
            film, thumbnail = thumbnail, film
        film.width = film.height = SIZE
        film.max_b_frames = 0
        thumbnail.width = thumbnail.height = SIZE // 2
        thumbnail.pix_fmt = "yuvj420p"
        picture = av.VideoFrame.from_ndarray(barcode(255)[::2, ::2]).reformat(format="yuvj420p")
        container.mux(thumbnail.encode(picture))
        for i in range(30):
            container.mux(film.encode(av.VideoFrame.from_ndarray(barcode(i))))
        container.mux(film.encode())
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 2
    assert numbers(frame for _, frame in video.frames(path)) == list(range(30))
    assert numbers(video.load(path, contract(4), start=0.4).frames) == [10, 11, 12, 13]


@dataclass
class Candidate:
    """What is known of a stream before it is read."""

    frames: int
    disposition: int
    width: int
    height: int
    codec_context: object | None = 1


@pytest.mark.parametrize(
    ("streams", "best"),
    [
        ([(0, 1, 160, 120), (0, 1, 320, 240)], 1),  # the larger
        ([(0, 1, 320, 240), (0, 0, 3840, 2160)], 0),  # the default
        ([(0, 1, 320, 240), (0, 1, 320, 240)], 0),  # the first
        ([(1, 1, 3840, 2160), (90, 0, 320, 240)], 1),  # the one that moves
        ([(0, 1 | Disposition.timed_thumbnails, 3840, 2160), (0, 0, 320, 240)], 1),
        ([(0, 1 | Disposition.attached_pic, 600, 600), (0, 0, 320, 240)], 1),
        ([(0, 1, 320, 240, None), (0, 0, 160, 120)], 1),  # the one with a decoder
        ([(0, Disposition.attached_pic, 600, 600)], None),
        ([], None),
    ],
)
def test_the_stream_that_a_player_would_show(streams: list[tuple[Any, ...]], best: int | None) -> None:
    candidates = [Candidate(*stream) for stream in streams]
    found = decoding.film(candidates)  # type: ignore[arg-type]
    assert (None if found is None else candidates.index(found)) == best  # type: ignore[arg-type]


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.mp4 is not a file"):
        video.load(tmp_path / "none.mp4", contract())
    with pytest.raises(InputError, match=r"is a folder, not a file"):
        video.load(tmp_path, contract())


# -------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp"])
def test_image_is_what_pillow_reads(tmp_path: Path, suffix: str) -> None:
    y, x = np.mgrid[0:50, 0:70]
    pixels = np.stack([x * 3, y * 5, x + y], -1).astype(np.uint8)
    path = tmp_path / f"50%03d{suffix}"  # a % must not be taken as the pattern of a sequence
    options: dict[str, Any] = {"quality": 100, "subsampling": 0} if suffix == ".jpg" else {}
    Image.fromarray(pixels).save(path, **options)
    (_, frame), *rest = video.frames(path)
    assert not rest
    slack = {".png": 0, ".bmp": 0}.get(suffix, 6)  # another decoder rounds the colours another way
    assert np.abs(frame.astype(int) - np.asarray(Image.open(path).convert("RGB"))).max() <= slack
    wanted = InputContract(1, 32, 32, fps=30.0)
    clip = video.load(path, wanted)
    np.testing.assert_array_equal(clip.frames, preprocess.prepare(frame, wanted))
    assert (clip.name, clip.start, clip.end) == (str(path), None, None)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16"])
def test_image_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(np.tile(np.arange(0, 240, 4, dtype=np.uint8), (20, 1)))
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    image.save(tmp_path / "image.png")
    ((_, frame),) = video.frames(tmp_path / "image.png")
    assert frame.shape == (20, 60, 3)
    assert np.abs(frame.astype(int) - np.asarray(grey)[..., None]).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff", ".avif"])
def test_photo_is_shown_as_exif_says(tmp_path: Path, suffix: str, orientation: int) -> None:
    y, x = np.mgrid[0:32, 0:48]
    pixels = np.stack([x * 5, y * 7, np.full_like(x, 40)], -1).astype(np.uint8)  # unlike all its turns and mirrors
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality: dict[str, Any] = {"lossless": True} if suffix == ".webp" else {"quality": 97, "subsampling": "4:4:4"}
    Image.fromarray(pixels).save(tmp_path / f"photo{suffix}", exif=exif, **({} if suffix == ".tiff" else quality))
    ((_, frame),) = video.frames(tmp_path / f"photo{suffix}")
    with Image.open(tmp_path / f"photo{suffix}") as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(int)
    assert frame.shape == upright.shape
    assert np.abs(frame - upright).max() <= (0 if suffix in (".png", ".webp", ".tiff") else 6)


def shown(pixels: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """A display matrix (a, b, c, d) read slowly: the pixel at (x, y) is shown at (ax + cy, bx + dy)."""
    a, b, c, d = matrix
    height, width = pixels.shape[:2]
    places = {(a * x + c * y, b * x + d * y): pixels[y, x] for y in range(height) for x in range(width)}
    left, top = (min(place[axis] for place in places) for axis in (0, 1))
    right, bottom = (max(place[axis] for place in places) for axis in (0, 1))
    return np.array([[places[x, y] for x in range(left, right + 1)] for y in range(top, bottom + 1)])


MATRICES = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_film_is_shown_as_its_display_matrix_says(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Turned and mirrored, as front cameras record it."""
    path = encode(tmp_path / "phone.mp4", count=3)
    stored = [frame for _, frame in video.frames(path)]
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44  # after version, flags, times, id, length, layer and volume
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    found = [frame for _, frame in video.frames(path)]
    assert len(found) == 3
    for frame, pixels in zip(found, stored, strict=True):
        np.testing.assert_array_equal(frame, shown(pixels, matrix))
    np.testing.assert_array_equal(video.load(path, contract(3)).frames, [shown(p, matrix) for p in stored])


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_phone_video_is_turned_upright(tmp_path: Path, rotation: int) -> None:
    """The display matrix says by how much a player turns the picture, counter-clockwise."""
    path = encode(tmp_path / "phone.mp4", rotation=rotation, count=12)
    upright = [np.rot90(frame, -rotation // 90) for _, frame in video.frames(path)]
    assert numbers(upright) == list(range(12))


def test_still_image_is_refused_by_a_video_model(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "photo.jpg")
    message = r"photo.jpg is a still image; the model needs 16 frames: give a video, or export .*--input image"
    with pytest.raises(InputError, match=message):
        video.load(tmp_path / "photo.jpg", contract(16))
    with pytest.raises(InputError, match=r"start is 1.0 s, but .*photo.jpg is a still image"):
        video.load(tmp_path / "photo.jpg", contract(1), start=1.0)


@pytest.mark.parametrize(("mode", "options"), [("avif", {}), ("gif", {}), ("png", {"save_all": True})])
def test_one_frame_is_a_still_image_in_any_container(tmp_path: Path, mode: str, options: dict[str, Any]) -> None:
    path = tmp_path / f"picture.{mode}"
    Image.fromarray(barcode(9)).save(path, **options)
    with pytest.raises(InputError, match=r"is a still image; the model needs 16 frames"):
        video.load(path, contract(16))
    clip = video.load(path, contract(1))
    assert (numbers(clip.frames), clip.start, clip.end) == ([9], None, None)


def animation(path: Path) -> Path:
    first, *rest = [Image.fromarray(barcode(i)) for i in range(12)]
    quality: dict[str, Any] = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=rest, duration=[100] * 6 + [50] * 6, loop=0, **quality)
    return path


@pytest.mark.parametrize("mode", ["gif", "png", "webp"])
def test_animations_are_videos(tmp_path: Path, mode: str) -> None:
    path = animation(tmp_path / f"a.{mode}")
    times, pixels = zip(*video.frames(path), strict=True)
    with Image.open(path) as image:
        pillow = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    np.testing.assert_array_equal(pixels, pillow)
    assert numbers(pixels) == list(range(12))
    assert times == pytest.approx([*np.arange(6) / 10, *(0.6 + np.arange(6) / 20)])


@pytest.mark.parametrize("mode", ["gif", "png", "webp"])
def test_an_animation_that_is_cut_off_is_refused(tmp_path: Path, mode: str) -> None:
    """Or shown as far as it goes, where whole pictures are missing at the end of a GIF."""
    path = animation(tmp_path / f"a.{mode}")
    data = path.read_bytes()
    whole = [frame for _, frame in video.frames(path)]
    refused = 0
    for length in range(10, len(data), 17):
        path.write_bytes(data[:length])
        if refusal(path):
            refused += 1
        else:
            assert mode == "gif" or length > len(data) - 9
            for (_, frame), expected in zip(video.frames(path), whole, strict=False):
                np.testing.assert_array_equal(frame, expected)
    assert refused > 0.7 * len(data) / 17


@pytest.mark.skipif("webp_anim" in av.formats_available, reason="this FFmpeg reads animated WebP")
def test_an_animated_webp_of_absurd_size_is_refused(tmp_path: Path) -> None:
    path = animation(tmp_path / "a.webp")
    data = bytearray(path.read_bytes())
    data[27:30] = (2_000_000).to_bytes(3, "little")  # the canvas's height, less one
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a.webp cannot be used: Image size \(128000064 pixels\) exceeds limit"):
        list(video.frames(path))


def test_animated_webp_without_pillow_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = animation(tmp_path / "a.webp")
    monkeypatch.setattr(av, "formats_available", av.formats_available - {"webp_anim"})
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingPackageError, match=r"PIL is not installed; install it with: .*plot"):
        list(video.frames(path))


def photograph(options: dict[str, Any]) -> bytes:
    y, x = np.mgrid[0:60, 0:90]
    noise = np.random.default_rng(0).integers(0, 40, (60, 90, 3))
    pixels = (np.stack([x * 2, y * 3, x + y], -1) + noise).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, **options)
    return file.getvalue()


PHOTOS: dict[str, dict[str, Any]] = {
    "baseline": {"format": "JPEG", "quality": 90},
    "progressive": {"format": "JPEG", "quality": 90, "progressive": True},
    "restart markers": {"format": "JPEG", "quality": 90, "restart_marker_blocks": 4},
    "end marker in a comment": {"format": "JPEG", "quality": 90, "comment": b"\xff\xd9" * 50},
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "lossless": True},
    "tiff": {"format": "TIFF", "compression": "tiff_lzw"},
    "bmp": {"format": "BMP"},
}


@pytest.mark.parametrize("kind", PHOTOS)
def test_a_picture_that_is_cut_off_is_refused(tmp_path: Path, kind: str) -> None:
    """At every length: refused, or the whole picture (the last bytes of some formats hold no pixel)."""
    data = photograph(PHOTOS[kind])
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    ((_, whole),) = video.frames(path)
    assert np.abs(whole.astype(int) - np.asarray(Image.open(path).convert("RGB"))).mean() < 2
    lengths = [*range(20, len(data), max(1, len(data) // 60)), *range(len(data) - 40, len(data))]
    refused = 0
    for length in lengths:
        path.write_bytes(data[:length])
        message = refusal(path)
        if message is None:
            np.testing.assert_array_equal(next(iter(video.frames(path)))[1], whole)
        else:
            assert re.search("photo.jpg (is cut off or damaged|cannot be decoded|has no video)", message)
            refused += 1
    assert refused > 0.9 * len(lengths) or kind == "tiff"


def refusal(path: Path) -> str | None:
    try:
        list(video.frames(path))
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("tail", [b"\0" * 500, b"SEFT" + bytes(range(256)), photograph(PHOTOS["baseline"])])
def test_what_follows_a_jpeg_does_not_matter(tmp_path: Path, tail: bytes) -> None:
    """Phones append their own data, or a second picture."""
    for name, data in (("a.jpg", b""), ("b.jpg", tail)):
        (tmp_path / name).write_bytes(photograph(PHOTOS["baseline"]) + data)
    first, second = (next(iter(video.frames(tmp_path / name)))[1] for name in ("a.jpg", "b.jpg"))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(("space", "red", "blue"), [(1, 0.2126, 0.0722), (5, 0.299, 0.114), (9, 0.2627, 0.0593)])
@pytest.mark.parametrize("full", [False, True])
def test_colours_follow_the_matrix_and_range_of_the_frame(space: int, red: float, blue: float, full: bool) -> None:
    """BT.709, BT.601 and BT.2020, limited and full range, by the formula."""
    luma, cb, cr = 100, 90, 170
    frame = av.VideoFrame(32, 32, "yuv420p")
    for plane, value in zip(frame.planes, (luma, cb, cr), strict=True):
        plane.update(bytes([value]) * plane.buffer_size)
    frame.colorspace, frame.color_range = space, 2 if full else 1
    y, u, v = (
        (luma, cb - 128, cr - 128) if full else ((luma - 16) * 255 / 219, (cb - 128) / 0.87843, (cr - 128) / 0.87843)
    )
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    g = (y - red * r - blue * b) / (1 - red - blue)
    assert np.abs(decoding.rgb(frame)[16, 16] - np.array([r, g, b])).max() <= 3


# ------------------------------------------------------------------------------------------------- cameras and network


def test_missing_camera_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for source in (97, "97"):
        with pytest.raises(InputError, match=r"there is no camera 97 \(/dev/video97\); this machine has "):
            next(video.frames(source))


@pytest.mark.parametrize(
    ("platform", "file", "form"), [("darwin", "2:none", "avfoundation"), ("win32", "video=Front", "dshow")]
)
def test_cameras_elsewhere_are_opened_by_their_system(
    monkeypatch: pytest.MonkeyPatch, platform: str, file: str, form: str
) -> None:
    devices = [av.DeviceInfo(n, "", False, [k]) for n, k in (("A", "video"), ("Mic", "audio"), ("B", "video"))]
    devices.append(av.DeviceInfo("Front", "", False, ["video"]))
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(av, "enumerate_input_devices", lambda form: devices)
    camera = address.of(2)
    assert (camera.file, camera.format) == (file, form)
    if platform == "win32":
        with pytest.raises(InputError, match="there is no camera 3; this machine has A, B, Front"):
            address.of(3)


def test_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/clip.mp4"
        with pytest.raises(InputError, match=r"did not answer within 0.3 s; is it on, and can it be reached"):
            next(video.frames(url))


def test_refused_connection_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(InputError, match="cannot be used: Connection refused"):
        next(video.frames(f"rtsp://127.0.0.1:{port}/"))


def serve(data: bytes) -> str:
    """One HTTP answer with `data`, then the connection closes."""
    server = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with server, server.accept()[0] as client:
            client.recv(4096)
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data)

    threading.Thread(target=answer, daemon=True).start()
    return f"http://127.0.0.1:{server.getsockname()[1]}/live.ts"


def test_stream_over_http_counts_from_its_first_frame(clips: dict[str, Path]) -> None:
    times, pixels = zip(*video.frames(serve(clips["h264.ts"].read_bytes())), strict=True)
    assert numbers(pixels) == list(range(60))
    assert times == pytest.approx(np.arange(60) / 25, abs=1e-3)


def test_stream_that_is_joined_in_the_middle_starts_with_the_next_key_frame(clips: dict[str, Path]) -> None:
    data = clips["h264.ts"].read_bytes()
    times, pixels = zip(*video.frames(serve(data[len(data) // 3 // 188 * 188 :])), strict=True)
    shown = numbers(pixels)
    assert times[0] == 0.0
    assert shown == list(range(shown[0], 60))
    assert 0 < shown[0] < 50


class Hesitant:
    """A camera whose driver says "not yet" before each packet, as avfoundation does."""

    def __init__(self, container: Any, stream: Any) -> None:
        self.packets, self.ready = list(container.demux(stream)), False
        self.format, self.metadata = container.format, container.metadata

    def demux(self, stream: Any) -> Iterator[Any]:
        while self.packets:
            self.ready = not self.ready
            if self.ready:
                raise av.BlockingIOError(11, "Resource temporarily unavailable")
            yield self.packets.pop(0)


def test_camera_that_is_not_ready_is_asked_again(clips: dict[str, Path]) -> None:
    with av.open(str(clips["cfr.mp4"])) as container:
        stream = container.streams.video[0]
        reader = decoding.Reader(address.Address("camera 0", None), cast(Any, Hesitant(container, stream)), stream)
        assert numbers(decoding.rgb(frame) for _, frame in reader.frames()) == list(range(60))


# -------------------------------------------------------------------------------------------------------------- sources


def test_folder_is_searched_in_order(tmp_path: Path) -> None:
    for name in ("b.mp4", "a/z.MOV", "a/y.jpg", "a/notes.txt", ".hidden.mp4", ".cache/c.mp4", "a/._b.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert video.sources(tmp_path) == [tmp_path / "a/y.jpg", tmp_path / "a/z.MOV", tmp_path / "b.mp4"]
    assert video.sources(str(tmp_path / "**/*.mp4")) == [tmp_path / "b.mp4"]
    assert video.sources(str(tmp_path / "a/notes.txt")) == [tmp_path / "a/notes.txt"]


def test_still_images_beside_videos_are_left_out_for_a_model_that_takes_clips(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.jpg", "notes.txt"):
        (tmp_path / name).touch()
    clips, images = InputContract(4, 16, 24), InputContract(1, 16, 24)
    found, note = video.search(tmp_path, clips)
    assert found == [tmp_path / "a.mp4"]
    assert note == f"2 files of {tmp_path} left out, not clips: 1 .jpg, 1 .txt"
    assert video.search(tmp_path, images)[0] == [tmp_path / "a.jpg", tmp_path / "a.mp4"]
    assert video.search(tmp_path / "a.jpg", clips) == ([tmp_path / "a.jpg"], "")


@pytest.mark.parametrize(
    ("given", "expected"),
    [(0, [0]), ("3", [3]), ("rtsp://host/1", ["rtsp://host/1"]), ("http://h/v.mp4", ["http://h/v.mp4"])],
)
def test_cameras_and_urls_pass(given: int | str, expected: list[Any]) -> None:
    assert video.sources(given) == expected


def test_nothing_found_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the folder .* holds no clip \(it is empty\); known are .*\.mp4"):
        video.sources(tmp_path)
    for name in ("none.mp4", "*.mp4"):
        with pytest.raises(InputError, match="there is no file, folder or match for"):
            video.sources(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------------- write


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    if codec == "mpeg4":
        monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    path = video.write(tmp_path / "out.mp4", (barcode(i) for i in range(40)), fps=12.5)
    times, pixels = zip(*video.frames(path), strict=True)
    assert numbers(pixels) == list(range(40))
    assert times == pytest.approx(np.arange(40) / 12.5)
    assert np.abs(np.stack(pixels).astype(int) - np.stack([barcode(i) for i in range(40)])).mean() < 3
    assert list(tmp_path.iterdir()) == [path]
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == ("h264" if codec == "libx264" else "mpeg4")


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_write_keeps_the_times_of_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    """A phone in the dark: 30 frames a second, then three."""
    if codec == "mpeg4":
        monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    wanted = [*np.arange(30) / 30, *(1 + np.arange(30) / 3)]
    path = video.write(tmp_path / "out.mp4", ((t, barcode(i)) for i, t in enumerate(wanted)), fps=30000 / 1001)
    times, pixels = zip(*video.frames(path), strict=True)
    assert numbers(pixels) == list(range(60))
    assert times == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("fps", [12.5, 24000 / 1001, 25, 30000 / 1001, 59.94, 240, 0.5])
def test_rates_are_exact(tmp_path: Path, fps: float) -> None:
    path = video.write(tmp_path / "out.mp4", (barcode(i) for i in range(10)), fps)
    assert [t for t, _ in video.frames(path)] == pytest.approx(np.arange(10) / fps, rel=1e-9)
    with av.open(str(path)) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-6)


def test_the_video_that_is_read_is_not_written(tmp_path: Path) -> None:
    path = video.write(tmp_path / "mine.mp4", [GOOD] * 3, 10)
    (tmp_path / "link.mp4").symlink_to(path)
    for name in (path, tmp_path / "link.mp4", tmp_path / ".." / tmp_path.name / "mine.mp4"):
        with pytest.raises(InputError, match=r"cannot write .*mp4: it is the video that is read; give another name"):
            video.check_output(name, path)
    assert video.check_output(tmp_path / "other.mp4", path) == tmp_path / "other.mp4"
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(InputError, match="it is a folder"):
        video.check_output(tmp_path / "folder.mp4")


def test_odd_sides_repeat_the_edge(tmp_path: Path) -> None:
    y, x = np.mgrid[0:33, 0:47]
    ramp = np.stack([x * 5, y * 7, x + y], -1).astype(np.uint8)
    path = video.write(tmp_path / "odd.mp4", [ramp[:, ::-1]] * 3, fps=10)  # negative strides too
    (_, frame), *_ = video.frames(path)
    assert frame.shape == (34, 48, 3)
    assert np.abs(frame[:33, :47].astype(int) - ramp[:, ::-1]).mean() < 6
    assert np.abs(frame[:, 47].astype(int) - frame[:, 46]).mean() < 6


GOOD = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("frames", "fps", "name", "message"),
    [
        ([], 10, "a.mp4", "there are no frames to write"),
        ([GOOD, GOOD[:6]], 10, "a.mp4", r"frame 1 is uint8 \(6, 8, 3\); expected uint8 \(8, 8, 3\) as the first"),
        ([GOOD.astype(np.float32)], 10, "a.mp4", r"frame 0 is float32 \(8, 8, 3\); expected uint8"),
        ([GOOD[..., 0]], 10, "a.mp4", r"frame 0 is uint8 \(8, 8\); expected uint8 \(height, width, 3\)"),
        (
            [(0.2, GOOD), (0.1, GOOD)],
            10,
            "a.mp4",
            "frame 1 is at 0.1 s; expected a time after that of the frame before",
        ),
        ([(float("nan"), GOOD)], 10, "a.mp4", "the time of frame 0 is nan; expected seconds"),
        ([GOOD], 0, "a.mp4", r"fps is 0; expected a rate in \(0, 1000\)"),
        ([GOOD], 10, "a.avi", r"a.avi: expected a name that ends in .mp4"),
        ([GOOD], 10, "no/a.mp4", r"there is no folder .*no"),
    ],
)
def test_write_refuses_and_leaves_nothing(tmp_path: Path, frames: list[Any], fps: int, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        video.write(tmp_path / name, frames, fps)
    assert not list(tmp_path.iterdir())


def test_write_keeps_the_old_file_when_the_frames_fail(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    path.write_bytes(b"old")

    def broken() -> Iterator[Any]:
        yield GOOD
        raise RuntimeError("the camera is gone")

    with pytest.raises(RuntimeError, match="the camera is gone"):
        video.write(path, broken(), 10)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# --------------------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("name", ["cfr.mp4", "one-key-frame.mp4", "cfr.mkv", "h264.ts", "mpeg4.avi", "raw.h264"])
def test_temporal_views_of_a_file(clips: dict[str, Path], name: str) -> None:
    """60 frames; 8 of every 4th leave room for 28."""
    wanted = InputContract(8, SIZE, SIZE, sampling="stride", stride=4)
    found = [numbers(clip.frames) for clip in video.load_views(clips[name], wanted, Views(5, 1))]
    assert found == [list(range(first, first + 32, 4)) for first in (0, 7, 14, 21, 28)]
    segments = InputContract(6, SIZE, SIZE, sampling="segments")
    found = [numbers(clip.frames) for clip in video.load_views(clips[name], segments, Views(2, 1))]
    assert found == [[0, 10, 20, 30, 40, 50], [5, 15, 25, 35, 45, 55]]


@pytest.mark.parametrize(
    "sampling", [{"fps": 10.0}, {"fps": None}, {"sampling": "stride", "stride": 4}, {"sampling": "segments"}]
)
def test_views_of_a_file_and_of_its_frames_are_alike(clips: dict[str, Path], sampling: dict[str, Any]) -> None:
    wanted = InputContract(6, 34, 30, resize_size=50, filter="bicubic", crop="center-floor", **sampling)
    pixels = np.stack([frame for _, frame in video.frames(clips["cfr.mp4"])])
    views = Views(3, 3)
    found = video.load_views(clips["cfr.mp4"], wanted, views)
    expected = [preprocess.prepare(pixels, wanted, 25.0, view=view) for crops in views for view in crops]
    assert len(found) == 9
    for clip, frames in zip(found, expected, strict=True):
        np.testing.assert_array_equal(clip.frames, frames)
    assert len({clip.frames.tobytes() for clip in found}) == 9


def test_the_crops_of_a_temporal_view_are_decoded_once(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    converted = []
    rgb = decoding.rgb
    monkeypatch.setattr(video, "rgb", lambda frame: converted.append(frame.pts) or rgb(frame))
    found = video.load_views(clips["cfr.mp4"], InputContract(4, 16, 16, resize_size=32, fps=5.0), Views(2, 3))
    assert (len(found), len(converted)) == (6, 8)
    assert [clip.start for clip in found] == pytest.approx([0.0] * 3 + [1.6] * 3)


def test_a_still_image_has_crops_and_no_temporal_views(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = video.load_views(tmp_path / "a.png", InputContract(1, 20, 20), Views(1, 3))
    for clip, left in zip(found, (0, 15, 30), strict=True):
        np.testing.assert_array_equal(clip.frames[0], pixels[:, left : left + 20])
    with pytest.raises(
        InputError, match=r"a\.png is a still image and has 1 temporal view, not 5: use --views 1x1 or 1x3"
    ):
        video.load_views(tmp_path / "a.png", InputContract(1, 20, 20), Views(5, 3))
