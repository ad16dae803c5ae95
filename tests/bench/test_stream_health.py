"""Drops, repeats and drift of made-up streams."""

from __future__ import annotations

import numpy as np
import pytest

from edgetube.bench import stream_health
from edgetube.live.frame import Frame


def test_a_steady_stream_is_sound() -> None:
    times = np.arange(300) / 29.97
    times = np.round(times, 3)  # as a container in milliseconds has them
    got = stream_health.health(times, np.full(299, 4.0))
    assert (got.frames, got.dropped, got.duplicated, got.gaps) == (300, 0, 0, ())
    assert got.fps == pytest.approx(29.97, rel=1e-3)
    assert abs(got.fps_drift_percent) < 0.2


def test_dropped_frames_are_counted_where_they_are() -> None:
    times = np.delete(np.arange(100) / 25, [40, 41, 70])
    got = stream_health.health(times, np.full(len(times) - 1, 4.0))
    assert got.dropped == 3
    assert [gap.frames for gap in got.gaps] == [2, 1]
    assert [gap.at for gap in got.gaps] == pytest.approx([39 / 25, 69 / 25])
    assert got.fps == pytest.approx(25)


def test_a_clock_that_slows_down_is_a_drift() -> None:
    steps = np.linspace(1 / 30, 1 / 27, 400)
    got = stream_health.health(np.concatenate([[0], np.cumsum(steps)]), np.full(400, 4.0))
    first, last = steps[:100].mean(), steps[-100:].mean()
    assert got.fps_drift_percent == pytest.approx(100 * (first / last - 1))
    assert got.fps_drift_percent < -5
    assert got.dropped == 0


def test_repeated_frames_are_counted_while_the_picture_moves(rng: np.random.Generator) -> None:
    moving = rng.uniform(3, 5, 100)
    moving[[20, 60, 61]] = 0.01
    times = np.arange(101) / 25
    assert stream_health.health(times, moving).duplicated == 3
    assert stream_health.health(times, np.zeros(100)).duplicated == 0, "a still scene repeats nothing"


@pytest.mark.parametrize(("interval", "dropped"), [(1.5, 0), (1.6, 1), (2.4, 1), (2.6, 2)])
def test_an_interval_of_more_than_one_and_a_half_lost_a_frame(interval: float, dropped: int) -> None:
    times = np.cumsum([10.0, 1, 1, interval, 1, 1])
    got = stream_health.health(times, np.full(5, 4.0))
    assert (got.dropped, sum(gap.frames for gap in got.gaps)) == (dropped, dropped)
    assert got.seconds == pytest.approx(4 + interval)
    assert got.fps == pytest.approx(1.0 if dropped else 5 / (4 + interval))
    assert [gap.at for gap in got.gaps] == ([12.0] if dropped else [])


def test_the_drift_of_a_few_frames_is_that_of_the_first_interval_to_the_last() -> None:
    assert stream_health.health(np.array([0.0, 1.0, 2.25]), np.full(2, 4.0)).fps_drift_percent == pytest.approx(-20)


@pytest.mark.parametrize(
    ("usual", "one", "repeated"), [(0.5, 0.05, 1), (0.49, 0.04, 0), (0.5, 0.06, 0), (8.0, 0.8, 1), (8.0, 0.81, 0)]
)
def test_a_repeated_frame_changes_by_a_tenth_of_half_a_level_at_least(usual: float, one: float, repeated: int) -> None:
    changes = np.full(60, usual)
    changes[30] = one
    assert stream_health.health(np.arange(61.0), changes).duplicated == repeated


@pytest.mark.parametrize("count", [1, 2, 12, 13, 14, 40, 100])
def test_what_is_usual_is_the_median_of_the_frames_around(count: int, rng: np.random.Generator) -> None:
    """Counted in a loop; a stream goes on behind its ends as in a mirror, a very short one as it ends."""
    for _ in range(20):
        changes = rng.choice([0.001, 0.3, 0.6, 5.0], count, p=[0.4, 0.1, 0.2, 0.3])
        expected = 0
        for at in range(count):
            places = np.arange(at - 12, at + 13)
            mirrored = (count - 1) - np.abs((count - 1) - np.abs(places))
            around = changes[mirrored if count > 12 else np.clip(places, 0, count - 1)]
            expected += bool(np.median(around) >= 0.5 and changes[at] <= 0.1 * np.median(around))
        assert stream_health.health(np.arange(count + 1.0), changes).duplicated == expected


def test_a_watch_looks_at_every_eighth_pixel() -> None:
    black = np.zeros((20, 30, 3), np.uint8)
    white, between = black + np.uint8(200), black.copy()
    white[0, 0], between[1:8], between[:, 1:8] = 0, 255, 255
    watch = stream_health.Watch()
    for i, (at, pixels) in enumerate([(0.5, black), (0.7, between), (0.9, white), (1.2, black), (1.3, black[:8])]):
        watch.see(Frame(pixels, i, 0.0, at))
    assert watch.times == [0.5, 0.7, 0.9, 1.2, 1.3]
    # Of 3 x 4 pixels one stays black; another size is another picture.
    assert watch.changes == pytest.approx([0, 200 * 11 / 12, 200 * 11 / 12, 255])
    assert watch.health() == stream_health.health(np.array(watch.times), np.array(watch.changes))


def test_one_frame_is_no_stream() -> None:
    assert stream_health.health(np.array([]), np.array([])) == stream_health.Health(0, 0.0, 0.0, 0.0, 0, 0, ())
    assert stream_health.health(np.array([7.0]), np.array([])) == stream_health.Health(1, 0.0, 0.0, 0.0, 0, 0, ())
