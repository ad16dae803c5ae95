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
    """Scale until the crop is covered (or the short side has its length), the exact fraction cut down; half the rest on
    each side, to even or cut off."""
    size = contract.resize_size
    if contract.resize == "stretch":
        assert not isinstance(size, int)
        rows, columns = size or (contract.height, contract.width)
    else:
        assert not isinstance(size, tuple)
        scale = max(Fraction(contract.height, height), Fraction(contract.width, width))
        scale = Fraction(size, min(height, width)) if size else scale
        rows, columns = math.floor(height * scale), math.floor(width * scale)
    half = math.floor if contract.crop == "center-floor" else round
    return rows, columns, half(Fraction(rows - contract.height, 2)), half(Fraction(columns - contract.width, 2))


def pil(image: np.ndarray, contract: InputContract) -> np.ndarray:
    """Pillow resizes the whole picture, then the crop is cut out.

    Pillow before 13 resizes the columns first, from 13 on the rows first where they shrink more. What bicubic cuts off
    between the two passes differs then, so it is called once for each axis.
    """
    height, width = image.shape[:2]
    rows, columns, top, left = expected_geometry(height, width, contract)
    picture = Image.fromarray(image)
    if contract.filter == "bicubic":
        picture = picture.resize((columns, height), Image.Resampling.BICUBIC).resize(
            (columns, rows), Image.Resampling.BICUBIC
        )
    else:
        picture = picture.resize((columns, rows), Image.Resampling.BILINEAR)
    return np.asarray(picture)[top : top + contract.height, left : left + contract.width]


