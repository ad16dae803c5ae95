"""One CUDA stream with its memory: through pycuda or, where that cannot be built, through cuda-python.

Both libraries are thin wrappers of the driver. Addresses and stream handles are plain integers, as TensorRT takes them.
CUDA graphs use the driver directly, because pycuda has none.
"""

from __future__ import annotations

import ctypes
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from edgetube.errors import BackendError, MissingPackageError
from edgetube.targets import installed, load_libcuda, pip_line

Bytes = npt.NDArray[np.uint8]


class Stream(ABC):
    """A stream of one GPU, with its buffers.

    Every method that touches the GPU is called inside `current()`, from any thread, one thread at a time.

    Attributes:
        library: which package talks to the driver.
        name, capability, driver: of the GPU ("NVIDIA RTX A2000"), its compute capability ("8.6"), and the CUDA version
            of its driver ("12.4").
        handle: of the stream.
    """

    library: ClassVar[str]
    name: str
    capability: str
    driver: str
    handle: int

    @abstractmethod
    def current(self) -> Any:
        """Context manager: make the GPU current in this thread; errors of the library become `BackendError`."""

    @abstractmethod
    def device(self, size: int) -> int:
        """Address of `size` new bytes on the GPU."""

    @abstractmethod
    def pinned(self, size: int) -> Bytes:
        """New page-locked host memory, for asynchronous copies."""

    @abstractmethod
    def upload(self, address: int, host: Bytes) -> None:
        """Queue a copy from pinned memory to the GPU."""

    @abstractmethod
    def download(self, host: Bytes, address: int) -> None:
        """Queue a copy from the GPU to pinned memory."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all queued work."""

    @abstractmethod
    def close(self) -> None:
        """Free the stream and its memory; called once, outside of `current()`."""

    def capture(self, work: Callable[[], None]) -> Graph:
        """Capture what `work` queues on this stream as a CUDA graph.

        Raises:
            BackendError: an operation cannot be captured.
        """
        return Graph(self.handle, work)


class Graph:
    """A captured CUDA graph of a stream."""

    def __init__(self, stream: int, work: Callable[[], None]) -> None:
        self._cuda, self._stream = _driver(), ctypes.c_void_p(stream)
        self._graph = ctypes.c_void_p()
        thread_local = ctypes.c_int(1)  # other threads may go on allocating while this one records
        _check(self._cuda.cuStreamBeginCapture_v2(self._stream, thread_local), "begin to record a CUDA graph")
        try:
            work()
        finally:
            ended = self._cuda.cuStreamEndCapture(self._stream, ctypes.byref(self._graph))
        _check(ended, "record a CUDA graph")
        self._run = ctypes.c_void_p()
        flags = ctypes.c_ulonglong(0)
        made = self._cuda.cuGraphInstantiateWithFlags(ctypes.byref(self._run), self._graph, flags)
        _check(made, "instantiate a CUDA graph")

    def __call__(self) -> None:
        """Launch it on the stream."""
        _check(self._cuda.cuGraphLaunch(self._run, self._stream), "launch a CUDA graph")

    def close(self) -> None:
        """Free the graph."""
        self._cuda.cuGraphExecDestroy(self._run)
        self._cuda.cuGraphDestroy(self._graph)


def _driver() -> Any:
    try:
        return load_libcuda()
    except OSError as error:
        raise BackendError(f"no NVIDIA driver on this machine ({error}); install the GPU's driver") from error


def _check(code: int, what: str) -> None:
    if code:
        raise BackendError(f"CUDA cannot {what}: error {code} of the driver")


