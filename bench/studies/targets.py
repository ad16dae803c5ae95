"""Every target that can be built here, on one model: who runs its artifact, on what, and how well it answers.

    python bench/studies/targets.py --json bench/results/targets.json [--film FILE ...] [--clips 504]
    python bench/studies/targets.py --json bench/results/targets.json --model videomae-tiny [--target onnx-fp32 ...]
    python bench/studies/targets.py --json bench/results/targets.json --cost random:tubevit-b [--target onnx-fp32 ...]
    python bench/studies/targets.py --json bench/results/targets.json --tables docs/targets.md

Bundles are made as a user makes them, with the defaults of each target, and compared with PyTorch on clips that no
calibration has seen: those that are built in, and `--windows` windows, evenly spaced, of the films given. The model is
the built-in one, or a VideoMAE of four blocks with random weights, as transformers saves it. What a vendor simulates
takes seconds a clip: it answers a sample of `--simulated-clips` of each set. `--cost` exports one model to each target
in a process of its own: processor seconds, and the largest memory. Each row is written as soon as it is measured. A row
that the file has is kept, unless its target is named or it is of other clips or versions. `--tables` measures nothing:
it writes the tables into a document.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np

from edgetube import datasets, demo, export, formats, runtimes, video
from edgetube.bench import machine, parity
from edgetube.bench.answer_cache import AnswerCache
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


def prepared(model: str, work: Path) -> tuple[str | Path, pipeline.Options]:
    """A model as it is exported: where it is, and with which options."""
    if model == "demo":
        return model, pipeline.Options()
    source = videomae(work / model)
    contract = formats.load(source).contract
    shown = np.stack([clip.frames for clip in demo.evaluation(contract, CALIBRATION)])
    np.save(work / "clips.npy", shown)
    return source, pipeline.Options(calib=work / "clips.npy", max_drop=UNLABELLED_DROP)


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
        "backend": bundle.backend,
        "by": by,
        "bytes": bundle.artifact_bytes,
        "lowering": bundle.build.get("lowering"),
        "sets": [{key: one.to_json()[key] for key in KEPT} for one in measured],
    }


KEPT = ("clips", "agreement", "cosine", "relative_error", "sqnr", "top1")
"""What is kept of a comparison."""


def agreement(model: str, options: argparse.Namespace, work: Path, document: Document) -> None:
    """Measure the rows of one model that `document` lacks."""
    labels = formats.load(model).labels if model == "demo" else ()
    sets = [datasets.built_in(options.clips, labels)]
    sets += [films(options.film, options.windows)] if options.film else []
    kept = document.of("models", model, sets=[clips.name for clips in sets])
    names = [name for name in buildable(options.target) if options.target or name not in kept["rows"]]
    if not names:
        return
    source, given = prepared(model, work)
    with AnswerCache(work / "answers.sqlite") as cache:
        for name in names:
            print(f"{model}: {name}", file=sys.stderr, flush=True)
            try:
                bundle = pipeline.export_model(name, source, work / "out", given)
            except EdgetubeError as error:
                kept["refused"][name] = str(error)
                document.save()
                continue
            simulated = runtimes.simulated(bundle.backend)
            shown = [clips.sample(options.simulated_clips) if simulated else clips for clips in sets]
            measured = [parity.measure([bundle], clips, answer_cache=cache, worst=1).measured[0] for clips in shown]
            kept["rows"][name] = row(bundle, measured)
            kept["refused"].pop(name, None)
            document.save()


def _export(model: str, target: str, sender: Any) -> None:
    stages, began = Stages(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        pipeline.export_model(target, model, folder, pipeline.Options(), stages)
    stages.end()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    processor = sum(one.ru_utime + one.ru_stime for one in used)
    peak = max(stage["peak_gb"] for stage in stages.rows)
    sender.send({"seconds": time.perf_counter() - began, "processor_s": processor, "peak_gb": peak})


def cost(model: str, asked: Sequence[str], document: Document) -> None:
    """Seconds, processor seconds and peak memory of the export to each target; null where it fails."""
    found = document.of("cost", model)["rows"]
    context = multiprocessing.get_context("spawn")
    for name in (name for name in buildable(asked) if asked or name not in found):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_export, args=(model, name, sender))
        process.start()
        sender.close()
        try:
            found[name] = receiver.recv()
        except EOFError:
            found[name] = None
        process.join()
        document.save()
        print(name, found[name], file=sys.stderr, flush=True)


class Document:
    """The results: `models` and `cost` by the model's name, with the machine of their rows, and `licences`.

    Args:
        path: of the file; None keeps it in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {}

    def of(self, kind: str, model: str, **stated: Any) -> dict[str, Any]:
        """The entry of a model, emptied where it was measured with something else than `stated`, or elsewhere."""
        here = {"machine": machine.describe(), "versions": machine.versions(), **stated}
        entries = self.data.setdefault(kind, {})
        found: dict[str, Any] = entries.get(model, {})
        if {key: found.get(key) for key in here} != json.loads(json.dumps(here)):
            found = entries[model] = {**here, "rows": {}, "refused": {}}
        return found

    def save(self) -> None:
        self.data["licences"] = licences()
        if self.path:
            atomic_write(self.path, json.dumps(self.data, indent=1) + "\n")


