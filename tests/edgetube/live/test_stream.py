"""One source as an iterator: in both worlds, closed at any moment, with its errors."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import threading
import time
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetube import resize
from edgetube.contract import InputContract
from edgetube.errors import BackendError, InputError
from edgetube.live.novelty import NoveltyGate
from edgetube.live.scheduler import Failed, Over, Scheduler
from edgetube.live.source import FrameSource
from edgetube.live.stream import Stream
from edgetube.spec import ModelSpec, TubeSpec
from tests.edgetube.live.doubles import CONTRACT, PATIENCE_S, Pixels, picture, pictures, seen


def stream(source: Any, model: Pixels | None = None, **options: Any) -> Stream:
    opened = source if isinstance(source, FrameSource) else FrameSource(source, fps=10.0)
    return Stream(Scheduler(model or Pixels(), hop=1, **options), opened, owned=opened is not source)


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if "edgetube" in thread.name}


@pytest.fixture(autouse=True)
def nothing_runs_on() -> Iterator[None]:
    before = threads()
    yield
    if threads() - before:
        gc.collect()
    assert threads() - before == set()


EXPECTED = [[i, i + 1, i + 2, i + 3] for i in range(17)]


def test_every_clip_of_a_finite_source_is_answered_in_order() -> None:
    found = list(stream(pictures(20)))
    assert [seen(p) for p in found] == EXPECTED
    assert [p.start for p in found] == pytest.approx([i / 10 for i in range(17)])
    assert {(p.source, p.dropped, p.restarted) for p in found} == {("the frames", 0, None)}
    assert all(p.captured_at is not None and p.age_ms is not None and p.age_ms >= 0 for p in found)


STILL = ModelSpec((TubeSpec((1, 4, 4), (1, 4, 4)),), 4, (8, 8), 8, 1, 1, (("x", 4),))


@pytest.mark.parametrize("batch", [1, 3])
def test_still_clips_repeat_the_last_answer_without_the_model(batch: int) -> None:
    """Grey levels of the frames; the windows are of four, one a frame."""
    levels = [10] * 6 + [11] * 2 + [90] * 6
    model, frames = Pixels(batch=batch), [np.full((8, 8, 3), level, np.uint8) for level in levels]
    found = list(stream(frames, model, gate=partial(NoveltyGate, STILL), batch_wait_ms=5000.0))
    expected, last = [], list[int]()
    for i in range(len(levels) - 3):
        window = levels[i : i + 4]
        skipped = bool(last) and max(abs(a - b) for a, b in zip(window, last, strict=True)) < 4
        last = last if skipped else window
        expected.append((last, skipped))
    assert [(seen(p), p.skipped) for p in found] == expected
    assert sum(model.calls) == [p.skipped for p in found].count(False) == 5
    assert [p.end for p in found] == pytest.approx([0.1 * i for i in range(4, 15)])


def test_after_an_error_nothing_is_repeated_that_was_not_answered() -> None:
    def fail(number: int) -> None:
        if number == 0:
            raise BackendError("once")

    told: list[Any] = []
    scheduler = Scheduler(Pixels(before=fail), hop=1, gate=partial(NoveltyGate, STILL))
    source = FrameSource([np.full((8, 8, 3), 10, np.uint8)] * 7, fps=10.0)
    scheduler.add("x", source, owned=True)
    while not (told and isinstance(told[-1], Over)):
        scheduler.step(told.append)
    scheduler.close()
    assert isinstance(told[0], Failed)
    assert [p.skipped for p in told[1:-1]] == [False, True, True]


@pytest.mark.parametrize("batch", [2, 4, 7])
def test_a_batch_of_one_file_is_in_order(batch: int) -> None:
    model = Pixels(batch=batch)
    assert [seen(p) for p in stream(pictures(20), model, batch_wait_ms=5000.0)] == EXPECTED
    assert model.calls == [batch] * (17 // batch) + [17 % batch] * (17 % batch > 0)


def test_the_account_of_a_whole_file_balances() -> None:
    found = stream(pictures(20))
    assert len(list(found)) == 17
    account = found.account
    assert (account.captured, account.used, account.waiting, account.dropped) == (20, 20, 0, {})
    assert found.statistics().predictions == 17


def test_async_for_gives_the_same() -> None:
    async def main() -> list[list[int]]:
        async with stream(pictures(20)) as found:
            return [seen(p) async for p in found]

    assert asyncio.run(main()) == EXPECTED


def test_a_cancelled_wait_loses_nothing() -> None:
    source = FrameSource.pushed("door", policy="all")

    async def main() -> list[int]:
        async with stream(source) as found:
            waiting = asyncio.ensure_future(anext(found))
            await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            for i in range(4):
                source.push(picture(i), i / 10)
            return seen(await anext(found))

    assert asyncio.run(main()) == [0, 1, 2, 3]
    source.close()


def test_the_loop_ends_while_a_camera_is_silent() -> None:
    """Whoever leaves an `async for` in the middle of a wait is not held up by it."""
    source = FrameSource.pushed("door")
    found = stream(source)

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(found), 0.01)

    asyncio.run(main())
    found.close()
    source.close()


def test_close_ends_a_for_of_another_thread() -> None:
    source = FrameSource.pushed("door")
    found = stream(source)
    threading.Timer(0.05, found.close).start()
    assert list(found) == []
    source.close()


def test_whoever_leaves_the_loop_leaves_nothing_running() -> None:
    for p in stream(pictures(1000)):
        assert seen(p) == [0, 1, 2, 3]
        break
    assert threads() == set()


def test_a_closed_stream_is_at_its_end() -> None:
    with stream(pictures(20)) as found:
        next(found)
        found.close()
        found.close()
        assert list(found) == []
        assert found.account.waiting == 0


def test_the_app_keeps_the_source_that_it_opened() -> None:
    with FrameSource.pushed("door", policy="all") as source:
        with stream(source) as found:
            for i in range(4):
                source.push(picture(i), i / 10)
            assert seen(next(found)) == [0, 1, 2, 3]
        assert source.state == "live"
        with stream(source) as found:
            for i in range(4, 8):
                source.push(picture(i), i / 10)
            assert seen(next(found)) == [4, 5, 6, 7]


def test_a_source_that_fails_raises_after_its_predictions() -> None:
    def camera() -> Iterator[np.ndarray]:
        yield from pictures(5)
        raise OSError("the cable is out")

    found = stream(camera())
    assert [seen(next(found)), seen(next(found))] == EXPECTED[:2]
    with pytest.raises(InputError, match="the cable is out"):
        next(found)
    assert list(found) == []


def test_a_model_that_fails_ends_the_stream() -> None:
    def broken(number: int) -> None:
        if number == 1:
            raise BackendError("out of memory")

    found = stream(pictures(20), Pixels(before=broken))
    assert seen(next(found)) == EXPECTED[0]
    with pytest.raises(BackendError, match="out of memory"):
        next(found)
    assert list(found) == []


def test_an_async_error_is_raised_where_it_is_awaited() -> None:
    def broken(_: int) -> None:
        raise BackendError("out of memory")

    async def main() -> None:
        async with stream(pictures(20), Pixels(before=broken)) as found:
            with pytest.raises(BackendError, match="out of memory"):
                await anext(found)
            assert [p async for p in found] == []

    asyncio.run(main())


def test_a_source_without_frames_says_so() -> None:
    with pytest.raises(InputError, match="ended without a frame"):
        list(stream([]))


def test_a_short_file_gives_one_clip_and_a_live_source_none() -> None:
    assert [seen(p) for p in stream(pictures(2))] == [[0, 1, 1, 1]]
    source = FrameSource(iter([(0.0, picture(1)), (0.1, picture(2))]), policy="latest")
    assert list(stream(source)) == []
    source.close()


def test_a_slow_reader_of_a_live_source_gets_what_is_newest() -> None:
    """Twenty frames come while it does something else; what it does not see is counted."""
    source = FrameSource.pushed("door")
    taken = threading.Semaphore(0)
    found = stream(source, max_age=None)
    window = found._scheduler._feeders["door"].window
    push = window.push

    def counted(frame: Any, **options: Any) -> Any:
        clip = push(frame, **options)
        taken.release()
        return clip

    window.push = counted  # type: ignore[method-assign]
    for i in range(20):
        source.push(picture(i), i / 10)
        assert taken.acquire(timeout=PATIENCE_S)
    first = next(found)
    assert seen(first) in ([15, 16, 17, 18], [16, 17, 18, 19])  # the last one may not have been offered yet
    found.close()
    account = source.ledger.account()
    assert account.waiting == 0
    assert account.dropped["overrun"] >= 15
    assert first.dropped == seen(first)[0]
    source.close()


def test_a_device_that_resizes_slower_than_frames_come_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty frames a second come, ten can be resized; each clip is whole, and what was lost is counted."""

    def slow(frames: Any, contract: Any, spatial: Any = resize.spatial) -> Any:
        time.sleep(0.1)
        return spatial(frames, contract)

    monkeypatch.setattr(resize, "spatial", slow)
    source, over = FrameSource.pushed("door", capacity=12), threading.Event()
    model = Pixels(InputContract(8, 8, 8, fps=50.0))

    def push() -> None:
        for i in itertools.count():
            source.push(picture(i % 256), i / 50)
            if over.wait(0.02):
                return

    pusher = threading.Thread(target=push)
    with source, stream(source, model) as found:
        pusher.start()
        alarm = threading.Timer(PATIENCE_S, found.close)
        alarm.start()
        answers = list(itertools.islice(found, 3))
        alarm.cancel()
        over.set()
        pusher.join()
    assert len(answers) == 3
    for answer in answers:
        first = seen(answer)[0]
        assert seen(answer) == [(first + i) % 256 for i in range(8)]
    assert all("were left out" in (answer.restarted or "") and answer.dropped > 0 for answer in answers[1:])
    account = source.ledger.account()
    assert account.captured == account.used + sum(account.dropped.values())
    assert (account.used, account.dropped["overrun"] > 16) == (24, True)


