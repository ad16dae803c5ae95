"""A calibration on disk: taken up where it was interrupted, used again when nothing changed, never when anything did.

::

    key.json                what it was made from: hashes of graph and clips, scheme, budget, tool versions
    state.safetensors       the stages that are done
    result.safetensors      the finished calibration

Each file is whole or not there. Beside the folder lies `NAME.lock`, which one process at a time holds.
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

BUDGET = frozenset({"judged clips", "max_drop"})
"""Parts of the key that the finished calibration depends on, but not its stages."""

STATE, RESULT = "state.safetensors", "result.safetensors"

BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError, InputError)
"""What reading a damaged cache can raise; a damaged cache is an empty one."""

Result = tuple[dict[str, Array], CalibrationTable, dict[str, Any]]


class Cache:
    """One calibration's folder; made by `opened`.

    Attributes:
        differences: the parts of the key that are not those of the calibration that was found; empty when it was
            made from the same things, or when there was none.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder, self.key = folder, json.loads(json.dumps(dict(key)))
        found = self._read_key()
        self.differences = tuple(
            sorted(name for name in {*found, *self.key} if found and found.get(name) != self.key.get(name))
        )
        if not found or set(self.differences) - BUDGET:
            shutil.rmtree(folder, ignore_errors=True)
        elif self.differences:
            (folder / RESULT).unlink(missing_ok=True)
        if not found or self.differences:
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(folder / "key.json", json.dumps(self.key, indent=1) + "\n")

    @property
    def note(self) -> str | None:
        """In words, why an earlier calibration is not used."""
        if not self.differences:
            return None
        return f"calibrated again: {', '.join(self.differences)} changed since the last calibration"

    def state(self) -> CalibrationState:
        """The stages that are done; none if what is there is damaged."""
        try:
            arrays, texts = _read(self.folder / STATE)
            choices = {
                name: Choice(Range(**fields.pop("range")), arrays[f"scales:{name}"], **fields)
                for name, fields in json.loads(texts["choices"]).items()
            }
        except BROKEN:
            return CalibrationState()
        kept = {kind: _part(arrays, f"{kind}:") for kind in ("values", "integers", "means")}
        return CalibrationState(choices=choices, **kept)

    def save_state(self, state: CalibrationState) -> None:
        """Keep the stages that are done, whole or not at all."""
        arrays: dict[str, Any] = {f"values:{name}": value for name, value in state.values.items()}
        arrays |= {f"integers:{name}": value for name, value in state.integers.items()}
        arrays |= {f"means:{name}": value for name, value in state.means.items()}
        arrays |= {f"scales:{name}": choice.scales for name, choice in state.choices.items()}
        fields = {name: asdict(choice) for name, choice in state.choices.items()}
        choices = {n: {k: v for k, v in f.items() if k != "scales"} for n, f in fields.items()}
        self._write(STATE, arrays, {"choices": json.dumps(choices)})

    def result(self) -> Result | None:
        """The finished calibration: changed initializers, table, report; None if it is not there, or damaged."""
        try:
            values, texts = _read(self.folder / RESULT)
            return values, CalibrationTable.from_json(json.loads(texts["table"])), json.loads(texts["report"])
        except BROKEN:
            return None

    def save_result(self, values: Mapping[str, Array], table: CalibrationTable, report: Mapping[str, Any]) -> None:
        """Keep a finished calibration, whole or not at all."""
        self._write(RESULT, values, {"table": json.dumps(table.to_json()), "report": json.dumps(report)})

    def _read_key(self) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / "key.json").read_text("utf-8"))
        except BROKEN:
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, name: str, arrays: Mapping[str, Array], texts: dict[str, str]) -> None:
        with replacing(self.folder / name) as part:
            save_file(dict(arrays), part, texts)


@contextmanager
def opened(folder: Path, key: Mapping[str, Any], progress: Progress = silent) -> Iterator[Cache]:
    """The cache in `folder`, which no other process has at the same time; waits until it is free.

    A process that ends, however it ends, lets go of it.
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


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The arrays and texts of a file."""
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _part(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
