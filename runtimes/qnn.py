"""The backend of Qualcomm's NPU (Hexagon Tensor Processor, HTP): ONNX Runtime with the plug-in `onnxruntime-qnn`.

On Snapdragon the NPU computes. On x86 the package emulates it bit by bit on the CPU: answers are those of the vendor's
own implementation, times say nothing.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import onnxruntime_qnn as plugin

from edgetube import strict
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, InputError
from edgetube.runtimes.onnxruntime import OnnxBackend, mapped, one_operator, session_options
from edgetube.targets import Arithmetic

RUNS = ("qnn",)
UNSEEN = "the NPU itself: speed, energy, heat, and the drivers of a device"

SIMULATED = platform.machine().lower() not in ("arm64", "aarch64")
"""Whether the processor is emulated, so that times are not those of a device."""

STRICT = "session.disable_cpu_ep_fallback"
ASSIGNMENT = "session.record_ep_graph_assignment_info"
SILENT = 4
"""ONNX Runtime's log severity for fatal errors alone; what else it logs is in the exceptions."""

MACHINE = Path("/sys/devices/soc0/machine")
"""Where Linux and Android on Snapdragon say which SoC they run on."""


@dataclass(frozen=True)
class Soc:
    """A system on a chip.

    Attributes:
        title: what it is sold as.
        model: `QNN_SOC_MODEL_*` of `QnnTypes.h` in Qualcomm's SDK (QAIRT).
        arch: version of its Hexagon processor, from "Supported Snapdragon devices" in the SDK's documentation.
    """

    title: str
    model: int
    arch: int


SOCS: Mapping[str, Soc] = {
    "sm8450": Soc("Snapdragon 8 Gen 1", 36, 69),
    "sm8475": Soc("Snapdragon 8+ Gen 1", 42, 69),
    "sm8550": Soc("Snapdragon 8 Gen 2", 43, 73),
    "qcs8550": Soc("Dragonwing QCS8550", 66, 73),
    "sc8380xp": Soc("Snapdragon X Elite", 60, 73),
    "sm8650": Soc("Snapdragon 8 Gen 3", 57, 75),
    "sm8750": Soc("Snapdragon 8 Elite", 69, 79),
    "sm8850": Soc("Snapdragon 8 Elite Gen 5", 87, 81),
}


class Session(OnnxBackend):
    """An artifact on the NPU alone: nothing of it may fall back to the CPU.

    The bundle's context binary for the SoC is opened, which was compiled at export. Without one, or where the installed
    version of the SDK is older than that of the export, the NPU's compiler compiles the ONNX file, which takes
    seconds to minutes. Inner tensors are those of the ONNX file.

    Args:
        bundle: a bundle whose artifact is an ONNX file with one input and one output; `build.contexts` of its manifest
            names an ONNX file with a context binary for each SoC.
        threads: CPU threads of one call; the NPU has none.
        device: the name of a SoC, `sm8650`, in any case. None asks the system; where the processor is emulated, it is
            the first SoC that the bundle has a context for.

    Raises:
        InputError: the SoC is unknown, or the system does not say which one it runs on.
        BackendError: the NPU does not take the artifact, or its context binary.
    """

    thread_safe = False
    arithmetic: Arithmetic = "float16"

    def __init__(self, bundle: Bundle, *, threads: int | None = None, device: str | None = None) -> None:
        contexts = strict.record(bundle.build.get("contexts", {}), "build.contexts")
        self.soc = find_soc(device or _own_soc(contexts))
        opened = bundle.artifact_path
        if self.soc in contexts and not _older(strict.text(bundle.build.get("qairt", "0"), "build.qairt")):
            name = strict.text(contexts[self.soc], f"build.contexts.{self.soc}")
            bundle.file(binary_of(name))
            opened = bundle.file(name)
        super().__init__(bundle, threads=threads, opened=opened)
        self.opened = opened.name

    def open_session(self, model: Path | bytes, entries: Mapping[str, str], what: str) -> ort.InferenceSession:
        return open_strictly(model, self.soc, entries, what, self.threads)

    def describe(self) -> dict[str, Any]:
        return {
            "onnxruntime": ort.__version__,
            "onnxruntime_qnn": plugin.__version__,
            "qairt": qairt_version(),
            "device": "htp (emulated on x86)" if SIMULATED else "htp",
            "soc": self.soc,
            "htp_arch": SOCS[self.soc].arch,
            "opened": self.opened,
        }


def find_soc(name: str) -> str:
    """The name of a SoC as `SOCS` has it.

    Raises:
        InputError: it is not known.
    """
    if name.lower() not in SOCS:
        raise InputError(f"no SoC is called {name!r} here; known are {', '.join(SOCS)}")
    return name.lower()


def binary_of(context: str) -> str:
    """The name of the binary beside a context's ONNX file, as the vendor's compiler calls it."""
    return f"{Path(context).stem}_qnn.bin"


