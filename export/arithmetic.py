"""How far the same artifact's answers may lie apart on two sound machines.

A float16 artifact is computed in float32 on most x86 processors, and in float16, sums included, on ARM and on GPUs;
both are right. So the export simulates the roughest arithmetic that a target allows: the rewritten model runs in
float32, and behind every operator noise is added that is as large as that arithmetic's rounding. What this does to the
logits of the golden clips goes into the manifest, and `Runtime.check` allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from edgetube.export.static import Conv2d, Gather, Linear, MatMul, Pool, Slice, StaticBlock, StaticTubeViT
from edgetube.targets import Arithmetic
from edgetube.video import Frames

UNIT: dict[Arithmetic, float] = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-9}
"""Largest relative error of one rounding."""

SUMS: dict[Arithmetic, float] = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-24}
"""The same for the sums of a matrix product: products of bfloat16 are summed in float32 everywhere."""

DRAWS, CLIPS = 2, 3
"""Independent draws of the noise, and the most clips that are looked at."""

ROUNDED = (Linear, MatMul, Gather, Slice, Conv2d, Pool, StaticBlock, nn.LayerNorm, nn.Softmax, nn.GELU)
"""What gives out a tensor that a runtime may store in the target's type."""


def spread(module: StaticTubeViT, clips: Frames, arithmetic: Arithmetic) -> float:
    """Energy of the noise that an arithmetic leaves in the logits, as a share of their own energy.

    Args:
        clips: (N, T, H, W, 3) uint8; the first few are used.

    Returns:
        sum (noisy - exact)^2 / sum exact^2 over the logits of all clips, the mean of `DRAWS` draws.
    """
    clips = clips[:CLIPS]
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        exact = _logits(module, clips)
        with _rounding(module, arithmetic, generator):
            noise = [float(((_logits(module, clips) - exact) ** 2).sum()) for _ in range(DRAWS)]
    return float(np.mean(noise)) / max(float((exact**2).sum()), float(np.finfo(np.float64).tiny))


def _logits(module: StaticTubeViT, clips: Frames) -> Tensor:
    return torch.cat([module(torch.from_numpy(clip[None])) for clip in clips]).double()


@contextmanager
def _rounding(module: nn.Module, arithmetic: Arithmetic, generator: torch.Generator) -> Iterator[None]:
    """Noise behind every operator while the block runs."""
    with ExitStack() as stack:
        for part in module.modules():
            if isinstance(part, ROUNDED):
                stack.callback(part.register_forward_hook(_noise(arithmetic, generator)).remove)
        yield


def _noise(
    arithmetic: Arithmetic, generator: torch.Generator
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook that rounds what a module gives out.

    Rounding is uniform, up to half a unit: its deviation is u |y| / sqrt(3). A sum of K terms is rounded K times, while
    it grows like a random walk: sum_k (k / K) y^2 u^2 / 3 = K y^2 u^2 / 6.
    """
    unit, sums = UNIT[arithmetic], SUMS[arithmetic]

    def hook(part: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> Tensor:
        rms = y.square().mean().sqrt()
        deviation = unit * y.abs() / 3**0.5 + sums * (terms(part, given) / 6) ** 0.5 * rms
        noisy: Tensor = y + deviation * torch.randn(y.shape, generator=generator)
        return noisy

    return hook


def terms(part: nn.Module, given: tuple[Tensor, ...]) -> int:
    """How many products a module sums for one value of its output; 0 where it multiplies no matrices."""
    if isinstance(part, Linear | Gather | Slice):
        return part.weight.shape[0]
    if isinstance(part, Conv2d):
        return part.weight[0].numel()
    return given[0].shape[-1] if isinstance(part, MatMul) else 0
