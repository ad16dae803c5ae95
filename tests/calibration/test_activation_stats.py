"""What is kept of an activation: its rows, halves of them, channels, and everything where that is asked for."""

from __future__ import annotations

import numpy as np
import pytest

from edgetube.calibration.layerwise import ActivationStats
from edgetube.errors import InputError


class TestActivationStats:
    def test_rows_are_drawn_evenly_and_without_repeats(self) -> None:
        """2048 rows of 8 channels at most, 512 at least: of 4 clips 512 each."""
        stats = ActivationStats("x", 4)
        seen = []
        for index in range(4):
            values = (np.arange(1000)[:, None] + 1000 * index + np.zeros(8)).astype(np.float32)
            stats.add(index, values[None])
            seen.append(values)
        assert stats.rows.shape == (2048, 8)
        per_clip = stats.rows[:, 0].astype(int) // 1000
        assert np.bincount(per_clip).tolist() == [512] * 4
        assert len(np.unique(stats.rows[:, 0])) == 2048
        assert (np.diff(stats.rows[:, 0]) > 0).all()
        np.testing.assert_allclose(stats.means[:, 0], [499.5, 1499.5, 2499.5, 3499.5])
        np.testing.assert_array_equal(stats.channels.low, 0)
        np.testing.assert_array_equal(stats.channels.high, 3999)
        again = ActivationStats("x", 4)
        other = ActivationStats("y", 4)
        for index, values in enumerate(seen):
            again.add(index, values)
            other.add(index, values)
        np.testing.assert_array_equal(again.rows, stats.rows)
        assert (other.rows != stats.rows).any()

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_a_value_that_is_not_finite_is_named(self, bad: float) -> None:
        stats = ActivationStats("blocks.0.mlp.act", 2)
        stats.add(0, np.zeros((1, 3, 4), np.float32))
        with pytest.raises(InputError, match=r"in blocks\.0\.mlp\.act on calibration clip 1; check weights and"):
            stats.add(1, np.array([[[0, 0, bad, 0]]], np.float32))

    @pytest.mark.parametrize(
        ("channels", "clips", "rows"), [(3072, 1, 512), (3072, 100, 600), (1000, 3, 1500), (8, 1, 2048), (8, 7, 2051)]
    )
    def test_how_many_rows_there_are(self, channels: int, clips: int, rows: int) -> None:
        """1.5 million values, between 512 and 2048 rows, rounded up to as many of each clip."""
        stats = ActivationStats("x", clips)
        for index in range(clips):
            stats.add(index, np.zeros((1, 2100 // clips + 10, channels), np.float32))
        assert len(stats.rows) == rows

    def test_fewer_rows_than_wanted_are_all(self) -> None:
        stats = ActivationStats("x", 2)
        stats.add(0, np.arange(6, dtype=np.float32).reshape(1, 3, 2))
        stats.add(1, np.array([[[7, 8]]], np.float32))
        np.testing.assert_array_equal(stats.rows, [[0, 1], [2, 3], [4, 5], [7, 8]])

    @pytest.mark.parametrize(
        ("clips", "first", "second"),
        [
            (1, [0], [0]),
            (2, [0], [1]),
            (5, [0, 2, 4], [1, 3]),
            (8, [0, 2, 4, 6], [1, 3, 5, 7]),
            (16, [0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]),
            (17, [0, 1, 2, 6, 7, 8, 12, 13, 14], [3, 4, 5, 9, 10, 11, 15, 16]),
        ],
    )
    def test_halves_are_groups_of_neighbours(self, clips: int, first: list[int], second: list[int]) -> None:
        """Eight groups, in turns; of a single clip both halves know the same."""
        stats = ActivationStats("x", clips)
        for index in range(clips):
            stats.add(index, np.full((1, 2, 3), index, np.float32))
        for half, expected in zip(stats.halves, (first, second), strict=True):
            np.testing.assert_array_equal(half.rows[:, 0], np.repeat(expected, 2))
            np.testing.assert_array_equal(half.channels.low, expected[0])
            np.testing.assert_array_equal(half.channels.high, expected[-1])

    def test_everything_is_kept_of_what_is_whole(self, rng: np.random.Generator) -> None:
        stats, parts = ActivationStats("x", 3, whole=True), rng.standard_normal((3, 50, 4)).astype(np.float32)
        for index, part in enumerate(parts):
            stats.add(index, part[None])
        every = parts.reshape(-1, 4)
        assert stats.gram is not None
        assert stats.histogram is not None
        np.testing.assert_allclose(stats.gram.total, every.T @ every, rtol=1e-5, atol=1e-5)
        assert stats.histogram.counts.sum() == every.size
        assert ActivationStats("x", 3).histogram is None
