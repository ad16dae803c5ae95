"""Reads a saved `.mlpackage` with nothing but numpy: manifest, protobuf, weight file.

Written from the published format (`Model.proto`, `MIL.proto`, the layout of `weight.bin`), independently of any code
that writes such packages, so that it can check them. It only parses: `edgetube.runtimes.mil` evaluates.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetube import strict
from edgetube.errors import BundleError
from edgetube.protobuf import Fields, parse, varint
from edgetube.protobuf import message as _bytes
from edgetube.protobuf import text as _text

Array = npt.NDArray[Any]

ALIGNMENT = 64
SENTINEL = 0xDEADBEEF
WEIGHTS_VERSION = 2

TYPES: dict[int, tuple[str, str]] = {
    1: ("bool", "?"),
    10: ("fp16", "<f2"),
    11: ("fp32", "<f4"),
    21: ("int8", "i1"),
    22: ("int16", "<i2"),
    23: ("int32", "<i4"),
    24: ("int64", "<i8"),
    31: ("uint8", "u1"),
    32: ("uint16", "<u2"),
    33: ("uint32", "<u4"),
}
"""`DataType` of MIL.proto -> (name, numpy dtype)."""

PACKED = {25: ("int4", 4), 35: ("uint4", 4), 36: ("uint2", 2), 37: ("uint1", 1), 38: ("uint6", 6), 39: ("uint3", 3)}
"""Types that share bytes: (name, bits)."""

BLOB_TYPES = {1: 10, 2: 11, 3: 31, 4: 21, 6: 22, 7: 32, 8: 25, 9: 37, 10: 36, 11: 35, 12: 39, 13: 38, 14: 23, 15: 33}
"""Type number in the weight file -> `DataType`."""


@dataclass(frozen=True)
class TensorType:
    """Element type ("fp16", "int32", "string", ...) and static shape of a value."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """One operation; `inputs` holds names of values, or the values themselves where they are constant."""

    kind: str
    inputs: Mapping[str, tuple[Any, ...]]
    outputs: tuple[tuple[str, TensorType], ...]


@dataclass(frozen=True)
class Ref:
    """The name of another operation's output."""

    name: str


@dataclass(frozen=True)
class Function:
    """A function of a program: inputs by name, operations in order, names of outputs."""

    inputs: Mapping[str, TensorType]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Package:
    """A parsed package.

    Attributes:
        path: the folder.
        version: specification version (8 is iOS 17).
        functions: of its ML program.
        default: the function that runs when none is asked for.
        metadata: as Xcode shows it, user-defined keys included.
    """

    path: Path
    version: int
    functions: Mapping[str, Function]
    default: str
    metadata: Mapping[str, str] = field(default_factory=dict)


def label(name: str) -> str:
    """A tensor's name as an ML program takes it: `blocks.3.attn.qkv` becomes `blocks_3_attn_qkv`."""
    return name.replace(".", "_").replace("-", "_")


def load(path: str | Path) -> Package:
    """Read a package.

    Raises:
        BundleError: it is not an ML program package, or its files are damaged; says which.
    """
    path = Path(path)
    try:
        manifest = strict.read_json(path / "Manifest.json")
        items = manifest["itemInfoEntries"]
        root = strict.path(items[manifest["rootModelIdentifier"]]["path"], "path of the model")
        model_file = path / "Data" / root
        fields = parse(memoryview(model_file.read_bytes()))
        weights = Weights(model_file.parent)
        program = parse(_one(fields, 502))
        functions = {name: _function(parse(value), weights) for name, value in _entries(program, 2)}
        description = parse(_one(fields, 2))
        default = _text(description[21][0]) if 21 in description else "main"
        metadata = _metadata(parse(_one(description, 100))) if 100 in description else {}
        version = _number(fields[1][0])
    except (OSError, ValueError, KeyError, IndexError, StopIteration, TypeError, RecursionError, struct.error) as error:
        raise BundleError(
            f"{path} is not an ML program package that can be read ({strict.shown(repr(error), 300)}); export it again"
        ) from error
    if default not in functions:
        raise BundleError(f"{path} has no function {default!r}; it has {', '.join(functions)}: export it again")
    return Package(path, version, functions, default, metadata)


