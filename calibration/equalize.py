"""Equalisation: moves quantisation difficulty from activations into weights, which have a scale per channel.

A linear reads x. Its producer is changed to give (x - shift) / scale per channel, and the linear to W' = scale * W,
b' = b + shift W: the same function in floating point, with an activation that one range fits better.
SmoothQuant (Xiao et al., 2022) is scale = max|x|^alpha / max|W|^(1 - alpha) without shift; RepQ-ViT (Li et al., 2022)
scales every channel to the same range and shifts it to its middle. The one with the smallest output error is used,
linear by linear. Behind a GELU, where scale and shift are operators of their own, the gain has to be larger
(`choose_behind_gelu`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from edgetube.calibration import observers
from edgetube.calibration.numeric import absmax_scales, fake_quantize_activations, fake_quantize_weights, output_error
from edgetube.calibration.observers import Histogram
from edgetube.calibration.table import INT8_MAX, ActivationScheme, Range, ScaleType

Array = npt.NDArray[np.float32]

ALPHAS = (0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85)
QUANTILES = (0.0, 1e-4, 1e-3)
"""Shares of the values that the ranges tried with each equalisation clip."""

QUANTILE_VALUES = 100_003
"""Values that quantiles are estimated from; a prime, so that the stride covers every channel."""

SCREENING_ROWS, FINALISTS = 192, 5
"""Rows of each half on which all candidates are compared first, and how many of the best, besides no equalisation, are
then compared on all rows: successive halving (Jamieson & Talwalkar, 2016) with one step."""

EVERY = slice(None)

MAX_ERROR_RATIO, MAX_OPERATOR_ERROR_RATIO = 0.97, 0.5
"""Largest error relative to no equalisation at which one is used: where it is folded, and where it is an operator."""


@dataclass(frozen=True)
class ChannelRanges:
    """Minimum and maximum of each channel over all clips and tokens, (K,) each."""

    low: Array
    high: Array

    @classmethod
    def of(cls, parts: Iterable[ChannelRanges]) -> ChannelRanges:
        """The union of the ranges of a tensor's parts."""
        lows, highs = zip(*((part.low, part.high) for part in parts), strict=True)
        return cls(np.minimum.reduce(lows), np.maximum.reduce(highs))

    @property
    def largest(self) -> Array:
        """max|x| per channel."""
        return np.maximum(-self.low, self.high)


@dataclass(frozen=True)
class Equalization:
    """x' = (x - shift) / scale, per channel.

    Attributes:
        name: "none", "smooth 0.5", "shift + smooth 0.5", "repq".
        scale, shift: (K,) float32.
        error: relative output error with everything quantised, on the sampled rows.
        range: the activation range that the shift belongs to; None leaves it to the observers.
    """

    name: str
    scale: Array
    shift: Array
    error: float = np.inf
    range: Range | None = None

    @property
    def identity(self) -> bool:
        return self.name == "none"

    def apply(self, x: Array, channels: npt.NDArray[np.intp] | slice = EVERY) -> Array:
        """The equalised activation (..., K), or values (...) of these channels (...)."""
        if self.identity:
            return x
        return ((x - self.shift[channels]) / self.scale[channels]).astype(np.float32)

    def weight(self, weight: Array) -> Array:
        """The equalised weight W' of weight (K, N)."""
        return weight if self.identity else (weight * self.scale[:, None]).astype(np.float32)

    def bias(self, weight: Array, bias: Array) -> Array:
        """The equalised bias b' of the original weight (K, N) and bias (N,)."""
        if self.identity:
            return bias
        return (bias + self.shift.astype(np.float64) @ weight.astype(np.float64)).astype(np.float32)


