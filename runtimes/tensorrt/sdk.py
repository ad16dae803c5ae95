"""TensorRT and TensorRT for RTX, which share an API: the module that is used, and its log."""

from __future__ import annotations

import functools
import platform
import sys
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from edgetube.errors import BackendError
from edgetube.targets import need

if TYPE_CHECKING:
    import tensorrt

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


FAMILIES = {
    "trt": Family("tensorrt", "tensorrt", "TensorRT"),
    "rtx": Family("tensorrt_rtx", "rtx", "TensorRT for RTX"),
}
"""By the first part of a target's name."""


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
def load_sdk(family: str) -> Sdk:
    """The SDK of "trt" or "rtx".

    Raises:
        MissingPackageError: it is not installed.
    """
    return Sdk(FAMILIES[family])


def system() -> str:
    """The platform that an engine is bound to: "linux-x86_64"."""
    return f"{sys.platform}-{platform.machine().lower()}"
