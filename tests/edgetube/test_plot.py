"""The picture of the tubes: its pixels against the clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetube import plot, voxels
from edgetube.errors import InputError
from edgetube.spec import ModelSpec, TubeSpec

HEAD: dict[str, Any] = {"width": 24, "depth": 1, "heads": 2, "classifiers": (("moves", 3),)}
SMALL = ModelSpec(
    tubes=(
        TubeSpec((4, 6, 6), (8, 16, 16), (1, 3, 2), (2, 1, 1)),
        TubeSpec((8, 2, 4), (4, 16, 16), (0, 5, 5), (1, 2, 2)),
        TubeSpec((1, 16, 16), (16, 16, 16)),
    ),
    frames=17,
    size=(50, 64),
    **HEAD,
)


def test_shown_frames_are_read_where_that_is_possible() -> None:
    clip = (32, 64, 64)
    assert plot.shown(TubeSpec((8, 8, 8), (16, 32, 32)), clip) == [0, 8, 16, 24]
    assert plot.shown(TubeSpec((2, 8, 8), (8, 32, 32), (5, 0, 0)), clip) == [5, 13, 21, 29]
    assert plot.shown(TubeSpec((16, 4, 4), (6, 32, 32), (4, 8, 8)), clip) == [4, 10, 16, 24]  # where most overlap
    assert plot.shown(TubeSpec((1, 8, 8), (1, 8, 8)), (1, 64, 64)) == [0]


def test_lanes_keep_windows_apart() -> None:
    windows = np.array([(4, 20), (10, 26), (16, 32), (20, 36), (26, 42)])
    assert plot.lanes(windows) == [[(4, 20), (20, 36)], [(10, 26), (26, 42)], [(16, 32)]]


def test_strongest_filters_are_scaled_one_by_one() -> None:
    weight = np.zeros((4, 3, 2, 2, 2))
    weight[1, 0, 0, 0, 0] = -0.01
    weight[3, 1, 1, 1, 0] = 5.0
    pictures = plot.strongest(weight, 3)
    assert pictures.shape == (3, 2, 2, 2, 3)
    assert pictures[0, 1, 1, 0].tolist() == [0.5, 1.0, 0.5]  # filter 3, all of its range
    assert pictures[1, 0, 0, 0].tolist() == [0.0, 0.5, 0.5]  # filter 1, all of its range
    assert (pictures[2] == 0.5).all()  # a filter of zeros
    assert plot.strongest(np.ones((2, 5, 1, 3, 3)), 9).shape == (2, 1, 3, 3, 3)  # not colours: grey


def test_contact_sheet_places_every_picture() -> None:
    pictures = np.linspace(0, 0.9, 5)[:, None, None, None, None] * np.ones((5, 3, 48, 24, 3))
    sheet, height = plot.contact_sheet(pictures, across=2, gap=0.5, lead=0.25)
    assert height == 48
    assert sheet.shape == (3 * 48 + 2 * 12, 2 * 72 + 24, 3)
    for i in range(5):
        y, x = i // 2 * 60, i % 2 * 96
        assert (sheet[y : y + 48, x : x + 72] == pictures[i, 0, 0, 0, 0]).all()
    assert (sheet[48:60] == 1).all()
    assert (sheet[:, 72:96] == 1).all()


def clip_of(spec: ModelSpec) -> np.ndarray:
    """A coloured gradient that moves."""
    t, h, w = np.meshgrid(*map(np.arange, spec.clip), indexing="ij")
    return np.stack([w * 255 // spec.size[1], h * 255 // spec.size[0], (t * 8) % 256], axis=-1).astype(np.uint8)


def kernels_of(spec: ModelSpec) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(spec.width // tube.merge, 3, *tube.kernel) for tube in spec.tubes]
    return {i: rng.standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)}


def rgb(path: Any) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)[..., :3]


def has(picture: np.ndarray, colour: str) -> bool:
    from matplotlib.colors import to_rgb

    return bool((np.abs(picture - to_rgb(colour)).max(axis=-1) < 0.02).sum() > 50)


IMAGE = ModelSpec(
    tubes=(TubeSpec((4, 8, 8), (4, 8, 8)), TubeSpec((1, 8, 8), (1, 8, 8))), frames=1, size=(32, 32), **HEAD
)


@pytest.mark.parametrize(("spec", "rows"), [(SMALL, 3), (IMAGE, 1)], ids=["clip", "image"])
def test_tubes_writes_one_png_with_a_row_a_tube(tmp_path: Path, spec: ModelSpec, rows: int) -> None:
    path = tmp_path / "tubes.png"
    assert plot.tubes(path, spec, clip_of(spec), kernels_of(spec), "a $title$ \\of") == path
    assert [p.name for p in tmp_path.iterdir()] == ["tubes.png"]
    picture = rgb(path)
    expected = (plot.HEADER + rows * plot.ROW + plot.FOOTER) * plot.DPI
    assert picture.shape[1] == plot.WIDTH * plot.DPI
    assert abs(picture.shape[0] - expected) <= 1
    for row in range(rows):
        top = round((plot.HEADER + row * plot.ROW) * plot.DPI)
        band = picture[top : top + round(plot.ROW * plot.DPI)]
        assert has(band, plot.COLOURS[row])
        assert not has(band, plot.COLOURS[row + 1])  # each row in its tube's colour only
        kernels = band[:, round(plot.KERNELS_X * plot.DPI) :]
        assert kernels.std() > 0.1


FRAMES = ModelSpec(
    tubes=(TubeSpec((1, 8, 8), (32, 8, 8)),),
    frames=6,
    size=(32, 32),
    prefix=2,
    per_frame=True,
    **HEAD,
)


def test_a_model_of_single_frames_reads_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tube's stride in time has no meaning; tokens are those of a frame."""
    assert voxels.touched(FRAMES) == 1
    assert len(voxels.boxes(voxels.placed(FRAMES, 0), FRAMES.clip)) == 6 * 16
    said: list[str] = []
    text = plot._text
    monkeypatch.setattr(plot, "_text", lambda *given, **look: (said.append(given[3]), text(*given, **look)))
    plot.tubes(tmp_path / "tubes.png", FRAMES, clip_of(FRAMES), kernels_of(FRAMES), "t")
    assert {"16 + 2", "tokens + prefix a frame", "4×4 = 16 a frame", "6 of 6", "6 of 6 read"} <= {*said}
    assert "32×8×8" in said


