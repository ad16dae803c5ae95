"""VideoMAE's own files, made of the weights of transformers' model, which answers for the authors'."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from edgetube import formats
from edgetube.errors import CheckpointError
from edgetube.formats import videomae_original
from edgetube.formats.reading.files import ReadOptions
from tests.edgetube.formats.families import answers, frames_of, pixels_of, proves, shake, transformers

SMALL = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "image_size": 32,
    "num_frames": 4, "num_labels": 5, "initializer_range": 0.3, "layer_norm_eps": 1e-6,
}  # fmt: skip
SAID: dict[str, Any] = {
    "model": {"heads": 3, "frames": 4, "size": [32, 32]},
    "input": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "sampling": "segments"},
}
NAMES = (
    ("videomae.embeddings.patch_embeddings.projection", "patch_embed.proj"), (r"videomae.encoder.layer\.", "blocks."),
    ("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("attention.attention", "attn"),
    ("attention.output.dense", "attn.proj"), ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"),
    ("query.bias", "q_bias"), ("value.bias", "v_bias"), ("classifier", "head"),
)  # fmt: skip


def model_of(**changes: Any) -> Any:
    model: Any = shake(transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(**SMALL | changes)))
    model.fc_norm.eps = 1e-6
    return model


def original(model: Any) -> dict[str, Tensor]:
    """The weights in the authors' names: queries, keys and values in one matrix."""
    state = {}
    for name, value in model.state_dict().items():
        for old, new in NAMES:
            name = re.sub(old, new, name)
        state[name] = value
    for stem in [name.removesuffix("query.weight") for name in state if name.endswith("query.weight")]:
        parts = [state.pop(f"{stem}{part}.weight") for part in ("query", "key", "value")]
        state[f"{stem}qkv.weight"] = torch.cat(parts)
    return state


def of_mmaction(state: dict[str, Tensor], table: Tensor) -> dict[str, Tensor]:
    """The names that mmaction2 gives them, with its stored table."""
    names = {"head.": "cls_head.fc_cls.", "patch_embed.proj.": "backbone.patch_embed.projection."}
    made = {}
    for name, value in state.items():
        new = next((name.replace(a, b) for a, b in names.items() if name.startswith(a)), f"backbone.{name}")
        made[new.replace("mlp.fc1.", "mlp.layers.0.0.").replace("mlp.fc2.", "mlp.layers.1.")] = value
    return made | {"backbone.pos_embed": table[None]}


def said(folder: Path, **changes: Any) -> ReadOptions:
    (folder / "said.json").write_text(json.dumps(SAID | changes))
    return ReadOptions(spec=str(folder / "said.json"))


def saved(path: Path, data: Any) -> Path:
    torch.save(data, path)
    return path


def agrees(path: Path, options: ReadOptions, model: Any) -> Any:
    found = formats.load(path, options)
    frames = frames_of(found)
    with torch.no_grad():
        expected = model(pixels_of(found, frames)).logits.numpy()
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(answers(found, frames), expected, atol=1e-4 * np.abs(expected).max())
    return found


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1, model="x")},
        lambda state: {"module": state, "optimizer": {"a": 1}},
        lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
        lambda state: {"model": {f"backbone.{name}": value.half() for name, value in state.items()}},
    ],
)
def test_logits_are_those_of_transformers(wrap: Any, tmp_path: Path) -> None:
    model = model_of().half().float()
    found = agrees(saved(tmp_path / "m.pth", wrap(original(model))), said(tmp_path), model)
    assert found.format == videomae_original.NAME
    assert found.contract.sampling == "segments"
    assert found.labels == tuple(f"class-{i}" for i in range(5))


def test_without_biases_of_queries_and_values(tmp_path: Path) -> None:
    model = model_of(qv_bias=False, hidden_act="gelu_new", layer_norm_eps=1e-3)
    model.fc_norm.eps = 1e-3
    model_said = {**SAID["model"], "activation": "gelu-tanh", "norm_eps": 1e-3}
    agrees(saved(tmp_path / "m.pth", original(model)), said(tmp_path, model=model_said), model)


