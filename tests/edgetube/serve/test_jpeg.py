"""JPEG, against Pillow."""

from __future__ import annotations

import io

import numpy as np
import pytest

from edgetube.errors import InputError
from edgetube.serve import jpeg

Image = pytest.importorskip("PIL.Image")


def gradient(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], -1).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (33, 57), (1, 1)])
def test_a_picture_survives(height: int, width: int) -> None:
    frame = gradient(height, width)
    data = jpeg.encode(frame, 1000)
    read = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert read.shape == frame.shape
    assert np.abs(read - frame).mean() < 4
    assert np.abs(jpeg.decode(data, 10_000).astype(int) - read).mean() < 3


def test_a_wide_picture_is_made_smaller() -> None:
    assert Image.open(io.BytesIO(jpeg.encode(gradient(100, 401), 200))).size == (200, 50)


def test_what_cannot_be_used() -> None:
    data = jpeg.encode(gradient(480, 640), 640)
    assert jpeg.decode(data, 480 * 640).shape == (480, 640, 3)
    for bad, words in (
        (b"", "no JPEG"),
        (b"GIF89a", "474946|4749"),
        (data[:-5], "cut off"),
        (data[:2] + b"\xff\xd9", "the frame"),
    ):
        with pytest.raises(InputError, match=words):
            jpeg.decode(bad, 10**9)
    for most in (480 * 640 - 1, 1000, 1):
        with pytest.raises(InputError, match=f"more than {most} pixels"):
            jpeg.decode(data, most)
