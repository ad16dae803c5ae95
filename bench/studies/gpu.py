"""What this machine's NVIDIA GPU answers and how fast, in one command from a folder that was prepared before.

    python bench/studies/gpu.py prepare --out FOLDER [--models random:tubevit-b] [--batches 1,8] [--exports FOLDER]
    python FOLDER/run.py [--json FILE] [--minutes 10]          # where the GPU is: needs PyTorch and numpy alone

1. Limits: the rate of one large product of matrices, and the bandwidth of one large copy.
2. Answers: the built-in model's bundles against PyTorch in float32, in their own runtimes where these are installed,
   and the graphs of the trt targets in PyTorch's kernels (`gpu_witness.py`), which shows what their float16 and their
   int8 products answer on silicon where TensorRT is not.
3. Latency: PyTorch eager and `torch.compile` in float16, the trt graphs in PyTorch, as they are and fused by
   `torch.compile`, ONNX Runtime's CUDA provider, the TensorRT bundles, trt-fp16 without its CUDA graph. Every call
   begins with uint8 frames in the host's memory and ends with logits there. Random weights: a time does not depend on
   them. With shares of the limits: the work is the model's multiplications, the traffic its weights once and its clips
   once, so both are lower bounds of what the GPU does.

Each row is measured in a process of its own, one after the other, within a time limit, and the results so far are
written after every row. A row that cannot run has the reason. Without a GPU nothing is measured, and the exit code is
2; `--device cpu` rehearses all of it. `docs/gpu.md` says more.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetube import bundle as bundles
from edgetube import metrics, runtimes
from edgetube.bench import latency, machine
from edgetube.bench.latency import Candidate, Options, Process
from edgetube.bench.studies import gpu_folder
from edgetube.bench.worker import Benchmarkable, StageTimer
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, EdgetubeError
from edgetube.files import atomic_write
from edgetube.precision import PRECISIONS, Precision
from edgetube.runtimes import tensorrt
from edgetube.runtimes.base import Backend
from edgetube.targets import GPU, missing

SCHEMA = 2
"""Of the documents; `gpu-h200*.json` are older and state none."""

ORT = "onnx-fp16"
TARGETS = ("trt-fp16", "trt-int8", "rtx-fp16", "rtx-int8", ORT)
CAMERA = (480, 640)
HERE = "edgetube.bench.studies.gpu"

LIMIT, COMPILE_LIMIT = 60.0, 150.0
"""Seconds that one row may take, and one that `torch.compile` works for first."""

PATIENCE = {"cuda": 1.0, "cpu": 10.0}
"""What a row's limit is multiplied by: rehearsals are slow."""

LEAST = 5.0
"""Seconds that must be left for a row to begin."""


# ------------------------------------------------------------------------------------------------------- candidates


def _torch(device: str) -> Any:
    """PyTorch, where it has the device.

    Raises:
        BackendError: it has not.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"PyTorch {torch.__version__} sees no GPU; install a build of it for CUDA")
    return torch


def eager(stage_timer: StageTimer, path: str, device: str, compiled: str) -> Benchmarkable:
    """The reference model of a bundle's geometry in float16, as it is or through `torch.compile` in a mode.

    Its weights are random: PyTorch alone reads no checkpoints.
    """
    torch = _torch(device)
    from edgetube.model.transformer import VideoTransformer

    stage_timer("import")
    bundle = bundles.load(path)
    torch.manual_seed(0)
    network = VideoTransformer(bundle.spec).half().to(device).eval()
    mean, std = (torch.tensor(v).half().to(device) for v in (bundle.contract.mean, bundle.contract.std))

    def forward(frames: Any) -> Any:
        return network(((frames.half() / 255 - mean) / std).permute(0, 4, 1, 2, 3)).float()

    run = torch.compile(forward, mode=compiled) if compiled else forward
    clips = torch.from_numpy(bundle.golden()[0][:1].repeat(bundle.batch, axis=0))
    clips = clips.pin_memory() if device == "cuda" else clips
    stage_timer("load")

    def call() -> object:
        with torch.inference_mode():
            return run(clips.to(device, non_blocking=True)).cpu()

    return Benchmarkable(call, about=_about(torch, device))


def _about(torch: Any, device: str) -> dict[str, Any]:
    if device != "cuda":
        return {"torch": torch.__version__, "device": device}
    major, minor = torch.cuda.get_device_capability()
    named = {"device": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"}
    return {"torch": torch.__version__, "cuda": torch.version.cuda, **named}


class KernelByKernel(tensorrt.Session):
    """A session without a CUDA graph, to measure the graph's gain."""

    def _record(self) -> tuple[Callable[[], None], str]:
        return self._enqueue, "none: to compare with"


