"""V-JEPA 2's own files, made of the weights of transformers' model, which answers for the authors'."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgetube import formats
from edgetube.errors import CheckpointError
from edgetube.formats import vjepa2_original
from edgetube.formats.reading.files import ReadOptions
from tests.edgetube.formats.families import answers, frames_of, pixels_of, proves, shake, transformers

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 1.5, "crop_size": 32,
    "patch_size": 8, "frames_per_clip": 6, "num_labels": 5, "initializer_range": 0.3, "num_pooler_layers": 2,
    "pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1,
}  # fmt: skip
SAID = {"heads": 2, "pool_heads": 4, "frames": 6, "size": [32, 32]}
NAMES = (
    (r"^vjepa2\.encoder\.embeddings\.patch_embeddings", "patch_embed"), (r"^vjepa2\.encoder\.layernorm", "norm"),
    (r"^vjepa2\.encoder\.layer", "blocks"), (r"\.attention\.", ".attn."), ("self_attention_layers", "blocks"),
    ("self_attn.out_proj", "attn.proj"), ("self_attn", "attn"), ("cross_attention_layer", "cross_attention_block"),
    ("cross_attn", "xattn"), ("layer_norm", "norm"), (r"xattn\.q_proj", "xattn.q"), ("classifier", "linear"),
)  # fmt: skip


def model_of(**changes: Any) -> Any:
    """The model as the authors' code makes it: a pooler with 4 heads and PyTorch's epsilon."""
    model: Any = shake(transformers.VJEPA2ForVideoClassification(transformers.VJEPA2Config(**SMALL | changes)))
    for module in model.pooler.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
        if hasattr(module, "num_heads"):
            module.num_heads, module.head_dim, module.scale = 4, 8, 8**-0.5
    return model


def original(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of the encoder and of the classifier in the authors' names, without prefixes."""
    state = {name: value for name, value in model.state_dict().items() if "predictor" not in name}
    for old, new in NAMES:
        state = {re.sub(old, new, name): value for name, value in state.items()}
    for kinds, whole in ((("query", "key", "value"), "qkv"), (("q_proj", "k_proj", "v_proj"), "qkv")):
        fuse(state, kinds, whole)
    fuse(state, ("k_proj", "v_proj"), "kv")
    probe = {name: value for name, value in state.items() if name.startswith(("pooler.", "linear."))}
    return {name: value for name, value in state.items() if name not in probe}, probe


def fuse(state: dict[str, Tensor], kinds: tuple[str, ...], whole: str) -> None:
    for end in ("weight", "bias"):
        last = f"{kinds[0]}.{end}"
        for stem in [name.removesuffix(last) for name in state if name.endswith(f".{last}")]:
            state[f"{stem}{whole}.{end}"] = torch.cat([state.pop(f"{stem}{kind}.{end}") for kind in kinds])


