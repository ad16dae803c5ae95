"""A small graph with outlier channels, as trained encoders have them, and clips for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from edgetube import datasets
from edgetube.calibration.clips import Clips
from edgetube.export.canonical import Graph
from edgetube.model.checkpoints import Checkpoint


@pytest.fixture(scope="session")
def hard_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The tiny model, trained to nothing, but with a few LayerNorm channels forty times larger than the others."""
    import torch

    from edgetube.model import checkpoints

    checkpoint = checkpoints.load(tiny_checkpoint).select("motion")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        blocks: Any = checkpoint.model.blocks
        for block in blocks:
            for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                norm.weight.copy_(torch.rand(24, generator=generator) + 0.5)
                norm.bias.copy_(torch.randn(24, generator=generator) * 0.3)
                norm.weight[5] *= 40
                norm.bias[11] += 25
                linear.weight[:, 5] /= 20
                linear.bias.copy_(torch.randn(linear.bias.shape, generator=generator) * 0.1)
    path = tmp_path_factory.mktemp("hard") / "hard.safetensors"
    return checkpoints.load(checkpoints.save(checkpoint, path))


@pytest.fixture(scope="session")
def hard_graph(hard_checkpoint: Checkpoint) -> Graph:
    """Its canonical graph at batch 1."""
    from edgetube.export import canonical, static

    c = hard_checkpoint
    return canonical.trace(static.StaticTransformer(c.model, c.contract, "gather"), c.spec, c.contract)


@pytest.fixture(scope="session")
def clips(hard_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Clips, Clips]:
    """16 rendered clips to calibrate on and 18 others to judge by."""
    from edgetube.calibration.clips import collect

    folder = tmp_path_factory.mktemp("clips")
    source = datasets.built_in_calibration(34, hard_checkpoint.labels)
    parts = source.items[:16], source.items[16:]
    c = hard_checkpoint
    first, second = (collect(datasets.ClipSet("built-in", part), c.contract, c.labels, folder) for part in parts)
    return first, second


@pytest.fixture
def answer() -> Callable[..., npt.NDArray[np.float32]]:
    """Logits of a graph with batch 1 on clips, in ONNX Runtime."""
    from edgetube import export

    def run(model: onnx.ModelProto, clips: Clips) -> npt.NDArray[np.float32]:
        call = export.evaluator()(model)
        return np.concatenate([call({"frames": np.asarray(frames)[None]})[0] for frames in clips.frames])

    return run
