"""The backends, one module or package each. The folder is the registry; a backend is imported only when it is needed.

`RUNS` lists the targets of a backend by the first part of their names: ("onnx",) for onnx-fp32. A backend without
`RUNS` opens no bundles.

A backend whose runtime is not available on every machine lists its needs in `NEEDS` (by the first part of the target's
name if they differ), and may name in `EMULATOR` another backend that evaluates its artifacts on any machine. Its module
must import without those needs. A function `needs_of` may state other needs of a single bundle. A backend whose vendor
simulates the processor on this machine sets `SIMULATED`, and its times are not measured. A backend that refuses a
number of threads sets `OWN_THREADS`. `UNSEEN` says what a run on an ordinary CPU does not show of its devices. A
function `product` lets it take part in measuring the machine's peak rate. A function `served` says how Triton runs a
bundle's artifact (`base.Served`), and `network` which ONNX file TensorRT builds an engine of.

Third parties add backends by entry points of the group `edgetube.targets`: `NAME = PACKAGE`, where `PACKAGE.runtime` is
such a module and `PACKAGE.exporter` one as in `edgetube.export`. A built-in backend of the same name counts.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from edgetube.bundle import Bundle
from edgetube.errors import BundleError, InputError, MissingPackageError
from edgetube.precision import Precision
from edgetube.runtimes.base import Backend, Interface, Served, Shape
from edgetube.targets import missing, pip_line

EMULATED: Literal["emulated"] = "emulated"
"""The device name of artifacts that another backend evaluates."""


GROUP = "edgetube.targets"
"""Entry points of third parties' backends."""


@functools.cache
def built_in() -> frozenset[str]:
    """Names of the modules and packages of this folder."""
    return frozenset(m.name for m in pkgutil.iter_modules(__path__)) - {"base"}


@functools.cache
def foreign() -> Mapping[str, str]:
    """Third parties' backends: name -> package."""
    from importlib.metadata import entry_points  # its import takes longer than opening a bundle

    return {point.name: point.value for point in entry_points(group=GROUP) if point.name not in built_in()}


def names() -> frozenset[str]:
    """Names of all backends."""
    return built_in() | foreign().keys()


def runtime(backend: str) -> ModuleType:
    """The module that opens and runs a backend's artifacts. (Entry points are searched for foreign ones alone.)"""
    place = f"edgetube.runtimes.{backend}" if backend in built_in() else f"{foreign()[backend]}.runtime"
    return importlib.import_module(place)


MAX_THREADS = max(64, 8 * (os.cpu_count() or 1))
"""Largest number of threads: more make any call slower, and thousands exhaust the machine."""


