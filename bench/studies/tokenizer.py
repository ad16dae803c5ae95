"""The tokenizer alone, from uint8 frames to embedded tokens: every lowering against the Conv3d that it replaces.

    python bench/studies/tokenizer.py [--checkpoint random:tubevit-b] [--threads 2] [--json FILE]
    python bench/studies/tokenizer.py --checkpoint videomae-b

A dense model, whose one tube touches each voxel once, has one more candidate: a plain reshape and one product, with the
normalisation folded into the weights as edgetube does.

The last table compares each runtime's fastest tokenizer with a call of the whole model: the most that a stream could
save by embedding only the tubes whose pixels have changed.

The candidates take turns in blocks of calls. The first calls of a block are not counted: the threads of the
runtime that ran before spin on the cores for a while after its last call.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from edgetube import demo, formats
from edgetube.bench.machine import describe
from edgetube.bench.studies import published
from edgetube.bench.studies.peers import naive
from edgetube.export import canonical, tokenizer
from edgetube.export.build import Builder
from edgetube.model.checkpoints import Checkpoint
from edgetube.progress import silent
from edgetube.spec import TubeSpec

NAIVE, PATCHES, WHOLE = "Conv3d", "reshape, GEMM", "whole model"
SETTLE = 3
"""Calls at the start of each block that are not counted."""

Call = Callable[[], np.ndarray]


class Patches(nn.Module):
    """The tokens of a dense tube: frames (B, T, H, W, 3) uint8 cut into blocks, one product, positions added."""

    weight: torch.Tensor
    added: torch.Tensor

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        spec, contract = checkpoint.spec, checkpoint.contract
        (kernel,) = (tube.kernel for tube in spec.tubes)
        self.cut = [part for pair in zip(spec.clip, kernel, strict=True) for part in (pair[0] // pair[1], pair[1])]
        convolution = checkpoint.model.tubes.weights[0].detach()  # (D, C, kt, kh, kw)
        gain = 1 / (255 * torch.tensor(contract.std))
        shift = -torch.tensor(contract.mean) / torch.tensor(contract.std)
        columns = convolution.permute(2, 3, 4, 1, 0)  # (kt, kh, kw, C, D)
        bias = (columns * shift[:, None]).sum((0, 1, 2, 3))
        self.register_buffer("weight", (columns * gain[:, None]).reshape(-1, columns.shape[-1]))
        self.register_buffer("added", checkpoint.model.positions.detach() + checkpoint.model.tubes.biases[0] + bias)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        blocks = frames.to(torch.float32).reshape(-1, *self.cut, 3).permute(0, 1, 3, 5, 2, 4, 6, 7)
        tokens: torch.Tensor = blocks.reshape(len(frames), -1, len(self.weight)) @ self.weight + self.added
        return tokens


def is_dense(checkpoint: Checkpoint) -> bool:
    """Whether one tube touches each voxel of the clip once."""
    spec = checkpoint.spec
    return len(spec.tubes) == 1 and spec.tubes[0] == TubeSpec(spec.tubes[0].kernel, spec.tubes[0].kernel)


def candidates(checkpoint: Checkpoint, frames: np.ndarray, threads: int, folder: Path) -> dict[tuple[str, str], Call]:
    """(runtime, lowering) -> a call that tokenizes `frames` (1, T, H, W, 3); (runtime, `WHOLE`) -> one that answers."""
    modules: dict[str, nn.Module] = {NAIVE: naive.Tokenizer(checkpoint).eval()}
    if is_dense(checkpoint):
        modules[PATCHES] = Patches(checkpoint).eval()
    for lowering in tokenizer.LOWERINGS:
        modules[lowering] = tokenizer.StaticTokenizer(checkpoint.model, checkpoint.contract, lowering).eval()
    calls: dict[tuple[str, str], Call] = {}
    for name, module in modules.items():
        path = folder / f"{name}.onnx"
        if isinstance(module, tokenizer.StaticTokenizer):
            canonical.save(canonical.trace(module, checkpoint.spec, checkpoint.contract).model, path)
        else:
            naive.export(module, frames, path)
        calls |= in_runtimes(name, path, frames, threads)
        calls["PyTorch eager", name] = partial(in_torch, module, frames)
    whole = folder / "whole.onnx"
    with closing(Builder(checkpoint, 1, silent)) as builder:
        canonical.save(builder.graph("gather").model, whole)
    return calls | in_runtimes(WHOLE, whole, frames, threads)


def in_runtimes(name: str, path: Path, frames: np.ndarray, threads: int) -> dict[tuple[str, str], Call]:
    """(runtime, name) -> a call of an ONNX graph in each runtime that is here."""
    calls = {("ONNX Runtime", name): in_onnxruntime(path, frames, threads)}
    if find_spec("openvino"):
        calls["OpenVINO", name] = in_openvino(path, frames, threads)
    return calls


def in_onnxruntime(path: Path, frames: np.ndarray | Mapping[str, np.ndarray], threads: int) -> Call:
    """A call; `frames` are the one input, or all inputs by name."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = frames if isinstance(frames, Mapping) else {session.get_inputs()[0].name: frames}
    return lambda: np.asarray(session.run(None, feed)[0])


