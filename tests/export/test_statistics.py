"""Statistics of canonical graphs against the formulas of the model."""

from __future__ import annotations

import math

import pytest
from onnx import TensorProto

from edgetube.export.statistics import graph_statistics, tensor_shapes
from edgetube.export.tokenizer import LOWERINGS
from tests.export.models import SPECS, model_of, nodes, trace


def test_statistics_count_what_the_formulas_count() -> None:
    traced = trace("paper")
    statistics = graph_statistics(traced.model)
    assert statistics["macs"] == SPECS["paper"].macs()
    assert statistics["max_rank"] == 5
    assert statistics["nodes"] == len(traced.model.graph.node) == sum(statistics["operators"].values())
    model = model_of("paper")[0]
    learned = sum(parameter.numel() for parameter in model.parameters())
    table = SPECS["paper"].tokens * 24  # biases and positions of the tubes
    other = sum(p.numel() for p in model.classifiers["other"].parameters())
    assert statistics["parameters"] == learned + table - other - 4 * 24 - 1  # tube biases folded, pool bias dropped


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", SPECS)
def test_the_costs_of_a_spec_are_those_of_its_graph(name: str, lowering: str) -> None:
    assert SPECS[name].macs() == graph_statistics(trace(name, lowering).model)["macs"]


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", SPECS)
def test_only_voxels_that_tubes_touch_become_float(name: str, lowering: str) -> None:
    model = trace(name, lowering).model
    types = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.input, *model.graph.value_info]}
    known = tensor_shapes(model)
    cast = sum(math.prod(known[n.input[0]]) for n in nodes(model, "Cast") if types[n.input[0]] == TensorProto.UINT8)
    spec = SPECS[name]
    touched = (spec.frames if spec.per_frame else 1) * sum(
        3 * math.prod(spec.tubes[i].kernel) * spec.tubes[i].merge * math.prod(grid)
        for i, grid in zip(spec.active, spec.grids, strict=True)
    )
    assert cast == touched == graph_statistics(model)["voxels"]
