"""The static model against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from edgetube.export import static, tokenizer
from edgetube.runtimes.torch import normalise
from edgetube.spec import PAPER_TUBES
from tests.export.test_tokenizer import SPECS, make, noise, spec_of


@pytest.mark.parametrize("lowering", tokenizer.LOWERINGS)
@pytest.mark.parametrize("name", ["paper", "image", "dense"])
def test_whole_model_equals_reference(name: str, lowering: str) -> None:
    model, contract = make(SPECS[name])
    clips = noise(model.spec, batch=2)
    with torch.no_grad():
        for head in ("a", "b"):
            expected = model(normalise(clips, contract), head)
            got = static.StaticTransformer(model, contract, lowering, head, batch=2)(clips)
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
            assert got.dtype == torch.float32


def test_gates_are_constants_and_a_closed_gate_is_nothing() -> None:
    spec = spec_of(PAPER_TUBES, depth=3, gates=(0, 2))
    model, contract = make(spec)
    with torch.no_grad():
        model.get_parameter("blocks.0.alpha").fill_(0.7)
        model.get_parameter("blocks.2.alpha").fill_(0.0)
    rewritten = static.StaticTransformer(model, contract)
    gates: list[Any] = [block.gate for block in rewritten.blocks]
    assert float(gates[0]) == pytest.approx(math.tanh(0.7))
    assert gates[1] is None
    assert gates[2] is None
    clips = noise(spec)
    with torch.no_grad():
        expected = model(normalise(clips, contract))
        torch.testing.assert_close(rewritten(clips), expected, atol=1e-4, rtol=0)
        model.get_parameter("blocks.0.alpha").fill_(0.0)
        assert float((model(normalise(clips, contract)) - expected).abs().max()) > 1e-3
        assert static.StaticTransformer(model, contract).positions is None


def test_the_model_is_left_as_it_was() -> None:
    model, contract = make(SPECS["paper"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    static.StaticTransformer(model, contract)(noise(model.spec))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
