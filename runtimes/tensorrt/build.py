"""Builds engines: their settings, the parser, the builder, TensorRT's own calibrator, and kernel timings."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from edgetube import arrays, cache, cuda, strict
from edgetube.bundle import CALIBRATION_CLIPS, sha256
from edgetube.errors import BackendError, FormatError
from edgetube.files import atomic_write
from edgetube.runtimes.tensorrt.sdk import FAMILIES, Sdk

if TYPE_CHECKING:
    import tensorrt

LOGGER = logging.getLogger("edgetube")

LEGACY = "legacy.onnx"
"""File in the bundle: the graph for networks without types, TensorRT 8.6 to 10."""


@dataclass(frozen=True)
class Settings:
    """How an engine is built; written to the manifest at export, and read on the device.

    Attributes:
        workspace_mb: largest scratch memory of a kernel; None leaves it to the SDK.
        version_compatible: the engine also runs on later minor versions (TensorRT).
        hardware_compatible: "ampere" for every GPU from Ampere on, "same" for every GPU of one compute capability,
            "" for this GPU alone (TensorRT).
        capabilities: compute capabilities to build for, ("86", "89"); empty for the GPU that builds (TensorRT for RTX).
        legacy: "" for a strongly typed network; else the precision of one without types (TensorRT 8.6 to 10).
        layers: of a legacy network, (layer, "fp32" | "fp16" | "int8"); "*" is every other one.
    """

    workspace_mb: int | None = None
    version_compatible: bool = False
    hardware_compatible: str = ""
    capabilities: tuple[str, ...] = ()
    legacy: str = ""
    layers: tuple[tuple[str, str], ...] = ()

    @property
    def source(self) -> str:
        """The file in the bundle that the engine is built from."""
        return LEGACY if self.legacy else "model.onnx"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"capabilities": list(self.capabilities), "layers": [list(pair) for pair in self.layers]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Settings:
        """Raises FormatError when `data`, of a manifest, is something else."""
        known = [f.name for f in fields(cls)]
        found = dict(strict.record(data, "build.settings", (), [*known, "timing_cache"]))
        found.pop("timing_cache", None)  # of bundles that were made when it was not the host's own option
        if (megabytes := found.get("workspace_mb")) is not None:
            strict.integer(megabytes, "workspace_mb", 1, 1 << 20)
        if not isinstance(found.get("version_compatible", False), bool):
            raise FormatError(f"version_compatible is {found['version_compatible']!r}; expected true or false")
        strict.choice(found.get("hardware_compatible", ""), "hardware_compatible", ("", *LEVELS))
        strict.choice(found.get("legacy", ""), "legacy", ("", "fp32", "fp16", "int8"))
        layers = [strict.items(pair, "layers", 2, 2) for pair in strict.items(found.get("layers", []), "layers")]
        for name, precision in layers:
            strict.text(name, "name of a layer")
            strict.choice(precision, f"layers.{name}", ("fp32", "fp16", "int8"))
        capabilities = parse_capabilities(found.get("capabilities", []))
        return cls(**found | {"capabilities": capabilities, "layers": tuple((name, kind) for name, kind in layers)})


LEVELS = {"ampere": "AMPERE_PLUS", "same": "SAME_COMPUTE_CAPABILITY"}
"""`hardware_compatible` -> name in `HardwareCompatibilityLevel`."""


def parse_capabilities(value: Any) -> tuple[str, ...]:
    """Compute capabilities in a manifest, ("86", "89").

    Raises:
        FormatError: `value` is something else.
    """
    return tuple(strict.text(c, "capabilities", r"\d{2,3}") for c in strict.items(value, "capabilities", 0, 64))


def build(
    trt: Sdk,
    onnx: Path,
    settings: Settings,
    on_progress: Callable[[str, int, int], None] | None = None,
    calibrator: tensorrt.IInt8Calibrator | None = None,
    timing_cache: Path | None = None,
) -> bytes:
    """Build the engine of an ONNX file, serialised as the vendor's tools read it.

    Args:
        onnx: the file, strongly typed unless the settings say legacy; weights may lie beside it.
        on_progress: called with (phase, step, steps) while the SDK works.
        calibrator: of a legacy int8 network.
        timing_cache: this machine's file of kernel timings, read and updated; None for none.

    Raises:
        BackendError: the parser refuses a node, or the builder fails; with the SDK's messages.
    """
    builder, network, parser = parse(trt, onnx, typed=not settings.legacy)
    config = builder.create_builder_config()
    _configure(trt, config, settings)
    if settings.legacy:
        _configure_legacy(trt, config, network, settings, calibrator)
    monitor = _monitor(trt, on_progress)  # lives as long as the builder uses it
    if monitor is not None:
        config.progress_monitor = monitor
    timings = _load_timings(config, timing_cache)
    trt.layers = ""
    plan = cast("tensorrt.IHostMemory | None", builder.build_serialized_network(network, config))
    if plan is None:
        raise trt.error(f"cannot build an engine of {onnx.name}")
    del parser
    if timings is not None and timing_cache is not None:
        try:
            atomic_write(timing_cache, bytes(timings.serialize()))
        except OSError as error:  # costs the next build its time, nothing else
            LOGGER.warning("cannot keep kernel timings in %s: %s", timing_cache, error.strerror)
    return bytes(plan)


def parse(
    trt: Sdk, onnx: Path, typed: bool = True
) -> tuple[tensorrt.Builder, tensorrt.INetworkDefinition, tensorrt.OnnxParser]:
    """Parse an ONNX file with the SDK; the parser owns the weights and must be kept alive.

    Args:
        typed: every tensor keeps its type in the file; only TensorRT 8.6 to 10 have networks without types.

    Raises:
        BackendError: it refuses a node; says which and why.
    """
    builder = trt.api.Builder(trt.log)
    network = builder.create_network(_strongly_typed(trt) if typed else _without_types(trt))
    parser = trt.api.OnnxParser(network, trt.log)
    trt.lines.clear()
    if not parser.parse_from_file(str(onnx)):
        raise trt.error(f"the parser refuses {onnx.name}{_first_fault(parser)}")
    return builder, network, parser


def _strongly_typed(trt: Sdk) -> int:
    """The flag of strongly typed networks; 0 in versions that removed it because it is the default."""
    flag = getattr(trt.api.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    if flag is None and int(trt.version.split(".")[0]) in (8, 9) and trt.family is FAMILIES["trt"]:
        raise BackendError(
            f"TensorRT {trt.version} has no strongly typed networks; this graph needs TensorRT 10.0 or newer: "
            "upgrade it (JetPack 6 has 10.3), or export with --set legacy=yes"
        )
    return 0 if flag is None else 1 << int(flag)


def _without_types(trt: Sdk) -> int:
    flags = trt.api.NetworkDefinitionCreationFlag
    if not hasattr(trt.api, "IInt8EntropyCalibrator2"):
        raise BackendError(
            f"{trt.family.title} {trt.version} knows typed networks only; this bundle was exported with legacy=yes, "
            "which is for TensorRT 8.6 to 10: export without it"
        )
    explicit = getattr(flags, "EXPLICIT_BATCH", None)  # a matter of course, and without effect, from 10.0 on
    return 0 if explicit is None else 1 << int(explicit)


def _first_fault(parser: tensorrt.OnnxParser) -> str:
    if not parser.num_errors:
        return ""
    fault = parser.get_error(0)
    return f" at {fault.node_name()} ({fault.node_operator()}): {' '.join(fault.desc().split())}"


def _configure(trt: Sdk, config: tensorrt.IBuilderConfig, settings: Settings) -> None:
    api = trt.api
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
    config.clear_flag(api.BuilderFlag.TF32)  # what is float32 in the graph is float32
    if settings.workspace_mb is not None:
        config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, settings.workspace_mb << 20)
    if settings.version_compatible:
        config.set_flag(api.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware_compatible:
        level = getattr(api.HardwareCompatibilityLevel, LEVELS[settings.hardware_compatible], None)
        if level is None:
            raise BackendError(f"{trt.family.title} {trt.version} has no {settings.hardware_compatible!r} engines")
        config.hardware_compatibility_level = level
    if trt.family is FAMILIES["rtx"]:
        _target_capabilities(trt, config, settings.capabilities)


def _configure_legacy(
    trt: Sdk,
    config: tensorrt.IBuilderConfig,
    network: tensorrt.INetworkDefinition,
    settings: Settings,
    calibrator: tensorrt.IInt8Calibrator | None,
) -> None:
    """Precisions of a network without types: what `trtexec --layerPrecisions --precisionConstraints=obey` sets."""
    flags = trt.api.BuilderFlag
    if settings.legacy != "fp32":
        config.set_flag(flags.FP16)
        config.set_flag(flags.OBEY_PRECISION_CONSTRAINTS)
    if settings.legacy == "int8":
        config.set_flag(flags.INT8)
        if calibrator is not None:
            config.int8_calibrator = calibrator
    kinds = {"fp32": trt.api.float32, "fp16": trt.api.float16, "int8": trt.api.int8}
    chosen = dict(settings.layers)
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        others = None if _moves_integers(trt, layer) else chosen.get("*")
        if precision := chosen.get(layer.name, others):
            layer.precision = kinds[precision]
            if precision == "fp32":
                layer.set_output_type(0, kinds[precision])


def _moves_integers(trt: Sdk, layer: tensorrt.ILayer) -> bool:
    """Whether a layer's outputs are shapes, indices, bytes or constants, whose precision cannot be set."""
    floats = (trt.api.float32, trt.api.float16)
    outputs = [layer.get_output(i).dtype for i in range(layer.num_outputs)]
    return layer.type == trt.api.LayerType.CONSTANT or not all(kind in floats for kind in outputs)


