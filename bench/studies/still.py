"""The novelty gate on what fixed cameras see: how much work it saves, and which answers it costs.

    python bench/studies/still.py [--bundle out/demo.onnx-fp32] [--film FILE] [--json bench/results/still.json]
    python bench/studies/still.py --plot FILE.png
    python bench/studies/still.py --cost

The built-in model answers every window of rendered films and of the shipped videos; gates with several thresholds run
beside it, and where one would have skipped a window, the answer that is repeated is compared with the model's own.
Films are made of the evaluation photographs, at the size of the model's input, so that their noise is the noise that
the gate sees: a camera of 480 x 640 whose frames are resized to 224 x 224 has about 0.4 of its noise left there.

* *still*: one picture, with sensor noise, flicker of the light and a slow drift of the exposure.
* *movers*: the same, and a disc of another photograph that crosses it now and then.
* *moves*: a camera that stands still for 4 s, makes one of the built-in moves, stands still, and goes elsewhere.
* *built-in clips*: the evaluation clips one after the other; they are moving, noisy, or both.
* the shipped videos.
* each recording of `--film`: whole, and nine parts of a quarter of its height and width as if each were a camera: its
  four corners, where less happens, and between them.

`--cost` prints the processor time of the gate on one clip of TubeViT-S. `--plot` draws the scores, the spans and the
gate of one film of *moves*.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetube import demo, metrics, resize, video
from edgetube.bench import machine, temporal
from edgetube.contract import InputContract
from edgetube.demo.moves import LABELS, Move
from edgetube.demo.render import Photo, generator, render_clip
from edgetube.errors import EdgetubeError
from edgetube.files import atomic_write, replacing
from edgetube.live.decisions import Decider, DecisionRule, Span
from edgetube.live.novelty import THRESHOLD, NoveltyGate
from edgetube.live.scheduler import clips
from edgetube.live.source import FrameSource
from edgetube.live.window import Window
from edgetube.resize import Frames
from edgetube.runtime import Runtime
from edgetube.spec import ModelSpec, named

THRESHOLDS = (2.0, 3.0, THRESHOLD, 6.0, 8.0)
PHOTOS, CLIPS = 3, 252
"""Photographs that are filmed; evaluation clips that are shown one after the other."""

NOISES = (0.0, 1.0, 2.0, 3.0)
"""Sigma of the sensor noise at the model's input, in grey levels."""

FLICKER, DRIFT, DRIFT_SECONDS = 0.003, 0.03, 60.0
"""Sigma of the gain from frame to frame; amplitude and period of its slow change."""

SECONDS, EVERY, CROSSING = 60.0, (8.0, 16.0), (2.0, 5.0)
"""Length of a film; seconds between two movers, and that one needs to cross."""

RADIUS = (0.06, 0.25)
"""Of a mover, in frame heights."""

STAND, SEGMENTS = 4.0, 8
"""Seconds that the camera of *moves* stands still before and after each move; moves of one film."""

RULE = DecisionRule(tau=0.3, minimum=0.25, labels={"static": None})
COST_FRAMES = (8, 16, 32)
COST_CALLS = 200
PICTURE = 50.0
"""Seconds that the picture shows."""

Floats = npt.NDArray[np.float32]
TimedFrame = tuple[float, Frames]
"""(seconds, frame (H, W, 3) uint8)."""

Film = Callable[[], Iterator[TimedFrame] | Path]


# --------------------------------------------------------------------------------------------------------------- films


def sensor(pictures: Iterator[Floats], fps: float, noise: float, rng: np.random.Generator) -> Iterator[TimedFrame]:
    """(seconds, frame (H, W, 3) uint8) of pictures (H, W, 3) float32 in grey levels, as a cheap camera records them."""
    for i, picture in enumerate(pictures):
        gain = 1 + DRIFT * np.sin(2 * np.pi * i / fps / DRIFT_SECONDS) + FLICKER * rng.standard_normal()
        light = picture * np.float32(gain) + rng.standard_normal(picture.shape, np.float32) * np.float32(noise)
        yield i / fps, np.clip(light + 0.5, 0, 255).astype(np.uint8)


def still(photo: Photo, contract: InputContract, fps: float) -> Iterator[Floats]:
    picture = resize.spatial(photo.pixels[None], contract)[0].astype(np.float32)
    for _ in range(round(SECONDS * fps)):
        yield picture


