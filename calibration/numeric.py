"""The arithmetic of quantisation in numpy: what integers do to activations and weights, and how much it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetube.calibration.table import LEVELS, Activations, Range, stored_scales

Array = npt.NDArray[np.float32]

CLIPS = np.linspace(1.0, 0.5, 21)
"""Shares of a channel's largest weight at which the MSE search clips."""

DAMPING, BLOCK = 0.01, 128
"""Share of the channels' mean power that is added to each, as in GPTQ; rows whose errors are passed on at once."""

NEAR, COLOURS = 0.97, 0.95
"""Correlations of neighbouring pixels and of one pixel's colours in photographs and videos of them."""


@dataclass(frozen=True)
class Moments:
    """What the rows that a linear reads are like: their mean (K,), and their second moments (K, K) about zero."""

    mean: Array
    second: Array


def fake_activations(x: Array, found: Range, activations: Activations) -> Array:
    """`x` after QuantizeLinear and DequantizeLinear: round half to even, saturate."""
    if activations == "int8":
        scale, zero, low, high = found.symmetric, 0, -128, 127
    else:
        (scale, zero), low, high = found.asymmetric, 0, 255
    q = np.multiply(x, np.float32(1 / scale), dtype=np.float32)
    np.rint(q, out=q)
    np.clip(q, low - zero, high - zero, out=q)
    q *= np.float32(scale)
    return np.asarray(q, np.float32)


PAIR = 128
"""Largest sum of the magnitudes of a pair of weights, input channels 2i and 2i + 1, that have one sign: `safe_pairs`.

x86 without VNNI adds the products of such a pair with two uint8 in 16 bits (`pmaddubsw`): 128 * 255 = 32640 fits.
"""


@dataclass(frozen=True)
class Bounds:
    """The least and the largest integer that each weight (K, N), or each of a row (N,), may become."""

    low: Array
    high: Array

    def __getitem__(self, row: int) -> Bounds:
        return Bounds(self.low[row], self.high[row])


