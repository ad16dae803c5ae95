"""Clips for a calibration: bad ones are refused or named."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetube.arrays import DiskArray
from edgetube.calibration.clips import FEW_CLIPS, Clips, collect
from edgetube.contract import InputContract
from edgetube.datasets import ClipSet, Item
from edgetube.errors import InputError
from edgetube.model.checkpoints import Checkpoint
from edgetube.video import Clip


def _given(clip: Clip, contract: InputContract) -> Clip:
    return clip


class TestBadClips:
    def collect(self, checkpoint: Any, tmp_path: Path, frames: Any, labels: Any = None) -> Any:
        items = []
        for i, x in enumerate(frames):
            label = None if labels is None else labels[i]
            clip = Clip(f"{i}", x, label)
            items.append(Item(f"{i}", label, partial(_given, clip)))
        return collect(ClipSet("mine", tuple(items)), checkpoint.contract, checkpoint.labels, tmp_path)

    def test_no_clips(self, hard_checkpoint: Checkpoint, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no clips to calibrate on"):
            self.collect(hard_checkpoint, tmp_path, [])

    def test_all_black(self, hard_checkpoint: Checkpoint, tmp_path: Path, rng: np.random.Generator) -> None:
        black = np.zeros(hard_checkpoint.contract.shape, np.uint8)
        with pytest.raises(InputError, match="every clip of mine is one flat colour"):
            self.collect(hard_checkpoint, tmp_path, [black, black])
        noise = rng.integers(0, 255, black.shape, np.uint8)
        (note,) = self.collect(hard_checkpoint, tmp_path, [black, *[noise] * FEW_CLIPS]).notes
        assert f"1 of {FEW_CLIPS + 1} clips are one flat colour" in note

    @pytest.mark.parametrize(
        ("count", "named"), [(1, "one clip, 0:"), (FEW_CLIPS - 1, f"{FEW_CLIPS - 1} clips:"), (FEW_CLIPS, None)]
    )
    def test_few_clips_are_a_stated_warning(
        self, hard_checkpoint: Checkpoint, tmp_path: Path, rng: np.random.Generator, count: int, named: str | None
    ) -> None:
        noise = rng.integers(0, 255, hard_checkpoint.contract.shape, np.uint8)
        notes = self.collect(hard_checkpoint, tmp_path, [noise] * count).notes
        assert [note.startswith(f"calibrated on {named} ") for note in notes] == ([True] if named else [])

    def test_more_labels_than_the_head(
        self, hard_checkpoint: Checkpoint, tmp_path: Path, rng: np.random.Generator
    ) -> None:
        noise = rng.integers(0, 255, (2, *hard_checkpoint.contract.shape), np.uint8)
        with pytest.raises(InputError, match="mine has 2 labels, among them 'jump', which the model does not know"):
            self.collect(hard_checkpoint, tmp_path, noise, ["static", "jump"])

    def test_truth_is_the_place_among_the_models_labels_or_minus_one(
        self, hard_checkpoint: Checkpoint, tmp_path: Path, rng: np.random.Generator
    ) -> None:
        noise = rng.integers(0, 255, (3, *hard_checkpoint.contract.shape), np.uint8)
        second, first = hard_checkpoint.labels[1], hard_checkpoint.labels[0]
        found = self.collect(hard_checkpoint, tmp_path, noise, [second, None, first])
        assert found.labels.tolist() == [1, -1, 0]


def test_the_first_clips_are_as_many_as_there_are(tmp_path: Path, rng: np.random.Generator) -> None:
    frames = DiskArray(tmp_path, (3, 2, 4, 4, 3), np.uint8)
    clips = Clips("mine", frames, np.zeros(3, int), ("a", "b", "c"), "")
    assert clips.first(2).shape == (2, 2, 4, 4, 3)
    assert clips.first(9).shape == (3, 2, 4, 4, 3)
