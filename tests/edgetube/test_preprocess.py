"""Preprocessing against PIL, torch and a slow reading of the definition in docs/preprocessing.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image

from edgetube import preprocess
from edgetube.contract import InputContract
from edgetube.errors import InputError


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
    ours = preprocess.spatial(image[None], contract)
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
    ours = preprocess.spatial(image[None], contract)[0]
    # Without rounding in between the distance to the exact value is half a level, and what 16-bit weights cost.
    assert np.abs(ours - exact).max() <= 0.55


@pytest.mark.parametrize("contract", [InputContract(1, 224, 224), InputContract(1, 96, 160)], ids=str)
def test_equals_pillow_on_a_photograph(contract: InputContract) -> None:
    photo = pytest.importorskip("skimage.data").astronaut()[:, :400]
    ours = preprocess.spatial(photo[None], contract)[0]
    assert levels(ours, pil(photo, contract)) <= 1
    assert np.mean(ours != pil(photo, contract)) < 0.2  # Pillow rounds twice, so some levels differ, not most


@pytest.mark.parametrize(("height", "width"), [(1080, 1920), (1920, 1080), (2000, 37)])
def test_large_frames_equal_pillow(height: int, width: int) -> None:
    contract = InputContract(1, 112, 112)
    image = picture("noise", height, width)
    assert levels(preprocess.spatial(image[None], contract)[0], pil(image, contract)) <= 1


@given(side, side, target, target)
def test_white_stays_white(height: Any, width: Any, rows: Any, columns: Any) -> None:
    """The weights sum to one exactly, so a flat picture keeps its level."""
    contract = InputContract(1, rows, columns)
    assert preprocess.spatial(picture("white", height, width)[None], contract).min() == 255


def test_is_exact_integer_arithmetic() -> None:
    """The same bytes on every machine: the filter in Python's integers gives the same bytes as the BLAS."""
    contract = InputContract(1, 9, 11)
    image = picture("noise", 61, 83)
    rows, columns, top, left = preprocess.geometry(61, 83, contract)
    ours = preprocess.spatial(image[None], contract)[0]
    for y in range(9):
        for x in range(11):
            y0, wy = preprocess._weights(61, rows, top + y)
            x0, wx = preprocess._weights(83, columns, left + x)
            assert sum(map(int, wy)) == sum(map(int, wx)) == preprocess.ONE
            for c in range(3):
                total = sum(
                    int(a) * int(b) * int(image[y0 + i, x0 + j, c]) for i, a in enumerate(wy) for j, b in enumerate(wx)
                )
                assert ours[y, x, c] == (total * 2 + preprocess.ONE**2) // (2 * preprocess.ONE**2)


@given(side, side, target, target, st.sampled_from(["short-side", "stretch"]))
def test_geometry_covers_the_crop(height: Any, width: Any, rows: Any, columns: Any, resize: Any) -> None:
    contract = InputContract(1, rows, columns, resize=resize)
    got = preprocess.geometry(height, width, contract)
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
    assert preprocess.geometry(*source, InputContract(1, 224, 224)) == expected


def test_right_size_is_returned_untouched() -> None:
    frames = picture("noise", 16, 24)[None]
    assert preprocess.spatial(frames, InputContract(1, 16, 24)) is frames


def test_crop_alone_copies_pixels() -> None:
    frames = picture("noise", 16, 30)[None]
    out = preprocess.spatial(frames, InputContract(1, 16, 24))
    np.testing.assert_array_equal(out, frames[:, :, 3:27])


def test_reads_only_what_the_crop_needs() -> None:
    """Changing pixels outside the crop's support changes nothing; inside, it does."""
    contract = InputContract(1, 20, 20)
    image = picture("noise", 100, 400)
    before = preprocess.spatial(image[None], contract)
    image[:, :140], image[:, 260:] = 0, 0
    np.testing.assert_array_equal(preprocess.spatial(image[None], contract), before)
    image[:, 150:250] = 0
    assert np.any(preprocess.spatial(image[None], contract) != before)


