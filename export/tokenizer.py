"""The tubes rewritten for export: from raw uint8 frames to embedded tokens, in operators that every runtime supports.

A tube is a convolution whose stride exceeds its kernel: it skips most voxels of the clip. Each lowering moves only the
bytes that are read into one matrix per tube, then casts them to float and multiplies. Mean and standard deviation are
folded into the weights and biases, biases and positions into one constant per token (`docs/lowering.md` has the
formulas). No tensor exceeds rank 5, every shape and index is a constant.
Letters: B clips, n tokens of a tube, N all tokens, S neighbours of space-to-depth, K voxels * colours of a kernel,
D width.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgetube.contract import InputContract
from edgetube.errors import SpecError
from edgetube.model.transformer import Tubes, VideoTransformer, tube_tokens
from edgetube.roles import tokenizer_roles
from edgetube.spec import ModelSpec, Triple, TubeSpec
from edgetube.video import Frames

LOWERINGS: tuple[str, ...] = ("gather", "slice", "conv2d")
"""Ways to move the voxels of a tube to its GEMM; all give the same tokens."""


class Linear(nn.Module):
    """x @ weight + bias with the weight kept as (K, N), the layout that runtimes pack once and then multiply by."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """`weight` (N, K) and `bias` (N,) as `nn.Linear` has them."""
        super().__init__()
        self.register_buffer("weight", weight.detach().float().T)  # a view: no second copy of a large model
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


def run_length(tube: TubeSpec, width: int) -> int:
    """Number of adjacent pixels, on rows of `width` pixels, that `gather` fetches as one element."""
    return math.gcd(tube.kernel[2], tube.conv_stride[2], tube.offset[2], width)


def run_indices(tube: TubeSpec, clip: Triple) -> npt.NDArray[np.int32]:
    """Indices of the runs of pixels of all tokens: (n * S * kt * kh * kw / run,), in that order, row-major.

    The flat clip is counted in runs of `run_length` pixels.
    """
    _, height, width = clip
    run = run_length(tube, width)
    rows = []
    for neighbour in neighbours(tube):
        starts = [
            o + s * np.arange(g)[:, None] + np.arange(k)  # (grid, kernel) voxels along one axis
            for o, s, g, k in zip(neighbour.offset, tube.stride, tube.grid(clip), tube.kernel, strict=True)
        ]
        t, h = starts[0][:, None, None, :, None, None], starts[1][None, :, None, None, :, None]
        w = starts[2][:, ::run][None, None, :, None, None, :]
        rows.append((((t * height + h) * width + w) // run).reshape(tube.tokens(clip), -1))
    return np.stack(rows, axis=1).reshape(-1).astype(np.int32)


def neighbours(tube: TubeSpec) -> list[TubeSpec]:
    """A space-to-depth tube as plain tubes, one per neighbour: same kernel and stride, shifted offsets."""
    (ot, oh, ow), (st, sh, sw) = tube.offset, tube.conv_stride
    return [
        TubeSpec(tube.kernel, tube.stride, (ot + dt * st, oh + dh * sh, ow + dw * sw))
        for dt, dh, dw in itertools.product(*map(range, tube.space_to_depth))
    ]


class Gather(nn.Module):
    """One constant Gather of whole pixel runs from the flat clip, one Cast, one GEMM."""

    weight: Tensor
    index: Tensor

    def __init__(self, tube: TubeSpec, clip: Triple, weight: Tensor) -> None:
        super().__init__()
        self.run = 3 * run_length(tube, clip[2])  # bytes
        self.rows, self.merge = tube.tokens(clip), tube.merge
        self.register_buffer("index", torch.from_numpy(run_indices(tube, clip)))
        self.register_buffer("weight", gemm_weight(weight))  # (K, D / S)

    def forward(self, frames: Tensor) -> Tensor:
        batch = frames.shape[0]
        runs = frames.reshape(batch, -1, self.run).index_select(1, self.index)  # (B, n * S * K / run, run)
        voxels = runs.reshape(batch, self.rows * self.merge, -1).float()  # (B, n * S, K)
        return concatenate_neighbours(torch.matmul(voxels, self.weight), self.merge)  # (B, n, D)


def gemm_weight(weight: Tensor) -> Tensor:
    """Convolution kernel (D / S, C, kt, kh, kw) as a matrix (K, D / S), rows in the order of gathered voxels."""
    return weight.permute(2, 3, 4, 1, 0).flatten(0, 3).contiguous()


def concatenate_neighbours(x: Tensor, merge: int) -> Tensor:
    """Tokens (B, n, D) of convolution outputs (B, n * S, D / S): free, because neighbours are adjacent rows."""
    return x if merge == 1 else x.reshape(x.shape[0], -1, merge * x.shape[2])


def windows(x: Tensor, axis: int, start: int, stride: int, kernel: int, count: int) -> Tensor:
    """`count` windows of `kernel`, `stride` apart, along `axis`: that axis becomes two, (count, kernel).

    One reshape and one slice where whole strides fit into the axis; where only the last stride sticks out, its
    window is sliced on its own; windows that overlap are sliced one by one.
    """
    size = x.shape[axis]
    lead = max(0, start + count * stride - size)  # how far to begin early so that the strides end inside
    if lead <= start and lead + kernel <= stride:
        strides = x.narrow(axis, start - lead, count * stride).unflatten(axis, (count, stride))
        return strides.narrow(axis + 1, lead, kernel)
    if kernel <= stride and count > 1:
        last = x.narrow(axis, start + (count - 1) * stride, kernel).unsqueeze(axis)
        return torch.cat([windows(x, axis, start, stride, kernel, count - 1), last], dim=axis)
    return torch.stack([x.narrow(axis, start + i * stride, kernel) for i in range(count)], dim=axis)


def frame_windows(x: Tensor, batch: int, tube: TubeSpec, count: int, late: bool) -> Tensor:
    """Frames x (B * T, ...) of all windows in time (B * count * kt, ...), or x unchanged at the wrong time.

    Overlapping windows copy frames, so they are cut late, after each frame has been cropped.
    """
    if late != (tube.kernel[0] > tube.stride[0]):
        return x
    cut = windows(x.reshape(batch, x.shape[0] // batch, -1), 1, tube.offset[0], tube.stride[0], tube.kernel[0], count)
    return cut.reshape(-1, *x.shape[1:])


class Slice(nn.Module):
    """Static slices, one axis after the other, one Cast, one GEMM."""

    weight: Tensor

    def __init__(self, tube: TubeSpec, clip: Triple, weight: Tensor) -> None:
        super().__init__()
        self.grid, self.parts = tube.grid(clip), neighbours(tube)
        self.register_buffer("weight", gemm_weight(weight))  # (K, D / S)

    def forward(self, frames: Tensor) -> Tensor:
        rows = [self.voxels(frames, part) for part in self.parts]  # S of (B, n, K)
        voxels = rows[0] if len(rows) == 1 else torch.stack(rows, dim=2).flatten(1, 2)  # (B, n * S, K)
        return concatenate_neighbours(torch.matmul(voxels.float(), self.weight), len(rows))  # (B, n, D)

    def voxels(self, frames: Tensor, tube: TubeSpec) -> Tensor:
        """The bytes (B, n, K) that a plain tube reads."""
        batch, _, height, width, _ = frames.shape
        (gt, gh, gw), (kt, kh, kw) = self.grid, tube.kernel
        (_, oh, ow), (_, sh, sw) = tube.offset, tube.stride
        x = frame_windows(frames.reshape(-1, height, width * 3), batch, tube, gt, late=False)  # (F, H, W 3)
        x = windows(x, 1, oh, sh, kh, gh)  # (F, gh, kh, W 3)
        x = windows(x.reshape(-1, kh, width * 3), 2, 3 * ow, 3 * sw, 3 * kw, gw)  # (F gh, kh, gw, kw 3)
        x = x.transpose(1, 2).reshape(-1, gh * gw, kh * kw * 3)  # (F, gh gw, kh kw 3)
        x = frame_windows(x, batch, tube, gt, late=True)  # (B gt kt, gh gw, kh kw 3)
        x = x.reshape(batch * gt, kt, gh * gw, -1).transpose(1, 2)  # (B gt, gh gw, kt, kh kw 3)
        return x.reshape(batch, gt * gh * gw, -1)  # (B, n, K)


class Conv2d(nn.Module):
    """The voxels read, packed together; a tube's frames as channels; one Cast, one 2-D convolution."""

    weight: Tensor

    def __init__(self, tube: TubeSpec, clip: Triple, weight: Tensor) -> None:
        super().__init__()
        self.grid, self.parts = tube.grid(clip), neighbours(tube)
        self.register_buffer("weight", weight.transpose(1, 2).flatten(1, 2).contiguous())  # (D / S, kt * C, kh, kw)

    def forward(self, frames: Tensor) -> Tensor:
        rows = [self.tokens(frames, part) for part in self.parts]  # S of (B, n, D / S)
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=2)  # (B, n, D)

    def tokens(self, frames: Tensor, tube: TubeSpec) -> Tensor:
        """Tokens (B, n, D / S) of a plain tube."""
        batch, _, height, width, _ = frames.shape
        (gt, gh, gw), (kt, kh, kw) = self.grid, tube.kernel
        (_, oh, ow), (_, sh, sw) = tube.offset, tube.stride
        x = frame_windows(frames.reshape(-1, height, width * 3), batch, tube, gt, late=False)  # (F, H, W 3)
        x, sh = squeeze(x, 1, oh, sh, kh, gh)  # (F, H', W 3)
        x, sw = squeeze(x.reshape(x.shape[0], -1, width, 3), 2, ow, sw, kw, gw)  # (F, H', W', 3)
        x = frame_windows(x, batch, tube, gt, late=True)  # (B gt kt, H', W', 3)
        x = x.permute(0, 3, 1, 2).reshape(batch * gt, kt * 3, x.shape[1], x.shape[2])  # (B gt, kt C, H', W')
        y = F.conv2d(x.float(), self.weight, stride=(sh, sw))  # (B gt, D / S, gh, gw)
        return y.flatten(2).transpose(1, 2).reshape(batch, gt * gh * gw, -1)  # (B, n, D / S)


