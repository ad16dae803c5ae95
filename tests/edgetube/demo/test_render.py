from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgetube.demo import render
from edgetube.demo.moves import LABELS, Move
from edgetube.errors import InputError


def picture(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    noise = np.random.default_rng(seed).uniform(0, 255, (height // 8 + 2, width // 8 + 2, 3))
    return np.kron(noise, np.ones((8, 8, 1)))[:height, :width].astype(np.uint8)


def still(**changes: Any) -> Any:
    """A camera that does nothing at all, but for `changes`."""
    move = Move.draw("static", np.random.default_rng(0))
    calm: dict[str, Any] = {
        "shake": np.zeros((4, 2, 3), np.float32),
        "blur": 0.0,
        "noise": 0.0,
        "exposure": 0.0,
        "flicker": 0.0,
    }
    return dataclasses.replace(move, **calm, **changes)


def test_generator_does_not_depend_on_the_process() -> None:
    assert render.generator("evaluation", 7).integers(2**32, size=2).tolist() == [220921436, 1608268853]


def test_view_without_scaling_is_the_photo_itself() -> None:
    photo = render.Photo("p", picture(96, 128))
    view = render.View((50.5, 40.5), 32.0, 0.0)  # between pixels: an even frame has no middle pixel
    points = render.project(view, np.zeros((1, 4), np.float32), (32, 48), render._grid((32, 48)))
    seen = render._sample_photo(photo, points, 1.0).reshape(32, 48, 3)
    np.testing.assert_allclose(seen, photo.pixels[25:57, 27:75], atol=1e-3)


def test_quarter_roll_clockwise_turns_the_picture_counter_clockwise() -> None:
    photo = render.Photo("p", picture(96, 96))
    view = render.View((47.5, 47.5), 32.0, 0.0)
    path = np.array([[0, 0, 0, 0], [0, 0, 0, np.pi / 2]], np.float32)
    seen = render._sample_photo(photo, render.project(view, path, (32, 32), render._grid((32, 32))), 1.0)
    first, last = seen.reshape(2, 32, 32, 3)
    np.testing.assert_allclose(last, np.rot90(first), atol=0.05)  # np.rot90 turns counter-clockwise


def test_shift_and_zoom_move_the_picture_the_other_way() -> None:
    photo = render.Photo("p", picture(128, 128))
    view = render.View((63.5, 63.5), 32.0, 0.0)
    path = np.array([[0, 0, 0, 0], [0.25, 0, 0, 0], [0, -0.25, 0, 0], [0, 0, np.log(2), 0]], np.float32)
    points = render.project(view, path, (32, 32), render._grid((32, 32)))
    seen = render._sample_photo(photo, points, 1.0).reshape(4, 32, 32, 3)
    np.testing.assert_allclose(seen[1][:, :-8], seen[0][:, 8:], atol=1e-3)  # camera right, picture left
    np.testing.assert_allclose(seen[2][8:], seen[0][:-8], atol=1e-3)  # camera up, picture down
    blocks = seen[3].reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))  # twice as large: 2x2 pixels show what one did
    assert np.abs(blocks - seen[0][8:24, 8:24]).mean() < 6


def test_far_views_read_means_of_the_photo() -> None:
    pixels = np.indices((256, 256)).sum(axis=0) % 2 * 255  # a chequerboard that must not alias
    photo = render.Photo("p", np.repeat(pixels[..., None], 3, axis=-1).astype(np.uint8))
    view = render.View((127.5, 127.5), 200.0, 0.1)
    points = render.project(view, np.zeros((1, 4), np.float32), (50, 50), render._grid((50, 50)))
    seen = render._sample_photo(photo, points, 4.0)
    np.testing.assert_allclose(seen, 127.5, atol=0.01)


def test_gaussian_against_its_definition() -> None:
    dot = np.zeros((31, 31, 1), np.float32)
    dot[15, 15] = 1
    blurred = render._gaussian(dot, 2.0)[..., 0]
    y, x = np.mgrid[:31, :31] - 15
    expected = np.exp(-(x**2 + y**2) / 8) / (8 * np.pi)
    np.testing.assert_allclose(blurred, expected, atol=5e-4)


@pytest.mark.parametrize("label", LABELS)
def test_the_whole_move_stays_inside_the_photo(label: str) -> None:
    photo = render.Photo("p", picture(150, 220))
    for seed in range(10):
        rng = np.random.default_rng(seed)
        move = Move.draw(label, rng)
        view = render.choose(photo, move, (60, 80), rng)
        x, y = render.project(view, move.path(33), (60, 80), render._grid((60, 80)))
        assert x.min() >= 0
        assert y.min() >= 0
        assert x.max() <= 219
        assert y.max() <= 149


def test_texture_decides_the_view() -> None:
    pixels = np.full((300, 300, 3), 128, np.uint8)
    pixels[:, 150:] = picture(300, 150)
    photo = render.Photo("half", pixels)
    rng = np.random.default_rng(0)
    seen = [render.choose(photo, still(), (64, 64), rng) for _ in range(30)]
    assert np.mean([view.centre[0] > 120 for view in seen]) > 0.8
    assert render.texture(np.full((32, 32, 3), 90.0, np.float32)) == 0


def test_exposure_and_noise_are_what_they_say() -> None:
    photo = render.Photo("grey", np.full((200, 200, 3), 100, np.uint8))
    brighter = render.render_clip(photo, still(), 9, (32, 32), np.random.default_rng(0))
    assert (brighter == 100).all()
    drifting = dataclasses.replace(still(), exposure=0.2)
    frames = render.render_clip(photo, drifting, 9, (32, 32), np.random.default_rng(0))
    assert frames[0].mean() == 90
    assert frames[4].mean() == 100
    assert frames[8].mean() == 110
    noisy = dataclasses.replace(still(), noise=5.0)
    frames = render.render_clip(photo, noisy, 9, (32, 32), np.random.default_rng(0)).astype(float)
    assert abs(frames.std() - 5.0) < 0.2
    assert abs(frames.mean() - 100) < 0.2


def test_common_grain_is_noise_of_the_same_size() -> None:
    """Each frame has a part of it of its own; nothing else of the clip changes."""
    photo = render.Photo("grey", np.full((200, 200, 3), 100, np.uint8))
    noisy = dataclasses.replace(still(), noise=5.0)

    def seen(seed: int) -> npt.NDArray[np.float64]:
        return render.render_clip(photo, noisy, 9, (32, 32), np.random.default_rng(seed), True).astype(float)

    frames = seen(0)
    assert abs(frames.std() - 5.0) < 0.2
    assert abs(frames.mean() - 100) < 0.2
    assert np.abs(np.corrcoef(frames.reshape(9, -1)) - np.eye(9)).max() < 0.1
    np.testing.assert_array_equal(seen(0), frames)
    assert (seen(1) != frames).mean() > 0.8
    own, common = (
        render.render_clip(photo, still(), 9, (32, 32), np.random.default_rng(0), which) for which in (False, True)
    )
    np.testing.assert_array_equal(own, common)


def test_a_file_that_is_no_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"not a picture at all")
    with pytest.raises(InputError, match=r"broken\.jpg is not an image"):
        render.Photo.read(path)
