"""The backend of TensorRT and TensorRT for RTX, which share an API.

A bundle holds the strongly typed ONNX graph, and may hold an engine. An engine runs on one version of the SDK and one
kind of GPU: where the bundle's engine does not run, the device builds one on first load and caches it.

    sdk.py           the SDKs, and their logs
    build.py         the settings of an engine, and how it is built
    layers.py        a summary of an engine's layers
    engine_cache.py  which engine runs here: the bundle's, a cached one, or a new one
    session.py       runs an engine

This module holds what `edgetube.runtimes` asks of every backend.
"""

from __future__ import annotations

from edgetube import cuda
from edgetube.bundle import Bundle
from edgetube.runtimes.tensorrt.engine_cache import read_build
from edgetube.runtimes.tensorrt.sdk import FAMILIES, LEAN, uses_lean
from edgetube.runtimes.tensorrt.session import Session
from edgetube.targets import GPU

__all__ = ["EMULATOR", "NEEDS", "RUNS", "Session", "needs_of"]

EMULATOR = "onnxruntime"

RUNS = tuple(FAMILIES)

NEEDS = {name: (family.module, "|".join(cuda.LIBRARIES), GPU) for name, family in FAMILIES.items()}


def needs_of(bundle: Bundle) -> tuple[str, ...]:
    """What must be here to run one bundle: for a version-compatible engine the lean runtime is enough.

    Raises:
        BundleError: the manifest's record of its engine does not follow the format.
    """
    family = bundle.target.partition("-")[0]
    _, record = read_build(bundle)
    if record is not None and uses_lean(family, record.version_compatible):
        return (LEAN.module, *NEEDS[family][1:])
    return NEEDS[family]
