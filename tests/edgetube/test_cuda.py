"""Streams: what is asked of pycuda, cuda-python and the driver, recorded by doubles; the real ones, marked `gpu`."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgetube import cuda, targets
from edgetube.errors import BackendError, MissingPackageError


class Driver:
    """libcuda as far as graphs go: records names, answers 0 or what it is told to."""

    def __init__(self, **answers: Any) -> None:
        self.calls: list[str] = []
        self.answers = answers

    def __getattr__(self, name: Any) -> Any:
        def call(*_: Any) -> Any:
            self.calls.append(name)
            return self.answers.get(name, 0)

        return call


def test_work_is_recorded_between_begin_and_end_and_then_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(cuda, "_driver", lambda: driver)
    graph = cuda.Graph(7, lambda: driver.calls.append("work"))
    graph()
    graph()
    graph.close()
    assert driver.calls == [
        "cuStreamBeginCapture_v2", "work", "cuStreamEndCapture", "cuGraphInstantiateWithFlags",
        "cuGraphLaunch", "cuGraphLaunch", "cuGraphExecDestroy", "cuGraphDestroy",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("cuStreamBeginCapture_v2", "begin to record"),
        ("cuStreamEndCapture", "CUDA cannot record a CUDA graph: error 901"),
        ("cuGraphInstantiateWithFlags", "instantiate"),
    ],
)
def test_what_the_driver_refuses_is_said(monkeypatch: pytest.MonkeyPatch, call: str, message: str) -> None:
    monkeypatch.setattr(cuda, "_driver", lambda: Driver(**{call: 901}))
    with pytest.raises(BackendError, match=message):
        cuda.Graph(7, lambda: None)


def test_work_that_fails_still_ends_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(cuda, "_driver", lambda: driver)
    with pytest.raises(ZeroDivisionError):
        cuda.Graph(7, lambda: print(1 / 0))
    assert driver.calls[-1] == "cuStreamEndCapture"


class FakePyCuda(ModuleType):
    """The part of pycuda.driver that is used, over host memory."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pycuda.driver")
        self.depth = 0
        self.memory: dict[int, Any] = {}
        self.freed: list[Any] = []
        fake = self

        class Block:
            def __init__(self, size: Any) -> None:
                assert fake.depth, "no context is current"
                self.address = 4096 * (len(fake.memory) + 1)
                fake.memory[self.address] = np.zeros(size, np.uint8)

            def __int__(self) -> int:
                return self.address

            def free(self) -> None:
                fake.freed.append(self.address)

        class Context:
            @staticmethod
            def pop() -> None:
                fake.depth -= 1

            def push(self) -> None:
                fake.depth += 1

            def detach(self) -> None:
                fake.freed.append("context")

        class Stream:
            handle = 99

            def synchronize(self) -> None:
                assert fake.depth

        self.mem_alloc, self.Context, self.Stream = Block, Context, Stream

    def init(self) -> None:
        pass

    def get_driver_version(self) -> int:
        return 12040

    def Device(self, index: Any) -> Any:
        if index:
            raise self.Error("cuDeviceGet failed: invalid device ordinal")
        return SimpleNamespace(
            name=lambda: "Orin", compute_capability=lambda: (8, 7), retain_primary_context=lambda: self.Context()
        )

    def pagelocked_empty(self, size: Any, dtype: Any) -> Any:
        return np.empty(size, dtype)

    def memcpy_htod_async(self, address: Any, host: Any, stream: cuda.Stream) -> None:
        assert stream.handle == 99
        self.memory[address][:] = host

    def memcpy_dtoh_async(self, host: Any, address: Any, stream: cuda.Stream) -> None:
        host[:] = self.memory[address]


