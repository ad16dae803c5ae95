"""The parts of a model by their purpose, and models of which some parts are new."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from edgetube.model.transformer import VideoTransformer, shapes, with_weights
from edgetube.spec import ModelSpec

Kind = Literal["image", "tube", "time", "gate", "block", "norm", "readout", "classifier"]
"""What a parameter is of: what images are made of (patches, prefix, learned grid, the norm behind them), another tube,
the times of anchored positions, a gate, an encoder block, the final norm, the readout, a classifier."""


@dataclass(frozen=True)
class Part:
    """The purpose of a parameter.

    Attributes:
        kind: what it is of.
        block: number of the block, of kind "block" and "gate".
        classifier: its name, of kind "classifier".
    """

    kind: Kind
    block: int = -1
    classifier: str = ""


def part_of(name: str, spec: ModelSpec) -> Part:
    """The purpose of the parameter `name` of a model."""
    first, *rest = name.split(".")
    if first == "tubes":
        return Part("image" if rest[-1].isdigit() and spec.tubes[int(rest[-1])].is_2d else "tube")
    if first == "blocks":
        return Part("gate" if rest[-1] == "alpha" else "block", int(rest[0]))
    if first == "classifiers":
        return Part("classifier", classifier=rest[0])
    if name == "anchor.time":
        return Part("time")
    known: dict[str, Kind] = {"anchor": "image", "prefix": "image", "embedding_norm": "image", "norm": "norm"}
    return Part(known.get(first, "readout"))


def with_tubes(
    model: VideoTransformer, spec: ModelSpec, tubes: Mapping[int, tuple[Tensor, Tensor]], time: Tensor
) -> VideoTransformer:
    """An image model in the form of `spec`, with its patches as the 2-D tube, and gates that are shut.

    Args:
        tubes: kernel and bias of each other tube, by its index.
        time: of anchored positions.
    """
    state = dict(model.state_dict())
    patches = state.pop("tubes.weights.0"), state.pop("tubes.biases.0")
    for index in range(len(spec.tubes)):
        found = (part.detach().clone() for part in tubes.get(index, patches))
        state[f"tubes.weights.{index}"], state[f"tubes.biases.{index}"] = found
    if spec.positions == "anchored":
        state |= {"anchor.grid": state.pop("positions"), "anchor.time": time}
    state |= {f"blocks.{gate}.alpha": torch.zeros(()) for gate in spec.gates}
    return with_weights(spec, {name: state[name] for name in shapes(spec)})


def with_classifier(model: VideoTransformer, name: str, classes: int) -> VideoTransformer:
    """The model with one more classifier, of zeros, which is the first."""
    spec = replace(model.spec, classifiers=((name, classes), *model.spec.classifiers))
    state = model.state_dict()
    state[f"classifiers.{name}.weight"] = torch.zeros(classes, spec.embedding)
    state[f"classifiers.{name}.bias"] = torch.zeros(classes)
    return with_weights(spec, {tensor: state[tensor] for tensor in shapes(spec)})


def replaced(model: VideoTransformer, weights: Mapping[str, Tensor]) -> VideoTransformer:
    """The same model on the CPU with some weights replaced."""
    state = {**model.state_dict(), **weights}
    return with_weights(model.spec, {name: state[name].detach().cpu() for name in shapes(model.spec)})
