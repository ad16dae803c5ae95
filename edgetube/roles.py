"""The roles of the tensors of a canonical graph, by name: blocks, attention, and where equalisation may be folded.

A canonical graph names its tensors after the modules of the static model (`edgetube.export.static`), and `roles_of`
states those names from the spec alone. Passes over the graph and the comparison of layers find their places by these
roles; no other file knows what the modules are called. A linear is called after its module; its weight is the
initializer `<linear>.weight`. Only the standard library is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edgetube.reduction import Kind
from edgetube.spec import ModelSpec, SpaceTime

TOKENS, LOGITS = "tubes", "logits"
"""The embedded tokens, and the output, of a whole model."""

Columns = tuple[int, int]
"""Neighbouring output columns of a linear: the first one, and the one after the last."""

FoldKind = Literal["norm", "activation", "values"]

PROJECTION = "projection"
"""The projection of cosine classifiers: a linear and a LayerNorm, see `edgetube.export.static.Projection`."""

QUERY_POOL = "pool.query"
"""The readout by a query pool."""

Attentions = tuple[tuple[str, str], ...]
"""The attentions of a block, in order: the LayerNorm before each, and its module."""

ATTENTIONS: Mapping[SpaceTime, Attentions] = {
    "joint": (("norm1", "attn"),),
    "divided": (("time_norm", "time_attn"), ("norm1", "attn")),
}
REGRET = "regret"
DECISIONS: Mapping[Kind, tuple[str, ...]] = {"merge": ("order", "target"), "drop": ("order",)}
"""What is decided where tokens leave: all candidates, the leaving first, and what each of those becomes part of."""

ATTENTION_LAYERS, MLP_LAYERS = ("qkv", "softmax", "context", "proj"), ("norm2", "mlp.fc1", "mlp.act", "mlp.fc2")
"""The compared layers of an attention, and those of a block behind it, in the order of execution."""


@dataclass(frozen=True)
class FoldSite:
    """A place where an equalisation, x' = (x - shift) / scale per channel, can be folded in before a linear.

    Attributes:
        producer: by kind. "norm": the output of a LayerNorm that the linear alone reads. "activation": the output of a
            nonlinearity, gated or not, that the linear reads; it has no parameters, so operators are inserted behind
            it. "values": the linear whose output, in part, is attention's values.
        linear: the linear that reads the equalised tensor.
        columns: of the producer's output, the values; None for other kinds.
    """

    producer: str
    linear: str
    kind: FoldKind
    columns: Columns | None = None


@dataclass(frozen=True)
class Attention:
    """One attention of a block.

    Attributes:
        projection: the linear that gives queries, keys and values.
        queries: its output columns that are queries.
        scale: the factor that the exported graph has folded into the queries' weights.
        scores, context: the products queries by keys, and softmax by values.
    """

    projection: str
    queries: Columns
    scale: float
    scores: str
    context: str


@dataclass(frozen=True)
class GraphRoles:
    """The roles of one graph; a role that the graph does not have is empty.

    Attributes:
        tokens: the embedded tokens.
        pixels: the layers that read pixels: linears, or convolutions, by lowering.
        blocks: the output of each encoder block, in order, those of a query pool included.
        linears: the linears of the blocks, in order.
        fold_sites: where equalisations can be folded in, at most one for each linear.
        attention: of the blocks, in order.
        layers: the tensors to compare between an artifact and its reference, in the order of execution.
        decisions: where tokens leave, the tensors that say which, in order; indices.
        whole: of `layers`, those at which no token has left, and the output.
    """

    tokens: str
    pixels: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    linears: tuple[str, ...] = ()
    fold_sites: tuple[FoldSite, ...] = ()
    attention: tuple[Attention, ...] = ()
    layers: tuple[str, ...] = ()
    decisions: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()

    @property
    def regrets(self) -> tuple[str, ...]:
        """Of the reference where it follows decisions: by how much worse they are than its own, for each of them."""
        return tuple(dict.fromkeys(f"{name.rpartition('.')[0]}.{REGRET}" for name in self.decisions))

    @property
    def landmarks(self) -> tuple[str, ...]:
        """The layers that remain after any folding and fusion: tokens, blocks, and the output."""
        return (self.tokens, *self.blocks, *(name for name in self.layers[-1:] if name != self.tokens))


def roles_of(spec: ModelSpec, head: str | None = None) -> GraphRoles:
    """The roles of the graph of a whole model with the classifier `head`, the first one by default."""
    names = [f"blocks.{i}" for i in range(spec.depth)]
    pooling = [f"{QUERY_POOL}.blocks.{i}" for i in range(spec.query_pool.depth if spec.query_pool else 0)]
    gated, own, joint = spec.gated_mlp, ATTENTIONS[spec.attention], ATTENTIONS["joint"]
    layers = _layers(spec, names, pooling)
    return GraphRoles(
        tokens=TOKENS,
        pixels=tuple(f"{TOKENS}.{i}" for i in spec.active),
        blocks=(*names, *pooling),
        linears=(*_linears(names, own), *_linears(pooling, joint)),
        fold_sites=(
            *(site for name in names for site in _fold_sites(name, own, spec.width, gated)),
            *(site for name in pooling for site in _fold_sites(name, joint, spec.width)),
            *_readout_sites(spec, head or spec.classifiers[0][0]),
        ),
        attention=(
            *_attention(names, own, spec.width, spec.heads),
            *(_attention(pooling, joint, spec.width, spec.query_pool.heads) if spec.query_pool else ()),
        ),
        layers=layers,
        decisions=tuple(_decisions(spec)),
        whole=_whole(spec, layers),
    )


def tokenizer_roles(spec: ModelSpec) -> GraphRoles:
    """The roles of the graph of a model's tokenizer alone."""
    return GraphRoles(tokens="tokens", pixels=tuple(map(str, spec.active)), layers=("tokens",))


