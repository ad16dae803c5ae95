"""Runs the clips of several sources through one model: a thread for each source, and the caller's for the model."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgetube import answer, preprocess
from edgetube.contract import InputContract
from edgetube.errors import InputError
from edgetube.live.frame import Account, Frame, State
from edgetube.live.novelty import NoveltyGate
from edgetube.live.schedule import BATCH_WAIT_MS, MAX_AGE_S, Lane, Schedule, Work
from edgetube.live.source import Ended, FrameSource, Policy
from edgetube.live.window import Hop, LiveClip, Window, check, step
from edgetube.spec import Prediction
from edgetube.video import Source

POLL_S = 0.2
"""Seconds that a source's thread waits for a frame before it looks whether it should end."""

RECENT = 1000
"""Predictions that percentiles are taken of."""

RHYTHM = 64
"""Frames that a source's rate is taken of."""


class Model(Protocol):
    """What clips are given to: an `edgetube.Runtime`. Any thread may call it."""

    @property
    def contract(self) -> InputContract: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def batch(self) -> int: ...
    def __call__(self, clips: npt.ArrayLike) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True)
class Failed:
    """A call of the model raised: the clips in it have no answer."""

    names: tuple[str, ...]
    error: Exception


@dataclass(frozen=True)
class Over:
    """A source has ended, with an error where it failed."""

    lane: Lane
    error: BaseException | None


Outcome = Prediction | Failed | Over


@dataclass(frozen=True)
class Statistics:
    """How a source does.

    Attributes:
        state, error: of the source; the error that ended it, or why it is lost.
        fps: frames per second of late; None before the second one.
        account: where its frames went.
        predictions: how many there were.
        latency_p50_ms, latency_p99_ms: of `Prediction.latency_ms`, of the last 1000; None before the first.
        age_p50_ms, age_p99_ms: of `Prediction.age_ms`.
        quiet_s: seconds since its last frame; None before the first.
    """

    state: State
    error: str | None
    fps: float | None
    account: Account
    predictions: int
    latency_p50_ms: float | None
    latency_p99_ms: float | None
    age_p50_ms: float | None
    age_p99_ms: float | None
    quiet_s: float | None


def open_source(
    source: Source | FrameSource | Iterable[Any],
    contract: InputContract,
    *,
    name: str | None = None,
    fps: float | None = None,
    policy: Policy | None = None,
) -> tuple[FrameSource, bool]:
    """A source for a model, and whether it was opened here.

    Args:
        fps: of bare frames; None: the contract's rate, but with the policy "latest" their time is that of their
            arrival.

    Raises:
        InputError: it cannot be used, or a rate is given for a source that was opened with its own.
    """
    if fps is not None:
        preprocess.frame_rate(fps)
    if isinstance(source, FrameSource):
        if fps is not None:
            raise InputError(f"{source.name} was opened with its own clock: leave fps out, or give it to FrameSource")
        return source, False
    rate = contract.fps if fps is None and policy != "latest" else fps
    return FrameSource(source, name=name, fps=rate, policy=policy), True


def clips(
    source: FrameSource,
    window: Window,
    going: Callable[[], bool] = lambda: True,
    came: Callable[[Frame], object] = lambda frame: None,
) -> Iterator[LiveClip]:
    """The clips of a source, to its end: all with the policy "all", the newest of those due at once with "latest".

    With "latest", what waits is taken before anything is resized. So a device that resizes more slowly than frames come
    loses frames only while it makes a clip: frames are left out in runs, and between two runs there is a whole clip.

    Args:
        going: looked at before each frame; False ends it.
        came: is told each frame before the window gets it.

    Raises:
        EdgetubeError: the source failed for good, or is finite and ended without a frame.
    """
    empty = True
    try:
        while going():
            frame = source.read(0)
            if frame is None and not window.settle():
                frame = source.read(POLL_S)
            if frame is None:
                continue
            empty = False
            came(frame)
            if source.policy == "all":
                yield from window.each(frame)
            elif (clip := window.push(frame, settle=False)) is not None:
                yield clip
    except Ended:
        if source.is_live or not going():
            return
        if empty:
            raise InputError(f"{source.name} ended without a frame") from None
        yield from window.finish()


