"""Sets of labelled clips: a folder of the user's own, arrays, a manifest, or the built-in ones."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import re
import unicodedata
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import NoReturn

import numpy as np

from edgetube import __version__, arrays, demo, listing, lists, preprocess, shards, video
from edgetube.arrays import RowArray
from edgetube.contract import InputContract
from edgetube.errors import InputError
from edgetube.listing import ARRAYS, IMAGES, VIDEOS
from edgetube.strict import shown
from edgetube.video import Clip
from edgetube.views import SINGLE, Views


@dataclass(frozen=True)
class Item:
    """A clip that has not been read yet.

    Attributes:
        name: unique in its set; the sample depends on it.
        label: the true class, or None.
        read: the clip for a contract, with that name and label.
        version: changes when the clip does: size and time of last change of its file.
        read_views: the views of its source, the crops of each temporal view together; None where the clip is all that
            there is.
    """

    name: str
    label: str | None
    read: Callable[[InputContract], Clip]
    version: str = ""
    read_views: Callable[[InputContract, Views], tuple[Clip, ...]] | None = None

    def clips(self, contract: InputContract, views: Views) -> tuple[Clip, ...]:
        """Read the views of the clip; a single one is the clip itself.

        Raises:
            InputError: it has no more than one view, or cannot be read.
        """
        if views.count == 1:
            return (self.read(contract),)
        if self.read_views is None:
            raise InputError(f"{self.name} is one clip, made for the model's input, and has no {views} views: {REMEDY}")
        return self.read_views(contract, views)


REMEDY = "leave out --views, or give videos with --data"


@dataclass(frozen=True)
class ClipSet:
    """An ordered set of clips, each of which can be read for any contract, repeatedly.

    Attributes:
        name: for tables and reports.
        items: the clips, unread.
        source: the absolute path that `load` takes to read the set again; None for the built-in clips.
        notes: messages about the set, such as files of a folder that were skipped.
    """

    name: str
    items: tuple[Item, ...]
    source: Path | None = None
    notes: tuple[str, ...] = ()

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
        """A stratified sample of `count` clips (all if there are fewer).

        It depends on the names and the seed only, not on the order of the set; a smaller sample is a prefix of a larger
        one.
        """
        groups: dict[str, list[Item]] = defaultdict(list)
        for item in sorted(self.items, key=lambda item: (_draw(item.name, seed), item.name)):
            groups[item.label or ""].append(item)
        rounds = zip_longest(*(groups[label] for label in sorted(groups)))
        dealt = [item for dealing in rounds for item in dealing if item is not None]
        return replace(self, items=tuple(dealt[:count]))

    def check_labels(self, labels: tuple[str, ...]) -> ClipSet:
        """Check that a model with these labels has every label of the set, and return the set.

        Raises:
            InputError: a clip has a label that the model does not know.
        """
        found = {item.label for item in self.items if item.label is not None}
        if unknown := sorted(found - set(labels)):
            raise InputError(
                f"{self.name} has {len(found)} labels, among them {', '.join(map(repr, unknown[:5]))}, which the model "
                f"does not know; it has {len(labels)}: {', '.join(labels[:12])}"
            )
        return self

    def check_views(self, views: Views) -> ClipSet:
        """Check, before any clip is read, that none is made for the model's input, and return the set.

        Raises:
            InputError: there are several views, and a clip with one.
        """
        if views.count > 1 and any(item.read_views is None for item in self.items):
            made = f"{self.name} clips are made for the model's input and have one view"
            raise InputError(f"{made}, not {views}: {REMEDY}")
        return self


def _draw(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).digest()


def built_in(count: int, labels: tuple[str, ...]) -> ClipSet:
    """The built-in evaluation set; its labels are dropped when a model does not know all of them."""
    return _rendered("evaluation", demo.EVALUATION, count, labels)


def built_in_calibration(count: int, labels: tuple[str, ...]) -> ClipSet:
    """The built-in calibration set: like the evaluation set, but over other photographs."""
    return _rendered(demo.CALIBRATION_SET, demo.CALIBRATION, count, labels)


def _rendered(name: str, photos: tuple[str, ...], count: int, labels: tuple[str, ...]) -> ClipSet:
    known = set(demo.LABELS) <= set(labels)
    return ClipSet("built-in", tuple(_rendered_item(name, photos, index, known) for index in range(count)))


def _rendered_item(name: str, photos: tuple[str, ...], index: int, labelled: bool) -> Item:
    photo, label = photos[index // len(demo.LABELS) % len(photos)], demo.LABELS[index % len(demo.LABELS)]
    read = partial(_render, name, photos, index, labelled)
    return Item(f"{name}/{photo}/{index:04d}", label if labelled else None, read, f"{__version__} {demo.VERSION}")


def _render(name: str, photos: tuple[str, ...], index: int, labelled: bool, contract: InputContract) -> Clip:
    clip = demo.clip(name, demo.photos(photos), index, contract)
    return clip if labelled else replace(clip, label=None)


def single(source: str, labels: tuple[str, ...] = (), start: float | None = None) -> Item:
    """One clip, unread: of a video, an image or an array file, or a built-in one.

    Args:
        source: a file; of an array file with several clips `FILE#INDEX`; `demo`, the first built-in clip, or the name
            of one, `evaluation/PHOTO/NUMBER`.
        labels: of the model; a built-in clip has a label if they are those of the built-in clips.
        start: second at which the clip of a video begins; None takes its middle.

    Raises:
        InputError: there is no such clip.
    """
    path, number = Path(source), None
    if not path.exists() and source.rpartition("#")[2].isdecimal():
        path, number = Path(source.rpartition("#")[0]), int(source.rpartition("#")[2])
    if path.is_dir():
        raise InputError(f"{source} is a folder; expected one clip: a video, an image or an array")
    is_array = path.suffix.lower() in ARRAYS
    if start is not None and (is_array or not path.exists()):
        raise InputError(f"start is {start:g} s, but {source} is not a video")
    if not path.is_file():
        return _named(source, labels)
    found = _items(path.absolute(), path.name, None, start)
    if number is None and len(found) == 1:
        return found[0]
    if number is None or not is_array or number >= len(found):
        raise InputError(f"{path} holds {len(found)} clips; name one: {path}#0 to {path}#{len(found) - 1}")
    return found[number]


def _named(source: str, labels: tuple[str, ...]) -> Item:
    """A built-in clip by its name."""
    number = 0 if source == "demo" else int(found[0]) if (found := re.findall(r"/(\d{4,6})$", source)) else None
    if number is not None:
        item = _rendered_item("evaluation", demo.EVALUATION, number, set(demo.LABELS) <= set(labels))
        if source in ("demo", item.name):
            return item
    raise InputError(
        f"there is no clip {shown(repr(source))}; expected a video, image or array file, demo, or the name of a "
        f"built-in clip, like {built_in(1, labels).items[0].name}"
    )


def load(source: str | Path, contract: InputContract | None = None) -> ClipSet:
    """Load a set from a folder, a `.csv` manifest, a list of a published data set, tars, a `.npy` or a `.npz` file.

    Args:
        contract: of the model; still images of a folder are skipped if it takes several frames.

    Raises:
        InputError: the source does not exist, or holds no clips.
    """
    given, path = str(source), Path(source).absolute()
    if path.is_dir():
        found = _folder_of_tars(path, contract) or folder(path, contract)
    elif not path.is_file():
        raise InputError(
            f"no clips at {given}; give a folder of videos or arrays, a .csv manifest, or .npy/.npz frames"
        )
    elif path.suffix.lower() == shards.SUFFIX:
        found = ClipSet(given, tuple(_tar(path, contract)), path)
    elif path.suffix.lower() in LISTS:
        found = listed(path) or manifest(path)
    elif path.suffix.lower() in ARRAYS:
        found = ClipSet(given, tuple(_arrays(path, path.stem, None)), path)
    else:
        raise InputError(
            f"{given} is not a set of clips; give a folder, a list (.csv, .txt, .json), or .npy/.npz frames"
        )
    return replace(found, name=given)


def folder(path: Path, contract: InputContract | None = None) -> ClipSet:
    """Every video, image and array file below `path`; a file's folder is its label, except at the top.

    Links are followed, hidden files are skipped; other files are counted in the set's notes.

    Args:
        contract: as for `load`.

    Raises:
        InputError: no such folder, nothing in it that can be read, or a link back into a folder that holds it.
    """
    path = path.absolute()
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; give one with videos, one sub-folder a class")
    wanted = _wanted(contract)
    found = listing.walk(path, wanted)
    items = []
    for file in found.required(path, wanted):
        label = None if file.parent == path else file.parent.name
        name = file.relative_to(path).as_posix()
        try:
            items.extend(_items(file, name, label))
        except InputError as error:  # whoever reads the clip is told
            refuse = partial(_refuse, str(error))
            items.append(Item(name, label, refuse, read_views=refuse))
    return ClipSet(str(path), tuple(items), path, tuple(filter(None, [found.note(path)])))


def _wanted(contract: InputContract | None) -> frozenset[str]:
    """Suffixes of clips: those of still images for a model that takes single ones."""
    return VIDEOS | ARRAYS if contract and not contract.is_image else VIDEOS | ARRAYS | IMAGES


def windows(path: Path, starts: Iterable[float]) -> ClipSet:
    """The clips of one video file that begin at the seconds `starts`."""
    given, path = str(path), path.absolute()
    read = [(f"{start:.3f}s", partial(_read_video, path, f"{start:.3f}s", None, start)) for start in starts]
    return ClipSet(given, tuple(Item(name, None, how, _version(path)) for name, how in read), path)


LISTS = (".csv", ".txt", ".json")


def listed(path: Path) -> ClipSet | None:
    """The videos of a list as data sets are published with them, see `edgetube.lists`; None if it is none.

    Videos that are not there are items that cannot be read; a note counts them.

    Raises:
        InputError: the list is damaged or empty, names a video twice, or none of its first videos is there.
    """
    found = lists.entries(path, lists.text_of(path))
    if found is None:
        return None
    if not found:
        raise InputError(f"{path} names no clips; expected a line for each")
    where, seen, items, missing = lists.folder_of(path, found), set[str](), [], 0
    for entry in found:
        if entry.path in seen:
            raise InputError(f"{path} names {entry.path!r} twice; name each clip once")
        seen.add(entry.path)
        file = where / entry.path
        if listing.is_file(file):
            items.extend(_items(file, entry.path, entry.label))
        else:
            missing += 1
            refuse = partial(_refuse, f"there is no file {file}")
            items.append(Item(entry.path, entry.label, refuse, "missing", refuse))
    notes = (f"{missing} of {len(found)} videos of {path.name} are not in {where}",) if missing else ()
    return ClipSet(str(path), tuple(items), path, notes)


def _folder_of_tars(path: Path, contract: InputContract | None) -> ClipSet | None:
    """The clips of the tars in a folder; None if there are none, or clips beside them, of which the set is then."""
    there = sorted(listing.visible(path.glob("*")))  # which passes over what cannot be read: `folder` says so
    tars = [file for file in there if file.suffix.lower() == shards.SUFFIX and listing.is_file(file)]
    if not tars or listing.walk(path, _wanted(contract)).files:
        return None
    return ClipSet(str(path), tuple(item for tar in tars for item in _tar(tar, contract)), path)


def _tar(path: Path, contract: InputContract | None) -> Iterator[Item]:
    """The videos of a tar; its images, too, for a model that takes single ones."""
    if not (found := shards.samples(path, _wanted(contract) - ARRAYS)):
        raise InputError(f"{path} holds no clips; expected a tar of webdataset, with videos and .cls or .json")
    for one in found:
        name = f"{path.name}/{one.name}"
        asked = path, one, name
        yield Item(name, one.label, partial(_read_sample, *asked), _version(path), partial(_read_sample_views, *asked))


def _read_sample(path: Path, sample: shards.Sample, name: str, contract: InputContract) -> Clip:
    return _read_sample_views(path, sample, name, contract, SINGLE)[0]


def _read_sample_views(
    path: Path, sample: shards.Sample, name: str, contract: InputContract, views: Views
) -> tuple[Clip, ...]:
    try:
        with shards.extracted(path, sample) as file:
            try:
                return _read_video_views(file, name, sample.label, None, contract, views)
            except InputError as error:
                raise InputError(f"{path}: {str(error).replace(str(file), sample.name)}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


COLUMNS = ("path", "label", "start")
"""Columns of a manifest; the first one is required."""


def manifest(path: Path) -> ClipSet:
    """A CSV file with the columns `path`, relative to it, and optionally `label` and `start` (seconds).

    The text is UTF-8, or UTF-16 with a byte order mark.

    Raises:
        InputError: another encoding, a column that is missing or unknown, a row with too few or too many cells, that
            names no file, or that names a clip of a row before; says the line.
    """
    path = path.absolute()
    lines = _lines(path)
    header, columns = next(lines, (1, []))
    if "path" not in columns or not set(columns) <= set(COLUMNS) or len(set(columns)) < len(columns):
        found = shown(", ".join(map(repr, columns))) or "nothing"
        hint = ", separated by commas" if len(columns) == 1 else ""
        raise InputError(f"{path}, line {header} has the columns {found}; expected path[,label][,start]{hint}")
    items: list[Item] = []
    seen: dict[tuple[str, float | None], int] = {}
    for number, cells in lines:
        if len(cells) != len(columns):
            hint = "; write names that have a comma in quotes" if len(cells) > len(columns) else ""
            raise InputError(f"{path}, line {number} has {len(cells)} cells; expected {len(columns)}{hint}")
        row = dict(zip(columns, cells, strict=True))
        where = f"{path}, line {number}"
        target = path.parent / row["path"]
        if not listing.is_file(target):
            raise InputError(f"{where}: {_no_file(path.parent, row['path'])}")
        start = _seconds(row.get("start"), where)
        if (before := seen.setdefault((os.path.normpath(target), start), number)) != number:
            raise InputError(f"{where} names {row['path']!r} again, as line {before} does; name each clip once")
        name = row["path"] if start is None else f"{row['path']}@{_shortest(start)}"
        items.extend(_items(target, name, row.get("label") or None, start))
    if not items:
        raise InputError(f"{path} names no clips; expected a line for each")
    return ClipSet(str(path), tuple(items), path)


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file that are not blank, with the numbers of their (last) lines."""
    reader = csv.reader(io.StringIO(lists.text_of(path), newline=""), strict=True)
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num} is not CSV: {error}") from error