def launched(stage_timer: StageTimer, path: str) -> Benchmarkable:
    """A TensorRT bundle without its CUDA graph."""
    stage_timer("import")
    bundle = bundles.load(path)
    session = KernelByKernel(bundle)
    stage_timer("load")
    clips = np.repeat(bundle.golden()[0][:1], session.batch, axis=0)
    return Benchmarkable(lambda: session(clips), about=session.describe())


def limits(stage_timer: StageTimer, device: str, size: int = 8192, copied: int = 1 << 30) -> Benchmarkable:
    """What the device reaches at best; `about` has `gmacs_per_s` by precision and `gb_per_s`.

    Args:
        size: of the square matrices that are multiplied.
        copied: bytes of the block that is copied.
    """
    torch = _torch(device)
    halves = torch.randn(2, size, size, device=device, dtype=torch.float16)
    bytes_ = torch.randint(-100, 100, (2, size, size), device=device, dtype=torch.int8)
    block = torch.empty(copied, device=device, dtype=torch.uint8)
    gmac = size**3 / 1e9
    found = {
        "gmacs_per_s": {
            "fp16": gmac / _best(torch, device, lambda: halves[0] @ halves[1]),
            "int8": gmac / _best(torch, device, lambda: torch._int_mm(bytes_[0], bytes_[1].t())),
        },
        "gb_per_s": 2 * block.numel() / 1e9 / _best(torch, device, block.clone),  # read once, written once
    }
    return Benchmarkable(lambda: None, about=found | _about(torch, device))


def _best(torch: Any, device: str, call: Callable[[], object]) -> float:
    """Seconds of the fastest of twenty calls."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    taken = []
    for _ in range(20):
        wait()
        start = time.perf_counter()
        call()
        wait()
        taken.append(time.perf_counter() - start)
    return min(taken)


def answers(stage_timer: StageTimer, path: str, clips: str, device: str, witness: bool) -> Benchmarkable:
    """How a bundle answers the clips of a folder, in its own runtime or as a graph in PyTorch; in `about`.

    Raises:
        BackendError, MissingPackageError: it cannot run here.
    """
    bundle = bundles.load(path)
    with np.load(clips) as found:
        given = {name: found[name] for name in found.files}
    if witness:
        from edgetube.bench.studies import gpu_witness

        backend: Backend = gpu_witness.Witness(bundle, device)
        status = gpu_witness.STATUS[device]
    else:
        # On the CPU ONNX Runtime has its own default; SDKs of GPUs have one device only.
        backend = runtimes.open_bundle(bundle, device="cuda" if device == "cuda" and bundle.target == ORT else None)
        status = backend.status
    with backend:
        logits = backend(given["frames"])
        about = backend.describe()
    compared = compare(logits, given["reference"], given["labels"], given.get(bundle.target))
    return Benchmarkable(lambda: None, about={"runtime": about, "status": status, **compared})


def compare(
    logits: npt.NDArray[np.float32],
    reference: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    emulated: npt.NDArray[np.float32] | None,
) -> dict[str, Any]:
    """Answers (N, classes) against the reference's, the true labels (N,), and the emulation's where there is one."""
    found = {
        "clips": len(logits),
        "agreement": metrics.agreement(reference, logits),
        "top1": float(np.mean(logits.argmax(1) == labels)),
        "top1_reference": float(np.mean(reference.argmax(1) == labels)),
        "worst_cosine": metrics.cosine(reference, logits),
        "max_abs_error": metrics.max_abs_error(reference, logits),
        "largest_logit": float(np.abs(reference).max()),
        "emulation_agreement": None,
        "emulation_error": None,
        "emulation_max_abs_error": None,
    }
    if emulated is not None:
        found["emulation_agreement"] = metrics.agreement(emulated, logits)
        found["emulation_error"] = metrics.max_abs_error(emulated, logits)
        found["emulation_max_abs_error"] = metrics.max_abs_error(reference, emulated)
    return found


def candidates(bundle: Bundle, model: str, device: str, mode: str) -> list[Candidate]:
    """The candidates that a bundle gives; `mode` is that of `torch.compile`, empty for none."""
    target, path = bundle.target, str(bundle.path)

    def candidate(name: str, opener: str, limit: float = LIMIT, **given: Any) -> Candidate:
        return _candidate(name, opener, {"path": path, **given}, bundle, model, target, bundle.precision, limit)

    chosen = "cuda" if target == ORT and device == "cuda" else None
    found = [candidate(target, "edgetube.bench.worker:bundle", threads=None, device=chosen, camera=CAMERA)]
    if target == "trt-fp16":
        found.append(candidate(f"{target}, no CUDA graph", f"{HERE}:launched"))
    if target.startswith("trt-"):
        opener = "edgetube.bench.studies.gpu_witness:open_graph"
        found.append(candidate(f"{target}'s graph in PyTorch", opener, device=device, compiled=False))
        if mode:
            name = f"{target}'s graph, torch.compile"
            found.append(candidate(name, opener, COMPILE_LIMIT, device=device, compiled=True))
    return found


def references(bundle: Bundle, model: str, device: str, mode: str) -> list[Candidate]:
    """PyTorch's own candidates for the model of a bundle; `mode` is that of `torch.compile`, empty for none."""

    def candidate(name: str, limit: float, compiled: str) -> Candidate:
        given = {"path": str(bundle.path), "device": device, "compiled": compiled}
        return _candidate(name, f"{HERE}:eager", given, bundle, model, None, Precision.FP16, limit)

    found = [candidate("PyTorch eager fp16", LIMIT, "")]
    return [*found, candidate("torch.compile fp16", COMPILE_LIMIT, mode)] if mode else found


