"""CLIP folders, classifiers and zero-shot towers, against transformers' own models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetube import formats
from edgetube.errors import CheckpointError
from edgetube.formats.reading.files import ReadOptions
from tests.edgetube.formats.families import (
    agrees,
    answers,
    frames_of,
    pixels_of,
    proves,
    save,
    sees_the_same,
    shake,
    transformers,
)

TOWER = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20, "vocab_size": 50,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def processor_of(short: int = 32) -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": short}, crop_size={"height": 32, "width": 32})


def config_of(**changes: Any) -> Any:
    return transformers.CLIPConfig(
        vision_config=TOWER | changes, text_config=TEXT, projection_dim=12, logit_scale_init_value=1.5, num_labels=5
    )


def classifier(**changes: Any) -> Any:
    return shake(transformers.CLIPForImageClassification(config_of(**changes)))


def whole(**changes: Any) -> Any:
    return shake(transformers.CLIPModel(config_of(**changes)))


def words() -> torch.Tensor:
    """Token numbers (5, 12) of five class names, the last of which ends each."""
    found = np.random.default_rng(0).integers(3, 50, (5, 12))
    found[:, -1] = 2
    return torch.from_numpy(found)


def text_of(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.get_text_features(words()).pooler_output.numpy()


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({}, {}),
        ({}, {"save_original_format": False}),
        ({"layer_norm_eps": 1e-3, "hidden_act": "gelu", "num_attention_heads": 3}, {"max_shard_size": "20KB"}),
    ],
)
def test_a_classifier_reads_the_mean_of_the_patches(
    changes: dict[str, Any], how: dict[str, Any], tmp_path: Path
) -> None:
    model = classifier(**changes)
    agrees(formats.load(save(model, tmp_path / "m", processor_of(), **how)), model)


def test_positions_follow_transformers_to_another_size(tmp_path: Path) -> None:
    model = classifier()
    found = formats.load(save(model, tmp_path / "m", processor_of())).with_clip(size=(48, 40))
    agrees(found, model, interpolate_pos_encoding=True)


def test_half_precision_weights_become_float32_exactly(tmp_path: Path) -> None:
    model = classifier().to(torch.float16)
    agrees(formats.load(save(model, tmp_path / "m", processor_of())), model.float())


@pytest.mark.parametrize("changes", [{}, {"num_attention_heads": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-3}])
def test_zero_shot_logits_are_those_of_the_whole_model(changes: dict[str, Any], tmp_path: Path) -> None:
    model = whole(**changes)
    np.save(tmp_path / "text.npy", text_of(model))
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\n")
    options = ReadOptions(text_features=str(tmp_path / "text.npy"), labels=str(tmp_path / "names.txt"))
    found = formats.load(save(model, tmp_path / "m", processor_of()), options)
    frames = frames_of(found, 4)
    pixels = pixels_of(found, frames)[:, 0]
    with torch.no_grad():
        expected = model(input_ids=words(), pixel_values=pixels).logits_per_image.numpy()
    assert np.ptp(expected, axis=1).min() > 0.1
    np.testing.assert_allclose(answers(found, frames), expected, atol=1e-4 * np.abs(expected).max())
    assert found.labels == ("a", "b", "c", "d", "e")
    assert found.notes == ()


def test_a_tower_saved_with_its_projection_alone(tmp_path: Path) -> None:
    tower = shake(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**TOWER, projection_dim=12)))
    text = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)
    np.save(tmp_path / "text.npy", text)
    options = ReadOptions(text_features=str(tmp_path / "text.npy"))
    found = formats.load(save(tower, tmp_path / "m", processor_of()), options)
    frames = frames_of(found)
    with torch.no_grad():
        feature = tower(pixels_of(found, frames)[:, 0]).image_embeds.numpy()
    feature /= np.linalg.norm(feature, axis=1, keepdims=True)
    expected = 100 * feature @ (text / np.linalg.norm(text, axis=1, keepdims=True)).T
    np.testing.assert_allclose(answers(found, frames), expected, atol=1e-4 * np.abs(expected).max())


def test_folders_of_older_versions(tmp_path: Path) -> None:
    """They number the positions in a tensor, and may say the tower's configuration a second time, which counts."""
    model = classifier()
    folder = save(model, tmp_path / "m", processor_of())
    config = json.loads((folder / "config.json").read_text())
    config["vision_config_dict"], config["vision_config"] = config["vision_config"], {"hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    state = model.state_dict() | {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    torch.save(state, folder / "pytorch_model.bin")
    agrees(formats.load(folder), model)


def test_preprocessing_is_that_of_the_processor(tmp_path: Path) -> None:
    processor = processor_of(37)
    sees_the_same(formats.load(save(classifier(), tmp_path / "m", processor)), processor)


def test_old_processors_say_the_short_side_as_a_number(tmp_path: Path) -> None:
    folder = save(classifier(), tmp_path / "m", processor_of())
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": 37, "crop_size": 32}))
    found = formats.load(folder)
    assert (found.contract.resize, found.contract.resize_size, found.spec.size) == ("short-side", 37, (32, 32))
    sees_the_same(found, transformers.CLIPImageProcessor.from_pretrained(folder))


def test_what_cannot_be_read(tmp_path: Path) -> None:
    tower = shake(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER)))
    folder = save(tower, tmp_path / "m", processor_of())
    np.save(tmp_path / "text.npy", np.ones((3, 12), np.float32))
    with pytest.raises(CheckpointError, match="an image-text model without a classifier; give --text-features FILE"):
        formats.load(folder)
    with pytest.raises(CheckpointError, match="saved without visual_projection"):
        formats.load(folder, ReadOptions(text_features=str(tmp_path / "text.npy")))


@pytest.mark.slow
def test_bundles_are_proven_and_found_again(tmp_path: Path) -> None:
    proves(save(classifier(), tmp_path / "m", processor_of()), tmp_path / "out", "onnx-fp32", "openvino-fp32")


@pytest.mark.slow
def test_zero_shot_bundles_are_proven_over_frames_as_well(tmp_path: Path) -> None:
    model = whole()
    np.save(tmp_path / "text.npy", text_of(model))
    read, folder = ReadOptions(text_features=str(tmp_path / "text.npy")), save(model, tmp_path / "m", processor_of())
    proves(folder, tmp_path / "out", "onnx-fp32", read=read)
    proves(folder, tmp_path / "video", "onnx-fp32", read=replace(read, pool_frames="mean"), frames=3)
