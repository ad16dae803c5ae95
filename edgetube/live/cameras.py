"""Several sources and one model, with callbacks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

from typing_extensions import Self

from edgetube import preprocess
from edgetube.errors import InputError
from edgetube.live.frame import State
from edgetube.live.novelty import NoveltyGate
from edgetube.live.schedule import BATCH_WAIT_MS, MAX_AGE_S, Lane
from edgetube.live.scheduler import Failed, Model, Outcome, Scheduler, Statistics, open_source
from edgetube.live.source import FrameSource, Policy, call_app
from edgetube.live.window import Hop
from edgetube.spec import Prediction
from edgetube.video import Source

MAX_FAILURES = 3
"""Calls of the model in a row that may fail. With the last of them it is taken to be broken, and everything closes."""


class ParallelModel(Model, Protocol):
    """A model that says how many calls at once it gains from."""

    @property
    def parallel_calls(self) -> int: ...


class Cameras:
    """Several cameras, URLs, files or iterables and one model: predictions come by callbacks.

    Each source has threads of its own, so that one that stalls or fails delays no other; the model runs in threads of
    this object, and takes the sources in turns (`edgetube.live.schedule.Schedule`). Sources may be added and removed at
    any time, and `close` called at any moment, by any thread, a callback's included. A context manager.

    Callbacks are called by those threads: for one source in order and one at a time, for several at the same time. A
    slow one delays the model. What a callback raises is printed as what a thread raises, and changes nothing else.

    When a source fails for good, the others go on. When a call of the model fails, its clips have no answer, and the
    next ones are tried; after `MAX_FAILURES` in a row everything closes, and `wait` raises the error.

    Args:
        runtime: an `edgetube.Runtime`; it stays open.
        sources: by name: what `edgetube.live.source.FrameSource` takes, or a `FrameSource`, which stays open.
        on_prediction: called with each `Prediction`, whose `source` is the name.
        on_state: called with (name, state, why in a few words) when a source is added and when its state changes.
        on_error: called with (name, error) when a source fails for good, or a call of the model with a clip of it.
        on_end: called with a name when its source has ended by itself or failed for good, after its last prediction.
        hop: frames between two predictions of a source, of those that sampling takes, or seconds ("0.5s"); None: a
            quarter of the clip.
        top_k: how many classes `Prediction.scores` holds.
        policy: "latest" or "all" for every source that this object opens; None: "latest" for cameras and URLs, "all"
            for files and iterables. An iterable that reads a camera wants "latest".
        max_age, batch_wait_ms: see `edgetube.live.schedule.Schedule`.
        calls: calls of the model at the same time; None: as many as the runtime gains from (`parallel_calls`).
        gate: makes the gate of each source that repeats answers to still clips: `runtime.gate`, or a `partial` of it;
            None: the model answers every clip.

    Raises:
        InputError: an option or a source that cannot be used, or a model that samples segments of a whole video.

    >>> with Cameras(rt, {"door": "rtsp://door", "yard": 0}, on_prediction=print) as cameras:
    ...     cameras.wait()
    """

    def __init__(
        self,
        runtime: ParallelModel,
        sources: Mapping[str, Source | FrameSource | Iterable[Any]] | None = None,
        *,
        on_prediction: Callable[[Prediction], object] | None = None,
        on_state: Callable[[str, State, str], object] | None = None,
        on_error: Callable[[str, BaseException], object] | None = None,
        on_end: Callable[[str], object] | None = None,
        hop: Hop | None = None,
        top_k: int = 5,
        policy: Policy | None = None,
        max_age: float | None = MAX_AGE_S,
        batch_wait_ms: float = BATCH_WAIT_MS,
        calls: int | None = None,
        gate: Callable[[], NoveltyGate] | None = None,
    ) -> None:
        self._on_prediction, self._on_state, self._on_error = on_prediction, on_state, on_error
        self._on_end = on_end
        self._policy = policy
        self._scheduler = Scheduler(
            runtime, hop=hop, top_k=top_k, max_age=max_age, batch_wait_ms=batch_wait_ms, gate=gate
        )
        self._changed = threading.Condition()
        self._running: dict[str, Lane] = {}
        self._unsubscribe: dict[str, Callable[[], None]] = {}
        self._failures = 0
        self._error: BaseException | None = None
        self._closed = False
        count = runtime.parallel_calls if calls is None else preprocess.count_of(calls, "calls")
        self._threads = [
            threading.Thread(target=self._run, name=f"edgetube model {i}", daemon=True) for i in range(count)
        ]
        try:
            for name, source in (sources or {}).items():
                self.add(name, source)
        except BaseException:
            self.close()
            raise
        for thread in self._threads:
            thread.start()

    def add(self, name: str, source: Source | FrameSource | Iterable[Any]) -> None:
        """A source joins; see the class for what it may be.

        Raises:
            InputError: it cannot be used, there is one of that name, or the cameras are closed.
        """
        if not isinstance(name, str) or not name:
            raise InputError(f"the name of a source is {name!r:.60}; expected some text")
        opened, owned = open_source(source, self._scheduler.model.contract, name=name, policy=self._policy)
        try:
            with self._changed:
                self._running[name] = self._scheduler.add(name, opened, owned)
        except BaseException:
            if owned:
                opened.close()
            raise
        if self._on_state is not None:
            unsubscribe = _subscribe(opened, partial(self._on_state, name))
            with self._changed:
                self._unsubscribe[name] = unsubscribe

    def remove(self, name: str) -> None:
        """A source leaves: its clips that wait do not run, and its name is free again. The answer of a clip that runs
        already may still come.

        Raises:
            InputError: there is none of that name.
        """
        self._scheduler.remove(name)
        with self._changed:
            self._running.pop(name, None)
            unsubscribe = self._unsubscribe.pop(name, None)
            self._changed.notify_all()
        if unsubscribe is not None:
            unsubscribe()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources, in the order in which they were added; one that ended stays until it is removed."""
        return self._scheduler.names()

    def statistics(self) -> dict[str, Statistics]:
        """By name: state, frame rate, account, percentiles of latency and age."""
        return self._scheduler.statistics()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until every source has ended, or everything is closed.

        Args:
            timeout: seconds; None waits for ever.

        Returns:
            Whether that is so; False when the time is over.

        Raises:
            EdgetubeError: the model was given up.
        """
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while self._running and not self._closed:
                left = 1.0 if until is None else until - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, 1.0))  # a wait without end would not hear Ctrl-C on Windows
        if self._error is not None:
            raise self._error
        return True

    def close(self) -> None:
        """End everything, at any moment, from any thread, more than once.

        It waits for calls of the model and for callbacks, except where a callback of the model's threads calls it.
        """
        with self._changed:
            self._closed = True
            self._running.clear()
            unsubscribes = list(self._unsubscribe.values())
            self._unsubscribe.clear()
            self._changed.notify_all()
        self._scheduler.close()
        for unsubscribe in unsubscribes:
            unsubscribe()
        if threading.current_thread() not in self._threads:  # else two of them could wait for one another
            for thread in self._threads:
                if thread.ident is not None:
                    thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------ the threads

    def _run(self) -> None:
        while self._scheduler.step(self._tell):
            pass

    def _tell(self, outcome: Outcome) -> None:
        if isinstance(outcome, Prediction):
            self._failures = 0
            call_app(self._on_prediction, outcome)
        elif isinstance(outcome, Failed):
            self._fail(outcome)
        else:
            if outcome.error is not None:
                call_app(self._on_error, outcome.lane.name, outcome.error)
            call_app(self._on_end, outcome.lane.name)
            with self._changed:
                if self._running.get(outcome.lane.name) is outcome.lane:  # not one that took its name meanwhile
                    del self._running[outcome.lane.name]
                self._changed.notify_all()

    def _fail(self, outcome: Failed) -> None:
        for name in outcome.names:
            call_app(self._on_error, name, outcome.error)
        with self._changed:
            self._failures += 1
            if self._failures < MAX_FAILURES or self._closed or self._error is not None:
                return
            self._error = outcome.error
        self.close()


def _subscribe(source: FrameSource, callback: Callable[[State, str], object]) -> Callable[[], None]:
    """Call `callback(state, why)` with the state of a source, and at each change of it; returns what ends that."""
    lock = threading.RLock()  # a callback may close everything, which changes the state
    told: State | None = None

    def tell(state: State, why: str) -> None:
        nonlocal told
        with lock:
            if state != told:
                told = state
                call_app(callback, state, why)

    unsubscribe = source.subscribe(tell)
    with lock:
        tell(source.state, "it was added" if source.error is None else str(source.error))
    return unsubscribe
