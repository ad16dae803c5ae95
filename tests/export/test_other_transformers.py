"""Transformers that are no sparse-tube models through the whole pipeline, to every kind of target that runs here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgetube import demo, export, runtimes
from edgetube.bench import layers
from edgetube.bundle import Bundle
from edgetube.export import int8, pipeline
from edgetube.model.checkpoints import Checkpoint
from edgetube.roles import roles_of
from edgetube.runtimes.torch import Reference
from tests.export.models import OTHERS, model_of
from tests.marks import but

FLOATS = ("onnx-fp32", "onnx-fp16", "openvino-fp32", "litert-fp32", "litert-fp16", "coreml-fp16", "rtx-fp16")
INTEGERS = ("onnx-int8", "openvino-int8", "litert-int8", "coreml-int8", "rtx-int8")
PROCESSORS = dict(zip(OTHERS, ("any", "x86", "arm", "any", "x86", "any"), strict=True))
"""The form of onnx-int8 that is made of each."""


def checkpoint(name: str) -> Checkpoint:
    model, contract = model_of(name)
    return Checkpoint(name, model, contract, tuple(f"class {i}" for i in range(5)), "0" * 64)


def buildable(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if not export.target(name).missing(export.target(name).build_needs)]


@pytest.mark.slow
@pytest.mark.parametrize("name", but(OTHERS, pytest.mark.long, "rotary", "divided"))
def test_float_targets_are_proven(name: str, tmp_path: Path) -> None:
    """The proof compares the answers with the reference, also with the frames in another order, and every layer."""
    names = buildable(FLOATS)
    assert {"onnx-fp32", "onnx-fp16"} <= set(names)
    options = pipeline.Options(lowering="gather")
    for bundle in pipeline.export_models(names, checkpoint(name), tmp_path, options):
        tolerance = export.target(bundle.target).tolerance
        assert tolerance is not None
        assert bundle.status in ("executed", "emulated")
        assert bundle.parity["max_abs_error"] <= tolerance * max(1, bundle.parity["max_abs_logit"])
        compare_layers(bundle, checkpoint(name), 80.0 if bundle.target.endswith("fp32") else 45.0)


def compare_layers(bundle: Bundle, source: Checkpoint, least: float) -> None:
    """Every layer, of every frame where frames are sequences of their own, has at least so many dB."""
    reference, stated = Reference(source.model, source.contract), layers.as_exported(source.model, source.spec)
    roles, clips = roles_of(source.spec), [clip.frames for clip in demo.evaluation(source.contract, 2)]
    wanted = reference.layers(roles.layers)
    device = runtimes.proof_device(bundle.target, bundle.backend)
    with runtimes.open_bundle(bundle, device=device) as backend:
        found = layers.curve(reference, backend, bundle, clips, wanted, stated)
    assert set(roles.landmarks) <= {each.layer for each in found.curve}
    assert min(each.sqnr_db for each in found.curve) > least


@pytest.mark.slow
@pytest.mark.parametrize("name", but(OTHERS, pytest.mark.long, "rotary"))
def test_integer_targets_are_proven(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a tenth of the largest logit, with nearly all products in integers."""
    monkeypatch.setattr(int8, "CALIBRATION_CLIPS", 9)
    monkeypatch.setattr(int8, "JUDGING_CLIPS", 36)
    source = checkpoint(name)
    np.save(tmp_path / "clips.npy", np.stack([clip.frames for clip in demo.evaluation(source.contract, 16)]))
    for target in buildable(INTEGERS):
        settings = {"cpu": PROCESSORS[name]} if target == "onnx-int8" else {}
        options = pipeline.Options(lowering="gather", calib=tmp_path / "clips.npy", max_drop=100.0, settings=settings)
        bundle = pipeline.export_model(target, source, tmp_path / "out", options)
        assert bundle.parity["max_abs_error"] <= 0.1 * max(1, bundle.parity["max_abs_logit"])
        assert bundle.build["int8"]["macs_share"] > 0.95
