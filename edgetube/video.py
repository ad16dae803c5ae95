"""Frames in and out: video files, images, cameras, arrays."""

from __future__ import annotations

import glob
import io
import re
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from edgetube import listing, preprocess, resize
from edgetube.contract import InputContract
from edgetube.errors import InputError, InputWarning
from edgetube.files import replacing
from edgetube.listing import IMAGES, VIDEOS
from edgetube.preprocess import TOLERANCE
from edgetube.resize import Frames
from edgetube.targets import need
from edgetube.views import SINGLE, View, Views

if TYPE_CHECKING:  # PyAV takes half as long to import as numpy; `import edgetube` does not wait for it
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream

__all__ = ["IMAGES", "VIDEOS", "Clip", "Frames", "Source", "frames", "load", "load_views", "sources", "write"]

Source: TypeAlias = int | str | Path
"""A camera's index (also as digits), a URL, or a file."""

SET_BACK, MAX_GAP = 0.1, 10.0
"""Seconds by which a broadcast's clock may jump back or ahead between two frames; beyond that its parts were joined."""

TIMEOUT = 10.0
"""Seconds that a URL or a camera may take to open, and again for each next frame."""

_MP4, _MATROSKA, _TS, _AVI = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts", "avi"
_HEADED = frozenset((_MP4, _MATROSKA, _AVI))
"""Containers whose header says how long they are; for others FFmpeg guesses, from the bit rate at worst."""

_ANIMATIONS = frozenset(("gif", "apng", "webp_anim"))
_PICTURE_BRANDS = frozenset(("avif", "heic", "heix", "heim", "heis", "mif1", "miaf"))
"""What a file says of itself that has the container of MP4 and holds a picture: AVIF and HEIF."""

