"""Resizes frames and crops them to the graph's input, as `InputContract` says: the same bytes on every machine.

The definition, with formulas and independent oracles, is in `docs/preprocessing.md`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetube.contract import InputContract
from edgetube.views import Side

Frames = npt.NDArray[np.uint8]
"""RGB frames, (T, H, W, 3) uint8."""

BLOCK, WIDE = 8, 3
"""Output rows (or columns) per matrix product: few, because a wide block is mostly zeros outside its band; and half as
many where a frame shrinks to less than 1 / `WIDE`."""

MANY = 64
"""Where more than one value in this / 3 is too close to call in float32, all are computed in float64."""

STRIP = 64
"""Source rows that the bicubic filter converts at a time: they stay in the cache, and a BLAS shares out no product that
is too small for it."""

ONE = 1 << 16
"""The sum of the integer weights of the bilinear filter, see `_triangle`."""

CUBIC_ONE = 1 << 22
"""The unit of the integer weights of the bicubic filter, see `_cubic`: Pillow's."""

Weights = Callable[[int, int, int], tuple[int, npt.NDArray[np.float64]]]
"""(source pixels, resized pixels, index of an output pixel) -> its first source pixel, and its integer weights."""


# --------------------------------------------------------------------------------------------------------- geometry


def geometry(height: int, width: int, contract: InputContract, side: Side = "middle") -> tuple[int, int, int, int]:
    """Size of the resized frame and the crop's corner in it: (rows, columns, top, left).

    "short-side" makes one side exact, the other is floor(size * scale). The corner is half of what is left over; a
    crop at the start or the end is moved along the axis where more is left over, the columns where it is equal.
    """
    rows, columns = _resized(height, width, contract)
    over = rows - contract.height, columns - contract.width
    corner = [x // 2 if contract.crop == "center-floor" else round(x / 2) for x in over]
    if side != "middle":
        axis = 0 if over[0] > over[1] else 1
        corner[axis] = 0 if side == "start" else over[axis]
    return rows, columns, corner[0], corner[1]


def _resized(height: int, width: int, contract: InputContract) -> tuple[int, int]:
    """(rows, columns) of the resized frame."""
    size = contract.resize_size
    if isinstance(size, tuple):
        return size
    rows, columns = (contract.height, contract.width) if size is None else (size, size)
    if contract.resize == "short-side":
        if rows * width >= columns * height:  # the side that needs the larger scale is exact
            columns = width * rows // height
        else:
            rows = height * columns // width
    return rows, columns


# ---------------------------------------------------------------------------------------------------------- weights


def _triangle(size: int, resized: int, index: int) -> tuple[int, npt.NDArray[np.float64]]:
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


def _cubic(size: int, resized: int, index: int) -> tuple[int, npt.NDArray[np.float64]]:
    """First source pixel and integer weights of one output pixel of the cubic filter, as Pillow rounds them.

    Their absolute values sum to less than 2 * `CUBIC_ONE`. So every partial sum of products with uint8 pixels, in
    whatever order, is an integer below 2**31, which float64 holds exactly.
    """
    scale = size / resized
    stretch = max(scale, 1.0)
    centre = (index + 0.5) * scale
    low, high = max(0, int(centre - 2 * stretch + 0.5)), min(size, int(centre + 2 * stretch + 0.5))
    x = np.abs((np.arange(low, high) - centre + 0.5) * (1.0 / stretch))
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    cubic = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    # Pillow adds the weights one by one, which `sum` of numpy does not.
    weights = cubic / np.cumsum(cubic)[-1]
    return low, np.trunc(weights * CUBIC_ONE + np.copysign(0.5, weights))


# ------------------------------------------------------------------------------------------------------------ filter


@dataclass(frozen=True)
class _Block:
    """Output rows (columns) `at` onward of one axis, as a matrix over the source rows (columns) [low, high)."""

    at: int
    low: int
    high: int
    matrix: npt.NDArray[np.floating]


@dataclass(frozen=True)
class _Plan:
    """The two passes of a filter for one source size, and the source pixels that they read.

    Attributes:
        first, weights: (W,) and (W, n): of each output column the first source column, counted from `left`, and the
            weights of n; columns that have fewer begin with zeros.
    """

    vertical: tuple[_Block, ...]
    horizontal: tuple[_Block, ...]
    first: npt.NDArray[np.intp]
    weights: npt.NDArray[np.float64]
    top: int
    bottom: int
    left: int
    right: int


def _blocks(weights: Weights, unit: int, size: int, resized: int, first: int, count: int) -> Iterator[_Block]:
    """Output pixels [first, first + count) of one axis, `BLOCK` at a time.

    Args:
        unit: of the integer weights, a power of two: dividing by it changes no digit of a product or a sum.
    """
    block = BLOCK if size < WIDE * resized else BLOCK // 2
    for at in range(0, count, block):
        rows = [weights(size, resized, first + i) for i in range(at, min(at + block, count))]
        low, high = min(a for a, _ in rows), max(a + len(w) for a, w in rows)
        matrix = np.zeros((len(rows), high - low))
        for row, (a, w) in zip(matrix, rows, strict=True):
            row[a - low : a - low + len(w)] = w / unit
        yield _Block(at, low, high, matrix)


@lru_cache(maxsize=32)
def _plan(height: int, width: int, contract: InputContract, side: Side) -> _Plan:
    rows, columns, top_, left_ = geometry(height, width, contract, side)
    weights, unit, kind, _ = _FILTERS[contract.filter]
    vertical = tuple(
        _Block(b.at, b.low, b.high, b.matrix.astype(kind))
        for b in _blocks(weights, unit, height, rows, top_, contract.height)
    )
    # Colours stay interleaved: a matrix with a 3x3 identity at every tap costs less than two transpositions.
    horizontal = tuple(
        _Block(b.at, b.low, b.high, np.ascontiguousarray(np.kron(b.matrix, np.eye(3)).T, kind))
        for b in _blocks(weights, unit, width, columns, left_, contract.width)
    )
    (top, bottom), (left, right) = (
        (min(b.low for b in blocks), max(b.high for b in blocks)) for blocks in (vertical, horizontal)
    )
    taps = [weights(width, columns, left_ + i) for i in range(contract.width)]
    longest = max(len(w) for _, w in taps)
    first = np.array([at + len(w) - longest - left for at, w in taps])
    padded = np.array([np.pad(w, (longest - len(w), 0)) for _, w in taps]) / unit
    return _Plan(vertical, horizontal, first, padded, top, bottom, left, right)


class _Scratch(threading.local):
    """Arrays of one thread that the passes write their intermediate results to: for large new ones the system would
    have to clear memory at every frame, which takes as long as the passes."""

    def __init__(self) -> None:
        self._held: dict[str, npt.NDArray[Any]] = {}

    def __call__(self, name: str, shape: tuple[int, ...], kind: type[np.generic]) -> npt.NDArray[Any]:
        """An array that is overwritten when the same name is asked for again."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or len(held) < size:
            self._held[name] = held = np.empty(size, kind)
        return held[:size].reshape(shape)


_scratch = _Scratch()


def _bilinear(frame: Frames, plan: _Plan, out: Frames) -> None:
    """Resize and crop one frame, (H0, W0, 3) -> (H, W, 3): rows, then columns, rounded once.

    The rows are exact in float32. The columns need float64; but float32 decides all values except those within its
    error of the middle between two levels, a few in ten thousand of a picture.
    """
    height, width, _ = out.shape
    wide = (plan.right - plan.left) * 3
    tall = _scratch("tall", (height, wide), np.float32)
    cut = frame[:, plan.left : plan.right]
    source = _scratch("source", (max(b.matrix.shape[1] for b in plan.vertical), wide), np.float32)
    pixels = source.reshape(len(source), -1, 3)
    for b in plan.vertical:
        count = b.high - b.low
        pixels[:count] = cut[b.low : b.high]
        np.matmul(b.matrix, source[:count], out=tall[b.at : b.at + len(b.matrix)])
    result = _scratch("result", (height, width * 3), np.float32)
    _columns(tall, plan, result)
    result += 0.5  # the cast below truncates: half goes up; at most 255.5, so nothing to clip
    out[...] = result.reshape(out.shape)
    # |error| <= (n + 1) u * sum |w t| for n products and their sum, and u * 256 for adding a half: doubled, to be safe.
    close = 2 * (plan.weights.shape[1] + 2) * 256 * 2.0**-24
    result -= out.reshape(result.shape)
    result -= 0.5  # how far behind the middle between two levels: from -0.5 to 0.5, which are the same place
    rows, places = np.nonzero(np.abs(result, out=result) >= 0.5 - close)
    if len(rows) > height * width // MANY:
        _exact_columns(tall, plan, out)
    elif len(rows):
        columns, colours = np.divmod(places, 3)
        at = (plan.first[columns, None] + np.arange(plan.weights.shape[1])) * 3 + colours[:, None]
        # float64; before the left edge is no weight
        taps = tall[rows[:, None], np.maximum(at, 0)] * plan.weights[columns]
        out[rows, columns, colours] = taps.sum(axis=1) + 0.5


def _columns(tall: npt.NDArray[np.floating], plan: _Plan, out: npt.NDArray[np.floating]) -> None:
    """The pass over columns, in the type of `tall`."""
    for b in plan.horizontal:
        band = tall[:, (b.low - plan.left) * 3 : (b.high - plan.left) * 3]
        np.matmul(band, b.matrix.astype(tall.dtype, copy=False), out=out[:, b.at * 3 : b.at * 3 + b.matrix.shape[1]])


def _exact_columns(tall: npt.NDArray[np.float32], plan: _Plan, out: Frames) -> None:
    """The pass over columns in float64, which is exact."""
    result = np.empty((len(tall), out.shape[1] * 3))
    _columns(tall.astype(np.float64), plan, result)
    result += 0.5
    out[...] = result.reshape(out.shape)


def _bicubic(frame: Frames, plan: _Plan, out: Frames) -> None:
    """Resize and crop one frame, (H0, W0, 3) -> (H, W, 3): columns, then rows, each pass to uint8 like Pillow's.

    The filter overshoots at edges. What is cut off between the passes decides what the second one sees, so a single
    rounding at the end would differ from Pillow by many levels there.
    """
    width = out.shape[1]
    wide = np.empty((plan.bottom - plan.top, width * 3), np.uint8)
    for at in range(0, len(wide), STRIP):
        strip = frame[plan.top + at : min(plan.top + at + STRIP, plan.bottom), plan.left : plan.right]
        pixels = _scratch("strip", (len(strip), strip.shape[1] * 3), np.float64)
        pixels.reshape(strip.shape)[...] = strip
        sums = _scratch("sums", (len(strip), width * 3), np.float64)
        _columns(pixels, plan, sums)
        wide[at : at + len(strip)] = _levels(sums)
    for b in plan.vertical:
        band = wide[b.low - plan.top : b.high - plan.top].astype(np.float64)
        out[b.at : b.at + len(b.matrix)] = _levels(b.matrix @ band).reshape(-1, width, 3)


def _levels(sums: npt.NDArray[np.float64]) -> Frames:
    """Sums as uint8: halves up, cut off at 0 and 255. Every step is exact."""
    sums += 0.5
    return np.clip(sums, 0, 255, out=sums).astype(np.uint8)


_FILTERS: dict[str, tuple[Weights, int, type[np.floating], Callable[[Frames, _Plan, Frames], None]]] = {
    "bilinear": (_triangle, ONE, np.float32, _bilinear),
    "bicubic": (_cubic, CUBIC_ONE, np.float64, _bicubic),
}
"""By name: the weights and their unit, the type of the matrices, and the two passes."""


def spatial(frames: Frames, contract: InputContract, side: Side = "middle") -> Frames:
    """Resize with antialias and crop, the centre by default; only the pixels that the crop needs are read.

    Args:
        frames: (N, H0, W0, 3) uint8, any strides.
        side: of the crop, for a view of an evaluation.

    Returns:
        (N, H, W, 3) uint8; a view where nothing is resized, and the argument itself where nothing is cropped either.
    """
    count, height, width, _ = frames.shape
    rows, columns, top, left = geometry(height, width, contract, side)
    if (rows, columns) == (height, width):
        if (height, width) == (contract.height, contract.width):
            return frames
        return frames[:, top : top + contract.height, left : left + contract.width]
    plan = _plan(height, width, contract, side)
    run = _FILTERS[contract.filter][3]
    out = np.empty((count, contract.height, contract.width, 3), np.uint8)
    for frame, target in zip(frames, out, strict=True):
        run(frame, plan, target)
    return out
