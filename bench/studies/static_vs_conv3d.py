"""The static rewrite against the model as it was trained, on this machine.

    python bench/studies/static_vs_conv3d.py [--checkpoint random:tubevit-b] [--json FILE]

1. The cost of `edgetube export --target onnx-fp32` as a user pays it: seconds and peak memory of a fresh process,
   lowerings proven and timed, artifact proven on 16 clips.
2. Latency of one clip, candidates in turns in one process: PyTorch eager, ONNX Runtime on the naive export (the
   reference model itself, its Conv3d included, fed with the same uint8 frames), ONNX Runtime on edgetube's bundle.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort

from edgetube import Runtime, demo
from edgetube import bundle as bundles
from edgetube.bench.latency import Timing, interleave
from edgetube.bench.machine import describe
from edgetube.bench.studies.peers import naive
from edgetube.model import checkpoints
from edgetube.runtimes.torch import Reference


def export(source: str, out: Path) -> dict[str, Any]:
    """Run the export as a user does; wall seconds and peak memory of that process."""
    command = [sys.executable, "-c", "from edgetube.cli import main; main()", "export", "--target", "onnx-fp32"]
    start = time.perf_counter()
    subprocess.run([*command, "--checkpoint", source, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    unit = 1 if platform.system() == "Darwin" else 1024
    return {"seconds": seconds, "peak_gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9}


def tell(timings: Mapping[str, Timing], first: str, called: str, about: Mapping[str, Any], json_: Path | None) -> None:
    """Print the timings, with the speed of each candidate against that of `first`; write them to a file, too."""
    print(f"\n| candidate | p50 ms | p10 - p90 | against {called} |\n|---|---|---|---|")
    for name, t in timings.items():
        speed = timings[first].p50_ms / t.p50_ms
        print(f"| {name} | {t.p50_ms:.0f} | {t.p10_ms:.0f} - {t.p90_ms:.0f} | {speed:.2f}x |")
    if json_:
        rows = {name: timing.to_json() for name, timing in timings.items()}
        json_.write_text(json.dumps({**about, "machine": describe(), "latency": rows}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="random:tubevit-b")
    parser.add_argument("--seconds", type=float, default=15.0, help="of timing, per candidate")
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    args = parser.parse_args()
    checkpoint = checkpoints.load(args.checkpoint)
    frames = demo.golden(checkpoint.contract).frames[None]
    with tempfile.TemporaryDirectory() as folder:
        cost = export(args.checkpoint, Path(folder))
        bundle = bundles.load(Path(folder) / f"{checkpoint.name}.onnx-fp32")
        naive.export(naive.Model(checkpoint), frames, Path(folder) / "naive.onnx")
        session = ort.InferenceSession(Path(folder) / "naive.onnx")
        reference = Reference(checkpoint.model, checkpoint.contract)
        with Runtime(bundle) as rt:
            calls = {
                "PyTorch eager": partial(reference, frames),
                "ONNX Runtime, naive export (Conv3d)": partial(
                    session.run, None, {session.get_inputs()[0].name: frames}
                ),
                "ONNX Runtime, edgetube onnx-fp32": partial(rt, frames),
            }
            timings = interleave(calls, seconds=args.seconds)
    print(f"{checkpoint.name}, clip {checkpoint.contract.shape}, batch 1; {describe()}")
    print(
        f"export: {cost['seconds']:.0f} s, {cost['peak_gb']:.1f} GB peak; lowering {bundle.build['lowering']['chosen']}"
    )
    tell(timings, "PyTorch eager", "eager", {"checkpoint": checkpoint.name, "export": cost}, args.json)


if __name__ == "__main__":
    main()
