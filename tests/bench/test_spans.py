"""Spans of two models, matched by hand and by trying every matching."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetube.bench.spans import SpanAgreement, compare
from edgetube.live.decisions import Span


def span(label: str, start: float, end: float) -> Span:
    return Span(label, start, end, 0.9)


REFERENCE = (span("a", 1, 3), span("b", 2, 6), span("a", 8, 9))


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        (REFERENCE, SpanAgreement(3, 0, 0, 1.0, 0.0, 0.0)),
        ((), SpanAgreement(0, 3, 0, 0.0, None, None)),
        ((span("a", 2, 4), span("b", 2, 4)), SpanAgreement(2, 1, 0, 3 / 8, 0.5, 1.0)),
        ((span("a", 0.5, 1.5), span("a", 2, 3)), SpanAgreement(1, 2, 1, 1.5 / 7.5, 1.0, 1.0)),  # the longer part counts
        ((span("b", 8, 9),), SpanAgreement(0, 3, 1, 0.0, None, None)),
        ((span("a", 3, 4),), SpanAgreement(0, 3, 1, 0.0, None, None)),  # where one ends the other begins
        ((span("a", 2, 2), span("a", 9, 9)), SpanAgreement(2, 1, 0, 0.0, 1.0, 1.0)),
        ((span("a", 0, 3), span("a", 8.5, 9)), SpanAgreement(2, 1, 0, 2.5 / 8, -0.25, -1.0)),
        ((span("a", 1, 9),), SpanAgreement(1, 2, 0, 3 / 12, 0.0, 0.0)),
    ],
)
def test_by_hand(spans: tuple[Span, ...], expected: SpanAgreement) -> None:
    got = compare(REFERENCE, spans)
    assert (got.shared, got.missed, got.extra) == (expected.shared, expected.missed, expected.extra)
    assert got.iou == pytest.approx(expected.iou)
    assert (got.onset_delay_mean_s, got.onset_delay_max_s) == (expected.onset_delay_mean_s, expected.onset_delay_max_s)


def test_nothing_on_both_sides() -> None:
    assert compare((), ()) == SpanAgreement(0, 0, 0, None, None, None)
    assert compare((span("a", 1, 1),), (span("a", 1, 1),)).iou == 1
    assert compare((span("a", 1, 1),), (span("b", 1, 1),)).iou == 0


@st.composite
def apart(draw: st.DrawFn) -> list[Span]:
    """Spans of two labels; those of one label do not overlap."""
    found = []
    for label in "ab":
        edges = sorted(set(draw(st.lists(st.integers(0, 20), max_size=6))))
        found += [span(label, a, b) for a, b in zip(edges[::2], edges[1::2], strict=False)]
    return sorted(found, key=lambda s: (s.end, s.label))


@given(apart(), apart())
def test_seconds_add_up_second_by_second(reference: list[Span], spans: list[Span]) -> None:
    def seconds(of: list[Span]) -> set[tuple[str, int]]:
        return {(s.label, t) for s in of for t in range(int(s.start), int(s.end))}

    got, a, b = compare(reference, spans), seconds(reference), seconds(spans)
    assert got.iou == (None if not a | b else pytest.approx(len(a & b) / len(a | b)))
    assert got.shared + got.missed == len(reference)
    assert got.shared + got.extra == len(spans)
    meeting = [(x, y) for x, y in itertools.product(reference, spans) if seconds([x]) & seconds([y])]
    assert (got.shared > 0) == bool(meeting)
    left, right = {x for x, _ in meeting}, {y for _, y in meeting}
    assert got.shared <= min(len(left), len(right))
    assert compare(spans, reference).shared == got.shared
