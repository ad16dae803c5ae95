"""Simulates low-precision arithmetic, to bound how much one artifact's logits may differ between machines.

A float16 artifact is computed in float32 on most x86 processors, and in float16, sums included, on ARM and on GPUs;
both are correct. The export simulates the least precise arithmetic that a target allows: the rewritten model runs in
float32 on constants rounded as that arithmetic does, and noise of the size of its rounding is added to the output of
every operator. The resulting error of the golden clips' logits goes into the manifest as the tolerance of
`Runtime.check`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from edgetube.export.reduction import First, MatMul, Target
from edgetube.export.static import Pool, QuickGelu, Rotate, StaticBlock, StaticTransformer
from edgetube.export.tokenizer import Conv2d, Gather, Linear, Slice
from edgetube.model.transformer import Act
from edgetube.targets import Arithmetic
from edgetube.video import Frames

UNIT_ROUNDOFF: dict[Arithmetic, float] = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-9}
"""Unit roundoff: largest relative error of one rounding."""

SUM_ROUNDOFF: dict[Arithmetic, float] = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-24}
"""Unit roundoff of the accumulator of a matrix product: bfloat16 is accumulated in float32 everywhere."""

STORED: dict[Arithmetic, torch.dtype] = {"bfloat16": torch.bfloat16}
"""The type that constants are rounded to where artifacts store them in a wider one. No artifact stores bfloat16, while
float16 constants are in the file, the same for every machine. Their errors are equal in all tokens: a mean over tokens
leaves them, and noise on the outputs alone would miss them."""

NOISE_DRAWS, MAX_CLIPS = 2, 3
"""Independent draws of the noise, and the most clips that are used."""

ARITHMETIC_MARGIN = 3.0
"""Factor on the energy of the simulated arithmetic, 4.8 dB. On aarch64 (ONNX Runtime under QEMU) the built-in model in
float16 reached 32.5 dB where 34.9 are simulated: rounding errors of one layer are not independent of the next one's."""

PREFIXES = 8
"""Places in a sum where its partial sum is looked at."""

ROUNDED_MODULES = (
    Linear,
    MatMul,
    Gather,
    Slice,
    Conv2d,
    Pool,
    Rotate,
    StaticBlock,
    nn.LayerNorm,
    nn.Softmax,
    nn.GELU,
    QuickGelu,
    Act,
)
"""Modules whose outputs a runtime may round to the target's type."""

DECIDING_MODULES = (First, Target)
"""Modules whose outputs, integers, say which tokens leave; see `edgetube.roles.GraphRoles.decisions`."""


class NoiseSimulation:
    """A model under simulated arithmetics; what does not depend on the arithmetic is computed once.

    Args:
        clips: (N, T, H, W, 3) uint8; the first few are used.
    """

    def __init__(self, module: StaticTransformer, clips: Frames) -> None:
        self.module, self.clips = module, clips[:MAX_CLIPS]
        with torch.inference_mode(), _recorded(module) as self.decisions:
            self.exact = _logits(module, self.clips)
        with torch.inference_mode():
            self.walks = _walks(module, self.clips[:1])

    def logit_noise(self, arithmetic: Arithmetic, decided: bool = False) -> float:
        """Energy of the error of the logits under an arithmetic, relative to the energy of the logits.

        Args:
            decided: the tokens leave that leave without noise.

        Returns:
            sum (noisy - exact)^2 / sum exact^2 over the logits of all clips, the mean of `NOISE_DRAWS` draws.
        """
        generator = torch.Generator().manual_seed(0)
        noise = partial(_add_noise, self.walks, UNIT_ROUNDOFF[arithmetic], SUM_ROUNDOFF[arithmetic], generator)
        with torch.inference_mode(), _stored(self.module, STORED.get(arithmetic)), _hooked(self.module, noise):
            errors = []
            for _ in range(NOISE_DRAWS):
                with _replayed(self.decisions if decided else {}):
                    errors.append(float(((_logits(self.module, self.clips) - self.exact) ** 2).sum()))
        return float(np.mean(errors)) / max(float((self.exact**2).sum()), float(np.finfo(np.float64).tiny))


def _logits(module: StaticTransformer, clips: Frames) -> Tensor:
    return torch.cat([module(torch.from_numpy(clip[None])) for clip in clips]).double()


Hook: TypeAlias = Callable[[nn.Module, tuple[Tensor, ...], Tensor], "Tensor | None"]


