"""The reference model: a sparse-tube video transformer in plain PyTorch.

"Rethinking Video ViTs: Sparse Video Tubes for Joint Image and Video Learning" (Piergiovanni, Kuo, Angelova,
CVPR 2023). Users train this model, and every artifact is compared with it; `edgetube.export.static` is the fast form.
Letters: B clips, T frames, H, W pixels, C colours, N tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgetube.errors import InputError
from edgetube.model import positions
from edgetube.spec import ModelSpec, TubeSpec


class Tubes(nn.Module):
    """The tokenizer: one strided 3-D convolution per tube, their outputs laid end to end.

    With `spec.kernel` set there is one shared `kernel` (D, C, *kernel) that is resized trilinearly to each tube's
    shape (a space-to-depth tube takes its first D / merge filters), else each tube has its own `weights[i]`
    (D / merge, C, kt, kh, kw); a bias (D / merge) per tube either way.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        shapes = [(spec.width // tube.merge, spec.channels, *tube.kernel) for tube in spec.tubes]
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(shape[0])) for shape in shapes)
        if spec.kernel is not None:
            self.kernel = nn.Parameter(_lecun(torch.empty(spec.width, spec.channels, *spec.kernel)))
        else:
            self.weights = nn.ParameterList(nn.Parameter(_lecun(torch.empty(shape))) for shape in shapes)

    def weight(self, index: int) -> Tensor:
        """Convolution kernel of tube `index`: (D / merge, C, kt, kh, kw)."""
        if self.spec.kernel is None:
            return self.weights[index]
        tube = self.spec.tubes[index]
        shared = self.kernel[: self.spec.width // tube.merge]
        return F.interpolate(shared, size=tube.kernel, mode="trilinear", align_corners=False)

    def forward(self, x: Tensor, spec: ModelSpec | None = None) -> Tensor:
        """Tokens (B, N, D) of normalised clips x (B, C, T, H, W)."""
        spec = spec or self.spec
        tokens = [
            tube_tokens(x, spec.tubes[i], self.weight(i), self.biases[i], grid)  # (B, n_i, D)
            for i, grid in zip(spec.active, spec.grids, strict=True)
        ]
        return torch.cat(tokens, dim=1)  # (B, N, D)


def tube_tokens(x: Tensor, tube: TubeSpec, weight: Tensor, bias: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Tokens (B, n, D) of one tube on x (B, C, T, H, W), row-major over `grid`."""
    t, h, w = tube.offset
    y = F.conv3d(x[:, :, t:, h:, w:], weight, bias, stride=tube.conv_stride)  # (B, D/S, gt*, gh*, gw*)
    (gt, gh, gw), (st, sh, sw) = grid, tube.space_to_depth
    y = y[:, :, : gt * st, : gh * sh, : gw * sw]
    y = y.unflatten(4, (gw, sw)).unflatten(3, (gh, sh)).unflatten(2, (gt, st))  # (B, D/S, gt,st, gh,sh, gw,sw)
    return y.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)  # (B, n, S * D/S)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens (joint space-time)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
        y = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D/heads)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, N, D)


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # (B, N, D)


class Block(nn.Module):
    """Pre-LN encoder block; a gated one also adds tanh(alpha) * z_0 (section 3.6, alpha starts at 0)."""

    def __init__(self, spec: ModelSpec, gated: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.width, spec.norm_eps)
        self.attn = Attention(spec.width, spec.heads)
        self.norm2 = nn.LayerNorm(spec.width, spec.norm_eps)
        self.mlp = Mlp(spec.width, spec.hidden)
        self.alpha = nn.Parameter(torch.zeros(())) if gated else None

    def forward(self, x: Tensor, z0: Tensor) -> Tensor:
        y = x + self.attn(self.norm1(x))  # (B, N, D)
        z = y + self.mlp(self.norm2(y))  # (B, N, D)
        return z if self.alpha is None else z + torch.tanh(self.alpha) * z0  # (B, N, D)


class AttentionPool(nn.Module):
    """Weighted sum of the tokens, weights = softmax over the tokens of Linear(D, 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (torch.softmax(self.score(x), dim=1) * x).sum(dim=1)  # (B, D)


class MeanPool(nn.Module):
    """Mean of the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)  # (B, D)


class TubeViT(nn.Module):
    """A sparse-tube video transformer; one model for clips and images.

    `forward` takes normalised float clips (B, C, T, H, W) of the spec's own size, or images as T = 1, and gives
    logits (B, classes) of the classifier named `head` (the first one by default).
    """

    positions: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.tubes = Tubes(spec)
        stored = spec.positions == "stored"
        self.register_buffer("positions", position_table(spec), persistent=stored)  # (N, D)
        self.blocks = nn.ModuleList(Block(spec, gated=i in spec.gates) for i in range(spec.depth))
        self.norm = nn.LayerNorm(spec.width, spec.norm_eps)
        self.pool = AttentionPool(spec.width) if spec.pool == "attention" else MeanPool()
        self.classifiers = nn.ModuleDict({name: nn.Linear(spec.width, n) for name, n in spec.classifiers})
        self.apply(_initialise)

    def forward(self, x: Tensor, head: str | None = None) -> Tensor:
        spec = self.spec_of(x)
        z0 = self.tubes(x, spec)  # (B, N, D)
        table = self.positions if spec == self.spec else position_table(spec).to(z0)
        x = z0 + table  # (B, N, D)
        return self.classify(self.encode(x, z0), head)  # (B, classes)

    def encode(self, x: Tensor, z0: Tensor) -> Tensor:
        """Encoded tokens (B, N, D) of embedded tokens x (B, N, D); z0 are the bare tube tokens for the gates."""
        for block in self.blocks:
            x = block(x, z0)  # (B, N, D)
        return self.norm(x)  # (B, N, D)

    def classify(self, x: Tensor, head: str | None = None) -> Tensor:
        """Logits (B, classes) of encoded tokens (B, N, D).

        Raises:
            InputError: no classifier is called `head`.
        """
        head = head or self.spec.classifiers[0][0]
        if head not in self.classifiers:
            raise InputError(f"the model has no classifier {head!r}; it has {', '.join(self.classifiers)}")
        return self.classifiers[head](self.pool(x))  # (B, classes)

    def spec_of(self, x: Tensor) -> ModelSpec:
        """The spec at the clip x (B, C, T, H, W): this model's own, or its image form when T = 1.

        Raises:
            InputError: x has another rank, another number of channels, or another size.
        """
        if x.ndim == 5 and x.shape[1] == self.spec.channels and tuple(x.shape[3:]) == self.spec.size:
            if x.shape[2] == self.spec.frames:
                return self.spec
            if x.shape[2] == 1 and self.spec.accepts_images:
                return self.spec.with_clip(frames=1)
        expected = ("B", self.spec.channels, *self.spec.clip)
        raise InputError(
            f"the model takes clips {expected}, or images as T = 1 when it has a 2-D tube; given {tuple(x.shape)}"
        )


def position_table(spec: ModelSpec) -> Tensor:
    """The fixed position table (N, D) in float32; the place for a stored one when the checkpoint has its own."""
    return torch.from_numpy(positions.table(spec)).float()


def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of `TubeViT(spec).state_dict()`, without making one."""
    d, hidden = spec.width, spec.hidden
    found: dict[str, tuple[int, ...]] = {} if spec.positions == "fixed" else {"positions": (spec.tokens, d)}
    for i, tube in enumerate(spec.tubes):
        found[f"tubes.biases.{i}"] = (d // tube.merge,)
        if spec.kernel is None:
            found[f"tubes.weights.{i}"] = (d // tube.merge, spec.channels, *tube.kernel)
    if spec.kernel is not None:
        found["tubes.kernel"] = (d, spec.channels, *spec.kernel)
    layers = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (hidden, d), "mlp.fc2": (d, hidden)}
    linears = {f"blocks.{i}.{name}": shape for i in range(spec.depth) for name, shape in layers.items()}
    linears |= {f"classifiers.{name}": (classes, d) for name, classes in spec.classifiers}
    linears |= {"pool.score": (1, d)} if spec.pool == "attention" else {}
    for name, shape in linears.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for norm in ("norm", *(f"blocks.{i}.norm{n}" for i in range(spec.depth) for n in (1, 2))):
        found |= {f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
    return found | {f"blocks.{i}.alpha": () for i in spec.gates}


def _lecun(weight: Tensor) -> Tensor:
    """LeCun normal, as ViT initialises its patch embedding."""
    return nn.init.normal_(weight, std=weight[0].numel() ** -0.5)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
