"""Several sources and one model: callbacks, failures, comings and goings."""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from edgetube.errors import BackendError, InputError
from edgetube.live.cameras import MAX_FAILURES, Cameras
from edgetube.live.frame import State
from edgetube.live.source import FrameSource
from edgetube.spec import Prediction
from tests.edgetube.live.doubles import PATIENCE_S, Pixels, picture, pictures, seen

EXPECTED = [[i, i + 1, i + 2, i + 3] for i in range(17)]


@pytest.fixture(autouse=True)
def nothing_runs_on() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert {t.name for t in threading.enumerate() if "edgetube" in t.name and t not in before} == set()


class Heard:
    """What the callbacks were told."""

    def __init__(self) -> None:
        self.predictions: dict[str, list[Prediction]] = defaultdict(list)
        self.states: dict[str, list[State]] = defaultdict(list)
        self.errors: list[tuple[str, BaseException]] = []
        self.changed = threading.Condition()

    def on_prediction(self, prediction: Prediction) -> None:
        with self.changed:
            self.predictions[prediction.source or ""].append(prediction)
            self.changed.notify_all()

    def on_state(self, name: str, state: State, why: str) -> None:
        assert why
        self.states[name].append(state)

    def on_error(self, name: str, error: BaseException) -> None:
        with self.changed:
            self.errors.append((name, error))
            self.changed.notify_all()

    def callbacks(self) -> dict[str, Any]:
        return {"on_prediction": self.on_prediction, "on_state": self.on_state, "on_error": self.on_error}

    def until(self, what: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(what, PATIENCE_S)


def given(count: int = 20, shift: int = 0) -> FrameSource:
    return FrameSource((picture(i + shift) for i in range(count)), fps=10.0)


@pytest.mark.parametrize(("batch", "calls"), [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_finite_sources_are_answered_whole_and_in_order(batch: int, calls: int) -> None:
    heard = Heard()
    sources = {f"file {i}": given(shift=10 * i) for i in range(4)}
    with Cameras(Pixels(batch=batch), sources, hop=1, calls=calls, **heard.callbacks()) as cameras:
        assert cameras.wait(PATIENCE_S)
        statistics = cameras.statistics()
    for i, name in enumerate(sources):
        assert [seen(p) for p in heard.predictions[name]] == [[v + 10 * i for v in clip] for clip in EXPECTED]
        assert statistics[name].predictions == 17
        assert statistics[name].account.used == statistics[name].account.captured == 20
        assert statistics[name].latency_p99_ms is not None
        sources[name].close()
    assert heard.errors == []


def test_one_that_fails_is_told_and_the_others_go_on() -> None:
    def broken() -> Iterator[np.ndarray]:
        yield from pictures(6)
        raise OSError("the cable is out")

    heard = Heard()
    with Cameras(Pixels(), {"bad": broken(), "good": pictures(20)}, hop=1, **heard.callbacks()) as cameras:
        assert cameras.wait(PATIENCE_S)
        assert cameras.names == ("bad", "good")
        assert "the cable is out" in (cameras.statistics()["bad"].error or "")
    assert [name for name, _ in heard.errors] == ["bad"]
    assert len(heard.predictions["good"]) >= 17
    assert heard.states["bad"][-1] == "closed"


def test_a_silent_camera_holds_nobody_up() -> None:
    heard = Heard()
    with FrameSource.pushed("silent") as silent, FrameSource.pushed("door", policy="all") as door:
        with Cameras(Pixels(batch=2), {"silent": silent, "door": door}, hop=1, **heard.callbacks()):
            for i in range(20):
                door.push(picture(i), i / 10)
            heard.until(lambda: len(heard.predictions["door"]) == 17)
        assert not heard.predictions["silent"]


def test_a_call_that_fails_costs_its_clips() -> None:
    def sometimes(number: int) -> None:
        if number % 3 == 1:
            raise BackendError(f"call {number}")

    heard = Heard()
    with Cameras(Pixels(before=sometimes), {"file": given()}, hop=1, **heard.callbacks()) as cameras:
        assert cameras.wait(PATIENCE_S)
    assert [seen(p) for p in heard.predictions["file"]] == [clip for i, clip in enumerate(EXPECTED) if i % 3 != 1]
    assert [(name, str(error)) for name, error in heard.errors] == [("file", f"call {i}") for i in range(1, 17, 3)]


@pytest.mark.parametrize("calls", [1, 3])
def test_a_model_that_always_fails_ends_everything(calls: int) -> None:
    def broken(_: int) -> None:
        raise BackendError("the device is lost")

    heard = Heard()
    sources = {name: given() for name in "abc"}
    cameras = Cameras(Pixels(before=broken), sources, hop=1, calls=calls, **heard.callbacks())
    with cameras, pytest.raises(BackendError, match="the device is lost"):
        cameras.wait(PATIENCE_S)
    assert len(heard.errors) >= MAX_FAILURES
    assert not heard.predictions
    for source in sources.values():
        source.close()


def test_what_a_callback_raises_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    heard = Heard()

    def raises(prediction: Prediction) -> None:
        heard.on_prediction(prediction)
        raise ValueError("of the app")

    with Cameras(Pixels(), {"file": pictures(20)}, on_prediction=raises) as cameras:
        assert cameras.wait(PATIENCE_S)
    assert len(printed) == len(heard.predictions["file"]) > 1


def test_sources_come_and_go() -> None:
    heard = Heard()
    with Cameras(Pixels(), hop=1, **heard.callbacks()) as cameras:
        assert cameras.wait()
        with FrameSource.pushed("door", policy="all") as door:
            cameras.add("door", door)
            for i in range(4):
                door.push(picture(i), i / 10)
            heard.until(lambda: len(heard.predictions["door"]) == 1)
            with pytest.raises(InputError, match="already is a source called 'door'"):
                cameras.add("door", pictures(3))
            cameras.remove("door")
            assert door.state == "live"
            with pytest.raises(InputError, match="no source called 'door'"):
                cameras.remove("door")
        cameras.add("door", (picture(i) for i in range(20)))
        assert cameras.wait(PATIENCE_S)
        assert len(heard.predictions["door"]) > 1
    with pytest.raises(InputError, match="closed"):
        cameras.add("late", pictures(3))


@pytest.mark.parametrize("calls", [1, 2])
def test_callbacks_may_close_and_remove(calls: int) -> None:
    heard = Heard()

    def on_prediction(prediction: Prediction) -> None:
        heard.on_prediction(prediction)
        if prediction.source == "a":
            cameras.remove("a")
        elif len(heard.predictions["b"]) == 3:
            cameras.close()

    cameras = Cameras(Pixels(), hop=1, on_prediction=on_prediction, calls=calls)
    cameras.add("a", pictures(100))
    cameras.add("b", pictures(100))
    assert cameras.wait(PATIENCE_S)
    cameras.close()
    assert 3 <= len(heard.predictions["b"]) <= 4


def test_closing_from_many_threads_at_any_moment() -> None:
    draw = random.Random(5)
    for _ in range(20):
        heard, gate = Heard(), threading.Event()
        sources = {name: pictures(200) for name in "abc"}
        cameras = Cameras(Pixels(parallel_calls=2), sources, hop=1, **heard.callbacks())
        wanted = draw.randrange(30)

        def close(cameras: Cameras = cameras, gate: threading.Event = gate) -> None:
            gate.wait()
            cameras.close()

        closers = [threading.Thread(target=close) for _ in range(3)]
        for thread in closers:
            thread.start()
        heard.until(lambda heard=heard, n=wanted: sum(map(len, heard.predictions.values())) >= n)  # type: ignore[misc]
        gate.set()
        for thread in closers:
            thread.join()
        assert cameras.wait(0)
        for statistics in cameras.statistics().values():
            assert statistics.account.waiting == 0


@pytest.mark.parametrize("name", ["", None, 3])
def test_names_are_text(name: Any) -> None:
    with pytest.raises(InputError, match="the name of a source"):
        Cameras(Pixels(), {name: pictures(3)})


def test_a_source_that_cannot_be_used_leaves_nothing_running() -> None:
    with pytest.raises(InputError, match="expected"):
        Cameras(Pixels(), {"good": pictures(20), "bad": None})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="calls is 0"):
        Cameras(Pixels(), {"good": pictures(20)}, calls=0)


def test_two_sources_are_answered_at_the_same_time() -> None:
    """Each call waits for one of the other source: with one call at a time, none would ever be answered."""
    both = threading.Barrier(2, timeout=PATIENCE_S)
    heard = Heard()
    model = Pixels(before=lambda _: both.wait(), parallel_calls=2)
    with Cameras(model, {"a": pictures(20), "b": pictures(20)}, hop=1, **heard.callbacks()) as cameras:
        assert cameras.wait(PATIENCE_S)
    assert heard.errors == []
    assert [len(heard.predictions[name]) for name in "ab"] == [17, 17]


@pytest.mark.parametrize(("seed", "batch", "calls"), [(0, 1, 1), (1, 1, 3), (2, 3, 1), (3, 2, 2)])
def test_whatever_cameras_do_the_account_balances_and_no_clip_shows_both_sides(
    seed: int, batch: int, calls: int
) -> None:
    """Cameras push in their own threads, some of which wait, with jumps of their clocks, each of which begins another
    picture; one is removed in the middle of it, and everything is closed at some moment."""
    draw = random.Random(seed)
    heard = Heard()
    sources = {
        name: FrameSource.pushed(name, policy="all" if name < "c" else "latest", capacity=draw.choice([2, 8, 64]))
        for name in "abcde"
    }

    def film(source: FrameSource, lengths: list[int]) -> None:
        seconds = 0.0
        for span, length in enumerate(lengths):
            seconds += 100.0
            for _ in range(length):
                seconds += 0.1
                source.push(picture(span), seconds)

    cameras = Cameras(Pixels(batch=batch), sources, hop=1, calls=calls, max_age=None, **heard.callbacks())
    films = [
        threading.Thread(target=film, args=(source, [draw.randrange(1, 30) for _ in range(12)]))
        for source in sources.values()
    ]
    for thread in films:
        thread.start()
    heard.until(lambda: sum(map(len, heard.predictions.values())) >= 5)
    cameras.remove("c")
    for thread in films[: draw.randrange(1, 5)]:
        thread.join()
    cameras.close()
    for source in sources.values():
        source.close()
    for thread in films:
        thread.join()
    for name, source in sources.items():
        account = source.ledger.account()
        assert account.waiting == 0
        assert account.captured == account.used + sum(account.dropped.values())
        answers = heard.predictions[name]
        assert all(len(set(seen(p))) == 1 for p in answers)
        assert [p.start for p in answers] == sorted({p.start for p in answers if p.start is not None})
        spans = [seen(p)[0] for p in answers]
        for p, before, span in zip(answers[1:], spans, spans[1:], strict=False):
            assert p.restarted is not None or before == span
        assert sum(p.dropped for p in answers) <= sum(account.dropped.values())
    assert heard.errors == []
