"""The rendered films of the study of the novelty gate show what their names say."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from edgetube import demo, video
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


def test_parts_of_a_recording_are_its_corners_and_what_lies_between(tmp_path: Path) -> None:
    """Each is a quarter of the height and width, and nine of them reach every edge."""
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:16, :24], picture[48:, 72:] = 250, 120
    path = video.write(tmp_path / "film.mp4", [picture] * 5, 25)
    films = [(scene, film()) for scene, _, film in still.films(CONTRACT, [path]) if "film.mp4, " in scene]
    parts = [(scene, list(film)) for scene, film in films if not isinstance(film, Path)]
    assert [scene for scene, _ in parts].count("film.mp4, corners") == 4
    assert [scene for scene, _ in parts].count("film.mp4, between them") == 5
    means = [frames[0][1].mean() for _, frames in parts]
    np.testing.assert_allclose(means, [250, 0, 0, 0, 0, 0, 0, 0, 120], atol=6)
    assert all(frame.shape == (16, 24, 3) for _, frames in parts for _, frame in frames)
