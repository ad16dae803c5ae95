"""How much wider than what was seen should ranges of 16 bits be: answers to clips that were not seen, by the factor.

    python bench/studies/headroom.py [--film FILE ...] [--json bench/results/headroom.json]

The built-in model, calibrated once; the ranges are those of 8, 32 and 128 of its calibration clips, evenly spaced. The
graph of `qnn-w8a16`, all of whose activations have 16 bits, is simulated by ONNX Runtime and compared with the
calibrated float graph, so that the rounding of weights does not count: on `--judging` of the judging clips, and on as
many windows of the films.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgetube import calibration, export, formats, metrics
from edgetube.bench import machine
from edgetube.bench.studies.targets import films
from edgetube.calibration import graphs
from edgetube.export import int8, pairs, quantize
from edgetube.export.build import Builder
from edgetube.export.int8_build import Int8Builder
from edgetube.files import atomic_write
from edgetube.progress import silent
from edgetube.runtimes.base import Logits
from edgetube.video import Frames

TARGET = "qnn-w8a16"
CLIPS, FACTORS = (8, 32, 128), (1.0, 1.25, 1.5, 2.0, 4.0)


def answers(model: onnx.ModelProto, clips: Sequence[Frames]) -> Logits:
    """Logits (N, classes) of clips (T, H, W, 3) uint8."""
    call = export.evaluator()(graphs.extract_subgraph(model, [model.graph.output[0].name]))
    return np.concatenate([call({model.graph.input[0].name: clip[None]})[0] for clip in clips])


def compare(exact: Logits, found: Logits) -> dict[str, float]:
    return {"sqnr": metrics.sqnr(exact, found), "cosine": metrics.cosine(exact, found)}


def measure(folder: Path, paths: Sequence[Path], judging: int) -> list[dict[str, Any]]:
    """A row for each number of clips and each factor."""
    checkpoint, target = formats.load("demo"), export.target(TARGET)
    builder = Builder(checkpoint, 1, silent)
    try:
        integers = Int8Builder(builder, None, None)
        calibrated = integers._calibrate(target, folder)
        plain, table = quantize.apply(calibrated, builder.graph("gather", batch=1))
        model, (seen, judged) = plain.model, integers.clips
        request = int8.calibration_request(plain, target)
        names = dict.fromkeys([*request.tensors, *(linear.activation for linear in graphs.linears(model))])
        sets = {"judging": [judged.frames[i] for i in np.linspace(0, len(judged) - 1, judging).astype(int)]}
        if paths:
            sets["films"] = [clip.frames for clip in films(paths, judging).clips(checkpoint.contract)]
        exact = {name: answers(model, clips) for name, clips in sets.items()}
        rows = []
        for count in CLIPS:
            ranges = calibration.observe(model, [*names], seen, export.evaluator(), table.activations, most=count)
            own = replace(table, ranges={**table.ranges, **ranges})
            for factor in FACTORS:
                made = pairs.integer_pairs(model, own, headroom=factor).model
                found = {name: compare(exact[name], answers(made, clips)) for name, clips in sets.items()}
                rows.append({"clips": count, "headroom": factor, **found})
                print(rows[-1], file=sys.stderr, flush=True)
        return rows
    finally:
        builder.close()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: SQNR in dB on each set, by the factor; a column for each number of clips."""
    columns = [(name, count) for name in ("judging", "films") for count in CLIPS if name in rows[0]]
    lines = [f"| ranges times | {' | '.join(f'{name}, {count} clips' for name, count in columns)} |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for factor in FACTORS:
        of = {row["clips"]: row for row in rows if row["headroom"] == factor}
        numbers = [f"{of[count][name]['sqnr']:.1f}" for name, count in columns]
        lines.append(f"| {factor:g} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--film", type=Path, action="append", default=[])
    parser.add_argument("--judging", type=int, default=48)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.film, options.judging)
    if options.json:
        atomic_write(options.json, json.dumps({"machine": machine.describe(), "rows": rows}, indent=1) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
