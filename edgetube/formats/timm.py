"""Image classifiers of timm: its hub folders, and bare state dicts with the name of their architecture.

What the tensors cannot tell, the architecture's name does: heads, epsilon, activation, the kind of block. Wightman,
"PyTorch Image Models", https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
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
from edgetube.spec import Activation, ModelSpec, QueryPool, Rotary, TubeSpec

NAME = "timm"

SAID = ("heads", "activation", "norm_eps", "size")
"""Fields of the model that a user may say."""

HEADS = {
    "tiny": 3, "xsmall": 4, "wee": 4, "little": 5, "small": 6, "medium": 8, "mediumd": 8, "betwixt": 10, "base": 12,
    "so150m": 14, "so150m2": 13, "large": 16, "huge": 16, "so400m": 16, "giant": 16, "giantopt": 16, "gigantic": 16,
    "7b": 32,
}  # fmt: skip
"""Size in an architecture's name -> attention heads."""

OTHER_HEADS = (
    (r"vit_base_.*plus", 14),
    (r"vit_huge_plus_", 20),
    (r"vit_giant_patch14_(reg\d_)?(dinov2|tipsv2)", 24),
    (r"vit_base_patch16_gap_224", 16),
    (r"test_vit2?$", 2),
    (r"test_vit3$", 3),
)
"""Names that do not follow the table."""

ARCHITECTURE = re.compile(
    r"(vit|deit3?|eva|flexivit)_([a-z0-9]+)((_patch\d+|_plus|_distilled|_clip|_quickgelu|_siglip|_gap|_map|_reg\d|_dinov2"
    r"|_dinov3|_qkvb|_tipsv2|_miil|_dino|_sam|_in21k|_in1k|_36x1|_\d+)*)"
)
"""Names of architectures that are plain encoders. Any other word in a name stands for something else: post-norm blocks
(rpn), parallel ones (xp, 18x2), rotary positions (rope), differential attention."""

TANH = re.compile(r"vit_(giantopt_.*|so400m_patch16|base_patch32|large_patch16(?=.*_512))(_siglip.*)?")
"""Architectures of SigLIP whose GELU is the tanh approximation; the others have the exact one."""

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu", "gelu_tanh": "gelu-tanh", "quick_gelu": "quick-gelu", "quickgelu": "quick-gelu", "silu": "silu",
    "swish": "silu",
}  # fmt: skip

HARMLESS = re.compile(
    r"(img_size|patch_size|in_chans|num_classes|embed_dim|depth|mlp_ratio|qkv_bias|qk_norm|scale_(attn|mlp)_norm"
    r"|proj_bias|init_values|class_token|pos_embed|no_embed_class|(num_)?reg_tokens|pre_norm|final_norm|(use_)?fc_norm"
    r"|dynamic_img_(size|pad)|\w*drop\w*|weight_init|fix_init|strict_img_size|num_heads|act_layer|norm_layer|global_pool)"
)
"""`model_args` that the tensors show as well, that are for training, or that are read here."""

REFUSED = {
    "attn.q_norm.weight": "normalises queries and keys",
    "attn.norm.weight": "has a LayerNorm inside of its attention",
    "mlp.norm.weight": "has a LayerNorm inside of its MLPs",
    "attn.gate.weight": "has gated attention",
}
"""Tensors of a block -> what the model does that a `ModelSpec` cannot say."""

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

BLOCK = BlockNames("norm1", ("attn.qkv",), "attn.proj", "norm2", ("mlp.fc1",), "mlp.fc2")


@dataclass(frozen=True)
class Architecture:
    """What a name tells, or what the settings of a folder say instead; None where neither does."""

    name: str = ""
    heads: int | None = None
    activation: Activation | None = None
    eps: float | None = None
    pool: str | None = None

    @property
    def is_rotary(self) -> bool:
        return "dinov3" in self.name


