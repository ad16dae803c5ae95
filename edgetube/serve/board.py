"""What is known about every source at this moment: for the page, for programs and for the metrics."""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

import numpy as np

from edgetube.errors import InputError
from edgetube.live.cameras import Cameras
from edgetube.live.decisions import Decider, DecisionRule, Event
from edgetube.live.frame import State
from edgetube.live.scheduler import Statistics
from edgetube.serve import jpeg
from edgetube.serve.watched import WatchedSource
from edgetube.spec import Prediction

POINTS = 600
"""Answers of each source that are kept for the chart."""

SPANS = 50
"""Spans of each source that are kept after they ended."""

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Upper bounds of histograms, in seconds."""

PICTURE_WIDTH = 640


Listener: TypeAlias = Callable[[dict[str, Any]], object]
"""Is told every answer to one source as the object of `Prediction.to_json`, and every error as {"error": text}."""


class Histogram:
    """Counts of seconds by `BOUNDS`.

    Attributes:
        counts: of those at most as large as each bound, and larger than the one before; last of those above all.
        total: sum of all, in seconds.
    """

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds


class Track:
    """One source: its answers and decisions. `lock` guards every attribute but the first three.

    Attributes:
        number: in addresses; never used twice.
        name: of its predictions; without credentials.
        source: whose frames they are.
    """

    def __init__(
        self,
        number: int,
        name: str,
        source: WatchedSource,
        decider: Decider,
        top_k: int,
        listener: Listener | None,
    ) -> None:
        self.number, self.name, self.source = number, name, source
        self.lock = threading.Lock()
        self.latency, self.age = Histogram(), Histogram()
        self.listener = listener
        self.why = ""
        self.problem: str | None = None
        self.latest: Prediction | None = None
        self.opened = self.skipped = 0
        self._decider, self._top_k = decider, top_k
        self._points: deque[tuple[int, float, dict[str, float]]] = deque(maxlen=POINTS)
        self._count = 0
        self._ended: deque[dict[str, Any]] = deque(maxlen=SPANS)
        self._encoding = threading.Lock()
        self._encoded: tuple[int, bytes] | None = None

    def answered(self, prediction: Prediction) -> list[Event]:
        """Take an answer; returns what it decided.

        Raises:
            InputError: its logits are not finite.
        """
        with self.lock:
            events = self._decider.update(prediction)
            self.latest, self.problem = prediction, None
            self.skipped += prediction.skipped
            self.latency.add(prediction.latency_ms / 1e3)
            self.age.add((prediction.age_ms or 0.0) / 1e3)
            self._note(events)
            smoothed = self._decider.smoothed
            if smoothed is not None and prediction.end is not None:
                best = np.argsort(-smoothed, kind="stable")[: self._top_k]
                scores = {self._decider.labels[i]: round(float(smoothed[i]), 4) for i in best}
                self._count += 1
                self._points.append((self._count, round(prediction.end, 3), scores))
            return events

    def ended(self) -> list[Event]:
        """There are no more answers; returns what that decided."""
        with self.lock:
            events = self._decider.flush()
            self._note(events)
            return events

    def _note(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.kind == "opened":
                self.opened += 1
            else:
                self._ended.append(asdict(event.span))

    def picture(self) -> tuple[int, bytes] | None:
        """The number of the newest frame, and the frame as JPEG, encoded once; None before the first frame."""
        with self._encoding:
            frame = self.source.newest
            if frame is None:
                return None
            if self._encoded is None or self._encoded[0] != frame.number:
                self._encoded = frame.number, jpeg.encode(frame.pixels, PICTURE_WIDTH)
            return self._encoded

    def to_json(self, statistics: Statistics | None, since: int = 0) -> dict[str, Any]:
        """All that is known; of the chart the points after number `since`."""
        with self.lock:
            latest = self.latest
            found = {
                "id": self.number,
                "name": self.name,
                "state": self.source.state,
                "why": self.why,
                "problem": self.problem,
                "count": self._count,
                "skipped": self.skipped,
                "points": [[seconds, scores] for number, seconds, scores in self._points if number > since],
                "open": [asdict(span) for span in self._decider.open],
                "ended": list(self._ended),
                "prediction": None if latest is None else latest.to_json() | {"logits": None},
            }
        return found if statistics is None else found | {"statistics": asdict(statistics) | {"state": None}}


class Board:
    """The sources of one server. Any thread may call it.

    Args:
        rule: how scores become spans.
        labels: of the model.
        top_k: how many labels a point of the chart has.
        on_event: told (name, event) of every decision.
        on_state: told (name, state, why).

    Raises:
        InputError: the rule names a label that is not among them.
    """

    def __init__(
        self,
        rule: DecisionRule,
        labels: Sequence[str],
        top_k: int = 5,
        *,
        on_event: Callable[[str, Event], object] = lambda name, event: None,
        on_state: Callable[[str, State, str], object] = lambda name, state, why: None,
    ) -> None:
        Decider(rule, labels)
        self.rule, self.labels = rule, tuple(labels)
        self._top_k, self._on_event, self._on_state = top_k, on_event, on_state
        self._tracks: dict[str, Track] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def add(self, name: str, source: WatchedSource, listener: Listener | None = None) -> Track:
        """A source joins, before its first answer; see `Listener`."""
        decider = Decider(self.rule, self.labels)
        with self._lock:
            track = Track(next(self._numbers), name, source, decider, self._top_k, listener)
            self._tracks[name] = track
            return track

    def remove(self, name: str) -> None:
        """A source leaves, and its history with it."""
        with self._lock:
            self._tracks.pop(name, None)

    def tracks(self) -> tuple[Track, ...]:
        """Of all sources, in the order in which they came."""
        with self._lock:
            return tuple(self._tracks.values())

    def track(self, number: int) -> Track | None:
        """The source with a number."""
        return next((track for track in self.tracks() if track.number == number), None)

    def to_json(self, cameras: Cameras | None, since: dict[int, int] | None = None) -> list[dict[str, Any]]:
        """What is known about each source; of charts what is newer than `since` says, by the number of the source."""
        statistics = {} if cameras is None else cameras.statistics()
        return [
            track.to_json(statistics.get(track.name), (since or {}).get(track.number, 0)) for track in self.tracks()
        ]

    # ------------------------------------------------------------------------------------------- callbacks of `Cameras`

    def answered(self, prediction: Prediction) -> None:
        """An answer came."""
        if (track := self._tracks.get(prediction.source or "")) is None:
            return
        try:
            events = track.answered(prediction)
        except InputError as error:
            self.failed(track.name, error)
            return
        for event in events:
            self._on_event(track.name, event)
        if track.listener is not None:
            track.listener(prediction.to_json())

    def changed(self, name: str, state: State, why: str) -> None:
        """The state of a source changed."""
        if (track := self._tracks.get(name)) is not None:
            with track.lock:
                track.why = why
            self._on_state(name, state, why)

    def failed(self, name: str, error: BaseException) -> None:
        """A source, or a call of the model, failed."""
        if (track := self._tracks.get(name)) is not None:
            with track.lock:
                track.problem = str(error)
            if track.listener is not None:
                track.listener({"error": str(error)})

    def ended(self, name: str) -> None:
        """A source gives no more answers."""
        if (track := self._tracks.get(name)) is not None:
            for event in track.ended():
                self._on_event(name, event)