def _no_file(folder: Path, given: str) -> str:
    """The message for a file of a manifest that does not exist; suggests one with a similar name."""
    if os.path.isdir(folder / given):  # noqa: PTH112  # which is False for every name that the system refuses
        return f"{given!r} is a folder; expected a file"
    said = f"there is no file {shown(repr(given))}"
    for other, why in (
        (given.strip(), "without the spaces around its name"),
        (given.replace("\\", "/"), "with / for \\"),
        (unicodedata.normalize("NFC", given), "in Unicode's composed form (NFC)"),
        (unicodedata.normalize("NFD", given), "in Unicode's decomposed form (NFD)"),
    ):
        if other != given and listing.is_file(folder / other):
            return f"{said}; there is one {why}"
    return said


def _seconds(text: str | None, where: str) -> float | None:
    """The start in a row of a manifest, or None."""
    if not text:
        return None
    try:
        start = float(text)
    except ValueError as error:
        raise InputError(f"{where}: start is {shown(repr(text))}; expected seconds, like 1.5") from error
    if not (math.isfinite(start) and start >= 0):
        raise InputError(f"{where}: start is {shown(repr(text))}; expected seconds from 0 on")
    return start


def _shortest(number: float) -> str:
    """A number so that no other one is written alike: 1.5, 2, 1234.567."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def _items(file: Path, name: str, label: str | None, start: float | None = None) -> list[Item]:
    if file.suffix.lower() in ARRAYS:
        return _arrays(file, name, label)
    asked = file, name, label, start
    return [Item(name, label, partial(_read_video, *asked), _version(file), partial(_read_video_views, *asked))]


def _refuse(reason: str, *_: object) -> NoReturn:
    raise InputError(reason)


def _version(file: Path) -> str:
    try:
        state = file.stat()
    except FileNotFoundError:  # a broken link: whoever reads it says so
        return "missing"
    return f"{state.st_size} bytes at {state.st_mtime_ns}"


def _read_video(file: Path, name: str, label: str | None, start: float | None, contract: InputContract) -> Clip:
    return _read_video_views(file, name, label, start, contract, SINGLE)[0]


def _read_video_views(
    file: Path, name: str, label: str | None, start: float | None, contract: InputContract, views: Views
) -> tuple[Clip, ...]:
    try:
        found = video.load_views(file, contract, views, start)
        return tuple(replace(clip, name=name, label=label) for clip in found)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except InputError as error:
        if str(file) in str(error):
            raise
        raise InputError(f"{file}: {error}") from error


def _arrays(file: Path, name: str, label: str | None) -> list[Item]:
    """The clips of one array file: one clip for rank 4, N clips for rank 5."""
    version = _version(file)
    stored = _open_arrays(file, version)
    frames, labels = stored["frames"], stored.get("labels")
    if len(frames.shape) < 5:
        own = label if labels is None else str(np.array(labels).item()) or None
        return [_array_item(file, None, name, own, version)]
    if labels is not None and len(labels) != len(frames):
        raise InputError(f"{file} has {len(frames)} clips and {len(labels)} labels; expected as many")
    items = []
    for i in range(len(frames)):
        one, own = f"{name}#{i:05d}", label if labels is None else str(labels[i]) or None
        items.append(_array_item(file, i, one, own, version))
    return items


def _array_item(file: Path, index: int | None, name: str, label: str | None, version: str) -> Item:
    asked = file, index, name, label
    return Item(name, label, partial(_read_array, *asked), version, partial(_read_array_views, *asked))


@lru_cache(maxsize=1)
def _open_arrays(file: Path, version: str) -> dict[str, RowArray]:
    """The arrays of a file as it is in `version`: of the frames only where they lie, if they are not compressed."""
    try:
        found = arrays.open_arrays(file)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    for key in ("", "frames", "clips"):
        if key in found:
            return {"frames": found[key]} | {k: v for k, v in found.items() if k == "labels"}
    raise InputError(f"{file} holds {', '.join(found)}; expected an array called frames or clips")


def _read_array(file: Path, index: int | None, name: str, label: str | None, contract: InputContract) -> Clip:
    return _read_array_views(file, index, name, label, contract, SINGLE)[0]


def _read_array_views(
    file: Path, index: int | None, name: str, label: str | None, contract: InputContract, views: Views
) -> tuple[Clip, ...]:
    found = _open_arrays(file, _version(file))["frames"]
    try:
        frames = np.array(list(found)) if index is None else found[index]
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    if np.issubdtype(frames.dtype, np.floating) and not np.isfinite(frames).all():
        raise InputError(f"{file} holds NaN or infinite pixels; expected uint8 RGB in 0..255")
    if frames.dtype == np.uint8 and frames.shape == contract.shape:
        if views.count > 1:
            raise InputError(f"{file} holds exactly the model's clip, {contract.shape}, and has one view: {REMEDY}")
        return (Clip(name, np.ascontiguousarray(frames), label),)  # ready: no stride or crop must be applied twice
    try:
        return tuple(
            Clip(name, preprocess.prepare(frames, contract, view=view), label) for crops in views for view in crops
        )
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