def squeeze(x: Tensor, axis: int, start: int, stride: int, kernel: int, count: int) -> tuple[Tensor, int]:
    """`axis` reduced to the voxels that a convolution reads, and the stride on the reduced axis."""
    if kernel < stride:
        return windows(x, axis, start, stride, kernel, count).flatten(axis, axis + 1), kernel
    return x.narrow(axis, start, stride * (count - 1) + kernel), stride


_TUBES = {"gather": Gather, "slice": Slice, "conv2d": Conv2d}


class StaticTokenizer(nn.Module):
    """Embedded tokens (B, N, D) float32, positions and biases added, of uint8 frames (B, T, H, W, 3).

    Equal to `Tubes` on normalised clips plus the position table. Children are named by the tube's index.
    """

    output = "tokens"
    bias: Tensor

    def __init__(
        self, model: VideoTransformer, contract: InputContract, lowering: str = "gather", batch: int = 1
    ) -> None:
        """
        Raises:
            SpecError: the lowering is unknown, or the contract's clip or colours are not the model's.
        """
        super().__init__()
        self.spec = lowered_spec(model.spec, contract, lowering)
        self.roles = tokenizer_roles(self.spec)
        self.contract, self.lowering, self.batch = contract, lowering, batch
        biases = []
        for i, grid in zip(self.spec.active, self.spec.grids, strict=True):
            tube = self.spec.tubes[i]
            weight, bias = fold(model.tubes.weight(i), model.tubes.biases[i], contract)
            self.add_module(str(i), _TUBES[lowering](tube, self.spec.encoded, weight))
            biases.append(bias.repeat(tube.merge).expand(math.prod(grid), -1))
        constant = torch.cat(biases) + model.position_rows().detach().double()
        self.register_buffer("bias", constant.float())  # (N, D)

    def forward(self, frames: Tensor) -> Tensor:
        if self.spec.per_frame:
            frames = frames.reshape(-1, *self.spec.encoded, 3)  # (B T, 1, H, W, 3)
        tokens = [tube(frames) for tube in self.children()]  # each (B, n, D)
        return (tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)) + self.bias  # (B, N, D)


