"""Encoders of blocks with LayerScale under the names that transformers gives those of self-distilled image towers."""

from __future__ import annotations

from dataclasses import replace

from edgetube.formats.reading import blocks, heads
from edgetube.formats.reading.blocks import BlockNames, Weights
from edgetube.formats.reading.tensors import State
from edgetube.spec import ModelSpec

BLOCK = BlockNames(
    norm1="norm1",
    qkv=("attention.query", "attention.key", "attention.value"),
    proj="attention.o_proj",
    norm2="norm2",
    fc1=("mlp.fc1",),
    fc2="mlp.fc2",
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
)
FUSED = replace(BLOCK, fc1=("mlp.weights_in",), fc2="mlp.weights_out", gated=True)
SPLIT = replace(BLOCK, fc1=("mlp.gate_proj", "mlp.up_proj"), fc2="mlp.down_proj", gated=True)
"""With SwiGLU, as transformers 4 and 5 name it."""


def read_encoder(state: State, spec: ModelSpec) -> Weights:
    """Blocks, last LayerNorm and classifier, by names without what stands before `layers.`."""
    names = BLOCK if not spec.gated_mlp else FUSED if "layers.0.mlp.weights_in.weight" in state else SPLIT
    weights: Weights = {}
    for i in range(spec.depth):
        weights |= blocks.read_block(state, f"layers.{i}.", f"blocks.{i}", names, spec.width, spec.hidden)
    weights |= blocks.norm(state, "layernorm", "norm", spec.width)
    return weights | blocks.classifier(state, heads.NAME, spec)
