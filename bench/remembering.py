"""A model that answers each clip once, however often a proof shows it: answers of a large model take seconds."""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgetube.runtimes.base import Backend, Logits
from edgetube.targets import Status
from edgetube.video import Frames


class Answering(Protocol):
    """What answers clips."""

    status: Status

    def __call__(self, clips: npt.ArrayLike, /) -> Logits:
        """Logits (B, classes) float32 of clips (B, T, H, W, 3) uint8."""


class Remembering:
    """An opened backend whose answers are kept, by the sha256 of the clip."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.status = backend, backend.status
        self._known: dict[bytes, Logits] = {}

    def __call__(self, clips: npt.ArrayLike, /) -> Logits:
        """Logits (B, classes) float32 of clips (B, T, H, W, 3) uint8."""
        return np.concatenate([self._answer(clip) for clip in np.asarray(clips)])

    def _answer(self, clip: Frames) -> Logits:
        key = hashlib.sha256(clip.tobytes()).digest()
        if key not in self._known:
            self._known[key] = self.backend(clip[None])
        return self._known[key]
