"""Spans of two models on one video: which do they share, and how late does one begin them?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgetube.live.decisions import Span


@dataclass(frozen=True)
class SpanAgreement:
    """The spans of one model, compared with those of another that is right by definition.

    Attributes:
        shared: spans that both have, one to one: of one label, and with time in common.
        missed, extra: spans that only the reference has, or only the model.
        iou: time that both have, over time that one of them has, label by label; 1 where they are equal. None where
            neither has any.
        onset_delay_mean_s, onset_delay_max_s: delay in seconds of the shared spans' starts behind the reference's;
            negative where they lead. The second is the one of largest size. None without shared spans.
    """

    shared: int
    missed: int
    extra: int
    iou: float | None
    onset_delay_mean_s: float | None
    onset_delay_max_s: float | None


def compare(reference: Sequence[Span], spans: Sequence[Span]) -> SpanAgreement:
    """Match spans one to one, those with the most time in common first, and count the rest."""
    pairs = [
        (common(a, b), i, j)
        for (i, a), (j, b) in itertools.product(enumerate(reference), enumerate(spans))
        if a.label == b.label and _touch(a, b)
    ]
    taken: tuple[set[int], set[int]] = set(), set()
    delays = []
    for _, i, j in sorted(pairs, key=lambda pair: (-pair[0], *pair[1:])):
        if i not in taken[0] and j not in taken[1]:
            taken[0].add(i)
            taken[1].add(j)
            delays.append(spans[j].start - reference[i].start)
    return SpanAgreement(
        shared=len(delays),
        missed=len(reference) - len(delays),
        extra=len(spans) - len(delays),
        iou=_iou(reference, spans),
        onset_delay_mean_s=float(np.mean(delays)) if delays else None,
        onset_delay_max_s=max(delays, key=abs, default=None),
    )


def common(a: Span, b: Span) -> float:
    """Seconds that both spans cover."""
    return max(0.0, min(a.end, b.end) - max(a.start, b.start))


def _touch(a: Span, b: Span) -> bool:
    """Whether they have time in common; a span of one answer has none of its own, and counts where it lies."""
    instant = a.seconds == 0 or b.seconds == 0
    return common(a, b) > 0 or (instant and max(a.start, b.start) <= min(a.end, b.end))


def _iou(reference: Sequence[Span], spans: Sequence[Span]) -> float | None:
    """Spans of one model and label do not overlap, so seconds add up."""
    if not reference and not spans:
        return None
    shared = math.fsum(common(a, b) for a, b in itertools.product(reference, spans) if a.label == b.label)
    whole = [math.fsum(span.seconds for span in side) for side in (reference, spans)]
    either = whole[0] + whole[1] - shared  # exactly `shared` where both sides are equal
    if either:
        return shared / either
    return float({(s.label, s.start) for s in reference} == {(s.label, s.start) for s in spans})
