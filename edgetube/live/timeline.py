"""The clock of a source: the time of each frame, and where a frame does not continue the frames before it."""

from __future__ import annotations

from collections import deque
from statistics import median_high
from typing import NamedTuple

from edgetube.preprocess import TOLERANCE

GAP_PERIODS = 1.5
"""Periods of a live source without a frame that are a gap: half a period more than a rate has."""

FREEZE_S = 10.0
"""Seconds that a file may hold a frame. Recordings of a still scene do that on purpose; after more it is a gap."""

MAX_LATE, LATE_S = 4, 1.0
"""Frames in a row, and seconds, by which frames may be out of order; with more the clock was set back."""

JUMP_S = 1.0
"""Seconds by which a source's clock may be ahead of the frames' arrival; with more it jumped, and nothing is missing
for that long. Networks bring frames in bursts of up to half a second."""

JITTER_S = 0.015
"""Seconds by which arrivals vary on any machine; they are the clock of sources that have none."""

HABIT_S = 60.0
"""Seconds for which a delay that was made up for is a source's habit."""

REMEMBERED, FEWEST = 31, 8
"""Differences of frames' times that a period is taken from, about a second; and the fewest of arrivals, because what a
server or a driver kept comes all at once in the beginning."""


class Look(NamedTuple):
    """What a window needs its frames to have in common."""

    height: int
    width: int
    turn: object = None
    """How the stored picture was turned to be upright, as the source says it; None where it says nothing."""


class Placed(NamedTuple):
    """The place of a frame in its source: what `edgetube.live.frame.Frame` says of it."""

    seconds: float
    restarted: str | None
    gap: bool = False


class Rhythm:
    """The period of a live source that stamps its frames: the median of the last differences between them."""

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=REMEMBERED)

    def is_gap(self, step: float) -> bool:
        """Whether frames are missing within `step` seconds between two frames; remembers it."""
        gap = bool(self._steps) and step > GAP_PERIODS * median_high(self._steps) + TOLERANCE
        if gap:
            self._steps.clear()  # the rate may be another from here on: one gap, not one for each frame
        self._steps.append(step)
        return gap


class Arrivals(Rhythm):
    """The period of a live source without stamps. Its frames are late at times, and nothing is missing.

    After a delay of a network or a driver the frames that were held up come all at once, and make up for it; after
    missing frames they do not. So a delay that was made up for is what this source does, for a while, and so is what
    came twice of late.
    """

    def __init__(self) -> None:
        super().__init__()
        self._usual: deque[float] = deque(maxlen=REMEMBERED)  # without delays and what made up for them
        self._owed = self._most = 0.0  # seconds of the delay that goes on, and at its longest
        self._since = 0  # frames of the delay that goes on
        self._allowed, self._age = 0.0, 0.0  # the longest delay of late that was made up for, and how long ago

    def is_gap(self, step: float) -> bool:
        """Whether frames are missing within `step` seconds between two frames; remembers it."""
        gap = False
        if len(self._steps) < FEWEST:
            self._usual.append(step)
        else:
            # The mean, which jitter leaves alone: what is late now is early next.
            period = max(sum(self._usual) / len(self._usual), TOLERANCE)
            twice = sorted(self._steps)[-2]
            gap = step > max(GAP_PERIODS * period, twice + JITTER_S, GAP_PERIODS * twice, period + 1.5 * self._allowed)
            self._follow(step, period)
        self._steps.append(step)
        return gap

    def _follow(self, step: float, period: float) -> None:
        """Find out whether a delay is made up for. The period stays as it is meanwhile."""
        self._age += step
        if self._age > HABIT_S:
            self._allowed = 0.0
        if not self._since and step <= GAP_PERIODS * period:
            self._usual.append(step)
            return
        self._since += 1
        self._owed += step - period
        self._most = max(self._most, self._owed)
        if self._owed < period / 2:
            self._allowed, self._age = max(self._allowed, self._most), 0.0
        elif self._owed > JUMP_S and self._since >= FEWEST:
            self._usual = self._steps.copy()  # the rate is another
        elif self._owed <= JUMP_S and self._since <= self._most / period + FEWEST:
            return  # it may still be made up for
        self._owed, self._most, self._since = 0.0, 0.0, 0