def _candidate(
    name: str,
    opener: str,
    given: Mapping[str, Any],
    bundle: Bundle,
    model: str,
    target: str | None,
    precision: Precision,
    limit: float,
) -> Candidate:
    return Candidate(
        name,
        opener,
        given,
        batch=bundle.batch,
        facts={"model": model, "target": target, "precision": str(precision)},
        macs=bundle.spec.macs(),
        precision=precision,
        limit=limit,
    )


# ----------------------------------------------------------------------------------------------------------- measuring


@dataclass
class Clock:
    """What is left of the time that all rows together may take."""

    minutes: float
    began: float
    patience: float = 1.0

    def left(self) -> float:
        """Seconds."""
        return self.began + 60 * self.minutes - time.monotonic()

    def limit(self, wanted: float) -> float:
        """Seconds that the next row may take.

        Raises:
            BackendError: too few are left.
        """
        if (left := self.left()) < LEAST:
            raise BackendError(f"the {self.minutes:g} minutes were over; --minutes allows more")
        return min(self.patience * wanted, left)


def measure_limits(device: str, clock: Clock) -> dict[str, Any]:
    """What `limits` finds, or the reason why not."""
    small = {} if device == "cuda" else {"size": 512, "copied": 1 << 24}
    try:
        with Process("limits", f"{HERE}:limits", {"device": device, **small}, limit=clock.limit(LIMIT)) as process:
            return process.about
    except EdgetubeError as error:
        return {"reason": _reason("limits", error)}


def _reason(name: str, error: Exception) -> str:
    return str(error).removeprefix(f"{name}: ")


def measure_answers(name: str, bundle: Bundle, clips: Path, device: str, witness: bool, clock: Clock) -> dict[str, Any]:
    """What `answers` finds, or the reason why not."""
    given = {"path": str(bundle.path), "clips": str(clips), "device": device, "witness": witness}
    row = {"name": name, "target": bundle.target, "reason": None}
    try:
        with Process(name, f"{HERE}:answers", given, limit=clock.limit(LIMIT)) as process:
            return row | process.about
    except EdgetubeError as error:
        return row | {"reason": _reason(name, error)}


