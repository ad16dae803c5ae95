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

from pathlib import Path

from edgetube import cuda
from edgetube.bundle import Bundle
from edgetube.runtimes.base import Served
from edgetube.runtimes.tensorrt.engine_cache import read_build
from edgetube.runtimes.tensorrt.sdk import FAMILIES, LEAN, uses_lean
from edgetube.runtimes.tensorrt.session import Session
from edgetube.targets import GPU

__all__ = ["EMULATOR", "NEEDS", "RUNS", "UNSEEN", "Session", "needs_of", "network", "served"]

EMULATOR = "onnxruntime"

RUNS = tuple(FAMILIES)
UNSEEN = "the engine: an NVIDIA GPU has kernels and arithmetic of its own, speed, heat"

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


def served(bundle: Bundle) -> Served | None:
    """Triton's backend for TensorRT opens engines, so None for a bundle without one, and for TensorRT for RTX.

    Raises:
        BundleError: the manifest's record of its engine does not follow the format.
    """
    _, record = read_build(bundle)
    if record is None or network(bundle) is None:
        return None
    return Served("tensorrt", {"model.plan": bundle.file(record.file)})


def network(bundle: Bundle) -> Path | None:
    """The ONNX file that engines are built of; None for those of TensorRT for RTX, which other programs do not run.

    Raises:
        BundleError: the manifest's settings do not follow the format.
    """
    settings, _ = read_build(bundle)
    return bundle.file(settings.source) if bundle.target.partition("-")[0] == "trt" else None
