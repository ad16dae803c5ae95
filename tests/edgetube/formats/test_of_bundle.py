"""Bundles find the checkpoint again, read as it was for the export; weights beside it that cannot be read alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgetube import formats
from edgetube.bundle import Bundle
from edgetube.errors import CheckpointError
from edgetube.formats.reading.files import ReadOptions
from edgetube.precision import Precision
from tests.edgetube.formats.families import save, shake, transformers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=40, image_size=32, patch_size=8
    )
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    return save(shake(transformers.ViTForImageClassification(config)), tmp_path / "m", processor)


def bundle_of(folder: Path, options: ReadOptions) -> Bundle:
    found = formats.load(folder, options)
    return Bundle(
        Path("/b"), "b", "onnx-fp32", Precision.FP32, "onnxruntime", found.spec, found.contract, found.labels, 1, "m",
        "built", found.record(),
    )  # fmt: skip


def test_the_file_of_spec_changes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(json.dumps({"input": {"std": [0.25] * 3}}))
    bundle = bundle_of(folder, ReadOptions(spec=str(tmp_path / "spec.json")))
    np.testing.assert_allclose(formats.of_bundle(bundle).contract.std, 0.25)
    (tmp_path / "spec.json").write_text(json.dumps({"input": {"std": [0.5] * 3}}))
    with pytest.raises(CheckpointError, match=r"made from another model than .*m with --spec .*spec.json says now"):
        formats.of_bundle(bundle)
    (tmp_path / "spec.json").unlink()
    with pytest.raises(CheckpointError, match=r"made with --spec .*spec.json, which is not there; give --checkpoint"):
        formats.of_bundle(bundle)


def test_the_names_of_classes_change(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    bundle = bundle_of(folder, ReadOptions(labels=str(tmp_path / "names.txt")))
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    with pytest.raises(CheckpointError, match=r"than .* with --labels .*names.txt says now"):
        formats.of_bundle(bundle)


def test_weights_of_a_folder_alone(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lies beside a config.json .*; give the folder of both"):
        formats.load(folder / "model.safetensors")


def test_an_adapter_is_no_model(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="it is an adapter: give the folder of its model, and this one with --ad"):
        formats.load(folder)
