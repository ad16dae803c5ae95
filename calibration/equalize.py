"""Moving the difficulty from activations into weights, where per-channel scales can take it.

A linear reads x; its producer can be changed to give (x - shift) / scale per channel, and the linear to
W' = scale * W, b' = b + shift W: the same function in floating point, but a tensor that one range fits better.
SmoothQuant (Xiao et al., 2022) is scale = max|x|^alpha / max|W|^(1 - alpha) without shift; RepQ-ViT (Li et al., 2022)
scales every channel to the same range and shifts it to its middle. Which one is used is measured, linear by linear.
Behind a GELU either is an operator of its own and has to be worth it (`behind_gelu`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgetube.calibration import observers
from edgetube.calibration.numeric import fake_activations, fake_weights, full_scales, output_error
from edgetube.calibration.observers import Histogram
from edgetube.calibration.table import LEVELS, Activations, Range, ScaleType

Array = npt.NDArray[np.float32]

ALPHAS = (0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85)
QUANTILES = (0.0, 1e-4, 1e-3)
"""Shares of the values that the ranges tried with every equalisation clip."""

QUANTILE_VALUES = 100_003
"""Values that those quantiles are read off, a prime so that no channel is left out."""

GAIN, HALF = 0.97, 0.5
"""An equalisation must bring the error below this share of the plain one's; one that costs an operator, below half."""


@dataclass(frozen=True)
class Channels:
    """Statistics of a tensor's channels over all clips and tokens, (K,) each."""

    low: Array
    high: Array

    @classmethod
    def of(cls, parts: Iterable[Channels]) -> Channels:
        """The channels of a tensor whose parts are known."""
        lows, highs = zip(*((part.low, part.high) for part in parts), strict=True)
        return cls(np.minimum.reduce(lows), np.maximum.reduce(highs))

    @property
    def largest(self) -> Array:
        """max|x| per channel."""
        return np.maximum(-self.low, self.high)


@dataclass(frozen=True)
class Equalisation:
    """x' = (x - shift) / scale, per channel.

    Attributes:
        name: "none", "smooth 0.5", "shift + smooth 0.5", "repq".
        scale, shift: (K,) float32.
        error: relative output error with everything quantised, on the sampled rows.
        range: the range that the shift was made for; None leaves it to the observers.
    """

    name: str
    scale: Array
    shift: Array
    error: float = np.inf
    range: Range | None = None

    @property
    def identity(self) -> bool:
        return self.name == "none"

    def apply(self, x: Array) -> Array:
        """The tensor that the linear reads afterwards."""
        return x if self.identity else ((x - self.shift) / self.scale).astype(np.float32)

    def weight(self, weight: Array) -> Array:
        """W' of weight (K, N)."""
        return weight if self.identity else (weight * self.scale[:, None]).astype(np.float32)

    def bias(self, weight: Array, bias: Array) -> Array:
        """b' of the original weight (K, N) and bias (N,)."""
        if self.identity:
            return bias
        return (bias + self.shift.astype(np.float64) @ weight.astype(np.float64)).astype(np.float32)


def candidates(seen: Channels, weight: Array, shifts: bool = True) -> Iterator[Equalisation]:
    """No equalisation, SmoothQuant at several alphas; with `shifts` also the same behind a shift, and RepQ."""
    zero, one = np.zeros_like(seen.low), np.ones_like(seen.low)
    yield Equalisation("none", one, zero)
    columns = np.maximum(np.abs(weight).max(axis=1), np.float32(1e-8))
    middle = ((seen.low + seen.high) / 2).astype(np.float32)
    half: Array = (seen.high - seen.low) / np.float32(2)
    ways = [("", zero, seen.largest), ("shift + ", middle, half)]
    for prefix, shift, largest in ways if shifts else ways[:1]:
        largest = np.maximum(largest, np.float32(1e-6))
        if shift is middle:
            yield Equalisation("shift", one, shift)
        for alpha in ALPHAS:
            yield Equalisation(f"{prefix}smooth {alpha}", _normal(largest**alpha / columns ** (1 - alpha)), shift)
        yield Equalisation("repq" if prefix else "smooth 1.0", _normal(largest), shift)


def _normal(scale: Array) -> Array:
    """A scale around 1, within what float32 and half precision bear."""
    scale = scale / np.exp(np.log(scale).mean())
    return np.clip(scale, 1e-3, 1e3).astype(np.float32)


@dataclass(frozen=True)
class Half:
    """What is known of a tensor from half of the clips: statistics of its channels, sampled rows (R, K)."""

    channels: Channels
    rows: Array


Halves = tuple[Half, Half]


