"""A machine of doubles, and a bundle whose engine is built there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgetube import export
from edgetube.bundle import Bundle
from edgetube.export import pipeline
from tests.runtimes import doubles


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[doubles.Machine]:
    """A machine of doubles: a GPU, both SDKs, and a builder that writes the graph's bytes."""
    with doubles.machine(tmp_path / "cache") as here:
        yield here


@pytest.fixture(scope="session")
def deferred(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A trt-fp16 bundle without an engine, two clips a call; shared by all tests, so nobody may write in it."""
    target = export.target("trt-fp16")
    if not target.missing(target.run_needs):
        pytest.skip("this machine builds the engine when it exports")
    options = pipeline.Options(batch=2, lowering="gather")
    return pipeline.export_model("trt-fp16", tiny_checkpoint, tmp_path_factory.mktemp("trt"), options)
