"""The canonical ONNX graph, from which every exporter starts: traced, folded, named after the modules, checked.

Opset 20 (the first with `Gelu`), IR version 9 (its contemporary; ONNX Runtime 1.17 and later read it). Static
shapes, no shape arithmetic, one input `frames` of raw uint8 and one output. A tensor that leaves a module carries the
module's name (`blocks.3.attn.qkv`), others the name of the module and the operator (`blocks.3.attn.qkv.matmul`), a
node the name of its first output, an initializer that of the buffer (`blocks.3.attn.qkv.weight`).
"""

from __future__ import annotations

import ast
import json
import logging
import math
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import common as passes
from onnxscript import optimizer, rewriter

from edgetube.calibration.numeric import Moments
from edgetube.errors import SpecError
from edgetube.export.static import StaticTokenizer, StaticTubeViT
from edgetube.spec import InputContract, ModelSpec

OPSET = 20
IR_VERSION = 9
MAX_RANK = 5
PROTOBUF_LIMIT = 2_000_000_000
"""Most bytes of one protobuf message; larger models store their weights in a second file."""

SHAPE_OPS = frozenset({"Shape", "Size", "NonZero", "Range", "ConstantOfShape", "Loop", "If", "Scan", "Identity"})
"""Operators that a static graph must not contain."""


@dataclass(frozen=True)
class Graph:
    """A checked canonical graph.

    Attributes:
        model: float32 ONNX; `frames` uint8 (batch, T, H, W, 3) -> `logits` float32 (batch, classes).
        spec, contract, batch: of the model.
        lowering: how the tubes are lowered, one of `static.LOWERINGS`.
        labels: class names in the order of the logits; empty where unknown.
        image: traces the graph that answers one image with the same weights; None where the model takes none.
        moments: measures the input moments of each linear with a bias, by its weight; empty by default.
    """

    model: onnx.ModelProto
    spec: ModelSpec
    contract: InputContract
    batch: int
    lowering: str
    labels: tuple[str, ...] = ()
    image: Callable[[], Graph] | None = field(default=None, compare=False)
    moments: Callable[[], Mapping[str, Moments]] = field(default=dict, compare=False)


def trace(module: StaticTubeViT | StaticTokenizer, spec: ModelSpec, contract: InputContract, batch: int = 1) -> Graph:
    """The canonical graph of a static model (or of its tokenizer alone, output `tokens`).

    Raises:
        SpecError: the traced graph is not static, or has a tensor above rank 5.
    """
    frames = torch.zeros(batch, *contract.shape, dtype=torch.uint8)
    with torch.no_grad(), quiet():
        program = torch.onnx.export(
            module.eval(),
            (frames,),
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=["frames"],
            output_names=[module.output],
            verbose=False,
        )
    assert program is not None
    canonical = program.model
    _fold(canonical)
    _name(canonical, module.output)
    _state_shapes(canonical.graph)
    _share_constants(canonical.graph)
    _clean_up(canonical)
    canonical.doc_string = (
        f"TubeViT: frames uint8 {(batch, *contract.shape)} RGB -> {module.output}; pixels are normalised inside"
    )
    canonical.metadata_props.update(
        {"spec": _json(spec.to_json()), "input": _json(contract.to_json()), "lowering": module.lowering}
    )
    model = ir.to_proto(canonical)
    check(model)
    return Graph(model, spec, contract, batch, module.lowering)