def choose(halves: Halves, weight: Array, activations: Activations, scales: ScaleType = "float32") -> Equalisation:
    """The equalisation with the smallest output error of the linear `weight` (K, N).

    Each is made from one half of the clips and judged on the other: a shift that fits the clips that were seen, and no
    others, would look best on those.
    """
    plain, *others = _judged(halves, weight, activations, shifts=True)
    best = min(others, key=lambda option: option.error)
    return best if best.error < GAIN * plain.error else plain


def behind_gelu(halves: Halves, weight: Array, activations: Activations, scales: ScaleType = "float32") -> Equalisation:
    """For a tensor whose producer can take neither scale nor shift, so that each is one more operator.

    A scale for each channel has to halve the error. For int8, which has no zero point, half of the integers would be
    for negative values that GELU does not give: the best range with a zero point gives scale and centre =
    (zero point - 128) * scale. The integers are then those of uint8 less 128, and what was zero is still exact, where
    a constant error would be one of every token.

    Args:
        weight: (K, N) of the linear that reads the tensor.
        scales: the type that the target stores scales in.
    """
    plain, *scaled = _judged(halves, weight, "uint8", shifts=False)
    chosen = min(scaled, key=lambda option: option.error)
    if chosen.error < HALF * plain.error:
        gain = (1 / chosen.scale).astype(np.float16).astype(np.float32)  # half precision multiplies by just this
        chosen = replace(chosen, scale=np.float32(1) / gain)
    else:
        chosen = plain
    rows = np.concatenate([half.rows for half in halves])
    return _centred(chosen, rows, weight, scales) if activations == "int8" else chosen


def _judged(halves: Halves, weight: Array, activations: Activations, shifts: bool) -> list[Equalisation]:
    """All candidates for the whole tensor, with the errors that they have on the half that they were not made from."""
    errors = []
    for own, other in (halves, halves[::-1]):
        exact = other.rows @ weight
        options = candidates(own.channels, weight, shifts)
        errors.append([_error(option, own.rows, other.rows, weight, exact, activations) for option in options])
    whole = Channels.of(half.channels for half in halves)
    found = zip(candidates(whole, weight, shifts), np.mean(errors, axis=0), strict=True)
    return [replace(option, error=float(error)) for option, error in found]


def _centred(chosen: Equalisation, rows: Array, weight: Array, scales: ScaleType) -> Equalisation:
    """The same with a shift that is the zero point that int8 lacks, where that lowers the error."""
    x, w = chosen.apply(rows), chosen.weight(weight)
    exact, quantised = x @ w, fake_weights(w, full_scales(w))
    seen = Histogram()
    seen.add(x)

    def best(activations: Activations) -> tuple[float, Range]:
        found = [each.stored(activations, scales) for each in observers.candidates(seen, activations)]
        errors = [output_error(exact, fake_activations(x, r, activations), quantised) for r in found]
        return min(zip(errors, found, strict=True), key=lambda pair: pair[0])

    (plain, _), (error, found) = best("int8"), best("uint8")
    if error >= GAIN * plain:
        return chosen
    scale, zero = found.asymmetric
    middle = np.float32(np.float16((128 - zero) * scale))  # half precision subtracts just this
    name = "centre" if chosen.identity else f"{chosen.name} + centre"
    around = Range(-LEVELS * scale, LEVELS * scale, "zero point")
    return replace(chosen, name=name, shift=middle * chosen.scale, error=error, range=around)


def _error(
    option: Equalisation, known: Array, rows: Array, weight: Array, exact: Array, activations: Activations
) -> float:
    """Relative output error on `rows`, with the best of the ranges that the rows `known` have."""
    x, w = option.apply(rows), option.weight(weight)
    quantised = fake_weights(w, full_scales(w))
    without_shift = exact if option.identity else exact - option.shift @ weight
    energy = float(np.vdot(without_shift, without_shift)) / max(float(np.vdot(exact, exact)), 1e-30)
    ranges = (_clipped(option.apply(known), share) for share in QUANTILES)
    fakes = (fake_activations(x, r, activations) for r in ranges)
    return energy * min(output_error(without_shift, fake, quantised) for fake in fakes)


def _clipped(x: Array, share: float) -> Range:
    """The range of rows without a share of the values, half of it on either side."""
    if share == 0:
        low, high = float(x.min()), float(x.max())
    else:
        values = x.reshape(-1)
        some = values[:: max(1, len(values) // QUANTILE_VALUES)]
        low, high = (float(v) for v in np.quantile(some, [share / 2, 1 - share / 2]))
    return Range(min(low, 0.0), max(high, 0.0), "rows")
