"""Frames of an application: what is taken, what is refused and why."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetube import preprocess
from edgetube.contract import InputContract
from edgetube.errors import InputError
from edgetube.live import feeds


def frame(value: int) -> np.ndarray:
    return np.full((8, 8, 3), value, np.uint8)


def test_bare_frames_get_a_clock() -> None:
    pairs = list(feeds.timed([frame(i) for i in range(3)], 10.0))
    assert [(t, int(f[0, 0, 0])) for t, f in pairs] == [(0.0, 0), (0.1, 1), (0.2, 2)]
    ((second, shown),) = feeds.timed([(5, frame(1))], 10.0)
    assert (second, int(shown[0, 0, 0])) == (5.0, 1)


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
    streamed = refusal(lambda: list(feeds.timed(frames, 10.0)))
    predicted = refusal(lambda: preprocess.prepare(frames, contract, 10.0))
    right = dtype is np.uint8 and len(shape) == 3 and shape[2] == 3 and 0 not in shape
    assert (streamed is None, predicted is None) == (right, right)
    # A stack of pictures without colours, (N, H, 3), looks like one picture to `predict`: refused, in other words.
    if len(shape) in (0, 3):
        assert reason(streamed) == reason(predicted)
    if right:
        for (_, shown), expected in zip(feeds.timed(frames, 10.0), frames, strict=True):
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
        list(feeds.timed([item], 10.0))


@pytest.mark.parametrize("fps", [0, 0.0, -1.0, math.nan, math.inf, "30", True, 1e-300, 1e300, np.array(30.0), 1j])
def test_a_rate_is_finite_and_positive(fps: Any) -> None:
    contract = InputContract(4, 8, 8, fps=10.0)
    for read in (lambda: list(feeds.timed([PICTURE], fps)), lambda: preprocess.prepare(PICTURE[None], contract, fps)):
        with pytest.raises(InputError, match=r"fps is .*; expected frames per second from 1e-06 to 1e\+06"):
            read()


@pytest.mark.parametrize("fps", [30, 29.97, Fraction(30000, 1001), np.float32(25), np.int64(25)])
def test_any_kind_of_number_is_a_rate(fps: Any) -> None:
    assert [t for t, _ in feeds.timed([PICTURE] * 2, fps)] == [0.0, pytest.approx(1 / float(fps))]


def test_bare_and_timed_frames_do_not_mix() -> None:
    with pytest.raises(InputError, match="frame 1 of the stream has no time, unlike those before"):
        list(feeds.timed([(0.0, PICTURE), PICTURE], 10.0))
    with pytest.raises(InputError, match="frame 1 of the stream has a time, unlike those before"):
        list(feeds.timed([PICTURE, (0.0, PICTURE)], 10.0))


@pytest.mark.parametrize("source", [None, 3.5, object()])
def test_what_cannot_be_iterated_is_refused(source: Any) -> None:
    with pytest.raises(InputError, match=r"the source is a .*; expected a file, a camera, a URL or frames"):
        list(feeds.timed(source, 10.0))
