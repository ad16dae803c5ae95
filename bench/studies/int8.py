"""Speed and accuracy of INT8 on this machine: edgetube's bundles, their float baselines, and other quantisers.

    python bench/studies/int8.py speed --checkpoint random:tubevit-b --folder out/int8 [--json docs/int8.json]
    python bench/studies/int8.py profile --checkpoint random:tubevit-b --folder out/int8 [--json docs/int8.json]
    python bench/studies/int8.py accuracy --folder out/int8 [--json docs/int8.json]
    python bench/studies/int8.py weights --windows windows.npz [--json docs/int8.json]
    python bench/studies/int8.py memory --checkpoint random:tubevit-b --clips 512 [--json docs/int8.json]

`speed`: latency of one clip, the candidates in turns and each in a process of its own, and what no arrangement of the
same multiplications could beat: their number over the best rates that any runtime reaches here. The peers quantise the
graph of our own float bundle on the clips that our calibration sees. `profile`: where the time of what `speed` made
goes, as each runtime tells it. `accuracy`: the built-in model on labelled clips that no calibration has seen.
`weights`: what 7 bits and what safe pairs cost the built-in model, on the judging clips and on the filmed windows
that `python tests/machines/windows.py make windows.npz` writes. `memory`: the most that this process ever held while it
calibrated the first blocks. What `--folder` holds already is not made again: make it with `--seconds 0.1`, then measure
when the machine is quiet.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime as ort

from edgetube import bundle as bundles
from edgetube import datasets, demo, metrics
from edgetube import export as exporting
from edgetube.arrays import DiskArray
from edgetube.bench import machine, parity
from edgetube.bench.latency import Candidate, Options, peaks, run_interleaved
from edgetube.bench.studies.peers import quantisers
from edgetube.bench.worker import Benchmarkable, StageTimer, peak_mb
from edgetube.bundle import Bundle
from edgetube.calibration import calibrate, graphs, numeric
from edgetube.calibration.clips import Clips, collect
from edgetube.calibration.layerwise import CalibrationState, LayerwiseCalibrator
from edgetube.calibration.table import IntegerFormat
from edgetube.export import canonical, integer, pipeline, quantize, static
from edgetube.export import int8 as exporting_int8
from edgetube.files import atomic_write
from edgetube.model import checkpoints
from edgetube.model.checkpoints import Checkpoint
from edgetube.precision import Precision
from edgetube.runtimes.torch import Reference

EAGER, NNCF, NNCF_SLICE, BEST_ORT = "PyTorch eager", "NNCF", "NNCF, slice-based graph", "best ORT recipe"
TARGETS = ("onnx-fp32", "onnx-int8", "openvino-fp32", "openvino-fp16", "openvino-int8")
ATTENTION: Mapping[str, Precision] = {"onnx-int8": Precision.FP32, "openvino-int8": Precision.FP16}
"""Our INT8 targets, and what each computes the products of attention in; "fp16" is what the CPU has of half
precision, or float32."""

GOALS = (
    ("openvino-int8", NNCF, 1.1),
    ("openvino-int8", NNCF_SLICE, 1.1),
    ("openvino-int8", "openvino-fp32", 3.0),
    ("onnx-int8", "onnx-fp32", 2.0),
    ("onnx-int8", EAGER, 4.8),
    ("onnx-int8", BEST_ORT, 1.3),
)
"""Who should be faster than whom, and by how much, for TubeViT-B."""

CAMERA = (480, 640)
TIMES = ("name", "p50_ms", "p10_ms", "p90_ms", "noise", "runs")
"""The columns that are kept."""


# ------------------------------------------------------------------------------------------------------------ making


def clips(checkpoint: Checkpoint, count: int, folder: Path) -> Path:
    """Built-in calibration clips as an array file; made once."""
    path = folder / f"{checkpoint.name}.clips.npz"
    if not path.exists():
        found = [clip.frames for clip in datasets.built_in_calibration(count, ()).clips(checkpoint.contract)]
        np.savez(path, clips=np.stack(found))
    return path


def export(
    checkpoint: Checkpoint, names: tuple[str, ...], folder: Path, options: pipeline.Options
) -> dict[str, Bundle]:
    """Bundles by target; those that the folder holds already are taken as they are."""
    there = {name: folder / f"{checkpoint.name}.{name}" for name in names}
    if missing := [name for name, path in there.items() if not path.exists()]:
        list(pipeline.export_models(missing, checkpoint, folder, options))
    return {name: bundles.load(path) for name, path in there.items()}


def traced(checkpoint: Checkpoint, lowering: str, folder: Path) -> Path:
    """The float graph in another lowering, as a file; made once."""
    path = folder / f"{checkpoint.name}.{lowering}.onnx"
    if not path.exists():
        module = static.StaticTransformer(checkpoint.model, checkpoint.contract, lowering)
        canonical.save(canonical.trace(module, checkpoint.spec, checkpoint.contract).model, path)
    return path


def quantise(source: Path, calibration: Path, names: list[str], folder: Path, prefix: str) -> dict[str, Path]:
    """The peers' files by name; those that the folder holds already are taken as they are."""
    found = {}
    for name in names:
        peer, suffix = quantisers.PEERS[name]
        found[name] = folder / f"{prefix}.{re.sub('[^a-z0-9_]+', '-', name.lower()).strip('-')}{suffix}"
        if not found[name].exists():
            peer(source, list(np.load(calibration)["clips"]), found[name])
    return found


