"""Float16 graphs from float32 ones."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgetube.calibration import storage
from edgetube.calibration.graphs import producers
from edgetube.errors import SpecError
from edgetube.export.canonical import check
from edgetube.export.statistics import attribute, byte_casts, tensor_shapes

FP32_OPS = frozenset({"LayerNormalization", "Softmax", "ReduceMean"})
"""Operators that stay in float32 in a float16 graph: their sums and exponentials exceed its range."""

PIXEL_SCALE = 256.0
"""Float16 graphs divide pixels by this and multiply tube weights by it: weights / 255 would lose digits in float16."""


def convert_to_fp16(model: onnx.ModelProto, further: Collection[str] = ()) -> onnx.ModelProto:
    """The graph in float16: weights, matrix products, sums and GELU; `FP32_OPS` stay in float32.

    Inputs and outputs keep their types (uint8 frames, float32 logits), and quantised tensors stay int8, with float16
    scales.

    Args:
        further: names of more operators with one output that stay in float32; what they read and give is float16.

    Raises:
        SpecError: a weight exceeds float16.
    """
    source = model.graph
    pixels = {node.output[0] for node in byte_casts(model)}
    outputs = {value.name for value in source.output}
    constants = {tensor.name for tensor in source.initializer}
    kept = {node.name for node in source.node if node.op_type in FP32_OPS or node.name in further}
    nodes = [new for node in source.node for new in _fp16_nodes(node, pixels, outputs, kept, constants)]
    wide = {name for node in source.node if node.name in kept for name in node.input if name in constants}
    factors = _pixel_factors(source, pixels)
    folder = storage.folder_of(model)
    weights = [_fp16_weight(t, factors.get(t.name, 1.0), t.name in wide, folder) for t in source.initializer]
    weights.append(numpy_helper.from_array(np.array(1 / PIXEL_SCALE, np.float16), "pixels.scale"))

    result = onnx.ModelProto()
    for name in ("ir_version", "producer_name", "doc_string"):
        setattr(result, name, getattr(model, name))
    result.opset_import.extend(model.opset_import)
    result.metadata_props.extend(model.metadata_props)
    graph = result.graph
    graph.name = source.name
    graph.node.extend(nodes)
    graph.input.extend(source.input)
    graph.output.extend(source.output)
    graph.initializer.extend(weights)
    graph.value_info.extend(_fp16_types(model, nodes))
    check(result)
    return result


def _pixel_factors(graph: onnx.GraphProto, pixels: set[str]) -> dict[str, float]:
    """Factors by `PIXEL_SCALE` of constants: weights that multiply pixels grow, scales of quantised pixels shrink.

    Of a quantised weight, the scale grows.
    """
    makers = producers(graph.node)
    factors: dict[str, float] = {}
    scaled = set(pixels)
    for node in graph.node:
        if node.input[0] not in scaled:
            continue
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            factors[node.input[1]] = 1 / PIXEL_SCALE
            scaled.update(node.output)
        else:
            weight = makers.get(node.input[1])
            factors[node.input[1] if weight is None else weight.input[1]] = PIXEL_SCALE
    return factors


def _fp16_nodes(
    node: onnx.NodeProto, pixels: set[str], outputs: set[str], kept: set[str], constants: set[str]
) -> list[onnx.NodeProto]:
    """One node in float16, or float32 if it is `kept`, with a Cast wherever the type changes."""
    new = deepcopy(node)
    name = node.output[0]
    if node.name in kept:
        read = [i for i, source in enumerate(node.input) if source and source not in constants]
        for i in read:
            new.input[i] = f"{name}.input.fp32" if i == read[0] else f"{name}.input.{i}.fp32"
        casts = [_cast(node.input[i], new.input[i], TensorProto.FLOAT) for i in read]
        if name in outputs:
            return [*casts, new]
        new.output[0] = f"{name}.fp32"
        return [*casts, new, _cast(new.output[0], name)]
    if name in pixels:
        scale = helper.make_node("Mul", [f"{name}.fp16", "pixels.scale"], [name], name=name)
        return [_cast(node.input[0], f"{name}.fp16"), scale]
    if node.op_type == "Cast":
        return [_cast(node.input[0], name)] if attribute(node, "to") == TensorProto.FLOAT else [new]
    if name in outputs:
        new.output[0] = f"{name}.fp16"
        return [new, _cast(new.output[0], name, TensorProto.FLOAT)]
    return [new]


def _cast(source: str, target: str, to: int = TensorProto.FLOAT16) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=to)


def _fp16_weight(tensor: TensorProto, scale: float, wide: bool, folder: Path | None) -> TensorProto:
    """A float32 initializer in float16, unless an operator in float32 reads it."""
    if wide or tensor.data_type != TensorProto.FLOAT:
        return tensor
    values = np.asarray(storage.read(tensor), np.float32) * np.float32(scale)
    if (largest := float(np.abs(values).max(initial=0))) > float(np.finfo(np.float16).max):
        raise SpecError(f"{tensor.name} reaches {largest:.3g}; float16 ends at 65504: export this model to fp32")
    return storage.make(tensor.name, values.astype(np.float16), folder)


def _fp16_types(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> Iterator[onnx.ValueInfoProto]:
    """Type and shape of every inner tensor of the float16 graph."""
    known, outputs = tensor_shapes(model), {value.name for value in model.graph.output}
    integers = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.input, *model.graph.value_info]}
    integers = {name: kind for name, kind in integers.items() if kind != TensorProto.FLOAT}
    for node in nodes:
        for name in node.output:
            origin = name.removesuffix(".fp32").removesuffix(".fp16").removesuffix(".input")
            if name not in known:  # a tensor on one side of a cast has the shape of the other
                known[name] = known[node.input[0]] if node.op_type == "Cast" else known[origin]
            width = TensorProto.FLOAT if name.endswith(".fp32") else TensorProto.FLOAT16
            if name not in outputs:
                yield helper.make_tensor_value_info(name, integers.get(name, width), known[name])
