"""What frames come from: the caller's own, or what `edgetube.decoding` decodes. A feed knows no thread and no queue."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from edgetube import address, decoding, listing, preprocess
from edgetube.decoding import rgb, upright
from edgetube.errors import EdgetubeError, InputError
from edgetube.hwdecode import Decoder
from edgetube.resize import Frames


class Arrival(NamedTuple):
    """What came from a source.

    Attributes:
        came: seconds of `time.monotonic()`.
        stamp: seconds of the source's own clock; None where it has none.
        pixels: (H, W, 3) uint8 RGB, upright, that nobody changes; None for a frame that could not be decoded.
        turn: how the stored picture was turned to be upright; None where the source says nothing.
    """

    came: float
    stamp: float | None
    pixels: Frames | None
    turn: object = None


class Feed(Protocol):
    """Where frames come from.

    Attributes:
        name: for messages and people; without credentials.
        live: whether frames come in real time by themselves; a feed may learn it when it is opened.
        again: whether it can be opened again after it ended or failed.
    """

    name: str
    live: bool
    again: bool

    def open(self) -> AbstractContextManager[Iterator[Arrival]]:
        """Its frames, from its beginning or from now.

        Raises:
            EdgetubeError: it cannot be opened or read.
        """


class Given:
    """A caller's frames: (H, W, 3) uint8 RGB, number i at i / fps; or (seconds, frame) pairs."""

    again = False

    def __init__(self, frames: Iterable[Any], name: str, fps: float | None, live: bool) -> None:
        self.name, self.live = name, live
        self._timed = checked(frames) if live and fps is None else timed(frames, fps)

    @contextmanager
    def open(self) -> Iterator[Iterator[Arrival]]:
        """Its frames, as the caller's iterator gives them."""
        yield self._arrivals()

    def _arrivals(self) -> Iterator[Arrival]:
        while True:
            try:
                item = next(self._timed, None)
            except EdgetubeError:
                raise
            except Exception as error:
                raise InputError(f"{self.name} failed: {type(error).__name__}: {error}") from error
            if item is None:
                return
            yield Arrival(time.monotonic(), *item)


class Decoded:
    """What `edgetube.decoding` opens: a video or a picture, a camera, a URL.

    Attributes:
        decoder: what decodes it, and fallbacks: why not the decoders before; known when it is open.
    """

    def __init__(self, source: address.Source, name: str | None, decoder: Decoder) -> None:
        self.name = name or address.shown(source)
        self.live = self.again = not isinstance(source, Path)
        self.decoder = "cpu"
        self.fallbacks: tuple[str, ...] = ()
        self._source, self._asked = source, decoder
        self._failed: tuple[str, ...] = ()
        self._lived = False

    @contextmanager
    def open(self) -> Iterator[Iterator[Arrival]]:
        """Its frames, from its beginning or from now."""
        with decoding.opened(self._source, self._asked) as reader:
            self.decoder, self.fallbacks = reader.decoder, (*self._failed, *reader.fallbacks)
            # A camera that shows one picture while it starts does not become a file by that.
            self._lived = self.live = self.again = self._lived or not reader.is_finite
            try:
                yield _live(reader) if self.live else _film(reader)
            except decoding.DeviceFailed as error:
                self._asked, self._failed = "cpu", (str(error),)
                raise


def _live(reader: decoding.Reader) -> Iterator[Arrival]:
    for came, stamp, frame in reader.arrivals():
        yield Arrival(came, stamp, None) if frame is None else Arrival(came, stamp, *upright(frame))


def _film(reader: decoding.Reader) -> Iterator[Arrival]:
    for seconds, frame in reader.film():
        yield Arrival(time.monotonic(), seconds, *upright(frame))


class Folder:
    """The pictures of a folder in the order of their names, where 10 comes after 9: number i is shown at i / fps."""

    live = again = False

    def __init__(self, folder: Path, name: str | None, fps: float | None) -> None:
        self.name = name or str(folder)
        self._rate = 1.0 if fps is None else preprocess.frame_rate(fps)
        self._folder = folder

    @contextmanager
    def open(self) -> Iterator[Iterator[Arrival]]:
        """Its pictures, from the first."""
        found = listing.walk(self._folder, listing.IMAGES).required(self._folder, listing.IMAGES)
        yield self._arrivals(sorted(found, key=_natural))

    def _arrivals(self, paths: list[Path]) -> Iterator[Arrival]:
        for i, path in enumerate(paths):
            with decoding.opened(path) as reader:
                frame = next(frame for _, frame in reader.film())
                yield Arrival(time.monotonic(), i / self._rate, rgb(frame))


def _natural(path: Path) -> list[tuple[int, str]]:
    """What paths are sorted by, so that the numbers in them count."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def choose(source: object, name: str | None, fps: float | None, live: bool, decoder: Decoder) -> Feed:
    """The feed of a source; see `edgetube.live.source.FrameSource`.

    Raises:
        InputError: a source, a name or a rate that cannot be used.
    """
    if isinstance(source, bool) or source is None or isinstance(source, bytes):
        raise InputError(f"the source is {source!r:.60}; expected a path, a URL, a camera's index, or frames")
    if isinstance(source, int | str | Path):
        parsed = address.parse(source)
        if isinstance(parsed, Path) and parsed.is_dir():
            return Folder(parsed, name, fps)
        return Decoded(parsed, name, decoder)
    return Given(cast("Iterable[Any]", source), name or "the frames", fps, live)


def timed(frames: Iterable[Any], fps: float | None) -> Iterator[tuple[float, Frames]]:
    """Check and copy a caller's frames, and give each a time.

    Args:
        frames: (H, W, 3) uint8 RGB, of which number i is shown at i / fps; or (seconds, frame) tuples.
        fps: frames per second of bare frames; None counts whole seconds.

    Raises:
        InputError: `frames` is not iterable, or a frame or its time cannot be used; says which and why.
    """
    rate = 1.0 if fps is None else preprocess.frame_rate(fps)
    return ((i / rate if seconds is None else seconds, frame) for i, (seconds, frame) in enumerate(checked(frames)))


def checked(frames: Iterable[Any]) -> Iterator[tuple[float | None, Frames]]:
    """Check and copy a caller's frames, with the times of pairs; bare frames have None.

    Raises:
        InputError: as `timed` raises.
    """
    try:
        items = iter(frames)
    except TypeError as error:
        raise InputError(
            f"the source is a {type(frames).__name__}; expected a file, a camera, a URL or frames"
        ) from error
    return _checked(items)


def _checked(items: Iterator[Any]) -> Iterator[tuple[float | None, Frames]]:
    clocked: bool | None = None
    for i, item in enumerate(items):
        what = f"frame {i} of the stream"
        paired = isinstance(item, tuple) and len(item) == 2 and not isinstance(item[0], bool | np.bool_)
        if clocked not in (None, paired):
            raise InputError(f"{what} has {'a' if paired else 'no'} time, unlike those before; expected one kind")
        clocked = paired
        if paired:
            yield preprocess.seconds(item[0], f"the time of {what}"), preprocess.frame(item[1], what)
        else:
            yield None, preprocess.frame(item, what)
