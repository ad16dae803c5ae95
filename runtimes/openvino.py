"""The OpenVINO backend: x86 and ARM CPUs, and Intel's GPUs and NPUs."""

from __future__ import annotations

import functools
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetube import strict
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, InputError
from edgetube.precision import Precision
from edgetube.runtimes.base import Backend, Interface, LayerOutputs, Logits, Served, Tap, may_saturate
from edgetube.targets import Arithmetic
from edgetube.video import Frames


@contextmanager
def _absent(module: str) -> Iterator[None]:
    """In the block a package that is not imported yet seems not to be installed."""
    hidden = module not in sys.modules
    if hidden:
        sys.modules[module] = None  # type: ignore[assignment]  # what `import` documents for this
    try:
        yield
    finally:
        if hidden:
            del sys.modules[module]


with _absent("openvino_telemetry"):  # else importing openvino reports the import to its vendor
    import openvino as ov

__all__ = ["Session", "compile_model", "core", "ov"]  # `ov`: OpenVINO, imported with its warnings silenced

RUNS = ("openvino",)
UNSEEN = "other arithmetic than this CPU's (float16, bfloat16), GPUs and NPUs of Intel"

CAPABILITY = {"f32": "FP32", "f16": "FP16", "bf16": "BF16"}
"""OpenVINO's names of device capabilities, by type."""

FLAGS = Path("/proc/cpuinfo")
"""What Linux says of an x86's instructions."""

ARITHMETIC: Mapping[str, Arithmetic] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
"""What a type that OpenVINO names computes in."""


def served(bundle: Bundle) -> Served:
    """Triton's backend for OpenVINO takes `model.xml` and `model.bin`, as the artifact's files are called."""
    return Served("openvino", {name: bundle.path / name for name in bundle.runtime_files})


_core_lock = threading.Lock()


def core() -> ov.Core:
    """The only `ov.Core` of this process.

    Its CPU plugin gives the thread that first needs it a stack for signal handlers (`sigaltstack`, Linux), and unmaps
    that stack when the core is deleted. Cores that are not deleted in the reverse order, or by another thread, leave
    that thread with an unmapped one: the next signal, Ctrl-C among them, ends the process with a segmentation fault or
    overwrites what was mapped there since. A core that lives as long as the process does neither.
    """
    with _core_lock:  # of two that threads make at the same time, one would be deleted
        return _make_core()


@functools.cache
def _make_core() -> ov.Core:
    return ov.Core()


class Session(Backend):
    """An IR (`model.xml`, `model.bin`) compiled for one device.

    The manifest's `build.inference_precision` lists the types that float arithmetic may run in, best first; the first
    one that the device can do is taken. OpenVINO's own default is not used: it silently computes in bfloat16.

    Args:
        bundle: a bundle whose artifact is a model with one input and one output.
        threads: CPU threads of one call; None leaves it to OpenVINO (the physical cores).
        device: "cpu" (default), "gpu", "npu", or another one that OpenVINO lists, in any case.

    Raises:
        InputError: OpenVINO has no such device here.
        BackendError: OpenVINO refuses the file, or would compute it wrongly on this processor.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None, device: str | None = None) -> None:
        super().__init__(bundle.contract, bundle.batch)
        named = strict.items(bundle.build.get("inference_precision", ["f32"]), "build.inference_precision")
        precisions = [strict.choice(precision, "build.inference_precision", CAPABILITY) for precision in named]
        bundle.file(str(Path(bundle.artifact).with_suffix(".bin")))  # opened by OpenVINO, beside the artifact
        self.path, self.how = bundle.artifact_path, (precisions, threads, device or "cpu")
        if self.how[2].lower() == "cpu" and may_saturate(bundle) and _saturates():
            raise BackendError(
                f"{bundle.path} was made for processors with VNNI: sums of its 8-bit products overflow here; export "
                "it again with this edgetube"
            )
        with _mapped(f"cannot open {bundle.artifact_path}"):
            self.compiled = compile_model(bundle.artifact_path, *self.how)
            self.request = self.compiled.create_infer_request()
            self.arithmetic = ARITHMETIC[self.compiled.get_property("INFERENCE_PRECISION_HINT").to_string()]

    def interface(self) -> Interface:
        inputs, outputs = (
            tuple(
                tuple(axis.get_length() if axis.is_static else None for axis in value.get_partial_shape())
                for value in values
            )
            for values in (self.compiled.inputs, self.compiled.outputs)
        )
        return Interface(inputs, outputs)

    def infer(self, clips: Frames) -> Logits:
        with _mapped("the inference request failed"):
            # Without a copy, the request reads the caller's frames, and only until it returns.
            result = self.request.infer([clips], share_inputs=True)
        return np.array(result[0], np.float32)

    def describe(self) -> dict[str, Any]:
        with _mapped("the compiled model has no properties"):
            return {
                "openvino": ov.__version__,
                "device": self.compiled.get_property("EXECUTION_DEVICES"),
                "inference_precision": self.compiled.get_property("INFERENCE_PRECISION_HINT").to_string(),
                "threads": self.compiled.get_property("INFERENCE_NUM_THREADS"),
            }

    def layers(self, names: Sequence[str]) -> tuple[str, ...]:
        with _mapped(f"cannot read {self.path}"):
            operations = core().read_model(self.path).get_ops()
            made = {name for operation in operations for output in operation.outputs() for name in output.get_names()}
        return tuple(name for name in names if name in made)

    def tap(self, names: Sequence[str]) -> Tap:
        with _mapped(f"cannot open {self.path} with more outputs"):
            model = core().read_model(self.path)
            given = {name for output in model.outputs for name in output.get_names()}
            model.add_outputs([name for name in names if name not in given])
            request = compile_model(model, *self.how).create_infer_request()

        def show(clips: Frames) -> LayerOutputs:
            with _mapped("the inference request failed"):
                request.infer([clips], share_inputs=True)
                return {name: np.array(request.get_tensor(name).data, np.float32) for name in names}

        return show

    def release_calls(self) -> None:
        del self.request, self.compiled


def compile_model(
    path: Path | ov.Model, precisions: list[str], threads: int | None = None, device: str = "cpu"
) -> ov.CompiledModel:
    """A model, or the one of a file, compiled for the latency of one call; see `Session`.

    Raises:
        InputError: OpenVINO has no such device here.
        RuntimeError: OpenVINO refuses the file.
    """
    name = device.upper()
    if name not in (available := core().available_devices):
        raise InputError(f"no device is called {device!r} here; OpenVINO finds {', '.join(available).lower()}")
    able = computed(name)
    precision = next((kind for kind in precisions if kind in able), "f32")
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    return core().compile_model(path, name, config)


def computed(device: str) -> set[str]:
    """Types that a device of OpenVINO's computes faster than float32, and float32.

    On x86, float16 is one only where a matrix unit has it (AMX-FP16). The vector instructions of AVX512-FP16 alone made
    TubeViT-B slower than float32, and three times as slow as bfloat16 on AMX: see `docs/benchmarks.md`.
    """
    able = core().get_property(device, "OPTIMIZATION_CAPABILITIES")
    types = {kind for kind, capability in CAPABILITY.items() if capability in able}
    return types - {"f16"} if device == "CPU" and "bf16" in types and not _multiplies_float16() else types


def _multiplies_float16() -> bool:
    """Whether this processor is no x86, or is known to have AMX-FP16."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return FLAGS.is_file() and "amx_fp16" in FLAGS.read_text().split()


