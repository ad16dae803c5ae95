"""Folders that libraries write, of small models with random weights, every parameter of them shaken."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgetube.formats.reading.files import ReadOptions
from edgetube.model.checkpoints import Checkpoint
from edgetube.runtimes.torch import Reference, normalise
from tests import peers

assert peers  # before the first import of a library that imports torchvision
transformers: Any = importlib.import_module("transformers")


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Noise on every parameter: zero tokens, unit scales and zero biases hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def frames_of(checkpoint: Checkpoint, count: int = 2) -> np.ndarray:
    """Random clips (count, T, H, W, 3) uint8 for a checkpoint."""
    return np.random.default_rng(0).integers(0, 256, (count, *checkpoint.contract.shape), np.uint8)


def pixels_of(checkpoint: Checkpoint, frames: np.ndarray) -> torch.Tensor:
    """Normalised pixels (B, T, C, H, W), as the video models of transformers take them."""
    return normalise(torch.from_numpy(frames), checkpoint.contract).transpose(1, 2)


def answers(checkpoint: Checkpoint, frames: np.ndarray) -> np.ndarray:
    """Logits (B, classes) of the reference model."""
    return np.concatenate([Reference(checkpoint.model, checkpoint.contract)(clip[None]) for clip in frames])


def save(model: Any, folder: Path, processor: Any = None, **how: Any) -> Path:
    """The folder that `save_pretrained` writes."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, **how)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


NO_OPTIONS = ReadOptions()