def architecture(what: Path, name: str) -> Architecture:
    """The facts of an architecture's name.

    Raises:
        CheckpointError: edgetube does not know it, or cannot express it.
    """
    stem = name.partition(".")[0]
    found = ARCHITECTURE.fullmatch(stem)
    heads = HEADS.get(found[2]) if found else None
    if heads is not None or stem.startswith("test_vit"):
        heads = next((other for pattern, other in OTHER_HEADS if re.match(pattern, stem)), heads)
    if heads is None:
        raise CheckpointError(
            f"{what}: edgetube does not know timm's architecture {name!r:.80}; it reads plain pre-norm encoders: "
            "vit_*, deit_*, deit3_* and eva_*, without rpn, rope, xp or 18x2 in the name"
        )
    quick, clip = "quickgelu" in stem, re.match("vit_.*(clip|dinov3)", stem)
    activation: Activation = "quick-gelu" if quick else "gelu-tanh" if "siglip" in stem and TANH.match(stem) else "gelu"
    return Architecture(stem, heads, activation, 1e-5 if clip else 1e-6, "avg" if "dinov3" in stem else None)


def detect(files: Files) -> bool:
    """A hub folder, or tensors in timm's names."""
    if files.config:
        return "architecture" in files.config and not files.model_type
    source = files.tensors
    return (
        source.has("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc2.weight")
        and len(source.shapes["patch_embed.proj.weight"]) == 4
        and not source.names() & {"mask_token", "storage_tokens", "time_embed"}
    )


def read(files: Files, options: ReadOptions) -> Checkpoint:
    """See `edgetube.formats.Format`."""
    options.allow("spec", "labels", "ema", "text_features", *([] if files.config else ["arch"]))
    said, state = Said.of(options, *SAID), State(files.path, files.tensors)
    arch = _architecture(files, options)
    _refuse(state)
    text = zeroshot.text_features(options)
    if text is None and "head.weight" not in state:
        raise CheckpointError(
            f"{files.path} has no classifier: train a head on labels first, or give --text-features where it is the "
            "tower of an image-text model"
        )
    cfg = _pretrained(files)
    spec = _spec(files.path, state, said, arch, cfg)
    weights = _embedding(state, spec)
    names = _block_names(state)
    for i in range(spec.depth):
        weights |= blocks.read_block(state, f"blocks.{i}.", f"blocks.{i}", names, spec.width, spec.hidden)
    for name, to in (("norm_pre", "embedding_norm"), ("norm", "norm"), ("fc_norm", "norm")):
        if f"{name}.weight" in state:
            weights |= blocks.norm(state, name, to, spec.width)
    if spec.query_pool is not None:
        weights |= _query_pool(state, spec, spec.query_pool)
    notes: tuple[str, ...] = ()
    if text is not None:
        weights |= _zero_shot(files.path, state, spec, text)
        spec = replace(spec, classifiers=(("classes", len(text)),), projection=text.shape[1])
        notes = zeroshot.notes(scaled=False)
    else:
        heads = ("head", "head_dist") if "head_dist.weight" in state else ("head",)
        weights |= blocks.mean_classifier(state, heads, spec)
    made = _contract(files.path, said, cfg, spec)
    known = _labels(files, cfg) if text is None else None
    named = labels(files.path, options, known, spec.classifiers[0][1])
    stated = cfg.get("license")
    return result.checkpoint(files, state, spec, weights, made, named, notes, stated if isinstance(stated, str) else "")