# ------------------------------------------------------------------------------- candidates, in processes of their own


def eager(stage_timer: StageTimer, checkpoint: str) -> Benchmarkable:
    """The reference model."""
    stage_timer("import")
    found = checkpoints.load(checkpoint)
    return Benchmarkable(partial(Reference(found.model, found.contract), demo.golden(found.contract).frames[None]))


def peer(stage_timer: StageTimer, checkpoint: str, path: str) -> Benchmarkable:
    """A peer's file in its runtime."""
    stage_timer("import")
    frames = demo.golden(checkpoints.load(checkpoint).contract).frames
    return Benchmarkable(partial(quantisers.open_model(Path(path), "default"), frames))


# --------------------------------------------------------------------------------------------------------- measuring


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Every candidate on one clip of one checkpoint."""
    checkpoint, folder = checkpoints.load(args.checkpoint), args.folder
    given = clips(checkpoint, args.clips, folder)
    options = pipeline.Options(calib=given, max_drop=100.0, lowering="gather")
    ours = export(checkpoint, TARGETS, folder, options)
    sliced = traced(checkpoint, "slice", folder)
    peers = quantise(ours["onnx-fp32"].artifact_path, given, list(quantisers.PEERS), folder, checkpoint.name)
    (nncf,) = (name for name in peers if name.startswith(NNCF))
    slow = quantise(sliced, given, [nncf], folder, f"{checkpoint.name}.slice")
    known: dict[str, Any] = {"checkpoint": args.checkpoint}
    candidates = [Candidate(EAGER, "edgetube.bench.studies.int8:eager", known)]
    for name, bundle in ours.items():
        own = {"path": str(bundle.path), "threads": None, "device": None, "camera": CAMERA}
        candidates.append(Candidate(name, "edgetube.bench.worker:bundle", own))
    for name, path in {**peers, NNCF_SLICE: slow[nncf]}.items():
        name = NNCF if name == nncf else name
        candidates.append(Candidate(name, "edgetube.bench.studies.int8:peer", {**known, "path": str(path)}))
    rates = peaks([None])
    timings = {row["name"]: row for row in run_interleaved(candidates, Options(seconds=args.seconds, starts=1))}
    sizes = {name: bundle.artifact_bytes for name, bundle in ours.items()}
    sizes |= {NNCF if n == nncf else n: quantisers.size(path) for n, path in peers.items()}
    sizes[NNCF_SLICE] = quantisers.size(slow[nncf])
    linear = sum(graphs.macs(onnx.load(ours["onnx-fp32"].artifact_path)).values()) / 1e9
    bounds = {name: Bound.of(name, rates, linear, checkpoint.spec.macs() / 1e9 - linear) for name in ATTENTION}
    return {
        "machine": machine.describe(),
        "checkpoint": checkpoint.name,
        "clip": list(checkpoint.contract.shape),
        "linear_gmac": linear,
        "int8_linears": {name: ours[name].build["integers"] for name in ATTENTION},
        "rows": rows(timings, sizes),
        "goals": goals(timings, bounds),
        "peak": rates,
        "bounds": {name: reached(bound, timings[name]["p50_ms"], linear) for name, bound in bounds.items()},
    }


Timings = Mapping[str, Mapping[str, Any]]
"""Rows of `edgetube.bench.latency.run_interleaved` by candidate."""


def rows(timings: Timings, sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """One row for each candidate: its times, the speed against PyTorch eager, and the bytes that it needs."""
    eager = timings[EAGER]["p50_ms"]
    return [
        {key: row[key] for key in TIMES} | {"against_eager": eager / row["p50_ms"], "bytes": sizes.get(name)}
        for name, row in timings.items()
    ]


@dataclass(frozen=True)
class Bound:
    """What the multiplications of a clip take when nothing else takes any time, ms.

    Attributes:
        integers: the linears, at the best rate that any runtime reaches here in one product of 8-bit integers.
        attention: the rest, at the best rate of what the target computes it in.
    """

    integers: float
    attention: float

    @classmethod
    def of(cls, target: str, rates: Sequence[Mapping[str, Any]], linear: float, rest: float) -> Bound:
        """From `edgetube.bench.latency.peaks`, and 1e9 multiply-accumulates of linears and of everything else."""
        best = {rate["precision"]: rate["gmacs_per_s"] for rate in rates}
        return cls(1e3 * linear / best["int8"], 1e3 * rest / best.get(ATTENTION[target], best["fp32"]))

    @property
    def ms(self) -> float:
        return self.integers + self.attention


def goals(timings: Timings, bounds: Mapping[str, Bound]) -> list[dict[str, Any]]:
    """Ratios of medians beside those that were asked for and those that the bounds would allow."""
    recipes = [name for name in timings if name.startswith("ORT ")]
    best = min(recipes, key=lambda name: timings[name]["p50_ms"])
    found = []
    for name, other, asked in GOALS:
        other = best if other == BEST_ORT else other
        slower = timings[other]["p50_ms"]
        measured, possible = slower / timings[name]["p50_ms"], slower / bounds[name].ms
        found.append({"name": name, "other": other, "asked": asked, "ratio": measured, "possible": possible})
    return found


def reached(bound: Bound, p50: float, linear: float) -> dict[str, float]:
    """The parts of a bound, its share of the time that was measured, and the rate of a clip's linears in that time."""
    share = {"share": bound.ms / p50, "gmacs_per_s": 1e3 * linear / p50, "int8_share": bound.integers / p50}
    return {"integers_ms": bound.integers, "attention_ms": bound.attention, **share}


