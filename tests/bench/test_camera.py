"""Cameras that do not wait. What depends on how fast this machine is, is not asserted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import edgetube
from edgetube import bundle
from edgetube.bench import camera
from edgetube.errors import BackendError, InputError
from edgetube.video import Frames


@pytest.fixture
def rt(tiny_bundle: Path) -> Iterator[edgetube.Runtime]:
    with edgetube.Runtime(tiny_bundle, threads=1) as runtime:
        yield runtime


def check(found: dict[str, Any], **expected: Any) -> None:
    assert found | expected == found
    assert found["predictions"] > 0
    assert 0 < found["p50_ms"] <= found["p90_ms"] <= found["p99_ms"]
    assert 0 <= found["late"] <= found["predictions"]
    assert 0 <= found["late_frames"] <= found["frames"]
    assert 0 <= found["dropped_frames"] < found["frames"]
    assert 0 <= found["idle_share"] <= 1
    assert not [thread.name for thread in threading.enumerate() if "edgetube" in thread.name]


def test_a_camera_fills_a_clip_and_then_runs(rt: edgetube.Runtime) -> None:
    # 8 frames at 10 per second make the first clip.
    check(camera.pace(rt, fps=50.0, seconds=0.6, hop=1, size=(48, 64)), frames=70, due_ms=100, cameras=1, hop=1)


def test_several_cameras_share_the_runtime(rt: edgetube.Runtime) -> None:
    check(camera.pace(rt, fps=50.0, seconds=0.5, size=(48, 64), cameras=3), frames=195, due_ms=200, cameras=3, hop=2)


def test_a_stride_takes_frames_of_the_camera(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = bundle.load(tiny_bundle)
    strided = replace(found, contract=replace(found.contract, fps=None, sampling="stride", stride=4))
    digest = found.contract_digest()
    monkeypatch.setattr(bundle.Bundle, "contract_digest", lambda self: digest)
    with edgetube.Runtime(strided) as runtime:
        # 8 frames with stride 4 at 100 per second make the first clip; then a prediction every eighth frame.
        check(camera.pace(runtime, fps=100.0, seconds=0.5, hop=2, size=(48, 64)), frames=82, due_ms=80)


def test_a_runtime_that_fails_says_so(rt: edgetube.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(clips: Frames) -> npt.NDArray[np.float32]:
        raise BackendError("the device is lost")

    monkeypatch.setattr(rt._backend, "infer", broken)
    with pytest.raises(BackendError, match="the device is lost"):
        camera.pace(rt, fps=100.0, seconds=0.2, hop=1, size=(48, 64))


def test_no_cameras_are_refused(rt: edgetube.Runtime) -> None:
    with pytest.raises(InputError, match="cameras is 0"):
        camera.pace(rt, fps=100.0, seconds=0.2, cameras=0)


def test_a_frame_that_waits_longer_than_a_frame_lasts_is_late() -> None:
    with camera.Camera.pushed("a") as source:
        source.interval = -1.0
        source.push(np.zeros((4, 4, 3), np.uint8))
        assert source.read(5.0) is not None
        assert source.late == 1
        source.interval = 1e9
        source.push(np.zeros((4, 4, 3), np.uint8))
        assert source.read(5.0) is not None
        assert source.late == 1
