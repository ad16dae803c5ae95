"""A source of frames that may fail and come back: its thread, its queue, its state and its account."""

from __future__ import annotations

import atexit
import os
import random
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from typing_extensions import Self

from edgetube import address, hwdecode, interrupts, preprocess
from edgetube.address import Source
from edgetube.decoding import DeviceFailed, Refused
from edgetube.errors import EdgetubeError, InputError
from edgetube.hwdecode import Decoder
from edgetube.live import feeds
from edgetube.live.feeds import Arrival, Feed
from edgetube.live.frame import Frame, Ledger, State
from edgetube.live.timeline import Look, Timeline

Policy: TypeAlias = Literal["latest", "all"]
"""What happens when a source is faster than its reader: old frames are dropped, or the source waits."""

Subscriber: TypeAlias = Callable[[State, str], None]
"""Is told each new state, and why in a few words."""

CAPACITY: dict[Policy, int] = {"latest": 32, "all": 4}
"""Frames that wait for a reader, by default."""

STALL_AFTER_S = 2.0
"""Seconds without a frame after which a live source is stalled."""

OPEN_WITHIN_S = 10.0
"""Seconds after which a live source that never gave a frame is given up."""

JOIN_S = 1.0
"""Seconds that `close` waits for the thread. Only a call of FFmpeg that waits for a network takes longer, and ends by
its own time limit."""

FIRST_RETRY_S, LAST_RETRY_S = 0.1, 0.5
"""Seconds before a lost source is opened again: at first, and at most. They double in between. With half a second a
camera that came back is seen within two seconds, the window of a second that it has to fill included."""

LIVED_S = 1.0
"""Seconds of frames after which a connection was none of a server that fails again and again."""

_open_sources: weakref.WeakSet[FrameSource] = weakref.WeakSet()


class Ended(Exception):
    """The source has given all of its frames, or was closed."""


def delays(draw: Callable[[], float] = random.random) -> Iterator[float]:
    """Seconds before each next try: doubled from one to the next, of which a random half is left out, so that cameras
    that were lost together do not all come back at once.

    Args:
        draw: random numbers in [0, 1).
    """
    longest = FIRST_RETRY_S
    while True:
        yield longest * (1 - draw() / 2)
        longest = min(2 * longest, LAST_RETRY_S)


