"""A small video model and clips that it can learn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgetube.contract import InputContract
from edgetube.model import checkpoints
from edgetube.model.checkpoints import Checkpoint
from edgetube.model.transformer import VideoTransformer
from edgetube.spec import ModelSpec, TubeSpec

SPEC = ModelSpec(
    tubes=(TubeSpec((4, 4, 4), (4, 4, 4)), TubeSpec((1, 4, 4), (4, 4, 4))),
    frames=4, size=(8, 8), width=24, depth=2, heads=2, classifiers=(("classes", 2),), prefix=1, readout=("prefix.0",),
    positions="anchored", position_resize="bicubic", gates=(0,),
)  # fmt: skip


@pytest.fixture
def start(tmp_path: Path) -> Checkpoint:
    """A model with the classes `a` and `b`, from its file."""
    torch.manual_seed(0)
    made = Checkpoint("tiny", VideoTransformer(SPEC).eval(), InputContract(4, 8, 8, fps=4.0), ("a", "b"), "")
    return checkpoints.load(checkpoints.save(made, tmp_path / "tiny.safetensors"))


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder of 24 clips: `rise` becomes brighter, `fall` darker."""
    rng = np.random.default_rng(0)
    for name, slope in (("rise", 40), ("fall", -40)):
        (tmp_path / "clips" / name).mkdir(parents=True)
        for i in range(12):
            levels = 128 + slope * (np.arange(4) - 1.5) + rng.normal(0, 10)
            noise = rng.normal(0, 8, (4, 8, 8, 3))
            frames = np.clip(levels[:, None, None, None] + noise, 0, 255).astype(np.uint8)
            np.save(tmp_path / "clips" / name / f"{i:02d}.npy", frames)
    return tmp_path / "clips"
