"""A calibration of awkward models: one token, odd widths, dead and constant activations, NaN."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetube import export, metrics
from edgetube.calibration import calibrate, graphs, moments
from edgetube.calibration.table import ActivationScheme, IntegerFormat
from edgetube.errors import InputError
from edgetube.export import integer
from edgetube.export.canonical import Graph
from edgetube.export.quantize import apply, qdq
from edgetube.spec import TubeSpec
from tests.calibration.models import PARTS, WHOLE, noise, outputs, traced


def changed(**values: float) -> Graph:
    """The model of eight tokens with constants in some initializers of its block."""
    graph = traced()
    known = graphs.initializers(graph.model)
    full = {f"blocks.0.{k.replace('_', '.')}": v for k, v in values.items()}
    arrays = {name: np.full(known[name].shape, value, np.float32) for name, value in full.items()}
    return replace(graph, model=graphs.replace_initializers(graph.model, arrays))


def ratio(graph: Graph, activations: ActivationScheme, folder: Path) -> float:
    """dB of the logits of the written forms on other clips, the worse one."""
    judged = noise(12, 2, "b")
    found = calibrate(
        graph.model,
        graph.roles,
        noise(12, 1, "a"),
        judged,
        export.evaluator(),
        activations=activations,
        form=IntegerFormat(safe_pairs=True),  # exact in the integer kernels of every processor
        workspace=folder,
        max_drop=100.0,
    )
    equalised, table = apply(found, graph)
    exact = outputs(graph.model, judged.frames)
    forms = qdq(equalised.model, table), integer.to_integer_kernels(equalised.model, table)
    assert all(np.isfinite(plan.weight_scales).all() for plan in table.linears)
    return min(metrics.sqnr(exact, outputs(form, judged.frames)) for form in forms)


@pytest.mark.parametrize(("tube", "width", "activations"), [(WHOLE, 13, "int8"), (PARTS, 13, "uint8")])
def test_one_token_and_odd_widths(tube: TubeSpec, width: int, activations: ActivationScheme, tmp_path: Path) -> None:
    assert ratio(traced(tube, width), activations, tmp_path) > 20


@pytest.mark.parametrize(("offset", "activations"), [(0.0, "int8"), (2.5, "uint8"), (-1e-6, "int8")])
def test_an_activation_that_never_changes(offset: float, activations: ActivationScheme, tmp_path: Path) -> None:
    """What `qkv` reads is one number everywhere: nothing, a constant, or next to nothing."""
    assert ratio(changed(norm1_weight=0.0, norm1_bias=offset), activations, tmp_path) > 20


def test_a_linear_of_zeros(tmp_path: Path) -> None:
    assert ratio(changed(mlp_fc1_weight=0.0), "int8", tmp_path) > 20


class TestNotFinite:
    def test_logits(self, tmp_path: Path) -> None:
        graph = changed(mlp_fc1_weight=3e38)
        seen, judged = noise(3, 1, "a"), noise(4, 2, "b")
        options: dict[str, Any] = {"activations": "uint8", "workspace": tmp_path}
        with pytest.raises(InputError, match=r"NaN or infinite logits on 4 of 4 clips, b0 among them; check weights"):
            calibrate(graph.model, graph.roles, seen, judged, export.evaluator(), **options)

    def test_an_activation_is_named(self, tmp_path: Path) -> None:
        graph = changed(mlp_fc1_weight=3e38)
        with pytest.raises(InputError, match=r"NaN or infinite values in blocks\.0\.mlp\.act; check its weights"):
            moments.measure(graph.model, graph.roles, list(noise(2, 1, "a").frames), export.evaluator(), tmp_path)
