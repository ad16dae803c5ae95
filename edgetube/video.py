"""Frames in and out: video files, images, cameras, arrays."""

from __future__ import annotations

import glob
import io
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from edgetube import listing, preprocess
from edgetube.errors import InputError
from edgetube.files import replacing
from edgetube.listing import IMAGES, VIDEOS
from edgetube.preprocess import TOLERANCE, Frames
from edgetube.spec import InputContract

if TYPE_CHECKING:  # PyAV takes half as long to import as numpy; `import edgetube` does not wait for it
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream

__all__ = ["IMAGES", "VIDEOS", "Clip", "Frames", "Source", "frames", "load", "sources", "write"]

Source: TypeAlias = int | str | Path
"""A camera's index (also as digits), a URL, or a file."""

TIMEOUT = 10.0
"""Seconds that a URL or a camera may take to open, and again for each next frame."""

_MP4, _MATROSKA, _TS, _AVI = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts", "avi"
_HEADED = frozenset((_MP4, _MATROSKA, _AVI))
"""Containers whose header says how long they are; for others FFmpeg guesses, from the bit rate at worst."""

_SOUGHT = frozenset((_MP4, _MATROSKA, _TS))
"""Containers in which timestamps are right after a seek; others are decoded from their beginning."""


@dataclass(frozen=True)
class Clip:
    """One clip that a model can take, with what is known about it.

    Attributes:
        name: where it comes from, unique in its set.
        frames: (T, H, W, 3) uint8 RGB, already through `edgetube.preprocess`.
        label: the true class, or None.
        start, end: seconds of the source that it covers, when the source has a clock.
    """

    name: str
    frames: Frames
    label: str | None = None
    start: float | None = None
    end: float | None = None


# --------------------------------------------------------------------------------------------------------------- public


def load(path: str | Path, contract: InputContract, start: float | None = None) -> Clip:
    """The clip of a video file, or of an image file where the contract takes images.

    Frames are found by their timestamps and resized as they are decoded, so memory does not grow with the video, and
    only the part around the clip is decoded.

    Args:
        start: second at which the clip begins; None takes the middle of the video.

    Returns:
        A clip whose `start` is the timestamp of its first frame and whose `end` is when its last frame leaves.

    Raises:
        InputError: no such file, no video in it, damaged or cut off within the clip, a still image for a model that
            takes several frames, or a `start` outside the video.
    """
    path = Path(path)
    out = np.empty(contract.shape, np.uint8)
    with _open(_file(path)) as reader:
        if reader.is_still:
            if not contract.is_image:
                remedy = "give a video, or export the model for images (--input image)"
                raise InputError(f"{path} is a still image; the model needs {contract.frames} frames: {remedy}")
            if start is not None:
                raise InputError(f"start is {start} s, but {path} is a still image and has no clock")
        begin = 0.0 if reader.is_still else preprocess.window(contract, reader.duration(), reader.rate, start)
        times: list[float] = []
        previous = None
        for slot, (seconds, frame) in zip(out, preprocess.pick(reader.frames(begin), contract, begin), strict=False):
            if frame is not previous:
                pixels = preprocess.spatial(_rgb(frame)[None], contract)[0]
            previous, slot[...] = frame, pixels
            times.append(seconds)
        if not times:
            raise InputError(f"{path} holds no frame that can be decoded")
        if reader.is_still:
            return Clip(str(path), out)
        return Clip(str(path), out, start=times[0], end=times[-1] + 1 / reader.rate)


def frames(source: Source) -> Iterator[tuple[float, Frames]]:
    """The frames of a file, a camera or a URL, as they come.

    Args:
        source: a path, a camera's index as a number or digits, or a URL (rtsp://, http://, ...).

    Yields:
        (seconds, frame (H, W, 3) uint8 RGB, upright); files count from their beginning, live sources from their
        first frame. A frame that was lost on the way is skipped in a live source and an error in a file.

    Raises:
        InputError: the source cannot be opened or decoded, ends before its time, or stays silent for `TIMEOUT` s.
    """
    with _open(_known(source)) as reader:
        empty = True
        for seconds, frame in reader.frames():
            empty = False
            yield seconds, _rgb(frame)
        if empty:
            raise InputError(f"{source} holds no frame that can be decoded")


def rate(source: Source) -> float:
    """Frames per second of a source, as its header says or FFmpeg guesses.

    Raises:
        InputError: the source cannot be opened.
    """
    with _open(_known(source)) as reader:
        return reader.rate


def sources(source: Source) -> list[Source]:
    """What a person's argument stands for: a file, the files of a folder or a glob, a camera, a URL; see `search`.

    Raises:
        InputError: nothing is found.
    """
    return search(source)[0]


