"""Integer kernels against the Q/DQ graph of the same table, evaluated operator by operator."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgetube import calibration, datasets, export
from edgetube.calibration.clips import collect
from edgetube.calibration.table import ActivationScheme, CalibrationTable, IntegerFormat
from edgetube.errors import InputError, ParityError
from edgetube.export import canonical, integer, onnxruntime, quantize, rewrite, static
from edgetube.export.canonical import Graph
from edgetube.model import checkpoints
from edgetube.runtimes.onnxruntime import evaluate
from tests.export import models

Both = dict[str, tuple[onnx.ModelProto, CalibrationTable]]
"""(graph, table) by scheme."""

FORMS = {"any": ("uint8", False), "x86": ("uint8", True), "arm": ("int8", False)}


@pytest.fixture(scope="module")
def graph(tiny_checkpoint: Path) -> Graph:
    c = checkpoints.load(tiny_checkpoint).select("motion")
    return canonical.trace(static.StaticTransformer(c.model, c.contract, "gather"), c.spec, c.contract)


@pytest.fixture(scope="module")
def clips(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    c = checkpoints.load(tiny_checkpoint).select("motion")
    return collect(datasets.built_in_calibration(9, c.labels), c.contract, c.labels, tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def calibrated(graph: Graph, clips: Any, tmp_path_factory: pytest.TempPathFactory) -> Both:
    found: Both = {}
    for scheme in get_args(ActivationScheme):
        made = calibration.calibrate(
            graph.model,
            graph.roles,
            clips,
            clips,
            export.evaluator(),
            activations=scheme,
            form=IntegerFormat(safe_pairs=True),
            workspace=tmp_path_factory.mktemp(scheme),
            max_drop=100.0,
        )
        applied, table = quantize.apply(made, graph)
        found[scheme] = applied.model, table
    return found


def logits(model: Any, clips: Any) -> Any:
    call = evaluate(model.SerializeToString())
    return np.concatenate([call({"frames": np.asarray(frames)[None]})[0] for frames in clips.frames])


@pytest.mark.parametrize("form", FORMS)
def test_kernels_compute_what_the_pairs_say(calibrated: Both, clips: Any, form: str) -> None:
    scheme, unsigned = FORMS[form]
    model, table = calibrated[scheme]
    ours = logits(integer.to_integer_kernels(model, table, unsigned_weights=unsigned), clips)
    pairs = logits(quantize.qdq(model, table), clips)
    exact = logits(model, clips)
    if scheme == "uint8":
        # A float that lies between two integers may fall to either side, in either graph.
        assert np.abs(ours - pairs).max() < 0.25 * np.abs(pairs - exact).max() + 1e-4
    else:  # here pixels are exact, behind Q/DQ they are rounded to 128 levels
        assert np.abs(ours - exact).max() < 2 * np.abs(pairs - exact).max()


@pytest.mark.parametrize("form", FORMS)
def test_types_are_those_of_the_form(calibrated: Both, form: str) -> None:
    scheme, unsigned = FORMS[form]
    model, table = calibrated[scheme]
    made = integer.to_integer_kernels(model, table, unsigned_weights=unsigned)
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    kernels = [node for node in made.graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(kernels) == len(table.quantised)
    for node in kernels:
        pixels = node.input[0] not in {q.output[0] for q in made.graph.node if q.op_type == "QuantizeLinear"}
        assert known[node.input[4]].dtype == ("uint8" if pixels else scheme)
        assert known[node.input[1]].dtype == ("uint8" if unsigned else "int8")
        assert (known[node.input[5]] == 128) if unsigned else node.input[5] == ""
    assert any(node.input[0] not in {q.output[0] for q in made.graph.node if q.op_type == "QuantizeLinear"} for node in
               kernels), "the tubes multiply pixels as they are"  # fmt: skip


def test_what_is_left_over_is_float_and_fused(calibrated: Both) -> None:
    model, table = calibrated["uint8"]
    kinds = Counter(node.op_type for node in integer.to_integer_kernels(model, table).graph.node)
    assert kinds["MultiHeadAttention"] == 2
    assert kinds["DequantizeLinear"] == kinds["Transpose"] == 0
    assert kinds["QuantizeLinear"] == sum("tubes" not in plan.name for plan in table.quantised)


@pytest.mark.parametrize("name", ["dense", "divided"])
def test_fused_attention_answers_alike(name: str) -> None:
    """Also where heads are made of other sequences of the tokens."""
    traced, frames = models.trace(name, batch=2), models.noise(name, 2)
    nodes, shapes = integer._fuse_attention(list(traced.model.graph.node), models.constants(traced.model))
    fused = integer._model(traced.model, nodes, shapes)
    kinds = Counter(node.op_type for node in fused.graph.node)
    assert kinds["MultiHeadAttention"] == len(traced.roles.attention)
    assert kinds["Softmax"] == kinds["Transpose"] == 0
    np.testing.assert_allclose(models.run(fused, frames), models.reference(name, frames), atol=2e-5)


def test_a_product_behind_a_split_becomes_one_for_each_part(calibrated: Both, clips: Any) -> None:
    model, table = calibrated["uint8"]
    pairs = quantize.qdq(model, table)
    split = rewrite.separate_projections(pairs)
    assert {node.op_type for node in pairs.graph.node} - {node.op_type for node in split.graph.node} == {"Split"}
    assert integer.count_integer_products(split) == integer.count_integer_products(pairs) + 2 * 2
    np.testing.assert_allclose(logits(split, clips), logits(pairs, clips), atol=1e-5)


def test_a_table_of_another_model_is_refused(calibrated: Both, graph: Graph) -> None:
    with pytest.raises(InputError, match="a table does not carry over"):
        integer.to_integer_kernels(graph.model, calibrated["uint8"][1])


def test_onnxruntime_runs_every_kernel(calibrated: Both, tmp_path: Path) -> None:
    model, table = calibrated["uint8"]
    canonical.save(integer.to_integer_kernels(model, table), tmp_path / "model.onnx")
    assert [kernel for kernel, _ in onnxruntime.integer_products(tmp_path / "model.onnx")] == [
        "MatMulIntegerToFloat"
    ] * len(table.quantised)


def test_a_float_fallback_is_counted_as_one(calibrated: Both, tmp_path: Path) -> None:
    """Without its QuantizeLinear one product is a float one, whatever its weights are kept in."""
    model, table = calibrated["uint8"]
    pairs = quantize.qdq(model, table)
    first = next(node for node in pairs.graph.node if node.op_type == "MatMul" and "qkv" in node.name)
    first.input[0] = first.input[0].removesuffix(".dequantized")
    onnx.save(pairs, tmp_path / "model.onnx")
    executed = len(onnxruntime.integer_products(tmp_path / "model.onnx"))
    assert executed < len(table.quantised)
    with pytest.raises(ParityError, match=rf"computes {len(table.quantised) - executed} of {len(table.quantised)} "):
        integer.assert_integer_coverage("ONNX Runtime", len(table.quantised), executed)
    integer.assert_integer_coverage("ONNX Runtime", 3, 3)


def test_openvino_runs_every_product(calibrated: Both, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from edgetube.export import openvino

    model, table = calibrated["uint8"]
    pairs = rewrite.separate_projections(quantize.qdq(model, table))
    openvino.convert(pairs, tmp_path / "model.xml", compress=False)
    products = openvino.integer_products(tmp_path / "model.xml", ["bf16", "f32"])
    assert len(products) == integer.count_integer_products(pairs)
    openvino.convert(model, tmp_path / "float.xml", compress=False)
    assert openvino.integer_products(tmp_path / "float.xml", ["f32"]) == []