_BROADCAST = frozenset((_TS, "mpeg"))
"""Containers made for lossy channels and for joining: parts may be missing, and the clock may start again."""

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
            takes several frames, or a `start` outside the video, or for segments of the whole video.
    """
    return load_views(path, contract, SINGLE, start)[0]


def load_views(path: str | Path, contract: InputContract, views: Views, start: float | None = None) -> tuple[Clip, ...]:
    """The views of a file, the crops of each temporal view together; the file is decoded once for each temporal view.

    Raises:
        InputError: as `load` raises, or several temporal views of a still image, or with a `start`.
    """
    return tuple(clip for crops in views for clip in _load(Path(path), contract, start, crops))


def _load(path: Path, contract: InputContract, start: float | None, views: Sequence[View]) -> list[Clip]:
    """The clips of one temporal view, one for each of its crops."""
    out = np.empty((len(views), *contract.shape), np.uint8)
    with _open(_file(path)) as reader:
        if reader.is_still:
            if not contract.is_image:
                remedy = "give a video, or export the model for images (--input image)"
                raise InputError(f"{path} is a still image; the model needs {contract.frames} frames: {remedy}")
            if start is not None:
                raise InputError(f"start is {start} s, but {path} is a still image and has no clock")
            preprocess.check_still(str(path), views[0])
        if reader.is_still:
            times = _fill(out, reader.frames(), contract, views)
        elif contract.sampling == "segments":
            times = _fill_segments(out, reader, contract, start, views)
        else:
            begin = preprocess.window(contract, reader.duration(), reader.rate, start, views[0])
            times = _fill(out, preprocess.pick(reader.frames(begin), contract, begin), contract, views)
        if not times:
            raise InputError(f"{path} holds no frame that can be decoded")
        start, end = (None, None) if reader.is_still else (times[0], times[-1] + 1 / reader.rate)
        return [Clip(str(path), frames, start=start, end=end) for frames in out]


def _fill(
    out: Frames, chosen: Iterable[tuple[float, av.VideoFrame]], contract: InputContract, views: Sequence[View]
) -> list[float]:
    """Resize chosen frames into clips, the same frame once; returns their times. Reads no more than fit.

    Args:
        out: (V, T, H, W, 3), a clip for the crop of each of the views.
    """
    times: list[float] = []
    previous = None
    for slots, (seconds, frame) in zip(out.swapaxes(0, 1), chosen, strict=False):
        if frame is not previous:
            whole = _rgb(frame)[None]
            crops = [resize.spatial(whole, contract, view.side)[0] for view in views]
        previous, slots[...] = frame, crops
        times.append(seconds)
    return times


def _fill_segments(
    out: Frames, reader: _Reader, contract: InputContract, start: float | None, views: Sequence[View]
) -> list[float]:
    """The frames of equal parts of a whole file, see `_fill`.

    How many frames there are is known when all are decoded. So the number of packets is taken for it, and where that
    was wrong (packets that show nothing, or cannot be decoded) the file is decoded once more.
    """
    count = reader.packets()
    for source in (reader.frames(), reader.frames_again()):
        wanted = preprocess.segments(count, contract, start, views[0])
        decoded = _Counted(source)
        times = _fill(out, _numbered(decoded, wanted), contract, views)
        deque(decoded, maxlen=0)  # to the end, where it shows that the file is whole
        if decoded.count == count:
            break
        count = decoded.count
    return times


class _Counted:
    """An iterator that counts what it gives."""

    def __init__(self, items: Iterator[tuple[float, av.VideoFrame]]) -> None:
        self.items, self.count = items, 0

    def __iter__(self) -> Iterator[tuple[float, av.VideoFrame]]:
        for item in self.items:
            self.count += 1
            yield item


def _numbered(
    decoded: Iterable[tuple[float, av.VideoFrame]], wanted: Iterable[int]
) -> Iterator[tuple[float, av.VideoFrame]]:
    """The frames with the numbers `wanted`, which never descend; fewer if there are fewer."""
    following = enumerate(decoded)
    number, item = -1, None
    for index in wanted:
        while number < index:
            if (found := next(following, None)) is None:
                return
            number, item = found
        if item is not None:
            yield item


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
    with _open(parse(source)) as reader:
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
    with _open(parse(source)) as reader:
        return reader.rate


def sources(source: Source) -> list[Source]:
    """The sources of a command line argument: a file, the files of a folder or a glob, a camera, a URL; see `search`.

    Raises:
        InputError: nothing is found.
    """
    return search(source)[0]


def search(source: Source, contract: InputContract | None = None) -> tuple[list[Source], str]:
    """The sources of an argument, and one line about skipped files of a folder, or "".

    A folder is searched, in sorted order, for the suffixes `VIDEOS` and `IMAGES`; links are followed, hidden files are
    skipped.

    Args:
        contract: of the model; still images are skipped if it takes several frames.

    Raises:
        InputError: nothing is found.
    """
    parsed = parse(source)
    if not isinstance(parsed, Path) or parsed.is_file():
        return [parsed], ""
    if parsed.is_dir():
        wanted = VIDEOS if contract and not contract.is_image else VIDEOS | IMAGES
        found = listing.walk(parsed, wanted)
        return list(found.required(parsed, wanted)), found.note(parsed)
    if parsed.exists():
        raise InputError(f"{parsed} is neither a file nor a folder: a pipe or a device cannot be read")
    # `Path.glob` has no patterns that are absolute.
    matches = sorted(glob.glob(str(parsed), recursive=True))  # noqa: PTH207
    files = [p for p in map(Path, matches) if p.is_file()]
    if not files:
        raise InputError(f"there is no file, folder or match for {parsed}")
    return list(files), ""


def check_output(path: str | Path, source: Source | None = None) -> Path:
    """Check that a video can be written to a path; called before the work starts, and by `write`.

    Raises:
        InputError: no .mp4, no folder, a folder by that name, or the file of `source` itself.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise InputError(f"cannot write {path}: expected a name that ends in .mp4")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    if isinstance(source, Path) and path.exists() and path.samefile(source):
        raise InputError(f"cannot write {path}: it is the video that is read; give another name")
    return path


