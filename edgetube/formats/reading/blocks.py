"""Encoder blocks of other libraries as those of `edgetube.model.transformer`: fused q, k, v, LayerScale folded in.

Exact at load: LayerScale goes into the linear before it (s * (W y + b) = (s W) y + s b), biases that are missing are
zero, and the channels of queries and keys are reordered so that rotary partners are half a head apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgetube.formats.reading.tensors import State
from edgetube.spec import ModelSpec

Weights = dict[str, Tensor]
"""Tensors by their names in the reference model."""


@dataclass(frozen=True)
class BlockNames:
    """Names of a block's parts behind the block's own prefix, without `.weight` and `.bias`.

    Attributes:
        norm1, norm2, proj, fc2: as in the reference model.
        qkv: one fused linear, rows q | k | v, or three.
        fc1: one linear; of a gated MLP gate and up, or one linear of both, the gate first.
        scales: LayerScale vectors behind `proj` and `fc2`, whole names; empty without.
        qkv_biases: whole names of the biases of q, k and v where they are not `<linear>.bias`; an empty name is zero.
        in_proj: the fused linear is stored as `<qkv>_weight` and `<qkv>_bias`, as `nn.MultiheadAttention` does.
        gated: the MLP is gated.
    """

    norm1: str
    qkv: tuple[str, ...]
    proj: str
    norm2: str
    fc1: tuple[str, ...]
    fc2: str
    scales: tuple[str, ...] = ()
    qkv_biases: tuple[str, ...] = ()
    in_proj: bool = False
    gated: bool = False


@dataclass(frozen=True)
class TimeNames:
    """Names of a block's attention over time, where it is divided from that over space, as in `BlockNames`.

    Attributes:
        norm, qkv, proj: as in the reference model; q, k and v are fused.
        dense: a second linear behind `proj`.
    """

    norm: str
    qkv: str
    proj: str
    dense: str


TORCHVISION = BlockNames(
    "ln_1", ("self_attention.in_proj",), "self_attention.out_proj", "ln_2", ("mlp.0",), "mlp.3", in_proj=True
)
"""The encoder block of torchvision, which others build on."""


def read_block(
    state: State,
    prefix: str,
    to: str,
    names: BlockNames,
    width: int,
    hidden: int,
    reorder: Tensor | None = None,
) -> Weights:
    """The tensors of the block `to` ("blocks.3"), from those behind `prefix` ("encoder.layer.3.").

    Args:
        reorder: (D,) source row of each row of queries and keys, see `rotary_order`.
    """
    qkv, bias = _qkv(state, prefix, f"{to}.attn.qkv", names, width)
    if reorder is not None:
        order = torch.cat([reorder, reorder + width, torch.arange(2 * width, 3 * width)])
        qkv, bias = qkv[order], bias[order]
    rows = (2 * hidden if names.gated else hidden) // len(names.fc1)
    fc1 = [linear(state, f"{prefix}{name}", f"{to}.mlp.fc1", (rows, width)) for name in names.fc1]
    made = {
        f"{to}.attn.qkv.weight": qkv,
        f"{to}.attn.qkv.bias": bias,
        f"{to}.mlp.fc1.weight": torch.cat([weight for weight, _ in fc1]),
        f"{to}.mlp.fc1.bias": torch.cat([bias for _, bias in fc1]),
    }
    for part, name, shape in (("attn.proj", names.proj, (width, width)), ("mlp.fc2", names.fc2, (width, hidden))):
        weight, offset = linear(state, f"{prefix}{name}", f"{to}.{part}", shape)
        if names.scales:
            scale = state.take(prefix + names.scales[part == "mlp.fc2"], f"{to}.{part}", (width,))
            weight, offset = scale[:, None] * weight, scale * offset
        made |= {f"{to}.{part}.weight": weight, f"{to}.{part}.bias": offset}
    return (
        made
        | norm(state, prefix + names.norm1, f"{to}.norm1", width)
        | norm(state, prefix + names.norm2, f"{to}.norm2", width)
    )


def read_time_attention(state: State, prefix: str, to: str, names: TimeNames, width: int) -> Weights:
    """The tensors of the attention over time of the block `to`, from those behind `prefix`.

    The two linears behind it are one: D (P y + p) + d = (D P) y + (D p + d).
    """
    attn = f"{to}.time_attn"
    proj, dense = (linear(state, prefix + name, f"{attn}.proj", (width, width)) for name in (names.proj, names.dense))
    (p, p_bias), (d, d_bias) = ((weight.double(), bias.double()) for weight, bias in (proj, dense))
    return {
        f"{attn}.proj.weight": (d @ p).float(),
        f"{attn}.proj.bias": (d @ p_bias + d_bias).float(),
        **placed_linear(state, prefix + names.qkv, f"{attn}.qkv", (3 * width, width)),
        **norm(state, prefix + names.norm, f"{to}.time_norm", width),
    }


def _qkv(state: State, prefix: str, to: str, names: BlockNames, width: int) -> tuple[Tensor, Tensor]:
    """Fused weight (3 D, D) and bias (3 D,)."""
    if names.in_proj:
        whole = f"{prefix}{names.qkv[0]}"
        weight = state.take(f"{whole}_weight", to, (3 * width, width))
        return weight, state.take(f"{whole}_bias", to, (3 * width,))
    rows = 3 * width // len(names.qkv)
    weights = [state.take(f"{prefix}{name}.weight", to, (rows, width)) for name in names.qkv]
    biases = [prefix + name if name else "" for name in names.qkv_biases]
    biases = biases or [f"{prefix}{name}.bias" for name in names.qkv]
    parts = 3 * width // len(biases)
    return torch.cat(weights), torch.cat([_bias(state, name, to, parts) for name in biases])


def _bias(state: State, name: str, to: str, size: int) -> Tensor:
    """A bias; zeros where the model has none."""
    return state.take(name, to, (size,)) if name in state else torch.zeros(size)


def linear(state: State, name: str, to: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Weight (N, K) and bias (N,) of a linear; the bias is zero where there is none."""
    return state.take(f"{name}.weight", to, shape), _bias(state, f"{name}.bias", to, shape[0])


