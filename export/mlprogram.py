"""The canonical graph in the words of an ML program: one method an operator, none that the graph does not have.

The builder comes as a parameter, so that this file reads without the vendor's package. Values are float16 unless the
list of pins says float32; every tensor keeps a rank of five at most, because the canonical graph has no other.
Letters: B clips, N tokens, D width, h heads, d = D / h.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edgetube.errors import InputError, SpecError
from edgetube.export import canonical
from edgetube.mlpackage import label as label

Array = npt.NDArray[Any]
Var = Any
"""A value of the program under construction; the builder's own type."""

Weight = Callable[[str, Array, float], Var]
"""(name, float32 weight with its output channels first, unit) -> constant of the program. What it multiplies is smaller
by `unit` than in the graph, and the weight is given larger by as much: `PIXEL_SCALE` for pixels, 1 for all others."""

Activation = Callable[[str, Var, float], Var]
"""(name of the weight, what it is to multiply, unit as above) -> what it multiplies instead."""


Bias = Callable[[str, Array], Array]
"""(name of the weight, float32 bias) -> the bias that goes with the weight as it is stored."""


class Lowering:
    """Translates one graph into the function that is being built.

    Args:
        mb: the builder.
        model: a canonical graph.
        weight: makes the constant of a matrix; decides its precision.
        pins: globs of tensor names (`blocks.3.norm1`, `blocks.*.norm?`); what makes them computes in float32.
        quantise: what is done to the input of a linear layer that computes in float16, by default nothing.
        correct: what is done to its bias when its weight is stored, by default nothing.

    Raises:
        InputError: a pin matches no tensor.
        SpecError: the graph has an operator that there is no translation for; says which.
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
        self.shapes = canonical.shapes(model)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.uses: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.uses[name].append(node)
        self.pinned = self._pinned(pins)
        self.pixels = {node.output[0] for node in self.nodes if node.op_type == "Cast"}
        self.scaled = {name for pixels in self.pixels for node in self.uses[pixels] for name in node.input[1:]}
        self.values: dict[str, Var] = {}
        self.narrowed: dict[tuple[str, str], Var] = {}
        self.matrices: dict[tuple[str, str], Var] = {}

    @classmethod
    def operators(cls) -> list[str]:
        """The operators that can be translated."""
        return sorted(name.removeprefix("on_") for name in dir(cls) if name.startswith("on_"))

    def run(self, frames: Var) -> Var:
        """Add the whole graph after the input `frames`; the value of its output, float16 unless it is pinned."""
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
        """The type that nodes which become one operation compute in."""
        return "fp32" if any(name in self.pinned for node in nodes for name in node.output) else "fp16"

    def label(self, name: str) -> str:
        """A tensor's name in the program; the graph's output keeps its own for the float32 that leaves it."""
        return f"{label(name)}_fp16" if name == self.output and name not in self.pinned else label(name)

    def take(self, name: str, width: str | None = None) -> Var:
        """The value of a tensor; with `width`, cast to it when it is a float of another width."""
        if name not in self.values:
            self.values[name] = self.constant(name, width)
        value = self.values[name]
        if width is None or width_of(value) in (width, "int32"):
            return value
        if (name, width) not in self.narrowed:
            self.narrowed[name, width] = self.mb.cast(x=value, dtype=width, name=f"{self.label(name)}_{width}")
        return self.narrowed[name, width]

    def constant(self, name: str, width: str | None) -> Var:
        """An initializer as a constant of its own; weights of matrix products do not come here."""
        array = self.array(name)
        if array.dtype == np.float32:
            array = narrow(name, array, width or "fp16")
        return self.mb.const(val=array.astype(np.int32) if array.dtype == np.int64 else array, name=self.label(name))

    def array(self, name: str) -> Array:
        """The numbers of an initializer; tube weights meet pixels that are divided by `PIXEL_SCALE`."""
        array: Array = numpy_helper.to_array(self.constants[name])
        return array * np.float32(canonical.PIXEL_SCALE) if name in self.scaled else array

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
        indices = self.mb.const(val=self.array(node.input[1]).astype(np.int32), name=self.label(node.input[1]))
        self.move(node, "gather", indices=indices, axis=attribute(node, "axis"))

    def on_Split(self, node: onnx.NodeProto) -> None:
        x = self.take(node.input[0])
        parts = self.mb.split(
            x=x, num_splits=len(node.output), axis=attribute(node, "axis"), name=self.label(node.name)
        )
        self.values.update(zip(node.output, parts, strict=True))

    def on_Concat(self, node: onnx.NodeProto) -> None:
        values = [self.take(name) for name in node.input]
        if len({width_of(value) for value in values}) > 1:
            values = [self.take(name, "fp32") for name in node.input]
        self.put(node, self.mb.concat(values=values, axis=attribute(node, "axis"), name=self.label(node.output[0])))

    # arithmetic

    def on_Cast(self, node: onnx.NodeProto) -> None:
        """Pixels become numbers here; divided by 256, exactly, so that the weights stay in float16's normal range."""
        name = self.label(node.output[0])
        x = self.take(node.input[0])
        if width_of(x) == "int32":
            x = self.mb.cast(x=x, dtype="fp16", name=f"{name}_fp16")
        self.put(node, self.mb.mul(x=x, y=np.float16(1 / canonical.PIXEL_SCALE), name=name))

    def on_Add(self, node: onnx.NodeProto) -> None:
        self._binary(node, "add")

    def on_Sub(self, node: onnx.NodeProto) -> None:
        self._binary(node, "sub")

    def on_Mul(self, node: onnx.NodeProto) -> None:
        self._binary(node, "mul")

    def _binary(self, node: onnx.NodeProto, operation: str) -> None:
        x, y = (self.take(name, self.width(node)) for name in node.input)
        self.put(node, getattr(self.mb, operation)(x=x, y=y, name=self.label(node.output[0])))

    def on_MatMul(self, node: onnx.NodeProto) -> None:
        if node.input[1] in self.constants:
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
        """The constant vector that is added to a product and to nothing else, and the node that ends the linear."""
        users = self.uses[node.output[0]]
        if len(users) == 1 and users[0].op_type == "Add":
            for name in users[0].input:
                if name in self.constants and len(self.shapes[name]) == 1:
                    return name, users[0]
        return None, node

    def vector(self, node: onnx.NodeProto, bias: str, width: str) -> Array:
        """The bias of a product whose matrix is made, corrected unless the product is pinned."""
        array = self.array(bias)
        return narrow(bias, array if width == "fp32" else self.correct(node.input[1], array), width)

    def activation(self, node: onnx.NodeProto, x: Var) -> Var:
        """What a product multiplies: quantised as the target says, unless the product is pinned."""
        return x if width_of(x) == "fp32" else self.quantise(node.input[1], x, self.unit(node))

    def unit(self, node: onnx.NodeProto) -> float:
        """By how much the input of a product is smaller than in the graph."""
        return float(canonical.PIXEL_SCALE) if node.input[0] in self.pixels else 1.0

    def matrix(self, node: onnx.NodeProto, array: Array, width: str) -> Var:
        """The weight of a product: compressed as the target says, or plain float32 where the product is pinned."""
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
        """gamma, beta and epsilon of a LayerNorm."""
        kind = np.float32 if self.width(node) == "fp32" else np.float16
        gamma, beta = (narrow(name, self.array(name), self.width(node)) for name in node.input[1:3])
        return {"gamma": gamma, "beta": beta, "epsilon": kind(attribute(node, "epsilon"))}

    def on_Softmax(self, node: onnx.NodeProto) -> None:
        self.simple(node, "softmax", axis=attribute(node, "axis"))

    def on_Gelu(self, node: onnx.NodeProto) -> None:
        self.simple(node, "gelu", mode="EXACT")

    def on_ReduceMean(self, node: onnx.NodeProto) -> None:
        keep = bool(attribute(node, "keepdims"))
        self.simple(node, "reduce_mean", axes=self.integers(node.input[1]), keep_dims=keep)


