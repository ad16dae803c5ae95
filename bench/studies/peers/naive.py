"""The naive export: `torch.onnx.export` of the reference model with its Conv3d."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgetube.export.canonical import quiet
from edgetube.model.checkpoints import Checkpoint
from edgetube.runtimes.torch import normalise


class Model(nn.Module):
    """The reference behind the same input, frames (B, T, H, W, 3) uint8."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.model, self.contract = checkpoint.model, checkpoint.contract

    def forward(self, frames: Tensor) -> Tensor:
        logits: Tensor = self.model(normalise(frames, self.contract))
        return logits


class Tokenizer(nn.Module):
    """What the lowerings replace: cast, normalise, transpose, one Conv3d per tube, positions added."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.tubes, self.contract = checkpoint.model.tubes, checkpoint.contract
        self.register_buffer("positions", checkpoint.model.positions)

    def forward(self, frames: Tensor) -> Tensor:
        tokens: Tensor = self.tubes(normalise(frames, self.contract)) + self.positions
        return tokens


def export(module: nn.Module, frames: np.ndarray, path: Path) -> None:
    """Trace `module` on `frames` into the ONNX file `path`, defaults throughout."""
    with quiet():
        torch.onnx.export(module.eval(), (torch.from_numpy(frames),), path, dynamo=True, verbose=False)
