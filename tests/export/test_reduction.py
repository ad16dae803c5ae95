"""Static reductions: the answers of the reference, bit-exact decisions, and a graph without data-dependent shapes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetube.contract import InputContract
from edgetube.export import canonical
from edgetube.export.reduction import First, Nearest
from edgetube.export.static import StaticTransformer
from edgetube.export.statistics import graph_statistics
from edgetube.model import checkpoints
from edgetube.model.reduction import leaving_first
from edgetube.reduction import Kind, evenly
from edgetube.roles import roles_of
from edgetube.runtimes.torch import Reference
from edgetube.spec import AXES, ModelSpec, QueryPool, Rotary, TubeSpec
from tests.edgetube.model.test_reduction import SPEC, model_of

FAMILIES: dict[str, ModelSpec] = {
    "tubes with gates": replace(checkpoints.load("demo").spec, gates=(1, 3)),
    "dense with prefix tokens": replace(SPEC, gates=(2,)),
    "rotary with a query pool": replace(
        SPEC, positions="rotary", rotary=Rotary(AXES), readout=("query",), query_pool=QueryPool(2, 96, depth=1)
    ),
    "frames apart": replace(
        SPEC, tubes=(TubeSpec((1, 16, 16), (1, 16, 16)),), per_frame=True, readout=("prefix.0", "mean")
    ),
}


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.data())
def test_places_are_those_of_a_stable_sort(values: list[int], data: st.DataObject) -> None:
    r = data.draw(st.integers(0, len(values)))
    value = torch.tensor([values, values[::-1]], dtype=torch.float32)
    assert torch.equal(First(len(values), r)(value).long(), leaving_first(value, r))


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_the_nearest_of_equal_ones_is_the_first(rows: int, columns: int, seed: int) -> None:
    scores = torch.randint(0, 3, (2, rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    best, nearest = Nearest(columns)(scores)
    assert torch.equal(best, scores.max(dim=2).values)
    assert nearest.tolist() == np.argmax(scores.numpy(), axis=2).tolist()  # numpy's is the first


@pytest.mark.parametrize(
    ("family", "batch"),
    [("tubes with gates", 1), *(pytest.param(family, 2, marks=pytest.mark.slow) for family in FAMILIES)],
)
@pytest.mark.parametrize("kind", ["merge", "drop"])
def test_the_graph_answers_like_the_reference(family: str, kind: Kind, batch: int) -> None:
    plain = FAMILIES[family]
    spec = replace(plain, reduction=evenly(kind, plain.tokens, plain.depth, plain.tokens * 4 // 9))
    model, contract = model_of(spec), InputContract(spec.frames, *spec.size)
    clips = np.random.default_rng(0).integers(0, 256, (batch, *contract.shape), np.uint8)
    expected = Reference(model, contract)(clips)
    static = StaticTransformer(model, contract, batch=batch)
    graph = canonical.trace(static, spec, contract, batch)
    session = ort.InferenceSession(graph.model.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"frames": clips})
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=1e-4)
    assert graph_statistics(graph.model)["macs"] == batch * spec.macs()
    made = {name for node in graph.model.graph.node for name in node.output}
    assert set(roles_of(spec).decisions) <= made
    assert len(roles_of(spec).decisions) == spec.depth * (2 if kind == "merge" else 1)