# ------------------------------------------------------------------------------------------------------------ sampling


def slow_sample(count: int, source: Fraction, contract: InputContract, start: Fraction | None) -> list[int]:
    """The definition, one frame after the other, in exact fractions."""
    fps = Fraction(contract.fps) if contract.fps else source
    if start is None:
        start = max(Fraction(0), (count / source - contract.frames / fps) / 2)
    tolerance = Fraction(preprocess.TOLERANCE)
    out = []
    for k in range(contract.frames):
        wanted = start + k / fps
        near = [i for i in range(count) if abs(i / source - wanted) <= tolerance]
        before = [i for i in range(count) if i / source < wanted]
        out.append(near[0] if near else before[-1] if before else 0)
    return out


def is_tie(count: int, source: Fraction, contract: InputContract, start: Fraction | None) -> bool:
    """Whether a frame is exactly the tolerance away, so that the rounding of floats decides."""
    fps = Fraction(contract.fps) if contract.fps else source
    start = max(Fraction(0), (count / source - contract.frames / fps) / 2) if start is None else start
    offsets = [abs(i / source - start - k / fps) for i in range(count) for k in range(contract.frames)]
    return any(abs(offset - Fraction(preprocess.TOLERANCE)) < 1e-9 for offset in offsets)


RATES = [5, 10, 12.5, 24, 30, 60]


@given(
    st.integers(1, 90),
    st.sampled_from(RATES),
    st.one_of(st.none(), st.sampled_from(RATES)),
    st.integers(1, 12),
    st.one_of(st.none(), st.integers(0, 99)),
)
@example(10, 30, 30, 5, None)
@example(3, 10, 10, 8, None)
def test_sample_equals_the_definition(count: Any, source: Any, fps: Any, frames: Any, percent: Any) -> None:
    contract = InputContract(frames, 8, 8, fps=fps)
    start = None if percent is None else Fraction(count * percent, 100) / Fraction(source)
    assume(not is_tie(count, Fraction(source), contract, start))
    got = preprocess.sample(count, source, contract, None if start is None else float(start))
    assert got.shape == (frames,)
    assert got.tolist() == slow_sample(count, Fraction(source), contract, start)


@pytest.mark.parametrize(
    ("count", "source", "fps", "frames", "start", "expected"),
    [
        (16, None, 10, 16, None, list(range(16))),  # no rate given: they are at the contract's
        (9, None, None, 4, None, [2, 3, 4, 5]),  # half a frame to the front
        (100, 30, 10, 4, 0.0, [0, 3, 6, 9]),
        (100, 30, 10, 4, 1.0, [30, 33, 36, 39]),
        (100, 10, 20, 6, 1.0, [10, 10, 11, 11, 12, 12]),  # a slow source repeats
        (100, 30, 15, 4, None, [46, 48, 50, 52]),  # (3.333 - 0.267) / 2 = 1.533 s
        (3, 10, 10, 6, None, [0, 1, 2, 2, 2, 2]),  # too short: the last frame is repeated
        (3, 10, 10, 4, 0.1, [1, 2, 2, 2]),
        (1, None, None, 3, None, [0, 0, 0]),
        (9, None, None, 1, None, [4]),  # an image of a clip is its middle
    ],
)
def test_sample_by_hand(
    count: int, source: float | None, fps: float | None, frames: int, start: float | None, expected: list[int]
) -> None:
    contract = InputContract(frames, 8, 8, fps=fps)
    assert preprocess.sample(count, source, contract, start).tolist() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 30, None), "no frames"),
        ((10, 0, None), "fps is 0; expected frames per second"),
        ((10, math.nan, None), "fps is nan"),
        ((10, 10, 1.0), "start is 1.0 s; expected a time within the 1.000 s"),
        ((10, 10, -0.1), "start is -0.1 s"),
        ((10, 10, math.nan), "start is nan; expected seconds"),
        ((10, None, 0.0), "no clock: give source_fps"),
    ],
)
def test_sample_refuses(arguments: Any, message: str) -> None:
    count, source, start = arguments
    with pytest.raises(InputError, match=message):
        preprocess.sample(count, source, InputContract(4, 8, 8), start)


