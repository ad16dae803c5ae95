"""SigLIP and SigLIP 2 at a fixed resolution as transformers saves them: image classifiers, and zero-shot ones.

A classifier reads the mean of the tokens, a zero-shot one the pooling head: one learned query, folded into constants.

Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023; Tschannen et al., "SigLIP 2: Multilingual
Vision-Language Encoders with Improved Semantic Understanding, Localization, and Dense Features", 2025.
"""

from __future__ import annotations

from edgetube.errors import CheckpointError
from edgetube.formats.reading import blocks
from edgetube.formats.reading.blocks import Weights
from edgetube.formats.reading.files import Files, ReadOptions
from edgetube.formats.reading.towers import Tower
from edgetube.model.checkpoints import Checkpoint
from edgetube.spec import ModelSpec, QueryPool

NAME = "transformers SigLIP"

FIXED, NATIVE = ("siglip", "siglip_vision_model"), ("siglip2", "siglip2_vision_model")

DEFAULTS = {
    "image_size": 224, "patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
"""Of `SiglipVisionConfig`."""

PROCESSOR = "SiglipImageProcessor"


def detect(files: Files) -> bool:
    """A folder whose configuration says so."""
    return files.model_type in FIXED + NATIVE


def read(files: Files, options: ReadOptions) -> Checkpoint:
    """See `edgetube.formats.Format`."""
    if files.model_type in NATIVE:
        raise CheckpointError(
            f"{files.path} is SigLIP 2 with NaFlex, whose grid of patches follows each image; edgetube takes SigLIP 2 "
            "at a fixed resolution, whose model_type is siglip"
        )
    tower = Tower.of(files, options, DEFAULTS)
    state = tower.state
    if tower.text is None:
        spec = tower.spec(readout=("mean",))
        weights = tower.encoder(spec) | blocks.classifier(state, "classifier", spec)
        state.leave(["head."], "the classifier reads the mean of the tokens")
    else:
        if "head.probe" not in state:
            raise CheckpointError(f"{files.path} was saved without its pooling head, which text features belong to")
        heads, hidden = tower.config.integer("num_attention_heads"), tower.config.integer("intermediate_size")
        width = tower.config.integer("hidden_size")
        spec = tower.spec(readout=("query",), query_pool=QueryPool(heads, hidden), projection=width)
        weights = tower.encoder(spec) | _pool(tower, spec) | tower.zero_shot(spec, None)
    weights |= blocks.norm(state, "post_layernorm", "norm", spec.width)
    return tower.checkpoint(spec, weights, PROCESSOR)


def _pool(tower: Tower, spec: ModelSpec) -> Weights:
    """The pooling head: attention of one constant query, then an MLP with a LayerNorm before it."""
    state, width, to, pool = tower.state, spec.width, "pool.query", spec.query_pool
    assert pool is not None
    query = state.take("head.probe", f"{to}.score", (1, 1, width))[0, 0]
    parts = f"{to}.score, {to}.value"
    q, key, value = state.take("head.attention.in_proj_weight", parts, (3 * width, width)).chunk(3)
    q_bias, _, value_bias = state.take("head.attention.in_proj_bias", parts, (3 * width,)).chunk(3)
    weights = {
        f"{to}.score.weight": blocks.folded_query(query, (q, q_bias), key, pool.heads),
        f"{to}.value.weight": value.clone(),
        f"{to}.value.bias": value_bias.clone(),
    }
    for name, part, shape in (
        ("head.attention.out_proj", "proj", (width, width)),
        ("head.mlp.fc1", "mlp.fc1", (pool.hidden, width)),
        ("head.mlp.fc2", "mlp.fc2", (width, pool.hidden)),
    ):
        weights |= blocks.placed_linear(state, name, f"{to}.{part}", shape)
    return weights | blocks.norm(state, "head.layernorm", f"{to}.mlp_norm", width)
