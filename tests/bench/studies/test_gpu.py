"""`bench/studies/gpu.py`: its arithmetic, its tables, and all of it on a GPU (marked `gpu`) and on doubles."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetube import bundle as bundles
from edgetube import datasets, demo, targets
from edgetube.bench import parity
from edgetube.bench.studies import gpu
from edgetube.errors import BackendError
from edgetube.model import checkpoints
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


def test_the_table_of_answers(tiny_bundle: Path) -> None:
    found = parity.measure([bundles.load(tiny_bundle)], datasets.built_in(9, demo.LABELS))
    _, _, tested, other = gpu.parity_table(found.measured, {"rtx-int8": "no such GPU"}).splitlines()
    assert re.fullmatch(r"\| onnx-fp32 \| executed \| 9 \| 100\.00% \| [\d.]+% \| [\d.]+% \| [\d.e-]+ \|", tested)
    assert other == "| rtx-int8 | not run: no such GPU | | | | | |"


def test_who_takes_part(tiny_bundle: Path) -> None:
    onnx = bundles.load(tiny_bundle)
    found = gpu.candidates("random:tubevit-ti", 8, {"onnx-fp16": onnx, "trt-fp16": onnx})
    names = ["PyTorch eager fp16", "torch.compile fp16", "onnx-fp16", "trt-fp16", "trt-fp16, no CUDA graph", *WITNESS]
    assert [candidate.name for candidate in found] == names
    assert {candidate.batch for candidate in found} == {8}
    assert found[2].given["device"] == "cuda"
    for candidate in found:
        module, _, function = candidate.opener.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_what_cannot_be_built_says_why(tmp_path: Path) -> None:
    made, reasons = gpu.build(["no-such-target"], "demo", tmp_path)
    assert made == {}
    assert "no target is called 'no-such-target'" in reasons["no-such-target"]


@pytest.mark.slow
def test_without_a_gpu_everybody_has_a_row_that_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not targets.missing((targets.GPU,)):
        pytest.skip("this machine has a GPU")
    rows = gpu._run_interleaved("demo", 2, (gpu.ORT, "trt-fp16", "no-such-target"), tmp_path, 0.1, LIMITS)
    reasons = {row["name"]: row["reason"] for row in rows}
    assert [row["p50_ms"] for row in rows] == [None] * len(rows)
    assert "sees no GPU" in reasons["PyTorch eager fp16"]
    assert "sees no GPU" in reasons["torch.compile fp16"]
    assert "not built for cuda" in reasons["onnx-fp16"]
    assert reasons["trt-fp16"] == reasons["trt-fp16, no CUDA graph"] != ""
    assert "no target is called" in reasons["no-such-target"]
    assert all("sees no GPU" in reasons[name] for name in WITNESS)
    assert gpu.table(rows).count("not run: ") == 8


@pytest.mark.parametrize("opener", [lambda stage_timer: gpu.eager(stage_timer, "demo", 1, compiled=""), gpu.limits])
def test_without_a_gpu_the_openers_say_so(opener: Callable[..., Any]) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("PyTorch has a GPU here")
    with pytest.raises(BackendError, match="sees no GPU; install a build of it for CUDA"):
        opener(lambda stage: None)


@pytest.mark.slow
def test_without_a_gpu_it_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    if not targets.missing((targets.GPU,)):
        pytest.skip("this machine has a GPU")
    out = tmp_path / "gpu.json"
    done = subprocess.run([sys.executable, gpu.__file__, "--json", out], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == ("gpu.py needs an NVIDIA GPU and its driver; this machine has none: nothing was measured\n")
    assert not out.exists()


@pytest.fixture(params=["double", pytest.param("gpu", marks=pytest.mark.gpu)])
def torch_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """PyTorch with a GPU, or with the processor in its place."""
    torch = pytest.importorskip("torch")
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("needs a PyTorch that sees an NVIDIA GPU")
        return torch
    for name, answer in (("is_available", True), ("get_device_name", "a double"), ("synchronize", None)):
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    for owner in (torch.Tensor, torch.nn.Module):
        monkeypatch.setattr(owner, "cuda", lambda self, **_: self)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    for name in ("randn", "randint", "empty"):
        monkeypatch.setattr(torch, name, _on_the_processor(getattr(torch, name)))
    return torch


def _on_the_processor(make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, device=None, **names: make(*arguments, **names)


def test_on_a_gpu_pytorch_answers_in_float16(torch_gpu: Any) -> None:
    candidate = gpu.eager(lambda stage: None, "demo", 2, compiled="")
    logits = np.asarray(candidate.call())
    assert logits.shape == (2, 9)
    assert logits.dtype == np.float32
    checkpoint = checkpoints.load("demo")
    clip = demo.golden(checkpoint.contract).frames
    expected = Reference(checkpoint.model, checkpoint.contract)(clip[None])
    np.testing.assert_allclose(logits, expected.repeat(2, axis=0), atol=0.05)
    assert candidate.about["torch"] == torch_gpu.__version__


def test_on_a_gpu_the_limits_are_measured(torch_gpu: Any) -> None:
    found = gpu.limits(lambda stage: None, size=256, copied=1 << 16).about
    assert found["gmacs_per_s"]["int8"] > 0 < found["gmacs_per_s"]["fp16"]
    assert found["gb_per_s"] > 0


def test_a_session_without_its_cuda_graph_answers_the_same(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with doubles.machine(tmp_path / "cache"):
        made, reasons = gpu.build(["trt-fp16"], str(tiny_checkpoint), tmp_path, batch=2)
        assert reasons == {}
        bundle = made["trt-fp16"]
        candidate = gpu.launched(lambda stage: None, str(bundle.path))
        assert candidate.about["replay"] == "none: to compare with"
        logits = bundle.golden()[1][0]
        np.testing.assert_allclose(np.asarray(candidate.call()), np.stack([logits, logits]), atol=2e-2)


@pytest.mark.slow
def test_all_of_the_script_where_the_processes_that_it_starts_find_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "missing", lambda needs: ())
    written = tmp_path / "results" / "gpu.json"
    given = ["--models", "demo", "--batches", "1", "--clips", "9", "--seconds", "0.2", "--json", str(written)]
    given += ["--targets", f"{gpu.ORT},trt-fp16"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *given])
    assert gpu.main() == 0
    document, printed = json.loads(written.read_text("utf-8")), capsys.readouterr().out
    assert document["parity"]["data"]["clips"] == 9
    assert document["parity"]["bundles"][0]["agreement"] == 1.0
    rows = {row["name"]: row for row in document["rows"]}
    torch_rows, trt_rows = ["PyTorch eager fp16", "torch.compile fp16"], ["trt-fp16", "trt-fp16, no CUDA graph"]
    assert list(rows) == [*torch_rows, gpu.ORT, *trt_rows, *WITNESS]
    assert "sees no GPU" in document["witness"][0]["reason"]
    assert all((row["p50_ms"] is None) == bool(row["reason"]) for row in rows.values())
    assert "The built-in model, batch 1" in printed


def test_the_table_of_the_graphs_in_pytorch() -> None:
    found = {"clips": 9, "agreement": 1.0, "worst_cosine": 0.9995, "max_abs_error": 0.0712, "largest_logit": 6.84}
    rows: list[dict[str, Any]] = [
        {"target": "trt-int8", "integer_products": 28} | found,
        {"target": "trt-fp16", "reason": "no GPU"},
    ]
    _, _, ran, other = gpu.witness_table(rows).splitlines()
    assert ran == "| trt-int8 | 9 | 100.00% | 0.999500 | 0.0712 of 6.84 | 28 |"
    assert other == "| trt-fp16 | not run: no GPU | | | | |"
