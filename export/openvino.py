"""Targets of OpenVINO: the canonical graph as IR, the pair `model.xml` (operators) and `model.bin` (weights)."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from edgetube.export.base import BuildContext, Built
from edgetube.precision import Precision
from edgetube.targets import Target

if TYPE_CHECKING:
    import onnx

    from edgetube.calibration.table import ActivationScheme, CalibrationTable, IntegerFormat
    from edgetube.export.canonical import Graph

BUILD_NEEDS = ("torch", "onnx", "onnxscript", "safetensors", "openvino")
EXTRA = "export,openvino"

TARGETS = (
    Target(
        name="openvino-fp32",
        precision=Precision.FP32,
        backend="openvino",
        summary="the canonical graph for OpenVINO, computed in float32 throughout",
        build_needs=BUILD_NEEDS,
        run_needs=("openvino",),
        extra=EXTRA,
        tolerance=1e-4,
    ),
    Target(
        name="openvino-fp16",
        precision=Precision.FP16,
        backend="openvino",
        summary="half the size; computed in float16, or in bfloat16 on CPUs that multiply only that fast",
        build_needs=BUILD_NEEDS,
        run_needs=("openvino",),
        extra=EXTRA,
        tolerance=2e-2,
        arithmetic=("float16", "bfloat16"),
    ),
    Target(
        name="openvino-int8",
        precision=Precision.W8A8,
        backend="openvino",
        summary="linears in 8-bit integers, the rest in bfloat16 where the CPU has it; within the accuracy budget",
        build_needs=BUILD_NEEDS,
        run_needs=("openvino",),
        extra=EXTRA,
        arithmetic=("float32", "bfloat16"),
    ),
)

INFERENCE_PRECISION = {
    Precision.FP32: ["f32"],
    Precision.FP16: ["f16", "bf16", "f32"],
    Precision.W8A8: ["bf16", "f32"],
}
"""Types that a target's float arithmetic may run in, best first; the backend takes the first that is fast there."""

PRODUCTS = ("FullyConnected", "MatMul", "Convolution")
"""How the names of layers begin that multiply matrices in OpenVINO's executed graph."""


def activation_scheme(target: Target) -> ActivationScheme:
    """As fast as int8 here, closer to one-sided ranges, exact for pixels; shares the calibration of onnx-int8."""
    return "uint8"


def integer_format(target: Target) -> IntegerFormat:
    """Safe pairs: 16-bit sums on x86 without VNNI must not overflow, and OpenVINO has no other kernel there."""
    from edgetube.calibration.table import IntegerFormat

    return IntegerFormat(safe_pairs=True)


def build(context: BuildContext) -> Built:
    """Write `model.xml` and `model.bin`; weights of the fp16 target are float16 in the file, of the int8 target int8.

    Raises:
        ParityError: OpenVINO would compute a linear in float that the table quantises.
    """
    from edgetube.export.statistics import graph_statistics

    graph, target, path = context.graph, context.target, context.folder / "model.xml"
    precisions = inference_precision(graph.model, target)
    if context.table is not None:
        return _build_int8(graph, path, context.table, precisions)
    convert(graph.model, path, compress=target.precision is Precision.FP16)
    return Built(path.name, {"graph": graph_statistics(graph.model), "inference_precision": precisions})


def inference_precision(model: onnx.ModelProto, target: Target) -> list[str]:
    """Types that float arithmetic may run in: no bfloat16 where OpenVINO 2026.4 computes something else in it.

    Its kernel for convolutions on AMX (`brgconv_avx512_amx_bf16`) computes some wrongly: an 8x8 kernel over 24
    channels, stride 8 of the built-in model's first tube, is off by more than its largest value. Its fused attention
    is off by as much where there are as many heads as tokens, scores (B, n, n, n).
    """
    from edgetube.export.statistics import tensor_shapes

    known, types = tensor_shapes(model), INFERENCE_PRECISION[target.precision]
    scores = [known[node.input[0]] for node in model.graph.node if node.op_type == "Softmax"]
    wrong = any(node.op_type == "Conv" for node in model.graph.node)
    wrong = wrong or any(len(shape) == 4 and len(set(shape[1:])) == 1 for shape in scores)
    return [t for t in types if t != "bf16"] if wrong else types


def _build_int8(graph: Graph, path: Path, table: CalibrationTable, precisions: list[str]) -> Built:
    from edgetube.export import integer, quantize, rewrite

    model = rewrite.separate_projections(quantize.qdq(graph.model, table))
    convert(model, path, compress=False)
    products = integer_products(path, precisions)
    kernels = Counter(kernel for kernel, _ in products)
    integer.assert_integer_coverage("OpenVINO", integer.count_integer_products(model), sum(kernels.values()))
    stated = integer.coverage(model, len(table.quantised), len(table.quantised), kernels)
    details = {"graph": integer.statistics(graph.model, model), "inference_precision": precisions, "integers": stated}
    return Built(path.name, details, integer_macs=sum(macs for _, macs in products))


def integer_products(path: Path, precisions: list[str]) -> list[tuple[str, int]]:
    """The products in 8-bit integers of OpenVINO's executed graph.

    Kernel and type of each, and its multiply-accumulates in one call.
    """
    from edgetube.runtimes.openvino import compile_model

    found = []
    for layer in compile_model(path, precisions).get_runtime_model().get_ops():
        kind, precision = (str(layer.get_rt_info()[key].astype(str)) for key in ("layerType", "runtimePrecision"))
        if kind.startswith(PRODUCTS) and precision in ("i8", "u8"):
            depth = math.prod(layer.get_input_shape(1)[1:])  # the weight is (N, K), or (O, I, ...) of a convolution
            found.append((f"{kind} {precision}", depth * math.prod(layer.get_output_shape(0))))
    return found


def convert(model: onnx.ModelProto, path: Path, compress: bool) -> None:
    """Write a graph as IR; `compress` rounds float32 weights to float16."""
    from edgetube.export import canonical
    from edgetube.runtimes.openvino import core, ov

    with tempfile.TemporaryDirectory() as folder:  # a file, not bytes: weights may exceed one protobuf message
        source = Path(folder) / "model.onnx"
        canonical.save(model, source)
        ov.save_model(core().read_model(source), path, compress_to_fp16=compress)
