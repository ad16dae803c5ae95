"""The reference model: a sparse-tube video transformer in plain PyTorch.

"Rethinking Video ViTs: Sparse Video Tubes for Joint Image and Video Learning" (Piergiovanni, Kuo, Angelova,
CVPR 2023). Users train this model, and every artifact is compared with it; `edgetube.export.static` is the fast form.
Letters: B clips, T frames, H, W pixels, C colours, N tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgetube.errors import InputError, SpecError
from edgetube.model import positions
from edgetube.model.reduction import Reduce, TokenState
from edgetube.spec import QUERY, Activation, ModelSpec, QueryPool, TubeSpec


class Tubes(nn.Module):
    """The tokenizer: one strided 3-D convolution per tube, their outputs laid end to end.

    With `spec.kernel` set there is one shared `kernel` (D, C, *kernel) that is resized trilinearly to each tube's
    shape (a space-to-depth tube takes its first D / merge filters), else each tube has its own `weights[i]`
    (D / merge, C, kt, kh, kw); a bias (D / merge) per tube either way.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        shapes = [(spec.width // tube.merge, spec.channels, *tube.kernel) for tube in spec.tubes]
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(shape[0])) for shape in shapes)
        if spec.kernel is not None:
            self.kernel = nn.Parameter(_lecun(torch.empty(spec.width, spec.channels, *spec.kernel)))
        else:
            self.weights = nn.ParameterList(nn.Parameter(_lecun(torch.empty(shape))) for shape in shapes)

    def weight(self, index: int) -> Tensor:
        """Convolution kernel of tube `index`: (D / merge, C, kt, kh, kw)."""
        if self.spec.kernel is None:
            return self.weights[index]
        tube = self.spec.tubes[index]
        shared = self.kernel[: self.spec.width // tube.merge]
        return F.interpolate(shared, size=tube.kernel, mode="trilinear", align_corners=False)

    def forward(self, x: Tensor, spec: ModelSpec | None = None) -> Tensor:
        """Tokens (B, N, D) of normalised clips x (B, C, T, H, W)."""
        spec = spec or self.spec
        tokens = [
            tube_tokens(x, spec.tubes[i], self.weight(i), self.biases[i], grid)  # (B, n_i, D)
            for i, grid in zip(spec.active, spec.grids, strict=True)
        ]
        return torch.cat(tokens, dim=1)  # (B, N, D)


def tube_tokens(x: Tensor, tube: TubeSpec, weight: Tensor, bias: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Tokens (B, n, D) of one tube on x (B, C, T, H, W), row-major over `grid`."""
    t, h, w = tube.offset
    y = F.conv3d(x[:, :, t:, h:, w:], weight, bias, stride=tube.conv_stride)  # (B, D/S, gt*, gh*, gw*)
    (gt, gh, gw), (st, sh, sw) = grid, tube.space_to_depth
    y = y[:, :, : gt * st, : gh * sh, : gw * sw]
    y = y.unflatten(4, (gw, sw)).unflatten(3, (gh, sh)).unflatten(2, (gt, st))  # (B, D/S, gt,st, gh,sh, gw,sw)
    return y.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)  # (B, n, S * D/S)


def rotate(x: Tensor, tables: Tensor) -> Tensor:
    """Queries or keys x (..., N, C) turned by their positions: x cos + (-x2 | x1) sin.

    `tables` is (2, ..., N, C): cosines and sines; x1 and x2 are the halves of x on its channels.
    """
    first, second = x.chunk(2, dim=-1)  # each (..., N, C / 2)
    return x * tables[0] + torch.cat([-second, first], dim=-1) * tables[1]  # (..., N, C)


class Projections(nn.Module):
    """The linears of a multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)


class Attention(Projections):
    """Attention of all tokens to all, with rotary positions and sizes of merged tokens, where `state` has them.

    What a reduction of tokens decides by is left in `state`: with `keys` the keys, with `received` the attention.
    """

    def __init__(self, width: int, heads: int, keys: bool = False, received: bool = False) -> None:
        super().__init__(width, heads)
        self.keys, self.received = keys, received

    def forward(self, x: Tensor, state: TokenState | None = None) -> Tensor:
        state = state or TokenState()
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
        if self.keys:
            state.keys = k.mean(dim=1)  # (B, N, D/heads)
        if state.rotation is not None:
            q, k = rotate(q, state.rotation), rotate(k, state.rotation)
        if self.received:
            scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5  # (B, heads, N, N)
            state.attention = torch.softmax(scores, dim=3).mean(dim=(1, 2))  # (B, N)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=state.bias)  # (B, heads, N, D/heads)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, N, D)


class TimeAttention(Projections):
    """Attention over time: tokens x (B, T S, D), time first, to those at the same of S places."""

    def forward(self, x: Tensor, times: int) -> Tensor:
        qkv = self.qkv(x).unflatten(1, (times, -1)).unflatten(-1, (3, self.heads, -1))  # (B, T, S, 3, heads, D/heads)
        q, k, v = qkv.permute(3, 0, 2, 4, 1, 5)  # each (B, S, heads, T, D/heads)
        y = F.scaled_dot_product_attention(q, k, v)  # (B, S, heads, T, D/heads)
        return self.proj(y.permute(0, 3, 1, 2, 4).flatten(3).flatten(1, 2))  # (B, T S, D)


QUICK_GELU = 1.702
"""Slope of the sigmoid that stands for a GELU."""


class Act(nn.Module):
    """The activation of an MLP."""

    def __init__(self, kind: Activation) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "silu":
            return F.silu(x)
        if self.kind == "quick-gelu":
            return x * torch.sigmoid(QUICK_GELU * x)
        return F.gelu(x, approximate="tanh" if self.kind == "gelu-tanh" else "none")


class Mlp(nn.Module):
    """Linear, activation, linear; a gated one multiplies one half of the first's output, activated, by the other."""

    def __init__(self, width: int, hidden: int, activation: Activation, gated: bool = False) -> None:
        super().__init__()
        self.gated = gated
        self.fc1 = nn.Linear(width, hidden * (2 if gated else 1))
        self.act = Act(activation)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.fc2(self.act(self.fc1(x)))  # (B, N, D)
        gate, up = self.fc1(x).chunk(2, dim=-1)  # each (B, N, hidden)
        return self.fc2(self.act(gate) * up)  # (B, N, D)


class Block(nn.Module):
    """Pre-LN encoder block; a gated one also adds tanh(alpha) * z_0 (section 3.6, alpha starts at 0).

    With `reduce`, tokens leave between attention and MLP.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        activation: Activation,
        eps: float,
        gated_mlp: bool,
        gate: bool,
        reduce: Reduce | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        kind = None if reduce is None else reduce.kind
        self.attn = Attention(width, heads, keys=kind == "merge", received=kind == "drop")
        self.reduce = reduce
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, hidden, activation, gated_mlp)
        self.alpha = nn.Parameter(torch.zeros(())) if gate else None

    def forward(self, x: Tensor, state: TokenState | None = None) -> Tensor:
        state = state or TokenState()
        y = x + self.attn(self.norm1(x), state)  # (B, N, D)
        y = y if self.reduce is None else self.reduce(y, state)  # (B, N - r, D)
        z = y + self.mlp(self.norm2(y))  # (B, N - r, D)
        return z if self.alpha is None or state.z0 is None else z + torch.tanh(self.alpha) * state.z0  # (B, N - r, D)


class DividedBlock(nn.Module):
    """Pre-LN encoder block of divided space-time attention, see `edgetube.spec.ModelSpec`.

    "Is Space-Time Attention All You Need for Video Understanding?" (Bertasius, Wang, Torresani, ICML 2021). T times, S
    places, P prefix tokens.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, activation: Activation, eps: float, gated_mlp: bool, prefix: int
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.time_norm = nn.LayerNorm(width, eps)
        self.time_attn = TimeAttention(width, heads)
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, hidden, activation, gated_mlp)

    def forward(self, x: Tensor, times: int) -> Tensor:
        """Tokens (B, P + T S, D) of tokens x (B, P + T S, D)."""
        first, tokens = x[:, : self.prefix], x[:, self.prefix :]  # (B, P, D), (B, T S, D)
        tokens = tokens + self.time_attn(self.time_norm(tokens), times)  # (B, T S, D)
        copies = first.unsqueeze(1).expand(-1, times, -1, -1)  # (B, T, P, D)
        frames = torch.cat([copies, tokens.unflatten(1, (times, -1))], dim=2)  # (B, T, P + S, D)
        added = self.attn(self.norm1(frames.flatten(0, 1))).unflatten(0, (-1, times))  # (B, T, P + S, D)
        first = first + added[:, :, : self.prefix].mean(dim=1)  # (B, P, D)
        tokens = tokens + added[:, :, self.prefix :].flatten(1, 2)  # (B, T S, D)
        x = torch.cat([first, tokens], dim=1)  # (B, P + T S, D)
        return x + self.mlp(self.norm2(x))  # (B, P + T S, D)


