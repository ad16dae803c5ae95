"""Quantisation in numpy: fake quantisation, GPTQ rounding, weight scales, output errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetube.calibration.table import INT8_MAX, INTEGERS, ActivationScheme, Range, ScaleType, stored_scales

Array = npt.NDArray[np.float32]

CLIP_RATIOS = np.linspace(1.0, 0.5, 21)
"""Shares of a channel's largest weight at which the MSE search of scales clips."""

DAMPING, BLOCK_SIZE = 0.01, 128
"""Of GPTQ: damping, relative to the mean of the Gram matrix's diagonal; rows per lazy update of the others."""

PIXEL_CORRELATION, COLOUR_CORRELATION = 0.97, 0.95
"""Assumed correlations of neighbouring pixels, and of the colours of one pixel, in photographs."""


@dataclass(frozen=True)
class Moments:
    """Moments of a linear's input rows: mean (K,), and second moments (K, K) about zero."""

    mean: Array
    second: Array


def fake_quantize_activations(x: Array, found: Range, activations: ActivationScheme) -> Array:
    """`x` after QuantizeLinear and DequantizeLinear: round half to even, saturate."""
    (scale, zero), (low, high) = found.parameters(activations), INTEGERS[activations]
    q = np.multiply(x, np.float32(1 / scale), dtype=np.float32)
    np.rint(q, out=q)
    np.clip(q, low - zero, high - zero, out=q)
    q *= np.float32(scale)
    return np.asarray(q, np.float32)


MAX_PAIR_SUM = 128
"""Under `safe_pairs`: largest sum of magnitudes of two weights of one sign, of input channels 2i and 2i + 1.

x86 without VNNI adds the products of such a pair with two uint8 in 16 bits (`pmaddubsw`): 128 * 255 = 32640 fits.
"""


@dataclass(frozen=True)
class Bounds:
    """The smallest and largest integer of each weight (K, N), or of each weight of a row (N,)."""

    low: Array
    high: Array

    def __getitem__(self, row: int) -> Bounds:
        return Bounds(self.low[row], self.high[row])