class PyCuda(Stream):
    """Through pycuda."""

    library = "pycuda"

    def __init__(self, index: int) -> None:
        self._cuda = importlib.import_module("pycuda.driver")
        self._kept: list[Any] = []
        with self._mapped():
            self._cuda.init()
            gpu = self._cuda.Device(index)
            self._context = gpu.retain_primary_context()
            self.name = gpu.name()
            self.capability = "{}.{}".format(*gpu.compute_capability())
            self.driver = _dotted(self._cuda.get_driver_version())
        with self.current():
            self._stream = self._cuda.Stream()
        self.handle = int(self._stream.handle)

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except self._cuda.Error as error:
            raise BackendError(f"pycuda: {error}") from error

    @contextmanager
    def current(self) -> Iterator[None]:
        with self._mapped():
            self._context.push()
            try:
                yield
            finally:
                self._cuda.Context.pop()

    def device(self, size: int) -> int:
        self._kept.append(self._cuda.mem_alloc(size))
        return int(self._kept[-1])

    def pinned(self, size: int) -> Bytes:
        host: Bytes = self._cuda.pagelocked_empty(size, np.uint8)
        return host

    def upload(self, address: int, host: Bytes) -> None:
        self._cuda.memcpy_htod_async(address, host, self._stream)

    def download(self, host: Bytes, address: int) -> None:
        self._cuda.memcpy_dtoh_async(host, address, self._stream)

    def synchronize(self) -> None:
        self._stream.synchronize()

    def capture(self, work: Callable[[], None]) -> Graph:
        with self._mapped():  # here and not where the context ends, so that the caller can do without a graph
            return super().capture(work)

    def close(self) -> None:
        with self.current():
            for block in self._kept:
                block.free()
            self._kept.clear()
            del self._stream
        self._context.detach()


class CudaPython(Stream):
    """Through cuda-python's low-level bindings."""

    library = "cuda-python"

    def __init__(self, index: int) -> None:
        self._cuda: Any = importlib.import_module("cuda.bindings.driver")
        self._device_blocks: list[Any] = []
        self._host_blocks: list[Any] = []
        self._call("cuInit", 0)
        self._gpu = self._call("cuDeviceGet", index)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._gpu)
        self.name = self._call("cuDeviceGetName", 128, self._gpu).split(b"\0")[0].decode()
        wanted = self._cuda.CUdevice_attribute
        version = (
            wanted.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            wanted.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
        self.capability = ".".join(str(self._call("cuDeviceGetAttribute", part, self._gpu)) for part in version)
        self.driver = _dotted(self._call("cuDriverGetVersion"))
        with self.current():
            non_blocking = self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
            self._stream = self._call("cuStreamCreate", non_blocking.value)
        self.handle = int(self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            code, *results = getattr(self._cuda, name)(*arguments)
        except RuntimeError as error:  # the driver's library is not there
            raise BackendError(f"cuda-python: {name}: {' '.join(str(error).split())}") from error
        if int(code):
            raise BackendError(f"cuda-python: {name}: {code.name}")
        return results[0] if results else None

    @contextmanager
    def current(self) -> Iterator[None]:
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def device(self, size: int) -> int:
        self._device_blocks.append(self._call("cuMemAlloc", size))
        return int(self._device_blocks[-1])

    def pinned(self, size: int) -> Bytes:
        address = self._call("cuMemHostAlloc", size, 0)
        self._host_blocks.append(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(address)))

    def upload(self, address: int, host: Bytes) -> None:
        self._call("cuMemcpyHtoDAsync", address, host.ctypes.data, host.nbytes, self._stream)

    def download(self, host: Bytes, address: int) -> None:
        self._call("cuMemcpyDtoHAsync", host.ctypes.data, address, host.nbytes, self._stream)

    def synchronize(self) -> None:
        self._call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        with self.current():
            for block in self._device_blocks:
                self._call("cuMemFree", block)
            for address in self._host_blocks:
                self._call("cuMemFreeHost", address)
            self._call("cuStreamDestroy", self._stream)
        self._call("cuDevicePrimaryCtxRelease", self._gpu)


LIBRARIES: dict[str, Callable[[int], Stream]] = {"pycuda.driver": PyCuda, "cuda.bindings.driver": CudaPython}
"""Module -> the stream that uses it, in the order of preference."""


def open_stream(index: int, extra: str) -> Stream:
    """A new stream on GPU `index`, through the first library that is installed; `extra` names the pip extra with one.

    Raises:
        MissingPackageError: neither pycuda nor cuda-python is installed.
        BackendError: no driver or no such GPU; with the library's message.
    """
    for module, stream in LIBRARIES.items():
        if installed(module):
            return stream(index)
    raise MissingPackageError(
        f"neither pycuda nor cuda-python is installed; install one with: {pip_line(extra)} or pip install cuda-bindings"
    )


def _dotted(version: int) -> str:
    """12040 as 12.4."""
    return f"{version // 1000}.{version % 1000 // 10}"
