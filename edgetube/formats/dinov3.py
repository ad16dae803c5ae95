"""DINOv3's image tower as transformers saves it, with a classifier beside it: rotary positions, registers, LayerScale.

transformers has no classifier for this tower, so nothing says what one reads. Two are known by their width, see `read`.

Siméoni et al., "DINOv3", 2025.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from edgetube.errors import CheckpointError
from edgetube.formats.reading import blocks, heads, result
from edgetube.formats.reading.blocks import BlockNames, Weights
from edgetube.formats.reading.files import Files, ReadOptions
from edgetube.formats.reading.processors import contract
from edgetube.formats.reading.said import Said, labels
from edgetube.formats.reading.tensors import State
from edgetube.formats.reading.transformers import ACTIVATIONS, Config
from edgetube.model.checkpoints import Checkpoint
from edgetube.spec import ModelSpec, Rotary, TubeSpec

NAME = "transformers DINOv3"

DEFAULTS = {
    "image_size": 224, "patch_size": 16, "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6,
    "intermediate_size": 1536, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "rope_theta": 100.0,
    "use_gated_mlp": False, "num_register_tokens": 0,
}  # fmt: skip
"""Of `DINOv3ViTConfig`."""

PROCESSOR = "DINOv3ViTImageProcessor"

BLOCK = BlockNames(
    norm1="norm1",
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    proj="attention.o_proj",
    norm2="norm2",
    fc1=("mlp.up_proj",),
    fc2="mlp.down_proj",
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
)
GATED = replace(BLOCK, fc1=("mlp.gate_proj", "mlp.up_proj"), gated=True)

OUTER = re.compile(r"^(?:(?:backbone|encoder|tower|vit|dinov3|dinov3_vit|model)\.)*(?=(?:embeddings|layer|norm)\.)")
"""What stands before the tower's own names: the attribute of a training module, or that of transformers' encoder."""


def detect(files: Files) -> bool:
    """A folder whose configuration says so."""
    return files.model_type == "dinov3_vit"


def read(files: Files, options: ReadOptions) -> Checkpoint:
    """See `edgetube.formats.Format`.

    The classifier is `classifier.weight` and `classifier.bias` beside the tower, or in a file of its own.
    """
    options.allow("spec", "labels", "adapter", "classifier")
    config, said = Config(files, DEFAULTS), Said.of(options)
    state = State(files.path, files.tensors, lambda name: OUTER.sub("", name))
    gated, width = config.flag("use_gated_mlp"), config.integer("hidden_size")
    classes, readout, note = heads.readout(files.path, state, width)
    (height, across), (rows, columns) = config.pair("image_size"), config.pair("patch_size")
    spec = ModelSpec(
        tubes=(TubeSpec((1, rows, columns), (1, rows, columns)),),
        frames=1,
        size=(height, across),
        **config.encoder(),
        classifiers=(("classes", classes),),
        hidden=config.integer("intermediate_size"),
        prefix=1 + config.integer("num_register_tokens", least=0),
        readout=readout,
        activation=config.choice("hidden_act", ACTIVATIONS),
        gated_mlp=gated,
        positions="rotary",
        rotary=Rotary(("height", "width"), base=config.number("rope_theta"), coordinates="centred"),
    )
    if spec.width // spec.heads % 4:
        raise CheckpointError(
            f"{files.path}: its heads have {spec.width // spec.heads} channels; expected a multiple of 4, a pair for "
            "each axis"
        )
    weights = blocks.tube(state, "embeddings.patch_embeddings", width, spec.tubes[0].kernel)
    weights |= _prefix(state, spec)
    for i in range(spec.depth):
        names = GATED if gated else BLOCK
        weights |= blocks.read_block(state, f"layer.{i}.", f"blocks.{i}", names, width, spec.hidden)
    weights |= blocks.norm(state, "norm", "norm", width) | blocks.classifier(state, "classifier", spec)
    state.leave(["embeddings.mask_token"], "it is for pre-training")
    made = contract(files, said, PROCESSOR, 1, {})
    notes = (note, *config.answer_notes())
    found = labels(files.path, options, config.id2label, classes)
    return result.checkpoint(files, state, spec, weights, made, found, notes)


def _prefix(state: State, spec: ModelSpec) -> Weights:
    """The class token, then the registers; neither has a position."""
    rows = [state.take("embeddings.cls_token", "prefix", (1, 1, spec.width))[0]]
    if "embeddings.register_tokens" in state:
        rows.append(state.take("embeddings.register_tokens", "prefix", (1, spec.prefix - 1, spec.width))[0])
    return {"prefix": torch.cat(rows)}  # (P, D)
