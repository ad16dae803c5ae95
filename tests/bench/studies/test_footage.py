"""What the study of real footage calls left, right and neither, and which clips judge whom."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from edgetube.bench.studies import footage
from edgetube.bench.studies.footage import Region, Row
from edgetube.resize import Frames

SECONDS = [i / 10 for i in range(11)]


def film(speed: float, cut: bool = False) -> Frames:
    """A bright block of 12 pixels that goes `speed` pixels to the right in each of 11 frames of 32x64."""
    pictures = np.zeros((len(SECONDS), 32, 64, 3), np.uint8)
    for i, picture in enumerate(pictures):
        left = round(26 + speed * (i - 5))
        picture[10:22, left : left + 12] = 200
        if cut and i > 5:
            picture[...] = 255 - picture
    return pictures


def flow(speed: float) -> footage.Flow:
    """The flow of such a film, known without a search."""

    def found(first: Frames, second: Frames) -> npt.NDArray[np.float32]:
        way = np.zeros((*first.shape[:2], 2), np.float32)
        way[..., 0] = speed * (first[..., 0] > 100)
        return way

    return found


def labels_of(speed: float, places: Sequence[Region], cut: bool = False) -> list[str | None]:
    motion = footage.motion_of(film(speed, cut), SECONDS, places, flow(speed))
    return [footage.label(motion, i, 0.0, 1.0) for i in range(len(places))]


@pytest.mark.parametrize(("speed", "expected"), [(2.0, "right"), (-2.0, "left"), (0.0, "neither"), (0.2, "neither")])
def test_a_block_that_moves_is_called_by_its_side(speed: float, expected: str) -> None:
    """0.2 pixels of 32 in a tenth of a second are less than a pixel that moves."""
    assert labels_of(speed, [Region(16, 0, 32)]) == [expected]


def test_each_region_has_what_it_shows_itself() -> None:
    assert labels_of(2.0, [Region(16, 0, 32), Region(0, 24, 8)]) == ["right", "neither"]


def test_a_window_in_which_the_shot_changes_has_no_label() -> None:
    assert labels_of(2.0, [Region(16, 0, 32)], cut=True) == [None]


def test_what_goes_there_and_back_is_neither() -> None:
    there = footage.motion_of(film(2.0), SECONDS, [Region(16, 0, 32)], flow(2.0))
    across = there.across * np.where(np.arange(10) < 5, 1, -1)[:, None]
    both = footage.Motion(there.seconds, there.moving, across, there.path, there.pixels, there.cuts)
    assert footage.label(both, 0, 0.0, 1.0) == "neither"


def test_regions_are_the_middle_and_squares_beside_each_other() -> None:
    found = footage.regions(100, 160, 0.5)
    assert Region(30, 0, 100) in found
    assert {(one.x, one.y) for one in found if one.side == 50} == {(x, y) for x in (0, 55, 110) for y in (0, 50)}


def test_no_source_judges_a_model_that_saw_it() -> None:
    rows = [
        Row(source, f"films/{source}/{name}.mp4", name, float(i))
        for source, count in (("a", 40), ("b", footage.ENOUGH), ("c", footage.ENOUGH - 1))
        for name in footage.LABELS
        for i in range(count)
    ]
    found = list(footage.folds(rows))
    assert [held for held, _, _ in found] == ["a", "b"]  # of c there are too few
    for held, trained, judged in found:
        assert {row.source for row in trained} == {"a", "b", "c"} - {held}
        assert {row.source for row in judged} == {held}
        counts = [sum(row.label == name for row in judged) for name in footage.LABELS]
        assert counts[0] == counts[1] == counts[2] >= footage.ENOUGH


def test_the_threshold_of_the_frame_difference_is_the_best_one() -> None:
    values = np.array([0.1, 0.2, 0.9, 1.0, 1.1])
    truth = np.array([footage.NEITHER, footage.NEITHER, footage.LEFT, footage.LEFT, footage.RIGHT])
    assert footage.best_threshold(values, truth) == (0.9, footage.NEITHER, footage.LEFT)