def _metadata(fields: Fields) -> dict[str, str]:
    names = {1: "description", 2: "version", 3: "author", 4: "license"}
    found = {name: _text(fields[number][0]) for number, name in names.items() if number in fields}
    return found | {key: _text(value) for key, value in _entries(fields, 100)}


def _function(fields: Fields, weights: Weights) -> Function:
    inputs = dict(_named(value) for value in fields[1])
    (_, block), *others = _entries(fields, 3)
    if others:
        raise ValueError("a function with several specialisations")
    body = parse(block)
    operations = tuple(_operation(parse(_bytes(value)), weights) for value in body.get(3, ()))
    names = [*inputs, *(name for operation in operations for name, _ in operation.outputs)]
    if len(set(names)) < len(names):
        raise ValueError(f"names that are given twice: {sorted({n for n in names if names.count(n) > 1})}")
    return Function(inputs, operations, tuple(_text(value) for value in body.get(2, ())))


def _operation(fields: Fields, weights: Weights) -> Operation:
    """Constant arguments may stand among the attributes or among the inputs; both are inputs here."""
    inputs: dict[str, tuple[Any, ...]] = {}
    for key, value in _entries(fields, 2):
        bindings = [parse(_bytes(binding)) for binding in parse(value).get(1, ())]
        inputs[key] = tuple(
            Ref(_text(binding[1][0])) if 1 in binding else _value(parse(_bytes(binding[2][0])), weights)
            for binding in bindings
        )
    for key, value in _entries(fields, 5):
        if key != "name":
            inputs[key] = (_value(parse(value), weights),)
    return Operation(_text(fields[1][0]), inputs, tuple(_named(value) for value in fields.get(3, ())))


def _named(value: int | memoryview) -> tuple[str, TensorType]:
    fields = parse(_bytes(value))
    return _text(fields[1][0]), _type(parse(_one(fields, 2)))


def _type(fields: Fields) -> TensorType:
    """The type of a tensor; lists and dictionaries, which only a classifier has, are named and left alone."""
    if 1 not in fields:
        return TensorType({2: "list", 4: "dictionary"}[next(iter(fields))], ())
    tensor = parse(_one(fields, 1))
    number = _number(tensor[1][0])
    dims = [parse(_one(parse(_bytes(dim)), 1)) for dim in tensor.get(3, ())]
    shape = tuple(_number(dim[1][0]) if 1 in dim else 0 for dim in dims)
    names = {2: "string"} | {k: v[0] for k, v in TYPES.items()} | {k: v[0] for k, v in PACKED.items()}
    return TensorType(names[number], shape)


def _value(fields: Fields, weights: Weights) -> Any:
    """A constant: an array, a string, or a list of them."""
    kind = _type(parse(_one(fields, 2)))
    if 5 in fields:
        blob = parse(_one(fields, 5))
        return weights.read(_text(blob[1][0]), _number(blob[2][0]) if 2 in blob else 0, kind)
    immediate = parse(_one(fields, 3))
    if 3 in immediate:
        return [_value(parse(_bytes(v)), weights) for v in parse(_one(immediate, 3)).get(1, ())]
    return _immediate(parse(_one(immediate, 1)), kind)


