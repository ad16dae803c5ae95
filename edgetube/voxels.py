"""Which voxels of a clip the tubes of a model read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from edgetube.spec import ModelSpec, Triple, TubeSpec


def boxes(tube: TubeSpec, clip: Triple) -> npt.NDArray[np.int64]:
    """The voxels of every kernel position: (n, 3, 2) as (start, stop) along time, height and width.

    One box a token, times `tube.merge` with space-to-depth: each neighbour reads a box of its own.
    """
    starts = [
        (o + s * np.arange(g)[:, None] + step * np.arange(m)).ravel()
        for o, s, g, step, m in zip(
            tube.offset, tube.stride, tube.grid(clip), tube.conv_stride, tube.space_to_depth, strict=True
        )
    ]
    low = np.stack(np.meshgrid(*starts, indexing="ij"), axis=-1).reshape(-1, 3)
    return np.stack([low, low + tube.kernel], axis=-1).astype(np.int64)


def mask(tubes: Sequence[TubeSpec], clip: Triple) -> npt.NDArray[np.bool_]:
    """Which voxels the tubes read: (T, H, W) bool."""
    read = np.zeros(clip, bool)
    for tube in tubes:
        for (t0, t1), (h0, h1), (w0, w1) in boxes(tube, clip):
            read[t0:t1, h0:h1, w0:w1] = True
    return read


def touched(spec: ModelSpec) -> float:
    """The share of the clip's voxels, 0..1, that at least one active tube reads."""
    return float(mask([placed(spec, i) for i in spec.active], spec.clip).mean())


def placed(spec: ModelSpec, index: int) -> TubeSpec:
    """Tube `index` as it lies in the whole clip: a model of single frames reads every frame alike."""
    tube = spec.tubes[index]
    return replace(tube, stride=(1, *tube.stride[1:])) if spec.per_frame else tube
