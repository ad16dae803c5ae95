"""Q/DQ graphs: what is in them, and that a table only fits its own graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgetube import calibration, datasets, export
from edgetube.calibration import Calibrated, graphs
from edgetube.calibration.clips import collect
from edgetube.calibration.table import ActivationScheme, Range
from edgetube.errors import InputError
from edgetube.export import canonical, quantize, static, tokenizer
from edgetube.model import checkpoints
from edgetube.model.checkpoints import Checkpoint
from tests.export import models
from tests.export.test_torchgraph import table_of


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return checkpoints.load(tiny_checkpoint).select("motion")


def traced(checkpoint: Checkpoint, lowering: str = "gather", batch: int = 1) -> Any:
    module = static.StaticTransformer(checkpoint.model, checkpoint.contract, lowering, batch=batch)
    return canonical.trace(module, checkpoint.spec, checkpoint.contract, batch)


@pytest.fixture(scope="module")
def calibrated(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    folder = tmp_path_factory.mktemp("q")
    source = datasets.built_in_calibration(12, checkpoint.labels)
    clips = collect(source, checkpoint.contract, checkpoint.labels, folder)
    graph = traced(checkpoint)
    options: dict[str, Any] = {"activations": "uint8", "workspace": folder, "max_drop": 100.0}
    return calibration.calibrate(graph.model, graph.roles, clips, clips, export.evaluator(), **options)


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["int8", "uint8"])
def test_only_linears_are_quantised_with_one_pair_a_tensor(
    checkpoint: Checkpoint, calibrated: Calibrated, activations: ActivationScheme
) -> None:
    graph, table = quantize.apply(calibrated, traced(checkpoint))
    model = quantize.qdq(graph.model, table, activations=activations)
    makers = {name: node for node in model.graph.node for name in node.output}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["QuantizeLinear"] == len(table.ranges)
    for node in model.graph.node:
        read = [makers[name].op_type for name in node.input if name in makers]
        if node.op_type == "MatMul" and read == ["DequantizeLinear"] * 2:
            scale, zero = (weights[name] for name in makers[node.input[0]].input[1:])
            assert numpy_helper.to_array(zero).dtype == np.dtype(activations)
            assert scale.data_type == onnx.TensorProto.FLOAT
            assert weights[makers[node.input[1]].input[0]].data_type == onnx.TensorProto.INT8
        elif node.op_type not in ("DequantizeLinear", "QuantizeLinear"):
            assert "DequantizeLinear" not in read, f"{node.name} reads integers"
    assert not any(t.name.endswith(".bias") and t.data_type != onnx.TensorProto.FLOAT for t in model.graph.initializer)


def test_the_int8_weights_take_a_quarter(checkpoint: Checkpoint, calibrated: Calibrated) -> None:
    graph, table = quantize.apply(calibrated, traced(checkpoint))
    model = quantize.qdq(graph.model, table)
    names = {plan.weight for plan in table.quantised}
    before = sum(len(t.raw_data) for t in graph.model.graph.initializer if t.name in names)
    after = sum(len(t.raw_data) for t in model.graph.initializer if t.name.endswith(".int8"))
    assert after * 4 == before > 0


def named(model: Any) -> Any:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.slow
@pytest.mark.parametrize("lowering", tokenizer.LOWERINGS)
def test_one_calibration_serves_every_lowering_and_batch(
    checkpoint: Checkpoint, calibrated: Calibrated, lowering: str, rng: np.random.Generator
) -> None:
    graph, table = quantize.apply(calibrated, traced(checkpoint, lowering, 2))
    call = export.evaluator()(quantize.qdq(graph.model, table))
    same, table1 = quantize.apply(calibrated, traced(checkpoint))
    expected = export.evaluator()(quantize.qdq(same.model, table1))
    clips = np.stack([c.frames for c in datasets.built_in(2, ()).clips(checkpoint.contract)])
    (got,) = call({"frames": clips})
    each = np.concatenate([expected({"frames": clip[None]})[0] for clip in clips])
    np.testing.assert_allclose(got, each, atol=0.05 if lowering == "conv2d" else 1e-3)
    tubes = [plan for plan in table.linears if plan.name.startswith("tubes")]
    assert {plan.precision for plan in tubes} == {"float" if lowering == "conv2d" else "int8"}
    before, after = (named(model) for model in (traced(checkpoint, lowering, 2).model, graph.model))
    kept = [np.array_equal(before[f"{plan.name}.weight"], after[f"{plan.name}.weight"]) for plan in tubes]
    assert kept == [lowering == "conv2d"] * len(tubes)  # what stays float is not rounded


@pytest.mark.slow
def test_a_table_of_another_model_is_refused(checkpoint: Checkpoint, calibrated: Calibrated) -> None:
    graph, table = quantize.apply(calibrated, traced(checkpoint))
    with pytest.raises(InputError, match="a table does not carry over"):
        quantize.qdq(traced(checkpoint).model, table)
    assert quantize.qdq(graph.model, table)


@pytest.mark.parametrize("name", ["paper", "cosine", "rotary"])
def test_outputs_of_quantised_linears_pass_through_integers_where_asked(name: str) -> None:
    """All that reads them reads what was rounded; logits and linears in float are not rounded."""
    source = models.trace(name).model
    table = table_of(source, "uint8")
    last, spared = table.linears[-1], table.linears[1]
    given = graphs.inner_linear_outputs(source)
    assert given[last.name] == ()
    ranges = {tensor: Range(-1.0, 1.0, "test") for tensors in given.values() for tensor in tensors}
    plans = tuple(replace(plan, precision="float") if plan == spared else plan for plan in table.linears)
    table = replace(table, ranges={**ranges, **table.ranges}, linears=plans)
    plain, rounded = quantize.qdq(source, table), quantize.qdq(source, table, outputs=True)
    assert [value.name for value in rounded.graph.output] == ["logits"]
    inputs = {plan.activation for plan in table.quantised}
    expected = {tensor for plan in table.quantised for tensor in given[plan.name]}
    for model, tensors in ((plain, inputs), (rounded, inputs | expected)):
        made = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
        assert made == tensors
    readers = {node.op_type for node in rounded.graph.node for tensor in node.input if tensor in expected - inputs}
    assert readers == {"QuantizeLinear"}
    assert set(given[spared.name]) & expected == set()
    onnx.checker.check_model(rounded, full_check=True)
