"""The study of targets goes on where it was interrupted, and the document's tables are those of its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetube import runtimes
from edgetube.bench.studies import targets

ROOT = Path(__file__).parents[3]
ENTRY = {
    "sets": ["built-in"],
    "rows": {
        "onnx-fp32": {
            "status": "executed", "backend": "onnxruntime", "bytes": 6.64e6,
            "by": {"onnxruntime": "1.2.3", "threads": 2},
            "sets": [{"clips": 9, "agreement": 8 / 9, "cosine": 0.99996, "relative_error": 4.2e-5}],
        },
        "trt-fp16": {
            "status": "emulated", "backend": "tensorrt",
            "by": {"onnxruntime": "1.2.3", "device": "cpu", "delegate": "none"}, "bytes": 3e6,
            "sets": [{"clips": 9, "agreement": 1.0, "cosine": 1.0, "relative_error": 1e-3}],
        },
    },
    "refused": {"qnn-fp16": "no"},
}  # fmt: skip


def test_the_tables_by_hand() -> None:
    costs = {"big": {"rows": {"onnx-fp32": {"seconds": 40.0, "processor_s": 61.6, "peak_gb": 2.04}, "trt-fp16": None}}}
    stated = {"a": {"version": "1", "licence": "MIT"}}
    made = targets.tables({"models": {"demo": ENTRY}, "cost": costs, "licences": stated})
    assert made["demo"].splitlines()[2:4] == [
        "| `onnx-fp32` | 6.6 | 8 of 9 | 1.0000 | 4.2e-05 |",
        "| `trt-fp16` | 3.0 | 9 of 9 | 1.0000 | 1.0e-03 |",
    ]
    assert made["demo"].splitlines()[-1] == "`qnn-fp16`: no"
    unseen = [runtimes.unseen(name) for name in ("onnxruntime", "tensorrt")]
    assert all(unseen)
    assert made["targets"].splitlines()[2:] == [
        f"| `onnx-fp32` | onnxruntime 1.2.3 | cpu | {unseen[0]} | 62 | 2.0 |",
        f"| `trt-fp16` | onnxruntime 1.2.3 | cpu; emulated | {unseen[1]} | – | – |",
    ]
    assert made["licences"].splitlines()[2:] == ["| `a` | 1 | MIT |"]


def test_an_evaluator_of_our_own_is_called_so() -> None:
    assert targets.executed({"evaluator": "numpy 2.4.6", "operations": 3}) == (
        "edgetube's evaluator on numpy 2.4.6",
        "cpu",
    )


def test_tables_are_put_between_their_lines_again_and_again() -> None:
    text = "a\n<!-- x -->\n<!-- end -->\nb\n<!-- y -->\nold\n<!-- end -->\n"
    once = targets.fill(text, {"x": "| 1 |", "y": "| 2 |", "z": "| 3 |"})
    assert once == "a\n<!-- x -->\n\n| 1 |\n\n<!-- end -->\nb\n<!-- y -->\n\n| 2 |\n\n<!-- end -->\n"
    assert targets.fill(once, {"x": "| 1 |", "y": "| 2 |"}) == once


def test_rows_are_kept_until_something_else_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "targets.json"
    document = targets.Document(path)
    document.of("models", "demo", sets=["a"])["rows"]["x"] = {"bytes": 1}
    document.save()
    assert targets.Document(path).of("models", "demo", sets=["a"])["rows"] == {"x": {"bytes": 1}}
    assert targets.Document(path).of("models", "demo", sets=["b"])["rows"] == {}


def test_every_runtime_says_what_a_cpu_does_not_show() -> None:
    silent = {name for name in runtimes.names() if not runtimes.unseen(name)}
    assert silent <= {"mil", "torch"}


def test_licences_are_those_of_installed_packages() -> None:
    found = targets.licences()
    assert {"onnxruntime"} <= found.keys()
    assert all(one["version"] and one["licence"] for one in found.values())


def test_the_document_has_the_tables_of_the_results() -> None:
    results = ROOT / "bench" / "results" / "targets.json"
    if not results.exists():
        pytest.skip("nothing is measured yet")
    data: dict[str, Any] = json.loads(results.read_text())
    text = (ROOT / "docs" / "targets.md").read_text()
    assert targets.fill(text, targets.tables(data)) == text
