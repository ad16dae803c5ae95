"""Targets of ONNX Runtime: the canonical graph itself, its half precision form, and its integer kernels."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetube.export.base import BuildContext, Built
from edgetube.precision import Precision
from edgetube.targets import Setting, Target

if TYPE_CHECKING:
    from onnx import ModelProto

    from edgetube.calibration.table import ActivationScheme, CalibrationTable, IntegerFormat
    from edgetube.export.canonical import Graph

NEEDS = ("torch", "onnx", "onnxscript", "safetensors")

CPU = Setting(
    "cpu",
    "any",
    "any: uint8 times int8, exact on every processor, fastest on x86; x86: uint8 times uint8, whose sums have 32 bits "
    "on every x86; arm: int8 times int8",
    ("any", "x86", "arm"),
)

TARGETS = (
    Target(
        name="onnx-fp32",
        precision=Precision.FP32,
        backend="onnxruntime",
        summary="the canonical graph, for ONNX Runtime on any CPU",
        build_needs=NEEDS,
        run_needs=("onnxruntime",),
        tolerance=1e-4,
    ),
    Target(
        name="onnx-fp16",
        precision=Precision.FP16,
        backend="onnxruntime",
        summary="half the size; LayerNorm and softmax in fp32. For GPUs and ARM: most x86 CPUs compute fp32 faster",
        build_needs=NEEDS,
        run_needs=("onnxruntime",),
        tolerance=2e-2,
        arithmetic=("float16",),
    ),
    Target(
        name="onnx-int8",
        precision=Precision.W8A8,
        backend="onnxruntime",
        summary="linears in 8-bit integers, the rest in fp32; calibrated on clips, accuracy budget held",
        build_needs=NEEDS,
        run_needs=("onnxruntime",),
        settings=(CPU,),
    ),
)

INTEGER_KERNELS = ("MatMulIntegerToFloat", "QGemm", "QLinearMatMul", "DynamicQuantizeMatMul", "MatMulInteger")
"""Operators of ONNX Runtime's CPU provider that multiply 8-bit integers."""


def activation_scheme(target: Target) -> ActivationScheme:
    """uint8 with a zero point is finer for one-sided ranges; ARM's dot products need two signed operands."""
    return "int8" if target.setting(CPU.name) == "arm" else "uint8"


def integer_format(target: Target) -> IntegerFormat:
    """Safe pairs: 16-bit sums on x86 without VNNI must not overflow, wherever the file is written."""
    from edgetube.calibration.table import IntegerFormat

    return IntegerFormat(safe_pairs=True)


def build(context: BuildContext) -> Built:
    """Write `model.onnx` (weights beside it in `model.onnx.data` when they exceed `canonical.MAX_ONE_FILE`).

    Raises:
        ParityError: ONNX Runtime would compute a linear in float that the table quantises.
    """
    from edgetube.export import canonical
    from edgetube.export.float16 import convert_to_fp16
    from edgetube.export.statistics import graph_statistics

    graph, target, path = context.graph, context.target, context.folder / "model.onnx"
    if context.table is not None:
        return _build_int8(graph, path, context.table, target.setting(CPU.name))
    model = graph.model if target.precision is Precision.FP32 else convert_to_fp16(graph.model)
    canonical.save(model, path)
    return Built(path.name, {"graph": graph_statistics(model)})


def _build_int8(graph: Graph, path: Path, table: CalibrationTable, cpu: str) -> Built:
    from edgetube.export import canonical, integer

    model = integer.to_integer_kernels(graph.model, table, unsigned_weights=cpu == "x86")
    canonical.save(model, path)
    products = integer_products(path)
    kernels = Counter(kernel for kernel, _ in products)
    integer.assert_integer_coverage("ONNX Runtime", len(table.quantised), sum(kernels.values()))
    stated = integer.coverage(model, len(table.quantised), len(table.quantised), kernels)
    details = {"graph": integer.statistics(graph.model, model), "integers": {**stated, "cpu": cpu}}
    return Built(path.name, details, integer_macs=sum(macs for _, macs in products))


def integer_products(path: Path) -> list[tuple[str, int]]:
    """The products by constant matrices in 8-bit integers of ONNX Runtime's optimised graph.

    Kernel of each, and its multiply-accumulates in one call. Any ONNX file is allowed; it is opened with the options of
    the backend, and the optimised graph is read back.
    """
    import onnx

    from edgetube.export.statistics import tensor_shapes
    from edgetube.runtimes.onnxruntime import optimise

    with tempfile.TemporaryDirectory() as folder:
        optimised = onnx.load(optimise(path, Path(folder) / "optimised.onnx"), load_external_data=False)
    depths = {tensor.name: tensor.dims[0] for tensor in optimised.graph.initializer if len(tensor.dims) == 2}
    shapes = tensor_shapes(optimised)
    return [
        (node.op_type, depths[matrix] * math.prod(shapes[node.output[0]]))
        for node in optimised.graph.node
        for matrix in node.input
        if node.op_type in INTEGER_KERNELS and matrix in depths
    ]


def evaluate(model: ModelProto) -> Callable[[Mapping[str, Any]], list[Any]]:
    """Open any graph on the CPU: feeds by input name -> its outputs. Calibration runs graphs through this.

    It is called by several threads. Where they are as many as there are cores, each call has one.
    """
    from edgetube import processes
    from edgetube.calibration import storage
    from edgetube.runtimes.onnxruntime import evaluate as opened

    threads = 1 if processes.side_by_side() == processes.cores() else None
    return opened(storage.relative(model).SerializeToString(), storage.folder_of(model), threads)
