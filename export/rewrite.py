"""Equivalent rewrites of typed graphs for particular engine builders."""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgetube.calibration import graphs, storage
from edgetube.export import canonical
from edgetube.export.statistics import byte_casts


def cast_first(model: onnx.ModelProto) -> onnx.ModelProto:
    """Move the Cast to float directly behind the uint8 input, before all operators that move data.

    For parsers that allow no other operator on uint8. Builders fuse the cast into the gather that follows.
    """
    result = deepcopy(model)
    graph = result.graph
    (frames,) = graph.input
    casts = {node.output[0]: node.input[0] for node in byte_casts(model)}
    width = next(node.attribute[0].i for node in graph.node if node.output[0] in casts)
    first = f"{frames.name}.cast"
    renamed = {frames.name: first} | {new: first if old == frames.name else old for new, old in casts.items()}
    nodes = [helper.make_node("Cast", [frames.name], [first], name=first, to=width)]
    for node in graph.node:
        if node.output[0] not in casts:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            nodes.append(node)
    shape = [d.dim_value for d in frames.type.tensor_type.shape.dim]
    types = [helper.make_tensor_value_info(first, width, shape)]
    for value in graph.value_info:
        if value.name not in casts:
            if value.type.tensor_type.elem_type == TensorProto.UINT8:
                value.type.tensor_type.elem_type = width
            types.append(value)
    return _with(result, nodes, types, graph.initializer)


