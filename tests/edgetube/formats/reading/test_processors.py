"""What the settings of a processor of transformers become, against the processors themselves."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetube import formats
from edgetube.errors import CheckpointError
from edgetube.formats.reading import processors
from edgetube.formats.reading.files import ReadOptions
from tests import peers
from tests.edgetube.formats.families import save, shake

assert peers  # before the first import of a library that imports torchvision
transformers: Any = importlib.import_module("transformers")


def folder_of(path: Path, name: str = "preprocessor_config.json", **settings: Any) -> Path:
    """A small ViT of 32 x 32 pictures with the settings of a processor."""
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=40, image_size=32, patch_size=8
    )
    folder = save(shake(transformers.ViTForImageClassification(config)), path)
    (folder / name).write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("name", processors.CLASSES)
def test_defaults_are_those_of_the_class(name: str) -> None:
    theirs = getattr(transformers, name)().to_dict()
    full = json.loads(json.dumps({key: value for key, value in theirs.items() if value is not None}))
    assert "size" in full
    found = processors.fields(Path("m"), processors.CLASSES[name], {})
    expected = processors.fields(Path("m"), {"offset": name.startswith("Vivit"), **full}, {})
    for colours in ("mean", "std"):
        np.testing.assert_allclose(found.pop(colours), expected.pop(colours), rtol=1e-6)
    assert found == expected


@pytest.mark.parametrize("name", ["BitImageProcessorFast", "BitImageProcessorPil", "BitFeatureExtractor"])
def test_the_named_class_has_its_own_defaults(name: str, tmp_path: Path) -> None:
    key = "feature_extractor_type" if name.endswith("Extractor") else "image_processor_type"
    settings: dict[str, Any] = {key: name, "size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    found = formats.load(folder_of(tmp_path / "m", **settings)).contract
    assert (found.resize, found.resize_size, found.height, found.filter) == ("short-side", 36, 32, "bicubic")
    np.testing.assert_allclose(found.mean, transformers.BitImageProcessor().image_mean)


def test_another_class_may_crop_where_the_model_s_own_does_not(tmp_path: Path) -> None:
    """DeiT's own processor crops by default; a ViT's in its folder does not."""
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 256, "width": 256}}
    found = processors.fields(Path("m"), {**processors.CLASSES[processors.class_of(settings, "")], **settings}, {})
    assert (found["height"], found["resize_size"]) == (256, (256, 256))


def test_a_processor_of_texts_and_images_counts_first(tmp_path: Path) -> None:
    own = transformers.ViTImageProcessor(size={"height": 32, "width": 40}).to_dict()
    folder = folder_of(tmp_path / "m", "processor_config.json", image_processor=own, processor_class="CLIPProcessor")
    assert formats.load(folder).contract.width == 40
    (folder / "preprocessor_config.json").write_text(json.dumps(own | {"size": {"height": 48, "width": 48}}))
    theirs = transformers.AutoImageProcessor.from_pretrained(folder)
    assert formats.load(folder).contract.width == theirs.size["width"] == 40
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert formats.load(folder).contract.width == 48


def test_one_number_stands_for_three_colours(tmp_path: Path) -> None:
    found = formats.load(folder_of(tmp_path / "m", size=32, image_mean=0.25, image_std=0.5)).contract
    np.testing.assert_allclose((found.mean, found.std), ((0.25,) * 3, (0.5,) * 3))


CROP = {"do_center_crop": True, "crop_size": 32}
REFUSED = [
    ({"image_processor_type": "ConvNextImageProcessor"}, {"mean": [0.5] * 3, "std": [0.5] * 3, "height": 32,
      "width": 32}, "its processor is ConvNextImageProcessor, whose settings edgetube does not know"),
    ({"do_resize": False, **CROP}, {"resize_size": 36}, "does not resize"),
    ({"size": {"shortest_edge": 32}}, {"height": 32, "width": 32}, "does not crop, so pictures keep their shapes"),
    ({"size": {"shortest_edge": 36, "longest_edge": 50}, **CROP}, {"resize_size": 36}, "no limit of the long side"),
    ({"size": {"longest_edge": 50}, **CROP}, {"resize_size": 36}, "expected height and width"),
    ({"size": 36, "resample": 1, **CROP}, {"filter": "bicubic"}, "resample 1; edgetube knows 2, 3"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "said", "why"), REFUSED)
def test_what_no_contract_says_is_asked_for(
    settings: dict[str, Any], said: dict[str, Any], why: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "m", **settings)
    with pytest.raises(CheckpointError, match=why):
        formats.load(folder)
    (tmp_path / "spec.json").write_text(json.dumps({"input": said}))
    found = formats.load(folder, ReadOptions(spec=str(tmp_path / "spec.json"))).contract
    assert (found.height, found.width) == (32, 32)
    assert {name: getattr(found, name) for name in said.keys() - {"mean", "std"}} == {
        name: value for name, value in said.items() if name not in ("mean", "std")
    }


def test_padding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pads pictures \(do_pad\)"):
        formats.load(folder_of(tmp_path / "m", do_pad=True, size=32))
