from pathlib import Path

import pytest
import torch
from torch import nn

from edgetube import formats
from edgetube.errors import CheckpointError, InputError
from edgetube.formats.reading.files import ReadOptions
from tests.edgetube.formats.families import answers, frames_of, pixels_of, save, shake, transformers

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}


def tower(folder: Path) -> tuple[nn.Module, Path]:
    model = shake(transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, initializer_range=0.3)))
    size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}
    return model, save(model, folder, transformers.BitImageProcessor(**size))


@pytest.mark.parametrize(("inputs", "bias"), [(24, True), (48, False)])
def test_a_linear_beside_a_tower_answers(inputs: int, bias: bool, tmp_path: Path) -> None:
    model, folder = tower(tmp_path / "m")
    head = shake(nn.Linear(inputs, 5, bias=bias))
    torch.save({f"probe.{name}": value for name, value in head.state_dict().items()}, tmp_path / "head.pt")
    read = ReadOptions(classifier=str(tmp_path / "head.pt"))
    found = formats.load(folder, read)
    frames = frames_of(found)
    with torch.no_grad():
        tokens = model(pixels_of(found, frames)[:, 0]).last_hidden_state
        parts = [tokens[:, 0], tokens[:, 1:].mean(dim=1)]
        expected = head(torch.cat(parts[: inputs // 24], dim=1)).numpy()
    torch.testing.assert_close(torch.from_numpy(answers(found, frames)), torch.from_numpy(expected), atol=1e-4, rtol=0)
    assert found.options == {"classifier": str(tmp_path / "head.pt")}
    before = found.digest
    torch.save(shake(head, 1).state_dict(), tmp_path / "head.pt")
    assert formats.load(folder, read).digest != before


def test_what_is_no_linear_for_it(tmp_path: Path) -> None:
    _, folder = tower(tmp_path / "m")
    torch.save({"a.weight": torch.ones(5, 24), "b.weight": torch.ones(5, 24)}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match=r"two.pt holds a.weight \(5, 24\), b.weight \(5, 24\); expected one"):
        formats.load(folder, ReadOptions(classifier=str(tmp_path / "two.pt")))
    torch.save({"weight": torch.ones(5, 23)}, tmp_path / "narrow.pt")
    with pytest.raises(CheckpointError, match=r"classifier.weight is \(5, 23\); expected \(classes, 24\)"):
        formats.load(folder, ReadOptions(classifier=str(tmp_path / "narrow.pt")))
    with pytest.raises(InputError, match=r"none\.pt is no file"):
        formats.load(folder, ReadOptions(classifier=str(tmp_path / "none.pt")))
    whole = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SMALL, num_labels=5))
    with pytest.raises(InputError, match="it has a classifier of its own"):
        formats.load(save(whole, tmp_path / "whole"), ReadOptions(classifier=str(tmp_path / "narrow.pt")))


def test_other_models_take_none(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(5, 24)}, tmp_path / "head.pt")
    with pytest.raises(InputError, match="--classifier does not apply to this checkpoint"):
        formats.load("random:ti", ReadOptions(classifier=str(tmp_path / "head.pt")))
