"""timm's hub folders and state dicts against timm's own models and transforms."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from edgetube import formats, preprocess
from edgetube.errors import CheckpointError, InputError
from edgetube.formats import timm as own
from edgetube.formats.reading.files import ReadOptions
from edgetube.model.checkpoints import Checkpoint
from tests.edgetube.formats.families import answers, frames_of, picture, pixels_of, proves, shake

timm: Any = importlib.import_module("timm")
hub: Any = importlib.import_module("timm.models._hub")

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32, "num_classes": 5}
LABELS = list("abcde")


def model_of(name: str = "vit_base_patch16_224", **changes: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shake(timm.create_model(name, **SMALL | changes))


def folder_of(model: Any, path: Path, **how: Any) -> Path:
    """A hub folder, as timm writes it."""
    config = {"label_names": LABELS, **how.pop("config", {})}
    hub.save_for_hf(model, path, model_config=config, safe_serialization=True, **how)
    return path


def agrees(found: Checkpoint, model: Any) -> None:
    frames = frames_of(found)
    with torch.no_grad():
        expected = model(pixels_of(found, frames)[:, 0]).numpy()
    assert np.ptp(expected) > 0.2
    np.testing.assert_allclose(answers(found, frames), expected, atol=1e-4 * np.abs(expected).max())


MODELS = [
    ("vit_base_patch16_224", {}),
    ("vit_base_patch16_224", {"num_heads": 3, "qkv_bias": False, "init_values": 0.3, "act_layer": "gelu_tanh"}),
    ("vit_base_patch16_224", {"global_pool": "avg", "class_token": False}),
    ("vit_base_patch16_224", {"global_pool": "avg", "reg_tokens": 2, "no_embed_class": True}),
    ("vit_base_patch16_224", {"reg_tokens": 3, "mlp_ratio": 2.5}),
    ("vit_base_patch16_224", {"global_pool": "avg", "fc_norm": False}),
    ("vit_base_patch16_clip_224", {}),
    ("vit_base_patch16_clip_quickgelu_224", {}),
    ("vit_base_patch16_siglip_224", {}),
    ("vit_so400m_patch16_siglip_256", {"num_heads": 4}),
    ("vit_base_patch32_siglip_gap_256", {}),
    ("vit_small_patch14_reg4_dinov2", {}),
    ("vit_giant_patch14_dinov2", {}),
    ("deit_base_distilled_patch16_224", {}),
    ("deit3_base_patch16_224", {}),
    ("vit_small_patch16_dinov3", {"global_pool": "token"}),
    ("vit_small_plus_patch16_dinov3_qkvb", {}),
    ("eva_giant_patch14_224", {}),
    ("vit_base_patch16_224", {"img_size": (32, 48)}),
]


@pytest.mark.parametrize(("name", "changes"), MODELS)
def test_logits_are_those_of_timm(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(name, **changes)
    crop = {"crop_mode": "squash"} if "img_size" in changes else {}  # center is known for square inputs alone
    size = (3, *np.broadcast_to(changes.get("img_size", 32), 2).tolist())
    found = formats.load(folder_of(model, tmp_path / "m", data_config={"input_size": size, **crop}))
    agrees(found, model)
    assert found.labels == tuple(LABELS)


@pytest.mark.parametrize("name", ["vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_siglip_224"])
def test_a_bare_state_dict_needs_the_name_of_its_architecture(name: str, tmp_path: Path) -> None:
    model = model_of(name, embed_dim=48, num_heads=12)
    torch.save({"epoch": 3, "arch": name, "state_dict": model.state_dict()}, tmp_path / "trained.pth.tar.pth")
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    said = tmp_path / "spec.json"
    said.write_text('{"input": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_size": 36}}')
    found = formats.load(tmp_path / "bare.safetensors", ReadOptions(arch=f"{name}.some_tag", spec=str(said)))
    agrees(found, model)
    assert (found.contract.filter, found.contract.resize_size) == ("bicubic", 36)
    agrees(formats.load(tmp_path / "trained.pth.tar.pth", ReadOptions(spec=str(said))), model)
    with pytest.raises(CheckpointError, match=r"does not say heads \(give its architecture with --arch NAME"):
        formats.load(tmp_path / "bare.safetensors", ReadOptions(spec=str(said)))
    with pytest.raises(CheckpointError, match="does not say mean, std, resize_size of its input"):
        formats.load(tmp_path / "bare.safetensors", ReadOptions(arch=name))
    said.write_text(
        '{"model": {"heads": 12, "activation": "quick-gelu", "norm_eps": 1e-5}, '
        '"input": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize": "stretch"}}'
    )
    found = formats.load(tmp_path / "bare.safetensors", ReadOptions(spec=str(said)))
    assert (found.spec.activation, found.contract.resize) == ("quick-gelu", "stretch")
    said.write_text('{"input": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}')
    with pytest.raises(CheckpointError, match="does not say resize_size of its input"):
        formats.load(tmp_path / "bare.safetensors", ReadOptions(arch=name, spec=str(said)))


def test_positions_follow_timm_to_another_size(tmp_path: Path) -> None:
    model = model_of(dynamic_img_size=True)
    found = formats.load(folder_of(model, tmp_path / "m")).with_clip(size=(40, 64))
    agrees(found, model)


def test_a_table_of_another_size_than_the_input_is_resized(tmp_path: Path) -> None:
    """DINOv2's files have positions for 518 pixels, and users ask for 224."""
    model = model_of(dynamic_img_size=True)
    folder = folder_of(model, tmp_path / "m", data_config={"input_size": (3, 48, 48)})
    found = formats.load(folder)
    assert found.spec.size == (48, 48)
    agrees(found, model)


