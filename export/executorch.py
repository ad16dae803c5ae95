"""Targets of ExecuTorch: the canonical graph as a program `model.pte`, what XNNPACK can compute delegated to it."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetube.export.base import BuildContext, Built, CalibrationRequest
from edgetube.precision import Precision
from edgetube.targets import Target

if TYPE_CHECKING:
    import onnx
    from executorch.exir import EdgeProgramManager
    from torch import Tensor

    from edgetube.calibration.table import ActivationScheme, CalibrationTable, IntegerFormat
    from edgetube.export.canonical import Graph

BUILD_NEEDS = ("torch", "onnx", "onnxscript", "safetensors", "executorch.exir")
RUN_NEEDS = ("torch", "executorch.runtime")
EXTRA = "export,executorch"

TARGETS = (
    Target(
        name="executorch-fp32",
        precision=Precision.FP32,
        backend="executorch",
        summary="a program for ExecuTorch on Android, iOS and boards; XNNPACK computes it in float32",
        build_needs=BUILD_NEEDS,
        run_needs=RUN_NEEDS,
        extra=EXTRA,
        tolerance=1e-4,
    ),
    Target(
        name="executorch-int8",
        precision=Precision.W8A8,
        backend="executorch",
        summary="linears in 8-bit integers by XNNPACK, their inputs and outputs too; within the accuracy budget",
        build_needs=BUILD_NEEDS,
        run_needs=RUN_NEEDS,
        extra=EXTRA,
    ),
)

ARTIFACT = "model.pte"

DELEGATE = "XnnpackBackend"

INTEGERS = ("qint8", "qcint8", "qint8")
"""Types of input, weight and output of a static product in integers: per tensor, per channel, per tensor."""


def activation_scheme(target: Target) -> ActivationScheme:
    """Shares the calibration of onnx-int8; uint8 with zero point z is int8 with z - 128, which XNNPACK computes in."""
    return "uint8"


def integer_format(target: Target) -> IntegerFormat:
    """That of onnx-int8, to share its calibration: XNNPACK sums in 32 bits on every processor."""
    from edgetube.calibration.table import IntegerFormat

    return IntegerFormat(safe_pairs=True)


def calibration_request(graph: Graph, target: Target) -> CalibrationRequest:
    """XNNPACK's static integer products round their outputs to 8 bits, too."""
    from edgetube.calibration import graphs

    given = graphs.inner_linear_outputs(graph.model).values()
    return CalibrationRequest(tuple(name for names in given for name in names))


def quantized_graph(model: onnx.ModelProto, table: CalibrationTable, target: Target) -> onnx.ModelProto:
    """What XNNPACK computes of a calibrated graph, for a simulation."""
    from edgetube.export import quantize

    return quantize.qdq(model, table, outputs=True)


def build(context: BuildContext) -> Built:
    """Write `model.pte`.

    Raises:
        ParityError: XNNPACK would compute a linear in float that is quantised.
    """
    return build_showing(context, ())


def build_showing(context: BuildContext, names: Sequence[str]) -> Built:
    """The same, which also returns inner tensors."""
    from edgetube.export.statistics import graph_statistics

    graph, path = context.graph, context.folder / ARTIFACT
    if context.table is not None:
        return _build_int8(graph, path, context.table, names)
    program = lower(graph.model, names)
    details = {"graph": graph_statistics(graph.model), "delegation": delegation(program)}
    save(program, path)
    return Built(path.name, details)


