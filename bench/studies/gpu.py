"""TensorRT and TensorRT for RTX on this machine's NVIDIA GPU, against PyTorch and ONNX Runtime on the same GPU.

    python bench/studies/gpu.py [--models demo,ti,s,b] [--batches 1,8] [--targets trt-fp16,...]
        [--json bench/results/gpu.json]

1. Parity: the built-in model as trt-fp16, trt-int8, rtx-fp16 and rtx-int8 against PyTorch over the built-in evaluation
   set; and the graphs of the trt targets in PyTorch's own kernels on this GPU (`gpu_witness.py`), which shows what
   their float16 and their integer products answer on silicon where TensorRT is not installed.
2. Latency, candidates in turns and each in a process of its own: PyTorch eager and `torch.compile` in float16, ONNX
   Runtime's CUDA provider, the four TensorRT bundles, trt-fp16 without its CUDA graph, and the trt graphs in PyTorch,
   as they are and fused by `torch.compile`. Every call begins with uint8 frames in the host's memory and ends with
   logits there. Random weights: a time does not depend on them.
3. Shares: of the rate of one large product of matrices and of the bandwidth of one large copy, both measured here. The
   work is the model's multiplications, the traffic its weights once and its clips once, so both shares are lower
   bounds of what the GPU does.

A candidate that cannot run here has a row with the reason. Without a GPU nothing is measured; the exit code is 2.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgetube import bundle as bundles
from edgetube import datasets, demo
from edgetube.bench import latency, machine, parity
from edgetube.bench.latency import Candidate, Options, Process
from edgetube.bench.worker import Benchmarkable, StageTimer
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, EdgetubeError, MissingPackageError
from edgetube.export import pipeline
from edgetube.files import atomic_write
from edgetube.model import checkpoints
from edgetube.precision import PRECISIONS, Precision
from edgetube.runtimes import tensorrt
from edgetube.targets import GPU, missing

ORT = "onnx-fp16"
TARGETS = ("trt-fp16", "trt-int8", "rtx-fp16", "rtx-int8")
CAMERA = (480, 640)
CALIBRATION_COUNT = 8
"""Clips to calibrate random weights on, whose ranges do not matter."""


# ------------------------------------------------------------------------------------------------------- candidates


def eager(stage_timer: StageTimer, model: str, batch: int, compiled: str) -> Benchmarkable:
    """The reference model in float16 on the GPU, as it is or through `torch.compile` in the mode `compiled`."""
    import torch

    if not torch.cuda.is_available():
        raise BackendError(f"PyTorch {torch.__version__} sees no GPU; install a build of it for CUDA")
    stage_timer("import")
    checkpoint = checkpoints.load(model)
    network = checkpoint.model.half().cuda().eval()
    mean, std = (torch.tensor(v).half().cuda() for v in (checkpoint.contract.mean, checkpoint.contract.std))

    def forward(frames: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = network(((frames.half() / 255 - mean) / std).permute(0, 4, 1, 2, 3))
        return logits.float()

    run = torch.compile(forward, mode=compiled) if compiled else forward
    clips = demo.golden(checkpoint.contract).frames[None].repeat(batch, axis=0)
    pinned = torch.from_numpy(clips).pin_memory()
    stage_timer("load")

    def call() -> object:
        with torch.inference_mode():
            return run(pinned.cuda(non_blocking=True)).cpu()

    return Benchmarkable(call, about={"torch": torch.__version__, "device": torch.cuda.get_device_name()})


class KernelByKernel(tensorrt.Session):
    """A session without a CUDA graph, to measure the graph's gain."""

    def _record(self) -> tuple[Callable[[], None], str]:
        return self._enqueue, "none: to compare with"


def launched(stage_timer: StageTimer, path: str) -> Benchmarkable:
    """A TensorRT bundle without its CUDA graph."""
    stage_timer("import")
    session = KernelByKernel(bundles.load(path))
    stage_timer("load")
    clips = np.repeat(bundles.load(path).golden()[0][:1], session.batch, axis=0)
    return Benchmarkable(lambda: session(clips), about=session.describe())


