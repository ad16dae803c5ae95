"""The backend of TensorRT and TensorRT for RTX, which share an API.

A bundle holds the strongly typed ONNX graph, and may hold an engine. An engine runs on one version of the SDK and one
kind of GPU: where the bundle's engine does not run, the device builds one on first load and caches it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import platform
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from edgetube import arrays, cache, cuda, strict
from edgetube.bundle import CALIBRATION_CLIPS, Bundle, sha256
from edgetube.errors import BackendError, BundleError, FormatError, InputError
from edgetube.files import atomic_write
from edgetube.runtimes.base import Backend, Interface, Logits
from edgetube.targets import GPU, need
from edgetube.video import Frames

if TYPE_CHECKING:
    import tensorrt

LOGGER = logging.getLogger("edgetube")

RELEVANT_LINES = 6
"""Number of the SDK's last warnings and errors in a `BackendError`."""


class Vendor(Protocol):
    """The parts of `tensorrt` and `tensorrt_rtx` that are used, with the types of TensorRT's stubs."""

    __version__: str
    Builder: type[tensorrt.Builder]
    BuilderFlag: type[tensorrt.BuilderFlag]
    HardwareCompatibilityLevel: type[tensorrt.HardwareCompatibilityLevel]
    IInt8EntropyCalibrator2: type[tensorrt.IInt8EntropyCalibrator2]
    ILogger: type[tensorrt.ILogger]
    IProgressMonitor: type[tensorrt.IProgressMonitor]
    LayerInformationFormat: type[tensorrt.LayerInformationFormat]
    LayerType: type[tensorrt.LayerType]
    MemoryPoolType: type[tensorrt.MemoryPoolType]
    NetworkDefinitionCreationFlag: type[tensorrt.NetworkDefinitionCreationFlag]
    OnnxParser: type[tensorrt.OnnxParser]
    ProfilingVerbosity: type[tensorrt.ProfilingVerbosity]
    Runtime: type[tensorrt.Runtime]
    float16: tensorrt.DataType
    float32: tensorrt.DataType
    int8: tensorrt.DataType


@dataclass(frozen=True)
class Family:
    """One of the two SDKs: its module, its pip extra, and its name."""

    module: str
    extra: str
    title: str


EMULATOR = "onnxruntime"

LEGACY = "legacy.onnx"
"""File in the bundle: the graph for networks without types, TensorRT 8.6 to 10."""

FAMILIES = {
    "trt": Family("tensorrt", "tensorrt", "TensorRT"),
    "rtx": Family("tensorrt_rtx", "rtx", "TensorRT for RTX"),
}
"""By the first part of a target's name."""

RUNS = tuple(FAMILIES)

NEEDS = {name: (family.module, "|".join(cuda.LIBRARIES), GPU) for name, family in FAMILIES.items()}


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
        capabilities = _capabilities(found.get("capabilities", []))
        return cls(**found | {"capabilities": capabilities, "layers": tuple((name, kind) for name, kind in layers)})


LEVELS = {"ampere": "AMPERE_PLUS", "same": "SAME_COMPUTE_CAPABILITY"}
"""`hardware_compatible` -> name in `HardwareCompatibilityLevel`."""


def _capabilities(value: Any) -> tuple[str, ...]:
    return tuple(strict.text(c, "capabilities", r"\d{2,3}") for c in strict.items(value, "capabilities", 0, 64))


@dataclass(frozen=True)
class EngineRecord:
    """The manifest's record of the bundle's engine.

    Attributes:
        file: in the bundle.
        version: of the SDK that built it.
        version_compatible: newer minor versions run it, too.
        capabilities: compute capabilities that run it; empty where that is not what it was built for.
        gpu: the one GPU that runs it; empty for several.
        platform: the system that it was built on; empty in older bundles.
    """

    file: str
    version: str
    version_compatible: bool
    capabilities: tuple[str, ...]
    gpu: str
    platform: str = ""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineRecord:
        """Raises FormatError when `data`, of a manifest, is something else."""
        needed = ("file", "version", "version_compatible", "capabilities", "gpu")
        found = strict.record(data, "build.engine", needed, ("platform",))
        if not isinstance(found["version_compatible"], bool):
            raise FormatError(f"version_compatible is {found['version_compatible']!r}; expected true or false")
        return cls(
            strict.path(found["file"], "build.engine.file"),
            strict.text(found["version"], "build.engine.version", VERSION),
            found["version_compatible"],
            _capabilities(found["capabilities"]),
            strict.text(found["gpu"], "build.engine.gpu"),
            strict.text(found.get("platform", ""), "build.engine.platform"),
        )


