"""Predictions drawn on frames: a translucent band with the label, the scores and the time span."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgetube import video
from edgetube.errors import InputError
from edgetube.spec import Prediction
from edgetube.targets import need

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

Frame = npt.NDArray[np.uint8]
"""One RGB frame, (H, W, 3) uint8."""

BAND = np.array((12, 17, 24), np.float32)
OPACITY = 0.68
WHITE, SOFT, TRACK, ACCENT = (255, 255, 255), (186, 197, 208), (72, 82, 94), (77, 171, 247)

NORMAL, SMALLEST = 9, 8  # pixels: of letters on a small frame, and of letters that can still be read
TOP = 3
LINE = 1.3  # from one line of text to the next, in letters


def save(path: Path, frames: Iterable[tuple[float, Frame]], predictions: Sequence[Prediction], fps: float) -> Path:
    """Write a video with the predictions drawn on it.

    A frame at t seconds shows the prediction whose middle is nearest to t, if t lies in its [start, end]: the one
    that saw as much before the frame as after it. A live viewer would see each label half a window later. Frames that
    no prediction covers stay as they are; a prediction without a clock covers all.

    Args:
        path: ends in .mp4; replaced when the new file is complete.
        frames: (seconds, frame (H, W, 3) uint8 RGB), as `edgetube.video.frames` gives them; each is shown at its time.
        predictions: in any order, over windows of one length.
        fps: nominal frames per second of the file.

    Raises:
        InputError: what `edgetube.video.write` refuses.
        MissingPackageError: Pillow or matplotlib (for its fonts) is not installed.
    """
    need("PIL", "plot")
    ordered = sorted(predictions, key=_middle)
    middles = [_middle(prediction) for prediction in ordered]

    def at(seconds: float) -> Prediction | None:
        i = bisect_right(middles, seconds)
        near = min(ordered[max(0, i - 1) : i + 1][::-1], key=lambda p: abs(_middle(p) - seconds), default=None)
        return near if near is not None and _covers(near, seconds) else None

    return video.write(path, ((seconds, annotate(frame, at(seconds))) for seconds, frame in frames), fps)


def _middle(prediction: Prediction) -> float:
    if prediction.start is None or prediction.end is None:
        return 0.0
    return (prediction.start + prediction.end) / 2


def _covers(prediction: Prediction, seconds: float) -> bool:
    if prediction.start is None or prediction.end is None:
        return True
    return prediction.start <= seconds <= prediction.end


def annotate(frame: Frame, prediction: Prediction | None) -> Frame:
    """A copy of a frame with a prediction along its lower edge; without a prediction, just a copy.

    The font size follows the frame and stays legible: text that does not fit is shrunk, then cut with an ellipsis, and
    the second column is left out where there is no room for it.

    Args:
        frame: (H, W, 3) uint8 RGB.

    Raises:
        InputError: the frame has another shape or dtype.
        MissingPackageError: Pillow or matplotlib (for its fonts) is not installed.
    """
    need("PIL", "plot")
    from PIL import Image, ImageDraw

    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        raise InputError(f"the frame is {frame.shape} {frame.dtype}; expected (height, width, 3) uint8")
    out: Frame = frame.copy()
    if prediction is None:
        return out
    height, width = frame.shape[:2]
    letters = max(NORMAL, round(min(0.026 * height, 0.02 * width)))
    pad = round(0.55 * letters)
    band = min(height, round(3 * LINE * letters) + 2 * pad)
    dimmed = out[height - band :] * np.float32(1 - OPACITY) + BAND * np.float32(OPACITY)
    image = Image.fromarray(dimmed.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    scores = list(prediction.scores.items())[:TOP]
    second = width // 2
    columns = len(scores) > 1 and width - second - 2 * pad >= 7 * letters
    _first(draw, prediction, (pad, pad, (second if columns else width) - pad), letters)
    if columns:
        _second(draw, scores, (second + pad, pad, width - pad), letters)
    out[height - band :] = np.asarray(image)
    return out


def _first(draw: ImageDraw, prediction: Prediction, place: tuple[int, int, int], letters: int) -> None:
    """Label and score, the confidence as a bar, the time span; `place` is left, top, right."""
    left, top, right = place
    large, score = round(1.4 * letters), f"{100 * prediction.score:.0f}%"
    upper, lower = top + round(1.05 * large), top + round(3.6 * letters)
    timed = prediction.start is not None and prediction.end is not None
    span = f"{prediction.start:.1f}–{prediction.end:.1f} s" if timed else ""
    room = right - left - _width(score, large, bold=True) - letters
    beside = fit(prediction.label, large, room, bold=True)[0] == prediction.label
    if beside:
        draw.text((right, upper), score, fill=WHITE, font=_font(large, bold=True), anchor="rs")
    else:  # the label needs the whole line, and the score shares that of the span
        draw.text((right, lower), score, fill=WHITE, font=_font(letters), anchor="rs")
    _text(draw, (left, upper), prediction.label, large, room if beside else right - left, WHITE, bold=True)
    thick = max(2, round(0.3 * letters))
    y = upper + round(0.55 * letters)
    _bar(draw, (left, y, right, y + thick), prediction.score, ACCENT)
    room = right - left - (0 if beside else _width(score, letters) + letters)
    if fit(span, letters, room)[0] == span:  # half a time span would say something else
        _text(draw, (left, lower), span, letters, room, SOFT)


def _second(draw: ImageDraw, scores: list[tuple[str, float]], place: tuple[int, int, int], letters: int) -> None:
    """The best classes: label, a small bar, per cent; `place` is left, top, right."""
    left, top, right = place
    number = max(_width(f"{100 * score:.0f}%", letters) for _, score in scores)
    meter = round(0.22 * (right - left)) if right - left > 14 * letters else 0
    for i, (label, score) in enumerate(scores):
        base = top + round((i + 0.75) * LINE * letters)
        colour = WHITE if i == 0 else SOFT
        draw.text((right, base), f"{100 * score:.0f}%", fill=colour, font=_font(letters), anchor="rs")
        end = right - number - letters // 2
        if meter:
            thick = max(2, round(0.3 * letters))
            y = base - round(0.36 * letters) - thick // 2
            _bar(draw, (end - meter, y, end, y + thick), score, ACCENT if i == 0 else SOFT)
            end -= meter + letters // 2
        _text(draw, (left, base), label, letters, end - left, colour)


def _bar(draw: ImageDraw, box: tuple[int, int, int, int], share: float, colour: tuple[int, int, int]) -> None:
    left, top, right, bottom = box
    if right <= left:
        return
    draw.rectangle((left, top, right - 1, bottom - 1), fill=TRACK)
    filled = round(min(max(share, 0.0), 1.0) * (right - left))
    if filled:
        draw.rectangle((left, top, left + filled - 1, bottom - 1), fill=colour)


def _text(
    draw: ImageDraw,
    at: tuple[int, int],
    text: str,
    size: int,
    room: int,
    colour: tuple[int, int, int],
    bold: bool = False,
) -> None:
    """Text whose baseline begins `at`, made to fit into `room` pixels."""
    text, size = fit(text, size, room, bold)
    draw.text(at, text, fill=colour, font=_font(size, bold), anchor="ls")


def fit(text: str, size: int, room: int, bold: bool = False) -> tuple[str, int]:
    """The text and letter size that fit into `room` pixels: down to three quarters of `size`, then cut short."""
    low = min(size, max(SMALLEST, round(0.75 * size)))
    while _width(text, size, bold) > room and size > low:
        size -= 1
    if _width(text, size, bold) <= room:
        return text, size
    for end in range(len(text) - 1, 0, -1):
        if _width(short := text[:end].rstrip(" -_") + "…", size, bold) <= room:
            return short, size
    return "", size


def _width(text: str, size: int, bold: bool = False) -> int:
    return int(np.ceil(_font(size, bold).getlength(text)))


@lru_cache(maxsize=64)
def _font(size: int, bold: bool = False) -> FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: Pillow's own font has no accents."""
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(need("matplotlib", "plot").get_data_path(), "fonts", "ttf", name)), size)
