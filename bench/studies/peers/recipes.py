"""Other tools that run the same checkpoint on a CPU, and other models that could be used instead.

A recipe has an optional `build`, which makes its files in a folder of its own, and a `load`, which gives a call
from frames (1, T, H, W, 3) uint8 to logits (1, classes). Each is what the package's own documentation shows, at the
package's defaults; threads are left to each runtime. Packages are imported by those who use them: the cold start and
the memory of a recipe are its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgetube import Runtime
from edgetube.bench.worker import Benchmarkable, StageTimer

Frames = np.ndarray
Call = Callable[[Frames], np.ndarray]

SOURCE, CLIPS, CALIBRATION = "source.json", "clips.npy", "calibration.npy"
"""In the work folder: the checkpoint's name, clips to compare and to time with, clips to calibrate with."""

ONNX, QUANTISED = "model.onnx", "quantised.onnx"


@dataclass(frozen=True)
class Recipe:
    """One line of the table: how to build and open it.

    Attributes:
        group: recipes of one group take turns with one another, in one run.
        packages: whose versions matter.
        load: (work folder, own folder) -> call.
        build: (work folder, own folder), once, before anything is timed.
        precision: of most of its arithmetic, as far as its maker says.
        same: whether it is the same checkpoint; else its weights are random and only the time means something.
    """

    group: str
    precision: str
    packages: tuple[str, ...]
    load: Callable[[Path, Path], Call]
    build: Callable[[Path, Path], None] | None = None
    same: bool = True


def slug(name: str) -> str:
    """The folder of a recipe."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


def source(work: Path) -> str:
    """The checkpoint, as `--checkpoint` takes it."""
    return str(json.loads((work / SOURCE).read_text())["checkpoint"])


def clips(work: Path) -> Frames:
    """(N, T, H, W, 3) uint8."""
    return np.load(work / CLIPS)


def calibration(work: Path) -> Sequence[Frames]:
    return list(np.load(work / CALIBRATION))


def module(work: Path) -> tuple[Any, Any]:
    """The reference behind uint8 frames (a module), and frames to trace it with (a tensor)."""
    import torch

    from edgetube.bench.studies.peers import naive
    from edgetube.model import checkpoints

    return naive.Model(checkpoints.load(source(work))).eval(), torch.from_numpy(clips(work)[:1])


# -------------------------------------------------------------------------------------------------------------- PyTorch


def in_torch(model: Callable[[Any], Any]) -> Call:
    import torch

    def call(frames: Frames) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(frames)).float().numpy()

    return call


def eager(work: Path, own: Path) -> Call:
    return in_torch(module(work)[0])


def compiled(work: Path, own: Path) -> Call:
    import torch

    return in_torch(torch.compile(module(work)[0]))


def torchao_int8(work: Path, own: Path) -> Call:
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = module(work)[0]
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return in_torch(torch.compile(model))


# ----------------------------------------------------------------------------------------------------------------- ONNX


def export_naive(work: Path, own: Path) -> None:
    from edgetube.bench.studies.peers import naive

    model, frames = module(work)
    naive.export(model, frames.numpy(), own / ONNX)


def quantise(function: str, file: str, work: Path, own: Path) -> None:
    """One of `quantisers` on the naive export."""
    import onnx

    from edgetube.bench.studies.peers import quantisers

    export_naive(work, own)
    model = onnx.load(own / ONNX)
    del model.graph.value_info[:]  # the exporter's shapes of some transposed weights are those before the transpose
    onnx.save(model, own / ONNX)
    getattr(quantisers, function)(own / ONNX, calibration(work), own / file)
    for file in own.glob(f"{ONNX}*"):
        file.unlink()


def in_onnxruntime(name: str, work: Path, own: Path) -> Call:
    import onnxruntime as ort

    session = ort.InferenceSession(own / name, providers=["CPUExecutionProvider"])
    feed = session.get_inputs()[0].name
    return lambda frames: session.run(None, {feed: frames})[0]


def in_openvino(name: str, work: Path, own: Path) -> Call:
    """With its defaults, which compute float layers in bfloat16 where the CPU has that."""
    import openvino as ov

    request = ov.Core().compile_model(own / name, "CPU", {"PERFORMANCE_HINT": "LATENCY"}).create_infer_request()
    return lambda frames: request.infer([frames])[0]


# --------------------------------------------------------------------------------------------------- ExecuTorch, LiteRT


def build_executorch(quantised: bool, work: Path, own: Path) -> None:
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    model, frames = module(work)
    if quantised:
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        prepared = prepare_pt2e(torch.export.export(model, (frames,)).module(), quantizer)
        for clip in calibration(work):
            prepared(torch.from_numpy(clip[None]))
        model = convert_pt2e(prepared)
    program = torch.export.export(model, (frames,))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    (own / "model.pte").write_bytes(lowered.buffer)


def executorch(work: Path, own: Path) -> Call:
    import torch
    from executorch.runtime import Runtime as Executor

    method = Executor.get().load_program(own / "model.pte").load_method("forward")
    return lambda frames: method.execute([torch.from_numpy(frames)])[0].numpy()


def build_litert(quantised: bool, work: Path, own: Path) -> None:
    import litert_torch

    model, frames = module(work)
    path = own / "model.tflite"
    litert_torch.convert(model, (frames,)).export(str(path))
    if quantised:
        from ai_edge_quantizer import quantizer, recipe

        found = quantizer.Quantizer(str(path))
        found.load_quantization_recipe(recipe.dynamic_wi8_afp32())
        found.quantize().export_model(str(path), overwrite=True)


def litert(work: Path, own: Path) -> Call:
    """With all cores; the interpreter's default is one thread."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(own / "model.tflite"), num_threads=os.cpu_count())
    interpreter.allocate_tensors()
    (entry,), (exit_,) = interpreter.get_input_details(), interpreter.get_output_details()

    def call(frames: Frames) -> np.ndarray:
        interpreter.set_tensor(entry["index"], frames)
        interpreter.invoke()
        return interpreter.get_tensor(exit_["index"])

    return call