class QueryPooler(nn.Module):
    """See `edgetube.spec.QueryPool`; heads h, C = D / h.

    `score` holds, for each head, the product of the learned query and the key weights, scaled by C ** -0.5 (a bias of
    the keys adds the same to every score, and softmax does not see it); the query itself is in the bias that is added
    last, of `proj` or `value`.
    """

    def __init__(self, spec: ModelSpec, pool: QueryPool) -> None:
        super().__init__()
        d, eps = spec.width, pool.norm_eps or spec.norm_eps
        self.blocks = nn.ModuleList(
            Block(d, pool.heads, pool.hidden, spec.activation, eps, gated_mlp=False, gate=False)
            for _ in range(pool.depth)
        )
        self.norm = nn.LayerNorm(d, eps) if pool.norm else None
        self.score = nn.Linear(d, pool.heads, bias=False)
        self.value = nn.Linear(d, d)
        self.proj = nn.Linear(d, d) if pool.projection else None
        self.mlp_norm = nn.LayerNorm(d, eps)
        self.mlp = Mlp(d, pool.hidden, spec.activation)

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, TokenState(sizes=sizes))  # (B, N, D)
        z = x if self.norm is None else self.norm(x)  # (B, N, D)
        weights = weighted_softmax(self.score(z), sizes)  # (B, N, h)
        mixed = weights.transpose(1, 2) @ z  # (B, h, D)
        rows = self.value.weight.unflatten(0, (weights.shape[2], -1))  # (h, C, D)
        y = torch.einsum("bhd,hcd->bhc", mixed, rows).flatten(1) + self.value.bias  # (B, D)
        y = y if self.proj is None else self.proj(y)  # (B, D)
        return y + self.mlp(self.mlp_norm(y))  # (B, D)


