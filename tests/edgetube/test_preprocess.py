"""Sampling against a slow reading of the definition in docs/preprocessing.md, and the checks of arrays."""

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

from edgetube import preprocess, resize
from edgetube.contract import InputContract
from edgetube.errors import InputError
from edgetube.views import View

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


def strided(frames: int, stride: int) -> InputContract:
    return InputContract(frames, 8, 8, sampling="stride", stride=stride)


@given(
    count=st.integers(1, 200),
    frames=st.integers(1, 12),
    stride=st.integers(1, 40),
    source=st.none() | st.sampled_from(RATES),
)
@example(count=10, frames=5, stride=4, source=None)
def test_a_stride_counts_frames_of_the_source(count: Any, frames: Any, stride: Any, source: Any) -> None:
    """VideoMAE on Kinetics: every stride-th frame of the source, the last of these repeated; the middle clip begins
    where half of what is over lies before it (mmaction2: max_offset // 2), whatever the rate of the source."""
    first = max(0, count - frames * stride) // 2
    every = list(range(first, count, stride))[:frames]
    expected = every + every[-1:] * (frames - len(every))
    assert preprocess.sample(count, source, strided(frames, stride)).tolist() == expected


@given(st.integers(1, 90), st.sampled_from(RATES), st.integers(1, 8), st.integers(1, 20), st.integers(0, 99))
def test_a_stride_begins_at_the_frame_on_display_at_start(
    count: Any, source: Any, frames: Any, stride: Any, percent: Any
) -> None:
    start = count * percent / 100 / source
    first = max(i for i in range(count) if i / source <= start + preprocess.TOLERANCE)
    every = list(range(first, count, stride))[:frames]
    found = preprocess.sample(count, source, strided(frames, stride), start)
    assert found.tolist() == every + every[-1:] * (frames - len(every))


def test_a_stride_of_one_takes_every_frame() -> None:
    for count in (1, 5, 9, 40):
        every = preprocess.sample(count, None, InputContract(6, 8, 8))
        np.testing.assert_array_equal(preprocess.sample(count, None, strided(6, 1)), every)


def test_a_stride_needs_a_clock_for_a_start_only() -> None:
    with pytest.raises(InputError, match="no clock: give source_fps"):
        preprocess.sample(9, None, strided(2, 2), 0.5)