def search(source: Source, contract: InputContract | None = None) -> tuple[list[Source], str]:
    """The sources that an argument stands for, and one line about files of a folder that are left out, or "".

    A folder is searched through, in sorted order, for the suffixes `VIDEOS` and `IMAGES`; links are followed, hidden
    files are passed over.

    Args:
        contract: of the model that is asked; still images are left out when it takes several frames.

    Raises:
        InputError: nothing is found.
    """
    known = _known(source)
    if not isinstance(known, Path) or known.is_file():
        return [known], ""
    if known.is_dir():
        wanted = VIDEOS if contract and not contract.is_image else VIDEOS | IMAGES
        found = listing.walk(known, wanted)
        return list(found.required(known, wanted)), found.note(known)
    # `Path.glob` has no patterns that are absolute.
    matches = sorted(glob.glob(str(known), recursive=True))  # noqa: PTH207
    files = [p for p in map(Path, matches) if p.is_file()]
    if not files:
        raise InputError(f"there is no file, folder or match for {known}")
    return list(files), ""


def write(path: str | Path, frames: Iterable[Frames], fps: float) -> Path:
    """Encode frames (H, W, 3) uint8 RGB as mp4: H.264 where PyAV has it, else MPEG-4 part 2.

    The file appears when it is complete: it is written beside its place and renamed. Sides that are odd repeat their
    last row or column, since 4:2:0 chroma needs even ones.

    Raises:
        InputError: no frames, frames of different or wrong shapes, a rate that is not positive, or a path that
            cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise InputError(f"cannot write {path}: expected a name that ends in .mp4")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    if not 0 < fps < 1000:
        raise InputError(f"fps is {fps}; expected a rate in (0, 1000)")
    with replacing(path) as part, _vendor_errors(path):
        _encode(part, iter(frames), Fraction(fps).limit_denominator(1001))
    return path


# -------------------------------------------------------------------------------------------------- where it comes from


@dataclass(frozen=True)
class _Address:
    """How PyAV opens a source."""

    name: str
    file: Any
    format: str | None = None
    options: tuple[tuple[str, str], ...] = ()
    path: Path | None = None
    """The local file, or None for what is live."""


def _known(source: Source) -> Source:
    """A source with digits as a camera's number and everything that is no URL as a path.

    Raises:
        InputError: neither a number, nor text, nor a path.
    """
    if isinstance(source, bool) or not isinstance(source, Source):
        raise InputError(f"the source is {source!r:.60}; expected a path, a URL or a camera's index")
    if isinstance(source, str):
        if source.isdecimal():
            return int(source)
        return source if "://" in source else Path(source)
    return source


def _address(source: Source) -> _Address:
    if isinstance(source, Path):
        return _file(source)
    if isinstance(source, str):
        # RTSP over UDP loses packets without a word; a server that has TCP is asked for it first.
        options = (("rtsp_flags", "prefer_tcp"),) if source.startswith("rtsp") else ()
        return _Address(source, source, options=options)
    return _camera(source)


def _file(path: Path) -> _Address:
    if not path.is_file():
        if path.is_symlink() and not path.exists():
            raise InputError(f"{path} is a link to {path.readlink()}, which is not there")
        raise InputError(f"{path} is {'a folder, not' if path.is_dir() else 'not'} a file")
    if not path.stat().st_size:
        raise InputError(f"{path} is empty (0 bytes)")
    # Images go in as bytes: FFmpeg's image reader would take a % in the name as the pattern of a sequence.
    # "file:" keeps a colon in the name from being read as a protocol.
    file = io.BytesIO(path.read_bytes()) if path.suffix.lower() in IMAGES else f"file:{path}"
    return _Address(str(path), file, path=path)


def _camera(index: int) -> _Address:
    name = f"camera {index}"
    if sys.platform == "darwin":
        # The built-in cameras offer 30, and FFmpeg's default of 29.97 is refused.
        return _Address(name, f"{index}:none", "avfoundation", (("framerate", "30"),))
    if sys.platform == "win32":
        import av

        found = [device.name for device in av.enumerate_input_devices("dshow") if "video" in device.media_types]
        if not 0 <= index < len(found):
            raise InputError(f"there is no {name}; this machine has {', '.join(found) or 'none'}")
        return _Address(name, f"video={found[index]}", "dshow")
    device = Path(f"/dev/video{index}")
    if not device.exists():
        present = ", ".join(sorted(map(str, device.parent.glob("video*")))) or "none"
        raise InputError(f"there is no {name} ({device}); this machine has {present}")
    return _Address(name, str(device), "video4linux2,v4l2")


@contextmanager
def _vendor_errors(name: object) -> Iterator[None]:
    """The one place where PyAV's errors become ours."""
    import av

    try:
        yield
    except (av.ExitError, av.TimeoutError) as error:
        raise InputError(f"{name} did not answer within {TIMEOUT:g} s; is it on, and can it be reached?") from error
    except (av.InvalidDataError, av.EOFError) as error:
        raise InputError(f"{name} cannot be decoded: it is no video, or the file was cut off") from error
    except av.FFmpegError as error:
        raise InputError(f"{name} cannot be used: {error.strerror}") from error


