"""The time of one clip with fewer tokens, on this machine: one model, several numbers of tokens, candidates in turns.

    python bench/studies/fewer_tokens.py [--checkpoint random:tubevit-b] [--keep 251 155] [--target onnx-fp32 ...]
        [--reduce merge] [--json FILE]

Float targets only, and nothing is proven: `edgetube export --keep-tokens` does that, and `edgetube parity` tells what
fewer tokens cost in answers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from edgetube import export, formats, reduction, runtimes
from edgetube.bench.latency import Timing, interleave
from edgetube.bench.machine import describe, versions
from edgetube.bundle import Bundle
from edgetube.export.build import Builder
from edgetube.files import atomic_write
from edgetube.model.checkpoints import Checkpoint
from edgetube.progress import silent
from edgetube.spec import ModelSpec


def built(checkpoint: Checkpoint, targets: list[str], folder: Path) -> Iterator[Bundle]:
    """Bundles of one checkpoint for float targets, not proven."""
    builder = Builder(checkpoint, 1, silent)
    for name in targets:
        target = export.target(name)
        (place := folder / f"{name}.{checkpoint.spec.left}").mkdir()
        bundle, _ = builder.build(place, target, builder.graph(target.lowering))
        yield bundle
    builder.close()


def encoder_macs(spec: ModelSpec) -> int:
    """Multiply-accumulates of a clip without those of the tubes."""
    return spec.macs() - spec.tokenizer_macs()


def tell(timings: dict[str, Timing], specs: dict[str, ModelSpec]) -> None:
    """Print the table; each target's rows are against its own first one."""
    print("\n| target | tokens left | encoder work | p50 ms | p10 - p90 | times as fast |\n|---|---|---|---|---|---|")
    first: dict[str, str] = {}
    for name, found in timings.items():
        target, spec = name.split()[0], specs[name]
        plain = first.setdefault(target, name)
        work = encoder_macs(specs[plain]) / encoder_macs(spec)
        speed = timings[plain].p50_ms / found.p50_ms
        spread = f"{found.p10_ms:.0f} - {found.p90_ms:.0f}"
        print(f"| `{target}` | {spec.left} | 1 / {work:.2f} | {found.p50_ms:.0f} | {spread} | {speed:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="random:tubevit-b")
    parser.add_argument("--keep", nargs="+", default=["251", "155"])
    parser.add_argument("--target", nargs="+", default=["onnx-fp32", "openvino-fp32"])
    parser.add_argument("--reduce", choices=["merge", "drop"], default="merge")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timed calls of each row")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    trained = formats.load(asked.checkpoint)
    spec = trained.spec
    kept = [reduction.parse(text, asked.reduce, spec.tokens, spec.depth) for text in asked.keep]
    clip = np.random.default_rng(0).integers(0, 256, (1, *trained.contract.shape), np.uint8)
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        bundles = [
            bundle for each in (None, *kept) for bundle in built(trained.reduced(each), asked.target, Path(place))
        ]
        calls = {
            f"{b.target} {b.spec.left}": partial(stack.enter_context(runtimes.open_bundle(b)), clip) for b in bundles
        }
        timings = interleave(calls, seconds=asked.seconds)
    specs = {f"{b.target} {b.spec.left}": b.spec for b in bundles}
    tell(dict(sorted(timings.items(), key=lambda item: asked.target.index(item[0].split()[0]))), specs)
    if asked.json:
        rows = {
            name: {**timing.to_json(), "encoder_macs": encoder_macs(specs[name]), "macs": specs[name].macs()}
            for name, timing in timings.items()
        }
        document = {
            "checkpoint": asked.checkpoint,
            "reduce": asked.reduce,
            "machine": describe(),
            "versions": versions(),
            "latency": rows,
        }
        atomic_write(asked.json, json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