def bounds(steps: npt.NDArray[np.floating[Any]], safe_pairs: bool) -> Bounds:
    """Bounds of int8 for weights (K, N) in steps of their scales, +-`LEVELS`.

    Under `safe_pairs` both weights of a pair may take their bounds of one sign and sum to no more than `PAIR`. What is
    too much is taken from both alike, and what is left is given to both, as far as whole numbers allow.
    """
    if not safe_pairs:
        return Bounds(np.full_like(steps, -LEVELS, np.float32), np.full_like(steps, LEVELS, np.float32))
    even, odd = steps[::2], np.zeros_like(steps[::2])
    odd[: len(steps) // 2] = steps[1::2]
    most = np.clip(np.rint((PAIR + even - odd) / 2), PAIR - LEVELS, LEVELS).astype(np.float32)
    high = np.stack([most, PAIR - most], axis=1).reshape(-1, *steps.shape[1:])[: len(steps)]
    return Bounds(high - PAIR, high)


def quantise_weights(
    weight: npt.NDArray[np.floating[Any]], scales: Array, within: Bounds | None = None
) -> npt.NDArray[np.int8]:
    """Symmetric int8 of `weight` (K, N) with a scale per column (N,), the nearest integers within their bounds."""
    low, high = (within.low, within.high) if within else (-LEVELS, LEVELS)
    return np.asarray(np.clip(np.rint(weight / scales), low, high), np.int8)


def fake_weights(weight: Array, scales: Array, safe_pairs: bool = False) -> Array:
    """`weight` (K, N) as its int8 form gives it back."""
    within = bounds(weight / scales, safe_pairs) if safe_pairs else None
    return np.asarray(quantise_weights(weight, scales, within) * scales, np.float32)


def rounded_weights(
    weight: Array, scales: Array, moments: npt.NDArray[np.floating[Any]], safe_pairs: bool = False
) -> npt.NDArray[np.int8]:
    """Symmetric int8 of `weight` (K, N) with a scale per column (N,), by `compensated`: errors cancel at the output.

    Args:
        safe_pairs: the sums of neighbouring weights are kept within `PAIR`, so that no processor's sums overflow.
    """
    within = bounds(weight / scales, safe_pairs)

    def stored(channel: int, row: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
        return quantise_weights(row, scales, within[channel]) * scales

    return quantise_weights(compensated(weight, moments, stored), scales, within)


def overflowing_pairs(integers: npt.NDArray[np.integer[Any]]) -> int:
    """How many pairs of neighbouring weights (K, N) make sums of two products that 16 bits do not hold."""
    wide = np.zeros((len(integers) + len(integers) % 2, *integers.shape[1:]), np.int32)
    wide[: len(integers)] = integers
    pairs = wide.reshape(-1, 2, *integers.shape[1:])
    sums = np.maximum(np.maximum(pairs, 0).sum(axis=1), np.maximum(-pairs, 0).sum(axis=1))
    return int((sums > PAIR).sum())


def compensated(
    weight: Array,
    moments: npt.NDArray[np.floating[Any]],
    stored: Callable[[int, npt.NDArray[np.float64]], npt.NDArray[Any]],
) -> npt.NDArray[np.float64]:
    """What is to be rounded instead of `weight` (K, N), so that rounding errors cancel for what the linear reads.

    Row after row is rounded, the largest input channels first, and those that are left take up its error. This is GPTQ
    (Frantar et al., 2022) as Babai's nearest plane (Chen et al., 2025): with moments = U' U and U upper triangular, the
    error E at the output is U E, and its rows are made small from the last to the first; nothing is inverted.

    Args:
        moments: second moments of the input channels (K, K), up to a factor; see `GramMatrix`, `pixel_moments`.
        stored: what the row (N,) of an input channel is after rounding.
    """
    power = moments.diagonal().mean()
    if power == 0:
        return weight.astype(np.float64)
    order = np.argsort(-moments.diagonal(), kind="stable")[::-1]
    exact, size = weight[order].astype(np.float64), len(weight)
    factor = np.linalg.cholesky(moments[np.ix_(order, order)] + DAMPING * power * np.eye(size)).T
    factor /= factor.diagonal()[:, None]
    errors, found = np.empty_like(exact), np.empty_like(exact)
    for end in range(size, 0, -BLOCK):
        start = max(end - BLOCK, 0)
        moved = exact[start:end] + factor[start:end, end:] @ errors[end:]
        for i in reversed(range(start, end)):
            found[order[i]] = row = moved[i - start] + factor[i, i + 1 : end] @ errors[i + 1 : end]
            errors[i] = exact[i] - stored(int(order[i]), row)
    return found


def second_moments(rows: Array) -> npt.NDArray[np.float64]:
    """The sum over the rows (R, K) of each row times itself: (K, K), multiplied in the type of the rows."""
    return np.asarray(rows.T @ rows, np.float64)


class GramMatrix:
    """`second_moments` of all rows (R, K) of an activation, which are shown piece by piece.

    Attributes:
        total: (K, K) float64; a piece is multiplied in float32.
        sums: of each channel (K,).
        rows: how many rows were shown.
    """

    def __init__(self, size: int) -> None:
        self.total: npt.NDArray[np.float64] = np.zeros((size, size), np.float64)
        self.sums: npt.NDArray[np.float64] = np.zeros(size, np.float64)
        self.rows = 0

    def add(self, rows: Array) -> None:
        """Take in more rows (R, K)."""
        self.total += second_moments(rows)
        self.sums += rows.sum(axis=0, dtype=np.float64)
        self.rows += len(rows)

    @property
    def power(self) -> Array:
        """Mean square of each channel (K,)."""
        return np.asarray(self.total.diagonal() / self.rows, np.float32)

    @property
    def moments(self) -> Moments:
        """Mean and second moments of the rows that were shown."""
        return Moments(np.float32(self.sums / self.rows), np.float32(self.total / self.rows))


def pixel_moments(frames: int, height: int, width: int, colours: int = 3) -> npt.NDArray[np.float64]:
    """What the moments of the pixels under a kernel are like before any clip was seen: (K, K), K = T * C * H * W.

    Neighbours in time, height and width correlate by `NEAR` to the power of their distance, as in the Markov model of
    images (Jain, Fundamentals of Digital Image Processing, 1989), colours by `COLOURS`, and the mean is as large as the
    deviation.
    """

    def markov(size: int) -> npt.NDArray[np.float64]:
        return np.power(NEAR, np.abs(np.subtract.outer(np.arange(size), np.arange(size))), dtype=np.float64)

    mixed = np.where(np.eye(colours, dtype=bool), 1.0, COLOURS)
    return 1 + np.kron(np.kron(markov(frames), mixed), np.kron(markov(height), markov(width)))


def full_scales(weight: Array, safe_pairs: bool = False) -> Array:
    """Scales (N,) that clip nothing."""
    largest = np.abs(weight).max(axis=0) / np.float32(LEVELS)
    if safe_pairs:
        largest = np.maximum(largest, _largest_pairs(weight) / np.float32(PAIR))
    return stored_scales(largest, "float32", "a weight")


def _largest_pairs(weight: Array) -> Array:
    """The largest sum of magnitudes of two neighbouring weights (K, N) of one sign, for each column (N,)."""
    even = len(weight) // 2 * 2
    signs = (np.maximum(sign * weight[:even], 0) for sign in (np.float32(1), np.float32(-1)))
    found: Array = np.max([(part[::2] + part[1::2]).max(axis=0, initial=0) for part in signs], axis=0)
    return found


def mse_scales(weight: Array, power: Array, safe_pairs: bool = False) -> Array:
    """Scales (N,) whose clipping makes the smallest error at the output.

    Args:
        weight: (K, N).
        power: mean square of each input channel (K,), the weight of its errors.
        safe_pairs: as in `rounded_weights`.
    """
    full = full_scales(weight, safe_pairs)
    best, least = full.copy(), np.full(len(full), np.inf, np.float32)
    weights = power.astype(np.float32) + np.float32(1e-6) * np.float32(power.max(initial=0))
    for share in CLIPS:
        scales = (full * np.float32(share)).astype(np.float32)
        error = fake_weights(weight, scales, safe_pairs) - weight
        np.square(error, out=error)
        cost = weights @ error
        better = cost < least
        best[better], least[better] = scales[better], cost[better]
    return np.asarray(best, np.float32)


def output_error(exact: Array, fake_x: Array, fake_weight: Array) -> float:
    """Energy of the error of fake_x (R, K) @ fake_weight (K, N) against `exact` (R, N), relative to the latter's."""
    noise = fake_x @ fake_weight
    noise -= exact
    return float(np.vdot(noise, noise)) / max(float(np.vdot(exact, exact)), 1e-30)
