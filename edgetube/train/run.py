"""`edgetube finetune`: a model and clips in, a folder with the trained model out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgetube import runtimes
from edgetube.errors import InputError
from edgetube.files import atomic_write
from edgetube.model.checkpoints import Checkpoint
from edgetube.progress import Progress, silent
from edgetube.train import prepare, ranks
from edgetube.train.loop import Training
from edgetube.train.prepare import Sources, recipe_of
from edgetube.train.recipe import Recipe
from edgetube.train.state import LOG

__all__ = ["Recipe", "Sources", "Told", "recipe_of", "run"]


@dataclass(frozen=True)
class Told:
    """Who is told the rows of the epochs, and notes."""

    epoch: Callable[[Mapping[str, Any]], None] | None = None
    note: Callable[[str], None] | None = None


def run(
    checkpoint: Checkpoint,
    sources: Sources,
    options: Recipe,
    folder: Path,
    device: str | None = None,
    threads: int | None = None,
    told: Told | None = None,
    progress: Progress = silent,
) -> dict[str, Any] | None:
    """Train, or go on where an earlier run in `folder` stopped.

    Returns:
        The document of `edgetube finetune`; None in a process that does not write.

    Raises:
        InputError: clips, labels, device or folder that do not fit.
        BackendError: the loss is no number.
    """
    told = told or Told()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out is {folder}, which is a file; expected a folder")
    runtimes.check_threads(threads)
    if threads is not None:
        torch.set_num_threads(threads)
    task, notes = prepare.task(checkpoint, sources, options.seed)
    with ranks.joined(device) as here:
        if here.leads:
            folder.mkdir(parents=True, exist_ok=True)
            for note in (*task.start.notes, *notes):
                if told.note is not None:
                    told.note(note)
        training = Training(task, options, folder, here)
        here.gathered(None)  # nobody writes before everybody has read
        training.fit(told.epoch, progress if here.leads else silent)
        if not here.leads:
            return None
        document = prepare.document(training, folder)
        atomic_write(folder / LOG, json.dumps(document, indent=1) + "\n")
        return document
