"""A camera that does not wait: what is read, what is late, what is lost. Time is counted by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

import edgetube
from edgetube import bundle
from edgetube.bench import camera
from edgetube.video import Frames


class Clock:
    """A clock that moves when somebody sleeps or works."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def frames(count: int) -> Frames:
    return np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)


def test_a_fast_reader_gets_every_frame_on_time(clock: Clock) -> None:
    source = camera.Camera(frames(3), 10.0, 1.0, clock.now, clock.sleep)
    seen = []
    for seconds, frame in source:
        assert clock.now() - 100.0 == pytest.approx(seconds)
        seen.append(int(frame[0, 0, 0]))
        clock.sleep(0.03)
    assert seen == list(itertools.islice(itertools.cycle(range(3)), 10))
    assert (source.read, source.dropped, source.late) == (10, 0, 0)
    assert source.idle == pytest.approx(9 * 0.07)


def test_a_slow_reader_loses_what_the_buffer_cannot_hold(clock: Clock) -> None:
    """Read every 0.25 s at 10 fps: each time the oldest of the four newest frames, or the next one if that is newer."""
    source = camera.Camera(frames(100), 10.0, 5.0, clock.now, clock.sleep)
    read = []
    for seconds, _ in source:
        read.append(round(seconds * 10))
        clock.sleep(0.25)
    expected, following = [], 0
    for moment in itertools.count(0, 250):  # milliseconds; list what the driver of a camera that goes on holds then
        held = [k for k in range(200) if k * 100 <= moment][-camera.HELD :]
        following = next(k for k in held if k >= following) + 1
        if following > 50:
            break
        expected.append(following - 1)
    assert read == expected
    assert source.read + source.dropped == source.total == 50
    assert source.dropped > 20
    assert source.idle == 0
    assert source.late == sum(250 * i - 100 * k > 100 for i, k in enumerate(read))


def test_a_runtime_that_keeps_up_is_never_late(tiny_bundle: Path, clock: Clock) -> None:
    with edgetube.Runtime(tiny_bundle) as rt:
        found = camera.pace(rt, fps=20.0, seconds=3.0, hop=5, size=(48, 64), clock=(clock.now, clock.sleep))
    # 8 frames at 10 per second make the first clip; then 3 s with a prediction every half second.
    assert (found["frames"], found["predictions"], found["due_ms"]) == (76, 7, 500)
    assert (found["late"], found["late_frames"], found["dropped_frames"]) == (0, 0, 0)
    assert found["p99_ms"] == pytest.approx(0, abs=1e-6)
    assert found["idle_share"] == pytest.approx(75 / 76)


def test_a_stride_takes_frames_of_the_camera(tiny_bundle: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    found = bundle.load(tiny_bundle)
    strided = replace(found, contract=replace(found.contract, fps=None, sampling="stride", stride=4))
    digest = found.contract_digest()
    monkeypatch.setattr(bundle.Bundle, "contract_digest", lambda self: digest)
    with edgetube.Runtime(strided) as rt:
        paced = camera.pace(rt, fps=20.0, seconds=3.0, hop=2, size=(48, 64), clock=(clock.now, clock.sleep))
    # 8 frames with stride 4 at 20 per second make the first clip; then 3 s with a prediction every eighth frame.
    assert (paced["frames"], paced["due_ms"]) == (92, 400)
    assert paced["predictions"] == 1 + (91 - 28) // 8
    assert paced["p99_ms"] == pytest.approx(0, abs=1e-6)
    assert (paced["late"], paced["dropped_frames"]) == (0, 0)


def test_a_runtime_that_is_too_slow_answers_late_and_loses_frames(tiny_bundle: Path, clock: Clock) -> None:
    with edgetube.Runtime(tiny_bundle) as rt:
        backend = rt._backend

        def slow(clips: Frames) -> npt.NDArray[np.float32]:
            clock.sleep(1.0)
            return backend(clips)

        rt._backend = cast(Any, slow)
        found = camera.pace(rt, fps=20.0, seconds=6.0, hop=5, size=(48, 64), clock=(clock.now, clock.sleep))
        rt._backend = backend
    assert found["late"] == found["predictions"] > 0
    assert found["p50_ms"] >= 1000
    assert found["dropped_frames"] > 0.3 * found["frames"]
