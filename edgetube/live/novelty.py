"""The novelty gate: no inference while the pixels that the model reads have not changed.

Most of what a fixed camera sees is still, and an unchanged clip has an unchanged answer. The gate compares a clip with
the last one that was answered, voxel by voxel, at the places that the model's tubes read. Each position of a tube is
judged on its own, so that a small mover in a large picture counts, and it is judged by the mean absolute difference of
at most `VOXELS` of its voxels, in which the noise of the sensor averages out to nearly the same number everywhere.
Compared is always with what was answered: a slow change adds up until it is seen.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from edgetube import strict
from edgetube.errors import FormatError, InputError
from edgetube.resize import Frames
from edgetube.spec import ModelSpec, Triple
from edgetube.voxels import boxes, placed

Voxels = npt.NDArray[np.uint8]

THRESHOLD = 4.0
"""Grey levels by which the voxels of one position of a tube differ, in the mean, where a clip has changed."""

REFRESH = 5.0
"""Seconds after which a clip is answered even if nothing has changed."""

VOXELS = 64
"""Voxels of one position of a tube that are compared, at most."""

BUDGET, LEAST = 1 << 16, 8
"""Voxels of a clip that are compared, about; of many positions at least so many each."""


class NoveltyGate:
    """Says for the clips of one source whether inference is needed. Not thread-safe: one for each source.

    Call `changed` before inference, and `answered` after each inference, with the same clip:

    >>> if gate.changed(clip.frames, clip.end):
    ...     answer = model(clip)
    ...     gate.answered(clip.frames, clip.end)

    Args:
        spec: of the model, whose tubes say which voxels count.
        skip_still: the threshold in grey levels, see `change`; True takes `THRESHOLD`.
        refresh_after: seconds of the source after which a clip counts as changed in any case.

    Raises:
        InputError: `skip_still` or `refresh_after` is no positive number.
    """

    def __init__(self, spec: ModelSpec, skip_still: float | bool = True, refresh_after: float = REFRESH) -> None:
        self.threshold = THRESHOLD if skip_still is True else _positive(skip_still, "skip_still (grey levels)", 255)
        self.refresh_after = _positive(refresh_after, "refresh_after (seconds)", 86400)
        self.shape = (*spec.clip, spec.channels)
        self._index, counts = _lattice(spec)
        self._first = np.cumsum([0, *counts[:-1]])  # of each position in the sampled voxels
        self._counts = np.array(counts, np.float64)
        self._last: Voxels | None = None
        self._at = -math.inf

    @property
    def compared(self) -> int:
        """Number of values that are compared in a clip."""
        return len(self._index)

    def changed(self, frames: Frames, seconds: float) -> bool:
        """Whether the clip whose window ends at `seconds` needs inference.

        It does if none was answered yet, if `refresh_after` seconds have passed since, if the clock went back, or if
        its `change` reaches the threshold.

        Args:
            frames: (T, H, W, 3) uint8, as the model takes them.

        Raises:
            InputError: frames of another shape or dtype.
        """
        values = self._values(frames)
        if self._last is None or not 0 <= seconds - self._at < self.refresh_after:
            return True
        return self._change(values) >= self.threshold

    def change(self, frames: Frames) -> float:
        """How far a clip differs from the last answered one, in grey levels; infinite before the first.

        It is the mean absolute difference over the sampled voxels of one position of a tube, the largest of all
        positions.
        """
        values = self._values(frames)
        return math.inf if self._last is None else self._change(values)

    def answered(self, frames: Frames, seconds: float) -> None:
        """Take a clip for the one that later ones are compared with."""
        self._last, self._at = self._values(frames), seconds

    def reset(self) -> None:
        """Forget what was answered: the source begins anew."""
        self._last, self._at = None, -math.inf

    def _change(self, values: Voxels) -> float:
        assert self._last is not None
        difference = np.maximum(values, self._last)
        difference -= np.minimum(values, self._last)
        sums = np.add.reduceat(difference, self._first, dtype=np.uint32)
        return float((sums / self._counts).max())

    def _values(self, frames: Frames) -> Voxels:
        """The voxels (compared,) of a clip; always read anew, because a window may fill one buffer again and again."""
        if frames.shape != self.shape or frames.dtype != np.uint8:
            raise InputError(f"the gate got frames {frames.shape} {frames.dtype}; expected {self.shape} uint8")
        return frames.reshape(-1).take(self._index)


def _positive(value: object, name: str, most: float) -> float:
    try:
        found = strict.number(value, name, 0, most)
    except FormatError as error:
        raise InputError(str(error)) from error
    if found == 0:
        raise InputError(f"{name} is 0; expected a number above 0")
    return found


def _lattice(spec: ModelSpec) -> tuple[npt.NDArray[np.intp], list[int]]:
    """Flat indices into (T, H, W, C) of the voxels to compare, position after position, and the number of each.

    The voxels of a position lie on a lattice in its kernel, as even as can be, one colour each: colours take turns.
    """
    tubes = [placed(spec, i) for i in spec.active]
    positions = [boxes(tube, spec.clip)[:, :, 0] for tube in tubes]  # (n, 3) first voxels
    most = min(VOXELS, max(LEAST, BUDGET // sum(map(len, positions))))
    parts, counts = [], []
    for tube, first in zip(tubes, positions, strict=True):
        inside = _inside(tube.kernel, most)  # (K, 3)
        at = first[:, None] + inside[None]  # (n, K, 3)
        flat = (at[..., 0] * spec.size[0] + at[..., 1]) * spec.size[1] + at[..., 2]
        parts.append((flat * spec.channels + np.arange(len(inside)) % spec.channels).ravel())
        counts += [len(inside)] * len(first)
    return np.concatenate(parts).astype(np.intp), counts


def _inside(kernel: Triple, most: int) -> npt.NDArray[np.int64]:
    """Places (K, 3) in a kernel, K <= most: those of a lattice that is coarser where the kernel is longer."""
    steps = [1, 1, 1]
    counts = list(kernel)
    while math.prod(counts) > most:
        axis = max(range(3), key=counts.__getitem__)
        steps[axis] += 1
        counts[axis] = -(-kernel[axis] // steps[axis])
    axes = [(step - 1) // 2 + step * np.arange(count) for step, count in zip(steps, counts, strict=True)]
    places = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    return np.asarray(np.minimum(places, np.array(kernel) - 1), np.int64)
