"""Tokens that leave the encoder: merged into similar ones, or dropped; see `edgetube.reduction.Reduction`.

Letters: B clips, P prefix tokens, N tokens of tubes, D width, C channels of a head; r tokens leave in one block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgetube.reduction import Kind


@dataclass
class TokenState:
    """What belongs to the tokens in the encoder, and follows them where some leave.

    Attributes:
        keep: number of the tubes' tokens behind each block; empty where all stay.
        z0: (B, P + N, D), the bare tokens of the tubes that gates add; None without gates.
        rotation: cosines and sines of rotary positions, (2, P + N, C), or (2, B, 1, P + N', C) once tokens have left.
        sizes: (B, P + N, 1), how many tokens of the tubes each one is the mean of; None while none was merged.
        keys: (B, P + N, C) of the block's attention, before rotation, averaged over the heads.
        attention: (B, P + N), that each token receives in the block: softmax averaged over queries and heads.
    """

    keep: tuple[int, ...] = ()
    z0: Tensor | None = None
    rotation: Tensor | None = None
    sizes: Tensor | None = None
    keys: Tensor | None = None
    attention: Tensor | None = None

    @property
    def bias(self) -> Tensor | None:
        """(B, 1, 1, P + N) that is added to the scores of attention: a mean of s tokens counts as s of them."""
        return None if self.sizes is None else self.sizes.log()[:, None, None, :, 0]


class Reduce(nn.Module):
    """The tokens (B, P + N, D) of block `index` between attention and MLP -> (B, P + N - r, D); a `TokenState` follows.

    `order` and `target` pass on what was decided, so that it can be read, or replaced, there.
    """

    def __init__(self, kind: Kind, prefix: int, index: int) -> None:
        super().__init__()
        self.kind, self.prefix, self.index = kind, prefix, index
        self.order, self.regret = nn.Identity(), nn.Identity()
        self.target = nn.Identity() if kind == "merge" else None

    def forward(self, x: Tensor, state: TokenState) -> Tensor:
        r = x.shape[1] - self.prefix - state.keep[self.index] if state.keep else 0
        if not r:
            return x
        return self.merge(x, state, r) if self.kind == "merge" else self.drop(x, state, r)

    def merge(self, x: Tensor, state: TokenState, r: int) -> Tensor:
        """Bipartite soft matching: the r even tokens most similar to an odd one become part of it."""
        assert state.keys is not None
        assert self.target is not None
        keys = F.normalize(state.keys[:, self.prefix :], dim=-1)  # (B, N, C)
        scores = keys[:, 0::2] @ keys[:, 1::2].transpose(1, 2)  # (B, A, N // 2), cosines
        best, nearest = scores.max(dim=2)  # (B, A)
        order = self.order(leaving_first(best, r))  # (B, A)
        target = self.target(nearest.gather(1, order[:, :r]))  # (B, r)
        chosen = scores.gather(1, order[:, :r, None].expand(-1, -1, scores.shape[2])).gather(2, target[..., None])
        self.regret(best.topk(r, dim=1).values.mean(dim=1) - chosen.mean(dim=(1, 2)))  # (B,)
        old = torch.ones_like(x[..., :1]) if state.sizes is None else state.sizes  # (B, P + N, 1)
        state.sizes = sizes = self.joined(old, order, target)  # (B, P + N - r, 1)

        def mean(rows: Tensor) -> Tensor:
            return self.joined(rows * old, order, target) / sizes

        state.z0 = None if state.z0 is None else mean(state.z0)
        if state.rotation is not None:  # a mean has the position of its odd token
            odd = torch.arange(1, keys.shape[1], 2).expand(len(order), -1)  # (B, N // 2)
            kept = torch.cat([2 * order[:, r:], odd], dim=1)  # (B, N - r)
            state.rotation = self.picked_rotation(state.rotation, kept)
        return mean(x)

    def joined(self, rows: Tensor, order: Tensor, target: Tensor) -> Tensor:
        """Rows (B, P + N, D) with the r even rows that leave added to their odd ones: (B, P + N - r, D)."""
        first, even, odd = rows[:, : self.prefix], rows[:, self.prefix :: 2], rows[:, self.prefix + 1 :: 2]
        at = order[..., None].expand(-1, -1, rows.shape[2])  # (B, A, D)
        leaving, kept = even.gather(1, at).split([target.shape[1], even.shape[1] - target.shape[1]], dim=1)
        odd = odd.scatter_add(1, target[..., None].expand_as(leaving), leaving)
        return torch.cat([first, kept, odd], dim=1)

    def drop(self, x: Tensor, state: TokenState, r: int) -> Tensor:
        """The r tokens that receive least attention leave; the others stay in their order."""
        assert state.attention is not None
        received = state.attention[:, self.prefix :]  # (B, N)
        order = self.order(leaving_first(-received, r))  # (B, N)
        kept = order[:, r:]
        best = received.topk(kept.shape[1], dim=1).values.mean(dim=1)
        self.regret((best - received.gather(1, kept).mean(dim=1)) / best)  # (B,)
        state.z0 = None if state.z0 is None else self.picked(state.z0, kept)
        state.rotation = None if state.rotation is None else self.picked_rotation(state.rotation, kept)
        return self.picked(x, kept)

    def picked(self, rows: Tensor, kept: Tensor) -> Tensor:
        """The prefix rows and the `kept` (B, n) of rows (B, P + N, D): (B, P + n, D)."""
        first, tokens = rows[:, : self.prefix], rows[:, self.prefix :]
        return torch.cat([first, tokens.gather(1, kept[..., None].expand(-1, -1, rows.shape[2]))], dim=1)

    def picked_rotation(self, tables: Tensor, kept: Tensor) -> Tensor:
        """The same of both tables of rotary positions."""
        tables = tables[:, None, None].expand(-1, len(kept), -1, -1, -1) if tables.ndim == 3 else tables
        return torch.stack([self.picked(table[:, 0], kept)[:, None] for table in tables])


def leaving_first(value: Tensor, r: int) -> Tensor:
    """Indices (B, A) of values (B, A): the r largest first, then the others, both in rising order.

    Of equal values the one with the smaller index is the larger.
    """
    ranked = value.argsort(dim=1, descending=True, stable=True)
    return torch.cat([ranked[:, :r].sort(dim=1).values, ranked[:, r:].sort(dim=1).values], dim=1)
