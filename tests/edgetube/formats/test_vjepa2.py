"""V-JEPA 2 folders against transformers' own model and processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetube import formats
from edgetube.errors import CheckpointError
from edgetube.formats import vjepa2
from edgetube.formats.reading.files import ReadOptions
from tests.edgetube.formats.families import (
    answers,
    clip,
    frames_of,
    levels_apart,
    pixels_of,
    proves,
    save,
    shake,
    transformers,
)

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 1.5, "crop_size": 32,
    "patch_size": 8, "frames_per_clip": 6, "num_labels": 5, "initializer_range": 0.3, "num_pooler_layers": 2,
    "pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1,
}  # fmt: skip
"""Heads of 16 channels: two pairs for each axis, and two that are not turned."""


def model_of(**changes: Any) -> Any:
    return shake(transformers.VJEPA2ForVideoClassification(transformers.VJEPA2Config(**SMALL | changes)))


def processor_of(**changes: Any) -> Any:
    return transformers.VJEPA2VideoProcessor(**{"crop_size": {"height": 32, "width": 32}} | changes)


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({}, {}),
        ({"layer_norm_eps": 1e-3, "hidden_act": "gelu_pytorch_tanh", "num_attention_heads": 4}, {}),
        ({"qkv_bias": False, "num_pooler_layers": 0, "tubelet_size": 3}, {}),
        ({}, {"max_shard_size": "30KB", "save_original_format": False}),
    ],
)
def test_logits_are_those_of_transformers(changes: dict[str, Any], how: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(**changes)
    found = formats.load(save(model, tmp_path / "m", processor_of(), **how))
    frames = frames_of(found)
    with torch.no_grad():
        expected = model(pixels_of(found, frames)).logits.numpy()
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(answers(found, frames), expected, atol=1e-4 * np.abs(expected).max())
    unused = {use.used for use in found.keys if use.used.startswith("not used")}
    assert unused == {"not used: it is for pre-training", "not used: a softmax over keys does not see it"}


def test_half_precision_weights_become_float32_exactly(tmp_path: Path) -> None:
    model = model_of().to(torch.bfloat16)
    found = formats.load(save(model, tmp_path / "m", processor_of()))
    assert torch.equal(found.model.pool.query.value.weight, model.pooler.cross_attention_layer.cross_attn.v_proj.weight)
    assert found.model.pool.query.value.weight.dtype == torch.float32


def test_positions_follow_to_another_clip(tmp_path: Path) -> None:
    model = model_of()
    found = formats.load(save(model, tmp_path / "m", processor_of())).with_clip(frames=10)
    frames = frames_of(found)
    with torch.no_grad():
        expected = model(pixels_of(found, frames)).logits.numpy()
    np.testing.assert_allclose(answers(found, frames), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["noise", "natural"])
@pytest.mark.parametrize("size", [(61, 83), (83, 61), (40, 37), (120, 160)])
def test_frames_are_those_of_the_processor(size: tuple[int, int], kind: str, tmp_path: Path) -> None:
    processor = processor_of()
    found = formats.load(save(model_of(), tmp_path / "m", processor))
    assert (found.contract.resize_size, found.contract.height) == (36, 32)
    frames = clip(kind, size, 6)
    theirs = processor(torch.from_numpy(frames).permute(0, 3, 1, 2), return_tensors="np")["pixel_values_videos"][0]
    assert levels_apart(found, frames, theirs) < 1.01


def test_the_class_resizes_by_its_own_rule_whatever_the_file_says(tmp_path: Path) -> None:
    folder = save(model_of(), tmp_path / "m", processor_of())
    file = folder / "video_preprocessor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"size": {"shortest_edge": 50}}))
    assert transformers.VJEPA2VideoProcessor.from_pretrained(folder).size["shortest_edge"] == 36
    assert formats.load(folder).contract.resize_size == 36
    file.write_text(json.dumps({key: value for key, value in settings.items() if key not in ("size", "crop_size")}))
    found = formats.load(folder).contract
    assert (found.resize_size, found.height, found.width) == (292, 256, 256)


def test_sampling_is_that_of_the_authors(tmp_path: Path) -> None:
    assert formats.load(save(model_of(), tmp_path / "a", processor_of())).contract.stride == 4
    assert formats.load(save(model_of(frames_per_clip=32), tmp_path / "b", processor_of())).contract.stride == 2
    (tmp_path / "spec.json").write_text('{"input": {"stride": 3}}')
    said = formats.load(tmp_path / "b", ReadOptions(spec=str(tmp_path / "spec.json")))
    assert said.contract.stride == 3


def test_a_pre_trained_model_has_no_classifier(tmp_path: Path) -> None:
    model = transformers.VJEPA2Model(transformers.VJEPA2Config(**SMALL))
    with pytest.raises(CheckpointError, match="no classifier: it is V-JEPA 2 as it was pre-trained"):
        formats.load(save(model, tmp_path / "m", processor_of()))


def test_tensors_of_another_model_are_refused(tmp_path: Path) -> None:
    model = model_of()
    model.pooler.extra = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"has tensors that this model does not: pooler\.extra\.bias"):
        formats.load(save(model, tmp_path / "m", processor_of()))


@pytest.mark.slow
def test_exported_and_read_back_from_the_bundle(tmp_path: Path) -> None:
    folder = save(model_of(), tmp_path / "m", processor_of())
    assert proves(folder, tmp_path / "out", "onnx-fp32", lowering="gather").checkpoint["format"] == vjepa2.NAME
