"""Tensors of a checkpoint by name, read one at a time, and a record of where each of them went."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from edgetube import strict
from edgetube.errors import CheckpointError, FormatError, printable
from edgetube.formats.reading import pickles
from edgetube.formats.reading.pickles import SHOWN
from edgetube.model import checkpoints

WRITTEN = ("model.safetensors", "pytorch_model.bin")
"""Names that libraries write weights under, the better one first; an index of shards has `.index.json` behind it."""

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".pyth", ".ckpt")
"""Of files of weights."""

OTHERS = re.compile(r"^(adapter_model|optimizer|scheduler|scaler|rng_state|training_args|random_states)")
"""Files beside the weights: adapters and the state of a training run. `training_args.bin` is a pickle; never read."""

PARTIAL = (".incomplete", ".part", ".crdownload", ".download", ".aria2")
"""Ends of the names of files that are still being downloaded."""

NESTS = ("state_dict", "model", "module", "model_state", "net", "target_encoder", "encoder")
"""Where files of PyTorch keep a state dict, in the order of search."""

AVERAGES = ("model_ema", "state_dict_ema", "ema", "ema_state_dict")
"""Where they keep an exponential moving average of it."""

PROBES = "classifiers"
"""Where evaluation scripts keep a list of classifiers that read a frozen model; they are named `classifiers.0.` on."""

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "net.")
"""Prefixes of wrappers, taken off where all tensors have them."""


def weight_files(path: Path) -> tuple[Path, ...]:
    """The files of weights of a checkpoint: the file itself, or those of a folder.

    Raises:
        CheckpointError: none, several models, or shards that an index names and that are missing. (Two files may be a
            model and its classifiers, which `open_source` tells.)
    """
    if path.is_file():
        return (path,)
    for name in WRITTEN:
        if (index := path / f"{name}.index.json").is_file():
            return _shards(index)
        if (path / name).is_file():
            return (path / name,)
    found = [p for p in sorted(path.iterdir()) if p.suffix in SUFFIXES and not OTHERS.match(p.name)]
    safe = [p for p in found if p.suffix == ".safetensors"]
    if len(safe) == 1 and all(p.suffix in (".safetensors", ".bin") for p in found):
        return (safe[0],)  # libraries write a model in both forms
    if not found:
        raise CheckpointError(f"{path} has no weights; {_instead(path)}")
    if len(found) > 2:
        raise _several(found)
    return tuple(found)


def _several(files: Sequence[Path]) -> CheckpointError:
    names = ", ".join(printable(file.name) for file in files[:SHOWN])
    return CheckpointError(f"{files[0].parent} has several files of weights, {names}; give one of them")


def _instead(path: Path) -> str:
    """What a folder without weights has, and what to do."""
    if partial := [p for p in sorted(path.rglob("*")) if p.name.endswith(PARTIAL)]:
        return f"{printable(partial[0].name)} is half a download: finish it"
    if (path / "adapter_config.json").is_file():
        return "it is an adapter: give the folder of its model, and this one with --adapter"
    below = sorted({p.parent.name for p in path.glob("*/*") if p.suffix in SUFFIXES and not OTHERS.match(p.name)})
    if below:
        return f"those below it have: give one of {', '.join(map(printable, below[:SHOWN]))}"
    return f"expected {' or '.join(WRITTEN)}: was the download complete?"


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        placed = strict.record(strict.record(strict.read_json(index), index.name)["weight_map"], "weight_map")
        names = sorted({strict.path(name, "a shard") for name in placed.values()})
    except (FormatError, KeyError) as error:
        raise CheckpointError(f"{index} is damaged: {error}") from error
    files = tuple(index.parent / name for name in names)
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(files)} shards, {printable(missing[0])} first"
        )
    return files


@dataclass(frozen=True)
class TensorSource:
    """Tensors by name.

    Attributes:
        shapes: of every tensor.
        load: reads one, as it is stored.
        prefix: what was taken off all names.
        nest: where in the file the tensors are; empty at its top.
        facts: what else the file says: the metadata of safetensors, the numbers and texts beside a state dict, and
            the arguments of the script that wrote it, where it kept them.
    """

    shapes: Mapping[str, tuple[int, ...]]
    load: Callable[[str], Tensor]
    prefix: str = ""
    nest: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def names(self) -> set[str]:
        """Names of the tensors."""
        return set(self.shapes)

    def has(self, *names: str) -> bool:
        """Whether all these tensors are there."""
        return all(name in self.shapes for name in names)


def open_source(files: Sequence[Path], ema: bool | None = None) -> TensorSource:
    """Open files of weights, all of one model.

    Args:
        ema: see `ReadOptions`.

    Raises:
        CheckpointError: a file is neither safetensors nor one of PyTorch's, is damaged, or holds Python objects.
    """
    parts = [_open(file, ema) for file in files]
    if (index := _index(files[0].parent)) is not None and len(parts) > 1:
        _check_union(index, files, parts)
    elif len(parts) > 1 and sorted(map(_has_probes, parts)) != [False, True]:
        raise _several(files)
    owner = {name: part for part in parts for name in part.shapes}
    merged = TensorSource(
        {name: part.shapes[name] for name, part in owner.items()},
        lambda name: owner[name].load(name),
        nest=next((part.nest for part in parts if part.nest), ""),
        facts=parts[0].facts,
    )
    return _unwrapped(merged)


def _index(folder: Path) -> Path | None:
    """The index of a folder's shards."""
    return next((found for name in WRITTEN if (found := folder / f"{name}.index.json").is_file()), None)


