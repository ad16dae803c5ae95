"""Range observers: streaming histograms, and min-max, percentile, MSE and entropy ranges of them.

A histogram has a fixed number of bins: when a value falls outside, neighbouring bins are merged in pairs. The bin width
is a power of two, so the counts do not depend on the order of the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from edgetube.calibration.table import INTEGERS, ActivationScheme, Range
from edgetube.errors import InputError

Array = npt.NDArray[np.float32]

BINS = 8192
"""Bins of a histogram; half of them for negative values."""

PERCENTILES = (99.9, 99.99, 99.999)
RANGE_RATIOS = np.geomspace(1.0, 0.02, 96)
"""Shares of the largest magnitude at which the MSE and entropy searches clip."""


class Histogram:
    """Histogram of the values of a tensor so far, with their exact minimum and maximum.

    Attributes:
        low, high: extremes seen, 0 included.
        width: of a bin; bin i covers [(i - BINS / 2) width, (i + 1 - BINS / 2) width).
        counts: (BINS,) int64.
    """

    def __init__(self) -> None:
        self.low = self.high = 0.0
        self.width = 2.0**-24
        self.counts = np.zeros(BINS, np.int64)

    @classmethod
    def of(cls, values: Array) -> Self:
        """That of an array; see `add`."""
        made = cls()
        made.add(values)
        return made

    def add(self, values: Array) -> None:
        """Count the values of an array of any shape.

        Raises:
            InputError: a value is NaN or infinite.
        """
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError("the model gives NaN or infinite activations on these clips; check weights and clips")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._grow(max(-low, high))
        scaled = np.multiply(values.reshape(-1), np.float32(1 / self.width), dtype=np.float32)
        index = np.floor(scaled, out=scaled).astype(np.int32)
        index += BINS // 2
        np.clip(index, 0, BINS - 1, out=index)
        self.counts += np.bincount(index, minlength=BINS)

    def merge(self, other: Histogram) -> None:
        """Count the values of another histogram, whose bins are widened to those of this one, or these to its."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self._widen(other.width)
        other._widen(self.width)
        self.counts += other.counts

    def _grow(self, largest: float) -> None:
        width = self.width
        while largest > width * (BINS // 2):
            width *= 2
        self._widen(width)

    def _widen(self, width: float) -> None:
        if not self.counts.any():
            self.width = max(self.width, width)
        while self.width < width:
            half = BINS // 2
            merged = self.counts.reshape(half, 2).sum(axis=1)
            self.counts[:] = 0
            self.counts[half // 2 : half // 2 + half] = merged
            self.width *= 2

    @property
    def centres(self) -> npt.NDArray[np.float64]:
        """Middle of every bin (BINS,)."""
        return np.asarray((np.arange(BINS) - BINS // 2 + 0.5) * self.width, np.float64)

    def quantile(self, share: float) -> float:
        """Upper edge of the bin that holds the quantile `share`."""
        total = np.cumsum(self.counts)
        index = int(np.searchsorted(total, share * total[-1]))
        return float((min(index, BINS - 1) + 1 - BINS // 2) * self.width)


def candidates(seen: Histogram, activations: ActivationScheme) -> Iterator[Range]:
    """The range of every observer, min-max first."""
    yield Range(seen.low, seen.high, "min-max")
    for percent in PERCENTILES:
        tail = (1 - percent / 100) / 2
        low, high = seen.quantile(tail) - seen.width, seen.quantile(1 - tail)
        yield Range(min(0.0, max(low, seen.low)), max(0.0, min(high, seen.high)), f"percentile {percent}")
    yield least_squares(seen, activations)
    yield _search(seen, activations, "entropy")


def least_squares(seen: Histogram, activations: ActivationScheme) -> Range:
    """The clipped range with the least expected squared error."""
    return _search(seen, activations, "mse")


def _search(seen: Histogram, activations: ActivationScheme, method: str) -> Range:
    """The clipped range with the least expected squared error, or the least divergence of the histogram."""
    centres, counts = seen.centres, seen.counts
    used = np.flatnonzero(counts)
    values, weight = centres[used], counts[used].astype(np.float64)
    best, least = Range(seen.low, seen.high, method), np.inf
    cost_of = _kl_divergence if method == "entropy" else _squared_error
    for share in RANGE_RATIOS:
        limit = float(share) * max(-seen.low, seen.high)
        found = Range(max(seen.low, -limit), min(seen.high, limit), method)
        cost = cost_of(values, weight, found, activations)
        if cost < least:
            best, least = found, cost
    return best


def _levels(values: npt.NDArray[np.float64], found: Range, activations: ActivationScheme) -> npt.NDArray[np.float64]:
    """The saturated integer of every value, as float64."""
    (scale, zero), (low, high) = found.parameters(activations), INTEGERS[activations]
    return np.clip(np.rint(values / scale), low - zero, high - zero)


def _squared_error(
    values: npt.NDArray[np.float64], weight: npt.NDArray[np.float64], found: Range, activations: ActivationScheme
) -> float:
    scale, _ = found.parameters(activations)
    error = _levels(values, found, activations) * scale - values
    return float(weight @ (error * error))


def _kl_divergence(
    values: npt.NDArray[np.float64], weight: npt.NDArray[np.float64], found: Range, activations: ActivationScheme
) -> float:
    """KL(P || Q) of TensorRT's entropy calibration.

    P is the histogram within the range, with the clipped values counted at its ends. Q is the histogram without them,
    with each integer's mass spread evenly over its bins. Empty bins are in neither.
    """
    inside = (values >= found.low) & (values <= found.high)
    if not inside.any():
        return np.inf
    kept = weight[inside]
    p = kept.copy()
    p[0] += weight[values < found.low].sum()
    p[-1] += weight[values > found.high].sum()
    levels = _levels(values[inside], found, activations)
    _, level, bins = np.unique(levels, return_inverse=True, return_counts=True)
    q = (np.bincount(level, kept) / bins)[level]
    p, q = p / p.sum(), q / q.sum()
    return float(p @ np.log(p / q))