def _architecture(files: Files, options: ReadOptions) -> Architecture:
    """What the name says, changed by the arguments that a hub folder gives the architecture."""
    facts = files.tensors.facts if not files.config else {}
    name = files.config.get("architecture") or options.arch or facts.get("arch")
    if not isinstance(name, str):
        return Architecture()
    found, args = architecture(files.path, name), files.config.get("model_args") or {}
    if not isinstance(args, Mapping):
        raise CheckpointError(f"{files.path}: config.json says model_args {args!r:.60}; expected an object")
    if unknown := [key for key in args if not HARMLESS.fullmatch(key) and args[key] not in (None, False, "")]:
        raise CheckpointError(
            f"{files.path}: config.json says {unknown[0]} {args[unknown[0]]!r:.60}, which edgetube does not know"
        )
    if (norm := args.get("norm_layer")) not in (None, "layernorm"):
        raise CheckpointError(f"{files.path}: config.json says norm_layer {norm!r:.60}; edgetube knows layernorm")
    if (act := args.get("act_layer")) not in (None, *ACTIVATIONS):
        raise CheckpointError(f"{files.path}: act_layer {act!r:.60}; edgetube knows {', '.join(ACTIVATIONS)}")
    pool = args.get("global_pool") or files.config.get("global_pool") or found.pool
    return replace(
        found,
        heads=args.get("num_heads") or found.heads,
        activation=ACTIVATIONS[act] if act else found.activation,
        eps=1e-6 if norm else found.eps,
        pool=pool,
    )


def _refuse(state: State) -> None:
    for name, why in REFUSED.items():
        if f"blocks.0.{name}" in state:
            raise CheckpointError(f"{state.what} {why} (blocks.0.{name}); edgetube knows no such model")


def _pretrained(files: Files) -> Mapping[str, Any]:
    """Settings of the input; older folders have them at the top of config.json."""
    found = files.config.get("pretrained_cfg", files.config)
    return found if isinstance(found, Mapping) else {}


def _spec(what: Path, state: State, said: Said, arch: Architecture, cfg: Mapping[str, Any]) -> ModelSpec:
    width, channels, *patch = state.shape("patch_embed.proj.weight")
    if channels != 3 or len(patch) != 2:
        raise CheckpointError(f"{what} takes {channels} channels; edgetube takes RGB images")
    hint = "" if arch.name else " (give its architecture with --arch NAME, as timm calls it)"
    tokens = sum(state.shape(name)[1] for name in PREFIX if name in state)
    pool = _pool(what, state, arch)
    hidden = state.shape("blocks.0.mlp.fc2.weight")[1]
    names = _block_names(state)
    heads = said.model_field(what, "heads", arch.heads, hint)
    activation = said.model_field(what, "activation", arch.activation, hint)
    rotary = Rotary(("height", "width"), base=100.0, coordinates="centred") if arch.is_rotary else None
    classes = state.shape("head.weight")[0] if "head.weight" in state else 1
    if rotary is None and "pos_embed" not in state:
        raise CheckpointError(f"{what} has no pos_embed, and its architecture none without: {arch.name or 'unknown'}")
    return ModelSpec(
        tubes=(TubeSpec((1, patch[0], patch[1]), (1, patch[0], patch[1])),),
        frames=1,
        size=_size(what, state, said, cfg, tokens, (patch[0], patch[1])),
        width=width,
        depth=_depth(state),
        heads=heads,
        classifiers=(("classes", classes),),
        hidden=hidden,
        prefix=tokens,
        readout=pool,
        query_pool=QueryPool(heads, state.shape("attn_pool.mlp.fc1.weight")[0]) if pool == ("query",) else None,
        final_norm="readout" if "fc_norm.weight" in state else "tokens" if "norm.weight" in state else "none",
        activation="silu" if names.gated else activation,
        gated_mlp=names.gated,
        positions="rotary" if rotary else "stored",
        position_resize="none" if rotary else "bicubic-antialias",
        rotary=rotary,
        embedding_norm="norm_pre.weight" in state,
        norm_eps=said.model_field(what, "norm_eps", arch.eps, hint),
    )


PREFIX = ("cls_token", "dist_token", "reg_token")
"""Tokens before those of the patches, in their order."""


