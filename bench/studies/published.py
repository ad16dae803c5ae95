"""Models that people have, exported by edgetube and as people do it, on this machine.

    python bench/studies/published.py [--model videomae-b] [--json FILE]

The folder is the one that transformers writes, with random weights (they do not affect the time).

1. The cost of `edgetube export --target onnx-fp32` as a user pays it: seconds and peak memory of a fresh process.
2. Latency of one clip of raw uint8 frames, candidates in turns in one process: the library's model in PyTorch,
   `torch.onnx.export` of it in ONNX Runtime and OpenVINO, edgetube's bundles in both, and TubeViT-B's for comparison.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from edgetube import Runtime, demo
from edgetube import bundle as bundles
from edgetube.bench.latency import interleave
from edgetube.bench.machine import describe
from edgetube.bench.studies.peers import naive
from edgetube.bench.studies.peers.beside import declare_torchvision
from edgetube.bench.studies.static_vs_conv3d import export, tell
from edgetube.contract import InputContract
from edgetube.export import pipeline
from edgetube.runtimes.torch import normalise

MODELS = ("videomae-b", "vjepa2-l")
TARGETS = ("onnx-fp32", "openvino-fp32")
SPARSE = "random:tubevit-b"


class AsPublished(nn.Module):
    """The library's model behind the same input, frames (B, T, H, W, 3) uint8."""

    def __init__(self, model: nn.Module, argument: str, contract: InputContract) -> None:
        super().__init__()
        self.model, self.argument, self.contract = model, argument, contract

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        pixels = normalise(frames, self.contract).transpose(1, 2)  # (B, T, C, H, W)
        logits: torch.Tensor = self.model(**{self.argument: pixels}).logits
        return logits


def published(name: str, folder: Path, depth: int | None = None) -> tuple[nn.Module, str]:
    """Save a model of the library with random weights; the model, and the name of its input.

    Args:
        depth: blocks of the encoder, all by default.
    """
    blocks = {} if depth is None else {"num_hidden_layers": depth}
    declare_torchvision()
    transformers: Any = import_module("transformers")
    torch.manual_seed(0)
    if name == "videomae-b":
        made = transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(num_labels=400, **blocks))
        processor, argument = transformers.VideoMAEImageProcessor(), "pixel_values"
    else:
        config = transformers.VJEPA2Config(frames_per_clip=16, num_labels=174, **blocks)
        made, argument = transformers.VJEPA2ForVideoClassification(config), "pixel_values_videos"
        processor = transformers.VJEPA2VideoProcessor()
    made.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return made, argument


def in_onnxruntime(path: Path, frames: np.ndarray) -> Callable[[], object]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {session.get_inputs()[0].name: frames})


def in_openvino(path: Path, frames: np.ndarray) -> Callable[[], object]:
    from edgetube.runtimes.openvino import core

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = core().compile_model(path, "CPU", settings).create_infer_request()
    return partial(request.infer, [frames])


def candidates(name: str, work: Path, stack: ExitStack) -> tuple[dict[str, Callable[[], object]], dict[str, Any]]:
    """Calls by the candidate's name, and what the export cost."""
    model, argument = published(name, work / name)
    cost = export(str(work / name), work / "out")
    made = {"onnx-fp32": bundles.load(work / "out" / f"{name}.onnx-fp32")}
    made["openvino-fp32"] = pipeline.export_model("openvino-fp32", work / name, work / "out")
    contract = made["onnx-fp32"].contract
    frames = demo.golden(contract).frames[None]
    peer = AsPublished(model, argument, contract).eval()
    naive.export(peer, frames, work / "naive.onnx")
    calls: dict[str, Callable[[], object]] = {
        "library, PyTorch": partial(_infer, peer, torch.from_numpy(frames)),
        "library, torch.onnx.export, ONNX Runtime": in_onnxruntime(work / "naive.onnx", frames),
        "library, torch.onnx.export, OpenVINO": in_openvino(work / "naive.onnx", frames),
    }
    for target, bundle in made.items():
        calls[f"edgetube {target}"] = partial(stack.enter_context(Runtime(bundle)), frames)
    for target in TARGETS:
        sparse = pipeline.export_model(target, SPARSE, work / "out")
        clip = demo.golden(sparse.contract).frames[None]
        calls[f"edgetube {target}, TubeViT-B"] = partial(stack.enter_context(Runtime(sparse)), clip)
    return calls, cost


def _infer(model: nn.Module, frames: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(frames)
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, per candidate")
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        calls, cost = candidates(args.model, Path(folder), stack)
        timings = interleave(calls, seconds=args.seconds, minimum=2, warmup=1)
    print(f"{args.model}, batch 1; {describe()}")
    print(f"edgetube export --target onnx-fp32: {cost['seconds']:.0f} s, {cost['peak_gb']:.1f} GB peak")
    tell(timings, "library, PyTorch", "PyTorch", {"model": args.model, "export": cost}, args.json)


if __name__ == "__main__":
    main()
