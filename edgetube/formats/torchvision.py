"""ViT image classifiers of torchvision: state dicts, whose architecture or weights the user names.

The tensors are alike for any number of heads, and no file says how its input was made. torchvision's names say both:
`vit_b_16` the heads, `ViT_B_16_Weights.IMAGENET1K_V1` the input too.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetube.errors import CheckpointError
from edgetube.formats.reading import blocks, result
from edgetube.formats.reading.blocks import Weights
from edgetube.formats.reading.files import Files, ReadOptions
from edgetube.formats.reading.said import Said, input_contract, labels
from edgetube.formats.reading.tensors import State
from edgetube.model.checkpoints import Checkpoint
from edgetube.spec import ModelSpec, TubeSpec

NAME = "torchvision ViT"

SAID = ("heads", "activation", "norm_eps")
"""Fields of the model that a user may say."""

MODELS = {
    "vit_b_16": (16, 768, 12, 12),
    "vit_b_32": (32, 768, 12, 12),
    "vit_l_16": (16, 1024, 24, 16),
    "vit_l_32": (32, 1024, 24, 16),
    "vit_h_14": (14, 1280, 32, 16),
}
"""Builder -> patch, width, blocks, heads."""

WEIGHTS = {
    "ViT_B_16_Weights.IMAGENET1K_V1": ("vit_b_16", 224, 256, "bilinear"),
    "ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1": ("vit_b_16", 384, 384, "bicubic"),
    "ViT_B_16_Weights.IMAGENET1K_SWAG_LINEAR_V1": ("vit_b_16", 224, 224, "bicubic"),
    "ViT_B_32_Weights.IMAGENET1K_V1": ("vit_b_32", 224, 256, "bilinear"),
    "ViT_L_16_Weights.IMAGENET1K_V1": ("vit_l_16", 224, 242, "bilinear"),
    "ViT_L_16_Weights.IMAGENET1K_SWAG_E2E_V1": ("vit_l_16", 512, 512, "bicubic"),
    "ViT_L_16_Weights.IMAGENET1K_SWAG_LINEAR_V1": ("vit_l_16", 224, 224, "bicubic"),
    "ViT_L_32_Weights.IMAGENET1K_V1": ("vit_l_32", 224, 256, "bilinear"),
    "ViT_H_14_Weights.IMAGENET1K_SWAG_E2E_V1": ("vit_h_14", 518, 518, "bicubic"),
    "ViT_H_14_Weights.IMAGENET1K_SWAG_LINEAR_V1": ("vit_h_14", 224, 224, "bicubic"),
}
"""Weights -> builder, crop, short side before it, filter. The mean and std of all are ImageNet's."""

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

CLASSIFIER = re.compile(r"(heads(\.head|\.\d+)?)\.weight")
"""The classifier's name: the builder's, or one of people who put another one in its place."""


def detect(files: Files) -> bool:
    """Tensors in torchvision's names, without a configuration."""
    return not files.config and files.tensors.has("class_token", "conv_proj.weight", "encoder.pos_embedding")


def modern(name: str) -> str:
    """A tensor's name as files since torchvision 0.13 have it; the published ones are older."""
    return name.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")


@dataclass(frozen=True)
class _Named:
    """What the user's name says."""

    heads: int | None
    input: dict[str, Any]
    notes: tuple[str, ...] = ()


