"""Finds the clips in a folder, by suffix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgetube.errors import InputError


def _suffixes(names: str) -> frozenset[str]:
    return frozenset(f".{name}" for name in names.split())


VIDEOS = _suffixes(
    "264 265 3g2 3gp 266 amv apng asf avc avi avs2 avs3 dav dif divx dv f4v flv gif gxf h261 h263 h264 h265 h266 h26l "
    "hevc ism ismv ivf jxl lrv m1v m2t m2ts m2v m4v mj2 mjpeg mjpg mk3d mkv mov mp4 mp4v mpe mpeg mpg mpv mts mxf nsv "
    "nut nuv obu ogm ogv psp qt rm rmvb roq tod trp ts ty viv vob vro vvc webm wmv wtv xvid y4m"
)
"""Video containers and raw streams that FFmpeg reads, except suffixes that are mostly audio or text."""

IMAGES = _suffixes("avif bmp jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm qoi tif tiff webp")
"""Still images. Folders are searched for these suffixes; a file that is given by name may have any."""

ARRAYS = frozenset((".npy", ".npz"))
"""Arrays of frames: `.npy` holds one array, `.npz` has `frames` or `clips`, and may have `labels`."""

SYSTEM = frozenset(("@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"))
"""System folders among a user's files; skipped like hidden ones."""


@dataclass(frozen=True)
class Listing:
    """What was found in a folder.

    Attributes:
        files: those with a wanted suffix, in the order of their paths. Broken links are included, so that
            reading them fails instead of skipping them silently.
        foreign: how many other files there are, by suffix; hidden ones are not counted.
    """

    files: tuple[Path, ...]
    foreign: Counter[str]

    def required(self, folder: Path, wanted: Collection[str]) -> tuple[Path, ...]:
        """The files.

        Raises:
            InputError: there are none; lists the suffixes found and those that are read.
        """
        if not self.files:
            note = self.note(folder) or "it is empty"
            raise InputError(f"the folder {folder} holds no clip ({note}); known are {' '.join(sorted(wanted))}")
        return self.files

    def note(self, folder: Path) -> str:
        """One line about the skipped files; empty if there are none."""
        if not self.foreign:
            return ""
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in self.foreign.most_common(6))
        more = " and others" if len(self.foreign) > 6 else ""
        count = self.foreign.total()
        return f"{count} {'file' if count == 1 else 'files'} of {folder} left out, not clips: {kinds}{more}"


def walk(folder: Path, wanted: Collection[str]) -> Listing:
    """Search `folder` and the folders in it, links included, for files with one of the suffixes `wanted` (lower case).

    Hidden files and folders, and those of `SYSTEM`, are skipped.

    Raises:
        InputError: a link that leads back into a folder that holds it, or a folder that cannot be read.
    """
    files: list[Path] = []
    foreign: Counter[str] = Counter()
    for path in _files(folder, {}):
        if (suffix := path.suffix.lower()) in wanted:
            files.append(path)
        else:
            foreign[suffix or "without suffix"] += 1
    return Listing(tuple(sorted(files)), foreign)


def visible(paths: Iterable[Path]) -> list[Path]:
    """Those of `paths` whose names are neither hidden nor of `SYSTEM`."""
    return [path for path in paths if not (path.name.startswith(".") or path.name in SYSTEM)]


def is_file(path: Path) -> bool:
    """Whether the file exists; False for a name that the system refuses, such as one that is too long."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _files(folder: Path, above: dict[tuple[int, int], Path]) -> Iterator[Path]:
    """Every file below `folder`; `above` holds device and inode of the folders that it lies in."""
    try:
        state = folder.stat()
        entries = visible(folder.iterdir())
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be read: {error.strerror}") from error
    this = (state.st_dev, state.st_ino)
    if this in above:
        raise InputError(f"{folder} is a link back to {above[this]}, which holds it: remove the link")
    for path in entries:
        if path.is_dir():
            yield from _files(path, {**above, this: folder})
        else:
            yield path
