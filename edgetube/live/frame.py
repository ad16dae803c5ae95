"""A frame on its way from a source to a window, and the account of where every frame went."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from edgetube.resize import Frames

State: TypeAlias = Literal["connecting", "live", "stalled", "lost", "closed"]
"""Of a source: not open yet; frames come; none came for a while; gone, to be opened again; it gives no more frames."""

DropCause: TypeAlias = Literal["overrun", "late", "damaged", "sampling", "restart", "closed"]
"""Why a frame was not shown to the model: newer ones took its place in the queue; it is older than one before it; it
could not be decoded; the model takes fewer frames a second; its window restarted before it was full; the source was
closed first."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame of a source.

    Attributes:
        pixels: (H, W, 3) uint8 RGB, upright; a copy that nobody changes.
        number: counts the captured frames of the source from 0, dropped ones included.
        captured_at: seconds of `time.monotonic()` at which it arrived.
        seconds: of the source's own clock; the first frame of a source has 0.
        restarted: why it does not continue the frames before it (a gap, a clock that jumped, another size, a new
            connection), in a few words for the user; None where it does.
        gap: whether `restarted` is only that frames are missing: the clock goes on, and the picture is as large.
    """

    pixels: Frames = field(repr=False)
    number: int
    captured_at: float
    seconds: float
    restarted: str | None = None
    gap: bool = False


@dataclass(frozen=True)
class Account:
    """Where the frames of a source went: captured = used + waiting + all of dropped.

    Attributes:
        used: frames that were part of a window that the model answered, or may still become so.
        waiting: frames that no window has taken yet.
        dropped: by cause.
    """

    captured: int
    used: int
    waiting: int
    dropped: Mapping[DropCause, int]


class Ledger:
    """Counts the frames of one source; any thread may write and read."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a handler of a signal may count, too
        self._captured = self._used = 0
        self._dropped: Counter[DropCause] = Counter()

    def capture(self) -> int:
        """Count a frame that came; returns its number."""
        with self._lock:
            self._captured += 1
            return self._captured - 1

    def use(self, count: int = 1) -> None:
        """Count frames that a window took."""
        with self._lock:
            self._used += count

    def drop(self, cause: DropCause, count: int = 1, *, used: bool = False) -> None:
        """Count frames that no answer will show; with `used`, of those that a window had taken."""
        with self._lock:
            self._dropped[cause] += count
            self._used -= count if used else 0

    def account(self) -> Account:
        """The balance at this moment."""
        with self._lock:
            waiting = self._captured - self._used - self._dropped.total()
            return Account(self._captured, self._used, waiting, dict(self._dropped))
