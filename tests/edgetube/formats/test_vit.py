"""ViT and DeiT folders against transformers' own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetube import formats
from edgetube.errors import CheckpointError, SpecError
from tests.edgetube.formats.families import answers, frames_of, pixels_of, save, shake, transformers

SMALL = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40, "image_size": 32,
    "patch_size": 8, "num_labels": 5, "initializer_range": 0.3,
}  # fmt: skip
SIDE = {"height": 32, "width": 32}


def vit(**changes: Any) -> tuple[Any, Any]:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL | changes))
    return shake(model), transformers.ViTImageProcessor(size=SIDE)


def deit(teacher: bool = False, **changes: Any) -> tuple[Any, Any]:
    kind = transformers.DeiTForImageClassificationWithTeacher if teacher else transformers.DeiTForImageClassification
    model = kind(transformers.DeiTConfig(**SMALL | changes))
    return shake(model), transformers.DeiTImageProcessor(size={"height": 36, "width": 36}, crop_size=SIDE)


@pytest.mark.parametrize(
    ("made", "how"),
    [
        (vit(), {}),
        (vit(), {"save_original_format": False}),
        (vit(layer_norm_eps=1e-3, hidden_act="gelu_new", qkv_bias=False), {}),
        (deit(), {}),
        (deit(teacher=True), {"save_original_format": False}),
    ],
)
def test_logits_are_those_of_transformers(made: tuple[Any, Any], how: dict[str, Any], tmp_path: Path) -> None:
    model, processor = made
    found = formats.load(save(model, tmp_path / "m", processor, **how))
    frames = frames_of(found)
    with torch.no_grad():
        expected = model(pixels_of(found, frames)[:, 0]).logits.numpy()
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(answers(found, frames), expected, atol=1e-4 * np.abs(expected).max())


def test_positions_follow_transformers_to_another_size(tmp_path: Path) -> None:
    model, processor = vit()
    found = formats.load(save(model, tmp_path / "m", processor)).with_clip(size=(48, 40))
    frames = frames_of(found)
    with torch.no_grad():
        expected = model(pixels_of(found, frames)[:, 0], interpolate_pos_encoding=True).logits.numpy()
    np.testing.assert_allclose(answers(found, frames), expected, atol=1e-4 * np.abs(expected).max())


def test_scores_of_several_answers_at_once_are_noted(tmp_path: Path) -> None:
    model, processor = vit(problem_type="multi_label_classification")
    notes = formats.load(save(model, tmp_path / "m", processor)).notes
    assert "take the sigmoid of the logits" in notes[0]


def test_an_impossible_geometry_names_the_checkpoint(tmp_path: Path) -> None:
    folder = save(vit()[0], tmp_path / "m", vit()[1])
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_attention_heads": 5}))
    with pytest.raises(SpecError, match=r"m: width 24 is not divisible by 5 attention heads"):
        formats.load(folder)


@pytest.mark.parametrize("how", [{}, {"save_original_format": False}])
def test_biases_that_the_configuration_denies_are_another_model_s(how: dict[str, Any], tmp_path: Path) -> None:
    model, processor = vit()
    folder = save(model, tmp_path / "m", processor, **how)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"qkv_bias": False}))
    with pytest.raises(CheckpointError, match=r"says qkv_bias false, and there is vit\..*k(ey|_proj)\.bias"):
        formats.load(folder)
