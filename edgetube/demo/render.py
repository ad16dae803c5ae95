"""A virtual camera over a photograph: the frames that a move sees, for any number of frames and any size.

numpy and PyAV only, because the clips are rendered wherever a model is exported or tested.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from edgetube.demo.moves import FloatArray, Move
from edgetube.errors import InputError
from edgetube.video import Frames

VIEW = (0.4, 0.98)  # how much of the photo's room the path of the view takes, from fully to least zoomed
TILTED = float(np.radians(12))  # highest rotation of the view against the photo
TEXTURE = 3.0  # grey levels per 1/32 of the view that a view must change by, in most of its quarters
TRIES = 8

VERSION = 2
"""Of the rendered bytes: clips are kept between exports, so it is raised when a clip of the same number changes."""
PREVIEW = 32
COMMON_GRAIN = 1 << 20
"""Places at which a frame's part of the common grain may begin."""


def generator(name: str, index: int) -> np.random.Generator:
    """Random numbers that depend on `name` and `index` alone, on every machine and in every process."""
    digest = hashlib.blake2b(f"{name}/{index}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


@dataclass(frozen=True)
class Photo:
    """A picture (H, W, 3) uint8 and its halvings, each the mean of 2x2 pixels."""

    name: str
    pixels: npt.NDArray[np.uint8]

    @classmethod
    def read(cls, path: Path) -> Photo:
        """Decode an image file.

        Raises:
            InputError: the file cannot be decoded.
        """
        try:
            with av.open(str(path)) as container:
                frame = next(container.decode(video=0))
                return cls(path.stem, frame.to_ndarray(format="rgb24"))
        except (av.FFmpegError, StopIteration) as error:
            raise InputError(f"{path} is not an image that can be decoded: {error}") from error

    @cached_property
    def levels(self) -> list[FloatArray]:
        """The picture as float32 at full size, half size, ... down to about 16 pixels."""
        levels = [self.pixels.astype(np.float32)]
        while min(levels[-1].shape[:2]) >= 32:
            h, w = (n // 2 * 2 for n in levels[-1].shape[:2])
            even = levels[-1][:h, :w]
            levels.append((even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) * np.float32(0.25))
        return levels


@dataclass(frozen=True)
class View:
    """Where the camera stands over a photo half way through its move.

    `centre` (x, y) in photo pixels, `scale` in photo pixels per short side of the frame, `angle` in radians.
    """

    centre: tuple[float, float]
    scale: float
    angle: float


def render_clip(
    photo: Photo,
    move: Move,
    frames: int,
    size: tuple[int, int],
    rng: np.random.Generator,
    common_grain: bool = False,
) -> Frames:
    """What the camera sees: (frames, height, width, 3) uint8.

    The view is drawn first and the noise last, so the same `rng` state gives the same move over the same part of
    the photo at any number of frames and any size of the same aspect ratio.

    Args:
        common_grain: the sensor noise of a frame is a part, drawn by `rng`, of noise that all such clips have in
            common; drawing each value takes a third of the time of a clip.
    """
    view = choose(photo, move, size, rng)
    points = project(view, move.path(frames), size, _grid(size))  # (2, T, H*W), photo pixels
    planes, at = _plate(photo, points, view.scale / min(size), move.blur * view.scale)
    gains = _gains(move, frames, rng)
    seen: Frames = np.empty((frames, *size, 3), np.uint8)
    for index, gain in enumerate(gains):  # frame by frame: what a frame needs fits into the processor's cache
        light = _bilinear(planes, at[:, index]).reshape(*size, 3)
        grain = _cut(light.shape, rng) if common_grain else rng.standard_normal(light.shape, dtype=np.float32)
        seen[index] = _develop(light, gain, np.float32(move.noise) * grain)
    return seen


def choose(photo: Photo, move: Move, size: tuple[int, int], rng: np.random.Generator) -> View:
    """A random view from which the whole move stays inside the photo and sees texture (else the most textured)."""
    path = move.path(33)
    height, width = size
    frame = np.array([[width], [height]], np.float32)
    corners = np.array([[-0.5, -0.5, 0.5, 0.5], [-0.5, 0.5, -0.5, 0.5]], np.float32) * frame
    preview = _grid((PREVIEW, PREVIEW)) * frame / np.float32(PREVIEW)
    best, chosen = -1.0, None
    for scale, angle, x, y in rng.uniform(size=(TRIES, 4)):
        unit = View((0, 0), 1.0, TILTED * (2 * angle - 1))
        reach = project(unit, path, size, corners).reshape(2, -1)
        low, high = reach.min(axis=1), reach.max(axis=1)
        room = np.array(photo.pixels.shape[1::-1], np.float32) - 2
        fit = float((room / (high - low)).min()) * (VIEW[0] + (VIEW[1] - VIEW[0]) * scale)
        slack = room - fit * (high - low)
        cx, cy = 1 + slack * (x, y) - fit * low
        view = View((float(cx), float(cy)), fit, unit.angle)
        points = project(view, np.zeros((1, 4), np.float32), size, preview)
        seen = texture(_sample_photo(photo, points, fit / PREVIEW).reshape(PREVIEW, PREVIEW, 3))
        if seen > best:
            best, chosen = seen, view
        if seen >= TEXTURE:
            break
    assert chosen is not None
    return chosen


def texture(picture: FloatArray) -> float:
    """Second lowest mean gradient of the four quarters of a picture (h, w, 3), in grey levels per pixel."""
    grey = picture.mean(axis=-1)
    steps = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    h, w = (n // 2 for n in steps.shape)
    quarters = [steps[:h, :w], steps[:h, w:], steps[h:, :w], steps[h:, w:]]
    return float(sorted(quarter.mean() for quarter in quarters)[1])


def project(view: View, path: FloatArray, size: tuple[int, int], points: FloatArray) -> FloatArray:
    """Photo coordinates (2, T, N) that frame points (2, N) see along `path` (T, 4).

    Points are (x, y), in output pixels from the frame's centre, y down. A camera that rolls clockwise by r looks
    along axes that are turned clockwise by r, and zooming by z divides the reach of the frame by e**z.
    """
    height, width = size
    dx, dy, zoom, roll = (axis[:, None] for axis in path.T)  # each (T, 1)
    step = np.float32(view.scale / min(size))
    turn = roll + np.float32(view.angle)
    cos, sin = np.cos(turn) * np.exp(-zoom), np.sin(turn) * np.exp(-zoom)
    across, down = dx * width, dy * height
    shift = (
        across * np.cos(view.angle) - down * np.sin(view.angle),
        across * np.sin(view.angle) + down * np.cos(view.angle),
    )
    seen = np.empty((2, len(path), points.shape[1]), np.float32)
    for t in range(len(path)):
        seen[0, t] = (points[0] * cos[t] - points[1] * sin[t] + shift[0][t]) * step + view.centre[0]
        seen[1, t] = (points[0] * sin[t] + points[1] * cos[t] + shift[1][t]) * step + view.centre[1]
    return seen


def _grid(size: tuple[int, int]) -> FloatArray:
    """Pixel centres of a frame, from its middle: (2, H*W) as (x, y)."""
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return np.stack([x - (width - 1) / 2, y - (height - 1) / 2]).astype(np.float32).reshape(2, -1)


def _sample_photo(photo: Photo, points: FloatArray, step: float) -> FloatArray:
    """Colours (T, N, 3) at photo coordinates (2, T, N), without blur."""
    planes, at = _plate(photo, points, step, 0.0)
    return _bilinear(planes, at.reshape(2, -1)).reshape(*points.shape[1:], 3)


def _plate(photo: Photo, points: FloatArray, step: float, blur: float) -> tuple[npt.NDArray[np.float64], FloatArray]:
    """The part of a photo that is seen at photo coordinates (2, T, N): planes (3, h, w), and the coordinates there.

    Antialiased by reading from the halving whose pixels are nearest to `step` photo pixels; `blur` is a Gaussian
    sigma in photo pixels.
    """
    level = int(np.clip(np.round(np.log2(max(step, 1e-6))), 0, len(photo.levels) - 1))
    pixels = photo.levels[level]
    at = (points + np.float32(0.5)) / np.float32(2**level) - np.float32(0.5)
    sigma = blur / 2**level
    margin = int(np.ceil(3 * sigma)) + 1
    low = np.maximum(np.floor(at.min(axis=(1, 2))).astype(int) - margin, 0)
    high = np.minimum(np.ceil(at.max(axis=(1, 2))).astype(int) + margin + 2, pixels.shape[1::-1])
    plate = _gaussian(pixels[low[1] : high[1], low[0] : high[0]], sigma)
    at -= low.astype(np.float32)[:, None, None]
    return np.ascontiguousarray(plate.transpose(2, 0, 1), np.float64), at


def _gaussian(picture: FloatArray, sigma: float) -> FloatArray:
    """Separable Gaussian blur of (h, w, 3), edges repeated."""
    if sigma < 0.2:
        return picture
    radius = int(np.ceil(3 * sigma))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    for axis in (0, 1):
        pad = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        shifts = np.lib.stride_tricks.sliding_window_view(np.pad(picture, pad, mode="edge"), len(taps), axis)
        picture = shifts @ taps
    return picture


def _bilinear(planes: npt.NDArray[np.float64], at: FloatArray) -> FloatArray:
    """Colours (N, 3) of a picture's planes (3, h, w) at (x, y) positions (2, N), clamped to the picture."""
    h, w = planes.shape[1:]
    x, y = np.clip(at[0], 0, w - 1), np.clip(at[1], 0, h - 1)
    column, row = np.minimum(x.astype(np.int32), w - 2), np.minimum(y.astype(np.int32), h - 2)
    fx, fy = x - column, y - row  # float64, as all arithmetic on them
    corner = (row * w + column).astype(np.intp)
    gx, gy = 1 - fx, 1 - fy
    weights = {0: gx * gy, 1: fx * gy, w: gx * fy, w + 1: fx * fy}
    colours = np.empty((at.shape[1], 3), np.float32)
    total, part = np.empty(at.shape[1]), np.empty(at.shape[1])
    for channel, plane in enumerate(planes.reshape(3, -1)):  # gathers of whole pixels take twice as long
        total[:] = 0
        for step, weight in weights.items():
            plane[step:].take(corner, out=part, mode="clip")  # all are inside: other modes copy the result
            part *= weight
            total += part
        colours[:, channel] = total
    return colours


def _gains(move: Move, frames: int, rng: np.random.Generator) -> FloatArray:
    """Exposure of each frame (T,)."""
    drift = np.linspace(-0.5, 0.5, frames) if frames > 1 else np.zeros(1)
    return (1 + move.exposure * drift + move.flicker * rng.standard_normal(frames)).astype(np.float32)


def _cut(shape: tuple[int, ...], rng: np.random.Generator) -> FloatArray:
    """A part of the common grain, which is to be read only."""
    size = int(np.prod(shape))
    start = int(rng.integers(COMMON_GRAIN))
    return _common_grain(size)[start : start + size].reshape(shape)


@cache
def _common_grain(size: int) -> FloatArray:
    """Standard normal values: any `size` of them begin at one of `COMMON_GRAIN` places."""
    return generator("grain", 0).standard_normal(COMMON_GRAIN + size, dtype=np.float32)


def _develop(light: FloatArray, gain: np.float32, grain: FloatArray) -> Frames:
    """Exposure, sensor noise and rounding of a frame: (H, W, 3) float32 to uint8."""
    light *= gain
    light += grain
    light += np.float32(0.5)
    grey: Frames = np.clip(light, 0, 255, out=light).astype(np.uint8)
    return grey