class FakeBindings(ModuleType):
    """The part of cuda.bindings.driver that is used, over host memory: every call answers (code, result...)."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=1, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=2
    )
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=SimpleNamespace(value=1))

    class Code(int):
        name = "CUDA_ERROR_INVALID_DEVICE"

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.depth = 0
        self.memory: dict[int, Any] = {}
        self.freed: list[Any] = []

    def __getattr__(self, name: Any) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            result = self.answer(name, *arguments)
            return (self.Code(0),) if result is None else (self.Code(0), result)

        return call

    def answer(self, name: Any, *arguments: Any) -> Any:
        match name:
            case "cuDeviceGetName":
                return b"RTX 4070\0\0\0"
            case "cuDeviceGetAttribute":
                return {1: 8, 2: 9}[arguments[0]]
            case "cuDriverGetVersion":
                return 13000
            case "cuCtxPushCurrent":
                self.depth += 1
            case "cuCtxPopCurrent":
                self.depth -= 1
                return "context"
            case "cuStreamCreate" | "cuDevicePrimaryCtxRetain" | "cuDeviceGet":
                return 99
            case "cuMemAlloc" | "cuMemHostAlloc":
                assert self.depth
                block = (ctypes.c_uint8 * arguments[0])()
                self.memory[ctypes.addressof(block)] = block
                return ctypes.addressof(block)
            case "cuMemcpyHtoDAsync" | "cuMemcpyDtoHAsync":
                ctypes.memmove(*arguments[:3])
            case "cuMemFree" | "cuMemFreeHost" | "cuStreamDestroy" | "cuDevicePrimaryCtxRelease":
                self.freed.append(name)
        return None

    def cuDeviceGet(self, index: Any) -> Any:
        return (self.Code(101 if index else 0), 0)


MODULES = {"pycuda": "pycuda.driver", "cuda-python": "cuda.bindings.driver"}


@pytest.fixture(params=MODULES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Any]:
    """One of the two libraries, replaced by its double; the other one is not installed."""
    module, fake = MODULES[request.param], {"pycuda": FakePyCuda, "cuda-python": FakeBindings}[request.param]()
    monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr(cuda, "installed", lambda name: name == module)
    return request.param, fake


@pytest.fixture(params=[*MODULES, *(pytest.param(f"real {name}", marks=pytest.mark.gpu) for name in MODULES)])
def stream(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[cuda.Stream]:
    """An open stream through each library; the doubles replay at once what was recorded."""
    kind, _, name = request.param.rpartition(" ")
    module = MODULES[name]
    monkeypatch.setattr(cuda, "installed", lambda name: name == module)
    if kind:
        if absent := targets.missing((module, targets.GPU)):
            pytest.skip(f"needs {', '.join(absent)}")
    else:
        fake = {"pycuda": FakePyCuda, "cuda-python": FakeBindings}[name]()
        monkeypatch.setitem(sys.modules, module, fake)
        monkeypatch.setattr(cuda.Stream, "capture", lambda self, work: Replayed(work))
    stream = cuda.open_stream(0, "rtx")
    yield stream
    stream.close()


class Replayed:
    """A double of a CUDA graph: it does the work again."""

    def __init__(self, work: Any) -> None:
        self.work = work
        work()

    def __call__(self) -> None:
        self.work()

    def close(self) -> None:
        pass


def test_a_recorded_round_trip_moves_what_lies_there_when_it_is_replayed(
    stream: cuda.Stream, rng: np.random.Generator
) -> None:
    size = 1 << 20
    with stream.current():
        up, down, address = stream.pinned(size), stream.pinned(size), stream.device(size)
        up[:] = down[:] = 0

        def work() -> None:
            stream.upload(address, up)
            stream.download(down, address)

        work()
        stream.synchronize()
        graph = stream.capture(work)
        for _ in range(3):
            up[:] = rng.integers(0, 256, size)
            graph()
            stream.synchronize()
            np.testing.assert_array_equal(down, up)
        graph.close()
    assert stream.name
    assert float(stream.capability) > 0
    assert float(stream.driver) > 0


def test_bytes_go_up_and_come_down(library: tuple[str, Any], rng: np.random.Generator) -> None:
    name, fake = library
    stream = cuda.open_stream(0, "rtx")
    assert stream.library == name
    assert (stream.name, stream.capability, stream.driver, stream.handle) in [
        ("Orin", "8.7", "12.4", 99),
        ("RTX 4070", "8.9", "13.0", 99),
    ]
    with stream.current():
        up, down, address = stream.pinned(64), stream.pinned(64), stream.device(64)
        up[:] = rng.integers(0, 256, 64)
        down[:] = 0
        stream.upload(address, up)
        stream.download(down, address)
        stream.synchronize()
    np.testing.assert_array_equal(down, up)
    assert fake.depth == 0
    stream.close()
    assert fake.freed
    assert fake.depth == 0


def test_a_gpu_that_is_not_there(library: tuple[str, Any]) -> None:
    with pytest.raises(BackendError, match=r"invalid device|INVALID_DEVICE"):
        cuda.open_stream(3, "rtx")


def test_no_library_says_both_pip_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "installed", lambda _: False)
    with pytest.raises(MissingPackageError, match=r"edgetube\[tensorrt\].* or pip install cuda-bindings"):
        cuda.open_stream(0, "tensorrt")


def test_without_a_driver_the_real_bindings_say_so() -> None:
    pytest.importorskip("cuda.bindings.driver")
    if not targets.missing((targets.GPU,)):
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendError, match="cuda-python: cu"):
        cuda.CudaPython(0)


def test_an_error_of_pycuda_in_a_recording_is_one_that_the_caller_can_do_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakePyCuda()
    monkeypatch.setitem(sys.modules, "pycuda.driver", fake)
    monkeypatch.setattr(cuda, "installed", lambda name: name == "pycuda.driver")
    monkeypatch.setattr(cuda, "Graph", lambda handle, work: work())
    stream = cuda.open_stream(0, "tensorrt")

    def refuse() -> None:
        raise fake.Error("cuMemcpyHtoDAsync failed: operation not permitted when stream is capturing")

    with (
        stream.current(),
        pytest.raises(BackendError, match="pycuda: cuMemcpyHtoDAsync failed: operation not permitted"),
    ):
        stream.capture(refuse)
    stream.close()
