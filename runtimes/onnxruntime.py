"""The ONNX Runtime backend, which every install has."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as native

from edgetube import protobuf
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, InputError
from edgetube.precision import Precision
from edgetube.runtimes.base import Backend, Interface, LayerOutputs, Logits, Served, Tap, integers, may_saturate
from edgetube.video import Frames

RUNS = ("onnx",)
UNSEEN = "ARM kernels and their speed, sums on x86 without VNNI, other providers"

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}

FAILURES = (
    native.EPFail,
    native.Fail,
    native.InvalidArgument,
    native.InvalidGraph,
    native.InvalidProtobuf,
    native.NoModel,
    native.NoSuchFile,
    native.NotImplemented,
    native.RuntimeException,
)

EXACT = "session.x64quantprecision"
"""Multiplies uint8 by uint8 where a file says uint8 by int8: exact on every x86, and slower."""

BESIDE = "session.model_external_initializers_file_folder_path"
"""The folder of the files that hold the weights of a model which is given as bytes."""

AS_THEY_STAND = "session.disable_quant_qdq"
"""Q/DQ pairs are computed one by one, in float32 between them, and not fused into integer kernels."""


def served(bundle: Bundle) -> Served:
    """Triton's backend for ONNX files takes the artifact, and the files of large weights beside it, as they are."""
    return Served("onnxruntime", {name: bundle.path / name for name in bundle.runtime_files})


class OnnxBackend(Backend):
    """An ONNX file in one inference session; a subclass says how sessions are opened.

    Args:
        bundle: a bundle whose artifact is an ONNX file with one input and one output.
        threads: CPU threads of one call; None leaves it to ONNX Runtime (the physical cores).
        opened: the file of the bundle that answers calls, where that is not the artifact itself. Inner tensors are
            those of the artifact.

    Raises:
        BackendError: ONNX Runtime refuses the file.
    """

    thread_safe = True

    def __init__(self, bundle: Bundle, *, threads: int | None = None, opened: Path | None = None) -> None:
        super().__init__(bundle.contract, bundle.batch)
        self.path, self.threads, opened = bundle.artifact_path, threads, opened or bundle.artifact_path
        self.session = self.open_session(opened, {}, f"cannot open {opened}")
        self.input = self.session.get_inputs()[0].name if self.session.get_inputs() else ""
        self.outputs = {value.name for value in self.session.get_outputs()}

    @abstractmethod
    def open_session(self, model: Path | bytes, entries: Mapping[str, str], what: str) -> ort.InferenceSession:
        """Open the artifact, or the same graph with more outputs, as bytes.

        Args:
            entries: further session options.
            what: what failed, for errors.
        """

    def interface(self) -> Interface:
        inputs, outputs = (
            tuple(tuple(n if isinstance(n, int) else None for n in value.shape) for value in values)
            for values in (self.session.get_inputs(), self.session.get_outputs())
        )
        return Interface(inputs, outputs)

    def infer(self, clips: Frames) -> Logits:
        with mapped("the session failed"):
            (output,) = self.session.run(None, {self.input: clips})
        return np.asarray(output, np.float32)

    def layers(self, names: Sequence[str]) -> tuple[str, ...]:
        made = _tensors(self.path)
        return tuple(name for name in names if name in made)

    def tap(self, names: Sequence[str]) -> Tap:
        hidden = [name for name in names if name not in self.outputs]
        beside = {BESIDE: str(self.path.parent)}
        session = self.open_session(
            _with_outputs(self.path, hidden), beside, f"cannot open {self.path} with more outputs"
        )

        def show(clips: Frames) -> LayerOutputs:
            with mapped("the session failed"):
                values = session.run(list(names), {self.input: clips})
            return {name: np.asarray(value, np.float32) for name, value in zip(names, values, strict=True)}

        return show

    def release_calls(self) -> None:
        del self.session


