"""Targets, and what must be installed to build and to run them."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Literal

from edgetube.errors import InputError, MissingPackageError
from edgetube.precision import Precision

Arithmetic = Literal["float32", "float16", "bfloat16"]
"""Types of float arithmetic."""

Status = Literal["executed", "emulated", "built", "deferred"]
"""How an artifact was verified: run by its own runtime; evaluated by another backend; built and checked but not run; to
be completed on the device."""


PLATFORMS = {"Linux": "linux", "macOS": "darwin", "Windows": "win32"}
"""Operating systems that a target may need -> `sys.platform`."""

GPU = "an NVIDIA GPU"
"""The need of targets whose runtime computes on a GPU."""


@dataclass(frozen=True)
class Setting:
    """An option of a target's build: `--set NAME=VALUE`.

    Attributes:
        name, default: strings.
        allowed: the valid values; empty if any string is.
        summary: one line for people.
    """

    name: str
    default: str
    summary: str
    allowed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """One line of `edgetube targets`.

    Attributes:
        name: `<runtime>-<precision>`.
        precision: what the artifact computes in.
        backend: the file in `runtimes/` that runs it, and the file in `export/` that makes it.
        summary: one line for people.
        build_needs, run_needs: modules that must be importable ("a|b" for either), names of `PLATFORMS`, or `GPU`.
        extra: the pip extra that brings them.
        lowering: the tube lowering where none can be timed.
        tolerance: largest error of a logit, relative to the largest |logit| of the proof (at least 1), that the
            proof accepts; None where the accuracy budget of the calibration decides instead.
        arithmetic: types that devices may compute floats in; all of them are correct.
        settings: options of the build.
        all_tokens: why its artifacts cannot have fewer tokens than the model; empty where they can.
        chosen: settings that differ from their default; see `choose`.
    """

    name: str
    precision: Precision
    backend: str
    summary: str
    build_needs: tuple[str, ...]
    run_needs: tuple[str, ...]
    extra: str = "export"
    lowering: str = "gather"
    tolerance: float | None = None
    arithmetic: tuple[Arithmetic, ...] = ("float32",)
    settings: tuple[Setting, ...] = ()
    all_tokens: str = ""
    chosen: Mapping[str, str] = field(default_factory=dict)

    def missing(self, needs: tuple[str, ...]) -> tuple[str, ...]:
        """The `needs` that are missing here."""
        return missing(needs)

    def setting(self, name: str) -> str:
        """The value of a setting."""
        default = next(setting.default for setting in self.settings if setting.name == name)
        return self.chosen.get(name, default)

    def choose(self, chosen: Mapping[str, str]) -> Target:
        """This target with other settings.

        Raises:
            InputError: there is no such setting, or the value is not allowed.
        """
        known = {setting.name: setting for setting in self.settings}
        for name, value in chosen.items():
            if name not in known:
                raise InputError(f"{self.name} has no setting {name!r}; it has {', '.join(known) or 'none'}")
            if (allowed := known[name].allowed) and value not in allowed:
                raise InputError(f"{self.name}: {name} is {value!r}; expected one of {', '.join(allowed)}")
        return replace(self, chosen={**self.chosen, **chosen})

    @property
    def remedy(self) -> str:
        """The pip command that installs what is missing; empty where pip cannot."""
        for needs in (self.build_needs, self.run_needs):
            absent = self.missing(needs)
            if absent and not any(need in PLATFORMS or need == GPU for need in absent):
                return pip_line(self.extra)
        return ""


def choose(chosen: Sequence[Target], settings: Mapping[str, str]) -> list[Target]:
    """Targets with other settings; each takes the settings that it has.

    Raises:
        InputError: none of them has a setting, or a value is not allowed.
    """
    known = dict.fromkeys(setting.name for target in chosen for setting in target.settings)
    if unknown := [name for name in settings if name not in known]:
        first, *others = (target.name for target in chosen)
        who = f"{first} has no setting" if not others else f"none of {', '.join([first, *others])} has a setting"
        raise InputError(f"{who} {unknown[0]!r}; {'they have' if others else 'it has'} {', '.join(known) or 'none'}")
    return [
        target.choose({s.name: settings[s.name] for s in target.settings if s.name in settings}) for target in chosen
    ]


def missing(needs: tuple[str, ...]) -> tuple[str, ...]:
    """The `needs`, modules and conditions, that are missing here."""
    return tuple(need.replace("|", " or ") for need in needs if not any(map(_present, need.split("|"))))


def _present(need: str) -> bool:
    if need in PLATFORMS:
        return sys.platform == PLATFORMS[need]
    if need == GPU:
        return _gpus() > 0
    return installed(need)


def installed(module: str) -> bool:
    """Whether a module can be imported; a folder that holds only type stubs cannot."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # its parent package is not there
        return False
    return spec is not None and spec.origin is not None


def load_libcuda() -> ctypes.CDLL:
    """The driver's CUDA library.

    Raises:
        OSError: no NVIDIA driver is installed.
    """
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


@functools.cache
def _gpus() -> int:
    """How many GPUs the driver sees; packages may be installed without a GPU."""
    try:
        driver = load_libcuda()
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return 0 if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) else count.value


def pip_line(extra: str) -> str:
    """How to install the extra of that name."""
    return f"pip install 'edgetube[{extra}]'"


def need(module: str, extra: str) -> ModuleType:
    """Import an optional package, or a module of edgetube that needs one.

    Raises:
        MissingPackageError: it is not installed; the message has the pip command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("edgetube"):
            raise
        raise MissingPackageError(f"{error.name} is not installed; install it with: {pip_line(extra)}") from error
