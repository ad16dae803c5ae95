"""Fixtures of the server's tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgetube.runtime import Runtime
from tests.edgetube.serve.doubles import film, until


@pytest.fixture(autouse=True)
def nothing_runs_on() -> Iterator[None]:
    """Every thread of a test ends with it."""
    before = set(threading.enumerate())
    yield

    def left() -> set[str]:
        names = {t.name for t in threading.enumerate() if t not in before}
        return {name for name in names if "edgetube" in name or "AnyIO" in name}

    until(lambda: not {name for name in left() if "AnyIO" in name})  # which are told to end, and not waited for
    assert left() == set()


@pytest.fixture(scope="module")
def rt(tiny_bundle: Path) -> Iterator[Runtime]:
    with Runtime(tiny_bundle, threads=1) as runtime:
        yield runtime


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("films") / "a film.mp4")