def _build_int8(graph: Graph, path: Path, table: CalibrationTable, names: Sequence[str]) -> Built:
    from edgetube.export import integer, quantize, rewrite

    kept, floats = answers_in_float(graph.model, table)
    model = rewrite.separate_projections(quantize.qdq(graph.model, kept, outputs=True))
    program = lower(_one_reader_each(model), names)
    products = integer_products(program)
    integer.assert_integer_coverage("XNNPACK", integer.count_integer_products(model), len(products))
    kernels = Counter(kernel for kernel, _ in products)
    stated = integer.coverage(model, len(kept.quantised), len(kept.quantised), kernels)
    details = {
        "graph": integer.statistics(graph.model, model),
        "delegation": delegation(program),
        "integers": {**stated, "saturates": False},  # XNNPACK sums in 32 bits
    }
    save(program, path)
    notes = [f"{', '.join(floats)} in float: XNNPACK would round the logits to 8 bits"] if floats else []
    macs = sum(work for _, work in products)
    return Built(path.name, details, table=kept, notes=tuple(notes), integer_macs=macs)


def answers_in_float(model: onnx.ModelProto, table: CalibrationTable) -> tuple[CalibrationTable, list[str]]:
    """A table in which the linears that give the answer stay float, and the names of those that it quantised.

    What only they read has no range then.
    """
    from edgetube.calibration import graphs

    given = graphs.inner_linear_outputs(model)
    floats = [plan.name for plan in table.quantised if not given[plan.name]]
    plans = tuple(
        replace(plan, precision="float", weight_scales=(), reason="its outputs are the answer")
        if plan.name in floats
        else plan
        for plan in table.linears
    )
    unread = {plan.activation for plan in table.quantised} - {p.activation for p in plans if p.precision == "int8"}
    ranges = {name: found for name, found in table.ranges.items() if name not in unread}
    return replace(table, ranges=ranges, linears=plans), floats


def _one_reader_each(model: onnx.ModelProto) -> onnx.ModelProto:
    """A Q/DQ graph with a DequantizeLinear for each reader of an activation.

    XNNPACK's partitioner makes one that a product reads a part of that product, and the rest cannot read it then.
    """
    result = deepcopy(model)
    constants = {tensor.name for tensor in model.graph.initializer}
    shared = {
        node.output[0]: node
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] not in constants
    }
    nodes: list[onnx.NodeProto] = []
    for node in result.graph.node:
        if node.output[0] in shared:
            continue
        for i, name in enumerate(node.input):
            if name in shared:
                nodes.append(deepcopy(shared[name]))
                nodes[-1].output[0] = nodes[-1].name = node.input[i] = f"{name}.{node.output[0]}"
        nodes.append(deepcopy(node))
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def integer_products(program: EdgeProgramManager) -> list[tuple[str, int]]:
    """The products in 8-bit integers of the graphs that XNNPACK is given.

    Kernel of each, and its multiply-accumulates in one call.
    """
    found = []
    for graph in xnnpack_graphs(program):
        tensors = dict(_tensor(value) for value in graph["xvalues"])
        for node in graph["xnodes"]:
            if (kind := node["xnode_union_type"]) != "XNNFullyConnected":
                continue
            names = ("input1_id", "filter_id", "output_id")
            types, shapes = zip(*(tensors[node["xnode_union"][name]] for name in names), strict=True)
            if types == INTEGERS:
                macs = math.prod(shapes[2]) * shapes[1][1]  # the weight is (N, K)
                found.append((f"{kind.removeprefix('XNN')} {' '.join(types)}", macs))
    return found


def _tensor(value: Mapping[str, Any]) -> tuple[int, tuple[str, tuple[int, ...]]]:
    """Number of a tensor of XNNPACK's graph, its type without the prefix, and its shape."""
    tensor = value["xvalue_union"]
    tensor = tensor.get("tensor_value", tensor)
    return tensor["id_out"], (tensor["datatype"].removeprefix("xnn_datatype_"), tuple(tensor["dims"]))


def lower(model: onnx.ModelProto, names: Sequence[str] = ()) -> EdgeProgramManager:
    """A canonical graph or its Q/DQ form with everything delegated to XNNPACK that its partitioner takes.

    Args:
        names: inner tensors that the program also returns, behind the graph's output.
    """
    import torch

    from edgetube.export.statistics import tensor_shapes
    from edgetube.export.torchgraph import TorchGraph
    from edgetube.runtimes.executorch import no_warnings

    frames = torch.zeros(tensor_shapes(model)[model.graph.input[0].name], dtype=torch.uint8)
    with no_warnings():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        aten = torch.ops.aten
        table = {aten.split_with_sizes.default: _split, aten.matmul.default: _matmul, aten.gelu.default: _gelu}
        module = TorchGraph(model, (model.graph.output[0].name, *names))
        program = torch.export.export(module, (frames,)).run_decompositions(table)
        return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])


