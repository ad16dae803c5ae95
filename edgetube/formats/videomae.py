"""VideoMAE classifiers as transformers saves them: dense 2x16x16 tubes, a fixed sine table, the mean of all tokens.

Tong et al., "VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video Pre-Training",
NeurIPS 2022.
"""

from __future__ import annotations

from edgetube.errors import CheckpointError
from edgetube.formats.reading import blocks, result, tables
from edgetube.formats.reading.dialects import one_dialect
from edgetube.formats.reading.files import Files, ReadOptions
from edgetube.formats.reading.processors import contract
from edgetube.formats.reading.said import Said, labels
from edgetube.formats.reading.tensors import State
from edgetube.formats.reading.transformers import ACTIVATIONS, CLASSIC, Config
from edgetube.model.checkpoints import Checkpoint
from edgetube.spec import ModelSpec, TubeSpec

NAME = "transformers VideoMAE"

DEFAULTS = {
    "image_size": 224, "patch_size": 16, "num_frames": 16, "tubelet_size": 2, "hidden_size": 768,
    "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "use_mean_pooling": True,
}  # fmt: skip
"""Of `VideoMAEConfig`."""

PROCESSOR = "VideoMAEImageProcessor"

READOUT_EPS = 1e-5
"""Of `fc_norm`: the class leaves it at PyTorch's default, whatever the configuration says."""


def detect(files: Files) -> bool:
    """A folder whose configuration says so."""
    return files.model_type == "videomae"


def read(files: Files, options: ReadOptions) -> Checkpoint:
    """See `edgetube.formats.Format`."""
    options.allow("spec", "labels", "adapter")
    config, said = Config(files, DEFAULTS), Said.of(options)
    state = State(files.path, files.tensors, one_dialect)
    if "classifier.weight" not in state:
        raise CheckpointError(
            f"{files.path} has no classifier: it is VideoMAE as it was pre-trained; fine-tune it on labels first"
        )
    if not config.flag("use_mean_pooling"):
        raise CheckpointError(
            f"{files.path}: use_mean_pooling is false, so the classifier reads the first patch; edgetube knows no "
            "such model"
        )
    patch, width = config.integer("patch_size"), config.integer("hidden_size")
    kernel = (config.integer("tubelet_size"), patch, patch)
    height, across = config.pair("image_size")
    classes = state.shape("classifier.weight")[0]
    spec = ModelSpec(
        tubes=(TubeSpec(kernel, kernel),),
        frames=config.integer("num_frames"),
        size=(height, across),
        **config.encoder(),
        classifiers=(("classes", classes),),
        hidden=config.integer("intermediate_size"),
        readout=("mean",),
        final_norm="readout",
        final_norm_eps=READOUT_EPS,
        activation=config.choice("hidden_act", ACTIVATIONS),
        positions="stored",
        position_resize="bicubic",
    )
    weights = blocks.tube(state, "videomae.embeddings.patch_embeddings.projection", width, kernel)
    weights["positions"] = tables.sine(spec.tokens, width)
    for i in range(spec.depth):
        weights |= blocks.read_block(state, f"videomae.layers.{i}.", f"blocks.{i}", CLASSIC, width, spec.hidden)
    weights |= blocks.norm(state, "fc_norm", "norm", width) | blocks.classifier(state, "classifier", spec)
    made = contract(files, said, PROCESSOR, spec.frames, {"sampling": "stride", "stride": 4})
    return result.checkpoint(
        files, state, spec, weights, made, labels(files.path, options, config.id2label, classes), config.answer_notes()
    )
