"""The model rewritten for export: equal logits from raw uint8 frames, in operators that every runtime supports.

`tokenizer.py` has the tubes, this module what follows. What does not depend on the pixels is folded: gates become plain
constants, the softmax scale goes into the query weights, signs into the rotary tables.
Letters: B clips, N tokens, D width, h heads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edgetube.contract import InputContract
from edgetube.errors import SpecError
from edgetube.export.reduction import COSINE_EPSILON, MatMul, StaticState, static_reduce
from edgetube.export.tokenizer import Linear, StaticTokenizer
from edgetube.model import transformer
from edgetube.model.transformer import Block, DividedBlock, Projections, QueryPooler, VideoTransformer
from edgetube.roles import roles_of
from edgetube.spec import QUERY, ModelSpec


class Heads(nn.Module):
    """(B, N, D) in heads of C channels: (B, h, N, C), or with `columns` (B, h, C, N), the right side of a product.

    With `length` T, tokens of S places, time first, are sequences over time: (B, S h, T, C) or (B, S h, C, T), of one
    more reshape of (B, T, S D), not of one more transposition.
    """

    def __init__(self, channels: int, columns: bool = False, length: int | None = None) -> None:
        super().__init__()
        self.channels, self.length = channels, length
        self.order = (0, 2, 3, 1) if columns else (0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, n, _ = x.shape
        return x.reshape(batch, self.length or n, -1, self.channels).permute(self.order)


def signed(tables: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines, and sines with their first half negated, (N, C) each, of `tables` (2, N, C)."""
    cos, sin = tables.detach().float().clone()
    sin[:, : sin.shape[1] // 2].neg_()
    return cos, sin


class Rotate(nn.Module):
    """Queries or keys turned by their positions, heads split: x cos + (x2 | x1) sin, the first half of sin negated.

    x is (B, h, N, C), or with `columns` (B, h, C, N); x1 and x2 are its halves on C.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, tables: Tensor, columns: bool = False) -> None:
        """`tables` (2, N, C): cosines and sines."""
        super().__init__()
        self.axis = -2 if columns else -1
        for name, table in zip(("cos", "sin"), signed(tables), strict=True):
            self.register_buffer(name, (table.T if columns else table).contiguous())

    def forward(self, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        """With `cos` and `sin` (B, 1, N, C) of tokens of which some have left."""
        first, second = x.chunk(2, dim=self.axis)
        swapped = torch.cat([second, first], dim=self.axis)
        if cos is None or sin is None:
            return x * self.cos + swapped * self.sin
        cos, sin = (t.transpose(2, 3) if self.axis == -2 else t for t in (cos, sin))
        return x * cos + swapped * sin


class Attention(nn.Module):
    """Self-attention without a tensor above rank 4; 1 / sqrt(D / h) is folded into the query weights.

    Of all tokens to all, or with `length` T of those at one place to each other: as if each place had heads of its own.
    """

    def __init__(
        self, width: int, attention: Projections, tables: Tensor | None = None, length: int | None = None
    ) -> None:
        super().__init__()
        qkv, proj, channels = attention.qkv, attention.proj, width // attention.heads
        scale = torch.ones(3 * width)
        scale[:width] = channels**-0.5
        self.qkv = Linear(qkv.weight * scale[:, None], qkv.bias * scale)
        self.q, self.k, self.v = (Heads(channels, columns, length) for columns in (False, True, False))
        self.turn_q = None if tables is None else Rotate(tables)
        self.turn_k = None if tables is None else Rotate(tables, columns=True)
        self.scores, self.softmax, self.context = MatMul(), nn.Softmax(dim=-1), MatMul()
        self.proj = Linear(proj.weight, proj.bias)

    def forward(self, x: Tensor, state: StaticState | None = None) -> Tensor:
        state = state or StaticState()
        q, k, v = self.qkv(x).split(x.shape[-1], dim=-1)  # each (B, N, D)
        state.keys = k
        q, k = self.q(q), self.k(k)  # (B, h, N, D / h), (B, h, D / h, N); with a length (B, S h, T, D / h) and so on
        if self.turn_q is not None and self.turn_k is not None:
            q, k = self.turn_q(q, state.cos, state.sin), self.turn_k(k, state.cos, state.sin)
        weights = state.weights = self.softmax(state.weighted(self.scores(q, k)))  # (B, h, N, N)
        y = self.context(weights, self.v(v))  # (B, h, N, D / h)
        return self.proj(y.permute(0, 2, 1, 3).reshape(x.shape))  # (B, N, D)


class QuickGelu(nn.Module):
    """x sigmoid(1.702 x); the number is a buffer, so that it has a name in the graph."""

    slope: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slope", torch.tensor(transformer.QUICK_GELU))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x * self.slope)


def activation(act: transformer.Act) -> nn.Module:
    """The activation of an MLP, as modules whose operators the graph has."""
    known = {"gelu": nn.GELU(), "gelu-tanh": nn.GELU("tanh"), "quick-gelu": QuickGelu()}
    return known.get(act.kind, act)


class Mlp(nn.Module):
    """Linear, activation, linear; gated where the model's is."""

    def __init__(self, mlp: transformer.Mlp) -> None:
        super().__init__()
        self.gated = mlp.gated
        self.fc1, self.fc2 = Linear(mlp.fc1.weight, mlp.fc1.bias), Linear(mlp.fc2.weight, mlp.fc2.bias)
        self.act = activation(mlp.act)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.fc2(self.act(self.fc1(x)))
        gate, up = self.fc1(x).chunk(2, dim=-1)  # each (B, N, hidden)
        return self.fc2(self.act(gate) * up)


class StaticBlock(nn.Module):
    """Pre-LN encoder block; tanh(alpha) is a constant, and a closed gate (alpha = 0) is no operator at all."""

    gate: Tensor | None

    def __init__(self, block: Block, spec: ModelSpec, tables: Tensor | None = None, sequences: int = 1) -> None:
        super().__init__()
        self.reduce = static_reduce(block.reduce, spec, sequences)
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.attn = Attention(spec.width, block.attn, tables)
        self.mlp = Mlp(block.mlp)
        gate = None if block.alpha is None else torch.tanh(block.alpha.detach())
        self.register_buffer("gate", gate if gate is not None and gate != 0 else None)

    def forward(self, x: Tensor, state: StaticState) -> Tensor:
        y = x + self.attn(self.norm1(x), state)  # (B, N, D)
        y = y if self.reduce is None else self.reduce(y, state)  # (B, N - r, D)
        z = y + self.mlp(self.norm2(y))  # (B, N - r, D)
        return z if self.gate is None or state.z0 is None else z + self.gate * state.z0  # (B, N - r, D)


class StaticDividedBlock(nn.Module):
    """`DividedBlock` on tokens that stay in their order, time first: only attention's heads are transposed."""

    def __init__(self, block: DividedBlock, spec: ModelSpec) -> None:
        super().__init__()
        self.prefix, self.times = spec.prefix, spec.grids[0][0]
        self.time_norm, self.norm1, self.norm2 = block.time_norm, block.norm1, block.norm2
        self.time_attn = Attention(spec.width, block.time_attn, length=self.times)
        self.attn = Attention(spec.width, block.attn)
        self.mlp = Mlp(block.mlp)

    def forward(self, x: Tensor, state: StaticState) -> Tensor:
        first, tokens = (x[:, : self.prefix], x[:, self.prefix :]) if self.prefix else (None, x)
        tokens = tokens + self.time_attn(self.time_norm(tokens))  # (B, T S, D)
        frames = self.split(tokens)  # (B T, S, D)
        if first is not None:
            frames = torch.cat([self.split(torch.cat([first] * self.times, dim=1)), frames], dim=1)  # (B T, P + S, D)
        added = self.attn(self.norm1(frames))  # (B T, P + S, D)
        x = tokens + added[:, self.prefix :].reshape(tokens.shape)  # (B, T S, D)
        if first is not None:
            mean = added[:, : self.prefix].reshape(x.shape[0], self.times, *first.shape[1:]).mean(dim=1)  # (B, P, D)
            x = torch.cat([first + mean, x], dim=1)  # (B, P + T S, D)
        return x + self.mlp(self.norm2(x))  # (B, P + T S, D)

    def split(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T S, D) of one time each: (B T, S, D)."""
        return tokens.reshape(tokens.shape[0] * self.times, -1, tokens.shape[2])


def static_block(
    block: nn.Module, spec: ModelSpec, tables: Tensor | None = None, sequences: int = 1
) -> StaticBlock | StaticDividedBlock:
    """An encoder block, rewritten, for `sequences` of tokens in one call."""
    if isinstance(block, DividedBlock):
        return StaticDividedBlock(block, spec)
    assert isinstance(block, Block)
    return StaticBlock(block, spec, tables, sequences)


class Pool(nn.Module):
    """Attention pooling as one matrix product; the score's bias cannot change a softmax and is dropped."""

    def __init__(self, score: nn.Linear) -> None:
        super().__init__()
        self.score, self.softmax = Linear(score.weight), nn.Softmax(dim=-1)

    def forward(self, x: Tensor, state: StaticState) -> Tensor:
        scores = state.weighted(self.score(x))  # (B, N, 1)
        weights = self.softmax(scores.reshape(x.shape[0], 1, -1))  # (B, 1, N)
        return torch.matmul(weights, x).flatten(1)  # (B, D)


class MeanPool(nn.Module):
    """Mean of the tokens behind the first `prefix`; of `tokens` that were there before some were merged."""

    def __init__(self, prefix: int = 0, tokens: int = 1) -> None:
        super().__init__()
        self.prefix, self.share = prefix, 1 / tokens

    def forward(self, x: Tensor, state: StaticState) -> Tensor:
        sizes = state.sizes
        if sizes is not None:
            shares = (sizes[:, self.prefix :] if self.prefix else sizes) * self.share  # (B, N, 1)
            return torch.matmul(shares.transpose(1, 2), x[:, self.prefix :] if self.prefix else x).flatten(1)  # (B, D)
        return (x[:, self.prefix :] if self.prefix else x).mean(dim=1)  # (B, D)


class TokenPool(nn.Module):
    """One token."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor, state: StaticState) -> Tensor:
        return x[:, self.index : self.index + 1].flatten(1)  # (B, D)


class QueryPool(nn.Module):
    """`QueryPooler` with the values of all heads projected by one batched product; h heads, C = D / h."""

    rows: Tensor
    bias: Tensor

    def __init__(self, pool: QueryPooler, spec: ModelSpec) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(StaticBlock(block, spec) for block in pool.blocks)  # type: ignore[arg-type]
        self.norm, self.score, self.softmax = pool.norm, Linear(pool.score.weight), nn.Softmax(dim=-1)
        self.mix, self.value = MatMul(), MatMul()
        rows = pool.value.weight.detach().float().unflatten(0, (pool.score.out_features, -1))  # (h, C, D)
        self.register_buffer("rows", rows.transpose(1, 2).contiguous())  # (h, D, C)
        self.register_buffer("bias", pool.value.bias.detach().float().clone())
        self.proj = None if pool.proj is None else Linear(pool.proj.weight, pool.proj.bias)
        self.mlp_norm, self.mlp = pool.mlp_norm, Mlp(pool.mlp)

    def forward(self, x: Tensor, state: StaticState) -> Tensor:
        for block in self.blocks:
            x = block(x, StaticState(sizes=state.sizes))  # (B, N, D)
        z = x if self.norm is None else self.norm(x)  # (B, N, D)
        scores = state.weighted(self.score(z))  # (B, N, h)
        weights = self.softmax(scores.transpose(1, 2))  # (B, h, N)
        mixed = self.mix(weights, z)  # (B, h, D)
        mixed = mixed.reshape(*mixed.shape[:2], 1, -1)  # (B, h, 1, D)
        y = self.value(mixed, self.rows).reshape(x.shape[0], -1) + self.bias  # (B, D)
        y = y if self.proj is None else self.proj(y)  # (B, D)
        return y + self.mlp(self.mlp_norm(y))  # (B, D)


def readout(model: VideoTransformer, part: str) -> nn.Module:
    """One part of `spec.readout`: (B, P + N, D) to (B, D)."""
    pool = model.pool
    if part == "attention" and pool.score is not None:
        return Pool(pool.score)
    if part == QUERY:
        return QueryPool(pool.query, model.spec)
    mean = MeanPool(model.spec.prefix, model.spec.tokens)
    return mean if part == "mean" else TokenPool(int(part.partition(".")[2]))


class Readout(nn.Module):
    """Several parts, concatenated; a query pool alone, too, so that it has the name that the reference gives it."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name.replace(".", "_"), part)

    def forward(self, x: Tensor, state: StaticState) -> Tensor:
        parts = [part(x, state) for part in self.children()]  # each (B, D)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)  # (B, F)


class Projection(nn.Module):
    """A projection divided by its length, with operators that every runtime has and keeps in range.

    The LayerNorm of [y, -y], whose mean is 0, is [y, -y] * sqrt(E) / |y|: (B, F) to (B, 2 E). Squares are summed inside
    it, where runtimes of 16 bits do not overflow.
    """

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        weight, bias = projection.weight.detach().float(), projection.bias.detach().float()
        self.linear = Linear(torch.cat([weight, -weight]), torch.cat([bias, -bias]))
        self.norm = nn.LayerNorm(2 * len(weight), COSINE_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))  # (B, 2 E)

    @staticmethod
    def classifier(classifier: nn.Linear) -> Linear:
        """The linear that makes of [y, -y] * sqrt(E) / |y| what `classifier` makes of y / |y|."""
        half = classifier.weight.detach().float() / (2 * classifier.in_features**0.5)
        return Linear(torch.cat([half, -half], dim=1), classifier.bias)