def bounds(steps: npt.NDArray[np.floating[Any]], safe_pairs: bool) -> Bounds:
    """Bounds of int8 for weights (K, N) in steps of their scales, +-`INT8_MAX`.

    Under `safe_pairs` the upper bounds of a pair of weights sum to at most `MAX_PAIR_SUM`, and so do the magnitudes of
    its lower bounds. An excess is taken from both weights equally, and a rest is given to both, up to rounding.
    """
    if not safe_pairs:
        return Bounds(np.full_like(steps, -INT8_MAX, np.float32), np.full_like(steps, INT8_MAX, np.float32))
    even, odd = steps[::2], np.zeros_like(steps[::2])
    odd[: len(steps) // 2] = steps[1::2]
    most = np.clip(np.rint((MAX_PAIR_SUM + even - odd) / 2), MAX_PAIR_SUM - INT8_MAX, INT8_MAX).astype(np.float32)
    high = np.stack([most, MAX_PAIR_SUM - most], axis=1).reshape(-1, *steps.shape[1:])[: len(steps)]
    return Bounds(high - MAX_PAIR_SUM, high)


def quantize_weights(
    weight: npt.NDArray[np.floating[Any]], scales: Array, within: Bounds | None = None
) -> npt.NDArray[np.int8]:
    """Symmetric int8 of `weight` (K, N) with a scale per column (N,), the nearest integers within their bounds.

    Any other scales that broadcast with the weight are allowed.
    """
    low, high = (within.low, within.high) if within else (-INT8_MAX, INT8_MAX)
    return np.asarray(np.clip(np.rint(weight / scales), low, high), np.int8)


def fake_quantize_weights(weight: Array, scales: Array, safe_pairs: bool = False) -> Array:
    """`weight` (K, N) quantised to int8 and dequantised."""
    within = bounds(weight / scales, safe_pairs) if safe_pairs else None
    return np.asarray(quantize_weights(weight, scales, within) * scales, np.float32)


def gptq_quantize(
    weight: Array, scales: Array, gram: npt.NDArray[np.floating[Any]], safe_pairs: bool = False
) -> npt.NDArray[np.int8]:
    """Symmetric int8 of `weight` (K, N) with a scale per column (N,), rounded by GPTQ: see `gptq_targets`.

    Args:
        gram: see `gptq_targets`.
        safe_pairs: limit the sums of neighbouring weights to `MAX_PAIR_SUM`, so that 16-bit sums do not overflow.
    """
    within = bounds(weight / scales, safe_pairs)

    def stored(channel: int, row: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
        return quantize_weights(row, scales, within[channel]) * scales

    return quantize_weights(gptq_targets(weight, gram, stored), scales, within)


def overflowing_pairs(integers: npt.NDArray[np.integer[Any]]) -> int:
    """Number of pairs of neighbouring weights (K, N) whose sum of two products may overflow 16 bits."""
    wide = np.zeros((len(integers) + len(integers) % 2, *integers.shape[1:]), np.int32)
    wide[: len(integers)] = integers
    pairs = wide.reshape(-1, 2, *integers.shape[1:])
    sums = np.maximum(np.maximum(pairs, 0).sum(axis=1), np.maximum(-pairs, 0).sum(axis=1))
    return int((sums > MAX_PAIR_SUM).sum())


def gptq_targets(
    weight: Array,
    gram: npt.NDArray[np.floating[Any]],
    stored: Callable[[int, npt.NDArray[np.float64]], npt.NDArray[Any]],
) -> npt.NDArray[np.float64]:
    """The values to round to nearest instead of `weight` (K, N), so that the error of the output is small: GPTQ.

    Rows are rounded one after the other, the largest input channels first; the remaining rows compensate each error.
    This is GPTQ (Frantar et al., 2022) as Babai's nearest plane algorithm (Chen et al., 2025): with gram = U' U and U
    upper triangular, the error E of the weight is U E at the output, and its rows are minimised from the last to the
    first; no matrix is inverted.

    Args:
        gram: Gram matrix of the input channels (K, K), up to a factor; see `GramAccumulator`, `pixel_moments`.
        stored: (input channel, its row (N,)) -> the row after rounding.
    """
    power = gram.diagonal().mean()
    if power == 0:
        return weight.astype(np.float64)
    order = np.argsort(-gram.diagonal(), kind="stable")[::-1]
    exact, size = weight[order].astype(np.float64), len(weight)
    factor = np.linalg.cholesky(gram[np.ix_(order, order)] + DAMPING * power * np.eye(size)).T
    factor /= factor.diagonal()[:, None]
    errors, found = np.empty_like(exact), np.empty_like(exact)
    for end in range(size, 0, -BLOCK_SIZE):
        start = max(end - BLOCK_SIZE, 0)
        moved = exact[start:end] + factor[start:end, end:] @ errors[end:]
        for i in reversed(range(start, end)):
            found[order[i]] = row = moved[i - start] + factor[i, i + 1 : end] @ errors[i + 1 : end]
            errors[i] = exact[i] - stored(int(order[i]), row)
    return found


@dataclass(frozen=True)
class Gram:
    """The Gram matrix (K, K) float32 of some rows (R, K), the sums of their channels (K,) float64, and R."""

    product: Array
    sums: npt.NDArray[np.float64]
    rows: int

    @classmethod
    def of(cls, rows: Array, sums: npt.NDArray[np.float64] | None = None) -> Gram:
        """That of rows (R, K); `sums` where they are known."""
        return cls(rows.T @ rows, rows.sum(axis=0, dtype=np.float64) if sums is None else sums, len(rows))


class GramAccumulator:
    """Accumulates the Gram matrix and the sums of an activation's rows (R, K).

    Attributes:
        total: the Gram matrix (K, K) float64; each piece is multiplied in float32.
        sums: of each channel (K,).
        rows: how many were added.
    """

    def __init__(self, size: int) -> None:
        self.total: npt.NDArray[np.float64] = np.zeros((size, size), np.float64)
        self.sums: npt.NDArray[np.float64] = np.zeros(size, np.float64)
        self.rows = 0

    def add(self, rows: Array) -> None:
        """Add rows (R, K)."""
        self.take(Gram.of(rows))

    def take(self, part: Gram) -> None:
        """Add what is known of further rows."""
        self.total += part.product
        self.sums += part.sums
        self.rows += part.rows

    @property
    def power(self) -> Array:
        """Mean square of each channel (K,)."""
        return np.asarray(self.total.diagonal() / self.rows, np.float32)

    @property
    def moments(self) -> Moments:
        """Mean and second moments of the rows."""
        return Moments(np.float32(self.sums / self.rows), np.float32(self.total / self.rows))


def pixel_moments(frames: int, height: int, width: int, colours: int = 3) -> npt.NDArray[np.float64]:
    """Prior second moments of the pixels under a kernel, without any clip: (K, K), K = T * C * H * W.

    Neighbours in time, height and width correlate by `PIXEL_CORRELATION` to the power of their distance, as in the
    Markov model of images (Jain, Fundamentals of Digital Image Processing, 1989), colours by `COLOUR_CORRELATION`, and
    the mean equals the standard deviation.
    """

    def markov(size: int) -> npt.NDArray[np.float64]:
        return np.power(
            PIXEL_CORRELATION, np.abs(np.subtract.outer(np.arange(size), np.arange(size))), dtype=np.float64
        )

    mixed = np.where(np.eye(colours, dtype=bool), 1.0, COLOUR_CORRELATION)
    return 1 + np.kron(np.kron(markov(frames), mixed), np.kron(markov(height), markov(width)))


def absmax_scales(weight: Array, safe_pairs: bool = False, dtype: ScaleType = "float32") -> Array:
    """Scales (N,), numbers of `dtype`, by the largest magnitude of each column: nothing is clipped."""
    largest = np.abs(weight).max(axis=0) / np.float32(INT8_MAX)
    if safe_pairs:
        largest = np.maximum(largest, _max_pair_sums(weight) / np.float32(MAX_PAIR_SUM))
    return stored_scales(largest, dtype, "a weight")


def _max_pair_sums(weight: Array) -> Array:
    """For each column (N,), the largest sum of magnitudes of two neighbouring weights (K, N) of one sign."""
    even = len(weight) // 2 * 2
    signs = (np.maximum(sign * weight[:even], 0) for sign in (np.float32(1), np.float32(-1)))
    found: Array = np.max([(part[::2] + part[1::2]).max(axis=0, initial=0) for part in signs], axis=0)
    return found


def mse_scales(weight: Array, power: Array, safe_pairs: bool = False) -> Array:
    """Scales (N,) with the smallest expected squared error at the output, clipping included.

    Args:
        weight: (K, N).
        power: mean square of each input channel (K,), the weight of its errors.
        safe_pairs: see `gptq_quantize`.
    """
    full = absmax_scales(weight, safe_pairs)
    best, least = full.copy(), np.full(len(full), np.inf, np.float32)
    weights = power.astype(np.float32) + np.float32(1e-6) * np.float32(power.max(initial=0))
    for share in CLIP_RATIOS:
        scales = (full * np.float32(share)).astype(np.float32)
        error = fake_quantize_weights(weight, scales, safe_pairs) - weight
        np.square(error, out=error)
        cost = weights @ error
        better = cost < least
        best[better], least[better] = scales[better], cost[better]
    return np.asarray(best, np.float32)


def output_error(exact: Array, fake_x: Array, fake_weight: Array) -> float:
    """Energy of the error of fake_x (R, K) @ fake_weight (K, N) against `exact` (R, N), relative to that of `exact`."""
    noise = fake_x @ fake_weight
    noise -= exact
    return float(np.vdot(noise, noise)) / max(float(np.vdot(exact, exact)), 1e-30)