def limits(stage_timer: StageTimer, size: int = 8192, copied: int = 1 << 30) -> Benchmarkable:
    """What this GPU reaches at best; `about` has `gmacs_per_s` by precision and `gb_per_s`.

    Args:
        size: of the square matrices that are multiplied.
        copied: bytes of the block that is copied.
    """
    import torch

    if not torch.cuda.is_available():
        raise BackendError(f"PyTorch {torch.__version__} sees no GPU; install a build of it for CUDA")
    halves = torch.randn(2, size, size, device="cuda", dtype=torch.float16)
    bytes_ = torch.randint(-100, 100, (2, size, size), device="cuda", dtype=torch.int8)
    block = torch.empty(copied, device="cuda", dtype=torch.uint8)
    gmac = size**3 / 1e9
    found = {
        "gmacs_per_s": {
            "fp16": gmac / _best(torch, lambda: halves[0] @ halves[1]),
            "int8": gmac / _best(torch, lambda: torch._int_mm(bytes_[0], bytes_[1])),
        },
        "gb_per_s": 2 * block.numel() / 1e9 / _best(torch, block.clone),  # read once, written once
    }
    return Benchmarkable(lambda: None, about=found)


def _best(torch: Any, call: Callable[[], object]) -> float:
    """Seconds of the fastest of twenty calls."""
    taken = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken)


# ----------------------------------------------------------------------------------------------------------- bundles


def build(names: Iterable[str], checkpoint: str, out: Path, batch: int = 1) -> tuple[dict[str, Bundle], dict[str, str]]:
    """The bundles that can be built here by target, and why the others cannot.

    Exported one by one: an SDK that does not know this GPU says so, and the others go on.
    """
    made: dict[str, Bundle] = {}
    reasons: dict[str, str] = {}
    options = pipeline.Options(batch=batch, lowering="gather", max_drop=100.0)
    if checkpoint.startswith("random:"):
        options = replace(options, calib=_clips(checkpoint, out))
    for name in names:
        try:
            made[name] = pipeline.export_model(name, checkpoint, out, options)
        except EdgetubeError as error:
            reasons[name] = str(error)
    return made, reasons


def _clips(checkpoint: str, out: Path) -> Path:
    contract = checkpoints.load(checkpoint).contract
    path = out / "clips.npy"
    np.save(path, np.stack([clip.frames for clip in demo.scenes(contract, CALIBRATION_COUNT)]))
    return path


def candidates(model: str, batch: int, made: Mapping[str, Bundle], mode: str = "max-autotune") -> list[Candidate]:
    """The candidates for one model and batch; `mode` is that of `torch.compile`."""
    macs = checkpoints.load(model).spec.macs()
    found = []
    for name, compiled in (("PyTorch eager fp16", ""), ("torch.compile fp16", mode)):
        given: dict[str, Any] = {"model": model, "batch": batch, "compiled": compiled}
        facts = {"model": model, "precision": "fp16"}
        worker = "edgetube.bench.studies.gpu:eager"
        found.append(Candidate(name, worker, given, None, batch, facts, macs, Precision.FP16))
    for target, bundle in made.items():
        given = {"path": str(bundle.path), "threads": None, "device": None, "camera": CAMERA}
        if target == ORT:
            given["device"] = "cuda"
        facts = {"model": model, "target": target, "precision": str(bundle.precision)}
        about = (None, batch, facts, macs, bundle.precision)
        found.append(Candidate(target, "edgetube.bench.worker:bundle", given, *about))
        if target == "trt-fp16":
            given = {"path": str(bundle.path)}
            found.append(Candidate(f"{target}, no CUDA graph", "edgetube.bench.studies.gpu:launched", given, *about))
        if target.startswith("trt-"):
            for name, fused in ((f"{target}'s graph in PyTorch", False), (f"{target}'s graph, torch.compile", True)):
                given = {"path": str(bundle.path), "compiled": fused}
                found.append(Candidate(name, "edgetube.bench.studies.gpu_witness:open_graph", given, *about))
    return found