def measure_latency(candidate: Candidate, seconds: float, clock: Clock) -> dict[str, Any]:
    """A row of `latency.run_interleaved`; `p50_ms` is None where there is a reason."""
    try:
        limited = replace(candidate, limit=clock.limit(candidate.limit or LIMIT))
        (row,) = latency.run_interleaved([limited], Options(seconds=seconds, warm=seconds, starts=1))
    except EdgetubeError as error:
        facts = {**candidate.facts, "batch": candidate.batch}
        return {"name": candidate.name, "p50_ms": None, "reason": _reason(candidate.name, error), **facts}
    return row


def measure(
    folder: Path, device: str, minutes: float, seconds: float, mode: str, scratch: Path
) -> Iterator[dict[str, Any]]:
    """The document, after every row."""
    plan, clock = gpu_folder.read_plan(folder), Clock(minutes, time.monotonic(), PATIENCE[device])
    document: dict[str, Any] = {"schema": SCHEMA, "machine": machine.describe(), "gpu": gpu_name(), "device": device}
    document |= {"prepared": plan.made, "options": {"minutes": minutes, "seconds": seconds, "compile": mode}}
    document |= {"not_made": [list(why) for why in plan.not_made], "limits": None, "answers": [], "rows": []}
    document["limits"] = best = measure_limits(device, clock)
    yield document
    built_in = [gpu_folder.fill(folder, entry, scratch) for entry in plan.entries if entry.model == "demo"]
    for witness in (True, False):
        for bundle in built_in:
            name = f"{bundle.target}'s graph in PyTorch" if witness else bundle.target
            if not witness or bundle.target.startswith("trt-"):
                clips = folder / gpu_folder.CLIPS
                document["answers"].append(measure_answers(name, bundle, clips, device, witness, clock))
                yield document
    groups = dict.fromkeys((entry.model, entry.batch) for entry in plan.entries)
    for model, batch in sorted(groups, key=lambda group: group[0] == "demo"):  # whose times matter least, last
        mine = [entry for entry in plan.entries if (entry.model, entry.batch) == (model, batch)]
        with tempfile.TemporaryDirectory(dir=scratch) as filled:
            made = [(entry, gpu_folder.fill(folder, entry, Path(filled))) for entry in mine]
            tasks = [(mine[0], c) for c in references(made[0][1], model, device, mode)]
            tasks += [(entry, c) for entry, bundle in made for c in candidates(bundle, model, device, mode)]
            tasks.sort(key=lambda task: task[1].limit == COMPILE_LIMIT)  # those that take longest, last
            for entry, candidate in tasks:
                row = measure_latency(candidate, seconds, clock)
                clip_bytes = int(np.prod(made[0][1].contract.shape))
                document["rows"].append(row | shares(row, entry.parameters, clip_bytes, best))
                yield document


