"""Decoding with PyAV: the clock of a video, and its pictures as RGB."""

from __future__ import annotations

import errno
import re
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from edgetube import address as addresses
from edgetube import hwdecode, pictures
from edgetube.address import Address, Source
from edgetube.errors import InputError, InputWarning
from edgetube.hwdecode import Decoder
from edgetube.preprocess import TOLERANCE
from edgetube.resize import Frames

if TYPE_CHECKING:  # PyAV takes half as long to import as numpy; `import edgetube` does not wait for it
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream

Turn: TypeAlias = tuple[tuple[int, int], tuple[int, int]]
"""The upper left 2 x 2 of a display matrix, by which a stored picture is turned and mirrored to be shown."""

SET_BACK, MAX_GAP = 0.1, 10.0
"""Seconds by which a broadcast's clock may jump back or ahead between two frames; beyond that its parts were joined."""

TIMEOUT = 10.0
"""Seconds that a URL or a camera may take to open, and again for each next frame."""

UNDECODABLE = 30.0
"""Seconds for which a live source may send what cannot be decoded: some cameras send a key frame every 20 s."""

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

_CLOCKLESS = frozenset(("mpjpeg", "mjpeg", "mjpeg_2000", "h264", "hevc", "m4v", "mpegvideo", "obu", "image2pipe"))
"""Formats whose frames have no times: FFmpeg counts them, at a rate that it guesses."""

_PLAYLISTS = frozenset(("hls", "dash"))
"""Formats that name other files: how long they are does not say whether they end."""

_WRAP = 1 << 33
"""Ticks after which the clock of a broadcast begins again."""


class Refused(InputError):
    """A URL that is refused, for who asks or for what it is: to ask again is of no use."""


class DeviceFailed(InputError):
    """The device that was to decode cannot; the CPU may."""


@contextmanager
def vendor_errors(name: object) -> Iterator[None]:
    """Turn PyAV's errors into `InputError`.

    What PyAV says of a URL holds the password, so it is not shown as the cause.
    """
    import av

    try:
        yield
    except (av.ExitError, av.TimeoutError) as error:
        raise InputError(f"{name} did not answer within {TIMEOUT:g} s; is it on, and can it be reached?") from _of(
            error
        )
    except (av.InvalidDataError, av.EOFError) as error:
        what = (
            "it is no video, or it ended early" if "://" in str(name) else "it is not a video, or the file was cut off"
        )
        raise InputError(f"{name} cannot be decoded: {what}") from _of(error)
    except (av.HTTPUnauthorizedError, av.HTTPForbiddenError) as error:
        remedy = "check the user name and the password of its URL"
        raise Refused(f"{name} refuses access ({error.strerror}): {remedy}") from _of(error)
    except av.ProtocolNotFoundError as error:
        raise Refused(f"{name} cannot be used: this FFmpeg does not know its protocol") from _of(error)
    except av.FFmpegError as error:
        lost = "://" in str(name) and error.errno in (errno.EIO, errno.ECONNRESET, errno.EPIPE)
        what = "cannot be reached: is it on, and is its address right?" if lost else f"cannot be used: {error.strerror}"
        raise InputError(f"{name} {what}") from _of(error)


def _of(error: av.FFmpegError) -> av.FFmpegError | None:
    """An error as the cause of another, unless it names a URL."""
    return None if "://" in str(error) else error


