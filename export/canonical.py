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
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer, rewriter

from edgetube.calibration import storage
from edgetube.contract import InputContract
from edgetube.errors import SpecError
from edgetube.export import memory
from edgetube.export.static import StaticTransformer
from edgetube.export.statistics import tensor_shapes
from edgetube.export.tokenizer import StaticTokenizer
from edgetube.roles import GraphRoles
from edgetube.spec import ModelSpec

OPSET = 20
IR_VERSION = 9
MAX_RANK = 5
MAX_ONE_FILE = 1_000_000_000
"""Most bytes of weights in the file of a graph; larger models store them in a second file.

A protobuf message ends at 2 GB. Runtimes map a second file, but parse and copy a message: ONNX Runtime needs three
times the weights for a while.
"""

SHAPE_OPS = frozenset({"Shape", "Size", "NonZero", "Range", "ConstantOfShape", "Loop", "If", "Scan", "Identity"})
"""Operators that a static graph must not contain."""


@dataclass(frozen=True)
class Graph:
    """A checked canonical graph.

    Attributes:
        model: float32 ONNX; `frames` uint8 (batch, T, H, W, 3) -> `logits` float32 (batch, classes).
        spec, contract, batch: of the model.
        lowering: how the tubes are lowered, one of `tokenizer.LOWERINGS`.
        roles: of its tensors.
        labels: class names in the order of the logits; empty where unknown.
    """

    model: onnx.ModelProto
    spec: ModelSpec
    contract: InputContract
    batch: int
    lowering: str
    roles: GraphRoles
    labels: tuple[str, ...] = ()


def trace(
    module: StaticTransformer | StaticTokenizer,
    spec: ModelSpec,
    contract: InputContract,
    batch: int = 1,
    folder: Path | None = None,
) -> Graph:
    """The canonical graph of a static model (or of its tokenizer alone, output `tokens`).

    Args:
        folder: for the weights of a graph that has more than `storage.LIMIT` of them; None keeps them in memory.

    Raises:
        SpecError: the traced graph is not static, or has a tensor above rank 5.
        OSError: the disk of `folder` is full or fails.
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
    del program  # it holds the module's tensors
    _fold(canonical)
    _name(canonical, module.output)
    _name_constants(canonical.graph, {name for name, _ in (*module.named_parameters(), *module.named_buffers())})
    _state_shapes(canonical.graph)
    _share_constants(canonical.graph)
    _share_tables(canonical.graph)
    _clean_up(canonical)
    canonical.doc_string = (
        f"frames uint8 {(batch, *contract.shape)} RGB -> {module.output}; pixels are normalised inside"
    )
    canonical.metadata_props.update(
        {"spec": _json(spec.to_json()), "input": _json(contract.to_json()), "lowering": module.lowering}
    )
    model = _to_proto(canonical, folder)
    del canonical
    memory.release()
    check(model)
    return Graph(model, spec, contract, batch, module.lowering, module.roles)


def _to_proto(model: ir.Model, folder: Path | None) -> onnx.ModelProto:
    """The graph as a message; above `storage.LIMIT`, its weights are in files of `folder`. `model` loses its own."""
    constants = {name: v.const_value for name, v in model.graph.initializers.items() if v.const_value is not None}
    if folder is None or sum(constant.nbytes for constant in constants.values()) < storage.LIMIT:
        return ir.to_proto(model)
    tensors = []
    for name, constant in constants.items():
        tensors.append(storage.make(name, constant.numpy(), folder))
        model.graph.initializers[name].const_value = ir.tensor(np.zeros(0, np.float32), name=name)
    result = ir.to_proto(model)
    del result.graph.initializer[:]
    result.graph.initializer.extend(tensors)
    return result


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
    _drop_casts(model.graph)


def _drop_casts(graph: ir.Graph) -> None:
    """Drop casts to the type that a tensor has, and those of int32 indices to int64: Gather reads either."""
    for node in [node for node in graph if node.op_type == "Cast"]:
        (value,), (made,) = node.inputs, node.outputs
        assert value is not None
        indices = {(user.op_type, place) for user, place in made.uses()} == {("Gather", 1)}
        if value.dtype == made.dtype or (indices and value.dtype == ir.DataType.INT32):
            ir.convenience.replace_all_uses_with(made, value)
            graph.remove(node, safe=True)


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


def _name_constants(graph: ir.Graph, known: set[str]) -> None:
    """Name what was folded to a constant, of which the module has none, after its first reader."""
    for value in list(graph.initializers.values()):
        made_by_folding = value.name not in known and "." not in str(value.name) and value.dtype != ir.DataType.INT64
        if made_by_folding and (uses := list(value.uses())):
            value.name = f"{uses[0].node.name}.constant{uses[0].idx}"


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
            if (index := ir.convenience.get_const_tensor(fetched)) is None:
                continue  # of tokens that are chosen by their values
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


def _share_tables(graph: ir.Graph) -> None:
    """Share the tables of rotary positions, which are the same in every block: one initializer, with its first name.

    They are what a Mul reads of rank 2; weights that happen to be equal keep their own names.
    """
    shared: dict[tuple[tuple[int, ...], bytes], ir.Value] = {}
    for value in list(graph.initializers.values()):
        constant = value.const_value
        if constant is None or len(constant.shape) != 2 or {node.op_type for node, _ in value.uses()} != {"Mul"}:
            continue
        array = constant.numpy()
        first = shared.setdefault((array.shape, array.tobytes()), value)
        if first is not value:
            ir.convenience.replace_all_uses_with(value, first)


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
    graph.name = "edgetube"


def check(model: onnx.ModelProto) -> None:
    """Check that a graph is valid ONNX, static, and of rank 5 at most.

    Raises:
        SpecError: it is not; names the tensor or operator.
    """
    storage.check(model, shapes=True)
    if left := sorted({node.op_type for node in model.graph.node} & SHAPE_OPS):
        raise SpecError(f"the graph is not static: {', '.join(left)} left in it")
    known = tensor_shapes(model)
    for node in model.graph.node:
        for name in node.output:
            shape = known.get(name, (-1,))
            if min(shape, default=1) < 1:
                raise SpecError(f"the shape of {name} ({node.op_type}) is {shape}; expected a static one")
            if len(shape) > MAX_RANK:
                raise SpecError(f"{name} ({node.op_type}) has rank {len(shape)}, {shape}; the most is {MAX_RANK}")


def save(model: onnx.ModelProto, path: str | Path) -> None:
    """Write a graph, tensor by tensor; above `MAX_ONE_FILE`, its weights go to `<name>.data` beside it."""
    path = Path(path)
    if storage.total(model) < MAX_ONE_FILE:
        storage.write(model, path)
    else:
        storage.write_apart(model, path, path.with_name(f"{path.name}.data"))
