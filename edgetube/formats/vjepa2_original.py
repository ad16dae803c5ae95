"""V-JEPA 2 as its authors' scripts save it: a pre-trained encoder, and a classifier that was trained on top of it.

The two are in one file, or in two files of one folder. Sizes that tensors do not have are said with `--spec`.
"""

from __future__ import annotations

import re
from typing import Any

from edgetube.contract import InputContract
from edgetube.errors import CheckpointError
from edgetube.formats.reading import blocks, result
from edgetube.formats.reading.blocks import BlockNames, Weights
from edgetube.formats.reading.files import Files, ReadOptions
from edgetube.formats.reading.said import Said, input_contract, labels, size_of
from edgetube.formats.reading.tensors import PROBES, State
from edgetube.model.checkpoints import Checkpoint
from edgetube.spec import AXES, ModelSpec, QueryPool, Rotary, TubeSpec

NAME = "V-JEPA 2's own files"

SAID = ("heads", "pool_heads", "frames", "size", "activation", "norm_eps")
"""Fields of the model that a user may say."""

EPS, POOL_EPS = 1e-6, 1e-5
"""Of the LayerNorms of the encoder, and of those of the classifier, which are made with PyTorch's default."""

BLOCK = BlockNames(norm1="norm1", qkv=("attn.qkv",), proj="attn.proj", norm2="norm2", fc1=("mlp.fc1",), fc2="mlp.fc2")

PROBE = f"{PROBES}.0."
"""The first classifier."""

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""What the authors' evaluation normalises by."""


def detect(files: Files) -> bool:
    """Patches over time and biases of queries, keys and values, or a pooler that a query reads."""
    if files.config:
        return False
    shapes = files.tensors.shapes
    encoder = len(shapes.get("patch_embed.proj.weight", ())) == 5 and "blocks.0.attn.qkv.bias" in shapes
    return encoder or f"{PROBE}pooler.query_tokens" in shapes


def read(files: Files, options: ReadOptions) -> Checkpoint:
    """See `edgetube.formats.Format`."""
    options.allow("spec", "labels")
    state, said = State(files.path, files.tensors), Said.of(options, *SAID)
    _check(state)
    spec = _spec(state, said)
    width = spec.width
    weights = blocks.tube(state, "patch_embed.proj", width, spec.tubes[0].kernel)
    order = blocks.rotary_order(width, spec.heads)
    for i in range(spec.depth):
        weights |= blocks.read_block(state, f"blocks.{i}.", f"blocks.{i}", BLOCK, width, spec.hidden, order)
    weights |= blocks.norm(state, "norm", "norm", width) | _pool(state, spec)
    weights |= blocks.classifier(state, f"{PROBE}linear", spec)
    state.leave(["pos_embed"], "its positions are rotary")
    count = len({name.split(".")[1] for name in state.names if name.startswith(f"{PROBES}.")})
    state.leave([f"{PROBES}.{i}." for i in range(1, count)], "the first classifier is taken")
    notes = (
        f"the encoder is {files.tensors.nest}" if files.tensors.nest else "the encoder is that of the file",
        "its classifier is taken for one that reads the last layer: one that reads several (those of Diving48) has the "
        "same tensors and would give wrong answers",
        "its input is that of its authors' evaluation, as far as --spec does not say another",
        *([f"it has {count} classifiers, of which the first is taken"] if count > 1 else []),
    )
    names = labels(files.path, options, None, spec.classifiers[0][1])
    return result.checkpoint(files, state, spec, weights, _contract(files, said, spec), names, notes)


def _check(state: State) -> None:
    """Check that both parts are there.

    Raises:
        CheckpointError: one is missing, or the positions are those of the first V-JEPA.
    """
    folder = "give a folder with two files, that of the encoder and that of the classifier"
    if f"{PROBE}linear.weight" not in state:
        raise CheckpointError(f"{state.what} has no classifier: it is V-JEPA 2 as it was pre-trained; {folder}")
    if "patch_embed.proj.weight" not in state:
        raise CheckpointError(f"{state.what} has no encoder: it is a classifier on top of V-JEPA 2; {folder}")
    if "pos_embed" in state and f"{PROBE}pooler.blocks.0.norm1.weight" not in state:
        raise CheckpointError(
            f"{state.what} stores positions, and its classifier has no blocks: it may be the first V-JEPA, which "
            "edgetube does not know"
        )


