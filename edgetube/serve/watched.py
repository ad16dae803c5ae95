"""A source whose newest frame can be looked at, and whose files play as fast as they were filmed."""

from __future__ import annotations

import time
from dataclasses import replace

from edgetube.live.frame import Frame
from edgetube.live.source import Ended, FrameSource


class WatchedSource(FrameSource):
    """A `FrameSource` that keeps the frame that was read last.

    The frames of a source that is not live are given out at their own pace, by its clock, and count as captured when
    they are: they play like a camera, but none is left out, and where the model is slower the film is.

    Attributes:
        newest: the frame that was read last; None before the first.
    """

    newest: Frame | None = None
    _due: Frame | None = None
    _began: float | None = None
    """Second of the monotonic clock at which second 0 of the source is shown."""

    def read(self, timeout: float | None = None) -> Frame | None:
        """As `FrameSource.read`, after a wait for the moment at which a film shows the frame."""
        frame = self._due or super().read(timeout)
        if frame is None:
            return None
        if self.is_live:
            self.newest = frame
            return frame
        now = time.monotonic()
        if self._began is None or frame.restarted is not None:
            self._began = now - frame.seconds
        self._due = frame
        wait = self._began + frame.seconds - now
        if wait > 0:
            time.sleep(wait if timeout is None else min(wait, timeout))
        with self._lock:
            if self._due is None:
                raise Ended(f"{self.name} has ended")
            now = time.monotonic()
            if now < self._began + frame.seconds:
                return None
            self._began = max(self._began, now - frame.seconds)  # after a delay it goes on, and does not hurry
            self.newest, self._due = replace(frame, captured_at=now), None
            return self.newest

    def close(self) -> None:
        """As `FrameSource.close`; a frame that waits for its moment is dropped."""
        super().close()
        with self._lock:
            if self._due is not None:
                self._due = None
                self.ledger.drop("closed")
