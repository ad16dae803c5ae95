"""The backend: runs an engine with a CUDA graph."""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from edgetube import cuda
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, InputError
from edgetube.files import atomic_write
from edgetube.runtimes.base import Backend, Interface, Logits
from edgetube.runtimes.tensorrt.build import Settings
from edgetube.runtimes.tensorrt.engine_cache import (
    JUST_BUILT,
    EngineRecord,
    build_here,
    find_engine,
    kernels_path,
    read_build,
)
from edgetube.runtimes.tensorrt.layers import summarize_engine_layers
from edgetube.runtimes.tensorrt.sdk import FAMILIES, Sdk, load_runner
from edgetube.video import Frames

if TYPE_CHECKING:
    import tensorrt

LOGGER = logging.getLogger("edgetube")


class Session(Backend):
    """An engine with one context, one stream and its buffers; a clip goes up as uint8.

    Args:
        bundle: a `trt-*` or `rtx-*` bundle.
        threads: ignored; the GPU computes.
        device: "cuda" (default) or "cuda:1".

    Raises:
        InputError: the device is no GPU's name.
        MissingPackageError: the SDK, or both pycuda and cuda-python, are not installed.
        BackendError: no driver, no such GPU, the SDK fails, with its last messages, or the lean runtime finds no engine
            that it can run.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None, device: str | None = None) -> None:
        super().__init__(bundle.contract, bundle.batch)
        settings, record = read_build(bundle)
        self.trt = load_runner(bundle.target.partition("-")[0], settings.version_compatible)
        self._graph: cuda.Graph | None = None
        with ExitStack() as failed:
            failed.callback(self.release)
            self.stream = cuda.open_stream(_index(device), self.trt.family.extra)
            with self.stream.current():
                self._load(bundle, settings, record)
            failed.pop_all()

    def _load(self, bundle: Bundle, settings: Settings, record: EngineRecord | None) -> None:
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
        return {
            self.trt.family.module: self.trt.version,
            "device": f"{self.stream.name} ({self.stream.capability})",
            "driver": f"CUDA {self.stream.driver}, {self.stream.library}",
            "engine": self.origin,
            "replay": self.replay,
            **self._layers(),
        }

    def _layers(self) -> dict[str, Any]:
        """`layers` of the engine; nothing in the lean runtime, whose bindings lack the class that lists them."""
        if not hasattr(self.trt.api, "EngineInspector"):
            return {}
        inspector = self.engine.create_engine_inspector()
        information = inspector.get_engine_information(self.trt.api.LayerInformationFormat.ONELINE)
        return {"layers": summarize_engine_layers(information)}

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


def _index(device: str | None) -> int:
    found = re.fullmatch(r"cuda(?::(\d+))?", device or "cuda")
    if not found:
        raise InputError(f"no device is called {device!r} here; expected cuda, or cuda:1 for the second GPU")
    return int(found[1] or 0)
