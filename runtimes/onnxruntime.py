"""ONNX Runtime: the runtime that every edgetube install has."""

from __future__ import annotations

import platform
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
from edgetube.runtimes.base import Backend, Output, Tap
from edgetube.video import Frames

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


CPUINFO = Path("/proc/cpuinfo")


class Session(Backend):
    """An ONNX file in one inference session.

    Args:
        bundle: a bundle whose artifact is an ONNX file with one input and one output.
        threads: CPU threads of one call; None leaves it to ONNX Runtime (the physical cores).
        device: "cpu" (default), "cuda", "directml" or "coreml".

    Raises:
        InputError: the device is unknown.
        BackendError: this ONNX Runtime was not built for the device, or refuses the file.
    """

    thread_safe = True

    def __init__(self, bundle: Bundle, *, threads: int | None = None, device: str | None = None) -> None:
        super().__init__(bundle.contract, bundle.batch)
        options, provider = _options(threads), _provider(device or "cpu")
        with _mapped(f"cannot open {bundle.artifact_path}"):
            self.session = ort.InferenceSession(bundle.artifact_path, options, providers=[provider])
        self.path, self.provider, self.threads = bundle.artifact_path, provider, threads
        self.input = self.session.get_inputs()[0].name

    def infer(self, clips: Frames) -> Output:
        with _mapped("the session failed"):
            (output,) = self.session.run(None, {self.input: clips})
        return np.asarray(output, np.float32)

    def describe(self) -> dict[str, Any]:
        return {
            "onnxruntime": ort.__version__,
            "providers": self.session.get_providers(),
            "threads": self.threads or "default",
        }

    def layers(self, names: Sequence[str]) -> tuple[str, ...]:
        made = _tensors(self.path)
        return tuple(name for name in names if name in made)

    def tap(self, names: Sequence[str]) -> Tap:
        given = {value.name for value in self.session.get_outputs()}
        hidden = [name for name in names if name not in given]
        options = _options(self.threads)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.path.parent))
        with _mapped(f"cannot open {self.path} with more outputs"):
            session = ort.InferenceSession(_with_outputs(self.path, hidden), options, providers=[self.provider])

        def show(clips: Frames) -> dict[str, Output]:
            with _mapped("the session failed"):
                values = session.run(list(names), {self.input: clips})
            return {name: np.asarray(value, np.float32) for name, value in zip(names, values, strict=True)}

        return show

    def release(self) -> None:
        del self.session


GRAPH, NODE, GRAPH_OUTPUT, NODE_OUTPUT, VALUE_NAME = 7, 1, 12, 2, 1
"""Numbers of the fields that hold them in onnx.proto: ModelProto.graph, GraphProto.node and .output, NodeProto.output,
ValueInfoProto.name. A device has no `onnx` package."""


def _tensors(path: Path) -> set[str]:
    """Names of the tensors that the nodes of a file make."""
    (graph,) = protobuf.parse(memoryview(path.read_bytes()))[GRAPH]
    nodes = protobuf.parse(graph).get(NODE, [])
    return {str(name, "utf-8") for n in nodes for name in map(protobuf.message, protobuf.parse(n).get(NODE_OUTPUT, []))}


def _with_outputs(path: Path, names: Sequence[str]) -> bytes:
    """A file whose graph gives out more tensors; their types are inferred when it is opened.

    Messages that follow one another are merged by whoever reads them, and their repeated fields appended: that is how
    protobuf is defined, so the outputs are written behind the file as they are.
    """
    values = (protobuf.field(VALUE_NAME, name.encode()) for name in names)
    added = b"".join(protobuf.field(GRAPH_OUTPUT, value) for value in values)
    return path.read_bytes() + protobuf.field(GRAPH, added)


def _options(threads: int | None = None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    if _saturates():  # multiply uint8 by uint8 instead: exact, and 1.4x slower where it is not needed
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def _saturates() -> bool:
    """Whether sums of uint8 times int8 may overflow 16 bits: on x86 without VNNI, and where that cannot be told."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not CPUINFO.is_file() or "vnni" not in CPUINFO.read_text("utf-8", "replace")


def optimise(source: Path, optimised: Path) -> Path:
    """Write the graph that a session really runs, after ONNX Runtime's own rewriting; returns `optimised`."""
    options = _options()
    options.optimized_model_filepath = str(optimised)
    with _mapped(f"cannot open {source}"):
        ort.InferenceSession(source, options, providers=[PROVIDERS["cpu"]])
    return optimised


def evaluate(model: bytes) -> Callable[[Mapping[str, npt.NDArray[Any]]], list[npt.NDArray[np.float32]]]:
    """Open any ONNX graph on the CPU: feeds by input name -> its outputs. Q/DQ pairs are computed as they stand."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with _mapped("cannot open a graph"):
        session = ort.InferenceSession(model, options, providers=[PROVIDERS["cpu"]])
    outputs = [output.name for output in session.get_outputs()]

    def call(feeds: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[np.float32]]:
        with _mapped("the graph failed"):
            return [np.asarray(value) for value in session.run(outputs, dict(feeds))]

    return call


def product(precision: str, size: int, threads: int | None) -> Callable[[], object] | None:
    """A call that multiplies two matrices (size, size) on the CPU, for `runtimes.products`; float32 and int8 only.

    The graph is written by hand (onnx.proto, field by field): a device has no package for that.
    """
    kinds = {"fp32": ("MatMul", 1, np.float32, 1, np.float32), "int8": ("MatMulInteger", 2, np.uint8, 3, np.int8)}
    if precision not in kinds:
        return None
    operator, kind, dtype, weight_kind, weight_dtype = kinds[precision]
    weight = np.ones((size, size), weight_dtype)
    shape = _field(2, *[_field(1, _field(1, size))] * 2)
    frames = _field(1, b"a") + _field(2, _field(1, _field(1, kind), shape))
    result = _field(1, b"c") + _field(2, _field(1, _field(1, 1 if precision == "fp32" else 6), shape))
    constant = _field(1, size) * 2 + _field(2, weight_kind) + _field(8, b"b") + _field(9, weight.tobytes())
    node = _field(1, b"a") + _field(1, b"b") + _field(2, b"c") + _field(4, operator.encode())
    graph = _field(1, node) + _field(2, b"g") + _field(5, constant) + _field(11, frames) + _field(12, result)
    model = _field(1, 8) + _field(8, _field(1, b"") + _field(2, 17)) + _field(7, graph)
    session = ort.InferenceSession(model, _options(threads), providers=[PROVIDERS["cpu"]])
    feed = {"a": np.ones((size, size), dtype)}
    return lambda: session.run(None, feed)


def _field(number: int, *values: bytes | int) -> bytes:
    """One field of a protobuf message: a number, or the joined bytes of a string or of a message."""
    if isinstance(values[0], int):
        return _varint(number << 3) + _varint(values[0])
    content = b"".join(value for value in values if isinstance(value, bytes))
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


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
def _mapped(what: str) -> Iterator[None]:
    try:
        yield
    except FAILURES as error:
        raise BackendError(f"ONNX Runtime {ort.__version__}: {what}: {' '.join(str(error).split())}") from error
