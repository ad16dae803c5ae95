"""Kept answers against the model's own."""

from __future__ import annotations

import numpy as np

from edgetube.bench.remembering import Remembering
from edgetube.contract import InputContract
from edgetube.runtimes.base import Backend, Logits
from edgetube.video import Frames


class Sums(Backend):
    """Answers with the sum of the pixels, and with how often it was asked."""

    status = "emulated"

    def __init__(self) -> None:
        super().__init__(InputContract(2, 3, 4), batch=1)
        self.calls = 0

    def infer(self, clips: Frames) -> Logits:
        self.calls += 1
        return np.array([[clips.sum(), self.calls]], np.float32)

    def release(self) -> None:
        pass


def test_each_clip_is_answered_once_and_like_the_backend_answers_it() -> None:
    clips = np.random.default_rng(0).integers(0, 256, (3, 2, 3, 4, 3), np.uint8)
    backend = Sums()
    model = Remembering(backend)
    first = model(clips[:2])
    again = model(clips[[1, 0, 2]])
    assert first[:, 0].tolist() == clips[:2].sum(axis=(1, 2, 3, 4)).tolist()
    assert again.tolist() == [first[1].tolist(), first[0].tolist(), [clips[2].sum(), 3]]
    assert (backend.calls, model.status) == (3, "emulated")
    assert model(clips[2:, ::-1])[0, 1] == 4  # the same frames in another order are another clip
