"""The voxels that tubes read, against a convolution's own gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edgetube import voxels
from edgetube.spec import ModelSpec, TubeSpec, named

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


def read_by_convolution(tube: TubeSpec, clip: tuple[int, int, int]) -> np.ndarray:
    """Where a convolution of ones has a gradient, cropped to whole tokens: (T, H, W) bool."""
    x = torch.zeros(1, 1, *clip, requires_grad=True)
    t, h, w = tube.offset
    y = F.conv3d(x[:, :, t:, h:, w:], torch.ones(1, 1, *tube.kernel), stride=tube.conv_stride)
    keep = [g * s for g, s in zip(tube.grid(clip), tube.space_to_depth, strict=True)]
    y[0, 0, : keep[0], : keep[1], : keep[2]].sum().backward()
    assert x.grad is not None
    return (x.grad[0, 0] > 0).numpy()


@pytest.mark.parametrize("tube", [*SMALL.tubes, TubeSpec((3, 5, 7), (1, 2, 3), (2, 0, 1))], ids=str)
def test_boxes_are_the_voxels_that_a_convolution_reads(tube: TubeSpec) -> None:
    clip = SMALL.clip
    expected = read_by_convolution(tube, clip)
    assert expected.any()
    np.testing.assert_array_equal(voxels.mask([tube], clip), expected)
    boxes = voxels.boxes(tube, clip)
    assert boxes.shape == (tube.tokens(clip) * tube.merge, 3, 2)
    assert len(np.unique(boxes, axis=0)) == len(boxes)


def test_the_papers_tubes_touch_a_tenth_of_the_clip() -> None:
    assert voxels.touched(named("tubevit-b")) == pytest.approx(0.105, abs=5e-4)
    assert voxels.touched(named("tubevit-b-s2d")) == pytest.approx(0.175, abs=5e-4)
    assert voxels.touched(named("tubevit-b", frames=1)) == 1.0  # the 2-D tube tiles an image


def test_touched_counts_shared_voxels_once() -> None:
    tube = TubeSpec((2, 4, 4), (2, 4, 4))
    spec = ModelSpec(tubes=(tube, tube, TubeSpec((1, 2, 2), (4, 4, 4))), frames=4, size=(8, 12), **HEAD)
    assert voxels.touched(spec) == 1.0
    assert voxels.touched(replace(spec, tubes=spec.tubes[2:])) == 4 / 64