# ------------------------------------------------------------------------------------------------------------- edgetube


KEPT = 155
"""Tokens of 539 that are left in the end, where a recipe keeps fewer."""


def build_bundle(target: str, keep: str | None, work: Path, own: Path) -> None:
    """Export it, unless a bundle was brought along (`--bundles`)."""
    if (own / "bundle").is_dir():
        return
    from edgetube.export import pipeline

    # Random weights have no accuracy to lose: time is measured here, so INT8 need not search for its budget.
    budget = {"calib": work / CALIBRATION, "max_drop": 100.0} if target.endswith("int8") else {}
    # In one folder: several numbers of tokens calibrate once.
    made = pipeline.export_model(
        target, source(work), work / "exports", pipeline.Options(lowering="gather", keep_tokens=keep, **budget)
    )
    made.path.rename(own / "bundle")


def bundle(work: Path, own: Path) -> Call:
    return Runtime(own / "bundle")


# ------------------------------------------------------------------------------------------- what one would use instead


def build_hugging(name: str, frames: int, work: Path, own: Path) -> None:
    from edgetube.bench.studies.peers import hugging, naive

    naive.export(hugging.model(name, frames), np.zeros((1, frames, 224, 224, 3), np.uint8), own / ONNX)


def eager_hugging(name: str, frames: int, work: Path, own: Path) -> Call:
    from edgetube.bench.studies.peers import hugging

    return in_torch(hugging.model(name, frames))


def first(frames: int, load: Callable[[Path, Path], Call], work: Path, own: Path) -> Call:
    """A call on the first `frames` frames only."""
    call = load(work, own)
    return lambda clip: call(np.ascontiguousarray(clip[:, :frames]))


# ------------------------------------------------------------------------------------------------------------ the table

SAME, COMPILED, OTHER = "the same checkpoint", "compiled by PyTorch", "what one would take instead"


