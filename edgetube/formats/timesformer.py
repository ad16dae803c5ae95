"""TimeSformer, which is recognised to be refused: its attention is divided into one over time and one over space.

Bertasius et al., "Is Space-Time Attention All You Need for Video Understanding?", ICML 2021.
"""

from __future__ import annotations

from edgetube.errors import CheckpointError
from edgetube.formats.reading.files import Files, ReadOptions
from edgetube.model.checkpoints import Checkpoint

NAME = "transformers TimeSformer"


def detect(files: Files) -> bool:
    """A folder whose configuration says so."""
    return files.model_type == "timesformer"


def read(files: Files, options: ReadOptions) -> Checkpoint:
    """Refuse it.

    Raises:
        CheckpointError: always.
    """
    raise CheckpointError(
        f"{files.path} is a TimeSformer, whose divided attention is not supported yet; a VideoMAE, ViViT or V-JEPA 2 "
        "classifier is"
    )
