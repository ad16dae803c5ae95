"""Sliding windows: frames as a camera delivers them become clips as the model wants them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from edgetube import preprocess
from edgetube.errors import InputError
from edgetube.spec import InputContract
from edgetube.video import Clip, Frames

TimedFrame = tuple[float, Frames]
"""(seconds, frame (H, W, 3) uint8)."""


def timed(frames: Iterable[Any], fps: float | None) -> Iterator[TimedFrame]:
    """Give bare frames a clock: frame i is shown at i / fps; (seconds, frame) pairs pass as they are."""
    for i, item in enumerate(frames):
        yield item if isinstance(item, tuple) else (i / (fps or 1.0), item)


def windows(
    frames: Iterable[TimedFrame], contract: InputContract, hop: int | None = None
) -> Iterator[tuple[float, Clip]]:
    """Clips of the last T frames at the contract's rate, one every `hop` frames once T have come.

    Frames are resampled by holding: the frame of time t is the last one shown at or before t, so a slow camera
    repeats frames and a fast one skips them. Each frame is resized once. Memory is one clip.

    Yields:
        (arrival of the newest frame on the `time.perf_counter` clock, clip). A source that ends before T frames
        gives one clip, its last frame repeated.

    Raises:
        InputError: hop < 1, or a source without frames.
    """
    hop = max(1, contract.frames // 4) if hop is None else hop
    if hop < 1:
        raise InputError(f"hop is {hop}; expected >= 1 frame")
    held: deque[TimedFrame] = deque(maxlen=contract.frames)
    arrived, count = time.perf_counter(), 0
    for seconds, frame in ticks(frames, contract):
        arrived = time.perf_counter()
        held.append((seconds, frame))
        count += 1
        if count >= contract.frames and (count - contract.frames) % hop == 0:
            yield arrived, _clip(held, contract)
    if not held:
        raise InputError("the source ended without a frame")
    if count < contract.frames:
        held.extend([held[-1]] * (contract.frames - count))
        yield arrived, _clip(held, contract)


def ticks(frames: Iterable[TimedFrame], contract: InputContract) -> Iterator[TimedFrame]:
    """Frames at the contract's rate and size: (seconds, (H, W, 3)); every frame when the contract has no rate."""
    shown: Frames | None = None
    for seconds, frame in preprocess.resample(frames, contract.fps):
        if frame is not shown:
            shown, resized = frame, _resize(frame, contract)
        yield seconds, resized


def _resize(frame: Frames, contract: InputContract) -> Frames:
    frame = np.asarray(frame)
    if frame.ndim != 3:
        raise InputError(f"a frame of the stream has shape {frame.shape}; expected (height, width, 3) uint8")
    resized: Frames = preprocess.spatial(frame[None], contract)[0]
    return resized


def _clip(held: deque[TimedFrame], contract: InputContract) -> Clip:
    start, end = held[0][0], held[-1][0] + (1 / contract.fps if contract.fps else 0.0)
    return Clip(f"{start:.3f}s", np.stack([frame for _, frame in held]), start=start, end=end)
