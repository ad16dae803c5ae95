"""Adapters against peft's own merge_and_unload, in the folders of several models."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgetube import formats
from edgetube.errors import CheckpointError, InputError
from edgetube.formats.reading.files import ReadOptions
from tests.edgetube.formats import test_videomae, test_vit, test_vivit, test_vjepa2
from tests.edgetube.formats.families import answers, frames_of, pixels_of, proves, save

peft: Any = importlib.import_module("peft")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Made = tuple[Any, Any]
"""A model and its processor."""


def videomae() -> Made:
    return test_videomae.model_of(), test_videomae.processor_of()


def vivit() -> Made:
    return test_vivit.model_of(), test_vivit.processor_of()


def vjepa2() -> Made:
    return test_vjepa2.model_of(), test_vjepa2.processor_of()


def adapted(model: Any, folder: Path, **settings: Any) -> tuple[Any, Path]:
    """The model with a shaken adapter, and the adapter's folder."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["query", "value"]} | settings)
    found = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    found.save_pretrained(folder)
    return found.eval(), folder


def agrees(base: Path, adapter: Path, found: Any, image: bool = False, options: Any = None) -> Any:
    """Check the logits of the base with its adapter against those of peft's merged model."""
    checkpoint = formats.load(base, options or ReadOptions(adapter=str(adapter)))
    frames = frames_of(checkpoint)
    pixels = pixels_of(checkpoint, frames)
    merged = found.merge_and_unload()
    with torch.no_grad():
        expected = merged(pixels[:, 0] if image else pixels).logits.numpy()
    ours = answers(checkpoint, frames)
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())
    if options is None:
        assert np.abs(answers(formats.load(base), frames) - ours).max() > 0.1
    return checkpoint


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (videomae, {}),
        (videomae, {"modules_to_save": ["classifier"], "init_lora_weights": "gaussian"}),
        (videomae, {"use_rslora": True, "target_modules": ["dense", "key"]}),
        (
            videomae,
            {
                "rank_pattern": {"layer.0.attention.attention.query": 2, "value": 3},
                "alpha_pattern": {r"^videomae.*layer\.1.*query": 5},
                "modules_to_save": ["classifier", "fc_norm"],
            },
        ),
        (vivit, {"target_modules": ["q_proj", "o_proj", "fc1", "fc2"], "modules_to_save": ["classifier"]}),
        (vjepa2, {"target_modules": "all-linear"}),
        (vjepa2, {"target_modules": ["query", "k_proj", "v_proj", "proj"]}),
    ],
)
def test_logits_are_those_of_peft(make: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    model, processor = make()
    base = save(model, tmp_path / "base", processor)
    agrees(base, tmp_path / "lora", adapted(model, tmp_path / "lora", **settings)[0])


@pytest.mark.parametrize("how", [{}, {"save_original_format": False}])
def test_an_adapter_of_either_dialect(how: dict[str, Any], tmp_path: Path) -> None:
    """transformers 5 names modules otherwise than its files do; adapters of transformers 4 have the names of files."""
    model, processor = test_vit.vit()
    base = save(model, tmp_path / "base", processor, **how)
    found, folder = adapted(model, tmp_path / "lora", target_modules=["q_proj", "v_proj", "fc1"])
    agrees(base, folder, found, image=True)
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    names = ((r"layers\.", "encoder.layer."), ("attention.q_proj", "attention.attention.query"),
             ("attention.v_proj", "attention.attention.value"), ("mlp.fc1", "intermediate.dense"))  # fmt: skip
    state = load_file(folder / "adapter_model.safetensors")
    for before, after in names:
        state = {re.sub(before, after, name): value for name, value in state.items()}
    save_file(state, old / "adapter_model.safetensors")
    one, other = (formats.load(base, ReadOptions(adapter=str(path))) for path in (folder, old))
    frames = frames_of(one)
    np.testing.assert_array_equal(answers(one, frames), answers(other, frames))


def test_an_adapter_brings_the_classifier_of_a_model_without_one(tmp_path: Path) -> None:
    model, processor = test_vit.vit(num_labels=3)
    base = save(model.vit, tmp_path / "base", processor)
    found, folder = adapted(model, tmp_path / "lora", target_modules=["q_proj"], modules_to_save=["classifier"])
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    options = ReadOptions(adapter=str(folder), labels=str(tmp_path / "names.txt"))
    assert agrees(base, folder, found, image=True, options=options).labels == ("a", "b", "c")
    with pytest.raises(CheckpointError, match="has no classifier"):
        formats.load(base)


def test_an_adapter_of_a_convolution_and_in_half_precision(tmp_path: Path) -> None:
    model, processor = test_vit.vit()
    base = save(model, tmp_path / "base", processor)
    found, folder = adapted(model, tmp_path / "lora", target_modules=["projection", "k_proj"], r=3)
    state = {name: value.bfloat16().float() for name, value in load_file(folder / "adapter_model.safetensors").items()}
    peft.set_peft_model_state_dict(found, state)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({name: value.bfloat16() for name, value in state.items()}, folder / "adapter_model.bin")
    agrees(base, folder, found, image=True)


def test_linears_are_never_stored_with_inputs_first(tmp_path: Path) -> None:
    """peft takes `fan_in_fan_out` back where the module is a linear."""
    model, processor = videomae()
    base = save(model, tmp_path / "base", processor)
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to False"):
        found, folder = adapted(model, tmp_path / "lora", fan_in_fan_out=True)
    change(folder, fan_in_fan_out=True)
    agrees(base, folder, found)


def change(folder: Path, **settings: Any) -> Path:
    """Change an adapter's settings."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def test_the_adapter_is_noted_and_is_part_of_the_digest(tmp_path: Path) -> None:
    model, processor = videomae()
    base = save(model, tmp_path / "base", processor)
    _, folder = adapted(model, tmp_path / "lora")
    plain, options = formats.load(base), ReadOptions(adapter=str(folder))
    change(folder, base_model_name_or_path="MCG/some-base")
    first = formats.load(base, options)
    assert first.notes[0] == "the adapter lora, which is merged in, was trained on MCG/some-base"
    change(folder, base_model_name_or_path=None)
    second = formats.load(base, options)
    assert "does not say on which model it was trained" in second.notes[0]
    state = load_file(folder / "adapter_model.safetensors")
    save_file({name: value * 2 for name, value in state.items()}, folder / "adapter_model.safetensors")
    assert len({plain.digest, first.digest, second.digest, formats.load(base, options).digest}) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "has use_dora True; edgetube merges plain LoRA; merge it with peft instead"),
        ({"peft_type": "IA3"}, "is an adapter of type 'IA3'; edgetube merges LORA"),
        ({"bias": "all"}, "has bias 'all'"),
        ({"lora_bias": True}, "has lora_bias True"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights 'pissa'"),
        ({"something_new": 3}, "has something_new 3"),
        ({"r": 5}, r"lora_A \(4, 24\) and lora_B \(24, 4\) do not fit it at rank 5"),
        ({"rank_pattern": {"query": "x"}}, "r is 'x'; expected an integer"),
        ({"rank_pattern": {"query(": 4}}, "adapter_config.json: "),
    ],
)
def test_other_adapters_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, processor = videomae()
    base = save(model, tmp_path / "base", processor)
    _, folder = adapted(model, tmp_path / "lora")
    with pytest.raises(CheckpointError, match=message):
        formats.load(base, ReadOptions(adapter=str(change(folder, **settings))))


def test_tensors_that_do_not_belong_there_are_refused(tmp_path: Path) -> None:
    model, processor = videomae()
    base = save(model, tmp_path / "base", processor)
    _, folder = adapted(model, tmp_path / "lora")
    file, options = folder / "adapter_model.safetensors", ReadOptions(adapter=str(folder))
    state, stem = load_file(file), "base_model.model.videomae.encoder.layer.0.attention.attention.query"
    for name, message in (
        (f"{stem}.lora_magnitude_vector", "lora_magnitude_vector, which is not of plain LoRA"),
        ("base_model.model.classifier.weight", "classifier.weight, which is not of plain LoRA"),
        ("base_model.model.other.lora_A.weight", "only one of lora_A and lora_B for other"),
    ):
        save_file(state | {name: torch.ones(2)}, file)
        with pytest.raises(CheckpointError, match=re.escape(message)):
            formats.load(base, options)
    other = {name.replace("layer.1", "layer.7"): value for name, value in state.items()}
    save_file(other, file)
    with pytest.raises(CheckpointError, match=r"is of another model than .*, which has no .*layer\.7.*query\.weight"):
        formats.load(base, options)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no weights of an adapter; expected adapter_model\.safetensors"):
        formats.load(base, options)


def test_an_adapter_needs_the_folder_of_its_base(tmp_path: Path) -> None:
    model, processor = videomae()
    base = save(model, tmp_path / "base", processor)
    with pytest.raises(InputError, match="is no folder of a peft adapter: it has no adapter_config"):
        formats.load(base, ReadOptions(adapter=str(tmp_path)))
    with pytest.raises(
        InputError, match=r"--adapter is merged into the folder of a model of transformers; .* is a file"
    ):
        formats.load(base / "model.safetensors", ReadOptions(adapter=str(tmp_path)))


@pytest.mark.slow
def test_exported_and_read_back_from_the_bundle(tmp_path: Path) -> None:
    model, processor = videomae()
    base = save(model, tmp_path / "base", processor)
    _, folder = adapted(model, tmp_path / "lora")
    options = ReadOptions(adapter=str(folder))
    bundle = proves(base, tmp_path / "out", "onnx-fp32", read=options, lowering="gather")
    moved = shutil.move(base, tmp_path / "elsewhere" / "model")
    assert formats.locate(bundle, tmp_path / "elsewhere").checkpoint["source"] == str(moved)
    (tmp_path / "elsewhere" / "deep").mkdir()
    shutil.move(folder, tmp_path / "elsewhere" / "deep" / folder.name)
    with pytest.raises(CheckpointError, match=r"was made with --adapter .*lora, which is not there; give --checkpoint"):
        formats.of_bundle(bundle)
    again = formats.locate(bundle, tmp_path / "elsewhere")
    assert formats.of_bundle(again).digest == bundle.checkpoint["sha256"]
    assert again.checkpoint["adapter"] == str(tmp_path / "elsewhere" / "deep" / folder.name)
    shutil.rmtree(tmp_path / "elsewhere" / "deep")
    with pytest.raises(CheckpointError, match="is not at"):
        formats.locate(bundle, tmp_path / "elsewhere")