def _has_probes(source: TensorSource) -> bool:
    return any(name.startswith(f"{PROBES}.") for name in source.shapes)


def _check_union(index: Path, files: Sequence[Path], parts: Sequence[TensorSource]) -> None:
    """Check that shards hold exactly what their index says that they do."""
    wanted = set(json.loads(index.read_bytes())["weight_map"].items())
    given = {(name, file.name) for file, part in zip(files, parts, strict=True) for name in part.shapes}
    if wanted != given:
        name, file = sorted(wanted ^ given)[0]
        what = "is not in" if (name, file) in wanted else "is unexpected in"
        raise CheckpointError(
            f"{index} and the shards differ: {printable(name)} {what} {printable(file)}; download the folder again"
        )


def _unwrapped(source: TensorSource) -> TensorSource:
    """The source without the prefixes of wrappers that all its names have."""
    names = {name: name for name in source.shapes if name != "n_averaged"}  # of `AveragedModel`
    taken = _common([name for name in names if not name.startswith(f"{PROBES}.")])
    names = {name.removeprefix(taken): whole for name, whole in names.items()}
    return TensorSource(
        {name: source.shapes[whole] for name, whole in names.items()},
        lambda name: source.load(names[name]),
        taken,
        source.nest,
        source.facts,
    )


def _common(names: Sequence[str]) -> str:
    """The prefixes of wrappers that all names have."""
    taken = ""
    while prefix := next((p for p in PREFIXES if names and all(n.startswith(taken + p) for n in names)), ""):
        taken += prefix
    return taken


def _open(path: Path, ema: bool | None) -> TensorSource:
    """Open a file, whose first bytes say what it is, whatever its name does."""
    if checkpoints.is_pickle(path):
        return _open_pickle(path, ema)
    with path.open("rb") as file:
        first = file.read(9)
    if foreign := checkpoints.foreign(path):
        raise CheckpointError(f"{path} holds no weights: {foreign}")
    if first[8:] == b"{" or path.suffix == ".safetensors":
        return _open_safetensors(path)
    raise CheckpointError(f"{path} is neither safetensors nor a file of torch.save: it begins with {first[:8]!r}")


def _open_safetensors(path: Path) -> TensorSource:
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            facts = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {strict.shown(str(error), 300)}") from error

    @cache
    def opened() -> Any:  # once: each opening maps the whole file, for as long as one of its tensors is there
        return safe_open(path, "pt").__enter__()

    return TensorSource(shapes, lambda name: opened().get_tensor(name), facts=facts)


def _open_pickle(path: Path, ema: bool | None) -> TensorSource:
    data = pickles.load(path)
    if not isinstance(data, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(data).__name__}; expected a state dict: torch.save(model.state_dict(), path)"
        )
    nest, state = _state_dict(path, data, ema)
    found = {str(name): value for name, value in state.items() if isinstance(value, Tensor)} | _probes(data)
    beside = {str(key): value for key, value in data.items() if key != nest}
    facts = {key: value for key, value in beside.items() if isinstance(value, str | int | float | Mapping)}
    facts |= vars(data["args"]) if isinstance(data.get("args"), argparse.Namespace) else {}
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    return TensorSource(shapes, lambda name: found[name], nest=nest, facts=facts)


