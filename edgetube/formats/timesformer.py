"""TimeSformer classifiers as transformers saves them: patches of every frame; attention over time, then over space.

Bertasius et al., "Is Space-Time Attention All You Need for Video Understanding?", ICML 2021.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetube.errors import CheckpointError
from edgetube.formats.reading import blocks, result, tables
from edgetube.formats.reading.blocks import BlockNames, TimeNames
from edgetube.formats.reading.files import Files, ReadOptions
from edgetube.formats.reading.processors import contract
from edgetube.formats.reading.said import Said, labels
from edgetube.formats.reading.tensors import State
from edgetube.formats.reading.transformers import ACTIVATIONS, Config
from edgetube.model.checkpoints import Checkpoint
from edgetube.spec import ModelSpec, SpaceTime, TubeSpec

NAME = "transformers TimeSformer"

DEFAULTS = {
    "image_size": 224, "patch_size": 16, "num_frames": 8, "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
    "attention_type": "divided_space_time",
}  # fmt: skip
"""Of `TimesformerConfig`."""

PROCESSOR = "VideoMAEImageProcessor"
"""That of the published folders; transformers 5 also has a processor of videos for this model."""

SPACE_ONLY = "space_only"
ATTENTION: Mapping[str, SpaceTime] = {"divided_space_time": "divided", "joint_space_time": "joint", SPACE_ONLY: "joint"}
"""`attention_type` -> the attention of the spec; that over space alone is the joint one of a single frame."""

BLOCK = BlockNames(
    norm1="layernorm_before",
    qkv=("attention.attention.qkv",),
    proj="attention.output.dense",
    norm2="layernorm_after",
    fc1=("intermediate.dense",),
    fc2="output.dense",
)
TIME = TimeNames(
    norm="temporal_layernorm",
    qkv="temporal_attention.attention.qkv",
    proj="temporal_attention.output.dense",
    dense="temporal_dense",
)

RATE, RATES = 32, {16: 16, 96: 4}
"""Every how manieth frame the authors count, at 30 frames per second; at other numbers of frames."""


def detect(files: Files) -> bool:
    """A folder whose configuration says so."""
    return files.model_type == "timesformer"


def read(files: Files, options: ReadOptions) -> Checkpoint:
    """See `edgetube.formats.Format`."""
    options.allow("spec", "labels", "adapter")
    config, said = Config(files, DEFAULTS), Said.of(options)
    state = State(files.path, files.tensors)
    if "classifier.weight" not in state:
        raise CheckpointError(f"{files.path} has no classifier: fine-tune the model on labels first")
    spec = _spec(config, state.shape("classifier.weight")[0])
    width, place, places = spec.width, "timesformer.embeddings.", spec.tokens // spec.frames
    weights = blocks.tube(state, f"{place}patch_embeddings.projection", width, spec.tubes[0].kernel)
    table = state.take(f"{place}position_embeddings", "positions, prefix", (1, 1 + places, width))[0]
    token = state.take(f"{place}cls_token", "prefix", (1, 1, width))[0]
    weights |= {"positions": table[1:].clone(), "prefix": token + table[:1]}
    if not _is_space_only(config):
        times = state.take(f"{place}time_embeddings", "positions", (1, spec.frames, width))[0]
        weights["positions"] = tables.over_time(weights["positions"], times)
    for i in range(spec.depth):
        block, to = f"timesformer.encoder.layer.{i}.", f"blocks.{i}"
        weights |= blocks.read_block(state, block, to, BLOCK, width, spec.hidden)
        if spec.attention == "divided":
            weights |= blocks.read_time_attention(state, block, to, TIME, width)
    weights |= blocks.norm(state, "timesformer.layernorm", "norm", width) | blocks.classifier(state, "classifier", spec)
    made = contract(files, said, PROCESSOR, spec.frames, _sampling(spec.frames))
    names = labels(files.path, options, config.id2label, spec.classifiers[0][1])
    return result.checkpoint(
        files, state, spec, weights, made, names, (*config.answer_notes(), *_notes(config, options))
    )


def _spec(config: Config, classes: int) -> ModelSpec:
    attention = config.choice("attention_type", ATTENTION)
    down, across = config.pair("patch_size")
    height, width = config.pair("image_size")
    return ModelSpec(
        tubes=(TubeSpec((1, down, across), (1, down, across)),),
        frames=1 if _is_space_only(config) else config.integer("num_frames"),
        size=(height, width),
        **config.encoder(),
        classifiers=(("classes", classes),),
        hidden=config.integer("intermediate_size"),
        prefix=1,
        readout=("prefix.0",),
        activation=config.choice("hidden_act", ACTIVATIONS),
        positions="stored",
        position_resize="nearest",
        attention=attention,
    )


def _is_space_only(config: Config) -> bool:
    return bool(config.values["attention_type"] == SPACE_ONLY)


def _sampling(frames: int) -> dict[str, Any]:
    """How the authors sample: as many frames, evenly from the first to the last of a clip, whose length is that of
    `frames` times the rate at 30 frames per second."""
    if frames == 1:
        return {}
    span = frames * RATES.get(frames, RATE) - 1
    return {"sampling": "uniform", "fps": round(30 * (frames - 1) / span, 4)}


def _notes(config: Config, options: ReadOptions) -> tuple[str, ...]:
    if not _is_space_only(config) or options.pool_frames is not None:
        return ()
    return ("its attention is over space alone, so it answers for one frame; --pool-frames mean takes several",)
