"""Q/DQ graphs: standard ONNX from a calibrated float graph and its table."""

from __future__ import annotations

from collections.abc import Container, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgetube.calibration import Calibrated, graphs, numeric, storage
from edgetube.calibration.table import ActivationScheme, CalibrationTable, LinearPlan
from edgetube.export.canonical import Graph


def qdq(
    model: onnx.ModelProto,
    table: CalibrationTable,
    *,
    activations: ActivationScheme | None = None,
    outputs: bool = False,
) -> onnx.ModelProto:
    """Insert Q/DQ around the linears that the table quantises, and around the products of two activations for which it
    has ranges.

    A quantised activation has one QuantizeLinear and one DequantizeLinear for all its readers; a weight is an int8
    initializer `<weight>.int8` (K, N) behind a DequantizeLinear along axis 1; biases stay float.

    Args:
        model: the calibrated float graph.
        activations: the type of the integers, int8 with zero point 0; the table's scheme by default.
        outputs: what these linears give passes through Q/DQ, too, where the table has ranges for it; see
            `edgetube.calibration.graphs.inner_linear_outputs`.

    Raises:
        InputError: the table is for another graph.
    """
    table.check(graphs.digest(model))
    plans = {plan.weight: plan for plan in table.quantised}
    readers = [node.name for node in model.graph.node if any(name in plans for name in node.input)]
    given = graphs.inner_linear_outputs(model) if outputs else {}
    operands = {*table.ranges} - {name for names in given.values() for name in names}
    readers += [node.name for node in model.graph.node if node.op_type == "MatMul" and {*node.input} <= operands]
    rounded = {name for plan in table.quantised for name in given.get(plan.name, ())}
    result = graphs.quantize_activations(model, table.ranges, readers, activations or table.activations, rounded)
    graph, known = result.graph, graphs.initializers(model)
    kept = [tensor for tensor in graph.initializer if tensor.name not in plans]
    folder = storage.folder_of(model)
    pairs = [_weight(plan, np.asarray(known[name], np.float32), folder) for name, plan in plans.items()]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *(tensor for _, tensors in pairs for tensor in tensors)])
    nodes = [node for node, _ in pairs] + list(graph.node)
    nodes = [deepcopy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.value_info.extend(_types(model, table, activations or table.activations, graphs.producers(graph.node)))
    storage.check(result)
    return result


def _weight(
    plan: LinearPlan, weight: npt.NDArray[np.float32], folder: Path | None
) -> tuple[onnx.NodeProto, list[TensorProto]]:
    """The DequantizeLinear whose output has the name of the weight, and its integers, scales and zero points."""
    name, scales = plan.weight, np.array(plan.weight_scales, np.float32)
    tensors = [
        storage.make(f"{name}.int8", numeric.quantize_weights(weight, scales), folder),
        numpy_helper.from_array(scales, f"{name}.scale"),
        numpy_helper.from_array(np.zeros(len(scales), np.int8), f"{name}.zero_point"),
    ]
    inputs = [tensor.name for tensor in tensors]
    return helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}.dequantize", axis=1), tensors


def _types(
    model: onnx.ModelProto, table: CalibrationTable, activations: ActivationScheme, made: Container[str]
) -> list[onnx.ValueInfoProto]:
    """Types of the tensors that quantisation adds; `made`: the tensors of the result."""
    known = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    integer = helper.np_dtype_to_tensor_dtype(np.dtype(activations))
    found = []
    for plan in table.quantised:
        found.append(helper.make_tensor_value_info(plan.weight, TensorProto.FLOAT, shapes[plan.weight]))
    for name in (name for name in table.ranges if f"{name}.quantized" in made):
        found.append(helper.make_tensor_value_info(f"{name}.quantized", integer, known[name]))
        found.append(helper.make_tensor_value_info(graphs.dequantized_name(name), TensorProto.FLOAT, known[name]))
    return found


def apply(calibrated: Calibrated, graph: Graph) -> tuple[Graph, CalibrationTable]:
    """Apply a calibration to a graph of the same model with any lowering and batch; that graph and its table.

    Tubes that are convolutions in this lowering stay float, with their original weights.
    """
    plain = graphs.insert_equalization_sites(graph.model, graph.roles, calibrated.table.activations)
    products = {linear.weight for linear in graphs.linears(plain)}
    absent = {plan.weight for plan in calibrated.table.linears} - products
    values = {name: value for name, value in calibrated.values.items() if name not in absent}
    model = graphs.remove_identity_sites(graphs.replace_initializers(plain, _fitting(values, plain)))
    here = {linear.name: linear for linear in graphs.linears(model)}
    plans = tuple(_moved(plan, here.get(plan.name)) for plan in calibrated.table.linears)
    used = {old.activation: new.activation for old, new in zip(calibrated.table.linears, plans, strict=True)}
    quantised = {plan.activation for plan in plans if plan.precision == "int8"}
    ranges = {used[name]: r for name, r in calibrated.table.ranges.items() if used[name] in quantised}
    table = replace(calibrated.table, model=graphs.digest(model), ranges=ranges, linears=plans)
    return replace(graph, model=model), table


def _fitting(values: Mapping[str, graphs.Array], model: onnx.ModelProto) -> dict[str, graphs.Array]:
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    assert all(shapes.get(name) == value.shape for name, value in values.items()), "another model's values"
    return dict(values)


def _moved(plan: LinearPlan, here: graphs.Linear | None) -> LinearPlan:
    if here is None:
        reason = "in this lowering it is a convolution"
        return replace(plan, precision="float", weight_scales=(), reason=reason)
    return replace(plan, activation=here.activation, weight=here.weight)
