"""Whose turn it is, what is too old, and where frames went: cameras and a model simulated on a clock."""

from __future__ import annotations

import heapq
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetube.contract import InputContract
from edgetube.errors import InputError
from edgetube.live.frame import Account, Frame, Ledger
from edgetube.live.schedule import Lane, Schedule, Work
from edgetube.live.source import Policy
from edgetube.live.window import LiveClip, Window

PIXELS = np.zeros((1, 1, 1, 3), np.uint8)
FRAME = np.zeros((2, 2, 3), np.uint8)


def clip(first: int, last: int, captured_at: float = 0.0, restarted: str | None = None) -> LiveClip:
    numbers = tuple(range(first, last + 1))
    return LiveClip("", PIXELS, captured_at=captured_at, numbers=numbers, restarted=restarted)


class Clock:
    def __init__(self) -> None:
        self.time = 50.0

    def __call__(self) -> float:
        return self.time


@dataclass
class Camera:
    """Every `period` seconds a frame, with each a clip of the last `length` frames; silent within `silence`. The frame
    after a silence restarts the window."""

    period: float
    length: int
    begin: float
    silence: tuple[float, float] = (0.0, 0.0)
    ledger: Ledger = field(default_factory=Ledger)
    lane: Any = None
    window: Any = None
    restarts: list[int] = field(default_factory=list)
    answers: list[Work] = field(default_factory=list)
    answered: list[float] = field(default_factory=list)


def simulate(
    cameras: list[Camera], call: float, seconds: float, *, workers: int = 1, **options: Any
) -> tuple[Schedule, list[list[Work]]]:
    """Cameras that offer, workers that take `call` seconds for each batch, event by event."""
    clock = Clock()
    start = clock.time
    schedule = Schedule(now=clock, **options)
    events: list[tuple[float, int, str, Any]] = []
    serial = 0

    def later(time: float, kind: str, what: Any) -> None:
        nonlocal serial
        serial += 1
        heapq.heappush(events, (time, serial, kind, what))

    for camera in cameras:
        camera.lane = schedule.add(str(id(camera)), camera.ledger, "latest")
        camera.window = Window(InputContract(camera.length, 2, 2), 1, ledger=camera.ledger)
        later(start + camera.begin, "frame", camera)
    free, batches, looks = workers, [], 0
    while events and events[0][0] < start + seconds:
        clock.time, _, kind, what = heapq.heappop(events)
        if kind == "frame":
            camera = what
            later(clock.time + camera.period, "frame", camera)
            passed = clock.time - start
            if not camera.silence[0] <= passed < camera.silence[1]:
                number = camera.ledger.capture()
                gap = camera.silence[0] < camera.silence[1] <= passed and not camera.restarts
                if gap:
                    camera.restarts.append(number)
                due = camera.window.push(Frame(FRAME, number, clock.time, passed, "a gap" if gap else None))
                if due is not None:
                    schedule.offer(camera.lane, due)
        elif kind == "done":
            for work in what:
                camera = next(c for c in cameras if c.lane is work.lane)
                camera.answers.append(work)
                camera.answered.append(clock.time)
            schedule.done(what, call)
            free += 1
        while free:
            works, wait = schedule.choose(clock.time)
            if works:
                free -= 1
                batches.append(works)
                later(clock.time + call, "done", works)
                continue
            if wait is not None:
                looks += 1
                later(clock.time + wait + 1e-9, "look", None)
            break
    assert looks < 10_000
    return schedule, batches


cameras = st.lists(
    st.builds(
        Camera,
        period=st.sampled_from([0.04, 0.1, 0.25]),
        length=st.integers(1, 5),
        begin=st.floats(0, 0.3),
        silence=st.sampled_from([(0.0, 0.0), (2.0, 4.0), (1.0, 100.0)]),
    ),
    min_size=1,
    max_size=6,
)


