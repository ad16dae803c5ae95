"""Atomic writes: a reader sees the old file or the new one, never a part.

The new file is written under a temporary name in the same folder, flushed to disk, and renamed.
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
"""Prefix of unfinished files; it hides them from listings of clips and bundles."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, which replaces `path` on success and is deleted on error.

    It has the suffix of `path`, because some writers choose their format by it.

    Raises:
        OSError: the write fails; `path` is unchanged.
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
    """Write a whole file, text as UTF-8 without translation of line ends; returns the path.

    Surrogates, which stand for bytes of file names that are not valid UTF-8, are escaped.

    Raises:
        OSError: the write fails; an older file at `path` is unchanged.
    """
    path = Path(path)
    with replacing(path) as part:
        part.write_bytes(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)
    return path


def exchange(one: Path, other: Path) -> bool:
    """Swap two paths of one file system atomically; False, without any change, where the system cannot."""
    name = {"linux": "renameat2", "darwin": "renameatx_np"}.get(sys.platform)
    swap = getattr(ctypes.CDLL(None), name, None) if name else None
    if swap is None:
        return False
    here = ctypes.c_int(-100 if sys.platform == "linux" else -2)  # AT_FDCWD
    flag = ctypes.c_uint(2)  # RENAME_EXCHANGE, RENAME_SWAP
    return bool(swap(here, os.fsencode(one.absolute()), here, os.fsencode(other.absolute()), flag) == 0)


def sync_tree(folder: Path) -> None:
    """Flush every file below a folder to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:
                os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut; does nothing on Windows."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems cannot; the file itself is on the disk
        pass
    finally:
        os.close(handle)
