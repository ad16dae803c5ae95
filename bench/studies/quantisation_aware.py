"""Does training with fake quantisation lower what INT8 costs? The same steps with it and without it.

    python bench/studies/quantisation_aware.py --json bench/results/quantisation_aware.json

The model is trained further for one epoch on the built-in clips, twice: plainly, and with the weights and inputs of its
blocks' linears rounded as a calibration table does before it equalises anything (int8 per output channel by the largest
weight; uint8 per tensor over the range of least squares on `--calibration` clips), gradients passed straight through
(Bengio et al., 2013). Then the ranges are found again, and the model that is rounded so is compared with itself in
float on clips over photographs that neither saw.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgetube import demo, formats, metrics
from edgetube.bench import machine
from edgetube.calibration import numeric
from edgetube.calibration.observers import Histogram, least_squares
from edgetube.calibration.table import Range
from edgetube.files import atomic_write
from edgetube.model.transformer import VideoTransformer
from edgetube.runtimes.torch import Reference
from edgetube.train import loop, prepare, ranks
from edgetube.train.recipe import Recipe
from edgetube.train.run import Sources

Frames = Sequence[np.ndarray]


def linears(model: VideoTransformer) -> dict[str, nn.Linear]:
    """The linears of the blocks."""
    found = ((name, module) for name, module in model.named_modules() if name.startswith("blocks."))
    return {name: module for name, module in found if isinstance(module, nn.Linear)}


def ranges(model: VideoTransformer, reference: Reference, clips: Frames) -> dict[str, Range]:
    """The range of the input of each linear of the blocks."""
    seen = {name: Histogram() for name in linears(model)}

    def count(name: str) -> Any:
        return lambda _, inputs: seen[name].add(inputs[0].detach().cpu().numpy())

    hooks = [module.register_forward_pre_hook(count(name)) for name, module in linears(model).items()]
    for clip in clips:
        reference(clip[None])
    for hook in hooks:
        hook.remove()
    return {name: least_squares(one, "uint8") for name, one in seen.items()}


def rounded(x: Tensor, found: Range) -> Tensor:
    """Values on the 256 levels of a range; the gradient of those inside it is 1, of the others 0."""
    scale, zero = found.asymmetric
    inside = x.clamp(found.low, found.high)
    levels = ((inside.detach() / scale).round() + zero).clamp(0, 255)
    return inside + ((levels - zero) * scale - inside.detach())


def rounded_rows(weight: Tensor) -> Tensor:
    """Weights (out, in) on the 255 levels of each row; the gradient is 1."""
    scales = torch.from_numpy(numeric.absmax_scales(weight.detach().cpu().numpy().T)).to(weight)[:, None]
    return weight + ((weight.detach() / scales).round().clamp(-127, 127) * scales - weight.detach())


@contextmanager
def quantised(model: VideoTransformer, found: dict[str, Range]) -> Iterator[None]:
    """The linears of the blocks multiply what is rounded."""

    def call(module: nn.Linear, of: Range) -> Any:
        return lambda x: F.linear(rounded(x, of), rounded_rows(module.weight), module.bias)

    for name, module in linears(model).items():
        module.__dict__["forward"] = call(module, found[name])
    try:
        yield
    finally:
        for module in linears(model).values():
            del module.__dict__["forward"]


def judged(checkpoint: str, calibration: int, clips: int) -> dict[str, Any]:
    """The checkpoint whose linears are rounded, against itself."""
    loaded = formats.load(checkpoint)
    seen = [clip.frames for clip in demo.scenes(loaded.contract, calibration)]
    shown = [clip.frames for clip in demo.evaluation(loaded.contract, clips)]
    with Reference(loaded.model, loaded.contract) as reference:
        exact = np.concatenate([reference(clip[None]) for clip in shown])
        with quantised(loaded.model, ranges(loaded.model, reference, seen)):
            answers = np.concatenate([reference(clip[None]) for clip in shown])
    return {
        "clips": clips,
        "sqnr_db": metrics.sqnr(exact, answers),
        "worst_cosine": float(metrics.cosine_rows(exact, answers).min()),
        "agreement": metrics.agreement(exact, answers),
    }


def trained(args: argparse.Namespace, aware: bool, folder: Path) -> dict[str, Any]:
    """One epoch further, and what rounding costs then."""
    start = formats.load(args.checkpoint)
    task, _ = prepare.task(start, Sources(prepare.BUILT_IN, judged=args.clips), 0)
    recipe = Recipe(epochs=1, batch=16, lr=args.lr, train="all", average=0.0, warmup=0.1, smoothing=0.0)
    folder.mkdir()
    with ranks.joined("cpu") as here:
        training = loop.Training(task, recipe, folder, here)
        seen = [clip.frames for clip in demo.scenes(start.contract, args.calibration)]
        with Reference(training.model, start.contract) as reference:
            found = ranges(training.model, reference, seen)
        if aware:
            with quantised(training.model, found):
                row = training.fit().rows[-1]
        else:
            row = training.fit().rows[-1]
    kept = {key: row[key] for key in ("loss", "train_top1", "held_out_top1")}
    return kept | judged(str(folder / "last.safetensors"), args.calibration, args.clips)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--calibration", type=int, default=24, help="clips for the ranges")
    parser.add_argument("--clips", type=int, default=216, help="clips to compare")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = {"as it is": judged(args.checkpoint, args.calibration, args.clips)}
    print(rows, flush=True)
    with tempfile.TemporaryDirectory() as name:
        for title, aware in (("trained on", False), ("trained on with fake quantisation", True)):
            rows[title] = trained(args, aware, Path(name) / str(aware))
            print(title, rows[title], flush=True)
    document = {"checkpoint": args.checkpoint, "machine": machine.describe(), "rows": rows}
    if args.json:
        atomic_write(args.json, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
