"""How the weights of an ML program are stored: float16, int8 with a scale a channel, 4-bit palettes.

And what happens to the activations that int8 weights multiply. The builder comes as a parameter, as in `mlprogram`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetube.calibration.numeric import Moments, gptq_quantize, gptq_targets, pixel_moments
from edgetube.calibration.table import LinearPlan, Range, stored_scales
from edgetube.export.mlprogram import Weight, label, narrow
from edgetube.targets import Precision

Array = npt.NDArray[Any]

SMALL = 2048
"""Weights of fewer elements stay float16: compressing them saves nothing and costs accuracy."""

COLOURS = 3
"""Of a pixel; a convolution has them for each of its frames."""

PALETTE = 16
GROUP = 16
"""Output channels that share a palette, from iOS 18 on, or a divisor; before, a weight has one palette."""


class Storage:
    """How a target stores the weight (output channels first) of a matrix product, and what the weight multiplies.

    Args:
        mb: the builder.
        precision: of the target.
        uint4: numpy's name for the builder's 4-bit integers where a weight may have scales and palettes for parts of it
            (from iOS 18 on), else None.
        plans: of an int8 target: for each weight its plan, and the range of what it multiplies.
        moments: measures for each weight what it multiplies is like; a target that compresses weights alone asks.
    """

    def __init__(
        self,
        mb: Any,
        precision: Precision,
        uint4: Any,
        plans: Mapping[str, tuple[LinearPlan, Range]],
        moments: Callable[[], Mapping[str, Moments]] = dict,
    ) -> None:
        self.mb, self.blocks, self.uint4, self.plans = mb, uint4 is not None, uint4, plans
        ways = {"fp16": self.plain, "w8": self.rounded, "w4": self.palettes, "int8": self.planned}
        self.weight: Weight = ways[precision]
        self.quantised: dict[str, Any] = {}
        self.measure = moments
        self.drifts: dict[str, Array] = {}

    @cached_property
    def moments(self) -> Mapping[str, Moments]:
        """Of what the weights multiply; measured when a weight is first rounded for that."""
        return self.measure()

    def plain(self, name: str, array: Array, unit: float) -> Any:
        """Float16."""
        return self.mb.const(val=narrow(name, array, "fp16"), name=label(name))

    def rounded(self, name: str, array: Array, unit: float) -> Any:
        """Int8 that clips nothing, for what the weight is known to read; a tube, a convolution, reads pixels."""
        if array.size < SMALL:
            return self.plain(name, array, unit)
        scales, matrix = channel_scales(array), array.reshape(len(array), -1)
        if array.ndim == 4 and array.shape[2:] != (1, 1):
            data = gptq_quantize(matrix.T, scales, pixel_moments(array.shape[1] // COLOURS, *array.shape[2:])).T
        elif name in self.moments:
            data = gptq_quantize(matrix.T, scales, self.moments[name].second).T
            self.note(name, matrix, data * scales[:, None])
        else:
            data = quantise(matrix, scales)
        return self.integers(name, np.ascontiguousarray(data.reshape(array.shape)), scales)

    def planned(self, name: str, array: Array, unit: float) -> Any:
        """Int8 with the scales of the table, or float16 where the table says float."""
        if name not in self.plans:
            return self.plain(name, array, unit)
        scales = np.array(self.plans[name][0].weight_scales, np.float32) * np.float32(unit)
        scales = stored_scales(scales, "float16", name)
        return self.integers(name, quantise(array, scales), scales)

    def activation(self, name: str, x: Any, unit: float) -> Any:
        """Through int8 and back, once a tensor, in the form that an engine can fuse with the product behind it."""
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

    def note(self, name: str, matrix: Array, stored: Array) -> None:
        """Remember what storing a weight (O, I) adds to its product on average (O,)."""
        self.drifts[name] = (stored.astype(np.float32) - matrix) @ self.moments[name].mean

    def bias(self, name: str, array: Array) -> Array:
        """The bias (O,) of a weight that is stored, without what storing it adds on average."""
        corrected: Array = array - self.drifts.get(name, np.float32(0))
        return corrected

    def palettes(self, name: str, array: Array, unit: float) -> Any:
        """Four bits an element, in the encoder; int8 elsewhere."""
        if not name.startswith("blocks."):  # the ends of the model: few weights, and errors that nothing evens out
            return self.rounded(name, array, unit)
        matrix = array.reshape(len(array), -1)
        groups = len(array) // math.gcd(len(array), GROUP) if self.blocks else 1
        luts = np.stack([palette(rows) for rows in np.split(matrix, groups)])
        found = Palettes(luts, len(array))
        if name in self.moments:
            second = self.moments[name].second
            indices = found.nearest(gptq_targets(matrix.T, second, lambda _, row: found.look_up(found.nearest(row))))
            self.note(name, matrix, found.look_up(indices).T)
        else:
            indices = found.nearest(matrix.T)
        indices = np.ascontiguousarray(indices.T).reshape(array.shape)
        if self.blocks:
            lut = luts.reshape(groups, *[1] * (array.ndim - 1), PALETTE, 1)
            return self.mb.constexpr_lut_to_dense(indices=indices.astype(self.uint4), lut=lut, name=label(name))
        packed = indices.reshape(-1, 2) @ np.array([1, PALETTE], np.uint8)
        shape = np.array(array.shape, np.uint32)
        return self.mb.constexpr_lut_to_dense(lut=luts[0], indices=packed, shape=shape, name=label(name))


def channel_scales(array: Array) -> Array:
    """The scale (O,) float32 with which each output channel of (O, ...) fills int8 symmetrically."""
    largest = np.abs(array).reshape(len(array), -1).max(axis=1)
    return stored_scales(largest / 127, "float16", "a weight")


def quantise(array: Array, scales: Array) -> Array:
    """The nearest int8 of each weight (O, ...), with one scale (O,) a channel."""
    steps = array / scales.reshape(-1, *[1] * (array.ndim - 1))
    return np.clip(np.rint(steps), -127, 127).astype(np.int8)


def palette(array: Array, steps: int = 50) -> Array:
    """The 16 float16 numbers that stand for an array with the least squared error, in ascending order.

    Lloyd's iteration on the sorted numbers: a cluster is a range, its mean a difference of cumulative sums.
    """
    flat = np.sort(array.astype(np.float64), axis=None)
    sums = np.concatenate([[0.0], np.cumsum(flat)])
    # Where a normal distribution has its 16 best levels: at the quantiles of one that is wider by sqrt(3).
    tails = np.sinh(np.linspace(-1.6, 1.6, PALETTE)) / np.sinh(1.6)
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
    """Palettes (groups, 16) of `channels` output channels, as many in each group."""

    def __init__(self, luts: Array, channels: int) -> None:
        self.numbers = np.repeat(luts.astype(np.float32), channels // len(luts), axis=0)  # (O, 16)
        self.middles = ((self.numbers[:, 1:] + self.numbers[:, :-1]) / 2).T  # (15, O)

    def nearest(self, rows: Array) -> Array:
        """The index of the number that is nearest to each weight (..., O)."""
        indices = np.zeros(rows.shape, np.uint8)
        for middle in self.middles:
            indices += rows > middle
        return indices

    def look_up(self, indices: Array) -> Array:
        """The numbers (..., O) float32 that indices stand for."""
        found: Array = self.numbers[np.arange(len(self.numbers)), indices]
        return found