@contextmanager
def opened(source: Source | Address, decoder: Decoder = "cpu") -> Iterator[Reader]:
    """Open a source.

    Raises:
        InputError: it cannot be opened, or has no video in it.
    """
    import av
    from av.container import InputContainer

    # Titles that are not UTF-8 must not stop a film: PyAV before 19 has to be told, later ones have no such option.
    lenient: dict[str, Any] = {"metadata_errors": "ignore"} if hasattr(InputContainer, "metadata_errors") else {}
    address = source if isinstance(source, Address) else addresses.of(source)
    name, accelerated, reasons = hwdecode.choose(decoder, live=address.path is None)
    with (
        vendor_errors(address.name),
        av.open(
            address.file,
            "r",
            format=address.format,
            options=dict(address.options),
            timeout=None if address.path else TIMEOUT,
            hwaccel=accelerated,
            **lenient,
        ) as container,
    ):
        found = film(container.streams.video)
        if found is None or container.format.name == "tty":  # FFmpeg renders any .txt as a video of its text
            raise InputError(f"{address.name} has no video in it")
        reader = Reader(address, container, found)
        if accelerated and not found.codec_context.is_hwaccel:
            name, reasons = "cpu", (*reasons, f"{name}: it does not decode {found.codec_context.name}")
        reader.decoder, reader.fallbacks = name, reasons
        reader.check_size()
        reader.check_picture()
        yield reader


def film(streams: Iterable[VideoStream]) -> VideoStream | None:
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