# ----------------------------------------------------------------------------------------------------------- results


def shares(row: Mapping[str, Any], weights: int, clip_bytes: int, best: Mapping[str, Any] | None) -> dict[str, Any]:
    """Shares of the GPU's limits that a row reaches; None where something is unknown.

    Args:
        row: with `p50_ms`, `macs` of the whole batch, `batch` and `precision`.
        weights: how many the model has; each is read once, at the width of the precision.
        clip_bytes: of one clip of uint8.
        best: what `limits` found.
    """
    if row["p50_ms"] is None or not best:
        return {"flop_share": None, "bandwidth_share": None}
    seconds = row["p50_ms"] / 1e3
    moved = weights * PRECISIONS[row["precision"]].weight_bits // 8 + row["batch"] * clip_bytes
    return {
        "flop_share": row["macs"] / 1e9 / seconds / best["gmacs_per_s"][row["precision"]],
        "bandwidth_share": moved / 1e9 / seconds / best["gb_per_s"],
    }


def graph_gain(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """How many times faster the CUDA graph makes trt-fp16; None where one of the two did not run."""
    times = {row["name"]: row["p50_ms"] for row in rows}
    plain, replayed = times.get("trt-fp16, no CUDA graph"), times.get("trt-fp16")
    return plain / replayed if plain and replayed else None


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows of one model and batch as Markdown; one that did not run says why."""
    rows = list(rows)
    base = next((row["p50_ms"] for row in rows if row["name"] == "PyTorch eager fp16"), None)
    lines = [
        "| | p50 ms | p99 ms | clips/s | against eager | of the FLOP limit | of the bandwidth |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["p50_ms"] is None:
            lines.append(f"| {row['name']} | not run: {row['reason']} | | | | | |")
            continue
        against = "-" if base is None else f"{base / row['p50_ms']:.2f}x"
        limits_ = " | ".join("-" if row[k] is None else f"{row[k]:.1%}" for k in ("flop_share", "bandwidth_share"))
        noisy = f" ±{row['noise']:.0%}" if row["noise"] > latency.NOISY else ""
        lines.append(
            f"| {row['name']} | {row['p50_ms']:.3f}{noisy} | {row['p99_ms']:.3f} | {row['throughput']:.0f} | "
            f"{against} | {limits_} |"
        )
    return "\n".join(lines)


def parity_table(measured: Iterable[parity.Measured], reasons: Mapping[str, str]) -> str:
    """Agreement of each bundle with PyTorch as Markdown."""
    lines = [
        "| | status | clips | agreement | top-1 | PyTorch | largest logit error |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in measured:
        p = one.parity
        tops = " | ".join("-" if top is None else f"{top:.1%}" for top in (p.top1, p.top1_reference))
        lines.append(
            f"| {one.bundle.target} | {p.status} | {p.clips} | {p.agreement:.2%} | {tops} | {p.max_abs_error:.3g} |"
        )
    lines += [f"| {name} | not run: {reason} | | | | | |" for name, reason in reasons.items()]
    return "\n".join(lines)


def main() -> int:
    """Measure and print; 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="ti,s,b", help="sizes of TubeViT with random weights, or demo")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--targets", default=",".join((ORT, *TARGETS)))
    parser.add_argument("--bundles", type=Path, help="folder of the built-in model's bundles, exported before")
    parser.add_argument("--compile", default="max-autotune", help="mode of torch.compile")
    parser.add_argument("--clips", type=int, default=504, help="of the evaluation set")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing, per candidate")
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    args = parser.parse_args()
    if missing((GPU,)):
        print(f"gpu.py needs {GPU} and its driver; this machine has none: nothing was measured", file=sys.stderr)
        return 2
    document: dict[str, Any] = {"machine": machine.describe(), "rows": []}
    with tempfile.TemporaryDirectory() as scratch:
        names = args.targets.split(",")
        if args.bundles:
            made: dict[str, Bundle] = {b.target: b for b in map(bundles.load, sorted(args.bundles.glob("demo.*")))}
            reasons: dict[str, str] = {}
        else:
            made, reasons = build([name for name in names if name != ORT], "demo", Path(scratch))
        source = datasets.built_in(args.clips, demo.LABELS)
        found = parity.measure(list(made.values()), source) if made else None
        document["parity"] = (found.to_json() if found else {}) | {"not_run": reasons}
        print(f"{document['machine']}\n\n{parity_table(found.measured if found else (), reasons)}")
        document["witness"] = witness(made.values(), args.clips)
        print(f"\nThe graphs in PyTorch's kernels:\n\n{witness_table(document['witness'])}")
        document["limits"] = best = _limits()
        _save(document, args.json)
        for size in args.models.split(","):
            model = "demo" if size == "demo" else f"random:tubevit-{size}"
            for batch in map(int, args.batches.split(",")):
                rows = _run_interleaved(model, batch, names, Path(scratch), args.seconds, best, args.compile)
                document["rows"] += rows
                gain = graph_gain(rows)
                said = "" if gain is None else f"\n\nThe CUDA graph makes trt-fp16 {gain:.2f}x as fast."
                title = "The built-in model" if model == "demo" else f"TubeViT-{size.title()}"
                print(f"\n{title}, batch {batch}\n\n{table(rows)}{said}", flush=True)
                _save(document, args.json)
    return 0