def check_threads(threads: int | None) -> None:
    """Check a number of CPU threads.

    Raises:
        InputError: it is below 1 or above `MAX_THREADS`.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise InputError(
            f"threads is {threads}; expected 1 to {MAX_THREADS} on this machine; left out, the runtime chooses"
        )


def open_bundle(bundle: Bundle, *, threads: int | None = None, device: str | None = None) -> Backend:
    """Open a bundle's artifact with the backend in its manifest, or, on device `EMULATED`, with the backend's emulator.

    Raises:
        BundleError: there is no such backend, it does not run the target, or the shapes of the artifact's input or
            output differ from the manifest.
        InputError: `device` is `EMULATED` and the backend has no emulator, or `threads` is out of range.
        MissingPackageError: the vendor's package is not installed.
        BackendError: the vendor's runtime refuses the artifact or the device.
    """
    check_threads(threads)
    if bundle.backend not in built_in() and bundle.backend not in foreign():
        raise BundleError(
            f"{bundle.path} needs the backend {bundle.backend!r}; this edgetube has "
            f"{', '.join(sorted(names()))}: upgrade edgetube"
        )
    name = bundle.backend
    if device == EMULATED:
        emulator = _stated(name, "EMULATOR")
        if emulator is None:
            raise InputError(f"nothing emulates {name}; leave out the device {EMULATED!r}")
        name, device = emulator, None
    try:
        families = getattr(runtime(bundle.backend), "RUNS", ())
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("edgetube"):
            raise
        raise MissingPackageError(
            f"{bundle.path} needs the package {error.name}, which is not installed; install it with: "
            f"{pip_line(bundle.backend)}"
        ) from error
    if bundle.target.partition("-")[0] not in families:
        raise BundleError(
            f"{bundle.path}: the target is {bundle.target}, but the backend is {bundle.backend}; export or copy the "
            "bundle again"
        )
    backend: Backend = runtime(name).Session(bundle, threads=threads, device=device)
    try:
        _check_interface(bundle, backend.interface())
    except BundleError:
        backend.close()
        raise
    if name != bundle.backend:
        backend.status = EMULATED
    return backend


def _check_interface(bundle: Bundle, stated: Interface | None) -> None:
    """Check the shapes of an artifact's input and output against the manifest.

    The tokenizer alone, which exports open to time it, outputs tokens instead of logits and has no manifest.

    Raises:
        BundleError: they differ.
    """
    if stated is None:
        return
    clips, logits = (bundle.batch, *bundle.contract.shape), (bundle.batch, len(bundle.labels))
    is_part = not bundle.files and len(stated.outputs) == 1 and len(stated.outputs[0]) != len(logits)
    if stated.inputs != (clips,) or (stated.outputs != (logits,) and not is_part):
        raise BundleError(
            f"{bundle.path}: {bundle.artifact} takes {_shapes(stated.inputs)} and gives {_shapes(stated.outputs)}, but "
            f"the manifest says {clips} and {logits}; export or copy the bundle again"
        )


def _shapes(shapes: tuple[Shape, ...]) -> str:
    return ", ".join(map(str, shapes)) or "nothing"


def proof_device(target: str, backend: str) -> str | None:
    """The device of a target's proof on this machine: None for its own device, `EMULATED` where that is missing."""
    needs = _stated(backend, "NEEDS")
    if isinstance(needs, Mapping):
        needs = needs[target.partition("-")[0]]
    return EMULATED if _stated(backend, "EMULATOR") and missing(needs) else None


def device_of(bundle: Bundle) -> str | None:
    """The device that runs a finished bundle on this machine: None for its own, `EMULATED` where that is missing.

    Raises:
        BundleError: the manifest is damaged.
    """
    needs_of = _stated(bundle.backend, "needs_of")
    if needs_of is None or _stated(bundle.backend, "EMULATOR") is None:
        return proof_device(bundle.target, bundle.backend)
    return EMULATED if missing(needs_of(bundle)) else None


def served(bundle: Bundle) -> Served | None:
    """How a backend of the Triton Inference Server runs a bundle's artifact; None if there is none for it.

    Raises:
        BundleError: the manifest is damaged.
    """
    stated: Callable[[Bundle], Served | None] | None = _stated(bundle.backend, "served")
    return stated and stated(bundle)


def network(bundle: Bundle) -> Path | None:
    """The ONNX file of a bundle that TensorRT builds an engine of; None for other bundles."""
    stated: Callable[[Bundle], Path | None] | None = _stated(bundle.backend, "network")
    return stated and stated(bundle)


def simulated(backend: str) -> bool:
    """Whether the vendor's runtime simulates the processor on this machine: slowly, and times say nothing."""
    return bool(_stated(backend, "SIMULATED"))


def unseen(backend: str) -> str:
    """What running a backend's artifacts on an ordinary CPU does not show of the devices they are for."""
    return str(_stated(backend, "UNSEEN") or "")


def takes_threads(backend: str, device: str | None = None) -> bool:
    """Whether a backend can be told a number of threads; others choose it themselves and refuse one."""
    return not _stated(_stated(backend, "EMULATOR") if device == EMULATED else backend, "OWN_THREADS")


def products(precision: Precision, size: int, threads: int | None) -> dict[str, Callable[[], object]]:
    """Backend -> a call that multiplies two matrices (size, size) in a precision; backends that cannot are left out."""
    stated = {name: _stated(name, "product") for name in sorted(names())}
    calls = {name: product(precision, size, threads) for name, product in stated.items() if product}
    return {name: call for name, call in calls.items() if call}


def _stated(backend: str, attribute: str) -> Any:
    """An attribute of a backend's module; None if it is not set, or if the vendor's package is missing."""
    try:
        module = runtime(backend)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("edgetube"):
            raise
        return None
    return getattr(module, attribute, None)