def test_image_towers_answer_with_text_features(tmp_path: Path) -> None:
    text = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "text.npy", text.numpy())
    model = model_of("vit_base_patch16_clip_224")
    found = formats.load(folder_of(model, tmp_path / "m"), ReadOptions(text_features=str(tmp_path / "text.npy")))
    frames = frames_of(found)
    with torch.no_grad():
        feature = model(pixels_of(found, frames)[:, 0])
    feature = torch.nn.functional.normalize(feature, dim=1)
    expected = (100 * feature @ torch.nn.functional.normalize(text, dim=1).T).numpy()
    np.testing.assert_allclose(answers(found, frames), expected, atol=1e-4 * np.abs(expected).max())
    assert found.labels == ("class-0", "class-1", "class-2")
    bare = folder_of(model_of("vit_base_patch16_siglip_224", num_classes=0), tmp_path / "tower")
    with pytest.raises(CheckpointError, match="has no classifier: train a head"):
        formats.load(bare)
    with pytest.raises(CheckpointError, match="image features of length 24, but those of --text-features are 5 long"):
        formats.load(bare, ReadOptions(text_features=str(tmp_path / "text.npy")))
    np.save(tmp_path / "wide.npy", torch.randn(3, 24).numpy())
    tower = formats.load(bare, ReadOptions(text_features=str(tmp_path / "wide.npy")))
    assert tower.spec.classifiers == (("classes", 3),)


def known_names() -> list[str]:
    names = []
    for name in timm.list_models():
        try:
            own.architecture(Path("x"), name)
        except CheckpointError:
            continue
        names.append(name)
    return names


def facts_of(model: Any) -> tuple[Any, ...]:
    """What the names of architectures tell, of timm's own model; read from the modules."""
    block = model.blocks[0]
    kind = {"QuickGELU": "quick-gelu", "GELUTanh": "gelu-tanh", "SiLU": "silu"}
    act = kind.get(type(block.mlp.act).__name__, "gelu")
    assert type(block).__name__ in ("Block", "EvaBlock"), "no other blocks are known"
    return block.attn.num_heads, act, block.norm1.eps, type(block.norm1).__name__


@pytest.mark.long
def test_names_tell_what_timm_builds() -> None:
    names = known_names()
    assert len(names) > 130
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        arch = own.architecture(Path("x"), name)
        heads, act, eps, norm = facts_of(model)
        gated = type(model.blocks[0].mlp).__name__ in ("GluMlp", "SwiGLU")
        assert (arch.heads, "silu" if gated else arch.activation, arch.eps) == (heads, act, eps), name
        assert norm == "LayerNorm", name
        assert (type(getattr(model, "rope", None)).__name__ == "RotaryEmbeddingDinoV3") == arch.is_rotary, name


@pytest.mark.parametrize(
    "name",
    ["vit_base_patch16_rpn_224", "vit_base_patch16_xp_224", "vit_base_patch16_rope_224", "resnet50", "eva02_tiny", "x"],
)
def test_other_architectures_are_refused_by_name(name: str) -> None:
    with pytest.raises(CheckpointError, match="does not know timm's architecture"):
        own.architecture(Path("m"), name)


def test_post_norm_blocks_are_refused_although_their_tensors_are_the_same(tmp_path: Path) -> None:
    model = model_of("vit_base_patch16_rpn_224")
    with pytest.raises(CheckpointError, match="'vit_base_patch16_rpn_224'"):
        formats.load(folder_of(model, tmp_path / "m"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": True}, "normalises queries and keys"),
        ({"scale_attn_norm": True}, "LayerNorm inside of its attention"),
        ({"scale_mlp_norm": True}, "LayerNorm inside of its MLPs"),
        ({"global_pool": "avgmax"}, "global_pool is 'avgmax'"),
        ({"global_pool": "avg", "pool_include_prefix": True}, "pool_include_prefix True"),
        ({"global_pool": "map"}, "attention pool leaves out class and register tokens"),
        ({"act_layer": "relu"}, "act_layer 'relu'"),
        ({"norm_layer": "rmsnorm"}, "norm_layer 'rmsnorm'"),
        ({"in_chans": 1}, "takes 1 channels"),
    ],
)
def test_what_no_spec_says_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = folder_of(model_of(**changes), tmp_path / "m")
    with pytest.raises(CheckpointError, match=message):
        formats.load(folder)