@contextmanager
def _open(source: Source | _Address) -> Iterator[_Reader]:
    import av
    from av.container import InputContainer
    from av.stream import Disposition

    # Titles that are not UTF-8 must not stop a film: PyAV before 19 has to be told, later ones have no such option.
    lenient: dict[str, Any] = {"metadata_errors": "ignore"} if hasattr(InputContainer, "metadata_errors") else {}
    address = source if isinstance(source, _Address) else _address(source)
    with (
        _vendor_errors(address.name),
        av.open(
            address.file,
            "r",
            format=address.format,
            options=dict(address.options),
            timeout=None if address.path else TIMEOUT,
            **lenient,
        ) as container,
    ):
        # The cover picture of a song is a video stream too; and FFmpeg renders any .txt as a video of its text.
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams or container.format.name == "tty":
            raise InputError(f"{address.name} has no video in it")
        yield _Reader(address, container, streams[0])


# --------------------------------------------------------------------------------------------------------------- decode


class _Reader:
    """An open source: its clock, and its frames in the order of display.

    Seconds count from the stream's start in a file, and from the first frame in a live source.
    """

    def __init__(self, address: _Address, container: InputContainer, stream: VideoStream) -> None:
        self.address = address
        self.container = container
        self.stream = stream
        self.live = address.path is None
        self.form = container.format.name
        self.tick = stream.time_base or Fraction(1, 1_000_000)
        self.origin = None if self.live else stream.start_time or 0
        self.rate = float(stream.guessed_rate or stream.average_rate or 25)
        # H.264 in AVI: the packets carry the order of decoding only, while the rate is constant by definition.
        self._counted = self.form == _AVI and stream.codec_context.has_b_frames
        self._end = 0.0  # second at which the last packet that was read leaves the display
        if not self.live:
            stream.thread_type = "AUTO"  # frames in parallel; costs delay, so not for cameras

    @property
    def is_still(self) -> bool:
        return self.form == "image2" or self.form.endswith("_pipe")

    def declared(self) -> float | None:
        """Seconds that the header promises; None where the format does not say."""
        if self.form not in _HEADED:
            return None
        if self.form == _AVI and self.stream.frames:
            return self.stream.frames / self.rate  # its duration is a guess where the index was cut off
        if self.stream.duration is not None:
            return float(self.stream.duration * self.tick)
        if self.container.duration is None:
            return None
        return self.container.duration / 1e6 - float((self.origin or 0) * self.tick)

    def duration(self) -> float:
        """Seconds of the video: the header's, or where it has none, read through the file without decoding."""
        return self.declared() or self._scan()[1]

    def frames(self, since: float = 0.0) -> Iterator[tuple[float, av.VideoFrame]]:
        """Decoded frames from one at or before `since` on; from the first on where the source cannot be sought.

        Raises:
            InputError: a file is damaged, or ends before its header says.
        """
        if since <= 0:
            yield from self._decode()
            return
        # A seek goes by decoding time in some formats, and to no key frame in others, so it may land too late.
        for earlier in (0.0, 10.0):
            if not self._seek(max(0.0, since - earlier)):
                break
            decoded = self._decode(sought=True)
            first = next(decoded, None)
            if first is not None and first[0] <= since + TOLERANCE:
                yield first
                yield from decoded
                return
        with self._again() as fresh:
            yield from fresh.frames()

    def _again(self) -> AbstractContextManager[_Reader]:
        """The same file from its beginning."""
        assert self.address.path is not None, "a live source has no beginning"
        return _open(_file(self.address.path))

    def _seek(self, second: float) -> bool:
        """Go to the key frame at or before `second`; False where the source cannot."""
        import av

        if self.form not in _SOUGHT or self.stream.start_time is None:
            return False
        try:
            self.container.seek(int(second / self.tick) + self.stream.start_time, stream=self.stream)
        except av.FFmpegError:
            return False
        return True

    def _packets(self) -> Iterator[av.Packet[VideoStream]]:
        import av

        heard = time.monotonic()
        while True:
            try:
                for packet in self.container.demux(self.stream):
                    yield packet
                    heard = time.monotonic()
                return
            except av.BlockingIOError as error:  # avfoundation's way to say that the next frame is not there yet
                if not self.live or time.monotonic() - heard > TIMEOUT:
                    raise InputError(f"{self.address.name} gave no frame for {TIMEOUT:g} s") from error
                time.sleep(0.002)

    def _decode(self, sought: bool = False) -> Iterator[tuple[float, av.VideoFrame]]:
        import av

        seconds: float | None = None
        try:
            for packet in self._packets():
                if packet.is_corrupt and not self.live:
                    raise self._cut_off()
                self._end = max(self._end, self._leaves(packet))
                if sought and packet.size and not packet.is_keyframe:
                    continue  # what it refers to was not read
                sought = False
                if not packet.size and packet.dts is None:  # the end, where decoders give out what they held back
                    self._check_end()
                try:
                    decoded = packet.decode()
                except av.InvalidDataError:
                    if self.live or seconds is None:  # joined in the middle of a group of pictures
                        continue
                    raise
                for frame in decoded:
                    seconds = self._seconds(frame, seconds)
                    yield seconds, frame
        except av.InvalidDataError as error:
            if self.live:
                raise
            raise self._cut_off() from error

    def _seconds(self, frame: av.VideoFrame, previous: float | None) -> float:
        """When `frame` is displayed; the clock never goes back, whatever the timestamps do."""
        due = 0.0 if previous is None else previous + 1 / self.rate
        if frame.pts is None or self._counted:
            return due
        if self.origin is None:
            self.origin = frame.pts
        seconds = float((frame.pts - self.origin) * self.tick)
        return seconds if previous is None or seconds > previous else due

    def _leaves(self, packet: av.Packet[VideoStream]) -> float:
        stamp = packet.dts if packet.pts is None else packet.pts
        return 0.0 if stamp is None else float((stamp + (packet.duration or 0) - (self.origin or 0)) * self.tick)

    def _check_end(self) -> None:
        """Refuse a file that ends before its time, by more than two frames, or more where sound may be the longer."""
        promised = None if self.live else self.declared()
        if promised is None:
            return
        exact = self.stream.duration is not None or len(self.container.streams) == 1
        slack = 2 / self.rate + (0.0 if exact else 0.25 + 0.05 * promised)
        if promised - self._end > slack:
            raise self._cut_off()

    def _scan(self) -> tuple[int, float]:
        """(frames, seconds) that can be read of a file, counted without decoding."""
        import av

        count, end = 0, 0.0
        with self._again() as fresh:
            try:
                for packet in fresh._packets():
                    if packet.size and not packet.is_corrupt:
                        count, end = count + 1, max(end, fresh._leaves(packet))
            except av.FFmpegError:
                pass  # whatever ends the reading is where the readable part ends
        return count, end or count / self.rate

    def _cut_off(self) -> InputError:
        count, seconds = self._scan()
        promised = self.declared()
        of = "" if promised is None else f" of {self.stream.frames or round(promised * self.rate)} ({promised:.2f} s)"
        remedy = "copy or record it again, or choose an earlier start"
        return InputError(
            f"{self.address.name} is cut off or damaged: {count} frames ({seconds:.2f} s){of} can be read: {remedy}"
        )