def candidates(seen: ChannelRanges, weight: Array, shifts: bool = True) -> Iterator[Equalization]:
    """No equalisation, SmoothQuant at several alphas; with `shifts` also a shift, SmoothQuant after it, and RepQ."""
    zero, one = np.zeros_like(seen.low), np.ones_like(seen.low)
    yield Equalization("none", one, zero)
    columns = np.maximum(np.abs(weight).max(axis=1), np.float32(1e-8))
    middle = ((seen.low + seen.high) / 2).astype(np.float32)
    half: Array = (seen.high - seen.low) / np.float32(2)
    ways = [("", zero, seen.largest), ("shift + ", middle, half)]
    for prefix, shift, largest in ways if shifts else ways[:1]:
        largest = np.maximum(largest, np.float32(1e-6))
        if shift is middle:
            yield Equalization("shift", one, shift)
        for alpha in ALPHAS:
            yield Equalization(
                f"{prefix}smooth {alpha}", _normalized_scale(largest**alpha / columns ** (1 - alpha)), shift
            )
        yield Equalization("repq" if prefix else "smooth 1.0", _normalized_scale(largest), shift)


def _normalized_scale(scale: Array) -> Array:
    """The scale divided by its geometric mean and clipped to [1e-3, 1e3], for float16."""
    scale = scale / np.exp(np.log(scale).mean())
    return np.clip(scale, 1e-3, 1e3).astype(np.float32)


