"""The arithmetic of quantisation in numpy: what integers do to activations and weights, and how much it costs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgetube.calibration.table import LEVELS, Activations, Range

Array = npt.NDArray[np.float32]

CLIPS = np.linspace(1.0, 0.5, 21)
"""Shares of a channel's largest weight at which the MSE search clips."""

DAMPING, BLOCK = 0.01, 128
"""Share of the channels' mean power that is added to each, as in GPTQ; rows whose errors are passed on at once."""

NEAR, COLOURS = 0.97, 0.95
"""Correlations of neighbouring pixels and of one pixel's colours in photographs and videos of them."""


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


def quantise_weights(weight: Array, scales: Array) -> npt.NDArray[np.int8]:
    """Symmetric int8 of `weight` (K, N) with a scale per column (N,)."""
    return np.asarray(np.clip(np.rint(weight / scales), -LEVELS, LEVELS), np.int8)


def fake_weights(weight: Array, scales: Array) -> Array:
    """`weight` (K, N) as its int8 form gives it back."""
    return np.asarray(np.clip(np.rint(weight / scales), -LEVELS, LEVELS) * scales, np.float32)


def rounded_weights(weight: Array, scales: Array, moments: npt.NDArray[np.float64]) -> npt.NDArray[np.int8]:
    """Symmetric int8 of `weight` (K, N) whose rounding errors cancel at the output, for what the linear really reads.

    GPTQ (Frantar et al., 2022): row after row is rounded, the largest input channels first, and the rows that are left
    take up its error as the second moments of the channels allow.

    Args:
        scales: per column (N,).
        moments: second moments of the input channels (K, K), up to a factor; see `second_moments`, `pixel_moments`.
    """
    power = moments.diagonal().mean()
    if power == 0:
        return quantise_weights(weight, scales)
    moments = moments + DAMPING * power * np.eye(len(weight))
    order = np.argsort(-moments.diagonal(), kind="stable")
    left = weight[order].astype(np.float64)
    factor = np.linalg.cholesky(np.linalg.inv(moments[np.ix_(order, order)])).T
    rounded = np.empty(weight.shape, np.int8)
    for start in range(0, len(weight), BLOCK):
        end = min(start + BLOCK, len(weight))
        errors = np.empty((end - start, weight.shape[1]))
        for i in range(start, end):
            rounded[order[i]] = integers = quantise_weights(left[i], scales)
            errors[i - start] = (left[i] - integers * scales) / factor[i, i]
            left[i + 1 : end] -= np.outer(factor[i, i + 1 : end], errors[i - start])
        left[end:] -= factor[start:end, end:].T @ errors
    return rounded


def second_moments(rows: Array) -> npt.NDArray[np.float64]:
    """Of the channels of sampled activations (R, K): (K, K)."""
    moments: npt.NDArray[np.float64] = rows.T.astype(np.float64) @ rows
    return moments


def pixel_moments(frames: int, height: int, width: int, colours: int = 3) -> npt.NDArray[np.float64]:
    """What `second_moments` of the pixels under a kernel are like before any clip was seen: (K, K), K = T * C * H * W.

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
    largest = np.abs(weight).max(axis=0) / np.float32(LEVELS)
    return np.asarray(np.where(largest > np.finfo(np.float32).tiny, largest, 1), np.float32)


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
