"""What a training keeps on disk: the state that it resumes from, and its models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetube.errors import CheckpointError, InputError
from edgetube.files import replacing
from edgetube.model import checkpoints
from edgetube.model.checkpoints import Checkpoint
from edgetube.model.parts import replaced

STATE, BEST, LAST, LOG = "state.pt", "best.safetensors", "last.safetensors", "log.json"
"""Files in the folder of a training."""


@dataclass
class State:
    """Where a training is.

    Attributes:
        key: of the recipe, the model and the clips, see `key_of`.
        step: steps that are done.
        weights, averages: the trained weights, and their moving averages, by name.
        optimizer: of `torch.optim.Optimizer.state_dict`.
        rows: what was measured, one row an epoch.
        best: the highest accuracy on the clips held out, and its epoch.
        seen: sums of the epoch that is under way: loss, clips right, clips.
        unread: clips that could not be read, and why, by set, see `edgetube.train.loop.Task.sets`.
    """

    key: str
    step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    averages: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    best: tuple[float, int] = (-1.0, -1)
    seen: tuple[float, int, int] = (0.0, 0, 0)
    unread: dict[str, dict[str, str]] = field(default_factory=dict)


def key_of(*parts: Any) -> str:
    """A digest of what a training depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def save(folder: Path, state: State) -> None:
    with replacing(folder / STATE) as part:
        torch.save(vars(state), part)


def load(folder: Path, key: str) -> State | None:
    """The state of an earlier run of the same training; None where there is none, or no step was done.

    Raises:
        InputError: the folder holds another training.
        CheckpointError: the file is damaged.
        OSError: it cannot be read.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        found = State(**torch.load(path, weights_only=True, map_location="cpu"))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged file raises errors of a dozen types
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}); delete it to begin again, or give another --out"
        ) from error
    if found.step and found.key != key:
        raise InputError(
            f"{folder} holds a training with other options, clips or model; give another --out, or delete it"
        )
    return found if found.step else None


def save_model(start: Checkpoint, weights: Mapping[str, Tensor], path: Path) -> None:
    """Write the model `start` with its trained weights replaced."""
    checkpoints.save(replace(start, model=replaced(start.model, weights)), path)
