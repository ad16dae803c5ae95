"""The comparison with other tools, on one checkpoint: one table.

    pip install -r bench/studies/peers/requirements.txt
    python bench/studies/peers/table.py --work WORK --json bench/results/peers.json

1. `--step build` makes the files of every recipe, each in a process of its own, and compares its answers on a few
   clips with PyTorch's. One that cannot be made has its last words in the table instead of numbers.
2. `--step time` times what could be made: a group at a time takes turns, every recipe in its own process.
3. `--step write` prints the table, and writes it into `docs/benchmarks.md` when `--json` is given.

Without `--step`, all three. `--only` and `--group` take some of them; what was measured before is kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import textwrap
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from edgetube import bundle as bundles
from edgetube import demo, metrics
from edgetube.bench import latency, machine
from edgetube.bench.studies.peers.recipes import (
    CALIBRATION,
    CLIPS,
    RECIPES,
    SOURCE,
    YARDSTICK,
    Recipe,
    clips,
    eager,
    slug,
    source,
)
from edgetube.model import checkpoints

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- begin: bench/studies/peers/table.py -->", "<!-- end: bench/studies/peers/table.py -->"
JUDGED, CALIBRATED = 2, 4
"""Clips."""

WARM = 2.0
"""Seconds of warm-up of a recipe, at most: there are many of them."""

EQUAL = 999.0
"""Decibels that stand for infinity, which JSON lacks."""

MISSING = "not measured"

PATIENCE = 1200
"""Seconds that one recipe may take to be built."""


def prepare(work: Path, checkpoint: str) -> None:
    """The clips, and PyTorch's answers to them."""
    work.mkdir(parents=True, exist_ok=True)
    (work / SOURCE).write_text(json.dumps({"checkpoint": checkpoint}))
    contract = checkpoints.load(checkpoint).contract
    np.save(work / CLIPS, np.stack([clip.frames for clip in demo.evaluation(contract, JUDGED)]))
    np.save(work / CALIBRATION, np.stack([clip.frames for clip in demo.scenes(contract, CALIBRATED)]))
    call = eager(work, work)
    np.save(work / "logits.npy", np.concatenate([call(clip[None]) for clip in clips(work)]))


def adopt(work: Path, folder: Path) -> None:
    """Take bundles that were exported before, of the same checkpoint, instead of exporting them again."""
    for path in sorted(folder.glob(f"*/{bundles.MANIFEST}")):
        found = bundles.load(path.parent)
        own = work / slug(f"edgetube {found.target}")
        whole = found.spec.reduction is None and not found.spec.left_out
        if whole and found.checkpoint["source"] == source(work) and not (own / "bundle").is_dir():
            shutil.copytree(found.path, own / "bundle")


def build(work: Path, name: str) -> None:
    """Build one recipe's files and compare its logits; the result is in `built.json`."""
    own = work / slug(name)
    own.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--work", str(work), "--build-one", name]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        code, words = done.returncode, (done.stderr or done.stdout).strip().splitlines()
    except subprocess.TimeoutExpired:
        code, words = 1, [f"not done after {PATIENCE} s"]
    found = json.loads((own / "judged.json").read_text()) if code == 0 else {"failed": _last(words)}
    found["build_seconds"] = time.perf_counter() - start
    (own / "built.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{name}: {found}", flush=True)


def _last(words: list[str]) -> str:
    """The last line that names an error."""
    named = [line.strip() for line in words if "Error" in line.split(":")[0]]
    return (named or words or ["it said nothing"])[-1][:160]


def build_one(work: Path, name: str) -> None:
    """In a process of its own."""
    recipe, own = RECIPES[name], work / slug(name)
    if recipe.build is not None:
        recipe.build(work, own)
    call = recipe.load(work, own)
    logits = np.concatenate([call(clip[None]) for clip in clips(work)])
    found: dict[str, Any] = {"size_mb": _megabytes(own)}
    if recipe.same:
        found["sqnr_db"] = min(EQUAL, float(metrics.sqnr(np.load(work / "logits.npy"), logits)))
    (own / "judged.json").write_text(json.dumps(found))


def _megabytes(own: Path) -> float | None:
    files = [f for f in own.rglob("*") if f.is_file() and f.suffix not in (".json", ".npz")]
    return sum(f.stat().st_size for f in files) / 1e6 or None


def measure(work: Path, group: str, seconds: float) -> None:
    """Time one group, with the yardstick in it; `timed-<group>.json` has the rows."""
    names = [n for n, c in RECIPES.items() if c.group == group and "failed" not in _built(work, n)]
    names = list(dict.fromkeys([YARDSTICK, *names]))
    candidates = [
        latency.Candidate(name, "edgetube.bench.studies.peers.recipes:open_recipe", {"name": name, "work": str(work)})
        for name in names
    ]
    rows = latency.run_interleaved(
        candidates, latency.Options(seconds=seconds, warm=WARM, starts=1), lambda stage, done, total: None
    )
    document = {"group": group, "machine": machine.describe(), "rows": rows}
    (work / f"timed-{slug(group)}.json").write_text(json.dumps(document, indent=1) + "\n")


