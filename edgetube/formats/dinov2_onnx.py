"""DINOv2 without registers in an ONNX file of PyTorch's TorchScript exporter: a classifier, or the tower of any model.

The file has the tensors of transformers' classes, and no configuration. A tower under something that is no classifier
(a depth map, a mask) is read with a classifier of its own; what the file computes behind the tower is left out.
"""

from __future__ import annotations

import math
import re

from torch import Tensor

from edgetube.errors import CheckpointError
from edgetube.formats.reading import blocks, heads, onnx_files, result, scaled_blocks
from edgetube.formats.reading.dialects import one_dialect
from edgetube.formats.reading.files import Files, ReadOptions
from edgetube.formats.reading.said import Said, input_contract, labels
from edgetube.formats.reading.tensors import State
from edgetube.model.checkpoints import Checkpoint
from edgetube.spec import ModelSpec, TubeSpec

NAME = "DINOv2 in ONNX"

PATCHES = "embeddings.patch_embeddings.projection"
SCALE = "layers.0.layer_scale1.lambda1"

STORED = "embeddings.position_embeddings"
"""The positions (1, 1 + N, D), where the exporter kept them whole."""

SPLIT = (re.compile(r"embeddings\.Concat(_\d+)?"), re.compile(r"embeddings\.Reshape(_\d+)?"))
"""Where it computed the position of the class token (1, 1, D) and those of the patches (1, N, D), to be resized."""

EPS = 1e-6


def detect(files: Files) -> bool:
    """An ONNX file with the first LayerScale and the patch embedding under one prefix."""
    if files.is_folder or files.path.suffix != onnx_files.SUFFIX:
        return False
    names = {one_dialect(name) for name in files.tensors.names()}
    return any(f"{place}{PATCHES}.weight" in names for place in _places(names))


def _places(names: set[str]) -> list[str]:
    """What stands before the names of towers."""
    return sorted(name.removesuffix(SCALE) for name in names if name.endswith(SCALE))


def read(files: Files, options: ReadOptions) -> Checkpoint:
    """See `edgetube.formats.Format`. The user says the number of heads, mean, std and how to resize."""
    options.allow("spec", "labels", "classifier")
    said = Said.of(options, "heads", "norm_eps")
    source = files.tensors
    place = _places({one_dialect(name) for name in source.names()})[0]
    outer = place.removesuffix(".").rpartition(".")[0]  # of the module that holds the tower and its classifier
    state = State(files.path, source, lambda name: one_dialect(name).removeprefix(place).removeprefix(f"{outer}."))
    width, _, rows, columns = state.shape(f"{PATCHES}.weight")
    classes, readout, note = heads.readout(files.path, state, width)
    positions, first = _positions(files, state, width)
    side = math.isqrt(len(positions))
    if side * side != len(positions):
        raise CheckpointError(f"{files.path} has {len(positions)} positions, which are no square of patches")
    spec = ModelSpec(
        tubes=(TubeSpec((1, rows, columns), (1, rows, columns)),),
        frames=1,
        size=(side * rows, side * columns),
        width=width,
        depth=sum(name.endswith("layer_scale1.lambda1") for name in state.names),
        heads=said.model_field(files.path, "heads", None),
        norm_eps=said.model_field(files.path, "norm_eps", EPS),
        classifiers=(("classes", classes),),
        hidden=state.shape("layers.0.mlp.fc1.bias")[0],
        prefix=1,
        readout=readout,
        positions="stored",
        position_resize="bicubic",
    )
    weights = blocks.tube(state, PATCHES, width, spec.tubes[0].kernel)
    weights |= {
        "positions": positions,
        "prefix": state.take("embeddings.cls_token", "prefix", (1, 1, width))[0] + first,
    }
    weights |= scaled_blocks.read_encoder(state, spec)
    state.leave(["embeddings.mask_token"], "it is for pre-training")
    if files.classifier:
        own = ("embeddings.", "layers.", "layernorm.", heads.NAME)
        state.leave([name for name in state.names if not name.startswith(own)], "it is behind the tower")
    made = input_contract(files.path, said, {"frames": 1, **_size(source.facts.get("input", ()))}, resized=True)
    found = labels(files.path, options, None, classes)
    return result.checkpoint(files, state, spec, weights, made, found, (note,))


def _positions(files: Files, state: State, width: int) -> tuple[Tensor, Tensor]:
    """Positions of the patches (N, D) and of the class token (1, D)."""
    if STORED in state:
        table = state.take(STORED, "positions, prefix")
        if table.ndim == 3 and table.shape[0] == 1 and table.shape[2] == width:
            return table[0, 1:].clone(), table[0, :1]
    one, many = ([name for name in state.names if pattern.fullmatch(name)] for pattern in SPLIT)
    one = [name for name in one if state.shape(name) == (1, 1, width)]
    many = [name for name in many if len(state.shape(name)) == 3 and state.shape(name)[::2] == (1, width)]
    if len(one) != 1 or len(many) != 1:
        raise CheckpointError(
            f"{files.path} has no positions that could be told: was it exported by torch.onnx.export?"
        )
    return state.take(many[0], "positions")[0].clone(), state.take(one[0], "prefix")[0]


def _size(shape: tuple[int, ...]) -> dict[str, int]:
    """Height and width of the graph's input (B, 3, H, W), where they are fixed."""
    return {"height": shape[2], "width": shape[3]} if len(shape) == 4 and min(shape[2:]) > 0 else {}
