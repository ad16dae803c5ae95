"""Targets of TensorRT and of TensorRT for RTX: one strongly typed graph, and an engine where one can be built.

TensorRT builds the engine on the GPU that will run it. Without a GPU the bundle lacks the engine, and the device builds
it on first load. TensorRT for RTX compiles for named GPUs on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetube import cuda
from edgetube.errors import InputError
from edgetube.export.base import BuildContext, Built, CalibrationRequest
from edgetube.precision import PRECISIONS, Precision
from edgetube.runtimes.tensorrt import NEEDS as RUN_NEEDS
from edgetube.runtimes.tensorrt import build as builder
from edgetube.runtimes.tensorrt.build import LEGACY, Settings
from edgetube.runtimes.tensorrt.layers import summarize_engine_layers
from edgetube.runtimes.tensorrt.sdk import FAMILIES, Sdk, load_sdk, system
from edgetube.targets import Setting, Target, installed

if TYPE_CHECKING:
    import onnx

    from edgetube.calibration.table import CalibrationTable, IntegerFormat
    from edgetube.export.canonical import Graph
    from edgetube.spec import ModelSpec

NEEDS = ("torch", "onnx", "onnxscript", "safetensors")
RTX_NEEDS = (*NEEDS, "tensorrt_rtx")

WORKSPACE = Setting("workspace", "", "MiB of scratch memory that a kernel may take; the SDK chooses when left out")
DLA = Setting("dla", "", "refused: this model cannot run there")
ATTENTION = Setting(
    "attention",
    "fp16",
    "int8 also multiplies queries, keys and values in integers; at most 512 tokens",
    ("fp16", "int8"),
)
SETTINGS = {
    "trt": (
        WORKSPACE,
        Setting(
            "timing-cache",
            "",
            "file of this machine with kernel timings, to begin with and to keep; no part of the bundle",
        ),
        Setting("version-compatible", "no", "the engine also runs on later minor versions", ("no", "yes")),
        Setting(
            "hardware-compatible",
            "no",
            "the engine also runs on every GPU from Ampere on, or on all of the same compute capability",
            ("no", "ampere", "same"),
        ),
        Setting(
            "legacy",
            "no",
            "for TensorRT 8.6 to 10: a network without types, int8 by TensorRT's own calibrator",
            ("no", "yes"),
        ),
        DLA,
    ),
    "rtx": (
        WORKSPACE,
        Setting("capabilities", "86,89,120", "compute capabilities to build for: Ampere, Ada and Blackwell desktops"),
        DLA,
    ),
}

FUSED_TOKENS, FUSED_HEADS = 512, (16, 32, 64)
"""The most tokens, and the head sizes, for which attention in int8 is one kernel. Built by TensorRT for RTX 1.7:
at 392 tokens each block's attention is one kernel of int8, at 539 it falls apart into GEMMs and copies."""

LEGACY_CLIPS = 32
"""Clips that a bundle carries to the device for TensorRT's own calibrator; 4.8 MB each at 32x224x224."""