def _pool(what: Path, state: State, arch: Architecture) -> tuple[str, ...]:
    """The readout: what the folder says, else what the tensors show."""
    if "attn_pool.latent" in state:
        if any(name in state for name in PREFIX):
            raise CheckpointError(
                f"{what}: its attention pool leaves out class and register tokens; edgetube knows no such model"
            )
        return ("query",)
    if "head_dist.weight" in state or "dist_token" in state:
        return ("prefix.0", "prefix.1")
    pool = arch.pool or ("avg" if "fc_norm.weight" in state or "cls_token" not in state else "token")
    if pool not in ("avg", "token") or (pool == "token" and "cls_token" not in state):
        raise CheckpointError(f"{what}: its global_pool is {pool!r:.40}; edgetube knows token, avg and map")
    return ("mean",) if pool == "avg" else ("prefix.0",)


def _depth(state: State) -> int:
    return 1 + max(int(name.split(".")[1]) for name in state.names if re.match(r"blocks\.\d+\.", name))


def _size(
    what: Path, state: State, said: Said, cfg: Mapping[str, Any], prefix: int, patch: tuple[int, int]
) -> tuple[int, int]:
    """Height and width that the position table is for; without a table those of the input."""
    found = _declared_size(what, said, cfg)
    if "pos_embed" not in state:
        if found is None:
            raise CheckpointError(
                f'{what} does not say its size; say it with --spec FILE: {{"model": {{"size": ...}}}}'
            )
        return found
    rows = state.shape("pos_embed")[1]
    if found is not None and (found[0] // patch[0]) * (found[1] // patch[1]) in (rows, rows - prefix):
        return found
    for count in (rows - prefix, rows):
        if (side := math.isqrt(max(count, 0))) ** 2 == count and side:
            return (side * patch[0], side * patch[1])
    raise CheckpointError(
        f"{what}: its {rows} positions are no square; say the size with --spec FILE: "
        '{"model": {"size": [HEIGHT, WIDTH]}}'
    )


def _declared_size(what: Path, said: Said, cfg: Mapping[str, Any]) -> tuple[int, int] | None:
    """The size that the user says, else that of the settings."""
    value = said.model.get("size")
    if value is None and {"height", "width"} <= said.input.keys():
        value = [said.input["height"], said.input["width"]]
    try:
        if value is None and cfg.get("input_size") is not None:
            value = strict.items(cfg["input_size"], "input_size", 3, 3)[1:]
        if value is None:
            return None
        height, width = (strict.integer(side, "the size", 1, LARGEST) for side in strict.items(value, "size", 2, 2))
    except FormatError as error:
        raise CheckpointError(f"{what}: {error}") from error
    return height, width


def _block_names(state: State) -> BlockNames:
    """Names of a block's parts, as the first block has them."""
    names, place = BLOCK, "blocks.0."
    if f"{place}ls1.gamma" in state:
        names = replace(names, scales=("ls1.gamma", "ls2.gamma"))
    elif f"{place}gamma_1" in state:
        names = replace(names, scales=("gamma_1", "gamma_2"))
    if f"{place}attn.q_bias" in state:
        names = replace(names, qkv_biases=("attn.q_bias", "", "attn.v_bias"))
    if f"{place}mlp.fc1_g.weight" in state:
        return replace(names, fc1=("mlp.fc1_g", "mlp.fc1_x"), gated=True)
    packed = state.shape(f"{place}mlp.fc1.weight")[0] == 2 * state.shape(f"{place}mlp.fc2.weight")[1]
    return replace(names, gated=packed)


def _embedding(state: State, spec: ModelSpec) -> Weights:
    """The tube, the prefix tokens, and the positions, which some models have for the prefix too."""
    width = spec.width
    weights = blocks.tube(state, "patch_embed.proj", width, spec.tubes[0].kernel)
    rows = [
        state.take(name, "prefix", (1, state.shape(name)[1], width))[0] for name in PREFIX if name in state
    ]  # each (n, D)
    if spec.positions == "stored":
        whole = state.shape("pos_embed")[1] == spec.sequence
        table = state.take("pos_embed", "positions, prefix" if whole and rows else "positions")[
            0
        ]  # (P + N, D) or (N, D)
        if whole and rows:
            rows, table = [torch.cat(rows) + table[: spec.prefix]], table[spec.prefix :]
        weights["positions"] = table.clone()
    return weights | ({"prefix": torch.cat(rows)} if rows else {})


def _query_pool(state: State, spec: ModelSpec, pool: QueryPool) -> Weights:
    """The attention of one query (MAP): its query is a constant, see `edgetube.spec.QueryPool`."""
    to, width = "pool.query", spec.width
    latent = state.take("attn_pool.latent", f"{to}.score", (1, 1, width))[0, 0]
    asked = (
        blocks.linear(state, "attn_pool.q", f"{to}.score", (width, width))
        if "attn_pool.q.weight" in state
        else (torch.eye(width), torch.zeros(width))
    )
    both, bias = blocks.linear(state, "attn_pool.kv", f"{to}.score, {to}.value", (2 * width, width))
    found: Weights = {
        f"{to}.score.weight": blocks.folded_query(latent, asked, both[:width], pool.heads),
        f"{to}.value.weight": both[width:].clone(),
        f"{to}.value.bias": bias[width:].clone(),
    }
    for part, shape in (("proj", (width, width)), ("mlp.fc1", (pool.hidden, width)), ("mlp.fc2", (width, pool.hidden))):
        found |= blocks.placed_linear(state, f"attn_pool.{part}", f"{to}.{part}", shape)
    return found | blocks.norm(state, "attn_pool.norm", f"{to}.mlp_norm", width)


def _zero_shot(what: Path, state: State, spec: ModelSpec, text: Tensor) -> Weights:
    """The classifier of text features; `head` of the tower, where it has one, projects to their space."""
    projection = offset = None
    if "head.weight" in state:
        size = state.shape("head.weight")[0]
        projection, offset = blocks.linear(state, "head", "projection", (size, spec.features))
    return zeroshot.linear(what, text, projection, offset, spec.features, zeroshot.SCALE)


def _contract(what: Path, said: Said, cfg: Mapping[str, Any], spec: ModelSpec) -> InputContract:
    """The input as timm prepares it for evaluation; what the settings of a folder leave out has timm's defaults."""
    try:
        _, height, width = strict.items(cfg.get("input_size") or (3, *spec.size), "input_size", 3, 3)
        share = strict.number(cfg.get("crop_pct") or 0.875, "crop_pct", 1e-3, 1)
        size = tuple(strict.integer(side, "input_size", 1, LARGEST) for side in (height, width))
    except FormatError as error:
        raise CheckpointError(f"{what}: {error}") from error
    height, width = said.input.get("height", size[0]), said.input.get("width", size[1])
    found: dict[str, Any] = {"frames": 1, "height": height, "width": width}
    if cfg and not {"resize", "resize_size"} & said.input.keys():
        found |= _resize(what, cfg.get("crop_mode") or "center", (height, width), share)
    if cfg:
        found |= {name: cfg.get(name) or IMAGENET[name] for name in IMAGENET}
    found["filter"] = cfg.get("interpolation") or "bicubic"
    return input_contract(what, said, found, resized=True)


def _resize(what: Path, mode: object, size: tuple[int, int], share: float) -> dict[str, Any]:
    """Fields of the contract for timm's crop modes."""
    height, width = (math.floor(side / share) for side in size)
    if mode == "squash":
        return {"resize": "stretch", "resize_size": (height, width)}
    if mode == "center" and size[0] == size[1]:
        return {"resize": "short-side", "resize_size": height}
    raise CheckpointError(
        f"{what}: its crop_mode is {mode!r:.40} for an input of {size[0]} x {size[1]}; edgetube knows center for "
        "square inputs, and squash"
    )


def _labels(files: Files, cfg: Mapping[str, Any]) -> Mapping[Any, str] | None:
    """Class names by number."""
    found = files.config.get("label_names") or cfg.get("label_names") or cfg.get("labels")
    if not isinstance(found, list | Mapping | None):
        raise CheckpointError(f"{files.path}: config.json says label_names {found!r:.60}; expected a list or an object")
    return dict(enumerate(found)) if isinstance(found, list) else found
