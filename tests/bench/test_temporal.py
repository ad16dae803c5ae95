"""Answers over time: flips, onsets and delays on made-up sequences, and bundles that watch a film."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

import edgetube
from edgetube import bundle as bundles
from edgetube import resize, video
from edgetube.bench import layers, parity, temporal
from edgetube.bench.spans import compare
from edgetube.errors import InputError
from edgetube.live import novelty
from edgetube.live.decisions import DecisionRule, spans
from edgetube.spec import ModelSpec, TubeSpec

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


@pytest.fixture
def mostly_still(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Ten seconds at 10 fps of one picture; between the third and the fourth second it slides away and is replaced."""
    first, second = (rng.integers(0, 256, (8, 12, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1) for _ in range(2))
    both = np.concatenate([first, second], axis=1)
    frames = (both[:, 96 * min(max(i - 30, 0), 10) // 10 :][:, :96] for i in range(100))
    return video.write(tmp_path / "still.mp4", frames, 10.0)


def test_spans_of_an_app_that_uses_the_bundle(mostly_still: Path, tiny_bundle: Path) -> None:
    """The tiny model's classes depend on the picture; what an app gets is what a decider gives on the same logits."""
    bundle = bundles.load(tiny_bundle)
    rule = DecisionRule(tau=0.5, enter=0.12, leave=0.1, minimum=0.3)
    seen = temporal.watch([bundle], mostly_still, 2, rule=rule, skip_still=True)
    reference, own = seen.decided
    with edgetube.Runtime(tiny_bundle) as rt:
        answers = list(rt.stream(mostly_still, hop=2))
    expected = spans(rule, bundle.labels, [p.end or 0.0 for p in answers], [p.logits for p in answers])
    assert len(expected) > 1
    assert own.spans == expected
    assert own.agreement == compare(reference.spans, own.spans)
    assert own.agreement.iou == pytest.approx(1.0)
    document = seen.to_json()
    assert DecisionRule.from_json(document["decisions"]["rule"]) == rule
    assert document["decisions"]["bundles"][0]["shared"] == len(expected)
    assert document["decisions"]["reference"]["spans"][0].keys() == {"label", "start", "end", "peak"}
    json.dumps(seen.comparison.to_json(video=document), allow_nan=False)


def test_what_a_gate_saves_and_costs(mostly_still: Path, tiny_bundle: Path) -> None:
    """Windows of 0.8 s, one in 0.2 s: 47 of them. The picture changes in 1 s, so about 9 windows do."""
    bundle = bundles.load(tiny_bundle)
    seen = temporal.watch([bundle], mostly_still, 2, skip_still=True)
    assert seen.still is not None
    assert (seen.still.threshold, seen.still.refresh_after) == (novelty.THRESHOLD, novelty.REFRESH)
    assert 0.7 < seen.still.skipped < 0.85
    assert [one.name for one in seen.still.models] == ["reference", bundle.name]
    assert all(one.flips == 0 and one.spans is None for one in seen.still.models)
    blind = temporal.watch([bundle], mostly_still, 2, skip_still=255.0, rule=DecisionRule()).still
    assert blind is not None
    assert blind.skipped > 0.9
    assert blind.models[0].flips > 0
    assert blind.models[0].spans is not None
    assert temporal.watch([bundle], mostly_still, 2).to_json()["still"] is None


def test_a_gate_repeats_the_last_answer() -> None:
    """Four windows, the second and third alike: their answer is the second's."""
    spec = ModelSpec((TubeSpec((1, 2, 2), (1, 2, 2)),), 1, (2, 2), 4, 1, 1, (("x", 3),))
    gating = temporal.Gating(novelty.NoveltyGate(spec), [temporal.Follower(None, "abc")])
    own = temporal.Follower(None, "abc")
    for at, (grey, best) in enumerate([(0, 0), (90, 1), (91, 2), (200, 2)]):
        logits = np.eye(3, dtype=np.float32)[best]
        own.push(at, logits)
        gating.push(video.Clip("", np.full((1, 2, 2, 3), grey, np.uint8)), at, [logits])
    assert gating.followers[0].classes.tolist() == [0, 1, 1, 2]
    found = gating.result(["x"], [own], np.arange(4.0), False)
    assert found.skipped == 0.25
    assert (found.models[0].flips, found.models[0].missed, found.models[0].onset_delay_max_s) == (0.25, 0, 1.0)


def test_a_missing_video_is_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a file"):
        temporal.watch([bundles.load(tiny_bundle)], tmp_path / "none.mp4")
