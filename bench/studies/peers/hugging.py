"""Base models of `transformers` with random weights and the same uint8 input, as alternatives to a TubeViT."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from edgetube.bench.studies.peers.beside import declare_torchvision


class Classifier(nn.Module):
    """A video classifier behind frames (B, T, H, W, 3) uint8."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        pixels = (frames.float() / 255 - 0.5) / 0.5
        logits: torch.Tensor = self.model(pixel_values=pixels.permute(0, 1, 4, 2, 3)).logits
        return logits


def model(name: str, frames: int) -> Classifier:
    """`VideoMAE` or `Vivit` at its base size, for clips of `frames` frames of 224 x 224."""
    declare_torchvision()
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(num_frames=frames, image_size=224, num_labels=400)
    return Classifier(getattr(transformers, f"{name}ForVideoClassification")(config)).eval()
