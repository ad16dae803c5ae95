"""SigLIP folders, classifiers and zero-shot towers, against transformers' own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgetube import formats
from edgetube.errors import CheckpointError, InputError
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
    "projection_size": 24, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PROCESSOR = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})


def classifier(**changes: Any) -> Any:
    config = transformers.SiglipConfig(vision_config=TOWER | changes, text_config=TEXT, num_labels=5)
    return shake(transformers.SiglipForImageClassification(config))


def whole(**changes: Any) -> Any:
    return shake(transformers.SiglipModel(transformers.SiglipConfig(vision_config=TOWER | changes, text_config=TEXT)))


def words() -> torch.Tensor:
    """Token numbers (5, 64) of five class names."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 50, (5, 64)))


def text_of(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.get_text_features(words()).pooler_output.numpy()


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({}, {}),
        ({}, {"save_original_format": False}),
        ({"layer_norm_eps": 1e-3, "hidden_act": "gelu", "num_attention_heads": 3}, {"max_shard_size": "20KB"}),
        ({"vision_use_head": False}, {}),
    ],
)
def test_a_classifier_reads_the_mean_of_the_tokens(
    changes: dict[str, Any], how: dict[str, Any], tmp_path: Path
) -> None:
    model = classifier(**changes)
    agrees(formats.load(save(model, tmp_path / "m", PROCESSOR, **how)), model)


def test_positions_follow_transformers_to_another_size(tmp_path: Path) -> None:
    model = classifier()
    found = formats.load(save(model, tmp_path / "m", PROCESSOR)).with_clip(size=(48, 40))
    agrees(found, model, interpolate_pos_encoding=True)


def test_half_precision_weights_become_float32_exactly(tmp_path: Path) -> None:
    model = classifier().to(torch.bfloat16)
    agrees(formats.load(save(model, tmp_path / "m", PROCESSOR)), model.float())


@pytest.mark.parametrize("changes", [{}, {"num_attention_heads": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-3}])
def test_zero_shot_logits_are_those_of_the_whole_model(changes: dict[str, Any], tmp_path: Path) -> None:
    model = whole(**changes)
    np.save(tmp_path / "text.npy", text_of(model))
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\n")
    options = ReadOptions(text_features=str(tmp_path / "text.npy"), labels=str(tmp_path / "names.txt"))
    found = formats.load(save(model, tmp_path / "m", PROCESSOR), options)
    frames = frames_of(found, 4)
    pixels = pixels_of(found, frames)[:, 0]
    with torch.no_grad():
        expected = model(input_ids=words(), pixel_values=pixels).logits_per_image.numpy()
    assert np.ptp(expected, axis=1).min() > 0.1
    np.testing.assert_allclose(answers(found, frames), expected, atol=1e-4 * np.abs(expected).max())
    assert found.labels == ("a", "b", "c", "d", "e")
    assert found.notes == ()


def test_a_tower_saved_alone_lacks_the_scale(tmp_path: Path) -> None:
    model = whole()
    save_file({"text": torch.from_numpy(text_of(model))}, tmp_path / "text.safetensors")
    options = ReadOptions(text_features=str(tmp_path / "text.safetensors"))
    found = formats.load(save(model.vision_model, tmp_path / "m", PROCESSOR), options)
    frames = frames_of(found)
    with torch.no_grad():
        feature = model.get_image_features(pixels_of(found, frames)[:, 0]).pooler_output
    text = torch.nn.functional.normalize(torch.from_numpy(text_of(model)))
    expected = (100 * torch.nn.functional.normalize(feature) @ text.T).numpy()
    np.testing.assert_allclose(answers(found, frames), expected, atol=1e-4 * np.abs(expected).max())
    assert [note.partition(":")[0] for note in found.notes] == [
        "it was saved without the scale of its logits, for which 100 was taken",
        "its classes have no names",
    ]


def test_preprocessing_is_that_of_the_processor(tmp_path: Path) -> None:
    sees_the_same(formats.load(save(classifier(), tmp_path / "m", PROCESSOR)), PROCESSOR)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    folder = save(whole(vision_use_head=False), tmp_path / "m", PROCESSOR)
    np.save(tmp_path / "text.npy", np.ones((3, 24), np.float32))
    np.save(tmp_path / "other.npy", np.ones((3, 16), np.float32))
    with pytest.raises(CheckpointError, match="an image-text model without a classifier; give --text-features FILE"):
        formats.load(folder)
    with pytest.raises(CheckpointError, match="saved without its pooling head"):
        formats.load(folder, ReadOptions(text_features=str(tmp_path / "text.npy")))
    with pytest.raises(CheckpointError, match="of length 24, but those of --text-features are 16 long"):
        formats.load(save(whole(), tmp_path / "w", PROCESSOR), ReadOptions(text_features=str(tmp_path / "other.npy")))
    with pytest.raises(InputError, match="--text-features does not apply to this checkpoint"):
        formats.load(
            save(classifier(), tmp_path / "c", PROCESSOR), ReadOptions(text_features=str(tmp_path / "text.npy"))
        )


def test_naflex_is_refused(tmp_path: Path) -> None:
    config = transformers.Siglip2Config(
        vision_config={**TOWER, "num_patches": 16}, text_config=TEXT, num_labels=5, architectures=["x"]
    )
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(CheckpointError, match="is SigLIP 2 with NaFlex, whose grid of patches follows each image"):
        formats.load(folder)


@pytest.mark.long
def test_bundles_are_proven_and_found_again(tmp_path: Path) -> None:
    model = whole()
    np.save(tmp_path / "text.npy", text_of(model))
    read = ReadOptions(text_features=str(tmp_path / "text.npy"))
    folder = save(model, tmp_path / "m", PROCESSOR)
    bundle = proves(folder, tmp_path / "out", "onnx-fp32", "openvino-fp32", read=read)
    assert formats.locate(bundle, tmp_path).checkpoint["source"] == str(folder)
    np.save(tmp_path / "text.npy", text_of(model)[::-1])
    with pytest.raises(CheckpointError, match="was made from other weights than"):
        formats.of_bundle(bundle)
    with pytest.raises(CheckpointError, match="is not at"):
        formats.locate(bundle, tmp_path)
