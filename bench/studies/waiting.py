"""How long exports take, and where the time goes: seconds and processor seconds of every stage.

    python bench/studies/waiting.py random:tubevit-ti random:tubevit-b --json docs/int8.json

Each export runs in a process of its own, with an empty output folder and, unless `--keep-cache`, an empty cache folder.
A stage is what the export reports as progress; the time before its first report has a row of its own. Processor seconds
are user and system time of the process; those of the processes that it has started and that have ended, which read
clips, are a row of their own, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from edgetube.bench import machine
from edgetube.bench.studies.int8 import keep
from edgetube.files import atomic_write

END, CHILDREN = "the end", "in processes that read clips"

Times = dict[str, tuple[float, float]]
"""Stage -> seconds, processor seconds."""


class StageTimer:
    """A progress callback that adds up the time of each stage.

    Attributes:
        times: so far, in the order of the stages' first reports.
    """

    def __init__(self) -> None:
        self.times: Times = defaultdict(lambda: (0.0, 0.0))
        self._last = _now()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now, last = _now(), self._last
        self._add(stage if done else f"before {stage}", now[0] - last[0], now[1] - last[1])
        self._add(CHILDREN, 0.0, now[2] - last[2])
        self._last = now

    def _add(self, name: str, wall: float, processor: float) -> None:
        before = self.times[name]
        self.times[name] = before[0] + wall, before[1] + processor


def _now() -> tuple[float, float, float]:
    """Seconds; processor seconds of this process; those of its children that have ended."""
    spent = os.times()
    return time.perf_counter(), sum(spent[:2]), sum(spent[2:4])


def export_here(model: str, target: str, out: Path, calib: Path | None) -> dict[str, Any]:
    """Export in this process; the record of one row of the table."""
    from edgetube.export.pipeline import Options, export_model

    begin, timer = _now(), StageTimer()
    bundle = export_model(target, model, out, Options(calib=calib), timer)
    timer(END, 0, 1)
    end = _now()
    return {
        "model": model,
        "target": target,
        "seconds": end[0] - begin[0],
        "processor_seconds": sum(end[1:]) - sum(begin[1:]),
        "judged": bundle.build.get("int8", {}).get("judged"),
        "stages": {
            name: {"seconds": wall, "processor_seconds": processor}
            for name, (wall, processor) in sorted(timer.times.items(), key=lambda item: -item[1][1])
        },
    }


def measure(model: str, target: str, calib: Path | None, keep_cache: bool) -> dict[str, Any]:
    """Export in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="edgetube.") as folder:
        record = Path(folder) / "record.json"
        options = ["--calib", str(calib)] if calib else []
        environment = dict(os.environ)
        if not keep_cache:
            environment["EDGETUBE_CACHE"] = str(Path(folder) / "cache")
        command = [sys.executable, __file__, model, "--target", target, *options, "--one", str(record)]
        subprocess.run(command, env=environment, check=True)
        found: dict[str, Any] = json.loads(record.read_text("utf-8"))
        return found


def show(found: dict[str, Any]) -> None:
    """Print one export as a table."""
    print(f"{found['model']} {found['target']}: {found['seconds']:.0f} s, {found['processor_seconds']:.0f} processor s")
    for name, spent in found["stages"].items():
        print(f"  {name:30} {spent['seconds']:8.1f} s {spent['processor_seconds']:8.1f} processor s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="as for edgetube export --checkpoint")
    parser.add_argument("--target", default="onnx-int8")
    parser.add_argument("--calib", type=Path, help="as for edgetube export")
    parser.add_argument("--keep-cache", action="store_true", help="use the cache folder of this machine")
    parser.add_argument("--json", type=Path, help="where to write the tables")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        with tempfile.TemporaryDirectory(prefix="edgetube.") as folder:
            found = export_here(given.models[0], given.target, Path(folder), given.calib)
        atomic_write(given.one, json.dumps(found))
        return
    rows = []
    for model in given.models:
        rows.append(measure(model, given.target, given.calib, given.keep_cache))
        show(rows[-1])
    if given.json:
        keep(given.json, "waiting", {"machine": machine.describe(), "exports": rows})


if __name__ == "__main__":
    main()