@contextmanager
def quiet() -> Iterator[None]:
    """Context manager: silences warnings and logs of PyTorch's ONNX exporter."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, sort_keys=True)


def _fold(model: ir.Model) -> None:
    """Fold constants, remove unused and repeated operators.

    Unlike in the stock optimiser, equal initializers are not merged: equal biases would lose their names.
    """
    passes.InlinePass()(model)
    optimizer.fold_constants_ir(model, input_size_limit=1 << 30, output_size_limit=1 << 30)
    rewriter.rewrite(model)
    passes.IdentityEliminationPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    passes.ShapeInferencePass()(model)


def _name(model: ir.Model, output: str) -> None:
    """Name tensors and nodes after the module hierarchy."""
    graph = model.graph
    scopes: dict[ir.Node, str] = {}
    for node in reversed(graph):
        scopes[node] = _scope(node, scopes)
    counts: Counter[str] = Counter()
    for node in graph:
        scope = scopes[node]
        leaving = [value for value in node.outputs if _leaves(value, scope, scopes)]
        for value in node.outputs:
            if len(leaving) == 1 and value is leaving[0] and scope:
                name = scope
            else:
                stem = f"{scope}.{node.op_type.lower()}".lstrip(".")
                name = f"{stem}.{value.index()}" if len(node.outputs) > 1 else stem
            counts[name] += 1
            value.name = name if counts[name] == 1 else f"{name}.{counts[name] - 1}"
        node.name = node.outputs[0].name
    graph.outputs[0].name = output


def _state_shapes(graph: ir.Graph) -> None:
    """Make Reshape shapes explicit, without -1 and 0; store Gather indices as int32."""
    for node in graph:
        if node.op_type == "Reshape":
            shape = node.outputs[0].shape
            assert shape is not None
            _replace_constant(graph, node, f"{node.name}.shape", ir.tensor(shape.numpy(), dtype=ir.DataType.INT64))
            node.attributes.pop("allowzero", None)
        elif node.op_type == "Gather":
            fetched = node.inputs[1]
            assert fetched is not None
            index = ir.convenience.get_const_tensor(fetched)
            assert index is not None
            _replace_constant(graph, node, f"{node.name}.index", ir.tensor(index.numpy().astype(np.int32)))


def _replace_constant(graph: ir.Graph, node: ir.Node, name: str, tensor: ir.TensorProtocol) -> None:
    """Replace the second input of a node by a constant."""
    value = ir.Value(name=name, const_value=tensor)
    graph.register_initializer(value)
    node.replace_input_with(1, value)


def _share_constants(graph: ir.Graph) -> None:
    """Share int64 constants (shapes, axes, slice bounds): one initializer per value, named after it."""
    shared: dict[str, ir.Value] = {}
    for value in [value for value in graph.initializers.values() if value.uses()]:
        constant = value.const_value
        if constant is None or constant.dtype != ir.DataType.INT64:
            continue
        name = ("constant." if len(constant.shape) else "scalar.") + "x".join(map(str, constant.numpy().reshape(-1)))
        if name in shared:
            ir.convenience.replace_all_uses_with(value, shared[name])
        else:
            shared[name] = value
            value.name = name


def _scope(node: ir.Node, scopes: dict[ir.Node, str]) -> str:
    """The module that a node was traced in, `blocks.3.attn.qkv`; for a node from folding, the module of its users."""
    recorded = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if recorded is not None:
        modules = [str(name) for name in ast.literal_eval(recorded)]
        return modules[-2]
    users = [PurePosixPath(*scopes[user].split(".")) for value in node.outputs for user, _ in value.uses()]
    return ".".join(PurePosixPath(os.path.commonpath(users)).parts) if users else ""


def _leaves(value: ir.Value, scope: str, scopes: dict[ir.Node, str]) -> bool:
    """Whether a value is used outside the module that produces it."""
    users = [scopes[node] for node, _ in value.uses()]
    return value.is_graph_output() or any(user != scope and not user.startswith(f"{scope}.") for user in users)


def _clean_up(model: ir.Model) -> None:
    """Merge repeated views, sort initializers by first use, remove metadata of the tracing machine."""
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    graph = model.graph
    initializers = [v for node in graph for v in node.inputs if v is not None and v.is_initializer()]
    graph.initializers.clear()
    for value in dict.fromkeys(initializers):
        graph.initializers.add(value)
    passes.ClearMetadataAndDocStringPass()(model)
    for value in [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]:
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.ir_version, model.producer_name, model.producer_version = IR_VERSION, "edgetube", None
    graph.name = "tubevit"


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Static shape of every tensor of a graph; a dynamic dimension is -1."""
    graph = model.graph
    found = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        dims = value.type.tensor_type.shape.dim
        found[value.name] = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
    return found


def check(model: onnx.ModelProto) -> None:
    """Check that a graph is valid ONNX, static, and of rank 5 at most.

    Raises:
        SpecError: it is not; names the tensor or operator.
    """
    if size(model) < PROTOBUF_LIMIT:
        onnx.checker.check_model(model, full_check=True)
    else:
        with tempfile.TemporaryDirectory() as folder:
            save(model, Path(folder) / "model.onnx")
            onnx.checker.check_model(str(Path(folder) / "model.onnx"), full_check=True)
    if left := sorted({node.op_type for node in model.graph.node} & SHAPE_OPS):
        raise SpecError(f"the graph is not static: {', '.join(left)} left in it")
    known = shapes(model)
    for node in model.graph.node:
        for name in node.output:
            shape = known.get(name, (-1,))
            if min(shape, default=1) < 1:
                raise SpecError(f"the shape of {name} ({node.op_type}) is {shape}; expected a static one")
            if len(shape) > MAX_RANK:
                raise SpecError(f"{name} ({node.op_type}) has rank {len(shape)}, {shape}; the most is {MAX_RANK}")


def size(model: onnx.ModelProto) -> int:
    """Bytes of the weights."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def save(model: onnx.ModelProto, path: str | Path) -> None:
    """Write a graph; above protobuf's limit, its weights go to `<name>.data` beside it."""
    if size(model) < PROTOBUF_LIMIT:
        onnx.save(model, str(path))
    else:
        ir.save(ir.from_proto(model), path, external_data=f"{Path(path).name}.data")


