"""The numbers of a comparison, worked out by hand and by loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgetube import metrics
from edgetube.bench import compare
from edgetube.bench.compare import ClipMetrics
from edgetube.errors import ParityError

LABELS = ("a", "b", "c")

# Margins of the reference: 1, 4, 2, 3. The artifact flips clips 0 and 2.
REFERENCE = np.array([[2, 1, 0], [0, 5, 1], [0, 1, 3], [4, 0, 1]], np.float32)
LOGITS = np.array([[1, 2, 0], [0, 4, 1], [3, 1, 2], [4, 0, 1]], np.float32)
TRUTH = np.array([0, 1, 2, -1])


@pytest.fixture
def clips() -> ClipMetrics:
    return compare.clip_metrics(REFERENCE, LOGITS, TRUTH)


def test_metrics_of_each_clip(clips: ClipMetrics) -> None:
    np.testing.assert_array_equal(clips.margin, [1, 4, 2, 3])
    np.testing.assert_array_equal(clips.flipped, [True, False, True, False])
    np.testing.assert_array_equal(clips.reference_rank, [0, 0, 0, -1])
    np.testing.assert_array_equal(clips.rank, [1, 0, 1, -1])
    np.testing.assert_array_equal(clips.error, [1, 1, 3, 0])
    np.testing.assert_array_equal(clips.largest, [2, 5, 3, 4])
    assert clips.score[3] == pytest.approx(np.exp(4) / (np.exp(4) + 1 + np.e))


def test_summary(clips: ClipMetrics) -> None:
    got = compare.summarise(clips, 3, "emulated")
    assert (got.clips, got.labelled, got.status) == (4, 3, "emulated")
    assert got.agreement == 0.5
    assert (got.agreement_low, got.agreement_high) == pytest.approx(metrics.wilson(0.5, 4))
    assert got.top1_reference == 1.0
    assert got.top1 == pytest.approx(1 / 3)
    assert got.drop == pytest.approx(200 / 3)
    assert got.sure_flips == 0.0  # the surer half are the clips 1 and 3
    assert (got.top5, got.top5_reference) == (None, None)
    assert (got.max_abs_error, got.max_abs_logit, got.relative_error) == (3.0, 5.0, 0.6)


def test_flips_by_margin(clips: ClipMetrics) -> None:
    assert compare.quarters(clips) == (
        compare.Quarter(1, 1, 1, 1),
        compare.Quarter(2, 2, 1, 1),
        compare.Quarter(3, 3, 1, 0),
        compare.Quarter(4, 4, 1, 0),
    )
    few = compare.clip_metrics(REFERENCE[:2], LOGITS[:2], TRUTH[:2])
    assert [quarter.clips for quarter in compare.quarters(few)] == [1, 1]


def test_classes_come_with_the_largest_drop_first(clips: ClipMetrics) -> None:
    found = compare.per_class(clips, LABELS)
    assert [(row.label, row.clips, row.drop, row.agreement) for row in found] == [
        ("a", 1, 100.0, 0.0),
        ("c", 1, 100.0, 0.0),
        ("b", 1, 0.0, 1.0),
    ]


def test_the_worst_clips_are_those_that_flipped_then_those_that_moved(clips: ClipMetrics) -> None:
    found = compare.worst(clips, "wxyz", LABELS, 3)
    assert [clip.name for clip in found] == ["y", "w", "x"]
    first = found[0].to_json()
    assert (first["label"], first["reference"]["label"], first["bundle"]["label"]) == ("c", "c", "a")
    assert (first["flipped"], first["margin"], first["max_abs_error"]) == (True, 2.0, 3.0)
    assert compare.worst(clips, "wxyz", LABELS, 9)[-1].label is None


def test_top_five(rng: np.random.Generator) -> None:
    reference, logits = rng.normal(size=(2, 50, 8)).astype(np.float32)
    truth = rng.integers(0, 8, 50)
    got = compare.summarise(compare.clip_metrics(reference, logits, truth), 8, "executed")
    best = [set(np.argsort(-row)[:5]) for row in logits]
    assert got.top5 == pytest.approx(np.mean([label in five for label, five in zip(truth, best, strict=True)]))
    assert got.top1 == pytest.approx(np.mean(logits.argmax(1) == truth))


def test_unlabelled_clips_have_no_accuracy_and_no_classes() -> None:
    clips = compare.clip_metrics(REFERENCE, LOGITS, np.full(4, -1))
    got = compare.summarise(clips, 3, "executed")
    assert (got.top1, got.top1_reference, got.drop, got.labelled) == (None, None, None, 0)
    assert compare.per_class(clips, LABELS) == ()


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(ParityError, match="NaN or infinite logits on 1 of 4 clips"):
        compare.clip_metrics(REFERENCE, np.where(LOGITS == 5 - 1, np.inf, LOGITS)[[0, 1, 2, 2]], TRUTH)


@given(arrays(np.float32, (6, 3), elements=st.floats(-9, 9, width=32)), st.permutations(range(6)))
def test_parts_in_any_order_join_to_the_whole(logits: Any, order: Any) -> None:
    reference, truth = np.roll(logits, 1, axis=0), np.arange(6) % 3
    whole = compare.clip_metrics(reference, logits, truth)
    parts = [compare.clip_metrics(reference[[i]], logits[[i]], truth[[i]]) for i in order]
    joined = compare.join(parts, np.argsort(order))
    np.testing.assert_array_equal(joined.kl, whole.kl)
    np.testing.assert_array_equal(joined.answer, whole.answer)
    np.testing.assert_array_equal(joined.rank, whole.rank)