def test_resample_gives_a_frame_when_its_time_has_come() -> None:
    """A live view must not wait for the next frame to show this one."""
    asked = []

    def camera() -> Iterator[Any]:
        for i in range(10):
            asked.append(i)
            yield i / 10, i

    got = preprocess.resample(camera(), 10.0)
    for i in range(5):
        assert next(got) == (i / 10, i)
        assert asked[-1] == i


@pytest.mark.parametrize(
    ("times", "fps", "start", "expected"),
    [
        ([0, 1, 2, 3], 1.0, None, [0, 1, 2, 3]),
        ([0, 1, 2, 3], 2.0, None, [0, 0, 1, 1, 2, 2, 3, 3]),  # the last one stays as long as the one before it
        ([0, 1, 2, 3], 0.5, None, [0, 2]),
        ([7, 8, 9], 1.0, None, [0, 1, 2]),  # from the first timestamp on
        ([0.4, 1.1, 5], 1.0, 0.0, [0, 0, 1, 1, 1, 2, 2, 2, 2]),  # before the first frame, the first; varying gaps
        ([0, 0.5, 0.6, 3], None, 0.55, [1, 2, 3]),  # every frame
        ([0.0004, 0.9996, 2.0004], 1.0, 0.0, [0, 1, 2]),  # timestamps rounded either way
        ([0], 1.0, None, [0]),
        ([], 1.0, None, []),
    ],
)
def test_resample_by_hand(times: list[Any], fps: float | None, start: float | None, expected: list[Any]) -> None:
    timed = ((t, i) for i, t in enumerate(times))
    assert [i for _, i in preprocess.resample(timed, fps, start)] == expected


# -------------------------------------------------------------------------------------------------------------- arrays


