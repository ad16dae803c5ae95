"""What the export of a large model costs: wall time, processor time and peak memory of a fresh process, by stage.

    python bench/studies/large.py [--model tubevit-h] [--target onnx-fp32] [--depth 2] [--clips 4] [--json FILE]

Weights are random, which does not affect the cost. `videomae-b` and `vjepa2-l` are folders as transformers writes them,
`wide` and `deep` have two wide blocks and 32 of TubeViT-H's, and float32 weights beyond the 2 GB of one protobuf
message. INT8 is calibrated and judged on `--clips` clips of noise in motion: the memory does not depend on their
number, but the time does.

Peaks of stages are those that Linux counts (VmHWM); a stage ends where the next one begins.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from edgetube import formats
from edgetube.bench.machine import describe
from edgetube.contract import InputContract
from edgetube.export import pipeline
from edgetube.files import atomic_write
from edgetube.model import checkpoints
from edgetube.model.transformer import VideoTransformer, shapes
from edgetube.spec import SIZES, ModelSpec, TubeSpec

PUBLISHED = ("videomae-b", "vjepa2-l")
SPARSE = {
    name: ModelSpec(
        (TubeSpec((2, 16, 16), (2, 16, 16)),), 4, (64, 64), width, depth, width // 128, (("c", 10),), readout=("mean",)
    )
    for name, width, depth in (("wide", 5120, 2), ("deep", 1280, 32))
}
"""2.5 GB in float32; few tokens."""


class Stages:
    """Progress of an export as a list of stages with their cost; one begins when the progress names it."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.begin("start")

    def begin(self, name: str) -> None:
        self.end()
        self.rows.append({"stage": name, "wall_s": -time.perf_counter(), "cpu_s": -time.process_time()})
        reset_peak()

    def end(self) -> None:
        """End the stage that runs."""
        if self.rows and "peak_gb" not in self.rows[-1]:
            self.rows[-1]["wall_s"] += time.perf_counter()
            self.rows[-1]["cpu_s"] += time.process_time()
            self.rows[-1] |= {"peak_gb": status_gb("VmHWM"), "left_gb": status_gb("VmRSS")}
            print(line(self.rows[-1]), file=sys.stderr, flush=True)

    def __call__(self, stage: str, done: int, total: int) -> None:
        if done == 0:
            self.begin(stage)
        elif done == total:
            self.begin(f"after {stage}")


def line(row: dict[str, Any]) -> str:
    """One stage as a line of a table."""
    numbers = f"{row['wall_s']:.1f} | {row['cpu_s']:.1f} | {row['peak_gb']:.2f} | {row['left_gb']:.2f}"
    return f"| {row['stage']} | {numbers} |"


def reset_peak() -> None:
    """Let Linux count the peak memory of this process from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def status_gb(field: str) -> float:
    """A size of `/proc/self/status` in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / 1e9


def source(name: str, folder: Path, depth: int | None = None) -> str:
    """The model as `edgetube export --checkpoint` takes it; written to `folder` where it is not a built-in one.

    Args:
        depth: blocks of a published model, all by default.
    """
    if name in SIZES:
        return f"random:{name}"
    path = folder / name
    if name in PUBLISHED:
        from edgetube.bench.studies.published import published

        published(name, path, depth)
        return str(path)
    spec = SPARSE[name]
    model = VideoTransformer(spec).eval()
    contract = InputContract(spec.frames, *spec.size)
    labels = tuple(f"class-{i}" for i in range(spec.classifiers[0][1]))
    checkpoint = checkpoints.Checkpoint(name, model, contract, labels, "")
    return str(checkpoints.save(checkpoint, path.with_suffix(".safetensors")))


def clips(count: int, contract: InputContract, folder: Path) -> Path:
    """A file of clips (N, T, H, W, 3) uint8: smooth noise that moves by one pixel a frame."""
    frames, height, width, _ = contract.shape
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (count, height // 8 + 1, (width + frames) // 8 + 1, 3))
    fine = coarse.repeat(8, axis=1).repeat(8, axis=2).astype(np.uint8)
    moved = np.stack([fine[:, :height, i : i + width] for i in range(frames)], axis=1)
    np.save(folder / "clips.npy", moved)
    return folder / "clips.npy"


def export(model: str, target: str, count: int, work: Path, memory_gb: float, result: Connection) -> None:
    """Export in this process and send its cost; run in a child."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory_gb * 1e9), resource.RLIM_INFINITY))
    stages, start = Stages(), time.perf_counter()
    checkpoint = formats.load(model)
    count = count if "int8" in target else 0
    calib = clips(count, checkpoint.contract, work) if count else None
    weights = 4 * sum(int(np.prod(shape)) for shape in shapes(checkpoint.spec).values())
    bundle = pipeline.export_model(target, checkpoint, work / "out", pipeline.Options(calib=calib), stages)
    stages.end()
    result.send(
        {
            "target": target,
            "weights_gb": weights / 1e9,
            "artifact_gb": sum(file.bytes for file in bundle.files.values()) / 1e9,
            "wall_s": time.perf_counter() - start,
            "cpu_s": time.process_time(),
            "peak_gb": max(row["peak_gb"] for row in stages.rows),
            "clips": count,
            "stages": stages.rows,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=(*SIZES, *PUBLISHED, *SPARSE), default="tubevit-h")
    parser.add_argument("--target", default="onnx-fp32")
    parser.add_argument("--depth", type=int, help="blocks of a published model, all by default")
    parser.add_argument("--clips", type=int, default=4, help="for calibration and judging of INT8")
    parser.add_argument("--memory", type=float, default=14.0, help="GB of data after which the export fails")
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work, spawn = Path(folder), multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe(duplex=False)
        writer = spawn.Pool(1)
        model = writer.apply(source, (args.model, work, args.depth))
        writer.terminate()
        given = (model, args.target, args.clips, work, args.memory, theirs)
        child = spawn.Process(target=export, args=given)
        child.start()
        theirs.close()
        try:
            cost = ours.recv()
        except EOFError:
            raise SystemExit("the export failed") from None
        child.join()
    blocks = f", {args.depth} blocks" if args.depth else ""
    print(f"{args.model}{blocks} to {args.target}; {describe()}; load {os.getloadavg()[0]:.1f}\n")
    print("| stage | wall s | processor s | peak GB | left GB |\n|---|---|---|---|---|")
    for row in cost["stages"]:
        if row["cpu_s"] > 0.5 or row["peak_gb"] > 0.9 * cost["peak_gb"]:
            print(line(row))
    ratio = cost["peak_gb"] / cost["weights_gb"]
    print(f"| **all** | {cost['wall_s']:.0f} | {cost['cpu_s']:.0f} | {cost['peak_gb']:.2f} | |")
    print(f"\nweights {cost['weights_gb']:.2f} GB, peak {ratio:.1f} times that; artifact {cost['artifact_gb']:.2f} GB")
    if args.json:
        document = {"model": args.model, "depth": args.depth, **cost, "machine": describe()}
        atomic_write(args.json, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
