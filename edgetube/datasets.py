"""Sets of labelled clips: a folder of the user's own, arrays, a manifest, or the built-in ones."""

from __future__ import annotations

import csv
import hashlib
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import zip_longest
from pathlib import Path

import numpy as np

from edgetube import __version__, demo, preprocess, rows, video
from edgetube.errors import InputError
from edgetube.rows import Rows
from edgetube.spec import InputContract
from edgetube.video import Clip

ARRAYS = (".npy", ".npz")
"""Files of frames: `.npy` is one array, `.npz` has `frames` or `clips`, and may have `labels`."""


@dataclass(frozen=True)
class Item:
    """One clip that has not been read yet.

    Attributes:
        name: unique in its set; what sampling goes by.
        label: the true class, or None.
        read: the clip for a contract, with that name and label.
        version: changes when the clip does: size and time of last change of its file.
    """

    name: str
    label: str | None
    read: Callable[[InputContract], Clip]
    version: str = ""


@dataclass(frozen=True)
class ClipSet:
    """Clips that can be made again for any contract, any number of times, in one order.

    Attributes:
        name: for tables and reports.
        items: the clips, unread.
        source: the path that it came from, from which `load` makes it again; None for the built-in clips.
    """

    name: str
    items: tuple[Item, ...]
    source: Path | None = None

    @property
    def count(self) -> int:
        """How many clips."""
        return len(self.items)

    def clips(self, contract: InputContract) -> Iterator[Clip]:
        """Read the clips for a contract, one at a time."""
        for item in self.items:
            yield item.read(contract)

    def item(self, name: str) -> Item:
        """The clip of that name, unread.

        Raises:
            InputError: there is none.
        """
        found = next((item for item in self.items if item.name == name), None)
        if found is None:
            raise InputError(f"{self.name} has no clip {name!r}; it has {self.count}, {self.items[0].name!r} first")
        return found

    def sample(self, count: int, seed: int = 0) -> ClipSet:
        """`count` of the clips (all when there are fewer), the classes as equal as they can be.

        Which ones depends on the names and the seed alone, not on the order of the set; any first part of a larger
        sample is a smaller one.
        """
        groups: dict[str, list[Item]] = defaultdict(list)
        for item in sorted(self.items, key=lambda item: (_draw(item.name, seed), item.name)):
            groups[item.label or ""].append(item)
        rounds = zip_longest(*(groups[label] for label in sorted(groups)))
        dealt = [item for dealing in rounds for item in dealing if item is not None]
        return replace(self, items=tuple(dealt[:count]))

    def known(self, labels: tuple[str, ...]) -> ClipSet:
        """The set itself, after a check that a model with these labels can be asked about it.

        Raises:
            InputError: a clip has a label that the model does not know.
        """
        found = {item.label for item in self.items if item.label is not None}
        if unknown := sorted(found - set(labels)):
            raise InputError(
                f"{self.name} has {len(found)} labels, among them {', '.join(unknown[:5])}, which the model does not "
                f"know; it has {len(labels)}: {', '.join(labels[:12])}"
            )
        return self


