"""Bundles and filmed windows that other processors, and other Pythons, are asked about; made once a session."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

HERE = Path(__file__).parent


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
