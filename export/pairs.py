"""Graphs for NPUs: data pass through pairs of QuantizeLinear and DequantizeLinear (Q/DQ).

Such a compiler takes an operator between DequantizeLinear and QuantizeLinear as one operator on integers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from edgetube.calibration import graphs, numeric, storage
from edgetube.calibration.graphs import Linear
from edgetube.calibration.table import INTEGERS, ActivationScheme, CalibrationTable, Range
from edgetube.export import canonical
from edgetube.export.float16 import PIXEL_SCALE
from edgetube.export.statistics import byte_casts, tensor_shapes

PIXELS = ("pixels.scale", "pixels.zero_point")
"""Names of the scale and the zero point of pixels."""


def pixel_pairs(model: onnx.ModelProto) -> onnx.ModelProto:
    """The float32 graph with pixels as quantised values: no Cast, and every operator that moves them in a Q/DQ pair.

    A pixel is a uint8 with scale 1 / `PIXEL_SCALE`, exact in float16; the weights of the tubes are multiplied by it.
    """
    nodes, types = moved_pixels(model)
    pixels = {node.output[0] for node in byte_casts(model)}
    weights = {name for node in model.graph.node if node.input[0] in pixels for name in node.input[1:]}
    folder = storage.folder_of(model)
    tensors = [_scaled(t.name, storage.read(t), folder) if t.name in weights else t for t in model.graph.initializer]
    return rebuilt(model, nodes, [*tensors, *pixel_parameters()], types)


def _scaled(name: str, weight: npt.NDArray[Any], folder: Path | None) -> TensorProto:
    """A weight of pixels, for pixels that are divided by `PIXEL_SCALE`."""
    values: npt.NDArray[np.float32] = np.asarray(weight, np.float32) * np.float32(PIXEL_SCALE)
    return storage.make(name, values, folder)


def pixel_parameters() -> list[TensorProto]:
    """The initializers `PIXELS`."""
    scale, zero_point = PIXELS
    return [
        numpy_helper.from_array(np.array(1 / PIXEL_SCALE, np.float32), scale),
        numpy_helper.from_array(np.array(0, np.uint8), zero_point),
    ]


def moved_pixels(model: onnx.ModelProto) -> tuple[list[NodeProto], list[ValueInfoProto]]:
    """The nodes of a graph, those that move pixels in Q/DQ pairs, and the types of the tensors that this adds.

    A Cast of pixels to float becomes a DequantizeLinear, so that pixels are those of the frames divided by
    `PIXEL_SCALE`.
    """
    shapes = tensor_shapes(model)
    pixels = {value.name for value in model.graph.input if value.type.tensor_type.elem_type == TensorProto.UINT8}
    nodes: list[NodeProto] = []
    types: list[ValueInfoProto] = []
    for node in model.graph.node:
        if node.input[0] not in pixels:
            nodes.append(node)
            continue
        name = node.output[0]
        if node.op_type == "Cast":
            nodes.append(helper.make_node("DequantizeLinear", [node.input[0], *PIXELS], [name], name=name))
            continue
        moved, after = deepcopy(node), f"{name}.moved"
        moved.output[0] = after
        for index, source in enumerate(node.input):
            if source in pixels:
                moved.input[index] = before = f"{name}.source.{index}"
                nodes.append(helper.make_node("DequantizeLinear", [source, *PIXELS], [before], name=before))
                types.append(helper.make_tensor_value_info(before, TensorProto.FLOAT, shapes[source]))
        nodes += [moved, helper.make_node("QuantizeLinear", [after, *PIXELS], [name], name=f"{name}.quantize")]
        types.append(helper.make_tensor_value_info(after, TensorProto.FLOAT, shapes[name]))
        pixels.update(node.output)
    return nodes, types


def rebuilt(
    model: onnx.ModelProto,
    nodes: list[NodeProto],
    tensors: Iterable[TensorProto],
    types: Iterable[ValueInfoProto],
    wide: bool = False,
) -> onnx.ModelProto:
    """`model` with other nodes, its tensors those that these read, and further types; checked.

    Args:
        wide: in an opset that has integers of 16 bits.
    """
    result = onnx.ModelProto()
    for field in ("ir_version", "producer_name", "doc_string"):
        setattr(result, field, getattr(model, field))
    result.opset_import.extend(model.opset_import)
    result.metadata_props.extend(model.metadata_props)
    graph, source = result.graph, model.graph
    graph.name = source.name
    graph.node.extend(nodes)
    graph.input.extend(source.input)
    graph.output.extend(source.output)
    read = {name for node in nodes for name in node.input}
    made = {name for node in nodes for name in node.output}
    graph.initializer.extend(tensor for tensor in tensors if tensor.name in read)
    graph.value_info.extend(value for value in [*source.value_info, *types] if value.name in made)
    if wide:
        graphs.allow_wide_integers(result)
    canonical.check(result)
    return result


HEADROOM = 2.0
"""Factor on ranges of 16 bits: clips that were not seen exceed them, and a bit of 16 costs nothing beside weights of 8
(`bench/studies/headroom.py`)."""

LARGEST_BIAS = 2.0**30
"""Largest integer of a bias; a weight's scale is raised where a bias would exceed it."""