def gpu_name() -> str:
    """The GPUs and their driver, as NVIDIA's tool lists them; empty where there is none."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return ""
    wanted = "--query-gpu=name,driver_version,clocks.max.sm,power.limit"
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run([tool, wanted, "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
        return "; ".join(done.stdout.split("\n")).strip("; ")
    return ""


# ----------------------------------------------------------------------------------------------------------- results


def shares(row: Mapping[str, Any], weights: int, clip_bytes: int, best: Mapping[str, Any] | None) -> dict[str, Any]:
    """Shares of the GPU's limits that a row reaches; None where something is unknown.

    Args:
        row: with `p50_ms`, `macs` of the whole batch, `batch` and `precision`.
        weights: how many the model has; each is read once, at the width of the precision.
        clip_bytes: of one clip of uint8.
        best: what `limits` found.
    """
    if row["p50_ms"] is None or not best or "gb_per_s" not in best:
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


def answers_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows of `answers` as Markdown."""
    lines = [
        "| | status | clips | agreement | top-1 | PyTorch | worst cosine | largest logit error | emulated | "
        "against the emulation |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["reason"]:
            lines.append(f"| {row['name']} | not run: {row['reason']} | | | | | | | | |")
            continue
        emulated = ("-", "-")
        if row["emulation_error"] is not None:
            emulated = (f"{row['emulation_max_abs_error']:.3g}", f"{row['emulation_error']:.3g}")
        lines.append(
            f"| {row['name']} | {row['status']} | {row['clips']} | {row['agreement']:.2%} | {row['top1']:.1%} | "
            f"{row['top1_reference']:.1%} | {row['worst_cosine']:.6f} | "
            f"{row['max_abs_error']:.3g} of {row['largest_logit']:.3g} | {' | '.join(emulated)} |"
        )
    return "\n".join(lines)


def tables(document: Mapping[str, Any]) -> str:
    """All of a document as Markdown."""
    best = document["limits"] or {}
    parts = [document["gpu"] or "no GPU", document["machine"]]
    if "reason" in best:
        parts.append(f"without shares of the limits: {best['reason']}")
    elif best:
        rates = ", ".join(f"{name} {rate / 1e3:.0f} TMAC/s" for name, rate in best["gmacs_per_s"].items())
        parts.append(f"PyTorch {best['torch']} on {best['device']}: {rates}, {best['gb_per_s']:.0f} GB/s")
    if document["device"] != "cuda":
        parts.append("A rehearsal on a CPU: its times say nothing about a GPU.")
    parts.append(answers_table(document["answers"]))
    rows: Sequence[Mapping[str, Any]] = document["rows"]
    for model, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["batch"]) == (model, batch)]
        parts += [f"{model}, batch {batch}", table(mine)]
        if (gain := graph_gain(mine)) is not None:
            parts.append(f"The CUDA graph makes trt-fp16 {gain:.2f}x as fast.")
    parts += [f"Not prepared: {target} of {model}, batch {b}: {why}" for model, b, target, why in document["not_made"]]
    return "\n\n".join(parts)


def run(folder: Path, device: str, minutes: float, seconds: float, mode: str, path: Path | None) -> int:
    """Measure and print; 2 without a GPU."""
    if device == "cuda" and missing((GPU,)):
        print(f"gpu.py needs {GPU} and its driver; this machine has none: nothing was measured", file=sys.stderr)
        return 2
    document: dict[str, Any] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        for document in measure(folder, device, minutes, seconds, mode, Path(scratch)):
            document["seconds"] = round(time.monotonic() - began, 1)
            _save(document, path)
            last = (document["rows"] or document["answers"] or [{"name": "limits"} | document["limits"]])[-1]
            said = f"not run: {last['reason']}" if last.get("reason") else "done"
            print(f"{document['seconds']:6.0f} s  {last['name']}: {said}", file=sys.stderr, flush=True)
    print(tables(document))
    return 0


def _save(document: Mapping[str, Any], path: Path | None) -> None:
    """Save the measurements so far."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(document, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("prepare", help="make a folder, where edgetube is installed")
    making.add_argument("--out", type=Path, required=True)
    making.add_argument("--models", default="random:tubevit-b", help="to time; the built-in model is always there")
    making.add_argument("--batches", default="1,8", help="of those models")
    making.add_argument("--targets", default=",".join(TARGETS))
    making.add_argument("--clips", type=int, default=90, help="of the built-in model's evaluation set")
    making.add_argument("--exports", type=Path, help="keep the exported bundles there, and take those that are there")
    running = commands.add_parser("run", help="measure from a folder, where the GPU is")
    running.add_argument("folder", type=Path)
    running.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu rehearses it")
    running.add_argument("--minutes", type=float, default=9.5, help="that all of it may take")
    running.add_argument("--seconds", type=float, default=3.0, help="of timing, and of warm-up at most, each row")
    running.add_argument("--compile", default="reduce-overhead", help="mode of torch.compile; '' for none")
    running.add_argument("--json", type=Path, help="write the numbers there, too")
    args = parser.parse_args(arguments)
    try:
        if args.command == "run":
            return run(args.folder, args.device, args.minutes, args.seconds, args.compile, args.json)
        with tempfile.TemporaryDirectory() as scratch:
            models, batches = args.models.split(","), [int(b) for b in args.batches.split(",")]
            exports = args.exports or Path(scratch)
            plan = gpu_folder.prepare(args.out, models, batches, args.targets.split(","), args.clips, exports)
    except EdgetubeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{args.out}: {gpu_folder.size_of(args.out) / 1e6:.1f} MB, {len(plan.entries)} bundles")
    for model, batch, target, why in plan.not_made:
        print(f"without {target} of {model}, batch {batch}: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
