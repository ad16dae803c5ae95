"""What a camera move is: four numbers that change over a clip, one of which carries the label.

The camera is seen from behind it. *Pan* is a turn left or right, *tilt* up or down, *zoom-in* makes the picture
grow, *roll-cw* turns the camera clockwise. The picture does the opposite of a pan, tilt or roll: when the camera
pans left, the picture moves right; when it tilts up, the picture moves down; when it rolls clockwise, the picture
turns counter-clockwise.

All magnitudes are relative to the frame and to the whole clip, so one move means the same thing at any number of
frames and at any size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

LABELS = (
    "static",
    "pan-left",
    "pan-right",
    "tilt-up",
    "tilt-down",
    "zoom-in",
    "zoom-out",
    "roll-cw",
    "roll-ccw",
)

AXES = ("x", "y", "zoom", "roll")
"""The camera's coordinates: x to the right in frame widths, y down in frame heights, zoom as the logarithm of the
magnification, roll clockwise in radians."""

DIRECTIONS = {
    "static": (0, 0, 0, 0),
    "pan-left": (-1, 0, 0, 0),
    "pan-right": (1, 0, 0, 0),
    "tilt-up": (0, -1, 0, 0),
    "tilt-down": (0, 1, 0, 0),
    "zoom-in": (0, 0, 1, 0),
    "zoom-out": (0, 0, -1, 0),
    "roll-cw": (0, 0, 0, 1),
    "roll-ccw": (0, 0, 0, -1),
}
"""label -> sign of the camera's travel along each of `AXES`."""

# Travel over the whole clip, low and high end of a uniform draw. The low end is five times what jitter can do.
TRAVEL = ((0.10, 0.40), (0.10, 0.40), (float(np.log(1.15)), float(np.log(1.6))), tuple(np.radians((8.0, 30.0))))
# Highest amplitude of the hand's shake per axis: two sines, 0.5 to 4 cycles a clip, each up to half of this.
JITTER = (0.010, 0.010, 0.010, float(np.radians(0.6)))
START, END = (0.0, 0.2), (0.8, 1.0)  # the move begins and ends in these parts of the clip
POWER = (1.0, 2.0)  # easing: progress ** power, forwards or backwards
BLUR = 0.012  # highest sigma of the lens blur, in short sides of the frame
NOISE = 6.0  # highest sigma of the sensor noise, in grey levels
EXPOSURE = 0.12  # highest change of gain over the clip, either way
FLICKER = 0.01  # highest sigma of the gain from frame to frame


@dataclass(frozen=True)
class Move:
    """One camera move, as a function of clip time 0..1.

    Attributes:
        label: one of `LABELS`.
        travel: signed travel along `AXES` between the two ends of the clip; zeros for a static camera.
        window: clip times between which the camera travels.
        power, backwards: easing, `u ** power` (starts slowly) or `1 - (1 - u) ** power` (stops slowly).
        shake: (axis, 2, 3): amplitude, cycles a clip, phase of two sines per axis.
        blur: sigma of the lens blur in short sides of the frame.
        noise: sigma of the sensor noise in grey levels.
        exposure: change of gain over the clip; flicker: sigma of the gain per frame.
    """

    label: str
    travel: tuple[float, ...]
    window: tuple[float, float]
    power: float
    backwards: bool
    shake: FloatArray
    blur: float
    noise: float
    exposure: float
    flicker: float

    @classmethod
    def draw(cls, label: str, rng: np.random.Generator) -> Move:
        """A random move of class `label`; always takes the same number of draws from `rng`."""
        sizes = [rng.uniform(low, high) for low, high in TRAVEL]
        amplitude = rng.uniform(0, 0.5, (4, 2)) * np.array(JITTER)[:, None] * rng.uniform(0, 1)
        shake = np.stack([amplitude, rng.uniform(0.5, 4, (4, 2)), rng.uniform(0, 2 * np.pi, (4, 2))], axis=-1)
        return cls(
            label=label,
            travel=tuple(float(sign * size) for sign, size in zip(DIRECTIONS[label], sizes, strict=True)),
            window=(float(rng.uniform(*START)), float(rng.uniform(*END))),
            power=float(rng.uniform(*POWER)),
            backwards=bool(rng.integers(2)),
            shake=shake.astype(np.float32),
            blur=float(BLUR * rng.uniform() ** 2),
            noise=float(NOISE * rng.uniform()),
            exposure=float(EXPOSURE * rng.uniform(-1, 1)),
            flicker=float(FLICKER * rng.uniform()),
        )

    def path(self, frames: int) -> FloatArray:
        """The camera's coordinates along `AXES` at `frames` evenly spaced times: (frames, 4), 0 half way."""
        times = np.linspace(0, 1, frames) if frames > 1 else np.array([0.5])
        start, end = self.window
        u = np.clip((times - start) / (end - start), 0, 1)
        eased = 1 - (1 - u) ** self.power if self.backwards else u**self.power
        amplitude, cycles, phase = np.moveaxis(self.shake, -1, 0)[..., None]  # each (4, 2, 1)
        shake = (amplitude * np.sin(2 * np.pi * cycles * times + phase)).sum(axis=1)  # (4, frames)
        path: FloatArray = (np.outer(eased - 0.5, self.travel) + shake.T).astype(np.float32)
        return path
