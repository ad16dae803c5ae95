"""The contract of the model's input: what preprocessing does to a video before the graph takes it.

The type is frozen, validated on construction, and survives a round trip through JSON. Only the standard library is
needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from edgetube import strict
from edgetube.errors import SpecError

LARGEST = 1 << 16
"""Largest number of voxels along an axis, and of channels of a layer: far beyond any model, a guard against damaged
files."""

MOST_VOXELS = 1 << 30
"""Largest number of voxels of a clip: a gigabyte."""

FPS = (1e-3, 1e5)
"""Slowest and fastest rate of frames, per second."""

LEAST_STD, MOST_MEAN = 1e-6, 1e6
"""Bounds of mean and std, of pixels in 0..1: float32 divides by std."""


@dataclass(frozen=True)
class InputContract:
    """The description of preprocessing, which `edgetube.preprocess` executes.

    Attributes:
        frames, height, width: the clip that the graph takes.
        resize: how the short side reaches the crop: "short-side" (keeps the aspect ratio, antialiased
            bilinear) or "stretch" (both sides to the crop's size, aspect ratio not kept).
        crop: "center", the only crop that is deterministic.
        mean, std: per channel, of pixels in 0..1; folded into the tube weights at export.
        sampling: "uniform": frames at a constant rate; a clip that is too short repeats its last frame.
        fps: the rate that the model was trained at, in frames per second; None takes every frame.
        layout, dtype, color: what the graph takes; fixed.
    """

    frames: int
    height: int
    width: int
    fps: float | None = None
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resize: Literal["short-side", "stretch"] = "short-side"
    crop: Literal["center"] = "center"
    sampling: Literal["uniform"] = "uniform"
    layout: Literal["THWC"] = "THWC"
    dtype: Literal["uint8"] = "uint8"
    color: Literal["RGB"] = "RGB"

    def __post_init__(self) -> None:
        with strict.spec_errors():
            self._normalise()
        if math.prod(self.shape) > MOST_VOXELS:
            raise SpecError(f"the clip is {self.shape}; this version goes up to {MOST_VOXELS} voxels")
        choices = {"resize": ("short-side", "stretch"), "crop": ("center",), "sampling": ("uniform",)}
        choices |= {"layout": ("THWC",), "dtype": ("uint8",), "color": ("RGB",)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise SpecError(f"input {name} is {getattr(self, name)!r:.60}; this version knows {', '.join(allowed)}")

    def _normalise(self) -> None:
        found: dict[str, Any] = {
            name: strict.integer(getattr(self, name), name, 1, LARGEST) for name in ("frames", "height", "width")
        }
        if self.fps is not None:
            found["fps"] = strict.number(self.fps, "fps", *FPS)
        for name, low in (("mean", -MOST_MEAN), ("std", LEAST_STD)):
            values = strict.items(getattr(self, name), name, 3, 3)
            found[name] = tuple(strict.number(value, name, low, MOST_MEAN) for value in values)
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(T, H, W, 3) of one clip."""
        return self.frames, self.height, self.width, 3

    @property
    def is_image(self) -> bool:
        return self.frames == 1

    def with_clip(self, frames: int | None = None, size: tuple[int, int] | None = None) -> InputContract:
        """The same preprocessing for another clip shape."""
        height, width = size or (self.height, self.width)
        return replace(self, frames=self.frames if frames is None else frames, height=height, width=width)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> InputContract:
        with strict.spec_errors():
            return cls(**strict.fields_of(cls, data))
