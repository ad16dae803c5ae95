"""The clock of a source, on scripted stamps and arrivals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetube.live.timeline import Look, Placed, Timeline

LOOK = Look(480, 640)


def place(
    stamps: Iterable[float | None], arrivals: Iterable[float] | None = None, live: bool = True
) -> list[Placed | None]:
    """Place frames that arrive at their stamps, or as given."""
    stamps = list(stamps)
    timeline = Timeline(live)
    came = [stamp or 0.0 for stamp in stamps] if arrivals is None else list(arrivals)
    return [timeline.place(stamp, at, LOOK) for stamp, at in zip(stamps, came, strict=True)]


def reasons(placed: list[Placed | None]) -> dict[int, str]:
    return {i: item.restarted for i, item in enumerate(placed) if item is not None and item.restarted is not None}


def steady(count: int, fps: float = 25, begin: float = 100.0) -> list[float]:
    return [begin + i / fps for i in range(count)]


@pytest.mark.parametrize("fps", [1, 15, 25, 30, 29.97, 120])
def test_steady_frames_continue_one_another_from_0(fps: float) -> None:
    placed = place(steady(200, fps))
    assert not reasons(placed)
    assert [item.seconds for item in placed if item] == pytest.approx([i / fps for i in range(200)])


@pytest.mark.parametrize("fps", [5, 15, 25, 30, 60])
@pytest.mark.parametrize("stamped", [True, False])
def test_one_missing_frame_is_a_gap(fps: float, stamped: bool) -> None:
    times = steady(100, fps)
    del times[60]
    placed = place(times) if stamped else place([None] * 99, times)
    assert list(reasons(placed)) == [60]
    assert reasons(placed)[60] == f"no frame for {2 / fps:.3f} s"
    assert placed[60] is not None
    assert placed[60].seconds == pytest.approx(61 / fps)  # the gap stays in the seconds


@given(
    jitter=st.lists(st.floats(-0.4, 0.4), min_size=60, max_size=60),
    burst=st.sampled_from([0.0, 0.1, 0.45, 0.9]),
)
def test_stamps_that_are_regular_have_no_gaps_however_they_arrive(jitter: list[float], burst: float) -> None:
    stamps = steady(60)
    late = [stamp if not burst else math.ceil(stamp / burst) * burst for stamp in stamps]
    arrivals = accumulate((at + shift / 25 for at, shift in zip(late, jitter, strict=True)), max)
    assert not reasons(place(stamps, arrivals))


@given(jitter=st.lists(st.floats(-0.45, 0.45), min_size=100, max_size=100), fps=st.sampled_from([15, 25, 30]))
def test_stamps_that_vary_by_less_than_half_a_frame_have_no_gaps_of_more(jitter: list[float], fps: int) -> None:
    """At most 1.9 periods apart: never as far as a frame that is missing twice."""
    stamps = [100 + (i + shift / 4) / fps for i, shift in enumerate(jitter)]
    assert not reasons(place(stamps))


def test_arrivals_in_bursts_are_a_habit_and_not_gaps() -> None:
    """Three frames at once, every 0.12 s, of a camera without a clock."""
    arrivals = [100 + 0.12 * (i // 3) + 1e-4 * (i % 3) for i in range(300)]
    assert not reasons(place([None] * 300, arrivals))


def arrive(times: Iterable[float]) -> dict[int, str]:
    """Why frames without stamps are taken not to continue those before."""
    came = [float(at) for at in times]
    return reasons(place([None] * len(came), came))


@pytest.mark.parametrize("mean_s", [0.002, 0.01, 0.02])
def test_frames_without_stamps_that_are_late_by_turns_have_no_gaps(mean_s: float, rng: np.random.Generator) -> None:
    """Ten minutes of a network whose delays are exponential; a delay longer than all before may be a gap."""
    times = 100 + np.arange(15_000) / 25 + rng.exponential(mean_s, 15_000)
    assert len(arrive(np.maximum.accumulate(times))) <= 5  # 137 of 15000 by the period alone


def test_bursts_are_a_habit_of_a_source_without_stamps_once_they_were_made_up_for() -> None:
    """450 ms of frames at once, every two seconds."""
    numbers = np.arange(3000)
    held = (numbers // 50 * 50 + 12) / 25
    times = 100 + np.where(numbers % 50 < 12, held, numbers / 25)
    found = arrive(times)
    assert len(found) <= 3
    assert max(found) <= 150


def test_missing_frames_are_told_from_bursts() -> None:
    missing = [100, 300, 500, 700, 701, 900, 915]
    assert list(arrive(np.delete(np.arange(1000) / 25, missing))) == [100, 299, 498, 697, 895, 909]


def test_what_was_kept_comes_at_once_in_the_beginning() -> None:
    times = np.concatenate([np.linspace(0, 0.001, 6), 0.04 * np.arange(1, 200)])
    assert not arrive(times)


def test_a_change_of_the_rate_is_two_gaps_at_most_without_stamps() -> None:
    steps = [1 / fps for fps in (30, 15, 25, 30, 10, 30) for _ in range(200)]
    found = arrive(accumulate(steps))
    assert [i for i in found if not 200 <= i < 203 and not 800 <= i < 803] == []


def test_a_change_of_the_rate_is_one_gap() -> None:
    stamps = steady(50, 30)
    for fps in (15, 25, 30, 15):
        stamps += [stamps[-1] + (i + 1) / fps for i in range(50)]
    assert list(reasons(place(stamps))) == [50, 200]


@pytest.mark.parametrize("hours", [1, -1, 26.5, -26.5])
def test_a_jump_of_the_clock_is_told_and_taken_out(hours: float) -> None:
    arrivals = steady(100)
    stamps = [at + 3600 * hours * (i >= 60) for i, at in enumerate(arrivals)]
    placed = place(stamps, arrivals)
    way = "ahead" if hours > 0 else "back"
    assert list(reasons(placed)) == [60]
    assert f"its clock jumped {way} by {abs(hours)}"[:20] in reasons(placed)[60]
    assert [item.seconds for item in placed if item] == pytest.approx([i / 25 for i in range(100)])


def test_a_gap_is_no_jump_where_the_frame_before_it_was_kept_until_it_was_over() -> None:
    """As MPEG-TS arrives: the end of a picture is known when the next one begins."""
    stamps = [*steady(50), *steady(50, begin=105.0)]
    arrivals = [*stamps[1:], 107.0]
    placed = place(stamps, arrivals)
    assert reasons(placed) == {50: "no frame for 3.040 s"}
    assert [item.seconds for item in placed if item] == pytest.approx([at - 100 for at in stamps])


def test_a_clock_that_jumps_with_each_frame_never_becomes_the_rhythm() -> None:
    placed = place([100.0 * i for i in range(5)], [i / 25 for i in range(5)])
    assert list(reasons(placed)) == [1, 2, 3, 4]


def test_the_clock_of_a_caller_is_not_touched() -> None:
    stamps = [i / 25 + 3600 * (i >= 60) for i in range(100)]
    placed = place(stamps, live=False)
    assert list(reasons(placed)) == [60]
    assert [item.seconds for item in placed if item] == stamps


def test_one_frame_of_another_time_is_told_twice_and_loses_nothing() -> None:
    arrivals = steady(100)
    stamps = [at + 36000 * (i == 60) for i, at in enumerate(arrivals)]
    placed = place(stamps, arrivals)
    assert list(reasons(placed)) == [60, 61]
    assert None not in placed


def test_frames_out_of_order_are_left_out_until_the_clock_was_set_back() -> None:
    stamps = steady(50)
    stamps[30], stamps[31] = stamps[31], stamps[30]
    placed = place(stamps, steady(50))
    assert placed[31] is None
    assert sum(item is None for item in placed) == 1
    back = [at - 0.5 * (i >= 30) for i, at in enumerate(steady(50))]
    placed = place(back, steady(50))
    assert [i for i, item in enumerate(placed) if item is None] == [30, 31, 32, 33]
    assert list(reasons(placed)) == [34]


def test_frames_without_a_stamp_among_others_are_placed_by_arrival() -> None:
    stamps: list[float | None] = [*steady(100, begin=7000.0)]
    for i in (0, 1, 40, 70, 71):
        stamps[i] = None
    placed = place(stamps, steady(100))
    assert not reasons(placed)
    assert [item.seconds for item in placed if item] == pytest.approx([i / 25 for i in range(100)])


def test_frames_without_a_stamp_that_come_at_once_are_one_after_the_other() -> None:
    placed = place([1.0, 1.04, None, None, 1.2], [5.0, 5.04, 5.12, 5.12, 5.2])
    seconds = [item.seconds for item in placed if item]
    assert len(seconds) == 5
    assert seconds == sorted(set(seconds))


def test_the_pairs_of_a_caller_may_have_the_same_time() -> None:
    assert None not in place([0.0] * 10, live=False)


def test_a_clock_that_stands_still_is_told() -> None:
    placed = place([7.0] * 12, steady(12))
    assert [i for i, item in enumerate(placed) if item is None] == [1, 2, 3, 4, 6, 7, 8, 9, 11]
    assert set(reasons(placed).values()) == {"its clock stands still"}


def test_a_file_may_hold_a_frame() -> None:
    placed = place([0, 0.04, 9.9, 9.94, 20.0, 20.04], live=False)
    assert list(reasons(placed)) == [4]
    assert [item.seconds for item in placed if item] == [0, 0.04, 9.9, 9.94, 20.0, 20.04]


def test_a_new_connection_goes_on_by_the_time_that_passed() -> None:
    timeline = Timeline(live=True)
    timeline.interrupt("a new connection")  # before the first frame there is nothing to continue
    assert timeline.place(500.0, 10.0, LOOK) == Placed(0.0, None)
    assert timeline.place(500.25, 10.25, LOOK) == Placed(0.25, None)
    timeline.interrupt("a new connection")
    assert timeline.place(3.0, 12.5, LOOK) == Placed(2.5, "a new connection")
    assert timeline.place(3.25, 12.75, LOOK) == Placed(2.75, None)


@pytest.mark.parametrize("live", [True, False])
def test_another_size_or_rotation_is_told(live: bool) -> None:
    timeline = Timeline(live)
    looks = [LOOK, LOOK, Look(480, 320), Look(480, 320), Look(480, 320, ((0, 1), (1, 0))), Look(240, 320)]
    placed = [timeline.place(i / 25, i / 25, look) for i, look in enumerate(looks)]
    assert reasons(placed) == {
        2: "its size changed from 640x480 to 320x480",
        4: "its rotation changed",
        5: "its size changed from 320x480 to 320x240",
    }


@given(
    frames=st.lists(st.tuples(st.floats(-1e5, 1e5), st.floats(0, 5), st.booleans()), max_size=60),
    stamped=st.booleans(),
)
def test_the_seconds_of_what_is_live_never_go_back(frames: list[tuple[float, float, bool]], stamped: bool) -> None:
    timeline, came, seconds = Timeline(live=True), 1000.0, 0.0
    for stamp, passed, reconnected in frames:
        came += passed
        if reconnected:
            timeline.interrupt("a new connection")
        placed = timeline.place(stamp if stamped else None, came, LOOK)
        if placed is not None:
            assert placed.seconds >= seconds - 1e-6
            seconds = placed.seconds


def test_a_gap_is_only_that_where_nothing_else_changed() -> None:
    timeline = Timeline(live=True)
    for i in range(8):
        timeline.place(i / 20, i / 20, LOOK)
    assert timeline.place(0.5, 0.5, LOOK) == Placed(0.5, "no frame for 0.150 s", gap=True)
    turned = timeline.place(1.5, 1.5, Look(LOOK.height * 2, LOOK.width))
    assert turned is not None
    assert "its size changed" in (turned.restarted or "")
    assert not turned.gap
    jumped = timeline.place(9.0, 1.6, Look(LOOK.height * 2, LOOK.width))
    assert jumped is not None
    assert "jumped ahead" in (jumped.restarted or "")
    assert not jumped.gap
