"""Which clips of which sources the model answers next. No thread and no model: decisions, and the account of them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from edgetube import interrupts, preprocess
from edgetube.errors import InputError
from edgetube.live.frame import DropCause, Ledger
from edgetube.live.source import Policy
from edgetube.live.window import LiveClip

MAX_AGE_S = 0.5
"""Seconds: see `Schedule`."""

BATCH_WAIT_MS = 10.0
"""Milliseconds that a clip waits for others to fill the model's batch; a batch of 1 waits for nothing."""

REMEMBERED = 8
"""Calls that the duration of the next one is guessed from: as long as the longest of them."""

LOOK_S = 1.0
"""Seconds between two looks for a signal that a library swallowed."""


@dataclass(frozen=True)
class Work:
    """One clip for the model.

    Attributes:
        prepared_s: seconds of work that its newest frame took: resizing, and copying the clip.
        ready_at: when it was ready.
        dropped: frames of its source that were lost since the clip before it.
    """

    lane: Lane
    clip: LiveClip
    prepared_s: float
    ready_at: float
    dropped: int = 0


@dataclass(eq=False)
class Lane:
    """One source, as the schedule sees it: its clips that wait, and what became of its frames."""

    name: str
    ledger: Ledger
    policy: Policy
    waiting: deque[Work] = field(default_factory=deque)
    running: bool = False
    served: int = 0
    ended: bool = False
    error: BaseException | None = None
    shown: deque[int] = field(default_factory=deque)
    """Numbers of frames that only clips show which have not run."""
    newest: int = -1
    lost: int = 0
    restarted: str | None = None

    def note(self, clip: LiveClip) -> None:
        """A clip may run."""
        self.shown.extend(number for number in clip.numbers if number > self.newest)
        self.newest = max(self.newest, clip.numbers[-1])

    def pass_by(self, number: int, cause: DropCause) -> None:
        """Frames before `number` will not be shown any more."""
        gone = 0
        while self.shown and self.shown[0] < number:
            self.shown.popleft()
            gone += 1
        if gone:
            self.ledger.drop(cause, gone, used=True)

    def run(self, work: Work) -> Work:
        """A clip runs; with what was lost and restarted since the one before it."""
        first, last = work.clip.numbers[0], work.clip.numbers[-1]
        self.pass_by(first, "overrun")
        while self.shown and self.shown[0] <= last:
            self.shown.popleft()
        dropped = self.ledger.account().dropped
        lost = sum(count for cause, count in dropped.items() if cause != "sampling")
        clip = replace(work.clip, restarted=work.clip.restarted or self.restarted)
        self.restarted = None
        new, self.lost = lost - self.lost, lost
        return replace(work, clip=clip, dropped=new)

    def skip(self, work: Work) -> None:
        """A clip does not run; why the window restarted is said by the next one."""
        self.restarted = work.clip.restarted or self.restarted

    def leave(self, cause: DropCause) -> None:
        """No clip runs any more."""
        self.waiting.clear()
        self.pass_by(self.newest + 1, cause)


