"""Every target that can be built here, on one model: who runs its artifact, on what, and how well it answers.

    python bench/studies/targets.py [--film FILE ...] [--clips 504] [--json bench/results/targets.json]
    python bench/studies/targets.py --model videomae-tiny
    python bench/studies/targets.py --cost random:tubevit-b [--target onnx-fp32 ...]

Bundles are made as a user makes them, with the defaults of each target, and compared with PyTorch on clips that no
calibration has seen: those that are built in, and `--windows` windows, evenly spaced, of the films given. The model is
the built-in one, or a VideoMAE of four blocks with random weights, as transformers saves it.
What a vendor simulates takes seconds a clip: it answers a sample of `--simulated-clips` of each set. `--cost` exports
one model to each target in a process of its own: seconds, and the largest memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from edgetube import datasets, demo, export, formats, runtimes, video
from edgetube.bench import machine, parity
from edgetube.bench.studies.large import Stages
from edgetube.bench.studies.peers.beside import declare_torchvision
from edgetube.bundle import Bundle
from edgetube.errors import EdgetubeError
from edgetube.export import pipeline
from edgetube.files import atomic_write

MODELS = ("demo", "videomae-tiny")
CALIBRATION = 96
"""Clips that the model without labels is calibrated on."""

UNLABELLED_DROP = 100.0
"""Points of accuracy that a model without labels may lose: there is no accuracy to lose."""


def videomae(folder: Path) -> Path:
    """A folder of a small VideoMAE with random weights."""
    declare_torchvision()
    transformers: Any = import_module("transformers")
    import_module("torch").manual_seed(0)
    config = transformers.VideoMAEConfig(
        image_size=64, num_frames=16, hidden_size=192, num_hidden_layers=4, num_attention_heads=3,
        intermediate_size=768, num_labels=9,
    )  # fmt: skip
    transformers.VideoMAEForVideoClassification(config).eval().save_pretrained(folder)
    size = {"height": 64, "width": 64}
    transformers.VideoMAEImageProcessor(size={"shortest_edge": 64}, crop_size=size).save_pretrained(folder)
    return folder


def buildable(asked: Sequence[str]) -> list[str]:
    """Targets that can be built here, in the order of their names."""
    known = export.targets()
    return [name for name in (asked or known) if not known[name].missing(known[name].build_needs)]


def bundles(model: str, names: Sequence[str], work: Path) -> Iterator[Bundle | tuple[str, str]]:
    """The bundle of each target, or its name and why there is none."""
    source: str | Path = model if model == "demo" else videomae(work / model)
    options = pipeline.Options()
    if model != "demo":
        contract = formats.load(source).contract
        shown = np.stack([clip.frames for clip in demo.evaluation(contract, CALIBRATION)])
        np.save(work / "clips.npy", shown)
        options = pipeline.Options(calib=work / "clips.npy", max_drop=UNLABELLED_DROP)
    for name in names:
        print(f"export {model} to {name}", file=sys.stderr, flush=True)
        try:
            yield pipeline.export_model(name, source, work / "out", options)
        except EdgetubeError as error:
            yield name, str(error)


def films(paths: Sequence[Path], count: int) -> datasets.ClipSet:
    """Windows of films, evenly spaced."""
    items: list[datasets.Item] = []
    for path in paths:
        times = [seconds for seconds, _ in video.frames(path)]
        starts = np.linspace(0, times[-1], count // len(paths) + 1)[:-1]
        items += datasets.windows(path, starts.tolist()).items
    return datasets.ClipSet(f"{len(items)} windows of {', '.join(path.name for path in paths)}", tuple(items))


def row(bundle: Bundle, measured: Sequence[parity.Measured]) -> dict[str, Any]:
    """What the table says of one bundle; `measured` on each set of clips."""
    with runtimes.open_bundle(bundle, device=runtimes.device_of(bundle)) as backend:
        by = backend.describe()
    return {
        "target": bundle.target,
        "status": measured[0].parity.status,
        "by": by,
        "bytes": bundle.artifact_bytes,
        "lowering": bundle.build.get("lowering"),
        "sets": [one.to_json() for one in measured],
    }


def agreement(model: str, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The rows of one model."""
    made = list(bundles(model, buildable(options.target), work))
    found = [one for one in made if isinstance(one, Bundle)]
    sets = [datasets.built_in(options.clips, found[0].labels)]
    sets += [films(options.film, options.windows)] if options.film else []
    rows: dict[str, dict[str, Any]] = {}
    for simulated in (False, True):
        group = [bundle for bundle in found if runtimes.simulated(bundle.backend) is simulated]
        shown = [clips.sample(options.simulated_clips) if simulated else clips for clips in sets]
        measured = [parity.measure(group, clips, worst=1).measured for clips in shown] if group else []
        rows |= {bundle.target: row(bundle, of_one) for bundle, *of_one in zip(group, *measured, strict=True)}
    return {
        "model": model,
        "sets": [clips.name for clips in sets],
        "rows": [rows[bundle.target] for bundle in found],
        "refused": dict(one for one in made if not isinstance(one, Bundle)),
    }


def _export(model: str, target: str, sender: Any) -> None:
    stages, began = Stages(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        pipeline.export_model(target, model, folder, pipeline.Options(), stages)
    stages.end()
    sender.send({"seconds": time.perf_counter() - began, "peak_gb": max(stage["peak_gb"] for stage in stages.rows)})


def cost(model: str, names: Sequence[str]) -> dict[str, Any]:
    """Target -> seconds and peak memory of its export; None where it fails."""
    found = {}
    context = multiprocessing.get_context("spawn")
    for name in names:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_export, args=(model, name, sender))
        process.start()
        sender.close()
        try:
            found[name] = receiver.recv()
        except EOFError:
            found[name] = None
        process.join()
        print(name, found[name], file=sys.stderr, flush=True)
    return {"model": model, "exports": found}


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    columns = ["target", "status", "by", "MB"]
    for name in found["sets"]:
        columns += [f"agreement, {name}", "worst cosine", "largest error"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for each in found["rows"]:
        by = ", ".join(f"{key} {value}" for key, value in each["by"].items())
        cells = [each["target"], each["status"], by, f"{each['bytes'] / 1e6:.1f}"]
        for one in each["sets"]:
            cells += [
                f"{one['agreement']:.1%} of {one['clips']}",
                f"{one['cosine']:.4f}",
                f"{one['relative_error']:.1e}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *(f"{name}: {why}" for name, why in found["refused"].items())])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="all of them by default")
    parser.add_argument("--target", action="append", default=[], help="instead of all that can be built here")
    parser.add_argument("--clips", type=int, default=504, help="built-in ones")
    parser.add_argument("--film", type=Path, action="append", default=[])
    parser.add_argument("--windows", type=int, default=100, help="of the films together")
    parser.add_argument("--simulated-clips", type=int, default=32)
    parser.add_argument("--cost", metavar="MODEL", help="Only what exports of this model cost.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    document: dict[str, Any] = {"machine": machine.describe(), "versions": machine.versions()}
    if options.cost:
        document["cost"] = cost(options.cost, buildable(options.target))
    else:
        with tempfile.TemporaryDirectory() as folder:
            document["models"] = [agreement(name, options, Path(folder)) for name in options.model or MODELS]
        for found in document["models"]:
            print(f"{found['model']}\n\n{table(found)}\n")
    if options.json:
        kept = json.loads(options.json.read_text()) if options.json.exists() else {}
        atomic_write(options.json, json.dumps({**kept, **document}, indent=1) + "\n")
    print(document["machine"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
