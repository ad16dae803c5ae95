"""One file a backend. The folder is the registry; a backend is imported only when it is asked for.

A backend says in `RUNS` which targets are its own, by the first part of their names: ("onnx",) for onnx-fp32. One that
has no `RUNS` opens no bundle that names it.

A backend whose runtime exists on some machines only says so in `NEEDS` (where its targets differ, by the first part of
their names), and may name another backend that evaluates its artifacts anywhere in `EMULATOR`. Its file must import
without what it needs. With a function `product` it takes part in measuring how fast a machine can multiply.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, Literal

from edgetube.bundle import Bundle
from edgetube.errors import BundleError, InputError
from edgetube.runtimes.base import Backend, Interface, Shape
from edgetube.targets import missing

EMULATED: Literal["emulated"] = "emulated"
"""The device of every artifact that another backend evaluates, wherever it was made to run."""


def names() -> frozenset[str]:
    """Names of the backends: the files of this folder."""
    return frozenset(m.name for m in pkgutil.iter_modules(__path__)) - {"base"}


MAX_THREADS = max(64, 8 * (os.cpu_count() or 1))
"""More threads than this make any call slower, and thousands of them exhaust the machine."""


def check_threads(threads: int | None) -> None:
    """That a number of CPU threads is one that this machine can bear.

    Raises:
        InputError: it is below 1 or above `MAX_THREADS`.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise InputError(
            f"threads is {threads}; expected 1 to {MAX_THREADS} on this machine; left out, the runtime chooses"
        )


def open_bundle(bundle: Bundle, *, threads: int | None = None, device: str | None = None) -> Backend:
    """Open a bundle's artifact with the backend that its manifest names, or on `EMULATED` with that one's emulator.

    Raises:
        BundleError: this version has no such backend, the backend does not run such targets, or the artifact takes or
            gives something else than the manifest says.
        InputError: `device` is `EMULATED` and nothing emulates the backend, or so many threads cannot be.
        MissingPackageError: the vendor's package is not installed.
        BackendError: the vendor's runtime refuses the artifact or the device.
    """
    check_threads(threads)
    if bundle.backend not in names():
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
    families = _stated(bundle.backend, "RUNS") or ()
    if bundle.target.partition("-")[0] not in families:
        raise BundleError(
            f"{bundle.path}: the target is {bundle.target}, but the backend is {bundle.backend}; export or copy the "
            "bundle again"
        )
    module = importlib.import_module(f"edgetube.runtimes.{name}")
    backend: Backend = module.Session(bundle, threads=threads, device=device)
    try:
        _check_interface(bundle, backend.interface())
    except BundleError:
        backend.close()
        raise
    if name != bundle.backend:
        backend.status = EMULATED
    return backend


def _check_interface(bundle: Bundle, stated: Interface | None) -> None:
    """That an artifact takes and gives what the manifest says.

    A part of a model, which is opened to be timed, gives tokens instead of logits; it is in no manifest.

    Raises:
        BundleError: it does not.
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
    """Where a target's artifacts are proven here: None for its own device, `EMULATED` where there is none here."""
    needs, emulator = _stated(backend, "NEEDS"), _stated(backend, "EMULATOR")
    if isinstance(needs, Mapping):
        needs = needs[target.partition("-")[0]]
    return EMULATED if emulator and missing(needs) else None


def products(precision: str, size: int, threads: int | None) -> dict[str, Callable[[], object]]:
    """By backend, a call that multiplies two matrices (size, size) in a precision; without those that cannot."""
    stated = {name: _stated(name, "product") for name in sorted(names())}
    calls = {name: product(precision, size, threads) for name, product in stated.items() if product}
    return {name: call for name, call in calls.items() if call}


def _stated(backend: str, attribute: str) -> Any:
    """What a backend's file says of itself; nothing when it cannot be imported for want of the vendor's package."""
    try:
        module = importlib.import_module(f"edgetube.runtimes.{backend}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("edgetube"):
            raise
        return None
    return getattr(module, attribute, None)
