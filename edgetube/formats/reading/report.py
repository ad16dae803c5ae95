"""What is in a checkpoint, as a document for people and programs: `edgetube inspect CHECKPOINT`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgetube.errors import CheckpointError, InputError
from edgetube.formats.reading.files import Files, ReadOptions
from edgetube.formats.reading.tensors import KeyUse
from edgetube.model.checkpoints import Checkpoint

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A number between dots: that of a block."""


def document(checkpoint: Checkpoint) -> dict[str, Any]:
    """The document of a checkpoint that was read. Every tensor has its shape and where it went."""
    state = checkpoint.model.state_dict()
    keys = checkpoint.keys or tuple(KeyUse(name, tuple(value.shape), name) for name, value in state.items())
    spec = checkpoint.spec
    return {
        "source": checkpoint.source,
        "error": None,
        "name": checkpoint.name,
        "format": checkpoint.format,
        "options": dict(checkpoint.options),
        "sha256": checkpoint.digest,
        "licence": checkpoint.licence,
        "notes": list(checkpoint.notes),
        "spec": spec.to_json(),
        "input": checkpoint.contract.to_json(),
        "labels": list(checkpoint.labels),
        "other_labels": {name: list(labels) for name, labels in checkpoint.other_labels.items()},
        "parameters": sum(value.numel() for value in checkpoint.model.parameters()),
        "macs": spec.macs(),
        "keys": [_key(use) for use in keys],
    }


def refusal(source: str | Path, options: ReadOptions, error: Exception) -> dict[str, Any]:
    """The document of a checkpoint that could not be read: why, its settings, and its tensors where they are legible.

    So that whoever is asked about it knows what it is.
    """
    found: dict[str, Any] = {"source": str(source), "error": str(error), "options": options.to_json(), "keys": []}
    try:
        files = Files(Path(source), options)
        found |= {"config": files.config, "processor": files.processor, "licence": files.licence}
        shapes = files.tensors.shapes
    except (CheckpointError, InputError):
        return found
    prefix = files.tensors.prefix
    found["keys"] = [_key(KeyUse(f"{prefix}{name}", shapes[name], "")) for name in sorted(shapes)]
    return found


def _key(use: KeyUse) -> dict[str, Any]:
    return asdict(use) | {"shape": list(use.shape)}


def folded(keys: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Rows (name, shape, use) of the keys of a document: blocks that are alike are one row, as `blocks.0-11.fc1`."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    for key in keys:
        name, used = key["name"], key["used"]
        shape = " x ".join(map(str, key["shape"])) or "1"
        if found := NUMBER.search(name):
            number = found[0]
            alike = name[: found.start()] + "{}" + name[found.end() :], shape, _without(number, used)
            rows.setdefault(alike, []).append(int(number))
        else:
            rows[name, shape, used] = []
    return [
        (name.replace("{}", _ranges(numbers)), shape, used.replace("{}", _ranges(numbers))) if numbers else row
        for row, numbers in rows.items()
        for name, shape, used in [row]
    ]


def _without(number: str, used: str) -> str:
    """The use of a tensor with `{}` for the number of its block."""
    return NUMBER.sub(lambda found: "{}" if found[0] == number else found[0], used, count=1)


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers as text: 0-3,7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
