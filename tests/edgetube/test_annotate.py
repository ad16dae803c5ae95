"""Predictions on frames: the text stays inside, the input stays as it was, each frame gets its prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgetube import annotate as module
from edgetube import video
from edgetube.annotate import annotate, fit, save
from edgetube.errors import InputError
from edgetube.spec import Prediction
from edgetube.video import Frames

SCORES = {"pan-left": 0.9, "roll-cw": 0.06, "zoom-out": 0.04}
PAN = Prediction("pan-left", 0.9, SCORES, (0.0,), 1.0, 3.0)
LONG = Prediction("a very long label " * 8, 0.5, {"a very long label " * 8: 0.5, "ß" * 90: 0.4}, (0.0,), 0.0, 1e6)


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 128, np.uint8)


@pytest.mark.parametrize("prediction", [PAN, LONG], ids=["short", "long"])
@pytest.mark.parametrize("size", [(120, 160), (360, 640), (1080, 1920), (480, 270), (64, 64), (20, 24), (1, 1)])
def test_only_the_lower_band_changes_and_the_margin_stays_free(size: tuple[int, int], prediction: Prediction) -> None:
    frame = grey(*size)
    out = annotate(frame, prediction)
    assert (frame == 128).all()
    assert out.shape == frame.shape
    assert out.dtype == np.uint8
    changed = np.flatnonzero((out != frame).any(axis=(1, 2)))
    assert changed[-1] == size[0] - 1
    if size[0] < 100:
        return
    assert len(changed) <= size[0] * (0.4 if size[0] < 200 else 0.2)
    band, background = out[changed[0] :], out[changed[0], 0]
    assert background.max() < 64
    assert (band == background).mean() < 0.95  # there is something on it
    for edge in (band[:2], band[-2:], band[:, :3], band[:, -3:]):  # and nothing that runs over
        assert (edge == background).all()


def test_the_band_is_translucent() -> None:
    """What is behind it still shows, darker and in the same order."""
    frame = grey(240, 320)
    frame[:, :160] = 255
    out = annotate(frame, Prediction("a", 1.0, {"a": 1.0}, (0.0,)))
    row = out[-1].astype(int)
    assert row[0].sum() > row[-1].sum() + 60
    assert row[0].max() < 128


@pytest.mark.parametrize("score", [0.0, 0.25, 0.5, 1.0])
def test_the_bar_is_as_long_as_the_score(score: float) -> None:
    out = annotate(grey(480, 640), Prediction("static", score, {"static": score}, (0.0,)))
    filled = (out == module.ACCENT).all(axis=-1)
    empty = (out == module.TRACK).all(axis=-1)
    bar = (filled | empty).sum(axis=1).argmax()
    total = filled[bar].sum() + empty[bar].sum()
    assert total > 500
    assert filled[bar].sum() == pytest.approx(score * total, abs=1)


def test_more_scores_and_the_time_span_are_drawn() -> None:
    frame = grey(360, 640)
    alone = Prediction("pan-left", 0.9, {"pan-left": 0.9}, (0.0,))
    timed = Prediction("pan-left", 0.9, {"pan-left": 0.9}, (0.0,), 1.0, 3.0)
    plain = annotate(frame, alone)
    changed = (annotate(frame, timed) != plain).any(axis=-1)
    assert changed[:, :200].any()  # the span, on the left, below the label
    assert not changed[:, 200:].any()
    assert (annotate(frame, PAN)[:, 330:] != plain[:, 330:]).any()  # the best three, on the right
    four = SCORES | {"static": 0.0}
    np.testing.assert_array_equal(
        annotate(frame, PAN), annotate(frame, Prediction("pan-left", 0.9, four, (0.0,), 1.0, 3.0))
    )


def test_text_is_made_smaller_then_cut_short() -> None:
    assert fit("pan-left", 20, 500) == ("pan-left", 20)
    text, size = fit("pan-left", 20, 72)
    assert text == "pan-left"
    assert 15 <= size < 20
    text, size = fit("pan-left", 20, 50)
    assert text.endswith("…")
    assert "pan-left".startswith(text[:-1])
    assert size == 15
    assert fit("pan-left", 20, 3) == ("", 15)
    assert fit("pan-left", 9, 25)[1] == module.SMALLEST


def test_without_a_prediction_the_frame_is_copied() -> None:
    frame = grey(8, 8)
    out = annotate(frame, None)
    np.testing.assert_array_equal(out, frame)
    assert not np.shares_memory(out, frame)


def test_views_of_any_strides_are_taken() -> None:
    frame = np.arange(240 * 320 * 3, dtype=np.uint32).astype(np.uint8).reshape(240, 320, 3)
    np.testing.assert_array_equal(annotate(frame[::-1, ::-1], PAN), annotate(frame[::-1, ::-1].copy(), PAN))


@pytest.mark.parametrize("frame", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3))])
def test_other_frames_are_refused(frame: npt.NDArray[Any]) -> None:
    with pytest.raises(InputError, match=r"expected \(height, width, 3\) uint8"):
        annotate(frame, PAN)


def spans(
    monkeypatch: pytest.MonkeyPatch, predictions: list[Prediction], times: list[float], tmp_path: Path
) -> list[str | None]:
    """The label that `save` draws at each time."""
    drawn: list[str | None] = []

    def record(frame: Frames, prediction: Prediction) -> Frames:
        drawn.append(prediction.label if prediction else None)
        return frame

    monkeypatch.setattr(module, "annotate", record)
    monkeypatch.setattr(video, "write", lambda path, frames, fps: (list(frames), path)[1])
    assert save(tmp_path / "out.mp4", ((t, grey(4, 4)) for t in times), predictions, 10.0) == tmp_path / "out.mp4"
    return drawn


def window(label: str, start: float | None, end: float | None) -> Prediction:
    return Prediction(label, 1.0, {label: 1.0}, (0.0,), start, end)


def test_a_frame_shows_the_prediction_whose_middle_is_nearest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sliding = [window("c", 2, 4), window("a", 0, 2), window("b", 1, 3)]  # in any order
    times = [0.0, 1.4, 1.5, 2.4, 2.5, 4.0, 4.1]
    assert spans(monkeypatch, sliding, times, tmp_path) == ["a", "a", "b", "b", "c", "c", None]


def test_frames_outside_of_every_window_stay_bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    apart = [window("a", 1, 2), window("b", 5, 6)]
    times = [0.9, 1.0, 2.0, 2.1, 4.9, 5.0, 6.1]
    assert spans(monkeypatch, apart, times, tmp_path) == [None, "a", "a", None, None, "b", None]
    assert spans(monkeypatch, [], [0.0], tmp_path) == [None]
    assert spans(monkeypatch, [window("x", None, None)], [0.0, 99.0], tmp_path) == ["x", "x"]


def test_save_writes_a_video_that_reads_back(tmp_path: Path) -> None:
    frames = [(i / 10, grey(96, 160)) for i in range(8)]
    path = save(tmp_path / "out.mp4", frames, [window("static", 0.35, 0.8)], 10.0)
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
    back = [frame for _, frame in video.frames(path)]
    assert len(back) == 8
    assert back[0].shape == (96, 160, 3)
    darkest = [int(frame[-30:, 2:-2].mean()) for frame in back]
    assert min(darkest[:4]) > 115  # not covered
    assert max(darkest[4:]) < 100  # covered
