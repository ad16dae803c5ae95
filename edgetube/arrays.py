"""Arrays (N, ...) in files, read row by row, so that N may be larger than memory."""

from __future__ import annotations

import errno
import math
import struct
import tempfile
import threading
import tokenize
import weakref
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import IO, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from edgetube.errors import FormatError
from edgetube.strict import shown

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
"""Readers of the header of NumPy's file format, by version; version 3 is for field names outside ASCII."""


class RowArray(Protocol):
    """An array (N, ...) that is read row by row; `np.ndarray` is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> np.ndarray: ...
    def __iter__(self) -> Iterator[np.ndarray]: ...


class DiskArray:
    """An array in a temporary file: rows are read from it and written to it, and none stays in memory.

    A memory map would do the same, but a full disk would then kill the process without an error message.

    Args:
        folder: of the temporary file, which has no name and is deleted with the array.
        file: takes its place: a new file, which stays, or one that holds the rows already and is only read.

    Raises:
        OSError: the disk is full or fails, here or when a row is written.
    """

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        file: BufferedReader | BufferedRandom | None = None,
    ) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._row = math.prod(shape[1:]) * self.dtype.itemsize
        self._lock = threading.Lock()  # threads read rows; the file has one position
        self._file = file or tempfile.TemporaryFile(dir=folder, suffix=".raw")  # noqa: SIM115  # closed below
        weakref.finalize(self, self._file.close)
        if self._file.writable():
            self._file.truncate(len(self) * self._row)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> np.ndarray:
        """A copy of one row (...); zeros if it was never written."""
        row = np.empty(self.shape[1:], self.dtype)
        with self._lock:
            self._file.seek(self._offset(index))
            self._file.readinto(row.data.cast("B"))
        return row

    def __setitem__(self, index: int, row: np.ndarray) -> None:
        """Write one row (...)."""
        data = np.ascontiguousarray(np.broadcast_to(row, self.shape[1:]), self.dtype).data
        with self._lock:
            self._file.seek(self._offset(index))
            self._file.write(data)
            self._file.flush()

    def shorten(self, length: int) -> None:
        """Keep the first `length` rows."""
        self.shape = (length, *self.shape[1:])
        self._file.truncate(length * self._row)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    def _offset(self, index: int) -> int:
        return range(len(self))[index] * self._row  # IndexError beyond the end


@dataclass(frozen=True)
class NpyArray:
    """An array inside a `.npy` or uncompressed `.npz` file: its bytes begin at `offset`, in C order."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> np.ndarray:
        """One row (...).

        Raises:
            OSError, ValueError: the file was deleted or truncated.
        """
        size = math.prod(self.shape[1:])
        offset = self.offset + range(len(self))[index] * size * self.dtype.itemsize
        return np.fromfile(self.file, self.dtype, size, offset=offset).reshape(self.shape[1:])

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))


def open_arrays(file: Path) -> dict[str, RowArray]:
    """The arrays of a `.npz` file by name, or that of a `.npy` file under "".

    Arrays that are compressed or not in C order are read into memory.

    Raises:
        OSError: the file cannot be read.
        FormatError: the file is damaged or truncated, or holds other types than numbers and strings.
    """
    with _readable(file), file.open("rb") as opened:
        if file.suffix.lower() == ".npy":
            return {"": _array(file, opened, file.stat().st_size)}
        found: dict[str, RowArray] = {}
        with zipfile.ZipFile(opened) as archive:
            members = _members(archive)
            if bad := archive.testzip():
                raise FormatError(f"{bad} in it is damaged")
            for name, member in members.items():
                if member.compress_type == zipfile.ZIP_STORED:
                    with file.open("rb") as own:
                        own.seek(member.header_offset + 26)  # local file header, APPNOTE.TXT 4.3.7
                        own.seek(sum(struct.unpack("<HH", own.read(4))), 1)
                        found[name] = _array(file, own, own.tell() + member.file_size)
                else:
                    found[name] = _member(archive, member)
    return found


