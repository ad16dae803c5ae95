"""The list of tensors that people read."""

from __future__ import annotations

from typing import Any

from edgetube.formats.reading.report import folded


def key(name: str, used: str, *shape: int) -> dict[str, Any]:
    return {"name": name, "shape": list(shape), "used": used}


def test_blocks_that_are_alike_are_one_row() -> None:
    keys = [key(f"m.layer.{i}.fc.weight", f"blocks.{i}.mlp.fc1", 4, 2) for i in (0, 1, 10, 2)]
    assert folded(keys) == [("m.layer.0-2,10.fc.weight", "4 x 2", "blocks.0-2,10.mlp.fc1")]


def test_what_differs_stays_apart() -> None:
    keys = [
        key("layer.0.w", "blocks.0.w", 4),
        key("layer.1.w", "blocks.1.w", 5),
        key("layer.2.w", "not used: a mask token", 4),
        key("scale", "norm.weight"),
    ]
    assert folded(keys) == [
        ("layer.0.w", "4", "blocks.0.w"),
        ("layer.1.w", "5", "blocks.1.w"),
        ("layer.2.w", "4", "not used: a mask token"),
        ("scale", "1", "norm.weight"),
    ]


def test_only_the_block_s_own_number_is_folded() -> None:
    """An embedding of one number and a block of another."""
    keys = [key(f"a.{i}.b", "tubes.weights.7", 1) for i in range(2)]
    assert folded(keys) == [("a.0-1.b", "1", "tubes.weights.7")]
