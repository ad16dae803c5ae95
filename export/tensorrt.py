"""Targets of TensorRT and of TensorRT for RTX: one strongly typed graph, and an engine where one can be built.

TensorRT builds on the GPU that will run the engine; without one the bundle is complete but for it, and the device
builds it on the first load. TensorRT for RTX compiles for named GPUs on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgetube import cuda
from edgetube.errors import InputError
from edgetube.export.base import Built
from edgetube.runtimes import tensorrt as runtime
from edgetube.runtimes.tensorrt import Sdk, Settings
from edgetube.targets import Precision, Setting, Target, installed

if TYPE_CHECKING:
    from edgetube.calibration.table import CalibrationTable
    from edgetube.export.graph import Graph

NEEDS = ("torch", "onnx", "onnxscript", "safetensors")
RTX_NEEDS = (*NEEDS, "tensorrt_rtx")

WORKSPACE = Setting("workspace", "", "MiB of scratch memory that a kernel may take; the SDK chooses when left out")
DLA = Setting("dla", "", "refused: this model cannot run there")
TRT_SETTINGS = (
    WORKSPACE,
    Setting("timing-cache", "", "file of kernel timings to begin with and to keep"),
    Setting("version-compatible", "no", "the engine also runs on later minor versions", ("no", "yes")),
    Setting(
        "hardware-compatible",
        "no",
        "the engine also runs on every GPU from Ampere on, or on all of the same compute capability",
        ("no", "ampere", "same"),
    ),
    DLA,
)
RTX_SETTINGS = (
    WORKSPACE,
    Setting("capabilities", "86,89,120", "compute capabilities to build for: Ampere, Ada and Blackwell desktops"),
    DLA,
)


def _target(name: str, summary: str, tolerance: float | None) -> Target:
    family, precision = name.split("-")
    rtx = family == "rtx"
    return Target(
        name=name,
        precision=cast(Precision, precision),
        backend="tensorrt",
        summary=summary,
        build_needs=RTX_NEEDS if rtx else NEEDS,
        run_needs=runtime.NEEDS[family],
        extra=runtime.FAMILIES[family].extra,
        tolerance=tolerance,
        settings=RTX_SETTINGS if rtx else TRT_SETTINGS,
    )


TARGETS = (
    _target("trt-fp16", "TensorRT 10 and 11, desktop and Jetson; LayerNorm and softmax in fp32", 2e-2),
    _target("trt-fp32", "TensorRT in full precision, without TF32: to compare with", 1e-4),
    _target("trt-int8", "TensorRT with the linears in int8, the rest as in trt-fp16; calibrated on clips", None),
    _target("rtx-fp16", "TensorRT for RTX, desktop GPUs; the engine is built here, without a GPU", 2e-2),
    _target("rtx-int8", "TensorRT for RTX with the linears in int8; the engine is built here", None),
)

CACHE = "calibration.cache"
"""The ranges in the text that TensorRT's own calibrators read and write."""


def build(graph: Graph, target: Target, folder: Path, table: CalibrationTable | None = None) -> Built:
    """Write `model.onnx` and, where the SDK and the machine allow, `model.engine`.

    Args:
        table: of an int8 target; Q/DQ is int8 with zero point 0, because the parser refuses every other kind.

    Raises:
        InputError: a setting that this target does not have, or that cannot be.
        BackendError: the SDK's parser or builder refuses the graph, with its words.
    """
    from edgetube.export import graph as graphs
    from edgetube.export import rewrite
    from edgetube.export.quantize import qdq

    family = target.name.partition("-")[0]
    chosen = parse_settings(target)
    model = graph.model
    if table is not None:
        model = qdq(model, table, activations="int8")
        (folder / CACHE).write_text(table.to_cache(), "ascii")
        model = rewrite.separate_projections(model)
    model = rewrite.cast_first(model if target.precision == "fp32" else graphs.half(model))
    path = folder / "model.onnx"
    graphs.save(model, path)
    details: dict[str, Any] = {
        "graph": graphs.statistics(model),
        "settings": chosen.to_json(),
        "command": command(family, chosen),
    }
    if engine := _engine(path, chosen, target):
        details |= engine
        if table is not None:
            details["layers"]["fell_back"] = fell_back(details["layers"], table)
    else:
        details |= _validate(path)
    return Built(path.name, details, deferred="engine" not in details)