@given(
    cameras=cameras,
    call=st.sampled_from([0.01, 0.06, 0.2]),
    batch=st.integers(1, 4),
    wait=st.sampled_from([0.0, 10.0, 50.0]),
    workers=st.integers(1, 3),
)
def test_any_schedule_is_fair_fresh_and_balanced(
    cameras: list[Camera], call: float, batch: int, wait: float, workers: int
) -> None:
    schedule, batches = simulate(cameras, call, 6.0, workers=workers, batch=batch, batch_wait_ms=wait, max_age=0.5)
    for camera in cameras:
        camera.answers = [work for works in batches for work in works if work.lane is camera.lane]
        schedule.remove(camera.lane)
        camera.window.close()
        ends = [work.clip.numbers[-1] for work in camera.answers]
        assert ends == sorted(set(ends))
        # No answer is older than promised, and what was lost is counted.
        shown = {number for work in camera.answers for number in work.clip.numbers}
        account = camera.ledger.account()
        assert account.used == len(shown)
        assert account.waiting == 0
        for restart in camera.restarts:
            assert not any(work.clip.numbers[0] < restart <= work.clip.numbers[-1] for work in camera.answers)
            after = [work.clip.restarted for work in camera.answers if work.clip.numbers[0] >= restart]
            assert after == ["a gap"] * bool(after) + [None] * (len(after) - 1)
        assert sum(work.dropped for work in camera.answers) <= sum(account.dropped.values())
    for works in batches:
        assert len(works) <= batch
        assert len({work.lane.name for work in works}) == len(works)
    for camera in cameras:
        for work, answered in zip(camera.answers, camera.answered, strict=False):
            assert answered - work.clip.captured_at <= 0.5 + 1e-9


@given(count=st.integers(2, 8), call=st.sampled_from([0.05, 0.1, 0.2]))
def test_under_overload_every_camera_gets_the_same_share(count: int, call: float) -> None:
    """Cameras of different rates, each of which alone would keep the model busy."""
    found = [Camera(0.01 * (1 + i % 3), 2, 0.003 * i) for i in range(count)]
    simulate(found, call, 5.0)
    answers = [len(camera.answers) for camera in found]
    assert max(answers) - min(answers) <= 1
    assert sum(answers) >= 5.0 / call - 2


def test_three_times_overload_gives_no_old_answers() -> None:
    """Twelve cameras with a clip every 0.2 s, a model of 0.05 s: it answers a third of them."""
    found = [Camera(0.2, 4, 0.016 * i) for i in range(12)]
    simulate(found, 0.05, 10.0)
    ages = [at - w.clip.captured_at for c in found for w, at in zip(c.answers, c.answered, strict=True)]
    assert len(ages) > 180  # of 200, less the time to fill the first clips
    assert max(ages) <= 0.5


def test_a_call_longer_than_the_limit_still_answers() -> None:
    camera = Camera(0.04, 4, 0.0)
    simulate([camera], 0.8, 10.0)
    assert len(camera.answers) >= 11
    assert all(at - w.clip.captured_at <= 0.8 + 0.25 for w, at in zip(camera.answers, camera.answered, strict=True))


def test_a_camera_that_stalls_delays_the_others_by_the_wait_for_the_batch_alone() -> None:
    found = [Camera(0.1, 1, 0.0), Camera(0.1, 1, 0.001, silence=(1.0, 100.0))]
    simulate(found, 0.01, 5.0, batch=2, batch_wait_ms=20.0)
    ages = [at - w.clip.captured_at for w, at in zip(found[0].answers, found[0].answered, strict=True)]
    assert len(ages) == 50
    assert max(ages) <= 0.01 + 0.02 + 1e-6
    assert len(found[1].answers) == 10


def test_a_batch_runs_when_nobody_could_add_to_it() -> None:
    clock = Clock()
    schedule = Schedule(4, batch_wait_ms=1000.0, now=clock)
    a, b, c = (schedule.add(name, Ledger(), "latest") for name in "abc")
    schedule.offer(a, clip(0, 0, clock.time))
    assert schedule.choose(clock.time) == ([], pytest.approx(1.0))
    schedule.offer(b, clip(0, 0, clock.time))
    schedule.finish(c)
    works, _ = schedule.choose(clock.time)
    assert [work.lane for work in works] == [a, b]


# ---------------------------------------------------------------------------------------------------------- the account


def test_a_newer_clip_takes_the_place_of_one_that_waits() -> None:
    """Frames that only the older one showed are lost, and so says the next answer, with the reason of a restart."""
    ledger, schedule = Ledger(), Schedule(now=Clock(), max_age=None)
    lane = schedule.add("a", ledger, "latest")
    for _ in range(8):
        ledger.capture()
        ledger.use()
    schedule.offer(lane, clip(0, 3, restarted="a gap"))
    schedule.offer(lane, clip(4, 7))
    ((work,), _) = schedule.choose(0.0)
    assert (work.clip.numbers, work.clip.restarted, work.dropped) == ((4, 5, 6, 7), "a gap", 4)
    assert ledger.account() == Account(8, 4, 0, {"overrun": 4})
    schedule.done([work])
    schedule.offer(lane, clip(6, 9))
    ((work,), _) = schedule.choose(0.0)
    assert (work.clip.restarted, work.dropped) == (None, 0)


