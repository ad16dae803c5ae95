"""Translates the canonical graph to an ML program: one method per operator.

The builder is a parameter, so that this file does not import the vendor's package. Values are float16, except where
pinned to float32; tensors have a rank of 5 at most, like those of the canonical graph.
Letters: B clips, N tokens, D width, h heads, d = D / h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edgetube.calibration import graphs, storage
from edgetube.errors import InputError, SpecError
from edgetube.export.float16 import PIXEL_SCALE
from edgetube.export.statistics import attribute, bias_of, byte_casts, tensor_shapes
from edgetube.mlpackage import label as label

Array = npt.NDArray[Any]
Var = Any
"""A value of the program under construction, of the builder's type."""

Weight = Callable[[str, Array, float], Var]
"""(name, float32 weight with its output channels first, unit) -> constant of the program. The linear's input is divided
by `unit`, and the given weight is already multiplied by it: `PIXEL_SCALE` for pixels, else 1."""

Activation = Callable[[str, Var, float], Var]
"""(name of the weight, input of the linear, unit as above) -> quantised input."""

Bias = Callable[[str, Array], Array]
"""(name of the weight, float32 bias) -> bias, corrected for the error of the stored weight."""


GELU_MODES = {b"none": "EXACT", b"tanh": "TANH_APPROXIMATION"}
"""What ONNX calls `approximate` of a GELU."""

SMALLEST_EPSILON = 2.0**-24
"""Of a LayerNorm in float16, the smallest number there is. 1e-12, which ViT and VideoMAE have, would become 0, and a
token without variance not a number; where the variance is above 1e-3, 2^-24 moves no float16 number."""