@dataclass(frozen=True)
class Half:
    """Statistics of an activation on half of the clips: channel ranges, sampled rows (R, K)."""

    channels: ChannelRanges
    rows: Array

    @cached_property
    def ends(self) -> Array:
        """Least and largest value of each channel in the rows (2, K)."""
        return np.stack([self.rows.min(axis=0), self.rows.max(axis=0)])

    @cached_property
    def drawn(self) -> tuple[Array, npt.NDArray[np.intp]]:
        """Values of the rows, evenly spaced, that quantiles are estimated from, and the channel of each."""
        values = self.rows.reshape(-1)
        step = max(1, len(values) // QUANTILE_VALUES)
        return values[::step].copy(), np.arange(0, len(values), step) % self.rows.shape[1]


Halves = tuple[Half, Half]


def choose(halves: Halves, weight: Array, activations: ActivationScheme, scales: ScaleType = "float32") -> Equalization:
    """The equalisation with the smallest output error of the linear `weight` (K, N).

    Cross-validated: each candidate is made from one half of the clips and scored on the other, since a shift that
    overfits the clips would look best on them.
    """
    plain, *others = _cross_validated(halves, weight, activations, shifts=True)
    best = min(others, key=lambda option: option.error)
    return best if best.error < MAX_ERROR_RATIO * plain.error else plain


def choose_behind_gelu(
    halves: Halves, weight: Array, activations: ActivationScheme, scales: ScaleType = "float32"
) -> Equalization:
    """The same behind a GELU, which can absorb neither scale nor shift: each is one more operator.

    A scale per channel is used only if it halves the error. Under int8, which has no zero point, half of the integers
    would stand for negative values that GELU hardly gives, so the best uint8 range gives scale and centre =
    (zero point - 128) * scale. The integers are then those of uint8 minus 128, and zero stays exact: an error there
    would be in every token.

    Args:
        weight: (K, N) of the linear that reads the tensor.
        scales: the type that the target stores scales in.
    """
    plain, *scaled = _cross_validated(halves, weight, "uint8" if activations == "int8" else activations, shifts=False)
    chosen = min(scaled, key=lambda option: option.error)
    if chosen.error < MAX_OPERATOR_ERROR_RATIO * plain.error:
        gain = (1 / chosen.scale).astype(np.float16).astype(np.float32)  # half precision multiplies by just this
        chosen = replace(chosen, scale=np.float32(1) / gain)
    else:
        chosen = plain
    rows = np.concatenate([half.rows for half in halves])
    return _add_centre(chosen, rows, weight, scales) if activations == "int8" else chosen


def _cross_validated(halves: Halves, weight: Array, activations: ActivationScheme, shifts: bool) -> list[Equalization]:
    """Candidates of the whole tensor, the first one none, with their cross-validated errors over the two halves.

    Where there are many rows, candidates that do not reach the final are left out.
    """
    whole = list(candidates(ChannelRanges.of(half.channels for half in halves), weight, shifts))
    made = [list(candidates(half.channels, weight, shifts)) for half in halves]
    options = [
        [(option, _clipped_ranges(option, half)) for option in side] for half, side in zip(halves, made, strict=True)
    ]
    rows = [half.rows for half in halves]
    entered = list(range(len(whole)))
    if (step := min(map(len, rows)) // SCREENING_ROWS) > 1:
        errors = _errors(entered, options, [some[::step] for some in rows], weight, activations)
        best = sorted(entered[1:], key=lambda index: errors[index])[:FINALISTS]
        entered = [0, *sorted(best)]
    errors = _errors(entered, options, rows, weight, activations)
    return [replace(whole[index], error=errors[index]) for index in entered]


def _errors(
    entered: Sequence[int],
    options: Sequence[Sequence[tuple[Equalization, Sequence[Range]]]],
    rows: Sequence[Array],
    weight: Array,
    activations: ActivationScheme,
) -> dict[int, float]:
    """The mean error of each candidate over the two halves, by its number.

    Args:
        entered: numbers of the candidates.
        options: the candidates that each half of the clips gives, and their ranges there.
        rows: of each half; a candidate is scored on those of the other one.
    """
    found = []
    for own, other in zip(options, rows[::-1], strict=True):
        exact = other @ weight
        found.append([_error(*own[index], other, weight, exact, activations) for index in entered])
    return dict(zip(entered, map(float, np.mean(found, axis=0)), strict=True))


def _add_centre(chosen: Equalization, rows: Array, weight: Array, scales: ScaleType) -> Equalization:
    """`chosen` with a shift in place of int8's missing zero point, where that lowers the error."""
    x, w = chosen.apply(rows), chosen.weight(weight)
    exact, quantised = x @ w, fake_quantize_weights(w, absmax_scales(w))
    seen = Histogram()
    seen.add(x)

    def best(activations: ActivationScheme) -> tuple[float, Range]:
        found = [each.stored(activations, scales) for each in observers.candidates(seen, activations)]
        errors = [output_error(exact, fake_quantize_activations(x, r, activations), quantised) for r in found]
        return min(zip(errors, found, strict=True), key=lambda pair: pair[0])

    (plain, _), (error, found) = best("int8"), best("uint8")
    if error >= MAX_ERROR_RATIO * plain:
        return chosen
    scale, zero = found.asymmetric
    middle = np.float32(np.float16((128 - zero) * scale))  # half precision subtracts just this
    name = "centre" if chosen.identity else f"{chosen.name} + centre"
    around = Range(-INT8_MAX * scale, INT8_MAX * scale, "zero point")
    return replace(chosen, name=name, shift=middle * chosen.scale, error=error, range=around)


def _error(
    option: Equalization,
    ranges: Sequence[Range],
    rows: Array,
    weight: Array,
    exact: Array,
    activations: ActivationScheme,
) -> float:
    """Relative output error on `rows`, with the best of `ranges`."""
    x, w = option.apply(rows), option.weight(weight)
    quantised = fake_quantize_weights(w, absmax_scales(w))
    without_shift = exact if option.identity else exact - option.shift @ weight
    energy = float(np.vdot(without_shift, without_shift)) / max(float(np.vdot(exact, exact)), 1e-30)
    fakes = (fake_quantize_activations(x, found, activations) for found in ranges)
    return energy * min(output_error(without_shift, fake, quantised) for fake in fakes)


def _clipped_ranges(option: Equalization, half: Half) -> list[Range]:
    """The ranges of equalised rows with each share of `QUANTILES` of the values clipped, half of it on either side; 0
    first."""
    low, high = option.apply(half.ends)  # scales are positive: the extremes stay where they are
    some = np.sort(option.apply(*half.drawn))  # NumPy sorts in less time than it partitions for several quantiles
    shares = [share / 2 for share in QUANTILES[1:]]
    found = np.quantile(some, [*shares, *(1 - share for share in shares)])
    ends = [(float(low.min()), float(high.max())), *zip(*np.split(found, 2), strict=True)]
    return [Range(min(float(low), 0.0), max(float(high), 0.0), "rows") for low, high in ends]
