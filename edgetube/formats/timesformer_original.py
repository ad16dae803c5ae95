"""TimeSformer classifiers as their authors' scripts save them (`.pyth`).

Bertasius et al., "Is Space-Time Attention All You Need for Video Understanding?", ICML 2021. The weights do not tell
the number of heads and the input; they have to be said.
"""

from __future__ import annotations

import math
import re

from edgetube.errors import CheckpointError
from edgetube.formats.reading import blocks, result, tables
from edgetube.formats.reading.blocks import BlockNames, TimeNames
from edgetube.formats.reading.files import Files, ReadOptions
from edgetube.formats.reading.said import Said, input_contract, labels, size_of
from edgetube.formats.reading.tensors import State
from edgetube.model.checkpoints import Checkpoint
from edgetube.spec import ModelSpec, TubeSpec

NAME = "TimeSformer's own files"

SAID = ("heads", "size", "activation", "norm_eps")
"""Fields of the model that a user may say."""

EPS = 1e-6
"""Of every LayerNorm of the authors' models."""

BLOCK = BlockNames(norm1="norm1", qkv=("attn.qkv",), proj="attn.proj", norm2="norm2", fc1=("mlp.fc1",), fc2="mlp.fc2")
TIME = TimeNames(norm="temporal_norm1", qkv="temporal_attn.qkv", proj="temporal_attn.proj", dense="temporal_fc")


def detect(files: Files) -> bool:
    """A file with patches of frames, and positions in time beside those in space."""
    if files.config or files.is_folder:
        return False
    return files.tensors.has("time_embed", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight")


def read(files: Files, options: ReadOptions) -> Checkpoint:
    """See `edgetube.formats.Format`."""
    options.allow("spec", "labels", "ema")
    said, state = Said.of(options, *SAID), State(files.path, files.tensors)
    if "head.weight" not in state:
        raise CheckpointError(f"{files.path} has no classifier, head.weight: fine-tune the model on labels first")
    spec = _spec(state, said)
    width, places = spec.width, spec.tokens // spec.frames
    weights = blocks.tube(state, "patch_embed.proj", width, spec.tubes[0].kernel)
    table = state.take("pos_embed", "positions, prefix", (1, 1 + places, width))[0]
    times = state.take("time_embed", "positions", (1, spec.frames, width))[0]
    token = state.take("cls_token", "prefix", (1, 1, width))[0]
    weights |= {"positions": tables.over_time(table[1:], times), "prefix": token + table[:1]}
    for i in range(spec.depth):
        weights |= blocks.read_block(state, f"blocks.{i}.", f"blocks.{i}", BLOCK, width, spec.hidden)
        if spec.attention == "divided":
            weights |= blocks.read_time_attention(state, f"blocks.{i}.", f"blocks.{i}", TIME, width)
    weights |= blocks.norm(state, "norm", "norm", width) | blocks.classifier(state, "head", spec)
    height, across = spec.size
    made = input_contract(files.path, said, {"frames": spec.frames, "height": height, "width": across})
    names = labels(files.path, options, None, spec.classifiers[0][1])
    return result.checkpoint(files, state, spec, weights, made, names)


def _check_said(state: State, said: Said) -> None:
    """Check that nothing would have to be guessed."""
    missing = [] if "heads" in said.model else ["heads"]
    missing += [f"input {name}" for name in ("mean", "std") if name not in said.input]
    missing += [] if said.input.keys() & {"sampling", "fps"} else ["input sampling"]
    if missing:
        raise CheckpointError(
            f"{state.what} does not say {', '.join(missing)}; say it with --spec FILE, as in "
            '{"model": {"heads": 12}, "input": {"mean": [0.45, 0.45, 0.45], "std": [0.225, 0.225, 0.225], '
            '"fps": 0.8235}}'
        )


def _spec(state: State, said: Said) -> ModelSpec:
    _check_said(state, said)
    width, _, down, across = state.shape("patch_embed.proj.weight")
    depth = 1 + max(int(found[1]) for name in state.names if (found := re.match(r"blocks\.(\d+)\.", name)))
    divided = any(name.startswith("blocks.0.temporal_") for name in state.names)
    side = math.isqrt(state.shape("pos_embed")[1] - 1)  # the authors' models are square
    size = said.model.get("size", [side * down, side * across])
    return ModelSpec(
        tubes=(TubeSpec((1, down, across), (1, down, across)),),
        frames=state.shape("time_embed")[1],
        size=size_of(state.what, size),
        width=width,
        depth=depth,
        heads=said.model["heads"],
        classifiers=(("classes", state.shape("head.weight")[0]),),
        hidden=state.shape("blocks.0.mlp.fc1.weight")[0],
        prefix=1,
        readout=("prefix.0",),
        activation=said.model.get("activation", "gelu"),
        positions="stored",
        position_resize="nearest",
        attention="divided" if divided else "joint",
        norm_eps=said.model.get("norm_eps", EPS),
    )
