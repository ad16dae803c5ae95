"""CLIP's image tower as transformers saves it: image classifiers, and zero-shot ones.

A classifier reads the mean of the patches as the last block leaves them, a zero-shot one the class token, normalised
and projected.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
"""

from __future__ import annotations

from edgetube.errors import CheckpointError
from edgetube.formats.reading import blocks
from edgetube.formats.reading.files import Files, ReadOptions
from edgetube.formats.reading.towers import Tower
from edgetube.model.checkpoints import Checkpoint

NAME = "transformers CLIP"

DEFAULTS = {
    "image_size": 224, "patch_size": 32, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
"""Of `CLIPVisionConfig`."""

PROCESSOR = "CLIPImageProcessor"


def detect(files: Files) -> bool:
    """A folder whose configuration says so."""
    return files.model_type in ("clip", "clip_vision_model")


def read(files: Files, options: ReadOptions) -> Checkpoint:
    """See `edgetube.formats.Format`."""
    tower = Tower.of(files, options, DEFAULTS)
    state = tower.state
    if tower.text is None:
        spec = tower.spec(embedding_norm=True, prefix=1, readout=("mean",), final_norm="none")
        weights = tower.encoder(spec) | blocks.classifier(state, "classifier", spec)
        state.leave(["post_layernorm."], "the classifier reads the tokens before it")
    else:
        if "visual_projection.weight" not in state:
            raise CheckpointError(f"{files.path} was saved without visual_projection, which text features belong to")
        length = state.shape("visual_projection.weight")[0]
        spec = tower.spec(embedding_norm=True, prefix=1, readout=("prefix.0",), final_norm="readout", projection=length)
        projection = state.take("visual_projection.weight", "projection", (length, spec.width))
        weights = tower.encoder(spec) | tower.zero_shot(spec, projection)
        weights |= blocks.norm(state, "post_layernorm", "norm", spec.width)
    weights |= blocks.norm(state, "pre_layrnorm", "embedding_norm", spec.width)
    return tower.checkpoint(spec, weights, PROCESSOR)