class FrameSource:
    """The frames of a camera, a URL, a file, a folder of pictures, an iterator, or the app itself.

    A thread of its own reads it from the start on; `read` takes its frames. Every method may be called by any thread.
    A context manager. Pickled, for a process that multiprocessing spawns, it is its arguments: the copy opens the
    source again. A forked process has to make its own.

    Args:
        source: a path of a video or a picture, or of a folder of pictures; a camera's index as a number or digits; a
            URL (rtsp://, http://, srt://, ...); or an iterable of frames (H, W, 3) uint8 RGB or (seconds, frame) pairs.
        name: for messages; None takes the source's own, without credentials.
        policy: "latest": when `capacity` frames wait, the oldest makes room for a new one; "all": the source waits.
            None: "latest" for what is live, cameras and URLs, but "all" for a URL that is a finite file.
            An iterable with "latest" is taken to be live.
        fps: of pictures in a folder and of bare frames: number i is shown at i / fps. None counts whole seconds; live
            frames then have the time of their arrival.
        capacity: frames that wait at most; None: 32 for "latest", 4 for "all".
        decoder: what decodes cameras and URLs: "cpu", "nvdec" (NVIDIA), "vaapi" (Intel, AMD), or "auto", the first of
            these devices that is there. Where one cannot, the CPU decodes, and `fallbacks` says why.
        reconnect: open a camera or a URL again when it is lost, until it is closed; False: that is an error.
        stall_after: seconds without a frame after which a live source is "stalled".
        open_within: seconds within which a camera or a URL has to give its first frame; until then it is tried again
            and again. None tries for ever, 0 once.

    Attributes:
        name: for messages; it holds no credentials.
        ledger: where its frames went; whoever reads the frames counts those that are used.

    Raises:
        InputError: arguments that cannot be used. What happens to the source later is for `read` and `state`.
    """

    def __init__(
        self,
        source: Source | Iterable[Any],
        *,
        name: str | None = None,
        policy: Policy | None = None,
        fps: float | None = None,
        capacity: int | None = None,
        decoder: Decoder = "auto",
        reconnect: bool = True,
        stall_after: float = STALL_AFTER_S,
        open_within: float | None = OPEN_WITHIN_S,
    ) -> None:
        self._source = source
        self._options: dict[str, Any] = {
            "name": name, "policy": policy, "fps": fps, "capacity": capacity, "decoder": decoder,
            "reconnect": reconnect, "stall_after": stall_after, "open_within": open_within,
        }  # fmt: skip
        hwdecode.check(decoder)
        feed = feeds.choose(source, name, fps, live=policy == "latest", decoder=decoder)
        self._prepare(feed.name, feed.live, policy, capacity, stall_after)
        self._feed: Feed | None = feed
        self._reconnect = reconnect
        self._open_within = None if open_within is None else preprocess.number(open_within, "open_within", "seconds")
        self._start(self._run)

    @classmethod
    def pushed(
        cls,
        name: str,
        *,
        policy: Policy = "latest",
        capacity: int | None = None,
        stall_after: float = STALL_AFTER_S,
    ) -> Self:
        """A source whose frames the app gives with `push`.

        Raises:
            InputError: arguments that cannot be used.
        """
        self = cls.__new__(cls)
        self._feed = None
        self._prepare(name, True, policy, capacity, stall_after)
        self._start(None)
        return self

    def _prepare(self, name: str, live: bool, policy: Policy | None, capacity: int | None, stall_after: float) -> None:
        if not isinstance(name, str) or not name:
            raise InputError(f"name is {name!r:.60}; expected text")
        if policy not in (None, "latest", "all"):
            raise InputError(f"policy is {policy!r:.60}; expected latest or all")
        if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1):
            raise InputError(f"capacity is {capacity!r:.60}; expected a whole number of frames >= 1")
        self._stall_after = preprocess.positive(stall_after, "stall_after", "seconds > 0")
        self.name = name
        self.ledger = Ledger()
        self._process = os.getpid()
        self._asked, self._capacity = policy, capacity
        self._live = live
        self._timeline = Timeline(live)
        self._lock = threading.RLock()  # a handler of a signal may close what its thread reads
        self._changed = threading.Condition(self._lock)
        self._entered = threading.Condition(self._lock)
        self._waiting: deque[Frame] = deque()
        self._blocked = False
        self._heard: float | None = None
        self._paired: bool | None = None
        self._state: State = "connecting"
        self._error: EdgetubeError | None = None
        self._closed = self._ended = False
        self._subscribers: list[Subscriber] = []
        self._news: deque[tuple[State, str]] = deque()
        self._telling = False
        self._pushing = threading.Lock()
        self._threads: list[threading.Thread] = []

    def _start(self, read: Callable[[], None] | None) -> None:
        _open_sources.add(self)
        for run in (read, self._watch if self._live else None):
            if run is not None:
                self._threads.append(threading.Thread(target=run, name=f"edgetube: {self.name}", daemon=True))
                self._threads[-1].start()

    # ------------------------------------------------------------------------------------------------------ for the app

    @property
    def is_live(self) -> bool:
        """Whether frames come in real time by themselves. Known of a URL once it was opened; True until then."""
        return self._live

    @property
    def policy(self) -> Policy:
        """What happens when the source is faster than its reader."""
        return self._asked or ("latest" if self._live else "all")

    @property
    def decoder(self) -> str | None:
        """What decodes it: cpu, nvdec or vaapi; of frames that come decoded None."""
        return self._feed.decoder if isinstance(self._feed, feeds.Decoded) else None

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Why each decoder that was to be taken before is not taken; known when the source is open."""
        return self._feed.fallbacks if isinstance(self._feed, feeds.Decoded) else ()

    @property
    def state(self) -> State:
        """Whether frames come; see `edgetube.live.frame.State`."""
        return self._state

    @property
    def error(self) -> EdgetubeError | None:
        """Why it ended, or why it is lost or not open yet; None while frames come."""
        return self._error

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        """Call `callback(state, why)` at each change of the state: in order, one at a time, from any thread.

        A callback may call any method. What it raises is printed as what a thread raises, and changes nothing.

        Returns:
            A function that ends this.
        """
        self._check_process()
        with self._changed:
            self._subscribers.append(callback)

        def unsubscribe() -> None:
            with self._changed:
                if callback in self._subscribers:
                    self._subscribers.remove(callback)

        return unsubscribe

    def push(self, frame: Any, captured_at: float | None = None) -> None:
        """Give a frame to a source that was made with `pushed`; it is copied.

        With the policy "all" it waits until there is room. A frame for a closed source is counted as dropped.

        Args:
            frame: (H, W, 3) uint8 RGB.
            captured_at: seconds of the app's own clock, from any beginning; all frames have it or none. None: its time
                is that of its arrival.

        Raises:
            InputError: the frame or its time cannot be used, the source is not made for it, or the process forked.
        """
        self._check_process()
        if self._feed is not None:
            raise InputError(f"{self.name} reads its own frames; make a source for pushed ones with FrameSource.pushed")
        with self._pushing:
            came = time.monotonic()
            what = f"the frame pushed to {self.name}"
            stamp = None if captured_at is None else preprocess.seconds(captured_at, f"captured_at of {what}")
            pixels = preprocess.frame(frame, what)
            if self._paired not in (None, stamp is not None):
                known = "has a" if stamp is not None else "has no"
                raise InputError(f"{what} {known} captured_at, unlike those before; expected one kind")
            self._paired = stamp is not None
            self._take(Arrival(came, stamp, pixels))

    def read(self, timeout: float | None = None) -> Frame | None:
        """Take the oldest waiting frame.

        Args:
            timeout: seconds to wait for one; None waits for ever.

        Returns:
            The frame, or None if none came in time.

        Raises:
            Ended: the source has given all of its frames, or is closed.
            EdgetubeError: the source failed for good. Frames that came before are given first.
            InputError: a timeout that is no number, or the process forked.
        """
        self._check_process()
        until = None if timeout is None else time.monotonic() + preprocess.number(timeout, "timeout", "seconds")
        with self._changed:
            while not self._waiting:
                if self._ended:
                    if self._error is not None and not self._closed:
                        raise self._error.with_traceback(None)
                    raise Ended(f"{self.name} has ended")
                left = 1.0 if until is None else until - time.monotonic()
                if left <= 0:
                    return None
                self._changed.wait(min(left, 1.0))
                interrupts.check()
            frame = self._waiting.popleft()
            self._changed.notify_all()
            return frame

    def close(self) -> None:
        """End it at once; frames that wait are dropped. At any moment, more than once, from any thread.

        It waits for the source's thread, at most `JOIN_S` seconds: a call of FFmpeg that waits for a network is left to
        its own time limit.
        """
        if os.getpid() != self._process:
            return  # it is the parent's
        self._stop()
        self._join(time.monotonic() + JOIN_S)

    def _join(self, until: float) -> None:
        _open_sources.discard(self)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))

    def _stop(self) -> None:
        with self._lock:
            self._closed = True
            if self._waiting:
                self.ledger.drop("closed", len(self._waiting))
                self._waiting.clear()
            self._finish(None, "it was closed")
        self._tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {self._state}>"

    def __reduce__(self) -> tuple[Any, ...]:
        source = None if self._feed is None else self._source
        if not isinstance(source, int | str | Path):
            raise InputError(f"{self.name} gives frames of this process and cannot be sent to another: make it there")
        parsed = address.parse(source)
        return partial(FrameSource, **self._options), (parsed.absolute() if isinstance(parsed, Path) else parsed,)

    def _check_process(self) -> None:
        # Locks that another thread held at the fork stay locked in the child, and the source's thread is not there.
        if os.getpid() != self._process:
            raise InputError(
                f"{self.name} was opened before the process forked and cannot be used in the child; make it there, or "
                "start processes with multiprocessing's spawn method"
            )

    # ------------------------------------------------------------------------------------------------------ the threads

    def _run(self) -> None:
        """Read the feed until it ends for good."""
        assert self._feed is not None, "only sources with a feed have this thread"
        began, waits = time.monotonic(), delays()
        while True:
            opened, failure = time.monotonic(), self._read_feed(self._feed)
            if (self._heard or opened) - opened > LIVED_S:
                waits = delays()
            if failure is None or self._is_final(failure, began):
                with self._changed:
                    self._finish(failure, str(failure) if failure else "it has ended")
                self._tell()
                return
            with self._changed:
                self._error = failure
                if self._heard is not None:
                    self._timeline.interrupt("a new connection")
                    self._enter("lost", str(failure))
            self._tell()
            with self._changed:
                self._changed.wait_for(lambda: self._ended, next(waits))
                if self._ended:
                    return

    def _read_feed(self, feed: Feed) -> EdgetubeError | None:
        """Read it to its end; returns why it ended, None where that is how it ends."""
        try:
            with feed.open() as arrivals:
                if self._live != feed.live:  # a URL turns out to be a finite file
                    self._live, self._timeline = feed.live, Timeline(feed.live)
                for arrival in arrivals:
                    self._take(arrival)
                    if self._ended:
                        return None
        except EdgetubeError as error:
            error.__traceback__ = None  # which holds what opened the source, and its address
            if error.__suppress_context__:
                error.__context__ = None
            return error
        except Exception as error:  # noqa: BLE001 - a fault of ours, or of what we call: whoever reads has to hear of it
            failure = InputError(f"{self.name} failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            return failure
        return InputError(f"{self.name} has ended: the other side closed it") if feed.again else None

    def _is_final(self, failure: EdgetubeError, began: float) -> bool:
        assert self._feed is not None, "only sources with a feed fail"
        if isinstance(failure, DeviceFailed) and not self._ended:
            return False  # the CPU is next
        if self._ended or not self._reconnect or not self._feed.again or isinstance(failure, Refused):
            return True
        if self._heard is not None or self._open_within is None:
            return False
        return time.monotonic() - began >= self._open_within

    def _take(self, arrival: Arrival) -> None:
        """Count what came, and put it into the queue or leave it out. One thread at a time."""
        with self._lock:
            frame = self._count(arrival)
        self._tell()
        if frame is not None:
            with self._lock:
                self._queue(frame)

    def _count(self, arrival: Arrival) -> Frame | None:
        """The frame that came; None where it is left out."""
        number, pixels = self.ledger.capture(), arrival.pixels
        if self._ended:
            self.ledger.drop("closed")
            return None
        if pixels is None:
            self.ledger.drop("damaged")
            return None
        self._heard, self._error = arrival.came, None
        self._enter("live", "frames come")
        look = Look(pixels.shape[0], pixels.shape[1], arrival.turn)
        placed = self._timeline.place(arrival.stamp, arrival.came, look)
        if placed is None:
            self.ledger.drop("late")
            return None
        return Frame(pixels, number, arrival.came, placed.seconds, placed.restarted, placed.gap)

    def _queue(self, frame: Frame) -> None:
        """Called with the lock held, which it gives away while it waits for room."""
        capacity = self._capacity or CAPACITY[self.policy]
        if self.policy == "all":
            self._blocked = True
            self._changed.wait_for(lambda: self._ended or len(self._waiting) < capacity)
            self._blocked, self._heard = False, time.monotonic()
        if self._ended:
            self.ledger.drop("closed")
            return
        left = None
        while len(self._waiting) >= capacity:
            left = self._waiting.popleft()
            self.ledger.drop("overrun")
        self._waiting.append(frame)
        if left is not None:  # the reader does not get what the oldest one continues
            self._waiting[0] = _after(left, self._waiting[0])
        self._changed.notify_all()

    def _watch(self) -> None:
        """Say that a live source is stalled: its own thread waits in a call of FFmpeg, or is the app's."""
        while True:
            with self._lock:
                while not self._is_stalled():
                    if self._ended:
                        return
                    silent = 0.0 if self._heard is None or self._blocked else time.monotonic() - self._heard
                    self._entered.wait(self._stall_after - silent if self._state == "live" else None)
                self._enter("stalled", f"no frame for {self._stall_after:g} s")
            self._tell()

    def _is_stalled(self) -> bool:
        if self._state != "live" or not self._live or self._heard is None or self._blocked:
            return False
        return time.monotonic() - self._heard >= self._stall_after

    def _enter(self, state: State, why: str) -> None:
        """Note a state, with the lock held; `_tell` tells it without."""
        if state != self._state and not self._ended:
            self._state = state
            self._news.append((state, why))
            self._entered.notify_all()

    def _finish(self, error: EdgetubeError | None, why: str) -> None:
        """No frame comes any more; with the lock held."""
        if not self._ended:
            self._enter("closed", why)
            self._ended, self._error = True, error
            self._changed.notify_all()
            self._entered.notify_all()

    def _tell(self) -> None:
        """Tell the subscribers what is new. Whoever comes while another thread does that leaves it to that thread."""
        while True:
            with self._lock:
                if self._telling or not self._news:
                    return
                self._telling = True
                state, why = self._news.popleft()
                subscribers = tuple(self._subscribers)
            try:
                for subscriber in subscribers:
                    call_app(subscriber, state, why)
            finally:
                with self._lock:
                    self._telling = False


def _after(left: Frame, frame: Frame) -> Frame:
    """A frame, with why it does not continue what was read before: the one between them was left out."""
    if frame.restarted is not None and not frame.gap:
        return frame
    if left.restarted is not None and not left.gap:  # what is more than missing frames is not forgotten
        return replace(frame, restarted=left.restarted, gap=False)
    why = frame.restarted or left.restarted or "frames were left out: they came faster than they were read"
    return replace(frame, restarted=why, gap=True)


def call_app(callback: Callable[..., object] | None, *arguments: object) -> None:
    """Call a callback of the app, if there is one; what it raises is printed as what a thread raises."""
    if callback is None:
        return
    try:
        callback(*arguments)
    except Exception:  # noqa: BLE001 - the app's, and nothing that could be handled here
        threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))


@atexit.register
def _close_all() -> None:
    """A thread in a call of FFmpeg must not outlive the interpreter."""
    left = [source for source in _open_sources if source._process == os.getpid()]
    for source in left:
        source._stop()
    until = time.monotonic() + JOIN_S
    for source in left:
        source._join(until)
