from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgetube import demo, video
from edgetube.demo.moves import DIRECTIONS
from edgetube.model.checkpoints import Checkpoint
from edgetube.video import Frames

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    from edgetube.model import checkpoints

    return checkpoints.load("demo")


def labels_of(checkpoint: Checkpoint, frames: Sequence[Frames]) -> list[str]:
    x = torch.from_numpy(np.stack(frames)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        return [checkpoint.labels[i] for i in checkpoint.model(x).argmax(-1)]


def test_shape_of_the_model(checkpoint: Checkpoint) -> None:
    assert checkpoint.labels == demo.LABELS
    assert sum(tube.is_2d for tube in checkpoint.spec.tubes) == 1
    assert checkpoint.spec.accepts_images
    assert any(tube.merge > 1 for tube in checkpoint.spec.tubes)
    assert 1e6 < sum(p.numel() for p in checkpoint.model.parameters()) < 2e6


def test_accuracy(checkpoint: Checkpoint) -> None:
    clips = list(demo.evaluation(checkpoint.contract, 54))
    guesses = labels_of(checkpoint, [clip.frames for clip in clips])
    assert np.mean([guess == clip.label for guess, clip in zip(guesses, clips, strict=True)]) >= 0.9


@pytest.mark.slow
def test_accuracy_and_controls(checkpoint: Checkpoint) -> None:
    clips = list(demo.evaluation(checkpoint.contract, 216))
    truth = np.array([clip.label for clip in clips], str)
    frames = [clip.frames for clip in clips]
    assert np.mean(np.array(labels_of(checkpoint, frames), str) == truth) >= 0.9
    order = np.random.default_rng(0).permutation(16)
    assert np.mean(np.array(labels_of(checkpoint, [f[order] for f in frames]), str) == truth) < 0.3
    assert np.mean(np.array(labels_of(checkpoint, [f[8:9].repeat(16, 0) for f in frames]), str) == truth) < 0.2
    names: dict[tuple[int, ...], str] = {direction: name for name, direction in DIRECTIONS.items()}
    opposite = np.array([names[tuple(-v for v in DIRECTIONS[label])] for label in truth], str)
    assert np.mean(np.array(labels_of(checkpoint, [f[::-1] for f in frames]), str) == opposite) >= 0.9


def test_calibration_clips_are_of_the_same_kind(checkpoint: Checkpoint) -> None:
    clips = list(demo.calibration(checkpoint.contract, 54))
    guesses = labels_of(checkpoint, [clip.frames for clip in clips])
    assert np.mean([guess == clip.label for guess, clip in zip(guesses, clips, strict=True)]) >= 0.85


def test_the_card_speaks_of_these_weights(checkpoint: Checkpoint) -> None:
    docs = Path(__file__).parents[3] / "docs"
    measured = json.loads((docs / "demo-model.json").read_text())
    assert measured["weights_sha256"] == checkpoint.digest
    card = (docs / "demo-model.md").read_text()
    for part in ("shipped_photos", "held_out_pictures"):
        result = measured[part]
        assert result["clips"] >= 1000
        assert result["top1"] >= 0.95
        right = sum(result["confusion"][label][label] for label in demo.LABELS)
        assert result["top1"] == pytest.approx(right / result["clips"])
        for share in (result["top1"], *result["per_class"].values(), *result["controls"].values()):
            assert f"{100 * share:.1f} %" in card


def test_videos_are_recognised(checkpoint: Checkpoint) -> None:
    for label, path in demo.videos().items():
        for start in (None, 0.0, 1.0):
            clip = video.load(path, checkpoint.contract, start)
            assert labels_of(checkpoint, [clip.frames]) == [label]
