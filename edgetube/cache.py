"""A cache of files that are slow to build and specific to this machine, valid until any part of their key changes.

An entry is a file `<name>.<digest of its key><suffix>` with its key beside it as JSON. One process builds an entry,
others that need it wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edgetube.bundle import sha256
from edgetube.errors import BackendError
from edgetube.files import atomic_write, replacing


@dataclass(frozen=True)
class Entry:
    """A file of the cache.

    Attributes:
        path: the file.
        reason: why it was built just now, for messages; empty if it was cached.
    """

    path: Path
    reason: str


def folder() -> Path:
    """`$EDGETUBE_CACHE`, or `edgetube` in the user's cache folder."""
    if chosen := os.environ.get("EDGETUBE_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "edgetube" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgetube"


def make_once(
    name: str, suffix: str, key: Mapping[str, str], make: Callable[[Path, str], None], refused: str = ""
) -> Entry:
    """The cached file for `key`; `make(path, reason)` builds it if it is missing or damaged.

    Args:
        name: for file names and messages; entries of one name differ in their key.
        suffix: of the file, `.engine`.
        key: all that the file depends on, readable: {"TensorRT": "10.3.0", "GPU": ...}.
        refused: sha256 of a cached file that turned out to be unusable; it is built again.
        make: writes the file to the given path, or raises. The reason says which part of the key changed.

    Raises:
        BackendError: the folder cannot be written.
    """
    place = folder()
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:16]
    path = place / f"{name}.{digest}{suffix}"
    record = path.with_name(path.name + ".json")
    try:
        place.mkdir(parents=True, exist_ok=True)
        with _locked(place / f"{name}{suffix}.lock"):
            reason = _reason(path, record, name, suffix, key, refused)
            if reason:
                with replacing(path) as part:
                    make(part, reason)
                atomic_write(record, json.dumps({"key": dict(key), "sha256": sha256(path)}, indent=1) + "\n")
    except OSError as error:
        raise BackendError(
            f"cannot write to the cache {place}: {error.strerror}; set EDGETUBE_CACHE to another folder"
        ) from error
    return Entry(path, reason)


def _reason(path: Path, record: Path, name: str, suffix: str, key: Mapping[str, str], refused: str) -> str:
    """Why the entry has to be built; empty if it is cached and intact."""
    if path.is_file():
        known = _read(record)
        if known is not None and known["sha256"] == sha256(path):
            return "the one in the cache was refused" if known["sha256"] == refused else ""
        return "the one in the cache is damaged"
    others = sorted(path.parent.glob(f"{name}.*{suffix}.json"), key=lambda p: p.stat().st_mtime)
    latest = _read(others[-1]) if others else None
    if latest is None:
        return "first load on this machine"
    old: dict[str, str] = latest["key"]
    changes = [f"{part} {old.get(part, 'none')} -> {now}" for part, now in key.items() if old.get(part) != now]
    return f"changed: {', '.join(changes)}"


def _read(record: Path) -> dict[str, Any] | None:
    """The record {"key", "sha256"} of an entry; None when it is missing or damaged."""
    try:
        data = json.loads(record.read_text("utf-8"))
        return {"key": dict(data["key"]), "sha256": str(data["sha256"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock; the system releases it when the process ends."""
    with path.open("a+b") as file:
        _lock(file)
        try:
            yield
        finally:
            _unlock(file)


if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[bytes]) -> None:
        file.seek(0)
        while True:
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
            except OSError:  # ten seconds have passed; the other process is still building
                continue
            return

    def _unlock(file: IO[bytes]) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _lock(file: IO[bytes]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX)

    def _unlock(file: IO[bytes]) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)