class Timeline:
    """Places the frames of one source on its clock.

    Stamps are the source's own times; a source without them is placed by arrival. The seconds of a live source begin
    at 0 and go on where its clock does not: after a jump, or over a new connection, by the time that passed meanwhile
    on arrival. Those of a file or of the caller's pairs are the stamps.

    Args:
        live: whether frames come in real time by themselves. Then a gap is more than `GAP_PERIODS` periods, else more
            than `FREEZE_S`.
    """

    def __init__(self, live: bool) -> None:
        self._live = live
        self._rhythm = Rhythm()
        self._shift: float | None = None
        self._stamped = False
        self._time = self._arrived = self._seconds = 0.0
        self._look: Look | None = None
        self._late = 0
        self._lag = 0.0  # seconds by which the last frame arrived later than the one before it had
        self._pending: str | None = None

    def interrupt(self, why: str) -> None:
        """The next frame does not continue the last one, and its stamps may begin anywhere: a new connection."""
        if self._look is not None:
            self._pending = why

    def place(self, stamp: float | None, arrived: float, look: Look) -> Placed | None:
        """Place the next frame; None for one that is not newer than a frame before it, which is to be left out.

        Args:
            stamp: seconds of the source's own clock, from any beginning; None where it has none.
            arrived: seconds of the monotonic clock.
        """
        time, stamped = arrived if stamp is None else stamp, stamp is not None
        if self._shift is None or self._look is None:
            self._shift = -time if self._live else 0.0
            self._rhythm = Rhythm() if stamped else Arrivals()
            return self._settle(time, arrived, look, stamped, None)
        passed = max(0.0, arrived - self._arrived)
        why, anew, gap = self._pending, self._pending is not None, False
        if not anew and self._stamped and not stamped:  # one among others that have a stamp
            return self._settle(self._time + max(passed, TOLERANCE), arrived, look, True, None)
        if not anew and stamped and not self._stamped:  # cameras send the first frames before they know the time
            anew = True
        if not anew:
            step = time - self._time
            is_late = step < 0 or (step == 0 and self._live and stamped)  # a coarse clock may stand still for a moment
            if is_late and step >= -LATE_S and self._late < MAX_LATE:
                self._late += 1
                return None
            # A demultiplexer may keep a frame until the next one begins, so the last one may have come after the gap.
            why, anew = self._judge(step, passed + self._lag)
            self._lag = max(0.0, passed - step)
            gap = why is not None and not anew
        if anew:
            self._lag = 0.0
            self._rhythm = Rhythm() if stamped else Arrivals()
            if self._live:
                self._shift = self._seconds + passed - time
        return self._settle(time, arrived, look, stamped, why, gap)

    def _judge(self, step: float, passed: float) -> tuple[str | None, bool]:
        """Why a frame does not continue the last one, and whether that is because the clock jumped."""
        if self._live and step == 0 and self._stamped:
            return "its clock stands still", True
        if step < 0:
            return f"its clock jumped back by {-step:.3f} s", True
        if self._live and step - passed > JUMP_S:  # also where there is no rhythm yet, which would take it for its own
            return f"its clock jumped ahead by {step - passed:.3f} s", True
        gap = self._rhythm.is_gap(step) if self._live else step > FREEZE_S
        return (f"no frame for {step:.3f} s", False) if gap else (None, False)

    def _settle(
        self, time: float, arrived: float, look: Look, stamped: bool, why: str | None, gap: bool = False
    ) -> Placed:
        assert self._shift is not None, "set with the first frame"
        if (why is None or gap) and self._look not in (None, look):
            why, gap = _change(self._look, look), False
        self._time, self._arrived, self._look, self._stamped = time, arrived, look, stamped
        self._seconds = time + self._shift
        self._late, self._pending = 0, None
        return Placed(self._seconds, why, gap)


def _change(before: Look, now: Look) -> str:
    if before[:2] != now[:2]:
        return f"its size changed from {before.width}x{before.height} to {now.width}x{now.height}"
    return "its rotation changed"
