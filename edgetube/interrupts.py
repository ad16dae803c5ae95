"""Signals that end a command: Ctrl-C, SIGTERM and SIGHUP unwind the stack, so that everything is cleaned up.

The exit code is 128 + the signal's number, as a shell gives it. Nothing but the standard library is imported, so that
the handlers are in place before anything else is.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from typing_extensions import Self

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a command, as far as this system has them."""

PATIENCE_S = 2.0
"""Seconds of clean-up during which further signals are ignored; a later one ends the process."""

_current: Handled | None = None


class Handled:
    """A block in which the first of `SIGNALS` raises KeyboardInterrupt; outside the main thread it changes nothing.

    Libraries may swallow or wrap exceptions. After a signal, `check` raises again, and the block ends with
    KeyboardInterrupt in any case.

    Attributes:
        received: the first signal that came, or None.
        deferred: signals that wait for the end of `held`; None outside of it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.deferred: list[int] | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._hook = sys.unraisablehook

    @property
    def exit_code(self) -> int:
        """The exit code of the process; that of Ctrl-C if no other signal was received."""
        return 128 + (self.received or int(signal.SIGINT))

    def __enter__(self) -> Self:
        global _current
        if threading.current_thread() is threading.main_thread():
            _current, sys.unraisablehook = self, self._unraisable
            self._before = _install(self._handle)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: TracebackType | None) -> None:
        global _current
        if self._before:
            _current, sys.unraisablehook = None, self._hook
            for number, handler in self._before.items():
                signal.signal(number, handler)
        if self.received is not None and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.deferred is not None:
            self.deferred.append(number)
            return
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = number, now
            raise KeyboardInterrupt
        if now - self._since > PATIENCE_S:
            os._exit(self.exit_code)

    def _unraisable(self, error: Any) -> None:
        """Python drops exceptions from finalisers and C callbacks; `check` raises them again."""
        if not isinstance(error.exc_value, KeyboardInterrupt):
            self._hook(error)


def check() -> None:
    """Raise KeyboardInterrupt if a library swallowed it; called in loops."""
    if _current is not None and _current.received is not None:
        raise KeyboardInterrupt


def leave_at_once() -> None:
    """From now on the first of `SIGNALS` ends the process at once: there is nothing to clean up."""
    _install(_leave)


@contextmanager
def held() -> Iterator[None]:
    """Signals wait for the end of the block, so that nothing in it is left half done."""
    handled = _current if threading.current_thread() is threading.main_thread() else None
    if handled is None or handled.deferred is not None:
        yield
        return
    handled.deferred = []
    try:
        yield
    finally:
        waiting, handled.deferred = handled.deferred or [], None
        for number in waiting[:1]:
            handled._handle(number, None)


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Start processes in the block that ignore the terminal's Ctrl-C; their parent ends them.

    Signals are `held`, so that no process is left half started. The signal mask, which children inherit, does not
    suffice: another thread may take the signal.
    """
    with held():
        before = None
        if hasattr(signal, "pthread_sigmask"):
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            if before is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """In a process of multiprocessing: end when the parent ends."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_outlive, args=(parent.sentinel,), daemon=True).start()


def _outlive(parent: int) -> None:
    from multiprocessing.connection import wait

    wait([parent])
    os._exit(1)


def _leave(number: int, _: FrameType | None) -> None:
    os._exit(128 + number)


def _install(handler: Any) -> dict[int, Any]:
    """Handle `SIGNALS`, without those that are ignored (nohup); returns the handlers that were there."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    return before
