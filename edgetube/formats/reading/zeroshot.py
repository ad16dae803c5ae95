"""Zero-shot classifiers: cosines of an image-text tower's image feature and the text features of class names, which the
user computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from edgetube.errors import CheckpointError, InputError
from edgetube.formats.reading.files import ReadOptions

SCALE = 100.0
"""Of the logits, where a tower was saved without it: what training goes to and does not exceed."""


def notes(scaled: bool) -> tuple[str, ...]:
    """What a user of text features has to know.

    Args:
        scaled: whether the checkpoint says the scale of its logits.
    """
    return () if scaled else (f"it was saved without the scale of its logits, for which {SCALE:g} was taken",)


def text_features(options: ReadOptions) -> Tensor | None:
    """Unit vectors (classes, E) of the file of `--text-features`; None without one.

    Raises:
        InputError: it cannot be read, or is no table of numbers.
    """
    if options.text_features is None:
        return None
    path = Path(options.text_features)
    try:
        if path.suffix == ".safetensors":
            (found,) = load_file(path).values()
        else:
            found = torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, TypeError, SafetensorError, EOFError) as error:
        raise InputError(
            f"--text-features {path} cannot be read: {error}; expected .npy, or .safetensors with one tensor"
        ) from error
    if found.ndim != 2 or not found.is_floating_point() or 0 in found.shape or not found.isfinite().all():
        raise InputError(f"--text-features {path} is {found.dtype} {tuple(found.shape)}; expected floats (classes, E)")
    vectors = found.float()
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)


def linear(
    what: Path, text: Tensor, projection: Tensor | None, offset: Tensor | None, width: int, scale: float
) -> dict[str, Tensor]:
    """The cosine classifier of text features (classes, E): logits scale * text @ y / |y|, y = projection @ x + offset.

    Args:
        projection: (E, D) of the image feature; None: the feature itself, E = D.
        offset: (E,) added to it.
        scale: of the logits, the exponential of an image-text model's `logit_scale`.

    Raises:
        CheckpointError: the features are of another length.
    """
    length = width if projection is None else projection.shape[0]
    if text.shape[1] != length:
        raise CheckpointError(
            f"{what} makes image features of length {length}, but those of --text-features are {text.shape[1]} long: "
            "they are of another model"
        )
    return {
        "projection.weight": torch.eye(width) if projection is None else projection.contiguous(),
        "projection.bias": torch.zeros(length) if offset is None else offset,
        "classifiers.classes.weight": scale * text,
        "classifiers.classes.bias": torch.zeros(len(text)),
    }
