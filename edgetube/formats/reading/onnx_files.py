"""ONNX files that PyTorch's exporter wrote, read as the state dict that they were made from.

The exporter keeps the names of tensors, but not those of what it computed from them: the transposed matrix of a linear
becomes `onnx::MatMul_1966`, and tables that do not depend on the input become other constants. The nodes that read
these keep the path of their module (`/encoder/layer.0/mlp/fc1/MatMul`), which says whose they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, external_data_helper, numpy_helper
from torch import Tensor

from edgetube import strict
from edgetube.errors import CheckpointError
from edgetube.formats.reading.tensors import TensorSource

SUFFIX = ".onnx"

COMPUTED = "onnx::"
"""What the exporter's own names begin with."""

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})

_Read: TypeAlias = Callable[[], Tensor]


def open_source(path: Path) -> TensorSource:
    """The floating-point constants of a graph by their names in the state dict.

    A computed constant has the name of the node that reads it, with dots (`embeddings.Reshape_1`); the matrix of a
    linear is `<module>.weight` (out, in). `facts["input"]` is the shape of the first input, 0 where it is dynamic.

    Raises:
        CheckpointError: it is no ONNX file, keeps its weights in other files, or two constants have one name.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as error:
        raise CheckpointError(f"{path} is not an ONNX file: {strict.shown(str(error), 300)}") from error
    if any(external_data_helper.uses_external_data(tensor) for tensor in model.graph.initializer):
        raise CheckpointError(f"{path} keeps its weights in other files; save it again as one file")
    found: dict[str, tuple[tuple[int, ...], _Read]] = {}
    for name, shape, read in _constants(model.graph):
        if name in found:
            raise CheckpointError(f"{path} has two constants for {strict.shown(name)}")
        found[name] = shape, read
    given = [v for v in model.graph.input if v.name not in {t.name for t in model.graph.initializer}]
    facts = {"input": tuple(d.dim_value for d in given[0].type.tensor_type.shape.dim)} if given else {}
    return TensorSource({name: shape for name, (shape, _) in found.items()}, lambda name: found[name][1](), facts=facts)


def _constants(graph: onnx.GraphProto) -> Iterator[tuple[str, tuple[int, ...], _Read]]:
    """Name, shape and reader of each floating-point constant that has an axis."""
    readers = {name: node for node in reversed(graph.node) for name in node.input}
    for tensor in graph.initializer:
        if tensor.data_type not in FLOATS or not tensor.dims:
            continue
        node, shape = readers.get(tensor.name), tuple(tensor.dims)
        if not tensor.name.startswith(COMPUTED) or node is None or not node.name:
            yield tensor.name, shape, lambda tensor=tensor: _value(tensor)  # type: ignore[misc]
            continue
        place = _place(node.name)
        if node.op_type == "MatMul" and len(shape) == 2 and node.input[1] == tensor.name:
            module = place.rpartition(".")[0]
            yield f"{module}.weight", shape[::-1], lambda tensor=tensor: _value(tensor).T  # type: ignore[misc]
        else:
            yield place, shape, lambda tensor=tensor: _value(tensor)  # type: ignore[misc]


def _place(node: str) -> str:
    """The path of a node with dots; a module of a Sequential repeats the path of that: `/block/block.0/MatMul`."""
    parts = node.strip("/").split("/")
    kept = [part for part, following in pairwise([*parts, ""]) if not following.startswith(f"{part}.")]
    return ".".join(kept)


def _value(tensor: onnx.TensorProto) -> Tensor:
    if tensor.data_type == TensorProto.BFLOAT16:
        return torch.from_numpy(numpy_helper.to_array(tensor).astype("float32"))
    return torch.from_numpy(numpy_helper.to_array(tensor).copy())