@given(st.integers(1, 3000), st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
def test_segments_are_those_of_the_authors(count: Any, frames: Any) -> None:
    """TSN and VideoMAE on Something-Something: `tick = frames of the video / segments`, then `tick / 2 + tick * k`, cut
    to an integer; in floats, which are exact for these numbers of segments."""
    contract = InputContract(frames, 8, 8, sampling="segments")
    tick = count / float(frames)
    expected = [int(tick / 2.0 + tick * k) for k in range(frames)]
    assert preprocess.sample(count, None, contract).tolist() == expected
    assert preprocess.sample(count, 30.0, contract).tolist() == expected


@given(st.integers(1, 3000), st.integers(1, 100))
def test_segments_are_the_middles_of_equal_parts(count: Any, frames: Any) -> None:
    found = preprocess.sample(count, None, InputContract(frames, 8, 8, sampling="segments")).tolist()
    assert found == [math.floor((k + Fraction(1, 2)) * Fraction(count, frames)) for k in range(frames)]
    assert found == sorted(found)
    assert 0 <= found[0] <= found[-1] < count


def test_segments_of_the_whole_source_have_no_start() -> None:
    contract = InputContract(4, 8, 8, sampling="segments")
    with pytest.raises(InputError, match=r"start is 0.0 s, but this model takes 4 frames from the whole .*: leave"):
        preprocess.sample(9, 30.0, contract, 0.0)


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


def test_prepare_samples_then_resizes(rng: np.random.Generator) -> None:
    frames = rng.integers(0, 256, (50, 40, 70, 3), np.uint8)
    contract = InputContract(6, 24, 32, fps=7)
    clip = preprocess.prepare(frames, contract, source_fps=25, start=0.2)
    wanted = slow_sample(50, Fraction(25), contract, Fraction(1, 5))
    assert len(set(wanted)) == 6
    np.testing.assert_array_equal(clip, resize.spatial(frames[wanted], contract))
    assert clip.shape == contract.shape
    assert clip.flags.c_contiguous


def test_prepare_resizes_only_what_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    spatial = resize.spatial
    monkeypatch.setattr(resize, "spatial", lambda f, *how: seen.append(len(f)) or spatial(f, *how))
    frames = np.zeros((200, 20, 20, 3), np.uint8)
    preprocess.prepare(frames, InputContract(4, 10, 10, fps=5), source_fps=30)
    preprocess.prepare(frames[:2], InputContract(4, 10, 10))  # repeats are not resized again
    preprocess.prepare(frames[:5], InputContract(4, 10, 10, sampling="stride", stride=3))
    preprocess.prepare(frames[:2], InputContract(4, 10, 10, sampling="segments"))
    assert seen == [4, 2, 2, 2]


def test_prepare_pads_a_short_clip_with_its_last_frame() -> None:
    frames = np.stack([np.full((8, 8, 3), 10 * i, np.uint8) for i in range(3)])
    clip = preprocess.prepare(frames, InputContract(6, 8, 8))
    assert clip[:, 0, 0, 0].tolist() == [0, 10, 20, 20, 20, 20]


def test_prepare_returns_a_copy() -> None:
    frames = np.zeros((4, 8, 8, 3), np.uint8)
    preprocess.prepare(frames, InputContract(4, 8, 8))[...] = 9
    assert not frames.any()


def test_image_contract_takes_one_image(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (30, 40, 3), np.uint8)
    contract = InputContract(1, 16, 16)
    np.testing.assert_array_equal(preprocess.prepare(image, contract), preprocess.prepare(image[None], contract))
    assert preprocess.check(image[:16, :16], contract).shape == (1, 1, 16, 16, 3)


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


# --------------------------------------------------------------------------------------------------------------- views


def places(count: int, contract: InputContract, views: int, source_fps: float | None = None) -> list[list[int]]:
    """The frames of each temporal view."""
    return [preprocess.sample(count, source_fps, contract, view=View(v, views)).tolist() for v in range(views)]


@given(st.integers(1, 400), st.integers(1, 16), st.integers(1, 8), st.integers(2, 12))
@example(300, 16, 4, 5)
def test_temporal_views_of_a_stride_are_spread_over_the_room(count: Any, frames: Any, stride: Any, views: Any) -> None:
    """`sample_linspace_sequence` of DMVR, which ViViT's authors call, in integers; short sources end as elsewhere."""
    room = max(0, count - frames * stride)
    for v, found in enumerate(places(count, strided(frames, stride), views)):
        first = room * v // (views - 1)
        every = list(range(first, count, stride))[:frames]
        assert found == every + every[-1:] * (frames - len(every))


def test_temporal_views_by_hand() -> None:
    assert [found[0] for found in places(300, strided(16, 4), 5)] == [0, 59, 118, 177, 236]
    assert places(300, strided(16, 4), 5)[-1][-1] == 296
    assert places(10, strided(4, 2), 3) == [[0, 2, 4, 6], [1, 3, 5, 7], [2, 4, 6, 8]]
    # 3 s at 30 per second leave 2.6 s of room beside 4 frames at 10 per second: 0, 1.3 and 2.6 s
    uniform = InputContract(4, 8, 8, fps=10)
    assert places(90, uniform, 3, 30) == [[0, 3, 6, 9], [39, 42, 45, 48], [78, 81, 84, 87]]
    assert places(3, uniform, 2, 10) == [[0, 1, 2, 2]] * 2  # no room: all views are the same


@pytest.mark.parametrize("count", [60, 61, 117, 16, 9])
def test_two_temporal_views_of_segments_are_those_of_videomae(count: int) -> None:
    """`SSVideoClsDataset` with test_num_segment=2: middles and starts of the parts are sorted and taken in turn."""
    parts = 16
    tick = count / parts
    every = sorted([int(tick / 2 + tick * x) for x in range(parts)] + [int(tick * x) for x in range(parts)])
    contract = InputContract(parts, 8, 8, sampling="segments")
    assert places(count, contract, 2) == [every[0::2], every[1::2]]


@given(st.integers(1, 300), st.integers(1, 20), st.integers(2, 9))
def test_temporal_views_of_segments_move_inside_of_each_part(count: Any, parts: Any, views: Any) -> None:
    tick = Fraction(count, parts)
    for v, found in enumerate(places(count, InputContract(parts, 8, 8, sampling="segments"), views)):
        assert found == [math.floor(j * tick + tick * v / views) for j in range(parts)]


@given(
    st.floats(0.01, 1e4), st.sampled_from(RATES), st.integers(1, 64), st.none() | st.sampled_from(RATES),
    st.integers(2, 100),
)  # fmt: skip
def test_starts_of_views_lie_within_the_source(duration: Any, rate: Any, frames: Any, fps: Any, views: Any) -> None:
    contract = InputContract(frames, 8, 8, fps=fps)
    starts = [preprocess.window(contract, duration, rate, view=View(v, views)) for v in range(views)]
    room = max(0.0, duration - frames / (fps or rate))
    assert starts[0] == 0
    assert starts[-1] == pytest.approx(room)
    assert np.diff(starts) == pytest.approx(room / (views - 1), abs=1e-9 * duration)
    assert max(starts) < duration
    if views % 2:
        assert starts[views // 2] == pytest.approx(preprocess.window(contract, duration, rate))


def test_views_of_frames_in_memory_have_their_own_crop() -> None:
    frames = np.arange(40, dtype=np.uint8)[:, None, None, None] + np.arange(30, dtype=np.uint8)[:, None] * np.ones(
        (40, 10, 30, 3), np.uint8
    )
    contract = InputContract(4, 10, 10, sampling="stride", stride=5)
    for v, first in enumerate((0, 10, 20)):
        for side, column in (("start", 0), ("middle", 10), ("end", 20)):
            found = preprocess.prepare(frames, contract, view=View(v, 3, side))  # type: ignore[arg-type]
            np.testing.assert_array_equal(found, frames[first : first + 20 : 5, :, column : column + 10])


@pytest.mark.parametrize(
    ("pixels", "start", "contract", "message"),
    [
        (
            (90, 8, 8, 3),
            1.0,
            InputContract(4, 8, 8, fps=10),
            "start is 1.0 s, but 3 temporal views are spread over the",
        ),
        ((8, 9, 3), None, InputContract(1, 8, 8), "a single frame is a still image and has 1 temporal view, not 3"),
        ((1, 8, 9, 3), None, InputContract(1, 8, 8), "a single frame is a still image"),
    ],
)
def test_temporal_views_are_refused_where_there_is_no_room(
    pixels: Any, start: Any, contract: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        preprocess.prepare(np.zeros(pixels, np.uint8), contract, start=start, view=View(0, 3))
    preprocess.prepare(np.zeros(pixels, np.uint8), contract, start=start, view=View(side="end"))
