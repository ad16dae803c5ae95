"""Weight storage of an ML program: float16, int8 with a scale per channel, 4-bit palettes.

It also quantises the activations of int8 targets. The builder is a parameter, as in `mlprogram`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetube.calibration.numeric import (
    Moments,
    absmax_scales,
    gptq_quantize,
    gptq_targets,
    pixel_moments,
    quantize_weights,
)
from edgetube.calibration.table import LinearPlan, Range, stored_scales
from edgetube.export.mlprogram import Weight, label, narrow
from edgetube.precision import Precision

Array = npt.NDArray[Any]

MIN_COMPRESSED_SIZE = 2048
"""Weights of fewer elements stay in float16."""

COLOUR_CHANNELS = 3
"""Input channels of a tube's convolution per frame."""

PALETTE_SIZE = 16
GROUP_SIZE = 16
"""Output channels per palette from iOS 18 on (or a divisor of it); before, a weight has one palette."""


class WeightStorage:
    """Stores weights (output channels first) and quantises activations of one target.

    Args:
        mb: the builder.
        precision: of the target.
        uint4: the builder's 4-bit numpy dtype where a weight may have several palettes (from iOS 18 on), else None.
        encoder: names of the weights of the encoder's blocks, which alone get palettes.
        plans: of an int8 target: plan and activation range of each quantised weight.
        moments: measures the input moments of each linear, by its weight; for targets that compress weights only.
    """

    def __init__(
        self,
        mb: Any,
        precision: Precision,
        uint4: Any,
        encoder: Collection[str],
        plans: Mapping[str, tuple[LinearPlan, Range]],
        moments: Callable[[], Mapping[str, Moments]] = dict,
    ) -> None:
        self.mb, self.blocks, self.uint4, self.encoder, self.plans = mb, uint4 is not None, uint4, encoder, plans
        ways = {
            Precision.FP16: self.fp16,
            Precision.W8: self.int8,
            Precision.W4: self.palettized,
            Precision.W8A8: self.calibrated_int8,
        }
        self.weight: Weight = ways[precision]
        self.quantised: dict[str, Any] = {}
        self.measure = moments
        self.drifts: dict[str, Array] = {}

    @cached_property
    def moments(self) -> Mapping[str, Moments]:
        """Input moments by weight; measured on first use."""
        return self.measure()

    def fp16(self, name: str, array: Array, unit: float) -> Any:
        """Float16."""
        return self.mb.const(val=narrow(name, array, "fp16"), name=label(name))

    def int8(self, name: str, array: Array, unit: float) -> Any:
        """Int8 without clipping, by GPTQ where the input's moments are known (of convolutions, those of pixels)."""
        if array.size < MIN_COMPRESSED_SIZE:
            return self.fp16(name, array, unit)
        scales, matrix = channel_scales(array), array.reshape(len(array), -1)
        if array.ndim == 4 and array.shape[2:] != (1, 1):
            data = gptq_quantize(matrix.T, scales, pixel_moments(array.shape[1] // COLOUR_CHANNELS, *array.shape[2:])).T
        elif name in self.moments:
            data = gptq_quantize(matrix.T, scales, self.moments[name].second).T
            self.record_drift(name, matrix, data * scales[:, None])
        else:
            data = quantise(matrix, scales)
        return self.integers(name, np.ascontiguousarray(data.reshape(array.shape)), scales)

    def calibrated_int8(self, name: str, array: Array, unit: float) -> Any:
        """Int8 with the scales of the calibration table, or float16 where the table keeps a linear in float."""
        if name not in self.plans:
            return self.fp16(name, array, unit)
        scales = np.array(self.plans[name][0].weight_scales, np.float32) * np.float32(unit)
        scales = stored_scales(scales, "float16", name)
        return self.integers(name, quantise(array, scales), scales)

    def activation(self, name: str, x: Any, unit: float) -> Any:
        """The input of a quantised linear through quantize and dequantize, one pair per tensor."""
        if name not in self.plans:
            return x
        plan, found = self.plans[name]
        if (tensor := plan.activation) not in self.quantised:
            scale = np.float16(stored_scales(found.symmetric / unit, "float16", tensor))
            integers = self.mb.quantize(input=x, scale=scale, output_dtype="int8", name=f"{label(tensor)}_int8")
            self.quantised[tensor] = self.mb.dequantize(input=integers, scale=scale, name=f"{label(tensor)}_rounded")
        return self.quantised[tensor]

    def integers(self, name: str, data: Array, scales: Array) -> Any:
        """Int8 (O, ...) with a scale (O,) for each output channel."""
        narrow_scales = scales.astype(np.float16)
        if self.blocks:
            scale = narrow_scales.reshape(-1, *[1] * (data.ndim - 1))
            return self.mb.constexpr_blockwise_shift_scale(data=data, scale=scale, name=label(name))
        return self.mb.constexpr_affine_dequantize(
            quantized_data=data, scale=narrow_scales, zero_point=np.int8(0), axis=np.int32(0), name=label(name)
        )

    def record_drift(self, name: str, matrix: Array, stored: Array) -> None:
        """Record the mean error (O,) of a linear's output from storing its weight (O, I)."""
        self.drifts[name] = (stored.astype(np.float32) - matrix) @ self.moments[name].mean

    def corrected_bias(self, name: str, array: Array) -> Array:
        """The bias (O,) less the mean error of the stored weight."""
        corrected: Array = array - self.drifts.get(name, np.float32(0))
        return corrected

    def palettized(self, name: str, array: Array, unit: float) -> Any:
        """4-bit palettes in the encoder; int8 elsewhere."""
        if name not in self.encoder:  # first and last layers: few weights, large effect
            return self.int8(name, array, unit)
        matrix = array.reshape(len(array), -1)
        groups = len(array) // math.gcd(len(array), GROUP_SIZE) if self.blocks else 1
        luts = np.stack([palette(rows) for rows in np.split(matrix, groups)])
        found = Palettes(luts, len(array))
        if name in self.moments:
            second = self.moments[name].second
            indices = found.nearest(gptq_targets(matrix.T, second, lambda _, row: found.look_up(found.nearest(row))))
            self.record_drift(name, matrix, found.look_up(indices).T)
        else:
            indices = found.nearest(matrix.T)
        indices = np.ascontiguousarray(indices.T).reshape(array.shape)
        if self.blocks:
            lut = luts.reshape(groups, *[1] * (array.ndim - 1), PALETTE_SIZE, 1)
            return self.mb.constexpr_lut_to_dense(indices=indices.astype(self.uint4), lut=lut, name=label(name))
        packed = indices.reshape(-1, 2) @ np.array([1, PALETTE_SIZE], np.uint8)
        shape = np.array(array.shape, np.uint32)
        return self.mb.constexpr_lut_to_dense(lut=luts[0], indices=packed, shape=shape, name=label(name))


def channel_scales(array: Array) -> Array:
    """Symmetric int8 scales (O,) float32 by the largest magnitude of each output channel of (O, ...)."""
    return absmax_scales(array.reshape(len(array), -1).T, dtype="float16")


def quantise(array: Array, scales: Array) -> Array:
    """The nearest int8 of each weight (O, ...), with one scale (O,) per channel."""
    return quantize_weights(array, scales.reshape(-1, *[1] * (array.ndim - 1)))


def palette(array: Array, steps: int = 50) -> Array:
    """The 16 float16 centroids of an array with the least squared error, in ascending order: 1-D k-means.

    Lloyd's iteration on the sorted values: a cluster is a range, its mean a difference of cumulative sums.
    """
    flat = np.sort(array.astype(np.float64), axis=None)
    sums = np.concatenate([[0.0], np.cumsum(flat)])
    # Initial centroids: the optimal levels of a normal distribution, quantiles of one wider by sqrt(3).
    tails = np.sinh(np.linspace(-1.6, 1.6, PALETTE_SIZE)) / np.sinh(1.6)
    centres = flat.mean() + tails * 2.7 * flat.std()
    for _ in range(steps):
        edges = np.searchsorted(flat, (centres[1:] + centres[:-1]) / 2)
        edges = np.concatenate([[0], edges, [len(flat)]])
        counts = np.diff(edges)
        moved = np.where(counts > 0, np.diff(sums[edges]) / np.maximum(counts, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    lut: Array = centres.astype(np.float16)
    return lut


class Palettes:
    """Palettes (groups, 16) of `channels` output channels in equal groups."""

    def __init__(self, luts: Array, channels: int) -> None:
        self.numbers = np.repeat(luts.astype(np.float32), channels // len(luts), axis=0)  # (O, 16)
        self.middles = ((self.numbers[:, 1:] + self.numbers[:, :-1]) / 2).T  # (15, O)

    def nearest(self, rows: Array) -> Array:
        """The index of the nearest palette entry of each weight (..., O)."""
        indices = np.zeros(rows.shape, np.uint8)
        for middle in self.middles:
            indices += rows > middle
        return indices

    def look_up(self, indices: Array) -> Array:
        """The palette entries (..., O) float32 of indices."""
        found: Array = self.numbers[np.arange(len(self.numbers)), indices]
        return found
