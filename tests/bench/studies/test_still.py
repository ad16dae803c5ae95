"""The rendered films of the study of the novelty gate show what their names say."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest

from edgetube import demo
from edgetube.bench.studies import still
from edgetube.contract import InputContract
from edgetube.demo.render import Photo, generator

CONTRACT = InputContract(8, 32, 32, fps=5.0)
FPS = 5.0


@pytest.fixture
def photos() -> tuple[Photo, Photo]:
    first, second = demo.photos(demo.EVALUATION[:2])
    return first, second


def test_a_still_film_has_only_the_sensor_in_it(photos: tuple[Photo, Photo]) -> None:
    film = list(still.sensor(still.still(photos[0], CONTRACT, FPS), FPS, 2.0, generator("x", 0)))
    assert [seconds for seconds, _ in film[:3]] == pytest.approx([0.0, 0.2, 0.4])
    assert film[-1][0] == pytest.approx(still.SECONDS - 0.2)
    steps = [np.abs(b.astype(int) - a).mean() for (_, a), (_, b) in itertools.pairwise(film)]
    assert 1.0 * 2 < np.mean(steps) < 1.3 * 2  # 2 sigma / sqrt(pi), less where pixels are black, and flicker


def test_movers_cross_a_part_of_the_picture_some_of_the_time(photos: tuple[Photo, Photo]) -> None:
    rng = generator("x", 1)
    plain = next(still.still(photos[0], CONTRACT, FPS))
    changed = np.array([(p != plain).any(axis=2).mean() for p in still.movers(*photos, CONTRACT, FPS, rng)])
    assert len(changed) == still.SECONDS * FPS
    assert 0.05 < (changed > 0).mean() < 0.5
    assert 0 < changed.max() < 0.3
    entering = np.flatnonzero((changed[1:] > 0) & (changed[:-1] == 0))
    assert len(entering) >= 2


def test_the_camera_of_moves_stands_and_moves(photos: tuple[Photo, Photo]) -> None:
    film = list(still.moves(photos[0], CONTRACT, FPS, generator("x", 2)))
    stand = round(still.STAND * FPS)
    assert len(film) == still.SEGMENTS * (2 * stand + CONTRACT.frames)
    steps = np.array([np.abs(b - a).mean() for a, b in itertools.pairwise(film)])
    assert not steps[: stand - 1].any()
    assert steps[stand : stand + CONTRACT.frames - 1].mean() > 1


def test_a_film_is_the_same_each_time(photos: tuple[Photo, Photo]) -> None:
    make = partial(still.movers, *photos, CONTRACT, FPS)
    for a, b in zip(make(generator("x", 3)), make(generator("x", 3)), strict=True):
        np.testing.assert_array_equal(a, b)