@contextmanager
def _hooked(module: nn.Module, hook: Hook) -> Iterator[None]:
    """Context manager: calls `hook` after every operator, which may replace its output."""
    with ExitStack() as stack:
        for part in module.modules():
            if isinstance(part, ROUNDED_MODULES):
                stack.callback(part.register_forward_hook(hook).remove)
        yield


@contextmanager
def _recorded(module: nn.Module) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """Context manager: which tokens leave, in each call of the modules that decide it."""
    found: dict[nn.Module, list[Tensor]] = {}
    with ExitStack() as stack:
        for part in module.modules():
            if isinstance(part, DECIDING_MODULES):
                kept = found.setdefault(part, [])
                stack.callback(part.register_forward_hook(lambda _, __, y, kept=kept: kept.append(y)).remove)
        yield found


@contextmanager
def _replayed(decisions: Mapping[nn.Module, Sequence[Tensor]]) -> Iterator[None]:
    """Context manager: the modules decide, call for call, what they did then."""
    with ExitStack() as stack:
        for part, kept in decisions.items():
            again = iter(kept)
            stack.callback(part.register_forward_hook(lambda *_, again=again: next(again)).remove)
        yield


@contextmanager
def _stored(module: nn.Module, kind: torch.dtype | None) -> Iterator[None]:
    """Context manager: the constants of a module are rounded to a type; None leaves them."""
    constants = [*module.parameters(), *module.buffers()] if kind is not None else []
    with ExitStack() as stack:
        for value in constants:
            if value.is_floating_point():
                stack.callback(setattr, value, "data", value.data)
                value.data = value.data.to(kind).to(value.dtype)
        yield


def _add_noise(
    walks: dict[nn.Module, Tensor],
    unit: float,
    sums: float,
    generator: torch.Generator,
    part: nn.Module,
    _: tuple[Tensor, ...],
    y: Tensor,
) -> Tensor:
    """An operator's output with rounding noise.

    The error of one rounding is uniform: its variance is u^2 y^2 / 3. A sum is rounded each time a product is added,
    relative to the partial sum s_k that it has then: sum_k u^2 s_k^2 / 3.
    """
    variance = (unit * y).square() / 3
    if part in walks:
        variance = variance + sums**2 / 3 * walks[part]
    noisy: Tensor = y + variance.sqrt() * torch.randn(y.shape, generator=generator)
    return noisy


def _walks(module: StaticTransformer, clips: Frames) -> dict[nn.Module, Tensor]:
    """For each matrix product, sum_k s_k^2 by output channel: the mean over the rows of these clips."""
    found: dict[nn.Module, Tensor] = {}

    def look(part: nn.Module, given: tuple[Tensor, ...], _: Tensor) -> None:
        if count := products_per_sum(part, given):
            found[part] = count * _mean_square_of_partial_sums(part, given, count)

    with _hooked(module, look):
        _logits(module, clips)
    return found


def _mean_square_of_partial_sums(part: nn.Module, given: tuple[Tensor, ...], count: int) -> Tensor:
    """s_k^2 of each output channel, the mean over the rows and over k, which `PREFIXES` places stand for."""
    ends = sorted({round(count * (i + 0.5) / PREFIXES) for i in range(PREFIXES)})
    squares = [partial_sums(part, given, end).square().flatten(0, -2).mean(dim=0) for end in ends]
    return torch.stack(squares).mean(dim=0)


def partial_sums(part: nn.Module, given: tuple[Tensor, ...], count: int) -> Tensor:
    """The output of a matrix product, without its bias, of which only the first `count` products have been added."""
    if isinstance(part, MatMul):
        a, b = given
        return torch.matmul(a[..., :count], b[..., :count, :])
    assert isinstance(part, Linear | Gather | Slice | Conv2d)
    weight, bias = part.weight, getattr(part, "bias", None)
    added = torch.arange(products_per_sum(part, given)) < count
    part.weight = weight * added.reshape(weight.shape[1:] if isinstance(part, Conv2d) else (-1, 1))
    try:
        y: Tensor = part.forward(*given)
    finally:
        part.weight = weight
    return y if bias is None else y - bias


def products_per_sum(part: nn.Module, given: tuple[Tensor, ...]) -> int:
    """Number of products summed for one output value of a module; 0 where it multiplies no matrices."""
    if isinstance(part, Linear | Gather | Slice):
        return part.weight.shape[0]
    if isinstance(part, Conv2d):
        return part.weight[0].numel()
    return given[0].shape[-1] if isinstance(part, MatMul) else 0