def test_a_stored_table_and_the_names_of_mmaction2(tmp_path: Path) -> None:
    model = model_of()
    table = torch.randn(model.videomae.embeddings.position_embeddings.shape[1:], generator=torch.manual_seed(1))
    model.videomae.embeddings.position_embeddings = table[None]
    data = {"meta": {"epoch": 1}, "state_dict": of_mmaction(original(model), table)}
    agrees(saved(tmp_path / "m.pth", data), said(tmp_path), model)
    short = {"meta": {}, "state_dict": of_mmaction(original(model), table[:4])}
    with pytest.raises(CheckpointError, match=r"pos_embed is \(1, 4, 24\); expected \(1, 8, 24\)"):
        formats.load(saved(tmp_path / "short.pth", short), said(tmp_path))


def test_layer_scale_is_folded_in(tmp_path: Path) -> None:
    """The authors' block: x + gamma_1 attention(norm1(x)), then x + gamma_2 mlp(norm2(x))."""
    model = model_of()
    state = original(model)
    torch.manual_seed(2)
    state |= {f"blocks.{i}.gamma_{j}": torch.rand(24) for i in (0, 1) for j in (1, 2)}
    found = formats.load(saved(tmp_path / "m.pth", {"model": state}), said(tmp_path))
    frames = frames_of(found)
    x = F.conv3d(pixels_of(found, frames).transpose(1, 2), state["patch_embed.proj.weight"], None, (2, 16, 16))
    x = x.flatten(2).transpose(1, 2) + state["patch_embed.proj.bias"] + model.videomae.embeddings.position_embeddings
    for i in (0, 1):
        s = {key.removeprefix(f"blocks.{i}."): value for key, value in state.items() if key.startswith(f"blocks.{i}.")}
        y = F.layer_norm(x, (24,), s["norm1.weight"], s["norm1.bias"], 1e-6) @ s["attn.qkv.weight"].T
        q, k, v = (
            (y + torch.cat([s["attn.q_bias"], torch.zeros(24), s["attn.v_bias"]])).unflatten(2, (3, 3, 8)).unbind(2)
        )
        scores = torch.einsum("bnhc,bmhc->bhnm", q, k) / 8**0.5
        y = torch.einsum("bhnm,bmhc->bnhc", scores.softmax(-1), v).flatten(2)
        x = x + s["gamma_1"] * (y @ s["attn.proj.weight"].T + s["attn.proj.bias"])
        y = F.layer_norm(x, (24,), s["norm2.weight"], s["norm2.bias"], 1e-6)
        y = F.gelu(y @ s["mlp.fc1.weight"].T + s["mlp.fc1.bias"]) @ s["mlp.fc2.weight"].T + s["mlp.fc2.bias"]
        x = x + s["gamma_2"] * y
    y = F.layer_norm(x.mean(1), (24,), state["fc_norm.weight"], state["fc_norm.bias"], 1e-6)
    expected = (y @ state["head.weight"].T + state["head.bias"]).numpy()
    np.testing.assert_allclose(answers(found, frames), expected, atol=1e-4 * np.abs(expected).max())


