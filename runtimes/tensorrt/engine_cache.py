"""Finds the engine for a GPU: the bundle's, the cached one, or one that is built here and cached."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgetube import cache, cuda, strict
from edgetube.bundle import CALIBRATION_CLIPS, Bundle, sha256
from edgetube.errors import BackendError, BundleError, FormatError
from edgetube.runtimes.tensorrt import build as builder
from edgetube.runtimes.tensorrt.build import Settings
from edgetube.runtimes.tensorrt.sdk import FAMILIES, Sdk, system
from edgetube.targets import pip_line

LOGGER = logging.getLogger("edgetube")

JUST_BUILT = "built here:"

VERSION = r"\d+\.\d+[\w.+-]*"


@dataclass(frozen=True)
class EngineRecord:
    """The manifest's record of the bundle's engine.

    Attributes:
        file: in the bundle.
        version: of the SDK that built it.
        version_compatible: newer minor versions run it, too.
        capabilities: compute capabilities that run it; empty where that is not what it was built for.
        gpu: the one GPU that runs it; empty for several.
        platform: the system that it was built on; empty in older bundles.
    """

    file: str
    version: str
    version_compatible: bool
    capabilities: tuple[str, ...]
    gpu: str
    platform: str = ""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineRecord:
        """Raises FormatError when `data`, of a manifest, is something else."""
        needed = ("file", "version", "version_compatible", "capabilities", "gpu")
        found = strict.record(data, "build.engine", needed, ("platform",))
        if not isinstance(found["version_compatible"], bool):
            raise FormatError(f"version_compatible is {found['version_compatible']!r}; expected true or false")
        return cls(
            strict.path(found["file"], "build.engine.file"),
            strict.text(found["version"], "build.engine.version", VERSION),
            found["version_compatible"],
            builder.parse_capabilities(found["capabilities"]),
            strict.text(found["gpu"], "build.engine.gpu"),
            strict.text(found.get("platform", ""), "build.engine.platform"),
        )


def read_build(bundle: Bundle) -> tuple[Settings, EngineRecord | None]:
    """The manifest's build settings, and its record of the bundle's engine or None.

    Raises:
        BundleError: they do not follow the format.
    """
    try:
        settings = Settings.from_json(bundle.build["settings"])
        record = EngineRecord.from_json(bundle.build["engine"]) if "engine" in bundle.build else None
    except (FormatError, KeyError) as error:
        raise BundleError(f"{bundle.path}: build is damaged ({error}); export or copy the bundle again") from error
    return settings, record


def find_engine(
    trt: Sdk, bundle: Bundle, gpu: cuda.Stream, settings: Settings, record: EngineRecord | None
) -> tuple[bytes, str]:
    """The engine for `gpu`: that of the bundle if it runs, else the cached one, else a new one; and its origin."""
    incompatibility = engine_incompatibility(record, trt, gpu) if record else "the bundle has no engine"
    if record and not incompatibility:
        return bundle.file(record.file).read_bytes(), "the bundle's"
    return build_here(trt, bundle, gpu, settings, incompatibility)


def build_here(
    trt: Sdk, bundle: Bundle, gpu: cuda.Stream, settings: Settings, incompatibility: str, refused: str = ""
) -> tuple[bytes, str]:
    """Build the engine on this machine, or take it from the cache; returns it with its origin.

    Args:
        incompatibility: why the bundle's engine, or the cached one, is not used.
        refused: sha256 of an engine that does not open; if that is the cached one, it is built again.

    Raises:
        BackendError: the SDK only runs engines, or cannot build this one.
    """
    if not trt.family.builds:
        raise BackendError(
            f"{bundle.path}: {incompatibility}, and {trt.family.title} {trt.version} builds none; export the bundle "
            f"with --set version-compatible=yes where the full TensorRT and such a GPU are (or another GPU from Ampere "
            f"on: --set hardware-compatible=ampere), or install it here: {pip_line(FAMILIES['trt'].extra)}"
        )
    settings = replace(settings, capabilities=())
    source = bundle.file(settings.source)
    key = engine_key(trt, bundle, gpu, settings)

    def make(path: Path, reason: str) -> None:
        began = time.monotonic()
        LOGGER.warning("building the engine of %s for %s (%s; %s)", bundle.name, gpu.name, incompatibility, reason)
        if settings.legacy == "int8":
            bundle.file(CALIBRATION_CLIPS)
        legacy = builder.calibrator(trt, bundle.path, settings, gpu, bundle.batch)
        path.write_bytes(builder.build(trt, source, settings, _Report(), legacy, builder.timing_cache()))
        LOGGER.warning("built in %.0f s; kept in %s", time.monotonic() - began, path.parent)

    entry = cache.make_once(bundle.name, ".engine", key, make, refused)
    origin = (
        f"{JUST_BUILT} {incompatibility}; {entry.reason}" if entry.reason else f"built here earlier: {incompatibility}"
    )
    return entry.path.read_bytes(), origin


def kernels_path(trt: Sdk, bundle: Bundle, gpu: cuda.Stream, plan: bytes) -> Path:
    """The cache file of the kernels that are compiled for an engine; its name has the digest of the key."""
    key = json.dumps([_digest(plan), trt.version, gpu.name, gpu.capability, gpu.driver, system()])
    return cache.folder() / f"{bundle.name}.{_digest(key.encode())}.jit"


def engine_key(trt: Sdk, bundle: Bundle, gpu: cuda.Stream, settings: Settings) -> dict[str, str]:
    """The cache key of an engine: all that it depends on."""
    return {
        "graph": graph_hash(bundle, settings.source),
        trt.family.title: trt.version,
        "GPU": f"{gpu.name} ({gpu.capability})",
        "driver": gpu.driver,
        "settings": ", ".join(f"{k}={v}" for k, v in _readable(settings).items() if v) or "default",
    }


def _readable(settings: Settings) -> dict[str, Any]:
    """The settings, with a digest in place of the list of layers."""
    layers = repr(settings.layers).encode() if settings.layers else b""
    return settings.to_json() | {"layers": layers and _digest(layers)}


def graph_hash(bundle: Bundle, source: str) -> str:
    """Hash of the graph, of weight files beside it, and of the calibration clips."""
    files = sorted([*bundle.path.glob(f"{source}*"), *bundle.path.glob(CALIBRATION_CLIPS)])
    return " ".join(bundle.files[f.name].sha256 if f.name in bundle.files else sha256(f) for f in files)


def engine_incompatibility(record: EngineRecord, trt: Sdk, gpu: cuda.Stream) -> str:
    """Why the bundle's engine cannot run here; empty if it can."""
    if not (record.version_compatible or trt.family.builds):
        return "the bundle's engine is not version-compatible"
    if record.version != trt.version and not (record.version_compatible and _newer(trt.version, record.version)):
        title = trt.family.title if trt.family.builds else FAMILIES["trt"].title
        return f"the bundle's engine is for {title} {record.version}, here is {trt.version}"
    if record.capabilities and gpu.capability.replace(".", "") not in record.capabilities:
        return (
            f"the bundle's engine is for compute capability {', '.join(record.capabilities)}, here is {gpu.capability}"
        )
    if record.gpu and record.gpu != gpu.name:
        return f"the bundle's engine is for {record.gpu}, here is {gpu.name}"
    if record.platform and record.platform != system():
        return f"the bundle's engine was built on {record.platform}, here is {system()}"
    return ""


def _newer(here: str, built: str) -> bool:
    """Whether version `here` runs version-compatible engines of `built`: the same major version, and not older."""
    mine, other = ([int(part) for part in re.findall(r"\d+", version)[:4]] for version in (here, built))
    return mine[0] == other[0] and mine >= other


class _Report:
    """Logs the SDK's progress every few seconds: a build has thousands of steps and can take minutes."""

    EVERY = 2.0

    def __init__(self) -> None:
        self.began = self.said = time.monotonic()

    def __call__(self, phase: str, step: int, steps: int) -> None:
        now = time.monotonic()
        if now - self.said >= self.EVERY:
            self.said = now
            LOGGER.info("%.0f s: %s, %d of %d", now - self.began, phase, step, steps)


def _digest(plan: bytes) -> str:
    return hashlib.sha256(plan).hexdigest()[:16]
