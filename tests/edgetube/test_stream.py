"""Sliding windows against a slow oracle that evaluates the definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetube import stream
from edgetube.errors import InputError
from edgetube.spec import InputContract


def frame(value):
    return np.full((8, 8, 3), value, np.uint8)


def values(clip):
    return [int(f[0, 0, 0]) for f in clip.frames]


@given(
    gaps=st.lists(st.integers(5, 300), min_size=1, max_size=60),
    fps=st.sampled_from([5.0, 12.5, 20.0]),
    hop=st.integers(1, 6),
)
def test_every_tick_shows_the_frame_that_was_on_display(gaps, fps, hop):
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


def test_frames_are_resized_by_the_contract():
    tall = np.zeros((40, 20, 3), np.uint8)
    ((_, clip),) = stream.windows([(0.0, tall)], InputContract(2, 10, 10))
    assert clip.frames.shape == (2, 10, 10, 3)


def test_bare_frames_get_a_clock():
    assert [t for t, _ in stream.timed([1, 2, 3], 10.0)] == [0.0, 0.1, 0.2]
    assert list(stream.timed([(5.0, 1)], 10.0)) == [(5.0, 1)]


def test_a_default_hop_is_a_quarter_of_the_clip():
    contract = InputContract(8, 8, 8, fps=10.0)
    found = list(stream.windows(stream.timed([frame(i) for i in range(13)], 10.0), contract))
    assert [values(c)[0] for _, c in found] == [0, 2, 4]


def test_what_cannot_be_windowed_is_refused():
    contract = InputContract(8, 8, 8)
    with pytest.raises(InputError, match="hop is 0"):
        next(stream.windows([], contract, 0))
    with pytest.raises(InputError, match="without a frame"):
        next(stream.windows([], contract))
    with pytest.raises(InputError, match=r"shape \(8, 8\)"):
        next(stream.windows([(0.0, np.zeros((8, 8), np.uint8))], contract))