def statistics(model: onnx.ModelProto) -> dict[str, Any]:
    """Statistics of a graph, plain JSON.

    Returns:
        operators (type -> count), nodes, parameters, weight_bytes, macs (matrix products and convolutions),
        max_rank, and voxels, the uint8 elements that are converted to float.
    """
    graph, known = model.graph, shapes(model)
    operators = Counter(node.op_type for node in graph.node)
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    return {
        "operators": dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        "nodes": len(graph.node),
        "parameters": sum(math.prod(t.dims) for t in graph.initializer if t.data_type in floats),
        "weight_bytes": size(model),
        "macs": sum(_macs(node, known) for node in graph.node),
        "max_rank": max(map(len, known.values())),
        "voxels": sum(math.prod(known[node.output[0]]) for node in byte_casts(model)),
    }


def _macs(node: onnx.NodeProto, known: dict[str, tuple[int, ...]]) -> int:
    """Multiply-accumulates of one node."""
    if node.op_type == "MatMul":
        return math.prod(known[node.output[0]]) * known[node.input[0]][-1]
    if node.op_type == "Conv":
        return math.prod(known[node.output[0]]) * math.prod(known[node.input[1]][1:])
    return 0


def byte_casts(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes that cast uint8 to float."""
    bytes_ = {value.name for value in model.graph.input if value.type.tensor_type.elem_type == TensorProto.UINT8}
    casts = []
    for node in model.graph.node:
        if node.input and node.input[0] in bytes_:
            if node.op_type == "Cast":
                casts.append(node)
            else:
                bytes_.update(node.output)
        elif any(name in bytes_ for name in node.input):
            bytes_.update(node.output)
    return casts


FP32_OPS = frozenset({"LayerNormalization", "Softmax", "ReduceMean"})
"""Operators that stay in float32 in a float16 graph: their sums and exponentials exceed its range."""

PIXEL_SCALE = 256.0
"""Float16 graphs divide pixels by this and multiply tube weights by it: weights / 255 would lose digits in float16."""


def convert_to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph in float16: weights, matrix products, sums and GELU; `FP32_OPS` stay in float32.

    Inputs and outputs keep their types (uint8 frames, float32 logits), and quantised tensors stay int8, with float16
    scales.

    Raises:
        SpecError: a weight exceeds float16.
    """
    source = model.graph
    pixels = {node.output[0] for node in byte_casts(model)}
    outputs = {value.name for value in source.output}
    nodes = [new for node in source.node for new in _fp16_nodes(node, pixels, outputs)]
    wide = {name for node in source.node if node.op_type in FP32_OPS for name in node.input[1:]}
    factors = _pixel_factors(source, pixels)
    weights = [_fp16_weight(t, factors.get(t.name, 1.0), t.name in wide) for t in source.initializer]
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
    makers = {name: node for node in graph.node for name in node.output}
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


def _fp16_nodes(node: onnx.NodeProto, pixels: set[str], outputs: set[str]) -> list[onnx.NodeProto]:
    """One node in float16, with a Cast wherever the type changes."""
    new = onnx.NodeProto()
    new.CopyFrom(node)
    name = node.output[0]
    if node.op_type in FP32_OPS:
        new.input[0], new.output[0] = f"{name}.input.fp32", f"{name}.fp32"
        return [_cast(node.input[0], new.input[0], TensorProto.FLOAT), new, _cast(new.output[0], name)]
    if name in pixels:
        scale = helper.make_node("Mul", [f"{name}.fp16", "pixels.scale"], [name], name=name)
        return [_cast(node.input[0], f"{name}.fp16"), scale]
    if name in outputs:
        new.output[0] = f"{name}.fp16"
        return [new, _cast(new.output[0], name, TensorProto.FLOAT)]
    return [new]


def _cast(source: str, target: str, to: int = TensorProto.FLOAT16) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=to)


def _fp16_weight(tensor: TensorProto, scale: float, wide: bool) -> TensorProto:
    """A float32 initializer in float16, unless it belongs to an operator of `FP32_OPS`."""
    if wide or tensor.data_type != TensorProto.FLOAT:
        return tensor
    values = numpy_helper.to_array(tensor) * np.float32(scale)
    if (largest := float(np.abs(values).max(initial=0))) > float(np.finfo(np.float16).max):
        raise SpecError(f"{tensor.name} reaches {largest:.3g}; float16 ends at 65504: export this model to fp32")
    return numpy_helper.from_array(values.astype(np.float16), tensor.name)


def _fp16_types(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> Iterator[onnx.ValueInfoProto]:
    """Type and shape of every inner tensor of the float16 graph."""
    known, outputs = shapes(model), {value.name for value in model.graph.output}
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