def test_what_nobody_says_is_never_guessed(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pth", {"model": original(model_of())})
    with pytest.raises(
        CheckpointError, match="does not say heads, frames, size, input mean, input std, input sampling"
    ):
        formats.load(path)
    with pytest.raises(CheckpointError, match="does not say frames, input std; say it with --spec"):
        formats.load(path, said(tmp_path, model={"heads": 3, "size": [32, 32]}, input={"mean": [0] * 3, "fps": 5}))
    with pytest.raises(CheckpointError, match="size has 1 entries; expected 2"):
        formats.load(path, said(tmp_path, model={"heads": 3, "frames": 4, "size": [32]}))


ARGUMENTS = {
    "model": "vit_small_patch16_224", "num_frames": 4, "num_segments": 1, "input_size": 32, "short_side_size": 40,
    "imagenet_default_mean_and_std": True, "sampling_rate": 4, "data_set": "Kinetics-400",
}  # fmt: skip


def test_arguments_of_the_script_say_it(tmp_path: Path) -> None:
    wide = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 1, "initializer_range": 0.05}
    model = model_of(**wide)
    data = {"model": original(model), "args": argparse.Namespace(**ARGUMENTS)}
    found = agrees(saved(tmp_path / "m.pth", data), ReadOptions(), model)
    contract = found.contract
    assert (contract.sampling, contract.stride, contract.resize_size, contract.height) == ("stride", 4, 40, 32)
    assert contract.mean == (0.485, 0.456, 0.406)
    assert found.notes[0].startswith("frames, heads, size, mean, resize_size, sampling, std, stride: as the arguments")
    other = formats.load(tmp_path / "m.pth", said(tmp_path, model={}, input={"fps": 8.0, "std": [1, 1, 1]}))
    assert (other.contract.sampling, other.contract.stride, other.contract.std) == ("uniform", None, (1, 1, 1))
    assert other.notes[0].startswith("frames, heads, size, mean, resize_size: as the arguments")
    data["args"] = argparse.Namespace(**ARGUMENTS | {"data_set": "SSV2"})
    assert formats.load(saved(tmp_path / "n.pth", data)).contract.sampling == "segments"


def test_an_architecture_of_another_width_says_nothing(tmp_path: Path) -> None:
    data = {"model": original(model_of()), "args": argparse.Namespace(**ARGUMENTS)}
    with pytest.raises(CheckpointError, match="does not say heads; say it with --spec"):
        formats.load(saved(tmp_path / "m.pth", data))


def test_a_moving_average_is_chosen(tmp_path: Path) -> None:
    model, other = model_of(), original(model_of())
    path = saved(tmp_path / "m.pth", {"model": other, "model_ema": original(shake(model, 5))})
    with pytest.raises(CheckpointError, match="holds model and model_ema; choose with --no-ema or --ema"):
        formats.load(path, said(tmp_path))
    agrees(path, ReadOptions(spec=said(tmp_path).spec, ema=True), model)


def test_pre_training_files_have_no_classifier(tmp_path: Path) -> None:
    state = {key: value for key, value in original(model_of()).items() if not key.startswith(("head", "fc_norm"))}
    encoder = {f"encoder.{key}": value for key, value in state.items()} | {"mask_token": torch.zeros(1, 1, 8)}
    backbone = {f"backbone.{key}": value for key, value in state.items()}
    for i, data in enumerate((encoder, {"model": encoder}, {"module": backbone})):
        with pytest.raises(CheckpointError, match=r"no classifier, head\.weight: it is VideoMAE as it was pre-trained"):
            formats.load(saved(tmp_path / f"{i}.pth", data))


def test_models_that_compute_something_else_are_refused(tmp_path: Path) -> None:
    state = original(model_of())
    cosine = state | {"blocks.0.attn.scale": torch.ones(3, 1, 1)}
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.scale is of cosine attention"):
        formats.load(saved(tmp_path / "a.pth", {"module": cosine}), said(tmp_path))
    first = {key.replace("fc_norm", "norm"): value for key, value in state.items()}
    with pytest.raises(CheckpointError, match="its classifier reads the first patch"):
        formats.load(saved(tmp_path / "b.pth", {"model": first}), said(tmp_path))
    more = state | {"blocks.0.extra": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"tensors that this model does not: blocks\.0\.extra"):
        formats.load(saved(tmp_path / "c.pth", {"model": more}), said(tmp_path))


@pytest.mark.slow
def test_exported_and_read_back_from_the_bundle(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pth", {"model": original(model_of())})
    bundle = proves(path, tmp_path / "out", "onnx-fp32", read=said(tmp_path), lowering="gather")
    assert bundle.checkpoint["spec"].endswith("said.json")
