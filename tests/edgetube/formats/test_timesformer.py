"""TimeSformer is named and refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetube import formats
from edgetube.errors import CheckpointError
from tests.edgetube.formats.families import save, transformers


def test_divided_attention_is_not_supported_yet(tmp_path: Path) -> None:
    config = transformers.TimesformerConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    folder = save(transformers.TimesformerForVideoClassification(config), tmp_path / "m")
    with pytest.raises(CheckpointError, match="is a TimeSformer, whose divided attention is not supported yet"):
        formats.load(folder)