def _rgb(frame: av.VideoFrame) -> Frames:
    """(H, W, 3) uint8, by the matrix and range that the frame says, turned upright in quarter turns."""
    pixels: Frames = frame.to_ndarray(format="rgb24")  # type: ignore[assignment]
    return np.rot90(pixels, frame.rotation // 90) if frame.rotation % 360 else pixels


# --------------------------------------------------------------------------------------------------------------- encode


def _encode(path: Path, frames: Iterator[Frames], rate: Fraction) -> None:
    import av

    first = next(frames, None)
    if first is None:
        raise InputError("there are no frames to write")
    shape = np.shape(first)
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = (side + side % 2 for side in shape[:2])
        stream.pix_fmt = "yuv420p"
        for i, pixels in enumerate(chain([first], frames)):
            given = np.asarray(pixels)
            if given.shape != shape or given.ndim != 3 or given.shape[2] != 3 or given.dtype != np.uint8:
                expected = f"{shape} as the first" if len(shape) == 3 and shape[2] == 3 else "(height, width, 3)"
                raise InputError(f"frame {i} is {given.dtype} {given.shape}; expected uint8 {expected}")
            even = np.pad(given, ((0, shape[0] % 2), (0, shape[1] % 2), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
            frame.pts, frame.time_base = i, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
