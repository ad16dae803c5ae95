"""`bench/studies/gpu.py`: its arithmetic, its tables, its rows, and what it does without a GPU."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetube import bundle as bundles
from edgetube import metrics, targets
from edgetube.bench import latency
from edgetube.bench.studies import gpu, gpu_folder
from edgetube.bench.studies.gpu_folder import Entry, Plan
from edgetube.errors import BackendError
from edgetube.export import pipeline
from edgetube.model.transformer import VideoTransformer
from edgetube.runtimes.torch import Reference
from tests.runtimes import doubles

WITNESS = ["trt-fp16's graph in PyTorch", "trt-fp16's graph, torch.compile"]
LIMITS = {"gmacs_per_s": {"fp16": 100_000.0, "int8": 200_000.0}, "gb_per_s": 1000.0}


def row(name: str = "trt-fp16", **changes: Any) -> dict[str, Any]:
    found = {"name": name, "p50_ms": 2.0, "p99_ms": 3.0, "throughput": 500.0, "noise": 0.01, "reason": None}
    found |= {"macs": 50_000_000_000, "batch": 1, "precision": "fp16", "flop_share": 0.25, "bandwidth_share": 0.1}
    return found | changes


def test_shares_by_hand() -> None:
    """50 GMAC in 2 ms are 25 000 GMAC/s; 90 M weights of 2 bytes and a clip of 20 MB are 0.2 GB, 100 GB/s."""
    found = gpu.shares(row(), weights=90_000_000, clip_bytes=20_000_000, best=LIMITS)
    assert found == pytest.approx({"flop_share": 0.25, "bandwidth_share": 0.1})
    int8 = gpu.shares(row(precision="int8", batch=2), weights=90_000_000, clip_bytes=20_000_000, best=LIMITS)
    assert int8 == pytest.approx({"flop_share": 0.125, "bandwidth_share": 0.065})


@pytest.mark.parametrize(("time", "best"), [(None, LIMITS), (2.0, None)])
def test_shares_of_what_is_unknown(time: float | None, best: dict[str, Any] | None) -> None:
    found = gpu.shares(row(p50_ms=time), weights=1, clip_bytes=1, best=best)
    assert found == {"flop_share": None, "bandwidth_share": None}


def test_the_gain_of_the_cuda_graph() -> None:
    rows = [row(p50_ms=2.0), row("trt-fp16, no CUDA graph", p50_ms=3.0)]
    assert gpu.graph_gain(rows) == 1.5
    assert gpu.graph_gain(rows[:1]) is None
    assert gpu.graph_gain([rows[0], row("trt-fp16, no CUDA graph", p50_ms=None)]) is None


def test_the_table() -> None:
    rows = [
        row("PyTorch eager fp16", p50_ms=5.0, noise=0.2),
        row(flop_share=None),
        row("rtx-int8", p50_ms=None, reason="TensorRT for RTX does not know SM90"),
    ]
    _, _, eager, trt, rtx = gpu.table(rows).splitlines()
    assert eager == "| PyTorch eager fp16 | 5.000 ±20% | 3.000 | 500 | 1.00x | 25.0% | 10.0% |"
    assert trt == "| trt-fp16 | 2.000 | 3.000 | 500 | 2.50x | - | 10.0% |"
    assert rtx == "| rtx-int8 | not run: TensorRT for RTX does not know SM90 | | | | | |"


def answered(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"name": "trt-int8's graph in PyTorch", "status": "executed on a GPU", "reason": None}
    found |= {"clips": 9, "agreement": 1.0, "top1": 0.9876, "top1_reference": 1.0, "worst_cosine": 0.9995}
    found |= {"max_abs_error": 0.0712, "largest_logit": 6.84, "emulation_agreement": 1.0, "emulation_error": 0.0123}
    return found | {"emulation_max_abs_error": 0.068} | changes


def test_the_table_of_answers() -> None:
    rows = [answered(), answered(emulation_error=None), {"name": "rtx-int8", "reason": "no such GPU"}]
    _, _, ran, alone, other = gpu.answers_table(rows).splitlines()
    beginning = "| trt-int8's graph in PyTorch | executed on a GPU | 9 | 100.00% | 98.8% | 100.0% | 0.999500 | "
    assert ran == beginning + "0.0712 of 6.84 | 0.068 | 0.0123 |"
    assert alone == beginning + "0.0712 of 6.84 | - | - |"
    assert other == "| rtx-int8 | not run: no such GPU | | | | | | | | |"


def test_answers_are_compared_by_hand() -> None:
    reference = np.array([[1, 0], [0, 2], [3, 0], [0, 4]], np.float32)
    logits = np.array([[1, 0], [0, 2.5], [0, 3], [0, 4]], np.float32)
    found = gpu.compare(logits, reference, np.array([0, 1, 1, 0]), logits + np.float32(0.25))
    assert (found["clips"], found["agreement"], found["top1"], found["top1_reference"]) == (4, 0.75, 0.75, 0.5)
    assert (found["max_abs_error"], found["largest_logit"], found["worst_cosine"]) == (3.0, 4.0, 0.0)
    assert (found["emulation_agreement"], found["emulation_error"], found["emulation_max_abs_error"]) == (1, 0.25, 3.25)
    assert gpu.compare(logits, reference, np.zeros(4, np.int64), None)["emulation_error"] is None


@pytest.mark.slow
def test_who_takes_part(tiny_bundle: Path) -> None:
    bundle = bundles.load(tiny_bundle)
    trt = replace(bundle, target="trt-fp16")
    names = [c.name for c in gpu.candidates(trt, "m", "cuda", "default")]
    assert names == ["trt-fp16", "trt-fp16, no CUDA graph", *WITNESS]
    assert [c.name for c in gpu.candidates(trt, "m", "cuda", "")] == names[:3]
    (ort,) = gpu.candidates(replace(bundle, target="onnx-fp16"), "m", "cuda", "default")
    assert ort.given["device"] == "cuda"
    torch_names = [c.name for c in gpu.references(trt, "m", "cuda", "default")]
    assert torch_names == ["PyTorch eager fp16", "torch.compile fp16"]
    assert [c.name for c in gpu.references(trt, "m", "cuda", "")] == torch_names[:1]
    for candidate in [*gpu.candidates(trt, "m", "cuda", "default"), *gpu.references(trt, "m", "cuda", "default")]:
        module, _, function = candidate.opener.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert candidate.limit


def test_the_time_of_a_row_is_what_is_left() -> None:
    clock = gpu.Clock(1.0, time.monotonic() - 30, patience=10.0)
    assert clock.limit(1.0) == 10.0
    assert 25 < clock.limit(60.0) <= 30
    with pytest.raises(BackendError, match="the 1 minutes were over; --minutes allows more"):
        gpu.Clock(1.0, time.monotonic() - 58).limit(60.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch has a GPU here")
@pytest.mark.parametrize("opener", [lambda t: gpu.eager(t, "", "cuda", compiled=""), lambda t: gpu.limits(t, "cuda")])
def test_without_a_gpu_the_openers_say_so(opener: Any) -> None:
    with pytest.raises(BackendError, match="sees no GPU; install a build of it for CUDA"):
        opener(lambda stage: None)


@pytest.mark.slow
def test_without_a_gpu_it_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    if not targets.missing((targets.GPU,)):
        pytest.skip("this machine has a GPU")
    out = tmp_path / "gpu.json"
    command = [sys.executable, gpu.__file__, "run", str(tmp_path), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == ("gpu.py needs an NVIDIA GPU and its driver; this machine has none: nothing was measured\n")
    assert not out.exists()


def test_what_is_no_folder_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["run", str(tmp_path), "--device", "cpu"]) != 0
    assert "has no plan.json; make such a folder with" in capsys.readouterr().err


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a PyTorch that sees an NVIDIA GPU")
    return str(request.param)


def test_pytorch_answers_in_float16(device: str, tiny_bundle: Path) -> None:
    bundle = bundles.load(tiny_bundle)
    candidate = gpu.eager(lambda stage: None, str(tiny_bundle), device, compiled="")
    logits = np.asarray(candidate.call())
    assert logits.dtype == np.float32
    torch.manual_seed(0)
    clips = bundle.golden()[0][:1]
    expected = Reference(VideoTransformer(bundle.spec), bundle.contract)(clips)
    np.testing.assert_allclose(logits, expected, atol=5e-3)
    assert candidate.about["torch"] == torch.__version__


def test_the_limits_are_measured(device: str) -> None:
    found = gpu.limits(lambda stage: None, device, size=256, copied=1 << 16).about
    assert found["gmacs_per_s"]["int8"] > 0 < found["gmacs_per_s"]["fp16"]
    assert found["gb_per_s"] > 0


@pytest.mark.slow
def test_a_session_without_its_cuda_graph_answers_the_same(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with doubles.machine(tmp_path / "cache"):
        options = pipeline.Options(batch=2, lowering="gather")
        bundle = pipeline.export_model("trt-fp16", tiny_checkpoint, tmp_path, options)
        candidate = gpu.launched(lambda stage: None, str(bundle.path))
        assert candidate.about["replay"] == "none: to compare with"
        logits = bundle.golden()[1][0]
        np.testing.assert_allclose(np.asarray(candidate.call()), np.stack([logits, logits]), atol=2e-2)


@pytest.mark.slow
def test_a_row_that_fails_stops_no_other(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles that are damaged, processes that die, and time that is over; the document is whole after every row."""
    bundle = bundles.load(tiny_bundle)
    folder = tmp_path / "folder"
    shutil.copytree(tiny_bundle, folder / "b" / bundle.name)
    frames, logits = bundle.golden()
    clips: dict[str, Any] = {"frames": frames, "labels": np.zeros(len(frames), np.int64), "reference": logits}
    np.savez(folder / gpu_folder.CLIPS, allow_pickle=False, **clips)
    entry = Entry(f"b/{bundle.name}", "demo", bundle.target, 1, 1000)
    Plan("there", (entry,), (("demo", 1, "rtx-fp16", "no SDK"),)).save(folder)
    monkeypatch.setattr(latency.Process, "__init__", _fails_for("limits", latency.Process.__init__))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    seen = [json.loads(json.dumps(d)) for d in gpu.measure(folder, "cpu", 30.0, 0.05, "", scratch)]
    assert [len(d["answers"]) + len(d["rows"]) for d in seen] == [0, 1, 2, 3]
    last = seen[-1]
    assert last["limits"] == {"reason": "out of memory"}
    (answer,), (eager, ort) = last["answers"], last["rows"]
    assert (answer["agreement"], answer["status"]) == (1.0, "executed")
    assert answer["max_abs_error"] == pytest.approx(metrics.max_abs_error(logits, logits), abs=1e-3)
    assert eager["p50_ms"] > 0 < ort["p50_ms"]
    assert ort["flop_share"] is None
    assert "without shares of the limits: out of memory" in gpu.tables(last)
    assert "Not prepared: rtx-fp16 of demo, batch 1: no SDK" in gpu.tables(last)
    late = [*gpu.measure(folder, "cpu", 0.0, 0.05, "", scratch)][-1]
    assert {row["reason"] for row in (*late["answers"], *late["rows"])} == {
        "the 0 minutes were over; --minutes allows more"
    }


def _fails_for(name: str, init: Any) -> Any:
    def replaced(self: Any, given: str, *arguments: Any, **names: Any) -> None:
        if given == name:
            raise BackendError(f"{name}: out of memory")
        init(self, given, *arguments, **names)

    return replaced
