"""Bundles and filmed windows that other processors, and other Pythons, are asked about; made once a session."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgetube.export import pipeline

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="session")
def films() -> SimpleNamespace:
    """`windows.py`: the films, their windows, and how answers are compared."""
    return SimpleNamespace(**runpy.run_path(str(HERE / "windows.py")))


@pytest.fixture(scope="session")
def windows(films: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 windows of filmed videos and the logits of PyTorch for them, as `windows.py make` writes them."""
    try:
        made: Path = films.make(tmp_path_factory.mktemp("windows") / "windows.npz")
    except films.Absent as error:
        pytest.skip(str(error))
    return made


@pytest.fixture(scope="session")
def emulation() -> SimpleNamespace:
    """`emulation.py`: how Python is started on a processor that this machine has not."""
    return SimpleNamespace(**runpy.run_path(str(HERE / "emulation.py")))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build leaves files in its source tree."""
    source, dist = tmp_path_factory.mktemp("wheel") / "source", tmp_path_factory.mktemp("dist")
    unwanted = (".git", ".venv", "build", "dist", "out", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*unwanted))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (made,) = dist.glob("*.whl")
    return made


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The bundle of a target, "onnx-int8" or "onnx-int8 cpu=x86", and of a checkpoint, the built-in one by default.

    Each is exported once a session, and those of one scheme share a calibration.
    """
    out, kept = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("bundles")

    @cache
    def export(name: str, checkpoint: str | Path = "demo") -> Path:
        target, _, setting = name.partition(" ")
        options = pipeline.Options(settings=dict([setting.split("=")]) if setting else {})
        bundle = pipeline.export_model(target, checkpoint, out, options).path
        return bundle.rename(kept / f"{bundle.name}{setting.replace('=', '-')}")

    return export
