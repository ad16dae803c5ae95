"""Reads an ONNX graph with numpy alone: a machine that lends its GPU has PyTorch, and need not have onnx."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetube import protobuf
from edgetube.errors import BackendError
from edgetube.protobuf import Fields

Array = npt.NDArray[Any]

TYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 10: "float16"}
"""onnx.TensorProto's numbers of types."""

# Fields by number, of onnx.proto.
GRAPH = 7
NODE, INITIALIZER, INPUT, OUTPUT = 1, 5, 11, 12
NODE_INPUT, NODE_OUTPUT, NODE_NAME, OPERATOR, ATTRIBUTE = 1, 2, 3, 4, 5
NAME, FLOAT, INTEGER, STRING, FLOATS, INTEGERS, KIND = 1, 2, 3, 4, 7, 8, 20
DIMS, TYPE, FLOAT_DATA, INT32_DATA, INT64_DATA, TENSOR_NAME, RAW, EXTERNAL = 1, 2, 4, 5, 7, 8, 9, 13


@dataclass(frozen=True)
class Node:
    """One node; strings among its attributes are bytes."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Graph:
    """A graph: its nodes in order, its initializers, and the names of what goes in and out."""

    nodes: tuple[Node, ...]
    constants: Mapping[str, Array]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read(path: Path) -> Graph:
    """The graph of an ONNX file; weights may be in a file beside it.

    Raises:
        BackendError: not an ONNX file, or one with a type of tensor or attribute that is not known here.
    """
    try:
        (data,) = protobuf.parse(memoryview(path.read_bytes()))[GRAPH]
        graph = protobuf.parse(data)
        constants = dict(_tensor(protobuf.parse(t), path.parent) for t in graph.get(INITIALIZER, []))
        nodes = tuple(_node(protobuf.parse(node)) for node in graph.get(NODE, []))
        inputs, outputs = (_names(graph, number) for number in (INPUT, OUTPUT))
    except (ValueError, KeyError, IndexError) as error:
        raise BackendError(f"{path} is no ONNX graph that is known here: {error}") from error
    return Graph(nodes, constants, inputs, outputs)


def _names(graph: Fields, number: int) -> tuple[str, ...]:
    return tuple(protobuf.text(protobuf.parse(value)[NAME][0]) for value in graph.get(number, []))


def _texts(fields: Fields, number: int) -> tuple[str, ...]:
    return tuple(protobuf.text(value) for value in fields.get(number, []))


def _text(fields: Fields, number: int) -> str:
    return "".join(_texts(fields, number)[-1:])


def _node(fields: Fields) -> Node:
    attributes = dict(_attribute(protobuf.parse(a)) for a in fields.get(ATTRIBUTE, []))
    name, operator = _text(fields, NODE_NAME), _text(fields, OPERATOR)
    return Node(name, operator, _texts(fields, NODE_INPUT), _texts(fields, NODE_OUTPUT), attributes)


def _attribute(fields: Fields) -> tuple[str, Any]:
    readers: dict[int, Callable[[], Any]] = {
        1: lambda: float(_floats(fields.get(FLOAT, []))[0]),
        2: lambda: _integers(fields.get(INTEGER, []))[0],
        3: lambda: bytes(protobuf.message(fields[STRING][0])),
        6: lambda: _floats(fields.get(FLOATS, [])).tolist(),
        7: lambda: _integers(fields.get(INTEGERS, [])),
    }
    name, (kind,) = _text(fields, NAME), _integers(fields[KIND])
    if kind not in readers:
        raise ValueError(f"attribute {name} has type {kind}")
    return name, readers[kind]()


def _floats(values: Sequence[int | memoryview]) -> npt.NDArray[np.float32]:
    """Numbers one by one, or packed."""
    return np.frombuffer(b"".join(protobuf.message(value) for value in values), "<f4")


def _integers(values: Sequence[int | memoryview]) -> list[int]:
    """Numbers one by one, or packed; negative ones have 64 bits."""
    found: list[int] = []
    for value in values:
        if isinstance(value, int):
            found.append(value)
            continue
        position = 0
        while position < len(value):
            number, position = protobuf.varint(value, position)
            found.append(number)
    return [number - (1 << 64) if number >> 63 else number for number in found]


def _tensor(fields: Fields, folder: Path) -> tuple[str, Array]:
    name, (kind,) = _text(fields, TENSOR_NAME), _integers(fields[TYPE])
    if kind not in TYPES:
        raise ValueError(f"tensor {name} has type {kind}")
    dtype, shape = np.dtype(TYPES[kind]), tuple(_integers(fields.get(DIMS, [])))
    if EXTERNAL in fields:
        pairs = [protobuf.parse(entry) for entry in fields[EXTERNAL]]
        entries = {_text(pair, 1): _text(pair, 2) for pair in pairs}
        path, offset = folder / Path(entries["location"]).name, int(entries.get("offset", 0))
        values = np.fromfile(path, dtype, math.prod(shape), offset=offset)
    elif RAW in fields:
        values = np.frombuffer(protobuf.message(fields[RAW][0]), dtype)
    elif dtype == np.float32:
        values = _floats(fields.get(FLOAT_DATA, []))
    elif dtype == np.float16:  # as the integers that have their bits
        values = np.array(_integers(fields.get(INT32_DATA, [])), np.uint16).view(np.float16)
    else:
        values = np.array(_integers(fields.get(INT64_DATA if dtype == np.int64 else INT32_DATA, [])), dtype)
    return name, values.reshape(shape)
