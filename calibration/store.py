"""Sets of clips that were slow to read, kept in the cache folder as frames for later exports.

An entry is a file of frames and a record beside it, which is renamed into place last. Nothing depends on one: it is
dropped when it is damaged, when the folder is full, and when newer ones need its room.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from edgetube import __version__, cache
from edgetube.arrays import DiskArray
from edgetube.contract import InputContract
from edgetube.datasets import Item
from edgetube.errors import InputError
from edgetube.files import PREFIX, atomic_write

LIMIT_GB = 4.0
"""Most gigabytes of frames that are kept; `$EDGETUBE_CLIPS_GB` sets another number, and 0 keeps none."""

WORTH_S = 5.0
"""A set that is read in fewer seconds is not kept."""

FREE_SHARE = 0.5
"""Most of the free space of the disk that a set may take."""

ABANDONED_S = 86400.0
"""Unfinished files of this age belong to no process any more."""


@dataclass(frozen=True)
class Record:
    """What is kept of a set beside its frames: see `edgetube.calibration.clips.Clips`.

    Attributes:
        shape: of the frames (N, T, H, W, 3).
        labels: of the clips, None where unknown.
        sha256: of pixels, names, labels and contract.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    labels: tuple[str | None, ...]
    sha256: str


def limit() -> int:
    """Most bytes of frames that are kept.

    Raises:
        InputError: `$EDGETUBE_CLIPS_GB` is no number, or negative.
    """
    given = os.environ.get("EDGETUBE_CLIPS_GB", str(LIMIT_GB))
    try:
        found = float(given)
    except ValueError:
        found = -1.0
    if not 0 <= found < 1e9:
        raise InputError(f"EDGETUBE_CLIPS_GB is {given!r}; expected gigabytes, 0 to keep no clips")
    return int(found * 1e9)


def key(source: str, items: Sequence[Item], contract: InputContract) -> str:
    """Names the entry of a set: digest of its place, the versions of its clips, the input, and what reads them.

    Empty where a clip has no version, so that a change of it would not be seen.
    """
    if not all(item.version for item in items):
        return ""
    what: Mapping[str, Any] = {
        "source": source,
        "clips": [(item.name, item.label, item.version) for item in items],
        "input": contract.to_json(),
        "readers": [__version__, av.__version__, np.__version__],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode("utf-8", "backslashreplace")).hexdigest()[:24]


def find(key: str) -> tuple[DiskArray, Record] | None:
    """The frames and record of an entry; None if it is missing, or damaged as far as its size and record tell."""
    path = _path(key)
    try:
        data = json.loads(_record(path).read_text("utf-8"))
        record = Record(tuple(data["shape"]), tuple(data["names"]), tuple(data["labels"]), str(data["sha256"]))
        for one in (path, _record(path)):  # the least recently used entry is dropped first
            os.utime(one)
        file = path.open("rb")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    size = int(np.prod(record.shape))
    counts = {len(record.names), len(record.labels), *record.shape[:1]}
    if len(record.shape) != 5 or len(counts) > 1 or os.fstat(file.fileno()).st_size != size:
        file.close()
        return None
    return DiskArray(path.parent, record.shape, np.uint8, file), record


def drop(key: str) -> None:
    """Remove an entry."""
    for path in (_record(_path(key)), _path(key)):
        path.unlink(missing_ok=True)


class Draft:
    """An entry that is being written.

    Attributes:
        frames: (N, T, H, W, 3) uint8 of the file.
    """

    def __init__(self, key: str, shape: tuple[int, ...]) -> None:
        self.key, self.begin = key, time.monotonic()
        self.path = _path(key).with_name(f"{PREFIX}{os.getpid()}-{key}.frames")
        self.frames = DiskArray(self.path.parent, shape, np.uint8, self.path.open("w+b"))

    def publish(self, record: Record) -> None:
        """Give the entry its name, and drop others that no longer fit; a set that was read quickly is not kept."""
        if time.monotonic() - self.begin < WORTH_S:
            return
        path = _path(self.key)
        self.path.replace(path)
        atomic_write(_record(path), json.dumps(asdict(record)) + "\n")
        _make_room()

    def discard(self) -> None:
        """Remove the file, unless it was published; its frames stay readable."""
        self.path.unlink(missing_ok=True)


def draft(key: str, shape: tuple[int, ...]) -> Draft | None:
    """Begin an entry; None without a key, if it would not fit, or if the folder cannot be written.

    None on Windows, too, which neither renames nor removes a file that is open.
    """
    size = int(np.prod(shape))
    if not key or os.name == "nt" or size > limit():
        return None
    try:
        _folder().mkdir(parents=True, exist_ok=True)
        if size > FREE_SHARE * shutil.disk_usage(_folder()).free:
            return None
        return Draft(key, shape)
    except OSError:  # a read-only home: the clips are read again next time
        return None


def _make_room() -> None:
    """Drop unfinished files that were abandoned, and the least recently used entries beyond the limit."""
    left = limit()
    for path in _folder().glob(f"{PREFIX}*.frames"):
        if time.time() - path.stat().st_mtime > ABANDONED_S:
            path.unlink(missing_ok=True)
    entries = [path for path in _folder().glob("*.frames") if not path.name.startswith(PREFIX)]
    for path in sorted(entries, key=lambda path: path.stat().st_mtime, reverse=True):
        left -= path.stat().st_size
        if left < 0:
            drop(path.stem)


def _folder() -> Path:
    return cache.folder() / "clips"


def _path(key: str) -> Path:
    return _folder() / f"{key}.frames"


def _record(path: Path) -> Path:
    return path.with_suffix(".json")
