"""Rewrites a calibrated graph to explicit integer kernels, so that no runtime has to fuse Q/DQ.

For runtimes with the `com.microsoft` operators. A linear is one MatMulIntegerToFloat (8-bit activations times
8-bit weights with a scale per column, plus the float bias), attention one MultiHeadAttention in float32. Tubes multiply
the bytes of the frames: a pixel is a uint8 with scale 1, so only weights are rounded. No pattern matching is needed, so
no linear falls back to float silently.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, helper, numpy_helper

from edgetube.calibration import graphs, numeric, storage
from edgetube.calibration.graphs import Linear
from edgetube.calibration.table import CalibrationTable, LinearPlan
from edgetube.errors import ParityError
from edgetube.export.statistics import by_count, graph_statistics, tensor_shapes

DOMAIN = "com.microsoft"

FROM_HEADS = [0, 2, 1, 3]
"""(B, N, h, D / h) to (B, h, N, D / h) and back."""

TO_COLUMNS = [0, 2, 3, 1]
"""(B, N, h, D / h) to (B, h, D / h, N)."""


def to_integer_kernels(
    model: onnx.ModelProto, table: CalibrationTable, *, unsigned_weights: bool = False
) -> onnx.ModelProto:
    """The calibrated float graph in integer kernels; linears that the table keeps in float stay as they are.

    Activations are of the table's scheme.

    Args:
        unsigned_weights: write the same weights as uint8 with zero point 128. Where uint8 times int8 is summed in
            16 bits that saturate (x86 without VNNI), uint8 times uint8 is summed in 32.

    Raises:
        InputError: the table is for another graph.
    """
    table.check(graphs.digest(model))
    nodes, tensors = _LinearRewriter(model, table, unsigned_weights).rewrite()
    nodes, shapes = _fuse_attention(nodes, graphs.initializers(model))
    return _model(model, nodes, [*tensors, *shapes])


class _LinearRewriter:
    """Rewrites the linears; quantised activations and zero points are shared."""

    def __init__(self, model: onnx.ModelProto, table: CalibrationTable, unsigned_weights: bool) -> None:
        self.model, self.ranges, self.scheme = model, table.ranges, table.activations
        self.unsigned_weights = unsigned_weights
        self.plans = {plan.name: plan for plan in table.quantised}
        self.weights = graphs.initializers(model)
        self.producers = graphs.producers(model.graph.node)
        self.folder = storage.folder_of(model)
        self.tensors: dict[str, onnx.TensorProto] = {}
        self.quantised: dict[str, list[str]] = {}

    def rewrite(self) -> tuple[list[NodeProto], list[onnx.TensorProto]]:
        """The new nodes of the graph, and the added constants."""
        linears = {found.node: found for found in graphs.linears(self.model) if found.name in self.plans}
        readers = graphs.readers(self.model.graph.node)
        nodes: list[NodeProto] = []
        biased: dict[str, str] = {}  # Add that is taken into a kernel -> that kernel's MatMul
        for node in self.model.graph.node:
            if node.name in biased:
                continue
            if (linear := linears.get(node.name)) is None:
                nodes.append(node)
                continue
            output = node.output[0]
            if linear.bias is not None:
                (add,) = readers[output]
                biased[add.name], output = node.name, add.output[0]
            nodes.extend(self._kernel(linear, output))
        dead = {name for name in self.quantised if self.quantised[name][0] != f"{name}.quantized"}
        kept = [n for n in nodes if n.output[0] not in dead or _is_read(n.output[0], nodes, self.model)]
        return kept, list(self.tensors.values())

    def _kernel(self, linear: Linear, output: str) -> Iterator[NodeProto]:
        plan, name = self.plans[linear.name], linear.weight
        known = linear.activation in self.quantised
        activation, scale, zero = self._activation(linear.activation)
        if not known and activation == f"{linear.activation}.quantized":
            yield helper.make_node("QuantizeLinear", [linear.activation, scale, zero], [activation], name=activation)
        inputs = [activation, *self._weight(plan, name, scale, zero)]
        if linear.bias is not None:
            inputs.append(linear.bias)
        yield helper.make_node("MatMulIntegerToFloat", inputs, [output], name=output, domain=DOMAIN)

    def _activation(self, name: str) -> list[str]:
        """Names of a tensor's integers, scale and zero point; for pixels, the integers are the frames."""
        if name not in self.quantised:
            found, cast = self.ranges[name], self.producers.get(name)
            integers, scale, zero = f"{name}.quantized", *found.asymmetric
            zero_point: np.generic = np.uint8(zero)
            if (scale, zero) == (1.0, 0) and cast is not None and cast.op_type == "Cast":
                integers = cast.input[0]
            elif self.scheme == "int8":
                scale, zero_point = found.symmetric, np.int8(0)
            self.quantised[name] = [
                integers,
                self._constant(f"{name}.scale", np.float32(scale)),
                self._constant(f"{name}.zero_point", zero_point),
            ]
        return self.quantised[name]

    def _weight(self, plan: LinearPlan, name: str, scale: str, zero: str) -> list[str]:
        scales = np.array(plan.weight_scales, np.float32)
        integers = numeric.quantize_weights(np.asarray(self.weights[name], np.float32), scales)
        if self.unsigned_weights:
            unsigned = (integers.astype(np.int16) + 128).astype(np.uint8)
            kept, weight_zero = self._constant(f"{name}.uint8", unsigned), self._constant("zero_point", np.uint8(128))
        else:
            kept, weight_zero = self._constant(f"{name}.int8", integers), ""  # 0
        return [kept, scale, self._constant(f"{name}.scale", scales), zero, weight_zero]

    def _constant(self, name: str, value: npt.ArrayLike) -> str:
        self.tensors[name] = storage.make(name, value, self.folder)
        return name


