"""Files of `torch.save`: zip archives, and the form before PyTorch 1.6. Nothing in them is executed.

They are read with `weights_only=True` alone. Beside PyTorch's own classes, those of `HARMLESS` are made, which training
scripts leave beside the weights; anything else is refused by name.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import re
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgetube import strict
from edgetube.errors import CheckpointError, printable

SHOWN = 3
"""How many names an error lists."""


def _numpy(name: str) -> list[tuple[Any, str]]:
    """A function of numpy under the names of numpy 1 and 2."""
    found = getattr(importlib.import_module("numpy._core.multiarray"), name)
    return [(found, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")]


HARMLESS: tuple[tuple[Any, str], ...] = (
    (argparse.Namespace, "argparse.Namespace"),
    *_numpy("scalar"),
    *_numpy("_reconstruct"),
    (np.dtype, "numpy.dtype"),
    (np.ndarray, "numpy.ndarray"),
    *(
        (type(np.dtype(k)), f"numpy.dtypes.{type(np.dtype(k)).__name__}")
        for k in ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?", "U", "S"]
    ),
    *(
        (kind, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name, kind in (
            ("PosixPath", pathlib.PurePosixPath),
            ("PurePosixPath", pathlib.PurePosixPath),
            ("WindowsPath", pathlib.PureWindowsPath),
            ("PureWindowsPath", pathlib.PureWindowsPath),
        )
    ),
)
"""(class or function, its name in files): they hold options and numbers, and run no code when they are made."""

_REFUSED = re.compile(r"(?:GLOBAL|for unrecognized function) ([\w.]+)")
"""A name in PyTorch's error about an object that it does not make."""

_ADVICE = re.compile(
    r"^Weights only load failed.*?trusted source\.|Check the documentation of torch\.load.*$", re.DOTALL
)
"""What PyTorch advises in the same error: to execute what is in the file."""


def load(path: Path) -> Any:
    """What `torch.save` wrote.

    Raises:
        CheckpointError: the file is damaged, a TorchScript archive, or holds Python objects.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if zipped:
        _check_archive(path)
    try:
        if zipped:
            _check_names(path, set(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
        with ExitStack() as stack:
            stack.enter_context(torch.serialization.safe_globals(list(HARMLESS)))
            if path.suffix != ".safetensors":
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
            file = stack.enter_context(path.open("rb"))  # torch.load goes by the name where it is given one
            return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # unpicklers and zip readers raise anything
        if found := _REFUSED.search(str(error)):
            _check_names(path, {found[1]})
        said = strict.shown(_ADVICE.sub("", str(error)).strip() or type(error).__name__, 300)
        raise CheckpointError(f"{path} cannot be read by torch.load: {said}") from error


def _check_names(path: Path, named: set[str]) -> None:
    """Refuse classes and functions that are not harmless."""
    if bad := sorted(named - {name for _, name in HARMLESS}):
        raise CheckpointError(
            f"{path} holds Python objects, {', '.join(map(printable, bad[:SHOWN]))}, which are not loaded because they "
            "can run any code; save the weights alone: torch.save(model.state_dict(), path)"
        )


def _check_archive(path: Path) -> None:
    """Refuse zip archives that are cut off, that TorchScript wrote, or that are something else."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise CheckpointError(
            f"{path} is cut off or damaged: it begins like a file of torch.save, and its end is missing; download or "
            "copy it again"
        ) from error
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise CheckpointError(
            f"{path} is a TorchScript archive, which holds a program; save its weights alone: "
            "torch.save(torch.jit.load(path, map_location='cpu').state_dict(), 'weights.pt')"
        )
    if "data.pkl" not in names:
        raise CheckpointError(f"{path} is a zip archive, and not one of torch.save; unpack it, and give what is in it")