@dataclass(eq=False)
class _Feeder:
    """A source with its window: the thread that takes its frames and offers its clips."""

    lane: Lane
    source: FrameSource
    window: Window
    owned: bool
    schedule: Schedule
    now: Callable[[], float]
    gate: NoveltyGate | None = None
    held: npt.NDArray[np.float32] | None = None
    """The logits of the last clip that the model answered."""
    thread: threading.Thread | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    arrivals: deque[float] = field(default_factory=lambda: deque(maxlen=RHYTHM))
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    ages: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    predictions: int = 0

    def run(self) -> None:
        error: BaseException | None = None
        try:
            self._feed()
        except Exception as failure:  # noqa: BLE001 - whatever ends a source is told to the app, and ends no other one
            error = failure
        except KeyboardInterrupt:  # the main thread has it, too, and says so
            pass
        self.window.close()
        self.schedule.finish(self.lane, error)

    def _feed(self) -> None:
        began = self.now()

        def came(frame: Frame) -> None:
            nonlocal began
            began = self.now()
            with self.lock:
                self.arrivals.append(frame.captured_at)

        for clip in clips(self.source, self.window, lambda: not self.lane.ended, came):
            self.lane.policy = self.source.policy
            if not self.schedule.offer(self.lane, clip, self.now() - began):
                return
            began = self.now()

    def still(self, clip: LiveClip) -> bool:
        """Whether the last answer is repeated for this clip; if not, it is taken for answered."""
        if self.gate is None:
            return False
        if clip.restarted is not None:
            self.gate.reset()
        seconds = clip.end or 0.0
        if not self.gate.changed(clip.frames, seconds):
            return True
        self.gate.answered(clip.frames, seconds)
        return False

    def answered(self, prediction: Prediction) -> None:
        with self.lock:
            self.predictions += 1
            self.latencies.append(prediction.latency_ms)
            self.ages.append(prediction.age_ms or 0.0)

    def stop(self) -> None:
        """End it; wait for its thread, unless this is called by it."""
        self.schedule.remove(self.lane)
        if self.owned:
            self.source.close()

    def join(self) -> None:
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join()

    def statistics(self) -> Statistics:
        with self.lock:
            arrivals, latencies, ages = list(self.arrivals), list(self.latencies), list(self.ages)
            predictions = self.predictions
        span = arrivals[-1] - arrivals[0] if arrivals else 0.0
        error = self.lane.error or self.source.error
        return Statistics(
            state=self.source.state,
            error=None if error is None else str(error),
            fps=(len(arrivals) - 1) / span if span > 0 else None,
            account=self.source.ledger.account(),
            predictions=predictions,
            latency_p50_ms=_percentile(latencies, 50),
            latency_p99_ms=_percentile(latencies, 99),
            age_p50_ms=_percentile(ages, 50),
            age_p99_ms=_percentile(ages, 99),
            quiet_s=self.now() - arrivals[-1] if arrivals else None,
        )


def _percentile(values: Sequence[float], share: float) -> float | None:
    return float(np.percentile(values, share)) if values else None


