"""The pipeline end to end: what is published was proven, what fails leaves nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import edgetube
from edgetube import bundle as bundles
from edgetube import export, formats, runtimes
from edgetube.bench.following import REGRET
from edgetube.errors import InputError, MissingPackageError, ParityError, SpecError
from edgetube.export import onnxruntime as exporter
from edgetube.export import pipeline, proof, tokenizer
from edgetube.export.base import BuildContext, Built
from edgetube.model import checkpoints
from edgetube.precision import Precision
from edgetube.reduction import Kind
from edgetube.runtimes.torch import Reference

GATHER = pipeline.Options(lowering="gather")


@pytest.mark.long
def test_every_target_that_can_be_built_here_answers_like_pytorch(
    tiny_checkpoint: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    names = [t.name for t in export.targets().values() if not t.missing(t.build_needs + t.run_needs)]
    assert {"onnx-fp32", "onnx-fp16"} <= set(names)
    checkpoint = checkpoints.load(tiny_checkpoint)
    reference = Reference(checkpoint.model, checkpoint.contract)
    clips = rng.integers(0, 256, (2, *checkpoint.contract.shape), np.uint8)
    for bundle in pipeline.export_models(names, tiny_checkpoint, tmp_path, GATHER):
        with edgetube.Runtime(bundle) as rt:
            error = np.abs(rt(clips) - reference(clips)).max()
        tolerance = export.target(bundle.target).tolerance or 0.1  # INT8 has a budget of accuracy, not of logits
        assert error <= tolerance * max(1, np.abs(reference(clips)).max())
        assert bundle.status == "executed"


@pytest.mark.long
@pytest.mark.parametrize("reduce", ["merge", "drop"])
def test_every_target_with_fewer_tokens_answers_like_the_reference(
    tiny_checkpoint: Path, tmp_path: Path, reduce: Kind
) -> None:
    """The reference leaves the same tokens out, where the runtime shows which they are."""
    # The tiny model does not bear compressed weights: a proof refuses them with all tokens, too.
    compressed = (Precision.W8, Precision.W4)
    known = [t for t in export.targets().values() if not t.all_tokens and t.precision not in compressed]
    buildable = [t for t in known if not t.missing(t.build_needs)]
    able = [t for t in buildable if runtimes.proof_device(t.name, t.backend) or not t.missing(t.run_needs)]
    assert {"onnx-fp32", "onnx-fp16"} <= {target.name for target in able}
    # Two of 252 clips are more than INT8 may lose by default, and the tiny model's answers are nearly ties.
    options = replace(GATHER, keep_tokens="0.5", reduce=reduce, max_drop=2.0)
    for bundle in pipeline.export_models([target.name for target in able], tiny_checkpoint, tmp_path, options):
        assert bundle.spec.reduction is not None
        assert bundle.status in ("executed", "emulated", "deferred")
        tolerance = export.target(bundle.target).tolerance or 0.1
        found = bundle.parity["reduced"]
        assert found["max_abs_error"] <= tolerance * max(1, found["max_abs_logit"])
        # On a device, these two show neither inner tensors nor a witness of them.
        if bundle.status == "emulated" or bundle.backend not in ("tensorrt", "coreml"):
            assert bundle.parity["regret"] <= REGRET[bundle.precision]


def test_a_target_that_cannot_leave_tokens_out_says_so_before_any_work(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = replace(export.target("onnx-fp32"), name="slow-npu", all_tokens="it has no Gather")
    monkeypatch.setattr(export, "target", lambda name: target)
    stages: list[str] = []
    with pytest.raises(InputError, match=r"^slow-npu cannot drop tokens: it has no Gather; use .*onnx-fp32"):
        next(
            pipeline.export_models(
                ["slow-npu"],
                tiny_checkpoint,
                tmp_path,
                replace(GATHER, keep_tokens="0.5", reduce="drop"),
                lambda stage, *_: stages.append(str(stage)),
            )
        )
    assert set(stages) == {"load checkpoint"}


def test_the_manifest_says_what_was_chosen_and_measured(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    bundle = bundles.load(tiny_bundle)
    assert bundle.name == "tiny.onnx-fp32"
    assert bundle.checkpoint["source"] == str(tiny_checkpoint)
    assert bundle.checkpoint["sha256"] == bundles.sha256(tiny_checkpoint)
    assert bundle.build["lowering"]["chosen"] == "gather"
    assert set(bundle.build["lowering"]["max_abs_error"]) == {"gather"}
    assert bundle.build["lowering"]["dropped"] == {}
    assert bundle.parity["clips"] == proof.PROOF_CLIPS
    assert bundle.parity["max_abs_error"] < 1e-4
    assert bundle.versions["torch"].partition("+")[0] == str(torch.__version__).partition("+")[0]
    json.dumps(bundle.to_json())


@pytest.mark.slow
def test_the_lowering_is_chosen_by_time_and_the_times_are_kept(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = pipeline.export_model("onnx-fp32", tiny_checkpoint, tmp_path)
    lowering = bundle.build["lowering"]
    times = {name: timing["p50_ms"] for name, timing in lowering["timings"].items()}
    assert set(times) == set(tokenizer.LOWERINGS)
    assert lowering["chosen"] == min(times, key=lambda name: times[name])


def test_another_clip_shape_and_classifier(tiny_checkpoint: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    options = pipeline.Options(frames=12, size=(40, 40), head="other", lowering="gather")
    bundle = pipeline.export_model("onnx-fp32", tiny_checkpoint, tmp_path, options)
    assert bundle.contract.shape == (12, 40, 40, 3)
    assert bundle.labels == ("no", "yes")
    moved = formats.of_bundle(bundle)
    clips = rng.integers(0, 256, (1, 12, 40, 40, 3), np.uint8)
    with edgetube.Runtime(bundle) as rt:
        np.testing.assert_allclose(rt(clips), Reference(moved.model, moved.contract)(clips), atol=1e-5)


def test_a_wrong_artifact_is_not_published(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = exporter.build

    def wrong(context: BuildContext) -> Built:
        built = right(context)
        model = onnx.load(context.folder / "model.onnx")
        weight = next(w for w in model.graph.initializer if w.name == "blocks.1.mlp.fc2.weight")
        values = onnx.numpy_helper.to_array(weight) * np.float32(1.01)
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        onnx.save(model, context.folder / "model.onnx")
        return built

    monkeypatch.setattr(exporter, "build", wrong)
    with pytest.raises(ParityError, match=r"tiny\.onnx-fp32 differs from the reference by .* nothing was written"):
        pipeline.export_model("onnx-fp32", tiny_checkpoint, tmp_path, GATHER)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_lowering_is_dropped_and_named(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = tokenizer.gemm_weight
    monkeypatch.setattr(tokenizer, "gemm_weight", lambda weight: right(weight).flip(0))
    told: list[str] = []
    bundle = pipeline.export_model("onnx-fp32", tiny_checkpoint, tmp_path, progress=lambda *s: told.append(str(s[0])))
    lowering = bundle.build["lowering"]
    assert lowering["chosen"] == "conv2d"
    assert set(lowering["dropped"]) == {"gather", "slice"}
    assert "times what float32 rounding explains" in lowering["dropped"]["gather"]
    assert [stage.split(":")[0] for stage in told if stage.startswith("drop")] == [
        "drop lowering gather",
        "drop lowering slice",
    ]


@pytest.mark.parametrize("lowering", ["gather", "slice"])
def test_a_wrong_lowering_that_was_asked_for_stops_the_export(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lowering: str
) -> None:
    right = tokenizer.gemm_weight
    monkeypatch.setattr(tokenizer, "gemm_weight", lambda weight: right(weight).flip(0))
    with pytest.raises(ParityError, match=rf"tiny: no lowering gives the tokens .*{lowering}: .* nothing was written"):
        pipeline.export_model("onnx-fp32", tiny_checkpoint, tmp_path, pipeline.Options(lowering=lowering))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_pip_line(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(export.target("onnx-fp32")), "missing", lambda *_: ("onnxscript",))
    with pytest.raises(MissingPackageError, match=r"needs onnxscript; install with: pip install 'edgetube\[export\]'"):
        pipeline.export_model("onnx-fp32", tiny_checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch": 0}, InputError, "batch is 0"),
        ({"lowering": "magic"}, InputError, "no lowering is called 'magic'"),
        ({"image": True, "frames": 8}, InputError, "an image model takes 1 frame; given 8"),
        ({"frames": 3}, SpecError, r"tube 0 \(4x8x8.* time is 3, minimum 6"),
        ({"size": (8, 48)}, SpecError, "height is 8, minimum 16"),
        ({"head": "cats"}, InputError, "no classifier 'cats'; it has motion, other"),
    ],
)
def test_impossible_options_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pipeline.export_model("onnx-fp32", tiny_checkpoint, tmp_path, pipeline.Options(**options))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_target_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'onnx-fp8'; there are .*onnx-fp16, onnx-fp32"):
        pipeline.export_model("onnx-fp8", out=tmp_path)


def test_progress_is_told_and_ends(tiny_checkpoint: Path, tmp_path: Path) -> None:
    told = []
    pipeline.export_model("onnx-fp32", tiny_checkpoint, tmp_path, GATHER, lambda *step: told.append(step))
    stages = dict.fromkeys(stage for stage, _, _ in told)
    assert next(iter(stages)) == "load checkpoint"
    for stage in stages:
        done, total = [(d, t) for s, d, t in told if s == stage][-1]
        assert done == total > 0
