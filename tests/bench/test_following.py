"""Fewer tokens: an artifact against the reference that follows its decisions, and the worth of these decisions."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgetube import bundle as bundles
from edgetube import datasets, formats, metrics, runtimes
from edgetube.bench import following, parity
from edgetube.bundle import Bundle
from edgetube.errors import ParityError
from edgetube.export import pipeline, reduction
from edgetube.precision import Precision
from edgetube.roles import LOGITS
from edgetube.runtimes.base import Tap
from edgetube.runtimes.onnxruntime import Session
from edgetube.runtimes.torch import Reference


@pytest.fixture(scope="module")
def reduced(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = pipeline.Options(keep_tokens="0.5", lowering="gather")
    return pipeline.export_model("onnx-fp32", tiny_checkpoint, tmp_path_factory.mktemp("reduced"), options)


def answers(bundle: Bundle) -> following.Following:
    model = formats.of_bundle(bundle)
    reference, backend = Reference(model.model, model.contract), runtimes.open_bundle(bundle)
    found = following.pair(reference, backend, bundle, (reference, backend))
    assert isinstance(found, following.Following)
    return found


class Silent(Session):
    """An artifact whose runtime shows no inner tensors."""

    def layers(self, names: Sequence[str]) -> tuple[str, ...]:
        return ()


def with_other_order(bundle: Bundle, folder: Path) -> Bundle:
    """The same artifact, but the least similar tokens leave first in block 0."""
    shutil.copytree(bundle.path, folder)
    model = onnx.load(folder / "model.onnx")
    (node,) = (n for n in model.graph.node if n.op_type == "Greater" and n.name.startswith("blocks.0.reduce"))
    node.input[:] = reversed(node.input)
    onnx.save(model, folder / "model.onnx")
    return replace(bundle, path=folder, files={})


def test_the_export_is_named_after_what_is_kept_and_proven_twice(reduced: Bundle) -> None:
    left = reduced.spec.left
    assert reduced.name.endswith(f"-keep{left}.onnx-fp32")
    assert bundles.load(reduced.path).spec.reduction == reduced.spec.reduction
    assert reduced.parity["reduced"]["sqnr"] > 100 > reduced.parity["sqnr"]
    assert reduced.parity["regret"] <= following.REGRET[Precision.FP32]


def test_the_reference_follows_what_the_artifact_decides(reduced: Bundle, tmp_path: Path) -> None:
    """Wrong decisions: the answers agree all the same, and the regret tells."""
    wrong = with_other_order(reduced, tmp_path / "wrong")
    (clip,) = datasets.built_in(1, reduced.labels).clips(reduced.contract)
    for bundle, regret in ((reduced, False), (wrong, True)):
        both = answers(bundle)
        expected, found = both(clip.frames)
        assert metrics.sqnr(expected, found) > 90
        assert both.regret is not None
        assert (both.regret > following.REGRET[Precision.FP32]) is regret


def test_what_is_no_decision_is_one_line(reduced: Bundle) -> None:
    """Indices of tokens that are not there, as of a broken runtime."""

    class Garbage(Session):
        def tap(self, names: Sequence[str]) -> Tap:
            call = super().tap(names)
            return lambda clips: {
                name: value if name == LOGITS else value + 1000 for name, value in call(clips).items()
            }

    model = formats.of_bundle(reduced)
    with Reference(model.model, model.contract) as reference, Garbage(reduced) as backend:
        paired = following.pair(reference, backend, reduced, (reference, backend))
        (clip,) = datasets.built_in(1, reduced.labels).clips(reduced.contract)
        with pytest.raises(ParityError, match="tokens that leave is no index of one"):
            paired(clip.frames)


def test_a_regret_that_is_no_number_stays_one(reduced: Bundle) -> None:
    """And no gate lets it pass."""

    class Nothing(Reference):
        def tap(self, names: Sequence[str]) -> Tap:
            call = super().tap(names)
            return lambda clips: {
                name: value if name == LOGITS else value * np.nan for name, value in call(clips).items()
            }

    model = formats.of_bundle(reduced)
    with Nothing(model.model, model.contract) as reference, runtimes.open_bundle(reduced) as backend:
        paired = following.pair(reference, backend, reduced, (reference, backend))
        for clip in datasets.built_in(2, reduced.labels).clips(reduced.contract):
            paired(clip.frames)
    assert paired.regret is not None
    assert np.isnan(paired.regret)


def test_a_witness_shows_what_an_artifact_decides_that_shows_nothing(reduced: Bundle, tmp_path: Path) -> None:
    """The reference follows the witness; the logits are the artifact's, which are wrong if it decides otherwise."""
    model = formats.of_bundle(reduced)
    reference, witness = Reference(model.model, model.contract), runtimes.open_bundle(reduced)
    (clip,) = datasets.built_in(1, reduced.labels).clips(reduced.contract)
    for bundle, least, most in ((reduced, 90, 200), (with_other_order(reduced, tmp_path / "wrong"), -10, 40)):
        artifact = Silent(bundle)
        assert not following.pair(reference, artifact, bundle, (reference, artifact)).alike
        both = following.pair(reference, artifact, bundle, (reference, artifact), witness)
        assert both.alike
        assert least < metrics.sqnr(*both(clip.frames)) < most
        assert both.regret is not None
        assert both.regret <= following.REGRET[Precision.FP32]


def test_parity_compares_with_all_tokens_and_its_layers_with_as_many(reduced: Bundle, tmp_path: Path) -> None:
    found = parity.measure([reduced], datasets.built_in(6, reduced.labels))
    (one,) = found.measured
    assert 0 < one.parity.sqnr < 90
    assert one.probe.jump is not None
    assert one.probe.jump[1] < 1
    assert one.probe.regret is not None
    failed = {verdict.gate for verdict in parity.DEFAULTS.judge(found) if not verdict.passed}
    assert not failed & {"max-regret", "max-layer-jump", "min-cosine", "min-sqnr"}
    worse = parity.measure([with_other_order(reduced, tmp_path / "wrong")], datasets.built_in(6, reduced.labels))
    assert "max-regret" in {verdict.gate for verdict in parity.DEFAULTS.judge(worse) if not verdict.passed}


def test_only_a_given_cosine_is_asked_for(reduced: Bundle) -> None:
    found = parity.measure([reduced], datasets.built_in(3, reduced.labels))
    given, default = (
        [verdict.limit for verdict in gates.judge(found) if verdict.gate == "min-cosine"]
        for gates in (parity.Gates(min_cosine=0.98), parity.DEFAULTS)
    )
    assert given == [0.98]
    assert default == []


@pytest.mark.slow
def test_a_graph_that_decides_otherwise_is_not_published(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = reduction.First.forward
    monkeypatch.setattr(reduction.First, "forward", lambda self, value: forward(self, -value))
    options = pipeline.Options(keep_tokens="0.5", lowering="gather")
    with pytest.raises(ParityError, match="regret"):
        pipeline.export_model("onnx-fp32", tiny_checkpoint, tmp_path, options)
    assert list(tmp_path.iterdir()) == []