def test_prepare_samples_then_resizes() -> None:
    frames = np.stack([picture("noise", 40, 70) // 2 + i for i in range(50)])
    contract = InputContract(6, 24, 32, fps=7)
    clip = preprocess.prepare(frames, contract, source_fps=25, start=0.2)
    wanted = slow_sample(50, Fraction(25), contract, Fraction(1, 5))
    assert len(set(wanted)) == 6
    for out, index in zip(clip, wanted, strict=True):
        assert levels(out, pil(frames[index], contract)) <= 1
    assert clip.shape == contract.shape
    assert clip.flags.c_contiguous


def test_prepare_resizes_only_what_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    spatial = preprocess.spatial
    monkeypatch.setattr(preprocess, "spatial", lambda f, c: seen.append(len(f)) or spatial(f, c))
    frames = np.zeros((200, 20, 20, 3), np.uint8)
    preprocess.prepare(frames, InputContract(4, 10, 10, fps=5), source_fps=30)
    preprocess.prepare(frames[:2], InputContract(4, 10, 10))  # repeats are not resized again
    assert seen == [4, 2]


def test_prepare_pads_a_short_clip_with_its_last_frame() -> None:
    frames = np.stack([np.full((8, 8, 3), 10 * i, np.uint8) for i in range(3)])
    clip = preprocess.prepare(frames, InputContract(6, 8, 8))
    assert clip[:, 0, 0, 0].tolist() == [0, 10, 20, 20, 20, 20]


def test_prepare_returns_a_copy() -> None:
    frames = np.zeros((4, 8, 8, 3), np.uint8)
    preprocess.prepare(frames, InputContract(4, 8, 8))[...] = 9
    assert not frames.any()


def test_image_contract_takes_one_image() -> None:
    image = picture("ramp", 30, 40)
    contract = InputContract(1, 16, 16)
    np.testing.assert_array_equal(preprocess.prepare(image, contract), preprocess.prepare(image[None], contract))
    small = picture("ramp", 16, 16)
    assert preprocess.check(small, contract).shape == (1, 1, 16, 16, 3)


def views(clip: np.ndarray) -> dict[str, np.ndarray]:
    """The same pixels behind different strides."""
    padded = np.zeros((*clip.shape[:2], clip.shape[2] + 7, 4), np.uint8)
    padded[:, :, 3:-4, :3] = clip
    double = np.repeat(clip, 2, axis=0)
    return {
        "negative": np.ascontiguousarray(clip[::-1, :, ::-1])[::-1, :, ::-1],
        "bgr": np.ascontiguousarray(clip[..., ::-1])[..., ::-1],
        "channels first": np.ascontiguousarray(clip.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1),
        "fortran": np.asfortranarray(clip),
        "padded": padded[:, :, 3:-4, :3],
        "every other": double[::2],
        "read-only": np.frombuffer(clip.tobytes(), np.uint8).reshape(clip.shape),
    }


@pytest.mark.parametrize("name", list(views(np.zeros((1, 1, 1, 3), np.uint8))))
def test_any_strides_give_the_same_bytes(name: str, rng: np.random.Generator) -> None:
    clip = rng.integers(0, 256, (5, 30, 44, 3), np.uint8)
    view = views(clip)[name]
    same, other = InputContract(5, 30, 44), InputContract(3, 16, 20)
    checked = preprocess.check(view, same)
    assert checked.flags.c_contiguous
    assert checked.shape == (1, 5, 30, 44, 3)
    np.testing.assert_array_equal(checked[0], clip)
    np.testing.assert_array_equal(preprocess.prepare(view, other), preprocess.prepare(clip, other))


def test_check_does_not_copy_what_is_right(rng: np.random.Generator) -> None:
    clips = rng.integers(0, 256, (2, 3, 8, 8, 3), np.uint8)
    assert np.shares_memory(preprocess.check(clips, InputContract(3, 8, 8)), clips)


FLOATS = np.zeros((3, 8, 8, 3), np.float32)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (FLOATS, r": dtype float32; expected uint8 RGB in 0..255: do not normalise; .*\(frames \* 255\)"),
        (FLOATS.astype(np.int64), ": dtype int64; expected uint8 RGB in 0..255: give raw RGB pixels"),
        (np.zeros((4, 8, 8), np.uint8), r"shape \(4, 8, 8\); expected .*: the last axis is the colour"),
        (np.zeros((3, 3, 8, 8), np.uint8), r"shape \(3, 3, 8, 8\); expected .*numpy.moveaxis\(frames, -3, -1\)"),
        (np.zeros((3, 8, 8, 4), np.uint8), r"shape \(3, 8, 8, 4\); expected"),
    ],
    ids=["float", "int", "rank", "channels first", "alpha"],
)
@pytest.mark.parametrize("function", [preprocess.check, preprocess.prepare])
def test_wrong_pixels_are_refused(function: Callable[..., Any], array: npt.NDArray[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        function(array, InputContract(3, 8, 8))


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (3, 8, 9, 3), (2, 3, 9, 8, 3), (0, 3, 8, 8, 3), (8, 8, 3)])
def test_check_refuses_another_shape(shape: tuple[int, ...]) -> None:
    text = ", ".join(map(str, shape))
    with pytest.raises(
        InputError, match=rf"\({text}\); expected \(3, 8, 8, 3\) or a batch .*\(B, 3, 8, 8, 3\): .*prepare"
    ):
        preprocess.check(np.zeros(shape, np.uint8), InputContract(3, 8, 8))


@pytest.mark.parametrize("shape", [(8, 8, 3), (2, 3, 8, 8, 3), (0, 8, 8, 3), (3, 0, 8, 3)])
def test_prepare_refuses_another_rank_and_nothing(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=rf"shape \({', '.join(map(str, shape))}\)"):
        preprocess.prepare(np.zeros(shape, np.uint8), InputContract(3, 8, 8))


def test_image_contract_refuses_a_stack_of_images() -> None:
    with pytest.raises(InputError, match=r"\(2, 8, 8, 3\); expected \(1, 8, 8, 3\)"):
        preprocess.check(np.zeros((2, 8, 8, 3), np.uint8), InputContract(1, 8, 8))
