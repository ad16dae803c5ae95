"""A model whose answers show which frames it saw."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetube.contract import InputContract
from edgetube.spec import Prediction

CONTRACT = InputContract(4, 8, 8, fps=10.0)

PATIENCE_S = 30.0
"""Seconds after which a test that waits has failed."""


def picture(value: int) -> np.ndarray:
    return np.full((8, 8, 3), value, np.uint8)


def pictures(count: int) -> Iterator[np.ndarray]:
    return (picture(i) for i in range(count))


def seen(prediction: Prediction) -> list[int]:
    """The values of the frames that the model saw."""
    return [round(value) for value in prediction.logits]


class Pixels:
    """Logits are the values of the clip's frames.

    Attributes:
        calls: batches so far.
        before: called with the number of the call before it is answered; it may raise, or wait.
    """

    def __init__(
        self,
        contract: InputContract = CONTRACT,
        batch: int = 1,
        before: Callable[[int], Any] = lambda _: None,
        parallel_calls: int = 1,
    ) -> None:
        self.contract, self.batch, self.before, self.parallel_calls = contract, batch, before, parallel_calls
        self.labels = tuple(f"frame {i}" for i in range(contract.frames))
        self.calls: list[int] = []
        self._lock = threading.Lock()

    def __call__(self, clips: npt.ArrayLike) -> npt.NDArray[np.float32]:
        frames = np.asarray(clips)
        with self._lock:
            number = len(self.calls)
            self.calls.append(len(frames))
        self.before(number)
        return frames[:, :, 0, 0, 0].astype(np.float32)
