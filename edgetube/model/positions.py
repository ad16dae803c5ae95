"""The fixed position embedding (TubeViT, equations 3-7): a function of the tubes' centres, without learned weights."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgetube.spec import ModelSpec, TubeSpec

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
