"""Histograms against counting by numpy, ranges against searching by hand."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import entropy

from edgetube.calibration import numeric, observers
from edgetube.calibration.observers import BINS, Histogram
from edgetube.calibration.table import ActivationScheme, Range
from edgetube.errors import InputError


@pytest.fixture
def values(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """A heavy tail, as activations have it."""
    return (rng.standard_t(3, 50_000) * 2).astype(np.float32)


def filled(values: npt.NDArray[np.float32], pieces: int = 1) -> Any:
    histogram = Histogram()
    for piece in np.array_split(values, pieces):
        histogram.add(piece)
    return histogram


def test_counts_are_those_of_numpy(values: npt.NDArray[np.float32]) -> None:
    h = filled(values, 7)
    edges = (np.arange(BINS + 1) - BINS // 2) * h.width
    np.testing.assert_array_equal(h.counts, np.histogram(values, edges)[0])
    assert (h.low, h.high) == (values.min(), values.max())
    assert h.width * BINS < 8 * np.abs(values).max()


def test_order_and_pieces_do_not_matter(values: npt.NDArray[np.float32], rng: np.random.Generator) -> None:
    first = filled(values, 3)
    second = filled(rng.permutation(values), 50)
    np.testing.assert_array_equal(first.counts, second.counts)
    assert first.width == second.width


@pytest.mark.parametrize("order", [1, -1])
def test_histograms_of_parts_add_up(values: npt.NDArray[np.float32], order: int) -> None:
    """Whichever has the wider bins."""
    merged = Histogram()
    parts: list[npt.NDArray[np.float32]] = [values[:40_000], values[40_000:] / np.float32(1000)]
    for part in parts[::order]:
        merged.merge(Histogram.of(part))
    whole = filled(np.concatenate(parts))
    np.testing.assert_array_equal(merged.counts, whole.counts)
    assert (merged.low, merged.high, merged.width) == (whole.low, whole.high, whole.width)


def test_memory_does_not_grow(values: npt.NDArray[np.float32]) -> None:
    assert filled(np.concatenate([values] * 5), 20).counts.nbytes == filled(values).counts.nbytes


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match="NaN or infinite activations"):
        Histogram().add(np.array([1, bad], np.float32))


def test_percentiles_are_those_of_numpy(values: npt.NDArray[np.float32]) -> None:
    h = filled(values, 5)
    for share in (0.0005, 0.01, 0.5, 0.999):
        assert abs(h.quantile(share) - np.quantile(values, share, method="inverted_cdf")) <= 2 * h.width


@pytest.mark.parametrize("activations", ["int8", "uint8"])
def test_the_mse_range_is_the_best_of_a_direct_search(
    values: npt.NDArray[np.float32], activations: ActivationScheme
) -> None:
    h = filled(values)
    found = next(r for r in observers.candidates(h, activations) if r.method == "mse")

    def cost(r: Any) -> Any:
        return float(np.square(numeric.fake_quantize_activations(values, r, activations) - values).mean())

    limits = np.geomspace(1, 0.05, 300) * max(-h.low, h.high)
    tried = [Range(max(h.low, -t), min(h.high, t), "x") for t in limits]
    assert cost(found) <= 1.05 * min(map(cost, tried))
    assert cost(found) < cost(Range(h.low, h.high, "min-max"))


def test_entropy_clips_outliers_of_a_normal_tensor(rng: np.random.Generator) -> None:
    values = rng.standard_normal(100_000).astype(np.float32)
    values[0] = 60.0
    found = next(r for r in observers.candidates(filled(values), "int8") if r.method == "entropy")
    assert 2.5 < max(found.high, -found.low) < 20


def test_every_candidate_lies_within_what_was_seen(values: npt.NDArray[np.float32]) -> None:
    h = filled(values)
    methods = [r.method for r in observers.candidates(h, "int8")]
    assert methods == ["min-max", "percentile 99.9", "percentile 99.99", "percentile 99.999", "mse", "entropy"]
    for r in observers.candidates(h, "int8"):
        assert h.low <= r.low <= 0 <= r.high <= h.high


def test_a_constant_tensor_has_a_range() -> None:
    for r in observers.candidates(filled(np.zeros(10, np.float32)), "uint8"):
        assert (r.low, r.high) == (0, 0)
        np.testing.assert_array_equal(numeric.fake_quantize_activations(np.zeros(3, np.float32), r, "uint8"), 0)


SCHEMES: tuple[ActivationScheme, ...] = ("int8", "uint8")


def in_integers(value: float, found: Range, activations: ActivationScheme) -> int:
    """QuantizeLinear by its definition: round half to even, add the zero point, saturate."""
    scale, zero = (found.symmetric, 0) if activations == "int8" else found.asymmetric
    low, high = (-128, 127) if activations == "int8" else (0, 255)
    return min(high, max(low, round(value / scale) + zero))


class TestBins:
    def test_every_value_lies_within_half_a_bin_of_the_centre_it_is_counted_at(
        self, values: npt.NDArray[np.float32]
    ) -> None:
        h = filled(values, 3)
        at = np.repeat(h.centres, h.counts)
        np.testing.assert_array_less(np.abs(at - np.sort(values)), h.width / 2 + 1e-12)
        assert h.centres[BINS // 2] == h.width / 2
        assert h.centres[BINS // 2 - 1] == -h.width / 2

    def test_a_histogram_begins_with_the_finest_bins(self) -> None:
        h = Histogram()
        h.add(np.array([2.0**-25, -(2.0**-24), 3 * 2.0**-24], np.float32))
        assert h.width == 2.0**-24
        assert np.flatnonzero(h.counts).tolist() == [BINS // 2 - 1, BINS // 2, BINS // 2 + 3]

    @pytest.mark.parametrize("sign", [1, -1])
    def test_the_largest_value_is_in_the_last_bin(self, sign: int) -> None:
        """1 is 4096 bins of 2 ** -12: a power of two needs no wider ones."""
        h = Histogram()
        h.add(np.array([sign * 1.0, 0.0], np.float32))
        assert h.width == 2.0**-12
        assert np.flatnonzero(h.counts).tolist() == ([BINS // 2, BINS - 1] if sign > 0 else [0, BINS // 2])
        h.add(np.array([sign * 1.001], np.float32))
        assert h.width == 2.0**-11
        assert h.counts.sum() == 3

    def test_bins_merge_in_pairs_and_stay_around_zero(self) -> None:
        h = Histogram()
        width = h.width
        h.add(np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], np.float32) * np.float32(width))
        h.add(np.array([4097 * width], np.float32))
        assert h.width == 2 * width
        middle = h.counts[BINS // 2 - 2 : BINS // 2 + 2]
        assert middle.tolist() == [1, 2, 2, 1]
        assert (h.low, h.high) == (-2.5 * width, 4097 * width)

    def test_the_extremes_hold_zero(self) -> None:
        h = Histogram()
        h.add(np.array([[2.0], [3.0]], np.float32))
        assert (h.low, h.high) == (0.0, 3.0)
        h.add(np.array([-1.0], np.float32))
        assert (h.low, h.high) == (-1.0, 3.0)
        h.add(np.array([1.0], np.float32))
        assert (h.low, h.high) == (-1.0, 3.0)

    def test_a_quantile_is_the_upper_edge_of_its_bin(self) -> None:
        h = Histogram()
        h.add(np.array([-0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0], np.float32))
        for share, value in ((0.05, -0.9), (0.1, -0.9), (0.11, 0.1), (0.5, 0.4), (0.85, 0.8), (0.9, 0.8)):
            assert h.quantile(share) == (np.floor(np.float32(value) / h.width) + 1) * h.width
        assert h.quantile(1.0) == 1.0


class TestCandidates:
    def test_percentiles_leave_out_as_many_on_either_side(self, rng: np.random.Generator) -> None:
        values = (rng.standard_t(3, 400_000) * 2 + 0.3).astype(np.float32)
        h = filled(values, 9)
        found = {r.method: r for r in observers.candidates(h, "int8")}
        for percent in (99.9, 99.99, 99.999):
            tail = (1 - percent / 100) / 2
            low, high = (np.quantile(values, q, method="inverted_cdf") for q in (tail, 1 - tail))
            r = found[f"percentile {percent}"]
            assert r.low == max(h.low, np.floor(low / h.width) * h.width)
            assert r.high == min(h.high, (np.floor(high / h.width) + 1) * h.width)

    def test_a_one_sided_tensor_has_one_sided_ranges(self, values: npt.NDArray[np.float32]) -> None:
        for sign in (1, -1):
            for r in observers.candidates(filled(sign * np.abs(values)), "uint8"):
                assert (r.low if sign > 0 else r.high) == 0
                assert r.low < 0 or r.high > 0

    @pytest.mark.parametrize("activations", SCHEMES)
    @pytest.mark.parametrize("method", ["mse", "entropy"])
    def test_the_search_finds_the_best_of_its_shares(
        self, values: npt.NDArray[np.float32], activations: ActivationScheme, method: str
    ) -> None:
        h = filled(values + np.float32(0.2), 2)
        cost = squared if method == "mse" else divergence
        tried = []
        for share in np.geomspace(1.0, 0.02, 96):
            limit = share * max(-h.low, h.high)
            tried.append(Range(max(h.low, -limit), min(h.high, limit), method))
        best = min(tried, key=lambda r: cost(h, r, activations))
        assert next(r for r in observers.candidates(h, activations) if r.method == method) == best
        assert best not in (tried[0], tried[-1])
        assert observers.least_squares(h, activations).method == "mse"


def squared(h: Histogram, found: Range, activations: ActivationScheme) -> float:
    """Sum over bins of the squared error of their centre, one by one."""
    scale, zero = (found.symmetric, 0) if activations == "int8" else found.asymmetric
    total = 0.0
    for index in np.flatnonzero(h.counts):
        centre = (index - BINS / 2 + 0.5) * h.width
        total += h.counts[index] * ((in_integers(centre, found, activations) - zero) * scale - centre) ** 2
    return float(total)


def divergence(h: Histogram, found: Range, activations: ActivationScheme) -> float:
    """TensorRT's entropy calibration as NVIDIA published it (Migacz, 8-bit inference with TensorRT, GTC 2017).

    The reference distribution has the outliers in its last bin; the candidate is quantised without them and expanded
    again, over the bins that are not empty. Here both ends may have outliers.
    """
    bins = [(int(i), (i - BINS / 2 + 0.5) * h.width) for i in np.flatnonzero(h.counts)]
    inside = [(i, centre) for i, centre in bins if found.low <= centre <= found.high]
    if not inside:
        return np.inf
    reference = {i: float(h.counts[i]) for i, _ in inside}
    for i, centre in bins:
        if centre < found.low:
            reference[inside[0][0]] += h.counts[i]
        elif centre > found.high:
            reference[inside[-1][0]] += h.counts[i]
    groups: dict[int, list[int]] = defaultdict(list)
    for i, centre in inside:
        groups[in_integers(centre, found, activations)].append(i)
    candidate = {i: sum(h.counts[j] for j in group) / len(group) for group in groups.values() for i in group}
    return float(entropy([reference[i] for i, _ in inside], [candidate[i] for i, _ in inside]))


class TestCosts:
    """What the searches minimise, against one bin at a time."""

    RANGES = (
        Range(-9.0, 9.0, "x"), Range(-1.0, 2.5, "x"), Range(-0.3, 0.2, "x"), Range(0.0, 1.5, "x"), Range(-3.0, 0.0, "x")
    )  # fmt: skip

    @pytest.mark.parametrize("activations", SCHEMES)
    @pytest.mark.parametrize("found", RANGES)
    def test_against_one_bin_at_a_time(
        self, rng: np.random.Generator, activations: ActivationScheme, found: Range
    ) -> None:
        h = filled((rng.standard_t(4, 4000) * 1.2 + 0.2).astype(np.float32))
        used = np.flatnonzero(h.counts)
        values, weight = h.centres[used], h.counts[used].astype(np.float64)
        assert observers._squared_error(values, weight, found, activations) == pytest.approx(
            squared(h, found, activations)
        )
        by_hand = divergence(h, found, activations)
        assert by_hand > 1e-4
        assert observers._kl_divergence(values, weight, found, activations) == pytest.approx(by_hand, rel=1e-9)

    def test_a_range_without_any_value_is_the_worst(self) -> None:
        values, weight = np.array([3.0, 4.0]), np.array([1.0, 2.0])
        assert observers._kl_divergence(values, weight, Range(-1.0, 1.0, "x"), "int8") == np.inf

    def test_a_divergence_by_hand(self) -> None:
        """Steps of 1: bins at .9, 1.1 (level 1) and 2 (level 2); 5, which is clipped, counts at 2."""
        values, weight = np.array([0.9, 1.1, 2.0, 500.0]), np.array([3.0, 1.0, 4.0, 2.0])
        p, q = np.array([3, 1, 6]) / 10, np.array([2, 2, 4]) / 8
        found = observers._kl_divergence(values, weight, Range(-127.0, 127.0, "x"), "int8")
        assert found == pytest.approx(float((p * np.log(p / q)).sum()))
