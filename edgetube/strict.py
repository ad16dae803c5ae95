"""Strict parsing of untrusted JSON: values of a wrong type or form are errors, never converted.

Every function takes `where`, the name of the value in an error message ("model.tubes[0].kernel"), and raises
`FormatError` with one line: what the value is, and what was expected.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from edgetube.errors import FormatError, SpecError, printable

T = TypeVar("T")

DEPTH = 32
"""Largest depth of lists and objects."""

BYTES = 64 << 20
"""Largest JSON file."""

SHOWN = 60
"""Characters of a wrong value that an error repeats."""


def read_json(path: Path, most: int = BYTES) -> Any:
    """The JSON document in a file of at most `most` bytes.

    Raises:
        FormatError: it is not JSON as RFC 8259 has it; see `parse_json`.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise FormatError(f"{path.name} is larger than {most} bytes")
    return parse_json(data, path.name)


def parse_json(data: bytes | str, where: str) -> Any:
    """A JSON document: UTF-8, no key twice in an object, no NaN or Infinity, at most `DEPTH` levels.

    No text in it has control characters, halves of surrogate pairs, or characters that turn the direction of writing.
    """
    try:
        found = json.loads(
            data.decode("utf-8") if isinstance(data, bytes) else data,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=_int,
        )
    except RecursionError as error:
        raise FormatError(f"{where} is nested deeper than {DEPTH} levels") from error
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from error
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
        raise FormatError(f"{where} is not JSON: {error}") from error
    _check(found, where)
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise FormatError(f"the key {_show(counts.most_common(1)[0][0])} stands twice in an object")
    return found


def _constant(name: str) -> NoReturn:
    raise FormatError(f"{name} is not a number of JSON")


def _float(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise FormatError(f"the number {digits[:SHOWN]} is too large")
    return value


def _int(digits: str) -> int:
    if len(digits) > 20:  # 64 bits have 19 digits and a sign
        raise FormatError(f"the integer {digits[:20]}... has {len(digits)} digits; expected at most 19")
    return int(digits)


def _check(document: Any, where: str) -> None:
    """Check depth and strings as `parse_json` says; without recursion."""
    level = [document]
    for _ in range(DEPTH):
        following: list[Any] = []
        for value in level:
            if isinstance(value, str):
                text(value, where)
            elif isinstance(value, dict):
                following += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                following += value
        if not following:
            return
        level = following
    raise FormatError(f"{where} is nested deeper than {DEPTH} levels")


def record(
    value: Any, where: str, required: Iterable[str] = (), optional: Iterable[str] | None = None
) -> dict[str, Any]:
    """An object with all of the `required` keys, and no others than the `optional` ones (None: any others)."""
    if not isinstance(value, dict):
        raise FormatError(f"{where} is {_show(value)}; expected an object")
    required = tuple(required)
    if missing := [key for key in required if key not in value]:
        raise FormatError(f"{where} lacks the field {', '.join(missing)}")
    if optional is not None and (unknown := sorted(set(value) - {*required, *optional})):
        known = ", ".join(sorted({*required, *optional}))
        raise FormatError(f"{where} has no field {printable(unknown[0])}; it has {known}")
    return value


def fields_of(cls: type[T], data: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a dataclass: an object with all its required fields, and no unknown ones."""
    known = fields(cls)  # type: ignore[arg-type]
    needed = [f.name for f in known if f.default is MISSING and f.default_factory is MISSING]
    return dict(record(data, cls.__name__, needed, [f.name for f in known]))


def stated(value: Any, later: Collection[str]) -> dict[str, Any]:
    """The fields of a dataclass as JSON states them: those called `later` only where they differ from their defaults.

    So what older versions wrote, who lack these fields, is still what is written, and so are digests of it.
    """
    defaults = {f.name: f.default for f in fields(value)}
    return {name: item for name, item in asdict(value).items() if name not in later or item != defaults[name]}


@contextmanager
def spec_errors() -> Iterator[None]:
    """Turn `FormatError` into `SpecError`, where the values describe a model or its input."""
    try:
        yield
    except FormatError as error:
        raise SpecError(str(error)) from error


def items(value: Any, where: str, least: int = 0, most: int = 1 << 20) -> list[Any]:
    """A list of `least` to `most` values."""
    if not isinstance(value, list | tuple):
        raise FormatError(f"{where} is {_show(value)}; expected a list")
    if not least <= len(value) <= most:
        expected = f"{least}" if least == most else f"{least} to {most}"
        raise FormatError(f"{where} has {len(value)} entries; expected {expected}")
    return list(value)


def integer(value: Any, where: str, low: int, high: int) -> int:
    """An integer, `low` <= value <= `high`; True is none, and neither is 8.0."""
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or not low <= found <= high:
        raise FormatError(f"{where} is {_show(value)}; expected an integer, {low} to {high}")
    return found


def number(value: Any, where: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number, `low` <= value <= `high`."""
    try:
        found = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not (math.isfinite(found) and low <= found <= high):
        bounds = "" if math.isinf(low) and math.isinf(high) else f", {low:g} to {high:g}"
        raise FormatError(f"{where} is {_show(value)}; expected a finite number{bounds}")
    return found


def text(value: Any, where: str, pattern: str | None = None, most: int = 1 << 16) -> str:
    """Text of at most `most` characters that all of `pattern` matches, and that a terminal shows as it is.

    Tabs and line ends are control characters like any other.
    """
    if not isinstance(value, str) or len(value) > most:
        raise FormatError(f"{where} is {_show(value)}; expected text of at most {most} characters")
    if printable(value) != value:
        raise FormatError(f"{where}: {_show(value)} has control characters")
    if pattern is not None and not re.fullmatch(pattern, value):
        raise FormatError(f"{where} is {_show(value)}; expected {pattern}")
    return value


def path(value: Any, where: str) -> str:
    """A relative POSIX path that stays inside of its folder, on every system: `model.mlpackage/Data/model.mlmodel`.

    Its parts are letters, digits, `_`, `-` and `.`, so that there is no drive, no backslash and no stream of NTFS, and
    none is a name that Windows keeps for devices.
    """
    given = text(value, where, most=1024)
    for part in given.split("/"):
        device = part.split(".")[0].lower()
        if not re.fullmatch(r"[\w.-]{1,255}", part) or part.endswith(".") or device in DEVICES:
            raise FormatError(
                f"{where} is {_show(value)}; expected a path inside the folder, of letters, digits, _ - ."
            )
    return given


def choice(value: Any, where: str, allowed: Collection[str]) -> str:
    """One of some strings."""
    if not isinstance(value, str) or value not in allowed:
        raise FormatError(f"{where} is {_show(value)}; expected one of {', '.join(allowed)}")
    return value


DEVICES = {"con", "prn", "aux", "nul", *(f"{name}{digit}" for name in ("com", "lpt") for digit in "0123456789¹²³")}
"""File names that are devices on Windows, with any suffix."""


def _show(value: Any) -> str:
    """A value in an error message: short, in one line, without control characters."""
    if isinstance(value, dict | list | tuple) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)}"
    return shown(repr(value[: 2 * SHOWN] if isinstance(value, str) else value))


def shown(text: str, most: int = SHOWN) -> str:
    """The beginning of a text in an error message, without control characters."""
    plain = printable(text)
    return plain if len(plain) <= most else f"{plain[:most]}..."
