"""Targets of LiteRT: the canonical graph as a TFLite file, for Android, Raspberry Pi and other ARM boards.

The graph is translated operator by operator (`lowering.py`): the converters from PyTorch and TensorFlow are not needed.
"""

from __future__ import annotations

from edgetube.export.base import BuildContext, Built
from edgetube.precision import Precision
from edgetube.targets import Target

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
)

ARTIFACT = "model.tflite"


def build(context: BuildContext) -> Built:
    """Write `model.tflite`.

    Raises:
        SpecError: the graph has an operator without translation, or more weights than one file can hold.
    """
    from edgetube.export.litert.lowering import Lowering
    from edgetube.export.statistics import graph_statistics

    graph, target, path = context.graph, context.target, context.folder / ARTIFACT
    writer = Lowering(graph.model, half=target.precision is Precision.FP16).run()
    writer.save(path, [value.name for value in graph.model.graph.input], [graph.model.graph.output[0].name])
    return Built(path.name, {"graph": graph_statistics(graph.model), "operators": writer.operators})
