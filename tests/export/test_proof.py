"""The export's own proof: it refuses small faults in every precision, and lets every sound arithmetic pass."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import numpy_helper

from edgetube import export, metrics
from edgetube.bench import probe
from edgetube.bench.following import Apart
from edgetube.calibration.table import CalibrationTable
from edgetube.errors import ParityError
from edgetube.export import arithmetic, build, canonical, int8, pipeline, proof, reduction, static, tokenizer
from edgetube.export.base import BuildContext
from edgetube.export.canonical import Graph
from edgetube.model import checkpoints
from edgetube.model.checkpoints import Checkpoint
from edgetube.runtimes.torch import Reference
from edgetube.spec import named
from tests.marks import but

Fault = Callable[[static.StaticTransformer], None]


def swapped_frames(module: static.StaticTransformer) -> None:
    """Frames 7 and 8 of 16 in each other's place, in the indices of the gathers."""
    _, height, width = module.spec.clip
    for tube in module.tubes.children():
        assert isinstance(tube, tokenizer.Gather)
        runs = height * width * 3 // tube.run  # of a frame
        frame, rest = tube.index // runs, tube.index % runs
        swapped = torch.where(frame == 7, 8, torch.where(frame == 8, 7, frame))
        tube.index = (swapped * runs + rest).to(tube.index.dtype)


def wrong_mean(module: static.StaticTransformer) -> None:
    """0.45 for 0.5: every pixel is brighter by 0.1 of what the model was trained with."""
    for i, (tube, grid) in enumerate(zip(module.tubes.children(), module.spec.grids, strict=True)):
        assert isinstance(tube, tokenizer.Gather)
        first = sum(int(np.prod(g)) for g in module.spec.grids[:i])
        shift = 255 * 0.05 * tube.weight.sum(dim=0)  # (D / S)
        module.tubes.bias[first : first + int(np.prod(grid))] += shift.repeat(tube.merge)


def wrong_proj(module: static.StaticTransformer) -> None:
    proj: Any = module.get_submodule("blocks.2.attn.proj")
    proj.weight = proj.weight * 1.5  # not in place: the reference has the same storage


def wrong_tube(module: static.StaticTransformer) -> None:
    tube: Any = module.get_submodule("tubes.2")
    tube.weight = tube.weight * 1.25


FAULTS: dict[str, Fault] = {
    "two frames swapped": swapped_frames,
    "a mean of 0.45 for 0.5": wrong_mean,
    "one proj x 1.5": wrong_proj,
    "one tube x 1.25": wrong_tube,
}


