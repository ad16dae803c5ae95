"""Graphs with Q/DQ pairs, computed by ONNX Runtime on the CPU."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from edgetube import export, metrics
from edgetube.calibration import graphs, numeric
from edgetube.calibration.table import ActivationScheme, CalibrationTable, LinearPlan, Range
from edgetube.errors import InputError
from edgetube.export import pairs
from edgetube.export import qnn as exporter
from edgetube.export.onnxruntime import evaluate
from edgetube.export.statistics import byte_casts
from edgetube.export.tokenizer import LOWERINGS
from tests.export import models
from tests.marks import but


@pytest.mark.parametrize("lowering", but(LOWERINGS, pytest.mark.slow, "gather"))
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


@pytest.mark.parametrize("name", models.SPECS)
def test_what_only_moves_values_stays_in_the_range_of_its_input(name: str) -> None:
    """Every value of an output of `graphs.MOVES` is one of the first input: the range need not be observed."""
    model = models.trace(name).model
    moves = [node for node in model.graph.node if node.op_type in graphs.MOVES]
    floats = {value.name for value in model.graph.value_info if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    moves = [node for node in moves if node.input[0] in floats]
    assert moves
    names = list(dict.fromkeys(tensor for node in moves for tensor in (node.input[0], *node.output)))
    answers = evaluate(graphs.extract_subgraph(model, names))({"frames": models.noise(name)})
    values = dict(zip(names, answers, strict=True))
    for node in moves:
        for output in node.output:
            assert np.isin(values[output], values[node.input[0]]).all(), node.name


def table_of(name: str, target: str, lowering: str = "gather") -> CalibrationTable:
    """All linears in integers, with the ranges of the clip of noise."""
    graph, frames = models.trace(name, lowering), models.noise(name)
    request = exporter.calibration_request(graph, export.target(target))
    linears, known = graphs.linears(graph.model), graphs.initializers(graph.model)
    names = list(dict.fromkeys([*request.tensors, *request.wide, *(linear.activation for linear in linears)]))
    values = evaluate(graphs.extract_subgraph(graph.model, names))({"frames": frames})
    ranges = {
        name: Range(min(0.0, float(value.min())), max(0.0, float(value.max())), "test")
        for name, value in zip(names, values, strict=True)
    }
    plans = []
    for linear in linears:
        scales = tuple(float(scale) for scale in np.abs(known[linear.weight]).max(axis=0) / 127)
        plans.append(LinearPlan(linear.name, linear.activation, linear.weight, scales, "int8"))
    scheme: ActivationScheme = exporter.activation_scheme(export.target(target))
    return CalibrationTable(graphs.digest(graph.model), {}, scheme, ranges, tuple(plans))


def integers(name: str, target: str = "qnn-w8a16", lowering: str = "gather") -> pairs.IntegerGraph:
    table = table_of(name, target, lowering)
    return pairs.integer_pairs(models.trace(name, lowering).model, table, narrow=target == "qnn-w8a8")


def kind_of(model: onnx.ModelProto, name: str) -> str:
    """The type of a tensor."""
    values = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    values |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return onnx.TensorProto.DataType.Name(values[name]).lower()


def rounded(name: str, lowering: str = "gather") -> np.ndarray:
    """The logits of the float graph with the weights of the integer one."""
    model = models.trace(name, lowering).model
    known = graphs.initializers(model)
    values = {}
    for plan in table_of(name, "qnn-w8a16", lowering).quantised:
        scales = np.array(plan.weight_scales, np.float32)
        values[plan.weight] = numeric.fake_quantize_weights(known[plan.weight], scales)
    return models.run(graphs.replace_initializers(model, values), models.noise(name))


@pytest.mark.parametrize("name", models.SPECS)
def test_integers_answer_like_the_float_graph(name: str) -> None:
    frames, exact = models.noise(name), rounded(name)
    made = integers(name)
    assert made.linears == tuple(linear.name for linear in graphs.linears(models.trace(name).model))
    assert metrics.sqnr(exact, evaluate(made.model)({"frames": frames})[0]) > 55
    few = evaluate(integers(name, "qnn-w8a8").model)({"frames": frames})[0]
    assert metrics.sqnr(exact, few) > 22


@pytest.mark.parametrize("target", ["qnn-w8a16", "qnn-w8a8"])
def test_nothing_is_computed_in_float(target: str) -> None:
    """Every operator reads what DequantizeLinear gives, or constants, and gives what QuantizeLinear reads."""
    model = integers("paper", target).model
    pair = {"QuantizeLinear", "DequantizeLinear"}
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    readers: defaultdict[str, set[str]] = defaultdict(set)
    for node in model.graph.node:
        for name in node.input:
            readers[name].add(node.op_type)
    for node in model.graph.node:
        if node.op_type not in pair:
            assert {makers[name] for name in node.input if name in makers} == {"DequantizeLinear"}, node.name
            assert all(readers[name] == {"QuantizeLinear"} for name in node.output), node.name


@pytest.mark.parametrize(("target", "bits"), [("qnn-w8a16", "uint16"), ("qnn-w8a8", "uint8")])
def test_types_around_a_linear(target: str, bits: str) -> None:
    model = integers("paper", target).model
    makers = graphs.producers(model.graph.node)
    gemms = {node.name.removesuffix(".matmul"): node for node in models.nodes(model, "Gemm")}
    for name, node in gemms.items():
        activation, weight, *bias = (makers[given].input[0] for given in node.input)
        expected = "uint16" if name.startswith("tubes") else bits
        assert (kind_of(model, activation), kind_of(model, weight)) == (expected, "int8")
        assert [kind_of(model, given) for given in bias] == ["int32"] * len(bias)
        (quantize,) = (n for n in model.graph.node if n.input[0] == node.output[0])
        assert kind_of(model, quantize.output[0]) == expected
    assert len([name for name in gemms if name.startswith("tubes")]) == 4


def test_pixels_in_16_bits_are_exact() -> None:
    made = integers("paper")
    pixels = next(n for n in made.model.graph.node if n.name == "tubes.0.input.quantized")
    constants = models.constants(made.model)
    scale, zero = (constants[name] for name in pixels.input[1:])
    steps = np.arange(256) * constants[pairs.PIXELS[0]] / scale
    assert (steps == np.arange(256) * 256).all()
    assert zero == 0


def test_weights_are_those_of_the_table() -> None:
    table, known = table_of("paper", "qnn-w8a16"), graphs.initializers(models.trace("paper").model)
    written = models.constants(integers("paper").model)
    for plan in table.quantised:
        expected = numeric.quantize_weights(known[plan.weight], np.array(plan.weight_scales, np.float32))
        np.testing.assert_array_equal(written[f"{plan.weight}.integers"], expected)


def test_a_bias_that_its_integers_cannot_hold_raises_the_scale_of_its_weights() -> None:
    """A channel that is as good as dead: weights of 1e-9, a bias of 1."""
    model = onnx.ModelProto.FromString(models.trace("paper").model.SerializeToString())
    known = models.constants(model)
    linear = next(found for found in graphs.linears(model) if found.bias)
    weight, bias = known[linear.weight].copy(), known[linear.bias or ""].copy()
    weight[:, 0], bias[0] = 1e-9 * weight[:, 0], 1.0
    model = graphs.replace_initializers(model, {linear.weight: weight, linear.bias or "": bias})
    table = table_of("paper", "qnn-w8a16")
    plans = [
        replace(plan, weight_scales=tuple(map(float, np.abs(weight).max(axis=0) / 127)))
        if plan.name == linear.name
        else plan
        for plan in table.linears
    ]
    table = replace(table, model=graphs.digest(model), linears=tuple(plans))
    written = models.constants(pairs.integer_pairs(model, table).model)
    whole, unit = written[f"{linear.bias}.integers"], written[f"{linear.bias}.scale"]
    np.testing.assert_allclose(whole * unit.astype(np.float64), bias, rtol=1e-4, atol=1e-5)


def test_an_operator_may_stay_in_float() -> None:
    frames, table = models.noise("paper"), table_of("paper", "qnn-w8a16")
    plain = models.trace("paper").model
    norm = next(models.nodes(plain, "LayerNormalization")).name
    made = pairs.integer_pairs(plain, table, floats=[norm])
    (node,) = (n for n in made.model.graph.node if n.name == norm)
    makers = graphs.producers(made.model.graph.node)
    assert [name for name in node.input[1:] if name in makers] == []
    assert metrics.sqnr(rounded("paper"), evaluate(made.model)({"frames": frames})[0]) > 55
    assert {made.origins[n.name] for n in made.model.graph.node} >= {norm, "blocks.0.attn.softmax"}


def test_convolutions_stay_in_float() -> None:
    frames, made = models.noise("paper"), integers("paper", lowering="conv2d")
    assert not [name for name in made.linears if name.startswith("tubes")]
    exact = rounded("paper", "conv2d")
    assert metrics.sqnr(exact, evaluate(made.model)({"frames": frames})[0]) > 55


def test_a_table_of_another_graph_is_refused() -> None:
    with pytest.raises(InputError, match="the calibration table is for the graph"):
        pairs.integer_pairs(models.trace("image").model, table_of("paper", "qnn-w8a16"))
