"""Writes and extends TFLite files, in the schema that LiteRT's package has."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from edgetube.errors import SpecError
from edgetube.files import atomic_write

Array = npt.NDArray[Any]

IDENTIFIER, SCHEMA_VERSION = b"TFL3", 3
"""What every TFLite file begins with, and the version of the schema that all of them have."""

ALIGNMENT = 16
"""Of a constant in the file, in bytes: kernels read it where it lies."""

MAX_BYTES = 2_000_000_000
"""Most bytes of constants: offsets in a flatbuffer have 31 bits, and what is not a constant needs some of them."""

TYPES: Mapping[str, int] = {
    "float32": schema.TensorType.FLOAT32,
    "float16": schema.TensorType.FLOAT16,
    "int32": schema.TensorType.INT32,
    "uint8": schema.TensorType.UINT8,
    "int8": schema.TensorType.INT8,
    "bool": schema.TensorType.BOOL,
}
"""Element types by the names that numpy has for them."""

HYBRID = "FULLY_CONNECTED.hybrid"
"""A FULLY_CONNECTED whose input is float32 and whose weight is int8."""

VERSIONS: Mapping[str, int] = {"FULLY_CONNECTED": 5, HYBRID: 12, "DEQUANTIZE": 3}
"""Versions of operators above 1; a runtime refuses those that it does not know. Version 5 of FULLY_CONNECTED keeps the
leading axes, version 12 has a scale per output where the input is float32; version 3 of DEQUANTIZE has float16."""


class _Builder(flatbuffers.Builder):  # type: ignore[misc]  # the package has no annotations
    """A builder that aligns byte vectors, as the schema demands of buffers; the generated code does not."""

    def StartVector(self, size: int, count: int, alignment: int) -> Any:
        return super().StartVector(size, count, ALIGNMENT if size == 1 else alignment)


class Writer:
    """One graph in the making; tensors are referred to by their indices.

    Attributes:
        tensors: index by name.
    """

    def __init__(self, description: str) -> None:
        self.description = description
        self.tensors: dict[str, int] = {}
        self._graph = schema.SubGraphT()
        self._graph.tensors, self._graph.operators, self._graph.name = [], [], b"main"
        self._buffers = [schema.BufferT()]  # the first one is empty: that of tensors that are computed
        self._codes: dict[str, int] = {}
        self._bytes = 0

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str,
        *,
        scales: npt.ArrayLike | None = None,
        zero: int = 0,
        axis: int = 0,
    ) -> int:
        """Add a tensor that an operator computes, or an input.

        Args:
            dtype: one of `TYPES`.
            scales: of integers: one, or one per index of `axis`.
            zero: their zero point.
        """
        assert name not in self.tensors, name
        found = schema.TensorT()
        found.name, found.shape, found.type = name.encode(), np.array(shape, np.int32), TYPES[dtype]
        found.hasRank = True
        if scales is not None:
            found.quantization = schema.QuantizationParametersT()
            found.quantization.scale = np.array(scales, np.float32).reshape(-1)
            found.quantization.zeroPoint = np.full(found.quantization.scale.size, zero, np.int64)
            found.quantization.quantizedDimension = axis
        self.tensors[name] = len(self._graph.tensors)
        self._graph.tensors.append(found)
        return self.tensors[name]

    def constant(self, name: str, values: Array, *, scales: npt.ArrayLike | None = None, axis: int = 0) -> int:
        """Add a constant; of integers with `scales`, see `tensor`.

        Raises:
            SpecError: the constants exceed `MAX_BYTES`.
        """
        index = self.tensor(name, values.shape, values.dtype.name, scales=scales, axis=axis)
        self._bytes += values.nbytes
        if self._bytes > MAX_BYTES:
            raise SpecError(
                f"the weights of this model exceed {MAX_BYTES / 1e9:g} GB, the most that a TFLite file can hold; "
                "nothing was written: export it to a target with smaller weights, or for another runtime"
            )
        buffer = schema.BufferT()
        buffer.data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._graph.tensors[index].buffer = len(self._buffers)
        self._buffers.append(buffer)
        return index

    @property
    def operators(self) -> Counter[str]:
        """Number of operators by kind."""
        kinds = list(self._codes)
        return Counter(kinds[operator.opcodeIndex] for operator in self._graph.operators)

    def operator(self, kind: str, inputs: Sequence[int], outputs: Sequence[int], options: Any = None) -> None:
        """Add an operator.

        Args:
            kind: its name in the schema, `FULLY_CONNECTED`, or `HYBRID`.
            inputs: a bias that is left out is -1.
            options: object of the schema, `FullyConnectedOptionsT`.
        """
        made = schema.OperatorT()
        made.opcodeIndex = self._codes.setdefault(kind, len(self._codes))
        made.inputs, made.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
        if options is not None:
            union = type(options).__name__.removesuffix("T")
            made.builtinOptionsType, made.builtinOptions = getattr(schema.BuiltinOptions, union), options
        self._graph.operators.append(made)

    def save(self, path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Write the file atomically, see `pack`.

        Raises:
            OSError: the disk is full or fails.
        """
        atomic_write(path, self.pack(inputs, outputs))

    def pack(self, inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
        """The file; `inputs` and `outputs` are tensors of the graph, and those of its only signature."""
        self._graph.inputs, self._graph.outputs = (
            np.array([self.tensors[name] for name in names], np.int32) for names in (inputs, outputs)
        )
        model = schema.ModelT()
        model.version, model.description = SCHEMA_VERSION, self.description.encode()
        model.subgraphs, model.buffers = [self._graph], self._buffers
        model.operatorCodes = [_code(kind) for kind in self._codes]
        signature = schema.SignatureDefT()
        signature.signatureKey = b"serving_default"
        signature.inputs, signature.outputs = ([self._named(name) for name in names] for names in (inputs, outputs))
        model.signatureDefs = [signature]
        builder = _Builder(self._bytes + (1 << 20))
        builder.Finish(model.Pack(builder), IDENTIFIER)
        return bytes(builder.Output())

    def _named(self, name: str) -> Any:
        found = schema.TensorMapT()
        found.name, found.tensorIndex = name.encode(), self.tensors[name]
        return found


def _code(kind: str) -> Any:
    code = schema.OperatorCodeT()
    code.builtinCode = getattr(schema.BuiltinOperator, kind.partition(".")[0])
    code.deprecatedBuiltinCode = min(code.builtinCode, schema.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES)
    code.version = VERSIONS.get(kind, 1)
    return code


OUTPUTS_FIELD = 8
"""Where the table of a SubGraph says where its outputs lie, see `with_outputs`."""


def with_outputs(file: bytes, names: Sequence[str]) -> bytes:
    """Add tensors to the outputs of a file's graph, behind those that it has.

    The list of outputs is written anew at the end, and the graph refers to it: nothing else moves.

    Args:
        names: tensors of the graph; those that are outputs already are added once more.
    """
    data = bytearray(file)
    graph = schema.Model.GetRootAs(data, 0).Subgraphs(0)
    indices = {graph.Tensors(i).Name().decode(): i for i in range(graph.TensorsLength())}
    outputs = [*map(int, graph.OutputsAsNumpy()), *(indices[name] for name in names)]
    field = graph._tab.Pos + graph._tab.Offset(OUTPUTS_FIELD)
    data += bytes(-len(data) % 4)
    struct.pack_into("<I", data, field, len(data) - field)
    data += struct.pack(f"<{len(outputs) + 1}i", len(outputs), *outputs)
    return bytes(data)


def hybrid_product(rows: Array, weight: Array) -> bytes:
    """A file that multiplies rows (M, K) float32 by a constant (N, K) of whole numbers stored as int8."""
    writer = Writer("a hybrid product")
    left = writer.tensor("left", rows.shape, "float32")
    right = writer.constant("right", weight.astype(np.int8), scales=np.ones(len(weight), np.float32))
    result = writer.tensor("result", (len(rows), len(weight)), "float32")
    options = schema.FullyConnectedOptionsT()
    options.keepNumDims = options.asymmetricQuantizeInputs = True
    writer.operator(HYBRID, [left, right, -1], [result], options)
    return writer.pack(["left"], ["result"])


def matrix_product(size: int, integers: bool) -> bytes:
    """A file that multiplies a matrix (size, size) by a constant one, in float32 or in 8-bit integers."""
    writer = Writer("a matrix product")
    kind: Any = np.int8 if integers else np.float32
    scales = np.ones(size, np.float32) if integers else None
    one = None if scales is None else scales[:1]
    left = writer.tensor("left", (size, size), np.dtype(kind).name, scales=one)
    right = writer.constant("right", np.ones((size, size), kind), scales=scales)
    result = writer.tensor("result", (size, size), np.dtype(kind).name, scales=one)
    writer.operator("FULLY_CONNECTED", [left, right, -1], [result], schema.FullyConnectedOptionsT())
    return writer.pack(["left"], ["result"])