def write(path: str | Path, frames: Iterable[Frames | tuple[float, Frames]], fps: float) -> Path:
    """Encode frames (H, W, 3) uint8 RGB as mp4: H.264 where PyAV has it, else MPEG-4 part 2.

    The file is written under a temporary name and renamed when complete. Odd sides repeat their last row or column,
    because 4:2:0 chroma needs even ones.

    Args:
        frames: frames, of which number i is shown at i / fps; or (seconds, frame), ascending, as `frames` gives them.
        fps: frames per second; of frames with times the nominal rate.

    Raises:
        InputError: no frames, frames of different or wrong shapes, a rate that is not positive, or a path that
            cannot be written.
    """
    path = check_output(path)
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


def parse(source: Source) -> Source:
    """Digits become a camera's index, and text without `://` becomes a path.

    Raises:
        InputError: neither an integer, a string nor a path.
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
    with path.open("rb") as opened:
        animated = _is_animated_webp(opened.read(21))
    if animated:
        return _Address(str(path), _as_apng(path), path=path)
    file = io.BytesIO(path.read_bytes()) if path.suffix.lower() in IMAGES else f"file:{path}"
    return _Address(str(path), file, options=(("pattern_type", "none"),), path=path)


def _is_animated_webp(head: bytes) -> bool:
    """Whether a file is an animated WebP that this FFmpeg (before 9) cannot read."""
    import av

    if len(head) < 21 or head[:4] + head[8:16] != b"RIFFWEBPVP8X" or not head[20] & 2:
        return False
    return "webp_anim" not in av.formats_available


def _as_apng(path: Path) -> io.BytesIO:
    """An animated WebP as APNG, the same pixels at the same times.

    Raises:
        InputError: damaged or cut off.
        MissingPackageError: Pillow is not installed.
    """
    need("PIL", "plot")
    import av
    from PIL import Image, ImageSequence

    found, shown = io.BytesIO(), 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image, av.open(found, "w", format="apng") as container:
                stream = container.add_stream("apng", rate=1000)
                stream.width, stream.height = image.size
                stream.pix_fmt = "rgb24"
                for picture in ImageSequence.Iterator(image):
                    frame = av.VideoFrame.from_ndarray(np.asarray(picture.convert("RGB")))
                    frame.pts, frame.time_base = shown, Fraction(1, 1000)
                    shown += picture.info["duration"]
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be used: {error}") from error
    except (OSError, EOFError, ValueError, SyntaxError) as error:
        raise InputError(f"{path} is cut off or damaged: copy or record it again") from error
    found.seek(0)
    return found


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
    """Turn PyAV's errors into `InputError`."""
    import av

    try:
        yield
    except (av.ExitError, av.TimeoutError) as error:
        raise InputError(f"{name} did not answer within {TIMEOUT:g} s; is it on, and can it be reached?") from error
    except (av.InvalidDataError, av.EOFError) as error:
        raise InputError(f"{name} cannot be decoded: it is not a video, or the file was cut off") from error
    except av.FFmpegError as error:
        raise InputError(f"{name} cannot be used: {error.strerror}") from error


@contextmanager
def _open(source: Source | _Address) -> Iterator[_Reader]:
    import av
    from av.container import InputContainer

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
        found = _film(container.streams.video)
        if found is None or container.format.name == "tty":  # FFmpeg renders any .txt as a video of its text
            raise InputError(f"{address.name} has no video in it")
        reader = _Reader(address, container, found)
        reader.check_picture()
        yield reader


def _film(streams: Iterable[VideoStream]) -> VideoStream | None:
    """The stream that a player would show: no cover, thumbnail or tile of a picture; the default stream, then the
    largest, then the first."""
    from av.stream import Disposition

    beside = Disposition.still_image | Disposition.timed_thumbnails

    def rank(stream: VideoStream) -> tuple[bool, bool, bool, int]:
        moving = stream.frames != 1 and not stream.disposition & beside
        is_default = bool(stream.disposition & Disposition.default)
        known = stream.codec_context is not None
        return known, moving, is_default, stream.width * stream.height if known else 0

    shown = [s for s in streams if not s.disposition & Disposition.attached_pic]
    return max(shown, key=rank, default=None)  # the first of equals


# --------------------------------------------------------------------------------------------------------------- decode


