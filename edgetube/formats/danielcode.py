"""TubeViT in PyTorch as https://github.com/daniel-code/TubeViT trains it: checkpoints of Lightning, and state dicts.

It is the paper's model with the tubes of 8x8x8 resized for the others, a table of positions of its own, and a class
token that the attention pooling reads beside the tubes' tokens. Its later version with space-to-depth is refused: how
that orders its channels is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetube import strict
from edgetube.contract import LARGEST
from edgetube.errors import CheckpointError, FormatError
from edgetube.formats.reading import blocks, result
from edgetube.formats.reading.blocks import Weights
from edgetube.formats.reading.files import Files, ReadOptions
from edgetube.formats.reading.said import Said, input_contract, labels
from edgetube.formats.reading.tensors import State
from edgetube.model.checkpoints import Checkpoint
from edgetube.spec import PAPER_TUBES, ModelSpec, Triple

NAME = "daniel-code/TubeViT"

SAID = ("frames", "size", "heads")
"""Fields of the model that a user may say."""

TOKENIZER = "sparse_tubes_tokenizer."

KERNEL = PAPER_TUBES[0].kernel
"""The one that is stored."""

INPUT = {
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "resize": "stretch", "sampling": "stride", "stride": 1,
}  # fmt: skip
"""Of its training and evaluation: consecutive frames, stretched."""


def detect(files: Files) -> bool:
    """Tensors in its names."""
    return not files.config and any(name.startswith(TOKENIZER) for name in files.tensors.names())


def read(files: Files, options: ReadOptions) -> Checkpoint:
    """See `edgetube.formats.Format`."""
    options.allow("spec", "labels", "ema")
    said, state = Said.of(options, *SAID), State(files.path, files.tensors)
    _refuse(state)
    spec = _spec(files, state, said)
    width = spec.width
    weights: Weights = {"tubes.kernel": state.take(f"{TOKENIZER}conv_proj_weight", "tubes.kernel", (width, 3, *KERNEL))}
    biases = state.take(f"{TOKENIZER}conv_proj_bias", "tubes.biases", (len(spec.tubes), width))
    weights |= {f"tubes.biases.{i}": bias.clone() for i, bias in enumerate(biases)}
    table = state.take("pos_embedding", "positions, prefix", (spec.sequence, width))
    token = state.take("class_token", "prefix", (1, 1, width))[0]
    weights |= {"positions": table[1:].clone(), "prefix": token + table[:1]}
    for i in range(spec.depth):
        place = f"encoder.layers.encoder_layer_{i}."
        weights |= blocks.read_block(state, place, f"blocks.{i}", blocks.TORCHVISION, width, spec.hidden)
    weights |= blocks.norm(state, "encoder.ln", "norm", width)
    weights |= blocks.placed_linear(state, "attention_pooling.W", "pool.score", (1, width))
    weights |= blocks.classifier(state, "heads.head", spec)
    made = input_contract(files.path, said, _input(spec, said))
    named = labels(files.path, options, None, spec.classifiers[0][1])
    note = "its input is that of its training, consecutive frames, stretched; its script for inference does otherwise"
    return result.checkpoint(files, state, spec, weights, made, named, () if said.input else (note,))


def _refuse(state: State) -> None:
    if any(
        name.startswith((f"{TOKENIZER}conv_proj_weights.", f"{TOKENIZER}conv_proj_biases.")) for name in state.names
    ):
        raise CheckpointError(
            f"{state.what} is of its later version, with kernels of their own or space-to-depth; how that orders its "
            "channels is not known: edgetube reads the first version"
        )
    if "heads.pre_logits.weight" in state:
        raise CheckpointError(f"{state.what} has a layer before its classifier; edgetube knows no such model")


def _spec(files: Files, state: State, said: Said) -> ModelSpec:
    """The model: its hyperparameters, which a checkpoint of Lightning holds, and its shapes."""
    found = files.tensors.facts.get("hyper_parameters")
    stored: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    clip = _clip(files, stored)
    width = state.shape("class_token")[2]
    return ModelSpec(
        tubes=PAPER_TUBES,
        frames=said.model_field(files.path, "frames", clip and clip[0]),
        size=said.model_field(files.path, "size", clip and clip[1:]),
        width=width,
        depth=sum(name.endswith(".ln_1.weight") for name in state.names),
        heads=said.model_field(files.path, "heads", stored.get("num_heads")),
        classifiers=(("classes", state.shape("heads.head.weight")[0]),),
        hidden=state.shape("encoder.layers.encoder_layer_0.mlp.0.weight")[0],
        kernel=KERNEL,
        prefix=1,
        positions="stored",
    )


def _clip(files: Files, stored: Mapping[str, Any]) -> Triple | None:
    """Frames, height and width of `video_shape` (C, T, H, W)."""
    value = stored.get("video_shape")
    if value is None:
        return None
    try:
        sides = [int(side) for side in value]
        _, frames, height, width = (
            strict.integer(side, "video_shape", 1, LARGEST) for side in strict.items(sides, "video_shape", 4, 4)
        )
    except (FormatError, TypeError, ValueError) as error:
        raise CheckpointError(f"{files.path}: its video_shape is {value!r:.60}; expected C, T, H, W") from error
    return frames, height, width


def _input(spec: ModelSpec, said: Said) -> dict[str, Any]:
    """Fields of the contract; another sampling of the user's has no stride."""
    found: dict[str, Any] = {**INPUT, "frames": spec.frames, "height": spec.size[0], "width": spec.size[1]}
    if "fps" in said.input or said.input.get("sampling", "stride") != "stride":
        found = {key: value for key, value in found.items() if key not in ("sampling", "stride")}
    return found
