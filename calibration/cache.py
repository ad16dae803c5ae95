"""A calibration on disk: taken up where it was interrupted, used again when nothing changed, never when anything did.

::

    key.json        what it was made from: hashes of graph and clips, scheme, budget, tool versions
    state.npz       the stages that are done (arrays), state.json (the rest of them)
    table.json, values.npz, report.json       the finished calibration
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgetube.calibration.graphs import Array
from edgetube.calibration.table import CalibrationTable, Range
from edgetube.calibration.walk import Choice, State
from edgetube.errors import InputError
from edgetube.files import atomic_write, replacing

BUDGET = frozenset({"judged clips", "max_drop"})
"""Parts of the key that the finished calibration depends on, but not its stages."""

BROKEN = (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, InputError)
"""What reading a damaged cache can raise; a damaged cache is an empty one."""

Result = tuple[dict[str, Array], CalibrationTable, dict[str, Any]]


class Cache:
    """One calibration's folder.

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
            for name in ("table.json", "values.npz", "report.json"):
                (folder / name).unlink(missing_ok=True)
        if not found or self.differences:
            folder.mkdir(parents=True, exist_ok=True)
            self._write("key.json", self.key)

    @property
    def note(self) -> str | None:
        """In words, why an earlier calibration is not used."""
        if not self.differences:
            return None
        return f"calibrated again: {', '.join(self.differences)} changed since the last calibration"

    def state(self) -> State:
        """The stages that are done."""
        try:
            with np.load(self.folder / "state.npz", allow_pickle=False) as data:
                arrays = {name: data[name] for name in data.files}
            data = json.loads((self.folder / "state.json").read_text("utf-8"))
            choices = {
                name: Choice(Range(**fields.pop("range")), arrays[f"scales:{name}"], **fields)
                for name, fields in data.items()
            }
        except BROKEN:
            return State()
        kept = {kind: _part(arrays, f"{kind}:") for kind in ("values", "integers", "means")}
        return State(choices=choices, **kept)

    def save_state(self, state: State) -> None:
        """Keep the stages that are done, whole or not at all."""
        arrays: dict[str, Any] = {f"values:{name}": value for name, value in state.values.items()}
        arrays |= {f"integers:{name}": value for name, value in state.integers.items()}
        arrays |= {f"means:{name}": value for name, value in state.means.items()}
        arrays |= {f"scales:{name}": choice.scales for name, choice in state.choices.items()}
        self._write_arrays("state.npz", arrays)
        fields = {name: asdict(choice) for name, choice in state.choices.items()}
        self._write("state.json", {n: {k: v for k, v in f.items() if k != "scales"} for n, f in fields.items()})

    def result(self) -> Result | None:
        """The finished calibration: changed initializers, table, report."""
        try:
            table = CalibrationTable.load(self.folder / "table.json")
            report = json.loads((self.folder / "report.json").read_text("utf-8"))
            with np.load(self.folder / "values.npz", allow_pickle=False) as data:
                return {name: data[name] for name in data.files}, table, report
        except BROKEN:
            return None

    def save_result(self, values: Mapping[str, Array], table: CalibrationTable, report: Mapping[str, Any]) -> None:
        """Keep a finished calibration; the table is written last and makes it count."""
        self._write_arrays("values.npz", values)
        self._write("report.json", report)
        table.save(self.folder / "table.json")

    def _read_key(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.folder / "key.json").read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return found

    def _write(self, name: str, data: Mapping[str, Any]) -> None:
        atomic_write(self.folder / name, json.dumps(data, indent=1) + "\n")

    def _write_arrays(self, name: str, arrays: Mapping[str, Array]) -> None:
        with replacing(self.folder / name) as part:
            np.savez(part, **arrays)  # type: ignore[arg-type]


def _part(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
