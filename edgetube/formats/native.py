"""edgetube's own checkpoints: safetensors files with the model's geometry, its input and its labels in the header."""

from __future__ import annotations

from edgetube.formats.reading.files import Files, ReadOptions
from edgetube.model import checkpoints
from edgetube.model.checkpoints import Checkpoint

NAME = "edgetube"


def detect(files: Files) -> bool:
    """A file with edgetube's header."""
    return not files.is_folder and checkpoints.HEADER in files.tensors.facts


def read(files: Files, options: ReadOptions) -> Checkpoint:
    """See `edgetube.model.checkpoints.load`."""
    options.allow()
    return checkpoints.load(files.path)