def _spec(state: State, said: Said) -> ModelSpec:
    needed = ("heads", "pool_heads", "frames", "size")
    if missing := [name for name in needed if name not in said.model]:
        raise CheckpointError(
            f"{state.what} does not say {', '.join(missing)}; say it with --spec FILE, as in "
            '{"model": {"heads": 16, "pool_heads": 16, "frames": 16, "size": [256, 256]}}; the authors\' encoders have '
            "16 heads (ViT-L, ViT-H) or 22 (ViT-g), their classifiers 16"
        )
    width, _, *kernel = state.shape("patch_embed.proj.weight")
    tube, pool = (kernel[0], kernel[1], kernel[2]), f"{PROBE}pooler."
    height, across = size_of(state.what, said.model["size"])
    return ModelSpec(
        tubes=(TubeSpec(tube, tube),),
        frames=said.model["frames"],
        size=(height, across),
        width=width,
        depth=_count(state, "blocks."),
        heads=said.model["heads"],
        classifiers=(("classes", state.shape(f"{PROBE}linear.weight")[0]),),
        hidden=state.shape("blocks.0.mlp.fc1.weight")[0],
        readout=("query",),
        query_pool=QueryPool(
            said.model["pool_heads"],
            state.shape(f"{pool}cross_attention_block.mlp.fc1.weight")[0],
            _count(state, f"{pool}blocks."),
            norm=True,
            projection=False,
            norm_eps=POOL_EPS,
        ),
        positions="rotary",
        rotary=Rotary(AXES, frequencies="channels"),
        norm_eps=said.model.get("norm_eps", EPS),
        activation=said.model.get("activation", "gelu"),
    )


def _count(state: State, prefix: str) -> int:
    """How many numbers stand behind a prefix."""
    found = (re.match(r"\d+(?=\.)", name.removeprefix(prefix)) for name in state.names if name.startswith(prefix))
    return len({number[0] for number in found if number})


def _pool(state: State, spec: ModelSpec) -> Weights:
    """The pool: its blocks, then the attention of one query, which is also added to what it reads."""
    pool, width, to = spec.query_pool, spec.width, "pool.query"
    assert pool is not None
    place = f"{PROBE}pooler."
    weights: Weights = {}
    for i in range(pool.depth):
        weights |= blocks.read_block(state, f"{place}blocks.{i}.", f"{to}.blocks.{i}", BLOCK, width, pool.hidden)
    cross = f"{place}cross_attention_block."
    query = state.take(f"{place}query_tokens", f"{to}.score, {to}.value", (1, 1, width))[0, 0]
    parts, square = f"{to}.score, {to}.value", (width, width)
    kv, offset = blocks.linear(state, f"{cross}xattn.kv", parts, (2 * width, width))
    return weights | blocks.reading_query(
        state,
        cross,
        to,
        spec,
        query=query,
        q=blocks.linear(state, f"{cross}xattn.q", f"{to}.score", square),
        key=kv[:width],
        value=(kv[width:], offset[width:]),
        norms=("norm1", "norm2"),
    )


def _contract(files: Files, said: Said, spec: ModelSpec) -> InputContract:
    """The input of the authors' evaluation: the short side to int(256 / 224 of the crop); frames as for that many."""
    height, width = spec.size
    given: dict[str, Any] = {"frames": spec.frames, "height": height, "width": width, **IMAGENET}
    if height == width:
        given["resize_size"] = int(256 / 224 * height)
    if not said.input.keys() & {"sampling", "fps"}:
        given |= {"sampling": "stride", "stride": 4 if spec.frames <= 16 else 2}
    return input_contract(files.path, said, given)
