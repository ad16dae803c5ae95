"""The backend of TensorRT and TensorRT for RTX, which share an API.

A bundle holds the strongly typed ONNX graph, and may hold an engine. An engine runs on one version of the SDK and one
kind of GPU: where the bundle's engine does not run, the device builds one on first load and caches it.

    sdk.py           the two SDKs, and their logs
    build.py         the settings of an engine, and how it is built
    layers.py        a summary of an engine's layers
    engine_cache.py  which engine runs here: the bundle's, a cached one, or a new one
    session.py       runs an engine

This module holds what `edgetube.runtimes` asks of every backend.
"""

from __future__ import annotations

from edgetube import cuda
from edgetube.runtimes.tensorrt.sdk import FAMILIES
from edgetube.runtimes.tensorrt.session import Session
from edgetube.targets import GPU

__all__ = ["EMULATOR", "NEEDS", "RUNS", "Session"]

EMULATOR = "onnxruntime"

RUNS = tuple(FAMILIES)

NEEDS = {name: (family.module, "|".join(cuda.LIBRARIES), GPU) for name, family in FAMILIES.items()}
