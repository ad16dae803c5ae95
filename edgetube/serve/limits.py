"""What a client may ask for, and how often."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields

from edgetube.errors import InputError

CLIENTS = 1000
"""Clients whose rates are remembered; of more, those that asked longest ago are forgotten."""


@dataclass(frozen=True)
class Limits:
    """Checked on construction: all are positive numbers.

    Attributes:
        upload_bytes: of one file.
        upload_seconds: until a file has come.
        uploads: files at the same time, coming or being classified.
        frame_pixels: of one frame, of a file or of the WebSocket.
        decoded_pixels: frames x width x height of a file: what decoding all of it would cost.
        decode_seconds: until a file is read and decoded.
        requests: a second, of one client; twice as many may come at once.
        watchers: streams of events at the same time.
        sockets: WebSockets of frames at the same time.
        frame_bytes: of one JPEG.
        frames: a second, of one WebSocket; twice as many may come at once.
        idle_seconds: after which a WebSocket without frames is closed.
        connections: at the same time, of all kinds.

    Raises:
        InputError: a limit that is not positive.
    """

    upload_bytes: int = 100_000_000
    upload_seconds: float = 120.0
    uploads: int = 2
    frame_pixels: int = 3840 * 2160
    decoded_pixels: int = 8_000_000_000
    decode_seconds: float = 30.0
    requests: float = 60.0
    watchers: int = 16
    sockets: int = 4
    frame_bytes: int = 4_000_000
    frames: float = 60.0
    idle_seconds: float = 60.0
    connections: int = 100

    def __post_init__(self) -> None:
        for field in fields(self):
            if not (value := getattr(self, field.name)) > 0:
                raise InputError(f"the limit {field.name} is {value!r:.60}; expected more than 0")


class Rate:
    """So many events a second, and twice as many at once (a token bucket). Any thread may ask.

    Args:
        per_second: how many, on average.
        now: seconds of a monotonic clock.
    """

    def __init__(self, per_second: float, now: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._now = per_second, now
        self._most = max(1.0, 2 * per_second)
        self._left, self._then = self._most, now()
        self._lock = threading.Lock()

    def allows(self) -> bool:
        """Count an event; False where it is one too many, which is not counted."""
        with self._lock:
            now = self._now()
            self._left = min(self._most, self._left + (now - self._then) * self._rate)
            self._then = now
            if self._left < 1:
                return False
            self._left -= 1
            return True


class ClientRates:
    """A `Rate` for each client. Not thread-safe: for one event loop."""

    def __init__(self, per_second: float, now: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._now = per_second, now
        self._rates: OrderedDict[str, Rate] = OrderedDict()

    def allows(self, client: str) -> bool:
        """Count an event of a client."""
        rate = self._rates.pop(client, None) or Rate(self._per_second, self._now)
        self._rates[client] = rate
        if len(self._rates) > CLIENTS:
            self._rates.popitem(last=False)
        return rate.allows()


class Slots:
    """So many at the same time; who comes later is refused. Any thread may ask."""

    def __init__(self, count: int) -> None:
        self._free = threading.BoundedSemaphore(count)

    def take(self) -> bool:
        """Whether there was a free one; `give` it back then."""
        return self._free.acquire(blocking=False)

    def give(self) -> None:
        """Give one back."""
        self._free.release()