@given(
    buffers=st.integers(1, 3),
    camera=st.sampled_from([5.0, 10.0, 30.0]),
    size=st.sampled_from([(8, 8), (8, 12), (20, 30)]),
)
@settings(max_examples=15)
def test_a_camera_may_fill_its_buffers_again(buffers: int, camera: float, size: tuple[int, int]) -> None:
    """Frames that need no resizing, only a crop, or both; a camera slower and faster than the model."""
    pixels = np.random.default_rng(1).integers(0, 256, (40, *size, 3), np.uint8)

    def ring() -> Iterator[np.ndarray]:
        held = [np.empty((*size, 3), np.uint8) for _ in range(buffers)]
        for i, one in enumerate(pixels):
            held[i % buffers][...] = one
            yield held[i % buffers]
        for buffer in held:
            buffer[...] = 0

    fresh, reused = (
        [p.logits for p in stream(FrameSource(frames, fps=camera), Pixels())] for frames in (list(pixels), ring())
    )
    assert fresh == reused
    assert len(set(fresh)) > 3


def test_eight_threads_of_streams_on_one_model_answer_as_one_does() -> None:
    model = Pixels()
    found: dict[int, list[list[int]]] = {}

    def run(shift: int) -> None:
        found[shift] = [seen(p) for p in stream((picture(i + shift) for i in range(20)), model)]

    running = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    for shift in range(8):
        assert found[shift] == [[value + shift for value in clip] for clip in EXPECTED]


def test_what_cannot_work_is_refused_at_the_call() -> None:
    with pytest.raises(InputError, match="hop is 0"):
        Scheduler(Pixels(), hop=0)
    with pytest.raises(InputError, match="top_k is 0"):
        Scheduler(Pixels(), top_k=0)
    with pytest.raises(InputError, match="max_age is -1"):
        Scheduler(Pixels(), max_age=-1)
    assert CONTRACT.frames == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_does_not_wait_for_threads_that_it_does_not_have() -> None:
    source = FrameSource.pushed("door")
    found = stream(source)
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with found._scheduler.schedule._changed:
            held.set()
            over.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of a fork with threads
        child = os.fork()
        if not child:
            found.close()
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    over.set()
    holder.join()
    found.close()
    source.close()