def lowered_spec(spec: ModelSpec, contract: InputContract, lowering: str) -> ModelSpec:
    """`spec`, checked for `lowering` on the clips of `contract`.

    Raises:
        SpecError: it cannot.
    """
    if lowering not in LOWERINGS:
        raise SpecError(f"no lowering is called {lowering!r}; there are {', '.join(LOWERINGS)}")
    if spec.clip != contract.shape[:3]:
        raise SpecError(f"the input is {contract.shape[:3]} but the model takes clips {spec.clip}; use Checkpoint.at")
    if spec.channels != len(contract.mean):
        raise SpecError(f"the model has {spec.channels} channels; frames (T, H, W, 3) have {len(contract.mean)}")
    return spec


def fold(weight: Tensor, bias: Tensor, contract: InputContract) -> tuple[Tensor, Tensor]:
    """Kernel (float32) and bias (float64) for raw 0..255 pixels, from those for normalised pixels.

    W ((u / 255 - mean) / std) + b  =  W / (255 std) u  +  b - sum(W mean / std)
    """
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None, None] for v in (contract.mean, contract.std))
    exact = weight.detach().double() / std
    return (exact / 255).float(), bias.detach().double() - (exact * mean).sum(dim=(1, 2, 3, 4))


@dataclass(frozen=True)
class LoweringError:
    """Error of one lowering's tokens against the reference tokenizer in float64.

    Attributes:
        max_abs: largest absolute error of a token.
        share: largest error relative to the error bound of float32 arithmetic for that value, see `_rounding`.
    """

    max_abs: float
    share: float

    @property
    def sound(self) -> bool:
        """Whether float32 rounding explains the error; false for NaN."""
        return self.share <= 1

    def __str__(self) -> str:
        return f"{self.max_abs:.1e}, {self.share:.3g} times what float32 rounding explains"


