"""What `bench/studies/int8.py` makes of timings, and the graphs that it times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetube.bench.studies import int8
from edgetube.bench.studies.peers import quantisers


def timings(**p50: Any) -> dict[str, dict[str, Any]]:
    """Timings of all candidates that the goals name, 100 ms where nothing is said."""
    names = {name for goal in int8.GOALS for name in goal[:2]} - {int8.BEST_ORT}
    names |= {"ORT one", "ORT two"}
    rest = {"p10_ms": 90.0, "p90_ms": 110.0, "noise": 0.01, "runs": 9}
    return {name: {"name": name, "p50_ms": p50.get(name, 100.0), **rest} for name in names}


BOUNDS = {"onnx-int8": int8.Bound(10.0, 6.0), "openvino-int8": int8.Bound(10.0, 2.0)}


def test_ratios_are_of_medians_and_the_best_recipe_counts() -> None:
    found = int8.goals(timings(**{"onnx-int8": 50.0, "ORT one": 80.0, "openvino-int8": 20.0}), BOUNDS)
    ratios = {(goal["name"], goal["other"]): goal["ratio"] for goal in found}
    assert ratios["onnx-int8", "ORT one"] == pytest.approx(1.6)
    assert ("onnx-int8", "ORT two") not in ratios
    assert ratios["onnx-int8", int8.EAGER] == pytest.approx(2.0)
    assert ratios["openvino-int8", int8.NNCF] == pytest.approx(5.0)
    assert {goal["possible"] for goal in found if goal["name"] == "onnx-int8"} == {80 / 16, 100 / 16}
    assert {goal["asked"] for goal in found} == {asked for *_, asked in int8.GOALS}


def test_bounds_by_hand() -> None:
    """Each part at the rate of its own precision."""
    precisions = {"fp32": 100.0, "fp16": 200.0, "int8": 400.0, "w8": 9999.0}
    rates = [{"precision": name, "gmacs_per_s": rate, "by": "x"} for name, rate in precisions.items()]
    bound = int8.Bound.of("onnx-int8", rates, linear=40.0, rest=5.0)
    assert (bound.integers, bound.attention, bound.ms) == pytest.approx((100.0, 50.0, 150.0))
    assert int8.Bound.of("openvino-int8", rates, 40.0, 5.0).attention == pytest.approx(25.0)
    old = [rate for rate in rates if rate["precision"] != "fp16"]  # a CPU without half precision
    assert int8.Bound.of("openvino-int8", old, 40.0, 5.0).attention == pytest.approx(50.0)
    found = int8.reached(bound, 200.0, 40.0)
    assert (found["share"], found["int8_share"], found["gmacs_per_s"]) == pytest.approx((0.75, 0.5, 200.0))


def test_every_row_has_its_ratio_and_its_size() -> None:
    found = int8.rows(timings(**{"onnx-int8": 25.0}), {"onnx-int8": 7})
    by_name = {row["name"]: row for row in found}
    assert (by_name["onnx-int8"]["against_eager"], by_name["onnx-int8"]["bytes"]) == (pytest.approx(4.0), 7)
    assert by_name[int8.EAGER]["bytes"] is None


def test_eager_opens() -> None:
    stages: list[str] = []
    assert np.shape(np.asarray(int8.eager(stages.append, "demo").call())) == (1, 9)
    assert stages == ["import"]


def test_a_table_is_complete() -> None:
    sizes = dict.fromkeys(("onnx-int8", "openvino-int8"), 5_000_000)
    given = timings()
    found = {
        "machine": "a machine",
        "checkpoint": "c",
        "clip": [1, 2, 3, 3],
        "linear_gmac": 1.0,
        "rows": int8.rows(given, sizes),
        "goals": int8.goals(given, BOUNDS),
        "peak": [{"precision": "int8", "gmacs_per_s": 40.0, "by": "x"}],
        "bounds": {name: int8.reached(bound, 100.0, 1.0) for name, bound in BOUNDS.items()},
    }
    text = int8.speed_text(found)
    assert all(f"| {name} |" in text for name in given)
    assert "onnx-int8: 10 GMAC/s in 8-bit integers, 10% of that; at these rates its linears take 10 ms" in text
    assert "| onnx-int8 | 100.0 | 90.0 - 110.0 | 1.00x | 5.0 |" in text


def test_a_profile_sums_medians_of_nodes() -> None:
    taken: dict[tuple[str, str], list[float]] = {
        ("A", "one"): [99, 99, 1, 2, 9],
        ("A", "two"): [99, 99, 3.0],
        ("B", "one"): [0, 0, 8],
    }
    assert int8.by_operator(taken) == {"B": 8, "A": 5}
    assert list(int8.by_operator(taken)) == ["B", "A"]


def test_results_are_kept_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    int8.keep(path, "speed a", {"x": 1})
    int8.keep(path, "speed b", {"x": 2})
    int8.keep(path, "speed a", {"x": 3})
    assert json.loads(path.read_text()) == {"speed a": {"x": 3}, "speed b": {"x": 2}}


def test_size_counts_the_weights_beside_a_file_and_no_other(tmp_path: Path) -> None:
    for name, size in (("m.xml", 3), ("m.bin", 4), ("m.slice.xml", 100), ("mm.bin", 100)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert quantisers.size(tmp_path / "m.xml") == 7