def open_strictly(
    model: Path | bytes, soc: str, entries: Mapping[str, str], what: str, threads: int | None = None
) -> ort.InferenceSession:
    """A session of which every operator runs on the NPU.

    Args:
        model: an ONNX file.
        entries: further session options.
        what: what failed, for errors.

    Raises:
        BackendError: the NPU refuses some operators, whose names the error gives, or the file.
    """
    try:
        return _open(model, soc, {**entries, STRICT: "1"}, what, threads)
    except BackendError as error:
        if refused := [f"{name} ({kind})" for name, kind in refused_operators(model, soc, entries)]:
            more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
            raise BackendError(
                f"ONNX Runtime {ort.__version__}: {what}: the NPU of {soc} does not take {', '.join(refused[:3])}{more}"
            ) from error
        raise


def refused_operators(model: Path | bytes, soc: str, entries: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    """Name and type of the operators that the NPU does not take; empty where it takes all, or refuses the file."""
    options = {key: value for key, value in (entries or {}).items() if not key.startswith("ep.context")}
    try:
        session = _open(model, soc, {**options, ASSIGNMENT: "1"}, "cannot be opened")
    except BackendError:
        return []
    return [
        (node.name, node.op_type)
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != plugin.get_ep_name()
        for node in part.get_nodes()
    ]


def compile_context(source: Path, context: Path, soc: str) -> None:
    """Compile an ONNX file for one SoC: writes `context`, a small ONNX file, and its binary, see `binary_of`.

    Raises:
        BackendError: the NPU does not take the file.
    """
    entries = {"ep.context_enable": "1", "ep.context_file_path": str(context), "ep.context_embed_mode": "0"}
    open_strictly(source, soc, entries, f"cannot compile {source.name} for {soc}")


def run_once(model: Path, soc: str, feeds: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    """The only output of a file for the given inputs; it is opened strictly, and closed.

    Raises:
        BackendError: the NPU does not take the file, or fails.
    """
    session = open_strictly(model, soc, {}, f"cannot open {model}")
    with mapped(f"{model} failed"):
        (output,) = session.run(None, dict(feeds))
    return np.asarray(output, np.float32)


def _open(
    model: Path | bytes, soc: str, entries: Mapping[str, str], what: str, threads: int | None = None
) -> ort.InferenceSession:
    options = session_options(threads, entries)
    options.log_severity_level = SILENT
    with mapped(what):
        found = SOCS[soc]
        chosen = {
            "backend_type": "htp",
            "htp_arch": str(found.arch),
            "soc_model": str(found.model),
            "enable_htp_fp16_precision": "1",
            "offload_graph_io_quantization": "0",  # else the CPU quantises inputs and dequantises outputs
        }
        options.add_provider_for_devices(_devices(), chosen)
        return ort.InferenceSession(model, options, enable_fallback=0)


_registering = threading.Lock()


def _devices() -> list[Any]:
    """The device of the plug-in, registered once in this process."""
    with _registering:
        return _register()


@functools.cache
def _register() -> list[Any]:
    name = plugin.get_ep_name()
    ort.register_execution_provider_library(name, plugin.get_library_path())
    found = [device for device in ort.get_ep_devices() if device.ep_name == name]
    npus = [device for device in found if device.device.type == ort.OrtHardwareDeviceType.NPU]
    chosen = (npus or found)[:1]
    if SIMULATED:
        with _quiet():
            options = session_options(1)
            options.add_provider_for_devices(chosen, {"backend_type": "htp"})
            ort.InferenceSession(
                one_operator("MatMul", np.float32, np.float32, {"b": np.ones((8, 8), np.float32)}), options
            )
    return chosen


def _own_soc(contexts: Mapping[str, Any]) -> str:
    """The SoC of this machine, as the system states it; where the processor is emulated, the first with a context.

    Raises:
        InputError: the system does not state it, or states one that is not in `SOCS`.
    """
    if SIMULATED:
        return next(iter(contexts), next(iter(SOCS)))
    with suppress(OSError):
        if stated := MACHINE.read_text().strip():
            if stated.lower() in SOCS:
                return stated
            raise InputError(
                f"{MACHINE} says {stated!r:.60}, a SoC that is not known here; name the one that is most like it as "
                f"the device: {', '.join(SOCS)}"
            )
    raise InputError(f"{MACHINE} does not say which SoC this is; name it as the device: {', '.join(SOCS)}")


def qairt_version() -> str:
    """Version of Qualcomm's SDK in the package."""
    from onnxruntime_qnn import build_and_package_info

    return str(build_and_package_info.qnn_version)


def _older(version: str) -> bool:
    """Whether the SDK here is older than `version`: it does not open what a newer one compiled."""
    return _parts(qairt_version()) < _parts(version)


def _parts(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what is written to standard output in the block.

    The emulator's library prints a line when a process first uses it, into the midst of the JSON of a command.
    """
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        if sys.platform != "win32":  # there a library has a C runtime of its own, which no other code can flush
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
