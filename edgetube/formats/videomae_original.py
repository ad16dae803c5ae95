"""VideoMAE classifiers as their authors' scripts save them, versions 1 and 2, and those of mmaction2.

Wang et al., "VideoMAE V2: Scaling Video Masked Autoencoders with Dual Masking", CVPR 2023. The files hold the weights,
and at best the arguments of the script; what neither says has to be said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgetube.contract import InputContract
from edgetube.errors import CheckpointError
from edgetube.formats.reading import blocks, result, tables
from edgetube.formats.reading.blocks import BlockNames, Weights
from edgetube.formats.reading.files import Files, ReadOptions
from edgetube.formats.reading.said import Said, input_contract, labels, size_of
from edgetube.formats.reading.tensors import State
from edgetube.model.checkpoints import Checkpoint
from edgetube.spec import ModelSpec, TubeSpec

NAME = "VideoMAE's own files"

SAID = ("heads", "frames", "size", "activation", "norm_eps")
"""Fields of the model that a user may say."""

HEADS = {
    "vit_small": (384, 6), "vit_base": (768, 12), "vit_large": (1024, 16), "vit_huge": (1280, 16),
    "vit_giant": (1408, 16), "vit_gigantic": (1664, 16),
}  # fmt: skip
"""Width and heads of the authors' architectures; the names go on with patch and size: `vit_base_patch16_224`."""