def accuracy(args: argparse.Namespace) -> dict[str, Any]:
    """The built-in model in integers, in both runtimes, on clips whose photographs no calibration has seen."""
    checkpoint = checkpoints.load("demo")
    made = export(checkpoint, tuple(ATTENTION), args.folder, pipeline.Options())
    comparison = parity.measure(list(made.values()), datasets.built_in(args.clips, checkpoint.labels))
    return {
        "machine": machine.describe(),
        "calibration": next(iter(made.values())).build["int8"]["clips"],
        "rows": [
            {"name": one.bundle.target, "summary": one.bundle.build["int8"]["summary"], **one.parity.to_json()}
            for one in comparison.measured
        ],
    }


FORMS = {"8 bits": (127, False), "8 bits, safe pairs": (127, True), "7 bits": (63, False)}
"""Forms of weights: the largest magnitude, and whether pairs are limited (`calibration.numeric.MAX_PAIR_SUM`)."""


def weights(args: argparse.Namespace) -> dict[str, Any]:
    """The built-in model in integer kernels under each form of weights, against PyTorch's graph in float32.

    Every form is calibrated anew. Where sums of 8-bit products overflow, only the last two give these numbers.
    """
    checkpoint, rows = checkpoints.load("demo"), []
    module = static.StaticTransformer(checkpoint.model, checkpoint.contract, "gather")
    graph = canonical.trace(module, checkpoint.spec, checkpoint.contract)
    with tempfile.TemporaryDirectory() as name, np.load(args.windows) as windows:
        sets = (
            collect(source, checkpoint.contract, checkpoint.labels, Path(name))
            for source in exporting_int8.sources(checkpoint, None)
        )
        seen, judged = sets
        clips = {"judged": judged.frames, "filmed": windows["frames"]}
        exact = answers(graph.model, clips)
        for form, (levels, safe) in FORMS.items():
            with patch.object(numeric, "INT8_MAX", levels):
                found = calibrate(
                    graph.model,
                    graph.roles,
                    seen,
                    judged,
                    exporting.evaluator(),
                    activations="uint8",
                    form=IntegerFormat(safe_pairs=safe),
                    workspace=Path(name),
                    cache=Path(name) / form,
                    max_drop=100.0,
                )
            applied, table = quantize.apply(found, graph)
            model = integer.to_integer_kernels(applied.model, table)
            stored = (
                np.asarray(m, np.int8)
                for m in graphs.initializers(model).values()
                if m.dtype == np.int8 and m.ndim == 2
            )
            row: dict[str, Any] = {"name": form, "overflowing_pairs": sum(map(numeric.overflowing_pairs, stored))}
            for kind, logits in answers(model, clips).items():
                row[f"{kind}_sqnr_db"] = metrics.sqnr(exact[kind], logits)
                row[f"{kind}_agreement"] = metrics.agreement(exact[kind], logits)
                row[f"{kind}_cosine"] = metrics.cosine(exact[kind], logits)
            rows.append(row)
    return {"machine": machine.describe(), "clips": {kind: len(frames) for kind, frames in clips.items()}, "rows": rows}


