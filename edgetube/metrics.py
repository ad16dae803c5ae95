"""Metrics of logits in plain numpy: the one definition for every table, gate and report."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]


def softmax(logits: Array) -> npt.NDArray[np.float64]:
    """Softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    exp = np.exp(shifted)
    return np.asarray(exp / exp.sum(axis=-1, keepdims=True), np.float64)


def sigmoid(logits: Array) -> npt.NDArray[np.float64]:
    """1 / (1 + exp(-x)) of each logit, in float64; large ones do not overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64))), np.float64)


def view_mean(logits: Array) -> npt.NDArray[np.float32]:
    """Logits (N, classes) whose softmax is the mean, over the views, of the softmax of logits (N, views, classes).

    They are ln(mean softmax) less its mean over the classes, because a softmax fixes logits up to a constant. A clip
    with a logit that is not finite gets NaN.
    """
    finite = np.asarray(np.isfinite(logits).all(axis=(1, 2), keepdims=True))
    wide = np.where(finite, logits, 0).astype(np.float64)
    shifted = wide - wide.max(axis=2, keepdims=True)
    log = shifted - np.log(np.exp(shifted).sum(axis=2, keepdims=True))
    largest = log.max(axis=1, keepdims=True)
    mean = (largest + np.log(np.exp(log - largest).mean(axis=1, keepdims=True)))[:, 0]
    centred = mean - mean.mean(axis=1, keepdims=True)
    return np.asarray(np.where(finite[:, 0], centred, np.nan), np.float32)


def ranks(logits: Array, labels: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Place (N,) of each row's label (N,) among its logits (N, classes), 0 the largest; equal ones in their order."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    return np.asarray(((logits > own) | ((logits == own) & earlier)).sum(axis=1), np.int64)


def top_k(logits: Array, labels: npt.NDArray[np.integer], k: int = 1) -> float:
    """Share of rows (N, classes) whose label (N,) is among the k largest logits."""
    return float((ranks(logits, labels) < k).mean())


def margins(logits: Array) -> Array:
    """Largest minus second largest logit (N,) of each row (N, classes); infinite for a single class."""
    if logits.shape[1] == 1:
        return np.full(len(logits), np.inf)
    best = np.partition(logits, -2, axis=1)
    return np.asarray(best[:, -1] - best[:, -2])


def agreement(a: Array, b: Array) -> float:
    """Share of rows with the same most probable class."""
    return float((a.argmax(axis=-1) == b.argmax(axis=-1)).mean())


def kl(reference: Array, logits: Array) -> float:
    """Mean Kullback-Leibler divergence KL(softmax(reference) || softmax(logits)) over the rows, in nats."""
    return float(kl_rows(reference, logits).mean())


def kl_rows(reference: Array, logits: Array) -> npt.NDArray[np.float64]:
    """KL(softmax(reference) || softmax(logits)) of each row (N, classes), in nats: (N,)."""
    p, q = softmax(reference), softmax(logits)
    tiny = np.finfo(np.float64).tiny
    return np.asarray((p * (np.log(p + tiny) - np.log(q + tiny))).sum(axis=-1), np.float64)


def cosine(a: Array, b: Array) -> float:
    """Smallest cosine between two rows of the same number; 1 where both rows are zero."""
    return float(cosine_rows(a, b).min())


def cosine_rows(a: Array, b: Array) -> npt.NDArray[np.float64]:
    """Cosine between two rows of the same number; 1 where they are equal: (N,)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    dots = (a * b).sum(axis=-1)
    same = (a == b).all(axis=-1)
    return np.asarray(np.where(same, 1.0, dots / np.maximum(norms, np.finfo(np.float64).tiny)), np.float64)


def max_abs_error(a: Array, b: Array) -> float:
    """Largest absolute difference of two arrays of one shape."""
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())


def moves_alike(reference: Array, value: Array) -> float | None:
    """How similarly two models react to a change of their input: 1 - sum (ref - value)^2 / (2 sum ref^2).

    Both are differences of logits (N, classes). The result is 1 where they are equal, their cosine where they have
    equal norms, and less elsewhere.

    Returns:
        None where the reference does not change: there is nothing to compare with.
    """
    signal, noise = energies(reference, value)
    return None if signal == 0 else 1 - noise / (2 * signal)


def sqnr(reference: Array, value: Array) -> float:
    """Signal to quantisation noise ratio 10 log10(sum ref^2 / sum (ref - value)^2), dB; inf when equal."""
    return decibels(*energies(reference, value))


def energies(reference: Array, value: Array) -> tuple[float, float]:
    """(sum ref^2, sum (ref - value)^2) in float64; both add up over the parts of a tensor."""
    ref = reference.astype(np.float64)
    return float((ref**2).sum()), float(((ref - value.astype(np.float64)) ** 2).sum())


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise); inf without noise; -inf without a signal, or where one of the two is not finite."""
    if noise == 0 and math.isfinite(signal):
        return float("inf")
    known = signal and math.isfinite(signal) and math.isfinite(noise)
    return float(10 * np.log10(signal / noise)) if known else float("-inf")


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a share seen on `count` trials (95 % by default); (Wilson, JASA 1927)."""
    if count == 0:
        return 0.0, 1.0
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))  # rounding leaves it outside at 0
