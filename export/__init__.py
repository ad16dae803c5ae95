"""Export of checkpoints to bundles. Importing this package is cheap: only its modules import torch.

A backend is two modules or packages of one name: that in `export/` builds artifacts and that in `runtimes/` runs them.
Third parties add backends by entry points, see `edgetube.runtimes`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

from edgetube import runtimes
from edgetube.errors import InputError
from edgetube.targets import Target


def exporter(backend: str) -> ModuleType:
    """The module that builds artifacts for a backend: it has `TARGETS` and `build`."""
    package = None if backend in runtimes.built_in() else runtimes.foreign().get(backend)
    return importlib.import_module(f"{package}.exporter" if package else f"edgetube.export.{backend}")


def evaluator() -> Callable[[Any], Any]:
    """Opens any ONNX graph for running: the function `evaluate` of the exporter that has one."""
    found = (exporter(name) for name in sorted(_exporters()))
    opened: Callable[[Any], Any] = next(module.evaluate for module in found if hasattr(module, "evaluate"))
    return opened


def _exporters() -> set[str]:
    return {m.name for m in pkgutil.iter_modules(__path__)} & runtimes.built_in() | runtimes.foreign().keys()


def targets() -> dict[str, Target]:
    """Every target by name, sorted."""
    found = [target for backend in _exporters() for target in exporter(backend).TARGETS]
    return {target.name: target for target in sorted(found, key=lambda t: t.name)}


def target(name: str) -> Target:
    """The target of that name.

    Raises:
        InputError: there is none; the message lists those there are.
    """
    known = targets()
    if name not in known:
        raise InputError(f"no target is called {name!r}; there are {', '.join(known)}")
    return known[name]
