"""Sources end, fail, stall and come back as scripted; nothing here depends on how fast the machine is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetube import demo, video
from edgetube.errors import InputError
from edgetube.live.frame import Frame
from edgetube.live.source import Ended, FrameSource, delays

PATIENCE_S = 20.0
"""Seconds after which a test that waits has failed."""


def picture(value: int = 0, height: int = 4, width: int = 6) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def drain(source: FrameSource) -> list[Frame]:
    """All of its frames, to its end."""
    found = []
    try:
        while (frame := source.read(PATIENCE_S)) is not None:
            found.append(frame)
    except Ended:
        return found
    raise AssertionError(f"{source} neither gave a frame nor ended")


def values(frames: list[Frame]) -> list[int]:
    return [int(frame.pixels[0, 0, 0]) for frame in frames]


def test_an_iterator_gives_all_of_its_frames_in_order() -> None:
    with FrameSource((picture(i) for i in range(50)), fps=25, capacity=2) as source:
        found = drain(source)
        assert values(found) == list(range(50)) == [frame.number for frame in found]
        assert [frame.seconds for frame in found] == [i / 25 for i in range(50)]
        assert not source.is_live
        assert source.policy == "all"
        assert source.error is None
        assert source.state == "closed"
        assert {frame.restarted for frame in found} == {None}


def test_frames_are_copied_as_they_come() -> None:
    buffer = picture()

    def camera() -> Iterator[np.ndarray]:
        for i in range(10):
            buffer[:] = i
            yield buffer

    with FrameSource(camera()) as source:
        assert values(drain(source)) == list(range(10))


def test_a_source_that_waits_never_drops() -> None:
    came: list[int] = []

    def frames() -> Iterator[np.ndarray]:
        for i in range(20):
            came.append(i)
            yield picture(i)

    with FrameSource(frames(), capacity=3) as source:
        assert values([source.read(PATIENCE_S) or pytest.fail("nothing came") for _ in range(5)]) == list(range(5))
        assert len(came) <= 5 + 3 + 1  # read, waiting, and the one for which there is no room
        assert values(drain(source)) == list(range(5, 20))
        assert not source.ledger.account().dropped


def test_what_is_live_drops_its_oldest_and_says_so_in_the_next() -> None:
    with FrameSource.pushed("porch", capacity=3) as source:
        for i in range(7):
            source.push(picture(i), i / 10)
        found = [source.read(0) for _ in range(4)]
        assert values([frame for frame in found if frame]) == [4, 5, 6]
        assert found[3] is None
        assert found[0]
        assert found[0].restarted
        assert "left out" in found[0].restarted
        assert found[1]
        assert found[1].restarted is None
        assert source.ledger.account().dropped == {"overrun": 4}


def test_the_error_of_an_iterator_comes_after_its_frames() -> None:
    def broken() -> Iterator[np.ndarray]:
        yield picture(1)
        raise OSError("the cable is out")

    with FrameSource(broken(), name="bench") as source:
        assert source.read(PATIENCE_S)
        for _ in range(2):
            with pytest.raises(InputError, match="bench failed: OSError: the cable is out"):
                source.read(PATIENCE_S)
        assert source.state == "closed"
        assert isinstance(source.error, InputError)


def test_a_closed_source_drops_what_waits() -> None:
    source = FrameSource.pushed("porch")
    source.push(picture())
    source.close()
    source.close()
    source.push(picture())
    with pytest.raises(Ended):
        source.read(0)
    account = source.ledger.account()
    assert (account.captured, account.waiting, account.dropped) == (2, 0, {"closed": 2})


def test_states_are_told_in_order_and_until_unsubscribed() -> None:
    stalled = threading.Event()
    with FrameSource.pushed("porch", stall_after=0.05) as source:
        told: list[str] = [source.state]

        def tell(state: str, why: str) -> None:
            told.append(state)
            if state == "stalled":
                stalled.set()

        unsubscribe = source.subscribe(tell)
        source.push(picture())
        assert stalled.wait(PATIENCE_S)
        assert source.state == "stalled"
        source.push(picture())
        unsubscribe()
    assert told[:4] == ["connecting", "live", "stalled", "live"]
    assert "closed" not in told
    assert repr(source) == "<FrameSource porch: closed>"


@pytest.mark.parametrize("stamp", [float("nan"), float("inf"), "now", 1e15])
def test_times_that_are_none_are_refused(stamp: Any) -> None:
    with FrameSource.pushed("porch") as source:
        with pytest.raises(InputError, match="captured_at of the frame pushed to porch"):
            source.push(picture(), stamp)
        assert source.ledger.account().captured == 0


def test_a_file_is_read_to_its_end() -> None:
    path = Path(demo.__file__).parent / "videos" / "tilt-up.mp4"
    with FrameSource(path) as source:
        for frame, (seconds, pixels) in zip(drain(source), video.frames(path), strict=True):
            assert frame.seconds == seconds
            assert np.array_equal(frame.pixels, pixels)


def test_a_lost_camera_is_tried_at_least_twice_a_second() -> None:
    assert list(islice(delays(lambda: 0.0), 6)) == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5, 0.5])
    assert list(islice(delays(lambda: 0.999), 4)) == pytest.approx([0.05, 0.1, 0.2, 0.25], rel=0.01)


def test_what_is_left_out_hides_no_new_size() -> None:
    """Frames 0 to 2 are read late; the frame that is another size is left out, its neighbours are not."""
    with FrameSource.pushed("door", capacity=1) as source:
        for i, side in enumerate((8, 8, 16, 16)):
            source.push(np.zeros((side, side, 3), np.uint8), i / 10)
        frame = source.read(0)
        assert frame is not None
        assert frame.number == 3
        assert "its size changed" in (frame.restarted or "")
        assert not frame.gap
        for i in (4, 5):
            source.push(np.zeros((16, 16, 3), np.uint8), i / 10)
        frame = source.read(0)
        assert frame is not None
        assert "were left out" in (frame.restarted or "")
        assert frame.gap
