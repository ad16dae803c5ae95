"""V-JEPA 2 video classifiers as transformers saves them: rotary positions, and a pooler that a learned query reads.

Assran et al., "V-JEPA 2: Self-Supervised Video Models Enable Understanding, Prediction and Planning", 2025.
"""

from __future__ import annotations

from typing import Any

from edgetube.errors import CheckpointError
from edgetube.formats.reading import blocks, result
from edgetube.formats.reading.blocks import BlockNames, Weights
from edgetube.formats.reading.files import Files, ReadOptions
from edgetube.formats.reading.processors import CLASSES, class_of, contract
from edgetube.formats.reading.said import Said, labels
from edgetube.formats.reading.tensors import State
from edgetube.formats.reading.transformers import ACTIVATIONS, SELF_ATTENTION, Config
from edgetube.model.checkpoints import Checkpoint
from edgetube.spec import AXES, ModelSpec, QueryPool, Rotary, TubeSpec

NAME = "transformers V-JEPA 2"

DEFAULTS = {
    "crop_size": 256, "patch_size": 16, "frames_per_clip": 64, "tubelet_size": 2, "hidden_size": 1024,
    "num_hidden_layers": 24, "num_attention_heads": 16, "mlp_ratio": 4.0, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
    "num_pooler_layers": 3,
}  # fmt: skip
"""Of `VJEPA2Config`."""

PROCESSOR = "VJEPA2VideoProcessor"

POOLER_RATIO = 4
"""Hidden width of the pooler's MLPs over the model's, whatever `mlp_ratio` says."""

ENCODER = BlockNames(
    norm1="norm1",
    qkv=("attention.query", "attention.key", "attention.value"),
    proj="attention.proj",
    norm2="norm2",
    fc1=("mlp.fc1",),
    fc2="mlp.fc2",
)


def detect(files: Files) -> bool:
    """A folder whose configuration says so."""
    return files.model_type == "vjepa2"


def read(files: Files, options: ReadOptions) -> Checkpoint:
    """See `edgetube.formats.Format`."""
    options.allow("spec", "labels", "adapter")
    config, said = Config(files, DEFAULTS), Said.of(options)
    state = State(files.path, files.tensors)
    if "classifier.weight" not in state:
        raise CheckpointError(
            f"{files.path} has no classifier: it is V-JEPA 2 as it was pre-trained; train a pooler and a classifier on "
            "its features first"
        )
    spec = _spec(config, state.shape("classifier.weight")[0])
    width, kernel = spec.width, spec.tubes[0].kernel
    weights = blocks.tube(state, "vjepa2.encoder.embeddings.patch_embeddings.proj", width, kernel)
    order = blocks.rotary_order(width, spec.heads)
    for i in range(spec.depth):
        place = f"vjepa2.encoder.layer.{i}."
        weights |= blocks.read_block(state, place, f"blocks.{i}", ENCODER, width, spec.hidden, order)
    weights |= blocks.norm(state, "vjepa2.encoder.layernorm", "norm", width)
    weights |= _pooler(state, spec)
    classes = spec.classifiers[0][1]
    weights |= blocks.classifier(state, "classifier", spec)
    state.leave(["vjepa2.predictor."], "it is for pre-training")
    made = contract(files, said, PROCESSOR, spec.frames, _sampling(files, spec.frames))
    names, notes = labels(files.path, options, config.id2label, classes), config.answer_notes()
    if spec.size != (made.height, made.width):
        notes += (
            f"its configuration is for {spec.size[0]} pixels and its input has {made.height} x {made.width}: the "
            "positions are those of this input, where transformers numbers them as in the other",
        )
    return result.checkpoint(files, state, spec, weights, made, names, notes)


def _spec(config: Config, classes: int) -> ModelSpec:
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    tube = (config.integer("tubelet_size"), *config.pair("patch_size"))
    size, layers = config.integer("crop_size"), config.values["num_pooler_layers"]
    kernel = (tube[0], tube[1], tube[2])
    return ModelSpec(
        tubes=(TubeSpec(kernel, kernel),),
        frames=config.integer("frames_per_clip"),
        size=(size, size),
        **config.encoder(),
        classifiers=(("classes", classes),),
        hidden=int(width * config.number("mlp_ratio")),
        readout=("query",),
        query_pool=QueryPool(heads, POOLER_RATIO * width, layers, norm=True, projection=False),
        activation=config.choice("hidden_act", ACTIVATIONS),
        positions="rotary",
        rotary=Rotary(AXES, frequencies="channels"),
    )


def _pooler(state: State, spec: ModelSpec) -> Weights:
    """The pool: its blocks, then the attention of one query, which is also added to what it reads."""
    pool, width, to = spec.query_pool, spec.width, "pool.query"
    assert pool is not None
    weights: Weights = {}
    for i in range(pool.depth):
        place = f"pooler.self_attention_layers.{i}."
        weights |= blocks.read_block(state, place, f"{to}.blocks.{i}", SELF_ATTENTION, width, pool.hidden)
    place, square = "pooler.cross_attention_layer.", (width, width)
    query = state.take("pooler.query_tokens", f"{to}.score, {to}.value", (1, 1, width))[0, 0]
    state.leave([f"{place}cross_attn.k_proj.bias"], "a softmax over keys does not see it")
    return weights | blocks.reading_query(
        state,
        place,
        to,
        spec,
        query=query,
        q=blocks.linear(state, f"{place}cross_attn.q_proj", f"{to}.score", square),
        key=state.take(f"{place}cross_attn.k_proj.weight", f"{to}.score", square),
        value=blocks.linear(state, f"{place}cross_attn.v_proj", f"{to}.value", square),
        norms=("layer_norm1", "layer_norm2"),
    )


def _sampling(files: Files, frames: int) -> dict[str, Any]:
    """Fields of the contract that the processor's settings do not say, or that its class makes otherwise of them.

    The class resizes to int(crop * 256 / 224) whatever `size` says. The authors took every 4th frame for 16 frames,
    and every 2nd for 32 and 64.
    """
    found: dict[str, Any] = {"sampling": "stride", "stride": 4 if frames <= 16 else 2}
    settings = files.processor
    if settings and class_of(settings, PROCESSOR) == PROCESSOR and settings.get("do_resize", True):
        crop = settings.get("crop_size", CLASSES[PROCESSOR]["crop_size"])
        side = crop.get("height") if isinstance(crop, dict) else crop
        found |= {"resize": "short-side", "resize_size": int(side * 256 / 224)} if isinstance(side, int) else {}
    return found
