"""Weights of graphs: in memory, or in files that copies of a graph share.

A protobuf message ends at 2 GB, and each edited copy of a graph holds its weights once more. So the large tensors of a
large graph name files instead of holding bytes: ONNX's external data, with one file per tensor, which is named after
the sha256 of its bytes, all in one folder, whose absolute path is in the graph. Files are written once and never
changed; what is written beside a graph's weights is deleted with the folder.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgetube import protobuf

LIMIT = 256 << 20
"""Bytes of weights from which a graph keeps its weights in files."""

SMALL = 1 << 16
"""Bytes below which a tensor is in memory in any case, among them shapes and axes, which shape inference reads."""

APART = 1024
"""Bytes from which a tensor is in the file of weights beside an artifact."""

Message = TypeVar("Message", onnx.ModelProto, onnx.GraphProto)


def size(tensor: TensorProto) -> int:
    """Bytes of a tensor's values."""
    item: int = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(math.prod(tensor.dims)) * item


def total(model: onnx.ModelProto) -> int:
    """Bytes of a graph's weights."""
    return sum(map(size, model.graph.initializer))


def make(name: str, values: npt.ArrayLike, folder: Path | None) -> TensorProto:
    """A tensor: in memory if it is small or `folder` is None, else in a file of that folder.

    Raises:
        OSError: the disk is full or fails.
    """
    array = np.asarray(values)
    if folder is None or array.nbytes < SMALL:
        return numpy_helper.from_array(array, name)
    array = np.ascontiguousarray(array)
    path = folder / hashlib.sha256(array.data.cast("B")).hexdigest()
    if not path.exists():
        part = folder / f"{secrets.token_hex(8)}.part"
        array.tofile(part)
        part.replace(path)
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=str(path))
    return tensor


def place(tensor: TensorProto) -> Path | None:
    """The file that holds a tensor's values, from its first to its last byte; None if they are in memory."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return None
    return next(Path(entry.value) for entry in tensor.external_data if entry.key == "location")


def folder_of(model: onnx.ModelProto) -> Path | None:
    """The folder with the weights of a graph; None if it has them in memory."""
    return next((path.parent for path in map(place, model.graph.initializer) if path is not None), None)


def read(tensor: TensorProto) -> npt.NDArray[Any]:
    """The values, read-only: in memory, or mapped from the file."""
    if (path := place(tensor)) is None:
        return numpy_helper.to_array(tensor)
    return np.memmap(path, helper.tensor_dtype_to_np_dtype(tensor.data_type), "r", shape=tuple(tensor.dims))


def digest(tensor: TensorProto) -> str:
    """sha256 of a tensor's bytes, the same wherever they are."""
    if (path := place(tensor)) is not None:
        return path.name
    return hashlib.sha256(tensor.raw_data or tensor.SerializeToString(deterministic=True)).hexdigest()


class Weights(Mapping[str, "npt.NDArray[Any]"]):
    """The weights of a graph by name, each read when it is asked for."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return read(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one, without reading it."""
        return tuple(self._tensors[name].dims)


def without(message: Message, *fields: str) -> Message:
    """A copy of a message without some of its fields, which are never copied."""
    result = type(message)()
    for field, value in message.ListFields():
        if field.name in fields:
            continue
        if field.is_repeated:
            getattr(result, field.name).extend(value)
        else:
            setattr(result, field.name, value)
    return result


def with_graph(model: onnx.ModelProto, graph: onnx.GraphProto) -> onnx.ModelProto:
    """The model with another graph."""
    result = without(model, "graph")
    result.graph.CopyFrom(graph)
    return result


def check(model: onnx.ModelProto, shapes: bool = False) -> None:
    """Check that a graph is valid ONNX; with `shapes`, also by inferring every shape.

    The checker sees large weights as inputs of the same types and shapes: it would copy them several times.

    Raises:
        onnx.checker.ValidationError: it is not.
    """
    graph = without(model.graph, "initializer")
    for tensor in model.graph.initializer:
        if size(tensor) < SMALL:
            graph.initializer.append(tensor)
        else:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.checker.check_model(with_graph(model, graph), full_check=shapes)


def relative(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with the names of its files instead of their paths, as runtimes want it."""
    if folder_of(model) is None:
        return model
    graph = without(model.graph, "initializer")
    for tensor in model.graph.initializer:
        copied = graph.initializer.add()
        copied.CopyFrom(tensor)
        for entry in copied.external_data:
            if entry.key == "location":
                entry.value = Path(entry.value).name
    return with_graph(model, graph)


GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9
"""Numbers of the fields in onnx.proto: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data."""

ALIGNMENT = 4096
"""Of the tensors in a file of weights, so that runtimes can map them."""


def write(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph as one message, tensor by tensor: the bytes that protobuf would make of all of it in memory.

    Raises:
        OSError: the disk is full or fails.
    """
    tensors = [_encoded_head(tensor) for tensor in model.graph.initializer]
    sizes = [len(head) + data for head, data in tensors]
    before, after = _around(model.graph, INITIALIZER)
    inner = len(before) + len(after) + sum(len(protobuf.head(INITIALIZER, size)) + size for size in sizes)
    first, last = _around(model, GRAPH)
    with path.open("wb") as file:
        file.write(first + protobuf.head(GRAPH, inner) + before)
        for tensor, (head, data), size in zip(model.graph.initializer, tensors, sizes, strict=True):
            file.write(protobuf.head(INITIALIZER, size) + head)
            if data:
                file.write(_bytes(tensor))
        file.write(after + last)


def _is_large(tensor: TensorProto) -> bool:
    return size(tensor) >= APART


def write_apart(
    model: onnx.ModelProto, path: Path, data: Path, apart: Callable[[TensorProto], bool] = _is_large
) -> None:
    """Write a graph to `path`, and its large weights, or those that are `apart`, to the file `data` of the same folder.

    Raises:
        OSError: the disk is full or fails.
    """
    graph = without(model.graph, "initializer")
    with data.open("wb") as file:
        for tensor in model.graph.initializer:
            if not apart(tensor):
                graph.initializer.append(tensor)
                continue
            file.write(bytes(-file.tell() % ALIGNMENT))
            named = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            named.data_location = TensorProto.EXTERNAL
            for key, value in (("location", data.name), ("offset", file.tell()), ("length", size(tensor))):
                named.external_data.add(key=key, value=str(value))
            graph.initializer.append(named)
            file.write(_bytes(tensor))
    path.write_bytes(with_graph(model, graph).SerializeToString())


def _around(message: onnx.ModelProto | onnx.GraphProto, number: int) -> tuple[bytes, bytes]:
    """The encoded fields of a message before and after the field `number`, without it."""
    fields = [field for field, _ in message.ListFields()]
    before = without(message, *(field.name for field in fields if field.number >= number))
    after = without(message, *(field.name for field in fields if field.number <= number))
    return before.SerializeToString(), after.SerializeToString()


def _encoded_head(tensor: TensorProto) -> tuple[bytes, int]:
    """The encoding of a tensor up to its values, and their bytes; 0 where it holds them in other fields."""
    if place(tensor) is None and not tensor.raw_data:
        return tensor.SerializeToString(), 0
    plain = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    return plain.SerializeToString() + protobuf.head(RAW_DATA, size(tensor)), size(tensor)


def _bytes(tensor: TensorProto) -> bytes | memoryview:
    """The bytes of a tensor's values."""
    return tensor.raw_data or np.ascontiguousarray(read(tensor)).reshape(-1).view(np.uint8).data