class _Clock:
    """Seconds that go on where the timestamps of joined recordings start again."""

    def __init__(self, step: float) -> None:
        self.step = step
        self.shift = 0.0
        self.leaps = 0
        self._last: float | None = None

    def __call__(self, seconds: float) -> float:
        now = seconds + self.shift
        if self._last is not None and not self._last - SET_BACK <= now <= self._last + MAX_GAP:
            self.leaps += 1
            self.shift += self._last + self.step - now
            now = self._last + self.step
        self._last = now
        return now


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
        # AVI has no display times, only a slot for each packet in the order of decoding: frames take them in turn.
        self._slots: deque[int] | None = deque() if self.form == _AVI else None
        self._clock = _Clock(1 / self.rate) if self.form in _BROADCAST else None
        self._joined = False  # whether a scan found that the clock starts again
        self._packets_read = self._packets_bad = 0
        self._warned = False
        self._end = 0.0  # second at which the last packet that was read leaves the display
        if not self.live:
            stream.thread_type = "AUTO"  # frames in parallel; costs delay, so not for cameras
        if self._is_picture and stream.codec_context.name == "mjpeg":  # which fills what is missing with grey
            stream.codec_context.options = {"err_detect": "explode"}

    @cached_property
    def _is_picture(self) -> bool:
        """Whether the format, whatever is in the file, is one of single pictures."""
        if self.form == _MP4:
            return self.container.metadata.get("major_brand") in _PICTURE_BRANDS
        return self.form in ("image2", "ico") or self.form.endswith("_pipe")

    @property
    def is_still(self) -> bool:
        """A picture, or an animation of one frame."""
        return self._is_picture or (self.form in _ANIMATIONS and not self.live and self._scan()[0] == 1)

    def check_picture(self) -> None:
        """Refuse pictures and animations that are incomplete.

        Raises:
            InputError: a picture or an animation without its end, or a HEIF picture in tiles, each of them a stream.
        """
        from av.stream import Disposition

        if not (self._is_picture or self.form in _ANIMATIONS) or self.address.path is None:
            return
        if self.stream.disposition & Disposition.dependent:
            raise InputError(f"{self.address.name} is a picture in tiles, as phones store HEIC: convert it to JPEG")
        whole = _WHOLE.get(self.form if self.form in _ANIMATIONS else self.stream.codec_context.name)
        if whole and not whole(self.address.path.read_bytes()):
            raise InputError(f"{self.address.name} is cut off or damaged: copy or record it again")

    def declared(self) -> float | None:
        """The duration in the header, of the video or else the longest stream, in seconds; None where it has none."""
        if self.form not in _HEADED:
            return None
        if self.form == _AVI and self.stream.frames:  # slots; its duration is a guess where the index was cut off
            return float(self.stream.frames * self.tick)
        if self.stream.duration is not None:
            return float(self.stream.duration * self.tick)
        ends = self._stated_end or (self.container.duration and self.container.duration / 1e6)
        return ends - float((self.origin or 0) * self.tick) if ends else None

    @cached_property
    def _stated_end(self) -> float | None:
        """When the video ends, where Matroska says so in a tag: 00:00:02.023000000."""
        found = re.fullmatch(r"(\d+):(\d\d):(\d\d\.\d+)", self.stream.metadata.get("DURATION", ""))
        return found and int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3])

    @cached_property
    def _is_outlasted(self) -> bool:
        """Whether a whole file, of which only the longest stream's length is known, goes on after its video."""
        exact = self.stream.duration is not None or len(self.container.streams) == 1 or self._stated_end
        promised = None if exact or self.live else self.declared()
        if promised is None:
            return False
        import av

        end = 0.0
        with self._again() as fresh:
            try:
                for packet in fresh.container.demux():
                    stamp = packet.dts if packet.pts is None else packet.pts
                    if stamp is not None and packet.time_base:
                        end = max(end, float((stamp + (packet.duration or 0)) * packet.time_base))
            except av.FFmpegError:
                pass  # what is cut off does not reach its end
        return end - float((self.origin or 0) * self.tick) > promised - 0.5

    def duration(self) -> float:
        """Seconds of the video: the header's, or where it has none, read through the file without decoding."""
        if (promised := self.declared()) and not self._is_outlasted:
            return promised
        _, seconds, leaps = self._scan()
        self._joined = leaps > 0
        return seconds

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
        yield from self.frames_again()

    def frames_again(self) -> Iterator[tuple[float, av.VideoFrame]]:
        """`frames` of a whole file that was read already."""
        with self._again() as fresh:
            fresh._warned = self._warned
            yield from fresh.frames()

    def packets(self) -> int:
        """Packets of a file with a picture in them: as a rule its frames."""
        return self._scan()[0]

    def _again(self) -> AbstractContextManager[_Reader]:
        """Reopen the file at its beginning."""
        assert self.address.path is not None, "a live source has no beginning"
        return _open(_file(self.address.path))

    def _seek(self, second: float) -> bool:
        """Go to the key frame at or before `second`; False where the source cannot."""
        import av

        if self.form not in _SOUGHT or self.stream.start_time is None or self._joined:
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
            except (
                IndexError
            ):  # PyAV at the end of a file in which streams began that were not there when it was opened
                return
            except av.BlockingIOError as error:  # avfoundation's way to say that the next frame is not there yet
                if not self.live or time.monotonic() - heard > TIMEOUT:
                    raise InputError(f"{self.address.name} gave no frame for {TIMEOUT:g} s") from error
                time.sleep(0.002)

    def _decode(self, sought: bool = False) -> Iterator[tuple[float, av.VideoFrame]]:
        import av

        seconds: float | None = None
        if self._clock:
            self._clock = _Clock(1 / self.rate)
        try:
            for packet in self._packets():
                self._packets_read += 1
                if packet.is_corrupt and not self.live:
                    self._damaged(packet, seconds)
                self._end = max(self._end, self._leaves(packet))
                if sought and packet.size and not packet.is_keyframe:
                    continue  # what it refers to was not read
                sought = False
                if self._slots is not None and packet.size and packet.dts is not None:
                    self._slots.append(packet.dts)
                if not packet.size and packet.dts is None:  # the end, where decoders give out what they held back
                    self._check_end()
                try:
                    decoded = packet.decode()
                except av.InvalidDataError:
                    if self._is_picture or not (self.live or seconds is None or self.form in _BROADCAST):
                        raise
                    if not self.live and seconds is not None:
                        self._damaged(packet, seconds)
                    continue  # else joined in the middle of a group of pictures
                for frame in decoded:
                    leaps = self._clock.leaps if self._clock else 0
                    seconds = self._seconds(frame, seconds)
                    if self._clock and self._clock.leaps > leaps and not self.live:
                        self._damaged(packet, seconds)
                    yield seconds, frame
        except av.InvalidDataError as error:
            if self.live:
                raise
            raise self._cut_off() from error

    def _seconds(self, frame: av.VideoFrame, previous: float | None) -> float:
        """When `frame` is displayed; the clock never goes back, whatever the timestamps do."""
        due = 0.0 if previous is None else previous + 1 / self.rate
        stamp = frame.pts
        if self._slots is not None:
            stamp = self._slots.popleft() if self._slots else None
        if stamp is None:
            return due
        if self.origin is None:
            self.origin = stamp
        seconds = float((stamp - self.origin) * self.tick)
        if self._clock:
            seconds = self._clock(seconds)
        return seconds if previous is None or seconds > previous else due

    def _leaves(self, packet: av.Packet[VideoStream], clock: _Clock | None = None) -> float:
        """When the picture of a packet leaves the display; packets come in the order of decoding."""
        shown = packet.dts if packet.pts is None else packet.pts
        if shown is None:
            return 0.0
        decoded = shown if packet.dts is None else packet.dts
        if not clock:
            return float((shown + (packet.duration or 0) - (self.origin or 0)) * self.tick)
        delay = float((shown - decoded) * self.tick)
        delay = delay if 0 <= delay <= MAX_GAP else 0.0  # at a join one time may be of the old clock, one of the new
        return (
            clock(float((decoded - (self.origin or 0)) * self.tick)) + delay + float((packet.duration or 0) * self.tick)
        )

    def _damaged(self, packet: av.Packet[VideoStream], seconds: float | None) -> None:
        """Something is missing at a packet of a file: an error, but a warning where the format is made for that and
        little is missing.

        Raises:
            InputError: the format is another, or more than a tenth is missing.
        """
        self._packets_bad += 1
        if self.form not in _BROADCAST or self._packets_bad > 2 + self._packets_read // 10:
            raise self._cut_off()
        if not self._warned:
            self._warned = True
            about = self._leaves(packet) if seconds is None else seconds
            where = f"{self.address.name} is damaged or was joined at about {about:.1f} s"
            warnings.warn(f"{where}: it is read, but pictures there may be wrong", InputWarning, stacklevel=2)

    def _check_end(self) -> None:
        """Refuse a file whose video ends more than two frames before its time."""
        promised = None if self.live else self.declared()
        if promised is not None and promised - self._end > 2 / self.rate and not self._is_outlasted:
            raise self._cut_off()

    def _scan(self) -> tuple[int, float, int]:
        """(frames, seconds, leaps of the clock) of what can be read of a file, found without decoding."""
        import av

        count, end = 0, 0.0
        with self._again() as fresh:
            clock = fresh._clock
            try:
                for packet in fresh._packets():
                    if packet.size and not (packet.is_corrupt and self.form not in _BROADCAST):
                        count, end = count + 1, max(end, fresh._leaves(packet, clock))
            except av.FFmpegError:
                pass  # whatever ends the reading is where the readable part ends
        return count, end or count / self.rate, clock.leaps if clock else 0

    def _cut_off(self) -> InputError:
        if self._is_picture:
            return InputError(f"{self.address.name} is cut off or damaged: copy or record it again")
        count, seconds, _ = self._scan()
        promised = self.declared()
        of = ""
        if promised is not None:
            frames = self.stream.frames if self.form != _AVI else 0
            of = f" of {frames or round(promised * self.rate)} ({promised:.2f} s)"
        remedy = "copy or record it again, or choose an earlier start"
        return InputError(
            f"{self.address.name} is cut off or damaged: {count} frames ({seconds:.2f} s){of} can be read: {remedy}"
        )