def product(precision: Precision, size: int, threads: int | None) -> Callable[[], object] | None:
    """A call that multiplies two matrices (size, size) on the CPU, for `runtimes.products`; no weight-only ones.

    FP16 is computed as `computed` says: in float16, or else in bfloat16; None where the CPU has neither.
    """
    wanted = {Precision.FP32: ["f32"], Precision.FP16: ["f16", "bf16"], Precision.W8A8: ["f32"]}
    able = computed("CPU")
    if not any(kind in able for kind in wanted.get(precision, [])):
        return None
    from openvino import opset13 as ops

    frames = ops.parameter([size, size], np.float32)
    right = ops.constant(np.ones((size, size), np.float32))
    if precision.quantises_activations:
        model = _integers(size, 1)
    else:
        model = ov.Model([ops.matmul(frames, right, False, True)], [frames])
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    config["INFERENCE_PRECISION_HINT"] = next(kind for kind in wanted[precision] if kind in able)
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    request = core().compile_model(model, "CPU", config).create_infer_request()
    feed = [np.ones((size, size), np.float32)]
    return lambda: request.infer(feed, share_inputs=True)


def _integers(size: int, weight: npt.ArrayLike) -> ov.Model:
    """A matrix of whole numbers (size, size), 0 to 255, times one of `weight`, -128 to 127, in 8-bit integers.

    Args:
        weight: (size of K, size of N), or one number for all.
    """
    from openvino import opset13 as ops

    frames = ops.parameter([size, size], np.float32)
    zero, low, high, highest = (np.float32(bound) for bound in (0, -128, 127, 255))
    left = ops.fake_quantize(frames, zero, highest, zero, highest, 256)
    constant = ops.constant(np.broadcast_to(np.asarray(weight, np.float32), (size, size)).T.copy())
    right = ops.fake_quantize(constant, low, high, low, high, 256)
    return ov.Model([ops.matmul(left, right, False, True)], [frames])


@functools.cache
def _saturates() -> bool:
    """Whether sums of uint8 times int8 overflow on this processor: 255 times 127, computed."""
    size = 64
    with _mapped("cannot multiply integers"):
        request = compile_model(_integers(size, 127), ["f32"], threads=1).create_infer_request()
        result = np.array(request.infer([np.full((size, size), 255, np.float32)])[0])
    return not bool((result == size * 255 * 127).all())


@contextmanager
def _mapped(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the one type that OpenVINO raises
        raise BackendError(f"OpenVINO {ov.__version__}: {what}: {' '.join(str(error).split())}") from error
