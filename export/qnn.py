"""Targets of Qualcomm's NPU on Snapdragon: an ONNX file for ONNX Runtime's QNN provider, and compiled contexts.

The NPU computes `Cast` of uint8 to float wrongly, without an error. So pixels are quantised values from the input on.
A context binary is the file as the vendor's compiler compiles it for one SoC; a device without one compiles the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetube.errors import InputError, ParityError
from edgetube.export.base import BuildContext, Built, CalibrationRequest
from edgetube.precision import Precision
from edgetube.targets import Setting, Target

if TYPE_CHECKING:
    import onnx

    from edgetube.calibration.table import ActivationScheme, CalibrationTable
    from edgetube.export.canonical import Graph
    from edgetube.export.pairs import IntegerGraph

NEEDS = ("torch", "onnx", "onnxscript", "safetensors", "onnxruntime_qnn")

SOC = Setting(
    "soc",
    "sm8550,sm8650,sm8750",
    "the SoCs to compile for, with commas: Snapdragon 8 Gen 2, Gen 3 and 8 Elite; none: the device compiles",
)

ALL_TOKENS = (
    "in integers the NPU's emulator (QAIRT 2.51) computes the logarithm of the tokens' sizes, and rotary positions of "
    "the tokens that are left, wrongly"
)

TARGETS = (
    Target(
        name="qnn-fp16",
        precision=Precision.FP16,
        backend="qnn",
        summary="Qualcomm's NPU in float16, Snapdragon 8 Gen 2 and later; compiled here for each SoC",
        build_needs=NEEDS,
        run_needs=("onnxruntime_qnn",),
        extra="export,qnn",
        tolerance=2e-2,
        arithmetic=("float16",),
        settings=(SOC,),
    ),
    Target(
        name="qnn-w8a16",
        precision=Precision.W8A16,
        backend="qnn",
        summary="Qualcomm's NPU in integers: weights of 8, activations of 16 bits; calibrated on clips",
        build_needs=NEEDS,
        run_needs=("onnxruntime_qnn",),
        extra="export,qnn",
        arithmetic=("float16",),
        settings=(SOC,),
        all_tokens=ALL_TOKENS,
    ),
    Target(
        name="qnn-w8a8",
        precision=Precision.W8A8,
        backend="qnn",
        summary="the same, with 8 bits into and out of linears, and 16 bits between them",
        build_needs=NEEDS,
        run_needs=("onnxruntime_qnn",),
        extra="export,qnn",
        arithmetic=("float16",),
        settings=(SOC,),
        all_tokens=ALL_TOKENS,
    ),
)

AGREEMENT = 1e-2
"""Largest difference of the logits of two SoCs' contexts, relative to the largest logit (at least 1)."""


def activation_scheme(target: Target) -> ActivationScheme:
    """Integers with a zero point, of 16 or 8 bits."""
    return "uint16" if target.precision is Precision.W8A16 else "uint8"


def calibration_request(graph: Graph, target: Target) -> CalibrationRequest:
    """The ranges of everything that is computed between the linears, and of what they give."""
    from edgetube.calibration import graphs
    from edgetube.export.statistics import byte_casts

    model = graph.model
    linears, outputs = graphs.linears(model), tuple(graphs.linear_outputs(model).values())
    pixels = {node.output[0] for node in byte_casts(model)}
    read = {linear.activation for linear in linears} | pixels
    biased = {node.output[0] for node in model.graph.node for linear in linears if linear.node == node.name}
    known = read | biased | {*outputs}
    names = [
        name
        for node in model.graph.node
        for name in node.output
        if node.op_type not in (*graphs.MOVES, "Cast", "Softmax", "Conv") and name not in known
    ]
    given = tuple(name for name in outputs if name not in read)
    if target.precision is Precision.W8A16:
        return CalibrationRequest((*given, *names))
    return CalibrationRequest(given, wide=tuple(names))


def quantized_graph(model: onnx.ModelProto, table: CalibrationTable, target: Target) -> onnx.ModelProto:
    """What the NPU computes of a calibrated graph, for a simulation."""
    from edgetube.export import pairs

    return pairs.integer_pairs(model, table, narrow=target.precision is Precision.W8A8).model