def test_tubes_without_kernels_draws_the_same_geometry(tmp_path: Path) -> None:
    with_kernels = rgb(plot.tubes(tmp_path / "a.png", SMALL, clip_of(SMALL), kernels_of(SMALL), "t"))
    without = rgb(plot.tubes(tmp_path / "b.png", SMALL, clip_of(SMALL), None, "t"))
    edge = round((plot.KERNELS_X - 0.1) * plot.DPI)
    np.testing.assert_array_equal(with_kernels[:, :edge], without[:, :edge])
    assert (with_kernels[:, edge:] != without[:, edge:]).any()


def test_the_strip_shows_the_clips_own_pixels_where_they_are_read(tmp_path: Path) -> None:
    """A white clip on which one tube reads the left half: white there, dark elsewhere."""
    spec = ModelSpec(tubes=(TubeSpec((1, 32, 16), (1, 32, 32)),), frames=4, size=(32, 32), **HEAD)
    picture = rgb(plot.tubes(tmp_path / "t.png", spec, np.full((4, 32, 32, 3), 255, np.uint8), None, "t"))
    pitch = plot.STRIP_W / plot.SHOWN
    side = pitch - 0.1
    y = round((plot.HEADER + 0.45 + side / 2) * plot.DPI)
    for frame in range(4):
        left, right = (round((plot.STRIP_X + pitch * frame + side * x) * plot.DPI) for x in (0.25, 0.75))
        assert picture[y, left].min() > 0.99
        assert picture[y, right].max() < 0.5


def test_tubes_does_not_depend_on_the_users_style(tmp_path: Path) -> None:
    import matplotlib

    plain = plot.tubes(tmp_path / "a.png", IMAGE, clip_of(IMAGE), None, "t").read_bytes()
    with matplotlib.rc_context({"font.size": 30, "text.color": "red", "image.interpolation": "nearest"}):
        assert plot.tubes(tmp_path / "b.png", IMAGE, clip_of(IMAGE), None, "t").read_bytes() == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_tubes_refuses_what_does_not_belong_together(tmp_path: Path) -> None:
    clip, path = clip_of(SMALL), tmp_path / "tubes.png"
    with pytest.raises(InputError, match=r"clip is \(16, 50, 64, 3\) uint8; the model takes \(17, 50, 64, 3\)"):
        plot.tubes(path, SMALL, clip[:16], None, "t")
    with pytest.raises(InputError, match="float32"):
        plot.tubes(path, SMALL, clip.astype(np.float32), None, "t")
    with pytest.raises(InputError, match=r"ends in \.png"):
        plot.tubes(tmp_path / "tubes.svg", SMALL, clip, None, "t")
    with pytest.raises(InputError, match="there is no folder"):
        plot.tubes(tmp_path / "nowhere" / "tubes.png", SMALL, clip, None, "t")
    with pytest.raises(InputError, match=r"kernel of tube 1 is \(24, 3, 4, 6, 6\)"):
        plot.tubes(path, SMALL, clip, {1: np.zeros((24, 3, 4, 6, 6))}, "t")
    with pytest.raises(InputError, match="kernel for tube 7; the model has tubes 0 to 2"):
        plot.tubes(path, SMALL, clip, {7: np.zeros((24, 3, 4, 6, 6))}, "t")
    assert not list(tmp_path.iterdir())


def test_filters_before_and_after_training_are_drawn_in_pairs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    before = {i: rng.normal(size=(24, 3, *SMALL.tubes[i].kernel)) for i in SMALL.active}
    after = {i: kernel.copy() for i, kernel in before.items()}
    after[0][5] *= -3
    plot.training(tmp_path / "pairs.png", SMALL, before, after, "small")
    assert (tmp_path / "pairs.png").read_bytes().startswith(b"\x89PNG")
    chosen = plot.strongest(before[0], 1, by=after[0] - before[0])
    np.testing.assert_allclose(chosen, plot.strongest(before[0][5:6], 1))
    with pytest.raises(InputError, match=r"expected a name that ends in \.png"):
        plot.training(tmp_path / "pairs.jpg", SMALL, before, after, "small")
    with pytest.raises(InputError, match=r"the kernel of tube 1 is .*; expected \(D, C, \*\(8, 2, 4\)\)"):
        plot.training(tmp_path / "pairs.png", SMALL, before, after | {1: before[0]}, "small")