EPS = 1e-6
"""Of every LayerNorm of the authors' architectures."""

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""What their data sets normalise by."""

BLOCK = BlockNames(
    norm1="norm1",
    qkv=("attn.qkv",),
    qkv_biases=("attn.q_bias", "", "attn.v_bias"),
    proj="attn.proj",
    norm2="norm2",
    fc1=("mlp.fc1",),
    fc2="mlp.fc2",
)

_AUTHORS_NAMES = (
    (re.compile(r"^backbone\."), ""),
    (re.compile(r"^cls_head\.fc_cls\."), "head."),
    (re.compile(r"^patch_embed\.projection\."), "patch_embed.proj."),
    (re.compile(r"\.mlp\.layers\.0\.0\."), ".mlp.fc1."),
    (re.compile(r"\.mlp\.layers\.1\."), ".mlp.fc2."),
)


def authors_name(name: str) -> str:
    """A tensor's name in the authors' code, also where mmaction2 wrote it."""
    for pattern, new in _AUTHORS_NAMES:
        name = pattern.sub(new, name)
    return name


def detect(files: Files) -> bool:
    """A file with patches over time and a bias for queries and values alone, or none; also one of pre-training."""
    if files.config or files.is_folder:
        return False
    names = {authors_name(name.removeprefix("encoder.")): shape for name, shape in files.tensors.shapes.items()}
    return (
        len(names.get("patch_embed.proj.weight", ())) == 5
        and "blocks.0.attn.qkv.weight" in names
        and not names.keys() & {"cls_token", "blocks.0.attn.qkv.bias"}
    )


def read(files: Files, options: ReadOptions) -> Checkpoint:
    """See `edgetube.formats.Format`."""
    options.allow("spec", "labels", "ema")
    state = State(files.path, files.tensors, authors_name)
    _check(state)
    width, _, *kernel = state.shape("patch_embed.proj.weight")
    stated = _Stated.of(files, Said.of(options, *SAID), width)
    spec = _spec(state, stated, (kernel[0], kernel[1], kernel[2]))
    weights = blocks.tube(state, "patch_embed.proj", width, spec.tubes[0].kernel)
    if "pos_embed" in state:
        weights["positions"] = state.take("pos_embed", "positions", (1, spec.tokens, width))[0]
    else:
        weights["positions"] = tables.sine(spec.tokens, width)
    weights |= _blocks(state, spec) | blocks.norm(state, "fc_norm", "norm", width)
    weights |= blocks.classifier(state, "head", spec)
    names = labels(files.path, options, None, spec.classifiers[0][1])
    return result.checkpoint(files, state, spec, weights, stated.contract, names, stated.notes)


def _check(state: State) -> None:
    """Refuse what is no classifier, or computes something else."""
    what = state.what
    if "head.weight" not in state:
        raise CheckpointError(
            f"{what} has no classifier, head.weight: it is VideoMAE as it was pre-trained; fine-tune it on labels first"
        )
    if cosine := [name for name in state.names if name.endswith(".attn.scale")]:
        raise CheckpointError(f"{what}: {cosine[0]} is of cosine attention (cos_attn), which edgetube does not know")
    if "fc_norm.weight" not in state:
        raise CheckpointError(
            f"{what} has no fc_norm: its classifier reads the first patch (use_cls); edgetube knows no such model"
        )


def _spec(state: State, stated: _Stated, kernel: tuple[int, int, int]) -> ModelSpec:
    width = state.shape("patch_embed.proj.weight")[0]
    depth = 1 + max(int(found[1]) for name in state.names if (found := re.match(r"blocks\.(\d+)\.", name)))
    return ModelSpec(
        tubes=(TubeSpec(kernel, kernel),),
        frames=stated.frames,
        size=stated.size,
        width=width,
        depth=depth,
        heads=stated.heads,
        classifiers=(("classes", state.shape("head.weight")[0]),),
        hidden=state.shape("blocks.0.mlp.fc1.weight")[0],
        readout=("mean",),
        final_norm="readout",
        activation=stated.activation,
        positions="stored",
        position_resize="bicubic",
        norm_eps=stated.norm_eps,
    )


def _blocks(state: State, spec: ModelSpec) -> Weights:
    weights: Weights = {}
    for i in range(spec.depth):
        scaled = f"blocks.{i}.gamma_1" in state
        names = replace(BLOCK, scales=("gamma_1", "gamma_2") if scaled else ())
        weights |= blocks.read_block(state, f"blocks.{i}.", f"blocks.{i}", names, spec.width, spec.hidden)
    return weights


@dataclass(frozen=True)
class _Stated:
    """What the user and the script's arguments say; the user's word counts.

    Attributes:
        heads, activation, norm_eps: of the model.
        frames, size: the clip that the positions are for.
        contract: of the input.
        notes: what was taken from the arguments.
    """

    heads: int
    activation: Any
    norm_eps: float
    frames: int
    size: tuple[int, int]
    contract: InputContract
    notes: tuple[str, ...]

    @classmethod
    def of(cls, files: Files, said: Said, width: int) -> _Stated:
        """Collect it.

        Raises:
            CheckpointError: something is said nowhere.
        """
        model, given = _arguments(files.tensors.facts, width)
        if said.input.keys() & {"sampling", "fps"}:
            given = {name: value for name, value in given.items() if name not in ("sampling", "stride")}
        used = sorted({*model} - {*said.model}) + sorted({*given} - {*said.input})
        model, given = {**model, **said.model}, {**given, **said.input}
        if "size" not in model and {"height", "width"} <= given.keys():
            model["size"] = [given["height"], given["width"]]
        _check_said(files, model, given)
        height, across = size_of(files.path, model["size"])
        given = {"frames": model["frames"], "height": height, "width": across, **given}
        made = input_contract(files.path, said, given)
        notes = (f"{', '.join(used)}: as the arguments in the file say",) if used else ()
        eps, activation = model.get("norm_eps", EPS), model.get("activation", "gelu")
        return cls(model["heads"], activation, eps, model["frames"], (height, across), made, notes)


def _check_said(files: Files, model: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Check that nothing would have to be guessed."""
    missing = [name for name in ("heads", "frames", "size") if name not in model]
    missing += [f"input {name}" for name in ("mean", "std") if name not in given]
    missing += [] if given.keys() & {"sampling", "fps"} else ["input sampling"]
    if missing:
        raise CheckpointError(
            f"{files.path} does not say {', '.join(missing)}; say it with --spec FILE, as in "
            '{"model": {"heads": 12, "frames": 16, "size": [224, 224]}, "input": {"mean": [0.485, 0.456, 0.406], '
            '"std": [0.229, 0.224, 0.225], "sampling": "stride", "stride": 4}}'
        )


def _arguments(facts: Mapping[str, Any], width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the model and of the input that the arguments of the authors' script decide."""
    model: dict[str, Any] = {}
    given: dict[str, Any] = {}
    known = re.match(r"(vit_[a-z]+)_patch\d+_\d+$", str(facts.get("model", "")))
    if known and HEADS.get(known[1], (0, 0))[0] == width:
        model["heads"] = HEADS[known[1]][1]
    frames, parts, side = facts.get("num_frames"), facts.get("num_segments", 1), facts.get("input_size")
    if isinstance(frames, int) and isinstance(parts, int):
        model["frames"] = frames * parts
    if isinstance(side, int):
        model["size"] = [side, side]
        if isinstance(short := facts.get("short_side_size"), int):
            given["resize_size"] = short
    if facts.get("imagenet_default_mean_and_std") is True:
        given |= IMAGENET
    rate = facts.get("sampling_rate")
    if str(facts.get("data_set")).upper().startswith("SSV2"):
        given["sampling"] = "segments"
    elif isinstance(rate, int):
        given |= {"sampling": "stride", "stride": rate}
    return model, given