def _probes(data: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of `PROBES`, without the prefixes of wrappers."""
    listed = data.get(PROBES)
    found: dict[str, Tensor] = {}
    for i, state in enumerate(listed if isinstance(listed, list) else []):
        if _is_state(state):
            taken = _common(list(state))
            found |= {f"{PROBES}.{i}.{name.removeprefix(taken)}": value for name, value in state.items()}
    return found


def _state_dict(path: Path, data: Mapping[Any, Any], ema: bool | None) -> tuple[str, Mapping[Any, Any]]:
    """The state dict in what a file holds, and its key; an empty key where it is the whole."""
    plain = [name for name in NESTS if _is_state(data.get(name))]
    averages = [name for name in AVERAGES if _is_state(data.get(name))]
    if _is_state(data):
        return "", data
    if plain and averages and ema is None:
        raise CheckpointError(f"{path} holds {plain[0]} and {averages[0]}; choose with --no-ema or --ema")
    wanted = averages if ema or not plain else plain
    if not wanted and _probes(data):
        return "", {}
    if not wanted:
        held = ", ".join(printable(key) for key in list(data)[:8])
        what = "no moving average of the weights" if ema else "no state dict"
        raise CheckpointError(f"{path} holds {what}; it holds {held or 'nothing'}")
    return wanted[0], data[wanted[0]]


def _is_state(value: Any) -> bool:
    """Whether a value is a state dict: names and mostly tensors."""
    if not isinstance(value, Mapping) or not value:
        return False
    count = sum(isinstance(one, Tensor) for one in value.values())
    return count > 0 and count >= len(value) // 2


@dataclass(frozen=True)
class KeyUse:
    """Where one tensor of a checkpoint went.

    Attributes:
        name: in the checkpoint.
        shape: there.
        used: the tensors of the model that it became part of, or why it is not used.
    """

    name: str
    shape: tuple[int, ...]
    used: str


class State:
    """A checkpoint's tensors, each of which is taken, or left out for a reason, exactly once.

    Args:
        what: the file or folder, for errors.
        source: its tensors.
        rename: from a name in the checkpoint to the one that a format asks for, where layouts have dialects.
    """

    def __init__(self, what: Path, source: TensorSource, rename: Callable[[str], str] = lambda name: name) -> None:
        self.what, self.source = what, source
        self.names = {rename(name): name for name in source.shapes}
        if len(self.names) < len(source.shapes):
            raise CheckpointError(f"{what}: two tensors mean the same, in the names of two versions of a library")
        self.uses: dict[str, KeyUse] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
            CheckpointError: it is missing.
        """
        if name not in self.names:
            raise CheckpointError(f"{self.what} lacks {printable(name)}: {self._neighbours(name)}")
        return self.source.shapes[self.names[name]]

    def _neighbours(self, name: str) -> str:
        stem = name.rpartition(".")[0]
        near = sorted(found for found in self.names if stem and found.startswith(stem))[:SHOWN]
        return f"there are {', '.join(map(printable, near))}" if near else "is this all of the model?"

    def take(self, name: str, to: str, shape: Sequence[int] | None = None) -> Tensor:
        """A tensor in float32, for the tensor or part `to` of the model.

        Raises:
            CheckpointError: it is missing, of another shape than `shape`, not of floats, or not finite.
        """
        found = self.shape(name)
        if shape is not None and found != tuple(shape):
            raise CheckpointError(f"{self.what}: {printable(name)} is {found}; expected {tuple(shape)}")
        stored = self.source.load(self.names[name])
        if stored.layout != torch.strided or stored.is_quantized:
            raise CheckpointError(f"{self.what}: {printable(name)} is sparse or quantised; expected plain weights")
        if not stored.is_floating_point():
            raise CheckpointError(f"{self.what}: {printable(name)} is {stored.dtype}; expected floating point")
        value = stored.float()
        if not value.isfinite().all():
            raise CheckpointError(
                f"{self.what}: {printable(name)} has NaN or infinite weights; save the model before it diverged"
            )
        self._record(name, to)
        return value

    def leave(self, names: Iterable[str], why: str) -> None:
        """Leave tensors out, those of the `names` that are there, for a reason; a name ending in `.` is a prefix."""
        for wanted in names:
            for name in list(self.names):
                if name == wanted or (wanted.endswith(".") and name.startswith(wanted)):
                    self._record(name, f"not used: {why}")

    def _record(self, name: str, used: str) -> None:
        whole = f"{self.source.prefix}{self.names[name]}"
        before = self.uses.get(name)
        joined = used if before is None or before.used == used else f"{before.used}, {used}"
        self.uses[name] = KeyUse(whole, self.source.shapes[self.names[name]], joined)

    def finish(self) -> tuple[KeyUse, ...]:
        """The record, once nothing is left.

        Raises:
            CheckpointError: a tensor was neither taken nor left out.
        """
        if left := sorted(self.names.keys() - self.uses.keys()):
            more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
            names = ", ".join(map(printable, left[:SHOWN]))
            raise CheckpointError(f"{self.what} has tensors that this model does not: {names}{more}")
        return tuple(self.uses[name] for name in sorted(self.uses))
