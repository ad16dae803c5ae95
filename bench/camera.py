"""A runtime behind simulated cameras, which deliver frames at a fixed rate.

A benchmark that calls in a loop keeps the processor's clock up and its caches warm; a camera leaves gaps between calls.
A runtime that is too slow for its cameras also loses frames.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetube import preprocess
from edgetube.contract import InputContract
from edgetube.errors import BackendError
from edgetube.live.cameras import Cameras
from edgetube.live.frame import Frame
from edgetube.live.source import FrameSource
from edgetube.live.window import step
from edgetube.resize import Frames
from edgetube.runtime import Runtime
from edgetube.spec import Prediction

DRAIN_S = 2.0
"""Seconds that the last frames may take to be read."""

NOT_LOST = frozenset(("sampling", "closed"))
"""Causes of dropped frames that say nothing about speed."""


class Camera(FrameSource):
    """A source that frames are pushed into.

    Attributes:
        late: frames that were read more than `interval` seconds after they came.
    """

    interval = float("inf")
    late = 0

    def read(self, timeout: float | None = None) -> Frame | None:
        frame = super().read(timeout)
        if frame is not None:
            self.late += time.monotonic() - frame.captured_at > self.interval
        return frame


class Busy:
    """A runtime that counts the seconds in which it is called at all."""

    def __init__(self, runtime: Runtime) -> None:
        self.contract, self.labels, self.batch = runtime.contract, runtime.labels, runtime.batch
        self.parallel_calls = runtime.parallel_calls
        self.seconds = 0.0
        self._runtime = runtime
        self._lock = threading.Lock()
        self._calls = 0
        self._began = 0.0

    def __call__(self, clips: npt.ArrayLike) -> npt.NDArray[np.float32]:
        with self._lock:
            self._calls += 1
            if self._calls == 1:
                self._began = time.monotonic()
        try:
            return self._runtime(clips)
        finally:
            with self._lock:
                self._calls -= 1
                if not self._calls:
                    self.seconds += time.monotonic() - self._began


def pace(
    runtime: Runtime,
    *,
    fps: float,
    seconds: float,
    hop: int | None = None,
    size: tuple[int, int] = (480, 640),
    cameras: int = 1,
) -> dict[str, Any]:
    """Run `edgetube.Cameras` on cameras of `fps` frames of `size` (height, width) for `seconds`.

    The time to fill the first clip comes on top. The frames of several cameras come evenly one after the other.
    Latency is from the arrival of a clip's newest frame to its prediction. A prediction is late when the next one was
    due before it arrived.

    Returns:
        The keys of `camera` in `docs/benchmarking.md`.

    Raises:
        BackendError: the runtime failed, or gave no answer.
    """
    contract = runtime.contract
    rate = contract.rate(fps)
    hop = step(hop, contract).frames
    total = round((seconds + contract.frames / rate) * fps)
    frames = enlarge(runtime.bundle.golden()[0][0], size)
    answers: list[Prediction] = []
    errors: list[BaseException] = []
    busy = Busy(runtime)
    sources = [Camera.pushed(f"camera {i}") for i in range(preprocess.count_of(cameras, "cameras"))]
    callbacks: dict[str, Any] = {"on_prediction": answers.append, "on_error": lambda _, error: errors.append(error)}
    try:
        with Cameras(busy, {source.name: source for source in sources}, hop=hop, **callbacks):
            took = _show(sources, frames, fps, total)
    finally:
        for source in sources:
            source.close()
    if errors:
        raise errors[0]
    if not answers:
        raise BackendError(f"no answer within {took:.1f} s: give --camera-seconds more")
    ages = np.array([answer.age_ms for answer in answers])
    dropped = [source.ledger.account().dropped for source in sources]
    p50, p90, p99 = (float(v) for v in np.percentile(ages, [50, 90, 99]))
    due = 1e3 * hop / rate
    return {
        "fps": fps,
        "cameras": len(sources),
        "hop": hop,
        "due_ms": due,
        "predictions": len(answers),
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "late": int((ages > due).sum()),
        "frames": total * len(sources),
        "late_frames": sum(source.late for source in sources),
        "dropped_frames": sum(n for causes in dropped for cause, n in causes.items() if cause not in NOT_LOST),
        "idle_share": max(0.0, 1 - busy.seconds / took),
    }


def _show(sources: Sequence[Camera], frames: Frames, fps: float, total: int) -> float:
    """Push frames (N, H, W, 3) in a loop, `total` into each source, in real time; returns the seconds that it took."""
    began = time.monotonic()
    for source in sources:
        source.interval = 1 / fps
    for number in range(total):
        for i, source in enumerate(sources):
            due = began + (number + i / len(sources)) / fps
            time.sleep(max(0.0, due - time.monotonic()))
            source.push(frames[number % len(frames)], number / fps)
    until = time.monotonic() + DRAIN_S
    # The newest frame of each waits for the one after it.
    while any(source.ledger.account().waiting > 1 for source in sources) and time.monotonic() < until:
        time.sleep(1 / fps)
    return time.monotonic() - began


def enlarge(clip: Frames, size: tuple[int, int]) -> Frames:
    """Resize a clip (T, H, W, 3) to the (height, width) of a camera."""
    return preprocess.prepare(clip, InputContract(len(clip), *size, resize="stretch"))
