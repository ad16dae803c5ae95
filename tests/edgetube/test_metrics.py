"""The arithmetic of every table, against torch, sklearn-free formulas and values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgetube import metrics

logits = arrays(np.float32, (5, 4), elements=st.floats(-30, 30, width=32))


@given(logits, logits)
def test_kl_is_torchs(a: Any, b: Any) -> None:
    p, q = torch.from_numpy(a).double(), torch.from_numpy(b).double()
    expected = torch.nn.functional.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="batchmean")
    assert metrics.kl(a, b) == pytest.approx(expected.item(), abs=1e-6)


@given(logits)
def test_softmax_is_torchs_and_sums_to_one(a: Any) -> None:
    expected = torch.from_numpy(a).double().softmax(-1).numpy()
    np.testing.assert_allclose(metrics.softmax(a), expected, atol=1e-12)


@given(logits)
def test_sigmoid_is_torchs(a: Any) -> None:
    np.testing.assert_allclose(metrics.sigmoid(a), torch.from_numpy(a).double().sigmoid().numpy(), atol=1e-12)
    assert metrics.sigmoid(np.array([-1e4, 0, 1e4])).tolist() == [0.0, 0.5, 1.0]


def test_top_k_counts_rows_whose_label_is_among_the_best() -> None:
    scores = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0], [1.0, 3.0, 2.0]])
    labels = np.array([0, 0, 0, 0])
    assert metrics.top_k(scores, labels) == 0.25
    assert metrics.top_k(scores, labels, 2) == 0.5
    assert metrics.top_k(scores, labels, 3) == 1.0


@given(arrays(np.float32, (5, 4), elements=st.integers(-3, 3).map(float)), st.lists(st.integers(0, 3), min_size=5))
def test_a_rank_is_the_place_in_a_stable_sort(scores: Any, labels: Any) -> None:
    truth = np.array(labels[:5])
    places = [np.argsort(-row, kind="stable").tolist().index(label) for row, label in zip(scores, truth, strict=True)]
    assert metrics.ranks(scores, truth).tolist() == places


def test_margins() -> None:
    assert metrics.margins(np.array([[1.0, 4.0, 2.5], [3.0, 3.0, 0.0]])).tolist() == [1.5, 0.0]
    assert metrics.margins(np.array([[7.0]])).tolist() == [np.inf]


def test_energies_add_up_over_the_parts(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(2, 6, 5))
    parts = np.array([metrics.energies(a[i : i + 2], b[i : i + 2]) for i in (0, 2, 4)])
    assert metrics.decibels(*parts.sum(axis=0)) == pytest.approx(metrics.sqnr(a, b))


def test_agreement_is_the_share_of_equal_answers() -> None:
    a = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    b = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 9.0], [0.1, 1.0]])
    assert metrics.agreement(a, b) == 0.75


def test_cosine_is_that_of_the_worst_row() -> None:
    a, b = np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([[5.0, 0.0], [1.0, 0.0]])
    assert metrics.cosine(a, b) == pytest.approx(np.sqrt(0.5))
    assert metrics.cosine(np.zeros((1, 3)), np.zeros((1, 3))) == 1.0


def test_sqnr_of_known_noise() -> None:
    reference = np.ones(1000)
    assert metrics.sqnr(reference, reference * 1.1) == pytest.approx(20.0)
    assert metrics.sqnr(reference, reference) == float("inf")
    assert metrics.sqnr(np.zeros(3), np.ones(3)) == float("-inf")


def test_wilson_interval_of_the_textbook() -> None:
    # Newcombe, Statistics in Medicine 1998, table I: 81 of 263 gives 0.2553 .. 0.3662.
    low, high = metrics.wilson(81 / 263, 263)
    assert (low, high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert metrics.wilson(1.0, 0) == (0.0, 1.0)
    for count in range(1, 200):  # rounding would leave the share outside
        assert metrics.wilson(0.0, count)[0] == 0.0
        assert metrics.wilson(1.0, count)[1] == 1.0


views = arrays(np.float32, (5, 3, 4), elements=st.floats(-300, 300, width=32))


@given(views)
def test_the_mean_over_views_is_that_of_torchs_softmax(of: Any) -> None:
    expected = torch.from_numpy(of).double().softmax(-1).mean(1).numpy()
    found = metrics.view_mean(of)
    assert (found.shape, found.dtype) == ((5, 4), np.float32)
    np.testing.assert_allclose(metrics.softmax(found), expected, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-3)


def test_the_mean_over_views_by_hand() -> None:
    """(0.5, 0.5) and (0.9, 0.1) are (0.7, 0.3); equal views are the view, less the mean of its logits."""
    two = np.log(np.array([[[0.5, 0.5], [0.9, 0.1]]], np.float32)) + 7
    np.testing.assert_allclose(metrics.view_mean(two), [[np.log(7 / 3) / 2, -np.log(7 / 3) / 2]], rtol=1e-6)
    same = np.repeat(np.array([[[4.0, 1.0, -2.0]]], np.float32), 3, axis=1)
    np.testing.assert_allclose(metrics.view_mean(same), [[3.0, 0.0, -3.0]], atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_view_that_is_not_finite_spoils_its_clip_alone(bad: float) -> None:
    logits = np.zeros((3, 2, 4), np.float32)
    logits[1, 0, 2] = bad
    assert np.isnan(metrics.view_mean(logits)).all(axis=1).tolist() == [False, True, False]
    assert (metrics.view_mean(logits)[[0, 2]] == 0).all()


@pytest.mark.parametrize(
    ("signal", "noise", "decibels"),
    [
        (1.0, 0.0, math.inf), (0.0, 0.0, math.inf), (0.0, 1.0, -math.inf), (100.0, 1.0, 20.0),
        (1.0, math.nan, -math.inf), (1.0, math.inf, -math.inf), (math.nan, 1.0, -math.inf), (math.inf, 0.0, -math.inf),
    ],
)  # fmt: skip
def test_decibels_at_their_ends(signal: float, noise: float, decibels: float) -> None:
    assert metrics.decibels(signal, noise) == pytest.approx(decibels)
