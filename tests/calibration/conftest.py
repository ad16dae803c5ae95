"""A small graph with outlier channels, as trained encoders have them, and clips for it."""

import numpy as np
import pytest

from edgetube import datasets


@pytest.fixture(scope="session")
def hard_checkpoint(tiny_checkpoint, tmp_path_factory):
    """The tiny model, trained to nothing, but with a few LayerNorm channels forty times larger than the others."""
    import torch

    from edgetube.model import checkpoints

    checkpoint = checkpoints.load(tiny_checkpoint).select("motion")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in checkpoint.model.blocks:
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
def hard_graph(hard_checkpoint):
    """Its canonical graph at batch 1."""
    from edgetube.export import graph, static

    c = hard_checkpoint
    return graph.trace(static.StaticTubeViT(c.model, c.contract, "gather"), c.spec, c.contract)


@pytest.fixture(scope="session")
def clips(hard_checkpoint, tmp_path_factory):
    """16 rendered clips to calibrate on and 18 others to judge by."""
    from edgetube.calibration.clips import collect

    folder = tmp_path_factory.mktemp("clips")
    source = datasets.built_in_calibration(34, hard_checkpoint.labels)
    parts = source.items[:16], source.items[16:]
    c = hard_checkpoint
    return tuple(collect(datasets.ClipSet("built-in", part), c.contract, c.labels, folder) for part in parts)


@pytest.fixture
def answer():
    """Logits of a graph with batch 1 on clips, in ONNX Runtime."""
    from edgetube import export

    def run(model, clips):
        call = export.evaluator()(model)
        return np.concatenate([call({"frames": np.asarray(frames)[None]})[0] for frames in clips.frames])

    return run