class Scheduler:
    """Sources, their windows, and the calls of one model for all of them.

    Each source has a thread that takes its frames and puts them into its window. `step` runs one call of the model in
    the thread that calls it; several threads may.

    Args:
        model: a `Runtime`.
        hop: of each window, see `edgetube.live.window.step`.
        top_k: how many classes `Prediction.scores` holds.
        max_age, batch_wait_ms: see `edgetube.live.schedule.Schedule`.
        gate: makes the `NoveltyGate` of a source; None: the model answers every clip.
        now: seconds of the monotonic clock that frames are captured by.

    Raises:
        InputError: an option that cannot be used, or a model that samples segments of a whole video.
    """

    def __init__(
        self,
        model: Model,
        *,
        hop: Hop | None = None,
        top_k: int = 5,
        max_age: float | None = MAX_AGE_S,
        batch_wait_ms: float = BATCH_WAIT_MS,
        gate: Callable[[], NoveltyGate] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        check(model.contract)
        step(hop, model.contract)
        self.model, self.hop, self.now = model, hop, now
        self._gate = gate
        self.top_k = preprocess.count_of(top_k, "top_k")
        self.schedule = Schedule(model.batch, batch_wait_ms=batch_wait_ms, max_age=max_age, now=now)
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._feeders: dict[str, _Feeder] = {}
        self._closed = False

    # ------------------------------------------------------------------------------------------------------ the sources

    def add(self, name: str, source: FrameSource, owned: bool) -> Lane:
        """A source joins, at any moment.

        Args:
            name: of its predictions.
            owned: whether to close it when it is removed.

        Raises:
            InputError: there is one of that name, or the scheduler is closed.
        """
        with self._lock:
            if self._closed:
                raise InputError(f"{name} cannot be added: this is closed")
            if name in self._feeders:
                raise InputError(
                    f"there already is a source called {name!r:.60}: remove it first, or give another name"
                )
            window = Window(self.model.contract, self.hop, ledger=source.ledger)
            gate = None if self._gate is None else self._gate()
            lane = self.schedule.add(name, source.ledger, source.policy)
            feeder = _Feeder(lane, source, window, owned, self.schedule, self.now, gate)
            feeder.thread = threading.Thread(target=feeder.run, name=f"edgetube window of {name}", daemon=True)
            self._feeders[name] = feeder
            feeder.thread.start()
            return lane

    def remove(self, name: str) -> None:
        """A source leaves, at any moment; its clips that wait do not run.

        Raises:
            InputError: there is none of that name.
        """
        with self._lock:
            feeder = self._feeders.pop(name, None)
        if feeder is None:
            raise InputError(f"there is no source called {name!r:.60}")
        feeder.stop()
        feeder.join()

    def names(self) -> tuple[str, ...]:
        """Of the sources, in the order in which they were added; one that ended stays until it is removed."""
        with self._lock:
            return tuple(self._feeders)

    def statistics(self) -> dict[str, Statistics]:
        """How each source does, by name."""
        with self._lock:
            feeders = dict(self._feeders)
        return {name: feeder.statistics() for name, feeder in feeders.items()}

    # -------------------------------------------------------------------------------------------------------- the model

    def step(self, tell: Callable[[Outcome], object]) -> bool:
        """Wait for what is next, run it, and tell every outcome.

        A source has one call at a time until its outcome is told, so that outcomes are told in order.

        Returns:
            Whether there may be more; False when the scheduler is closed.
        """
        found = self.schedule.take()
        if found is None:
            return False
        if isinstance(found, Lane):
            tell(Over(found, found.error))
            return True
        seconds = None
        try:
            began = self.now()
            outcomes = self._run(found, began)
            if any(isinstance(outcome, Prediction) and not outcome.skipped for outcome in outcomes):
                seconds = self.now() - began
            for outcome in outcomes:
                tell(outcome)
        finally:
            self.schedule.done(found, seconds)
        return True

    def _run(self, works: Sequence[Work], began: float) -> Sequence[Outcome]:
        feeders = [self._feeder(work.lane) for work in works]
        still = [feeder is not None and feeder.still(work.clip) for work, feeder in zip(works, feeders, strict=True)]
        asked = [work.clip.frames for work, same in zip(works, still, strict=True) if not same]
        try:
            logits = iter(self.model(asked[0][None] if len(asked) == 1 else np.stack(asked)) if asked else ())
        except Exception as error:  # noqa: BLE001 - whatever the model raises is told to the app
            for feeder in feeders:
                if feeder is not None and feeder.gate is not None:
                    feeder.gate.reset()
            return [Failed(tuple(dict.fromkeys(work.lane.name for work in works)), error)]
        ended = self.now()
        outcomes = []
        for work, feeder, same in zip(works, feeders, still, strict=True):
            row = feeder.held if same and feeder is not None else next(logits)
            assert row is not None
            if feeder is not None:
                feeder.held = row
            outcomes.append(self._answer(work, feeder, row, began, ended, same))
        return outcomes

    def _feeder(self, lane: Lane) -> _Feeder | None:
        """Of a source; None where it was removed."""
        with self._lock:
            feeder = self._feeders.get(lane.name)
        return feeder if feeder is not None and feeder.lane is lane else None

    def _answer(
        self,
        work: Work,
        feeder: _Feeder | None,
        logits: npt.NDArray[np.float32],
        began: float,
        ended: float,
        skipped: bool,
    ) -> Prediction:
        clip = work.clip
        found = answer.prediction(
            logits,
            self.model.labels,
            self.top_k,
            start=clip.start,
            end=clip.end,
            latency_ms=(work.prepared_s + ended - began) * 1e3,
            source=work.lane.name,
            captured_at=clip.captured_at,
            age_ms=(ended - clip.captured_at) * 1e3,
            dropped=work.dropped,
            restarted=clip.restarted,
            skipped=skipped,
        )
        if feeder is not None:
            feeder.answered(found)
        return found

    def close(self) -> None:
        """End everything, at any moment, from any thread, more than once; waits for the sources' threads."""
        if os.getpid() != self._process:
            return  # it is the parent's: its threads are not here, and its locks may be locked for ever
        with self._lock:
            self._closed = True
            feeders = tuple(self._feeders.values())
        self.schedule.close()
        for feeder in feeders:
            feeder.stop()
        for feeder in feeders:
            feeder.join()