def build(context: BuildContext) -> Built:
    """Write `model.onnx`, and for each SoC `<soc>.onnx` with its binary `<soc>_qnn.bin`.

    Operators of an integer target that the NPU does not take in integers are left to float16; linears are not.

    Raises:
        InputError: an unknown SoC.
        BackendError: the NPU does not take an operator; with its name.
        ParityError: the NPU does not take a linear in integers, or the contexts of two SoCs answer differently.
    """
    from edgetube.calibration import graphs
    from edgetube.export import canonical, integer, pairs
    from edgetube.runtimes import qnn as runtime

    graph, table, path = context.graph, context.table, context.folder / "model.onnx"
    socs = parse_socs(context.target)
    details: dict[str, Any] = {
        "settings": {SOC.name: context.target.setting(SOC.name)},
        "qairt": runtime.qairt_version(),
    }
    macs = 0
    if table is None:
        model = pairs.pixel_pairs(graph.model)
        canonical.save(model, path)
    else:
        narrow = context.target.precision is Precision.W8A8
        made, floats = _integers(graph.model, table, narrow, path, socs or (next(iter(runtime.SOCS)),))
        model, count = made.model, len(made.linears)
        asked = [plan.name for plan in table.quantised]
        integer.assert_integer_coverage("the NPU", len(asked), count)
        kernel = "Gemm uint8 int8" if narrow else "Gemm uint16 int8"
        details["integers"] = {
            **integer.coverage(model, len(asked), count, {kernel: count}),
            "saturates": False,  # the NPU sums in 32 bits
            "float16": floats,
        }
        work = graphs.macs(graph.model)
        macs = sum(work[name] for name in made.linears)
    details |= {"graph": integer.statistics(graph.model, model), "contexts": compile_contexts(path, socs, model)}
    return Built(path.name, details, integer_macs=macs)


def _integers(
    model: onnx.ModelProto, table: CalibrationTable, narrow: bool, path: Path, socs: Sequence[str]
) -> tuple[IntegerGraph, list[str]]:
    """Write the graph in integers, but for operators that the NPU of a SoC does not take; their names."""
    from edgetube.export import canonical, pairs
    from edgetube.runtimes import qnn as runtime

    floats: set[str] = set()
    while True:
        made = pairs.integer_pairs(model, table, narrow=narrow, floats=floats)
        canonical.save(made.model, path)
        refused = {made.origins.get(name, name) for soc in socs for name, _ in runtime.refused_operators(path, soc)}
        if refused <= floats:
            return made, sorted(floats)
        floats |= refused


def parse_socs(target: Target) -> tuple[str, ...]:
    """The SoCs of the setting.

    Raises:
        InputError: one is unknown.
    """
    from edgetube.runtimes.qnn import SOCS, find_soc

    chosen = target.setting(SOC.name)
    if chosen == "none":
        return ()
    if not (names := [name.strip() for name in chosen.split(",") if name.strip()]):
        raise InputError(f"soc is {chosen!r}; expected names with commas of {', '.join(SOCS)}, or none")
    return tuple(dict.fromkeys(map(find_soc, names)))


def compile_contexts(path: Path, socs: tuple[str, ...], model: onnx.ModelProto) -> dict[str, str]:
    """Compile a file for each SoC, and run each on one clip of noise; SoC -> the name of its context.

    Raises:
        BackendError: the NPU does not take an operator, or does not open its context.
        ParityError: two contexts answer differently.
    """
    import numpy as np

    from edgetube.runtimes import qnn as runtime

    (frames,) = model.graph.input
    shape = [d.dim_value for d in frames.type.tensor_type.shape.dim]
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    answers = {}
    for soc in socs:
        context = path.with_name(f"{soc}.onnx")
        runtime.compile_context(path, context, soc)
        answers[soc] = runtime.run_once(context, soc, {frames.name: noise})
    for soc in socs[1:]:
        first, other = answers[socs[0]], answers[soc]
        difference = float(np.abs(other - first).max() / max(1.0, float(np.abs(first).max())))
        if not difference <= AGREEMENT:
            raise ParityError(
                f"the context binaries of {socs[0]} and {soc} answer a clip of noise differently, by {difference:.2g} "
                "of the largest output; nothing was written: leave out one of them"
            )
    return {soc: f"{soc}.onnx" for soc in socs}
