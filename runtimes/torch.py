"""The reference as a backend: PyTorch, float32, the pixels of the one contract. Everything is measured against it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from edgetube.runtimes.base import Backend, Output
from edgetube.spec import InputContract
from edgetube.video import Frames


class Reference(Backend):
    """A trained model in eval mode, fed with uint8 clips.

    Args:
        model: takes normalised float32 clips (B, C, T, H, W), gives logits (B, classes).
        contract: the input that the model was trained with; mean and std are applied here.
    """

    thread_safe = True

    def __init__(self, model: torch.nn.Module, contract: InputContract) -> None:
        super().__init__(contract, batch=1)
        self.model = model.eval()

    def infer(self, clips: Frames) -> Output:
        with torch.inference_mode():
            logits: torch.Tensor = self.model(normalise(torch.from_numpy(clips), self.contract))
        return np.asarray(logits.float().numpy())

    def describe(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": "cpu"}

    def release(self) -> None:
        del self.model


def normalise(frames: torch.Tensor, contract: InputContract) -> torch.Tensor:
    """Float clips (B, C, T, H, W) of frames (B, T, H, W, C) uint8: (pixel / 255 - mean) / std per channel."""
    mean, std = torch.tensor(contract.mean), torch.tensor(contract.std)
    return ((frames.float() / 255 - mean) / std).permute(0, 4, 1, 2, 3)
