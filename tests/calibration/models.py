"""A random model of one block, its canonical graph, clips of noise, and logits in ONNX Runtime."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edgetube import export
from edgetube.calibration.clips import Clips
from edgetube.contract import InputContract
from edgetube.export import canonical, static
from edgetube.export.canonical import Graph
from edgetube.spec import ModelSpec, TubeSpec

CONTRACT = InputContract(4, 8, 8, fps=10.0)
WHOLE, PARTS = TubeSpec((4, 8, 8), (4, 8, 8)), TubeSpec((2, 3, 3), (2, 4, 4))
"""One token, and eight of them; kernels of 768 and 54 voxels."""


@cache
def traced(tube: TubeSpec = PARTS, width: int = 16) -> Graph:
    """The canonical graph of a random model of one block and one head, with biases and positions other than zero."""
    import torch

    from edgetube.model.transformer import VideoTransformer

    spec = ModelSpec((tube,), 4, (8, 8), width, 1, 1, (("x", 3),), positions="stored")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = VideoTransformer(spec).eval()
    state = model.state_dict()
    with torch.no_grad():
        for name in state:  # biases and positions of a new model are zero
            if name.endswith("bias") or name == "positions":
                state[name].normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return canonical.trace(static.StaticTransformer(model, CONTRACT, "gather"), spec, CONTRACT)


def noise(count: int, seed: int, prefix: str, most: int = 255) -> Clips:
    """Clips of random pixels from 0 to `most`."""
    frames = np.random.default_rng(seed).integers(0, most + 1, (count, *CONTRACT.shape), np.uint8)
    return Clips("noise", frames, np.full(count, -1), tuple(f"{prefix}{i}" for i in range(count)), f"{seed}")


def outputs(model: onnx.ModelProto, frames: Any) -> npt.NDArray[np.float32]:
    """The first output (N, ...) of a graph with batch 1, without the axis of the batch, on clips (N, T, H, W, 3)."""
    call = export.evaluator()(model)
    return np.concatenate([call({"frames": np.asarray(clip)[None]})[0] for clip in frames])
