"""ViViT classifiers as transformers saves them, model 1 of the paper: all tokens attend to all; a class token is read.

Arnab et al., "ViViT: A Video Vision Transformer", ICCV 2021.
"""

from __future__ import annotations

from edgetube.contract import InputContract
from edgetube.errors import CheckpointError
from edgetube.formats.reading import blocks, result
from edgetube.formats.reading.dialects import one_dialect
from edgetube.formats.reading.files import Files, ReadOptions
from edgetube.formats.reading.processors import CLASSES, class_of, contract
from edgetube.formats.reading.said import Said, labels
from edgetube.formats.reading.tensors import State
from edgetube.formats.reading.transformers import ACTIVATIONS, CLASSIC, Config
from edgetube.model.checkpoints import Checkpoint
from edgetube.spec import ModelSpec, TubeSpec

NAME = "transformers ViViT"

DEFAULTS = {
    "image_size": 224, "num_frames": 32, "tubelet_size": [2, 16, 16], "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu_fast", "layer_norm_eps": 1e-6,
}  # fmt: skip
"""Of `VivitConfig`."""

PROCESSOR = "VivitImageProcessor"


def detect(files: Files) -> bool:
    """A folder whose configuration says so."""
    return files.model_type == "vivit"


def read(files: Files, options: ReadOptions) -> Checkpoint:
    """See `edgetube.formats.Format`."""
    options.allow("spec", "labels", "adapter")
    config, said = Config(files, DEFAULTS), Said.of(options)
    state = State(files.path, files.tensors, one_dialect)
    if "classifier.weight" not in state:
        raise CheckpointError(f"{files.path} has no classifier: fine-tune the model on labels first")
    spec = _spec(config, state.shape("classifier.weight")[0])
    width, place = spec.width, "vivit.embeddings."
    weights = blocks.tube(state, f"{place}patch_embeddings.projection", width, spec.tubes[0].kernel)
    table = state.take(f"{place}position_embeddings", "positions, prefix", (1, spec.sequence, width))[0]
    token = state.take(f"{place}cls_token", "prefix", (1, 1, width))[0]
    weights |= {"positions": table[1:].clone(), "prefix": token + table[:1]}
    for i in range(spec.depth):
        weights |= blocks.read_block(state, f"vivit.layers.{i}.", f"blocks.{i}", CLASSIC, width, spec.hidden)
    weights |= blocks.norm(state, "vivit.layernorm", "norm", width) | blocks.classifier(state, "classifier", spec)
    state.leave(["vivit.pooler."], "the classifier does not read it")
    made = contract(files, said, PROCESSOR, spec.frames, {"sampling": "stride", "stride": 2})
    names = labels(files.path, options, config.id2label, spec.classifiers[0][1])
    return result.checkpoint(
        files, state, spec, weights, made, names, (*config.answer_notes(), *_range_notes(files, said, made))
    )


def _spec(config: Config, classes: int) -> ModelSpec:
    frames, down, across = config.pair("tubelet_size", 3)
    height, width = config.pair("image_size")
    return ModelSpec(
        tubes=(TubeSpec((frames, down, across), (frames, down, across)),),
        frames=config.integer("num_frames"),
        size=(height, width),
        **config.encoder(),
        classifiers=(("classes", classes),),
        hidden=config.integer("intermediate_size"),
        prefix=1,
        readout=("prefix.0",),
        activation=config.choice("hidden_act", ACTIVATIONS),
        positions="stored",
        position_resize="bicubic",
    )


def _range_notes(files: Files, said: Said, made: InputContract) -> tuple[str, ...]:
    """A note where the processor shifts the pixels by its offset and by a mean as well, as its class does by itself."""
    if not files.processor or "mean" in said.input:
        return ()
    settings = {**CLASSES[class_of(files.processor, PROCESSOR)], **files.processor}
    mean = settings["image_mean"]
    normalised = settings.get("do_normalize", True) and any(mean if isinstance(mean, list) else [mean])
    if not (settings.get("offset") and settings.get("do_rescale", True) and normalised):
        return ()
    low, high = (((black - made.mean[0]) / made.std[0]) for black in (0, 1))
    return (
        f"its processor takes both an offset and a mean off the pixels, so they range from {low:g} to {high:g}; if it "
        "was trained on another range, say mean and std of pixels in 0..1 with --spec",
    )
