"""Sliding windows against a slow oracle that evaluates the definition."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetube import preprocess, stream
from edgetube.contract import InputContract
from edgetube.errors import InputError, InputWarning
from edgetube.video import Clip


def frame(value: int) -> np.ndarray:
    return np.full((8, 8, 3), value, np.uint8)


def values(clip: Clip) -> list[int]:
    return [int(f[0, 0, 0]) for f in clip.frames]


@given(
    gaps=st.lists(st.integers(5, 300), min_size=1, max_size=60),
    fps=st.sampled_from([5.0, 12.5, 20.0]),
    hop=st.integers(1, 6),
)
def test_every_tick_shows_the_frame_that_was_on_display(gaps: Any, fps: Any, hop: Any) -> None:
    # Off the grid of milliseconds, so that no tick lies exactly on a tolerance.
    times = np.cumsum([0, *(gap + 0.137 for gap in gaps[:-1])]) / 1000 + 2.0
    contract = InputContract(4, 8, 8, fps=fps)
    found = [c for _, c in stream.windows(((t, frame(i)) for i, t in enumerate(times)), contract, hop)]
    # The last frame stays on display for as long as the one before it did, less the rounding of three timestamps.
    end = times[-1] + max(1e-3, times[-1] - times[-2] - 3e-3 if len(times) > 1 else 0)
    wanted = [2.0 + k / fps for k in range(1000) if 2.0 + k / fps < end]
    shown = [int(np.flatnonzero(times <= t + 1e-3)[-1]) for t in wanted]
    if len(shown) < 4:
        assert [values(c)[: len(shown)] for c in found] == [shown]
        assert values(found[0])[len(shown) :] == [shown[-1]] * (4 - len(shown))
    else:
        assert [values(c) for c in found] == [shown[s : s + 4] for s in range(0, len(shown) - 3, hop)]


def test_frames_are_resized_by_the_contract() -> None:
    tall = np.zeros((40, 20, 3), np.uint8)
    ((_, clip),) = stream.windows([(0.0, tall)], InputContract(2, 10, 10))
    assert clip.frames.shape == (2, 10, 10, 3)


@given(count=st.integers(1, 60), stride=st.integers(1, 9), hop=st.integers(1, 6), gap=st.floats(0.001, 40))
def test_a_stride_takes_every_kth_frame_whatever_the_clock(count: Any, stride: Any, hop: Any, gap: Any) -> None:
    contract = InputContract(4, 8, 8, sampling="stride", stride=stride)
    taken = list(range(0, count, stride))
    found = [c for _, c in stream.windows(((gap * i, frame(i)) for i in range(count)), contract, hop)]
    if len(taken) < 4:
        assert [values(c) for c in found] == [taken + taken[-1:] * (4 - len(taken))]
    else:
        assert [values(c) for c in found] == [taken[s : s + 4] for s in range(0, len(taken) - 3, hop)]


def test_a_strided_window_comes_with_its_newest_frame() -> None:
    """It waits for no frame after it. A hop of a quarter of the clip is two frames of the model, six of the camera."""
    asked = []

    def camera() -> Iterator[stream.TimedFrame]:
        for i in range(100):
            asked.append(i)
            yield i / 30, frame(i)

    clips = stream.windows(camera(), InputContract(8, 8, 8, sampling="stride", stride=3))
    for newest in (21, 27, 33):
        _, clip = next(clips)
        assert values(clip) == list(range(newest - 21, newest + 1, 3))
        assert asked[-1] == newest
        assert (clip.start, clip.end) == (pytest.approx((newest - 21) / 30), pytest.approx(newest / 30))


def test_segments_of_a_stream_are_refused_at_the_call() -> None:
    contract = InputContract(4, 8, 8, sampling="segments")
    with pytest.raises(InputError, match=r"samples 4 segments of a whole video; no window .* whole files"):
        stream.windows(iter(()), contract)


def test_bare_frames_get_a_clock() -> None:
    pairs = list(stream.timed([frame(i) for i in range(3)], 10.0))
    assert [(t, int(f[0, 0, 0])) for t, f in pairs] == [(0.0, 0), (0.1, 1), (0.2, 2)]
    ((second, shown),) = stream.timed([(5, frame(1))], 10.0)
    assert (second, int(shown[0, 0, 0])) == (5.0, 1)


# ------------------------------------------------------------------------------------------------------------ the door

DTYPES = [np.uint8, np.int8, np.uint16, np.int64, np.float16, np.float32, np.float64, np.bool_, np.complex64]


def refusal(function: Callable[[], object]) -> str | None:
    """What is said; None when nothing is refused."""
    try:
        function()
    except InputError as error:
        return str(error)
    return None


def reason(message: str | None) -> str | None:
    """A refusal without the name of what is refused and its shape."""
    return message and re.sub(r"^[^:]*: |shape \([^)]*\); expected [^:;]*", "", message)


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=5) | st.permutations([3, 4, 5]) | st.just([6, 7, 3]),
    count=st.integers(1, 3),
    reverse=st.booleans(),
)
def test_stream_and_predict_refuse_the_same_arrays(dtype: type, shape: list[int], count: int, reverse: bool) -> None:
    """Whatever one door takes or refuses, the other does, and for the same reason."""
    given_: npt.NDArray[Any] = np.arange(count * math.prod(shape)).reshape(count, *shape).astype(dtype)
    frames = given_[:, ::-1] if reverse and shape else given_
    contract = InputContract(4, 6, 6, fps=10.0)
    streamed = refusal(lambda: list(stream.timed(frames, 10.0)))
    predicted = refusal(lambda: preprocess.prepare(frames, contract, 10.0))
    right = dtype is np.uint8 and len(shape) == 3 and shape[2] == 3 and 0 not in shape
    assert (streamed is None, predicted is None) == (right, right)
    # A stack of pictures without colours, (N, H, 3), looks like one picture to `predict`: refused, in other words.
    if len(shape) in (0, 3):
        assert reason(streamed) == reason(predicted)
    if right:
        for (_, shown), expected in zip(stream.timed(frames, 10.0), frames, strict=True):
            np.testing.assert_array_equal(shown, expected)
            assert not np.shares_memory(shown, given_)


PICTURE = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((True, PICTURE), r"frame 0 of the stream: a pair \(ok, frame\), as OpenCV .* cv2.COLOR_BGR2RGB"),
        ((np.True_, PICTURE), r"a pair \(ok, frame\)"),
        ((False, None), r"a pair \(ok, frame\)"),
        (None, "frame 0 of the stream: None; expected an array: a camera that gives None"),
        ((0.0, None), "frame 0 of the stream: None"),
        ((None, PICTURE), "the time of frame 0 of the stream is None; expected seconds"),
        (("0.0", PICTURE), "the time of frame 0 of the stream is '0.0'; expected seconds"),
        ((math.nan, PICTURE), "is nan; expected seconds"),
        ((math.inf, PICTURE), "is inf; expected seconds"),
        ((1.7e18, PICTURE), "divide milliseconds by 1e3, nanoseconds by 1e9"),
        ((0.0, 1.0, PICTURE), "a tuple that is no array"),
        ([0.0, PICTURE], "a list that is no array"),
        ("clip.mp4", "dtype <U8; expected uint8 RGB"),
        (object(), "object; expected uint8 RGB"),
        (PICTURE[..., 0], r"shape \(8, 8\); expected \(height, width, 3\): the last axis is the colour"),
        (np.moveaxis(PICTURE, -1, 0), r"numpy.moveaxis\(frames, -3, -1\)"),
        (np.zeros((8, 8, 4), np.uint8), r"leave out alpha, frames\[..., :3\]"),
        (np.zeros((8, 8, 1), np.uint8), r"repeat the grey channel, numpy.repeat\(frames, 3, -1\)"),
        (np.zeros((0, 8, 3), np.uint8), "there is no pixel in them"),
    ],
)
def test_the_door_says_what_is_wrong(item: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(stream.timed([item], 10.0))


@pytest.mark.parametrize("fps", [0, 0.0, -1.0, math.nan, math.inf, "30", True, 1e-300, 1e300, np.array(30.0), 1j])
def test_a_rate_is_finite_and_positive(fps: Any) -> None:
    contract = InputContract(4, 8, 8, fps=10.0)
    for read in (lambda: list(stream.timed([PICTURE], fps)), lambda: preprocess.prepare(PICTURE[None], contract, fps)):
        with pytest.raises(InputError, match=r"fps is .*; expected frames per second from 1e-06 to 1e\+06"):
            read()


@pytest.mark.parametrize("fps", [30, 29.97, Fraction(30000, 1001), np.float32(25), np.int64(25)])
def test_any_kind_of_number_is_a_rate(fps: Any) -> None:
    assert [t for t, _ in stream.timed([PICTURE] * 2, fps)] == [0.0, pytest.approx(1 / float(fps))]


def test_bare_and_timed_frames_do_not_mix() -> None:
    with pytest.raises(InputError, match="frame 1 of the stream has no time, unlike those before"):
        list(stream.timed([(0.0, PICTURE), PICTURE], 10.0))
    with pytest.raises(InputError, match="frame 1 of the stream has a time, unlike those before"):
        list(stream.timed([PICTURE, (0.0, PICTURE)], 10.0))


@pytest.mark.parametrize("source", [None, 3.5, object()])
def test_what_cannot_be_iterated_is_refused(source: Any) -> None:
    with pytest.raises(InputError, match=r"the source is a .*; expected a file, a camera, a URL or frames"):
        list(stream.timed(source, 10.0))


@given(
    buffers=st.integers(1, 3),
    camera=st.sampled_from([5.0, 10.0, 30.0]),
    size=st.sampled_from([(8, 8), (8, 12), (20, 30)]),
)
def test_a_camera_may_fill_its_buffers_again(buffers: int, camera: float, size: tuple[int, int]) -> None:
    """Frames that need no resizing, only a crop, or both; a camera slower and faster than the model."""
    pictures = np.random.default_rng(1).integers(0, 256, (40, *size, 3), np.uint8)

    def ring() -> Iterator[np.ndarray]:
        held = [np.empty((*size, 3), np.uint8) for _ in range(buffers)]
        for i, picture in enumerate(pictures):
            held[i % buffers][...] = picture
            yield held[i % buffers]
        for buffer in held:
            buffer[...] = 0

    contract = InputContract(4, 8, 8, fps=10.0)
    fresh = [clip.frames for _, clip in stream.windows(stream.timed(list(pictures), camera), contract)]
    reused = [clip.frames for _, clip in stream.windows(stream.timed(ring(), camera), contract)]
    np.testing.assert_array_equal(reused, fresh)
    assert len({clip.tobytes() for clip in fresh}) == len(fresh) > 3


# ----------------------------------------------------------------------------------------------------------- the clock


def clips_of(times: Sequence[float], contract: InputContract, hop: int = 1) -> list[list[int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        pairs = [(t, frame(i)) for i, t in enumerate(times)]
        return [values(c) for _, c in stream.windows(pairs, contract, hop)]


STEADY = np.arange(64) / 10


@pytest.mark.parametrize(
    ("leap", "expected"),
    [
        (3600.0, [*range(29), *range(32, 61)]),
        (37600.0, [*range(29), *range(32, 61)]),
        (10.2, [*range(29), *range(32, 61)]),
        (-2.0, [*range(29), *range(36, 61)]),  # four frames pass before it is certain
        (-3600.0, [*range(29), *range(36, 61)]),
        (-0.2, [*range(29), 29, 30]),
    ],
)
def test_a_leap_of_the_clock_starts_the_window_anew(leap: float, expected: list[int]) -> None:
    """Frame 32 on, of a camera at the model's rate, is `leap` seconds off: the first numbers of the clips."""
    found = clips_of([*STEADY[:32], *(STEADY[32:] + leap)], InputContract(4, 8, 8, fps=10.0))
    if leap == -0.2:  # two frames late: out of order, so left out; their times are then filled by holding
        assert found[28:31] == [[28, 29, 30, 31], [29, 30, 31, 34], [30, 31, 34, 35]]
    else:
        assert [clip[0] for clip in found] == expected
        assert all(clip == list(range(clip[0], clip[0] + 4)) for clip in found)