def _immediate(fields: Fields, kind: TensorType) -> Any:
    number, content = next(iter(fields.items()))
    values = parse(_bytes(content[0])).get(1, [])
    if number == 4:
        texts = [_text(value) for value in values]
        return texts if kind.shape else texts[0]
    dtype = dict(TYPES.values())[kind.dtype]
    if number == 7:  # raw bytes: float16 and small integers
        flat = np.frombuffer(_bytes(values[0]), dtype)
    elif number in (1, 6):
        flat = np.frombuffer(b"".join(_bytes(v) for v in values), "<f4" if number == 1 else "<f8")
    else:
        flat = np.array([n for value in values for n in _integers(value)], np.int64)
    return flat.astype(dtype).reshape(kind.shape)


class Weights:
    """The weight files beside a model; mapped, not read, until a constant is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Array] = {}

    def read(self, name: str, offset: int, kind: TensorType) -> Array:
        """The constant whose record is at `offset`.

        Raises:
            BundleError: the file is missing, cut off, or has another constant there.
        """
        inside = strict.path(PurePosixPath(name).relative_to("@model_path").as_posix(), "path of the weights")
        path = self.folder / inside
        data = self._map(path)
        if offset % ALIGNMENT or offset + ALIGNMENT > len(data):
            raise BundleError(f"{path} is damaged: no record at byte {offset} of {len(data)}; export it again")
        sentinel, number, size, start, spare = struct.unpack("<IIQQQ", data[offset : offset + 32].tobytes())
        found = BLOB_TYPES.get(number, 0)
        if sentinel != SENTINEL or found not in (TYPES | PACKED) or start + size > len(data):
            raise BundleError(f"{path} is damaged: the record at byte {offset} makes no sense; export it again")
        name, bits = PACKED.get(found) or (TYPES[found][0], 8 * np.dtype(TYPES[found][1]).itemsize)
        count = math.prod(kind.shape)
        if name != kind.dtype or size * 8 - (spare if bits < 8 else 0) != count * bits:
            raise BundleError(
                f"{path} is damaged: {size} bytes of {name} at byte {offset}, expected {kind.dtype} {kind.shape}; "
                "export it again"
            )
        raw = data[start : start + size]
        flat = raw.view(TYPES[found][1]) if found in TYPES else unpack(raw, bits, count, signed=name.startswith("int"))
        return flat.reshape(kind.shape)

    def _map(self, path: Path) -> Array:
        if path.name not in self.files:
            if not path.is_file() or path.stat().st_size < ALIGNMENT:
                raise BundleError(f"{path} is missing or empty; export or copy the package again")
            data: Array = np.memmap(path, np.uint8, mode="r")
            _, version = struct.unpack("<II", data[:8].tobytes())
            if version != WEIGHTS_VERSION:
                raise BundleError(f"{path} is damaged, or of version {version}; this edgetube reads {WEIGHTS_VERSION}")
            self.files[path.name] = data
        return self.files[path.name]


def unpack(raw: Array, bits: int, count: int, signed: bool = False) -> Array:
    """Numbers of fewer than eight bits that follow one another without gaps, least significant bits first."""
    stream = np.unpackbits(raw, bitorder="little")[: count * bits].reshape(count, bits)
    values = (stream << np.arange(bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)
    if not signed:
        return values
    wide = values.astype(np.int8)
    return np.where(wide >= 1 << (bits - 1), wide - (1 << bits), wide).astype(np.int8)


def _integers(value: int | memoryview) -> list[int]:
    """Packed or single varints, as two's complement of 64 bits."""
    if isinstance(value, int):
        numbers = [value]
    else:
        numbers, position = [], 0
        while position < len(value):
            number, position = varint(value, position)
            numbers.append(number)
    return [n - (1 << 64) if n >= 1 << 63 else n for n in numbers]


def _number(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise ValueError("a message where a number was expected")
    return value


def _one(fields: Fields, number: int) -> memoryview:
    return _bytes(fields[number][-1])


def _entries(fields: Fields, number: int) -> list[tuple[str, memoryview]]:
    """The entries of a map with text keys."""
    entries = [parse(value) for value in fields.get(number, ())]
    return [(_text(entry[1][0]), _one(entry, 2)) for entry in entries]