def test_clips_that_are_too_old_are_left_out_and_counted() -> None:
    clock, ledger = Clock(), Ledger()
    schedule = Schedule(max_age=0.5, now=clock)
    lane = schedule.add("a", ledger, "latest")
    for _ in range(4):
        ledger.capture()
        ledger.use()
    schedule.offer(lane, clip(0, 3, clock.time, restarted="a gap"))
    clock.time += 0.6
    assert schedule.choose(clock.time) == ([], None)
    schedule.offer(lane, clip(4, 7, clock.time))
    ((work,), _) = schedule.choose(clock.time)
    assert (work.dropped, work.clip.restarted) == (4, "a gap")
    schedule.done([work], 0.3)
    assert schedule.limit() == 0.25


def test_a_clip_that_took_long_to_prepare_is_not_left_out_for_that() -> None:
    clock, ledger = Clock(), Ledger()
    schedule = Schedule(max_age=0.5, now=clock)
    lane = schedule.add("a", ledger, "latest")
    for wait in (0.2, 0.3):
        came = clock.time
        clock.time += 3.0
        schedule.offer(lane, clip(0, 3, came))
        clock.time += wait
        works, _ = schedule.choose(clock.time)
        assert len(works) == (wait < 0.25)
        schedule.done(works)


@pytest.mark.parametrize("policy", ["latest", "all"])
def test_what_waits_when_a_source_leaves_is_counted(policy: Policy) -> None:
    ledger, schedule = Ledger(), Schedule(2, now=Clock(), max_age=None)
    lane = schedule.add("a", ledger, policy)
    for _ in range(5):
        ledger.capture()
        ledger.use()
    assert schedule.offer(lane, clip(0, 3))
    assert schedule.offer(lane, clip(1, 4))
    schedule.remove(lane)
    assert ledger.account().used == 0
    assert ledger.account().dropped == ({"overrun": 1, "closed": 4} if policy == "latest" else {"closed": 5})
    ledger.capture()
    ledger.use()
    assert not schedule.offer(lane, clip(5, 5))
    assert ledger.account().used == 0


def test_all_waits_until_there_is_room() -> None:
    schedule = Schedule(1, now=Clock(), max_age=0.1)
    lane = schedule.add("file", Ledger(), "all")
    offered: list[int] = []

    def offer() -> None:
        for i in range(20):
            assert schedule.offer(lane, clip(i, i))
            offered.append(i)
        schedule.finish(lane)

    thread = threading.Thread(target=offer)
    thread.start()
    seen: list[int] = []
    while isinstance(found := schedule.take(), list):
        assert len(offered) <= len(seen) + 2
        seen += [work.clip.numbers[0] for work in found]
        schedule.done(found, 5.0)
    thread.join()
    assert found is lane
    assert seen == list(range(20))


def test_closing_wakes_whoever_waits() -> None:
    schedule = Schedule(now=Clock())
    lane = schedule.add("file", Ledger(), "all")
    found: list[object] = []
    schedule.offer(lane, clip(0, 0))
    assert isinstance(schedule.take(), list)
    schedule.offer(lane, clip(1, 1))
    threads = [
        threading.Thread(target=lambda: found.append(schedule.take())),
        threading.Thread(target=lambda: found.append(schedule.offer(lane, clip(2, 2)))),
    ]
    for thread in threads:
        thread.start()
    schedule.close()
    for thread in threads:
        thread.join()
    assert sorted(map(str, found)) == ["False", "None"]


def test_the_end_of_a_source_is_told_once_after_its_clips() -> None:
    schedule = Schedule(now=Clock(), max_age=None)
    lane = schedule.add("a", Ledger(), "latest")
    schedule.offer(lane, clip(0, 0))
    schedule.finish(lane, error := InputError("gone"))
    works = schedule.take()
    assert isinstance(works, list)
    schedule.done(works)
    over = schedule.take()
    assert isinstance(over, Lane)
    assert over.error is error


@pytest.mark.parametrize(
    "options", [{"batch_wait_ms": -1}, {"max_age": "x"}, {"max_age": -0.1}, {"max_age": 0}, {"batch": 0}]
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        Schedule(**options)