def opset_17(model: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 graph in opset 17, for parsers of 2023: GELU becomes what it is made of.

    LayerNormalization, the newest remaining operator, came with opset 17.
    """
    result = deepcopy(model)
    graph = result.graph
    nodes: list[onnx.NodeProto] = []
    types = list(graph.value_info)
    known = {value.name: value for value in types}
    integers = {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.data_type == TensorProto.INT64}
    for node in graph.node:
        if node.op_type == "Split":  # which had no number of outputs then
            kept = [a for a in node.attribute if a.name != "num_outputs"]
            del node.attribute[:]
            node.attribute.extend(kept)
        if node.op_type in ("ReduceMean", "ReduceMax", "ReduceMin"):  # the axes were an attribute then
            keep = next(a for a in node.attribute if a.name == "keepdims")
            del node.attribute[:]
            node.attribute.extend([keep, helper.make_attribute("axes", integers[node.input.pop()].tolist())])
        if node.op_type != "Gelu":
            nodes.append(node)
            continue
        steps = _gelu_steps(node)
        nodes += steps
        shape = [d.dim_value for d in known[node.output[0]].type.tensor_type.shape.dim]
        types += [helper.make_tensor_value_info(step.name, TensorProto.FLOAT, shape) for step in steps[:-1]]
    used = {name for node in nodes for name in node.input}
    constants = [t for t in graph.initializer if t.name in used]
    constants += [
        numpy_helper.from_array(np.array(value, np.float32), name)
        for name, value in GELU_NUMBERS.items()
        if name in used
    ]
    del result.opset_import[:]
    result.opset_import.append(helper.make_opsetid("", 17))
    result.ir_version = 8
    return _with(result, nodes, types, constants)


GELU_NUMBERS = {
    "gelu.half": 0.5,
    "gelu.root": math.sqrt(0.5),
    "gelu.one": 1.0,
    "gelu.slope": math.sqrt(2 / math.pi),
    "gelu.cube": 0.044715,
}
"""Constants of the two formulas of `_gelu_steps`."""


def _gelu_steps(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """x (1 + erf(x / sqrt 2)) / 2; where `approximate` is tanh, x (1 + tanh(sqrt(2 / pi) x (1 + 0.044715 x^2))) / 2.

    In this order no product of float16 becomes inf - inf or 0 * inf.
    """
    (x,), (out,) = node.input, node.output
    approximate = next((helper.get_attribute_value(a) for a in node.attribute if a.name == "approximate"), b"none")
    if approximate == b"tanh":
        inner = [
            ("Mul", [x, x], "square"),
            ("Mul", [f"{out}.square", "gelu.cube"], "cube"),
            ("Add", [f"{out}.cube", "gelu.one"], "bent"),
            ("Mul", [x, "gelu.slope"], "scaled"),
            ("Mul", [f"{out}.scaled", f"{out}.bent"], "inner"),
            ("Tanh", [f"{out}.inner"], "sigmoid"),
        ]
    else:
        inner = [("Mul", [x, "gelu.root"], "scaled"), ("Erf", [f"{out}.scaled"], "sigmoid")]
    steps = [
        *inner,
        ("Add", [f"{out}.sigmoid", "gelu.one"], "plus"),
        ("Mul", [x, "gelu.half"], "halved"),
        ("Mul", [f"{out}.halved", f"{out}.plus"], ""),
    ]
    names = [f"{out}.{name}" if name else out for _, _, name in steps]
    return [
        helper.make_node(kind, inputs, [name], name=name) for (kind, inputs, _), name in zip(steps, names, strict=True)
    ]


def separate_projections(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace the split product of queries, keys and values by three products of the same input.

    The numbers are the same. TensorRT splits the weight of a split product itself, and then dequantises it on every
    call and multiplies in float; it multiplies three products in integers, as one kernel. OpenVINO fuses scale and bias
    into a product, but not across a Split: it would round bare sums of integers to its inference precision.
    """
    result = deepcopy(model)
    graph, folder = result.graph, storage.folder_of(model)
    makers = graphs.producers(graph.node)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    gone: set[str] = set()
    put: dict[str, list[onnx.NodeProto]] = {}
    for split in graph.node:
        add = makers.get(split.input[0])
        if (
            split.op_type != "Split"
            or len(split.input) > 1
            or add is None
            or add.op_type != "Add"
            or add.input[0] not in makers
        ):
            continue
        product = makers[add.input[0]]
        weight = makers.get(product.input[1]) if product.op_type == "MatMul" else None
        if weight is None or weight.op_type != "DequantizeLinear":
            continue
        put[split.name] = []
        constants |= _parts(split, add, product, weight, constants, put[split.name], folder)
        gone |= {add.name, product.name, weight.name}
    nodes = [new for node in graph.node if node.name not in gone for new in put.get(node.name, [node])]
    used = {name for node in nodes for name in node.input}
    kept = {value.name: value for value in graph.value_info}
    types = [kept[name] for node in nodes for name in node.output if name in kept]
    types += _new_types([n for new in put.values() for n in new], kept, constants)
    return _with(result, nodes, types, [t for name, t in constants.items() if name in used])


def _parts(
    split: onnx.NodeProto,
    add: onnx.NodeProto,
    product: onnx.NodeProto,
    weight: onnx.NodeProto,
    constants: dict[str, TensorProto],
    nodes: list[onnx.NodeProto],
    folder: Path | None,
) -> dict[str, TensorProto]:
    """Append the products that replace a split one to `nodes`; their new constants."""
    integers, scales, zeros = (storage.read(constants[name]) for name in weight.input)
    bias = storage.read(constants[add.input[1]])
    made: dict[str, TensorProto] = {}

    def constant(name: str, values: Any) -> str:
        made[name] = storage.make(name, np.ascontiguousarray(values), folder)
        return name

    for i, columns in enumerate(np.split(np.arange(bias.size), len(split.output))):
        name, part = f"{product.name}.{i}", f"{weight.output[0]}.{i}"
        inputs = [
            constant(f"{part}.int8", integers[:, columns]),
            constant(f"{part}.scale", scales[columns]),
            constant(f"{part}.zero_point", zeros[columns]),
        ]
        nodes += [
            helper.make_node("DequantizeLinear", inputs, [part], name=f"{part}.dequantize", axis=1),
            helper.make_node("MatMul", [product.input[0], part], [name], name=name),
            helper.make_node(
                "Add", [name, constant(f"{name}.bias", bias[columns])], [split.output[i]], name=f"{name}.add"
            ),
        ]
    return made


def _new_types(
    nodes: Iterable[onnx.NodeProto], kept: dict[str, onnx.ValueInfoProto], constants: dict[str, TensorProto]
) -> Iterable[onnx.ValueInfoProto]:
    """Types of the weights and products that `separate_projections` made."""
    shapes: dict[str, list[int]] = {}
    for node in nodes:
        name = node.output[0]
        if node.op_type == "DequantizeLinear":
            shapes[name] = list(constants[node.input[0]].dims)
        elif node.op_type == "MatMul":
            rows = [d.dim_value for d in kept[node.input[0]].type.tensor_type.shape.dim]
            shapes[name] = [*rows[:-1], shapes[node.input[1]][-1]]
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]


def _with(
    model: onnx.ModelProto,
    nodes: Iterable[onnx.NodeProto],
    types: Iterable[onnx.ValueInfoProto],
    constants: Iterable[TensorProto],
) -> onnx.ModelProto:
    """`model` with new contents, checked; the arguments may be parts of it."""
    nodes, types, constants = deepcopy(list(nodes)), deepcopy(list(types)), deepcopy(list(constants))
    graph = model.graph
    del graph.node[:], graph.value_info[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.value_info.extend(types)
    graph.initializer.extend(constants)
    canonical.check(model)
    return model
