"""Answers over time: flips, onsets and delays on made-up sequences; drops and repeats in made-up and real streams."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from edgetube import bundle as bundles
from edgetube import resize, video
from edgetube.bench import layers, parity, temporal
from edgetube.errors import InputError
from edgetube.live.frame import Frame

TIMES = np.linspace(0.0, 3.5, 8)


def test_flip_rate_is_the_share_of_changes() -> None:
    assert temporal.flip_rate(np.array([0, 0, 1, 1, 0])) == 0.5
    assert temporal.flip_rate(np.array([3])) == 0.0


def test_runs() -> None:
    assert temporal.runs(np.array([2, 2, 0, 1, 1])) == [(2, 0, 2), (0, 2, 3), (1, 3, 5)]
    assert temporal.runs(np.array([7])) == [(7, 0, 1)]


@pytest.mark.parametrize(
    ("answers", "delay", "missed"),
    [
        ([0, 0, 0, 1, 1, 1, 1, 1], 0.0, 0),
        ([0, 0, 0, 0, 0, 1, 1, 1], 1.0, 0),
        ([0, 0, 1, 1, 1, 1, 1, 1], -0.5, 0),
        ([0, 0, 0, 0, 0, 0, 0, 0], None, 1),
        ([0, 1, 0, 0, 1, 1, 1, 1], 0.5, 0),  # an earlier slip is no onset of this change
        ([0, 1, 1, 0, 0, 0, 0, 0], None, 1),  # nor is one that ends where the change begins
        ([0, 0, 0, 0, 0, 0, 0, 1], 2.0, 0),  # the last window is not too late
    ],
)
def test_onset_delay(answers: list[int], delay: float | None, missed: int) -> None:
    reference = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    got = temporal.steadiness("x", reference, np.array(answers), TIMES)
    assert (got.onset_delay_mean_s, got.onset_delay_max_s, got.missed) == (delay, delay, missed)
    assert got.agreement == np.mean(reference == answers)


def test_several_onsets() -> None:
    """Changes at windows 2, 4 and 6; noticed 1 window late, 1 early, and one only when the reference has left it."""
    reference, answers = np.array([0, 0, 1, 1, 2, 2, 3, 0]), np.array([0, 0, 0, 2, 2, 2, 2, 3])
    got = temporal.steadiness("x", reference, answers, TIMES)
    assert got.onsets == 2
    assert got.flip_rate == pytest.approx(2 / 7)
    assert got.missed == 3  # 1, 3, and the return to 0
    assert (got.onset_delay_mean_s, got.onset_delay_max_s) == (-0.5, -0.5)
    later = temporal.steadiness("x", np.array([0, 0, 1, 1, 0, 0, 0, 0]), np.array([0, 0, 0, 1, 1, 1, 0, 0]), TIMES)
    assert (later.onset_delay_mean_s, later.onset_delay_max_s, later.missed) == (0.75, 1.0, 0)


def test_a_change_that_comes_when_the_reference_has_left_it_is_missed() -> None:
    got = temporal.steadiness("x", np.array([0, 1, 1, 0, 0]), np.array([0, 0, 0, 1, 1]), TIMES[:5])
    assert (got.missed, got.onset_delay_mean_s) == (2, None)


def test_a_steady_stream_is_sound() -> None:
    times = np.arange(300) / 29.97
    times = np.round(times, 3)  # as a container in milliseconds has them
    got = temporal.health(times, np.full(299, 4.0))
    assert (got.frames, got.dropped, got.duplicated, got.gaps) == (300, 0, 0, ())
    assert got.fps == pytest.approx(29.97, rel=1e-3)
    assert abs(got.fps_drift_percent) < 0.2


def test_dropped_frames_are_counted_where_they_are() -> None:
    times = np.delete(np.arange(100) / 25, [40, 41, 70])
    got = temporal.health(times, np.full(len(times) - 1, 4.0))
    assert got.dropped == 3
    assert [gap.frames for gap in got.gaps] == [2, 1]
    assert [gap.at for gap in got.gaps] == pytest.approx([39 / 25, 69 / 25])
    assert got.fps == pytest.approx(25)


def test_a_clock_that_slows_down_is_a_drift() -> None:
    steps = np.linspace(1 / 30, 1 / 27, 400)
    got = temporal.health(np.concatenate([[0], np.cumsum(steps)]), np.full(400, 4.0))
    first, last = steps[:100].mean(), steps[-100:].mean()
    assert got.fps_drift_percent == pytest.approx(100 * (first / last - 1))
    assert got.fps_drift_percent < -5
    assert got.dropped == 0


def test_repeated_frames_are_counted_while_the_picture_moves(rng: np.random.Generator) -> None:
    moving = rng.uniform(3, 5, 100)
    moving[[20, 60, 61]] = 0.01
    times = np.arange(101) / 25
    assert temporal.health(times, moving).duplicated == 3
    assert temporal.health(times, np.zeros(100)).duplicated == 0, "a still scene repeats nothing"


@pytest.mark.parametrize(("interval", "dropped"), [(1.5, 0), (1.6, 1), (2.4, 1), (2.6, 2)])
def test_an_interval_of_more_than_one_and_a_half_lost_a_frame(interval: float, dropped: int) -> None:
    times = np.cumsum([10.0, 1, 1, interval, 1, 1])
    got = temporal.health(times, np.full(5, 4.0))
    assert (got.dropped, sum(gap.frames for gap in got.gaps)) == (dropped, dropped)
    assert got.seconds == pytest.approx(4 + interval)
    assert got.fps == pytest.approx(1.0 if dropped else 5 / (4 + interval))
    assert [gap.at for gap in got.gaps] == ([12.0] if dropped else [])


def test_the_drift_of_a_few_frames_is_that_of_the_first_interval_to_the_last() -> None:
    assert temporal.health(np.array([0.0, 1.0, 2.25]), np.full(2, 4.0)).fps_drift_percent == pytest.approx(-20)


@pytest.mark.parametrize(
    ("usual", "one", "repeated"), [(0.5, 0.05, 1), (0.49, 0.04, 0), (0.5, 0.06, 0), (8.0, 0.8, 1), (8.0, 0.81, 0)]
)
def test_a_repeated_frame_changes_by_a_tenth_of_half_a_level_at_least(usual: float, one: float, repeated: int) -> None:
    changes = np.full(60, usual)
    changes[30] = one
    assert temporal.health(np.arange(61.0), changes).duplicated == repeated


@pytest.mark.parametrize("count", [1, 2, 12, 13, 14, 40, 100])
def test_what_is_usual_is_the_median_of_the_frames_around(count: int, rng: np.random.Generator) -> None:
    """Counted in a loop; a stream goes on behind its ends as in a mirror, a very short one as it ends."""
    for _ in range(20):
        changes = rng.choice([0.001, 0.3, 0.6, 5.0], count, p=[0.4, 0.1, 0.2, 0.3])
        expected = 0
        for at in range(count):
            places = np.arange(at - 12, at + 13)
            mirrored = (count - 1) - np.abs((count - 1) - np.abs(places))
            around = changes[mirrored if count > 12 else np.clip(places, 0, count - 1)]
            expected += bool(np.median(around) >= 0.5 and changes[at] <= 0.1 * np.median(around))
        assert temporal.health(np.arange(count + 1.0), changes).duplicated == expected


def test_a_watch_looks_at_every_eighth_pixel() -> None:
    black = np.zeros((20, 30, 3), np.uint8)
    white, between = black + np.uint8(200), black.copy()
    white[0, 0], between[1:8], between[:, 1:8] = 0, 255, 255
    watch = temporal.Watch()
    for i, (at, pixels) in enumerate([(0.5, black), (0.7, between), (0.9, white), (1.2, black), (1.3, black[:8])]):
        watch.see(Frame(pixels, i, 0.0, at))
    assert watch.times == [0.5, 0.7, 0.9, 1.2, 1.3]
    # Of 3 x 4 pixels one stays black; another size is another picture.
    assert watch.changes == pytest.approx([0, 200 * 11 / 12, 200 * 11 / 12, 255])
    assert watch.health() == temporal.health(np.array(watch.times), np.array(watch.changes))


def test_one_frame_is_no_stream() -> None:
    assert temporal.health(np.array([]), np.array([])) == temporal.Health(0, 0.0, 0.0, 0.0, 0, 0, ())
    assert temporal.health(np.array([7.0]), np.array([])) == temporal.Health(1, 0.0, 0.0, 0.0, 0, 0, ())


@pytest.fixture
def film(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Three seconds at 20 fps that pan over noise; frames 21 and 22 are missing and frame 40 shows what 39 does."""
    still = rng.integers(0, 256, (8, 20, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=20, options={"qscale": "2"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 20)
        for i in range(60):
            if i in (21, 22):
                continue
            shift = 3 * (39 if i == 40 else i) % 160
            picture = np.ascontiguousarray(np.roll(still, shift, axis=1)[:, :96])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 20)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_a_bundle_watches_a_video_with_the_reference(film: Path, tiny_bundle: Path) -> None:
    bundle = bundles.load(tiny_bundle)  # 8 frames at 10 fps
    seen = temporal.watch([bundle], film, 2)
    assert (seen.stream.frames, seen.stream.dropped, seen.stream.duplicated) == (58, 2, 1)
    assert seen.stream.fps == pytest.approx(20, rel=1e-3)
    assert seen.windows.count == (30 - 8) // 2 + 1
    (steady,) = seen.bundles
    assert (steady.agreement, steady.missed) == (1.0, 0)
    assert steady.flip_rate == seen.reference_flip_rate
    document = seen.comparison.to_json(video=seen.to_json())
    assert document["video"]["windows"] == document["data"]["clips"] == 12
    assert document["data"]["labelled"] == 0


def test_windows_begin_and_end_where_the_film_does(
    film: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 frames at 10 fps, a quarter of the clip apart: from 0.0, 0.2, ... to 0.8 s later."""
    given: list[Any] = []
    steadiness = temporal.steadiness
    monkeypatch.setattr(temporal, "steadiness", lambda *a: given.append(a) or steadiness(*a))
    told: list[tuple[str, int, int]] = []
    seen = temporal.watch([bundles.load(tiny_bundle)], film, progress=lambda *step: told.append(step))
    assert seen.hop == 2
    starts = [float(item.name.removesuffix("s")) for item in seen.windows.items]
    assert starts == pytest.approx(0.2 * np.arange(12), abs=0.05)
    ((name, reference, answers, ends),) = given
    assert name == seen.bundles[0].name == tiny_bundle.name
    np.testing.assert_array_equal(reference, answers)
    assert len(reference) == len(ends) == 12
    assert ends == pytest.approx(0.8 + 0.2 * np.arange(12), abs=0.11)  # two frames are lost
    assert seen.reference_onsets == len(temporal.runs(reference)) - 1
    assert seen.reference_flip_rate == temporal.flip_rate(reference)
    assert told[-1] == ("watch", 12, 12)
    assert all(step[2] == 0 and 0 < step[1] <= 12 for step in told if step[0] == "watch" and step is not told[-1])
    document = seen.to_json()
    assert (document["hop"], document["windows"], document["source"]) == (2, 12, seen.windows.name)


def test_windows_can_be_read_again(film: Path, tiny_bundle: Path) -> None:
    bundle = bundles.load(tiny_bundle)
    seen = temporal.watch([bundle], film, 4)
    document = seen.comparison.to_json(video=seen.to_json())
    again = parity.reopen(document, bundle.labels)
    name = document["bundles"][0]["worst"][0]["name"]
    strip = parity.strip(again, name, bundle.contract, 4)
    start = float(name.removesuffix("s"))
    expected = video.load(film, bundle.contract, start).frames
    np.testing.assert_array_equal(strip, expected[[0, 2, 5, 7]])
    assert layers.curves([bundle], seen.windows.sample(1))[0].first_jump is None


def test_strided_windows_hop_in_frames_of_the_model_and_can_be_read_again(film: Path, tiny_bundle: Path) -> None:
    """58 frames, every third: 20 of them, so windows of 8 begin at the first, fifth, ninth and 13th."""
    found = bundles.load(tiny_bundle)
    strided = replace(found, contract=replace(found.contract, fps=None, sampling="stride", stride=3))
    times = [seconds for seconds, _ in video.frames(film)]
    seen = temporal.watch([strided], film, 4, reference=strided)
    starts = [float(item.name.removesuffix("s")) for item in seen.windows.items]
    assert starts == pytest.approx([times[3 * i] for i in (0, 4, 8, 12)], abs=1e-3)
    frames = np.stack([frame for _, frame in video.frames(film)])
    for clip, first in zip(seen.windows.clips(strided.contract), (0, 12, 24, 36), strict=True):
        np.testing.assert_array_equal(clip.frames, resize.spatial(frames[first : first + 24 : 3], strided.contract))


def test_a_model_of_segments_watches_no_video(film: Path, tiny_bundle: Path) -> None:
    found = bundles.load(tiny_bundle)
    segments = replace(found, contract=replace(found.contract, fps=None, sampling="segments"))
    with pytest.raises(InputError, match="segments of a whole video; no window"):
        temporal.watch([segments], film, reference=segments)


def test_a_missing_video_is_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a file"):
        temporal.watch([bundles.load(tiny_bundle)], tmp_path / "none.mp4")