class Lowering:
    """Translates one graph into the function under construction.

    Args:
        mb: the builder.
        model: a canonical graph.
        weight: makes the constant of a weight, in the target's storage.
        pins: globs of tensor names (`blocks.3.norm1`, `blocks.*.norm?`) that are computed in float32.
        quantise: quantises the input of a linear in float16; none by default.
        correct: corrects the bias of such a linear; none by default.

    Raises:
        InputError: a pin matches no tensor.
        SpecError: an operator has no translation; says which.
    """

    def __init__(
        self,
        mb: Any,
        model: onnx.ModelProto,
        weight: Weight,
        pins: Sequence[str] = (),
        quantise: Activation | None = None,
        correct: Bias | None = None,
    ) -> None:
        self.mb, self.weight, self.quantise = mb, weight, quantise or (lambda _, x, __: x)
        self.correct = correct or (lambda _, array: array)
        self.nodes, self.output = list(model.graph.node), model.graph.output[0].name
        if unknown := sorted({node.op_type for node in self.nodes} - set(self.operators())):
            raise SpecError(
                f"no translation for the operator {', '.join(unknown)}; there are {', '.join(self.operators())}"
            )
        self.shapes = tensor_shapes(model)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.uses = graphs.readers(model.graph.node)
        self.pinned = self._pinned(pins)
        self.pixels = {node.output[0] for node in byte_casts(model)}
        self.scaled = {name for pixels in self.pixels for node in self.uses[pixels] for name in node.input[1:]}
        self.values: dict[str, Var] = {}
        self.narrowed: dict[tuple[str, str], Var] = {}
        self.matrices: dict[tuple[str, str], Var] = {}

    @classmethod
    def operators(cls) -> list[str]:
        """The supported operators."""
        return sorted(name.removeprefix("on_") for name in dir(cls) if name.startswith("on_"))

    def run(self, frames: Var) -> Var:
        """Translate the whole graph on the input `frames`; the value of its output, float16 unless pinned."""
        self.values["frames"] = frames
        for node in self.nodes:
            if node.output[0] not in self.values:  # a bias may have been folded into its matrix product
                getattr(self, f"on_{node.op_type}")(node)
        return self.take(self.output)

    def _pinned(self, pins: Sequence[str]) -> set[str]:
        outputs = [name for node in self.nodes for name in node.output]
        for pin in pins:
            if not any(fnmatchcase(name, pin) for name in outputs):
                raise InputError(f"fp32={pin!r} matches no tensor of the graph; it has {', '.join(outputs[:40])} ...")
        return {name for name in outputs if any(fnmatchcase(name, pin) for pin in pins)}

    # values

    def width(self, *nodes: onnx.NodeProto) -> str:
        """The float type of one operation, made of `nodes`."""
        return "fp32" if any(name in self.pinned for node in nodes for name in node.output) else "fp16"

    def label(self, name: str) -> str:
        """A tensor's name in the program; a float16 output gets a suffix, since its float32 cast keeps the name."""
        return f"{label(name)}_fp16" if name == self.output and name not in self.pinned else label(name)

    def take(self, name: str, width: str | None = None) -> Var:
        """The value of a tensor; with `width`, floats are cast to it."""
        if name not in self.values:
            self.values[name] = self.constant(name, width)
        value = self.values[name]
        if width is None or width_of(value) not in ("fp16", "fp32") or width_of(value) == width:
            return value
        if (name, width) not in self.narrowed:
            self.narrowed[name, width] = self.mb.cast(x=value, dtype=width, name=f"{self.label(name)}_{width}")
        return self.narrowed[name, width]

    def constant(self, name: str, width: str | None) -> Var:
        """An initializer as a constant; not for weights of matrix products, see `matrix`."""
        array = self.array(name)
        if array.dtype == np.float32:
            array = narrow(name, array, width or "fp16")
        return self.mb.const(val=array.astype(np.int32) if array.dtype == np.int64 else array, name=self.label(name))

    def array(self, name: str) -> Array:
        """The values of an initializer; tube weights are multiplied by `PIXEL_SCALE`."""
        array: Array = np.asarray(storage.read(self.constants[name]))
        return array * np.float32(PIXEL_SCALE) if name in self.scaled else array

    def integers(self, name: str) -> list[int]:
        return [int(i) for i in self.array(name).reshape(-1)]

    def put(self, node: onnx.NodeProto, value: Var) -> None:
        self.values[node.output[0]] = value

    def simple(self, node: onnx.NodeProto, operation: str, **arguments: Any) -> None:
        """An operator with one floating input."""
        x = self.take(node.input[0], self.width(node))
        self.put(node, getattr(self.mb, operation)(x=x, name=self.label(node.output[0]), **arguments))

    def move(self, node: onnx.NodeProto, operation: str, **arguments: Any) -> None:
        """An operator that only moves data: it keeps the type of its input."""
        x = self.take(node.input[0])
        self.put(node, getattr(self.mb, operation)(x=x, name=self.label(node.output[0]), **arguments))

    # data movement

    def on_Reshape(self, node: onnx.NodeProto) -> None:
        self.move(node, "reshape", shape=self.shapes[node.output[0]])

    def on_Transpose(self, node: onnx.NodeProto) -> None:
        self.move(node, "transpose", perm=attribute(node, "perm"))

    def on_Unsqueeze(self, node: onnx.NodeProto) -> None:
        self.move(node, "expand_dims", axes=self.integers(node.input[1]))

    def on_Squeeze(self, node: onnx.NodeProto) -> None:
        self.move(node, "squeeze", axes=self.integers(node.input[1]))

    def on_Slice(self, node: onnx.NodeProto) -> None:
        shape = self.shapes[node.input[0]]
        begin, end, stride = [0] * len(shape), list(shape), [1] * len(shape)
        starts, ends, axes, steps = (self.integers(name) for name in node.input[1:5])
        for start, stop, axis, step in zip(starts, ends, axes, steps, strict=True):
            begin[axis], end[axis], stride[axis] = start, min(stop, shape[axis]), step
        self.move(node, "slice_by_index", begin=begin, end=end, stride=stride)

    def on_Gather(self, node: onnx.NodeProto) -> None:
        indices = self.take(node.input[1])
        self.move(node, "gather", indices=indices, axis=attribute(node, "axis"))

    def on_Split(self, node: onnx.NodeProto) -> None:
        x, axis = self.take(node.input[0]), attribute(node, "axis")
        sizes = [self.shapes[name][axis] for name in node.output]
        parts = self.mb.split(x=x, axis=axis, name=self.label(node.name), **sections(sizes))
        self.values.update(zip(node.output, parts, strict=True))

    def on_Concat(self, node: onnx.NodeProto) -> None:
        values = self.alike(*node.input)
        self.put(node, self.mb.concat(values=values, axis=attribute(node, "axis"), name=self.label(node.output[0])))

    def on_Where(self, node: onnx.NodeProto) -> None:
        """`select` where the shapes are equal; it does not broadcast. Else, of integers, (a - b) condition + b."""
        name, condition = self.label(node.output[0]), self.take(node.input[0])
        a, b = self.alike(*node.input[1:])
        if len({self.shapes[each] for each in node.input}) == 1:
            self.put(node, self.mb.select(cond=condition, a=a, b=b, name=name))
            return
        if width_of(a) != "int32":
            raise SpecError(f"{node.name}: only integers are chosen from with broadcasting")
        chosen = self.mb.cast(x=condition, dtype="int32", name=f"{name}_chosen")
        more = self.mb.mul(x=chosen, y=self.mb.sub(x=a, y=b, name=f"{name}_distance"), name=f"{name}_more")
        self.put(node, self.mb.add(x=more, y=b, name=name))

    def alike(self, *names: str) -> list[Var]:
        """Values as they are, where all have one type; else in float32."""
        values = [self.take(name) for name in names]
        return values if len({*map(width_of, values)}) == 1 else [self.take(name, "fp32") for name in names]

    # arithmetic

    def on_Cast(self, node: onnx.NodeProto) -> None:
        """Cast pixels to float16 and divide them by 256, which is exact: see `PIXEL_SCALE`."""
        name = self.label(node.output[0])
        x = self.take(node.input[0])
        if node.output[0] not in self.pixels:
            dtype = self.width(node) if attribute(node, "to") == onnx.TensorProto.FLOAT else "int32"
            self.put(node, self.mb.cast(x=x, dtype=dtype, name=name))
            return
        if width_of(x) == "int32":
            x = self.mb.cast(x=x, dtype="fp16", name=f"{name}_fp16")
        self.put(node, self.mb.mul(x=x, y=np.float16(1 / PIXEL_SCALE), name=name))

    def on_Add(self, node: onnx.NodeProto) -> None:
        self._binary(node, "add")

    def on_Sub(self, node: onnx.NodeProto) -> None:
        self._binary(node, "sub")

    def on_Mul(self, node: onnx.NodeProto) -> None:
        self._binary(node, "mul")

    def on_Div(self, node: onnx.NodeProto) -> None:
        self._binary(node, "real_div")

    def on_Neg(self, node: onnx.NodeProto) -> None:
        x = self.take(node.input[0], self.width(node))
        self.put(node, self.mb.mul(x=x, y=narrow("-1", np.float32(-1), width_of(x)), name=self.label(node.output[0])))

    def on_Log(self, node: onnx.NodeProto) -> None:
        epsilon = narrow("epsilon", np.float32(SMALLEST_EPSILON), self.width(node))
        self.simple(node, "log", epsilon=epsilon)

    def on_Equal(self, node: onnx.NodeProto) -> None:
        self.pair(node, "equal")

    def on_Greater(self, node: onnx.NodeProto) -> None:
        self.pair(node, "greater")

    def on_Less(self, node: onnx.NodeProto) -> None:
        self.pair(node, "less")

    def on_And(self, node: onnx.NodeProto) -> None:
        self.pair(node, "logical_and")

    def on_Or(self, node: onnx.NodeProto) -> None:
        self.pair(node, "logical_or")

    def pair(self, node: onnx.NodeProto, operation: str) -> None:
        """An operator whose answer is a truth value: it reads both operands as they are."""
        x, y = self.alike(*node.input)
        self.put(node, getattr(self.mb, operation)(x=x, y=y, name=self.label(node.output[0])))

    def _binary(self, node: onnx.NodeProto, operation: str) -> None:
        x, y = (self.take(name, self.width(node)) for name in node.input)
        self.put(node, getattr(self.mb, operation)(x=x, y=y, name=self.label(node.output[0])))

    def on_MatMul(self, node: onnx.NodeProto) -> None:
        if node.input[1] in self.constants and len(self.shapes[node.input[1]]) == 2:
            self._linear(node)
            return
        x, y = (self.take(name, self.width(node)) for name in node.input)
        self.put(node, self.mb.matmul(x=x, y=y, name=self.label(node.output[0])))

    def _linear(self, node: onnx.NodeProto) -> None:
        """x @ W + b in one operation; W is stored (outputs, inputs)."""
        bias, end = self._bias(node)
        width = self.width(node, end)
        x = self.activation(node, self.take(node.input[0], width))
        weight = self.matrix(node, np.ascontiguousarray(self.array(node.input[1]).T), width)
        arguments = {} if bias is None else {"bias": self.vector(node, bias, width)}
        value = self.mb.linear(x=x, weight=weight, name=self.label(end.output[0]), **arguments)
        self.values[node.output[0]] = self.values[end.output[0]] = value

    def _bias(self, node: onnx.NodeProto) -> tuple[str | None, onnx.NodeProto]:
        return bias_of(node, self.uses[node.output[0]], self.shapes, self.constants)

    def vector(self, node: onnx.NodeProto, bias: str, width: str) -> Array:
        """The bias of a product, corrected unless the product is pinned; after its `matrix`."""
        array = self.array(bias)
        return narrow(bias, array if width == "fp32" else self.correct(node.input[1], array), width)

    def activation(self, node: onnx.NodeProto, x: Var) -> Var:
        """The input of a product, quantised unless the product is pinned."""
        return x if width_of(x) == "fp32" else self.quantise(node.input[1], x, self.unit(node))

    def unit(self, node: onnx.NodeProto) -> float:
        """The number that the input of a product is divided by."""
        return float(PIXEL_SCALE) if node.input[0] in self.pixels else 1.0

    def matrix(self, node: onnx.NodeProto, array: Array, width: str) -> Var:
        """The weight of a product: in the target's storage, or float32 where the product is pinned."""
        name = node.input[1]
        if (name, width) not in self.matrices:  # the neighbours of a space-to-depth tube share one
            wide = width == "fp32"
            matrix = self.mb.const(val=array, name=label(name)) if wide else self.weight(name, array, self.unit(node))
            self.matrices[name, width] = matrix
        return self.matrices[name, width]

    def on_Conv(self, node: onnx.NodeProto) -> None:
        if len(node.input) > 2 or any(attribute(node, "pads")) or attribute(node, "group") != 1:
            raise SpecError(f"{node.name}: only convolutions without bias, padding and groups are translated")
        width = self.width(node)
        x = self.take(node.input[0], width)
        weight = self.matrix(node, self.array(node.input[1]), width)
        arguments = {"strides": attribute(node, "strides"), "pad_type": "valid"}
        self.put(node, self.mb.conv(x=x, weight=weight, name=self.label(node.output[0]), **arguments))

    def on_LayerNormalization(self, node: onnx.NodeProto) -> None:
        self.simple(node, "layer_norm", axes=[-1], **self.affine(node))

    def affine(self, node: onnx.NodeProto) -> dict[str, Any]:
        """gamma, beta and epsilon of a LayerNorm; all have the type of its input, see `SMALLEST_EPSILON`."""
        gamma, beta = (narrow(name, self.array(name), self.width(node)) for name in node.input[1:3])
        epsilon = attribute(node, "epsilon")
        narrowed = np.float32(epsilon) if self.width(node) == "fp32" else np.float16(max(epsilon, SMALLEST_EPSILON))
        return {"gamma": gamma, "beta": beta, "epsilon": narrowed}

    def on_Softmax(self, node: onnx.NodeProto) -> None:
        self.simple(node, "softmax", axis=attribute(node, "axis"))

    def on_Gelu(self, node: onnx.NodeProto) -> None:
        self.elementwise(node, "gelu", mode=GELU_MODES[attribute(node, "approximate")])

    def on_Sigmoid(self, node: onnx.NodeProto) -> None:
        self.elementwise(node, "sigmoid")

    def elementwise(self, node: onnx.NodeProto, operation: str, **arguments: Any) -> None:
        """A function of each number, in whatever layout."""
        self.simple(node, operation, **arguments)

    def on_ReduceMean(self, node: onnx.NodeProto) -> None:
        self._reduce(node, "reduce_mean")

    def on_ReduceMax(self, node: onnx.NodeProto) -> None:
        self._reduce(node, "reduce_max")

    def on_ReduceMin(self, node: onnx.NodeProto) -> None:
        self._reduce(node, "reduce_min")

    def on_ReduceSum(self, node: onnx.NodeProto) -> None:
        self._reduce(node, "reduce_sum")

    def _reduce(self, node: onnx.NodeProto, operation: str) -> None:
        keep = bool(attribute(node, "keepdims"))
        self.simple(node, operation, axes=self.integers(node.input[1]), keep_dims=keep)