def movers(
    photo: Photo, other: Photo, contract: InputContract, fps: float, rng: np.random.Generator
) -> Iterator[Floats]:
    """The picture, and discs of `other` that cross it along straight lines, one at a time."""
    texture = resize.spatial(other.pixels[None], contract)[0].astype(np.float32)
    height, width = contract.height, contract.width
    y, x = np.mgrid[:height, :width].astype(np.float32)
    begins = rng.uniform(*EVERY)
    ends, radius, path = begins, 0.0, np.zeros((2, 2))
    for i, picture in enumerate(still(photo, contract, fps)):
        now = i / fps
        if now >= begins and ends <= begins:  # a new one
            ends, radius = begins + rng.uniform(*CROSSING), height * rng.uniform(*RADIUS)
            sides = rng.permutation([(-radius, width + radius), (width + radius, -radius)])[0]
            path = np.stack([sides, rng.uniform(0, height, 2)])
        if begins <= now < ends:
            at = path[:, 0] + (path[:, 1] - path[:, 0]) * (now - begins) / (ends - begins)
            cover = np.clip(radius + 0.5 - np.hypot(x - at[0], y - at[1]), 0, 1)[..., None]
            shift = (round(float(at[1])), round(float(at[0])))
            yield picture + cover * (np.roll(texture, shift, axis=(0, 1)) - picture)
        else:
            if now >= ends > begins:
                begins = ends + rng.uniform(*EVERY)
                ends = begins
            yield picture


def moves(photo: Photo, contract: InputContract, fps: float, rng: np.random.Generator) -> Iterator[Floats]:
    size, stand = (contract.height, contract.width), round(STAND * fps)
    for index in range(SEGMENTS):
        label = LABELS[1 + (index + int(rng.integers(8))) % 8]
        move = replace(Move.draw(label, rng), noise=0.0, flicker=0.0, exposure=0.0)
        move = replace(move, shake=0 * move.shake)  # a tripod
        clip = render_clip(photo, move, contract.frames, size, rng).astype(np.float32)
        yield from [clip[0]] * stand
        yield from clip
        yield from [clip[-1]] * stand


def films(contract: InputContract, recorded: Sequence[Path] = ()) -> Iterator[tuple[str, float | None, Film]]:
    """(scene, noise, film) of each film."""
    fps = contract.fps or 25.0
    photos = demo.photos(demo.EVALUATION)[:PHOTOS]
    for noise in NOISES:
        for i, photo in enumerate(photos):
            rng = generator(f"still/{noise}", i)
            shown: dict[str, Callable[[], Iterator[Floats]]] = {
                "still": partial(still, photo, contract, fps),
                "movers": partial(movers, photo, photos[(i + 1) % len(photos)], contract, fps, rng),
                "moves": partial(moves, photo, contract, fps, rng),
            }
            for scene, pictures in shown.items():
                yield scene, noise, partial(_filmed, pictures, fps, noise, rng)
    yield "built-in clips", None, partial(_joined, contract, fps)
    for name, path in demo.videos().items():
        yield f"{name}.mp4", None, partial(Path, path)
    for path in recorded:
        yield path.name, None, partial(Path, path)
        for row, column in itertools.product(range(3), repeat=2):
            place = "corners" if row != 1 and column != 1 else "between them"
            yield f"{path.name}, {place}", None, partial(_part, path, row / 2, column / 2)


