"""Graphs with Q/DQ pairs, computed by ONNX Runtime on the CPU."""

from __future__ import annotations

from collections import defaultdict

import onnx
import pytest

from edgetube import metrics
from edgetube.export import pairs
from edgetube.export.statistics import byte_casts
from edgetube.export.tokenizer import LOWERINGS
from tests.export import models


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", models.SPECS)
def test_pixels_in_pairs_are_the_same_pixels(name: str, lowering: str) -> None:
    plain, frames = models.trace(name, lowering).model, models.noise(name)
    model = pairs.pixel_pairs(plain)
    assert not byte_casts(model)
    assert metrics.sqnr(models.run(plain, frames), models.run(model, frames)) > 100


def test_every_operator_on_pixels_stands_between_a_pair() -> None:
    model = pairs.pixel_pairs(models.trace("paper").model)
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    readers: defaultdict[str, list[str]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node.op_type)
    gathers = list(models.nodes(model, "Gather"))
    assert gathers
    for node in gathers:
        assert makers[node.input[0]] == "DequantizeLinear"
        assert readers[node.output[0]] == ["QuantizeLinear"]


def test_pixels_are_exact_in_float16() -> None:
    model = pairs.pixel_pairs(models.trace("paper").model)
    scale = models.constants(model)[pairs.PIXELS[0]]
    assert all(float(scale) * pixel == (scale.astype("float16") * pixel) for pixel in range(256))


def test_the_graph_is_left_as_it_was() -> None:
    model = models.trace("image").model
    before = onnx.ModelProto.FromString(model.SerializeToString())
    pairs.pixel_pairs(model)
    assert model == before
