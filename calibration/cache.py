"""A calibration cache on disk: an interrupted calibration resumes, a finished one is reused while its key is the same.

::

    key.json                the cache key: hashes of graph and clips, scheme, budget, tool versions
    stages/N.safetensors    what the Nth of the stages that are done added or changed
    result.safetensors      the finished calibration

Files are written atomically. `NAME.lock` beside the folder allows one process at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edgetube.calibration.graphs import Array
from edgetube.calibration.layerwise import CalibrationState, Choice
from edgetube.calibration.table import CalibrationTable, Range
from edgetube.errors import InputError
from edgetube.files import atomic_write, replacing
from edgetube.progress import Progress, silent

BUDGET_KEYS = frozenset({"judged clips", "max_drop"})
"""Parts of the key that the result depends on, but the stages do not."""

STAGES, RESULT = "stages", "result.safetensors"

KINDS = ("values", "integers", "means")
"""The arrays of a state that are kept."""

READ_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError, InputError)
"""Errors from reading a damaged cache, which is then treated as empty."""

Result = tuple[dict[str, Array], CalibrationTable, dict[str, Any]]


class Cache:
    """The folder of one calibration; made by `open_cache`.

    Attributes:
        differences: the parts of the key that differ from those of the cached calibration; empty when none differs or
            there was no cache.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder, self.key = folder, json.loads(json.dumps(dict(key)))
        self._files, self._saved = 0, dict[str, Any]()
        found = self._read_key()
        self.differences = tuple(
            sorted(name for name in {*found, *self.key} if found and found.get(name) != self.key.get(name))
        )
        if not found or set(self.differences) - BUDGET_KEYS:
            shutil.rmtree(folder, ignore_errors=True)
        elif self.differences:
            (folder / RESULT).unlink(missing_ok=True)
        if not found or self.differences:
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(folder / "key.json", json.dumps(self.key, indent=1) + "\n")

    @property
    def note(self) -> str | None:
        """Why an earlier calibration is not reused, for the user; None where it is."""
        if not self.differences:
            return None
        return f"calibrated again: {', '.join(self.differences)} changed since the last calibration"

    def state(self) -> CalibrationState:
        """The stages that are done, up to the first whose file is missing or damaged; files after it are removed."""
        state, folder = CalibrationState(), self.folder / STAGES
        self._files, self._saved = 0, {}
        for path in map(self._stage, range(len(list(folder.glob("*"))))):
            try:
                arrays, texts = _read(path)
                choices = {
                    name: Choice(Range(**fields.pop("range")), arrays[f"scales:{name}"], **fields)
                    for name, fields in json.loads(texts["choices"]).items()
                }
            except READ_ERRORS:
                break
            self._files += 1
            state.choices.update(choices)
            for kind in KINDS:
                getattr(state, kind).update(_part(arrays, f"{kind}:"))
        self._saved = _entries(state)
        for path in {*folder.glob("*")} - {*map(self._stage, range(self._files))}:
            path.unlink()
        return state

    def save_state(self, state: CalibrationState) -> None:
        """Write what is new since the last call, or since `state`, atomically.

        Arrays and choices that are the same objects as then are not written again. A state that lacks some of those
        begins again.
        """
        entries = _entries(state)
        if not self._saved.keys() <= entries.keys():
            shutil.rmtree(self.folder / STAGES)
            self._files, self._saved = 0, {}
        new = {name: value for name, value in entries.items() if self._saved.get(name) is not value}
        choices = _part(new, "choices:")
        arrays = {name: value for name, value in new.items() if not isinstance(value, Choice)}
        arrays |= {f"scales:{name}": choice.scales for name, choice in choices.items()}
        texts = {
            name: {key: value for key, value in asdict(choice).items() if key != "scales"}
            for name, choice in choices.items()
        }
        (self.folder / STAGES).mkdir(exist_ok=True)
        _write(self._stage(self._files), arrays, {"choices": json.dumps(texts)})
        self._files, self._saved = self._files + 1, entries

    def result(self) -> Result | None:
        """The finished calibration: changed initializers, table, report; None if missing or damaged."""
        try:
            values, texts = _read(self.folder / RESULT)
            return values, CalibrationTable.from_json(json.loads(texts["table"])), json.loads(texts["report"])
        except READ_ERRORS:
            return None

    def save_result(self, values: Mapping[str, Array], table: CalibrationTable, report: Mapping[str, Any]) -> None:
        """Write a finished calibration, atomically."""
        _write(self.folder / RESULT, values, {"table": json.dumps(table.to_json()), "report": json.dumps(report)})

    def _read_key(self) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / "key.json").read_text("utf-8"))
        except READ_ERRORS:
            return {}
        return found if isinstance(found, dict) else {}

    def _stage(self, index: int) -> Path:
        return self.folder / STAGES / f"{index}.safetensors"


@contextmanager
def open_cache(folder: Path, key: Mapping[str, Any], progress: Progress = silent) -> Iterator[Cache]:
    """The cache in `folder` under a lock; waits while another process has it.

    The lock is released when the process ends, however it ends.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress("wait for another calibration", 0, 1)
        lock.acquire()
        progress("wait for another calibration", 1, 1)
    try:
        yield Cache(folder, key)
    finally:
        lock.release()


def _write(path: Path, arrays: Mapping[str, Array], texts: dict[str, str]) -> None:
    with replacing(path) as part:
        save_file(dict(arrays), part, texts)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The arrays and texts of a safetensors file."""
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _entries(state: CalibrationState) -> dict[str, Any]:
    """All that is kept of a state, by kind and name."""
    return {f"{kind}:{name}": value for kind in (*KINDS, "choices") for name, value in getattr(state, kind).items()}


def _part(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
