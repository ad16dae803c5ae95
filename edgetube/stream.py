"""Sliding windows: turns a stream of frames into clips for the model."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import groupby, islice

import numpy as np

from edgetube import preprocess, resize
from edgetube.contract import InputContract
from edgetube.errors import InputError, InputWarning
from edgetube.live.feeds import timed as timed
from edgetube.video import Clip, Frames

TimedFrame = tuple[float, Frames]
"""(seconds, frame (H, W, 3) uint8)."""

MAX_GAP = 10.0
"""Seconds that a frame is held at most. After a longer gap the window starts again."""

MAX_LATE = 4
"""Frames in a row that may be out of order. With one more the clock was set back, and the window starts again."""


def check(contract: InputContract) -> None:
    """Check that a window can slide over the frames that a model takes.

    Raises:
        InputError: they are spread over a whole video, and a stream has no end.
    """
    if contract.sampling == "segments":
        raise InputError(
            f"this model samples {contract.frames} segments of a whole video; no window of a stream or a camera can be "
            "classified: give it whole files, with predict, or with edgetube run without --stream"
        )


def windows(
    frames: Iterable[TimedFrame], contract: InputContract, hop: int | None = None
) -> Iterator[tuple[float, Clip]]:
    """Clips of the last T frames that sampling takes, one every `hop` of these frames once T have come.

    Frames are resampled to the contract's rate by holding: the frame of time t is the last one shown at or before t,
    so a slow camera repeats frames and a fast one skips them. With a stride every `stride`-th frame is taken, whatever
    the clock says, so a hop is `hop * stride` frames of the source. Each frame is resized once. Memory is one clip.

    A contract with a rate needs a steady clock. A frame that is earlier than one before it is left out. Where the
    clock leaps by more than `MAX_GAP` seconds, or is set back (more than `MAX_LATE` such frames in a row), the window
    starts again: no clip holds frames of both sides. The first leap is an `InputWarning`.

    Args:
        frames: (seconds, frame); a frame must not change afterwards.

    Yields:
        (arrival of the newest frame on the `time.perf_counter` clock, clip). A source that ends before its first
        full clip gives one clip, its last frame repeated.

    Raises:
        InputError: hop < 1, a source without frames, or a model that samples segments.
    """
    check(contract)
    hop = max(1, contract.frames // 4) if hop is None else preprocess.count_of(hop, "hop")
    return _windows(frames, contract, hop)


def _windows(frames: Iterable[TimedFrame], contract: InputContract, hop: int) -> Iterator[tuple[float, Clip]]:
    held: deque[TimedFrame] = deque(maxlen=contract.frames)
    arrived, given = time.perf_counter(), False
    for _, span in groupby(_spans(frames, contract), key=lambda item: item[0]):
        held.clear()
        for count, (seconds, frame) in enumerate(ticks((item for _, item in span), contract), 1):
            arrived = time.perf_counter()
            held.append((seconds, frame))
            if count >= contract.frames and (count - contract.frames) % hop == 0:
                given = True
                yield arrived, _clip(held, contract)
    if not held:
        raise InputError("the source ended without a frame")
    if not given:
        held.extend([held[-1]] * (contract.frames - len(held)))
        yield arrived, _clip(held, contract)


def _spans(frames: Iterable[TimedFrame], contract: InputContract) -> Iterator[tuple[int, TimedFrame]]:
    """Each frame with the number of its span of steady clock; frames out of order are dropped."""
    span, late, newest = 0, 0, None
    for item in frames:
        now = item[0]
        if newest is not None and contract.fps is not None:
            late = late + 1 if now < newest else 0
            if 0 < late <= MAX_LATE:
                continue
            if late or now - newest > MAX_GAP:
                if not span:
                    leap = f"the clock of the stream leaps from {newest:.3f} s to {now:.3f} s"
                    warnings.warn(f"{leap}: the window starts anew", InputWarning, stacklevel=2)
                span, late = span + 1, 0
        newest = now
        yield span, item


def ticks(frames: Iterable[TimedFrame], contract: InputContract) -> Iterator[TimedFrame]:
    """The frames that sampling takes, at the contract's size: (seconds, (H, W, 3))."""
    shown: Frames | None = None
    for seconds, frame in islice(preprocess.resample(frames, contract.fps), 0, None, contract.stride):
        if frame is not shown:
            shown, resized = frame, resize.spatial(frame[None], contract)[0]
        yield seconds, resized


def _clip(held: deque[TimedFrame], contract: InputContract) -> Clip:
    start, end = held[0][0], held[-1][0] + (1 / contract.fps if contract.fps else 0.0)
    return Clip(f"{start:.3f}s", np.stack([frame for _, frame in held]), start=start, end=end)
