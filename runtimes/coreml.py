"""Core ML: predicts with the neural engine, the GPU or the CPU of an Apple device. Needs macOS."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from edgetube import mlpackage
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, InputError, MissingPackageError
from edgetube.runtimes.base import Backend, Interface, Logits
from edgetube.runtimes.mil import function_for, interface_of
from edgetube.targets import missing, need
from edgetube.video import Frames

RUNS = ("coreml",)
NEEDS = ("macOS", "coremltools")
EMULATOR = "mil"
OWN_THREADS = True
UNSEEN = "everything of a Mac or an iPhone: Core ML itself, neural engine and GPU, speed, heat"

DEVICES = {"all": "ALL", "cpu": "CPU_ONLY", "gpu": "CPU_AND_GPU", "ane": "CPU_AND_NE"}
"""Device -> compute units; each may fall back to the CPU."""

BUFFERS = 2
"""Input buffers, used in turn: Core ML may still hold that of the last prediction."""


class Session(Backend):
    """An ML program, loaded by Core ML.

    Args:
        bundle: a bundle whose artifact is a `.mlpackage`.
        threads: None only; Core ML chooses.
        device: "all" (default), "cpu", "gpu" or "ane".

    Raises:
        MissingPackageError: this is not macOS, or coremltools is not installed; says how to emulate.
        InputError: the device is unknown.
        BackendError: Core ML refuses the package.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None, device: str | None = None) -> None:
        if absent := missing(NEEDS):
            raise MissingPackageError(
                f"{bundle.name} runs on {', '.join(absent)}, which is not here; its program can be evaluated on any "
                "machine, slowly, with the device 'emulated'"
            )
        if threads is not None:
            raise InputError(f"threads is {threads}; Core ML chooses them itself, leave it out")
        self.device = device or "all"
        if self.device not in DEVICES:
            raise InputError(f"no device is called {device!r} here; Core ML knows {', '.join(DEVICES)}, and emulated")
        super().__init__(bundle.contract, bundle.batch)
        shape = (bundle.batch, *bundle.contract.shape)
        package = mlpackage.load(bundle.artifact_path)
        function = function_for(package, shape)
        self.function = function if len(package.functions) > 1 else None
        self._interface = interface_of(package.functions[function])
        dtype = np.int32 if package.functions[function].inputs["frames"].dtype == "int32" else np.float16
        self.buffers = [np.empty(shape, dtype) for _ in range(BUFFERS)]
        self.ct = need("coremltools", "coreml")
        self.units = getattr(self.ct.ComputeUnit, DEVICES[self.device])
        try:
            self.model = self.ct.models.MLModel(
                str(bundle.artifact_path), compute_units=self.units, function_name=self.function
            )
        except (RuntimeError, ValueError) as error:
            raise BackendError(f"Core ML cannot open {bundle.artifact_path}: {' '.join(str(error).split())}") from error

    def interface(self) -> Interface:
        return self._interface

    def infer(self, clips: Frames) -> Logits:
        buffer = self.buffers.pop(0)
        self.buffers.append(buffer)
        buffer[...] = clips
        try:
            answers = self.model.predict({"frames": buffer})
        except (RuntimeError, ValueError) as error:
            raise BackendError(f"Core ML: the prediction failed: {' '.join(str(error).split())}") from error
        (output,) = (answers[name] for name in ("logits", "tokens") if name in answers)
        return np.array(output, np.float32)

    def describe(self) -> dict[str, Any]:
        return {
            "coremltools": self.ct.__version__,
            "device": self.device,
            "function": self.function or "main",
            "operations": self.plan(),
        }

    def plan(self) -> dict[str, int]:
        """Core ML's compute plan: how many operations it means to run on which unit; nothing before macOS 14.4."""
        try:
            plan = self.ct.models.compute_plan.MLComputePlan.load_from_path(
                path=self.model.get_compiled_model_path(), compute_units=self.units
            )
        except (RuntimeError, ValueError):  # it has no plans to show; predictions do not need one
            return {}
        operations = plan.model_structure.program.functions[self.function or "main"].block.operations
        usages = (plan.get_compute_device_usage_for_mlprogram_operation(operation) for operation in operations)
        return dict(Counter(_unit(usage.preferred_compute_device) for usage in usages if usage is not None))

    def release(self) -> None:
        del self.model


def _unit(device: object) -> str:
    """`MLNeuralEngineComputeDevice` -> `ane`."""
    names = {"MLCPUComputeDevice": "cpu", "MLGPUComputeDevice": "gpu", "MLNeuralEngineComputeDevice": "ane"}
    return names.get(type(device).__name__, "other")