def test_tensors_that_are_left_over_are_refused(tmp_path: Path) -> None:
    folder = folder_of(model_of(), tmp_path / "m")
    save_file(model_of().state_dict() | {"extra.weight": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensors that this model does not: extra\.weight"):
        formats.load(folder)


def test_options_that_say_nothing_about_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--arch does not apply"):
        formats.load(folder_of(model_of(), tmp_path / "m"), ReadOptions(arch="vit_base_patch16_224"))


@pytest.mark.parametrize(
    ("cfg", "sizes"),
    [
        ({"crop_pct": 0.9}, [(131, 97), (97, 131), (64, 64), (301, 225)]),
        ({"crop_pct": 0.95, "interpolation": "bilinear"}, [(131, 97), (97, 131), (300, 225)]),
        ({"crop_pct": 1.0, "crop_mode": "squash"}, [(90, 97), (97, 90), (36, 50)]),
        ({"crop_pct": 0.8, "crop_mode": "squash", "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}, [(90, 97)]),
        ({}, [(131, 97), (60, 64)]),
    ],
)
def test_pixels_are_those_of_timm_s_transform(
    cfg: dict[str, Any], sizes: list[tuple[int, int]], tmp_path: Path
) -> None:
    """timm's own transform for evaluation, of a picture of Pillow; what is left of its pixels after undoing the
    normalisation. Strongly shrunk portraits are left out for "squash": Pillow 13 resizes their rows first."""
    folder = folder_of(model_of(), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for name in ("crop_pct", "crop_mode", "interpolation", "mean", "std"):
        config["pretrained_cfg"].pop(name, None)
    config["pretrained_cfg"] |= cfg
    (folder / "config.json").write_text(json.dumps(config))
    contract = formats.load(folder).contract
    theirs = timm.data.create_transform(**timm.data.resolve_data_config({}, config["pretrained_cfg"]))
    for size in sizes:
        for kind in ("noise", "natural"):
            frame = picture(kind, size)
            levels = theirs(Image.fromarray(frame)).permute(1, 2, 0).numpy()
            levels = (levels * np.array(contract.std) + np.array(contract.mean)) * 255
            ours = preprocess.prepare(frame, contract)[0]
            assert ours.shape == levels.shape
            assert np.abs(ours - levels).max() < 1.01


def test_an_input_that_no_contract_says(tmp_path: Path) -> None:
    folder = folder_of(model_of(), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"crop_mode": "border"}, "crop_mode is 'border'"),
        ({"interpolation": "lanczos"}, "lanczos"),
        ({"crop_pct": "much"}, "crop_pct"),
        ({"input_size": [3, 32]}, "input_size"),
    ):
        changed = config | {"pretrained_cfg": config["pretrained_cfg"] | change}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message):
            formats.load(folder)


def test_the_licence_is_that_of_the_settings(tmp_path: Path) -> None:
    folder = folder_of(model_of(), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["license"] = "cc-by-nc-4.0"
    (folder / "config.json").write_text(json.dumps(config))
    found = formats.load(folder)
    assert found.licence == "cc-by-nc-4.0"
    assert any("commercial" in note for note in found.notes)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert formats.load(folder).licence == "mit"


@pytest.mark.parametrize("change", [{"model_args": [1]}, {"label_names": 3}, {"pretrained_cfg": {"mean": "grey"}}])
def test_settings_of_another_type_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    folder = folder_of(model_of(), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError):
        formats.load(folder)


def test_a_folder_of_the_first_layout(tmp_path: Path) -> None:
    """Everything at the top of config.json, `labels` for the names."""
    model = model_of()
    folder = folder_of(model, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    flat = config["pretrained_cfg"] | {"architecture": config["architecture"], "labels": LABELS}
    (folder / "config.json").write_text(json.dumps(flat))
    said = tmp_path / "spec.json"
    said.write_text('{"model": {"heads": 2}}')
    found = formats.load(folder, ReadOptions(spec=str(said)))
    agrees(found, model)
    assert found.labels == tuple(LABELS)


@pytest.mark.slow
def test_an_export_is_proven_and_finds_its_checkpoint_again(tmp_path: Path) -> None:
    folder = folder_of(model_of("vit_base_patch16_siglip_224"), tmp_path / "m")
    assert proves(folder, tmp_path / "out", "onnx-fp32", "openvino-fp32").checkpoint["format"] == "timm"
