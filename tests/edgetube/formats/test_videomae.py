"""VideoMAE folders against transformers' own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetube import formats
from edgetube.errors import CheckpointError, InputError
from edgetube.formats.reading.files import ReadOptions
from tests.edgetube.formats.families import answers, frames_of, pixels_of, save, shake, transformers

SMALL = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40, "image_size": 32,
    "num_frames": 4, "num_labels": 5, "initializer_range": 0.3,
}  # fmt: skip
PROCESSOR = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


def model_of(**changes: Any) -> Any:
    config = transformers.VideoMAEConfig(**SMALL | changes)
    return shake(transformers.VideoMAEForVideoClassification(config))


def processor_of(**changes: Any) -> Any:
    return transformers.VideoMAEImageProcessor(**PROCESSOR | changes)


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({}, {}),
        ({}, {"save_original_format": False}),
        ({"layer_norm_eps": 1e-3, "hidden_act": "gelu_new"}, {}),
        ({"qv_bias": False, "num_attention_heads": 3}, {}),
        ({}, {"max_shard_size": "20KB"}),
        ({"tubelet_size": 1, "patch_size": 8}, {}),
    ],
)
def test_logits_are_those_of_transformers(changes: dict[str, Any], how: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(**changes)
    found = formats.load(save(model, tmp_path / "m", processor_of(), **how))
    frames = frames_of(found)
    with torch.no_grad():
        expected = model(pixels_of(found, frames)).logits.numpy()
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(answers(found, frames), expected, atol=1e-4 * np.abs(expected).max())
    assert found.contract.sampling == "stride"
    assert {use.used.partition(".")[0] for use in found.keys} <= {"blocks", "tubes", "norm", "classifiers"}


def test_half_precision_weights_become_float32_exactly(tmp_path: Path) -> None:
    model = model_of().to(torch.bfloat16)
    found = formats.load(save(model, tmp_path / "m", processor_of()))
    kernel = model.videomae.embeddings.patch_embeddings.projection.weight.float()
    assert torch.equal(found.model.tubes.weight(0), kernel)


def test_labels_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = {i: f"name {i}" for i in range(12)}
    model = shake(
        transformers.VideoMAEForVideoClassification(
            transformers.VideoMAEConfig(**SMALL | {"num_labels": 12}, id2label=names)
        )
    )
    assert formats.load(save(model, tmp_path / "m", processor_of())).labels == tuple(names.values())


def test_nobody_named_the_classes(tmp_path: Path) -> None:
    folder = save(model_of(), tmp_path / "m", processor_of())
    assert "its classes have no names" in formats.load(folder).notes[0]
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\n")
    assert formats.load(folder, ReadOptions(labels=str(tmp_path / "names.txt"))).labels == ("a", "b", "c", "d", "e")


def test_a_pre_trained_model_has_no_classifier(tmp_path: Path) -> None:
    model = transformers.VideoMAEForPreTraining(
        transformers.VideoMAEConfig(**SMALL, decoder_num_attention_heads=2, decoder_hidden_size=24)
    )
    with pytest.raises(CheckpointError, match="no classifier: it is VideoMAE as it was pre-trained; fine-tune it"):
        formats.load(save(model, tmp_path / "m", processor_of()))


def test_without_a_processor_the_user_has_to_say_the_input(tmp_path: Path) -> None:
    folder = save(model_of(), tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"no preprocessor_config\.json"):
        formats.load(folder)
    said = tmp_path / "spec.json"
    said.write_text('{"input": {"height": 32, "width": 32, "mean": [0, 0, 0], "std": [1, 1, 1], "stride": 2}}')
    found = formats.load(folder, ReadOptions(spec=str(said)))
    assert (found.contract.mean, found.contract.stride) == ((0.0, 0.0, 0.0), 2)


def test_what_the_folder_says_is_not_said_again(tmp_path: Path) -> None:
    folder = save(model_of(), tmp_path / "m", processor_of())
    said = tmp_path / "spec.json"
    said.write_text('{"model": {"heads": 3}}')
    with pytest.raises(InputError, match=r"says model\.heads, which does not apply .*its own files say what the model"):
        formats.load(folder, ReadOptions(spec=str(said)))
