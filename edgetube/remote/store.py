"""What is sent to a device: files by their sha256, in pieces. What is there is not sent again, and what broke off goes
on where it ended."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from edgetube.bundle import MANIFEST, Bundle, sha256
from edgetube.progress import Progress, silent

Ask = Callable[..., Any]
"""Gives an order to the device, see `edgetube.remote.device.Device.ask`."""

MB = 10**6
PIECE = 1 << 20
"""Bytes of one message: small enough to see progress on a slow line."""


def send_files(ask: Ask, files: Mapping[str, Path], stage: str, progress: Progress = silent) -> None:
    """Send files, by their sha256.

    Raises:
        DeviceError: its disk is full, or the line was cut.
        OSError: a file cannot be read.
    """
    for done, total in _send(ask, {digest: partial(_open, path) for digest, path in files.items()}):
        steps = max(1, total // MB)
        progress(f"{stage}, MB", steps if done == total else min(done // MB, steps - 1), steps)


def send_clips(ask: Ask, pieces: Sequence[bytes | memoryview]) -> list[str]:
    """Send clips, as files that are in memory; returns their sha256."""
    digests = [hashlib.sha256(piece).hexdigest() for piece in pieces]
    contents = {digest: partial(io.BytesIO, piece) for digest, piece in zip(digests, pieces, strict=True)}
    for _ in _send(partial(ask, clips=True), contents):
        pass
    return digests


def _send(ask: Ask, contents: Mapping[str, Callable[[], IO[bytes]]]) -> Iterator[tuple[int, int]]:
    """Send what is missing, and of each file the rest; yields the bytes that are there, and all, after each piece."""
    there = {digest: offset for digest, offset in ask("have", digests=list(contents)).items() if offset >= 0}
    sizes = {digest: _size(contents[digest]) for digest in there}
    offsets = {digest: offset if offset <= sizes[digest] else 0 for digest, offset in there.items()}
    done, total = sum(offsets.values()), sum(sizes.values())
    for digest, offset in offsets.items():
        with contents[digest]() as file:
            file.seek(offset)
            while True:
                piece = file.read(PIECE)
                ask("put", *([piece] if piece else []), digest=digest, offset=offset, size=sizes[digest])
                offset += len(piece)
                done += len(piece)
                yield done, total
                if offset >= sizes[digest] or not piece:
                    break


def _open(path: Path) -> IO[bytes]:
    return path.open("rb")


def _size(content: Callable[[], IO[bytes]]) -> int:
    with content() as file:
        return file.seek(0, io.SEEK_END)


def send_bundle(ask: Ask, bundle: Bundle, progress: Progress = silent) -> str:
    """Send a bundle; returns the path of its folder there."""
    manifest = bundle.path / MANIFEST
    digests = {MANIFEST: sha256(manifest), **{name: record.sha256 for name, record in bundle.files.items()}}
    for beside in sorted(bundle.path.glob(f"{MANIFEST}.*")):  # a signature
        digests[beside.name] = sha256(beside)
    files = {digest: bundle.path / name for name, digest in digests.items()}
    send_files(ask, files, f"send {bundle.name}", progress)
    place: str = ask("tree", files={f"{bundle.path.name}/{name}": digest for name, digest in digests.items()})
    return f"{place}/{bundle.path.name}"


def send_file(ask: Ask, path: Path, progress: Progress = silent) -> str:
    """Send one file under its own name; returns its path there."""
    digest = sha256(path)
    send_files(ask, {digest: path}, f"send {path.name}", progress)
    place: str = ask("tree", files={path.name: digest})
    return f"{place}/{path.name}"
