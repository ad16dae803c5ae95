"""Sliding windows: frames of a source, one by one, become clips for the model."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from edgetube import preprocess, resize
from edgetube.contract import InputContract
from edgetube.errors import InputError
from edgetube.live.frame import DropCause, Frame, Ledger
from edgetube.live.timeline import GAP_PERIODS
from edgetube.preprocess import TOLERANCE, Resampler
from edgetube.video import Clip

Hop = int | str
"""Frames that sampling takes, or seconds as text ("0.5s"), between two clips."""

SECONDS: Final = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*s\s*")

LONGEST_HOP = 86_400.0
"""Seconds."""


@dataclass(frozen=True)
class LiveClip(Clip):
    """A clip of a source that goes on.

    Attributes:
        start, end: seconds of the source's clock: of the first frame, and when the last one leaves.
        captured_at: `Frame.captured_at` of the newest frame.
        numbers: `Frame.number` of the frames in it, ascending; a frame that is held is there once.
        restarted: why the window began again since the clip before this one; None where it did not.
    """

    captured_at: float = 0.0
    numbers: tuple[int, ...] = ()
    restarted: str | None = None


@dataclass(frozen=True)
class Tick:
    """One frame that sampling took: where its pixels are, and what is known about them."""

    seconds: float
    slot: int
    number: int
    captured_at: float


@dataclass(frozen=True)
class Step:
    """How far a window moves from one clip to the next: so many of the frames that sampling takes, or, for a model
    without a rate, so many seconds of the source."""

    frames: int
    seconds: float | None = None


def parse(hop: Hop | None) -> int | float | None:
    """Check a caller's hop: frames as an int, seconds as a float.

    Args:
        hop: frames, also as digits; or text, a number of seconds and "s".

    Raises:
        InputError: neither, or not positive.
    """
    if hop is None:
        return None
    if not isinstance(hop, str):
        return preprocess.count_of(hop, "hop")
    if hop.strip().isdecimal():
        return preprocess.count_of(int(hop), "hop")
    found = SECONDS.fullmatch(hop)
    if found is None or not 0 < (seconds := float(found[1])) <= LONGEST_HOP:
        raise InputError(f'hop is {hop!r:.60}; expected frames (8), or seconds above 0 ("0.5s")')
    return seconds


def step(hop: Hop | None, contract: InputContract) -> Step:
    """The step of a caller's hop.

    Args:
        hop: see `parse`; seconds are rounded to frames where the contract has a rate. None: a quarter of the clip.

    Raises:
        InputError: neither frames nor seconds, or not positive.
    """
    parsed = parse(hop)
    if parsed is None:
        return Step(max(1, contract.frames // 4))
    if isinstance(parsed, int):
        return Step(parsed)
    return Step(1, parsed) if contract.fps is None else Step(max(1, round(parsed * contract.fps)))


def check(contract: InputContract) -> None:
    """Check that a window can slide over the frames that a model takes.

    Raises:
        InputError: they are spread over a whole video, and a stream has no end.
    """
    if contract.sampling == "segments":
        raise InputError(
            f"this model samples {contract.frames} segments of a whole video; no window of a stream or a camera can be "
            "classified: give it whole files, with predict, or with edgetube run without --stream"
        )


class Window:
    """The last T frames that sampling takes of one source; gives a clip every `hop` of them, once T have come.

    Frames are resampled to the contract's rate by holding (`edgetube.preprocess.Resampler`): the frame of time t is
    the last one shown at or before t, so a slow camera repeats frames and a fast one skips them. With a stride every
    `stride`-th frame is taken, whatever the clock says. A frame that is taken is resized once, into memory that is
    allocated once; a clip is a copy, which stays as it is. Which frames are taken is known without their pixels: who is
    behind pushes what waits with `settle=False` first, and loses no frame to the time that resizing takes.

    Where `Frame.restarted` says that a frame does not continue those before it, the window begins again with that
    frame: no clip holds frames of both sides, and the next clip has the reason. A mere gap (`Frame.gap`) of at most
    `GAP_PERIODS` of the contract's rate is none for the window: no more than one frame is held for it, as one of a slow
    camera is.

    Every frame is counted in the ledger: as used when it is taken; as dropped by "sampling" when it is not, or is
    between two clips; by "late" when it is older than one before it; by "restart" or "closed" when it was taken, and
    the window began again or ended before a clip showed it.

    Not thread-safe: one thread pushes. Others may read the clips.

    Args:
        contract: of the model.
        hop: frames between two clips, of those that sampling takes, or seconds ("0.5s"); None: a quarter of the clip.
        ledger: of the source; None counts in a ledger of its own.

    Raises:
        InputError: a hop that is none, or a model that samples segments of a whole video.

    >>> window = Window(rt.contract, "0.5s")
    >>> for frame in frames:
    ...     if (clip := window.push(frame)) is not None:
    ...         logits = rt(clip.frames[None])
    """

    def __init__(self, contract: InputContract, hop: Hop | None = None, *, ledger: Ledger | None = None) -> None:
        check(contract)
        self.contract = contract
        self.ledger = Ledger() if ledger is None else ledger
        self._step = step(hop, contract)
        # A frame may bring two new ones, the one before it and itself, while a clip of older ones is due.
        self._pixels = np.empty((contract.frames + 2, *contract.shape[1:]), np.uint8)
        self._slot = -1
        self._unsettled: dict[int, Frame] = {}
        """Frames that were taken and are not resized yet, by slot."""
        self._untaken: set[int] = set()
        """Numbers of frames that may still be taken: the newest."""
        self._fresh: deque[int] = deque()
        """Numbers of frames that were taken and are in no clip yet."""
        self._given = 0
        self._restarted: str | None = None
        self._begin()

    def _begin(self) -> None:
        self._resampler = Resampler[Frame](self.contract.fps)
        self._held: deque[Tick] = deque(maxlen=self.contract.frames)
        self._came = self._taken = 0
        self._wanted: float | None = None
        self._newest = -math.inf
        self._shown: Frame | None = None
        """The newest frame that was taken."""
        self._unsettled.clear()

    def push(self, frame: Frame, *, settle: bool = True) -> LiveClip | None:
        """Take the next frame of the source; the clip that is due with it, or None.

        Where several are due, because a slow camera's frame is held for longer than a hop, this is the newest.

        Args:
            settle: resize the frame now; False leaves that to the clip that shows it, or to `settle`.
        """
        last = None
        for ticks, restarted in self._due(frame):
            last = ticks, restarted or (last[1] if last else None)
        while settle and self.settle():
            pass
        return None if last is None else self._clip(*last)

    def settle(self) -> bool:
        """Resize one frame that was taken and is not resized yet; whether there was one."""
        slot = next(iter(self._unsettled), None)
        if slot is not None:
            self._resize(slot)
        return slot is not None

    def _resize(self, slot: int) -> None:
        frame = self._unsettled.pop(slot, None)
        if frame is not None:
            self._pixels[slot] = resize.spatial(frame.pixels[None], self.contract)[0]

    def each(self, frame: Frame) -> Iterator[LiveClip]:
        """Take the next frame of the source; every clip that is due with it, made when it is asked for. To be read to
        its end before the next call."""
        for ticks, restarted in self._due(frame):
            yield self._clip(ticks, restarted)
        while self.settle():
            pass

    def finish(self) -> Iterator[LiveClip]:
        """The clips that are due when the source has come to its end, where its last frame stays on display for as long
        as the one before it was. A source that ends before its first full clip gives one, its last frame repeated."""
        for ticks, restarted in self._take(self._resampler.end()):
            yield self._clip(ticks, restarted)
        if self._held and not self._given:
            ticks = tuple(self._held)
            yield self._clip(ticks + ticks[-1:] * (self.contract.frames - len(ticks)), self._offer(ticks))
        self.close()

    def close(self) -> None:
        """Count what was taken for clips that will not come; the window begins again with the next frame."""
        self._leave("closed")
        self._begin()
        self._given = 0

    def _leave(self, cause: DropCause) -> None:
        """Count frames that no clip showed."""
        if self._fresh:
            self.ledger.drop(cause, len(self._fresh), used=True)
        if self._untaken:
            self.ledger.drop("sampling", len(self._untaken))
        self._fresh.clear()
        self._untaken.clear()

    def _due(self, frame: Frame) -> Iterator[tuple[tuple[Tick, ...], str | None]]:
        """The windows that are due with a frame, each with the reason of a restart before it."""
        if frame.restarted is not None and self._newest > -math.inf and not self._is_bridged(frame):
            yield from self._take(self._resampler.end())
            self._leave("restart")
            self._begin()
            self._restarted = frame.restarted
        if frame.seconds < self._newest:
            self.ledger.drop("late")
            return
        self._newest = frame.seconds
        self._untaken.add(frame.number)
        yield from self._take(self._resampler.push(frame.seconds, frame))
        passed = self._untaken - {frame.number}
        if passed:
            self.ledger.drop("sampling", len(passed))
            self._untaken -= passed

    def _is_bridged(self, frame: Frame) -> bool:
        """Whether the frames that are missing before this one make no difference to what is sampled, but for one."""
        fps = self.contract.fps
        return frame.gap and fps is not None and frame.seconds - self._newest <= GAP_PERIODS / fps + TOLERANCE

    def _take(self, shown: Iterator[tuple[float, Frame]]) -> Iterator[tuple[tuple[Tick, ...], str | None]]:
        """Put frames that are on display into the window."""
        contract = self.contract
        for seconds, frame in shown:
            self._came += 1
            if contract.stride is not None and (self._came - 1) % contract.stride:
                continue
            if frame is not self._shown:
                self._shown = frame
                self._slot = (self._slot + 1) % len(self._pixels)
                self._unsettled[self._slot] = frame
            if frame.number in self._untaken:
                self._untaken.remove(frame.number)
                self._fresh.append(frame.number)
                self.ledger.use()
            self._held.append(Tick(seconds, self._slot, frame.number, frame.captured_at))
            self._taken += 1
            if self._is_due(seconds):
                ticks = tuple(self._held)
                yield ticks, self._offer(ticks)

    def _is_due(self, seconds: float) -> bool:
        if self._taken < self.contract.frames:
            return False
        if self._step.seconds is None:
            return (self._taken - self.contract.frames) % self._step.frames == 0
        if self._wanted is None:
            self._wanted = seconds
        elif seconds < self._wanted - TOLERANCE:
            return False
        self._wanted = max(self._wanted, seconds - self._step.seconds) + self._step.seconds
        return True

    def _offer(self, ticks: tuple[Tick, ...]) -> str | None:
        """Note that a clip shows these frames; the reason of a restart since the clip before it."""
        passed = sum(number < ticks[0].number for number in self._fresh)
        if passed:
            self.ledger.drop("sampling", passed, used=True)
        self._fresh.clear()
        self._given += 1
        restarted, self._restarted = self._restarted, None
        return restarted

    def _clip(self, ticks: tuple[Tick, ...], restarted: str | None) -> LiveClip:
        for tick in ticks:
            self._resize(tick.slot)
        start, end = ticks[0].seconds, ticks[-1].seconds + (1 / self.contract.fps if self.contract.fps else 0.0)
        return LiveClip(
            f"{start:.3f}s",
            self._pixels.take([tick.slot for tick in ticks], axis=0),
            start=start,
            end=end,
            captured_at=ticks[-1].captured_at,
            numbers=tuple(dict.fromkeys(tick.number for tick in ticks)),
            restarted=restarted,
        )