def _fuse_attention(
    nodes: list[NodeProto], weights: Mapping[str, npt.NDArray[np.generic]]
) -> tuple[list[NodeProto], list[onnx.TensorProto]]:
    """Fuse scores, softmax, context and their transposes into one MultiHeadAttention, which never stores the scores.

    Its operands (B, N, D) are what is reshaped to heads (B, N, h, D / h). Where that Reshape also makes other sequences
    of the tokens, (B, n, H, D / h) of (B, N, D), a Reshape to (B, n, H D / h) stays before it, and one back behind it.
    """
    producers, readers = graphs.producers(nodes), graphs.readers(nodes)
    gone: set[str] = set()
    fused: dict[str, list[NodeProto]] = {}
    shapes: list[onnx.TensorProto] = []
    for softmax in nodes:
        if softmax.op_type != "Softmax" or (found := _attention(softmax, producers, readers)) is None:
            continue
        inside, operands, merge = found
        batch, length, heads, channels = map(int, weights[producers[producers[inside[0]].input[0]].input[1]])
        rows = [batch, length, heads * channels]
        output, before, after = merge.output[0], [], []
        if weights[merge.input[1]].tolist() != rows:
            output, shape = f"{merge.name}.rows", f"{merge.name}.rows.shape"
            shapes.append(numpy_helper.from_array(np.array(rows, np.int64), shape))
            reshaped = [f"{merge.name}.{part}" for part in ("query", "key", "value")]
            before = [
                helper.make_node("Reshape", [old, shape], [new], name=new)
                for old, new in zip(operands, reshaped, strict=True)
            ]
            after = [helper.make_node("Reshape", [output, merge.input[1]], list(merge.output), name=merge.name)]
            operands = reshaped
        attention = helper.make_node(
            "MultiHeadAttention",
            operands,
            [output],
            name=output,
            domain=DOMAIN,
            num_heads=heads,
            scale=1.0,  # it is folded into the query weights
        )
        gone |= set(inside)
        fused[merge.output[0]] = [*before, attention, *after]
    return [new for n in nodes if n.output[0] not in gone for new in fused.get(n.output[0], [n])], shapes