def in_openvino(path: Path, frames: np.ndarray, threads: int) -> Call:
    core = import_module("edgetube.runtimes.openvino").core()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(path, "CPU", settings).create_infer_request()
    return lambda: np.asarray(request.infer([frames])[0])


def in_torch(module: nn.Module, frames: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(module(torch.from_numpy(frames)).numpy())


def measure(calls: dict[tuple[str, str], Call], seconds: float, block: int) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of every counted call."""
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for key, call in calls.items():
            for turn in range(SETTLE + block):
                start = time.perf_counter()
                call()
                if turn >= SETTLE:
                    taken[key].append((time.perf_counter() - start) * 1e3)
    return taken


def rows(calls: dict[tuple[str, str], Call], taken: dict[tuple[str, str], list[float]]) -> list[dict[str, Any]]:
    """One row per candidate: milliseconds, speed against Conv3d in the same runtime, error against PyTorch's."""
    expected = calls["PyTorch eager", NAIVE]()
    table = []
    for runtime, lowering in sorted(key for key in calls if WHOLE not in key):
        p10, p50, p90 = np.percentile(taken[runtime, lowering], [10, 50, 90])
        error = float(np.abs(calls[runtime, lowering]() - expected).max())
        table.append(
            {
                "runtime": runtime,
                "lowering": lowering,
                "p50_ms": float(p50),
                "p10_ms": float(p10),
                "p90_ms": float(p90),
                "speedup": float(np.median(taken[runtime, NAIVE]) / p50),
                "max_abs_error": error,
                "runs": len(taken[runtime, lowering]),
            }
        )
    return table


def shares(taken: dict[tuple[str, str], list[float]]) -> list[dict[str, Any]]:
    """Of each runtime that answers: the median call of the whole model, and the fastest tokenizer's share of it."""
    medians = {key: float(np.median(times)) for key, times in taken.items()}
    table = []
    for runtime in sorted(runtime for runtime, name in medians if name == WHOLE):
        whole = medians[runtime, WHOLE]
        fastest = min(median for (where, name), median in medians.items() if where == runtime and name != WHOLE)
        table.append({"runtime": runtime, "p50_ms": whole, "tokenizer_share": fastest / whole})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="random:tubevit-b")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing, all candidates together")
    parser.add_argument("--block", type=int, default=10, help="counted calls before the next candidate's turn")
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        source = args.checkpoint
        if source in published.MODELS:
            published.published(source, Path(folder) / source)
            source = str(Path(folder) / source)
        checkpoint = formats.load(source)
        frames = demo.golden(checkpoint.contract).frames[None]
        calls = candidates(checkpoint, frames, args.threads, Path(folder))
        taken = measure(calls, args.seconds, args.block)
        table, whole = rows(calls, taken), shares(taken)
    print(f"tokenizer of {checkpoint.name}, clip {checkpoint.contract.shape} uint8, batch 1, {args.threads} threads")
    print(describe())
    print("\n| runtime | tokenizer | p50 ms | p10 - p90 | against Conv3d | max abs error |\n|---|---|---|---|---|---|")
    for row in table:
        print(
            f"| {row['runtime']} | {row['lowering']} | {row['p50_ms']:.1f} | {row['p10_ms']:.1f} - {row['p90_ms']:.1f} "
            f"| {row['speedup']:.1f}x | {row['max_abs_error']:.0e} |"
        )
    print("\n| runtime | whole model, p50 ms | share of the fastest tokenizer |\n|---|---|---|")
    for row in whole:
        print(f"| {row['runtime']} | {row['p50_ms']:.1f} | {row['tokenizer_share']:.1%} |")
    if args.json:
        document = {"checkpoint": checkpoint.name, "threads": args.threads, "machine": describe()}
        document |= {"tokenizers": table, "whole": whole}
        args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
