"""Arrays (N, ...) that lie in files and are looked at row by row, so that N does not matter."""

from __future__ import annotations

import math
import struct
import tempfile
import weakref
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
"""Of NumPy's file format by version; the third is for names of fields that are not ASCII."""


class Rows(Protocol):
    """What is common to such an array and to one in memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> np.ndarray: ...
    def __iter__(self) -> Iterator[np.ndarray]: ...


class Spool:
    """An array in a file of its own: rows are copied from and to it, and none stays in memory.

    A file mapped into memory would do the same until the disk is full, which then ends the process without a word.

    Args:
        folder: for the file, which has no name there and is gone when nobody holds the array.

    Raises:
        OSError: the disk refuses, here or when a row is written.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._row = math.prod(shape[1:]) * self.dtype.itemsize
        self._file = tempfile.TemporaryFile(dir=folder, suffix=".raw")  # noqa: SIM115  # closed below
        weakref.finalize(self, self._file.close)
        self._file.truncate(len(self) * self._row)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> np.ndarray:
        """A copy of one row (...); zeros if it was never written."""
        row = np.empty(self.shape[1:], self.dtype)
        self._file.seek(self._offset(index))
        self._file.readinto(row.data.cast("B"))
        return row

    def __setitem__(self, index: int, row: np.ndarray) -> None:
        """Write one row (...)."""
        self._file.seek(self._offset(index))
        self._file.write(np.ascontiguousarray(np.broadcast_to(row, self.shape[1:]), self.dtype).data)
        self._file.flush()

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    def _offset(self, index: int) -> int:
        return range(len(self))[index] * self._row  # IndexError beyond the end


@dataclass(frozen=True)
class Stored:
    """An array in somebody else's file, whose bytes begin at `offset`, in C order."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> np.ndarray:
        """One row (...).

        Raises:
            OSError, ValueError: the file is not there any more, or shorter than it was.
        """
        size = math.prod(self.shape[1:])
        offset = self.offset + range(len(self))[index] * size * self.dtype.itemsize
        return np.fromfile(self.file, self.dtype, size, offset=offset).reshape(self.shape[1:])

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))


def stored(file: Path) -> dict[str, Rows]:
    """The arrays of a `.npz` file by name, or that of a `.npy` file under "".

    Those that are compressed, or not in C order, are read at once.

    Raises:
        OSError, ValueError, zipfile.BadZipFile: the file is damaged or truncated, or holds Python objects.
    """
    if file.suffix == ".npy":
        with file.open("rb") as opened:
            return {"": _rows(file, opened, file.stat().st_size)}
    found: dict[str, Rows] = {}
    with zipfile.ZipFile(file) as archive, file.open("rb") as opened:
        if bad := archive.testzip():
            raise zipfile.BadZipFile(f"{bad} in it is damaged")
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if member.compress_type == zipfile.ZIP_STORED:
                opened.seek(member.header_offset + 26)  # local file header, APPNOTE.TXT 4.3.7
                opened.seek(sum(struct.unpack("<HH", opened.read(4))), 1)
                found[name] = _rows(file, opened, opened.tell() + member.file_size)
            else:
                with archive.open(member) as compressed:
                    found[name] = np.lib.format.read_array(compressed, allow_pickle=False)
    return found


def _rows(file: Path, opened: BinaryIO, end: int) -> Rows:
    """The array at the place where `opened` is."""
    start = opened.tell()
    if header := HEADERS.get(np.lib.format.read_magic(opened)):
        shape, fortran, dtype = header(opened)
        if shape and not fortran and not dtype.hasobject:
            missing = opened.tell() + math.prod(shape) * dtype.itemsize - end
            if missing > 0:
                raise ValueError(f"it is {missing} bytes too short")
            return Stored(file, opened.tell(), shape, dtype)
    opened.seek(start)
    array: np.ndarray = np.lib.format.read_array(opened, allow_pickle=False)
    return array