VERSION = r"\d+\.\d+[\w.+-]*"


def system() -> str:
    """The platform that an engine is bound to: "linux-x86_64"."""
    return f"{sys.platform}-{platform.machine().lower()}"


class Sdk:
    """A loaded SDK and its log.

    Each SDK has one logger per process, so there is one object of this class per SDK.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self.api = cast(Vendor, need(family.module, family.extra))
        self.lines: deque[str] = deque(maxlen=RELEVANT_LINES)
        self.layers = ""
        self.log = self._logger()

    @property
    def version(self) -> str:
        return str(self.api.__version__)

    def error(self, what: str) -> BackendError:
        """An error with what failed and the SDK's last messages."""
        return BackendError(f"{self.family.title} {self.version}: {what}: {self.words()}")

    def words(self) -> str:
        """The SDK's last messages in one line; clears them."""
        said = "; ".join(" ".join(line.split()) for line in self.lines) or "it said nothing"
        self.lines.clear()
        return said

    def _logger(self) -> tensorrt.ILogger:
        base, sdk = cast(Any, self.api.ILogger), self
        warning = int(self.api.ILogger.Severity.WARNING)

        class Log(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                base.__init__(self)

            def log(self, severity: tensorrt.ILogger.Severity, msg: str) -> None:
                if int(severity) <= warning:
                    sdk.lines.append(msg)
                elif msg.startswith("Layers:"):  # the builder tells what it made; no GPU is needed to hear it
                    sdk.layers = msg

        return cast("tensorrt.ILogger", Log())


@functools.cache
def sdk(family: str) -> Sdk:
    """The SDK of "trt" or "rtx".

    Raises:
        MissingPackageError: it is not installed.
    """
    return Sdk(FAMILIES[family])


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


KERNEL = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]+), Inputs: (?P<tensors>.*)")
DATATYPE = re.compile(r"Datatype: ([^,}\]]+)")
TYPES = {"int8": "int8", "half": "fp16", "fp16": "fp16", "float": "fp32", "fp32": "fp32", "fp8": "fp8", "bf": "bf16"}


def summarize_engine_layers(information: str) -> dict[str, Any]:
    """Count an engine's kernels by type, from the one-line form of the SDK's layer information.

    Returns:
        kernels; gemms and attention, which are fused kernels (type of their first input -> how many), reformats
        (kernels that only move data), and float_gemms, the ONNX nodes of the products that stayed float where others
        are in int8.
    """
    kernels, reformats = 0, 0
    gemms: Counter[str] = Counter()
    attention: Counter[str] = Counter()
    floats: list[str] = []
    for line in information.splitlines():
        found = KERNEL.match(line.strip())
        if not found or found["kind"] in ("signal", "wait"):
            continue
        kernels += 1
        name, kind = found["name"].lower(), found["kind"].lower()
        if "mha" in name or "attention" in name + kind:
            attention[_datatype(found["tensors"], dequantises=False)] += 1
        elif "reformat" in name + kind or re.search(r"(tran|resh)\w*move", name):
            reformats += 1
        elif re.search(r"gemm|matrix|conv", kind) or re.search(r"gemm|matmul", name) or "Fc" in found["name"]:
            datatype = _datatype(found["tensors"], dequantises="Cast" in found["name"].partition("Fc")[0])
            gemms[datatype] += 1
            if datatype != "int8":
                floats.append(_product(line) or found["name"])
    return {
        "kernels": kernels,
        "gemms": dict(gemms),
        "attention": dict(attention),
        "reformats": reformats,
        "float_gemms": floats if "int8" in gemms else [],
    }


def _datatype(tensors: str, dequantises: bool) -> str:
    """The type in which a product is computed: that of the first tensor that its kernel reads.

    A fused kernel that casts before it multiplies reads integers and multiplies floats.
    """
    types = [_short(word) for word in DATATYPE.findall(tensors)] or ["unknown"]
    return next((t for t in types if t != "int8"), "float") if dequantises else types[0]