def licences() -> dict[str, dict[str, str]]:
    """Version and licence, as its metadata state them, of each installed package that runs artifacts."""
    extras = tuple({extra for target in export.targets().values() for extra in target.extra.split(",")} - {"export"})
    names = set(runtimes.names())
    for requirement in metadata.requires("edgetube") or []:
        package, extra = NAME.match(requirement), EXTRA.search(requirement)
        if package and extra and extra[1].startswith(extras):
            names.add(package[0])
    found = {}
    for name in sorted(names & {each.lower() for each in machine.versions()}):
        stated = metadata.metadata(name)
        classes = [each.split(" :: ")[-1] for each in stated.get_all("Classifier") or [] if "License ::" in each]
        licence = stated["License-Expression"] or ", ".join(classes) or str(stated["License"]).partition("\n")[0]
        found[name] = {"version": metadata.version(name), "licence": licence}
    return found


NAME, EXTRA = re.compile(r"[\w.-]+"), re.compile(r'extra == "([\w-]+)"')


def tables(data: Mapping[str, Any]) -> dict[str, str]:
    """Markdown: `targets`, a table for each model by its name, and `licences`."""
    models = data.get("models", {})
    found = {"targets": overview(models, data.get("cost", {}))}
    found |= {model: table(entry) for model, entry in models.items()}
    lines = [f"| `{name}` | {one['version']} | {one['licence']} |" for name, one in data.get("licences", {}).items()]
    found["licences"] = "\n".join(["| package | version | licence |", "|---|---|---|", *lines])
    return found


def overview(models: Mapping[str, Any], costs: Mapping[str, Any]) -> str:
    """Markdown: each target, who executes it here, on what, what that does not show, and what its export costs."""
    columns = ["target", "executed by", "on", "not shown by that"]
    for model in costs:
        columns += [f"export of {model}, processor s", "largest memory, GB"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    rows = {name: row for entry in models.values() for name, row in entry["rows"].items()}
    for name, row in sorted(rows.items()):
        by, on = executed(row["by"])
        emulated = "; emulated" if row["status"] == "emulated" else ""
        cells = [f"`{name}`", by, on + emulated, runtimes.unseen(row["backend"])]
        for entry in costs.values():
            one = entry["rows"].get(name)
            cells += [f"{one['processor_s']:.0f}", f"{one['peak_gb']:.1f}"] if one else ["–", "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table(entry: Mapping[str, Any]) -> str:
    """Markdown of one model: size, and agreement, worst cosine and largest error on each set of clips."""
    columns = ["target", "MB"]
    for name in entry["sets"]:
        columns += [f"agreement: {name}", "worst cosine", "largest error"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, each in sorted(entry["rows"].items()):
        cells = [f"`{name}`", f"{each['bytes'] / 1e6:.1f}"]
        for one in each["sets"]:
            right = round(one["agreement"] * one["clips"])
            cells += [f"{right} of {one['clips']}", f"{one['cosine']:.4f}", f"{one['relative_error']:.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *(f"\n`{name}`: {why}" for name, why in sorted(entry["refused"].items()))])


def executed(by: Mapping[str, Any]) -> tuple[str, str]:
    """Who runs an artifact, packages with their versions, and on what, of `Backend.describe`."""
    device = by.get("device") or "cpu"
    where = [*device] if isinstance(device, list) else [device]
    where += [by[key] for key in ("soc", "delegate") if by.get(key) not in (None, "none")]
    versions = {key: VERSION.match(value) for key, value in by.items() if isinstance(value, str)}
    who = [f"edgetube's evaluator on {by['evaluator']}"] if "evaluator" in by else []
    who += [f"{key} {version[0]}" for key, version in versions.items() if version]
    return ", ".join(who), ", ".join(where).replace("CPU", "cpu")


VERSION = re.compile(r"\d+(\.\d+)+\w*")


def fill(text: str, made: Mapping[str, str]) -> str:
    """A document with the tables between its lines `<!-- NAME -->` and `<!-- end -->` made anew."""
    for name, lines in made.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda match, lines=lines: f"{match[1]}\n{lines}\n\n{match[2]}", text)  # type: ignore[misc]
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="all of them by default")
    parser.add_argument("--target", action="append", default=[], help="instead of all that can be built here")
    parser.add_argument("--clips", type=int, default=504, help="built-in ones")
    parser.add_argument("--film", type=Path, action="append", default=[])
    parser.add_argument("--windows", type=int, default=100, help="of the films together")
    parser.add_argument("--simulated-clips", type=int, default=32)
    parser.add_argument("--cost", metavar="MODEL", help="Only what exports of this model cost.")
    parser.add_argument("--tables", metavar="DOCUMENT", type=Path, help="Only write the tables of --json there.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    document = Document(options.json)
    if options.cost:
        cost(options.cost, options.target, document)
    elif options.tables is None:
        for name in options.model or MODELS:
            with tempfile.TemporaryDirectory() as folder:
                agreement(name, options, Path(folder), document)
    made = tables(document.data)
    if options.tables:
        atomic_write(options.tables, fill(options.tables.read_text(), made))
    else:
        print("\n\n".join(f"{name}\n\n{lines}" for name, lines in made.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