def _target(name: str, summary: str, tolerance: float | None) -> Target:
    family, _, precision_name = name.partition("-")
    precision = PRECISIONS[precision_name]
    rtx = family == "rtx"
    return Target(
        name=name,
        precision=precision,
        backend="tensorrt",
        summary=summary,
        build_needs=RTX_NEEDS if rtx else NEEDS,
        run_needs=RUN_NEEDS[family],
        extra=FAMILIES[family].extra,
        tolerance=tolerance,
        arithmetic=("float32",) if precision is Precision.FP32 else ("float16",),
        settings=SETTINGS[family] + ((ATTENTION,) if precision.quantises_activations else ()),
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


def integer_format(target: Target) -> IntegerFormat:
    """Scales in float16, like all constants; pixels are divided so that their sums stay in its range.

    Every GPU accumulates integers in 32 bits, so weights keep all of their 8 bits.
    """
    from edgetube.calibration.table import IntegerFormat
    from edgetube.export.float16 import PIXEL_SCALE

    return IntegerFormat("float16", PIXEL_SCALE)


def build(context: BuildContext) -> Built:
    """Write `model.onnx` and, where the SDK and the machine allow, `model.engine`.

    The Q/DQ of an int8 target is int8 with zero point 0, the only kind that the parser allows.

    Raises:
        InputError: an unknown or impossible setting.
        BackendError: the SDK's parser or builder refuses the graph; with its message.
    """
    from edgetube.calibration import graphs
    from edgetube.export import canonical, integer, rewrite
    from edgetube.export.float16 import convert_to_fp16
    from edgetube.export.quantize import qdq
    from edgetube.export.statistics import graph_statistics

    graph, target, folder, table = context.graph, context.target, context.folder, context.table
    family = target.name.partition("-")[0]
    chosen = parse_settings(target)
    typed = plain = graph.model
    notes: list[str] = []
    if table is not None:
        typed = rewrite.separate_projections(qdq(plain, table, activations="int8"))
        (folder / CACHE).write_text(table.to_cache(), "ascii")
        if target.setting("attention") != "int8" and (note := attention_note(graph.spec)):
            notes.append(note)
    macs = integer.integer_macs(typed)
    typed = rewrite.cast_first(typed if target.precision is Precision.FP32 else convert_to_fp16(typed))
    canonical.save(typed, folder / "model.onnx")
    if chosen.legacy:
        chosen = replace(chosen, layers=layer_precisions(plain, chosen.legacy, table))
        canonical.save(rewrite.opset_17(rewrite.cast_first(plain)), folder / LEGACY)
        if table is not None:
            notes.append(LEGACY_NOTE)
    details: dict[str, Any] = {
        "graph": graph_statistics(typed),
        "settings": chosen.to_json(),
        "command": command(family, chosen),
    }
    if engine := _engine(folder, chosen, target, graph.batch):
        details |= engine
        if table is not None:
            details["layers"]["fell_back"] = fallen = fell_back(details["layers"], table)
            work = graphs.macs(plain)
            macs -= sum(work[name] for name in fallen)
    else:
        details |= _validate(folder / chosen.source)
    return Built("model.onnx", details, deferred="engine" not in details, notes=tuple(notes), integer_macs=macs)


LEGACY_NOTE = (
    "legacy: the proof is of the typed graph; TensorRT's calibrator chooses ranges of its own on the device, "
    "so run edgetube doctor and edgetube parity there"
)


def calibration_request(graph: Graph, target: Target) -> CalibrationRequest:
    """Ranges of attention's operands with `attention=int8`, and clips for TensorRT's own calibrator with `legacy=yes`.

    Raises:
        InputError: a setting that this model cannot have.
        SpecError: the graph's roles name no attention.
    """
    from edgetube.calibration import graphs

    chosen = parse_settings(target)
    tensors: tuple[str, ...] = ()
    if target.setting("attention") == "int8":
        if refusal := attention_refusal(graph.spec):
            raise InputError(refusal)
        tensors = graphs.attention_operands(graph.model, graph.roles)
    return CalibrationRequest(tensors, LEGACY_CLIPS if chosen.legacy else 0)


def attention_refusal(spec: ModelSpec) -> str:
    """Why attention in int8 would not be one fused kernel; empty if it would be."""
    head = spec.width // spec.heads
    if head not in FUSED_HEADS:
        known = ", ".join(map(str, FUSED_HEADS))
        return f"attention=int8 needs heads of {known} channels, this model's have {head}: leave attention at fp16"
    if (longest := _longest(spec)) > FUSED_TOKENS:
        return (
            f"attention=int8 needs at most {FUSED_TOKENS} tokens, this clip gives {longest}: leave attention at "
            f"fp16{_or(shorter(spec))}"
        )
    return ""


def _longest(spec: ModelSpec) -> int:
    """The most tokens that attend to each other."""
    return max(tokens for _, tokens in spec.attended)


def attention_note(spec: ModelSpec) -> str:
    """A note on the shorter clip that would allow attention in int8, and its cost; empty if none would or need be."""
    longest = _longest(spec)
    if longest <= FUSED_TOKENS or spec.width // spec.heads not in FUSED_HEADS or not (choice := shorter(spec)):
        return ""
    return (
        f"attention stays in fp16: in int8 it is one kernel up to {FUSED_TOKENS} tokens only, this clip gives "
        f"{longest}; to have it, {choice}"
    )


def shorter(spec: ModelSpec) -> str:
    """The options for the shortest clip that every tube fits, with their cost, in words; empty if it does not help."""
    shortest = max(spec.tubes[i].minimum()[0] for i in spec.active)
    if shortest >= spec.frames or spec.positions == "stored":
        return ""
    preset = spec.with_clip(shortest)
    if (tokens := _longest(preset)) > FUSED_TOKENS:
        return ""
    return (
        f"export with --frames {preset.frames} --set attention=int8 ({tokens} tokens): that sees "
        f"{preset.frames} of {spec.frames} frames and does {preset.macs() / spec.macs():.0%} of the multiplications, "
        "and its accuracy has to be measured anew"
    )


def _or(choice: str) -> str:
    return f", or {choice}" if choice else ""


def layer_precisions(
    model: onnx.ModelProto, precision: str, table: CalibrationTable | None
) -> tuple[tuple[str, str], ...]:
    """Precision of each layer of a weakly typed network, by the name of its ONNX node; "*" is all others.

    LayerNorm and softmax accumulate in fp32, and nothing but the linears of the table is in int8: a layer left to
    TensorRT would be quantised as soon as that is faster.
    """
    if precision == "fp32":
        return ()
    wide = [(node.name, "fp32") for node in model.graph.node if node.op_type in ("LayerNormalization", "Softmax")]
    weights = {plan.weight for plan in table.quantised} if table else set()
    linears = [(node.name, "int8") for node in model.graph.node if weights & set(node.input)]
    return (("*", "fp16"), *wide, *linears)


def _engine(folder: Path, chosen: Settings, target: Target, batch: int) -> dict[str, Any]:
    """Build the engine beside the graph; its record for the manifest, empty when none can be built here."""
    family = target.name.partition("-")[0]
    if family == "rtx":
        return _write(load_sdk(family), folder, chosen, None, batch)
    if target.missing(target.run_needs):
        return {}
    trt = load_sdk(family)
    gpu = cuda.open_stream(0, trt.family.extra)
    try:
        with gpu.current():
            return _write(trt, folder, chosen, gpu, batch, timing_cache(target))
    finally:
        gpu.close()


def _write(
    trt: Sdk, folder: Path, chosen: Settings, gpu: cuda.Stream | None, batch: int, timings: Path | None = None
) -> dict[str, Any]:
    engine = folder / "model.engine"
    calibrator = builder.calibrator(trt, folder, chosen, gpu, batch) if gpu is not None else None
    plan = builder.build(trt, folder / chosen.source, chosen, calibrator=calibrator, timing_cache=timings)
    engine.write_bytes(plan)
    capabilities = list(chosen.capabilities)
    if gpu is not None and chosen.hardware_compatible == "same":
        capabilities = [gpu.capability.replace(".", "")]
    record = {
        "file": engine.name,
        "version": trt.version,
        "version_compatible": chosen.version_compatible,
        "capabilities": capabilities,
        "gpu": "" if gpu is None or chosen.hardware_compatible else gpu.name,
        "platform": "" if gpu is None else system(),
    }
    return {"engine": record, "layers": summarize_engine_layers(trt.layers)}


def timing_cache(target: Target) -> Path | None:
    """This machine's timing cache: the setting, else that of the environment."""
    chosen = target.setting("timing-cache")
    return Path(chosen).absolute() if chosen else builder.timing_cache()


def fell_back(layers: Mapping[str, Any], table: CalibrationTable) -> list[str]:
    """The linears that the table quantises but the engine computes in float."""
    floats = layers["float_gemms"]
    return [plan.name for plan in table.quantised if any(f"{name}.".startswith(f"{plan.name}.") for name in floats)]


def _validate(path: Path) -> dict[str, Any]:
    """Parse the graph with TensorRT for RTX, if installed: its parser needs no GPU."""
    if not installed(FAMILIES["rtx"].module):
        return {"parsed_by": None}
    trt = load_sdk("rtx")
    builder.parse(trt, path)
    return {"parsed_by": f"{trt.family.title} {trt.version}"}


def parse_settings(target: Target) -> Settings:
    """The user's settings, checked.

    Raises:
        InputError: an impossible value.
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
    if target.name.startswith("rtx-"):
        capabilities = target.setting("capabilities").split(",")
        if not all(c.isdigit() for c in capabilities):
            raise InputError(f"capabilities is {','.join(capabilities)!r}; expected numbers with commas: 86,89,120")
        return Settings(workspace_mb=megabytes, capabilities=tuple(capabilities))
    hardware = target.setting("hardware-compatible")
    return Settings(
        workspace_mb=megabytes,
        version_compatible=target.setting("version-compatible") == "yes",
        hardware_compatible="" if hardware == "no" else hardware,
        legacy=str(target.precision) if target.setting("legacy") == "yes" else "",
    )


LEGACY_FLAGS = {"fp32": (), "fp16": ("--fp16",), "int8": ("--fp16", "--int8", f"--calib={CACHE}")}
"""Options of `trtexec` of TensorRT 8.6 to 10 for a weakly typed network."""


def command(family: str, chosen: Settings) -> str:
    """The command of the vendor's tool that builds the same engine, to run in the bundle's folder."""
    tool = "tensorrt_rtx" if family == "rtx" else "trtexec"
    line = [tool, f"--onnx={chosen.source}", "--saveEngine=model.engine"]
    if family == "rtx":
        line.append(f"--computeCapabilities={','.join(chosen.capabilities)}")
    elif chosen.legacy:
        line += ["--noTF32", "--profilingVerbosity=detailed", *LEGACY_FLAGS[chosen.legacy]]
        if chosen.layers:
            layers = ",".join(f"{name}:{precision}" for name, precision in chosen.layers)
            line += ["--precisionConstraints=obey", f"--layerPrecisions={layers}"]
    else:
        line += ["--stronglyTyped", "--noTF32", "--profilingVerbosity=detailed"]
    if chosen.workspace_mb is not None:
        line.append(f"--memPoolSize=workspace:{chosen.workspace_mb}")
    if chosen.version_compatible:
        line.append("--versionCompatible")
    if chosen.hardware_compatible:
        level = {"ampere": "ampere+", "same": "sameComputeCapability"}[chosen.hardware_compatible]
        line.append(f"--hardwareCompatibilityLevel={level}")
    return " ".join([*line, "--skipInference"])
