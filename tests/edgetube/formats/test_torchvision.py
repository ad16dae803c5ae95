"""torchvision's ViT state dicts against torchvision's own models and transforms."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from edgetube import formats, preprocess
from edgetube.errors import CheckpointError
from edgetube.formats import torchvision as own
from edgetube.formats.reading.files import ReadOptions
from edgetube.formats.reading.said import Said, input_contract
from tests import peers
from tests.edgetube.formats.families import answers, frames_of, picture, pixels_of, proves, shake

assert peers  # before the import of torchvision
models: Any = importlib.import_module("torchvision.models")

SMALL = {
    "image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 24, "mlp_dim": 40,
    "num_classes": 5,
}  # fmt: skip
SAID = '{"model": {"heads": 3}, "input": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_size": 36}}'


def model_of(**changes: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shake(models.VisionTransformer(**SMALL | changes))


@pytest.fixture
def said(tmp_path: Path) -> ReadOptions:
    (tmp_path / "spec.json").write_text(SAID)
    return ReadOptions(spec=str(tmp_path / "spec.json"))


def agrees(path: Path, model: Any, options: ReadOptions) -> None:
    found = formats.load(path, options)
    frames = frames_of(found)
    with torch.no_grad():
        expected = model(pixels_of(found, frames)[:, 0]).numpy()
    assert np.ptp(expected) > 0.2
    np.testing.assert_allclose(answers(found, frames), expected, atol=1e-4 * np.abs(expected).max())


def test_logits_are_those_of_torchvision(said: ReadOptions, tmp_path: Path) -> None:
    model = model_of()
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "m.pth")
    agrees(tmp_path / "m.pth", model, said)


def test_names_of_the_published_files(said: ReadOptions, tmp_path: Path) -> None:
    """They are older than torchvision's present names of the MLP."""
    model = model_of()
    state = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for name, value in model.state_dict().items()
    }
    assert "encoder.layers.encoder_layer_0.mlp.linear_1.weight" in state
    torch.save(state, tmp_path / "m.pth")
    agrees(tmp_path / "m.pth", model, said)


@pytest.mark.parametrize("heads", [nn.Linear(24, 4), nn.Sequential(nn.Dropout(0.1), nn.Linear(24, 4))[1:]])
def test_a_head_of_one_s_own(heads: nn.Module, said: ReadOptions, tmp_path: Path) -> None:
    model = model_of()
    model.heads = heads
    torch.save(shake(model).state_dict(), tmp_path / "m.pth")
    agrees(tmp_path / "m.pth", model, said)


def test_what_the_tensors_cannot_tell(said: ReadOptions, tmp_path: Path) -> None:
    torch.save(model_of().state_dict(), tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"does not say heads; say it with --spec"):
        formats.load(tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="it is not vit_b_16"):
        formats.load(tmp_path / "m.pth", ReadOptions(arch="vit_b_16"))
    with pytest.raises(CheckpointError, match="torchvision has no ViT 'vit_b_15'"):
        formats.load(tmp_path / "m.pth", ReadOptions(arch="vit_b_15"))
    (tmp_path / "heads.json").write_text('{"model": {"heads": 3}}')
    with pytest.raises(CheckpointError, match="does not say mean, std, resize_size of its input"):
        formats.load(tmp_path / "m.pth", ReadOptions(spec=str(tmp_path / "heads.json")))
    torch.save(model_of(representation_size=7).state_dict(), tmp_path / "r.pth")
    with pytest.raises(CheckpointError, match="a layer before its classifier"):
        formats.load(tmp_path / "r.pth", said)


def test_the_hint_names_the_architecture() -> None:
    assert own._hint((14, 1280, 32)) == " (its tensors are those of vit_h_14: give --arch vit_h_14)"


@pytest.mark.parametrize("builder", own.MODELS)
def test_builders_are_torchvision_s(builder: str) -> None:
    with torch.device("meta"):
        model = models.get_model(builder)
    layer = model.encoder.layers[0]
    shape = model.patch_size, model.hidden_dim, len(model.encoder.layers), layer.num_heads
    assert own.MODELS[builder] == shape
    assert layer.ln_1.eps == 1e-6


def test_weights_are_torchvision_s() -> None:
    named = {
        str(one): (builder, one.transforms()) for builder in own.MODELS for one in models.get_model_weights(builder)
    }
    assert set(named) == set(own.WEIGHTS)
    for name, (builder, t) in named.items():
        expected = (builder, t.crop_size[0], t.resize_size[0], t.interpolation.value)
        assert own.WEIGHTS[name] == expected
        assert (t.mean, t.std) == tuple(map(list, own.IMAGENET.values()))


@pytest.mark.parametrize(
    "name",
    ["ViT_B_16_Weights.IMAGENET1K_V1", "ViT_L_16_Weights.IMAGENET1K_V1", "ViT_H_14_Weights.IMAGENET1K_SWAG_LINEAR_V1"],
)
def test_pixels_are_those_of_torchvision_s_transform(name: str) -> None:
    builder, side, _, _ = own.WEIGHTS[name]
    fields = own._named(Path("m"), name, own.MODELS[builder][:3], side).input
    contract = input_contract(Path("m"), Said(), {"frames": 1, "height": side, "width": side} | fields)
    theirs = models.get_weight(name).transforms()
    for size in ((331, 297), (240, 301), (260, 256)):
        frame = picture("natural", size)
        levels = theirs(Image.fromarray(frame)).permute(1, 2, 0).numpy()
        levels = (levels * np.array(contract.std) + np.array(contract.mean)) * 255
        assert np.abs(preprocess.prepare(frame, contract)[0] - levels).max() < 1.01


def test_a_plain_name_takes_the_input_of_the_first_weights_and_says_so() -> None:
    named = own._named(Path("m"), "vit_b_16", (16, 768, 12), 224)
    assert (named.heads, named.input["resize_size"]) == (12, 256)
    assert "ViT_B_16_Weights.IMAGENET1K_V1" in named.notes[0]
    assert own._named(Path("m"), "vit_b_16", (16, 768, 12), 128).input == {}


@pytest.mark.long
def test_an_export_is_proven_and_finds_its_checkpoint_again(said: ReadOptions, tmp_path: Path) -> None:
    torch.save(model_of().state_dict(), tmp_path / "m.pth")
    proves(tmp_path / "m.pth", tmp_path / "out", "onnx-fp32", read=said)