def _part(path: Path, top: float, left: float) -> Iterator[TimedFrame]:
    """A sixteenth of a recording's frames; `top` and `left` are shares of the way that it can go."""
    for seconds, frame in video.frames(path):
        height, width = (length // 4 for length in frame.shape[:2])
        y, x = round(3 * top * height), round(3 * left * width)
        yield seconds, frame[y : y + height, x : x + width]


def _filmed(
    pictures: Callable[[], Iterator[Floats]], fps: float, noise: float, rng: np.random.Generator
) -> Iterator[TimedFrame]:
    return sensor(pictures(), fps, noise, rng)


def _joined(contract: InputContract, fps: float) -> Iterator[TimedFrame]:
    """The evaluation clips as one film."""
    frames = (frame for clip in demo.evaluation(contract, CLIPS) for frame in clip.frames)
    return ((i / fps, frame) for i, frame in enumerate(frames))


# ----------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Row:
    """One gate on all films of one scene and noise.

    Attributes:
        windows, answered: how many there were, and how many needed inference.
        less_work: windows / answered.
        flips_percent: windows whose repeated answer has another class than the model's own.
        onsets, missed: changes of the model's own class, and those that the gated answers do not show.
        delay_mean_s, delay_max_s: of the changes that they show.
        spans, spans_shared: spans from the model's own answers, and those that the gated answers have, too.
    """

    scene: str
    noise: float | None
    threshold: float
    windows: int
    answered: int
    less_work: float
    flips_percent: float
    onsets: int
    missed: int
    delay_mean_s: float | None
    delay_max_s: float | None
    spans: int
    spans_shared: int


Watched = tuple[list[temporal.Gating], temporal.Follower, npt.NDArray[np.float64]]


def watch(rt: Runtime, frames: Iterator[TimedFrame] | Path) -> Watched:
    """Every gate on one film, and the model on all of its windows."""
    every = temporal.Follower(RULE, rt.labels)
    gates = [
        temporal.Gating(NoveltyGate(rt.bundle.spec, level), [temporal.Follower(RULE, rt.labels)])
        for level in THRESHOLDS
    ]
    times = []
    with FrameSource(frames) as film:
        for clip in clips(film, Window(rt.contract)):
            times.append(clip.end or 0.0)
            logits = rt(clip.frames[None])[0]
            every.push(times[-1], logits)
            for gate in gates:
                gate.push(clip, times[-1], [logits])
    for follower in (every, *(gate.followers[0] for gate in gates)):
        follower.finish()
    return gates, every, np.array(times)


def rows(scene: str, noise: float | None, watched: Sequence[Watched]) -> Iterator[Row]:
    """The films of one scene together, one row a threshold."""
    for place, level in enumerate(THRESHOLDS):
        windows = answered = onsets = missed = spans = shared = 0
        flips, delays, largest = 0.0, [], []
        for gates, every, times in watched:
            gate = gates[place]
            (found,) = gate.result(["model"], [every], times, decided=True).models
            windows, answered = windows + gate.windows, answered + gate.windows - gate.skipped
            own = len(temporal.runs(every.classes)) - 1
            onsets, missed, flips = onsets + own, missed + found.missed, flips + found.flips * gate.windows
            if found.onset_delay_mean_s is not None and found.onset_delay_max_s is not None:
                delays += [found.onset_delay_mean_s] * (own - found.missed)
                largest.append(found.onset_delay_max_s)
            assert found.spans is not None
            spans, shared = spans + len(every.spans), shared + found.spans.shared
        yield Row(
            scene, noise, level, windows, answered, windows / answered, 100 * flips / windows, onsets, missed,
            float(np.mean(delays)) if delays else None, max(largest, default=None), spans, shared,
        )  # fmt: skip


def measure(rt: Runtime, recorded: Sequence[Path] = ()) -> list[Row]:
    watched: dict[tuple[str, float | None], list[Watched]] = {}
    for scene, noise, film in films(rt.contract, recorded):
        print(f"{scene}, noise {noise}", file=sys.stderr)
        watched.setdefault((scene, noise), []).append(watch(rt, film()))
    return [row for (scene, noise), one in watched.items() for row in rows(scene, noise, one)]


def cost(spec: ModelSpec) -> dict[str, Any]:
    """Processor milliseconds of `changed` on one clip after another, of several clips that do not fit in a cache."""
    gate, rng = NoveltyGate(spec), np.random.default_rng(0)
    clips = [rng.integers(0, 256, gate.shape, np.uint8) for _ in range(8)]
    gate.answered(clips[0], 0.0)
    began = time.process_time()
    for i in range(COST_CALLS):
        gate.changed(clips[i % len(clips)], 1.0)
    spent = time.process_time() - began
    return {"clip": list(spec.clip), "values": gate.compared, "ms": 1e3 * spent / COST_CALLS}


def costs() -> list[dict[str, Any]]:
    """For clips of 8, 16 and 32 frames of 224 x 224: those of the paper's tubes that fit into them."""
    base = named("tubevit-s")
    found = []
    for frames in COST_FRAMES:
        fits = tuple(tube for tube in base.tubes if tube.minimum()[0] <= frames)
        found.append(cost(replace(base, tubes=fits, frames=frames)))
    return found


# ------------------------------------------------------------------------------------------------------------- picture


def timeline(path: Path, rt: Runtime) -> Path:
    """Scores, smoothed scores, spans and the gate of the first minute of one film of *moves*."""
    from matplotlib.figure import Figure

    fps, rng = rt.contract.fps or 25.0, generator("still/picture", 0)
    photo = demo.photos(demo.EVALUATION)[0]
    frames = sensor(moves(photo, rt.contract, fps, rng), fps, 1.5, rng)
    decider, gate = Decider(RULE, rt.labels), NoveltyGate(rt.bundle.spec)
    times, scores, smoothed, answered = list[float](), [], [], list[bool]()
    spans = list[Span]()
    with FrameSource(frames) as film:
        for clip in clips(film, Window(rt.contract)):
            now = clip.end or 0.0
            if now > PICTURE:
                break
            if needed := gate.changed(clip.frames, now):
                logits = rt(clip.frames[None])[0]
                gate.answered(clip.frames, now)
            events = decider.push(now, logits)
            spans += [event.span for event in events if event.kind == "closed"]
            times.append(now)
            scores.append(metrics.softmax(logits))
            smoothed.append(decider.smoothed)
            answered.append(needed)
    spans += [event.span for event in decider.flush()]
    raw, mean = np.array(scores), np.array(smoothed)
    shown = [i for i, label in enumerate(rt.labels) if any(span.label == label for span in spans)]
    figure = Figure(figsize=(11, 4.6), dpi=110, facecolor="white", layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(5, 2, 0.6))
    colours = {i: f"C{place}" for place, i in enumerate(shown)}
    for i in shown:
        top.plot(times, raw[:, i], color=colours[i], linewidth=0.6, alpha=0.6)
        top.plot(times, mean[:, i], color=colours[i], linewidth=2, label=rt.labels[i])
        own = [span for span in spans if span.label == rt.labels[i]]
        middle.barh([rt.labels[i]] * len(own), [s.seconds for s in own], left=[s.start for s in own], color=colours[i])
    for level, name in ((RULE.enter, "enter"), (RULE.leave, "leave")):
        top.axhline(level, color="0.5", linewidth=0.8, linestyle="--")
        top.text(0.2, level, name, color="0.4", size=9, va="bottom")
    top.set(ylabel="score", ylim=(0, 1.02), title="thin: scores; thick: smoothed")
    middle.set(ylabel="spans")
    bottom.bar(times, 1.0, width=0.27, color=["0.2" if one else "0.88" for one in answered])
    saved = 100 * (1 - sum(answered) / len(answered))
    bottom.set(yticks=[], xlabel=f"seconds; bottom: windows that were answered (dark), {saved:.0f} % skipped")
    with replacing(path) as part:
        figure.savefig(part, format="png")
    return path


# ---------------------------------------------------------------------------------------------------------------- main


def table(found: Sequence[Row]) -> str:
    """Markdown."""

    def cell(value: float | None, form: str, unit: str = "") -> str:
        return "–" if value is None else format(value, form) + unit

    columns = [
        "film", "noise", "threshold", "windows", "less work", "flips", "changes", "missed", "mean delay",
        "largest delay", "spans kept",
    ]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in found:
        lines.append(
            f"| {row.scene} | {cell(row.noise, 'g')} | {row.threshold:g} | {row.windows} | {row.less_work:.1f} x | "
            f"{row.flips_percent:.2f} % | {row.onsets} | {row.missed} | {cell(row.delay_mean_s, '.2f', ' s')} | "
            f"{cell(row.delay_max_s, '.2f', ' s')} | {row.spans_shared} of {row.spans} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("out/demo.onnx-fp32"))
    parser.add_argument("--film", type=Path, action="append", default=[], help="a recording of a fixed camera, too")
    parser.add_argument("--cost", action="store_true", help="Only the processor time of the gate.")
    parser.add_argument("--plot", type=Path, help="Only the picture.")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    try:
        if args.cost:
            print(json.dumps(costs(), indent=1))
            return 0
        with Runtime(args.bundle) as rt:
            if args.plot:
                timeline(args.plot, rt)
                return 0
            found = measure(rt, args.film)
        document = {
            "machine": machine.describe(),
            "bundle": args.bundle.name,
            "cost": costs(),
            "rows": [asdict(row) for row in found],
        }
        if args.json:
            atomic_write(args.json, json.dumps(document, indent=1) + "\n")
        print(table(found))
        print(document["machine"])
    except EdgetubeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