def _built(work: Path, name: str) -> dict[str, Any]:
    path = work / slug(name) / "built.json"
    return json.loads(path.read_text()) if path.is_file() else {"failed": MISSING}


def collect(work: Path) -> dict[str, Any]:
    """All measurements, as one document."""
    groups = []
    for group in dict.fromkeys(c.group for c in RECIPES.values()):
        path = work / f"timed-{slug(group)}.json"
        timed = json.loads(path.read_text()) if path.is_file() else {"rows": [], "machine": None}
        times = {row["name"]: row for row in timed["rows"]}
        names = [n for n, c in RECIPES.items() if c.group == group]
        names = list(dict.fromkeys([YARDSTICK, *names]))
        rows = [_row(name, RECIPES[name], _built(work, name), times.get(name, {})) for name in names]
        groups.append({"group": group, "machine": timed["machine"], "contestants": rows})
    packages = sorted({p for c in RECIPES.values() for p in c.packages})
    return {"checkpoint": source(work), "versions": {p: _version(p) for p in packages}, "groups": groups}


def _row(name: str, recipe: Recipe, built: dict[str, Any], timed: dict[str, Any]) -> dict[str, Any]:
    keys = ("p50_ms", "p50_low_ms", "p50_high_ms", "p90_ms", "p99_ms", "runs", "noise", "throughput", "cold_start_ms")
    row = {"name": name, "precision": recipe.precision, "latency_only": not recipe.same}
    row |= {key: built.get(key) for key in ("failed", "sqnr_db", "size_mb", "build_seconds")}
    row["sqnr_db"] = None if row["sqnr_db"] is None else min(EQUAL, row["sqnr_db"])
    return row | {key: timed.get(key) for key in (*keys, "peak_mb", "reason")}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def table(document: dict[str, Any]) -> str:
    """Markdown."""
    lines = []
    for group in document["groups"]:
        yardstick = next((r["p50_ms"] for r in group["contestants"] if r["name"] == YARDSTICK), None)
        lines += ["", f"### {group['group'][0].upper()}{group['group'][1:]}", ""]
        lines += ["| candidate | computes in | p50 ms | 95 % interval | against edgetube onnx-fp32 | SQNR dB | cold start s | memory MB | files MB |"]  # fmt: skip  # noqa: E501
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for row in group["contestants"]:
            lines.append(_line(row, yardstick))
        if group["machine"]:
            lines += ["", _wrapped(f"{group['machine']}.")]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    return "\n".join([*lines, "", _wrapped(f"All of them: {versions}.")]).strip()


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _line(row: dict[str, Any], yardstick: float | None) -> str:
    name, quality = row["name"], "latency only" if row["latency_only"] else _decibels(row["sqnr_db"])
    if row["p50_ms"] is None:
        why = row["failed"] or row["reason"] or MISSING
        why = why if why == MISSING else f"failed: {why.replace('|', '/')}"
        return f"| {name} | {row['precision']} | {why} | | | {quality} | | | {_number(row['size_mb'])} |"
    ratio = f"{yardstick / row['p50_ms']:.2f}x" if yardstick else ""
    interval = f"{row['p50_low_ms']:.0f} - {row['p50_high_ms']:.0f}"
    rest = f"{row['cold_start_ms'] / 1e3:.1f} | {_number(row['peak_mb'])} | {_number(row['size_mb'])}"
    return f"| {name} | {row['precision']} | {row['p50_ms']:.0f} | {interval} | {ratio} | {quality} | {rest} |"


def _decibels(value: float | None) -> str:
    return "equal" if value is not None and value >= EQUAL else _number(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def write(document: dict[str, Any], path: Path) -> None:
    """The JSON, and the section of the benchmarks between its two marks."""
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    text = DOCUMENT.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{table(document)}\n\n{END}{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is built and measured")
    parser.add_argument("--checkpoint", default="random:tubevit-b")
    parser.add_argument("--bundles", type=Path, help="folder of exported bundles of the checkpoint; else they are made")
    parser.add_argument("--step", choices=("build", "time", "write"), action="append")
    parser.add_argument("--only", action="append", help="recipes to build; all that were not built if left out")
    parser.add_argument("--group", action="append", help="groups to time; all if left out")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing, per candidate")
    parser.add_argument("--json", type=Path, help="write the numbers there, and the table into docs/benchmarks.md")
    parser.add_argument("--build-one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.build_one:
        build_one(args.work, args.build_one)
        return
    steps = args.step or ["build", "time", "write"]
    if "build" in steps:
        if not (args.work / "logits.npy").is_file():
            prepare(args.work, args.checkpoint)
        if args.bundles:
            adopt(args.work, args.bundles)
        for name in args.only or [n for n in RECIPES if not (args.work / slug(n) / "built.json").is_file()]:
            build(args.work, name)
    if "time" in steps:
        for group in args.group or dict.fromkeys(c.group for c in RECIPES.values()):
            measure(args.work, group, args.seconds)
    if "write" in steps:
        document = collect(args.work)
        print(table(document))
        if args.json:
            write(document, args.json)


if __name__ == "__main__":
    main()
