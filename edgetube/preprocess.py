"""Preprocessing as `InputContract` describes it: samples frames; `edgetube.resize` makes them the graph's input.

Files, cameras, arrays, calibration and benchmarks all use this module, so that all of them get the same bytes.
The definition, with formulas and independent oracles, is in `docs/preprocessing.md`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from edgetube import resize
from edgetube.contract import InputContract
from edgetube.errors import InputError
from edgetube.resize import Frames
from edgetube.views import MIDDLE, View

TOLERANCE = 1e-3
"""Seconds by which a frame may be late: containers round timestamps, many to milliseconds."""

SLOWEST, FASTEST = 1e-6, 1e6
"""Frames per second that a source may have."""

LATEST = 1e11
"""Largest timestamp in seconds: 3000 years; sums with 1 / fps are still exact to 1e-4."""

T = TypeVar("T")


# ------------------------------------------------------------------------------------------------------------- time


def number(value: object, name: str, expected: str) -> float:
    """Check and convert a caller's finite number to float.

    Raises:
        InputError: text, a bool, None, an array, infinity or no number at all.
    """
    try:
        if isinstance(value, str | bytes | bool | np.bool_ | np.ndarray):
            raise TypeError
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{name} is {value!r:.60}; expected {expected}") from error
    if not math.isfinite(found):
        raise InputError(f"{name} is {value!r:.60}; expected {expected}")
    return found


def positive(value: object, name: str, expected: str) -> float:
    """Check and convert a caller's finite number above 0 to float.

    Raises:
        InputError: as `number` raises, or it is not above 0.
    """
    found = number(value, name, expected)
    if found <= 0:
        raise InputError(f"{name} is {value!r:.60}; expected {expected}")
    return found


def count_of(value: object, name: str) -> int:
    """Check a caller's integer >= 1.

    Raises:
        InputError: it is not one.
    """
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        found = operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise InputError(f"{name} is {value!r:.60}; expected a whole number >= 1") from error
    if found < 1:
        raise InputError(f"{name} is {found}; expected >= 1")
    return found


def frame_rate(value: object, name: str = "fps") -> float:
    """Check a caller's frame rate.

    Raises:
        InputError: not a number, or out of range.
    """
    expected = f"frames per second from {SLOWEST:g} to {FASTEST:g}"
    found = number(value, name, expected)
    if not SLOWEST <= found <= FASTEST:
        raise InputError(f"{name} is {value!r:.60}; expected {expected}")
    return found


def seconds(value: object, name: str) -> float:
    """Check a caller's time in seconds.

    Raises:
        InputError: not a number, or out of range.
    """
    found = number(value, name, "seconds")
    if abs(found) > LATEST:
        raise InputError(f"{name} is {value!r:.60}; expected seconds: divide milliseconds by 1e3, nanoseconds by 1e9")
    return found


def window(
    contract: InputContract, duration: float, rate: float, start: float | None = None, view: View = MIDDLE
) -> float:
    """The start of the clip in seconds.

    Args:
        duration: seconds of the source.
        rate: frames per second of the source; decides where the contract knows no rate.
        start: the wanted second, or None for the window in the middle.
        view: of several temporal views the first begins with the source, the last ends with it, and the others begin
            at equal distances between them.

    Raises:
        InputError: `start` lies outside the source, or there are several temporal views.
    """
    if start is None:
        room = max(0.0, duration - contract.frames / contract.rate(rate))
        return room / 2 if view.count == 1 else room * view.index / (view.count - 1)
    if view.count > 1:
        spread = f"{view.count} temporal views are spread over the whole source"
        raise InputError(f"start is {start} s, but {spread}: leave start out, or ask for 1 temporal view")
    start = seconds(start, "start")
    if not 0 <= start < duration:
        raise InputError(f"start is {start} s; expected a time within the {duration:.3f} s of the source")
    return start


def check_still(what: str, view: View) -> None:
    """Refuse several temporal views of a still image.

    Raises:
        InputError: there are several.
    """
    if view.count > 1:
        raise InputError(f"{what} is a still image and has 1 temporal view, not {view.count}: use --views 1x1 or 1x3")


class Resampler(Generic[T]):
    """Frames at a constant rate: for each time start + k / fps the frame that is on display then.

    That is the first frame whose timestamp lies within `TOLERANCE` of the time, else the last one before it; times
    before the first frame get the first frame. A frame is given out as soon as its time has come; it can come out more
    than once, or never.

    Args:
        fps: frames per second to give out; None gives the frame that is on display at `start`, and all after it.
        start: seconds of the first one; None: the timestamp of the first frame.
    """

    def __init__(self, fps: float | None, start: float | None = None) -> None:
        self._fps, self._start, self._count, self._gap = fps, start, 0, 0.0
        self._wanted = -math.inf if start is None else start
        self._last: tuple[float, T] | None = None

    def push(self, now: float, frame: T) -> Iterator[tuple[float, T]]:
        """The frames (seconds, frame) whose time has come with the next one, in the order of display; to be read to
        its end before the next call."""
        last = self._last
        if last is None and self._start is None:
            self._wanted = self._start = now
        while last is not None and self._wanted < now - TOLERANCE:
            yield last
            self._advance()
        if self._fps is None and self._count:
            self._wanted = now
        self._gap = 0.0 if last is None else now - last[0]
        self._last = now, frame
        while self._wanted <= now + TOLERANCE:
            yield self._last
            self._advance()

    def end(self, hold: bool = False) -> Iterator[tuple[float, T]]:
        """What follows the last frame.

        Args:
            hold: repeat it for ever; else it is on display for as long as the one before it was.
        """
        rounded = 3 * TOLERANCE  # this timestamp, and the two that make the gap
        while self._last is not None and (hold or self._wanted < self._last[0] + self._gap - rounded):
            yield self._last
            self._advance()

    def _advance(self) -> None:
        """The time of the following frame; without a rate it is unknown until that frame arrives."""
        self._count += 1
        self._wanted = (self._start or 0.0) + self._count / self._fps if self._fps else math.inf


def resample(
    timed: Iterable[tuple[float, T]], fps: float | None, start: float | None = None, hold: bool = False
) -> Iterator[tuple[float, T]]:
    """The frames of `timed`, (seconds, frame) in the order of display, at a constant rate: see `Resampler`."""
    resampler = Resampler[T](fps, start)
    for now, frame in timed:
        yield from resampler.push(now, frame)
    yield from resampler.end(hold)


def pick(timed: Iterable[tuple[float, T]], contract: InputContract, start: float) -> Iterator[tuple[float, T]]:
    """The `contract.frames` frames of the clip that begins at second `start`, for "uniform" and "stride" sampling.

    A short source repeats the last frame: the one on display, or the last one that the stride takes. Reads no further
    than the clip needs. Empty when there is no frame at all.
    """
    shown = resample(timed, contract.fps, start, hold=True)
    return islice(shown if contract.stride is None else _every(shown, contract.stride), contract.frames)


def _every(shown: Iterator[tuple[float, T]], stride: int) -> Iterator[tuple[float, T]]:
    """Every `stride`-th frame, and the last of these for ever.

    Args:
        shown: every frame of a source once, then the last one for ever, as `resample` holds it.
    """
    taken = previous = None
    for count, item in enumerate(shown):
        if item is previous:
            break
        if count % stride == 0:
            taken = item
            yield taken
        previous = item
    while taken is not None:
        yield taken


def segments(
    count: int, contract: InputContract, start: float | None = None, view: View = MIDDLE
) -> npt.NDArray[np.intp]:
    """(T,) indices of the middle frames of T equal parts of `count` frames: floor((k + 1/2) * count / T).

    Of V temporal views number v takes the frames at v / V of each part: floor((k + v / V) * count / T).

    Raises:
        InputError: a `start`, which the whole source does not have.
    """
    if start is not None:
        taken = f"takes {contract.frames} frames from the whole of a source"
        raise InputError(f"start is {start} s, but this model {taken}: leave start out")
    place, parts = (1, 2) if view.count == 1 else (view.index, view.count)
    return (parts * np.arange(contract.frames) + place) * count // (parts * contract.frames)


def sample(
    count: int,
    source_fps: float | None,
    contract: InputContract,
    start: float | None = None,
    view: View = MIDDLE,
) -> npt.NDArray[np.intp]:
    """Indices of the frames of the clip, of `count` frames.

    Args:
        count: frames that there are.
        source_fps: their rate in frames per second; None: they already are at the contract's rate. Where the contract
            knows no rate it only says what a `start` means.
        start: second at which the clip begins, None for the middle.
        view: a temporal view takes the place of the middle, see `window` and `segments`.

    Returns:
        (T,) indices, never descending.

    Raises:
        InputError: no frames, a rate that is not positive, or a `start` that is outside, has no clock, or is given
            for segments of the whole source.
    """
    if count < 1:
        raise InputError("there are no frames; expected at least one")
    if contract.sampling == "segments":
        return segments(count, contract, start, view)
    rate = contract.fps if source_fps is None else frame_rate(source_fps)
    if rate is None and start is not None:
        raise InputError(f"start is {start} s, but these frames have no clock: give source_fps too")
    rate = rate or 1.0
    begin = window(contract, count / rate, rate, start, view)
    first = max(0, math.floor(begin * rate) - 1)
    timed = ((i / rate, i) for i in range(first, count))
    return np.fromiter((i for _, i in pick(timed, contract, begin)), np.intp, contract.frames)


# ----------------------------------------------------------------------------------------------------------- arrays


def _array(given: object, what: str) -> npt.NDArray[Any]:
    """Convert a caller's frames to an array.

    Raises:
        InputError: None, the pair that OpenCV's `read` returns, or not an array.
    """
    if given is None:
        raise InputError(f"{what}: None; expected an array: a camera that gives None has lost its picture")
    first = given[0] if isinstance(given, tuple | list) and given else None
    for pair in (given, first):
        if isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], bool | np.bool_):
            remedy = "where ok is true, give the frame alone, as RGB: cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)"
            raise InputError(f"{what}: a pair (ok, frame), as OpenCV reads it; expected an array: {remedy}")
    try:
        return np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, tensors on a GPU
        reason = str(error).partition("\n")[0]
        raise InputError(f"{what}: a {type(given).__name__} that is no array ({reason}); expected an array") from error


def _pixels(given: object, expected: str, what: str) -> Frames:
    """Check a caller's pixels, (..., H, W, 3) uint8.

    Raises:
        InputError: not an array, another dtype, or a last axis that is not RGB.
    """
    frames = _array(given, what)
    if frames.dtype != np.uint8:
        remedy = "give raw RGB pixels"
        if np.issubdtype(frames.dtype, np.floating):
            remedy = "do not normalise; pixels in 0..1 become (frames * 255).round().astype(numpy.uint8)"
        kind = type(given).__name__ if frames.dtype == object else f"dtype {frames.dtype}"
        raise InputError(f"{what}: {kind}; expected uint8 RGB in 0..255: {remedy}")
    if frames.ndim < 3 or frames.shape[-1] != 3:
        raise InputError(f"{what}: shape {frames.shape}; expected {expected}: {_colours_last(frames.shape)}")
    return frames


def _colours_last(shape: tuple[int, ...]) -> str:
    """Advice for pixels of a wrong shape: how to make them (..., H, W, 3)."""
    if len(shape) >= 3 and shape[-3] == 3:
        return "move the colours last, numpy.moveaxis(frames, -3, -1)"
    if len(shape) >= 3 and shape[-1] == 4:
        return "leave out alpha, frames[..., :3]"
    if len(shape) >= 3 and shape[-1] == 1:
        return "repeat the grey channel, numpy.repeat(frames, 3, -1)"
    return "the last axis is the colour"


def frame(given: object, what: str = "the frame") -> Frames:
    """Check and copy a caller's frame: a camera may reuse its buffer.

    Args:
        given: (H, W, 3) uint8 RGB, any strides.
        what: its name in errors.

    Returns:
        (H, W, 3) uint8, C-contiguous.

    Raises:
        InputError: as `prepare` raises.
    """
    expected = "(height, width, 3)"
    pixels = _pixels(given, expected, what)
    if pixels.ndim != 3:
        raise InputError(f"{what}: shape {pixels.shape}; expected {expected}")
    return np.array(_not_empty(pixels, what), order="C")


def _not_empty(pixels: Frames, what: str) -> Frames:
    if 0 in pixels.shape:
        raise InputError(f"{what}: shape {pixels.shape}; there is no pixel in them")
    return pixels


def prepare(
    frames: npt.ArrayLike,
    contract: InputContract,
    source_fps: float | None = None,
    start: float | None = None,
    view: View = MIDDLE,
) -> Frames:
    """Convert frames of any number and size to the clip of the contract. Only sampled frames are resized.

    Args:
        frames: (N, H0, W0, 3) uint8 RGB, any strides; one image (H0, W0, 3) when the contract takes images.
        source_fps, start, view: see `sample`; the view has a crop of its own, too.

    Returns:
        (T, H, W, 3) uint8, contiguous, a copy.

    Raises:
        InputError: wrong dtype, rank or colours, no frames, times outside the frames, or several temporal views of a
            still image.
    """
    expected = "(frames, height, width, 3)"
    what = "the frames"
    pixels = _pixels(frames, expected, what)
    if pixels.ndim == 3 and contract.is_image:
        pixels = pixels[None]
    if pixels.ndim != 4:
        raise InputError(f"{what}: shape {pixels.shape}; expected {expected}")
    _not_empty(pixels, what)
    if contract.is_image and len(pixels) == 1:
        check_still("a single frame", view)
    taken, repeats = np.unique(sample(len(pixels), source_fps, contract, start, view), return_counts=True)
    resized = resize.spatial(pixels[taken], contract, view.side)
    return np.ascontiguousarray(np.repeat(resized, repeats, axis=0))


def check(clips: npt.ArrayLike, contract: InputContract) -> Frames:
    """Check clips that are already preprocessed, and make them contiguous.

    Args:
        clips: (T, H, W, 3) or (B, T, H, W, 3) uint8 RGB, any strides; (H, W, 3) too when the contract takes images.

    Returns:
        (B, T, H, W, 3) uint8, C-contiguous; a copy only where the strides need one.

    Raises:
        InputError: wrong dtype or shape; says what was given and what was expected.
    """
    expected = f"{contract.shape} or a batch of such clips (B, {', '.join(map(str, contract.shape))})"
    pixels = _pixels(clips, expected, "the clip")
    batch = pixels
    if batch.ndim == 3 and contract.is_image:
        batch = batch[None]
    if batch.ndim == 4:
        batch = batch[None]
    if batch.ndim != 5 or batch.shape[1:] != contract.shape or not len(batch):
        remedy = "edgetube.preprocess.prepare makes it from frames of another size or number"
        raise InputError(f"the clip: shape {pixels.shape}; expected {expected}: {remedy}")
    return np.ascontiguousarray(batch)
