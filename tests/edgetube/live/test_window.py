"""Sliding windows against slow oracles that evaluate the definition."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetube import preprocess, video
from edgetube.contract import InputContract
from edgetube.errors import InputError
from edgetube.live.frame import Account, Frame, Ledger
from edgetube.live.window import Hop, LiveClip, Step, Window, step


def picture(value: int) -> np.ndarray:
    return np.full((8, 8, 3), value, np.uint8)


def values(clip: video.Clip) -> list[int]:
    return [int(f[0, 0, 0]) for f in clip.frames]


def frames_of(
    times: Iterable[float], ledger: Ledger | None = None, restarts: Iterable[int] = (), pixels: Any = picture
) -> Iterator[Frame]:
    """Frame i shows the value i; it came 100 s after its time."""
    ledger = Ledger() if ledger is None else ledger
    broken = set(restarts)
    for i, seconds in enumerate(times):
        number = ledger.capture()
        yield Frame(pixels(i), number, 100 + seconds, seconds, f"gap {i}" if i in broken else None)


def windows(frames: Iterable[Frame], contract: InputContract, hop: Hop | None = None) -> Iterator[LiveClip]:
    window = Window(contract, hop)
    for frame in frames:
        yield from window.each(frame)
    yield from window.finish()


# ------------------------------------------------------------------------------------------------------------ sampling


@given(
    gaps=st.lists(st.integers(5, 300), min_size=1, max_size=60),
    fps=st.sampled_from([5.0, 12.5, 20.0]),
    hop=st.integers(1, 6),
)
def test_every_tick_shows_the_frame_that_was_on_display(gaps: Any, fps: Any, hop: Any) -> None:
    # Off the grid of milliseconds, so that no tick lies exactly on a tolerance.
    times = np.cumsum([0, *(gap + 0.137 for gap in gaps[:-1])]) / 1000 + 2.0
    contract = InputContract(4, 8, 8, fps=fps)
    found = list(windows(frames_of(times), contract, hop))
    # The last frame stays on display for as long as the one before it did, less the rounding of three timestamps.
    end = times[-1] + max(1e-3, times[-1] - times[-2] - 3e-3 if len(times) > 1 else 0)
    wanted = [2.0 + k / fps for k in range(1000) if 2.0 + k / fps < end]
    shown = [int(np.flatnonzero(times <= t + 1e-3)[-1]) for t in wanted]
    if len(shown) < 4:
        assert [values(c)[: len(shown)] for c in found] == [shown]
        assert values(found[0])[len(shown) :] == [shown[-1]] * (4 - len(shown))
    else:
        assert [values(c) for c in found] == [shown[s : s + 4] for s in range(0, len(shown) - 3, hop)]
    for clip in found:
        assert list(clip.numbers) == sorted(set(values(clip)))
        assert clip.captured_at == 100 + times[clip.numbers[-1]]


@given(
    gaps=st.lists(st.integers(1, 900), min_size=1, max_size=40),
    fps=st.sampled_from([None, 5.0, 12.5, 20.0]),
    hop=st.integers(1, 6),
)
def test_push_gives_the_newest_of_the_clips_that_are_due(gaps: Any, fps: Any, hop: Any) -> None:
    times = np.cumsum([0, *gaps]) / 1000
    contract = InputContract(4, 8, 8, fps=fps)
    one, all_ = Window(contract, hop), Window(contract, hop)
    for frame in frames_of(times):
        newest, every = one.push(frame), list(all_.each(frame))
        assert (newest is None) == (not every)
        if newest is not None:
            np.testing.assert_array_equal(newest.frames, every[-1].frames)
            assert (newest.start, newest.end, newest.numbers) == (every[-1].start, every[-1].end, every[-1].numbers)


def test_frames_are_resized_by_the_contract(rng: np.random.Generator) -> None:
    tall = rng.integers(0, 256, (2, 40, 20, 3), np.uint8)
    contract = InputContract(2, 10, 10)
    (clip,) = windows(frames_of([0.0, 1.0], pixels=lambda i: tall[i]), contract)
    np.testing.assert_array_equal(clip.frames, preprocess.prepare(tall, contract))


@given(count=st.integers(1, 60), stride=st.integers(1, 9), hop=st.integers(1, 6), gap=st.floats(0.001, 40))
def test_a_stride_takes_every_kth_frame_whatever_the_clock(count: Any, stride: Any, hop: Any, gap: Any) -> None:
    contract = InputContract(4, 8, 8, sampling="stride", stride=stride)
    taken = list(range(0, count, stride))
    found = list(windows(frames_of(gap * i for i in range(count)), contract, hop))
    if len(taken) < 4:
        assert [values(c) for c in found] == [taken + taken[-1:] * (4 - len(taken))]
    else:
        assert [values(c) for c in found] == [taken[s : s + 4] for s in range(0, len(taken) - 3, hop)]


def test_a_strided_window_comes_with_its_newest_frame() -> None:
    """It waits for no frame after it. A hop of a quarter of the clip is two frames of the model, six of the camera."""
    window = Window(InputContract(8, 8, 8, sampling="stride", stride=3))
    due = {f.number: clip for f in frames_of(i / 30 for i in range(40)) if (clip := window.push(f)) is not None}
    assert list(due) == [21, 27, 33, 39]
    for newest, clip in due.items():
        assert values(clip) == list(range(newest - 21, newest + 1, 3))
        assert (clip.start, clip.end) == (pytest.approx((newest - 21) / 30), pytest.approx(newest / 30))


@pytest.mark.parametrize(("fps", "hop"), [(30.0, 4), (24.0, 3), (12.5, 8), (5.0, 2)])
def test_the_clips_of_a_file_are_those_that_load_cuts_from_it(tmp_path: Path, fps: float, hop: int) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (8, 6, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    shown = [np.roll(pixels[i % 8], 5 * i, axis=1) for i in range(40)]
    path = video.write(tmp_path / "a.mp4", iter(shown), fps)
    contract = InputContract(8, 24, 32, fps=10.0)
    read = list(video.frames(path))
    frames = (Frame(f, i, 0.0, s) for i, (s, f) in enumerate(read))
    found = [clip for clip in windows(frames, contract, hop) if clip.end is not None and clip.end <= read[-1][0]]
    assert len(found) > 1
    for k, clip in enumerate(found):
        np.testing.assert_array_equal(clip.frames, video.load(path, contract, k * hop / 10).frames)


def test_clips_stay_as_they_are() -> None:
    """The window goes on in another thread while the model reads a clip."""
    window = Window(InputContract(4, 8, 8), 1)
    kept = [(clip, values(clip)) for f in frames_of(range(50)) if (clip := window.push(f)) is not None]
    assert all(values(clip) == before for clip, before in kept)


# ------------------------------------------------------------------------------------------------------------- restarts


@given(
    gaps=st.lists(st.integers(20, 400), min_size=1, max_size=60),
    restarts=st.sets(st.integers(1, 59), max_size=6),
    fps=st.sampled_from([None, 5.0, 12.5]),
    frames=st.integers(1, 6),
    hop=st.integers(1, 8),
)
def test_no_clip_shows_both_sides_of_a_restart(
    gaps: list[int], restarts: set[int], fps: float | None, frames: int, hop: int
) -> None:
    """Each span is a stream of its own. The first clip after a restart has its reason; the account balances."""
    times = (np.cumsum(gaps) / 1000).tolist()
    contract = InputContract(frames, 8, 8, fps=fps)
    ledger = Ledger()
    window = Window(contract, hop, ledger=ledger)
    found: list[LiveClip] = []
    for frame in frames_of(times, ledger, restarts):
        found += window.each(frame)
        account = ledger.account()
        assert 0 <= account.waiting <= 1
    found += window.finish()

    starts = [0, *sorted(r for r in restarts if r < len(times)), len(times)]
    expected, told, alone = [], [], []
    why = None
    for first, last in pairwise(starts):
        why = f"gap {first}" if first else None if first == 0 else why
        alone = list(windows(list(frames_of(times))[first:last], contract, hop))
        shown = len(list(preprocess.resample([(times[i], i) for i in range(first, last)], fps)))
        if shown >= frames:
            expected += [values(clip) for clip in alone]
            told += [why] + [None] * (len(alone) - 1)
            why = None
    if not expected:
        expected, told = [values(clip) for clip in alone], [why]
    assert [values(clip) for clip in found] == expected
    assert [clip.restarted for clip in found] == told

    account = ledger.account()
    shown_frames = {n for clip in found for n in clip.numbers}
    assert account.waiting == 0
    assert (account.captured, account.used) == (len(times), len(shown_frames))


def test_the_latest_reason_is_told() -> None:
    window = Window(InputContract(4, 8, 8, fps=10.0), 1)
    clips = [c for f in frames_of([i / 10 for i in range(12)], restarts=[4, 6]) if (c := window.push(f)) is not None]
    assert [(clip.numbers[0], clip.restarted) for clip in clips] == [(0, None), (6, "gap 6"), (7, None), (8, None)]


def test_where_frames_went() -> None:
    """30 a second for a model of 10, four of them with a hop of six: two of three are not sampled, and of six sampled
    ones two are between clips."""
    ledger = Ledger()
    window = Window(InputContract(4, 8, 8, fps=10.0), 6, ledger=ledger)
    for frame in frames_of((i / 30 for i in range(90)), ledger):
        window.push(frame)
    window.close()
    # Frames 0, 3, 6, 9 | 12, 15 | 18 ... 27 | ...: 30 sampled, clips end with number 3, 9, 15, 21, 27 of them.
    assert ledger.account() == Account(90, 20, 0, {"sampling": 60 + 8, "closed": 2})


def test_a_frame_older_than_one_before_it_is_left_out() -> None:
    ledger = Ledger()
    window = Window(InputContract(3, 8, 8, fps=10.0), 1, ledger=ledger)
    times = [0.0, 0.1, 0.05, 0.2, 0.3]
    clips = [clip for f in frames_of(times, ledger) if (clip := window.push(f)) is not None]
    assert [values(clip) for clip in clips] == [[0, 1, 3], [1, 3, 4]]
    assert ledger.account().dropped == {"late": 1}


# ------------------------------------------------------------------------------------------------------------- the hop


def test_a_default_hop_is_a_quarter_of_the_clip() -> None:
    found = list(windows(frames_of(i / 10 for i in range(13)), InputContract(8, 8, 8, fps=10.0)))
    assert [values(c)[0] for c in found] == [0, 2, 4]


RATED, UNRATED = InputContract(8, 8, 8, fps=12.5), InputContract(8, 8, 8)


@pytest.mark.parametrize(
    ("hop", "contract", "expected"),
    [
        (None, RATED, Step(2)),
        (3, RATED, Step(3)),
        (np.int64(3), RATED, Step(3)),
        ("3", RATED, Step(3)),
        ("0.4s", RATED, Step(5)),
        (" .4 s ", RATED, Step(5)),
        ("0.001s", RATED, Step(1)),
        ("2s", UNRATED, Step(1, 2.0)),
    ],
)
def test_a_hop_is_frames_or_seconds(hop: Any, contract: InputContract, expected: Step) -> None:
    assert step(hop, contract) == expected


@pytest.mark.parametrize("hop", [0, -1, 2.5, True, "0s", "-1s", "x", "", "1e9s", "1 min", "nan s", b"1s", "0"])
def test_what_is_no_hop_is_refused(hop: Any) -> None:
    with pytest.raises(InputError, match=r"hop is .*expected"):
        Window(RATED, hop)


@given(st.lists(st.integers(10, 900), min_size=4, max_size=60))
def test_without_a_rate_seconds_are_those_of_the_source(gaps: list[int]) -> None:
    times = (np.cumsum(gaps) / 1000).tolist()
    window = Window(InputContract(3, 8, 8), "0.5s")
    due = [f.seconds for f in frames_of(times) if window.push(f) is not None]
    expected: list[float] = []
    wanted = 0.0
    for seconds in times[2:]:
        if not expected or seconds >= wanted - 1e-3:
            expected.append(seconds)
            wanted = max(wanted, seconds - 0.5) + 0.5 if len(expected) > 1 else seconds + 0.5
    assert due == expected


def test_segments_are_refused() -> None:
    with pytest.raises(InputError, match=r"samples 4 segments of a whole video; no window .* whole files"):
        Window(InputContract(4, 8, 8, sampling="segments"))


def clips_of(times: Sequence[float], contract: InputContract) -> list[list[int]]:
    return [values(clip) for clip in windows(frames_of(times), contract, 1)]


def test_equal_times_are_in_order() -> None:
    """A clock of whole seconds: every second shows the newest frame that it had when its time came."""
    found = clips_of(np.floor(np.arange(60) / 10).tolist(), InputContract(4, 8, 8, fps=1.0))
    assert [clip[0] for clip in found] == [0, 10, 20]


@pytest.mark.parametrize(("lost", "bridged"), [((5,), True), ((5, 6), True), ((5, 6, 7), False)])
def test_a_gap_within_the_rate_of_the_model_does_not_begin_the_window_again(
    lost: tuple[int, ...], bridged: bool
) -> None:
    """Twenty frames a second, of which the model takes ten: 0.15 s without a frame are bridged, more is not."""
    times = [i / 20 for i in range(16) if i not in lost]
    plain = list(windows(frames_of(times), InputContract(4, 8, 8, fps=10.0), 1))
    ledger = Ledger()
    frames = list(frames_of(times, ledger, {5}))
    frames[5] = replace(frames[5], gap=True)
    window = Window(InputContract(4, 8, 8, fps=10.0), 1, ledger=ledger)
    found = [clip for frame in frames for clip in window.each(frame)] + list(window.finish())
    restarted = [clip.restarted for clip in found if clip.restarted is not None]
    assert restarted == ([] if bridged else ["gap 5"])
    assert ([values(clip) for clip in found] == [values(clip) for clip in plain]) is bridged


def test_frames_that_are_resized_later_are_the_same() -> None:
    contract, rng = InputContract(4, 8, 8, fps=10.0), np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (11, 13, 3), dtype=np.uint8) for _ in range(40)]
    frames = list(frames_of([i / 15 for i in range(40)], restarts={9}, pixels=lambda i: pictures[i]))
    now, later = Window(contract, 3), Window(contract, 3)
    for i, frame in enumerate(frames):
        a, b = now.push(frame), later.push(frame, settle=False)
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert np.array_equal(a.frames, b.frames)
            assert a.numbers == b.numbers
        if i % 7 == 0:
            assert not now.settle()
            later.settle()
    while later.settle():
        pass
