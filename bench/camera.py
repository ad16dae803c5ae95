"""A runtime behind a simulated camera, which delivers frames at a fixed rate.

A benchmark that calls in a loop keeps the processor's clock up and its caches warm; a camera leaves gaps between calls.
A runtime that is too slow for the camera also drops frames.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from edgetube import preprocess
from edgetube.contract import InputContract
from edgetube.runtime import Runtime
from edgetube.video import Frames

HELD = 4
"""Size of the camera driver's frame queue; when it is full, a new frame replaces the oldest."""


class Camera:
    """Frames at a fixed rate, in real time; an iterator of (seconds, frame (H, W, 3) uint8).

    Args:
        frames: (N, H, W, 3) uint8, shown in a loop.
        fps: frames per second.
        seconds: how long it runs.
        now, sleep: the clock; tests bring their own.

    Attributes:
        captured, read, dropped: frames so far; a dropped one left the queue before it was read.
        late: frames that were read more than one frame's time after they were captured.
        idle: seconds that the reader waited for a frame.
    """

    def __init__(
        self,
        frames: Frames,
        fps: float,
        seconds: float,
        now: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.frames, self.fps, self.total = frames, fps, round(seconds * fps)
        self.now, self.sleep = now, sleep
        self.captured = self.read = self.dropped = self.late = 0
        self.idle = 0.0
        self.begin = 0.0

    def age(self, seconds: float) -> float:
        """Seconds since the frame with that timestamp was captured."""
        return self.now() - self.begin - seconds

    def __iter__(self) -> Iterator[tuple[float, Frames]]:
        self.begin = self.now()
        following = 0  # frame k is captured at k / fps
        while following < self.total:
            elapsed = self.now() - self.begin
            oldest = int(elapsed * self.fps + 1e-9) - HELD + 1
            if oldest > following:
                self.dropped += min(oldest, self.total) - following
                following = oldest
                continue
            due = following / self.fps
            if due > elapsed:
                self.sleep(due - elapsed)
                self.idle += due - elapsed
            elif elapsed - due > 1 / self.fps:
                self.late += 1
            self.read += 1
            following += 1
            yield due, self.frames[(following - 1) % len(self.frames)]
        self.captured = self.total


def pace(
    runtime: Runtime,
    *,
    fps: float,
    seconds: float,
    hop: int | None = None,
    size: tuple[int, int] = (480, 640),
    clock: tuple[Callable[[], float], Callable[[float], None]] = (time.perf_counter, time.sleep),
) -> dict[str, Any]:
    """Run `Runtime.stream` on a camera of `fps` frames of `size` (height, width) for `seconds`.

    The time to fill the first clip comes on top. Latency is from the capture of a clip's newest frame to its
    prediction. A prediction is late when the next one was due before it arrived.

    Returns:
        The keys of `camera` in `docs/benchmarking.md`.
    """
    contract = runtime.contract
    rate = contract.rate(fps)
    hop = max(1, contract.frames // 4) if hop is None else hop
    source = Camera(enlarge(runtime.bundle.golden()[0][0], size), fps, seconds + contract.frames / rate, *clock)
    latencies: list[float] = []
    for prediction in runtime.stream(source, hop=hop, fps=fps):
        newest = (prediction.end or 0.0) - (1 / contract.fps if contract.fps else 0.0)
        latencies.append(source.age(newest) * 1e3)
    p50, p90, p99 = (float(v) for v in np.percentile(latencies, [50, 90, 99]))
    due = 1e3 * hop / rate
    return {
        "fps": fps,
        "hop": hop,
        "due_ms": due,
        "predictions": len(latencies),
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "late": sum(latency > due for latency in latencies),
        "frames": source.total,
        "late_frames": source.late,
        "dropped_frames": source.dropped,
        "idle_share": source.idle / (source.total / fps),
    }


def enlarge(clip: Frames, size: tuple[int, int]) -> Frames:
    """Resize a clip (T, H, W, 3) to the (height, width) of a camera."""
    return preprocess.prepare(clip, InputContract(len(clip), *size, resize="stretch"))
