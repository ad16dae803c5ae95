"""A calibration of transformers that are no sparse-tube models: what is quantised, and what stays float."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from edgetube import export, metrics
from edgetube.calibration import graphs, moments
from edgetube.calibration.clips import Clips
from edgetube.calibration.graphs import CENTRED, SCALED
from edgetube.calibration.layerwise import CalibrationState, LayerwiseCalibrator
from edgetube.calibration.table import ActivationScheme
from edgetube.roles import QUERY_POOL
from tests.calibration.models import outputs
from tests.export.models import OTHERS, SPECS, model_of, trace
from tests.marks import but

SCHEMES: tuple[ActivationScheme, ...] = ("uint8", "int8")


@cache
def clips(name: str, seed: int) -> Clips:
    """Clips of smooth brightness with a little noise, not the same everywhere."""
    rng, (t, h, w, c) = np.random.default_rng(seed), model_of(name)[1].shape
    slopes = rng.normal(size=(12, t, c, 2)) * 60
    y, x = np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing="ij")
    frames = 128 + slopes[..., :1, None] * y + slopes[..., 1:, None] * x
    frames = np.moveaxis(frames, 2, -1) + rng.normal(size=(12, t, h, w, c)) * 20
    names = tuple(f"{seed}.{i}" for i in range(12))
    return Clips("smooth", np.clip(frames, 0, 255).astype(np.uint8), np.full(12, -1), names, f"{seed}")


@pytest.fixture(
    scope="module",
    params=but(
        [(name, scheme) for name in OTHERS for scheme in SCHEMES],
        pytest.mark.slow,
        ("dense", "int8"),
        ("divided", "uint8"),
        ("rotary", "uint8"),
    ),
    ids=str,
)
def calibrated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, LayerwiseCalibrator, CalibrationState]:
    name, scheme = request.param
    graph, folder = trace(name), tmp_path_factory.mktemp("calibration")
    model = graphs.insert_equalization_sites(graph.model, graph.roles, scheme)
    calibrator = LayerwiseCalibrator(model, graph.roles, clips(name, 1), export.evaluator(), scheme, folder)
    state = CalibrationState()
    calibrator.calibrate(state)
    calibrator.correct_biases(state, frozenset(state.choices))
    return name, calibrator, state


Calibration = tuple[str, LayerwiseCalibrator, CalibrationState]


def test_every_linear_is_calibrated_and_the_answers_stay(calibrated: Calibration) -> None:
    """What is folded changes nothing; what is rounded, little, on other clips too."""
    name, calibrator, state = calibrated
    assert {*trace(name).roles.linears} <= {*state.choices}
    others = clips(name, 2).frames
    exact = outputs(trace(name).model, others)
    folded = graphs.replace_initializers(calibrator.model, state.values)
    np.testing.assert_allclose(outputs(folded, others), exact, atol=2e-5)
    rounded = outputs(calibrator.fake_quantized(state, frozenset(state.choices)), others)
    assert metrics.sqnr(exact, rounded) > 25


def test_rotations_stay_float(calibrated: Calibration) -> None:
    name, calibrator, state = calibrated
    model = calibrator.fake_quantized(state, frozenset(state.choices))
    rounded = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert rounded == {linear.activation for linear in calibrator.linears}
    turned = {each for node in model.graph.node if ".turn_" in node.name for each in (*node.input, *node.output)}
    assert not {each.removesuffix(".dequantized") for each in turned} & rounded
    assert bool(turned) == (SPECS[name].rotary is not None)


def test_what_the_last_linear_of_an_mlp_reads_may_be_equalised(calibrated: Calibration) -> None:
    """Of a gated MLP, the product of its halves; of others, what their activation gives."""
    name, calibrator, state = calibrated
    spec, suffix = SPECS[name], CENTRED if calibrator.activations == "int8" else SCALED
    known = {linear.name: linear.activation for linear in calibrator.linears}
    inner = "mul" if spec.gated_mlp else "act"
    for block in range(spec.depth):
        assert known[f"blocks.{block}.mlp.fc2"] == f"blocks.{block}.mlp.{inner}{suffix}"
    if spec.query_pool:
        assert known[f"{QUERY_POOL}.mlp.fc2"] == f"{QUERY_POOL}.mlp.act{suffix}"
    assert {known[linear] for linear in known if linear.endswith("mlp.fc2")} == {*calibrator.sites}
    assert {*state.choices} == {*known}


@pytest.mark.parametrize("name", OTHERS)
def test_moments_are_those_of_every_row(name: str, tmp_path: Path) -> None:
    """Of a model of single frames, the rows of all frames."""
    model, frames = trace(name).model, [clips(name, 1).frames[i] for i in range(2)]
    found = moments.measure(model, trace(name).roles, frames, export.evaluator(), tmp_path)
    known = {linear.weight: linear.activation for linear in graphs.linears(model)}
    assert {f"{linear}.weight" for linear in trace(name).roles.linears} <= {*found}
    for weight, stored in found.items():
        part = graphs.extract_subgraph(model, [known[weight]])
        rows = outputs(part, frames).reshape(-1, len(stored.mean))
        np.testing.assert_allclose(stored.mean, rows.mean(axis=0), rtol=1e-4, atol=1e-4)
