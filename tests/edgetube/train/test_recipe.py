"""What is trained, and at which rate."""

from __future__ import annotations

import math
from typing import Any

import pytest

from edgetube.errors import InputError
from edgetube.model.transformer import VideoTransformer
from edgetube.spec import ModelSpec, TubeSpec
from edgetube.train import recipe
from edgetube.train.recipe import Recipe

SPEC = ModelSpec(
    tubes=(TubeSpec((4, 8, 8), (4, 16, 16)), TubeSpec((1, 8, 8), (8, 8, 8))),
    frames=8, size=(32, 32), width=24, depth=6, heads=2, classifiers=(("video", 3), ("classes", 5)), prefix=1,
    readout=("prefix.0",), positions="anchored", position_resize="bicubic", gates=(1, 5),
)  # fmt: skip


def names(part: str) -> set[str]:
    model = VideoTransformer(SPEC)
    found = recipe.trained(model, Recipe(train=part), {"video"})  # type: ignore[arg-type]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(found)
    return set(found)


def test_tubes_are_trained_and_what_images_are_made_of_is_not() -> None:
    tubes = {"tubes.weights.0", "tubes.biases.0", "anchor.time", "blocks.1.alpha", "blocks.5.alpha"}
    assert names("tubes") == tubes | {"classifiers.video.weight", "classifiers.video.bias"}


def test_the_last_four_blocks_and_the_norm() -> None:
    more = names("last4") - names("tubes")
    assert {name.split(".")[1] for name in more if name.startswith("blocks")} == {"2", "3", "4", "5"}
    assert {name for name in more if not name.startswith("blocks")} == {"norm.weight", "norm.bias"}


def test_all_is_everything_but_classifiers_without_clips() -> None:
    every = {name for name, _ in VideoTransformer(SPEC).named_parameters()}
    assert every - names("all") == {"classifiers.classes.weight", "classifiers.classes.bias"}


def test_the_rate_rises_then_falls_as_a_half_cosine() -> None:
    options = Recipe(lr=2.0, warmup=0.1)
    rates = [options.rate(step, 100) for step in range(100)]
    assert rates[:3] == pytest.approx([2 / 11, 4 / 11, 6 / 11])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(1 + math.cos(math.pi * 89 / 90))
    assert Recipe(warmup=0).rate(0, 1) == Recipe().lr


def test_rates_decay_from_block_to_block_and_vectors_do_not_shrink() -> None:
    options = Recipe(train="all", layer_decay=0.5, weight_decay=0.2)
    parameters = recipe.trained(VideoTransformer(SPEC), options, {"video"})
    by_id = {id(p): (group["scale"], group["weight_decay"]) for group in recipe.groups(parameters, SPEC, options)
             for p in group["params"]}  # fmt: skip
    found = {name: by_id[id(p)] for name, p in parameters.items()}
    assert found["classifiers.video.weight"] == (1, 0.2)
    assert found["tubes.weights.0"] == (1, 0.2)
    assert found["blocks.1.alpha"] == (1, 0)
    assert found["blocks.5.mlp.fc1.weight"] == (0.5, 0.2)
    assert found["blocks.0.norm1.weight"] == (0.5**6, 0)
    assert found["tubes.weights.1"] == (0.5**7, 0.2)
    assert found["anchor.grid"] == (0.5**7, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": "head"}, "--train is 'head'; expected tubes, last4, all"),
        ({"epochs": 0}, "--epochs is 0; expected 1"),
        ({"lr": math.nan}, "--lr is nan"),
        ({"batch": 10, "accumulate": 4}, "--batch 10 is not divisible by --accumulate 4"),
        ({"weight_decay": -1}, "--weight-decay is -1"),
    ],
)
def test_options_out_of_bounds(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(**given)