def answers(model: onnx.ModelProto, clips: Mapping[str, Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
    """Logits of a graph for each set of clips."""
    call = exporting.evaluator()(model)
    return {kind: np.concatenate([call({"frames": clip[None]})[0] for clip in some]) for kind, some in clips.items()}


def profile(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds by operator of the INT8 files that `speed` has left in the folder."""
    checkpoint = checkpoints.load(args.checkpoint)
    frames = demo.golden(checkpoint.contract).frames[None]
    files = sorted(args.folder.glob(f"{checkpoint.name}.*-int8/model.*"))
    files += sorted(args.folder.glob(f"{checkpoint.name}.*nncf*.*")) + sorted(
        args.folder.glob(f"{checkpoint.name}.ort*")
    )
    found: dict[str, dict[str, float]] = {}
    with get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
        for path in TURNS * [path for path in files if path.suffix in (".onnx", ".xml")]:
            name = (path.parent.name if path.stem == "model" else path.stem).removeprefix(f"{checkpoint.name}.")
            times = processes.apply(profile_onnx if path.suffix == ".onnx" else profile_xml, (path, frames))
            found[name] = min(found.get(name, times), times, key=lambda one: sum(one.values()))
    return {"machine": machine.describe(), "checkpoint": checkpoint.name, "operators": found}


RUNS, TURNS = 8, 5
"""Calls of a profile, the first two of which do not count; turns of each file, in processes of their own: the fastest
one counts."""


def profile_onnx(path: Path, frames: np.ndarray) -> dict[str, float]:
    """Operator -> milliseconds of a call, the medians of its nodes summed, in ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level, options.enable_profiling = 3, True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for _ in range(RUNS):
            session.run(None, {"frames": frames})
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    taken: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            taken[event["args"]["op_name"], event["name"]].append(event["dur"] / 1e3)
    return by_operator(taken)


def profile_xml(path: Path, frames: np.ndarray) -> dict[str, float]:
    """The same in OpenVINO; its "Subgraph" is attention, or elementwise operators that it fused."""
    from edgetube.runtimes.openvino import core

    hints = {"PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": True}
    request = core().compile_model(path, "CPU", hints).create_infer_request()
    taken: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(RUNS):
        request.infer([frames])
        for node in request.profiling_info:
            if node.real_time:
                taken[node.node_type, node.node_name].append(node.real_time.total_seconds() * 1e3)
    return by_operator(taken)


def by_operator(taken: Mapping[tuple[str, str], list[float]]) -> dict[str, float]:
    """Sums of the medians of nodes, largest first, from times of (operator, node)."""
    found: dict[str, float] = defaultdict(float)
    for (operator, _), times in taken.items():
        found[operator] += float(np.median(times[2:]))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of calibrating tubes and first blocks; the other blocks are alike, and nothing of a block is kept.

    Linux and macOS only.
    """
    checkpoint = checkpoints.load(args.checkpoint)
    module = static.StaticTransformer(checkpoint.model, checkpoint.contract, "gather")
    graph = canonical.trace(module, checkpoint.spec, checkpoint.contract)
    del module
    before = peak_mb()
    with tempfile.TemporaryDirectory(dir=args.workspace) as name:
        prepared = graphs.insert_equalization_sites(graph.model, graph.roles, "uint8")
        clips = noise(checkpoint, args.clips, Path(name))
        calibrator = LayerwiseCalibrator(prepared, graph.roles, clips, exporting.evaluator(), "uint8", Path(name))
        calibrator.stages = calibrator.stages[: args.stages]
        calibrator.calibrate(CalibrationState())
    return {
        "machine": machine.describe(),
        "checkpoint": checkpoint.name,
        "clips": args.clips,
        "stages": [stage.name for stage in calibrator.stages],
        "before_mb": before,
        "peak_mb": peak_mb(),
    }


def noise(checkpoint: Checkpoint, count: int, folder: Path) -> Clips:
    """Clips of noise: what they show does not change the memory that they take."""
    frames = DiskArray(folder, (count, *checkpoint.contract.shape), np.uint8)
    for index in range(count):
        frames[index] = np.random.default_rng(index).integers(0, 256, frames.shape[1:], np.uint8)
    names = tuple(f"{index:04d}" for index in range(count))
    return Clips("noise", frames, np.full(count, -1), names, "")


# ----------------------------------------------------------------------------------------------------------- showing


def speed_text(found: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"{found['checkpoint']}, clip {tuple(found['clip'])}, {found['linear_gmac']:.1f} GMAC in linears; "
        f"{found['machine']}",
        "",
        "| candidate | p50 ms | p10 - p90 | against eager | MB |",
        "|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f}"
        lines.append(
            f"| {row['name']} | {row['p50_ms']:.1f} | {row['p10_ms']:.1f} - {row['p90_ms']:.1f} "
            f"| {row['against_eager']:.2f}x | {size} |"
        )
    lines += ["", "| faster | than | asked | measured | at most |", "|---|---|---|---|---|"]
    for goal in found["goals"]:
        ratios = f"{goal['asked']:.1f}x | {goal['ratio']:.2f}x | {goal['possible']:.2f}x"
        lines.append(f"| {goal['name']} | {goal['other']} | {ratios} |")
    rates = ", ".join(f"{rate['precision']} {rate['gmacs_per_s']:.0f} ({rate['by']})" for rate in found["peak"])
    lines += ["", f"GMAC/s of one large product, the best of all runtimes: {rates}"]
    for name, bound in found["bounds"].items():
        lines.append(
            f"{name}: {bound['gmacs_per_s']:.0f} GMAC/s in 8-bit integers, {bound['int8_share']:.0%} of that; at these "
            f"rates its linears take {bound['integers_ms']:.0f} ms and attention {bound['attention_ms']:.0f} ms, "
            f"{bound['share']:.0%} of what a clip takes"
        )
    return "\n".join(lines)


def accuracy_text(found: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"demo, calibrated on {found['calibration']['count']} clips; {found['machine']}",
        "",
        "| bundle | clips | top-1 float | top-1 int8 | drop, points | agreement | worst cosine |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        lines.append(
            f"| {row['name']} | {row['clips']} | {row['top1_reference']:.2%} | {row['top1']:.2%} "
            f"| {100 * (row['top1_reference'] - row['top1']):.2f} | {row['agreement']:.2%} | {row['cosine']:.5f} |"
        )
    return "\n".join(lines)


def weights_text(found: Mapping[str, Any]) -> str:
    """Markdown."""
    judged, filmed = (found["clips"][kind] for kind in ("judged", "filmed"))
    lines = [
        f"demo, {judged} clips that judge, {filmed} filmed windows; {found['machine']}",
        "",
        "| weights | pairs that may overflow | SQNR dB | filmed: SQNR dB | agreement | worst cosine |",
        "|---|" + "---|" * 5,
    ]
    for row in found["rows"]:
        lines.append(
            f"| {row['name']} | {row['overflowing_pairs']} | {row['judged_sqnr_db']:.1f} | {row['filmed_sqnr_db']:.1f} "
            f"| {row['filmed_agreement']:.0%} | {row['filmed_cosine']:.4f} |"
        )
    return "\n".join(lines)


def profile_text(found: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [f"{found['checkpoint']}; {found['machine']}", "", "| file | ms | of them |", "|---|---|---|"]
    for name, times in found["operators"].items():
        most = ", ".join(f"{operator} {ms:.1f}" for operator, ms in list(times.items())[:6])
        lines.append(f"| {name} | {sum(times.values()):.0f} | {most} |")
    return "\n".join(lines)


def memory_text(found: Mapping[str, Any]) -> str:
    """Markdown."""
    return (
        f"{found['checkpoint']}, {found['clips']} clips, {', '.join(found['stages'])}: at most {found['peak_mb']:.0f} "
        f"MB, {found['before_mb']:.0f} MB of them before calibration; {found['machine']}"
    )


def keep(path: Path, key: str, found: Mapping[str, Any]) -> None:
    """Put one result beside the others of a file."""
    document = json.loads(path.read_text("utf-8")) if path.exists() else {}
    document[key] = found
    atomic_write(path, json.dumps(document, indent=1) + "\n")


COMMANDS = {
    "speed": (speed, speed_text),
    "profile": (profile, profile_text),
    "accuracy": (accuracy, accuracy_text),
    "weights": (weights, weights_text),
    "memory": (memory, memory_text),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("speed").add_argument(
        "--clips", type=int, default=16, help="to calibrate on: speed is the same"
    )
    commands.add_parser("profile")
    commands.add_parser("accuracy").add_argument("--clips", type=int, default=1008, help="labelled clips to judge by")
    commands.add_parser("weights").add_argument("--windows", type=Path, required=True, help="filmed, as .npz")
    commands.add_parser("memory").add_argument("--clips", type=int, default=512, help="to calibrate on")
    for name, command in commands.choices.items():
        command.add_argument("--json", type=Path, help="write the numbers there, too")
        if name not in ("memory", "weights"):
            command.add_argument("--folder", type=Path, required=True, help="for bundles and the peers' files")
        if name not in ("accuracy", "weights"):
            command.add_argument("--checkpoint", default="random:tubevit-b")
    speeds, memories = commands.choices["speed"], commands.choices["memory"]
    speeds.add_argument("--seconds", type=float, default=8.0, help="of timing, per candidate")
    memories.add_argument("--stages", type=int, default=3, help="tubes and blocks to calibrate")
    memories.add_argument("--workspace", type=Path, help="folder for what is spooled; the system's own if left out")
    args = parser.parse_args()
    if "folder" in args:
        args.folder.mkdir(parents=True, exist_ok=True)
    measure, text = COMMANDS[args.command]
    result = measure(args)
    if args.json:
        keep(args.json, " ".join([args.command, result.get("checkpoint", "demo")]), result)
    print(text(result))


if __name__ == "__main__":
    main()
