"""Positions: fixed ones (TubeViT, equations 3-7), rotary tables, stored tables at another clip, anchored ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from edgetube.errors import SpecError
from edgetube.spec import AXES, ModelSpec, Triple, TubeSpec

FloatArray = npt.NDArray[np.float64]


def centres(tube: TubeSpec, grid: tuple[int, int, int]) -> FloatArray:
    """Centre of every token of `tube`, in voxels of the clip: (tokens, 3) as (t, y, x), row-major over the grid.

    The mean index of the voxels that the token spans: `offset + stride * i + (extent - 1) / 2`. A 1-frame tube
    at time 0 sits at exactly t = 0, so an image and the first frame of a clip have the same positions.
    """
    axes = [
        o + s * np.arange(n) + (e - 1) / 2
        for o, s, n, e in zip(tube.offset, tube.stride, grid, tube.extent, strict=True)
    ]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


def embed(points: FloatArray, width: int) -> FloatArray:
    """Position embedding of points (N, 3) given as (t, y, x): (N, width), float64.

    omega_j = 10000 ** (-j / (d / 6)) for j = 0 .. d // 6 - 1; channels 6j .. 6j + 5 hold
    sin t*w, cos t*w, sin x*w, cos x*w, sin y*w, cos y*w. When 6 does not divide d the channels that are left
    over stay zero: those features are untouched by position.
    """
    count = width // 6
    omega = 10000.0 ** (-np.arange(count) / (width / 6))
    t, y, x = (points[:, axis, None] * omega for axis in range(3))  # each (N, d // 6)
    table = np.zeros((len(points), width))
    waves = np.stack([np.sin(t), np.cos(t), np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=-1)  # (N, d//6, 6)
    table[:, : 6 * count] = waves.reshape(len(points), -1)
    return table


def table(spec: ModelSpec) -> FloatArray:
    """Position embedding of every token of `spec`, in token order: (N, width), float64."""
    points = [centres(spec.tubes[i], grid) for i, grid in zip(spec.active, spec.grids, strict=True)]
    return embed(np.concatenate(points), spec.width)


def anchored(spec: ModelSpec) -> tuple[FloatArray, FloatArray]:
    """What anchored positions are made of, `sampling @ grid + scale * waves`, in token order.

    Returns:
        sampling: (N, places), bilinear at the tokens' centres, in strides of the 2-D tube; beyond the grid its edge.
        waves: (N, width), p(t) - p(0) of the fixed embedding.
    """
    points = np.concatenate([centres(spec.tubes[i], grid) for i, grid in zip(spec.active, spec.grids, strict=True)])
    sampling = np.ones((len(points), 1))
    for axis, count in zip((1, 2), spec.places, strict=True):
        origin = spec.anchor.offset[axis] + (spec.anchor.extent[axis] - 1) / 2
        at = np.clip((points[:, axis] - origin) / spec.anchor.stride[axis], 0, count - 1)
        hats = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(count)))  # (N, count)
        sampling = (sampling[:, :, None] * hats[:, None, :]).reshape(len(points), -1)
    times = points * [1, 0, 0]
    return sampling, embed(times, spec.width) - embed(0 * times, spec.width)


def resized_grid(grid: Tensor, old: ModelSpec, new: ModelSpec) -> Tensor:
    """The learned grid (places, D) of anchored positions at another size, by `new.position_resize`.

    Raises:
        SpecError: it has no rule for another size.
    """
    return _resize(grid.reshape(1, *old.places, -1), (1, *new.places), new).flatten(0, 2)


def rotation(spec: ModelSpec) -> FloatArray:
    """Cosines and sines of the rotary positions of `spec`: (2, P + N, D / heads), float64; see `edgetube.spec.Rotary`.

    Prefix tokens have cosine 1 and sine 0.
    """
    rotary, head = spec.rotary, spec.width // spec.heads
    assert rotary is not None
    pairs = head // 2 // len(rotary.axes)
    j = np.arange(pairs)
    order = (j, j) if rotary.frequencies == "pairs" else (2 * j % pairs, (2 * j + 1) % pairs)
    (grid,) = spec.grids
    angles = np.zeros((spec.sequence, 2, head // 2))  # of the first and the second partner of each pair
    places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1).reshape(-1, 3)  # (N, 3)
    for place, name in enumerate(rotary.axes):
        axis = AXES.index(name)
        c = places[:, axis, None].astype(np.float64)
        if rotary.coordinates == "centred":
            c = 2 * np.pi * ((c + 0.5) / grid[axis] * 2 - 1)
        for half in (0, 1):
            angles[spec.prefix :, half, place * pairs : (place + 1) * pairs] = c * rotary.base ** (-order[half] / pairs)
    flat = angles.reshape(spec.sequence, head)
    return np.stack([np.cos(flat), np.sin(flat)])


def resized(table: Tensor, old: ModelSpec, new: ModelSpec) -> Tensor:
    """A stored position table (N, D) of the spec `old` for the clip of `new`: (N', D).

    For each tube: over height and width by `new.position_resize`, over time linearly (both with half-pixel centres);
    by "nearest" over all three, i of n' taking floor(i n / n'). A grid that stays as it is keeps its rows exactly; an
    image takes the rows of its tubes at time 0.

    Raises:
        SpecError: the grids differ and the table has no rule for another one.
    """
    rows, at = {}, 0
    for i, grid in zip(old.active, old.grids, strict=True):
        rows[i] = table[at : at + math.prod(grid)].reshape(*grid, -1)
        at += math.prod(grid)
    parts = []
    for i, grid in zip(new.active, new.grids, strict=True):
        part = rows[i][:1] if new.encoded[0] == 1 else rows[i]
        parts.append(_resize(part, grid, new).flatten(0, 2))
    return torch.cat(parts)


def _resize(part: Tensor, grid: Triple, spec: ModelSpec) -> Tensor:
    """One tube's rows (t, h, w, D) at another grid."""
    if tuple(part.shape[:3]) == grid:
        return part
    if spec.position_resize == "none":
        raise SpecError(f"the stored positions are for a grid {tuple(part.shape[:3])} of tokens, not for {grid}")
    x, nearest = part.permute(0, 3, 1, 2).float(), spec.position_resize == "nearest"  # (t, D, h, w)
    if tuple(x.shape[2:]) != grid[1:]:
        mode, _, antialias = spec.position_resize.partition("-")
        centres = None if nearest else False
        x = F.interpolate(x, size=grid[1:], mode=mode, align_corners=centres, antialias=bool(antialias))
    if x.shape[0] != grid[0]:
        series = x.flatten(1).T.unsqueeze(0)  # (1, D h w, t)
        how: dict[str, Any] = {"mode": "nearest"} if nearest else {"mode": "linear", "align_corners": False}
        x = F.interpolate(series, size=grid[0], **how)[0].T.unflatten(1, x.shape[1:])
    return x.permute(0, 2, 3, 1)
