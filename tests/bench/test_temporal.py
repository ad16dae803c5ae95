"""Answers over time: flips, onsets and delays on made-up sequences; drops and repeats in made-up and real streams."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from edgetube import bundle as bundles
from edgetube import video
from edgetube.bench import layers, parity, temporal
from edgetube.errors import InputError

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
    ],
)
def test_onset_delay(answers: list[int], delay: float | None, missed: int) -> None:
    reference = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    got = temporal.steadiness("x", reference, np.array(answers), TIMES)
    assert (got.onset_delay_mean_s, got.onset_delay_max_s, got.missed) == (delay, delay, missed)
    assert got.agreement == np.mean(reference == answers)


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


def test_one_frame_is_no_stream() -> None:
    assert temporal.health(np.array([0.0]), np.array([])).fps == 0.0


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


def test_a_missing_video_is_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a file"):
        temporal.watch([bundles.load(tiny_bundle)], tmp_path / "none.mp4")