def test_a_leap_is_told_once() -> None:
    times = [*STEADY[:10], *(STEADY[10:20] + 3600), *(STEADY[20:] + 7200)]
    pairs = [(t, frame(i)) for i, t in enumerate(times)]
    with pytest.warns(InputWarning, match=r"leaps from 0.900 s to 3601.000 s: the window starts anew") as seen:
        list(stream.windows(pairs, InputContract(4, 8, 8, fps=10.0)))
    assert len(seen) == 1


def test_one_frame_with_a_wrong_time_costs_one_window() -> None:
    times = STEADY.copy()
    times[32] += 36000
    found = clips_of(times.tolist(), InputContract(4, 8, 8, fps=10.0))
    assert [clip[0] for clip in found] == [*range(29), *range(37, 61)]


def test_frames_out_of_order_are_left_out() -> None:
    times = STEADY.copy()
    times[[10, 20, 40]] = times[[9, 18, 37]] - 0.01
    found = clips_of(times.tolist(), InputContract(4, 8, 8, fps=10.0))
    assert not {10, 20, 40} & {number for clip in found for number in clip}
    assert len(found) == 61


def test_equal_times_are_no_leap() -> None:
    """A clock of whole seconds: every second shows the newest frame that it had when its time came."""
    times = np.floor(np.arange(60) / 10)
    found = clips_of(times.tolist(), InputContract(4, 8, 8, fps=1.0))
    assert [clip[0] for clip in found] == [0, 10, 20]


