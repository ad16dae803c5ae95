"""INT8 on filmed videos: the answers of PyTorch, on the processor that runs this test."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edgetube import bundle as bundles
from edgetube import export, runtimes

INT8 = [
    t.name for t in export.targets().values() if t.precision.quantises_activations and not runtimes.simulated(t.backend)
]
"""Those that no vendor's simulator runs here, which takes a second or more for each of the windows."""

LOOSE = {"executorch-int8": 0.97}
"""Bars below `films.BAR`. The outputs of linears are 8 bits, too: measured were 0.98 and 0.976."""


def test_answers_are_compared_row_by_row(films: SimpleNamespace) -> None:
    expected = np.array([[3.0, 0.0], [0.0, 4.0]], np.float32)
    given = np.array([[3.0, 0.0], [4.0, 3.0]], np.float32)
    found = films.compare(expected, given)
    assert found == {
        "windows": 2,
        "agreement": 0.5,
        "worst_cosine": pytest.approx(0.6),
        "max_abs_error": 4.0,
        "max_abs_logit": 4.0,
    }


@pytest.mark.machines
@pytest.mark.parametrize("name", INT8)
def test_int8_answers_filmed_videos_like_pytorch(
    name: str, films: SimpleNamespace, windows: Path, exported: Callable[..., Path]
) -> None:
    target = export.target(name)
    if absent := target.missing(target.build_needs):
        pytest.skip(f"{name} needs {', '.join(absent)}")
    found = films.judge(exported(name), windows)
    assert found["windows"] == films.COUNT
    assert min(found["agreement"], found["worst_cosine"]) >= LOOSE.get(name, films.BAR), found


SATURATION = 0.083
"""Relative error of the logits that saturating sums gave `openvino-int8` on a processor without VNNI."""


@pytest.mark.machines
@pytest.mark.parametrize("name", INT8)
def test_doctor_asks_for_more_than_saturation_leaves(name: str, exported: Callable[..., Path]) -> None:
    target = export.target(name)
    if absent := target.missing(target.build_needs):
        pytest.skip(f"{name} needs {', '.join(absent)}")
    least = bundles.load(exported(name)).parity["golden"]["min_sqnr"]
    assert least > -20 * math.log10(SATURATION)
