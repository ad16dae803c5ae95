"""Files that other processes may read while they are written: a reader sees the old file or the new one, never a part.

The new file is written under a name of its own in the same folder, flushed to the disk, and renamed.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = ".edgetube-"
"""How names of unfinished files begin; hidden, so that no listing of clips or bundles takes them for finished ones."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, for a function that writes to a path; it replaces `path` when the block ends.

    The temporary name has the suffix of `path`, because some writers choose their format by it. When the block raises,
    the temporary file is removed and `path` is as it was.

    Raises:
        OSError: the file system refuses; `path` is as it was.
    """
    path = Path(path)
    part = path.with_name(f"{PREFIX}{os.getpid()}-{secrets.token_hex(6)}{path.suffix}")
    try:
        yield part
        with part.open("r+b") as file:  # Windows flushes only what is open for writing
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def atomic_write(path: str | Path, data: str | bytes) -> Path:
    """Write a whole file, text as UTF-8 with the line ends that it has; returns the path.

    What UTF-8 cannot express, bytes of file names that are not text, is escaped.

    Raises:
        OSError: the file system refuses; an older file at `path` is as it was.
    """
    path = Path(path)
    with replacing(path) as part:
        part.write_bytes(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)
    return path


def exchange(one: Path, other: Path) -> bool:
    """Swap two names of one file system in one step; False where the system cannot, and then nothing has changed."""
    name = {"linux": "renameat2", "darwin": "renameatx_np"}.get(sys.platform)
    swap = getattr(ctypes.CDLL(None), name, None) if name else None
    if swap is None:
        return False
    here = ctypes.c_int(-100 if sys.platform == "linux" else -2)  # AT_FDCWD
    flag = ctypes.c_uint(2)  # RENAME_EXCHANGE, RENAME_SWAP
    return bool(swap(here, os.fsencode(one.absolute()), here, os.fsencode(other.absolute()), flag) == 0)


def sync_tree(folder: Path) -> None:
    """Flush every file below a folder to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:
                os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk, so that a rename in it outlives a power cut; nothing on Windows."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems cannot; the file itself is on the disk
        pass
    finally:
        os.close(handle)