def placed_linear(state: State, name: str, to: str, shape: tuple[int, int]) -> Weights:
    """The two tensors of a linear, see `linear`."""
    weight, bias = linear(state, name, to, shape)
    return {f"{to}.weight": weight, f"{to}.bias": bias}


def classifier(state: State, name: str, spec: ModelSpec) -> Weights:
    """The linear `name` as the first classifier of a model."""
    return mean_classifier(state, (name,), spec)


def mean_classifier(state: State, names: tuple[str, ...], spec: ModelSpec) -> Weights:
    """The mean of linears, each of which reads a part of the readout of its own, as the first classifier of a model."""
    kind, classes = spec.classifiers[0]
    to = f"classifiers.{kind}"
    parts = [linear(state, name, to, (classes, spec.features // len(names))) for name in names]
    weight: Tensor = torch.cat([weight for weight, _ in parts], dim=1) / len(parts)
    return {f"{to}.weight": weight, f"{to}.bias": torch.stack([bias for _, bias in parts]).mean(dim=0)}


def norm(state: State, name: str, to: str, width: int) -> Weights:
    """The two tensors of a LayerNorm."""
    return {f"{to}.{part}": state.take(f"{name}.{part}", to, (width,)) for part in ("weight", "bias")}


def tube(state: State, name: str, width: int, kernel: tuple[int, int, int], index: int = 0) -> Weights:
    """The patch embedding `name`, a convolution over (H, W) or (T, H, W), as tube number `index`."""
    to, shape = f"tubes.weights.{index}", (width, 3, *kernel)
    flat = len(state.shape(f"{name}.weight")) == 4
    weight = state.take(f"{name}.weight", to, (width, 3, *kernel[1:]) if flat else shape)
    bias = _bias(state, f"{name}.bias", f"tubes.biases.{index}", width)
    return {to: weight.reshape(shape), f"tubes.biases.{index}": bias}


def rotary_order(width: int, heads: int) -> Tensor:
    """Source row (D,) of each row of queries and keys where partners are adjacent: evens of a head, then odds."""
    head = torch.arange(width).reshape(heads, -1)  # (h, C)
    return torch.cat([head[:, 0::2], head[:, 1::2]], dim=1).flatten()


def folded_query(query: Tensor, q: tuple[Tensor, Tensor], key: Tensor, heads: int) -> Tensor:
    """Weight (h, D) of the scores of a constant query: (Wq query + bq) Wk / sqrt(C), for each head.

    Args:
        query: (D,).
        q: weight (D, D) and bias (D,) of the linear of queries.
        key: (D, D), weight of the linear of keys; its bias adds the same to all scores of a head, which a softmax does
            not see.
    """
    weight, bias = (part.double() for part in q)
    asked = (weight @ query.double() + bias).reshape(heads, 1, -1)  # (h, 1, C)
    score = asked @ key.double().reshape(heads, asked.shape[2], -1)  # (h, 1, D)
    return (score[:, 0] * asked.shape[2] ** -0.5).float()


def reading_query(
    state: State,
    prefix: str,
    to: str,
    spec: ModelSpec,
    *,
    query: Tensor,
    q: tuple[Tensor, Tensor],
    key: Tensor,
    value: tuple[Tensor, Tensor],
    norms: tuple[str, str],
) -> Weights:
    """The pool `to` of a constant query that is added to what it reads, without its blocks and without a projection.

    Args:
        prefix: of the two LayerNorms, before the attention and before the MLP, and of the MLP's `mlp.fc1`, `mlp.fc2`.
        query: (D,).
        q, key, value: of the attention, see `folded_query`.
    """
    pool, width = spec.query_pool, spec.width
    assert pool is not None
    weights = {
        f"{to}.score.weight": folded_query(query, q, key, pool.heads),
        f"{to}.value.weight": value[0],
        f"{to}.value.bias": value[1] + query,
    }
    for name, shape in (("mlp.fc1", (pool.hidden, width)), ("mlp.fc2", (width, pool.hidden))):
        weights |= placed_linear(state, f"{prefix}{name}", f"{to}.{name}", shape)
    weights |= norm(state, f"{prefix}{norms[0]}", f"{to}.norm", width)
    return weights | norm(state, f"{prefix}{norms[1]}", f"{to}.mlp_norm", width)
