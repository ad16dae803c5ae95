"""DINOv2 folders, with registers and without, against transformers' own models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edgetube import formats
from edgetube.errors import CheckpointError
from tests.edgetube.formats.families import (
    agrees,
    proves,
    save,
    sees_the_same,
    shake,
    transformers,
)

SMALL = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 56,
    "patch_size": 14, "num_labels": 5, "initializer_range": 0.3,
}  # fmt: skip


def plain(**changes: Any) -> Any:
    return shake(transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SMALL | changes)))


def registers(**changes: Any) -> Any:
    config = transformers.Dinov2WithRegistersConfig(**SMALL | changes)
    return shake(transformers.Dinov2WithRegistersForImageClassification(config))


def processor_of(short: int = 64, crop: int = 56, **changes: Any) -> Any:
    size = {"size": {"shortest_edge": short}, "crop_size": {"height": crop, "width": crop}}
    return transformers.BitImageProcessor(**size | changes)


@pytest.mark.parametrize(
    ("make", "changes", "how"),
    [
        (plain, {}, {}),
        (plain, {"use_swiglu_ffn": True}, {}),
        (plain, {"use_swiglu_ffn": True, "num_attention_heads": 3}, {"save_original_format": False}),
        (plain, {"layer_norm_eps": 1e-3, "hidden_act": "gelu_new", "qkv_bias": False}, {}),
        (plain, {"use_mask_token": False}, {"max_shard_size": "20KB"}),
        (registers, {}, {}),
        (registers, {"num_register_tokens": 2, "use_swiglu_ffn": True}, {"save_original_format": False}),
    ],
)
def test_logits_are_those_of_transformers(
    make: Any, changes: dict[str, Any], how: dict[str, Any], tmp_path: Path
) -> None:
    model = make(**changes)
    agrees(formats.load(save(model, tmp_path / "m", processor_of(), **how)), model)


@pytest.mark.parametrize("crop", [42, 84])
@pytest.mark.parametrize("make", [plain, registers])
def test_each_variant_resizes_its_position_table_to_the_crop_by_its_own_rule(
    make: Any, crop: int, tmp_path: Path
) -> None:
    model = make()
    found = formats.load(save(model, tmp_path / "m", processor_of(96, crop)))
    assert found.spec.size == (crop, crop)
    agrees(found, model)


def test_the_two_rules_differ(tmp_path: Path) -> None:
    model = plain()
    folder = save(model, tmp_path / "m", processor_of(96, 42))
    found = formats.load(folder).model.positions
    table = model.dinov2.embeddings.position_embeddings[:, 1:].detach().reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    other = torch.nn.functional.interpolate(table, (3, 3), mode="bicubic", antialias=True)
    assert (found - other[0].flatten(1).T).abs().max() > 0.1 * table.std()


def test_half_precision_weights_become_float32_exactly(tmp_path: Path) -> None:
    model = plain().to(torch.bfloat16)
    found = formats.load(save(model, tmp_path / "m", processor_of()))
    agrees(found, model.float())


def test_preprocessing_is_that_of_the_processor(tmp_path: Path) -> None:
    processor = processor_of(61)
    sees_the_same(formats.load(save(plain(), tmp_path / "m", processor)), processor)


def test_a_tower_alone_has_no_classifier(tmp_path: Path) -> None:
    model = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL))
    with pytest.raises(
        CheckpointError, match="no classifier: it is the tower alone; train a linear on labels, and give its weight"
    ):
        formats.load(save(model, tmp_path / "m", processor_of()))


def test_a_width_that_contradicts_the_weights_is_refused(tmp_path: Path) -> None:
    folder = save(plain(), tmp_path / "m", processor_of())
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"mlp_ratio": 2', '"mlp_ratio": 4'))
    with pytest.raises(CheckpointError, match=r"mlp\.fc1\.weight is \(48, 24\); expected \(96, 24\)"):
        formats.load(folder)


@pytest.mark.slow
def test_bundles_are_proven_and_found_again(tmp_path: Path) -> None:
    model = registers(use_swiglu_ffn=True)
    folder = save(model, tmp_path / "m", processor_of(48, 42))
    proves(folder, tmp_path / "out", "onnx-fp32", "openvino-fp32")
