"""The graph as a PyTorch module answers like the same graph in ONNX Runtime: float, float16 and Q/DQ."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import onnx
import pytest
import torch

from edgetube.calibration import graphs
from edgetube.calibration.table import ActivationScheme, CalibrationTable, LinearPlan, Range
from edgetube.errors import SpecError
from edgetube.export import quantize
from edgetube.export.float16 import convert_to_fp16
from edgetube.export.tokenizer import LOWERINGS
from edgetube.export.torchgraph import TorchGraph
from tests.export.models import REDUCED, SPECS, noise, run, trace
from tests.marks import but

OBSERVED = Range(-2.0, 4.0, "test")


def answers(model: onnx.ModelProto, frames: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found = TorchGraph(model)(torch.from_numpy(frames))
    assert isinstance(found, torch.Tensor)
    return found.numpy()


def table_of(model: onnx.ModelProto, activations: ActivationScheme) -> CalibrationTable:
    """All linears in integers."""
    known, plans, ranges = graphs.initializers(model), [], {}
    pixels = {node.output[0] for node in model.graph.node if node.op_type == "Cast"}
    for linear in graphs.linears(model):
        scales = tuple(float(scale) for scale in np.abs(known[linear.weight]).max(axis=0) / 127)
        plans.append(LinearPlan(linear.name, linear.activation, linear.weight, scales, "int8"))
        ranges[linear.activation] = Range(0, 255, "pixels") if linear.activation in pixels else OBSERVED
    return CalibrationTable(graphs.digest(model), {}, activations, ranges, tuple(plans))


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", SPECS)
def test_float_graphs(name: str, lowering: str) -> None:
    model, frames = trace(name, lowering).model, noise(name)
    expected = run(model, frames)
    np.testing.assert_allclose(answers(model, frames), expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("batch", but([1, 2], pytest.mark.slow, 1))
@pytest.mark.parametrize("name", REDUCED)
def test_graphs_with_fewer_tokens_decide_alike(name: str, batch: int) -> None:
    graph, frames = trace(name, batch=batch), noise(name, batch)
    with torch.no_grad():
        logits, *decided = TorchGraph(graph.model, ["logits", *graph.roles.decisions])(torch.from_numpy(frames))
    np.testing.assert_allclose(logits.numpy(), run(graph.model, frames), atol=1e-5)
    assert {value.dtype for value in decided} == {torch.int32}
    for order in decided[:: len(decided) // 2]:
        assert order.sort(dim=1).values.tolist() == [list(range(order.shape[1]))] * batch


@pytest.mark.parametrize("name", SPECS)
def test_float16_graphs_have_float16_weights(name: str) -> None:
    model, frames = convert_to_fp16(trace(name).model), noise(name)
    module, expected = TorchGraph(model), run(model, frames)
    assert {value.dtype for value in module.buffers() if value.ndim == 2} >= {torch.float16}
    np.testing.assert_allclose(answers(model, frames), expected, atol=2e-2 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("activations", ["int8", "uint8"])
@pytest.mark.parametrize("name", SPECS)
def test_integer_graphs(name: str, activations: ActivationScheme) -> None:
    """Numbers at the border of two integers may be rounded to either."""
    source = trace(name).model
    model, frames = quantize.qdq(source, table_of(source, activations)), noise(name)
    expected = run(model, frames)
    noise_of_integers = np.abs(expected - run(source, frames)).max()
    assert np.abs(answers(model, frames) - expected).max() < max(0.2 * noise_of_integers, 1e-5)
    program = torch.export.export(TorchGraph(model), (torch.from_numpy(frames),))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("dequantize_per_channel" in name for name in called) == len(graphs.linears(source))


def test_tensors_have_the_names_of_the_graph_in_the_program() -> None:
    model, frames = trace("paper").model, noise("paper")
    program = torch.export.export(TorchGraph(model), (torch.from_numpy(frames),))
    named = {path for node in program.graph.nodes for path, _ in (node.meta.get("nn_module_stack") or {}).values()}
    assert {"blocks.0.attn.qkv", "blocks.1", "logits"} <= named


def test_inner_tensors_are_returned_by_their_names() -> None:
    model, frames = trace("paper").model, noise("paper")
    with torch.no_grad():
        block, logits = TorchGraph(model, ["blocks.0", "logits"])(torch.from_numpy(frames))
    np.testing.assert_array_equal(logits.numpy(), answers(model, frames))
    assert block.shape[::2] == (1, SPECS["paper"].width)
    with pytest.raises(SpecError, match=r"no tensor blocks\.7"):
        TorchGraph(model, ["blocks.7"])


def test_an_operator_without_a_translation_is_named() -> None:
    model = deepcopy(trace("paper").model)
    model.graph.node[-1].op_type = "Softsign"
    with pytest.raises(SpecError, match="no translation for the operator Softsign"):
        TorchGraph(model)