def _split(x: Tensor, sizes: Sequence[int], axis: int = 0) -> list[Tensor]:
    """A split in slices: XNNPACK has no operator for a split, which would end a delegated part."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [x.narrow(axis, end - size, size) for size, end in zip(sizes, ends, strict=True)]


def _matmul(left: Tensor, right: Tensor) -> Any:
    """A product of two batches of matrices, (..., N, K) and (..., K, M), in three axes.

    The usual decomposition copies the operands, and XNNPACK has no operator for that.
    """
    import torch

    if left.shape[:-2] != right.shape[:-2]:
        return NotImplemented
    product = torch.bmm(left.reshape(-1, *left.shape[-2:]), right.reshape(-1, *right.shape[-2:]))
    return product.reshape(*left.shape[:-1], right.shape[-1])


def _gelu(x: Tensor, *, approximate: str = "none") -> Any:
    """The approximation by tanh in its parts: delegated whole, it is computed as if it was exact, 5e-4 off."""
    import torch

    if approximate == "none":
        return NotImplemented
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1 + torch.tanh(inner))


def save(program: EdgeProgramManager, path: Path) -> None:
    """Write a program as a file that ExecuTorch runs; what is left of `program` is not what it was."""
    from edgetube.runtimes.executorch import no_warnings

    with no_warnings(), path.open("wb") as file:
        program.to_executorch().write_to_file(file)


def delegation(program: EdgeProgramManager) -> dict[str, Any]:
    """What XNNPACK computes and what is left to ExecuTorch's own operators, plain JSON.

    Returns:
        delegates: number of parts that XNNPACK computes; delegated: its operators in them (type -> count); portable:
        the operators outside of them (name -> count).
    """
    from edgetube.export.statistics import by_count

    delegated = Counter(
        node["xnode_union_type"].removeprefix("XNN") for graph in xnnpack_graphs(program) for node in graph["xnodes"]
    )
    called = [node.target for node in program.exported_program().graph.nodes if node.op == "call_function"]
    names = Counter(getattr(target, "__name__", str(target)) for target in called)
    return {
        "delegates": names.pop("executorch_call_delegate", 0),
        "delegated": by_count(delegated),
        "portable": by_count({name: count for name, count in names.items() if name != "getitem"}),
    }


def xnnpack_graphs(program: EdgeProgramManager) -> list[dict[str, Any]]:
    """The graphs that XNNPACK is given, read from the bytes of the delegated parts: `xnodes` and `xvalues`."""
    from executorch.exir.lowered_backend_module import get_lowered_backend_modules

    modules = get_lowered_backend_modules(program.exported_program().graph_module)
    return [_parse(module.processed_bytes) for module in modules if module.backend_id == DELEGATE]


def _parse(delegate: bytes) -> dict[str, Any]:
    """XNNPACK's part of a program as JSON: a header says where the flatbuffer lies.

    The package reads and writes flatbuffers with a compiler that it brings, by these functions alone.
    """
    from importlib import resources

    from executorch.backends.xnnpack import serialization
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(delegate[: XNNHeader.EXPECTED_LENGTH])
    start = header.flatbuffer_offset
    with tempfile.TemporaryDirectory() as folder:
        schema, binary = Path(folder) / "schema.fbs", Path(folder) / "graph.bin"
        schema.write_bytes(resources.files(serialization).joinpath(schema.name).read_bytes())
        binary.write_bytes(delegate[start : start + header.flatbuffer_size])
        _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary", "--defaults-json"])
        found: dict[str, Any] = json.loads(binary.with_suffix(".json").read_text())
    return found
