"""TimeSformer folders against transformers' own model and processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetube import formats
from edgetube.errors import CheckpointError
from edgetube.formats import timesformer
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
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40, "image_size": 32,
    "patch_size": 16, "num_frames": 8, "num_labels": 5, "initializer_range": 0.3,
}  # fmt: skip
PROCESSOR = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
POOLED = ReadOptions(pool_frames="mean")


def model_of(**changes: Any) -> Any:
    return shake(transformers.TimesformerForVideoClassification(transformers.TimesformerConfig(**SMALL | changes)))


def processor_of(kind: str = "VideoMAEImageProcessor", **changes: Any) -> Any:
    return getattr(transformers, kind)(**PROCESSOR | changes)


def spec_file(folder: Path, **given: Any) -> ReadOptions:
    (folder / "spec.json").write_text(json.dumps({"input": given}))
    return ReadOptions(spec=str(folder / "spec.json"))


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({}, {}),
        ({"patch_size": 8}, {"save_original_format": False}),
        ({"num_frames": 16, "num_attention_heads": 3, "hidden_act": "gelu_new"}, {"max_shard_size": "20KB"}),
        ({"layer_norm_eps": 1e-3, "qkv_bias": False, "num_frames": 3}, {}),
        ({"attention_type": "joint_space_time"}, {}),
        ({"attention_type": "joint_space_time", "num_frames": 16, "qkv_bias": False, "layer_norm_eps": 1e-2}, {}),
        ({"num_frames": 1}, {}),
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
    assert found.spec.attention == ("joint" if "attention_type" in changes else "divided")
    assert found.spec.frames == (SMALL | changes)["num_frames"]


def test_a_file_of_torch_save_in_half_precision(tmp_path: Path) -> None:
    model = model_of().to(torch.float16)
    folder = save(model, tmp_path / "m", processor_of())
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    found = formats.load(folder)
    frames, whole = frames_of(found), model.float()
    with torch.no_grad():
        expected = whole(pixels_of(found, frames)).logits.numpy()
    np.testing.assert_allclose(answers(found, frames), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["divided_space_time", "joint_space_time"])
@pytest.mark.parametrize(("frames", "size"), [(12, (32, 32)), (8, (48, 48)), (5, (64, 80)), (16, (16, 32))])
def test_another_clip_takes_the_nearest_positions(
    frames: int, size: tuple[int, int], kind: str, tmp_path: Path
) -> None:
    """As the class resizes both of its tables."""
    model = model_of(attention_type=kind)
    folder = save(model, tmp_path / "m", processor_of())
    found = formats.load(folder, spec_file(tmp_path, frames=frames, height=size[0], width=size[1], resize_size=80))
    assert found.spec.clip == (frames, *size)
    model.config.num_frames, model.config.image_size = frames, size[1]
    given = frames_of(found)
    with torch.no_grad():
        expected = model(pixels_of(found, given)).logits.numpy()
    np.testing.assert_allclose(answers(found, given), expected, atol=1e-4 * np.abs(expected).max())


def test_space_alone_is_a_model_of_frames(tmp_path: Path) -> None:
    """transformers answers for each frame; the mean over them is an option as for every image model."""
    model = model_of(attention_type="space_only")
    folder = save(model, tmp_path / "m", processor_of())
    image, video = formats.load(folder), formats.load(folder, POOLED)
    assert image.spec.is_image
    assert any("--pool-frames mean takes several" in note for note in image.notes)
    assert not any("--pool-frames" in note for note in video.notes)
    frames = frames_of(video)
    with torch.no_grad():
        expected = model(pixels_of(video, frames)).logits.reshape(*frames.shape[:2], -1)
    np.testing.assert_allclose(answers(video, frames), expected.mean(dim=1), atol=1e-5)
    np.testing.assert_allclose(answers(image, frames[:, 3:4]), expected[:, 3], atol=1e-5)


@pytest.mark.parametrize("kind", ["VideoMAEImageProcessor", "TimesformerVideoProcessor"])
@pytest.mark.parametrize("size", [(61, 83), (83, 61), (120, 160)])
def test_frames_are_those_of_the_processor(size: tuple[int, int], kind: str, tmp_path: Path) -> None:
    processor = processor_of(kind)
    found = formats.load(save(model_of(), tmp_path / "m", processor))
    frames = clip("natural", size, 8)
    theirs = processor(list(frames), return_tensors="np")["pixel_values"][0]
    assert levels_apart(found, frames, theirs) < 1.01


@pytest.mark.parametrize("kind", ["VideoMAEFeatureExtractor", "TimesformerVideoProcessor"])
def test_defaults_of_a_processor_that_says_its_class_alone(kind: str, tmp_path: Path) -> None:
    """transformers has the oracle of one of them; the other is an older name."""
    folder = save(model_of(image_size=224), tmp_path / "m")
    key = "feature_extractor_type" if "Extractor" in kind else "video_processor_type"
    (folder / "preprocessor_config.json").write_text(json.dumps({key: kind}))
    found = formats.load(folder).contract
    of = processor_of("VideoMAEImageProcessor" if "Extractor" in kind else kind)
    assert found.mean == pytest.approx(of.image_mean)
    assert found.std == pytest.approx(of.image_std)
    assert (found.height, found.width, found.resize_size, found.filter) == (224, 224, None, "bilinear")


@pytest.mark.parametrize(("frames", "rate"), [(8, 32), (16, 16), (96, 4), (32, 32)])
def test_frames_are_sampled_as_the_authors_do(frames: int, rate: int) -> None:
    """`torch.linspace(start, start + frames * rate - 1, frames)` at 30 frames per second."""
    places = torch.linspace(0, frames * rate - 1, frames, dtype=torch.float64)
    stated = timesformer._sampling(frames)
    assert stated["sampling"] == "uniform"
    assert stated["fps"] == pytest.approx(30 / float(places[1] - places[0]), abs=1e-4)


@pytest.mark.parametrize("given", [{"sampling": "segments"}, {"sampling": "stride", "stride": 32}, {"fps": 2.0}])
def test_another_sampling_replaces_that_of_the_authors(given: dict[str, Any], tmp_path: Path) -> None:
    found = formats.load(save(model_of(), tmp_path / "m", processor_of()), spec_file(tmp_path, **given)).contract
    wanted = {"sampling": "uniform", "fps": None, "stride": None} | given
    assert {name: getattr(found, name) for name in wanted} == wanted


def test_the_two_linears_behind_the_attention_over_time_are_one(tmp_path: Path) -> None:
    """Nothing lies between them, so their product is exact; the record says where both went."""
    model = model_of()
    found = formats.load(save(model, tmp_path / "m", processor_of()))
    used = {use.name: use.used for use in found.keys}
    assert len(used) == len(model.state_dict())
    for name in ("temporal_dense", "temporal_attention.output.dense"):
        assert used[f"timesformer.encoder.layer.1.{name}.weight"] == "blocks.1.time_attn.proj"
    layer = model.timesformer.encoder.layer[1]
    x = torch.randn(3, 24)
    block: Any = found.model.blocks[1]
    with torch.no_grad():
        expected = layer.temporal_dense(layer.temporal_attention.output.dense(x))
        torch.testing.assert_close(block.time_attn.proj(x), expected, atol=1e-5, rtol=1e-5)


def edited(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 16}, r"time_embeddings is \(1, 8, 24\); expected \(1, 16, 24\)"),
        ({"image_size": 64}, r"position_embeddings is \(1, 5, 24\); expected \(1, 17, 24\)"),
        ({"patch_size": 8}, r"projection.weight is \(24, 3, 16, 16\); expected \(24, 3, 8, 8\)"),
        ({"attention_type": "axial"}, "attention_type 'axial'; edgetube knows divided_space_time, joint_space_time"),
        ({"attention_type": "joint_space_time"}, "has tensors that this model does not: .*temporal_attention"),
        ({"attention_type": "space_only"}, "has tensors that this model does not: .*time_embeddings"),
        ({"qkv_bias": False}, "config.json says qkv_bias false, and there is timesformer.encoder.layer.0.attention"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'; edgetube knows gelu"),
        ({"num_hidden_layers": 3}, r"lacks timesformer.encoder.layer.2.attention"),
    ],
)
def test_a_configuration_of_another_model(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = edited(save(model_of(), tmp_path / "m", processor_of()), **changes)
    with pytest.raises(CheckpointError, match=message):
        formats.load(folder)


def test_a_joint_model_that_is_said_to_be_divided(tmp_path: Path) -> None:
    folder = save(model_of(attention_type="joint_space_time"), tmp_path / "m", processor_of())
    with pytest.raises(CheckpointError, match=r"lacks timesformer\.encoder\.layer\.0\.temporal_"):
        formats.load(edited(folder, attention_type="divided_space_time"))


def test_a_folder_without_a_classifier(tmp_path: Path) -> None:
    model = transformers.TimesformerModel(transformers.TimesformerConfig(**SMALL))
    with pytest.raises(CheckpointError, match="has no classifier: fine-tune the model"):
        formats.load(save(model, tmp_path / "m", processor_of()))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"attention_type": "joint_space_time"}], ids=["divided", "joint"])
def test_exported_and_read_back_from_the_bundle(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = save(model_of(**changes), tmp_path / "m", processor_of())
    bundle = proves(folder, tmp_path / "out", "onnx-fp32", "onnx-fp16", lowering="gather")
    assert bundle.checkpoint["format"] == timesformer.NAME
    assert bundle.spec.attention == ("joint" if changes else "divided")


@pytest.mark.slow
def test_exported_at_another_clip(tmp_path: Path) -> None:
    folder = save(model_of(), tmp_path / "m", processor_of())
    bundle = proves(folder, tmp_path / "out", "onnx-fp32", lowering="gather", frames=4, batch=2)
    assert (bundle.spec.frames, bundle.batch) == (4, 2)
