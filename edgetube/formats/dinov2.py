"""DINOv2 image classifiers and towers, with registers or without, as transformers saves them: LayerScale.

The classifier of transformers reads the class token and the mean of the patches; one beside a tower may read the class
token alone.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", TMLR 2024; Darcet et al., "Vision
Transformers Need Registers", ICLR 2024.
"""

from __future__ import annotations

import torch

from edgetube.formats.reading import blocks, heads, result, scaled_blocks
from edgetube.formats.reading.blocks import Weights
from edgetube.formats.reading.dialects import one_dialect
from edgetube.formats.reading.files import Files, ReadOptions
from edgetube.formats.reading.processors import contract
from edgetube.formats.reading.said import Said, labels
from edgetube.formats.reading.tensors import State
from edgetube.formats.reading.transformers import ACTIVATIONS, Config
from edgetube.model.checkpoints import Checkpoint
from edgetube.spec import ModelSpec, PositionResize, TubeSpec

NAME = "transformers DINOv2"

PLAIN, REGISTERS = "dinov2", "dinov2_with_registers"

DEFAULTS = {
    "image_size": 224, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "mlp_ratio": 4,
    "hidden_act": "gelu", "layer_norm_eps": 1e-6, "use_swiglu_ffn": False,
}  # fmt: skip
OWN_DEFAULTS = {PLAIN: {"patch_size": 14}, REGISTERS: {"patch_size": 16, "num_register_tokens": 4}}
"""Of `Dinov2Config` and `Dinov2WithRegistersConfig`."""

RESIZE: dict[str, PositionResize] = {PLAIN: "bicubic", REGISTERS: "bicubic-antialias"}
"""How each class takes its position table, of 37x37 patches in the published files, to the size of the input."""

PROCESSOR = "BitImageProcessor"


def detect(files: Files) -> bool:
    """A folder whose configuration says so."""
    return files.model_type in RESIZE


def read(files: Files, options: ReadOptions) -> Checkpoint:
    """See `edgetube.formats.Format`."""
    options.allow("spec", "labels", "adapter", "classifier")
    kind = files.model_type
    config, said = Config(files, DEFAULTS | OWN_DEFAULTS[kind]), Said.of(options)
    state = State(files.path, files.tensors, lambda name: one_dialect(name).removeprefix(f"{kind}."))
    gated, width = config.flag("use_swiglu_ffn"), config.integer("hidden_size")
    (height, across), (rows, columns) = config.pair("image_size"), config.pair("patch_size")
    classes, readout, note = heads.readout(files.path, state, width)
    spec = ModelSpec(
        tubes=(TubeSpec((1, rows, columns), (1, rows, columns)),),
        frames=1,
        size=(height, across),
        **config.encoder(),
        classifiers=(("classes", classes),),
        hidden=_hidden(width, config.number("mlp_ratio"), gated),
        prefix=1 + (config.integer("num_register_tokens") if kind == REGISTERS else 0),
        readout=readout,
        activation="silu" if gated else config.choice("hidden_act", ACTIVATIONS),
        gated_mlp=gated,
        positions="stored",
        position_resize=RESIZE[kind],
    )
    weights = _embedding(state, spec) | scaled_blocks.read_encoder(state, spec)
    made = contract(files, said, PROCESSOR, 1, {})
    notes = (*([note] if files.classifier else []), *config.answer_notes())
    names = None if files.classifier else config.id2label
    found = labels(files.path, options, names, classes)
    return result.checkpoint(files, state, spec, weights, made, found, notes)


def _hidden(width: int, ratio: float, gated: bool) -> int:
    """Width of the MLP's hidden layer: SwiGLU keeps two thirds, rounded up to a multiple of 8."""
    hidden = int(width * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden


def _embedding(state: State, spec: ModelSpec) -> Weights:
    """The tube, the positions of the patches, and the prefix: the class token at its position, registers without."""
    place, width, registers = "embeddings.", spec.width, spec.prefix - 1
    weights = blocks.tube(state, f"{place}patch_embeddings.projection", width, spec.tubes[0].kernel)
    table = state.take(f"{place}position_embeddings", "positions, prefix", (1, 1 + spec.tokens, width))[0]
    rows = state.take(f"{place}cls_token", "prefix", (1, 1, width))[0] + table[:1]  # (1, D)
    if registers:
        found = state.take(f"{place}register_tokens", "prefix", (1, registers, width))[0]
        rows = torch.cat([rows, found])  # (P, D)
    state.leave([f"{place}mask_token"], "it is for pre-training")
    return weights | {"positions": table[1:].clone(), "prefix": rows}