def calibrator(
    trt: Sdk, folder: Path, settings: Settings, gpu: cuda.Stream, batch: int
) -> tensorrt.IInt8Calibrator | None:
    """TensorRT's own calibrator over the clips in a bundle's folder; None where the settings need none.

    Its results are cached on this machine, by graph, clips and version of TensorRT.
    Called inside `gpu.current()`; its buffers live as long as the stream.
    """
    if settings.legacy != "int8":
        return None
    base = cast(Any, trt.api.IInt8EntropyCalibrator2)
    clips = arrays.open_arrays(folder / CALIBRATION_CLIPS)[""]
    key = f"{sha256(folder / LEGACY)}{sha256(folder / CALIBRATION_CLIPS)}{trt.version}"
    kept = cache.folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.calibration"

    class Calibrator(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)
            self.next = 0
            size = batch * clips[0].nbytes
            self.host, self.address = gpu.pinned(size), gpu.device(size)

        def get_batch_size(self) -> int:
            return batch

        def get_batch(self, names: list[str]) -> list[int]:
            if self.next + batch > len(clips):
                return []
            self.host[:] = np.stack([clips[self.next + i] for i in range(batch)]).reshape(-1)
            gpu.upload(self.address, self.host)
            gpu.synchronize()
            self.next += batch
            return [self.address]

        def read_calibration_cache(self) -> bytes | None:
            return kept.read_bytes() if kept.is_file() else None

        def write_calibration_cache(self, cache: Any) -> None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(kept, bytes(cache))

    return cast("tensorrt.IInt8Calibrator", Calibrator())


