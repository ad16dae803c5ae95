"""Doubles of a GPU, of TensorRT and of TensorRT for RTX; their arithmetic is that of ONNX Runtime.

What is copied where is thus checked by the answer. `machine` puts all of them in place.
"""

from __future__ import annotations

import importlib.machinery
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from edgetube import cuda, targets
from edgetube.errors import BackendError
from edgetube.runtimes.tensorrt import build as builder
from edgetube.runtimes.tensorrt.build import Settings
from edgetube.runtimes.tensorrt.sdk import FAMILIES, LEAN, Sdk, load_sdk

Work = Callable[[], object]


class HostStream(cuda.Stream):
    """A stream whose GPU is the host's memory; it runs what is queued when it is synchronised."""

    library = "host"
    opened: ClassVar[dict[int, HostStream]] = {}
    """By handle."""

    def __init__(
        self,
        index: int = 0,
        can_capture: bool = True,
        name: str = "RTX 4070",
        capability: str = "8.9",
        driver: str = "12.4",
    ) -> None:
        self.name, self.capability, self.driver = name, capability, driver
        self.handle = 77 + len(HostStream.opened)
        HostStream.opened[self.handle] = self
        self.can_capture = can_capture
        self.memory: dict[int, cuda.Bytes] = {}
        self.queue: list[Work] = []
        self.recording: list[Work] | None = None
        self.depth, self.closed = 0, False
        self.freed: list[int] = []
        """How deep in `current()` pinned memory was given back."""

    @contextmanager
    def current(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def device(self, size: int) -> int:
        assert self.depth
        address = 4096 * (len(self.memory) + 1)
        self.memory[address] = np.zeros(size, np.uint8)
        return address

    def pinned(self, size: int) -> cuda.Bytes:
        assert self.depth
        host = np.zeros(size, np.uint8)
        weakref.finalize(host, lambda: self.freed.append(self.depth))
        return host

    def put(self, work: Work) -> None:
        """Queue or record a piece of work."""
        assert self.depth
        (self.queue if self.recording is None else self.recording).append(work)

    def upload(self, address: int, host: cuda.Bytes) -> None:
        self.put(lambda: self.memory[address].__setitem__(slice(None), host))

    def download(self, host: cuda.Bytes, address: int) -> None:
        self.put(lambda: host.__setitem__(slice(None), self.memory[address]))

    def synchronize(self) -> None:
        assert self.depth
        for work in self.queue:
            work()
        self.queue.clear()

    def capture(self, work: Callable[[], None]) -> cuda.Graph:
        if not self.can_capture:
            raise BackendError("CUDA cannot record a CUDA graph: error 901 of the driver")
        self.recording = recorded = list[Work]()
        try:
            work()
        finally:
            self.recording = None
        return cast(cuda.Graph, _HostGraph(self, recorded))

    def close(self) -> None:
        assert not self.depth
        self.closed = True


class _HostGraph:
    def __init__(self, stream: HostStream, recorded: list[Work]) -> None:
        self.stream, self.recorded = stream, recorded

    def __call__(self) -> None:
        self.stream.queue.extend(self.recorded)

    def close(self) -> None:
        assert self.stream.depth
        assert not self.stream.closed
        self.recorded.clear()


HALF = "Name: m, LayerType: gemm, Inputs: [ { Name: x, Datatype: Half } ], Metadata: [ONNX Layer: a.matmul]"
INT8 = "Name: q, LayerType: gemm, Inputs: [ { Name: y, Datatype: Int8 } ], Metadata: [ONNX Layer: b.matmul]"


def vendor(
    version: str = "10.3.0",
    opens: bool | Callable[[bytes], bool] = True,
    runs: bool = True,
    has_context: bool = True,
    kernels: Callable[[bytes], bool] = lambda data: True,
    inspects: bool = True,
) -> Any:
    """A module like `tensorrt`, or `tensorrt_rtx`, whose engines are ONNX files; see `layers` for what they say.

    Args:
        opens, runs: whether engines can be opened (some may be), and be run.
        has_context: whether there is memory for a context.
        kernels: whether compiled kernels are accepted.
        inspects: whether the layers of an engine can be listed.
    """
    trt: Any = _module("tensorrt")
    trt.__version__, trt.flags = version, []

    class Logger:
        Severity = SimpleNamespace(WARNING=2)

    class Context:
        def __init__(self, engine: Engine) -> None:
            self.engine, self.addresses = engine, dict[str, int]()

        def set_tensor_address(self, name: str, address: int) -> bool:
            self.addresses[name] = address
            return True

        def execute_async_v3(self, handle: int) -> bool:
            if not runs:
                trt.logger.log(1, "IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime\n(illegal address)")
                return False
            stream, session = HostStream.opened[handle], self.engine.session

            def work() -> None:
                spec = session.get_inputs()[0]
                clips = stream.memory[self.addresses["frames"]].reshape(spec.shape)
                (logits,) = session.run(None, {"frames": clips})
                stream.memory[self.addresses["logits"]][:] = logits.reshape(-1).view(np.uint8)

            stream.put(work)
            return True

    class Engine:
        num_io_tensors = 2

        def __init__(self, plan: bytes) -> None:
            self.session = ort.InferenceSession(plan, providers=["CPUExecutionProvider"])

        def get_tensor_name(self, i: int) -> str:
            return ("logits", "frames")[i]

        def get_tensor_shape(self, name: str) -> list[int]:
            tensors = [*self.session.get_inputs(), *self.session.get_outputs()]
            return cast("list[int]", next(tensor.shape for tensor in tensors if tensor.name == name))

        def create_runtime_config(self) -> SimpleNamespace:
            cache = SimpleNamespace(serialize=lambda: b"kernels", deserialize=kernels)
            return SimpleNamespace(create_runtime_cache=lambda: cache, set_runtime_cache=lambda cache: True)

        def create_execution_context(self, config: object = None) -> Context | None:
            return Context(self) if has_context else None

        def create_engine_inspector(self) -> SimpleNamespace:
            if not inspects:
                raise TypeError("Unable to convert function return value to a Python type!")
            information = layers(self.session.get_modelmeta().description)
            return SimpleNamespace(get_engine_information=lambda form: information)

    class Runtime:
        def __init__(self, logger: object) -> None:
            trt.logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            if opens(plan) if callable(opens) else opens:
                return Engine(plan)
            trt.logger.log(1, "Error Code 6: The engine plan file is generated on an incompatible device")
            return None

    class Calibrator:
        def __init__(self) -> None:
            self.base_was_initialised = True

    trt.ILogger, trt.Runtime, trt.IInt8EntropyCalibrator2 = Logger, Runtime, Calibrator
    trt.LayerInformationFormat = SimpleNamespace(ONELINE=0)
    if inspects:
        trt.EngineInspector = SimpleNamespace
    return trt


def _module(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="a double")
    return module


def layers(kind: str) -> str:
    """Layer information in one-line form, of an engine whose file describes itself as `kind`."""
    return "\n".join(("Layers:", *([INT8] if kind == "int8" else []), HALF, ""))


@dataclass
class Machine:
    """A machine with a GPU, both SDKs and a library for CUDA, all of them doubles.

    Attributes:
        trt: the module in the place of both SDKs.
        stream: arguments of the streams that are opened from now on.
        builds: (version, settings) of every engine that was built.
        timing_caches: the files of timings that they were built with.
    """

    patch: pytest.MonkeyPatch
    trt: Any = None
    stream: dict[str, Any] = field(default_factory=dict)
    builds: list[tuple[str, Settings]] = field(default_factory=list)
    opened: list[HostStream] = field(default_factory=list)
    timing_caches: list[Path | None] = field(default_factory=list)

    def use(self, **changes: Any) -> None:
        """Install another SDK, see `vendor`."""
        self.trt = vendor(**changes)
        for family in FAMILIES.values():
            self.patch.setitem(sys.modules, family.module, self.trt)
        load_sdk.cache_clear()

    def use_lean(self, **changes: Any) -> None:
        """Install the lean runtime alone, in the place of the full TensorRT; see `vendor`."""
        self.trt = vendor(inspects=False, **changes)
        self.patch.setitem(sys.modules, FAMILIES["trt"].module, None)
        self.patch.setitem(sys.modules, LEAN.module, self.trt)
        load_sdk.cache_clear()

    def open_stream(self, index: int, extra: str) -> HostStream:
        """In the place of `cuda.open_stream`."""
        self.opened.append(HostStream(index, **self.stream))
        return self.opened[-1]

    def build(
        self,
        sdk: Sdk,
        path: Path,
        settings: Settings,
        on_progress: object = None,
        calibrator: Any = None,
        timing_cache: Path | None = None,
    ) -> bytes:
        """In the place of `build.build`: the engine is the graph, which says whether it multiplies integers."""
        self.builds.append((sdk.version, settings))
        self.timing_caches.append(timing_cache)
        model = onnx.load(path)
        quantised = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
        model.doc_string = "int8" if quantised or settings.legacy == "int8" else "float"
        sdk.layers = layers(model.doc_string)
        while calibrator is not None and calibrator.get_batch(["frames"]):
            pass
        return model.SerializeToString()


@contextmanager
def machine(cache: Path) -> Iterator[Machine]:
    """Put the doubles in place; what is kept between processes goes to the folder `cache`."""
    with pytest.MonkeyPatch.context() as patch:
        here = Machine(patch)
        patch.setenv("EDGETUBE_CACHE", str(cache))
        patch.setattr(cuda, "open_stream", here.open_stream)
        patch.setattr(builder, "build", here.build)
        patch.setattr(targets, "_gpus", lambda: 1)
        patch.setitem(sys.modules, "pycuda.driver", _module("pycuda.driver"))
        here.use()
        yield here
    load_sdk.cache_clear()
