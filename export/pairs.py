"""Graphs for NPUs: data pass through pairs of QuantizeLinear and DequantizeLinear (Q/DQ).

Such a compiler takes an operator between DequantizeLinear and QuantizeLinear as one operator on integers.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from edgetube.calibration import storage
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
    tensors = [_scaled(t, folder) if t.name in weights else t for t in model.graph.initializer]
    return rebuilt(model, nodes, [*tensors, *pixel_parameters()], types)


def _scaled(tensor: TensorProto, folder: Path | None) -> TensorProto:
    values: npt.NDArray[np.float32] = np.asarray(storage.read(tensor), np.float32) * np.float32(PIXEL_SCALE)
    return storage.make(tensor.name, values, folder)


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
    model: onnx.ModelProto, nodes: list[NodeProto], tensors: Iterable[TensorProto], types: Iterable[ValueInfoProto]
) -> onnx.ModelProto:
    """`model` with other nodes, its tensors those that these read, and further types; checked."""
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
    canonical.check(result)
    return result
