"""Lists of labelled videos as data sets are published with them: which file has which label.

Known are lines of `path label` (VideoMAE, SlowFast, V-JEPA), the splits of UCF101 in that form, the tables of Kinetics
(`label,youtube_id,time_start,time_end,split`), and the JSON files of Something-Something (`id`, `template`).
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetube import strict
from edgetube.errors import FormatError, InputError
from edgetube.listing import VIDEOS, is_file

KINETICS = {"label", "youtube_id", "time_start", "time_end"}
"""Columns of the tables of Kinetics; further ones are not used."""

CLASSES = "classInd.txt"
"""Names of the classes of UCF101, `1 ApplyEyeMakeup`, beside its splits."""

MOST = 4 << 20

SAVE_AS = "save the file as UTF-8 (in Excel: CSV UTF-8; for Windows-1252: iconv -f cp1252 -t utf-8)"


@dataclass(frozen=True)
class Entry:
    """A video of a list: its path without the folder of all videos, and its label, if the list has one."""

    path: str
    label: str | None


def entries(path: Path, text: str) -> list[Entry] | None:
    """The videos of a list; None if it is none of the known ones.

    Raises:
        InputError: it is, and is damaged; says the line.
    """
    if path.suffix.lower() == ".json":
        return list(_something(path, text))
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if set(first.split(",")) >= KINETICS:
        return list(_kinetics(path, text))
    is_video = Path(first.rpartition(" ")[0]).suffix.lower() in VIDEOS
    return list(_lines(path, text)) if path.suffix.lower() == ".txt" or is_video else None


def folder_of(path: Path, found: Sequence[Entry]) -> Path:
    """Where the videos of a list are: beside it, beside its folder, or in a folder there.

    Raises:
        InputError: the first videos are in none of these.
    """
    above = (path.parent, path.parent.parent)
    places = [place for one in above for place in (one, *sorted(p for p in one.iterdir() if p.is_dir()))]
    first = [entry.path for entry in found[:20]]
    best = max(places, key=lambda place: sum(is_file(place / name) for name in first))
    if not any(is_file(best / name) for name in first):
        raise InputError(
            f"{path} names {first[0]!r}, which is neither in {above[0]} nor in {above[1]}, nor in a folder there; put "
            "the list beside its videos"
        )
    return best


def text_of(path: Path) -> str:
    """The text of a file by its byte order mark; UTF-8 where it has none.

    Raises:
        InputError: another encoding; says the line.
    """
    data = path.read_bytes()
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if marked else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x} is not {encoding.removesuffix('-sig').upper()}"
        raise InputError(f"{path}, line {line}: {found}; {SAVE_AS}") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(f"{path}, line {line} has a zero byte, as UTF-16 has it; {SAVE_AS}")
    return text


def _lines(path: Path, text: str) -> Iterator[Entry]:
    """`path label`, split at the last space; numbers are classes of `CLASSES` where that is beside the list."""
    names = _classes(path.parent / CLASSES)
    for number, line in enumerate(text.splitlines(), start=1):
        if not (line := line.strip()):
            continue
        file, _, label = line.rpartition(" ")
        if not file or Path(line).suffix.lower() in VIDEOS:  # a list without labels
            yield Entry(line, _folder(line) if _folder(line) in names.values() else None)
        elif names and label not in names:
            raise InputError(f"{path}, line {number}: class {label!r} is not in {CLASSES}")
        else:
            yield Entry(file, names.get(label, label))


def _folder(name: str) -> str:
    return name.rpartition("/")[0].rpartition("/")[2]


def _classes(path: Path) -> dict[str, str]:
    """Names of classes by their numbers; empty without the file."""
    if not path.is_file():
        return {}
    pairs = [line.split(None, 1) for line in text_of(path).splitlines() if line.strip()]
    if bad := next((pair for pair in pairs if len(pair) != 2), None):
        raise InputError(f"{path} has the line {' '.join(bad)!r}; expected a number and a name")
    return {number: name.strip() for number, name in pairs}


def _kinetics(path: Path, text: str) -> Iterator[Entry]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in rows:
            start, end = int(float(row["time_start"])), int(float(row["time_end"]))
            yield Entry(f"{row['youtube_id']}_{start:06d}_{end:06d}.mp4", row["label"] or None)
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.reader.line_num} is not CSV: {error}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}, line {rows.line_num}: time_start and time_end are no numbers") from error


def _something(path: Path, text: str) -> Iterator[Entry]:
    try:
        rows: list[Any] = strict.items(strict.parse_json(text, path.name), path.name, 1, MOST)
        for index, row in enumerate(rows):
            found = strict.record(row, f"entry {index} of {path.name}", ("id",))
            label = found.get("template", found.get("label"))
            named = None if label in (None, "") else strict.text(label, "template", most=1000)
            name = strict.text(str(found["id"]), "id", most=200)
            yield Entry(f"{name}.webm", None if named is None else re.sub(r"[\[\]]", "", named))
    except FormatError as error:
        raise InputError(
            f"{path}: {error}; expected the JSON of Something-Something, a list of id and template"
        ) from error
