"""Targets of LiteRT: the canonical graph as a TFLite file, for Android, Raspberry Pi and other ARM boards.

The graph is translated operator by operator (`lowering.py`): the converters from PyTorch and TensorFlow are not needed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgetube.export.base import BuildContext, Built
from edgetube.precision import Precision
from edgetube.targets import Target

if TYPE_CHECKING:
    from edgetube.calibration.table import ActivationScheme, CalibrationTable, IntegerFormat
    from edgetube.export.canonical import Graph

NEEDS = ("torch", "onnx", "onnxscript", "safetensors", "ai_edge_litert")
EXTRA = "export,litert"

TARGETS = (
    Target(
        name="litert-fp32",
        precision=Precision.FP32,
        backend="litert",
        summary="TFLite file for Android and ARM boards, computed in float32 by XNNPACK",
        build_needs=NEEDS,
        run_needs=("ai_edge_litert",),
        extra=EXTRA,
        tolerance=1e-4,
    ),
    Target(
        name="litert-fp16",
        precision=Precision.FP16,
        backend="litert",
        summary="weights stored as float16, half the size; CPUs compute it in float32",
        build_needs=NEEDS,
        run_needs=("ai_edge_litert",),
        extra=EXTRA,
        tolerance=2e-2,
        arithmetic=("float32", "float16"),
    ),
    Target(
        name="litert-int8",
        precision=Precision.W8A8,
        backend="litert",
        summary="linears in 8-bit integers, each token's activations by their own range; the rest in float32",
        build_needs=NEEDS,
        run_needs=("ai_edge_litert",),
        extra=EXTRA,
    ),
)

ARTIFACT = "model.tflite"


def activation_scheme(target: Target) -> ActivationScheme:
    """uint8 with a zero point, as XNNPACK rounds a row; shares the calibration of other targets for CPUs."""
    return "uint8"


def integer_format(target: Target) -> IntegerFormat:
    """Safe pairs, as other targets for CPUs, whose calibration is shared; XNNPACK itself sums in 32 bits."""
    from edgetube.calibration.table import IntegerFormat

    return IntegerFormat(safe_pairs=True)


def build(context: BuildContext) -> Built:
    """Write `model.tflite`.

    Raises:
        SpecError: the graph has an operator without translation, or more weights than one file can hold.
        ParityError: LiteRT would compute a linear in float that the table quantises.
    """
    from edgetube.export.litert.lowering import Lowering
    from edgetube.export.statistics import by_count, graph_statistics

    graph, target, table, path = context.graph, context.target, context.table, context.folder / ARTIFACT
    lowering = Lowering(graph.model, target.precision is Precision.FP16, table.quantised if table else ())
    writer = lowering.run()
    writer.save(path, [value.name for value in graph.model.graph.input], [graph.model.graph.output[0].name])
    details = {"graph": graph_statistics(graph.model), "operators": by_count(writer.operators)}
    if table is None:
        return Built(path.name, details)
    details["integers"] = _integers(graph, table, len(lowering.integer_products))
    used = replace(table, ranges={})  # each row of an activation has a range of its own, found when it is computed
    return Built(path.name, details, table=used, integer_macs=sum(lowering.integer_products))


def _integers(graph: Graph, table: CalibrationTable, products: int) -> dict[str, Any]:
    """For the manifest: the products in integers; see `edgetube.export.integer.coverage`.

    Raises:
        ParityError: there are fewer than the table asks for, or this LiteRT computes them in float.
    """
    from edgetube.export import integer, quantize
    from edgetube.runtimes.litert import multiplies_integers

    model = quantize.qdq(graph.model, table)
    executed = products if multiplies_integers() else 0
    integer.assert_integer_coverage("LiteRT", integer.count_integer_products(model), executed)
    return integer.coverage(model, len(table.quantised), len(table.quantised), {"FULLY_CONNECTED hybrid": executed})