def levels(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


side = st.integers(1, 150)
target = st.integers(1, 60)


@st.composite
def contracts(draw: st.DrawFn, filters: tuple[str, ...] = ("bilinear", "bicubic")) -> InputContract:
    """Any resizing before any crop that fits into it."""
    rule: Any = draw(st.sampled_from(["short-side", "stretch"]))
    size: Any = draw(st.none() | (target if rule == "short-side" else st.tuples(target, target)))
    most = (size, size) if isinstance(size, int) else size or (60, 60)
    height, width = (draw(st.integers(1, side)) for side in most)
    crop: Any = draw(st.sampled_from(["center", "center-floor"]))
    chosen: Any = draw(st.sampled_from(filters))
    return InputContract(1, height, width, resize=rule, resize_size=size, crop=crop, filter=chosen)


KINDS = st.sampled_from(["noise", "extremes", "ramp"])


@given(side, side, contracts(("bilinear",)), KINDS)
@example(149, 150, InputContract(1, 1, 1), "extremes")
@example(1, 1, InputContract(1, 60, 60), "noise")
@example(1, 150, InputContract(1, 40, 3), "ramp")
@example(150, 1, InputContract(1, 5, 60, resize="stretch"), "noise")
def test_bilinear_equals_pillow_within_one_level(height: Any, width: Any, contract: Any, kind: Any) -> None:
    image = picture(kind, height, width)
    ours = resize.spatial(image[None], contract)
    assert ours.dtype == np.uint8
    assert levels(ours[0], pil(image, contract)) <= 1


@given(side, side, contracts(("bicubic",)), KINDS)
@example(149, 150, InputContract(1, 1, 1, filter="bicubic"), "extremes")
@example(150, 149, InputContract(1, 60, 60, resize="stretch", filter="bicubic"), "extremes")
@example(1, 1, InputContract(1, 60, 60, filter="bicubic"), "noise")
@example(2, 3, InputContract(1, 50, 60, resize="stretch", filter="bicubic"), "extremes")
def test_bicubic_equals_pillow_to_the_byte(height: Any, width: Any, contract: Any, kind: Any) -> None:
    image = picture(kind, height, width)
    np.testing.assert_array_equal(resize.spatial(image[None], contract)[0], pil(image, contract))


@pytest.mark.parametrize(
    "contract",
    [
        InputContract(1, 224, 224, resize_size=256, filter="bicubic", crop="center-floor"),
        InputContract(1, 224, 224, resize="stretch", resize_size=(256, 256), filter="bicubic"),
        InputContract(1, 256, 256, resize_size=292, crop="center-floor"),
    ],
    ids=["short side", "deit", "v-jepa 2"],
)
@pytest.mark.parametrize(("height", "width"), [(480, 640), (225, 301), (120, 90)])
def test_the_field_s_contracts_equal_one_call_of_pillow(contract: InputContract, height: int, width: int) -> None:
    """Of any version of Pillow: the height does not shrink more than the width."""
    image = picture("extremes", height, width)
    rows, columns, top, left = expected_geometry(height, width, contract)
    method = Image.Resampling[contract.filter.upper()]
    whole = np.asarray(Image.fromarray(image).resize((columns, rows), method))
    ours = resize.spatial(image[None], contract)[0]
    allowed = 0 if contract.filter == "bicubic" else 1
    assert levels(ours, whole[top : top + contract.height, left : left + contract.width]) <= allowed


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


@pytest.mark.parametrize(
    ("contract", "differing"),  # Pillow rounds twice: some levels differ with bilinear, not most
    [
        (InputContract(1, 224, 224), 0.2),
        (InputContract(1, 96, 160), 0.2),
        (InputContract(1, 224, 224, resize_size=256, filter="bicubic"), 0),
        (InputContract(1, 448, 600, resize="stretch", filter="bicubic"), 0),
    ],
    ids=str,
)
def test_equals_pillow_on_a_photograph(contract: InputContract, differing: float) -> None:
    photo = pytest.importorskip("skimage.data").astronaut()[:, :400]
    ours = resize.spatial(photo[None], contract)[0]
    assert levels(ours, pil(photo, contract)) <= 1
    assert np.mean(ours != pil(photo, contract)) <= differing


@pytest.mark.parametrize(("height", "width"), [(1080, 1920), (1920, 1080), (2000, 37)])
@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_large_frames_equal_pillow(height: int, width: int, name: Any) -> None:
    contract = InputContract(1, 112, 112, filter=name)
    image = picture("noise", height, width)
    assert levels(resize.spatial(image[None], contract)[0], pil(image, contract)) <= 1


@given(side, side, contracts())
def test_white_stays_white(height: Any, width: Any, contract: Any) -> None:
    """The weights sum to one, exactly or nearly, so a flat picture keeps its level."""
    assert resize.spatial(picture("white", height, width)[None], contract).min() == 255


@given(side, side, contracts(), st.integers(0, 3))
def test_any_strides_and_any_number_of_frames_give_the_same_bytes(
    height: Any, width: Any, contract: Any, turns: Any
) -> None:
    image = picture("noise", height, width)
    view = np.rot90(np.ascontiguousarray(np.rot90(image, turns)), -turns)
    found = resize.spatial(np.stack([image, image[::-1]]), contract)
    np.testing.assert_array_equal(resize.spatial(view[None], contract)[0], found[0])
    assert found.shape == (2, contract.height, contract.width, 3)


@given(st.integers(1, 4000), st.integers(1, 600), st.floats(0, 1, exclude_max=True))
@example(3, 600, 0.0)
@example(4000, 1, 0.0)
def test_partial_sums_are_exact_in_float64(size: Any, resized: Any, where: Any) -> None:
    """The bound that makes bicubic the same on every machine: whatever is added first, the sum stays an integer that
    float64 holds. Pillow needs it, too: its sums have 32 bits."""
    low, weights = resize._cubic(size, resized, int(where * resized))
    assert low >= 0
    assert low + len(weights) <= size
    np.testing.assert_array_equal(weights, np.rint(weights))
    assert abs(weights.sum() - resize.CUBIC_ONE) <= len(weights) / 2
    assert 255 * np.abs(weights).sum() < 2**31 - 2**21


def test_is_exact_integer_arithmetic() -> None:
    """The same bytes on every machine: the filter in Python's integers gives the same bytes as the BLAS."""
    contract = InputContract(1, 9, 11)
    image = picture("noise", 61, 83)
    rows, columns, top, left = resize.geometry(61, 83, contract)
    ours = resize.spatial(image[None], contract)[0]
    for y in range(9):
        for x in range(11):
            y0, wy = resize._triangle(61, rows, top + y)
            x0, wx = resize._triangle(83, columns, left + x)
            assert sum(map(int, wy)) == sum(map(int, wx)) == resize.ONE
            for c in range(3):
                total = sum(
                    int(a) * int(b) * int(image[y0 + i, x0 + j, c]) for i, a in enumerate(wy) for j, b in enumerate(wx)
                )
                assert ours[y, x, c] == (total * 2 + resize.ONE**2) // (2 * resize.ONE**2)


@given(side, side, contracts())
def test_geometry_covers_the_crop(height: Any, width: Any, contract: Any) -> None:
    rows, columns, top, left = resize.geometry(height, width, contract)
    assert (rows, columns, top, left) == expected_geometry(height, width, contract)
    assert 0 <= top <= top + contract.height <= rows
    assert 0 <= left <= left + contract.width <= columns
    if contract.resize_size is None:
        assert rows == contract.height or columns == contract.width
    elif contract.resize == "short-side":
        assert min(rows, columns) == contract.resize_size


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 600))
def test_the_short_side_is_that_of_transformers_and_torchvision(height: Any, width: Any, size: Any) -> None:
    """`get_resize_output_image_size` of transformers and `_compute_resized_output_size` of torchvision."""
    short, long = min(height, width), max(height, width)
    longer = int(size * long / short)
    expected = (longer, size) if width <= height else (size, longer)
    rows, columns, top, left = resize.geometry(height, width, InputContract(1, 1, 1, resize_size=size))
    assert (rows, columns) == expected
    # CenterCrop of torchvision, and center_crop of transformers.
    assert (top, left) == (round((rows - 1) / 2.0), round((columns - 1) / 2.0))
    floored = resize.geometry(height, width, InputContract(1, 1, 1, resize_size=size, crop="center-floor"))
    assert floored[2:] == ((rows - 1) // 2, (columns - 1) // 2)


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


def test_a_frame_that_has_the_size_of_the_crop_is_resized_before_it() -> None:
    image, contract = picture("noise", 32, 32), InputContract(1, 32, 32, resize_size=40)
    assert levels(resize.spatial(image[None], contract)[0], pil(image, contract)) <= 1
    assert levels(resize.spatial(image[None], contract)[0], image) > 50


def test_a_frame_that_has_the_size_before_the_crop_is_cropped() -> None:
    image = picture("noise", 40, 43)
    out = resize.spatial(image[None], InputContract(1, 32, 32, resize_size=40))
    np.testing.assert_array_equal(out[0], image[4:36, 6:38])  # 5.5 to the even side
    out = resize.spatial(image[None], InputContract(1, 32, 32, resize_size=40, crop="center-floor"))
    np.testing.assert_array_equal(out[0], image[4:36, 5:37])


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


# --------------------------------------------------------------------------------------------------------------- views

SIDES: Any = ("start", "middle", "end")


@pytest.mark.parametrize(("height", "width"), [(240, 320), (320, 240), (1080, 1921), (225, 224), (224, 224)])
def test_square_crops_are_those_of_the_authors(height: int, width: int) -> None:
    """VideoMAE: the short side becomes that of the crop, int(index * (long - short) / 2) along the longer one."""
    contract = InputContract(1, 224, 224, crop="center-floor")
    long = math.floor(max(height, width) * Fraction(224, min(height, width)))
    for index, side in enumerate(SIDES):
        rows, columns, top, left = resize.geometry(height, width, contract, side)
        along = int(index * (1.0 * (long - 224) / 2))
        assert (rows, columns) == ((long, 224) if height > width else (224, long))
        assert (top, left) == ((along, 0) if height > width else (0, along))


def test_the_other_axis_stays_in_the_middle() -> None:
    """`uniform_crop` of SlowFast: 256 x 341 leaves 32 rows and 117 columns beside 224 x 224."""
    contract = InputContract(1, 224, 224, resize_size=256)
    assert [resize.geometry(480, 640, contract, side)[2:] for side in SIDES] == [(16, 0), (16, 58), (16, 117)]
    assert [resize.geometry(640, 480, contract, side)[2:] for side in SIDES] == [(0, 16), (58, 16), (117, 16)]
    assert [resize.geometry(480, 480, contract, side)[2:] for side in SIDES] == [(16, 0), (16, 16), (16, 32)]


def test_a_crop_that_is_not_square_moves_where_there_is_room() -> None:
    """266 x 320 leaves 26 rows and no column beside 240 x 320, though its columns are the longer side."""
    found = [resize.geometry(500, 600, InputContract(1, 240, 320), side) for side in SIDES]
    assert found == [(266, 320, 0, 0), (266, 320, 13, 0), (266, 320, 26, 0)]


@given(side, side, contracts(), KINDS)
def test_crops_are_cut_from_the_resized_frame(height: Any, width: Any, contract: Any, kind: Any) -> None:
    """To the byte; and they lie inside of it, the first at its start and the last at its end."""
    image = picture(kind, height, width)[None]
    rows, columns, *_ = expected_geometry(height, width, contract)
    everything = InputContract(1, rows, columns, resize="stretch", filter=contract.filter)
    whole = resize.spatial(image, everything)
    corners = []
    for at in SIDES:
        *size, top, left = resize.geometry(height, width, contract, at)
        assert size == [rows, columns]
        assert 0 <= top <= rows - contract.height
        assert 0 <= left <= columns - contract.width
        corners.append((top, left))
        crop = whole[:, top : top + contract.height, left : left + contract.width]
        np.testing.assert_array_equal(resize.spatial(image, contract, at), crop)
    assert corners[1] == expected_geometry(height, width, contract)[2:]
    over = rows - contract.height, columns - contract.width
    assert tuple(np.subtract(corners[2], corners[0])) == ((over[0], 0) if over[0] > over[1] else (0, over[1]))


@pytest.mark.parametrize(("levels", "every"), [((0, 255), False), ((0, 1), True), ((7, 8), True)])
@pytest.mark.parametrize("size", [(16, 16), (32, 48), (37, 61)])
def test_values_in_the_middle_between_two_levels_go_up(
    levels: tuple[int, int], every: bool, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 cannot decide them. Summed in integers here; with a few of them and with nothing but them."""
    calls: list[object] = []
    exact = resize._exact_columns
    monkeypatch.setattr(resize, "_exact_columns", lambda *given: calls.append(given) or exact(*given))
    contract = InputContract(1, 8, 8, resize="stretch")
    frame = np.random.default_rng(2).choice(np.array(levels, np.uint8), (*size, 3))
    if every:
        frame[:, ::2], frame[:, 1::2] = levels[0], levels[1]  # each sum is half a level above the lower one
    out = resize.spatial(frame[None], contract)[0]
    weights = [[resize._triangle(n, 8, i) for i in range(8)] for n in size]
    for i, (top, rows) in enumerate(weights[0]):
        for j, (left, columns) in enumerate(weights[1]):
            seen = frame[top : top + len(rows), left : left + len(columns)].astype(object)
            total = (np.outer(rows.astype(int), columns.astype(int)).astype(object)[..., None] * seen).sum((0, 1))
            assert [int(t) // 2**31 + 1 >> 1 for t in total] == out[i, j].tolist()
    assert calls or not (every and size[1] % 16 == 0)