def witness(made: Iterable[Bundle], clips: int) -> list[dict[str, Any]]:
    """What `gpu_witness.agreement` finds for the bundles of full TensorRT on this GPU; a reason where it cannot run."""
    from edgetube.bench.studies import gpu_witness

    found = []
    for bundle in made:
        if bundle.target.startswith("trt-"):
            try:
                found.append({"target": bundle.target} | gpu_witness.agreement(bundle, "cuda", clips))
            except BackendError as error:
                found.append({"target": bundle.target, "reason": str(error)})
    return found


def witness_table(found: Iterable[Mapping[str, Any]]) -> str:
    """The rows of `witness` as Markdown."""
    lines = [
        "| graph of | clips | agreement | worst cosine | largest logit error | int8 products |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        if "reason" in one:
            lines.append(f"| {one['target']} | not run: {one['reason']} | | | | |")
            continue
        lines.append(
            f"| {one['target']} | {one['clips']} | {one['agreement']:.2%} | {one['worst_cosine']:.6f} | "
            f"{one['max_abs_error']:.3g} of {one['largest_logit']:.3g} | {one['integer_products']} |"
        )
    return "\n".join(lines)


def _save(document: Mapping[str, Any], path: Path | None) -> None:
    """Save the measurements so far."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(document, indent=1) + "\n")


def _limits() -> dict[str, Any] | None:
    try:
        with Process("limits", "edgetube.bench.studies.gpu:limits", {}) as process:
            return process.about
    except (BackendError, MissingPackageError) as error:
        print(f"\nwithout shares of the limits: {error}")
        return None


def _run_interleaved(
    model: str,
    batch: int,
    names: Sequence[str],
    scratch: Path,
    seconds: float,
    best: Mapping[str, Any] | None,
    mode: str = "max-autotune",
) -> list[dict[str, Any]]:
    """The rows of one model and batch, those that cannot be built among them."""
    out = scratch / f"{model.rpartition(':')[2]}.{batch}"
    out.mkdir()
    made, reasons = build(names, model, out, batch)
    rows = latency.run_interleaved(candidates(model, batch, made, mode), Options(seconds=seconds, starts=1))
    checkpoint = checkpoints.load(model)
    weights = sum(tensor.numel() for tensor in checkpoint.model.parameters())
    clip_bytes = int(np.prod(checkpoint.contract.shape))
    rows = [row | shares(row, weights, clip_bytes, best) for row in rows]
    return [*rows, *({"name": name, "model": model, "p50_ms": None, "reason": why} for name, why in reasons.items())]


if __name__ == "__main__":
    sys.exit(main())
