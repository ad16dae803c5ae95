"""The line that stands beside every number."""

import numpy as np
import torch

from edgetube.bench import machine


def test_versions_are_those_that_are_loaded():
    found = machine.versions()
    assert found["torch"] == torch.__version__
    assert found["numpy"] == np.__version__
    assert found["edgetube"] == "0.1.0"
    assert "pytest" not in found


def test_the_description_is_one_line_with_processor_and_versions():
    text = machine.describe()
    assert "\n" not in text
    assert machine.processor() in text
    assert f"numpy {np.__version__}" in text
