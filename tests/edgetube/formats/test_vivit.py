"""ViViT folders against transformers' own model and processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetube import formats
from edgetube.errors import CheckpointError
from edgetube.formats import vivit
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
    "num_frames": 4, "tubelet_size": [2, 16, 8], "num_labels": 5, "initializer_range": 0.3,
}  # fmt: skip
PROCESSOR = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}


def model_of(**changes: Any) -> Any:
    return shake(transformers.VivitForVideoClassification(transformers.VivitConfig(**SMALL | changes)))


def processor_of(**changes: Any) -> Any:
    return transformers.VivitImageProcessor(**PROCESSOR | changes)


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({}, {}),
        ({}, {"save_original_format": False}),
        ({"layer_norm_eps": 1e-3, "hidden_act": "gelu", "num_attention_heads": 3}, {"max_shard_size": "20KB"}),
        ({"qkv_bias": False, "tubelet_size": [1, 8, 8]}, {}),
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
    assert (found.contract.sampling, found.contract.stride) == ("stride", 2)


def test_half_precision_weights_become_float32_exactly(tmp_path: Path) -> None:
    model = model_of().to(torch.bfloat16)
    found = formats.load(save(model, tmp_path / "m", processor_of()))
    assert torch.equal(found.model.tubes.weight(0), model.vivit.embeddings.patch_embeddings.projection.weight.float())


@pytest.mark.parametrize("kind", ["noise", "natural"])
@pytest.mark.parametrize("size", [(61, 83), (83, 61), (40, 37), (120, 160)])
def test_frames_are_those_of_the_processor(size: tuple[int, int], kind: str, tmp_path: Path) -> None:
    processor = processor_of()
    found = formats.load(save(model_of(), tmp_path / "m", processor))
    frames = clip(kind, size, 4)
    theirs = processor(list(frames), return_tensors="np")["pixel_values"][0]
    assert levels_apart(found, frames, theirs) < 1.01


def test_the_range_of_pixels_is_that_of_the_file(tmp_path: Path) -> None:
    """The class takes off an offset and a mean, which its authors cannot have meant: -3..1."""
    folder = save(model_of(), tmp_path / "m", processor_of())
    found = formats.load(folder)
    assert found.contract.mean == pytest.approx((0.75,) * 3)
    assert found.contract.std == pytest.approx((0.25,) * 3)
    assert any("range from -3 to 1" in note for note in found.notes)
    (tmp_path / "spec.json").write_text(json.dumps({"input": {"mean": [0.5] * 3, "std": [0.5] * 3}}))
    said = formats.load(folder, ReadOptions(spec=str(tmp_path / "spec.json")))
    assert said.contract.mean == (0.5,) * 3
    assert not any("range" in note for note in said.notes)
    usual = formats.load(save(model_of(), tmp_path / "n", processor_of(do_normalize=False)))
    assert (usual.contract.mean[0], usual.contract.std[0]) == pytest.approx((0.5, 0.5))
    assert not any("range" in note for note in usual.notes)


def test_a_folder_without_a_classifier(tmp_path: Path) -> None:
    model = transformers.VivitModel(transformers.VivitConfig(**SMALL))
    with pytest.raises(CheckpointError, match="has no classifier: fine-tune the model"):
        formats.load(save(model, tmp_path / "m", processor_of()))


def test_a_pooler_is_left_out(tmp_path: Path) -> None:
    model = model_of()
    model.vivit.pooler = torch.nn.ModuleDict({"dense": torch.nn.Linear(24, 24)})
    found = formats.load(save(model, tmp_path / "m", processor_of()))
    assert {use.name: use.used for use in found.keys}["vivit.pooler.dense.weight"].startswith(
        "not used: the classifier"
    )


def test_positions_of_another_clip_are_refused(tmp_path: Path) -> None:
    folder = save(model_of(), tmp_path / "m", processor_of())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_frames": 8}))
    with pytest.raises(CheckpointError, match=r"position_embeddings is \(1, 17, 24\); expected \(1, 33, 24\)"):
        formats.load(folder)


@pytest.mark.slow
def test_exported_and_read_back_from_the_bundle(tmp_path: Path) -> None:
    folder = save(model_of(), tmp_path / "m", processor_of())
    assert proves(folder, tmp_path / "out", "onnx-fp32", lowering="gather").checkpoint["format"] == vivit.NAME