def plant(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """Every graph of a whole model is traced with the fault; the reference is not."""
    right = canonical.trace

    def trace(module: Any, *given: Any) -> canonical.Graph:
        if isinstance(module, static.StaticTransformer):
            with torch.no_grad():
                fault(module)
        return right(module, *given)

    monkeypatch.setattr(canonical, "trace", trace)


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return checkpoints.load("demo")


@pytest.mark.slow
@pytest.mark.parametrize("fault", but(FAULTS, pytest.mark.long, "two frames swapped", "one tube x 1.25"))
def test_small_faults_are_not_published(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, FAULTS[fault])
    for target in ("onnx-fp32", "onnx-fp16"):
        with pytest.raises(ParityError, match="nothing was written"):
            pipeline.export_model(target, "demo", tmp_path, pipeline.Options(lowering="gather"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(  # one that is executed, one that is emulated
    "target", but(["onnx-int8", "coreml-w4"], pytest.mark.long, "onnx-int8")
)
def test_nor_are_they_beside_the_noise_of_integers(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibration sees the same fault in its float graph: only the reference tells."""
    monkeypatch.setattr(int8, "CALIBRATION_CLIPS", 18)
    monkeypatch.setattr(int8, "JUDGING_CLIPS", 36)
    options = pipeline.Options(lowering="gather")
    sound = pipeline.export_model(target, "demo", tmp_path, options)
    assert sound.parity["order_agreement"] > 0.999
    for fault in FAULTS.values():
        with monkeypatch.context() as patched:
            plant(patched, fault)
            with pytest.raises(ParityError, match=r"not answer like the reference|differs from the reference"):
                pipeline.export_model(target, "demo", tmp_path / "broken", options)


def rows_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tokens leave, every graph takes the row behind the right one."""
    right = reduction.Rows.forward

    def forward(self: reduction.Rows, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return right(self, torch.cat([rows[:, 1:], rows[:, -1:]], dim=1), index)

    monkeypatch.setattr(reduction.Rows, "forward", forward)


def wrong_in_the_artifact(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """One weight is wrong in artifacts alone: neither in calibration nor in what simulates them."""

    def context(graph: Graph, *given: Any) -> BuildContext:
        model = deepcopy(graph.model)
        (tensor,) = (t for t in model.graph.initializer if t.name == "blocks.1.attn.proj.weight")
        tensor.CopyFrom(numpy_helper.from_array(np.float32(factor) * numpy_helper.to_array(tensor), tensor.name))
        return BuildContext(replace(graph, model=model), *given)

    monkeypatch.setattr(build, "BuildContext", context)
    monkeypatch.setattr(CalibrationTable, "check", lambda *_: None)


WITH_FEWER = {
    "onnx-fp32": 1.01,
    "executorch-fp32": 1.01,
    "coreai-fp32": 1.01,
    "trt-fp16": 1.5,
    "qnn-fp16": 1.5,
    "litert-int8": 1.5,
    "executorch-int8": 1.5,
    "coreml-int8": 1.5,
    "trt-int8": 1.5,
}
"""Targets -> a factor of one weight that is a fault. The noise of float16 and of integers hides smaller ones."""


@pytest.mark.slow
@pytest.mark.parametrize("target", WITH_FEWER)
def test_faults_are_not_published_with_fewer_tokens(
    target: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference follows what leaves, also where the runtime shows it only to the proof."""
    if missing := export.target(target).missing(export.target(target).build_needs):
        pytest.skip(f"needs {', '.join(missing)}")
    monkeypatch.setattr(int8, "CALIBRATION_CLIPS", 9)
    monkeypatch.setattr(int8, "JUDGING_CLIPS", 36)
    options = pipeline.Options(lowering="gather", keep_tokens="0.5", max_drop=100.0)
    for plant_fault in (rows_off_by_one, partial(wrong_in_the_artifact, factor=WITH_FEWER[target])):
        with monkeypatch.context() as patched:
            plant_fault(patched)
            with pytest.raises(ParityError, match="nothing was written"):
                pipeline.export_model(target, tiny_checkpoint, tmp_path, options)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["coreml-w8", "coreml-w4"])
def test_nor_are_they_in_compressed_weights(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_off_by_one(monkeypatch)
    with pytest.raises(ParityError, match="nothing was written"):
        pipeline.export_model(target, "demo", tmp_path, pipeline.Options(lowering="gather", keep_tokens="50"))


def test_float16_may_do_what_it_did_on_arm(demo: Checkpoint) -> None:
    """Computed in float16 on aarch64, the golden clips of the built-in model reached 32.5 dB: that has to pass."""
    clips = proof.golden_clips(proof.clips(demo, 8))
    simulation = arithmetic.NoiseSimulation(static.StaticTransformer(demo.model, demo.contract), clips)
    ratios = {kind: -10 * np.log10(simulation.logit_noise(kind)) for kind in arithmetic.UNIT_ROUNDOFF}
    assert 33 < ratios["float16"] < 37
    assert ratios["float16"] - 10 * np.log10(arithmetic.ARITHMETIC_MARGIN) < 32.5 - 0.5
    assert 50 < ratios["bfloat16"] < 58
    assert ratios["float32"] > 110


def test_a_golden_bound_adds_what_was_proven_and_what_arithmetic_does() -> None:
    class Noisy:
        def __call__(self, clips: np.ndarray) -> np.ndarray:
            return np.array([[1.0, 0.01]], np.float32)

    golden = proof.Golden(np.zeros((2, 1, 1, 1, 3), np.uint8), np.array([[1, 0], [1, 0]], np.float32))
    noisy: Any = Noisy()
    stated = golden.measure(noisy, arithmetic_noise=1e-4)
    assert stated["sqnr"] == pytest.approx(40.0, abs=1e-3)
    assert stated["min_sqnr"] == pytest.approx(-10 * np.log10(2 * 1e-4 + 3 * 1e-4), abs=1e-3)
    assert golden.measure(noisy, arithmetic_noise=0.0)["min_sqnr"] == pytest.approx(37.0, abs=0.02)


def test_golden_clips_go_backwards_too_and_are_few_when_they_are_large(
    demo: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    proven = proof.clips(demo, 8)
    clips = proof.golden_clips(proven)
    assert clips.shape == (6, *demo.contract.shape)
    np.testing.assert_array_equal(clips[0], proven[0].frames)
    np.testing.assert_array_equal(clips[4], proven[0].frames[::-1])
    monkeypatch.setattr(proof, "MAX_GOLDEN_BYTES", 3 * clips[0].nbytes)
    few = proof.golden_clips(proven)
    np.testing.assert_array_equal(few, clips[[0, 1, 5]])
    monkeypatch.setattr(proof, "MAX_GOLDEN_BYTES", 1)
    assert len(proof.golden_clips(proven)) == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [("tubevit-ti", (16, 6, 2)), ("tubevit-b", (16, 6, 2)), ("tubevit-l", (6, 2, 2)), ("tubevit-h", (4, 1, 1))],
)
def test_large_models_are_shown_fewer_clips(name: str, expected: tuple[int, int, int]) -> None:
    effort = proof.Effort.of(named(name))
    assert (effort.clips, effort.ordered, effort.layers) == expected
    assert effort.clips * named(name).macs() <= proof.PROOF_MACS or effort.clips == 4


def test_of_few_clips_few_go_backwards(demo: Checkpoint) -> None:
    proven = proof.clips(demo, 4)
    clips = proof.golden_clips(proven, ordered=1)
    np.testing.assert_array_equal(clips[-1], proven[0].frames[::-1])
    assert len(clips) == 4  # three rendered ones, one of them again


def test_order_is_seen_by_how_logits_move(demo: Checkpoint) -> None:
    """1 for itself; by hand for a model that moves half as far; nothing to say for one that does not move."""
    reference = Reference(demo.model, demo.contract)
    ordered = probe.in_orders([clip.frames for clip in proof.clips(demo, 4)])
    assert len(ordered) == 3 * 4
    assert probe.order_agreement(*zip(*map(Apart(reference, reference), ordered), strict=True)) == 1.0
    assert probe.in_orders([np.zeros((1, 4, 4, 3), np.uint8)]) == []
    plain = [np.array([4, 0], np.float32), np.array([0, 4], np.float32), np.array([2, 2], np.float32)]
    half = [np.array([4, 0], np.float32), np.array([2, 2], np.float32), np.array([3, 1], np.float32)]
    assert probe.order_agreement(plain, half) == pytest.approx(1 - 0.25 / 2)
    assert probe.order_agreement([plain[0]] * 3, half) is None
    assert probe.reordered(np.zeros((1, 4, 4, 3), np.uint8)) == []


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["more", "less"])
def test_an_artifact_that_is_worse_than_its_simulation_is_refused_with_a_cause(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """The artifact gives other logits than the graph that was calibrated: by 3 dB and more it is an error."""
    monkeypatch.setattr(int8, "CALIBRATION_CLIPS", 9)
    monkeypatch.setattr(int8, "JUDGING_CLIPS", 36)
    right = metrics.sqnr
    told: list[float] = []

    def worse(reference: Any, value: Any) -> float:
        told.append(right(reference, value))
        return told[-1] - (4.0 if lost == "more" else 2.0)

    original = int8.check_accuracy

    def check_accuracy(calibrated: Any, *given: Any) -> dict[str, Any]:
        with monkeypatch.context() as patched:
            patched.setattr("edgetube.metrics.sqnr", worse)
            return original(calibrated, *given)

    monkeypatch.setattr(int8, "check_accuracy", check_accuracy)
    options = pipeline.Options(lowering="gather")
    if lost == "less":
        assert pipeline.export_model("onnx-int8", tiny_checkpoint, tmp_path, options).status == "executed"
        return
    with pytest.raises(ParityError, match=r"its SQNR on 36 clips is .* dB, simulated were .*; .*; nothing was written"):
        pipeline.export_model("onnx-int8", tiny_checkpoint, tmp_path, options)
