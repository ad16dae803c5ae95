"""Checkpoints of daniel-code/TubeViT against its model, rebuilt here from its description."""

from __future__ import annotations

import importlib
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgetube import formats
from edgetube.errors import CheckpointError
from edgetube.formats.reading.files import ReadOptions
from edgetube.runtimes.torch import normalise
from tests import peers
from tests.edgetube.formats.families import answers, frames_of, proves, shake

assert peers  # before the import of torchvision
EncoderBlock: Any = importlib.import_module("torchvision.models.vision_transformer").EncoderBlock

TUBES = (  # kernel, stride, offset, each (time, height, width)
    ((8, 8, 8), (16, 32, 32), (0, 0, 0)),
    ((16, 4, 4), (6, 32, 32), (4, 8, 8)),
    ((4, 12, 12), (16, 32, 32), (0, 16, 16)),
    ((1, 16, 16), (32, 16, 16), (0, 0, 0)),
)
HYPER = {
    "num_classes": 5, "video_shape": [3, 22, 48, 64], "num_layers": 2, "num_heads": 3, "hidden_dim": 24, "mlp_dim": 40,
}  # fmt: skip


class Encoder(nn.Module):
    def __init__(self, layers: int, heads: int, width: int, hidden: int) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.layers = nn.Sequential()
        for i in range(layers):
            self.layers.add_module(f"encoder_layer_{i}", EncoderBlock(heads, width, hidden, 0.0, 0.0, norm))
        self.ln = norm(width)


class Tokenizer(nn.Module):
    """One kernel for all tubes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_proj_weight = nn.Parameter(torch.randn(width, 3, 8, 8, 8) * 0.1)
        self.conv_proj_bias = nn.Parameter(torch.zeros(len(TUBES), width))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) of x (B, C, T, H, W)."""
        tokens = []
        for (kernel, stride, (t, h, w)), bias in zip(TUBES, self.conv_proj_bias, strict=True):
            weight: Tensor = self.conv_proj_weight
            if kernel != (8, 8, 8):
                weight = F.interpolate(weight, kernel, mode="trilinear")
            tokens.append(F.conv3d(x[:, :, t:, h:, w:], weight, bias, stride).flatten(2).transpose(1, 2))
        return torch.cat(tokens, 1)


class Pooling(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.W = nn.Linear(width, 1)

    def forward(self, z: Tensor) -> Tensor:
        return (self.W(z).softmax(1) * z).sum(1)


class Rebuilt(nn.Module):
    """The model under its own names: a table of positions, a class token, attention pooling over it and the tubes."""

    def __init__(self, hyper: dict[str, Any]) -> None:
        super().__init__()
        width, (_, *clip) = hyper["hidden_dim"], hyper["video_shape"]
        self.sparse_tubes_tokenizer = Tokenizer(width)
        grids = [[(size - o - k) // s + 1 for size, k, s, o in zip(clip, *tube, strict=True)] for tube in TUBES]
        self.pos_embedding = nn.Parameter(torch.randn(1 + sum(map(math.prod, grids)), width), requires_grad=False)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.encoder = Encoder(hyper["num_layers"], hyper["num_heads"], width, hyper["mlp_dim"])
        self.attention_pooling = Pooling(width)
        self.heads = nn.Sequential()
        self.heads.add_module("head", nn.Linear(width, hyper["num_classes"]))

    def forward(self, x: Tensor) -> Tensor:
        token = self.class_token.expand(len(x), -1, -1)
        x = torch.cat([token, self.sparse_tubes_tokenizer(x)], 1) + self.pos_embedding
        logits: Tensor = self.heads(self.attention_pooling(self.encoder.ln(self.encoder.layers(x))))
        return logits


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shake(Rebuilt(HYPER))


def lightning(model: nn.Module, **changes: Any) -> dict[str, Any]:
    """What Lightning's checkpoint callback stores."""
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    return {
        "epoch": 3, "global_step": 12, "pytorch-lightning_version": "2.6.6", "state_dict": state, "loops": {},
        "callbacks": {}, "optimizer_states": [{"state": {}, "param_groups": []}], "lr_schedulers": [],
        "hparams_name": "kwargs", "hyper_parameters": HYPER | changes,
    }  # fmt: skip


@pytest.mark.parametrize("shape", [[3, 22, 48, 64], torch.Size([3, 22, 48, 64])])
def test_logits_are_those_of_its_model(shape: Any, model: nn.Module, tmp_path: Path) -> None:
    torch.save(lightning(model, video_shape=shape), tmp_path / "last.ckpt")
    found = formats.load(tmp_path / "last.ckpt")
    frames = frames_of(found)
    with torch.no_grad():
        expected = model(normalise(torch.from_numpy(frames), found.contract)).numpy()
    assert np.ptp(expected) > 0.2
    np.testing.assert_allclose(answers(found, frames), expected, atol=1e-4 * np.abs(expected).max())
    assert found.spec.clip == (22, 48, 64)
    assert (found.contract.resize, found.contract.stride) == ("stretch", 1)


def test_a_bare_state_dict_needs_its_clip_and_heads(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="does not say frames"):
        formats.load(tmp_path / "bare.pth")
    said = tmp_path / "spec.json"
    said.write_text('{"model": {"frames": 22, "size": [48, 64], "heads": 3}, "input": {"fps": 16}}')
    found = formats.load(tmp_path / "bare.pth", ReadOptions(spec=str(said)))
    assert (found.contract.fps, found.contract.sampling, found.spec.heads) == (16, "uniform", 3)
    said.write_text('{"model": {"frames": 32, "size": [48, 64], "heads": 3}}')
    with pytest.raises(CheckpointError, match="pos_embedding is"):
        formats.load(tmp_path / "bare.pth", ReadOptions(spec=str(said)))


def test_its_later_version_is_refused(model: nn.Module, tmp_path: Path) -> None:
    state = dict(model.state_dict())
    state["sparse_tubes_tokenizer.conv_proj_biases.0"] = torch.zeros(24)
    torch.save(state, tmp_path / "v2.pth")
    with pytest.raises(CheckpointError, match="its later version"):
        formats.load(tmp_path / "v2.pth")


def test_a_video_shape_that_is_none(model: nn.Module, tmp_path: Path) -> None:
    torch.save(lightning(model, video_shape="large"), tmp_path / "m.ckpt")
    with pytest.raises(CheckpointError, match="its video_shape is 'large'"):
        formats.load(tmp_path / "m.ckpt")


@pytest.mark.long
def test_an_export_is_proven_and_finds_its_checkpoint_again(model: nn.Module, tmp_path: Path) -> None:
    torch.save(lightning(model), tmp_path / "last.ckpt")
    proves(tmp_path / "last.ckpt", tmp_path / "out", "onnx-fp32", "openvino-fp32")
