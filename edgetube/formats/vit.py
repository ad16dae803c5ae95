"""ViT and DeiT image classifiers as transformers saves them.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; Touvron et al., "Training data-efficient image
transformers & distillation through attention", ICML 2021.
"""

from __future__ import annotations

import torch

from edgetube.errors import CheckpointError
from edgetube.formats.reading import blocks, result
from edgetube.formats.reading.dialects import one_dialect
from edgetube.formats.reading.files import Files, ReadOptions
from edgetube.formats.reading.processors import contract
from edgetube.formats.reading.said import Said, labels
from edgetube.formats.reading.tensors import State
from edgetube.formats.reading.transformers import ACTIVATIONS, CLASSIC, Config
from edgetube.model.checkpoints import Checkpoint
from edgetube.spec import ModelSpec, TubeSpec

NAME = "transformers ViT or DeiT"

DEFAULTS = {
    "image_size": 224, "patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
}  # fmt: skip
"""Of `ViTConfig` and `DeiTConfig`."""

PROCESSORS = {"vit": "ViTImageProcessor", "deit": "DeiTImageProcessor"}


def detect(files: Files) -> bool:
    """A folder whose configuration says so."""
    return files.model_type in PROCESSORS


def read(files: Files, options: ReadOptions) -> Checkpoint:
    """See `edgetube.formats.Format`."""
    options.allow("spec", "labels", "adapter")
    config, said, kind = Config(files, DEFAULTS), Said.of(options), files.model_type
    state = State(files.path, files.tensors, one_dialect)
    teacher = "distillation_classifier.weight" in state
    head = "cls_classifier" if teacher else "classifier"
    if f"{head}.weight" not in state:
        raise CheckpointError(f"{files.path} has no classifier: fine-tune the model on labels first")
    patch, width = config.integer("patch_size"), config.integer("hidden_size")
    height, across = config.pair("image_size")
    classes = state.shape(f"{head}.weight")[0]
    tokens = ["cls_token", "distillation_token"] if kind == "deit" else ["cls_token"]
    spec = ModelSpec(
        tubes=(TubeSpec((1, patch, patch), (1, patch, patch)),),
        frames=1,
        size=(height, across),
        **config.encoder(),
        classifiers=(("classes", classes),),
        hidden=config.integer("intermediate_size"),
        prefix=len(tokens),
        readout=("prefix.0", "prefix.1") if teacher else ("prefix.0",),
        activation=config.choice("hidden_act", ACTIVATIONS),
        positions="stored",
        position_resize="bicubic",
    )
    place = f"{kind}.embeddings."
    weights = blocks.tube(state, f"{place}patch_embeddings.projection", width, (1, patch, patch))
    table = state.take(f"{place}position_embeddings", "positions, prefix", (1, spec.sequence, width))[0]
    rows = torch.cat([state.take(place + name, "prefix", (1, 1, width))[0] for name in tokens])  # (P, D)
    weights |= {"positions": table[spec.prefix :].clone(), "prefix": rows + table[: spec.prefix]}
    for i in range(spec.depth):
        weights |= blocks.read_block(state, f"{kind}.layers.{i}.", f"blocks.{i}", CLASSIC, width, spec.hidden)
    weights |= blocks.norm(state, f"{kind}.layernorm", "norm", width)
    heads = ("cls_classifier", "distillation_classifier") if teacher else (head,)
    weights |= blocks.mean_classifier(state, heads, spec)
    state.leave([f"{place}mask_token"], "it is for pre-training")
    state.leave([f"{kind}.pooler."], "the classifier does not read it")
    made = contract(files, said, PROCESSORS[kind], 1, {})
    return result.checkpoint(
        files, state, spec, weights, made, labels(files.path, options, config.id2label, classes), config.answer_notes()
    )