def tokenizer_errors(
    model: VideoTransformer, contract: InputContract, clips: Frames, lowerings: Sequence[str] = LOWERINGS
) -> dict[str, LoweringError]:
    """The error of each lowering's tokens on uint8 clips (B, T, H, W, 3), by its name.

    The reference tokenizer runs in float64: its own float32 rounding is as large as that of a lowering.

    Raises:
        SpecError: a lowering is unknown, or the clips or the contract do not fit the model.
    """
    frames = torch.from_numpy(clips)
    with torch.no_grad():
        exact = copy.deepcopy(model.tubes).double()
        positions = model.position_rows().double()
        sequences = frames.reshape(-1, *model.spec.encoded, frames.shape[-1])
        expected = exact(_pixels(sequences, contract)) + positions
        allowed = _rounding(exact, positions, sequences, contract)
        errors = {
            name: (StaticTokenizer(model, contract, name)(frames).double() - expected).abs() for name in lowerings
        }
    return {name: LoweringError(float(error.max()), float((error / allowed).max())) for name, error in errors.items()}


def _pixels(frames: Tensor, contract: InputContract, sign: int = -1) -> Tensor:
    """Normalised pixels (B, C, T, H, W) float64 of frames (B, T, H, W, C) uint8; `sign` 1 adds the mean instead."""
    mean, std = (torch.tensor(value, dtype=torch.float64) for value in (contract.mean, contract.std))
    return ((frames.double() / 255 + sign * mean) / std).permute(0, 4, 1, 2, 3)


def _rounding(tubes: Tubes, positions: Tensor, frames: Tensor, contract: InputContract) -> Tensor:
    """Error (B, N, D) that each token may have because a lowering computes it in float32.

    A sum of K products a_k is off by at most eps sqrt(K) sum |a_k|, whatever the order: the usual probabilistic bound
    (Higham and Mary, SISC 2019); a lowering adds the products of raw pixels and the folded mean, which is why it is
    sum |W| (u / 255 + mean) / std and not the token that counts. A few more eps are for the weights' own rounding.
    """
    pixels, spec = _pixels(frames, contract, sign=1), tubes.spec
    parts = []
    for i, grid in zip(spec.active, spec.grids, strict=True):
        tube, kernel = spec.tubes[i], tubes.weight(i).abs()
        terms = tube_tokens(pixels, tube, kernel, tubes.biases[i].abs(), grid)  # (B, n, D) of sum |a_k|
        parts.append((8 + math.sqrt(kernel[0].numel())) * terms)
    return torch.finfo(torch.float32).eps * (torch.cat(parts, dim=1) + 8 * positions.abs())
