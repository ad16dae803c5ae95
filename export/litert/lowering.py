"""Translates the canonical graph to a TFLite graph: one method per operator.

Tensors keep the names of the canonical graph, so that a runtime can show them; what a translation adds is named after
the tensor that it is for, with a suffix. Values are float32 and of rank 5 at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from ai_edge_litert import schema_py_generated as schema
from onnx import helper

from edgetube.calibration import graphs, numeric, storage
from edgetube.calibration.table import LinearPlan
from edgetube.errors import SpecError
from edgetube.export.float16 import PIXEL_SCALE
from edgetube.export.statistics import attribute, bias_of, byte_casts, tensor_shapes
from edgetube.runtimes.litert.flatbuffer import HYBRID, TYPES, Writer

Array = npt.NDArray[Any]

TO_CHANNELS_LAST, FROM_CHANNELS_LAST = [0, 2, 3, 1], [0, 3, 1, 2]
"""Images (B, C, H, W) to (B, H, W, C) and back."""

CASTS = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT32: "int32"}
"""Types that a graph casts to, in numpy's words."""


class Lowering:
    """Translates one float graph.

    Args:
        model: a canonical graph.
        half: store constants of rank 2 and above as float16, behind a DEQUANTIZE to float32.
        plans: of the linears whose weights are stored, and multiplied, as int8.

    Attributes:
        integer_products: multiply-accumulates of each product in integers.

    Raises:
        SpecError: an operator has no translation, says which layer has it; a weight exceeds float16; or the constants
            exceed what one file can hold.
    """

    def __init__(self, model: onnx.ModelProto, half: bool = False, plans: Sequence[LinearPlan] = ()) -> None:
        self.model, self.half, self.plans = model, half, {plan.weight: plan for plan in plans}
        self.nodes = list(model.graph.node)
        for node in self.nodes:
            if node.op_type not in self.operators():
                raise SpecError(
                    f"{node.name}: no translation for the operator {node.op_type}; there are "
                    f"{', '.join(self.operators())}"
                )
        self.writer = Writer(model.doc_string)
        self.shapes = tensor_shapes(model)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.uses = graphs.readers(model.graph.node)
        casts = {node.output[0] for node in byte_casts(model)}
        self.scaled = {name for node in self.nodes if node.input[0] in casts for name in node.input[1:]} if half else {}
        self.integer_products: list[int] = []
        self.values: dict[str, int] = {}
        self.types: dict[str, str] = {}

    @classmethod
    def operators(cls) -> list[str]:
        """The supported operators."""
        return sorted(name.removeprefix("on_") for name in dir(cls) if name.startswith("on_"))

    def run(self) -> Writer:
        """Translate the whole graph."""
        (frames,) = self.model.graph.input
        self.put(frames.name, dtype=helper.tensor_dtype_to_np_dtype(frames.type.tensor_type.elem_type).name)
        for node in self.nodes:
            if node.output[0] not in self.values:  # a bias may have been folded into its matrix product
                getattr(self, f"on_{node.op_type}")(node)
        return self.writer

    # values

    def take(self, name: str) -> int:
        """The index of a tensor."""
        if name not in self.values:
            self.values[name] = self.constant(name, self.array(name))
        return self.values[name]

    def array(self, name: str) -> Array:
        """The values of an initializer; tube weights may be multiplied by `PIXEL_SCALE`."""
        array: Array = np.asarray(storage.read(self.constants[name]))
        return array * np.float32(PIXEL_SCALE) if name in self.scaled else array

    def constant(self, name: str, array: Array) -> int:
        """A constant, float32 for who reads it; whole numbers become int32."""
        if array.dtype == np.int64:
            array = array.astype(np.int32)
        if not (self.half and array.dtype == np.float32 and array.ndim > 1):
            return self.writer.constant(name, array)
        if (largest := float(np.abs(array).max(initial=0))) > float(np.finfo(np.float16).max):
            raise SpecError(f"{name} reaches {largest:.3g}; float16 ends at 65504: export this model to fp32")
        stored = self.writer.constant(f"{name}.fp16", array.astype(np.float16))
        wide = self.writer.tensor(name, array.shape, "float32")
        self.writer.operator("DEQUANTIZE", [stored], [wide], schema.DequantizeOptionsT())
        return wide

    def numbers(self, values: Sequence[int]) -> int:
        """An int32 constant (axes, a shape, a permutation): one per value."""
        name = "int32." + "x".join(map(str, values))
        if name not in self.values:
            self.values[name] = self.writer.constant(name, np.array(values, np.int32))
        return self.values[name]

    def integers(self, name: str) -> list[int]:
        return [int(i) for i in self.array(name).reshape(-1)]

    def put(self, name: str, shape: Sequence[int] | None = None, dtype: str = "float32", **quantised: Any) -> int:
        """Add the tensor that is computed next; its shape is the graph's where it is one of the graph."""
        self.values[name] = self.writer.tensor(name, self.shapes[name] if shape is None else shape, dtype, **quantised)
        self.types[name] = dtype
        return self.values[name]

    def emit(
        self,
        kind: str,
        inputs: Sequence[int],
        name: str,
        options: Any = None,
        shape: Sequence[int] | None = None,
        dtype: str = "float32",
    ) -> int:
        """One operator with one output called `name`, float by default; returns the output."""
        output = self.put(name, shape, dtype)
        self.writer.operator(kind, inputs, [output], options)
        return output

    def move(self, node: onnx.NodeProto, kind: str, inputs: Sequence[int], options: Any) -> None:
        """An operator that only moves data: it keeps the type of its input."""
        output = self.put(node.output[0], dtype=self.type_of(node.input[0]))
        self.writer.operator(kind, [self.take(node.input[0]), *inputs], [output], options)

    def type_of(self, name: str) -> str:
        """Element type of a tensor of the graph, in numpy's words."""
        if name in self.constants and name not in self.types:
            kind = helper.tensor_dtype_to_np_dtype(self.constants[name].data_type).name
            self.types[name] = {"int64": "int32"}.get(kind, kind)
        return self.types[name]

    # data movement

    def on_Reshape(self, node: onnx.NodeProto) -> None:
        options = schema.ReshapeOptionsT()
        shape = self.shapes[node.output[0]]
        options.newShape = np.array(shape, np.int32)
        self.move(node, "RESHAPE", [self.numbers(shape)], options)

    on_Unsqueeze = on_Squeeze = on_Reshape

    def on_Transpose(self, node: onnx.NodeProto) -> None:
        self.move(node, "TRANSPOSE", [self.numbers(attribute(node, "perm"))], schema.TransposeOptionsT())

    def on_Slice(self, node: onnx.NodeProto) -> None:
        shape = self.shapes[node.input[0]]
        begin, end, stride = [0] * len(shape), list(shape), [1] * len(shape)
        starts, ends, axes, steps = (self.integers(name) for name in node.input[1:5])
        for start, stop, axis, step in zip(starts, ends, axes, steps, strict=True):
            if step < 1 or start < 0 or stop < 0:
                raise SpecError(f"{node.name}: slices from the end or backwards are not translated")
            begin[axis], end[axis], stride[axis] = start, min(stop, shape[axis]), step
        if set(stride) == {1}:
            size = self.shapes[node.output[0]]
            self.move(node, "SLICE", [self.numbers(begin), self.numbers(size)], schema.SliceOptionsT())
        else:
            bounds = [self.numbers(values) for values in (begin, end, stride)]
            self.move(node, "STRIDED_SLICE", bounds, schema.StridedSliceOptionsT())

    def on_Gather(self, node: onnx.NodeProto) -> None:
        options = schema.GatherOptionsT()
        options.axis = attribute(node, "axis")
        self.move(node, "GATHER", [self.take(node.input[1])], options)

    def on_Split(self, node: onnx.NodeProto) -> None:
        axis = attribute(node, "axis") % len(self.shapes[node.input[0]])
        x = self.take(node.input[0])
        outputs = [self.put(name, dtype=self.types[node.input[0]]) for name in node.output]
        sizes = [self.shapes[name][axis] for name in node.output]
        if len({*sizes}) > 1:  # SPLIT has a number of parts, and no sizes
            various = schema.SplitVOptionsT()
            various.numSplits = len(sizes)
            self.writer.operator("SPLIT_V", [x, self.numbers(sizes), self.numbers([axis])], outputs, various)
            return
        options = schema.SplitOptionsT()
        options.numSplits = len(sizes)
        self.writer.operator("SPLIT", [self.numbers([axis]), x], outputs, options)

    def on_Concat(self, node: onnx.NodeProto) -> None:
        options = schema.ConcatenationOptionsT()
        options.axis = attribute(node, "axis") % len(self.shapes[node.output[0]])
        inputs = [self.take(name) for name in node.input]
        types = {*map(self.type_of, node.input)}
        assert len(types) == 1, node.name
        self.writer.operator("CONCATENATION", inputs, [self.put(node.output[0], dtype=types.pop())], options)

    # arithmetic

    def on_Cast(self, node: onnx.NodeProto) -> None:
        """Pixels to float32; with float16 weights also divided by 256, which is exact: see `PIXEL_SCALE`."""
        name, x = node.output[0], self.take(node.input[0])
        source, target = self.type_of(node.input[0]), CASTS[attribute(node, "to")]
        options = schema.CastOptionsT()
        options.inDataType, options.outDataType = TYPES[source], TYPES[target]
        if not self.half or source != "uint8":
            self.emit("CAST", [x], name, options, dtype=target)
            return
        wide = self.emit("CAST", [x], f"{name}.bytes", options, self.shapes[name])
        self.emit("MUL", [wide, self.scalar(1 / PIXEL_SCALE)], name, schema.MulOptionsT())

    def scalar(self, value: float) -> int:
        name = f"float32.{np.float32(value)}"
        if name not in self.values:
            self.values[name] = self.writer.constant(name, np.array(value, np.float32))
        return self.values[name]

    def on_Add(self, node: onnx.NodeProto) -> None:
        self.simple(node, "ADD", schema.AddOptionsT())

    def on_Sub(self, node: onnx.NodeProto) -> None:
        self.simple(node, "SUB", schema.SubOptionsT())

    def on_Mul(self, node: onnx.NodeProto) -> None:
        self.simple(node, "MUL", schema.MulOptionsT())

    def on_Div(self, node: onnx.NodeProto) -> None:
        self.simple(node, "DIV", schema.DivOptionsT())

    def on_Neg(self, node: onnx.NodeProto) -> None:
        self.simple(node, "NEG", schema.NegOptionsT())

    def on_Log(self, node: onnx.NodeProto) -> None:
        self.simple(node, "LOG")

    def on_Equal(self, node: onnx.NodeProto) -> None:
        self.simple(node, "EQUAL", schema.EqualOptionsT(), "bool")

    def on_Greater(self, node: onnx.NodeProto) -> None:
        self.simple(node, "GREATER", schema.GreaterOptionsT(), "bool")

    def on_Less(self, node: onnx.NodeProto) -> None:
        self.simple(node, "LESS", schema.LessOptionsT(), "bool")

    def on_And(self, node: onnx.NodeProto) -> None:
        self.simple(node, "LOGICAL_AND", schema.LogicalAndOptionsT(), "bool")

    def on_Or(self, node: onnx.NodeProto) -> None:
        self.simple(node, "LOGICAL_OR", schema.LogicalOrOptionsT(), "bool")

    def on_Where(self, node: onnx.NodeProto) -> None:
        self.simple(node, "SELECT_V2", schema.SelectV2OptionsT(), self.type_of(node.input[1]))

    def simple(self, node: onnx.NodeProto, kind: str, options: Any = None, dtype: str | None = None) -> None:
        """One operator of the same inputs; its output has the type of the first one, or `dtype`."""
        inputs = [self.take(name) for name in node.input]
        self.emit(kind, inputs, node.output[0], options, dtype=dtype or self.type_of(node.input[0]))

    def on_MatMul(self, node: onnx.NodeProto) -> None:
        if node.input[1] in self.constants and len(self.shapes[node.input[1]]) == 2:
            bias, end = bias_of(node, self.uses[node.output[0]], self.shapes, self.constants)
            self.linear(node, bias, end.output[0])
        else:
            self.simple(node, "BATCH_MATMUL", schema.BatchMatMulOptionsT())

    def linear(self, node: onnx.NodeProto, bias: str | None, output: str) -> None:
        """x @ W + b in one operator; W is stored (outputs, inputs)."""
        if (plan := self.plans.get(node.input[1])) is not None:
            self.integer_linear(node, plan, bias, output)
            return
        inputs = [self.take(node.input[0]), self.matrix(node.input[1], (1, 0)), -1 if bias is None else self.take(bias)]
        self.emit("FULLY_CONNECTED", inputs, output, fully_connected())
        self.values[node.output[0]] = self.values[output]

    def integer_linear(self, node: onnx.NodeProto, plan: LinearPlan, bias: str | None, output: str) -> None:
        """x @ W + b whose weight is int8, (outputs, inputs) with a scale per output; x and b are float32.

        This is the form that TFLite calls hybrid: the kernel rounds each row of x to 8 bits, with a scale and a zero
        point of its own, and multiplies integers.
        """
        name, options = f"{plan.weight}.int8", fully_connected()
        options.asymmetricQuantizeInputs = True
        if name not in self.values:
            scales = np.array(plan.weight_scales, np.float32)
            integers = numeric.quantize_weights(np.asarray(self.array(plan.weight), np.float32), scales)
            self.values[name] = self.writer.constant(name, np.ascontiguousarray(integers.T), scales=scales)
        inputs = [self.take(node.input[0]), self.values[name], -1 if bias is None else self.take(bias)]
        self.emit(HYBRID, inputs, output, options)
        self.values[node.output[0]] = self.values[output]
        self.integer_products.append(math.prod(self.shapes[output]) * self.shapes[plan.weight][0])

    def matrix(self, name: str, order: Sequence[int]) -> int:
        """The weight of a linear or a convolution with its axes in another order; several may share one."""
        if name not in self.values:
            self.values[name] = self.constant(name, np.ascontiguousarray(self.array(name).transpose(order)))
        return self.values[name]

    def on_Conv(self, node: onnx.NodeProto) -> None:
        """A convolution of images whose channels are last, between two transpositions."""
        if len(node.input) > 2 or any(attribute(node, "pads")) or attribute(node, "group") != 1:
            raise SpecError(f"{node.name}: only convolutions without bias, padding and groups are translated")
        options = schema.Conv2DOptionsT()
        options.padding = schema.Padding.VALID
        options.strideH, options.strideW = attribute(node, "strides")
        name, (batch, channels, height, width) = node.output[0], self.shapes[node.input[0]]
        x = self.turn(self.take(node.input[0]), TO_CHANNELS_LAST, f"{name}.input", (batch, height, width, channels))
        weight = self.matrix(node.input[1], TO_CHANNELS_LAST)
        bias = self.writer.constant(f"{name}.bias", np.zeros(self.shapes[name][1], np.float32))
        batch, channels, height, width = self.shapes[name]
        result = self.emit("CONV_2D", [x, weight, bias], f"{name}.output", options, (batch, height, width, channels))
        self.turn(result, FROM_CHANNELS_LAST, name, self.shapes[name])

    def turn(self, x: int, order: Sequence[int], name: str, shape: Sequence[int]) -> int:
        return self.emit("TRANSPOSE", [x, self.numbers(order)], name, schema.TransposeOptionsT(), shape)

    def on_LayerNormalization(self, node: onnx.NodeProto) -> None:
        """(x - mean) / sqrt(variance + epsilon) * gamma + beta over the last axis, operator by operator."""
        name, shape = node.output[0], self.shapes[node.output[0]]
        if attribute(node, "axis") not in (-1, len(shape) - 1):
            raise SpecError(f"{node.name}: only LayerNorms over the last axis are translated")
        rows, x = (*shape[:-1], 1), self.take(node.input[0])
        gamma, beta = (self.take(constant) for constant in node.input[1:3])
        mean = self.emit("MEAN", [x, self.numbers([len(shape) - 1])], f"{name}.mean", reducer(True), rows)
        centred = self.emit("SUB", [x, mean], f"{name}.centred", schema.SubOptionsT(), shape)
        square = self.emit("MUL", [centred, centred], f"{name}.square", schema.MulOptionsT(), shape)
        variance = self.emit("MEAN", [square, self.numbers([len(shape) - 1])], f"{name}.variance", reducer(True), rows)
        epsilon = self.scalar(attribute(node, "epsilon"))
        stable = self.emit("ADD", [variance, epsilon], f"{name}.stable", schema.AddOptionsT(), rows)
        factor = self.emit("RSQRT", [stable], f"{name}.factor", None, rows)
        normal = self.emit("MUL", [centred, factor], f"{name}.normal", schema.MulOptionsT(), shape)
        scaled = self.emit("MUL", [normal, gamma], f"{name}.scaled", schema.MulOptionsT(), shape)
        self.emit("ADD", [scaled, beta], name, schema.AddOptionsT())

    def on_Softmax(self, node: onnx.NodeProto) -> None:
        if attribute(node, "axis") not in (-1, len(self.shapes[node.output[0]]) - 1):
            raise SpecError(f"{node.name}: only softmax over the last axis is translated")
        options = schema.SoftmaxOptionsT()
        options.beta = 1.0
        self.simple(node, "SOFTMAX", options)

    def on_Gelu(self, node: onnx.NodeProto) -> None:
        options = schema.GeluOptionsT()
        options.approximate = attribute(node, "approximate") == b"tanh"
        self.simple(node, "GELU", options)

    def on_Sigmoid(self, node: onnx.NodeProto) -> None:
        self.simple(node, "LOGISTIC")

    def on_ReduceMean(self, node: onnx.NodeProto) -> None:
        self.reduce(node, "MEAN")

    def on_ReduceMax(self, node: onnx.NodeProto) -> None:
        self.reduce(node, "REDUCE_MAX")

    def on_ReduceMin(self, node: onnx.NodeProto) -> None:
        self.reduce(node, "REDUCE_MIN")

    def on_ReduceSum(self, node: onnx.NodeProto) -> None:
        self.reduce(node, "SUM")

    def reduce(self, node: onnx.NodeProto, kind: str) -> None:
        rank = len(self.shapes[node.input[0]])
        axes = [axis % rank for axis in self.integers(node.input[1])]
        inputs, options = [self.take(node.input[0]), self.numbers(axes)], reducer(bool(attribute(node, "keepdims")))
        self.emit(kind, inputs, node.output[0], options, dtype=self.type_of(node.input[0]))


def reducer(keep: bool) -> Any:
    options = schema.ReducerOptionsT()
    options.keepDims = keep
    return options


def fully_connected() -> Any:
    """Options of a linear that keeps the leading axes of its input."""
    options = schema.FullyConnectedOptionsT()
    options.keepNumDims = True
    return options