def read(files: Files, options: ReadOptions) -> Checkpoint:
    """See `edgetube.formats.Format`."""
    options.allow("spec", "labels", "arch", "ema")
    said, state = Said.of(options, *SAID), State(files.path, files.tensors, modern)
    if "heads.pre_logits.weight" in state:
        raise CheckpointError(
            f"{files.path} has a layer before its classifier (heads.pre_logits); edgetube knows no such model"
        )
    head = next((found[1] for name in state.names if (found := CLASSIFIER.fullmatch(name))), "heads.head")
    width, _, patch, _ = state.shape("conv_proj.weight")
    depth = sum(name.endswith(".ln_1.weight") for name in state.names)
    named = _named(files.path, options.arch, (patch, width, depth), _side(files.path, state, patch))
    spec = ModelSpec(
        tubes=(TubeSpec((1, patch, patch), (1, patch, patch)),),
        frames=1,
        size=(_side(files.path, state, patch),) * 2,
        width=width,
        depth=depth,
        heads=said.model_field(files.path, "heads", named.heads, _hint((patch, width, depth))),
        classifiers=(("classes", state.shape(f"{head}.weight")[0]),),
        hidden=state.shape("encoder.layers.encoder_layer_0.mlp.0.weight")[0],
        prefix=1,
        readout=("prefix.0",),
        activation=said.model.get("activation", "gelu"),
        positions="stored",
        norm_eps=said.model.get("norm_eps", 1e-6),
    )
    weights = _embedding(state, spec)
    for i in range(depth):
        place = f"encoder.layers.encoder_layer_{i}."
        weights |= blocks.read_block(state, place, f"blocks.{i}", blocks.TORCHVISION, width, spec.hidden)
    weights |= blocks.norm(state, "encoder.ln", "norm", width) | blocks.classifier(state, head, spec)
    known = {"frames": 1, "height": spec.size[0], "width": spec.size[1]} | named.input
    made = input_contract(files.path, said, known, resized=True)
    names = labels(files.path, options, None, spec.classifiers[0][1])
    return result.checkpoint(files, state, spec, weights, made, names, named.notes)


def _embedding(state: State, spec: ModelSpec) -> Weights:
    weights = blocks.tube(state, "conv_proj", spec.width, spec.tubes[0].kernel)
    table = state.take("encoder.pos_embedding", "positions, prefix", (1, spec.sequence, spec.width))[0]
    token = state.take("class_token", "prefix", (1, 1, spec.width))[0]
    return weights | {"positions": table[1:].clone(), "prefix": token + table[:1]}


def _side(what: Path, state: State, patch: int) -> int:
    """Height and width of the input: torchvision's are square."""
    rows = state.shape("encoder.pos_embedding")[1] - 1
    side = math.isqrt(max(rows, 0))
    if side * side != rows or not rows:
        raise CheckpointError(f"{what}: {rows} positions of patches; expected a square number")
    return side * patch


def _hint(shape: tuple[int, int, int]) -> str:
    """What to give for tensors of these shapes."""
    alike = next((name for name, found in MODELS.items() if found[:3] == shape), "")
    return f" (its tensors are those of {alike}: give --arch {alike})" if alike else ""


def _named(what: Path, arch: str | None, shape: tuple[int, int, int], side: int) -> _Named:
    """What the name of an architecture or of weights says about tensors of a shape (patch, width, blocks).

    Raises:
        CheckpointError: the name is unknown, or is that of other tensors.
    """
    if arch is None:
        return _Named(None, {})
    weights, builder = WEIGHTS.get(arch), arch
    notes: tuple[str, ...] = ()
    if weights is None:
        same = (name for name, one in WEIGHTS.items() if one[:2] == (arch, side))
        if name := next(same, ""):
            weights = WEIGHTS[name]
            notes = (f"its input is taken to be that of {name}; if it is of other weights, name those with --arch",)
    else:
        builder = weights[0]
    if builder not in MODELS:
        raise CheckpointError(
            f"{what}: torchvision has no ViT {arch!r:.60}; there are {', '.join([*MODELS, *WEIGHTS])}"
        )
    if shape != MODELS[builder][:3] or (weights and weights[1] != side):
        raise CheckpointError(
            f"{what} has patches of {shape[0]}, width {shape[1]}, {shape[2]} blocks and takes {side} pixels: it is not "
            f"{arch}"
        )
    found = {"resize": "short-side", "resize_size": weights[2], "filter": weights[3]} if weights else {}
    return _Named(MODELS[builder][3], found | (IMAGENET if weights else {}), notes)
