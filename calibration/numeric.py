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


def quantise_weights(weight: npt.NDArray[np.floating[Any]], scales: Array) -> npt.NDArray[np.int8]:
    """Symmetric int8 of `weight` (K, N) with a scale per column (N,)."""
    return np.asarray(np.clip(np.rint(weight / scales), -LEVELS, LEVELS), np.int8)


def fake_weights(weight: Array, scales: Array) -> Array:
    """`weight` (K, N) as its int8 form gives it back."""
    return np.asarray(np.clip(np.rint(weight / scales), -LEVELS, LEVELS) * scales, np.float32)


def rounded_weights(weight: Array, scales: Array, moments: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.int8]:
    """Symmetric int8 of `weight` (K, N) with a scale per column (N,), by `compensated`: errors cancel at the output."""
    return quantise_weights(compensated(weight, moments, lambda row: quantise_weights(row, scales) * scales), scales)


def compensated(
    weight: Array, moments: npt.NDArray[np.floating[Any]], stored: Callable[[npt.NDArray[np.float64]], npt.NDArray[Any]]
) -> npt.NDArray[np.float64]:
    """What is to be rounded instead of `weight` (K, N), so that rounding errors cancel for what the linear reads.

    Row after row is rounded, the largest input channels first, and those that are left take up its error. This is GPTQ
    (Frantar et al., 2022) as Babai's nearest plane (Chen et al., 2025): with moments = U' U and U upper triangular, the
    error E at the output is U E, and its rows are made small from the last to the first; nothing is inverted.

    Args:
        moments: second moments of the input channels (K, K), up to a factor; see `GramMatrix`, `pixel_moments`.
        stored: what a row (N,) is after rounding.
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
            errors[i] = exact[i] - stored(row)
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


def full_scales(weight: Array) -> Array:
    """Scales (N,) that clip nothing."""
    return stored_scales(np.abs(weight).max(axis=0) / np.float32(LEVELS), "float32", "a weight")


def mse_scales(weight: Array, power: Array) -> Array:
    """Scales (N,) whose clipping makes the smallest error at the output.

    Args:
        weight: (K, N).
        power: mean square of each input channel (K,), the weight of its errors.
    """
    full = full_scales(weight)
    best, least = full.copy(), np.full(len(full), np.inf, np.float32)
    weights = power.astype(np.float32) + np.float32(1e-6) * np.float32(power.max(initial=0))
    for share in CLIPS:
        scales = (full * np.float32(share)).astype(np.float32)
        error = fake_weights(weight, scales) - weight
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
