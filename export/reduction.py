"""Tokens that leave the encoder, for export: `edgetube.model.reduction.Reduce` in operators that every runtime has.

What is decided is exact and has one answer: ranks and places are counted by comparisons of all pairs, in int32, so that
equal values are ordered by their index in every runtime, and no operator is needed whose order of equal values is the
vendor's. Letters: B clips, P prefix tokens, N tokens of tubes, A = ceil(N / 2) even ones, D width, r tokens leave.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgetube.model import reduction
from edgetube.spec import ModelSpec

COSINE_EPSILON = 1e-12
"""Of the LayerNorm that divides keys by their length."""


@dataclass
class StaticState:
    """What follows the tokens of a static model; see `edgetube.model.reduction.TokenState`.

    Attributes:
        z0: (B, P + N, D), or None.
        tables: cosines and sines (1, 1, P + N, C) of a model with rotary positions, before any token has left.
        cos, sin: (B, 1, P + N', C) of the tokens that are left; None before, where they are constants of the blocks.
        sizes: (B, P + N, 1), or None.
        keys: (B, P + N, D) of the block's attention, all heads, before rotation. Not by head as attention reads them,
            so that a runtime's fused attention may take those in.
        weights: (B, h, P + N, P + N), the softmax of the block's attention.
    """

    z0: Tensor | None = None
    tables: tuple[Tensor, Tensor] | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    sizes: Tensor | None = None
    keys: Tensor | None = None
    weights: Tensor | None = None

    def weighted(self, scores: Tensor) -> Tensor:
        """Scores of the tokens (B, P + N, h), or of attention (B, h, P + N, P + N), where a mean of s tokens counts as
        s of them."""
        if self.sizes is None:
            return scores
        sizes = self.sizes.log()  # (B, P + N, 1)
        return scores + (sizes if scores.ndim == 3 else sizes.transpose(1, 2).unsqueeze(1))

    def rotation(self, sequences: int) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines (B, 1, P + N, C) of the tokens; None without rotary positions."""
        if self.cos is not None and self.sin is not None:
            return self.cos, self.sin
        if self.tables is None:
            return None
        cos, sin = self.tables
        return cos.expand(sequences, -1, -1, -1), sin.expand(sequences, -1, -1, -1)


class First(nn.Module):
    """Indices (B, A) int32 of values (B, A): the r largest first, then the others, both in rising order."""

    earlier: Tensor
    places: Tensor

    def __init__(self, count: int, leaving: int) -> None:
        super().__init__()
        self.leaving = leaving
        places = torch.arange(count, dtype=torch.int32)
        self.register_buffer("places", places)
        self.register_buffer("earlier", places[None, :] < places[:, None])  # (A, A): j before i

    def forward(self, value: Tensor) -> Tensor:
        own, other = value.unsqueeze(2), value.unsqueeze(1)  # (B, A, 1), (B, 1, A)
        before = (other > own) | ((other == own) & self.earlier)  # (B, A, A)
        rank = before.to(torch.int32).sum(dim=2, dtype=torch.int32)  # (B, A)
        leaves = rank < self.leaving  # (B, A)
        ahead = (leaves.unsqueeze(1) & self.earlier).to(torch.int32).sum(dim=2, dtype=torch.int32)  # (B, A)
        place = torch.where(leaves, ahead, self.places + self.leaving - ahead)  # (B, A)
        found = place.unsqueeze(1) == self.places.unsqueeze(1)  # (B, A, A): place k is that of token i
        return torch.where(found, self.places, torch.zeros_like(self.places)).sum(dim=2, dtype=torch.int32)


class Nearest(nn.Module):
    """Of scores (B, A, n) the largest (B, A), and its index (B, A) int32; of equal ones the first."""

    columns: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("columns", torch.arange(count, dtype=torch.int32))

    def forward(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        best = scores.amax(dim=2, keepdim=True)  # (B, A, 1)
        behind = torch.full_like(self.columns, len(self.columns))
        return best.squeeze(2), torch.where(scores == best, self.columns, behind).amin(dim=2)


class Rows(nn.Module):
    """Rows (B, A, D) in the order of `index` (B, n) int32: (B, n, D)."""

    starts: Tensor | None

    def __init__(self, sequences: int, count: int) -> None:
        super().__init__()
        starts = torch.arange(sequences, dtype=torch.int32)[:, None] * count  # (B, 1)
        self.register_buffer("starts", starts if sequences > 1 else None)

    def forward(self, rows: Tensor, index: Tensor) -> Tensor:
        index = index if self.starts is None else index + self.starts  # (B, n)
        flat = rows.reshape(rows.shape[0] * rows.shape[1], *rows.shape[2:])  # (B A, D)
        return torch.index_select(flat, 0, index.reshape(-1)).reshape(*index.shape, *rows.shape[2:])


class Unit(nn.Module):
    """[y, -y] sqrt(2 C) / (|y| sqrt 2) of y (B, n, C): its LayerNorm, whose mean is 0. Squares are summed inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * channels, COSINE_EPSILON)

    def forward(self, y: Tensor) -> Tensor:
        return self.norm(torch.cat([y, -y], dim=2))  # (B, n, 2 C)


class Target(Rows):
    """The indices (B, r) int32 of the odd tokens that the leaving ones become part of: rows of (B, A)."""


class MatMul(nn.Module):
    """a @ b; a module, so that the product has a name in the graph."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b)


class Merge(nn.Module):
    """Bipartite soft matching; see `edgetube.model.reduction.Reduce.merge`."""

    columns: Tensor

    def __init__(self, spec: ModelSpec, index: int, sequences: int) -> None:
        super().__init__()
        before, after = _counts(spec, index)
        self.prefix, self.leaving, self.even, self.odd = spec.prefix, before - after, before - before // 2, before // 2
        self.heads, self.unit = spec.heads, Unit(spec.width // spec.heads)
        self.scores, self.counts, self.sums = MatMul(), MatMul(), MatMul()
        self.nearest = Nearest(self.odd)
        self.order, self.target = First(self.even, self.leaving), Target(sequences, self.even)
        self.rows = Rows(sequences, self.even)
        self.register_buffer("columns", torch.arange(self.odd, dtype=torch.int32))

    def forward(self, x: Tensor, state: StaticState) -> Tensor:
        assert state.keys is not None
        tokens = state.keys[:, self.prefix :] if self.prefix else state.keys  # (B, N, D)
        keys = self.unit(tokens.reshape(*tokens.shape[:2], self.heads, -1).mean(dim=2))  # (B, N, 2 C)
        best, nearest = self.nearest(self.scores(keys[:, 0::2], keys[:, 1::2].transpose(1, 2)))  # each (B, A)
        order = self.order(best)  # (B, A)
        target = self.target(nearest, order[:, : self.leaving])  # (B, r)
        chosen = (self.columns[:, None] == target.unsqueeze(1)).to(x.dtype)  # (B, N // 2, r)
        old = torch.ones_like(x[:, :, :1]) if state.sizes is None else state.sizes  # (B, P + N, 1)
        new = self.joined(old, order, chosen, self.counts)  # (B, P + N - r, 1)
        weight = None if state.sizes is None else old
        if state.z0 is not None:
            state.z0 = self.mean(state.z0, weight, new, order, chosen)
        if (tables := state.rotation(len(x))) is not None:
            state.cos, state.sin = (self.picked(table, order) for table in tables)
        state.sizes = new
        return self.mean(x, weight, new, order, chosen)

    def mean(self, rows: Tensor, weight: Tensor | None, sizes: Tensor, order: Tensor, chosen: Tensor) -> Tensor:
        """The weighted means (B, P + N - r, D) of rows (B, P + N, D)."""
        return self.joined(rows if weight is None else rows * weight, order, chosen, self.sums) / sizes

    def joined(self, rows: Tensor, order: Tensor, chosen: Tensor, product: MatMul) -> Tensor:
        """Rows (B, P + N, D) with the r even rows that leave added to their odd ones: (B, P + N - r, D)."""
        even = self.rows(rows[:, self.prefix :: 2], order)  # (B, A, D)
        leaving, kept = even.split([self.leaving, self.even - self.leaving], dim=1)
        return self.behind(rows, kept, rows[:, self.prefix + 1 :: 2] + product(chosen, leaving))

    def picked(self, table: Tensor, order: Tensor) -> Tensor:
        """The rows of a table (B, 1, P + N, C) that stay: (B, 1, P + N - r, C)."""
        rows = table.squeeze(1)  # (B, P + N, C)
        kept = self.rows(rows[:, self.prefix :: 2], order)[:, self.leaving :]
        return self.behind(rows, kept, rows[:, self.prefix + 1 :: 2]).unsqueeze(1)

    def behind(self, rows: Tensor, *parts: Tensor) -> Tensor:
        """The prefix rows of rows (B, P + N, D), and the parts behind them."""
        return torch.cat([rows[:, : self.prefix], *parts] if self.prefix else list(parts), dim=1)


class Drop(nn.Module):
    """The tokens that receive least attention leave; see `edgetube.model.reduction.Reduce.drop`."""

    def __init__(self, spec: ModelSpec, index: int, sequences: int) -> None:
        super().__init__()
        before, after = _counts(spec, index)
        self.prefix, self.leaving = spec.prefix, before - after
        self.order, self.rows = First(before, self.leaving), Rows(sequences, before)

    def forward(self, x: Tensor, state: StaticState) -> Tensor:
        assert state.weights is not None
        received = state.weights.mean(dim=1).mean(dim=1)  # (B, P + N)
        kept = self.order(-received[:, self.prefix :])[:, self.leaving :]  # (B, N - r)
        state.z0 = None if state.z0 is None else self.picked(state.z0, kept)
        if (tables := state.rotation(len(x))) is not None:
            state.cos, state.sin = (self.picked(table.squeeze(1), kept).unsqueeze(1) for table in tables)
        return self.picked(x, kept)

    def picked(self, rows: Tensor, kept: Tensor) -> Tensor:
        """The prefix rows and the `kept` (B, n) of rows (B, P + N, D): (B, P + n, D)."""
        tokens = self.rows(rows[:, self.prefix :] if self.prefix else rows, kept)
        return torch.cat([rows[:, : self.prefix], tokens], dim=1) if self.prefix else tokens


def _counts(spec: ModelSpec, index: int) -> tuple[int, int]:
    """The tubes' tokens before and behind a block."""
    assert spec.reduction is not None
    return spec.entering[index], spec.reduction.keep[index]


def static_reduce(reduce: reduction.Reduce | None, spec: ModelSpec, sequences: int) -> Merge | Drop | None:
    """A block's reduction, rewritten; None where no token leaves."""
    if reduce is None or spec.reduction is None:
        return None
    before, after = _counts(spec, reduce.index)
    if before == after:
        return None
    return (Merge if reduce.kind == "merge" else Drop)(spec, reduce.index, sequences)