def test_without_a_rate_the_clock_does_not_matter() -> None:
    times = [0.0, 100.0, 50.0, 3600.0, 0.0, 1.0]
    assert clips_of(times, InputContract(3, 8, 8)) == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]


def test_a_stream_of_short_spans_gives_one_clip_of_the_last() -> None:
    times = [0.0, 0.1, 100.0, 100.1, 200.0, 200.1]
    assert clips_of(times, InputContract(4, 8, 8, fps=10.0)) == [[4, 5, 5, 5]]


@given(st.lists(st.sampled_from([0.1] * 12 + [0.05, 0.3, 2.0, 11.0, 5000.0, -0.05, -3.0, -5000.0]), max_size=80))
def test_clips_are_those_of_each_span(steps: list[float]) -> None:
    """The definition read slowly: cut at the leaps, then every span is a stream of its own. Nothing floods."""
    times = np.cumsum([0.0, *steps])
    spans: list[list[int]] = [[0]]
    late = 0
    for i in range(1, len(times)):
        late = late + 1 if times[i] < times[spans[-1][-1]] else 0
        if late > 4 or times[i] - times[spans[-1][-1]] > 10.0:
            spans.append([i])
            late = 0
        elif not late:
            spans[-1].append(i)
    contract = InputContract(4, 8, 8, fps=10.0)
    expected = []
    for span in spans:
        alone = [values(c) for _, c in stream.windows([(times[i], frame(i)) for i in span], contract, 1)]
        whole = len(list(preprocess.resample([(times[i], i) for i in span], 10.0))) >= 4
        expected += [(alone, whole)]
    long = [clip for clips, whole in expected if whole for clip in clips]
    assert clips_of(list(times), contract) == (long or expected[-1][0])
    assert len(long) < 110 * (len(times) + 1)


def test_a_default_hop_is_a_quarter_of_the_clip() -> None:
    contract = InputContract(8, 8, 8, fps=10.0)
    found = list(stream.windows(stream.timed([frame(i) for i in range(13)], 10.0), contract))
    assert [values(c)[0] for _, c in found] == [0, 2, 4]


def test_what_cannot_be_windowed_is_refused() -> None:
    contract = InputContract(8, 8, 8)
    with pytest.raises(InputError, match="hop is 0"):
        next(stream.windows([], contract, 0))
    with pytest.raises(InputError, match="without a frame"):
        next(stream.windows([], contract))
    for hop in (2.5, True, "2", None):
        with pytest.raises(InputError, match="expected a whole number >= 1"):
            preprocess.count_of(hop, "hop")
