"""Image towers of CLIP in the names of OpenAI and open_clip: hub folders, checkpoints of training, and state dicts.

A tower has no classes: the user gives text features (classes, E), which the same model's text tower made of class
names. Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from edgetube import strict
from edgetube.contract import LARGEST, InputContract
from edgetube.errors import CheckpointError, FormatError
from edgetube.formats.reading import blocks, result, zeroshot
from edgetube.formats.reading.blocks import BlockNames, Weights
from edgetube.formats.reading.files import Files, ReadOptions
from edgetube.formats.reading.said import Said, input_contract, labels
from edgetube.formats.reading.tensors import State
from edgetube.model.checkpoints import Checkpoint
from edgetube.spec import Activation, ModelSpec, TubeSpec

NAME = "OpenAI CLIP or open_clip"

SAID = ("heads", "activation", "norm_eps")
"""Fields of the model that a user may say."""

CONFIG = "open_clip_config.json"

TOWER, TEXT = "visual.", "text tower."
"""Prefix of the image tower's tensors beside those of the text tower, and the one that the latter get here."""

_SCALE = f"{TEXT}logit_scale"

OPENAI = {
    "mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711), "filter": "bicubic",
}  # fmt: skip

HEAD_WIDTH = 64
WIDE_HEADS = {"-H-": 80, "-g-": 88, "-bigG-": 104, "-e-": 112}
"""Part of an architecture's name -> channels of a head, where they are not `HEAD_WIDTH`."""

BLOCK = BlockNames("ln_1", ("attn.in_proj",), "attn.out_proj", "ln_2", ("mlp.c_fc",), "mlp.c_proj", in_proj=True)

KNOWN = {
    "image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "ls_init_value", "no_ln_pre", "pool_type",
    "final_ln_after_pool", "pos_embed_type", "patch_dropout", "output_tokens", "norm_kwargs", "act_kwargs",
}  # fmt: skip
"""Settings of a tower that are read here, or that its tensors show."""


def detect(files: Files) -> bool:
    """A hub folder, or tensors in the names of OpenAI's code, unless a configuration says what they are."""
    if files.config:
        return False
    if files.json(CONFIG) is not None:
        return True
    source = files.tensors
    tower = ("class_embedding", "conv1.weight", "ln_post.weight", "transformer.resblocks.0.attn.in_proj_weight")
    return any(source.has(*(place + name for name in tower)) for place in ("", TOWER)) or source.has(
        f"{TOWER}trunk.patch_embed.proj.weight"
    )


def read(files: Files, options: ReadOptions) -> Checkpoint:
    """See `edgetube.formats.Format`."""
    state = State(files.path, files.tensors, _one_tower(files))
    _refuse(files.path, state)
    settings, said = _Settings(files, options), Said.of(options, *SAID)
    options.allow("spec", "labels", "ema", "text_features", *([] if settings.config else ["arch"]))
    text = zeroshot.text_features(options)
    if text is None:
        raise CheckpointError(
            f"{files.path} is an image tower without classes: give --text-features FILE.npy, the features (classes, E) "
            "that its text tower makes of the class names, and --labels"
        )
    spec = replace(_spec(files.path, state, said, settings), projection=text.shape[1])
    weights = _embedding(state, spec)
    names = replace(BLOCK, scales=("ls_1.gamma", "ls_2.gamma")) if _has(state, "ls_1.gamma") else BLOCK
    for i in range(spec.depth):
        weights |= blocks.read_block(
            state, f"transformer.resblocks.{i}.", f"blocks.{i}", names, spec.width, spec.hidden
        )
    weights |= blocks.norm(state, "ln_post", "norm", spec.width)
    weights |= _classifier(files.path, state, spec, text)
    spec = replace(spec, classifiers=(("classes", len(text)),))
    state.leave([TEXT], "it is of the text tower")
    named = labels(files.path, options, None, len(text))
    made, notes = settings.contract(said, spec)
    return result.checkpoint(files, state, spec, weights, made, named, (*zeroshot.notes(_SCALE in state), *notes))