def wrapped(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two files."""
    encoder, probe = original(model)
    pretrained = {f"module.backbone.{name}": value for name, value in encoder.items()}
    stale = {name: torch.zeros_like(value) for name, value in pretrained.items()}
    predictor = {"module.backbone.mask_tokens.0": torch.zeros(1, 1, 3)}
    classifiers = [{f"module.{name}": value for name, value in probe.items()}]
    first = {"encoder": stale, "target_encoder": pretrained, "predictor": predictor, "epoch": 3, "opt": {"state": {}}}
    return first, {"classifiers": classifiers, "opt": [{}], "epoch": 20, "batch_size": 4}


def said(folder: Path, **changes: Any) -> ReadOptions:
    (folder / "said.json").write_text(json.dumps({"model": SAID} | changes))
    return ReadOptions(spec=str(folder / "said.json"))


def folder_of(path: Path, *files: dict[str, Any]) -> Path:
    path.mkdir()
    for name, data in zip(("vitl.pt", "ssv2-vitl.pt", "third.pt"), files, strict=False):
        torch.save(data, path / name)
    return path


def agrees(path: Path, options: ReadOptions, model: Any) -> Any:
    found = formats.load(path, options)
    frames = frames_of(found)
    with torch.no_grad():
        expected = model(pixels_of(found, frames)).logits.numpy()
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(answers(found, frames), expected, atol=1e-4 * np.abs(expected).max())
    return found


def test_two_files_in_a_folder(tmp_path: Path) -> None:
    model = model_of()
    found = agrees(folder_of(tmp_path / "m", *wrapped(model)), said(tmp_path), model)
    assert found.format == vjepa2_original.NAME
    assert found.notes[0] == "the encoder is target_encoder"
    assert found.notes[1].startswith("its classifier is taken for one that reads the last layer: ")
    pool = found.spec.query_pool
    assert pool is not None
    assert (pool.norm_eps, found.spec.norm_eps, pool.depth) == (1e-5, 1e-6, 2)
    contract = found.contract
    assert (contract.resize_size, contract.height, contract.stride) == (36, 32, 4)
    assert contract.mean == (0.485, 0.456, 0.406)


def test_both_in_one_file(tmp_path: Path) -> None:
    model = model_of(num_pooler_layers=0)
    first, second = wrapped(model)
    del first["target_encoder"]
    first["encoder"] = {f"module.backbone.{name}": value for name, value in original(model)[0].items()}
    torch.save({**second, **first}, tmp_path / "m.pt")
    found = agrees(tmp_path / "m.pt", said(tmp_path), model)
    assert found.notes[0] == "the encoder is encoder"


def test_stored_positions_beside_rotary_ones_are_left_out(tmp_path: Path) -> None:
    model = model_of()
    first, second = wrapped(model)
    first["target_encoder"]["module.backbone.pos_embed"] = torch.ones(1, 48, 32)
    found = agrees(folder_of(tmp_path / "m", first, second), said(tmp_path), model)
    used = {use.name: use.used for use in found.keys}
    assert used["module.backbone.pos_embed"] == "not used: its positions are rotary"
    without = {k: v for k, v in second["classifiers"][0].items() if ".blocks." not in k}
    with pytest.raises(CheckpointError, match="it may be the first V-JEPA"):
        formats.load(folder_of(tmp_path / "n", first, {"classifiers": [without]}), said(tmp_path))


def test_the_first_of_several_classifiers(tmp_path: Path) -> None:
    model = model_of()
    first, second = wrapped(model)
    second["classifiers"] += [{name: value * 2 for name, value in second["classifiers"][0].items()}]
    found = agrees(folder_of(tmp_path / "m", first, second), said(tmp_path), model)
    assert "it has 2 classifiers, of which the first is taken" in found.notes


def test_what_the_user_says_of_the_input_counts(tmp_path: Path) -> None:
    options = said(tmp_path, input={"fps": 8, "mean": [0, 0, 0], "resize_size": 40})
    contract = formats.load(folder_of(tmp_path / "m", *wrapped(model_of())), options).contract
    assert (contract.sampling, contract.fps, contract.mean, contract.resize_size) == ("uniform", 8, (0, 0, 0), 40)


def test_half_of_a_model_is_refused(tmp_path: Path) -> None:
    first, second = wrapped(model_of())
    for name, data in (("encoder", first), ("probe", second)):
        torch.save(data, tmp_path / f"{name}.pt")
    with pytest.raises(
        CheckpointError, match="no classifier: it is V-JEPA 2 as it was pre-trained; give a folder with"
    ):
        formats.load(tmp_path / "encoder.pt", said(tmp_path))
    with pytest.raises(CheckpointError, match="no encoder: it is a classifier on top of V-JEPA 2; give a folder with"):
        formats.load(tmp_path / "probe.pt", said(tmp_path))
    for files in ((first, first), (first, second, second)):
        with pytest.raises(CheckpointError, match=r"has several files of weights, ssv2-vitl\.pt, "):
            formats.load(folder_of(tmp_path / f"{len(files)}", *files), said(tmp_path))


def test_what_nobody_says_is_never_guessed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", *wrapped(model_of()))
    with pytest.raises(CheckpointError, match="does not say heads, pool_heads, frames, size; say it with --spec"):
        formats.load(folder)
    with pytest.raises(CheckpointError, match=r"size is 3\.5; expected an integer"):
        formats.load(folder, said(tmp_path, model=SAID | {"size": [32, 3.5]}))


def test_tensors_of_another_model_are_refused(tmp_path: Path) -> None:
    first, second = wrapped(model_of())
    first["target_encoder"]["module.backbone.patch_embed_img.proj.weight"] = torch.ones(2)
    with pytest.raises(CheckpointError, match=r"tensors that this model does not: patch_embed_img\.proj\.weight"):
        formats.load(folder_of(tmp_path / "m", first, second), said(tmp_path))


@pytest.mark.slow
def test_exported_and_read_back_from_the_bundle(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", *wrapped(model_of()))
    bundle = proves(folder, tmp_path / "out", "onnx-fp32", read=said(tmp_path), lowering="gather")
    assert bundle.spec.query_pool is not None