class StaticTransformer(nn.Module):
    """`VideoTransformer` for export: logits (B, classes) float32 of uint8 frames (B, T, H, W, 3)."""

    output = "logits"
    positions: Tensor | None
    prefix: Tensor | None
    cos: Tensor | None
    sin: Tensor | None

    def __init__(
        self,
        model: VideoTransformer,
        contract: InputContract,
        lowering: str = "gather",
        head: str | None = None,
        batch: int = 1,
    ) -> None:
        """
        Raises:
            SpecError: the lowering or the head is unknown, or model and contract do not fit each other.
        """
        super().__init__()
        self.tubes = StaticTokenizer(model, contract, lowering, batch)
        self.spec, self.contract, self.lowering, self.batch = self.tubes.spec, contract, lowering, batch
        names = [name for name, _ in self.spec.classifiers]
        self.head = head or names[0]
        if self.head not in names:
            raise SpecError(f"no classifier is called {head!r}; the model has {', '.join(names)}")
        self.roles = roles_of(self.spec, self.head)
        if batch < 1:
            raise SpecError(f"batch is {batch}; expected >= 1")
        self.register_buffer("prefix", None if model.prefix is None else model.prefix.detach().float().clone())
        self.embedding_norm = model.embedding_norm
        sequences = batch * (self.spec.frames if self.spec.per_frame else 1)
        blocks = [static_block(block, self.spec, model.rotation, sequences) for block in model.blocks]
        self.blocks = nn.ModuleList(blocks)
        self.norm = None if self.spec.final_norm == "none" else model.norm
        parts = {part: readout(model, part) for part in self.spec.readout}
        self.pool = Readout(parts) if len(parts) > 1 or QUERY in parts else parts[self.spec.readout[0]]
        chosen: nn.Linear = model.classifiers[self.head]  # type: ignore[assignment]
        self.projection = None if model.projection is None else Projection(model.projection)
        linear = Linear(chosen.weight, chosen.bias) if self.projection is None else Projection.classifier(chosen)
        self.classifiers = nn.ModuleDict({self.head: linear})
        gated = any(isinstance(block, StaticBlock) and block.gate is not None for block in blocks)
        rotation = None if model.rotation is None or self.spec.reduction is None else signed(model.rotation)
        for name, table in zip(("cos", "sin"), rotation or (None, None), strict=True):
            self.register_buffer(name, None if table is None else table[None, None])  # (1, 1, P + N, C)
        self.register_buffer("positions", model.position_rows().detach().clone() if gated else None)  # (N, D)

    def forward(self, frames: Tensor) -> Tensor:
        tokens = x = self.tubes(frames)  # (B, N, D)
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], dim=1)  # (B, P + N, D)
        x = x if self.embedding_norm is None else self.embedding_norm(x)  # (B, P + N, D)
        z0 = None if self.positions is None else self.bare(tokens, self.positions)  # (B, P + N, D)
        state = StaticState(z0, None if self.cos is None or self.sin is None else (self.cos, self.sin))
        for block in self.blocks:
            x = block(x, state)  # (B, P + N, D)
        last = self.spec.final_norm == "readout"
        x = x if last or self.norm is None else self.norm(x)  # (B, P + N, D)
        x = self.pool(x, state)  # (B, F)
        x = self.norm(x) if last and self.norm is not None else x  # (B, F)
        x = x if self.projection is None else self.projection(x)  # (B, 2 E)
        if self.spec.per_frame:
            x = x.reshape(frames.shape[0], self.spec.frames, -1).mean(dim=1)  # (B, F or 2 E)
        return self.classifiers[self.head](x)  # (B, classes)

    def bare(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The tubes' tokens without positions, which gates add; zeros for prefix tokens."""
        bare = tokens - positions  # (B, N, D)
        if self.prefix is None:
            return bare
        return torch.cat([torch.zeros_like(self.prefix).expand(bare.shape[0], -1, -1), bare], dim=1)  # (B, P + N, D)