def read_arrays(file: Path, wanted: Mapping[str, tuple[tuple[int, ...], npt.DTypeLike]]) -> dict[str, np.ndarray]:
    """Read the arrays of a `.npz` file, which must be those of `wanted`, by name, shape and type.

    At most the size of these arrays is decompressed.

    Raises:
        OSError: the file cannot be read.
        FormatError: the file is damaged, or holds other arrays.
    """
    with _readable(file), zipfile.ZipFile(file) as archive:
        members = _members(archive)
        if members.keys() != wanted.keys():
            raise FormatError(f"it holds {', '.join(sorted(members)) or 'nothing'}; expected {', '.join(wanted)}")
        return {name: _member(archive, members[name], wanted[name]) for name in wanted}


MOST_MEMBERS = 1 << 16


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members of an archive by the name of their array."""
    found: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name in found or len(found) >= MOST_MEMBERS:
            raise FormatError(f"it has {name!r} twice, or more than {MOST_MEMBERS} arrays")
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise FormatError(f"{name!r} in it is encrypted, or compressed in another way than NumPy does")
        found[name] = member
    return found


def _member(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, wanted: tuple[tuple[int, ...], npt.DTypeLike] | None = None
) -> np.ndarray:
    """Read the array of one member; check its shape and type if `wanted` is given."""
    with archive.open(member) as opened:
        header = _header(opened)
        if wanted is not None and (header.shape, header.dtype) != (wanted[0], np.dtype(wanted[1])):
            raise FormatError(
                f"{member.filename} is {header.shape} {header.dtype}; expected {wanted[0]} {np.dtype(wanted[1])}"
            )
        header.check(member.file_size - opened.tell())
        flat = np.empty(math.prod(header.shape), header.dtype)
        target, done = flat.view(np.uint8).data, 0
        while done < len(target) and (count := opened.readinto(target[done:])):  # type: ignore[attr-defined]
            done += count
        header.check(done + len(opened.read(1)))
    return flat.reshape(header.shape, order="F" if header.fortran else "C")


@dataclass(frozen=True)
class _Header:
    """The header of an array in NumPy's format."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def check(self, there: int) -> None:
        """Check that `there` bytes are exactly the size of the array."""
        if there != self.bytes:
            what = f"{self.bytes - there} bytes too short" if there < self.bytes else "longer than its header says"
            raise FormatError(f"it is {what}")


def _header(opened: IO[bytes]) -> _Header:
    """Read the header at the current position; numbers and strings only."""
    version = np.lib.format.read_magic(opened)
    if version not in HEADERS:
        raise FormatError(f"it is of version {version} of NumPy's format")
    shape, fortran, dtype = HEADERS[version](opened)
    if dtype.kind not in "biufUS" or dtype.itemsize == 0 or min(shape, default=0) < 0:
        raise FormatError(f"it holds {dtype} of shape {shape}; expected numbers")
    return _Header(shape, fortran, dtype)


def _array(file: Path, opened: BinaryIO, end: int) -> RowArray:
    """The array at the current position of `opened`, whose bytes end at `end`."""
    header = _header(opened)
    header.check(end - opened.tell())
    if header.shape and not header.fortran:
        return NpyArray(file, opened.tell(), header.shape, header.dtype)
    flat = np.fromfile(opened, header.dtype, math.prod(header.shape))
    return flat.reshape(header.shape, order="F" if header.fortran else "C")


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn what NumPy and zipfile raise on a damaged file into `FormatError`."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{file.name}: {error}") from error
    except DAMAGES as error:
        raise FormatError(f"{file.name} is damaged: {shown(str(error), 200)}") from error
    except OSError as error:  # a place in the file that cannot be
        if error.errno != errno.EINVAL:
            raise
        raise FormatError(f"{file.name} is damaged: {error.strerror}") from error


DAMAGES = (
    zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError,
    EOFError, IndexError, KeyError, NotImplementedError, OverflowError, RecursionError, RuntimeError,
    SyntaxError, TypeError, ValueError,
)  # fmt: skip
"""What NumPy and zipfile raise on damaged files; a header is a Python literal and fails in many ways."""
