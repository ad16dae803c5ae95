"""How many clips the statistics of INT8 need: SQNR on the judging clips by the number of calibration clips.

    python bench/studies/enough_clips.py demo --json docs/int8.json
    python bench/studies/enough_clips.py random:tubevit-ti --depth 3 [--outliers] --judging 48 --json docs/int8.json

The clips are the first of those that an export draws. `--outliers` makes a few channels of every LayerNorm much larger
than the others, and a few weights that read them smaller, as trained encoders have them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgetube import export, processes
from edgetube.bench import machine
from edgetube.bench.studies.int8 import keep
from edgetube.calibration import calibrate, search
from edgetube.calibration.clips import Clips, collect
from edgetube.export import canonical, int8, static
from edgetube.model import checkpoints
from edgetube.model.checkpoints import Checkpoint
from edgetube.model.transformer import VideoTransformer

TARGET = "onnx-int8"


def shortened(checkpoint: Checkpoint, depth: int) -> Checkpoint:
    """The checkpoint with its first blocks alone."""
    model = VideoTransformer(replace(checkpoint.spec, depth=depth)).eval()
    found = model.state_dict()
    model.load_state_dict({name: value for name, value in checkpoint.model.state_dict().items() if name in found})
    return replace(checkpoint, model=model)


def plant_outliers(checkpoint: Checkpoint) -> None:
    """Make two channels of every LayerNorm of a block 40 and 20 times larger, and one 25 larger; in place."""
    generator = torch.Generator().manual_seed(3)
    width = checkpoint.spec.width
    blocks: Any = checkpoint.model.blocks
    with torch.no_grad():
        for block in blocks:
            for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                norm.weight.copy_(torch.rand(width, generator=generator) + 0.5)
                norm.bias.copy_(torch.randn(width, generator=generator) * 0.3)
                norm.bias[11] += 25
                for channel, factor in ((5, 40), (width // 2, 20)):
                    norm.weight[channel] *= factor
                    linear.weight[:, channel] /= factor / 2
                linear.bias.copy_(torch.randn(linear.bias.shape, generator=generator) * 0.1)


def some(clips: Clips, names: Collection[str]) -> Clips:
    """The clips that are called `names`."""
    chosen = [index for index, name in enumerate(clips.names) if name in names]
    frames = np.stack([clips.frames[index] for index in chosen])
    return replace(clips, frames=frames, labels=clips.labels[chosen], names=tuple(clips.names[i] for i in chosen))


def measure(checkpoint: Checkpoint, counts: list[int], judging: int, folder: Path) -> list[dict[str, Any]]:
    """One row for each number of calibration clips."""
    module = static.StaticTransformer(checkpoint.model, checkpoint.contract, "gather")
    graph = canonical.trace(module, checkpoint.spec, checkpoint.contract)
    source, others = int8.sources(checkpoint, None)
    others = replace(others, items=others.items[:judging])
    seen, judged = (
        collect(clips, checkpoint.contract, checkpoint.labels, folder, workers=processes.workers(), keep=True)
        for clips in (source, others)
    )
    exact = search.compute_logits(graph.model, judged, export.evaluator(), "float answers")
    rows, target = [], export.target(TARGET)
    for wanted in counts:
        begin, chosen = time.process_time(), some(seen, {item.name for item in source.items[:wanted]})
        count = len(chosen)
        report = calibrate(
            graph.model,
            graph.roles,
            chosen,
            judged,
            export.evaluator(),
            activations=int8.activation_scheme(target),
            form=int8.integer_format(target),
            workspace=folder,
            cache=folder / f"cache-{count}",
            max_drop=100.0,
            float_logits=exact,
        ).report
        errors = [linear["held_out_error"] for linear in report["linears"].values()]
        rows.append(
            {
                "clips": count,
                "rows_per_channel": count
                * checkpoint.spec.sequence
                / max(checkpoint.spec.width, checkpoint.spec.hidden),
                "sqnr_db": report["judged"]["sqnr"],
                "linears_db": float(-10 * np.log10(np.mean(errors))),
                "processor_seconds": time.process_time() - begin,
            }
        )
    return rows


def text(found: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"{found['checkpoint']}, depth {found['depth']}, {found['judging']} judging clips; {found['machine']}",
        "",
        "| clips | rows for each channel | SQNR dB | linears, held out: dB | processor s |",
        "|---|" + "---|" * 4,
    ]
    lines += [
        f"| {r['clips']} | {r['rows_per_channel']:.1f} | {r['sqnr_db']:.2f} | {r['linears_db']:.2f} "
        f"| {r['processor_seconds']:.0f} |"
        for r in found["rows"]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="demo or random:NAME")
    parser.add_argument("--counts", type=int, nargs="+", default=[12, 24, 48, 96, int8.CALIBRATION_CLIPS])
    parser.add_argument("--judging", type=int, default=int8.JUDGING_CLIPS)
    parser.add_argument("--depth", type=int, help="blocks to keep, all by default")
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--json", type=Path, help="where to write the table")
    given = parser.parse_args()
    checkpoint = checkpoints.load(given.checkpoint)
    checkpoint = shortened(checkpoint, given.depth) if given.depth else checkpoint
    if given.outliers:
        plant_outliers(checkpoint)
    with tempfile.TemporaryDirectory(prefix="edgetube.") as folder:
        rows = measure(checkpoint, given.counts, given.judging, Path(folder))
    found = {
        "machine": machine.describe(),
        "checkpoint": given.checkpoint + (" with outliers" if given.outliers else ""),
        "depth": checkpoint.spec.depth,
        "judging": given.judging,
        "rows": rows,
    }
    if given.json:
        keep(given.json, f"enough clips {found['checkpoint']}", found)
    print(text(found))


if __name__ == "__main__":
    main()