def _linears(blocks: Sequence[str], attentions: Attentions) -> Iterator[str]:
    for block in blocks:
        yield from (f"{block}.{attn}.{part}" for _, attn in attentions for part in ("qkv", "proj"))
        yield from (f"{block}.mlp.fc1", f"{block}.mlp.fc2")


def _fold_sites(block: str, attentions: Attentions, width: int, gated: bool = False) -> Iterator[FoldSite]:
    for norm, attn in attentions:
        qkv = f"{block}.{attn}.qkv"
        yield FoldSite(f"{block}.{norm}", qkv, "norm")
        yield FoldSite(qkv, f"{block}.{attn}.proj", "values", (2 * width, 3 * width))
    yield from _mlp_sites(f"{block}.norm2", f"{block}.mlp", gated)


def _mlp_sites(norm: str, mlp: str, gated: bool = False) -> tuple[FoldSite, ...]:
    """Before the two linears of an MLP; the second one of a gated MLP reads a product."""
    return (
        FoldSite(norm, f"{mlp}.fc1", "norm"),
        FoldSite(f"{mlp}.{'mul' if gated else 'act'}", f"{mlp}.fc2", "activation"),
    )


def _readout_sites(spec: ModelSpec, head: str) -> tuple[FoldSite, ...]:
    """Behind the blocks. A mean over the frames lies between a norm and its linear where frames are apart."""
    sites = _mlp_sites(f"{QUERY_POOL}.mlp_norm", f"{QUERY_POOL}.mlp") if spec.query_pool else ()
    norm, classifier = "norm" if spec.final_norm == "readout" else "", f"classifiers.{head}"
    if spec.projection:  # of each frame where frames are apart
        sites = (*sites, FoldSite(norm, f"{PROJECTION}.linear", "norm")) if norm else sites
        norm = f"{PROJECTION}.norm"
    return (*sites, FoldSite(norm, classifier, "norm")) if norm and not spec.per_frame else sites


def _attention(blocks: Sequence[str], attentions: Attentions, width: int, heads: int) -> Iterator[Attention]:
    scale = (width / heads) ** -0.5
    for module in (f"{block}.{attn}" for block in blocks for _, attn in attentions):
        yield Attention(f"{module}.qkv", (0, width), scale, f"{module}.scores", f"{module}.context")


def _decisions(spec: ModelSpec) -> Iterator[str]:
    """Which tokens leave in each block, and into which others they are merged."""
    if spec.reduction is None:
        return
    for block, (before, after) in enumerate(zip(spec.entering, spec.reduction.keep, strict=True)):
        if after < before:
            yield from (f"blocks.{block}.reduce.{part}" for part in DECISIONS[spec.reduction.kind])


def _whole(spec: ModelSpec, layers: tuple[str, ...]) -> tuple[str, ...]:
    """The layers before the first block in which tokens leave, those of its attention, and the output."""
    first = next((name.partition(".reduce.")[0] for name in _decisions(spec)), None)
    return layers if first is None else (*layers[: layers.index(f"{first}.{MLP_LAYERS[0]}")], layers[-1])


def _layers(spec: ModelSpec, names: Sequence[str], pooling: Sequence[str]) -> tuple[str, ...]:
    norm = {spec.final_norm: ("norm",)}
    return (
        TOKENS,
        *(["embedding_norm"] if spec.embedding_norm else []),
        *_inside(names, ATTENTIONS[spec.attention]),
        *norm.get("tokens", ()),
        *_inside(pooling, ATTENTIONS["joint"]),
        QUERY_POOL if spec.query_pool else "pool",
        *norm.get("readout", ()),
        LOGITS,
    )


def _inside(blocks: Sequence[str], attentions: Attentions) -> Iterator[str]:
    """The compared layers of some blocks."""
    for block in blocks:
        for norm, attn in attentions:
            yield from (f"{block}.{norm}", *(f"{block}.{attn}.{part}" for part in ATTENTION_LAYERS))
        yield from (*(f"{block}.{part}" for part in MLP_LAYERS), block)
