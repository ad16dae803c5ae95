"""The health of a stream of frames: rate, drift, and frames that are missing or shown twice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgetube.live.frame import Frame

Floats = npt.NDArray[np.float64]

GAP = 1.5
"""A frame is missing where an interval is longer than this multiple of the median interval."""

STILL, MOVING, AROUND = 0.1, 0.5, 12
"""A frame is a duplicate if it changes by at most `STILL` of the median change of the `AROUND` frames on either side,
which is at least `MOVING` grey levels."""

STEP = 8
"""Stride of the pixels that are compared to see whether a frame changed."""

MOST = 255.0
"""Grey levels by which a frame changes whose size is another."""

ENDS = 4
"""The drift compares the rates of the first and the last of this many parts of the video."""


@dataclass(frozen=True)
class Gap:
    """`frames` frames are missing behind the one at second `at`."""

    at: float
    frames: int


@dataclass(frozen=True)
class Health:
    """Defects of a stream of frames.

    Attributes:
        frames, seconds: how many came, and from the first timestamp to the last.
        fps: frames per second, missing ones left out; 0 for a single frame.
        fps_drift_percent: change of that rate from the first to the last quarter of the frames.
        dropped: frames that are missing, by the gaps between timestamps.
        duplicated: frames that show what the one before them shows, while what is around them moves.
        gaps: where frames are missing.
    """

    frames: int
    seconds: float
    fps: float
    fps_drift_percent: float
    dropped: int
    duplicated: int
    gaps: tuple[Gap, ...]


class Watch:
    """Records the time and the change of each frame."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.changes: list[float] = []
        self._previous: npt.NDArray[np.int16] | None = None

    def see(self, frame: Frame) -> None:
        """The next frame."""
        sample = frame.pixels[::STEP, ::STEP].astype(np.int16)
        if self._previous is not None and self._previous.shape == sample.shape:
            self.changes.append(float(np.abs(sample - self._previous).mean()))
        elif self._previous is not None:
            self.changes.append(MOST)
        self._previous = sample
        self.times.append(frame.seconds)

    def health(self) -> Health:
        """The health of the stream, after all frames have passed."""
        return health(np.array(self.times), np.array(self.changes))


def health(times: Floats, changes: Floats) -> Health:
    """The health of a stream.

    Args:
        times: (N,) seconds of each frame.
        changes: (N - 1,) mean absolute change of each frame from the one before it, in grey levels.
    """
    if len(times) < 2:
        return Health(len(times), 0.0, 0.0, 0.0, 0, 0, ())
    steps = np.diff(times)
    usual = float(np.median(steps))
    missing = np.where(steps > GAP * usual, np.rint(steps / usual).astype(int) - 1, 0)
    whole = steps[missing == 0]
    part = max(1, len(whole) // ENDS)
    drift = 100 * (float(whole[:part].mean()) / float(whole[-part:].mean()) - 1)
    gaps = tuple(Gap(float(times[i]), int(missing[i])) for i in np.flatnonzero(missing))
    return Health(
        frames=len(times),
        seconds=float(times[-1] - times[0]),
        fps=1 / float(whole.mean()),
        fps_drift_percent=drift,
        dropped=int(missing.sum()),
        duplicated=_repeated(changes),
        gaps=gaps,
    )


def _repeated(changes: Floats) -> int:
    """Number of frames that do not change while their neighbours do."""
    around = np.pad(changes, AROUND, mode="reflect" if len(changes) > AROUND else "edge")
    usual = np.median(np.lib.stride_tricks.sliding_window_view(around, 2 * AROUND + 1), axis=1)
    return int(((usual >= MOVING) & (changes <= STILL * usual)).sum())
