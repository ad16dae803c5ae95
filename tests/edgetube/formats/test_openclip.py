"""Towers of open_clip, and in OpenAI's names, against open_clip's own models and transforms."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgetube import formats, preprocess
from edgetube.errors import CheckpointError, InputError
from edgetube.formats import openclip as own
from edgetube.formats.reading.files import Files, ReadOptions
from tests import peers
from tests.edgetube.formats.families import answers, frames_of, picture, pixels_of, proves, shake

assert peers  # before the import of torchvision
open_clip: Any = pytest.importorskip("open_clip")
hub: Any = importlib.import_module("open_clip.push_to_hf_hub")

VISION = {"image_size": 32, "layers": 2, "width": 24, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}


def config_of(quick: bool = False, **vision: Any) -> dict[str, Any]:
    return {"embed_dim": 12, "quick_gelu": quick, "vision_cfg": VISION | vision, "text_cfg": TEXT}


def model_of(config: dict[str, Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shake(open_clip.CLIP(**config))


def folder_of(model: Any, config: dict[str, Any], path: Path, **pixels: Any) -> Path:
    """A hub folder as open_clip writes it, both forms of the weights in it."""
    path.mkdir()
    torch.save(model.state_dict(), path / "open_clip_pytorch_model.bin")
    importlib.import_module("safetensors.torch").save_file(model.state_dict(), path / "open_clip_model.safetensors")
    model.visual.image_mean, model.visual.image_std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    model.visual.preprocess_cfg = pixels
    hub.save_config_for_hf(model, path / "open_clip_config.json", config)
    return path


@pytest.fixture
def text(tmp_path: Path) -> ReadOptions:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "text.npy", rng.normal(size=(3, 12)).astype(np.float32))
    return ReadOptions(text_features=str(tmp_path / "text.npy"))


def agrees(path: Path, model: Any, options: ReadOptions, scaled: bool = True) -> None:
    found = formats.load(path, options)
    frames = frames_of(found)
    features = torch.nn.functional.normalize(torch.from_numpy(np.load(str(options.text_features))), dim=1)
    with torch.no_grad():
        scale = model.logit_scale.exp() if scaled else 100
        image = model.encode_image(pixels_of(found, frames)[:, 0], normalize=True)
        expected = (scale * image @ features.T).numpy()
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(answers(found, frames), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "config",
    [
        config_of(),
        config_of(quick=True, ls_init_value=0.3),
        config_of(no_ln_pre=True, pool_type="avg", final_ln_after_pool=True),
        config_of(pool_type="avg", norm_kwargs={"eps": 1e-3}, act_kwargs={"approximate": "tanh"}),
    ],
)
def test_features_are_those_of_open_clip(config: dict[str, Any], text: ReadOptions, tmp_path: Path) -> None:
    model = model_of(config)
    agrees(folder_of(model, config, tmp_path / "m"), model, text)


@pytest.mark.parametrize(("arch", "quick"), [("ViT-B/32", True), ("ViT-B-32", False), ("ViT-B-32-quickgelu", True)])
def test_a_state_dict_needs_the_name_of_its_architecture(
    arch: str, quick: bool, text: ReadOptions, tmp_path: Path
) -> None:
    config = config_of(quick, width=128, head_width=64)
    model = model_of(config)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 1, "name": "run", "state_dict": state, "optimizer": {"state": {}}}, tmp_path / "epoch_1.pt")
    torch.save(model.visual.state_dict(), tmp_path / "tower.pt")
    options = ReadOptions(text_features=text.text_features, arch=arch)
    agrees(tmp_path / "epoch_1.pt", model, options)
    agrees(tmp_path / "tower.pt", model, options, scaled=False)
    notes = formats.load(tmp_path / "tower.pt", options).notes
    assert any("without the scale" in note for note in notes)
    assert any("OpenAI's models" in note for note in notes)
    with pytest.raises(CheckpointError, match=r"does not say heads \(give its architecture with --arch NAME"):
        formats.load(tmp_path / "tower.pt", text)


@pytest.mark.parametrize("name", [n for n in open_clip.list_models() if n.startswith("ViT-") and "SigLIP" not in n])
def test_names_tell_what_open_clip_builds(name: str, tmp_path: Path) -> None:
    config = open_clip.get_model_config(name)
    vision = config["vision_cfg"]
    (tmp_path / "x.pt").write_bytes(b"")
    settings = own._Settings(Files(tmp_path / "x.pt"), ReadOptions(arch=name))
    assert settings.heads(vision["width"]) == vision["width"] // vision.get("head_width", 64)
    assert settings.activation() == ("quick-gelu" if config.get("quick_gelu") else "gelu")
    pool = "mean" if vision.get("pool_type") == "avg" else "prefix.0"
    assert settings.pools() == (pool, vision.get("final_ln_after_pool", False))
    assert not set(vision) - own.KNOWN


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_pixels_are_those_of_open_clip_s_transform(mode: str, text: ReadOptions, tmp_path: Path) -> None:
    """Strongly shrunk portraits are left out for "squash": Pillow 13 resizes their rows first."""
    config = config_of()
    folder = folder_of(model_of(config), config, tmp_path / "m", resize_mode=mode, interpolation="bicubic")
    contract = formats.load(folder, text).contract
    theirs = open_clip.image_transform(32, False, contract.mean, contract.std, mode, "bicubic")
    for size in ((90, 97), (64, 64), (33, 50)) if mode == "squash" else ((131, 97), (97, 131), (301, 225)):
        for kind in ("noise", "natural"):
            frame = picture(kind, size)
            levels = theirs(Image.fromarray(frame)).permute(1, 2, 0).numpy()
            levels = (levels * np.array(contract.std) + np.array(contract.mean)) * 255
            assert np.abs(preprocess.prepare(frame, contract)[0] - levels).max() < 1.01


def test_positions_follow_open_clip_to_another_size(text: ReadOptions, tmp_path: Path) -> None:
    model = model_of(config_of())
    found = formats.load(folder_of(model, config_of(), tmp_path / "m"), text).with_clip(size=(48, 48))
    larger = model_of(config_of(image_size=48))
    state = model.state_dict()
    importlib.import_module("open_clip.model").resize_pos_embed(state, larger)
    expected = state["visual.positional_embedding"][1:]
    torch.testing.assert_close(found.model.positions, expected)


def test_what_is_refused(text: ReadOptions, tmp_path: Path) -> None:
    config = config_of()
    folder = folder_of(model_of(config), config, tmp_path / "m")
    with pytest.raises(CheckpointError, match="image tower without classes: give --text-features"):
        formats.load(folder)
    with pytest.raises(InputError, match="--arch does not apply"):
        formats.load(folder, ReadOptions(arch="ViT-B-32", text_features=text.text_features))
    said = json.loads((folder / "open_clip_config.json").read_text())
    for change, message in (
        ({"scale_heads": True}, "says scale_heads"),
        ({"pool_type": "none"}, "pool_type 'none'"),
        ({"layers": 3}, "has 2 blocks, and its settings say layers 3"),
        ({"act_kwargs": {"approximate": "erf"}}, "act_kwargs"),
        ({"norm_kwargs": {"eps": "small"}}, "eps"),
        ({"head_width": 0}, "head_width"),
    ):
        changed = said | {"model_cfg": said["model_cfg"] | {"vision_cfg": VISION | change}}
        (folder / "open_clip_config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message):
            formats.load(folder, text)
    torch.save({"visual.trunk.patch_embed.proj.weight": torch.ones(2, 3, 4, 4)}, tmp_path / "siglip.pt")
    with pytest.raises(CheckpointError, match="its image tower is one of timm"):
        formats.load(tmp_path / "siglip.pt", text)


@pytest.mark.long
def test_an_export_is_proven_and_finds_its_checkpoint_again(text: ReadOptions, tmp_path: Path) -> None:
    config = config_of(quick=True)
    proves(folder_of(model_of(config), config, tmp_path / "m"), tmp_path / "out", "onnx-fp32", read=text)