def _attention(
    softmax: NodeProto, producers: Mapping[str, NodeProto], readers: Mapping[str, list[NodeProto]]
) -> tuple[list[str], list[str], NodeProto] | None:
    """Inner tensors, [query, key, value] (B, N, D), and the last Reshape of the attention around a softmax."""
    scores = producers.get(softmax.input[0])
    context = readers[softmax.output[0]][0]
    if scores is None or scores.op_type != "MatMul" or context.op_type != "MatMul":
        return None
    back = readers[context.output[0]][0]
    sides = [(scores.input[0], FROM_HEADS), (scores.input[1], TO_COLUMNS), (context.input[1], FROM_HEADS)]
    inside, sources = [], []
    for name, order in sides:
        transpose = producers.get(name)
        if transpose is None or not _transposes(transpose, order):
            return None
        inside += [name, transpose.input[0]]
        sources.append(producers[transpose.input[0]].input[0])
    if not _transposes(back, FROM_HEADS):
        return None
    (merge,) = readers[back.output[0]]
    inside += [scores.output[0], softmax.output[0], context.output[0], back.output[0]]
    if any(len(readers[name]) > 1 for name in inside):
        return None  # what a fused attention does not show
    return inside, sources, merge


def _transposes(node: NodeProto, order: list[int]) -> bool:
    return node.op_type == "Transpose" and list(node.attribute[0].ints) == order


def _is_read(name: str, nodes: Iterable[NodeProto], model: onnx.ModelProto) -> bool:
    return any(name in node.input for node in nodes) or any(name == value.name for value in model.graph.output)


def count_integer_products(model: onnx.ModelProto) -> int:
    """Number of MatMuls of a Q/DQ graph whose both operands are dequantised integers."""
    integers = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    return sum(n.op_type == "MatMul" and integers >= {*n.input} for n in model.graph.node)


def integer_macs(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of those MatMuls by constants in one call of a Q/DQ graph."""
    shapes, producers = tensor_shapes(model), graphs.producers(model.graph.node)
    constants = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    found = 0
    for node in model.graph.node:
        sides = [producers[name] for name in node.input if name in producers]
        if node.op_type == "MatMul" and [side.op_type for side in sides] == ["DequantizeLinear"] * 2:
            depth, *_ = constants.get(sides[1].input[0], (0,))
            found += depth * math.prod(shapes[node.output[0]])
    return found


def _model(source: onnx.ModelProto, nodes: list[NodeProto], tensors: list[onnx.TensorProto]) -> onnx.ModelProto:
    """`source` with new nodes and further constants; unused tensors are left out."""
    graph = source.graph
    used = {name for node in nodes for name in (*node.input, *node.output)}
    made = helper.make_graph(
        nodes,
        graph.name,
        graph.input,
        graph.output,
        [tensor for tensor in [*graph.initializer, *tensors] if tensor.name in used],
        value_info=[value for value in graph.value_info if value.name in used],
    )
    domains = {node.domain for node in nodes} - {opset.domain for opset in source.opset_import}
    opsets = [*source.opset_import, *(helper.make_opsetid(domain, 1) for domain in sorted(domains))]
    result = helper.make_model(made, opset_imports=opsets, ir_version=source.ir_version)
    result.producer_name, result.doc_string = source.producer_name, source.doc_string
    result.metadata_props.extend(source.metadata_props)
    storage.check(result)
    return result


def coverage(model: onnx.ModelProto, asked: int, executed: int, kernels: Mapping[str, int]) -> dict[str, Any]:
    """For the manifest: the linears to compute in integers, those that are, and the kernels that do it.

    `saturates`, from the weights of `model`: whether a sum of two products may exceed 16 bits, as on x86 without VNNI.
    """
    matrices = (storage.read(t) for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8)
    overflowing = sum(numeric.overflowing_pairs(matrix) for matrix in matrices if matrix.ndim == 2)
    counted = {"asked": asked, "executed": executed, "kernels": dict(sorted(kernels.items()))}
    return {**counted, "saturates": overflowing > 0}


def assert_integer_coverage(runtime: str, asked: int, executed: int) -> None:
    """Check that the runtime computes every quantised product in integers.

    Raises:
        ParityError: some are computed in float.
    """
    if executed < asked:
        raise ParityError(
            f"{runtime} computes {asked - executed} of {asked} quantised products in float; nothing was written: "
            "this version of it does not know the integer form, use the one in constraints.txt"
        )


def statistics(plain: onnx.ModelProto, model: onnx.ModelProto) -> dict[str, Any]:
    """`graph_statistics` of the float graph, with the operators and bytes of the integer one."""
    operators = Counter(node.op_type for node in model.graph.node)
    return graph_statistics(plain) | {
        "operators": by_count(operators),
        "nodes": len(model.graph.node),
        "weight_bytes": storage.total(model),
    }
