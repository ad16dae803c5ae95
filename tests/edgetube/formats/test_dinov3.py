"""DINOv3 towers with a linear head beside them, against transformers' own tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgetube import formats
from edgetube.errors import CheckpointError
from tests.edgetube.formats.families import (
    answers,
    frames_of,
    pixels_of,
    proves,
    save,
    sees_the_same,
    shake,
    transformers,
)

SMALL = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "image_size": 224,
    "patch_size": 8, "initializer_range": 0.3,
}  # fmt: skip
PROCESSOR = transformers.DINOv3ViTImageProcessor(size={"height": 32, "width": 48})


def tower(**changes: Any) -> Any:
    return shake(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SMALL | changes)))


def head(width: int = 48, classes: int = 5) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(width, classes)


def with_head(model: Any, linear: torch.nn.Linear, folder: Path, prefix: str = "", **how: Any) -> Path:
    """The tower's folder with the head beside its tensors, which stand behind a prefix."""
    save(model, folder, PROCESSOR, **how)
    file = folder / "model.safetensors"
    state = {prefix + name: value for name, value in load_file(file).items()}
    save_file(state | {f"classifier.{name}": value for name, value in linear.state_dict().items()}, file)
    return folder


def agrees(folder: Path, model: Any, linear: torch.nn.Linear, size: tuple[int, int] = (32, 48)) -> Any:
    found = formats.load(folder).with_clip(size=size)
    frames = frames_of(found)
    with torch.no_grad():
        tokens = model(pixels_of(found, frames)[:, 0]).last_hidden_state
        read = tokens[:, 0]
        if linear.in_features > tokens.shape[2]:
            patches = tokens[:, 1 + model.config.num_register_tokens :]
            read = torch.cat([read, patches.mean(dim=1)], dim=1)
        expected = linear(read).numpy()
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(answers(found, frames), expected, atol=1e-4 * np.abs(expected).max())
    return found


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({"num_register_tokens": 4}, {}),
        ({"num_register_tokens": 2}, {"save_original_format": False}),
        ({}, {}),
        ({"use_gated_mlp": True, "hidden_act": "silu", "num_register_tokens": 1}, {}),
        ({"rope_theta": 30.0, "layer_norm_eps": 1e-3, "num_attention_heads": 4, "hidden_act": "gelu_new"}, {}),
        ({"query_bias": False, "key_bias": True, "value_bias": False, "proj_bias": False, "mlp_bias": False}, {}),
    ],
)
def test_logits_are_those_of_the_head_on_the_class_token(
    changes: dict[str, Any], how: dict[str, Any], tmp_path: Path
) -> None:
    model, linear = tower(**changes), head()
    found = agrees(with_head(model, linear, tmp_path / "m", **how), model, linear)
    assert found.notes[0] == "its classifier is taken to read the class token, by the number of its inputs"


def test_a_head_of_twice_the_width_also_reads_the_mean_of_the_patches(tmp_path: Path) -> None:
    model, linear = tower(num_register_tokens=4), head(96)
    found = agrees(with_head(model, linear, tmp_path / "m"), model, linear)
    assert "the class token and the mean of the patches" in found.notes[0]


@pytest.mark.parametrize("prefix", ["backbone.", "model.", "dinov3_vit.model."])
def test_the_tower_may_be_an_attribute_of_a_training_module(prefix: str, tmp_path: Path) -> None:
    model, linear = tower(num_register_tokens=4), head()
    agrees(with_head(model, linear, tmp_path / "m", prefix, save_original_format=False), model, linear)


def test_rotary_positions_follow_the_size(tmp_path: Path) -> None:
    model, linear = tower(num_register_tokens=4), head()
    agrees(with_head(model, linear, tmp_path / "m"), model, linear, (64, 40))


def test_half_precision_weights_become_float32_exactly(tmp_path: Path) -> None:
    model, linear = tower(num_register_tokens=4).to(torch.bfloat16), head()
    folder = with_head(model, linear, tmp_path / "m")
    exact = tower(num_register_tokens=4)  # its frequencies were never rounded
    exact.load_state_dict(model.float().state_dict())
    agrees(folder, exact, linear)


def test_preprocessing_is_that_of_the_processor(tmp_path: Path) -> None:
    """It resizes in floating point, ours rounds to whole levels."""
    sees_the_same(formats.load(with_head(tower(), head(), tmp_path / "m")), PROCESSOR)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no classifier: it is the tower alone; train a linear on labels"):
        formats.load(save(tower(), tmp_path / "tower", PROCESSOR))
    with pytest.raises(
        CheckpointError, match=r"classifier.weight is \(5, 50\); expected \(classes, 48\), of the class"
    ):
        formats.load(with_head(tower(), head(50), tmp_path / "other"))
    folder = with_head(tower(num_register_tokens=4), head(), tmp_path / "registers")
    config = json.loads((folder / "config.json").read_text()) | {"num_register_tokens": 3}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"embeddings.register_tokens is \(1, 4, 48\); expected \(1, 3, 48\)"):
        formats.load(folder)
    odd = tmp_path / "odd"
    folder = with_head(tower(), head(), odd)
    config = json.loads((odd / "config.json").read_text()) | {"num_attention_heads": 8}
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="its heads have 6 channels; expected a multiple of 4"):
        formats.load(odd)


@pytest.mark.slow
def test_bundles_are_proven_and_found_again(tmp_path: Path) -> None:
    model, linear = tower(num_register_tokens=4, use_gated_mlp=True, hidden_act="silu"), head()
    proves(with_head(model, linear, tmp_path / "m"), tmp_path / "out", "onnx-fp32", "openvino-fp32")
