"""Interleaving is fair: everybody has the same number of turns, in turn, after a warm-up; in one process or in many."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetube import bundle as bundles
from edgetube import runtimes
from edgetube.bench import conditions, latency, worker
from edgetube.bench.latency import interleave
from edgetube.errors import BackendError, BundleError, InputError
from edgetube.targets import missing


def test_candidates_take_turns_after_a_warm_up() -> None:
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    timings = interleave(calls, seconds=0.0, minimum=6, warmup=2)
    assert order == ["a", "a", "b", "b", *"aaaabbbb" * 6]
    assert {t.runs for t in timings.values()} == {18}


def test_times_are_milliseconds_and_ordered() -> None:
    timing = interleave({"sleep": lambda: time.sleep(0.02)}, seconds=0.0, minimum=2, warmup=0)["sleep"]
    assert 20 <= timing.p10_ms <= timing.p50_ms <= timing.p90_ms
    assert timing.to_json()["runs"] == 6


class TestStatistics:
    @pytest.mark.parametrize(
        ("count", "low", "high"), [(6, 1, 6), (10, 2, 9), (20, 6, 15), (50, 18, 33), (100, 40, 61)]
    )
    def test_the_interval_of_a_median_is_the_one_in_the_tables(self, count: int, low: int, high: int) -> None:
        values = list(np.random.default_rng(0).permutation(np.arange(1, count + 1)))
        assert latency.median_interval(values) == (low, high)

    def test_a_few_values_give_their_range(self) -> None:
        assert latency.median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)

    def test_it_holds_the_median_95_times_in_100(self) -> None:
        draws = np.random.default_rng(1).exponential(size=(2000, 15))
        inside = [low <= np.log(2) <= high for low, high in map(latency.median_interval, draws.tolist())]
        assert np.mean(inside) == pytest.approx(0.965, abs=0.02)  # 1 - 2 * P(Binomial(15, 1/2) <= 3)

    def test_calls_are_steady_when_their_medians_stay(self) -> None:
        assert not worker.steady([1.0] * 9)
        assert worker.steady([9.0, 9.0, *[1.0] * 10])
        assert not worker.steady([*[2.0] * 5, *[1.0] * 5])
        assert worker.steady([1.0, 1.0, 1.0, 50.0, 1.0, *[1.04] * 5])


def test_a_long_call_is_a_turn_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = worker.Benchmarkable(lambda: time.sleep(0.01))
    assert len(worker.turn(candidate, 0.0, 3)["ms"]) == 3
    monkeypatch.setattr(worker, "LONG", 0.005)
    found = worker.turn(candidate, 1.0, 3)
    assert (len(found["ms"]), found["calls"]) == (1, 1)
    assert found["ms"][0] >= 10


def test_a_machine_without_a_temperature_is_refused_before_its_peak_is_measured(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditions, "celsius", lambda: None)
    monkeypatch.setattr(latency, "peaks", None)
    with pytest.raises(InputError, match="start-below needs a temperature"):
        latency.measure([bundles.load(tiny_bundle)], latency.Options(start_below=45.0))


def test_what_a_simulator_runs_is_not_timed(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "simulated", lambda backend: backend == "onnxruntime")
    monkeypatch.setattr(latency, "peaks", lambda threads: [])
    document = latency.measure([bundles.load(tiny_bundle)], latency.Options())
    (row,) = document["bundles"]
    assert row["status"] == "executed"
    assert row["p50_ms"] is row["cold_start_ms"] is row["runtime"] is None
    (note,) = latency.notes(document)
    assert note.startswith("tiny.onnx-fp32 is not timed here (executed): its processor is simulated")


def test_a_runtime_that_chooses_its_threads_is_not_timed_with_a_number(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rows are measured."""
    other = shutil.copytree(tiny_bundle, tmp_path / "own.onnx-fp32")
    found = [replace(bundles.load(path), backend=name) for path, name in ((tiny_bundle, "onnxruntime"), (other, "own"))]
    monkeypatch.setattr(runtimes, "takes_threads", lambda backend, device=None: backend != "own")
    monkeypatch.setattr(runtimes, "simulated", lambda backend: False)
    rows = list(latency._candidates(found, 1, latency.Options()))
    assert [row.untimed for row in rows] == ["", latency.OWN_THREADS]
    assert [row.untimed for row in latency._candidates(found, None, latency.Options())] == ["", ""]