def _target_capabilities(trt: Sdk, config: Any, capabilities: tuple[str, ...]) -> None:
    """Set the compute capabilities that TensorRT for RTX builds for; the stubs of TensorRT lack this API."""
    known = cast(Any, trt.api).ComputeCapability.__members__
    names = [f"SM{capability}" for capability in capabilities] or ["CURRENT"]
    if unknown := [name for name in names if name not in known]:
        can = ", ".join(name.removeprefix("SM") for name in known if name.startswith("SM"))
        raise BackendError(f"{trt.family.title} {trt.version} does not know {', '.join(unknown)}; it builds for {can}")
    config.num_compute_capabilities = len(names)
    for i, name in enumerate(names):
        config.set_compute_capability(known[name], i)


def _monitor(trt: Sdk, on_progress: Callable[[str, int, int], None] | None) -> tensorrt.IProgressMonitor | None:
    """Phases of the builder, passed to `on_progress`; None where the SDK has no monitor or there is no callback."""
    base = cast(Any, getattr(trt.api, "IProgressMonitor", None))
    if on_progress is None or base is None:
        return None
    report = on_progress

    class Monitor(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            report(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            report(phase_name, step + 1, self.steps.get(phase_name, 0))
            return True

        def phase_finish(self, phase_name: str) -> None:
            steps = self.steps.pop(phase_name, 0)
            report(phase_name, steps, steps)

    return cast("tensorrt.IProgressMonitor", Monitor())


TIMING_CACHE = "EDGETUBE_TIMING_CACHE"
"""Environment variable with the path of this machine's file of kernel timings."""


def timing_cache() -> Path | None:
    """This machine's file of kernel timings, from the environment; None if unset. A bundle cannot set it."""
    return Path(chosen).absolute() if (chosen := os.environ.get(TIMING_CACHE)) else None


def _load_timings(config: tensorrt.IBuilderConfig, path: Path | None) -> tensorrt.ITimingCache | None:
    """Kernel timings from a file; empty ones if it is missing, or of another device or version."""
    if path is None:
        return None
    try:
        kept = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        LOGGER.warning("cannot read kernel timings of %s: %s", path, error.strerror)
        kept = b""
    for data in (kept, b"") if kept else (b"",):
        timings = cast("tensorrt.ITimingCache | None", config.create_timing_cache(data))
        if timings is not None and config.set_timing_cache(timings, ignore_mismatch=False):
            return timings
        LOGGER.warning("the kernel timings in %s are not this device's; they begin anew", path)
    return None
