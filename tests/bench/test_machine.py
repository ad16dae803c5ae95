"""The line that stands beside every number."""

from importlib import metadata

import numpy as np
import pytest
import torch
from packaging.version import Version

from edgetube.bench import machine


@pytest.mark.parametrize("build", ["", "+cpu", "+cu130"])
def test_versions_are_those_that_are_loaded(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build's local part is in `torch.__version__`, and in the metadata of some indexes' wheels only."""
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: Version(real(name)).public + build * (name == "torch"))
    found = machine.versions()
    assert Version(found["torch"]).public == Version(torch.__version__).public
    assert found["numpy"] == np.__version__
    assert found["edgetube"] == "0.1.0"
    assert "pytest" not in found


def test_the_description_is_one_line_with_processor_and_versions() -> None:
    text = machine.describe()
    assert "\n" not in text
    assert machine.processor() in text
    assert f"numpy {np.__version__}" in text