@dataclass(frozen=True)
class IntegerGraph:
    """A graph in which everything is quantised that can be.

    Attributes:
        origins: the operator of the float graph that each node was made for, by the node's name.
        linears: the linears that multiply integers.
    """

    model: onnx.ModelProto
    origins: Mapping[str, str]
    linears: tuple[str, ...]


def integer_pairs(
    model: onnx.ModelProto,
    table: CalibrationTable,
    *,
    narrow: bool = False,
    floats: Collection[str] = (),
    headroom: float = HEADROOM,
) -> IntegerGraph:
    """A calibrated float graph with every operator in Q/DQ pairs whose tensors have ranges.

    A linear becomes a Gemm of its int8 weights, a scale per column, with its bias in int32. Activations are uint16;
    with `narrow` those that go into and come out of a linear are uint8, but for the linears of pixels. An operator
    without ranges stays float, and so does a linear that the table keeps in float.

    Args:
        table: with the ranges of all tensors that are to be integers; pixels and what only moves values need none.
        floats: names of operators to leave in float.
        headroom: factor on ranges of 16 bits.

    Raises:
        InputError: the table is for another graph.
    """
    table.check(graphs.digest(model))
    return _IntegerWriter(model, table, narrow, frozenset(floats), headroom).write()


class _IntegerWriter:
    """Writes an `IntegerGraph` node by node.

    A tensor keeps its name in float: behind DequantizeLinear where an operator on integers gives it, `<name>.exact`
    being what goes into QuantizeLinear. What a float operator gives is `<name>.dequantized` for readers in integers.
    """

    def __init__(
        self, model: onnx.ModelProto, table: CalibrationTable, narrow: bool, floats: frozenset[str], headroom: float
    ) -> None:
        self.headroom = headroom
        self.model, self.narrow, self.floats, self.given = model, narrow, floats, table.ranges
        self.folder, self.shapes, self.weights = (
            storage.folder_of(model),
            tensor_shapes(model),
            graphs.initializers(model),
        )
        self.kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        self.plans = {plan.name: plan for plan in table.quantised}
        self.linears = {found.node: found for found in graphs.linears(model) if found.name in self.plans}
        self.outputs = graphs.linear_outputs(model)
        self.pixels = {node.output[0] for node in byte_casts(model)}
        self.ranges = self._ranges()
        self.nodes: list[NodeProto] = []
        self.types: list[ValueInfoProto] = []
        self.tensors = {tensor.name: tensor for tensor in pixel_parameters()}
        self.integers: dict[str, str] = {}
        """The name under which operators on integers read a tensor."""

    def _ranges(self) -> dict[str, Range]:
        """The ranges of tensors of 16 bits, also of those that only move values."""
        found = {name: range_ for name, range_ in self.given.items() if name not in self.pixels}
        for node in self.model.graph.node:
            if node.op_type in graphs.MOVES and node.input[0] in found:
                found |= dict.fromkeys(node.output, found[node.input[0]])
            elif node.op_type == "Softmax":
                found[node.output[0]] = Range(0.0, 1.0, "softmax")
        return found

    def write(self) -> IntegerGraph:
        moved, self.types = moved_pixels(self.model)
        moves = self._bytes()
        own = {node.name for node in self.model.graph.node if node.input[0] not in moves}
        origins: dict[str, str] = {}
        done: list[str] = []
        biased: set[str] = set()
        for node in moved:
            first, linear = len(self.nodes), self.linears.get(node.name)
            if linear is not None and self._fits(linear):
                self._linear(linear)
                done.append(linear.name)
                biased.update([self.outputs[linear.name]] if linear.bias else [])
            elif node.output[0] in biased:
                continue  # a bias that is part of its Gemm
            elif node.name in own and self._is_integer(node):
                self._operator(node)
            else:
                self.nodes.append(self._float(node))
            origins |= {new.name: node.name for new in self.nodes[first:]}
        tensors = [*self.model.graph.initializer, *self.tensors.values()]
        return IntegerGraph(rebuilt(self.model, self.nodes, tensors, self.types, wide=True), origins, tuple(done))

    def _bytes(self) -> set[str]:
        """The tensors of bytes, before they are cast."""
        found = {value.name for value in self.model.graph.input}
        for node in self.model.graph.node:
            if node.op_type != "Cast" and node.input[0] in found:
                found.update(node.output)
        return found

    def _fits(self, linear: Linear) -> bool:
        known = linear.activation in self.pixels or linear.activation in self.ranges
        return known and linear.node not in self.floats and self.outputs[linear.name] in self.ranges

    def _is_integer(self, node: NodeProto) -> bool:
        read = [name for name in node.input if name and name not in self.kinds]
        if node.name in self.floats or node.op_type == "Conv" or not all(name in self.ranges for name in read):
            return False
        shape = self.shapes[node.input[1]] if node.op_type == "MatMul" and node.input[1] in self.kinds else (1,)
        return shape[-1] == 1 and all(name in self.ranges for name in node.output)

    def _float(self, node: NodeProto) -> NodeProto:
        """A node in float; weights of pixels are multiplied by `PIXEL_SCALE`."""
        if node.input[0] not in self.pixels:
            return node
        new = deepcopy(node)
        for index, name in enumerate(node.input):
            if self.kinds.get(name) == TensorProto.FLOAT:
                new.input[index] = f"{name}.scaled"
                self.tensors[f"{name}.scaled"] = _scaled(f"{name}.scaled", self.weights[name], self.folder)
        return new

    def _operator(self, node: NodeProto) -> None:
        """An operator on integers of 16 bits."""
        new = deepcopy(node)
        for index, name in enumerate(node.input):
            if self.kinds.get(name) == TensorProto.FLOAT:
                new.input[index] = self._constant(name, node.op_type == "LayerNormalization", index)
            elif name and name not in self.kinds:
                new.input[index] = self._read(name)
        for index, name in enumerate(node.output):
            new.output[index] = self._typed(f"{name}.exact", self.shapes[name])
        self.nodes.append(new)
        for name in node.output:
            self._pair(f"{name}.exact", name, self._wide(name), name, self.shapes[name])
            self.integers[name] = name

    def _linear(self, linear: Linear) -> None:
        name, source, output = linear.name, linear.activation, self.outputs[linear.name]
        rows, columns = self.shapes[source], self.shapes[output]
        pixels = source in self.pixels
        if pixels:
            read = np.float32(1 / PIXEL_SCALE / 256), np.zeros((), np.uint16)  # 65280 is a pixel of 255
        elif self.narrow:
            read = _parameters(self.given[source], "uint8")
        else:
            read = self._wide(source)
        value = source if pixels else self._read(source)
        if pixels or self.narrow:
            value = self._pair(value, f"{name}.input", read, f"{name}.input", rows)
        if len(rows) > 2:
            flat = math.prod(rows[:-1]), rows[-1]
            value = self._reshape(value, f"{name}.rows", flat)
            value = self._pair(value, f"{name}.rows", read, f"{name}.rows", flat)
        product = self._typed(f"{name}.product", (math.prod(columns[:-1]), columns[-1]))
        inputs = [value, *self._weights(linear, read[0], PIXEL_SCALE if pixels else 1.0)]
        self.nodes.append(helper.make_node("Gemm", inputs, [product], name=linear.node))
        small = self.narrow and not pixels
        given = _parameters(self.given[output], "uint8") if small else self._wide(output)
        if len(columns) > 2:
            flat = math.prod(columns[:-1]), columns[-1]
            value = self._pair(product, f"{name}.product", given, f"{name}.product.dequantized", flat)
            product = self._reshape(value, f"{name}.output", columns)
        if small:
            value = self._pair(product, f"{name}.output", given, f"{name}.output", columns)
            self._pair(value, output, self._wide(output), output, columns)
        else:
            self._pair(product, output, given, output, columns)
        self.integers[output] = output

    def _weights(self, linear: Linear, read: np.float32, factor: float) -> list[str]:
        """Weights and bias of a linear behind DequantizeLinear; `read`: the scale of its input."""
        scales = np.array(self.plans[linear.name].weight_scales, np.float32)
        if linear.bias is None:
            bias = np.zeros(len(scales), np.float32)
        else:
            bias = np.asarray(self.weights[linear.bias], np.float32)
        scales = np.maximum(scales, np.abs(bias) / (LARGEST_BIAS * float(read) * factor)).astype(np.float32)
        integers = numeric.quantize_weights(np.asarray(self.weights[linear.weight], np.float32), scales)
        scales = (scales * np.float32(factor)).astype(np.float32)
        made = [self._dequantized(linear.weight, integers, scales, axis=1)]
        if linear.bias is not None:
            units = (scales.astype(np.float64) * float(read)).astype(np.float32)
            made.append(
                self._dequantized(linear.bias, np.rint(bias / units.astype(np.float64)), units, np.int32, axis=0)
            )
        return made

    def _constant(self, name: str, norm: bool, index: int) -> str:
        """A float constant of an operator as integers: int16 and int32 for a LayerNorm's weight and bias."""
        values = np.asarray(self.weights[name], np.float32)
        largest = float(np.abs(values).max(initial=0)) or 1.0
        if norm:
            kind, most = (np.int16, 32767.0) if index == 1 else (np.int32, LARGEST_BIAS)
            scale = np.float32(largest / most)
            return self._dequantized(name, np.rint(values / np.float64(scale)), scale, kind)
        whole = Range(min(0.0, float(values.min())), max(0.0, float(values.max())), "constant")
        scale, zero = _parameters(whole, "uint16")
        integers = np.clip(np.rint(values / scale) + zero, *INTEGERS["uint16"])
        return self._dequantized(name, integers, scale, np.uint16, zero=zero)

    def _dequantized(
        self,
        name: str,
        integers: npt.NDArray[Any],
        scale: npt.ArrayLike,
        kind: type[np.generic] = np.int8,
        zero: npt.ArrayLike = 0,
        axis: int | None = None,
    ) -> str:
        """A constant behind DequantizeLinear; a scale for each entry of an axis, or one for all."""
        shape = np.shape(scale)
        parts = {
            f"{name}.integers": integers.astype(kind),
            f"{name}.scale": np.asarray(scale, np.float32),
            f"{name}.zero_point": np.broadcast_to(np.asarray(zero), shape).astype(kind),
        }
        result = self._typed(f"{name}.dequantized", np.shape(integers))
        if not parts.keys() <= self.tensors.keys():
            self.tensors |= {part: storage.make(part, value, self.folder) for part, value in parts.items()}
            node = helper.make_node("DequantizeLinear", [*parts], [result], name=result)
            node.attribute.extend([] if axis is None else [helper.make_attribute("axis", axis)])
            self.nodes.append(node)
        return result

    def _read(self, name: str) -> str:
        """The name of a tensor of 16 bits behind DequantizeLinear."""
        if name not in self.integers:
            result = graphs.dequantized_name(name)
            self.integers[name] = self._pair(name, name, self._wide(name), result, self.shapes[name])
        return self.integers[name]

    def _wide(self, name: str) -> Parameters:
        found = self.ranges[name]
        if found.method != "softmax":
            found = Range(found.low * self.headroom, found.high * self.headroom, found.method)
        return _parameters(found, "uint16")

    def _reshape(self, source: str, name: str, shape: Sequence[int]) -> str:
        self.tensors[f"{name}.shape"] = numpy_helper.from_array(np.array(shape, np.int64), f"{name}.shape")
        result = self._typed(f"{name}.exact", shape)
        self.nodes.append(helper.make_node("Reshape", [source, f"{name}.shape"], [result], name=f"{name}.reshape"))
        return result

    def _pair(self, source: str, name: str, parameters: Parameters, result: str, shape: Sequence[int]) -> str:
        """QuantizeLinear and DequantizeLinear of `source`, with constants called after `name`; gives `result`."""
        constants = [f"{name}.scale", f"{name}.zero_point"]
        self.tensors |= {
            c: numpy_helper.from_array(np.asarray(v), c) for c, v in zip(constants, parameters, strict=True)
        }
        kind = helper.np_dtype_to_tensor_dtype(parameters[1].dtype)
        integers = self._typed(f"{name}.quantized", shape, kind)
        self.nodes += [
            helper.make_node("QuantizeLinear", [source, *constants], [integers], name=integers),
            helper.make_node("DequantizeLinear", [integers, *constants], [result], name=f"{name}.dequantize"),
        ]
        return self._typed(result, shape)

    def _typed(self, name: str, shape: Sequence[int], kind: int = TensorProto.FLOAT) -> str:
        if name not in self.shapes:
            self.shapes[name] = tuple(shape)
            self.types.append(helper.make_tensor_value_info(name, kind, shape))
        return name


Parameters = tuple[np.float32, npt.NDArray[Any]]
"""Scale, and zero point in the type of the integers."""


def _parameters(found: Range, scheme: ActivationScheme) -> Parameters:
    scale, zero = found.parameters(scheme)
    return np.float32(scale), np.array(zero, scheme)
