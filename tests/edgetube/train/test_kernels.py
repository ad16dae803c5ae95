"""Kernels of tubes from those of patches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edgetube import demo
from edgetube.contract import InputContract
from edgetube.errors import InputError, SpecError
from edgetube.model.transformer import tube_tokens
from edgetube.runtimes.torch import normalise
from edgetube.spec import PAPER_TUBES, TubeSpec
from edgetube.train import kernels


def patches(width: int = 6, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    return torch.randn(width, 3, 1, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tube", PAPER_TUBES)
@pytest.mark.parametrize("inflated", [False, True])
def test_equal_pixels_are_answered_as_patches_answer_them(tube: TubeSpec, inflated: bool) -> None:
    patch = patches()
    made = kernels.from_patches(patch, tube, inflated)
    assert made.shape == (6, 3, *tube.kernel)
    torch.testing.assert_close(made.sum(dim=(2, 3, 4)), patch.sum(dim=(2, 3, 4)), rtol=1e-4, atol=1e-3)


def test_a_region_is_answered_as_patches_answer_it_enlarged() -> None:
    patch, region = patches(), torch.rand(1, 3, 8, 12)
    tube = TubeSpec((1, 8, 12), (1, 8, 12))
    large = torch.nn.functional.interpolate(region, size=(16, 16), mode="bilinear", align_corners=False)
    expected = (patch[:, :, 0] * large).sum(dim=(1, 2, 3))
    torch.testing.assert_close((kernels.from_patches(patch, tube)[:, :, 0] * region).sum(dim=(1, 2, 3)), expected)


def test_a_kernel_stands_in_the_middle_frame_or_in_all() -> None:
    tube = TubeSpec((4, 16, 16), (4, 16, 16))
    patch = patches()
    central = kernels.from_patches(patch, tube)
    torch.testing.assert_close(central[:, :, 2], patch[:, :, 0], rtol=0, atol=0)
    assert central[:, :, [0, 1, 3]].abs().max() == 0
    torch.testing.assert_close(kernels.from_patches(patch, tube, inflated=True).sum(2), patch[:, :, 0])


def test_neighbours_of_space_to_depth_take_the_first_filters() -> None:
    tube = TubeSpec((2, 16, 16), (4, 32, 32), (0, 0, 0), (1, 2, 1))
    patch = patches()
    torch.testing.assert_close(kernels.from_patches(patch, tube)[:, :, 1], patch[:3, :, 0], rtol=0, atol=0)


def test_tokens_of_photographs_are_as_large_as_those_of_patches() -> None:
    """Of smooth filters: a kernel of 4x4 without the factor would give tokens a sixteenth as large."""
    ramp = torch.linspace(-1, 1, 16)
    filters = [torch.cos(i * ramp[:, None] + j * ramp[None]) for i in range(3) for j in range(3)]
    patch = torch.stack(filters)[:, None, None].repeat(1, 3, 1, 1, 1) / 256
    contract = InputContract(32, 64, 64)
    x = normalise(torch.from_numpy(np.stack([clip.frames for clip in demo.scenes(contract, 4)])), contract)
    sizes = [
        float(tube_tokens(x, tube, kernels.from_patches(patch, tube), torch.zeros(9), tube.grid((32, 64, 64))).std())
        for tube in PAPER_TUBES
    ]
    assert all(0.6 < size / sizes[-1] < 1.6 for size in sizes[:-1])


def test_sets_and_files_of_tubes(tmp_path: Path) -> None:
    patch = TubeSpec((1, 14, 14), (1, 14, 14))
    assert kernels.with_patches(kernels.read_tubes("default"), patch) == (
        *PAPER_TUBES[:3],
        TubeSpec((1, 14, 14), (32, 14, 14)),
    )
    assert sum(tube.tokens((32, 224, 224)) for tube in kernels.read_tubes("392")) == 392 - 196
    file = tmp_path / "tubes.json"
    own = [{"kernel": [1, 14, 14], "stride": [8, 14, 14]}, {"kernel": [4, 8, 8], "stride": [8, 16, 16]}]
    file.write_text(json.dumps(own))
    found = kernels.with_patches(kernels.read_tubes(str(file)), patch)
    assert found == (TubeSpec((1, 14, 14), (8, 14, 14)), TubeSpec((4, 8, 8), (8, 16, 16)))
    with pytest.raises(InputError, match="--tubes is 'none'; expected default, 392, or a JSON file"):
        kernels.read_tubes("none")
    for text, message in (
        ("{}", r"tubes\.json is {}; expected a list"),
        ('[{"stride": [1, 2, 3]}]', "kernel"),
        ("[3]", "TubeSpec is 3"),
        (40 * "[" + 40 * "]", "deeper than"),
        ("[" * 100_000, "deeper than"),
    ):
        file.write_text(text)
        with pytest.raises(SpecError, match=message):
            kernels.read_tubes(str(file))


def test_a_mapped_tube_with_space_to_depth_makes_the_mapped_tokens() -> None:
    tube = TubeSpec((3, 2, 4), (4, 6, 8), (1, 1, 0), (2, 3, 1))
    generator = torch.Generator().manual_seed(0)
    weight, bias, matrix, clip = (
        torch.randn(shape, generator=generator) for shape in ((2, 3, *tube.kernel), (2,), (5, 12), (1, 3, 12, 17, 18))
    )
    plain, kernel, shift = kernels.mapped(tube, weight, bias, matrix)
    grid = tube.grid((12, 17, 18))
    assert plain.grid((12, 17, 18)) == grid
    expected = tube_tokens(clip, tube, weight, bias, grid) @ matrix.T
    torch.testing.assert_close(tube_tokens(clip, plain, kernel, shift, grid), expected, rtol=1e-4, atol=1e-4)


def test_a_map_between_filters_is_found_and_its_share_said() -> None:
    small, matrix = patches(8), torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    found, explained = kernels.mapping(small, torch.einsum("Dd,dcthw->Dcthw", matrix, small))
    torch.testing.assert_close(found, matrix, rtol=1e-4, atol=1e-4)
    assert explained == pytest.approx(1)
    _, explained = kernels.mapping(patches(8)[:4], patches(8)[4:])
    assert 0 <= explained < 0.1