OTHERS = {
    "ai_edge_litert", "coreai", "coremltools", "executorch", "onnx", "onnxruntime_qnn", "openvino", "tensorrt", "torch",
}  # fmt: skip
"""Packages of other runtimes, and those that only exports need."""


def test_the_process_of_a_bundle_loads_its_own_runtime_only(tiny_bundle: Path) -> None:
    """Memory and cold start are those of the bundle: no other vendor's package, and no PyTorch, is in the process."""
    order = {"path": str(tiny_bundle), "threads": 1, "device": None, "camera": (48, 64)}
    code = (
        "import json, sys; from edgetube.bench import worker;"
        f"worker.bundle(lambda stage: None, **json.loads({json.dumps(order)!r})).call();"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "onnxruntime" in loaded
    assert not loaded & OTHERS


def keys_documented(title: str) -> set[str]:
    text = (Path(__file__).parents[2] / "docs" / "benchmarking.md").read_text("utf-8")
    section = text.split(f"\n### {title}\n")[1].split("\n### ")[0].split("\n## ")[0]
    first = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in first for name in re.findall(r"`(\w+)`", cell)}


@pytest.fixture(scope="module")
def foreign_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose runtime is not on this machine."""
    path = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("foreign") / "tiny.trt-fp32")
    manifest = json.loads((path / "edgetube.json").read_text())
    manifest |= {"name": "tiny.trt-fp32", "target": "trt-fp32", "backend": "tensorrt", "status": "deferred"}
    manifest["build"]["settings"] = {}
    (path / "edgetube.json").write_text(json.dumps(manifest))
    return path


@pytest.fixture(scope="module")
def document(tiny_bundle: Path, foreign_bundle: Path) -> dict[str, Any]:
    if not missing(("tensorrt",)):
        pytest.skip("TensorRT is installed: the bundle of this test would need a GPU")
    found = [bundles.load(path) for path in (tiny_bundle, foreign_bundle)]
    options = latency.Options(
        seconds=0.1,
        warm=0.5,
        starts=1,
        camera_fps=40.0,
        camera_seconds=0.5,
        hop=2,
        camera_size=(48, 64),
        reference=True,
    )
    with pytest.MonkeyPatch.context() as patch:  # enough to look at the document
        patch.setattr(latency, "TURN", 0.02)
        return latency.measure(found, options)


@pytest.mark.slow  # for the machine's peak, every runtime that is installed is imported and timed
class TestDocument:
    def test_every_key_is_documented(self, document: dict[str, Any]) -> None:
        assert set(document) == keys_documented("The document") - {"date", "device"}  # of `--json` and `--on`
        assert set(document["bundles"][1]) == keys_documented("`bundles[]`")
        assert all(set(row) == set(document["bundles"][1]) for row in document["bundles"])
        assert set(document["bundles"][1]["camera"]) == keys_documented("`camera`")
        assert json.loads(json.dumps(document))["bundles"][1]["name"] == "tiny.onnx-fp32"

    def test_the_numbers_of_a_row_fit_together(self, document: dict[str, Any], tiny_bundle: Path) -> None:
        row = document["bundles"][1]
        spec = bundles.load(tiny_bundle).spec
        assert row["status"] == "executed"
        assert row["p10_ms"] <= row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["turns"] >= latency.TURNS
        assert row["runs"] >= row["turns"] * latency.BLOCK
        assert row["cold_start_ms"] == pytest.approx(sum(row["cold_start"].values()))
        assert list(row["cold_start"]) == ["start_ms", "import_ms", "load_ms", "first_ms"]
        assert all(value > 0 for value in row["cold_start"].values())
        assert row["macs"] == spec.macs()
        assert row["gmacs_per_s"] == pytest.approx(spec.macs() / row["p50_ms"] / 1e6)
        assert row["size_mb"] == bundles.load(tiny_bundle).artifact_bytes / 1e6
        assert row["warmup"]["calls"] >= 2 * worker.WINDOW
        share = row["preprocess_ms"] / (row["preprocess_ms"] + row["p50_ms"])
        assert row["preprocess_share"] == pytest.approx(share)
        assert row["runtime"]["onnxruntime"]

    def test_a_runtime_that_is_not_here_has_a_reason_and_no_times(self, document: dict[str, Any]) -> None:
        row = document["bundles"][2]
        assert row["status"] == "deferred"
        assert "pip install" in row["reason"]
        assert row["p50_ms"] is row["cold_start_ms"] is row["peak_mb"] is row["camera"] is None
        assert any("tiny.trt-fp32 is not timed here (deferred)" in note for note in latency.notes(document))

    def test_the_reference_takes_part(self, document: dict[str, Any]) -> None:
        row = document["bundles"][0]
        assert (row["name"], row["status"], row["target"]) == ("PyTorch", "executed", None)
        assert row["p50_ms"] > 0
        assert "torch" in row["runtime"]
        assert row["camera"] is None


class TestProcesses:
    def test_candidates_have_the_same_turns(self, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(latency, "TURN", 0.02)
        options = latency.Options(threads=(1, 2), seconds=0.1, warm=0.5, starts=1)
        found = [bundles.load(tiny_bundle)]
        candidates = [c for threads in (1, 2) for c in latency._candidates(found, threads, options)]
        rows = latency.run_interleaved(candidates, options)
        assert [(row["threads"], row["runtime"]["threads"]) for row in rows] == [(1, 1), (2, 2)]
        assert [row["turns"] for row in rows] == [latency.TURNS] * 2
        assert all(row["runs"] >= latency.TURNS * latency.BLOCK and row["status"] == "executed" for row in rows)

    @pytest.mark.slow
    def test_memory_is_the_candidates_own(self, tiny_bundle: Path) -> None:
        """The kernel hands the parent's peak on to a child through `getrusage`; a gigabyte here must not show there."""
        ballast = np.ones(125_000_000)
        given = {"path": str(tiny_bundle), "threads": 1, "device": None, "camera": (48, 64)}
        with latency.Process("tiny", "edgetube.bench.worker:bundle", given) as process:
            assert 30 < process.ask("warm", seconds=0.1)["peak_mb"] < 500
        assert ballast.nbytes == 1e9

    def test_a_process_that_dies_is_an_error_with_its_last_words(self, tiny_bundle: Path) -> None:
        given = {"path": str(tiny_bundle), "threads": 1, "device": None, "camera": (48, 64)}
        with (
            latency.Process("tiny", "edgetube.bench.worker:bundle", given) as process,
            pytest.raises(BackendError, match="tiny: its process ended with exit code 1: KeyError: 'nothing'"),
        ):
            process.ask("nothing")
        with pytest.raises(BackendError, match="tiny: its process was closed"):
            process.ask("warm", seconds=0.1)

    def test_a_process_whose_time_is_up_is_ended(self, tiny_bundle: Path) -> None:
        given = {"path": str(tiny_bundle), "threads": 1, "device": None, "camera": (48, 64)}
        with pytest.raises(BackendError, match="tiny: not done after 0 s, and ended"):
            latency.Process("tiny", "edgetube.bench.worker:bundle", given, limit=0.01)

    def test_the_errors_of_a_candidate_are_those_of_the_caller(self, tmp_path: Path) -> None:
        given = {"path": str(tmp_path), "threads": 1, "device": None, "camera": (48, 64)}
        with pytest.raises(BundleError, match="is not a bundle"):
            latency.Process("none", "edgetube.bench.worker:bundle", given)


@pytest.mark.parametrize("given", [{"threads": (0,)}, {"seconds": 0}, {"starts": 0}, {"camera_fps": -1.0}, {"hop": 0}])
def test_options_that_cannot_be(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(given)).replace('_', '-')} is .*expected"):
        latency.Options(**given)
