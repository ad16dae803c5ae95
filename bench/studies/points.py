"""What fewer tubes, wider strides and fewer blocks cost the built-in model, in PyTorch alone: top-1, and the work.

    python bench/studies/points.py [--clips 1008] [--json bench/results/points.json]

Of the first N blocks the final norm and the head follow, as they were trained, and with a head that is fitted again:
ridge regression of the classes on the features of calibration clips, whose penalty is the best of `PENALTIES` on a
quarter of these clips that it was not fitted on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgetube import datasets, formats, metrics, reduction, tubesets
from edgetube.bench import machine
from edgetube.bench.studies.fewer_tokens import encoder_macs
from edgetube.datasets import ClipSet
from edgetube.files import atomic_write
from edgetube.model.checkpoints import Checkpoint
from edgetube.runtimes.torch import Reference, normalise
from edgetube.spec import TubeSpec

SETS = ("0,2,3", "0,1,3", "0,1,2", "1,2,3", "0,3")
"""Tubes that are left, see `edgetube.tubesets.parse`."""

WIDER = {
    "tube 0 every 16 pixels": {0: ((8, 16, 16), (0, 4, 4))},
    "tube 0 every 24 pixels": {0: ((8, 24, 24), (0, 4, 4))},
    "tube 2 once in time": {2: ((16, 16, 16), (6, 2, 2))},
    "tube 2 every 24 pixels": {2: ((8, 24, 24), (2, 2, 2))},
    "tube 0 from pixel 0": {0: ((8, 12, 12), (0, 0, 0))},
}
"""Strides and offsets of single tubes, (time, height, width)."""

KEEP = ("98", "82", "50")
PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)
TOGETHER = 16
"""Clips of one call."""

Array = npt.NDArray[np.floating[Any]]


class Clips:
    """Clips of a set in memory, and the indices of their labels."""

    def __init__(self, source: ClipSet, checkpoint: Checkpoint) -> None:
        found = list(source.clips(checkpoint.contract))
        self.frames = np.stack([clip.frames for clip in found])
        self.labels = np.array([checkpoint.labels.index(str(clip.label)) for clip in found])

    def batches(self) -> Iterator[npt.NDArray[np.uint8]]:
        for start in range(0, len(self.frames), TOGETHER):
            yield self.frames[start : start + TOGETHER]


def top1(logits: Array, clips: Clips) -> dict[str, float]:
    """Accuracy and its interval."""
    accuracy = metrics.top_k(logits, clips.labels)
    low, high = metrics.wilson(accuracy, len(logits))
    return {"top1": accuracy, "top1_low": low, "top1_high": high}


def answers(checkpoint: Checkpoint, clips: Clips) -> Array:
    with Reference(checkpoint.model, checkpoint.contract) as model:
        return np.concatenate([model(batch) for batch in clips.batches()])


def features(checkpoint: Checkpoint, clips: Clips, depth: int) -> Array:
    """What the head reads (N, F) behind the first `depth` blocks and the final norm."""
    model, found = checkpoint.model, []
    with torch.no_grad():
        for batch in clips.batches():
            tubes = model.tubes(normalise(torch.from_numpy(batch), checkpoint.contract))
            tokens = model.embed(tubes, model.position_rows())
            for block in model.blocks[:depth]:
                tokens = block(tokens)
            found.append(model.features(model.norm(tokens)).numpy())
    return np.concatenate(found)


def ridge(x: Array, labels: npt.NDArray[np.int64], classes: int, penalty: float) -> tuple[Array, Array]:
    """Weight (F, classes) and bias (classes,) of a ridge regression of the classes on features (N, F)."""
    centre, spread = x.mean(axis=0), x.std() + 1e-6
    z, target = (x - centre) / spread, 2.0 * np.eye(classes)[labels] - 1
    weight = np.linalg.solve(z.T @ z + penalty * np.eye(z.shape[1]), z.T @ target) / spread
    return weight, target.mean(axis=0) - centre @ weight


def fitted(x: Array, labels: npt.NDArray[np.int64], classes: int) -> tuple[tuple[Array, Array], float]:
    """`ridge` with the best penalty on every fourth row, and that penalty."""
    held = np.arange(len(x)) % 4 == 0
    scores = {}
    for penalty in PENALTIES:
        weight, bias = ridge(x[~held], labels[~held], classes, penalty)
        scores[penalty] = metrics.top_k(x[held] @ weight + bias, labels[held])
    best = max(PENALTIES, key=lambda penalty: (scores[penalty], penalty))
    return ridge(x, labels, classes, best), best


def block_rows(checkpoint: Checkpoint, seen: Clips, judged: Clips) -> Iterator[dict[str, Any]]:
    """The first N blocks, with the trained head and a fitted one."""
    head, trained = checkpoint.model.classifier(), checkpoint.spec
    for depth in range(trained.depth, 1, -1):
        work = encoder_macs(trained) / encoder_macs(replace(trained, depth=depth))
        x = features(checkpoint, judged, depth)
        with torch.no_grad():
            plain = head(torch.from_numpy(x)).numpy()
        known = features(checkpoint, seen, depth).astype(np.float64)
        (weight, bias), penalty = fitted(known, seen.labels, plain.shape[1])
        for kind, logits in (("trained head", plain), (f"ridge head, penalty {penalty:g}", x @ weight + bias)):
            yield {"point": f"{depth} blocks, {kind}", "tokens": trained.tokens, "work": work, **top1(logits, judged)}


def spec_rows(trained: Checkpoint, judged: Clips) -> Iterator[dict[str, Any]]:
    """Points that are values of the spec: tubes left out, tubes moved, and merged tokens to compare them with."""
    spec, named = trained.spec, dict[str, Checkpoint]()
    for text in SETS:
        named[f"tubes {text}"] = trained.with_clip(tubes=tubesets.parse(text, spec))
    for name, moved in WIDER.items():
        tubes = {i: TubeSpec(spec.tubes[i].kernel, *where, spec.tubes[i].space_to_depth) for i, where in moved.items()}
        named[name] = trained.with_clip(tubes=spec.chosen | tubes)
    for text in KEEP:
        named[f"merged to {text}"] = trained.reduced(reduction.parse(text, "merge", spec.tokens, spec.depth))
    for name, point in named.items():
        row = {"point": name, "tokens": point.spec.left, "work": encoder_macs(spec) / encoder_macs(point.spec)}
        yield row | top1(answers(point, judged), judged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1008, help="built-in clips to judge on")
    parser.add_argument("--fit", type=int, default=504, help="calibration clips that heads are fitted on")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    trained = formats.load("demo")
    seen = Clips(datasets.built_in_calibration(asked.fit, trained.labels), trained)
    judged = Clips(datasets.built_in(asked.clips, trained.labels), trained)
    rows = []
    print("| point | tokens left | encoder work | top-1 |\n|---|---|---|---|")
    for row in chain(block_rows(trained, seen, judged), spec_rows(trained, judged)):
        rows.append(row)
        share = f"{row['top1']:.1%} ({row['top1_low']:.1%} to {row['top1_high']:.1%})"
        print(f"| {row['point']} | {row['tokens']} | 1 / {row['work']:.2f} | {share} |", flush=True)
    if asked.json:
        document = {"clips": len(judged.labels), "fitted on": len(seen.labels), "machine": machine.describe()}
        atomic_write(asked.json, json.dumps({**document, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
