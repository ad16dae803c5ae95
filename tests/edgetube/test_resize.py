"""Resizing and cropping against PIL, torch and a slow reading of the definition in docs/preprocessing.md."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from edgetube import resize
from edgetube.contract import InputContract


def picture(kind: str, height: int, width: int) -> np.ndarray:
    """Noise has every frequency, the ramp shows half-pixel shifts, black and white the rounding, the photo is real."""
    rng = np.random.default_rng(height * 10007 + width)
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), np.uint8)
    if kind == "extremes":
        return rng.choice(np.array([0, 255], np.uint8), (height, width, 3))
    if kind == "white":
        return np.full((height, width, 3), 255, np.uint8)
    y, x = np.mgrid[0:height, 0:width]
    ramp = np.stack([255 * x / max(1, width - 1), 255 * y / max(1, height - 1), 127 + 100 * np.sin(x * y / 50)], -1)
    return ramp.astype(np.uint8)


def expected_geometry(height: int, width: int, contract: InputContract) -> tuple[int, int, int, int]:
    """Scale until the crop is covered, the exact fraction cut down; half the rest on each side, to even."""
    scale = max(Fraction(contract.height, height), Fraction(contract.width, width))
    rows, columns = math.floor(height * scale), math.floor(width * scale)
    if contract.resize == "stretch":
        rows, columns = contract.height, contract.width
    top, left = Fraction(rows - contract.height, 2), Fraction(columns - contract.width, 2)
    return rows, columns, round(top), round(left)


def pil(image: np.ndarray, contract: InputContract) -> np.ndarray:
    """Pillow resizes the whole picture, then the crop is cut out."""
    rows, columns, top, left = expected_geometry(image.shape[0], image.shape[1], contract)
    resized = np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR))
    return resized[top : top + contract.height, left : left + contract.width]


def levels(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


side = st.integers(1, 150)
target = st.integers(1, 60)


@given(side, side, target, target, st.sampled_from(["noise", "extremes", "ramp"]), st.booleans())
@example(149, 150, 1, 1, "extremes", False)
@example(1, 1, 60, 60, "noise", False)
@example(1, 150, 40, 3, "ramp", False)
@example(150, 1, 5, 60, "noise", True)
def test_equals_pillow_within_one_level(
    height: Any, width: Any, rows: Any, columns: Any, kind: Any, stretch: Any
) -> None:
    contract = InputContract(1, rows, columns, resize="stretch" if stretch else "short-side")
    image = picture(kind, height, width)
    ours = resize.spatial(image[None], contract)
    assert ours.dtype == np.uint8
    assert levels(ours[0], pil(image, contract)) <= 1


# A single column or row is left out: torch 2.13 then gives the other axis one and the same value everywhere.
@given(side, side, st.integers(2, 60), st.integers(2, 60))
def test_equals_torch_antialias_within_one_level(height: Any, width: Any, rows: Any, columns: Any) -> None:
    torch = pytest.importorskip("torch")
    contract = InputContract(1, rows, columns)
    image = picture("noise", height, width)
    resized, top, left = (expected_geometry(height, width, contract)[i] for i in (slice(0, 2), 2, 3))
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].double().contiguous()
    exact = torch.nn.functional.interpolate(tensor, resized, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    exact = exact[top : top + rows, left : left + columns].numpy()
    ours = resize.spatial(image[None], contract)[0]
    # Without rounding in between the distance to the exact value is half a level, and what 16-bit weights cost.
    assert np.abs(ours - exact).max() <= 0.55


@pytest.mark.parametrize("contract", [InputContract(1, 224, 224), InputContract(1, 96, 160)], ids=str)
def test_equals_pillow_on_a_photograph(contract: InputContract) -> None:
    photo = pytest.importorskip("skimage.data").astronaut()[:, :400]
    ours = resize.spatial(photo[None], contract)[0]
    assert levels(ours, pil(photo, contract)) <= 1
    assert np.mean(ours != pil(photo, contract)) < 0.2  # Pillow rounds twice, so some levels differ, not most


@pytest.mark.parametrize(("height", "width"), [(1080, 1920), (1920, 1080), (2000, 37)])
def test_large_frames_equal_pillow(height: int, width: int) -> None:
    contract = InputContract(1, 112, 112)
    image = picture("noise", height, width)
    assert levels(resize.spatial(image[None], contract)[0], pil(image, contract)) <= 1


@given(side, side, target, target)
def test_white_stays_white(height: Any, width: Any, rows: Any, columns: Any) -> None:
    """The weights sum to one exactly, so a flat picture keeps its level."""
    contract = InputContract(1, rows, columns)
    assert resize.spatial(picture("white", height, width)[None], contract).min() == 255


def test_is_exact_integer_arithmetic() -> None:
    """The same bytes on every machine: the filter in Python's integers gives the same bytes as the BLAS."""
    contract = InputContract(1, 9, 11)
    image = picture("noise", 61, 83)
    rows, columns, top, left = resize.geometry(61, 83, contract)
    ours = resize.spatial(image[None], contract)[0]
    for y in range(9):
        for x in range(11):
            y0, wy = resize._weights(61, rows, top + y)
            x0, wx = resize._weights(83, columns, left + x)
            assert sum(map(int, wy)) == sum(map(int, wx)) == resize.ONE
            for c in range(3):
                total = sum(
                    int(a) * int(b) * int(image[y0 + i, x0 + j, c]) for i, a in enumerate(wy) for j, b in enumerate(wx)
                )
                assert ours[y, x, c] == (total * 2 + resize.ONE**2) // (2 * resize.ONE**2)


@given(side, side, target, target, st.sampled_from(["short-side", "stretch"]))
def test_geometry_covers_the_crop(height: Any, width: Any, rows: Any, columns: Any, rule: Any) -> None:
    contract = InputContract(1, rows, columns, resize=rule)
    got = resize.geometry(height, width, contract)
    assert got == expected_geometry(height, width, contract)
    assert got[0] >= rows
    assert got[1] >= columns
    assert got[0] == rows or got[1] == columns


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ((1080, 1920), (224, 398, 0, 87)),  # 398.2 -> 398; 174 left over
        ((1920, 1080), (398, 224, 87, 0)),
        ((480, 640), (224, 298, 0, 37)),  # 298.7 is cut, not rounded
        ((224, 225), (224, 225, 0, 0)),  # half a pixel goes to the even side
        ((224, 227), (224, 227, 0, 2)),
    ],
)
def test_geometry_is_that_of_torchvision(source: tuple[int, int], expected: tuple[int, int, int, int]) -> None:
    assert resize.geometry(*source, InputContract(1, 224, 224)) == expected


def test_right_size_is_returned_untouched() -> None:
    frames = picture("noise", 16, 24)[None]
    assert resize.spatial(frames, InputContract(1, 16, 24)) is frames


def test_crop_alone_copies_pixels() -> None:
    frames = picture("noise", 16, 30)[None]
    out = resize.spatial(frames, InputContract(1, 16, 24))
    np.testing.assert_array_equal(out, frames[:, :, 3:27])


def test_reads_only_what_the_crop_needs() -> None:
    """Changing pixels outside the crop's support changes nothing; inside, it does."""
    contract = InputContract(1, 20, 20)
    image = picture("noise", 100, 400)
    before = resize.spatial(image[None], contract)
    image[:, :140], image[:, 260:] = 0, 0
    np.testing.assert_array_equal(resize.spatial(image[None], contract), before)
    image[:, 150:250] = 0
    assert np.any(resize.spatial(image[None], contract) != before)
