"""What an ONNX graph holds: shapes, attributes, biases, bytes, multiply-accumulates, casts of pixels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Any

import onnx
from onnx import TensorProto, helper

from edgetube.calibration import storage


def graph_statistics(model: onnx.ModelProto) -> dict[str, Any]:
    """Statistics of a graph, plain JSON.

    Returns:
        operators (type -> count), nodes, parameters, weight_bytes, macs (matrix products and convolutions),
        max_rank, and voxels, the uint8 elements that are converted to float.
    """
    graph, known = model.graph, tensor_shapes(model)
    operators = Counter(node.op_type for node in graph.node)
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    return {
        "operators": by_count(operators),
        "nodes": len(graph.node),
        "parameters": sum(math.prod(t.dims) for t in graph.initializer if t.data_type in floats),
        "weight_bytes": storage.total(model),
        "macs": sum(_macs(node, known) for node in graph.node),
        "max_rank": max(map(len, known.values())),
        "voxels": sum(math.prod(known[node.output[0]]) for node in byte_casts(model)),
    }


def by_count(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts by name, the largest first."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _macs(node: onnx.NodeProto, known: dict[str, tuple[int, ...]]) -> int:
    """Multiply-accumulates of one node."""
    if node.op_type == "MatMul":
        return math.prod(known[node.output[0]]) * known[node.input[0]][-1]
    if node.op_type == "Conv":
        return math.prod(known[node.output[0]]) * math.prod(known[node.input[1]][1:])
    return 0


def tensor_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Static shape of every tensor of a graph; a dynamic dimension is -1."""
    graph = model.graph
    found = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        dims = value.type.tensor_type.shape.dim
        found[value.name] = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
    return found


def attribute(node: onnx.NodeProto, name: str) -> Any:
    """An attribute of a node of a canonical graph, which has no implicit ones."""
    return next(helper.get_attribute_value(a) for a in node.attribute if a.name == name)


def bias_of(
    product: onnx.NodeProto,
    users: Sequence[onnx.NodeProto],
    shapes: Mapping[str, tuple[int, ...]],
    constants: Container[str],
) -> tuple[str | None, onnx.NodeProto]:
    """The bias that is added to a product by a matrix, if any, and the last node of that linear.

    Args:
        users: the nodes that read the product; see `edgetube.calibration.graphs.readers`.
        shapes: of all tensors.
        constants: names of the graph's initializers.
    """
    if len(users) == 1 and users[0].op_type == "Add":
        for name in users[0].input:
            if name in constants and shapes[name] == shapes[product.output[0]][-1:]:
                return name, users[0]
    return None, product


def byte_casts(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes that cast uint8 to float."""
    bytes_ = {value.name for value in model.graph.input if value.type.tensor_type.elem_type == TensorProto.UINT8}
    casts = []
    for node in model.graph.node:
        if node.input and node.input[0] in bytes_:
            if node.op_type == "Cast":
                casts.append(node)
            else:
                bytes_.update(node.output)
        elif any(name in bytes_ for name in node.input):
            bytes_.update(node.output)
    return casts