def _whole_bmp(bmp: bytes) -> bool:
    """Whether a BMP has all its rows. FFmpeg takes rows without their padding for granted when bytes are missing."""
    if len(bmp) < 54 or bmp[30:34] not in (b"\0\0\0\0", b"\3\0\0\0"):  # compressed ones are refused when cut
        return True
    offset, width, height = (int.from_bytes(bmp[at : at + 4], "little", signed=True) for at in (10, 18, 22))
    bits = abs(width) * int.from_bytes(bmp[28:30], "little")
    found = len(bmp) - offset
    return found >= (bits + 31) // 32 * 4 * abs(height) or found == (bits + 7) // 8 * abs(height)


def _whole_jpeg(jpeg: bytes) -> bool:
    """Whether a JPEG goes on to its end marker: segments with a length each, then data in which 0xff is escaped."""
    at = 2
    while 0 <= (at := jpeg.find(b"\xff", at)) < len(jpeg) - 1:
        marker = jpeg[at + 1]
        if marker == 0xD9:
            return True
        if marker == 0xFF:  # padding
            at += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # an escaped 0xff, or a marker without a segment
            at += 2
        else:
            at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return False


def _whole_gif(gif: bytes) -> bool:
    """Whether a GIF does not end within a block."""

    def table(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    if len(gif) < 13:
        return False
    at = 13 + table(gif[10])
    while at < len(gif) and gif[at] in b"\x21\x2c":
        if gif[at] == 0x2C:
            if at + 10 > len(gif):
                return False
            at += 9 + table(gif[at + 9])
        at += 2
        while at < len(gif) and gif[at]:  # blocks of data up to an empty one
            at += 1 + gif[at]
        at += 1
    return at <= len(gif)


def _whole_webp(webp: bytes) -> bool:
    """Whether a WebP is as long as it says."""
    return int.from_bytes(webp[4:8], "little") + 8 <= len(webp)


_WHOLE: dict[str, Callable[[bytes], bool]] = {
    "mjpeg": _whole_jpeg, "bmp": _whole_bmp, "gif": _whole_gif, "webp_anim": _whole_webp,
    "apng": lambda data: data[:4] == b"RIFF" or b"IEND" in data,  # a WebP was checked when it became an APNG
}  # fmt: skip
"""By codec, or by format of an animation: whether a file goes on to its end, where the decoder does not ask."""


def _rgb(frame: av.VideoFrame) -> Frames:
    """(H, W, 3) uint8, by the matrix and range that the frame says, turned and mirrored as it is to be shown."""
    pixels: Frames = frame.to_ndarray(format="rgb24")  # type: ignore[assignment]
    matrix = _display_matrix(frame)
    if matrix is None:
        return pixels
    (xx, xy), (yx, yy) = matrix  # a stored pixel at (x, y) is shown at (xx * x + yx * y, xy * x + yy * y)
    if abs(xy) + abs(yx) > abs(xx) + abs(yy):
        pixels, xx, yy = pixels.swapaxes(0, 1), yx, xy
    return pixels[:: -1 if yy < 0 else 1, :: -1 if xx < 0 else 1]


def _display_matrix(frame: av.VideoFrame) -> list[list[int]] | None:
    """The upper left 2 x 2 of the display matrix, from a container or from EXIF; None where there is none."""
    from av.sidedata.sidedata import Type

    try:
        data: Any = frame.side_data
    except ValueError:  # a kind of side data, EXIF for one, that this PyAV has no name for
        data = _without_unnamed(frame).side_data
    found = data.get(Type.DISPLAYMATRIX)
    return None if found is None else np.frombuffer(found, np.int32).reshape(3, 3)[:2, :2].tolist()


def _without_unnamed(frame: av.VideoFrame) -> av.VideoFrame:
    """The frame without the side data that FFmpeg knows and PyAV does not."""
    from av.filter import Graph
    from av.sidedata.sidedata import Type

    graph = Graph()
    named: set[Any] = {kind.value for kind in Type}
    chain = [graph.add("buffer", f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1")]
    chain += [graph.add("sidedata", f"mode=delete:type={kind}") for kind in range(64) if kind not in named]
    chain.append(graph.add("buffersink"))
    for source, sink in pairwise(chain):
        source.link_to(sink)
    graph.configure()
    graph.push(frame)
    return cast("av.VideoFrame", graph.pull())


# --------------------------------------------------------------------------------------------------------------- encode


TICKS = 60_000
"""Most ticks a second of a file that is written: MPEG-4 part 2 has 16 bits for them."""


def _encode(path: Path, frames: Iterator[Frames | tuple[float, Frames]], rate: Fraction) -> None:
    import av

    timed = (item if isinstance(item, tuple) else (float(i / rate), item) for i, item in enumerate(frames))
    first = next(timed, None)
    if first is None:
        raise InputError("there are no frames to write")
    shape = np.shape(first[1])
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    tick = Fraction(1, rate.numerator * max(1, TICKS // rate.numerator))  # a whole number of them is one frame
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = (side + side % 2 for side in shape[:2])
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", tick
        stamp, begin = -1, min(0.0, first[0])
        for i, (seconds, pixels) in enumerate(chain([first], timed)):
            given = np.asarray(pixels)
            if given.shape != shape or given.ndim != 3 or given.shape[2] != 3 or given.dtype != np.uint8:
                expected = f"{shape} as the first" if len(shape) == 3 and shape[2] == 3 else "(height, width, 3)"
                raise InputError(f"frame {i} is {given.dtype} {given.shape}; expected uint8 {expected}")
            even = np.pad(given, ((0, shape[0] % 2), (0, shape[1] % 2), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
            shown = round((preprocess.seconds(seconds, f"the time of frame {i}") - begin) / tick)
            if shown <= stamp:
                raise InputError(f"frame {i} is at {seconds} s; expected a time after that of the frame before it")
            stamp = shown
            frame.pts, frame.time_base = stamp, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