def _one_tower(files: Files) -> Any:
    """Tensors' names without the tower's prefix; those of the text tower, some of which are called alike, get one."""
    if not any(name.startswith(TOWER) for name in files.tensors.names()):
        return lambda name: name
    return lambda name: name.removeprefix(TOWER) if name.startswith(TOWER) else TEXT + name


def _has(state: State, name: str) -> bool:
    return f"transformer.resblocks.0.{name}" in state


def _refuse(what: Path, state: State) -> None:
    if any(name.startswith("trunk.") for name in state.names):
        raise CheckpointError(f"{what}: its image tower is one of timm; give timm's own checkpoint of it")
    if any(name.startswith("attn_pool.") for name in state.names):
        raise CheckpointError(f"{what} has an attention pool with many queries (CoCa); edgetube knows no such model")


class _Settings:
    """What a hub folder, or the name of an architecture, says."""

    def __init__(self, files: Files, options: ReadOptions) -> None:
        self.what, self.config = files.path, files.json(CONFIG) or {}
        self.arch = options.arch
        model = self._object(self.config, "model_cfg")
        self.quick = model.get("quick_gelu", False)
        self.tower = self._object(model, "vision_cfg")
        self.act, self.norm = self._object(self.tower, "act_kwargs"), self._object(self.tower, "norm_kwargs")
        if self.act not in ({}, {"approximate": "none"}, {"approximate": "tanh"}) or not self.norm.keys() <= {"eps"}:
            raise CheckpointError(
                f"{self.what}: {CONFIG} says act_kwargs {self.act!r:.60} and norm_kwargs {self.norm!r:.60}; edgetube "
                "knows approximate and eps"
            )
        if not isinstance(self.quick, bool):
            raise CheckpointError(f"{self.what}: {CONFIG} says quick_gelu {self.quick!r:.60}; expected true or false")
        self.pixels = self._object(self.config, "preprocess_cfg")
        if unknown := [key for key, value in self.tower.items() if key not in KNOWN and value]:
            raise CheckpointError(f"{self.what}: {CONFIG} says {unknown[0]} of the tower, which edgetube does not know")

    def _object(self, data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        try:
            return strict.record(data.get(name) or {}, name)
        except FormatError as error:
            raise CheckpointError(f"{self.what}: {CONFIG}: {error}") from error

    def number(self, given: Mapping[str, Any], name: str, otherwise: float) -> float:
        """A positive number of the settings."""
        try:
            return strict.number(given.get(name, otherwise), name, 1e-12, LARGEST)
        except FormatError as error:
            raise CheckpointError(f"{self.what}: {CONFIG}: {error}") from error

    def heads(self, width: int) -> int | None:
        """Attention heads; None where nothing says them."""
        if self.config:
            return int(width // self.number(self.tower, "head_width", HEAD_WIDTH))
        if self.arch is None:
            return None
        name = f"-{self.arch.replace('/', '-')}-"
        return width // next((size for part, size in WIDE_HEADS.items() if part in name), HEAD_WIDTH)

    def activation(self) -> Activation | None:
        """The activation; OpenAI's own names (ViT-B/32) mean quick-gelu, as its weights were trained."""
        if not self.config and self.arch is None:
            return None
        quick = self.quick if self.config else "quickgelu" in str(self.arch) or "/" in str(self.arch)
        return "quick-gelu" if quick else "gelu-tanh" if self.act.get("approximate") == "tanh" else "gelu"

    def eps(self) -> float:
        """Of the LayerNorms."""
        return self.number(self.norm, "eps", 1e-5)

    def pools(self) -> tuple[str, bool]:
        """The readout, and whether the last LayerNorm is over it."""
        clipa = not self.config and "CLIPA" in str(self.arch)
        pool = self.tower.get("pool_type", "avg" if clipa else "tok")
        if pool not in ("tok", "avg"):
            raise CheckpointError(f"{self.what}: pool_type {pool!r:.40}; edgetube knows tok, avg")
        return "prefix.0" if pool == "tok" else "mean", bool(self.tower.get("final_ln_after_pool", clipa))

    def contract(self, said: Said, spec: ModelSpec) -> tuple[InputContract, tuple[str, ...]]:
        """The input, and a note where nothing said it."""
        mode = self.pixels.get("resize_mode", "shortest")
        if mode not in ("shortest", "squash"):
            raise CheckpointError(f"{self.what}: resize_mode {mode!r:.40}; edgetube knows shortest, squash")
        found = {**OPENAI, "frames": 1, "height": spec.size[0], "width": spec.size[1]}
        given = {"mean": "mean", "std": "std", "interpolation": "filter"}
        found |= {field: self.pixels[name] for name, field in given.items() if name in self.pixels}
        found["resize"] = "stretch" if mode == "squash" else "short-side"
        unsaid = not self.pixels and not {"mean", "std"} <= said.input.keys()
        notes = ("its input is taken to be that of OpenAI's models; say another with --spec",) if unsaid else ()
        return input_contract(self.what, said, found), notes


def _spec(what: Path, state: State, said: Said, settings: _Settings) -> ModelSpec:
    width, _, patch, _ = state.shape("conv1.weight")
    hint = " (give its architecture with --arch NAME: ViT-B/32 of OpenAI, ViT-B-32 of open_clip)"
    rows = state.shape("positional_embedding")[0] - 1
    side = math.isqrt(max(rows, 0))
    if side * side != rows or not rows:
        raise CheckpointError(f"{what}: {rows} positions of patches; expected a square number")
    pool, behind = settings.pools()
    depth = sum(name.endswith(".ln_1.weight") and name.startswith("transformer.") for name in state.names)
    if (stated := settings.tower.get("layers", depth)) != depth:
        raise CheckpointError(f"{what} has {depth} blocks, and its settings say layers {stated!r:.60}")
    return ModelSpec(
        tubes=(TubeSpec((1, patch, patch), (1, patch, patch)),),
        frames=1,
        size=(side * patch, side * patch),
        width=width,
        depth=depth,
        heads=said.model_field(what, "heads", settings.heads(width), hint),
        classifiers=(("classes", 1),),
        hidden=state.shape("transformer.resblocks.0.mlp.c_fc.weight")[0],
        prefix=1,
        readout=(pool,),
        final_norm="readout" if behind else "tokens",
        activation=said.model_field(what, "activation", settings.activation(), hint),
        positions="stored",
        position_resize="bicubic-antialias",
        embedding_norm="ln_pre.weight" in state,
        norm_eps=said.model.get("norm_eps", settings.eps()),
    )


def _embedding(state: State, spec: ModelSpec) -> Weights:
    weights = blocks.tube(state, "conv1", spec.width, spec.tubes[0].kernel)
    table = state.take("positional_embedding", "positions, prefix", (spec.sequence, spec.width))
    token = state.take("class_embedding", "prefix", (spec.width,))
    weights |= {"positions": table[1:].clone(), "prefix": token + table[:1]}
    return weights | (blocks.norm(state, "ln_pre", "embedding_norm", spec.width) if spec.embedding_norm else {})


def _classifier(what: Path, state: State, spec: ModelSpec, text: Tensor) -> Weights:
    """Text features behind the projection; the scale of the logits is that of the whole model, where it is there."""
    projection = None
    if "proj" in state:
        projection = state.take("proj", "projection", (spec.width, state.shape("proj")[1])).T
    scale = state.take(_SCALE, "classifiers.classes").exp().item() if _SCALE in state else zeroshot.SCALE
    return zeroshot.linear(what, text, projection, None, spec.width, scale)