class NeuralEngineLowering(Lowering):
    """The layout for Apple's neural engine: tokens are (B, D, 1, N), linears are 1x1 convolutions.

    Attention runs one head at a time on (B, d, 1, N) with products over other axes than the last, so that only the
    keys are transposed. The principles are those of Apple's "Deploying Transformers on the Apple Neural Engine"
    (2022). Tensors that are not tokens, as in the tokenizer and the pooling, are translated as in `Lowering`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.columns: dict[str, Var] = {}
        """Tensors (B, N, D) in the layout (B, D, 1, N)."""
        self.heads: dict[str, list[Var]] = {}
        """Tensors of h heads, whatever the order of their axes, as h of (B, d, 1, N)."""
        self.orders: dict[str, str] = {}
        """The order of their axes behind B in the graph: `nhd`, `hnd` or `hdn`."""
        self.tables: dict[tuple[str, str], Var] = {}
        """Constants that broadcast with either, by name and width."""

    def take(self, name: str, width: str | None = None) -> Var:
        if name not in self.values and name in self.columns:
            rows = self.mb.squeeze(x=self.columns[name], axes=[2], name=f"{self.label(name)}_rows")
            self.values[name] = self.mb.transpose(x=rows, perm=[0, 2, 1], name=f"{self.label(name)}_plain")
        if name not in self.values and name in self.heads:
            self.values[name] = self._joined(name)
        return super().take(name, width)

    def _joined(self, name: str) -> Var:
        """Heads as one tensor, as it is in the graph."""
        heads, order = self.heads[name], self.orders[name]
        sizes = dict(zip(order, self.shapes[name][1:], strict=True))
        whole = self.mb.concat(values=heads, axis=1) if len(heads) > 1 else heads[0]
        shape = (self.shapes[name][0], *(sizes[axis] for axis in "hdn"))
        split = self.mb.reshape(x=whole, shape=shape)
        perm = [0, *("hdn".index(axis) + 1 for axis in order)]
        return self.mb.transpose(x=split, perm=perm, name=f"{self.label(name)}_plain")

    def column(self, name: str, width: str) -> Var:
        """A tensor (B, N, D) in the layout (B, D, 1, N)."""
        if name not in self.columns:
            rows = self.mb.transpose(x=self.take(name), perm=[0, 2, 1], name=f"{self.label(name)}_columns")
            self.columns[name] = self.mb.expand_dims(x=rows, axes=[2], name=f"{self.label(name)}_column")
        return self._cast(self.columns[name], width)

    def _cast(self, value: Var, width: str) -> Var:
        return value if width_of(value) == width else self.mb.cast(x=value, dtype=width)

    def run(self, frames: Var) -> Var:
        self.values["frames"] = frames
        for node in self.nodes:
            if not any(node.output[0] in known for known in (self.values, self.columns, self.heads)):
                getattr(self, f"on_{node.op_type}")(node)
        return self.take(self.output)

    def on_LayerNormalization(self, node: onnx.NodeProto) -> None:
        if len(self.shapes[node.input[0]]) != 3:  # of the pooled vector
            super().on_LayerNormalization(node)
            return
        x = self.column(node.input[0], self.width(node))
        self.columns[node.output[0]] = self.mb.layer_norm(
            x=x, axes=[1], name=self.label(node.output[0]), **self.affine(node)
        )

    def elementwise(self, node: onnx.NodeProto, operation: str, **arguments: Any) -> None:
        if node.input[0] not in self.columns:
            super().elementwise(node, operation, **arguments)
            return
        x = self.column(node.input[0], self.width(node))
        self.columns[node.output[0]] = getattr(self.mb, operation)(x=x, name=self.label(node.output[0]), **arguments)

    def _binary(self, node: onnx.NodeProto, operation: str) -> None:
        if node.input[0] in self.heads:
            self._binary_of_heads(node, operation)
            return
        if not any(name in self.columns for name in node.input) or not all(map(self._has_column, node.input)):
            super()._binary(node, operation)
            return
        x, y = (self._operand(name, self.width(node)) for name in node.input)
        self.columns[node.output[0]] = getattr(self.mb, operation)(x=x, y=y, name=self.label(node.output[0]))

    def _binary_of_heads(self, node: onnx.NodeProto, operation: str) -> None:
        """Heads with heads, with a table of each token's rotation, (N, d) or (d, N), or with what all heads share."""
        first, second = node.input
        width = self.width(node)
        left = [self._cast(x, width) for x in self.heads[first]]
        if second in self.heads:
            right = [self._cast(x, width) for x in self.heads[second]]
        elif second not in self.constants:
            order = self.orders[first]  # (B, d or 1, 1, N or 1) of what has an axis of one head
            shared = self.mb.transpose(x=self.take(second, width), perm=[0, *(order.index(a) + 1 for a in "dhn")])
            right = [shared] * len(left)
        else:
            table = self.array(second) if self.orders[first] == "hdn" else self.array(second).T  # (d, N)
            right = [self._table(second, table[None, :, None], width)] * len(left)
        pairs = zip(left, right, strict=True)
        self._put_heads(node.output[0], [getattr(self.mb, operation)(x=x, y=y) for x, y in pairs], first)

    def _put_heads(self, name: str, values: list[Var], source: str) -> None:
        """Heads made of those called `source`, with axes in the same order."""
        self.heads[name], self.orders[name] = values, self.orders[source]

    def _has_column(self, name: str) -> bool:
        return name in self.columns or (name in self.constants and len(self.shapes[name]) <= 1)

    def _operand(self, name: str, width: str) -> Var:
        """A tensor in the layout (B, D, 1, N), or a constant (D,), (1,) or () that broadcasts with it."""
        if name in self.columns:
            return self.column(name, width)
        if not self.shapes[name]:
            return self.take(name, width)
        return self._table(name, self.array(name)[:, None, None], width)

    def _table(self, name: str, values: Array, width: str) -> Var:
        if (name, width) not in self.tables:
            narrowed = narrow(name, np.ascontiguousarray(values), width)
            known = any(name == other for other, _ in self.tables)
            self.tables[name, width] = self.mb.const(
                val=narrowed, name=f"{label(name)}_{width}" if known else label(name)
            )
        return self.tables[name, width]

    def _linear(self, node: onnx.NodeProto) -> None:
        if node.input[0] not in self.columns:
            super()._linear(node)
            return
        bias, end = self._bias(node)
        width = self.width(node, end)
        x = self.activation(node, self.column(node.input[0], width))
        weight = self.matrix(node, np.ascontiguousarray(self.array(node.input[1]).T)[:, :, None, None], width)
        arguments = {} if bias is None else {"bias": self.vector(node, bias, width)}
        value = self.mb.conv(x=x, weight=weight, pad_type="valid", name=self.label(end.output[0]), **arguments)
        self.columns[node.output[0]] = self.columns[end.output[0]] = value

    def on_Split(self, node: onnx.NodeProto) -> None:
        if node.input[0] in self.heads:
            parts = [self.mb.split(x=x, num_splits=len(node.output), axis=1) for x in self.heads[node.input[0]]]
            for name, values in zip(node.output, zip(*parts, strict=True), strict=True):
                self._put_heads(name, list(values), node.input[0])
            return
        shape, axis = self.shapes[node.input[0]], attribute(node, "axis")
        if node.input[0] not in self.columns or axis % len(shape) != len(shape) - 1:  # columns split their channels
            super().on_Split(node)
            return
        sizes = sections([self.shapes[name][-1] for name in node.output])
        parts = self.mb.split(x=self.columns[node.input[0]], axis=1, name=self.label(node.name), **sizes)
        self.columns.update(zip(node.output, parts, strict=True))

    def on_Concat(self, node: onnx.NodeProto) -> None:
        """Of heads, their channels: no more than rotary positions need."""
        if node.input[0] not in self.heads:
            super().on_Concat(node)
            return
        values = [self.mb.concat(values=parts, axis=1) for parts in zip(*map(self.heads.get, node.input), strict=True)]
        self._put_heads(node.output[0], values, node.input[0])

    def on_Reshape(self, node: onnx.NodeProto) -> None:
        """(B, N, D) to (B, N, h, d) is a split of the columns, and back a concatenation of the heads."""
        source, target = self.shapes[node.input[0]], self.shapes[node.output[0]]
        if node.input[0] in self.columns and len(target) == 4 and target[:2] == source[:2]:
            x = self.columns[node.input[0]]
            parts = self.mb.split(x=x, num_splits=target[2], axis=1) if target[2] > 1 else [x]
            self.heads[node.output[0]], self.orders[node.output[0]] = list(parts), "nhd"
        elif node.input[0] in self.heads:
            heads = self.heads[node.input[0]]
            whole = (
                self.mb.concat(values=heads, axis=1, name=self.label(node.output[0])) if len(heads) > 1 else heads[0]
            )
            self.columns[node.output[0]] = whole
        else:
            super().on_Reshape(node)

    def on_Transpose(self, node: onnx.NodeProto) -> None:
        if node.input[0] not in self.heads:
            super().on_Transpose(node)
            return
        order = self.orders[node.input[0]]
        self.heads[node.output[0]] = self.heads[node.input[0]]
        self.orders[node.output[0]] = "".join(order[axis - 1] for axis in attribute(node, "perm")[1:])

    def on_MatMul(self, node: onnx.NodeProto) -> None:
        """Scores k^T q as (B, N keys, 1, N queries), context v weights as (B, d, 1, N queries), head by head."""
        if not all(name in self.heads for name in node.input):
            super().on_MatMul(node)
            return
        width = self.width(node)
        left, right = ([self._cast(x, width) for x in self.heads[name]] for name in node.input)
        scores = all(name not in self.softmaxes for name in node.input)
        products = []
        for a, b in zip(left, right, strict=True):
            first, second = (self.mb.transpose(x=b, perm=[0, 3, 2, 1]), a) if scores else (b, a)
            products.append(self.mb.einsum(values=(first, second), equation="nchw,nwhu->nchu"))
        self.heads[node.output[0]], self.orders[node.output[0]] = products, "hnd"

    @property
    def softmaxes(self) -> set[str]:
        return {node.output[0] for node in self.nodes if node.op_type == "Softmax"}

    def on_Softmax(self, node: onnx.NodeProto) -> None:
        if node.input[0] not in self.heads:
            super().on_Softmax(node)
            return
        width = self.width(node)
        scores = [self._cast(x, width) for x in self.heads[node.input[0]]]
        self._put_heads(node.output[0], [self.mb.softmax(x=x, axis=1) for x in scores], node.input[0])


def width_of(value: Var) -> str:
    """The type of a value: `fp16`, `fp32`, `int32`, which other integers count as, or `bool`."""
    name = str(value.dtype.__name__)
    return name if name in ("fp16", "fp32", "bool") else "int32"


def sections(sizes: Sequence[int]) -> dict[str, Any]:
    """Arguments of a split into parts of these sizes."""
    return {"num_splits": len(sizes)} if len({*sizes}) == 1 else {"split_sizes": list(sizes)}


def narrow(name: str, array: Array, width: str) -> Array:
    """A float32 array in `width`, "fp16" or "fp32".

    Raises:
        SpecError: a value exceeds float16.
    """
    if width == "fp32":
        return array
    if (largest := float(np.abs(array).max(initial=0))) > float(np.finfo(np.float16).max):
        raise SpecError(f"{name} reaches {largest:.3g}; float16 ends at 65504: pin what uses it to float32")
    return array.astype(np.float16)
