"""What `bench/int8.py` makes of timings, and the graphs that it times."""

import json

import numpy as np
import onnxruntime as ort
import pytest

from edgetube.bench import int8
from edgetube.bench.peers import quantisers


def timings(**p50):
    """Timings of all contestants that the goals name, 100 ms where nothing is said."""
    names = {name for goal in int8.GOALS for name in goal[:2]} - {int8.BEST_ORT}
    names |= {"ORT one", "ORT two", *int8.PEAK.values()}
    rest = {"p10_ms": 90.0, "p90_ms": 110.0, "noise": 0.01, "runs": 9}
    return {name: {"name": name, "p50_ms": p50.get(name, 100.0), **rest} for name in names}


def test_ratios_are_of_medians_and_the_best_recipe_counts():
    found = int8.goals(timings(**{"onnx-int8": 50.0, "ORT one": 80.0, "openvino-int8": 20.0}))
    ratios = {(goal["name"], goal["other"]): goal["ratio"] for goal in found}
    assert ratios["onnx-int8", "ORT one"] == pytest.approx(1.6)
    assert ("onnx-int8", "ORT two") not in ratios
    assert ratios["onnx-int8", int8.EAGER] == pytest.approx(2.0)
    assert ratios["openvino-int8", int8.NNCF] == pytest.approx(5.0)
    assert {goal["asked"] for goal in found} == {asked for *_, asked in int8.GOALS}


def test_rates_by_hand(monkeypatch):
    monkeypatch.setattr(int8, "PRODUCT", (10, 20, 500))  # 200 000 operations
    given = timings(**{int8.PEAK["ONNX Runtime"]: 0.001, int8.PEAK["OpenVINO"]: 0.002, "onnx-int8": 2.0})
    found = int8.product_rates(given, 100_000_000)
    assert found["gops"] == pytest.approx({"ONNX Runtime": 200.0, "OpenVINO": 100.0})
    assert found["reached"]["onnx-int8"] == pytest.approx({"gops": 100.0, "share": 0.5})


def test_products_are_no_contestants():
    found = int8.rows(timings(**{"onnx-int8": 25.0}), {"onnx-int8": 7})
    by_name = {row["name"]: row for row in found}
    assert not set(int8.PEAK.values()) & set(by_name)
    assert (by_name["onnx-int8"]["against_eager"], by_name["onnx-int8"]["bytes"]) == (pytest.approx(4.0), 7)


def test_both_runtimes_multiply_the_same_numbers(tmp_path, monkeypatch, rng):
    monkeypatch.setattr(int8, "PRODUCT", (4, 32, 16))
    paths = int8.product(tmp_path)
    x = rng.integers(0, 256, (1, 4, 32), np.uint8)
    answers = [ort.InferenceSession(path).run(None, {"x": x})[0] for path in paths.values()]
    weight = np.random.default_rng(0).integers(-127, 128, (32, 16), np.int8)
    expected = x[0].astype(np.int64) @ weight.astype(np.int64) * 1e-3
    for answer in answers:
        np.testing.assert_allclose(answer[0], expected, rtol=1e-4, atol=1e-3)


def test_contestants_open(tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "PRODUCT", (4, 32, 16))
    laps = []
    for runtime, path in int8.product(tmp_path).items():
        assert int8.multiply(laps.append, runtime, str(path)).call() is not None
    assert laps == ["import", "import"]
    assert int8.eager(laps.append, "demo").call().shape == (1, 9)


def test_a_table_is_complete():
    sizes = dict.fromkeys(("onnx-int8", "openvino-int8"), 5_000_000)
    given = timings()
    found = {
        "machine": "a machine",
        "checkpoint": "c",
        "clip": [1, 2, 3, 3],
        "linear_gmac": 1.0,
        "rows": int8.rows(given, sizes),
        "goals": int8.goals(given),
        "product": int8.product_rates(given, 10**9),
    }
    text = int8.speed_text(found)
    assert all(f"| {name} |" in text for name in given if name not in int8.PEAK.values())
    assert "| onnx-int8 | 100.0 | 90.0 - 110.0 | 1.00x | 5.0 |" in text


def test_a_profile_sums_medians_of_nodes():
    taken = {("A", "one"): [99, 99, 1, 2, 9], ("A", "two"): [99, 99, 3.0], ("B", "one"): [0, 0, 8]}
    assert int8.by_operator(taken) == {"B": 8, "A": 5}
    assert list(int8.by_operator(taken)) == ["B", "A"]


def test_results_are_kept_side_by_side(tmp_path):
    path = tmp_path / "x.json"
    int8.keep(path, "speed a", {"x": 1})
    int8.keep(path, "speed b", {"x": 2})
    int8.keep(path, "speed a", {"x": 3})
    assert json.loads(path.read_text()) == {"speed a": {"x": 3}, "speed b": {"x": 2}}


def test_size_counts_the_weights_beside_a_file_and_no_other(tmp_path):
    for name, size in (("m.xml", 3), ("m.bin", 4), ("m.slice.xml", 100), ("mm.bin", 100)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert quantisers.size(tmp_path / "m.xml") == 7