def weighted_softmax(scores: Tensor, sizes: Tensor | None) -> Tensor:
    """Softmax of scores (B, N, h) over the tokens; a mean of s tokens, `sizes` (B, N, 1), counts as s of them."""
    return torch.softmax(scores if sizes is None else scores + sizes.log(), dim=1)  # (B, N, h)


class Readout(nn.Module):
    """The vector that the classifiers read: the parts of `spec.readout` of the encoded tokens, concatenated."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.parts, self.prefix = spec.readout, spec.prefix
        self.score = nn.Linear(spec.width, 1) if "attention" in self.parts else None
        if spec.query_pool is not None:
            self.query = QueryPooler(spec, spec.query_pool)

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        found = [self.part(name, x, sizes) for name in self.parts]  # each (B, D)
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)  # (B, F)

    def part(self, name: str, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        """One vector (B, D) of the tokens x (B, P + N, D), each the mean of `sizes` (B, P + N, 1) tokens or of one."""
        if name == "mean":
            tokens, counts = x[:, self.prefix :], None if sizes is None else sizes[:, self.prefix :]
            return tokens.mean(dim=1) if counts is None else (tokens * counts).sum(dim=1) / counts.sum(dim=1)
        if self.score is not None and name == "attention":
            return (weighted_softmax(self.score(x), sizes) * x).sum(dim=1)
        return self.query(x, sizes) if name == QUERY else x[:, int(name.partition(".")[2])]


class Anchor(nn.Module):
    """Anchored positions (N, D): the learned grid at the tokens' centres, and a learned share of their times."""

    sampling: Tensor
    waves: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.grid = nn.Parameter(torch.zeros(math.prod(spec.places), spec.width))
        self.time = nn.Parameter(torch.zeros(()))
        self.place(spec)

    def place(self, spec: ModelSpec) -> None:
        """Take the tokens of `spec`."""
        for name, table in zip(("sampling", "waves"), positions.anchored(spec), strict=True):
            self.register_buffer(name, torch.from_numpy(table).float(), persistent=False)

    def forward(self) -> Tensor:
        return self.sampling @ self.grid + self.time * self.waves  # (N, D)