class EngineLowering(Lowering):
    """The same function as the neural engine likes it: tokens lie as (B, D, 1, N), linears are 1x1 convolutions.

    Attention runs one head at a time on (B, d, 1, N) with products that leave the last axis alone, so that no tensor
    is transposed but the keys. The principles are those of Apple's "Deploying Transformers on the Apple Neural Engine"
    (2022). Tensors that are not tokens, as in the tokenizer and the pooling, are translated as in `Lowering`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.columns: dict[str, Var] = {}
        """Tensors (B, N, D) that lie as (B, D, 1, N)."""
        self.heads: dict[str, list[Var]] = {}
        """Tensors of h heads, whatever the order of their axes, as h of (B, d, 1, N)."""

    def take(self, name: str, width: str | None = None) -> Var:
        if name not in self.values and name in self.columns:
            rows = self.mb.squeeze(x=self.columns[name], axes=[2], name=f"{self.label(name)}_rows")
            self.values[name] = self.mb.transpose(x=rows, perm=[0, 2, 1], name=f"{self.label(name)}_plain")
        return super().take(name, width)

    def column(self, name: str, width: str) -> Var:
        """A tensor (B, N, D) as (B, D, 1, N)."""
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
        x = self.column(node.input[0], self.width(node))
        self.columns[node.output[0]] = self.mb.layer_norm(
            x=x, axes=[1], name=self.label(node.output[0]), **self.affine(node)
        )

    def on_Gelu(self, node: onnx.NodeProto) -> None:
        x = self.column(node.input[0], self.width(node))
        self.columns[node.output[0]] = self.mb.gelu(x=x, mode="EXACT", name=self.label(node.output[0]))

    def _binary(self, node: onnx.NodeProto, operation: str) -> None:
        if not any(name in self.columns for name in node.input) or not all(map(self._has_column, node.input)):
            super()._binary(node, operation)
            return
        x, y = (self._operand(name, self.width(node)) for name in node.input)
        self.columns[node.output[0]] = getattr(self.mb, operation)(x=x, y=y, name=self.label(node.output[0]))

    def _has_column(self, name: str) -> bool:
        return name in self.columns or (name in self.constants and len(self.shapes[name]) == 1)

    def _operand(self, name: str, width: str) -> Var:
        """A tensor as columns, or a constant (D,) or (1,) beside them."""
        if name in self.columns:
            return self.column(name, width)
        return self.mb.const(val=narrow(name, self.array(name)[:, None, None], width), name=label(name))

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
        if node.input[0] not in self.columns:
            super().on_Split(node)
            return
        x = self.columns[node.input[0]]
        parts = self.mb.split(x=x, num_splits=len(node.output), axis=1, name=self.label(node.name))
        self.columns.update(zip(node.output, parts, strict=True))

    def on_Reshape(self, node: onnx.NodeProto) -> None:
        """(B, N, D) to (B, N, h, d) is a split of the columns, and back a concatenation of the heads."""
        source, target = self.shapes[node.input[0]], self.shapes[node.output[0]]
        if node.input[0] in self.columns and len(target) == 4 and target[:2] == source[:2]:
            x = self.columns[node.input[0]]
            parts = self.mb.split(x=x, num_splits=target[2], axis=1) if target[2] > 1 else [x]
            self.heads[node.output[0]] = list(parts)
        elif node.input[0] in self.heads:
            heads = self.heads[node.input[0]]
            whole = (
                self.mb.concat(values=heads, axis=1, name=self.label(node.output[0])) if len(heads) > 1 else heads[0]
            )
            self.columns[node.output[0]] = whole
        else:
            super().on_Reshape(node)

    def on_Transpose(self, node: onnx.NodeProto) -> None:
        if node.input[0] in self.heads:
            self.heads[node.output[0]] = self.heads[node.input[0]]
        else:
            super().on_Transpose(node)

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
        self.heads[node.output[0]] = products

    @property
    def softmaxes(self) -> set[str]:
        return {node.output[0] for node in self.nodes if node.op_type == "Softmax"}

    def on_Softmax(self, node: onnx.NodeProto) -> None:
        if node.input[0] not in self.heads:
            super().on_Softmax(node)
            return
        width = self.width(node)
        scores = [self._cast(x, width) for x in self.heads[node.input[0]]]
        self.heads[node.output[0]] = [self.mb.softmax(x=x, axis=1) for x in scores]


def attribute(node: onnx.NodeProto, name: str) -> Any:
    """An attribute of a node; the canonical graph states them all."""
    return next(helper.get_attribute_value(a) for a in node.attribute if a.name == name)


def width_of(value: Var) -> str:
    """`fp16`, `fp32` or `int32`, the only ones that the graph has."""
    name = str(value.dtype.__name__)
    return name if name in ("fp16", "fp32") else "int32"


def narrow(name: str, array: Array, width: str) -> Array:
    """Float32 numbers in the width that they are stored in.

    Raises:
        SpecError: one of them exceeds float16.
    """
    if width == "fp32":
        return array
    if (largest := float(np.abs(array).max(initial=0))) > float(np.finfo(np.float16).max):
        raise SpecError(f"{name} reaches {largest:.3g}; float16 ends at 65504: pin what uses it to float32")
    return array.astype(np.float16)
