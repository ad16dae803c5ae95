"""The reference backend: the trained model in PyTorch, float32. Artifacts are compared with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgetube.contract import InputContract
from edgetube.roles import LOGITS
from edgetube.runtimes.base import Backend, LayerOutputs, Logits, Tap
from edgetube.video import Frames


class Reference(Backend):
    """A trained model in eval mode, fed with uint8 clips.

    Args:
        model: takes normalised float32 clips (B, C, T, H, W), gives logits (B, classes).
        contract: the input that the model was trained with; mean and std are applied here.
        threads: CPU threads of PyTorch in the whole process; None leaves them as they are.
    """

    thread_safe = True

    def __init__(self, model: torch.nn.Module, contract: InputContract, threads: int | None = None) -> None:
        super().__init__(contract, batch=1)
        self.model = model.eval()
        if threads is not None:
            torch.set_num_threads(threads)

    def infer(self, clips: Frames) -> Logits:
        with torch.inference_mode():
            logits: torch.Tensor = self.model(normalise(torch.from_numpy(clips), self.contract))
        return np.asarray(logits.float().numpy())

    def describe(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": "cpu"}

    def layers(self, names: Sequence[str]) -> tuple[str, ...]:
        modules = dict(self.model.named_modules())
        return tuple(name for name in names if name in modules or name == LOGITS)

    def tap(self, names: Sequence[str]) -> Tap:
        """The outputs of modules by name, as the model computes them; `logits` is the model's output."""
        modules = dict(self.model.named_modules())

        def show(clips: Frames) -> LayerOutputs:
            seen: LayerOutputs = {}

            def keep(name: str, value: torch.Tensor) -> None:
                seen[name] = value.detach().float().numpy().copy()

            with ExitStack() as stack:
                for name in set(names) - {LOGITS}:
                    hook = modules[name].register_forward_hook(lambda _, __, value, name=name: keep(name, value))
                    stack.callback(hook.remove)
                logits = self.infer(clips)
            return seen | ({LOGITS: logits} if LOGITS in names else {})

        return show

    @contextmanager
    def following(self, decisions: Mapping[str, npt.NDArray[np.float32]]) -> Iterator[None]:
        """Context manager: tokens leave as an artifact decided, see `edgetube.roles.GraphRoles.decisions`.

        Args:
            decisions: indices (B, n), by name.
        """
        modules = dict(self.model.named_modules())
        with ExitStack() as stack:
            for name, value in decisions.items():
                given = torch.from_numpy(value.astype(np.int64))
                hook = modules[name].register_forward_hook(lambda _, __, ___, given=given: given)
                stack.callback(hook.remove)
            yield

    def release(self) -> None:
        del self.model


def normalise(frames: torch.Tensor, contract: InputContract) -> torch.Tensor:
    """Float clips (B, C, T, H, W) of frames (B, T, H, W, C) uint8: (pixel / 255 - mean) / std per channel."""
    mean, std = (torch.tensor(values, device=frames.device) for values in (contract.mean, contract.std))
    return ((frames.float() / 255 - mean) / std).permute(0, 4, 1, 2, 3)
