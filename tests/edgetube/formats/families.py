"""Folders that libraries write, of small models with random weights, every parameter of them shaken."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from edgetube import bundle as bundles
from edgetube import demo, formats, preprocess, resize
from edgetube.export import pipeline
from edgetube.formats.reading.files import ReadOptions
from edgetube.model.checkpoints import Checkpoint
from edgetube.runtimes.torch import Reference, normalise
from tests import peers

assert peers  # before the first import of a library that imports torchvision
transformers: Any = importlib.import_module("transformers")


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Noise on every parameter: zero tokens, unit scales and zero biases hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def frames_of(checkpoint: Checkpoint, count: int = 2) -> np.ndarray:
    """Random clips (count, T, H, W, 3) uint8 for a checkpoint."""
    return np.random.default_rng(0).integers(0, 256, (count, *checkpoint.contract.shape), np.uint8)


def pixels_of(checkpoint: Checkpoint, frames: np.ndarray) -> torch.Tensor:
    """Normalised pixels (B, T, C, H, W), as the video models of transformers take them."""
    return normalise(torch.from_numpy(frames), checkpoint.contract).transpose(1, 2)


def answers(checkpoint: Checkpoint, frames: np.ndarray) -> np.ndarray:
    """Logits (B, classes) of the reference model."""
    return np.concatenate([Reference(checkpoint.model, checkpoint.contract)(clip[None]) for clip in frames])


def save(model: Any, folder: Path, processor: Any = None, **how: Any) -> Path:
    """The folder that `save_pretrained` writes."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, **how)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


NO_OPTIONS = ReadOptions()


def agrees(checkpoint: Checkpoint, model: Any, **how: Any) -> None:
    """Check that the logits are those of an image model of transformers, called with `how`, on the same pixels."""
    frames = frames_of(checkpoint)
    with torch.no_grad():
        expected = model(pixels_of(checkpoint, frames)[:, 0], **how).logits.numpy()
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(answers(checkpoint, frames), expected, atol=1e-4 * np.abs(expected).max())


def picture(kind: str, size: tuple[int, int]) -> np.ndarray:
    """A picture (H, W, 3) uint8: noise, or a cutting of a photograph."""
    if kind == "noise":
        return np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    with Image.open(demo.photo_files()[0]) as photo:
        return np.asarray(photo.convert("RGB").crop((0, 0, *size[::-1])))


SIZES = ((131, 97), (97, 131), (64, 64), (60, 64), (301, 225))
"""(height, width) of pictures, among them half-pixel crops. Left out are strongly shrunk portraits, of which Pillow 13
resizes the rows first, and extreme shapes, on which torchvision's two integer passes are 2 levels from Pillow's."""


def sees_the_same(checkpoint: Checkpoint, processor: Any) -> None:
    """Check our preprocessing: equal to that of a processor's Pillow form, within 1 grey level of its own."""
    settings = {key: value for key, value in processor.to_dict().items() if key != "image_processor_type"}
    pillow = getattr(transformers, f"{type(processor).__name__}Pil", None)
    for size in SIZES:
        for kind in ("noise", "natural"):
            assert levels_from(checkpoint, processor, kind, size) <= 1
            if pillow is not None:
                assert levels_from(checkpoint, pillow(**settings), kind, size) == 0


def levels_from(checkpoint: Checkpoint, processor: Any, kind: str, size: tuple[int, int]) -> float:
    """The largest difference in grey levels between our preprocessing and that of a processor of transformers."""
    frame, contract = picture(kind, size), checkpoint.contract
    theirs = processor(Image.fromarray(frame), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    levels = (theirs * np.array(contract.std) + np.array(contract.mean)) * 255  # (H, W, 3)
    ours = preprocess.prepare(frame, contract)[0]
    assert levels.shape == ours.shape
    return round(float(np.abs(ours - levels).max()), 3)  # float32 rounded what was normalised


def proves(folder: Path, out: Path, *targets: str, read: ReadOptions = NO_OPTIONS, **options: Any) -> bundles.Bundle:
    """Export a checkpoint with the usual proof, and check that the first bundle finds the same model again."""
    made = list(pipeline.export_models(targets, folder, out, pipeline.Options(**options), read=read))
    assert [bundle.status for bundle in made] == ["executed"] * len(targets)
    bundle = bundles.load(made[0].path)
    again = formats.of_bundle(bundle)
    assert (again.spec, again.contract, again.labels) == (bundle.spec, bundle.contract, bundle.labels)
    source = formats.load(folder, read).with_clip(bundle.spec.frames, bundle.spec.size)
    frames = frames_of(again, 1)
    np.testing.assert_array_equal(answers(again, frames), answers(source, frames))
    return bundle


def clip(kind: str, size: tuple[int, int], count: int) -> np.ndarray:
    """Frames (count, H, W, 3) uint8 of a `picture`, each moved a pixel further."""
    return np.stack([np.roll(picture(kind, size), t, axis=1) for t in range(count)])


def levels_apart(checkpoint: Checkpoint, frames: np.ndarray, theirs: Any) -> float:
    """Largest difference in grey levels between our frames and a processor's normalised pixels (T, 3, H, W)."""
    contract = checkpoint.contract
    mean, std = (np.asarray(v)[:, None, None] for v in (contract.mean, contract.std))
    levels = 255 * (np.asarray(theirs, np.float64) * std + mean)  # (T, 3, H, W)
    ours = resize.spatial(frames, contract).transpose(0, 3, 1, 2)
    assert levels.shape == ours.shape
    return float(np.abs(levels - ours).max())