class Session(OnnxBackend):
    """An ONNX file on one of ONNX Runtime's own providers.

    INT8 artifacts whose sums would saturate on this processor run with other kernels, or are refused. Q/DQ pairs of
    another backend's artifact, which is emulated here, are not fused.

    Args:
        bundle: a bundle whose artifact is an ONNX file with one input and one output.
        threads: CPU threads of one call; None leaves it to ONNX Runtime (the physical cores).
        device: "cpu" (default), "cuda", "directml" or "coreml".

    Raises:
        InputError: the device is unknown.
        BackendError: this ONNX Runtime was not built for the device, cannot use it, or refuses the file; or the file
            would be computed wrongly.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None, device: str | None = None) -> None:
        self.provider, self.entries = _provider(device or "cpu"), _entries(bundle)
        super().__init__(bundle, threads=threads)

    def open_session(self, model: Path | bytes, entries: Mapping[str, str], what: str) -> ort.InferenceSession:
        return _open(model, session_options(self.threads, {**self.entries, **entries}), self.provider, what)

    def describe(self) -> dict[str, Any]:
        return {
            "onnxruntime": ort.__version__,
            "providers": self.session.get_providers(),
            "threads": self.threads or "default",
        }


GRAPH, NODE, GRAPH_OUTPUT, NODE_OUTPUT, VALUE_NAME = 7, 1, 12, 2, 1
"""Numbers of the fields that hold them in onnx.proto: ModelProto.graph, GraphProto.node and .output, NodeProto.output,
ValueInfoProto.name. A device has no `onnx` package."""


def _tensors(path: Path) -> set[str]:
    """Names of the outputs of all nodes of a file."""
    (graph,) = protobuf.parse(memoryview(path.read_bytes()))[GRAPH]
    nodes = protobuf.parse(graph).get(NODE, [])
    return {protobuf.text(name) for node in nodes for name in protobuf.parse(node).get(NODE_OUTPUT, [])}


def _with_outputs(path: Path, names: Sequence[str]) -> bytes:
    """Add tensors to the outputs of a file's graph; their types are inferred when it is opened.

    A protobuf reader merges concatenated messages and appends their repeated fields, so the outputs are appended to the
    file.
    """
    values = (protobuf.text_field(VALUE_NAME, name) for name in names)
    added = b"".join(protobuf.field(GRAPH_OUTPUT, value) for value in values)
    return path.read_bytes() + protobuf.field(GRAPH, added)


def session_options(threads: int | None = None, entries: Mapping[str, str] | None = None) -> ort.SessionOptions:
    """Options of a session; `entries` by ONNX Runtime's names."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    return options


def _open(model: Path | bytes, options: ort.SessionOptions, provider: str, what: str) -> ort.InferenceSession:
    """A session on the given provider, without fallback to another.

    Raises:
        BackendError: the provider cannot be used here, or ONNX Runtime refuses the model.
    """
    with mapped(what):
        session = ort.InferenceSession(model, options, providers=[provider], enable_fallback=0)
    if (got := session.get_providers()[0]) != provider:
        raise BackendError(
            f"ONNX Runtime {ort.__version__} could not load {provider} and took {got}: install the driver and the "
            "libraries that this build of it needs, or leave out the device"
        )
    return session


def _entries(bundle: Bundle) -> dict[str, str]:
    """Session options that make a bundle's integer products exact on this processor.

    Raises:
        BackendError: there are none.
    """
    if bundle.backend != __name__.rpartition(".")[2]:
        return {AS_THEY_STAND: "1"}
    if not may_saturate(bundle) or not _saturates(""):
        return {}
    signed = integers(bundle).get("cpu") == "arm"  # int8 activations, which have no uint8 weights
    if signed or _saturates(EXACT):
        raise BackendError(
            f"{bundle.path} was made for processors with VNNI: sums of its 8-bit products overflow here, and ONNX "
            f"Runtime {ort.__version__} has no other form; export it again with this edgetube"
        )
    return {EXACT: "1"}


@functools.cache
def _saturates(entry: str) -> bool:
    """Whether sums of uint8 times int8 overflow here, under one session option: 255 times 127, computed."""
    size = 64
    model = _integers(np.full((size, size), 127, np.int8))
    session = _open(
        model, session_options(1, {entry: "1"} if entry else {}), PROVIDERS["cpu"], "cannot multiply integers"
    )
    with mapped("cannot multiply integers"):
        (result,) = session.run(None, {"a": np.full((size, size), 255, np.uint8)})
    return not bool((np.asarray(result) == size * 255 * 127).all())


def _integers(weight: npt.NDArray[np.int8]) -> bytes:
    """An ONNX file that multiplies uint8 (M, K) by `weight` (K, N), in the very form that INT8 artifacts have."""
    one, zero = np.ones((), np.float32), np.zeros((), np.uint8)
    scales = np.ones(weight.shape[1], np.float32)
    constants: dict[str, npt.NDArray[np.generic]] = {
        "b": weight,
        "scale": one,
        "scales": scales,
        "zero": zero,
        "": zero,
    }
    return one_operator("MatMulIntegerToFloat", np.uint8, np.float32, constants, "com.microsoft")


