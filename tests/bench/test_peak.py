"""The products that are timed are products, and the rate is the fastest call's."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from edgetube import runtimes
from edgetube.bench import peak
from edgetube.precision import Precision

SIZE = 64


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.W8A8])
def test_every_runtime_multiplies(precision: Precision) -> None:
    """Of two matrices of ones, every element is their size."""
    found = runtimes.products(precision, SIZE, 1)
    assert found or precision is Precision.FP16
    for call in found.values():
        answer: Any = call()
        (value,) = answer.values() if hasattr(answer, "values") else answer
        np.testing.assert_allclose(np.asarray(value), SIZE, rtol=0.01)
        assert value.shape == (SIZE, SIZE)


def test_nobody_multiplies_weights_of_four_bits() -> None:
    assert runtimes.products(Precision.W4, SIZE, 1) == {}


def test_the_rate_is_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "SECONDS", 0.0)
    assert peak.rate(lambda: time.sleep(0.01)) == pytest.approx(peak.SIZE**3 / 0.01 / 1e9, rel=0.2)


def test_each_precision_has_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "SECONDS", 0.0)
    monkeypatch.setattr(peak, "SIZE", SIZE)
    lines = peak.open_products(lambda stage: None, 1).about["peak"]
    assert {"fp32", "int8"} <= {line["precision"] for line in lines}
    assert all(line["gmacs_per_s"] > 0 and line["threads"] == 1 and line["by"] for line in lines)
