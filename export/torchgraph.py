"""The canonical graph as a PyTorch module, for converters that start from `torch.export`; Q/DQ graphs in PT2E's form.

The graph, not the static model that it was traced from, is what calibration and the float16 conversion have changed, so
a converter that reads PyTorch programs starts from it, too. Each operator is a submodule with the name of the tensor
that it makes (`blocks.3.attn.qkv`), which converters write into their artifacts.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from onnx import helper
from torch import Tensor, nn
from torch.nn import functional

from edgetube.calibration import graphs, storage
from edgetube.errors import SpecError
from edgetube.export.statistics import bias_of, tensor_shapes

Function = Callable[..., Tensor | tuple[Tensor, ...]]
Attributes = Mapping[str, Any]
Shape = tuple[int, ...]

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Rows (..., N, K), weight (M, K) and bias (M,) or None -> (..., N, M), like `functional.linear`."""

TYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.INT32: torch.int32,
}
"""Types that an ONNX graph casts to."""


class TorchGraph(nn.Module):
    """A canonical graph, its float16 form or its Q/DQ form: frames uint8 (B, T, H, W, 3) -> logits (B, classes).

    A product with a matrix is `linear`, with the bias that is added behind it. In a Q/DQ graph, activations pass
    through `quantized_decomposed.quantize_per_tensor` and `dequantize_per_tensor`, as int8: uint8 with zero point z
    becomes int8 with z - 128, the same numbers. Pixels are quantised from float, as everything else is. Weights are
    int8 behind `dequantize_per_channel`, their output channels first.

    Args:
        model: the graph.
        outputs: tensors of it to return, in this order; its own output by default.
        linear: computes a product with a matrix.

    Raises:
        SpecError: an operator has no translation, or there is no such tensor; says which.
    """

    def __init__(self, model: onnx.ModelProto, outputs: Sequence[str] = (), linear: Linear = functional.linear) -> None:
        super().__init__()
        self.input = model.graph.input[0].name
        self.outputs = tuple(outputs) or (model.graph.output[0].name,)
        self.steps: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []
        translation = _Translation(model, linear)
        for node in model.graph.node:
            if (made := translation.operator(node)) is not None:
                operator, inputs, results = made
                path = ".".join(f"{part}_" if keyword.iskeyword(part) else part for part in results[0].split("."))
                self._place(path, operator)  # `torch.export` writes it into code
                self.steps.append((path, inputs, results))
        known = {self.input, *(name for _, _, results in self.steps for name in results)}
        if absent := [name for name in self.outputs if name not in known]:
            raise SpecError(f"the graph has no tensor {', '.join(absent)}")
        self.eval()

    def _place(self, name: str, operator: nn.Module) -> None:
        *folders, last = name.split(".")
        module: nn.Module = self
        for folder in folders:
            if folder not in module._modules:
                module.add_module(folder, nn.Module())
            module = module.get_submodule(folder)
        if (folder_of_last := module._modules.get(last)) is not None:
            for child, inner in folder_of_last.named_children():
                operator.add_module(child, inner)
        module.add_module(last, operator)

    def forward(self, frames: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits, or a tuple of `outputs` if there are several."""
        values = {self.input: frames}
        for name, inputs, results in self.steps:
            made = self.get_submodule(name)(*(values[each] for each in inputs))
            values.update(zip(results, made if isinstance(made, tuple) else (made,), strict=True))
        found = tuple(values[name] for name in self.outputs)
        return found if len(found) > 1 else found[0]


class Operator(nn.Module):
    """One operator: its constants are buffers, what varies is given in order."""

    def __init__(self, function: Function, arguments: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.function, self.constants = function, []
        for i, value in enumerate(arguments):
            self.constants.append(value is not None)
            if value is not None:
                self.register_buffer(f"constant{i}", value)

    def forward(self, *given: Tensor) -> Tensor | tuple[Tensor, ...]:
        rest = iter(given)
        return self.function(
            *(getattr(self, f"constant{i}") if constant else next(rest) for i, constant in enumerate(self.constants))
        )


class _Translation:
    """Makes the operators of one graph."""

    def __init__(self, model: onnx.ModelProto, linear: Linear) -> None:
        self.linear = linear
        self.shapes = tensor_shapes(model)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.uses = graphs.readers(model.graph.node)
        self.weights: dict[str, onnx.NodeProto] = {}
        """Weights in integers, by the name of what their DequantizeLinear makes."""
        self.fused: set[str] = set()
        """Sums that are the bias of a product."""

    def array(self, name: str) -> npt.NDArray[Any]:
        return storage.read(self.constants[name])

    def operator(self, node: onnx.NodeProto) -> tuple[Operator, tuple[str, ...], tuple[str, ...]] | None:
        """The operator, the names that it reads and those that it makes; None where it is part of another one."""
        if node.output[0] in self.fused:
            return None
        if node.op_type == "DequantizeLinear" and node.input[0] in self.constants:
            self.weights[node.output[0]] = node
            return None
        if node.op_type == "MatMul" and (node.input[1] in self.weights or self._is_matrix(node.input[1])):
            return self._linear(node)
        translate = getattr(self, f"_{node.op_type.lower()}", None)
        if translate is None:
            raise SpecError(f"{node.name}: PyTorch programs have no translation for the operator {node.op_type}")
        function, count = translate(node, {a.name: helper.get_attribute_value(a) for a in node.attribute})
        names = list(node.input) if count is None else list(node.input[:count])
        arguments = [_tensor(self.array(name)) if name in self.constants else None for name in names]
        inputs = tuple(name for name in names if name not in self.constants)
        return Operator(function, arguments), inputs, tuple(node.output)

    def _is_matrix(self, name: str) -> bool:
        return name in self.constants and len(self.constants[name].dims) == 2

    def _linear(self, node: onnx.NodeProto) -> tuple[Operator, tuple[str, ...], tuple[str, ...]]:
        bias, end = bias_of(node, self.uses[node.output[0]], self.shapes, self.constants)
        self.fused |= {end.output[0]} - {node.output[0]}
        function: Function
        if node.input[1] in self.weights:
            source = self.weights[node.input[1]]
            integers, scales = (self.array(each) for each in source.input[:2])
            zeros = np.zeros(len(scales), np.int64)
            constants, function = (
                [np.ascontiguousarray(integers.T), scales, zeros],
                partial(_integer_linear, self.linear),
            )
        else:
            constants, function = [np.ascontiguousarray(self.array(node.input[1]).T)], partial(_linear, self.linear)
        constants += [] if bias is None else [self.array(bias)]
        return Operator(function, [None, *map(_tensor, constants)]), (node.input[0],), (end.output[0],)

    # Each gives a function of the operator's inputs, and how many of them it reads; None for all.

    def _reshape(self, node: onnx.NodeProto, _: Attributes) -> tuple[Function, int | None]:
        shape = self.shapes[node.output[0]]
        return lambda x: x.reshape(shape), 1

    _unsqueeze = _squeeze = _reshape

    def _transpose(self, node: onnx.NodeProto, attributes: Attributes) -> tuple[Function, int | None]:
        order = list(attributes["perm"])
        return lambda x: x.permute(order), None

    def _slice(self, node: onnx.NodeProto, _: Attributes) -> tuple[Function, int | None]:
        bounds = [self.array(name).tolist() for name in node.input[1:]]

        def function(x: Tensor) -> Tensor:
            for start, stop, axis, *step in zip(*bounds, strict=True):
                x = x[(slice(None),) * axis + (slice(start, stop, *step),)]
            return x

        return function, 1

    def _gather(self, node: onnx.NodeProto, attributes: Attributes) -> tuple[Function, int | None]:
        axis, shape = attributes["axis"], self.shapes[node.output[0]]
        return lambda x, index: x.index_select(axis, index.reshape(-1)).reshape(shape), None

    def _split(self, node: onnx.NodeProto, attributes: Attributes) -> tuple[Function, int | None]:
        axis = attributes["axis"]
        sizes = [self.shapes[name][axis] for name in node.output]
        return lambda x: tuple(torch.split(x, sizes, axis)), 1

    def _concat(self, node: onnx.NodeProto, attributes: Attributes) -> tuple[Function, int | None]:
        axis = attributes["axis"]
        return lambda *values: torch.cat(values, axis), None

    def _cast(self, node: onnx.NodeProto, attributes: Attributes) -> tuple[Function, int | None]:
        kind = TYPES[attributes["to"]]
        return lambda x: x.to(kind), None

    def _where(self, node: onnx.NodeProto, _: Attributes) -> tuple[Function, int | None]:
        return torch.where, None

    def _equal(self, node: onnx.NodeProto, _: Attributes) -> tuple[Function, int | None]:
        return torch.eq, None

    def _greater(self, node: onnx.NodeProto, _: Attributes) -> tuple[Function, int | None]:
        return torch.gt, None

    def _less(self, node: onnx.NodeProto, _: Attributes) -> tuple[Function, int | None]:
        return torch.lt, None

    def _and(self, node: onnx.NodeProto, _: Attributes) -> tuple[Function, int | None]:
        return torch.logical_and, None

    def _or(self, node: onnx.NodeProto, _: Attributes) -> tuple[Function, int | None]:
        return torch.logical_or, None

    def _neg(self, node: onnx.NodeProto, _: Attributes) -> tuple[Function, int | None]:
        return torch.neg, None

    def _log(self, node: onnx.NodeProto, _: Attributes) -> tuple[Function, int | None]:
        return torch.log, None

    def _div(self, node: onnx.NodeProto, _: Attributes) -> tuple[Function, int | None]:
        return torch.div, None

    def _add(self, node: onnx.NodeProto, _: Attributes) -> tuple[Function, int | None]:
        return torch.add, None

    def _sub(self, node: onnx.NodeProto, _: Attributes) -> tuple[Function, int | None]:
        return torch.sub, None

    def _mul(self, node: onnx.NodeProto, _: Attributes) -> tuple[Function, int | None]:
        return torch.mul, None

    def _matmul(self, node: onnx.NodeProto, _: Attributes) -> tuple[Function, int | None]:
        return torch.matmul, None

    def _conv(self, node: onnx.NodeProto, attributes: Attributes) -> tuple[Function, int | None]:
        if len(node.input) > 2 or any(attributes["pads"]) or attributes["group"] != 1:
            raise SpecError(f"{node.name}: only convolutions without bias, padding and groups are translated")
        strides = list(attributes["strides"])
        convolve = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[len(strides)]
        return lambda x, weight: convolve(x, weight, stride=strides), None

    def _layernormalization(self, node: onnx.NodeProto, attributes: Attributes) -> tuple[Function, int | None]:
        width, epsilon = self.shapes[node.input[0]][-1:], attributes["epsilon"]
        return lambda x, gamma, beta: functional.layer_norm(x, width, gamma, beta, epsilon), None

    def _softmax(self, node: onnx.NodeProto, attributes: Attributes) -> tuple[Function, int | None]:
        axis = attributes["axis"]
        return lambda x: torch.softmax(x, axis), None

    def _gelu(self, node: onnx.NodeProto, attributes: Attributes) -> tuple[Function, int | None]:
        approximate = attributes["approximate"].decode()
        return lambda x: functional.gelu(x, approximate=approximate), None

    def _sigmoid(self, node: onnx.NodeProto, _: Attributes) -> tuple[Function, int | None]:
        return torch.sigmoid, None

    def _reducemean(self, node: onnx.NodeProto, attributes: Attributes) -> tuple[Function, int | None]:
        return self._reduction(torch.mean, node, attributes)

    def _reducemax(self, node: onnx.NodeProto, attributes: Attributes) -> tuple[Function, int | None]:
        return self._reduction(torch.amax, node, attributes)

    def _reducemin(self, node: onnx.NodeProto, attributes: Attributes) -> tuple[Function, int | None]:
        return self._reduction(torch.amin, node, attributes)

    def _reducesum(self, node: onnx.NodeProto, attributes: Attributes) -> tuple[Function, int | None]:
        return self._reduction(_sum, node, attributes)

    def _reduction(
        self, function: Callable[..., Tensor], node: onnx.NodeProto, attributes: Attributes
    ) -> tuple[Function, int | None]:
        """A function over axes that the graph states."""
        axes, keep = self.array(node.input[1]).tolist(), bool(attributes["keepdims"])
        return partial(function, dim=axes, keepdim=keep), 1

    def _quantizelinear(self, node: onnx.NodeProto, _: Attributes) -> tuple[Function, int | None]:
        scale, zero = self._scale(node)
        quantise = torch.ops.quantized_decomposed.quantize_per_tensor.default
        return lambda x: quantise(x, scale, zero, -128, 127, torch.int8), 1

    def _dequantizelinear(self, node: onnx.NodeProto, _: Attributes) -> tuple[Function, int | None]:
        scale, zero = self._scale(node)
        kind = _narrow(TYPES[self.constants[node.input[1]].data_type])
        dequantise = torch.ops.quantized_decomposed.dequantize_per_tensor.default
        return lambda x: dequantise(x, scale, zero, -128, 127, torch.int8, **kind), 1

    def _scale(self, node: onnx.NodeProto) -> tuple[float, int]:
        """Scale, and zero point as int8."""
        zero = self.array(node.input[2])
        return float(self.array(node.input[1])), int(zero) - (128 if zero.dtype == np.uint8 else 0)


def _linear(linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(x, weight, bias)


def _integer_linear(
    linear: Linear, x: Tensor, kept: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None
) -> Tensor:
    """A linear whose weight `kept` is int8 (N, K), with scales (N,)."""
    dequantise = torch.ops.quantized_decomposed.dequantize_per_channel.default
    return linear(x, dequantise(kept, scales, zeros, 0, -127, 127, torch.int8, **_narrow(scales.dtype)), bias)


def _narrow(kind: torch.dtype) -> dict[str, torch.dtype]:
    """The arguments of a dequantisation to a type; none for float32, the default, as converters expect it."""
    return {} if kind is torch.float32 else {"out_dtype": kind}


def _sum(x: Tensor, **given: Any) -> Tensor:
    """In the type of x; PyTorch would sum int32 in int64."""
    return torch.sum(x, dtype=x.dtype, **given)


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(array))
