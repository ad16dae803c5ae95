"""DINOv2 in the files of PyTorch's TorchScript exporter, against ONNX Runtime on the very files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from edgetube import formats
from edgetube.errors import CheckpointError
from edgetube.formats.reading.files import ReadOptions
from tests.edgetube.formats.families import answers, frames_of, pixels_of, proves, shake, transformers

SMALL = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_ratio": 2, "image_size": 70,
    "patch_size": 14, "num_labels": 5, "initializer_range": 0.3,
}  # fmt: skip
INPUT = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "resize_size": 80}


class DepthMap(nn.Module):
    """A tower under something that is no classifier; it also answers with the tower's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL))
        self.decoder = nn.Conv2d(24, 2, 1)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.backbone(pixels).last_hidden_state
        side = int(tokens[0, 1:].shape[0] ** 0.5)
        return self.decoder(tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))), tokens


def written(model: nn.Module, path: Path, size: int) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.zeros(1, 3, size, size),), path, dynamo=False, input_names=["pixels"])
    return path


def spec_file(folder: Path, **model: Any) -> str:
    (folder / "spec.json").write_text(json.dumps({"model": {"heads": 3} | model, "input": INPUT}))
    return str(folder / "spec.json")


def run(path: Path, pixels: torch.Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = [session.run(None, {"pixels": one[None].numpy()}) for one in pixels]
    return [np.concatenate(found) for found in zip(*outputs, strict=True)]


@pytest.mark.parametrize("size", [70, 42])
def test_the_classifier_of_a_tower_reads_what_the_file_computes(size: int, tmp_path: Path) -> None:
    path = written(shake(DepthMap()), tmp_path / "depth.onnx", size)
    head = nn.Linear(48, 4)
    torch.save(shake(head).state_dict(), tmp_path / "head.pt")
    found = formats.load(path, ReadOptions(classifier=str(tmp_path / "head.pt"), spec=spec_file(tmp_path)))
    assert (found.spec.size, found.format) == ((size, size), "DINOv2 in ONNX")
    frames = frames_of(found)
    tokens = torch.from_numpy(run(path, pixels_of(found, frames)[:, 0])[1])
    with torch.no_grad():
        expected = head(torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)).numpy()
    np.testing.assert_allclose(answers(found, frames), expected, atol=1e-4 * np.abs(expected).max())
    used = {key.name: key.used for key in found.keys}
    assert used["decoder.weight"] == "not used: it is behind the tower"
    assert "class token and the mean" in found.notes[0]


def test_a_classifier_in_onnx_is_read_as_it_is(tmp_path: Path) -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SMALL))

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.net(pixels).logits

    model = shake(transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SMALL)))
    wrapped = Logits().eval()
    wrapped.net = model
    path = written(wrapped, tmp_path / "net.onnx", 56)
    with pytest.raises(CheckpointError, match="does not say heads"):
        formats.load(path)
    found = formats.load(path, ReadOptions(spec=spec_file(tmp_path)))
    frames = frames_of(found)
    expected = run(path, pixels_of(found, frames)[:, 0])[0]
    np.testing.assert_allclose(answers(found, frames), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.long
def test_an_export_of_one_is_proven(tmp_path: Path) -> None:
    path = written(shake(DepthMap()), tmp_path / "depth.onnx", 42)
    torch.save(shake(nn.Linear(24, 4)).state_dict(), tmp_path / "head.pt")
    read = ReadOptions(classifier=str(tmp_path / "head.pt"), spec=spec_file(tmp_path))
    bundle = proves(path, tmp_path / "out", "onnx-fp32", "openvino-fp32", read=read)
    assert bundle.spec.readout == ("prefix.0",)