class Schedule:
    """The clips of several sources for one model; any thread may call.

    Sources take turns: of those with a clip, the one that was served longest ago is next. One source has one call at a
    time, so that its answers are in order. A batch is run when it is full, when nobody could add to it, or when its
    first clip has waited for `batch_wait_ms`: a source that stalls delays the others by no more than that.

    With the policy "latest" a newer clip takes the place of one that waits. A clip is left out where its answer would
    come more than `max_age` seconds after its newest frame did, as long as the model is as fast as in its last calls.
    Where one call alone takes more than half of `max_age`, a clip may still be half of `max_age` old when its call
    begins; where preparing a clip takes that long, it may still wait for half of `max_age`: a device that is too slow
    gives old answers, not none. With "all" no clip is left out; `offer` waits instead.

    Args:
        batch: clips of one call, at most.
        batch_wait_ms: milliseconds.
        max_age: seconds; None for no limit.
        now: seconds of the monotonic clock that frames are captured by.
    """

    def __init__(
        self,
        batch: int = 1,
        *,
        batch_wait_ms: float = BATCH_WAIT_MS,
        max_age: float | None = MAX_AGE_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.batch, self.now = preprocess.count_of(batch, "batch"), now
        self.batch_wait = preprocess.number(batch_wait_ms, "batch_wait_ms", "milliseconds >= 0") / 1e3
        self.max_age = None if max_age is None else preprocess.positive(max_age, "max_age", "seconds > 0, or None")
        if self.batch_wait < 0:
            raise InputError(f"batch_wait_ms is {batch_wait_ms}; expected milliseconds >= 0")
        self._changed = threading.Condition()
        self._lanes: list[Lane] = []
        self._closed = False
        self._turn = 0
        self._calls: deque[float] = deque(maxlen=REMEMBERED)

    # ------------------------------------------------------------------------------------------------------ the sources

    def add(self, name: str, ledger: Ledger, policy: Policy) -> Lane:
        """A source that will offer clips; it takes its turn as if it had just been served."""
        with self._changed:
            lane = Lane(name, ledger, policy, served=self._turn)
            self._lanes.append(lane)
            return lane

    def remove(self, lane: Lane) -> None:
        """No clip of this source runs any more, except one that runs already."""
        with self._changed:
            lane.ended = True
            lane.leave("closed")
            if lane in self._lanes:
                self._lanes.remove(lane)
            self._changed.notify_all()

    def offer(self, lane: Lane, clip: LiveClip, prepared_s: float = 0.0) -> bool:
        """A clip is ready. With the policy "all" this waits until there is room for it.

        Returns:
            Whether the source should go on; False when it was removed, or everything closed.
        """
        with self._changed:
            while lane.policy == "all" and len(lane.waiting) >= self.batch and not (lane.ended or self._closed):
                self._changed.wait()
            if lane.ended or self._closed:
                lane.note(clip)
                lane.leave("closed")
                return False
            lane.note(clip)
            if lane.policy == "latest":
                while lane.waiting:
                    lane.skip(lane.waiting.popleft())
                lane.pass_by(clip.numbers[0], "overrun")
            lane.waiting.append(Work(lane, clip, prepared_s, self.now()))
            self._changed.notify_all()
            return True

    def finish(self, lane: Lane, error: BaseException | None = None) -> None:
        """A source has offered its last clip; `take` says so once those that wait have run."""
        with self._changed:
            if not lane.ended:
                lane.ended, lane.error = True, error
                self._changed.notify_all()

    # -------------------------------------------------------------------------------------------------------- the model

    def take(self) -> list[Work] | Lane | None:
        """Wait for what is next.

        Returns:
            Clips to run, of which `done` has to be told; or a source that has ended, once; or None: closed.
        """
        with self._changed:
            while not self._closed:
                found, wait = self.choose(self.now())
                if found:
                    return found
                over = next((lane for lane in self._lanes if lane.ended and not (lane.waiting or lane.running)), None)
                if over is not None:
                    over.leave("overrun")
                    self._lanes.remove(over)
                    return over
                self._changed.wait(LOOK_S if wait is None else min(wait, LOOK_S))
                if threading.current_thread() is threading.main_thread():
                    interrupts.check()
            return None

    def choose(self, now: float) -> tuple[list[Work], float | None]:
        """What runs at a moment: the clips; where there are none, seconds until one is due without further events."""
        with self._changed:
            limit = self.limit()
            if limit is not None:
                for lane in self._lanes:
                    while lane.policy == "latest" and lane.waiting and self._is_old(lane.waiting[0], now, limit):
                        lane.skip(lane.waiting.popleft())
            ready = sorted((lane for lane in self._lanes if lane.waiting and not lane.running), key=lambda x: x.served)
            if not ready:
                return [], None
            count = min(self.batch, sum(len(lane.waiting) for lane in ready))
            if count < self.batch and any(self._may_add(lane) for lane in self._lanes):
                wait = min(lane.waiting[0].ready_at for lane in ready) + self.batch_wait - now
                if wait > 0:
                    return [], wait
            chosen: list[Work] = []
            while len(chosen) < count:
                for lane in ready:
                    if lane.waiting and len(chosen) < count:
                        chosen.append(lane.run(lane.waiting.popleft()))
                        lane.running = True
                        self._turn += 1
                        lane.served = self._turn
            self._changed.notify_all()
            return chosen, 0.0

    def _may_add(self, lane: Lane) -> bool:
        """Whether a source that has no turn yet could offer a clip for the next call."""
        room = self.batch if lane.policy == "all" else 1
        return not (lane.ended or lane.running) and len(lane.waiting) < room

    def _is_old(self, work: Work, now: float, limit: float) -> bool:
        """Whether a clip waited for too long; one that was old when it was ready is not left out for that."""
        assert self.max_age is not None, "there is a limit"
        return now > max(work.clip.captured_at + limit, work.ready_at + self.max_age / 2)

    def limit(self) -> float | None:
        """Seconds that a clip may be old when its call begins; None for no limit."""
        if self.max_age is None:
            return None
        return max(self.max_age - max(self._calls, default=0.0), self.max_age / 2)

    def done(self, works: Sequence[Work], seconds: float | None = None) -> None:
        """A call is over and its answers are told; it took that long, where it succeeded."""
        with self._changed:
            for work in works:
                work.lane.running = False
            if seconds is not None:
                self._calls.append(seconds)
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing runs any more, except what runs already; whoever waits is told."""
        with self._changed:
            self._closed = True
            for lane in self._lanes:
                lane.ended = True
                lane.leave("closed")
            self._changed.notify_all()
