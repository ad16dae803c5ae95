"""How a model is trained: what of it, at which rate, for how long."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import nn

from edgetube.errors import InputError
from edgetube.model.parts import part_of
from edgetube.model.transformer import VideoTransformer
from edgetube.spec import ModelSpec

Trained = Literal["tubes", "last4", "all"]
LAST = 4
"""Blocks that are trained, where not all are."""

BETAS = (0.9, 0.999)
CLIP = 1.0
"""Largest norm of the gradient."""


@dataclass(frozen=True)
class Recipe:
    """Options of a training.

    Attributes:
        epochs: passes over the clips.
        batch: clips of a step, over all processes; with images, as many of them.
        accumulate: parts that a batch is computed in, one after the other; the gradient is that of the whole.
        lr: highest learning rate, behind the warm-up; a half cosine leads to zero.
        warmup: share of the steps over which the rate rises from zero.
        weight_decay: of AdamW, of matrices.
        layer_decay: factor of the rate from one block to the one before it; the head has 1.
        smoothing: of the labels.
        average: share of the moving average of the weights that a step keeps; less in the first steps; 0 has none.
        train: "tubes" (with times, gates and heads), "last4" (the last blocks and the norm, too), or "all".
        mirror: whether half of the clips are mirrored, see `edgetube.train.augment.mirrored`.
        jitter: largest change of brightness and contrast, and of the crop in shares of its side.
        seed: of the order of the clips, their augmentation, and new heads.
        bf16: matrix products in bfloat16; None where it helps: on CUDA.
    """

    epochs: int = 10
    batch: int = 32
    accumulate: int = 1
    lr: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.05
    layer_decay: float = 0.75
    smoothing: float = 0.1
    average: float = 0.998
    train: Trained = "tubes"
    mirror: bool = True
    jitter: float = 0.1
    seed: int = 0
    bf16: bool | None = None

    def __post_init__(self) -> None:
        if self.train not in get_args(Trained):
            raise InputError(f"--train is {self.train!r}; expected {', '.join(get_args(Trained))}")
        bounds = {
            "epochs": (1, 100_000), "batch": (1, 65536), "accumulate": (1, 65536), "lr": (1e-12, 100),
            "warmup": (0, 1), "weight_decay": (0, 10), "layer_decay": (0.01, 1), "smoothing": (0, 0.99),
            "average": (0, 0.999999), "jitter": (0, 0.5), "seed": (0, 2**31),
        }  # fmt: skip
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                said = f"--{name.replace('_', '-')} is {getattr(self, name)}"
                raise InputError(f"{said}; expected {low} to {high}")
        if self.batch % self.accumulate:
            raise InputError(f"--batch {self.batch} is not divisible by --accumulate {self.accumulate}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step number `step` of 0 .. `steps` - 1."""
        rising = self.warmup * steps
        if step < rising:
            return self.lr * (step + 1) / (rising + 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, steps - rising)))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def trained(model: VideoTransformer, recipe: Recipe, heads: set[str]) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name; the others are marked as constants.

    Args:
        heads: classifiers that clips or images are given for.
    """
    chosen = {name: p for name, p in model.named_parameters() if _is_trained(name, model.spec, recipe.train, heads)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return chosen


def _is_trained(name: str, spec: ModelSpec, chosen: Trained, heads: set[str]) -> bool:
    part = part_of(name, spec)
    if part.kind == "classifier":
        return part.classifier in heads
    if part.kind in ("tube", "time", "gate"):
        return True
    late = part.kind == "norm" or (part.kind == "block" and part.block >= spec.depth - LAST)
    return chosen == "all" or (chosen == "last4" and late)


def groups(parameters: dict[str, nn.Parameter], spec: ModelSpec, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameter groups of AdamW: `scale` of the learning rate by depth; vectors, tokens and positions do not shrink."""
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        scale = 1.0 if recipe.train == "tubes" else recipe.layer_decay ** (spec.depth + 1 - _layer(name, spec))
        is_matrix = parameter.ndim > 1 and not (part_of(name, spec).kind == "image" and parameter.ndim == 2)
        found.setdefault((scale, recipe.weight_decay if is_matrix else 0.0), []).append(parameter)
    return [
        {"params": params, "weight_decay": decay, "scale": scale}
        for (scale, decay), params in sorted(found.items(), key=lambda item: item[0])
    ]


def _layer(name: str, spec: ModelSpec) -> int:
    """0 of what images are made of, then the blocks from 1 on, last what reads them, and new tubes."""
    part = part_of(name, spec)
    return 0 if part.kind == "image" else part.block + 1 if part.kind == "block" else spec.depth + 1