class VideoTransformer(nn.Module):
    """A video or image transformer fed by tubes; with sparse tubes, one model for clips and images.

    `forward` takes normalised float clips (B, C, T, H, W) of the spec's own size, or images as T = 1, and gives
    logits (B, classes) of the classifier named `head` (the first one by default). P prefix tokens come before the N
    tokens of the tubes.
    """

    positions: Tensor
    rotation: Tensor | None

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.tubes = Tubes(spec)
        self.anchor = Anchor(spec) if spec.positions == "anchored" else None
        if self.anchor is None:
            self.register_buffer("positions", position_table(spec), persistent=spec.positions == "stored")  # (N, D)
        self.register_buffer("rotation", rotation_tables(spec), persistent=False)  # (2, P + N, D / heads) or None
        self.prefix = nn.Parameter(torch.zeros(spec.prefix, spec.width)) if spec.prefix else None
        self.embedding_norm = nn.LayerNorm(spec.width, spec.norm_eps) if spec.embedding_norm else None
        self.blocks = nn.ModuleList(encoder_block(spec, i) for i in range(spec.depth))
        self.norm = nn.LayerNorm(spec.width, spec.final_norm_eps) if spec.final_norm != "none" else nn.Identity()
        self.pool = Readout(spec)
        self.projection = nn.Linear(spec.features, spec.projection) if spec.projection else None
        self.classifiers = classifiers_of(spec)
        self.apply(_initialise)

    def forward(self, x: Tensor, head: str | None = None) -> Tensor:
        spec, batch = self.spec_of(x), x.shape[0]
        if spec.per_frame:
            x = x.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # (B T, C, 1, H, W)
        z0, table = self.tubes(x, spec), self.position_rows(spec)  # (B, N, D), (N, D)
        rotation = self.rotation if spec == self.spec else rotation_tables(spec)
        keep = spec.reduction.keep if spec.reduction else ()
        state = TokenState(keep, F.pad(z0, (0, 0, spec.prefix, 0)) if spec.gates else None, rotation)
        x = self.encode(self.embed(z0, table), state, spec.grids[0][0])  # (B, P + N, D)
        features = self.features(x, state.sizes)  # (B, E)
        if spec.per_frame:
            features = features.unflatten(0, (batch, -1)).mean(dim=1)  # (B, E)
        return self.classifier(head)(features)  # (B, classes)

    def position_rows(self, spec: ModelSpec | None = None) -> Tensor:
        """The positions (N, D) that are added to the tokens, of this model or of its form `spec` at another clip."""
        same = spec is None or spec == self.spec
        if self.anchor is not None:
            return self.anchor() if same else self.anchor.grid  # the other form is that of an image
        table = self.positions
        return table if spec is None or same else moved_positions(table, self.spec, spec).to(table)

    def embed(self, z0: Tensor, table: Tensor) -> Tensor:
        """The encoder's input (B, P + N, D) of the tubes' tokens z0 (B, N, D) and their position table (N, D)."""
        x = z0 + table  # (B, N, D)
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(len(x), -1, -1), x], dim=1)  # (B, P + N, D)
        return x if self.embedding_norm is None else self.embedding_norm(x)  # (B, P + N, D)

    def encode(self, x: Tensor, state: TokenState | None = None, times: int = 1) -> Tensor:
        """Encoded tokens of embedded tokens x (B, P + N, D): as many, or with a reduction the P + N' that are left.

        Args:
            state: of the tokens; it follows them.
            times: the length of their grid in time, for divided attention.
        """
        state = state or TokenState()
        for block in self.blocks:
            x = block(x, times) if isinstance(block, DividedBlock) else block(x, state)  # (B, P + N, D)
        return self.norm(x) if self.spec.final_norm == "tokens" else x  # (B, P + N, D)

    def features(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        """What the classifiers read (B, F) or (B, E), of encoded tokens (B, P + N, D) and their `TokenState.sizes`."""
        y = self.pool(x, sizes)  # (B, F)
        y = self.norm(y) if self.spec.final_norm == "readout" else y  # (B, F)
        return y if self.projection is None else F.normalize(self.projection(y), dim=1)  # (B, E), of length 1

    def classify(self, x: Tensor, head: str | None = None) -> Tensor:
        """Logits (B, classes) of encoded tokens (B, P + N, D).

        Raises:
            InputError: no classifier is called `head`.
        """
        return self.classifier(head)(self.features(x))  # (B, classes)

    def classifier(self, head: str | None = None) -> nn.Module:
        """The linear called `head`, or the first.

        Raises:
            InputError: no classifier is called `head`.
        """
        head = head or self.spec.classifiers[0][0]
        if head not in self.classifiers:
            raise InputError(f"the model has no classifier {head!r}; it has {', '.join(self.classifiers)}")
        return self.classifiers[head]

    def spec_of(self, x: Tensor) -> ModelSpec:
        """The spec at the clip x (B, C, T, H, W): this model's own, or its image form when T = 1.

        Raises:
            InputError: x has another rank, another number of channels, or another size.
        """
        if x.ndim == 5 and x.shape[1] == self.spec.channels and tuple(x.shape[3:]) == self.spec.size:
            if x.shape[2] == self.spec.frames:
                return self.spec
            if x.shape[2] == 1 and self.spec.accepts_images:
                return self.spec.with_clip(frames=1)
        expected = ("B", self.spec.channels, *self.spec.clip)
        raise InputError(
            f"the model takes clips {expected}, or images as T = 1 when it has a 2-D tube; given {tuple(x.shape)}"
        )


def classifiers_of(spec: ModelSpec) -> nn.ModuleDict:
    """The classifiers of a model, with random weights.

    Raises:
        SpecError: one has a name that PyTorch's modules have for something of their own.
    """
    found = nn.ModuleDict()
    for name, classes in spec.classifiers:
        if hasattr(found, name):
            raise SpecError(f"a classifier cannot be called {name!r}, which PyTorch uses itself; give another name")
        found[name] = nn.Linear(spec.embedding, classes)
    return found


def encoder_block(spec: ModelSpec, index: int) -> Block | DividedBlock:
    """Encoder block number `index` of a model, with random weights."""
    shape = spec.width, spec.heads, spec.hidden, spec.activation, spec.norm_eps, spec.gated_mlp
    if spec.attention == "divided":
        return DividedBlock(*shape, spec.prefix)
    reduce = Reduce(spec.reduction.kind, spec.prefix, index) if spec.reduction else None
    return Block(*shape, index in spec.gates, reduce)


def position_table(spec: ModelSpec) -> Tensor:
    """The fixed position table (N, D) in float32, where a stored one starts from; zeros where positions are rotary."""
    if spec.positions == "rotary":
        return torch.zeros(spec.tokens, spec.width)
    return torch.from_numpy(positions.table(spec)).float()


def rotation_tables(spec: ModelSpec) -> Tensor | None:
    """Cosines and sines (2, P + N, D / heads) of rotary positions; None without them."""
    return None if spec.rotary is None else torch.from_numpy(positions.rotation(spec)).float()


def moved_positions(table: Tensor, old: ModelSpec, new: ModelSpec) -> Tensor:
    """The position table (N', D) for another clip shape: `spec.position_resize` where it is stored.

    Raises:
        SpecError: it belongs to one clip shape.
    """
    if new.positions != "stored":
        return position_table(new)
    return positions.resized(table, old, new)


def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of `VideoTransformer(spec).state_dict()`, without making one."""
    d = spec.width
    found: dict[str, tuple[int, ...]] = {"positions": (spec.tokens, d)} if spec.positions == "stored" else {}
    if spec.positions == "anchored":
        found |= {"anchor.grid": (math.prod(spec.places), d), "anchor.time": ()}
    found |= {"prefix": (spec.prefix, d)} if spec.prefix else {}
    for i, tube in enumerate(spec.tubes):
        found[f"tubes.biases.{i}"] = (d // tube.merge,)
        if spec.kernel is None:
            found[f"tubes.weights.{i}"] = (d // tube.merge, spec.channels, *tube.kernel)
    if spec.kernel is not None:
        found["tubes.kernel"] = (d, spec.channels, *spec.kernel)
    for i in range(spec.depth):
        found |= _block_shapes(f"blocks.{i}", d, spec.hidden, spec.gated_mlp, spec.attention == "divided")
    found |= _norm_shapes("embedding_norm", d) if spec.embedding_norm else {}
    found |= _norm_shapes("norm", d) if spec.final_norm != "none" else {}
    found |= _linear_shapes("pool.score", (1, d)) if "attention" in spec.readout else {}
    found |= _query_pool_shapes("pool.query", d, spec.query_pool) if spec.query_pool else {}
    found |= _linear_shapes("projection", (spec.projection, spec.features)) if spec.projection else {}
    for name, classes in spec.classifiers:
        found |= _linear_shapes(f"classifiers.{name}", (classes, spec.embedding))
    return found | {f"blocks.{i}.alpha": () for i in spec.gates}


def _block_shapes(name: str, d: int, hidden: int, gated_mlp: bool, divided: bool = False) -> dict[str, tuple[int, ...]]:
    found = _norm_shapes(f"{name}.norm1", d) | _norm_shapes(f"{name}.norm2", d)
    linears = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc2": (d, hidden)}
    linears |= {"mlp.fc1": (hidden * (2 if gated_mlp else 1), d)}
    if divided:
        found |= _norm_shapes(f"{name}.time_norm", d)
        linears |= {"time_attn.qkv": (3 * d, d), "time_attn.proj": (d, d)}
    for linear, shape in linears.items():
        found |= _linear_shapes(f"{name}.{linear}", shape)
    return found


def _query_pool_shapes(name: str, d: int, pool: QueryPool) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {f"{name}.score.weight": (pool.heads, d)}
    for i in range(pool.depth):
        found |= _block_shapes(f"{name}.blocks.{i}", d, pool.hidden, gated_mlp=False)
    for norm in ("mlp_norm", *(["norm"] if pool.norm else [])):
        found |= _norm_shapes(f"{name}.{norm}", d)
    linears = {"value": (d, d), "mlp.fc1": (pool.hidden, d), "mlp.fc2": (d, pool.hidden)}
    for linear, shape in (linears | ({"proj": (d, d)} if pool.projection else {})).items():
        found |= _linear_shapes(f"{name}.{linear}", shape)
    return found


def _linear_shapes(name: str, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def with_weights(spec: ModelSpec, weights: Mapping[str, Tensor]) -> VideoTransformer:
    """A model in eval mode of tensors by name, all of `shapes(spec)`; it takes them over without a copy."""
    with torch.device("meta"):  # nothing is allocated, nor drawn at random
        model = VideoTransformer(spec)
    if model.anchor is not None:
        model.anchor.place(spec)
    else:
        model.register_buffer("positions", position_table(spec), persistent=spec.positions == "stored")
    model.register_buffer("rotation", rotation_tables(spec), persistent=False)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _lecun(weight: Tensor) -> Tensor:
    """LeCun normal, as ViT initialises its patch embedding."""
    return nn.init.normal_(weight, std=weight[0].numel() ** -0.5)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
