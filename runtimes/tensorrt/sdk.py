"""TensorRT, its lean runtime, and TensorRT for RTX, which share an API: the module that is used, and its log."""

from __future__ import annotations

import functools
import platform
import sys
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from edgetube.errors import BackendError, MissingPackageError
from edgetube.targets import installed, need, pip_line

if TYPE_CHECKING:
    import tensorrt

RELEVANT_LINES = 6
"""Number of the SDK's last warnings and errors in a `BackendError`."""


class Vendor(Protocol):
    """The parts of `tensorrt` and `tensorrt_rtx` that are used, with the types of TensorRT's stubs.

    `tensorrt_lean` has those of them that run engines.
    """

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
    """One of the SDKs: its module, its pip extra, its name, and whether it builds engines or only runs them."""

    module: str
    extra: str
    title: str
    builds: bool = True


FAMILIES = {
    "trt": Family("tensorrt", "tensorrt", "TensorRT"),
    "rtx": Family("tensorrt_rtx", "rtx", "TensorRT for RTX"),
}
"""By the first part of a target's name."""

LEAN = Family("tensorrt_lean", "tensorrt-lean", "TensorRT's lean runtime", builds=False)
"""Runs version-compatible engines of TensorRT."""

SDKS = {**FAMILIES, "lean": LEAN}


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
def load_sdk(name: str) -> Sdk:
    """The SDK of "trt" or "rtx", or "lean".

    Raises:
        MissingPackageError: it is not installed.
    """
    return Sdk(SDKS[name])


def uses_lean(family: str, version_compatible: bool) -> bool:
    """Whether engines of a family are run by the lean runtime: it is here, and the full TensorRT is not."""
    full = FAMILIES[family].module
    return family == "trt" and version_compatible and not installed(full) and installed(LEAN.module)


def load_runner(family: str, version_compatible: bool) -> Sdk:
    """The SDK that runs engines of "trt" or "rtx": their own or, for version-compatible ones, the lean runtime.

    Raises:
        MissingPackageError: none is installed that runs them; says what to install.
    """
    if uses_lean(family, version_compatible):
        return load_sdk("lean")
    try:
        return load_sdk(family)
    except MissingPackageError as error:
        if family != "trt":
            raise
        if version_compatible:
            raise MissingPackageError(f"{error}; to run an engine and build none: {pip_line(LEAN.extra)}") from error
        if installed(LEAN.module):
            hint = "the lean runtime, which is here, runs engines of bundles with --set version-compatible=yes"
            raise MissingPackageError(f"{error}; {hint}") from error
        raise


def system() -> str:
    """The platform that an engine is bound to: "linux-x86_64"."""
    return f"{sys.platform}-{platform.machine().lower()}"