def of_quantiser(function: str, file: str, loader: Callable[..., Call], *packages: str) -> Recipe:
    return Recipe(SAME, "int8", packages, partial(loader, file), partial(quantise, function, file))


def of_bundle(target: str, precision: str, package: str) -> dict[str, Recipe]:
    """With all tokens, and with `KEPT`."""
    names = {f"edgetube {target}": None, f"edgetube {target}, {KEPT} tokens": str(KEPT)}
    return {
        name: Recipe(SAME, precision, ("edgetube", package), bundle, partial(build_bundle, target, keep))
        for name, keep in names.items()
    }


def of_hugging(name: str, frames: int) -> dict[str, Recipe]:
    title, packages = f"{name}-B, {frames} frames", ("transformers", "torch")
    alone = partial(first, frames, partial(eager_hugging, name, frames))
    exported, build = partial(first, frames, partial(in_onnxruntime, ONNX)), partial(build_hugging, name, frames)
    return {
        f"{title}, PyTorch eager": Recipe(OTHER, "fp32", packages, alone, None, False),
        f"{title}, ONNX Runtime": Recipe(OTHER, "fp32", (*packages, "onnxruntime"), exported, build, False),
    }


RECIPES: dict[str, Recipe] = {
    "PyTorch eager": Recipe(SAME, "fp32", ("torch",), eager),
    "torch.compile": Recipe(COMPILED, "fp32", ("torch",), compiled),
    "ONNX Runtime, naive export": Recipe(SAME, "fp32", ("onnxruntime",), partial(in_onnxruntime, ONNX), export_naive),
    "OpenVINO defaults, naive export": Recipe(SAME, "bf16", ("openvino",), partial(in_openvino, ONNX), export_naive),
    "ExecuTorch, XNNPACK": Recipe(SAME, "fp32", ("executorch",), executorch, partial(build_executorch, False)),
    "LiteRT": Recipe(SAME, "fp32", ("litert-torch", "ai-edge-litert"), litert, partial(build_litert, False)),
    **of_bundle("onnx-fp32", "fp32", "onnxruntime"),
    **of_bundle("openvino-fp32", "fp32", "openvino"),
    **of_bundle("openvino-fp16", "bf16", "openvino"),
    "ORT quantize_static, defaults": of_quantiser("ort_defaults", QUANTISED, in_onnxruntime, "onnxruntime"),
    "ORT quantize_dynamic": of_quantiser("ort_dynamic", QUANTISED, in_onnxruntime, "onnxruntime"),
    "NNCF, OpenVINO defaults": of_quantiser("nncf_transformer", "quantised.xml", in_openvino, "nncf", "openvino"),
    "torchao int8 dynamic, torch.compile": Recipe(COMPILED, "int8", ("torchao", "torch"), torchao_int8),
    "ExecuTorch, XNNPACK int8": Recipe(
        SAME, "int8", ("executorch", "torchao"), executorch, partial(build_executorch, True)
    ),
    "LiteRT int8 dynamic": Recipe(
        SAME, "int8", ("litert-torch", "ai-edge-litert"), litert, partial(build_litert, True)
    ),
    **of_bundle("onnx-int8", "int8", "onnxruntime"),
    **of_bundle("openvino-int8", "int8", "openvino"),
    **of_hugging("VideoMAE", 16),
    **of_hugging("Vivit", 32),
}
"""All recipes, in the order of the table."""

YARDSTICK = "edgetube onnx-fp32"
"""The recipe that runs in every group, so that groups can be compared."""


def open_recipe(stage_timer: StageTimer, name: str, work: str) -> Benchmarkable:
    """For `edgetube.bench.latency.Process`: a recipe, to be timed on one clip."""
    stage_timer("import")
    call = RECIPES[name].load(Path(work), Path(work) / slug(name))
    stage_timer("load")
    frames = clips(Path(work))[:1]
    stage_timer("")
    return Benchmarkable(lambda: call(frames))
