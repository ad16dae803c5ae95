"""Fewer tokens: how many of the tubes' tokens are left behind each block of the encoder, and how they leave.

Only the standard library is needed; `edgetube.model.reduction` has the computation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from edgetube import strict
from edgetube.errors import InputError, SpecError

Kind = Literal["merge", "drop"]

LABELS: Mapping[Kind, str] = {"merge": "keep", "drop": "drop"}
"""What names of files call the kinds."""

MOST = 1 << 16
"""Most tokens, and most blocks, of a schedule."""


@dataclass(frozen=True)
class Reduction:
    """The tokens that leave the encoder in its blocks, between attention and MLP.

    Prefix tokens always stay. Where two tokens are equally good, the one with the smaller index wins.

    Attributes:
        kind: "merge": tokens with similar keys become their weighted mean ("Token Merging: Your ViT But Faster", Bolya
            et al., ICLR 2023). "drop": the tokens that receive least attention leave, on average over all queries
            and heads.
        keep: number of the tubes' tokens behind each block, in order; it never rises.
    """

    kind: Kind
    keep: tuple[int, ...]

    def __post_init__(self) -> None:
        with strict.spec_errors():
            strict.choice(self.kind, "kind of a reduction of tokens", get_args(Kind))
            given = strict.items(self.keep, "keep of a reduction of tokens", 1, MOST)
            keep = tuple(strict.integer(count, "keep of a reduction of tokens", 1, MOST) for count in given)
            object.__setattr__(self, "keep", keep)

    def check(self, tokens: int, depth: int) -> None:
        """Check that a model of `depth` blocks and `tokens` tokens of tubes can be reduced so.

        Raises:
            SpecError: it cannot; says why.
        """
        if len(self.keep) != depth:
            raise SpecError(f"a reduction of tokens states {len(self.keep)} blocks; the model has {depth}")
        before = tokens
        for block, count in enumerate(self.keep):
            if count > before:
                raise SpecError(f"{count} tokens are to be left behind block {block}, which gets {before}")
            if self.kind == "merge" and count < (least := before // 2):
                raise SpecError(
                    f"block {block} gets {before} tokens and can merge {before - least} of them into others; "
                    f"{count} cannot be left: keep more, or spread it over more blocks"
                )
            before = count
        if before == tokens:
            raise SpecError(f"a reduction of tokens that keeps all {tokens}: leave it out")

    def entering(self, tokens: int) -> tuple[int, ...]:
        """Number of the tubes' tokens that enter each block, where `tokens` enter the first."""
        return tokens, *self.keep[:-1]

    def scaled(self, tokens: int, new: int) -> Reduction | None:
        """The same shares of another number of tokens; None where nothing would leave."""
        keep, before = [], new
        for count in self.keep:
            least = before // 2 if self.kind == "merge" else 1
            before = min(before, max(1, least, round(count * new / tokens)))
            keep.append(before)
        return Reduction(self.kind, tuple(keep)) if before < new else None

    @property
    def label(self) -> str:
        """For names of files: `keep155` or `drop155`."""
        return f"{LABELS[self.kind]}{self.keep[-1]}"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Reduction:
        with strict.spec_errors():
            return cls(**strict.fields_of(cls, data))


def evenly(kind: Kind, tokens: int, depth: int, keep: int) -> Reduction:
    """A reduction from `tokens` to `keep` tokens, the same number in each of `depth` blocks."""
    return Reduction(kind, tuple(tokens - round((i + 1) * (tokens - keep) / depth) for i in range(depth)))


def parse(text: str, kind: Kind, tokens: int, depth: int) -> Reduction:
    """A reduction from what a user states.

    Args:
        text: the tokens that are left in the end, as a count (`155`) or a share (`0.5`, `50%`), spread evenly over the
            blocks; or one number for each block, separated by commas.
        tokens: of the tubes, in the model's clip.

    Raises:
        InputError: it is no such text, or the model cannot be reduced so.
    """
    keep = counts(text, tokens)
    try:
        found = evenly(kind, tokens, depth, keep[0]) if len(keep) == 1 else Reduction(kind, tuple(keep))
        found.check(tokens, depth)
    except SpecError as error:
        raise InputError(f"--keep-tokens {text}: {error}") from error
    return found


def counts(text: str, tokens: int) -> list[int]:
    """The numbers of tokens that a user states: one for the last block, or one for each; see `parse`.

    Raises:
        InputError: they are none.
    """
    return [_count(part, tokens) for part in text.split(",")]


def _count(text: str, tokens: int) -> int:
    """A number of tokens from a count or a share."""
    text = text.strip()
    if re.fullmatch(r"\d{1,6}", text):
        return int(text)
    share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1) if re.fullmatch(SHARE, text) else 0.0
    if not 0 < share <= 1:
        raise InputError(
            f"--keep-tokens has {text!r:.40}; give a number of tokens (1 to {tokens}), a share (0.5 or 50%), or one of "
            "them for each block, separated by commas"
        )
    return max(1, round(share * tokens))


SHARE = r"\d{0,3}\.\d{1,6}|\d{1,3}(\.\d{0,6})?%"
