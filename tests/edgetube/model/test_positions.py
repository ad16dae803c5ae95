"""The fixed position embedding against the formula, one number at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from edgetube.errors import SpecError
from edgetube.model import positions
from edgetube.model.transformer import VideoTransformer
from edgetube.spec import PAPER_TUBES, PAPER_TUBES_S2D, ModelSpec, TubeSpec, named


def spans(tube: Any, axis: Any, size: Any) -> Iterator[Any]:
    """First and last voxel of every token along an axis, by sliding the tube until it leaves the clip."""
    merge = tube.space_to_depth[axis]
    reach = tube.kernel[axis] - 1 + (merge - 1) * (tube.stride[axis] // merge)
    first = tube.offset[axis]
    while first + reach < size:
        yield first, first + reach
        first += tube.stride[axis]


def by_hand(tubes: Any, clip: Any, width: Any) -> Any:
    """Rows of the table, one sine at a time, at the middle between the first and the last voxel of each token."""
    rows = []
    for tube in tubes:
        for times, heights, widths in product(*(list(spans(tube, axis, clip[axis])) for axis in range(3))):
            row = [0.0] * width
            for j in range(width // 6):
                omega = math.exp(-j * math.log(10000) / (width / 6))
                for place, (first, last) in enumerate((times, widths, heights)):  # t, x, y
                    row[6 * j + 2 * place] = math.sin((first + last) / 2 * omega)
                    row[6 * j + 2 * place + 1] = math.cos((first + last) / 2 * omega)
            rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("width", [192, 64, 12, 7, 5])
@pytest.mark.parametrize("tubes", [PAPER_TUBES, PAPER_TUBES_S2D], ids=["plain", "space-to-depth"])
def test_values_are_those_of_the_formula_at_the_centres(
    tubes: tuple[TubeSpec, TubeSpec, TubeSpec, TubeSpec], width: int
) -> None:
    clip = (32, 64, 96)
    points = np.concatenate([positions.centres(tube, tube.grid(clip)) for tube in tubes])
    expected = by_hand(tubes, clip, width)
    assert len(expected) == sum(tube.tokens(clip) for tube in tubes) > 50
    np.testing.assert_allclose(positions.embed(points, width), expected, atol=1e-11)


def test_the_table_of_a_model_is_the_one_that_it_adds() -> None:
    spec = named("tubevit-ti", 32, (64, 64), classes=2)
    expected = by_hand(spec.tubes, spec.clip, spec.width)
    np.testing.assert_allclose(positions.table(spec), expected, atol=1e-11)
    table = VideoTransformer(spec).positions
    assert table.dtype == torch.float32
    np.testing.assert_allclose(table.numpy(), expected, atol=1e-6)


def test_the_first_tokens_by_hand() -> None:
    """8x8x8 at the origin: centre 3.5 everywhere; 16x4x4 at (4, 8, 8): centre (11.5, 9.5, 9.5)."""
    assert positions.centres(PAPER_TUBES[0], (2, 7, 7))[0].tolist() == [3.5, 3.5, 3.5]
    assert positions.centres(PAPER_TUBES[1], (3, 7, 7))[[0, 1, 7, 49]].tolist() == [
        [11.5, 9.5, 9.5],
        [11.5, 9.5, 41.5],
        [11.5, 41.5, 9.5],
        [17.5, 9.5, 9.5],
    ]
    row = positions.embed(np.array([[2.0, 3.0, 5.0]]), 6)[0]  # (t, y, x); one frequency, omega = 1
    np.testing.assert_allclose(row, [f(v) for v in (2, 5, 3) for f in (math.sin, math.cos)], atol=1e-15)


@pytest.mark.parametrize("width", [64, 7, 5])
def test_channels_that_six_does_not_divide_are_untouched(width: int) -> None:
    table = positions.embed(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), width)
    left = 6 * (width // 6)
    assert left < width
    assert not table[:, left:].any()
    assert np.abs(table[:, :left]).min(initial=1.0) > 0


def test_an_image_has_the_positions_of_the_first_frame() -> None:
    video = named("tubevit-ti", 32, (64, 64), classes=2)
    image = video.with_clip(frames=1)
    np.testing.assert_array_equal(positions.table(image), positions.table(video)[-image.tokens :])
    assert set(positions.centres(PAPER_TUBES[3], image.grids[0])[:, 0]) == {0.0}


@pytest.mark.parametrize("clip", [(7, 32, 56), (3, 24, 16), (12, 16, 16), (4, 24, 24)])
def test_the_nearest_rows_of_a_stored_table(clip: tuple[int, int, int]) -> None:
    """Of n' coordinates, number i takes floor(i n / n'), over time as over space."""
    old = ModelSpec(
        (TubeSpec((1, 8, 8), (1, 8, 8)),),
        4,
        (24, 24),
        6,
        1,
        1,
        (("a", 2),),
        positions="stored",
        position_resize="nearest",
    )
    new = old.with_clip(clip[0], clip[1:])
    table = torch.randn(36, 6, generator=torch.Generator().manual_seed(0))
    grid = (clip[0], clip[1] // 8, clip[2] // 8)
    expected = [
        table.reshape(4, 3, 3, 6)[tuple(i * n // size for i, n, size in zip(at, (4, 3, 3), grid, strict=True))]
        for at in product(*map(range, grid))
    ]
    assert torch.equal(positions.resized(table, old, new), torch.stack(expected))
    assert torch.equal(positions.resized(table, old, old.with_clip(1)), table[:9])


def test_two_tokens_of_one_model_never_share_a_position() -> None:
    table = positions.table(named("tubevit-ti", 64))
    assert len(np.unique(table.round(9), axis=0)) == len(table) == 1176


def test_a_tube_s_centre_does_not_depend_on_space_to_depth_where_the_extents_agree() -> None:
    whole = TubeSpec((8, 4, 4), (8, 8, 8))
    halves = TubeSpec((4, 4, 4), (8, 8, 8), space_to_depth=(2, 1, 1))
    np.testing.assert_array_equal(positions.centres(whole, (2, 3, 3)), positions.centres(halves, (2, 3, 3)))


ANCHORED = ModelSpec(
    tubes=(
        TubeSpec((4, 8, 8), (4, 12, 12), (0, 4, 4)), TubeSpec((1, 8, 8), (4, 8, 8)), TubeSpec((2, 4, 4), (8, 28, 28)),
    ),
    frames=8, size=(32, 40), width=13, depth=1, heads=1, classifiers=(("a", 2),), positions="anchored",
)  # fmt: skip


def test_anchored_positions_take_the_grid_bilinearly_at_the_centres_and_add_times() -> None:
    """Against loops over tokens; the grid has a row of 5 places for each of 4."""
    model = VideoTransformer(ANCHORED)
    assert model.anchor is not None
    torch.nn.init.normal_(model.anchor.grid)
    torch.nn.init.constant_(model.anchor.time, 0.7)
    grid = model.anchor.grid.detach().double().numpy().reshape(4, 5, 13)
    expected = []
    for tube, shape in zip(ANCHORED.tubes, ANCHORED.grids, strict=True):
        for point in positions.centres(tube, shape):
            t, y, x = point[0], (point[1] - 3.5) / 8, (point[2] - 3.5) / 8
            y, x = min(max(y, 0), 3), min(max(x, 0), 4)
            top, left = min(int(y), 2), min(int(x), 3)
            v, u = y - top, x - left
            row = (1 - v) * ((1 - u) * grid[top, left] + u * grid[top, left + 1])
            row += v * ((1 - u) * grid[top + 1, left] + u * grid[top + 1, left + 1])
            for j in range(2):
                omega = 10000.0 ** (-j / (13 / 6))
                row[6 * j] += 0.7 * np.sin(t * omega)
                row[6 * j + 1] += 0.7 * (np.cos(t * omega) - 1)
            expected.append(row)
    assert len(expected) == ANCHORED.tokens
    np.testing.assert_allclose(model.position_rows().detach().numpy(), expected, atol=1e-5)
    image = model.position_rows(ANCHORED.with_clip(frames=1))
    assert torch.equal(image, model.anchor.grid)


def test_anchored_positions_need_one_2d_tube() -> None:
    for tubes in (ANCHORED.tubes[:1], (*ANCHORED.tubes, TubeSpec((1, 4, 4), (4, 4, 4)))):
        with pytest.raises(SpecError, match=r"anchored positions are those of one 2-D tube .* has [02] 2-D tubes"):
            replace(ANCHORED, tubes=tubes)
