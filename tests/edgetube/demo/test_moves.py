from __future__ import annotations

import numpy as np
import pytest

from edgetube.demo.moves import DIRECTIONS, JITTER, LABELS, TRAVEL, Move


def test_every_label_has_its_own_direction() -> None:
    assert tuple(DIRECTIONS) == LABELS
    assert len(set(DIRECTIONS.values())) == len(LABELS) == 9


@pytest.mark.parametrize("label", LABELS)
def test_path_travels_as_labelled_at_any_number_of_frames(label: str) -> None:
    for seed in range(20):
        move = Move.draw(label, np.random.default_rng(seed))
        for frames in (2, 5, 16, 64):
            path = move.path(frames)
            assert path.shape == (frames, 4)
            travelled = path[-1] - path[0]
            for value, sign, (low, high), shake in zip(travelled, DIRECTIONS[label], TRAVEL, JITTER, strict=True):
                slack = 2 * shake + 1e-6
                assert abs(value) <= slack if sign == 0 else low - slack <= sign * value <= high + slack


def test_smallest_travel_is_well_above_the_shake() -> None:
    assert all(low >= 4 * 2 * shake for (low, _), shake in zip(TRAVEL[:2], JITTER[:2], strict=True))
    assert all(low >= 5 * shake for (low, _), shake in zip(TRAVEL, JITTER, strict=True))


def test_the_same_times_are_the_same_places() -> None:
    move = Move.draw("roll-cw", np.random.default_rng(3))
    np.testing.assert_allclose(move.path(31)[::10], move.path(4), atol=1e-6)
    np.testing.assert_allclose(move.path(1)[0], move.path(3)[1], atol=1e-6)
