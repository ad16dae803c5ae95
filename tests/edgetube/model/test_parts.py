"""What the parameters of a model are for."""

from __future__ import annotations

import torch

from edgetube.model import parts
from edgetube.model.parts import Part
from edgetube.model.transformer import VideoTransformer
from edgetube.spec import ModelSpec, TubeSpec

SPEC = ModelSpec(
    tubes=(TubeSpec((2, 4, 4), (2, 4, 4)), TubeSpec((1, 4, 4), (4, 4, 4))),
    frames=4, size=(8, 8), width=12, depth=2, heads=2, classifiers=(("a-1", 2), ("b", 3)), prefix=1,
    positions="anchored", embedding_norm=True, gates=(1,),
)  # fmt: skip


def test_every_parameter_has_a_purpose() -> None:
    found = {name: parts.part_of(name, SPEC) for name, _ in VideoTransformer(SPEC).named_parameters()}
    assert found["tubes.weights.0"] == found["tubes.biases.0"] == Part("tube")
    assert found["blocks.0.attn.qkv.weight"] == Part("block", 0)
    assert found["blocks.1.norm2.bias"] == Part("block", 1)
    assert found["blocks.1.alpha"] == Part("gate", 1)
    assert found["classifiers.a-1.weight"] == Part("classifier", classifier="a-1")
    assert {name for name, part in found.items() if part.kind == "image"} == {
        "tubes.weights.1", "tubes.biases.1", "prefix", "anchor.grid", "embedding_norm.weight", "embedding_norm.bias",
    }  # fmt: skip
    assert {name for name, part in found.items() if part.kind == "norm"} == {"norm.weight", "norm.bias"}
    assert {name for name, part in found.items() if part.kind == "readout"} == {"pool.score.weight", "pool.score.bias"}
    assert found["anchor.time"] == Part("time")


def test_a_new_classifier_is_the_first_and_zero_and_the_others_stay() -> None:
    model = VideoTransformer(SPEC).eval()
    made = parts.with_classifier(model, "new", 5)
    assert made.spec.classifiers == (("new", 5), ("a-1", 2), ("b", 3))
    x = torch.randn(2, 3, 4, 8, 8)
    with torch.no_grad():
        assert made(x).abs().max() == 0
        assert torch.equal(made(x, "b"), model(x, "b"))


def test_replaced_weights_leave_the_model_as_it_was() -> None:
    model = VideoTransformer(SPEC).eval()
    made = parts.replaced(model, {"prefix": torch.full((1, 12), 3.0)})
    assert made.prefix is not None
    assert model.prefix is not None
    assert float(made.prefix.detach().min()) == 3.0
    assert float(model.prefix.detach().abs().max()) == 0.0