def _draw(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def built_in(count: int, labels: tuple[str, ...]) -> ClipSet:
    """The built-in evaluation set; its labels are dropped when a model does not know all of them."""
    return _rendered("evaluation", demo.EVALUATION, count, labels)


def built_in_calibration(count: int, labels: tuple[str, ...]) -> ClipSet:
    """The built-in calibration set: like the evaluation set, but over other photographs."""
    return _rendered("calibration", demo.CALIBRATION, count, labels)


def _rendered(name: str, photos: tuple[str, ...], count: int, labels: tuple[str, ...]) -> ClipSet:
    known = set(demo.LABELS) <= set(labels)
    items = []
    for index in range(count):
        photo, label = photos[index // len(demo.LABELS) % len(photos)], demo.LABELS[index % len(demo.LABELS)]
        read = partial(_render, name, photos, index, known)
        items.append(Item(f"{name}/{photo}/{index:04d}", label if known else None, read, __version__))
    return ClipSet("built-in", tuple(items))


def _render(name: str, photos: tuple[str, ...], index: int, labelled: bool, contract: InputContract) -> Clip:
    clip = demo.clip(name, demo.photos(photos), index, contract)
    return clip if labelled else replace(clip, label=None)


def load(source: str | Path) -> ClipSet:
    """A set from whatever `source` is: a folder, a `.csv` manifest, or one `.npy` or `.npz` file.

    Raises:
        InputError: no such thing, or it holds no clips.
    """
    path = Path(source)
    if path.is_dir():
        return folder(path)
    if not path.is_file():
        raise InputError(f"no clips at {path}; give a folder of videos or arrays, a .csv manifest, or .npy/.npz frames")
    if path.suffix == ".csv":
        return manifest(path)
    if path.suffix in ARRAYS:
        return ClipSet(str(path), tuple(_arrays(path, path.stem, None)), path)
    raise InputError(f"{path} is not a set of clips; give a folder, a .csv manifest, or .npy/.npz frames")


def folder(path: Path) -> ClipSet:
    """Every video, image and array file below `path`; a file's folder is its label, except at the top.

    Raises:
        InputError: no such folder, or nothing in it that can be read.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; give one with videos, one sub-folder a class")
    arrays = sorted(file for file in path.rglob("*") if file.suffix in ARRAYS and file.is_file())
    files = [] if arrays and not _has_videos(path) else [f for f in video.sources(str(path)) if isinstance(f, Path)]
    items = []
    for file in sorted([*files, *arrays]):
        label = None if file.parent == path else file.parent.name
        items.extend(_items(file, file.relative_to(path).as_posix(), label))
    return ClipSet(str(path), tuple(items), path)


def windows(path: Path, starts: Iterable[float]) -> ClipSet:
    """The clips of one video file that begin at the seconds `starts`."""
    read = [(f"{start:.3f}s", partial(_read_video, path, f"{start:.3f}s", None, start)) for start in starts]
    return ClipSet(str(path), tuple(Item(name, None, how, _version(path)) for name, how in read), path)


def _has_videos(path: Path) -> bool:
    try:
        return bool(video.sources(str(path)))
    except InputError:
        return False


def manifest(path: Path) -> ClipSet:
    """A CSV file with the columns `path`, relative to it, and optionally `label` and `start` (seconds).

    Raises:
        InputError: a column is missing or unknown, or a row names no file.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = set(reader.fieldnames or ())
        if "path" not in columns or not columns <= {"path", "label", "start"}:
            raise InputError(f"{path} has the columns {', '.join(sorted(columns))}; expected path[,label][,start]")
        rows = list(reader)
    items: list[Item] = []
    for number, row in enumerate(rows, start=2):
        target = path.parent / row["path"]
        if not target.is_file():
            raise InputError(f"{path}, line {number}: there is no file {row['path']!r}")
        try:
            start = float(row["start"]) if row.get("start") else None
        except ValueError as error:
            raise InputError(f"{path}, line {number}: start is {row['start']!r}; expected seconds") from error
        name = row["path"] if start is None else f"{row['path']}@{start:g}"
        items.extend(_items(target, name, row.get("label") or None, start))
    if not items:
        raise InputError(f"{path} names no clips; expected a line for each")
    return ClipSet(str(path), tuple(items), path)


def _items(file: Path, name: str, label: str | None, start: float | None = None) -> list[Item]:
    if file.suffix in ARRAYS:
        return _arrays(file, name, label)
    return [Item(name, label, partial(_read_video, file, name, label, start), _version(file))]


def _version(file: Path) -> str:
    state = file.stat()
    return f"{state.st_size} bytes at {state.st_mtime_ns}"


def _read_video(file: Path, name: str, label: str | None, start: float | None, contract: InputContract) -> Clip:
    return replace(video.load(file, contract, start), name=name, label=label)


def _arrays(file: Path, name: str, label: str | None) -> list[Item]:
    """The clips of one array file: one of rank 4, or as many as the first axis of rank 5 says."""
    version = _version(file)
    stored = _open_arrays(file, version)
    frames, labels = stored["frames"], stored.get("labels")
    if len(frames.shape) < 5:
        own = label if labels is None else str(np.array(labels).item())
        return [Item(name, own, partial(_read_array, file, None, name, own), version)]
    if labels is not None and len(labels) != len(frames):
        raise InputError(f"{file} has {len(frames)} clips and {len(labels)} labels; expected as many")
    items = []
    for i in range(len(frames)):
        one, own = f"{name}#{i:05d}", label if labels is None else str(labels[i])
        items.append(Item(one, own, partial(_read_array, file, i, one, own), version))
    return items


@lru_cache(maxsize=1)
def _open_arrays(file: Path, version: str) -> dict[str, Rows]:
    """The arrays of a file as it is in `version`: of the frames only where they lie, if they are not compressed."""
    try:
        found = rows.stored(file)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    for key in ("", "frames", "clips"):
        if key in found:
            return {"frames": found[key]} | {k: v for k, v in found.items() if k == "labels"}
    raise InputError(f"{file} holds {', '.join(found)}; expected an array called frames or clips")


def _read_array(file: Path, index: int | None, name: str, label: str | None, contract: InputContract) -> Clip:
    found = _open_arrays(file, _version(file))["frames"]
    try:
        frames = np.array(list(found)) if index is None else found[index]
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    if np.issubdtype(frames.dtype, np.floating) and not np.isfinite(frames).all():
        raise InputError(f"{file} holds NaN or infinite pixels; expected uint8 RGB in 0..255")
    try:
        return Clip(name, preprocess.prepare(frames, contract), label)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