def _engine(path: Path, chosen: Settings, target: Target) -> dict[str, Any]:
    """The manifest's record of the engine that was written beside the graph; empty when none can be built here."""
    family = target.name.partition("-")[0]
    if family == "rtx":
        return _write(runtime.sdk(family), path, chosen, None)
    if target.missing(target.run_needs):
        return {}
    kit = runtime.sdk(family)
    gpu = cuda.open_stream(0, kit.family.extra)
    try:
        with gpu.current():
            return _write(kit, path, chosen, gpu)
    finally:
        gpu.close()


def _write(kit: Sdk, path: Path, chosen: Settings, gpu: cuda.Stream | None) -> dict[str, Any]:
    engine = path.with_name("model.engine")
    engine.write_bytes(runtime.build(kit, path, chosen))
    capabilities = list(chosen.capabilities)
    if gpu is not None and chosen.hardware_compatible == "same":
        capabilities = [gpu.capability.replace(".", "")]
    record = {
        "file": engine.name,
        "version": kit.version,
        "version_compatible": chosen.version_compatible,
        "capabilities": capabilities,
        "gpu": "" if gpu is None or chosen.hardware_compatible else gpu.name,
    }
    return {"engine": record, "layers": runtime.layer_truth(kit.layers)}


def fell_back(layers: Mapping[str, Any], table: CalibrationTable) -> list[str]:
    """The linears that the table quantises and that the engine computes in float all the same."""
    floats = layers["float_gemms"]
    return [plan.name for plan in table.quantised if any(f"{name}.".startswith(f"{plan.name}.") for name in floats)]


def _validate(path: Path) -> dict[str, Any]:
    """Show the graph to the real parser of the other SDK, when that is installed: it needs no GPU."""
    if not installed(runtime.FAMILIES["rtx"].module):
        return {"parsed_by": None}
    kit = runtime.sdk("rtx")
    runtime.parse(kit, path)
    return {"parsed_by": f"{kit.family.title} {kit.version}"}


def parse_settings(target: Target) -> Settings:
    """The settings that a user chose, checked.

    Raises:
        InputError: a value that cannot be.
    """
    if "dla" in target.chosen:
        raise InputError(
            "dla cannot be set: the DLA has no LayerNorm, no GELU and no product of two activations, so that every "
            "block would return to the GPU several times; leave it out"
        )
    workspace = target.setting("workspace")
    if workspace and not (workspace.isdigit() and int(workspace)):
        raise InputError(f"workspace is {workspace!r}; expected MiB, a number above 0")
    megabytes = int(workspace) if workspace else None
    if target.settings == RTX_SETTINGS:
        capabilities = target.setting("capabilities").split(",")
        if not all(c.isdigit() for c in capabilities):
            raise InputError(f"capabilities is {','.join(capabilities)!r}; expected numbers with commas: 86,89,120")
        return Settings(workspace_mb=megabytes, capabilities=tuple(capabilities))
    hardware = target.setting("hardware-compatible")
    return Settings(
        workspace_mb=megabytes,
        timing_cache=target.setting("timing-cache"),
        version_compatible=target.setting("version-compatible") == "yes",
        hardware_compatible="" if hardware == "no" else hardware,
    )


def command(family: str, chosen: Settings) -> str:
    """The line of the vendor's own tool that builds the same engine, to be run in the bundle's folder."""
    line = ["tensorrt_rtx" if family == "rtx" else "trtexec", "--onnx=model.onnx", "--saveEngine=model.engine"]
    if family == "rtx":
        line.append(f"--computeCapabilities={','.join(chosen.capabilities)}")
    else:
        line += ["--stronglyTyped", "--noTF32", "--profilingVerbosity=detailed"]
    if chosen.workspace_mb is not None:
        line.append(f"--memPoolSize=workspace:{chosen.workspace_mb}")
    if chosen.timing_cache:
        line.append(f"--timingCacheFile={chosen.timing_cache}")
    if chosen.version_compatible:
        line.append("--versionCompatible")
    if chosen.hardware_compatible:
        level = {"ampere": "ampere+", "same": "sameComputeCapability"}[chosen.hardware_compatible]
        line.append(f"--hardwareCompatibilityLevel={level}")
    return " ".join([*line, "--skipInference"])
