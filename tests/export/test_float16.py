"""Float16 graphs: like PyTorch, in the range of float16, and without subnormal weights."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgetube.calibration.storage import total
from edgetube.errors import SpecError
from edgetube.export import canonical, coreai
from edgetube.export.float16 import PIXEL_SCALE, convert_to_fp16
from edgetube.export.static import StaticTransformer
from edgetube.export.tokenizer import LOWERINGS
from edgetube.model.transformer import VideoTransformer
from edgetube.runtimes.torch import normalise
from tests.export.models import OTHERS, SPECS, constants, model_of, nodes, noise, reference, run, trace
from tests.marks import but


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("lowering", but(LOWERINGS, pytest.mark.slow, "gather"))
@pytest.mark.parametrize("name", SPECS)
def test_half_precision_answers_like_pytorch(name: str, lowering: str) -> None:
    frames = noise(name)
    model = convert_to_fp16(trace(name, lowering).model)
    onnx.checker.check_model(model, full_check=True)
    answer = run(model, frames)
    assert answer.dtype == np.float32
    assert cosine(answer, reference(name, frames)) > 0.9999
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert all(types[n.input[1]] == TensorProto.FLOAT16 for n in nodes(model, "MatMul") if n.input[1] in types)
    assert total(model) < 0.65 * total(trace(name, lowering).model)


@pytest.mark.parametrize("name", but([*SPECS, *OTHERS], pytest.mark.slow, "dense", "rotary"))
def test_the_operators_behind_the_last_block_may_stay_in_float32(name: str) -> None:
    graph, frames = trace(name), noise(name)
    kept = coreai.answer_operators(graph)
    model = convert_to_fp16(graph.model, kept)
    onnx.checker.check_model(model, full_check=True)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    stored = {n.name: types[n.input[1]] for n in nodes(model, "MatMul") if n.input[1] in types}
    classifiers = {node for node in stored if node.startswith("classifier")}
    assert classifiers
    assert {node for node, kind in stored.items() if kind == TensorProto.FLOAT} == stored.keys() & kept >= classifiers
    assert not any("blocks." in node for node in kept)
    assert cosine(run(model, frames), reference(name, frames)) > 0.9999


@pytest.mark.parametrize("name", ["mean", *OTHERS])
def test_half_precision_in_an_evaluator_that_computes_in_half_precision(name: str) -> None:
    """ONNX Runtime computes half precision in float on most CPUs; numpy does not."""
    frames = noise(name)
    (answer,) = ReferenceEvaluator(convert_to_fp16(trace(name).model)).run(None, {"frames": frames})
    assert cosine(np.asarray(answer), reference(name, frames)) > 0.9995


def test_epsilons_stay_float32() -> None:
    """1e-12 is 0 in float16."""
    model = convert_to_fp16(trace("dense").model)
    epsilons = {a.f for n in nodes(model, "LayerNormalization") for a in n.attribute if a.name == "epsilon"}
    assert epsilons == {np.float32(1e-12), np.float32(1e-5)}


def test_half_precision_keeps_the_range_of_layernorm_and_softmax() -> None:
    """One channel of 1500, as trained ViTs have: its square is 34 times the largest float16."""
    spec = SPECS["paper"]
    model, contract = VideoTransformer(spec).eval(), model_of("paper")[1]
    with torch.no_grad():
        model.get_parameter("blocks.0.mlp.fc2.bias")[3] = 1500.0
        model.get_parameter("blocks.0.attn.qkv.weight").mul_(6)
    narrow = convert_to_fp16(canonical.trace(StaticTransformer(model, contract), spec, contract).model)
    frames = noise("paper")
    with torch.no_grad():
        expected = model(normalise(torch.from_numpy(frames), contract)).numpy()
    (by_numpy,) = ReferenceEvaluator(narrow).run(None, {"frames": frames})
    for answer in (run(narrow, frames), np.asarray(by_numpy)):
        assert cosine(answer, expected) > 0.999
    types = {value.name: value.type.tensor_type.elem_type for value in narrow.graph.value_info}
    wide = [node for kind in ("LayerNormalization", "Softmax") for node in nodes(narrow, kind)]
    assert len(wide) == 5 + 3
    assert all(types[name] == TensorProto.FLOAT for node in wide for name in [node.input[0], *node.output])
    assert types["blocks.0"] == types["blocks.1.norm1"] == TensorProto.FLOAT16
    with np.errstate(over="ignore"):
        assert np.isinf(np.float16(1500) ** 2)  # what would have happened


def test_half_precision_keeps_tube_weights_out_of_the_subnormals() -> None:
    model = convert_to_fp16(trace("paper").model)
    values = constants(model)
    for i in range(4):
        weight = values[f"tubes.{i}.weight"].astype(np.float64)
        exact = constants(trace("paper").model)[f"tubes.{i}.weight"].astype(np.float64)
        assert np.median(abs(exact)) < 2**-11  # unscaled, they would lose digits
        np.testing.assert_allclose(weight / PIXEL_SCALE, exact, rtol=2**-10, atol=1e-9)


def test_half_precision_refuses_what_it_cannot_hold() -> None:
    model = deepcopy(trace("paper").model)
    for tensor in model.graph.initializer:
        if tensor.name == "blocks.1.mlp.fc2.bias":
            tensor.CopyFrom(numpy_helper.from_array(np.full(24, 7e4, np.float32), tensor.name))
    with pytest.raises(SpecError, match=r"blocks\.1\.mlp\.fc2\.bias reaches 7e\+04; float16 ends at 65504"):
        convert_to_fp16(model)
