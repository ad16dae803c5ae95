"""Where a video comes from: a file, a camera or a URL, and how PyAV opens it."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from edgetube import pictures
from edgetube.errors import InputError
from edgetube.listing import IMAGES

Source: TypeAlias = int | str | Path
"""A camera's index (also as digits), a URL, or a file."""


@dataclass(frozen=True)
class Untrusted:
    """What a file from a stranger may be.

    Attributes:
        name: for messages, in place of its path.
        formats: FFmpeg's names of the formats that are read, with commas between them: none that names other files.
        max_pixels: of one frame.
        check: called for each packet that is read; raises to give up.
    """

    name: str
    formats: str
    max_pixels: int
    check: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Address:
    """How PyAV opens a source.

    Attributes:
        name: for messages; without credentials.
        file: what PyAV opens; it may hold credentials.
        path: the local file, or None for what is live.
        untrusted: what it may be, if it is a stranger's.
    """

    name: str
    file: Any = field(repr=False)
    format: str | None = None
    options: tuple[tuple[str, str], ...] = ()
    path: Path | None = None
    untrusted: Untrusted | None = None


def parse(source: Source) -> Source:
    """Digits become a camera's index, and text without `://` becomes a path.

    Raises:
        InputError: neither an integer, a string nor a path.
    """
    if isinstance(source, bool) or not isinstance(source, Source):
        raise InputError(f"the source is {source!r:.60}; expected a path, a URL or a camera's index")
    if isinstance(source, int) and source < 0:
        raise InputError(f"the source is camera {source}; expected an index from 0")
    if isinstance(source, str):
        if not source.strip():
            raise InputError(f"the source is {source!r}; expected a path, a URL or a camera's index")
        if source.isdecimal():
            return int(source)
        return source if "://" in source else Path(source)
    return source


def plain(url: str) -> str:
    """A URL for messages: without user name and password, and without its query, which may hold a key."""
    bare = re.sub(r"(?<=://).*@", "***@", url, flags=re.DOTALL)  # to the last @: a password may hold one, or a /
    return re.sub(r"\?.*", "?***", bare, flags=re.DOTALL)


def shown(source: Source) -> str:
    """The name of a source, as `parse` returns it, for messages."""
    return f"camera {source}" if isinstance(source, int) else plain(source) if isinstance(source, str) else str(source)


def of(source: Source) -> Address:
    """How a source is opened.

    Args:
        source: as `parse` returns it.

    Raises:
        InputError: there is no such file or camera.
    """
    if isinstance(source, Path):
        return of_file(source)
    if isinstance(source, str):
        # RTSP over UDP loses packets without a word; a server that has TCP is asked for it first.
        options = (("rtsp_flags", "prefer_tcp"),) if source.startswith("rtsp") else ()
        # FFmpeg would watch 20 frames to find their rate, four seconds of a slow camera.
        return Address(plain(source), source, options=(("fpsprobesize", "0"), *options))
    return _camera(source)


def of_file(path: Path, untrusted: Untrusted | None = None) -> Address:
    """How a file is opened.

    Args:
        untrusted: what a stranger's file may be; None for the user's own, which may be anything that FFmpeg reads.

    Raises:
        InputError: there is no file, or nothing in it.
    """
    name = str(path) if untrusted is None else untrusted.name
    if not path.is_file():
        if path.is_symlink() and not path.exists():
            raise InputError(f"{name} is a link to {path.readlink()}, which is not there")
        raise InputError(f"{name} is {'a folder, not' if path.is_dir() else 'not'} a file")
    if not path.stat().st_size:
        raise InputError(f"{name} is empty (0 bytes)")
    # Images go in as bytes: FFmpeg's image reader would take a % in the name as the pattern of a sequence.
    # "file:" keeps a colon in the name from being read as a protocol.
    with path.open("rb") as opened:
        animated = pictures.is_animated_webp(opened.read(21))
    if animated and untrusted is not None:
        raise InputError(f"{name} is an animated WebP, which is not taken here: convert it to MP4")
    if animated:
        return Address(name, pictures.as_apng(path), path=path)
    options: tuple[tuple[str, str], ...] = (("pattern_type", "none"),)
    if untrusted is not None:
        options += (("format_whitelist", untrusted.formats), ("protocol_whitelist", "file"))
    file = io.BytesIO(path.read_bytes()) if path.suffix.lower() in IMAGES else f"file:{path}"
    return Address(name, file, options=options, path=path, untrusted=untrusted)


def _camera(index: int) -> Address:
    name = f"camera {index}"
    if sys.platform == "darwin":
        # The built-in cameras offer 30, and FFmpeg's default of 29.97 is refused.
        return Address(name, f"{index}:none", "avfoundation", (("framerate", "30"),))
    if sys.platform == "win32":
        import av

        found = [device.name for device in av.enumerate_input_devices("dshow") if "video" in device.media_types]
        if not 0 <= index < len(found):
            raise InputError(f"there is no {name}; this machine has {', '.join(found) or 'none'}")
        return Address(name, f"video={found[index]}", "dshow")
    device = Path(f"/dev/video{index}")
    if not device.exists():
        present = ", ".join(sorted(map(str, device.parent.glob("video*")))) or "none"
        raise InputError(f"there is no {name} ({device}); this machine has {present}")
    return Address(name, str(device), "video4linux2,v4l2")
