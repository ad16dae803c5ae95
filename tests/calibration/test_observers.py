"""Histograms against counting by numpy, ranges against searching by hand."""

import numpy as np
import pytest

from edgetube.calibration import numeric, observers
from edgetube.calibration.observers import BINS, Histogram
from edgetube.calibration.table import Range
from edgetube.errors import InputError


@pytest.fixture
def values(rng):
    """A heavy tail, as activations have it."""
    return (rng.standard_t(3, 50_000) * 2).astype(np.float32)


def filled(values, pieces=1):
    histogram = Histogram()
    for piece in np.array_split(values, pieces):
        histogram.add(piece)
    return histogram


def test_counts_are_those_of_numpy(values):
    h = filled(values, 7)
    edges = (np.arange(BINS + 1) - BINS // 2) * h.width
    np.testing.assert_array_equal(h.counts, np.histogram(values, edges)[0])
    assert (h.low, h.high) == (values.min(), values.max())
    assert h.width * BINS < 8 * np.abs(values).max()


def test_order_and_pieces_do_not_matter(values, rng):
    first = filled(values, 3)
    second = filled(rng.permutation(values), 50)
    np.testing.assert_array_equal(first.counts, second.counts)
    assert first.width == second.width


def test_memory_does_not_grow(values):
    assert filled(np.concatenate([values] * 5), 20).counts.nbytes == filled(values).counts.nbytes


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(InputError, match="NaN or infinite activations"):
        Histogram().add(np.array([1, bad], np.float32))


def test_percentiles_are_those_of_numpy(values):
    h = filled(values, 5)
    for share in (0.0005, 0.01, 0.5, 0.999):
        assert abs(h.quantile(share) - np.quantile(values, share, method="inverted_cdf")) <= 2 * h.width


@pytest.mark.parametrize("activations", ["int8", "uint8"])
def test_the_mse_range_is_the_best_of_a_direct_search(values, activations):
    h = filled(values)
    found = next(r for r in observers.candidates(h, activations) if r.method == "mse")

    def cost(r):
        return float(np.square(numeric.fake_activations(values, r, activations) - values).mean())

    limits = np.geomspace(1, 0.05, 300) * max(-h.low, h.high)
    tried = [Range(max(h.low, -t), min(h.high, t), "x") for t in limits]
    assert cost(found) <= 1.05 * min(map(cost, tried))
    assert cost(found) < cost(Range(h.low, h.high, "min-max"))


def test_entropy_clips_outliers_of_a_normal_tensor(rng):
    values = rng.standard_normal(100_000).astype(np.float32)
    values[0] = 60.0
    found = next(r for r in observers.candidates(filled(values), "int8") if r.method == "entropy")
    assert 2.5 < max(found.high, -found.low) < 20


def test_every_candidate_lies_within_what_was_seen(values):
    h = filled(values)
    methods = [r.method for r in observers.candidates(h, "int8")]
    assert methods == ["min-max", "percentile 99.9", "percentile 99.99", "percentile 99.999", "mse", "entropy"]
    for r in observers.candidates(h, "int8"):
        assert h.low <= r.low <= 0 <= r.high <= h.high


def test_a_constant_tensor_has_a_range():
    for r in observers.candidates(filled(np.zeros(10, np.float32)), "uint8"):
        assert (r.low, r.high) == (0, 0)
        np.testing.assert_array_equal(numeric.fake_activations(np.zeros(3, np.float32), r, "uint8"), 0)
