"""Targets of Qualcomm's NPU on Snapdragon: an ONNX file for ONNX Runtime's QNN provider, and compiled contexts.

The NPU computes `Cast` of uint8 to float wrongly, without an error. So pixels are quantised values from the input on.
A context binary is the file as the vendor's compiler compiles it for one SoC; a device without one compiles the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgetube.errors import InputError, ParityError
from edgetube.export.base import BuildContext, Built
from edgetube.precision import Precision
from edgetube.targets import Setting, Target

if TYPE_CHECKING:
    import onnx

NEEDS = ("torch", "onnx", "onnxscript", "safetensors", "onnxruntime_qnn")

SOC = Setting(
    "soc",
    "sm8550,sm8650,sm8750",
    "the SoCs to compile for, with commas: Snapdragon 8 Gen 2, Gen 3 and 8 Elite; none: the device compiles",
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
)

AGREEMENT = 1e-2
"""Largest difference of the logits of two SoCs' contexts, relative to the largest logit (at least 1)."""


def build(context: BuildContext) -> Built:
    """Write `model.onnx`, and for each SoC `<soc>.onnx` with its binary `<soc>_qnn.bin`.

    Raises:
        InputError: an unknown SoC.
        BackendError: the NPU does not take an operator; with its name.
        ParityError: the contexts of two SoCs answer differently.
    """
    from edgetube.export import canonical, integer, pairs
    from edgetube.runtimes import qnn as runtime

    graph, folder = context.graph, context.folder
    socs = parse_socs(context.target)
    model = pairs.pixel_pairs(graph.model)
    path = folder / "model.onnx"
    canonical.save(model, path)
    contexts = compile_contexts(path, socs, model)
    details = {
        "graph": integer.statistics(graph.model, model),
        "settings": {SOC.name: context.target.setting(SOC.name)},
        "contexts": contexts,
        "qairt": runtime.qairt_version(),
    }
    return Built(path.name, details)


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
