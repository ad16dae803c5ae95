"""TimeSformer files as the authors' scripts save them, of weights under their names, against transformers' model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetube import formats
from edgetube.errors import CheckpointError, InputError
from edgetube.formats import timesformer_original
from edgetube.formats.reading.files import ReadOptions
from tests.edgetube.formats.families import answers, frames_of, pixels_of, proves, shake, transformers

SMALL = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "image_size": 32,
    "patch_size": 8, "num_frames": 4, "num_labels": 5, "initializer_range": 0.3,
}  # fmt: skip
SAID: dict[str, Any] = {
    "model": {"heads": 3},
    "input": {"mean": [0.45] * 3, "std": [0.225] * 3, "fps": 0.8235},
}
NAMES = (
    (r"^timesformer\.embeddings\.cls_token", "cls_token"),
    (r"^timesformer\.embeddings\.position_embeddings", "pos_embed"),
    (r"^timesformer\.embeddings\.time_embeddings", "time_embed"),
    (r"^timesformer\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^timesformer\.encoder\.layer\.", "blocks."),
    (r"^timesformer\.layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"\.temporal_layernorm\.", ".temporal_norm1."),
    (r"\.temporal_attention\.attention\.qkv\.", ".temporal_attn.qkv."),
    (r"\.temporal_attention\.output\.dense\.", ".temporal_attn.proj."),
    (r"\.temporal_dense\.", ".temporal_fc."),
    (r"\.attention\.attention\.qkv\.", ".attn.qkv."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)
"""transformers' names -> those of `timesformer/models/vit.py`, as transformers' own converter has them."""


def model_of(**changes: Any) -> Any:
    return shake(transformers.TimesformerForVideoClassification(transformers.TimesformerConfig(**SMALL | changes)))


def authors(model: Any, prefix: str = "model.") -> dict[str, torch.Tensor]:
    """The state dict in the authors' names."""
    made = {}
    for name, value in model.state_dict().items():
        for old, new in NAMES:
            name = re.sub(old, new, name)
        made[prefix + name] = value
    return made


def saved(path: Path, state: Any) -> Path:
    """As the training script saves it: beside the optimiser and a text of its configuration."""
    torch.save({"epoch": 14, "model_state": state, "optimizer_state": {"state": {}}, "cfg": "DATA:\n"}, path)
    return path


def said(folder: Path, **changes: Any) -> ReadOptions:
    (folder / "said.json").write_text(json.dumps(SAID | changes))
    return ReadOptions(spec=str(folder / "said.json"))


@pytest.mark.parametrize("prefix", ["model.", "module.model.", ""])
@pytest.mark.parametrize("kind", ["divided_space_time", "joint_space_time"])
def test_logits_are_those_of_transformers(kind: str, prefix: str, tmp_path: Path) -> None:
    model = model_of(attention_type=kind)
    found = formats.load(saved(tmp_path / "m.pyth", authors(model, prefix)), said(tmp_path))
    assert (found.spec.attention, found.spec.clip) == (kind.partition("_")[0], (4, 32, 32))
    assert (found.contract.mean, found.contract.fps) == ((0.45,) * 3, 0.8235)
    frames = frames_of(found)
    with torch.no_grad():
        expected = model(pixels_of(found, frames)).logits.numpy()
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(answers(found, frames), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"model": {}}, "heads"),
        ({"input": {}}, "input mean, input std, input sampling"),
        ({"model": {}, "input": {"mean": [0.5] * 3}}, "heads, input std, input sampling"),
    ],
)
def test_what_the_file_does_not_say_has_to_be_said(changes: dict[str, Any], missing: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pyth", authors(model_of()))
    with pytest.raises(CheckpointError, match=rf"does not say {missing}; say it with --spec FILE"):
        formats.load(path, said(tmp_path, **changes))


def test_the_frames_are_those_of_the_table(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pyth", authors(model_of()))
    with pytest.raises(InputError, match=r"says model.frames, which does not apply"):
        formats.load(path, said(tmp_path, model={"heads": 3, "frames": 8}))


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("head.", "has no classifier, head.weight"),
        ("blocks.1.temporal_fc.", "lacks blocks.1.temporal_fc.weight"),
        ("blocks.0.temporal_", "has tensors that this model does not: blocks.1.temporal_"),
        ("cls_token", "lacks cls_token"),
    ],
)
def test_files_that_lack_something(gone: str, message: str, tmp_path: Path) -> None:
    state = {name: value for name, value in authors(model_of(), "").items() if not name.startswith(gone)}
    with pytest.raises(CheckpointError, match=message):
        formats.load(saved(tmp_path / "m.pyth", state), said(tmp_path))


def test_a_table_of_places_that_is_not_square(tmp_path: Path) -> None:
    """Its height and width are not told by the number of places: they are said, and are then checked."""
    state = authors(model_of())
    state["model.pos_embed"] = state["model.pos_embed"][:, :9]
    path = saved(tmp_path / "m.pyth", state)
    with pytest.raises(CheckpointError, match=r"pos_embed is \(1, 9, 24\); expected \(1, 5, 24\)"):
        formats.load(path, said(tmp_path))
    found = formats.load(path, said(tmp_path, model={"heads": 3, "size": [16, 32]}))
    assert found.spec.grids == ((4, 2, 4),)


@pytest.mark.slow
def test_exported_and_read_back_from_the_bundle(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pyth", authors(model_of()))
    bundle = proves(path, tmp_path / "out", "onnx-fp32", lowering="gather", read=said(tmp_path))
    assert bundle.checkpoint["format"] == timesformer_original.NAME