def _short(word: str) -> str:
    return next((short for key, short in TYPES.items() if key in word.lower()), word.lower())


def _product(line: str) -> str:
    """The ONNX node of the product among the nodes that were fused into a kernel."""
    nodes: list[str] = re.findall(r"\[ONNX Layer: (\S+?)\]", line)
    return next((node for node in nodes if "matmul" in node), nodes[0] if nodes else "")


class Session(Backend):
    """An engine with one context, one stream and its buffers; a clip goes up as uint8.

    Args:
        bundle: a `trt-*` or `rtx-*` bundle.
        threads: ignored; the GPU computes.
        device: "cuda" (default) or "cuda:1".

    Raises:
        InputError: the device is no GPU's name.
        MissingPackageError: the SDK, or both pycuda and cuda-python, are not installed.
        BackendError: no driver, no such GPU, or the SDK fails; with its last messages.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None, device: str | None = None) -> None:
        super().__init__(bundle.contract, bundle.batch)
        self.trt = sdk(bundle.target.partition("-")[0])
        self._graph: cuda.Graph | None = None
        with ExitStack() as failed:
            failed.callback(self.release)
            self.stream = cuda.open_stream(_index(device), self.trt.family.extra)
            with self.stream.current():
                self._load(bundle)
            failed.pop_all()

    def _load(self, bundle: Bundle) -> None:
        settings, record = read_build(bundle)
        runtime = self.trt.api.Runtime(self.trt.log)
        if settings.version_compatible:
            runtime.engine_host_code_allowed = True
        plan, self.origin = find_engine(self.trt, bundle, self.stream, settings, record)
        engine = self._deserialize(runtime, plan)
        if engine is None and not self.origin.startswith(JUST_BUILT):
            why = f"the engine that was there does not open ({self.trt.words()})"
            refused = hashlib.sha256(plan).hexdigest()
            plan, self.origin = build_here(self.trt, bundle, self.stream, settings, why, refused)
            engine = self._deserialize(runtime, plan)
        if engine is None:
            raise self.trt.error(f"cannot open the engine of {bundle.name} on {self.stream.name}")
        self.engine = engine
        compiled = _Compiled(self.trt, kernels_path(self.trt, bundle, self.stream, plan))
        context = compiled.context(engine)
        if context is None:
            raise self.trt.error(f"cannot make a context for {bundle.name} on {self.stream.name}, perhaps for memory")
        self.context = context
        self._allocate()
        self._enqueue()  # the first call compiles and allocates; only then can work be recorded
        self.stream.synchronize()
        compiled.keep()
        self._run, self.replay = self._record()

    def _deserialize(self, runtime: tensorrt.Runtime, plan: bytes) -> tensorrt.ICudaEngine | None:
        self.trt.lines.clear()
        return cast("tensorrt.ICudaEngine | None", runtime.deserialize_cuda_engine(plan))

    def _allocate(self) -> None:
        """Allocate host and device buffers of the input and the output."""
        self.host: dict[str, cuda.Bytes] = {}
        self.address: dict[str, int] = {}
        for i in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(i)
            width = 1 if name == "frames" else np.dtype(np.float32).itemsize
            size = math.prod(self._shape(name)) * width
            self.host[name], self.address[name] = self.stream.pinned(size), self.stream.device(size)
            self.context.set_tensor_address(name, self.address[name])
        self.input = "frames"
        (self.output,) = set(self.host) - {self.input}
        self.frames = self.host[self.input].reshape(self.batch, *self.contract.shape)
        self.logits = self.host[self.output].view(np.float32).reshape(self._shape(self.output))

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(cast(Any, self.engine.get_tensor_shape(name)))

    def interface(self) -> Interface:
        return Interface((self._shape(self.input),), (self._shape(self.output),))

    def _enqueue(self) -> None:
        self.stream.upload(self.address[self.input], self.host[self.input])
        if not self.context.execute_async_v3(self.stream.handle):
            raise self.trt.error("cannot run the engine")
        self.stream.download(self.host[self.output], self.address[self.output])

    def _record(self) -> tuple[Callable[[], None], str]:
        """A call that replays a CUDA graph, or else launches the kernels one by one; and the reason."""
        try:
            graph = self.stream.capture(self._enqueue)
        except BackendError as error:
            LOGGER.warning("launching kernel by kernel: %s", error)
            return self._enqueue, f"none: {error}"
        self._graph = graph
        return graph, "CUDA graph"

    def infer(self, clips: Frames) -> Logits:
        with self.stream.current():
            np.copyto(self.frames, clips)
            self._run()
            self.stream.synchronize()
            return np.array(self.logits)

    def describe(self) -> dict[str, Any]:
        inspector = self.engine.create_engine_inspector()
        information = inspector.get_engine_information(self.trt.api.LayerInformationFormat.ONELINE)
        return {
            self.trt.family.module: self.trt.version,
            "device": f"{self.stream.name} ({self.stream.capability})",
            "driver": f"CUDA {self.stream.driver}, {self.stream.library}",
            "engine": self.origin,
            "replay": self.replay,
            "layers": summarize_engine_layers(information),
        }

    def release(self) -> None:
        # Before the stream that they belong to, in its context, and what uses memory before the memory.
        if not hasattr(self, "stream"):
            return
        try:
            with self.stream.current():
                if self._graph is not None:
                    self._graph.close()
                for name in ("_run", "_graph", "context", "engine", "frames", "logits", "host"):
                    if hasattr(self, name):
                        delattr(self, name)
        finally:
            self.stream.close()


class _Compiled:
    """The cache of kernels that TensorRT for RTX compiles on the first call; unused with TensorRT."""

    def __init__(self, trt: Sdk, path: Path) -> None:
        self.just_in_time = trt.family is FAMILIES["rtx"]
        self.path, self.cache = path, cast(Any, None)
        self.used = False

    def context(self, engine: tensorrt.ICudaEngine) -> tensorrt.IExecutionContext | None:
        if not self.just_in_time:
            return engine.create_execution_context()
        config = cast(Any, engine.create_runtime_config())
        self.cache = config.create_runtime_cache()
        try:
            kept = self.path.read_bytes() if self.path.is_file() else b""
        except OSError:
            kept = b""
        self.used = bool(kept) and bool(self.cache.deserialize(kept))
        if kept and not self.used:
            LOGGER.warning("the compiled kernels in %s were refused; they are compiled anew", self.path)
            self.cache = config.create_runtime_cache()
        config.set_runtime_cache(self.cache)
        return cast("tensorrt.IExecutionContext | None", engine.create_execution_context(config))

    def keep(self) -> None:
        if self.cache is not None and not self.used:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(self.path, bytes(self.cache.serialize()))
            except OSError as error:  # costs the next process its compile time, nothing else
                LOGGER.warning("cannot keep compiled kernels in %s: %s", self.path, error.strerror)


def read_build(bundle: Bundle) -> tuple[Settings, EngineRecord | None]:
    """The manifest's build settings, and its record of the bundle's engine or None.

    Raises:
        BundleError: they do not follow the format.
    """
    try:
        settings = Settings.from_json(bundle.build["settings"])
        record = EngineRecord.from_json(bundle.build["engine"]) if "engine" in bundle.build else None
    except (FormatError, KeyError) as error:
        raise BundleError(f"{bundle.path}: build is damaged ({error}); export or copy the bundle again") from error
    return settings, record


JUST_BUILT = "built here:"


def find_engine(
    trt: Sdk, bundle: Bundle, gpu: cuda.Stream, settings: Settings, record: EngineRecord | None
) -> tuple[bytes, str]:
    """The engine for `gpu`: that of the bundle if it runs, else the cached one, else a new one; and its origin."""
    incompatibility = engine_incompatibility(record, trt, gpu) if record else "the bundle has no engine"
    if record and not incompatibility:
        return bundle.file(record.file).read_bytes(), "the bundle's"
    return build_here(trt, bundle, gpu, settings, incompatibility)


def build_here(
    trt: Sdk, bundle: Bundle, gpu: cuda.Stream, settings: Settings, incompatibility: str, refused: str = ""
) -> tuple[bytes, str]:
    """Build the engine on this machine, or take it from the cache; returns it with its origin.

    Args:
        incompatibility: why the bundle's engine, or the cached one, is not used.
        refused: sha256 of an engine that does not open; if that is the cached one, it is built again.
    """
    settings = replace(settings, capabilities=())
    source = bundle.file(settings.source)
    key = engine_key(trt, bundle, gpu, settings)

    def make(path: Path, reason: str) -> None:
        began = time.monotonic()
        LOGGER.warning("building the engine of %s for %s (%s; %s)", bundle.name, gpu.name, incompatibility, reason)
        if settings.legacy == "int8":
            bundle.file(CALIBRATION_CLIPS)
        legacy = calibrator(trt, bundle.path, settings, gpu, bundle.batch)
        path.write_bytes(build(trt, source, settings, _Report(), legacy, timing_cache()))
        LOGGER.warning("built in %.0f s; kept in %s", time.monotonic() - began, path.parent)

    entry = cache.make_once(bundle.name, ".engine", key, make, refused)
    origin = (
        f"{JUST_BUILT} {incompatibility}; {entry.reason}" if entry.reason else f"built here earlier: {incompatibility}"
    )
    return entry.path.read_bytes(), origin


def kernels_path(trt: Sdk, bundle: Bundle, gpu: cuda.Stream, plan: bytes) -> Path:
    """The cache file of the kernels that are compiled for an engine; its name has the digest of the key."""
    key = json.dumps([_digest(plan), trt.version, gpu.name, gpu.capability, gpu.driver, system()])
    return cache.folder() / f"{bundle.name}.{_digest(key.encode())}.jit"


def engine_key(trt: Sdk, bundle: Bundle, gpu: cuda.Stream, settings: Settings) -> dict[str, str]:
    """The cache key of an engine: all that it depends on."""
    return {
        "graph": graph_hash(bundle, settings.source),
        trt.family.title: trt.version,
        "GPU": f"{gpu.name} ({gpu.capability})",
        "driver": gpu.driver,
        "settings": ", ".join(f"{k}={v}" for k, v in _readable(settings).items() if v) or "default",
    }


def _readable(settings: Settings) -> dict[str, Any]:
    """The settings, with a digest in place of the list of layers."""
    layers = repr(settings.layers).encode() if settings.layers else b""
    return settings.to_json() | {"layers": layers and _digest(layers)}


def graph_hash(bundle: Bundle, source: str) -> str:
    """Hash of the graph, of weight files beside it, and of the calibration clips."""
    files = sorted([*bundle.path.glob(f"{source}*"), *bundle.path.glob(CALIBRATION_CLIPS)])
    return " ".join(bundle.files[f.name].sha256 if f.name in bundle.files else sha256(f) for f in files)


def engine_incompatibility(record: EngineRecord, trt: Sdk, gpu: cuda.Stream) -> str:
    """Why the bundle's engine cannot run here; empty if it can."""
    if record.version != trt.version and not (record.version_compatible and _newer(trt.version, record.version)):
        return f"the bundle's engine is for {trt.family.title} {record.version}, here is {trt.version}"
    if record.capabilities and gpu.capability.replace(".", "") not in record.capabilities:
        return (
            f"the bundle's engine is for compute capability {', '.join(record.capabilities)}, here is {gpu.capability}"
        )
    if record.gpu and record.gpu != gpu.name:
        return f"the bundle's engine is for {record.gpu}, here is {gpu.name}"
    if record.platform and record.platform != system():
        return f"the bundle's engine was built on {record.platform}, here is {system()}"
    return ""


def _newer(here: str, built: str) -> bool:
    """Whether version `here` runs version-compatible engines of `built`: the same major version, and not older."""
    mine, other = ([int(part) for part in re.findall(r"\d+", version)[:4]] for version in (here, built))
    return mine[0] == other[0] and mine >= other


class _Report:
    """Logs the SDK's progress every few seconds: a build has thousands of steps and can take minutes."""

    EVERY = 2.0

    def __init__(self) -> None:
        self.began = self.said = time.monotonic()

    def __call__(self, phase: str, step: int, steps: int) -> None:
        now = time.monotonic()
        if now - self.said >= self.EVERY:
            self.said = now
            LOGGER.info("%.0f s: %s, %d of %d", now - self.began, phase, step, steps)


def _digest(plan: bytes) -> str:
    return hashlib.sha256(plan).hexdigest()[:16]


def _index(device: str | None) -> int:
    found = re.fullmatch(r"cuda(?::(\d+))?", device or "cuda")
    if not found:
        raise InputError(f"no device is called {device!r} here; expected cuda, or cuda:1 for the second GPU")
    return int(found[1] or 0)
