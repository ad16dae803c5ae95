"""Simulates low-precision arithmetic, to bound how much one artifact's logits may differ between machines.

A float16 artifact is computed in float32 on most x86 processors, and in float16, sums included, on ARM and on GPUs;
both are correct. The export simulates the least precise arithmetic that a target allows: the rewritten model runs in
float32, and noise of the size of that arithmetic's rounding is added to the output of every operator. The resulting
error of the golden clips' logits goes into the manifest as the tolerance of `Runtime.check`.
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

UNIT_ROUNDOFF: dict[Arithmetic, float] = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-9}
"""Unit roundoff: largest relative error of one rounding."""

SUM_ROUNDOFF: dict[Arithmetic, float] = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-24}
"""Unit roundoff of the accumulator of a matrix product: bfloat16 is accumulated in float32 everywhere."""

NOISE_DRAWS, MAX_CLIPS = 2, 3
"""Independent draws of the noise, and the most clips that are used."""

ROUNDED_MODULES = (Linear, MatMul, Gather, Slice, Conv2d, Pool, StaticBlock, nn.LayerNorm, nn.Softmax, nn.GELU)
"""Modules whose outputs a runtime may round to the target's type."""


def logit_noise(module: StaticTubeViT, clips: Frames, arithmetic: Arithmetic) -> float:
    """Energy of the error of the logits under an arithmetic, relative to the energy of the logits.

    Args:
        clips: (N, T, H, W, 3) uint8; the first few are used.

    Returns:
        sum (noisy - exact)^2 / sum exact^2 over the logits of all clips, the mean of `NOISE_DRAWS` draws.
    """
    clips = clips[:MAX_CLIPS]
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        exact = _logits(module, clips)
        with _rounding(module, arithmetic, generator):
            noise = [float(((_logits(module, clips) - exact) ** 2).sum()) for _ in range(NOISE_DRAWS)]
    return float(np.mean(noise)) / max(float((exact**2).sum()), float(np.finfo(np.float64).tiny))


def _logits(module: StaticTubeViT, clips: Frames) -> Tensor:
    return torch.cat([module(torch.from_numpy(clip[None])) for clip in clips]).double()


@contextmanager
def _rounding(module: nn.Module, arithmetic: Arithmetic, generator: torch.Generator) -> Iterator[None]:
    """Context manager: adds rounding noise to the output of every operator."""
    with ExitStack() as stack:
        for part in module.modules():
            if isinstance(part, ROUNDED_MODULES):
                stack.callback(part.register_forward_hook(_noise(arithmetic, generator)).remove)
        yield


def _noise(
    arithmetic: Arithmetic, generator: torch.Generator
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A forward hook that adds rounding noise to a module's output.

    A rounding error is uniform: its deviation is u |y| / sqrt(3). A sum of K terms is rounded K times while it grows
    like a random walk: sum_k (k / K) y^2 u^2 / 3 = K y^2 u^2 / 6.
    """
    unit, sums = UNIT_ROUNDOFF[arithmetic], SUM_ROUNDOFF[arithmetic]

    def hook(part: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> Tensor:
        rms = y.square().mean().sqrt()
        deviation = unit * y.abs() / 3**0.5 + sums * (products_per_sum(part, given) / 6) ** 0.5 * rms
        noisy: Tensor = y + deviation * torch.randn(y.shape, generator=generator)
        return noisy

    return hook


def products_per_sum(part: nn.Module, given: tuple[Tensor, ...]) -> int:
    """Number of products summed for one output value of a module; 0 where it multiplies no matrices."""
    if isinstance(part, Linear | Gather | Slice):
        return part.weight.shape[0]
    if isinstance(part, Conv2d):
        return part.weight[0].numel()
    return given[0].shape[-1] if isinstance(part, MatMul) else 0
