"""Tubes whose kernels start from the patches of an image model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from edgetube import tubesets
from edgetube.errors import InputError, SpecError
from edgetube.spec import PAPER_TUBES, TubeSpec

FLAT_STRIDE = 32
"""Frames from one picture of patches to the next, as in the paper."""

SETS = {
    name: tuple(tube for tube in tubes if not tube.is_2d)
    for name, tubes in {tubesets.DEFAULT: PAPER_TUBES, **tubesets.PRESETS}.items()
}
"""Tubes beside the patches: the paper's, and those of them in `tubesets.PRESETS`."""


def read_tubes(given: str) -> tuple[TubeSpec, ...]:
    """The tubes beside the patches: one of `SETS`, or a JSON file with a list of `TubeSpec`.

    Raises:
        InputError: there is no such set or file.
        SpecError: the file is not such a list.
    """
    if given in SETS:
        return SETS[given]
    path = Path(given)
    if not path.is_file():
        raise InputError(f"--tubes is {given!r}; expected {', '.join(SETS)}, or a JSON file with a list of tubes")
    return tuple(tubesets.read(path))


def with_patches(tubes: Sequence[TubeSpec], patch: TubeSpec) -> tuple[TubeSpec, ...]:
    """`tubes` with the patches of an image model: where they stand among them, else last.

    Raises:
        SpecError: another 2-D tube, which would make other tokens of an image.
    """
    flat = [tube for tube in tubes if tube.is_2d]
    if any(_in_space(tube) != _in_space(patch) or tube.offset[0] for tube in flat) or len(flat) > 1:
        raise SpecError(
            f"the tubes have {len(flat)} of one frame, {', '.join(map(str, flat))}; an image of this model is made of "
            f"{patch} with stride {patch.stride[1:]} from its first frame on: leave them out, or give that one alone"
        )
    if flat:
        return tuple(tubes)
    return (*tubes, TubeSpec(patch.kernel, (FLAT_STRIDE, *patch.stride[1:]), patch.offset))


def _in_space(tube: TubeSpec) -> tuple[object, ...]:
    return tube.kernel[1:], tube.stride[1:], tube.offset[1:], tube.space_to_depth


def from_patches(patch: Tensor, tube: TubeSpec, inflated: bool = False) -> Tensor:
    """A kernel (D / merge, C, kt, kh, kw) for `tube` from that of patches (D, C, 1, ph, pw).

    It answers kh x kw pixels as the patches answer them enlarged to ph x pw: about the kernel resized, times
    (ph pw) / (kh kw). It stands in the middle frame of the tube (zeros elsewhere), or as kt equal parts. A tube with
    space-to-depth takes the first filters.
    """
    flat = patch[: len(patch) // tube.merge, :, 0].detach()  # (D / S, C, ph, pw)
    kt, kh, kw = tube.kernel
    for axis, size in ((2, kh), (3, kw)):
        flat = torch.tensordot(flat, zoom(size, flat.shape[axis]), dims=([axis], [0])).movedim(-1, axis)
    if inflated:
        return (flat / kt).unsqueeze(2).repeat(1, 1, kt, 1, 1)
    kernel = flat.new_zeros(*flat.shape[:2], kt, kh, kw)
    kernel[:, :, kt // 2] = flat
    return kernel


def zoom(old: int, new: int) -> Tensor:
    """The matrix (new, old) that resizes a row of pixels linearly, antialiased."""
    rows = torch.eye(old)[None, None]
    return F.interpolate(rows, size=(new, old), mode="bilinear", antialias=True, align_corners=False)[0, 0]


def mapped(tube: TubeSpec, weight: Tensor, bias: Tensor, matrix: Tensor) -> tuple[TubeSpec, Tensor, Tensor]:
    """The tube that makes `matrix` (D, d) times the tokens of `tube`, with its kernel (D, C, kt, kh, kw) and bias (D,).

    A tube with space-to-depth becomes a plain one over all that its tokens span.
    """
    plain = TubeSpec(tube.extent, tube.stride, tube.offset)
    kernel = weight.new_zeros(len(matrix), weight.shape[1], *plain.kernel)
    neighbours = itertools.product(*map(range, tube.space_to_depth))
    for part, place in zip(matrix.split(len(weight), dim=1), neighbours, strict=True):
        t, h, w = (slice(i * s, i * s + k) for i, s, k in zip(place, tube.conv_stride, tube.kernel, strict=True))
        kernel[:, :, t, h, w] += torch.einsum("Dd,dcthw->Dcthw", part, weight)
    return plain, kernel, matrix @ bias.repeat(tube.merge)


def mapping(small: Tensor, large: Tensor) -> tuple[Tensor, float]:
    """The matrix (D, d) that makes the patch filters `large` (D, C, 1, ph, pw) of filters (d, C, 1, qh, qw).

    It is the one of least squares, between filters at the size of `large`.

    Returns:
        The matrix, and the share of the energy of `large` that it explains, 0..1.
    """
    like = from_patches(small, TubeSpec((1, *large.shape[3:]), (1, 1, 1)))  # (d, C, 1, ph, pw)
    rows, wanted = like.flatten(1).double(), large.detach().flatten(1).double()  # (d, K), (D, K)
    found = torch.linalg.lstsq(rows.T, wanted.T, driver="gelsd").solution.T  # (D, d)
    rest = (wanted - found @ rows).square().sum() / wanted.square().sum()
    return found.float(), 1 - float(rest)
