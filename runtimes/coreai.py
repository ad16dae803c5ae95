"""The Core AI backend: Apple's runtime, on the CPU of Linux and of any Mac; on macOS 27 also GPU and neural engine."""

from __future__ import annotations

import asyncio
import hashlib
import os
import platform
import sys
import threading
import time
import weakref
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from coreai.authoring import AIModelAsset
from coreai.runtime import InferenceFunction, NDArray, SpecializationOptions

from edgetube.bundle import Bundle
from edgetube.errors import BackendError, InputError
from edgetube.precision import Precision
from edgetube.runtimes.base import FixedOutputs, Interface
from edgetube.video import Frames

RUNS = ("coreai",)
OWN_THREADS = True
UNSEEN = "neural engine and GPU, which have kernels of their own; speed; heat"
SIMULATED = sys.platform != "darwin"
"""Elsewhere Core AI interprets the program on the CPU."""

DEVICES = {"gpu": "gpu", "ane": "neural_engine"}
"""Devices besides the CPU -> their names in Core AI; what they cannot compute runs elsewhere."""

PROGRAM, HASH = "main.mlirb", "main.hash"
MEMBERS = (PROGRAM, HASH, "metadata.json")
"""The files of a model asset: the program with its weights, the program's SHA-256, and what Xcode shows."""

FAILURES = (RuntimeError, ValueError, TypeError, KeyError, OSError)
"""What Core AI's Python package raises."""

Result = TypeVar("Result")


SETTLED = 0.1
"""Seconds in which Core AI's threads let go of Python's objects after a call. One that comes too late, when the
interpreter is ending, ends the process (SIGABRT)."""


class _Caller:
    """A thread with an event loop, in which coroutines run for any other thread."""

    def __init__(self) -> None:
        self.loop, self.last = asyncio.new_event_loop(), 0.0
        self.thread = threading.Thread(target=self.loop.run_forever, name="edgetube-coreai", daemon=True)
        self.thread.start()

    def __call__(self, call: Coroutine[Any, Any, Result]) -> Result:
        """The result of a coroutine."""
        try:
            return asyncio.run_coroutine_threadsafe(call, self.loop).result()
        finally:
            self.last = time.monotonic()

    def end(self, process: int) -> None:
        """End the thread; in a forked process, which has none, do nothing."""
        if os.getpid() == process:
            time.sleep(max(0.0, self.last + SETTLED - time.monotonic()))
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
            self.loop.close()


class Session(FixedOutputs):
    """A model asset (`model.aimodel`), compiled for this machine in a temporary folder while it is opened.

    Core AI's calls are coroutines; they run in a thread of the session, so that any thread may call it, also one with
    an event loop of its own.

    Args:
        bundle: a bundle whose artifact is a model asset.
        threads: None only; Core AI chooses.
        device: "cpu" (default); with the runtime of macOS 27 also "gpu" and "ane" (never run by edgetube's tests).

    Raises:
        InputError: there is no such device here, or `threads` is given.
        BackendError: Core AI refuses the asset.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None, device: str | None = None) -> None:
        super().__init__(bundle)
        if threads is not None:
            raise InputError(f"threads is {threads}; Core AI chooses them itself, leave it out")
        self.device = (device or "cpu").lower()
        options = specialization(self.device)
        for member in MEMBERS:
            bundle.file(f"{bundle.artifact}/{member}")
        self.arithmetic = "float32" if bundle.precision is Precision.FP32 else "float16"
        self.call = _Caller()
        self._end = weakref.finalize(self, self.call.end, os.getpid())  # also where nobody closes the session
        try:
            with _mapped(f"cannot open {bundle.artifact_path}"):
                self.function = self.call(_load(_checked(bundle.artifact_path), options))
                (self.input,) = self.function.desc.input_names
                (self.output,) = (name for name in self.function.desc.output_names if name not in self.shown)
        except BaseException:
            self._end()
            raise

    def interface(self) -> Interface:
        described = self.function.desc
        return Interface(
            (tuple(described.input_descriptor(self.input).shape),),
            (tuple(described.output_descriptor(self.output).shape),),
        )

    def returned(self, clips: Frames) -> list[npt.NDArray[np.float32]]:
        with _mapped("the call failed"):
            answers = self.call(_call(self.function, {self.input: NDArray(clips)}))
            return [np.array(answers[name].numpy(), np.float32) for name in (self.output, *self.shown)]

    def describe(self) -> dict[str, Any]:
        return {"coreai": version(), "device": self.device}

    def release_calls(self) -> None:
        del self.function
        self._end()


def version() -> str:
    """Of Core AI's package."""
    return metadata.version("coreai-core")


def specialization(device: str) -> SpecializationOptions | None:
    """Core AI's options for a device; None for the CPU where it has no other.

    Raises:
        InputError: there is no such device here.
    """
    others = SpecializationOptions.is_supported()  # with the system's own runtime, from macOS 27 on
    if device == "cpu":
        return SpecializationOptions.cpu_only() if others else None
    if device not in DEVICES:
        raise InputError(f"no device is called {device!r} here; Core AI knows cpu, {', '.join(DEVICES)}")
    if not others:
        raise InputError(
            f"the device {device!r} needs macOS 27 or newer; on {platform.system()} Core AI computes on the cpu"
        )
    from coreai.runtime import ComputeUnitKind

    kind = getattr(ComputeUnitKind, DEVICES[device])()
    return SpecializationOptions.from_preferred_compute_unit_kind(kind)


def _checked(path: Path) -> AIModelAsset:
    """A model asset whose program Core AI can read: compiling another one would end the process.

    Raises:
        BackendError: the program is damaged, or newer than Core AI's package.
    """
    asset = AIModelAsset.load(path)
    whole = hashlib.sha256((path / PROGRAM).read_bytes()).digest() == (path / HASH).read_bytes()
    summary = asset.summary(include_statistics=False) if whole else None
    if summary is None or not summary.function_names:
        if whole:
            why = "is not known to this version of Core AI: upgrade coreai-core, or export the bundle again"
        else:
            why = f"is damaged, it is not that of its {HASH}; export or copy the bundle again"
        raise BackendError(f"Core AI {version()}: cannot open {path}: its {PROGRAM} {why}")
    return asset


async def _load(asset: AIModelAsset, options: SpecializationOptions | None) -> InferenceFunction:
    """The asset's only function. It needs the files that are compiled here no longer than it is being loaded."""
    async with asset.executable(options) as model:
        (name,) = model.function_names
        return model.load_function(name)


async def _call(function: InferenceFunction, inputs: dict[str, NDArray]) -> Any:
    return await function(inputs)


@contextmanager
def _mapped(what: str) -> Iterator[None]:
    try:
        yield
    except FAILURES as error:
        text = " ".join(str(error).split())
        raise BackendError(f"Core AI {version()}: {what}: {text}") from error
