"""Export for ONNX Runtime: what its optimiser makes of the graphs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx

from edgetube.export import canonical
from edgetube.export.canonical import Graph
from edgetube.runtimes.onnxruntime import optimise
from tests.export import models


def optimised_operators(graph: Graph, folder: Path) -> Counter[str]:
    canonical.save(graph.model, folder / "model.onnx")
    optimised = onnx.load(optimise(folder / "model.onnx", folder / "optimised.onnx"))
    return Counter(node.op_type for node in optimised.graph.node)


def test_rotary_positions_leave_fusions_as_they_were(tmp_path: Path) -> None:
    """The CPU provider has no fused attention for either; products, norms and GELUs are fused as without rotation."""
    plain, turned = (optimised_operators(models.trace_vit(kind), tmp_path) for kind in ("plain", "rotary"))
    for kind in ("MatMul", "Gemm", "FusedMatMul", "LayerNormalization", "SkipLayerNormalization", "Gelu", "Softmax"):
        assert turned[kind] == plain[kind], kind
    assert turned["Transpose"] == plain["Transpose"]
    assert turned.total() <= 1.5 * plain.total()


def test_divided_attention_is_one_more_attention_in_each_block(tmp_path: Path) -> None:
    """Two linears and two products, a LayerNorm and a softmax, and the same four transpositions: of heads alone."""
    plain, divided = (optimised_operators(models.trace_vit(kind), tmp_path) for kind in ("plain", "divided"))
    blocks = plain["Softmax"]
    more = {"Softmax": 1, "Transpose": 4, "Gelu": 0}
    for kind, each in more.items():
        assert divided[kind] == plain[kind] + each * blocks, kind
    products, norms = ("MatMul", "Gemm", "FusedMatMul"), ("LayerNormalization", "SkipLayerNormalization")
    assert sum(map(divided.get, products, (0,) * 3)) == sum(map(plain.get, products, (0,) * 3)) + 4 * blocks
    assert sum(map(divided.get, norms, (0,) * 2)) == sum(map(plain.get, norms, (0,) * 2)) + blocks


def test_sigmoid_activations_are_one_operator(tmp_path: Path) -> None:
    for name in ("rotary", "gated-mlp"):
        spec = models.SPECS[name]
        found = optimised_operators(models.trace(name), tmp_path)
        mlps = spec.depth + (spec.query_pool.depth + 1 if spec.query_pool else 0)
        assert found["QuickGelu"] == mlps
        assert "Sigmoid" not in found
