"""The contract of the model's input: what preprocessing does to a video before the graph takes it.

The type is frozen, validated on construction, and survives a round trip through JSON. Only the standard library is
needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

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


Resize = Literal["short-side", "stretch"]
Filter = Literal["bilinear", "bicubic"]
Crop = Literal["center", "center-floor"]
Sampling = Literal["uniform", "stride", "segments"]

CHOICES: dict[str, tuple[str, ...]] = {
    "resize": get_args(Resize),
    "filter": get_args(Filter),
    "crop": get_args(Crop),
    "sampling": get_args(Sampling),
    "layout": ("THWC",),
    "dtype": ("uint8",),
    "color": ("RGB",),
}

LATER = ("resize_size", "filter", "stride")
"""Fields that older bundles lack. JSON leaves them out where they have their defaults, so that the digests of older
bundles, which are made of it, stay what they were."""


@dataclass(frozen=True)
class InputContract:
    """The description of preprocessing, which `edgetube.preprocess` executes.

    Attributes:
        frames, height, width: the clip that the graph takes; height and width are those of the crop.
        fps: frames per second of "uniform" sampling, those that the model was trained at; None takes every frame.
        mean, std: per channel, of pixels in 0..1; folded into the tube weights at export.
        resize: "short-side" (keeps the aspect ratio) or "stretch" (does not keep it).
        resize_size: what the frame is resized to before the crop: the length of the short side, or for "stretch"
            (height, width). None resizes no further than the crop needs: until it is just covered, or to its size.
            A size that says the same becomes None.
        filter: "bilinear" or "bicubic", both antialiased.
        crop: the middle; where half a pixel is left over, "center" rounds it to the even number (torchvision, timm)
            and "center-floor" cuts it off (the processors of transformers).
        sampling: "uniform": frames at the constant rate `fps`; "stride": every `stride`-th frame of the source,
            whatever its rate; "segments": the middle frame of each of `frames` equal parts of the whole source. The
            first two repeat the last frame of a source that is too short.
        stride: of "stride" sampling, in frames of the source.
        layout, dtype, color: what the graph takes; fixed.
    """

    frames: int
    height: int
    width: int
    fps: float | None = None
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resize: Resize = "short-side"
    crop: Crop = "center"
    sampling: Sampling = "uniform"
    layout: Literal["THWC"] = "THWC"
    dtype: Literal["uint8"] = "uint8"
    color: Literal["RGB"] = "RGB"
    resize_size: int | tuple[int, int] | None = None
    filter: Filter = "bilinear"
    stride: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise SpecError(f"input {name} is {getattr(self, name)!r:.60}; this version knows {', '.join(allowed)}")
        with strict.spec_errors():
            self._normalise()
        if math.prod(self.shape) > MOST_VOXELS:
            raise SpecError(f"the clip is {self.shape}; this version goes up to {MOST_VOXELS} voxels")
        self._check_resize_size()
        self._check_sampling()

    def _normalise(self) -> None:
        """Convert every field to its type and check its bounds."""
        found: dict[str, Any] = {
            name: strict.integer(getattr(self, name), name, 1, LARGEST) for name in ("frames", "height", "width")
        }
        if self.fps is not None:
            found["fps"] = strict.number(self.fps, "fps", *FPS)
        if self.stride is not None:
            found["stride"] = strict.integer(self.stride, "stride", 1, LARGEST)
        if self.resize_size is not None and self.resize == "short-side":
            found["resize_size"] = strict.integer(self.resize_size, "resize_size", 1, LARGEST)
        elif self.resize_size is not None:
            sides = strict.items(self.resize_size, "resize_size (height, width)", 2, 2)
            found["resize_size"] = tuple(strict.integer(side, "resize_size", 1, LARGEST) for side in sides)
        for name, low in (("mean", -MOST_MEAN), ("std", LEAST_STD)):
            values = strict.items(getattr(self, name), name, 3, 3)
            found[name] = tuple(strict.number(value, name, low, MOST_MEAN) for value in values)
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def _check_resize_size(self) -> None:
        """Refuse a crop that is larger than the resized frame; replace a size that says what None does by None."""
        size = self.resize_size
        if size is None:
            return
        least = (size, size) if isinstance(size, int) else size  # the long side may be no longer than the short one
        if self.height > least[0] or self.width > least[1]:
            what = f"a frame with a short side of {size}" if isinstance(size, int) else f"{size[0]} x {size[1]}"
            raise SpecError(
                f"the crop of {self.height} x {self.width} is larger than {what}; expected it to fit inside"
            )
        if least == (self.height, self.width):
            object.__setattr__(self, "resize_size", None)

    def _check_sampling(self) -> None:
        if (self.stride is None) == (self.sampling == "stride"):
            expected = "a stride" if self.stride is None else "no stride"
            raise SpecError(f"input stride is {self.stride}; sampling {self.sampling} takes {expected}")
        if self.fps is not None and self.sampling != "uniform":
            raise SpecError(f"input fps is {self.fps}; sampling {self.sampling} knows no rate: leave fps out")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(T, H, W, 3) of one clip."""
        return self.frames, self.height, self.width, 3

    @property
    def is_image(self) -> bool:
        return self.frames == 1

    def rate(self, source: float) -> float:
        """Frames per second of the clip, where the source has `source` frames per second and sampling a rate."""
        return self.fps or source / (self.stride or 1)

    def with_clip(self, frames: int | None = None, size: tuple[int, int] | None = None) -> InputContract:
        """The same preprocessing for another clip shape; the size before the crop grows or shrinks with it."""
        height, width = size or (self.height, self.width)
        resized = self.resize_size
        if isinstance(resized, int):
            resized = resized * max(height, width) // max(self.height, self.width)
        elif resized is not None:
            resized = resized[0] * height // self.height, resized[1] * width // self.width
        frames = self.frames if frames is None else frames
        return replace(self, frames=frames, height=height, width=width, resize_size=resized)

    def to_json(self) -> dict[str, Any]:
        return strict.stated(self, LATER)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> InputContract:
        with strict.spec_errors():
            return cls(**strict.fields_of(cls, data))
