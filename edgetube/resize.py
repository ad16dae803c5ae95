"""Resizes frames and crops them to the graph's input, as `InputContract` says: the same bytes on every machine.

The definition, with formulas and independent oracles, is in `docs/preprocessing.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from edgetube.contract import InputContract

Frames = npt.NDArray[np.uint8]
"""RGB frames, (T, H, W, 3) uint8."""

ONE = 1 << 16
"""The sum of the integer filter weights, see `_weights`."""

BLOCK = 4
"""Output rows (or columns) per matrix product: few, because a wide block is mostly zeros outside its band."""


@dataclass(frozen=True)
class _Block:
    """Output rows (columns) `at` onward of one axis, as a matrix over the source rows (columns) [low, high)."""

    at: int
    low: int
    high: int
    matrix: npt.NDArray[np.floating]


@dataclass(frozen=True)
class _Plan:
    """The two passes of the filter for one source size."""

    vertical: tuple[_Block, ...]
    horizontal: tuple[_Block, ...]
    left: int
    right: int


def geometry(height: int, width: int, contract: InputContract) -> tuple[int, int, int, int]:
    """Size of the resized frame and the crop's corner in it: (rows, columns, top, left).

    "short-side" scales until the crop is just covered: one side is exact, the other is floor(size * scale). The
    corner is half of what is left over, halves to the even side, as torchvision's Resize and CenterCrop do.
    """
    rows, columns = contract.height, contract.width
    if contract.resize == "short-side":
        if contract.height * width >= contract.width * height:
            columns = width * contract.height // height
        else:
            rows = height * contract.width // width
    return rows, columns, round((rows - contract.height) / 2), round((columns - contract.width) / 2)


def _weights(size: int, resized: int, index: int) -> tuple[int, npt.NDArray[np.float64]]:
    """First source pixel and integer weights of one output pixel of the triangle filter.

    The weights sum to `ONE` exactly: rounding their running sum, not each one, keeps the error of every partial sum
    below half a unit. A product with uint8 pixels then stays below 2**24 and is exact in float32 in whatever order
    a BLAS adds it up, which is what makes the result the same bytes on every machine.
    """
    scale = size / resized
    support = max(scale, 1.0)
    centre = (index + 0.5) * scale
    low, high = max(0, int(centre - support + 0.5)), min(size, int(centre + support + 0.5))
    triangle = np.maximum(0.0, 1.0 - np.abs(np.arange(low, high) + 0.5 - centre) / support)
    return low, np.diff(np.rint(np.cumsum(triangle) * (ONE / triangle.sum())), prepend=0.0)


def _blocks(size: int, resized: int, first: int, count: int) -> Iterator[_Block]:
    """Output pixels [first, first + count) of one axis, `BLOCK` at a time."""
    for at in range(0, count, BLOCK):
        rows = [_weights(size, resized, first + i) for i in range(at, min(at + BLOCK, count))]
        low, high = min(a for a, _ in rows), max(a + len(w) for a, w in rows)
        matrix = np.zeros((len(rows), high - low))
        for row, (a, w) in zip(matrix, rows, strict=True):
            row[a - low : a - low + len(w)] = w
        yield _Block(at, low, high, matrix)


@lru_cache(maxsize=32)
def _plan(height: int, width: int, contract: InputContract) -> _Plan:
    rows, columns, top, left = geometry(height, width, contract)
    vertical = tuple(
        _Block(b.at, b.low, b.high, b.matrix.astype(np.float32)) for b in _blocks(height, rows, top, contract.height)
    )
    # Colours stay interleaved: a matrix with a 3x3 identity at every tap costs less than two transpositions.
    horizontal = tuple(
        _Block(b.at, b.low, b.high, np.ascontiguousarray(np.kron(b.matrix, np.eye(3)).T))
        for b in _blocks(width, columns, left, contract.width)
    )
    return _Plan(vertical, horizontal, min(b.low for b in horizontal), max(b.high for b in horizontal))


def _filter(frame: Frames, plan: _Plan, out: Frames) -> None:
    """Resize and crop one frame, (H0, W0, 3) -> (H, W, 3): rows in float32, columns in float64, rounded once."""
    height, width, _ = out.shape
    tall = np.empty((height, (plan.right - plan.left) * 3), np.float32)
    for b in plan.vertical:
        source = frame[b.low : b.high, plan.left : plan.right].astype(np.float32)
        np.matmul(b.matrix, source.reshape(b.high - b.low, -1), out=tall[b.at : b.at + len(b.matrix)])
    result = np.empty((height, width * 3))
    for b in plan.horizontal:
        band = tall[:, (b.low - plan.left) * 3 : (b.high - plan.left) * 3].astype(np.float64)
        result[:, b.at * 3 : b.at * 3 + b.matrix.shape[1]] = band @ b.matrix
    result *= 1.0 / (ONE * ONE)
    result += 0.5  # the cast below truncates: half goes up; at most 255.5, so nothing to clip
    out[...] = result.astype(np.uint8).reshape(out.shape)


def spatial(frames: Frames, contract: InputContract) -> Frames:
    """Resize with antialias and crop the centre; only the pixels that the crop needs are read.

    Args:
        frames: (N, H0, W0, 3) uint8, any strides.

    Returns:
        (N, H, W, 3) uint8; the argument itself when it already has that size.
    """
    count, height, width, _ = frames.shape
    if (height, width) == (contract.height, contract.width):
        return frames
    rows, columns, top, left = geometry(height, width, contract)
    if (rows, columns) == (height, width):
        return frames[:, top : top + contract.height, left : left + contract.width]
    plan = _plan(height, width, contract)
    out = np.empty((count, contract.height, contract.width, 3), np.uint8)
    for frame, target in zip(frames, out, strict=True):
        _filter(frame, plan, target)
    return out