def optimise(source: Path, optimised: Path) -> Path:
    """Write the graph as ONNX Runtime optimises it for execution; returns `optimised`."""
    options = session_options()
    options.optimized_model_filepath = str(optimised)
    _open(source, options, PROVIDERS["cpu"], f"cannot open {source}")
    return optimised


def evaluate(
    model: bytes, folder: Path | None = None, threads: int | None = None
) -> Callable[[Mapping[str, npt.NDArray[Any]]], list[npt.NDArray[np.float32]]]:
    """Open any ONNX graph on the CPU: feeds by input name -> its outputs. Q/DQ pairs are not fused.

    Args:
        folder: of the files that hold its weights, where they are not in `model`.
        threads: of one call; None leaves it to ONNX Runtime.
    """
    beside = {BESIDE: str(folder)} if folder else {}
    options = session_options(threads, {AS_THEY_STAND: "1", "session.intra_op.allow_spinning": "0", **beside})
    session = _open(model, options, PROVIDERS["cpu"], "cannot open a graph")
    outputs = [output.name for output in session.get_outputs()]

    def call(feeds: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[np.float32]]:
        with mapped("the graph failed"):
            return [np.asarray(value) for value in session.run(outputs, dict(feeds))]

    return call


def product(precision: Precision, size: int, threads: int | None) -> Callable[[], object] | None:
    """A call that multiplies two matrices (size, size) on the CPU, for `runtimes.products`; float32 and int8 only."""
    kinds: dict[Precision, tuple[str, _Type, _Type, _Type]] = {
        Precision.FP32: ("MatMul", np.float32, np.float32, np.float32),
        Precision.W8A8: ("MatMulInteger", np.uint8, np.int8, np.int32),
    }
    if precision not in kinds:
        return None
    operator, left, right, result = kinds[precision]
    model = one_operator(operator, left, result, {"b": np.ones((size, size), right)})
    session = _open(model, session_options(threads), PROVIDERS["cpu"], "cannot multiply")
    feed = {"a": np.ones((size, size), left)}
    return lambda: session.run(None, feed)


_Type = type[np.generic]

TYPES: Mapping[_Type, int] = {np.float32: 1, np.uint8: 2, np.int8: 3, np.int32: 6}
"""Numbers of element types in onnx.proto."""


def one_operator(
    operator: str, left: _Type, result: _Type, constants: Mapping[str, npt.NDArray[np.generic]], domain: str = ""
) -> bytes:
    """An ONNX file with one operator: `a`, of any shape (M, K), and constants, "" for one that is left out -> `c`.

    Written by hand (onnx.proto, field by field): a device has no package for that.
    """
    text, field, number = protobuf.text_field, protobuf.field, protobuf.number
    rank = field(2, field(1, b"") * 2)

    def value(name: str, dtype: _Type) -> bytes:
        return text(1, name) + field(2, field(1, number(1, TYPES[dtype]) + rank))

    def constant(name: str, array: npt.NDArray[np.generic]) -> bytes:
        dims = b"".join(number(1, size) for size in array.shape)
        return dims + number(2, TYPES[array.dtype.type]) + text(8, name) + field(9, array.tobytes())

    inputs = b"".join(text(1, name) for name in ("a", *constants))
    graph = field(1, inputs + text(2, "c") + text(4, operator) + text(7, domain)) + text(2, "g")
    graph += b"".join(field(5, constant(name, array)) for name, array in constants.items() if name)
    graph += field(11, value("a", left)) + field(12, value("c", result))
    opsets = field(8, text(1, "") + number(2, 17)) + (field(8, text(1, domain) + number(2, 1)) if domain else b"")
    return number(1, 8) + opsets + field(7, graph)


def _provider(device: str) -> str:
    if device not in PROVIDERS:
        raise InputError(f"no device is called {device!r} here; ONNX Runtime knows {', '.join(PROVIDERS)}")
    if PROVIDERS[device] not in (available := ort.get_available_providers()):
        raise BackendError(
            f"this ONNX Runtime was not built for {device}; it has {', '.join(available)}: install a build with "
            f"{PROVIDERS[device]}, or leave out the device"
        )
    return PROVIDERS[device]


@contextmanager
def mapped(what: str) -> Iterator[None]:
    """Context manager: ONNX Runtime's errors become `BackendError`, in one line."""
    try:
        yield
    except FAILURES as error:
        raise BackendError(f"ONNX Runtime {ort.__version__}: {what}: {' '.join(str(error).split())}") from error