class Reader:
    """An open source: its clock, and its frames in the order of display.

    Seconds count from the stream's start in a file, and from the first frame in a live source.

    Attributes:
        live: whether it is no local file.
        decoder: what decodes it, and fallbacks: why not the decoders that were asked for.
    """

    decoder = "cpu"
    fallbacks: tuple[str, ...] = ()

    def __init__(self, address: Address, container: InputContainer, stream: VideoStream) -> None:
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
        options = {}
        if self._is_picture and stream.codec_context.name == "mjpeg":  # which fills what is missing with grey
            options["err_detect"] = "explode"
        if address.untrusted is not None and stream.codec_context is not None:
            # Frames may become larger than the header says. FFmpeg counts rows as padded to 64 pixels: twice as many
            # lets through all that `check_size` does.
            options["max_pixels"] = str(2 * address.untrusted.max_pixels)
        if options:
            stream.codec_context.options = options

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

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of its frames, as the header says; zeros where it does not say what decodes them."""
        return (self.stream.width, self.stream.height) if self.stream.codec_context is not None else (0, 0)

    def check_size(self) -> None:
        """
        Raises:
            InputError: a stranger's file has frames of more pixels than it may.
        """
        if self.address.untrusted is None:
            return
        (width, height), most = self.size, self.address.untrusted.max_pixels
        if width * height > most:
            raise InputError(
                f"{self.address.name} has frames of {width}x{height}; at most {most} pixels are taken here"
            )

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
        whole = pictures.WHOLE.get(self.form if self.form in _ANIMATIONS else self.stream.codec_context.name)
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
                    if self.address.untrusted is not None:
                        self.address.untrusted.check()
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

    @property
    def is_finite(self) -> bool:
        """Whether it ends by itself: a file, also a server's, and a recording that a server plays; no camera."""
        if self.address.path is not None:
            return True
        if self.address.format is not None or self.form in _CLOCKLESS:
            return False
        if self.container.duration and self.container.duration > 0:
            return True
        return self.form not in _PLAYLISTS and self.container.size > 0

    def film(self) -> Iterator[tuple[float, av.VideoFrame]]:
        """All `frames` of what is finite.

        Raises:
            InputError: as `frames` raises, or there is none.
        """
        seconds = None
        for seconds, frame in self.frames():
            yield seconds, frame
        if seconds is None:
            raise InputError(f"{self.address.name} holds no frame that can be decoded")

    def arrivals(self) -> Iterator[tuple[float, float | None, av.VideoFrame | None]]:
        """The frames of a live source as they come, from the first that can be decoded on.

        Yields:
            (seconds of `time.monotonic()` at which it came; seconds of the source's clock from any beginning, None
            where it has none; the frame, None for one that is damaged).

        Raises:
            InputError: the connection is gone, nothing comes for `TIMEOUT` s, or nothing whole for `UNDECODABLE` s.
            DeviceFailed: the device that decodes failed.
        """
        import av

        begun, has_clock, ticks = False, self.form not in _CLOCKLESS, None
        good = time.monotonic()
        is_jpeg = self.stream.codec_context.name == "mjpeg"  # whose decoder fills what is missing with grey
        for packet in self._packets():
            came = time.monotonic()
            decoded: Sequence[av.VideoFrame | None]
            try:
                decoded = packet.decode()
            except av.InvalidDataError:
                decoded = [None] if begun else []  # else joined in the middle of a group of pictures
            except av.FFmpegError as error:
                if self.decoder == "cpu":
                    raise
                raise DeviceFailed(f"{self.decoder}: it failed ({error.strerror})") from error
            whole = not (is_jpeg and packet.size) or pictures.whole_jpeg(bytes(packet))
            if packet.is_corrupt and self.form not in _PLAYLISTS:  # where each file counts its packets anew
                whole = False
            for frame in decoded:
                if frame is None or frame.is_corrupt or not whole:
                    if begun:
                        yield came, None, None
                    continue
                begun, good, seconds = True, came, None
                if has_clock and frame.pts is not None:
                    ticks = self._unwrapped(frame.pts, ticks)
                    seconds = float(ticks * self.tick)
                yield came, seconds, frame
            if came - good > UNDECODABLE:
                raise InputError(f"{self.address.name} gave no frame that can be decoded for {UNDECODABLE:g} s")

    def _unwrapped(self, stamp: int, before: int | None) -> int:
        """A time in ticks, after a clock of 33 bits began again."""
        if before is None or self.form not in _BROADCAST:
            return stamp
        return before + (stamp - before + _WRAP // 2) % _WRAP - _WRAP // 2

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

    def _again(self) -> AbstractContextManager[Reader]:
        """Reopen the file at its beginning."""
        assert self.address.path is not None, "a live source has no beginning"
        return opened(addresses.of_file(self.address.path, self.address.untrusted))

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
                    if self.address.untrusted is not None:
                        self.address.untrusted.check()
                    yield packet
                    heard = time.monotonic()
                return
            except IndexError:  # PyAV at the end of a file with streams that were not there when it was opened
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


def rgb(frame: av.VideoFrame) -> Frames:
    """(H, W, 3) uint8, by the matrix and range that the frame says, turned and mirrored as it is to be shown."""
    return upright(frame)[0]


def upright(frame: av.VideoFrame) -> tuple[Frames, Turn | None]:
    """A frame's `rgb`, and the `turn` that made it upright: reading the turn of a frame with EXIF is slow."""
    # One thread: by default each frame would start one for each core, which costs more than it gains.
    pixels: Frames = frame.to_ndarray(format="rgb24", threads=1)  # type: ignore[assignment]
    matrix = turn(frame)
    if matrix is None:
        return pixels, None
    (xx, xy), (yx, yy) = matrix  # a stored pixel at (x, y) is shown at (xx * x + yx * y, xy * x + yy * y)
    if abs(xy) + abs(yx) > abs(xx) + abs(yy):
        pixels, xx, yy = pixels.swapaxes(0, 1), yx, xy
    return pixels[:: -1 if yy < 0 else 1, :: -1 if xx < 0 else 1], matrix


def turn(frame: av.VideoFrame) -> Turn | None:
    """The upper left 2 x 2 of the display matrix, from a container or from EXIF; None where there is none."""
    from av.sidedata.sidedata import SideDataContainer, Type

    # Not `frame.side_data`, which the frame keeps and which keeps the frame: frames would wait for the collector.
    read: Any = SideDataContainer  # PyAV's annotations do not know its argument
    try:
        data = read(frame)
    except ValueError:  # a kind of side data, EXIF for one, that this PyAV has no name for
        data = read(_without_unnamed(frame))
    found = data.get(Type.DISPLAYMATRIX)
    if found is None:
        return None
    xx, xy, _, yx, yy = np.frombuffer(found, np.int32)[:5].tolist()
    return (xx, xy), (yx, yy)


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
